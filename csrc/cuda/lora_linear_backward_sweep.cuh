// The backward's sweeps, each of which reads its large operand once:
//   over dy:  g [T, r] = s'·dy·B,  dB [N, r] = s'·dyᵀ·h,  dbias [N] = sum of dy over tokens
//   over x:   dA [r, K] = gᵀ·(m⊙x), the mask drawn on the tile in shared memory
// One kernel for both, of z [T, C] (dy or x), v [T, r] (h or g) and w [C, r] (B, or nothing):
//   row product    P [T, r] = scale·z·w, summed over columns      (g)
//   token product  Q [C, r] = scale·zᵀ·v, summed over tokens      (dB; transposed, dA)
//
//               C, cut into strips of kStrip columns
//             ┌───┬───┬───┬───┬─────
//   tokens    │ ▒ │   │   │   │           a block: one strip, one span of tokens, up to 8·kRankTiles ranks
//   of one    ├───┼───┼───┼───┤           ▒ a stage: [64 tokens][128 columns] of z, [64][ranks] of v
//   span      │   │   │   │   │           P: a warp's 16 tokens, complete after a row of stages
//             ├───┼───┼───┼───┤           Q: a warp's 32 columns of each 128, in registers all the way
//             ↓                           w of the strip stays in shared memory
//
// P meets the other strips' in fp32 partial sums, Q the other spans', and a second kernel adds them in their
// order: left to whichever block comes last, as lora_linear_mixed does it, they would be the work of a few
// blocks. Each fragment of z is read from shared memory twice, once transposed; a column of ones beside v
// makes dbias.
//
// Several adapters (rows sorted by adapter): a span is a run of tiles of one adapter, cut on the device, so
// that one adapter's many rows are many spans; its Q and w are that adapter's. Q of an adapter that has one
// span goes out as it is, and spans of those that have several have slots for partial sums.
//
// Bytes: z once (for each 8·kRankTiles ranks); partial sums of 4·r·(T·C/kStrip + C·slots) bytes, written and
// read, mostly in L2. Floor: the bytes of z over the bandwidth.
#pragma once
#include "low_rank.cuh"

namespace lk::cuda::sweep {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 3;
constexpr int kMostParts = 64;

struct Output {
  Global<void> data;  // contiguous; null: not wanted
  int dtype;
};

struct Problem {
  Rows rows;
  int64_t columns;  // C
  Matrix z, v;
  Matrix w[kMostAdapters];    // [C, r] each; read where P is wanted
  Output out[kMostAdapters];  // Q [C, r], or [r, C] where `transposed`
  int rank[kMostAdapters];
  float scale[kMostAdapters];
  Dropout dropout;
  Global<uint16_t> row_out;  // P [T, row_stride], null: not wanted
  int64_t row_stride;
  Global<float> ones_out;     // [C] sums over tokens, null: not wanted; one adapter only
  Global<float> row_partial;  // [strip][T][row_stride], where there are several strips
  Global<float> partial;      // [slot][C][chunk][ranks of a chunk + 1], of adapters that have several spans
  int64_t span_rows;          // at most, a multiple of a tile
  int strips, chunks;
  bool tokens_wanted, transposed;

  __device__ __forceinline__ int64_t row_at(int strip, int64_t token, int64_t rank) const {
    return (strip * rows.count + token) * row_stride + rank;
  }
  __device__ __forceinline__ int64_t partial_at(int slot, int64_t column, int chunk, int width) const {
    return ((slot * columns + column) * chunks + chunk) * width;
  }
  template <int kDtype>
  __device__ __forceinline__ void put_row(int adapter, int64_t token, int64_t rank, float sum) const {
    row_out[rows[token] * row_stride + rank] = round_to<kDtype>(scale[adapter] * sum);
  }
  __device__ __forceinline__ void put_column(int adapter, int64_t column, int64_t rank, float sum) const {
    const Output& to = out[adapter];
    const int64_t at = transposed ? rank * columns + column : column * this->rank[adapter] + rank;
    store_float(to.data, to.dtype, at, scale[adapter] * sum);
  }
};

template <int kRankTiles>
struct Shape {
  static constexpr int kRanks = 8 * kRankTiles;
  static constexpr int kSubs = 8 / kRankTiles;  // stages side by side: Q takes 64 registers
  static constexpr int kStrip = kSubs * kTileCols;
  static constexpr int kRankBytes = 16 * kRankTiles;  // of a row of v or w
  static constexpr int kStageBytes = kTileBytes + kTileRows * kRankBytes;
  static constexpr int kW = kStages * kStageBytes;
  static constexpr int kBytes = kW + kStrip * kRankBytes;
};

template <int kDtype, int kRankTiles, bool kOnes>
struct Kernel {
  using S = Shape<kRankTiles>;
  using Sums = float[S::kSubs][2][kRankTiles][4];
  using Ones = float[kOnes ? S::kSubs : 1][2][4];

  static __device__ __forceinline__ void run(const Problem& p, Shared<char> shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int strip = static_cast<int>(blockIdx.x), chunk = static_cast<int>(blockIdx.z);
    const auto span = Runs<true>(p.rows, p.span_rows, lane)[blockIdx.y];
    if (span.adapter < 0) return;
    const int adapter = span.adapter;
    const int64_t begin = span.begin, end = span.end;
    const int first_rank = chunk * S::kRanks;
    const int ranks = clamped(p.rank[adapter] - first_rank, S::kRanks);
    if (ranks == 0 && !(kOnes && chunk == 0)) return;  // as all blocks of this adapter and chunk do
    const int64_t col0 = int64_t{strip} * S::kStrip;
    const int64_t col_end = least(col0 + S::kStrip, p.columns);
    const bool rows_wanted = p.row_out != nullptr, dropout = p.dropout.rng != nullptr;
    const Mask mask(p.dropout);

    if (rows_wanted) {
      start_rank_tile<kDtype, kRankTiles, kThreads>(
          shared + S::kW, p.w[adapter], [&](int row) { return col0 + row; },
          clamped(col_end - col0, S::kStrip), S::kStrip, first_rank, first_rank + ranks, thread);
    }
    const int steps = static_cast<int>((end - begin + kTileRows - 1) / kTileRows) * S::kSubs;
    const auto stage = [&](int step) { return shared + step % kStages * S::kStageBytes; };
    const auto start = [&](int step) {
      if (step < steps) {
        const int64_t first = begin + step / S::kSubs * kTileRows;
        const int count = clamped(end - first, kTileRows);
        start_tile<kDtype, kThreads>(stage(step), p.z, p.rows, first, count,
                                     col0 + step % S::kSubs * kTileCols, col_end, thread);
        if (p.tokens_wanted) {
          const int there = p.v.data == nullptr ? 0 : count;  // nothing but dbias may be wanted
          start_rank_tile<kDtype, kRankTiles, kThreads>(
              stage(step) + kTileBytes, p.v, [&](int row) { return p.rows[first + row]; }, there, kTileRows,
              first_rank, first_rank + ranks, thread);
        }
      }
      ptx::cp_async_commit();
    };
    for (int step = 0; step < kStages - 1; ++step) start(step);  // w is in the first group

    Sums sums = {};
    Ones ones = {};
    for (int step0 = 0; step0 < steps; step0 += S::kSubs) {
      const int64_t first = begin + step0 / S::kSubs * kTileRows;
      const int count = clamped(end - first, kTileRows);
      float row_sums[kRankTiles][4] = {};
#pragma unroll
      for (int sub = 0; sub < S::kSubs; ++sub) {
        const int step = step0 + sub;
        ptx::cp_async_wait<kStages - 2>();
        if (dropout) {
          mask_tile<kThreads>(stage(step), mask, p.rows, first, count, col0 + sub * kTileCols, col_end,
                              p.columns, thread);
        }
        __syncthreads();  // the stage is there, and the one that is filled next has been read
        start(step + kStages - 1);
        const Shared<const char> z = stage(step), v = stage(step) + kTileBytes;
        if (rows_wanted) {
          multiply_rows(z, shared + (S::kW + sub * kTileCols * S::kRankBytes), warp, lane, row_sums);
        }
        if (p.tokens_wanted) multiply_tokens(z, v, warp, lane, sums[sub], ones[kOnes ? sub : 0]);
      }
      if (rows_wanted) put_rows(p, row_sums, strip, adapter, first, count, first_rank, ranks, warp, lane);
    }
    put_columns(p, sums, ones, span, chunk, col0, col_end, ranks, warp, lane);
  }

  static __device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  // P of the warp's 16 tokens += z [16, 128] · w [128, ranks].
  static __device__ __forceinline__ void multiply_rows(Shared<const char> z, Shared<const char> w, int warp,
                                                       int lane, float (&sums)[kRankTiles][4]) {
#pragma unroll
    for (int s = 0; s < kTileCols / 16; ++s) {
      uint32_t a[4];
      load_a(a, z, 16 * warp, 2 * s, lane);
#pragma unroll
      for (int pair = 0; pair < kRankTiles / 2; ++pair) {
        uint32_t b[4];
        load_b_ranks<kRankTiles>(b, w, 16 * s, pair, lane);
        mma<kDtype>(sums[2 * pair], a, {b[0], b[1]});
        mma<kDtype>(sums[2 * pair + 1], a, {b[2], b[3]});
      }
    }
  }

  // Q of the warp's 32 columns += zᵀ [32, 64] · v [64, ranks].
  static __device__ __forceinline__ void multiply_tokens(Shared<const char> z, Shared<const char> v, int warp,
                                                         int lane, float (&sums)[2][kRankTiles][4],
                                                         float (&ones)[2][4]) {
    const uint32_t one = kDtype == LK_BF16 ? 0x3f803f80u : 0x3c003c00u;  // two of them
#pragma unroll
    for (int s = 0; s < kTileRows / 16; ++s) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_a_trans(a[m], z, 16 * s, 4 * warp + 2 * m, lane);
#pragma unroll
      for (int pair = 0; pair < kRankTiles / 2; ++pair) {
        uint32_t b[4];
        load_b_ranks<kRankTiles>(b, v, 16 * s, pair, lane);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma<kDtype>(sums[m][2 * pair], a[m], {b[0], b[1]});
          mma<kDtype>(sums[m][2 * pair + 1], a[m], {b[2], b[3]});
        }
      }
      if constexpr (kOnes) {
        const uint32_t first = lane < 4 ? one : 0;  // column 0 of the eight
#pragma unroll
        for (int m = 0; m < 2; ++m) mma<kDtype>(ones[m], a[m], {first, first});
      }
    }
  }

  // P of a row of stages: out where the strip is the only one, else to its partial sums.
  static __device__ __forceinline__ void put_rows(const Problem& p, const float (&sums)[kRankTiles][4],
                                                  int strip, int adapter, int64_t first, int count,
                                                  int first_rank, int ranks, int warp, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kRankTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 16 * warp + g + e / 2 * 8, rank = 8 * j + 2 * t + e % 2;
        if (row >= count || rank >= ranks) continue;
        if (p.strips == 1) {
          p.template put_row<kDtype>(adapter, first + row, first_rank + rank, sums[j][e]);
        } else {
          p.row_partial[p.row_at(strip, first + row, first_rank + rank)] = sums[j][e];
        }
      }
    }
  }

  // Q of the block: out where the span is its adapter's only one, else to its partial sums.
  static __device__ __forceinline__ void put_columns(const Problem& p, const Sums& sums, const Ones& ones,
                                                     const Runs<true>::Run& span, int chunk, int64_t col0,
                                                     int64_t col_end, int ranks, int warp, int lane) {
    const int g = lane / 4, t = lane % 4, first_rank = chunk * S::kRanks, adapter = span.adapter;
    const bool wanted = p.tokens_wanted && p.out[adapter].data != nullptr, with_ones = kOnes && chunk == 0;
#pragma unroll
    for (int sub = 0; sub < S::kSubs; ++sub) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = i / 2, half = i % 2;
        const int64_t col = col0 + sub * kTileCols + 32 * warp + 16 * m + g + 8 * half;
        if (col >= col_end) continue;
        const int64_t at = p.partial_at(span.slot, col, chunk, S::kRanks + 1);
#pragma unroll
        for (int e = 0; e < 2 * kRankTiles; ++e) {
          const int rank = e / 2 * 8 + 2 * t + e % 2;
          const float sum = sums[sub][m][e / 2][2 * half + e % 2];
          if (!wanted || rank >= ranks) continue;
          if (span.runs == 1) {
            p.put_column(adapter, col, first_rank + rank, sum);
          } else {
            p.partial[at + rank] = sum;
          }
        }
        if (with_ones && t == 0) {
          const float sum = ones[kOnes ? sub : 0][m][2 * half];
          if (span.runs == 1) {
            p.ones_out[col] = sum;
          } else {
            p.partial[at + S::kRanks] = sum;
          }
        }
      }
    }
  }
};

template <int kDtype, int kRankTiles, bool kOnes>
__global__ void __launch_bounds__(kThreads, 2) lora_linear_backward_sweep(const __grid_constant__ Problem p) {
  LK_DYNAMIC_SHARED(shared);
  Kernel<kDtype, kRankTiles, kOnes>::run(p, shared);
}

// Adds partial sums in their order: a thread owns an element of P or of Q. `ranks` is a chunk's.
template <int kDtype>
__global__ void __launch_bounds__(256)
    lora_linear_backward_reduce(const __grid_constant__ Problem p, int ranks, int64_t row_elements,
                                int64_t elements) {
  int64_t i = blockIdx.x * int64_t{256} + threadIdx.x;
  const int width = ranks + 1;
  const int64_t sums = i - row_elements, column = sums / width / p.chunks % p.columns;
  const int in_chunk = static_cast<int>(sums % width), chunk = static_cast<int>(sums / width % p.chunks);
  const bool is_sum = sums >= 0 && sums < elements;
  const int adapter = is_sum ? static_cast<int>(sums / width / p.chunks / p.columns) : 0;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto slots = Runs<true>(p.rows, p.span_rows, lane).slots_of(adapter);  // by whole warps
  if (i < row_elements) {
    const int64_t token = i / p.row_stride, rank = i % p.row_stride;
    int owner = 0;
    while (owner < p.rows.adapters && token >= p.rows.end(owner)) ++owner;
    if (owner == p.rows.adapters || token < p.rows.begin(owner) || rank >= p.rank[owner]) return;
    float sum = 0;
#pragma unroll 8
    for (int strip = 0; strip < p.strips; ++strip) sum += p.row_partial[p.row_at(strip, token, rank)];
    p.template put_row<kDtype>(owner, token, rank, sum);
    return;
  }
  const int rank = chunk * ranks + in_chunk;
  const bool is_ones = in_chunk == ranks;
  if (!is_sum || slots.runs == 1) return;
  if (is_ones ? p.ones_out == nullptr || chunk != 0
              : p.out[adapter].data == nullptr || rank >= p.rank[adapter])
    return;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < slots.runs; ++part) {
    sum += p.partial[p.partial_at(slots.first + part, column, chunk, width) + in_chunk];
  }
  if (is_ones) {
    p.ones_out[column] = sum;
  } else {
    p.put_column(adapter, column, rank, sum);
  }
}

// How a problem is cut up. A pure function of sizes and the number of multiprocessors.
struct Plan {
  int rank_tiles, chunks, strips;
  int64_t span_rows;  // at most
  int64_t spans;      // at most
  int64_t slots;      // at most, of spans of adapters that have several

  int64_t row_floats(int64_t rows, int64_t stride) const { return strips > 1 ? strips * rows * stride : 0; }
  int64_t partial_floats(int64_t columns) const { return slots * chunks * columns * (8 * rank_tiles + 1); }
};

inline Plan make_plan(int64_t rows, int64_t adapters, int64_t columns, int64_t rank, int multiprocessors) {
  const int rank_tiles = rank <= 16 ? 2 : rank <= 32 ? 4 : 8, strip = 8 / rank_tiles * kTileCols;
  const int chunks = static_cast<int>(std::max<int64_t>(1, (rank + 8 * rank_tiles - 1) / (8 * rank_tiles)));
  const int strips = static_cast<int>(std::max<int64_t>(1, (columns + strip - 1) / strip));
  // Two blocks for each multiprocessor, with at least a tile of tokens each, were all rows one adapter's.
  const int64_t tiles = std::max<int64_t>(1, (rows + kTileRows - 1) / kTileRows);
  const int64_t wanted = std::clamp<int64_t>(2 * multiprocessors / (int64_t{strips} * chunks), 1, kMostParts);
  const int64_t span_rows = (tiles + wanted - 1) / wanted * kTileRows;
  // An adapter of n rows has ceil(n / span_rows) spans, or one that is empty; several of them only where
  // n > span_rows.
  const int64_t full = rows / span_rows;
  const int64_t spans =
      adapters == 1 ? std::max<int64_t>(1, (rows + span_rows - 1) / span_rows) : full + adapters;
  const int64_t slots = adapters == 1 ? (spans > 1 ? spans : 0) : full + std::min(adapters, full);
  return {rank_tiles, chunks, strips, span_rows, spans, slots};
}

}  // namespace lk::cuda::sweep

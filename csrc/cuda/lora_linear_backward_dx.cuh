// dx [T, K] = dy·W0 + m⊙(g·A) for few to some hundred tokens, in one launch, from the same packed weights
// that the forward reads; g = s'·dy·B [T, r] is lora_linear_backward_sweep's.
//
// dxᵀ = W0ᵀ·dyᵀ: columns of W0 are the m16 operand of mma.m16n8k16, its rows the k, tokens the n8. A block
// owns 128 columns, kTokens tokens and one slice of the rows; of its eight warps, two share 32 of the columns
// and halve the rows of each stage:
//
//                    kTokens tokens
//   128 columns   ┌─────────────────┐       stage: 64 rows of W0 x 128 columns, kTokens tokens x 64 of dy
//   of W0 (m)     │ warps 0 and 4   │
//                 │ warps 1 and 5   │       warp 0: rows 0..31 of every stage, warp 4: rows 32..63; their
//                 │ warps 2 and 6   │       sums meet in shared memory at the end
//                 │ warps 3 and 7   │
//                 └─────────────────┘
//
// A byte of W0 holds two columns of one row, while an operand's register holds two rows of one column.
// Neither has to move: which columns m = 0..15 are and which rows k = 0..15 are is free. Lane (g, t) takes
// columns 4g..4g+3 of its warp's 32 and rows 8t..8t+7 of 32, and packs what it decodes row by row into pairs
// of rows. Four successive columns are one counter of the dropout mask, and eight bytes of dx.
//
// A scale belongs to a row, which is summed over, so it cannot wait for the sums: each weight is
// T(code·scale), rounded once as nf4_dequantize rounds it, out of a table of pairs of fp32 codes: per two
// weights two integer instructions, one LDS, two FMUL and one F2FP.
//
// m⊙(g·A) is the head of the sum: multiplied first, masked in the fragment, then dy·W0 is added on top.
// Slices meet in fp32 partial sums, added in their order by the last block of a tile.
//
// Bytes: W0 once per kTokens tokens, dy once per 128 columns (from L2). The floor is that of
// lora_linear_mixed.
#pragma once
#include "lora_linear.cuh"
#include "low_rank.cuh"

namespace lk::cuda::backward_dx {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 128;   // of a block
constexpr int kStageRows = 64;  // of W0
constexpr int kStages = 4;
constexpr int kMostSlices = 8;
constexpr int kTableBytes = 256 * 128;  // byte -> two fp32 codes, a copy for each of 16 lanes

template <bool kNf4, int kTokens>
struct Shape {
  static constexpr int kRowBytes = kNf4 ? kColumns / 2 : 2 * kColumns;
  static constexpr int kWeightBytes = kStageRows * kRowBytes, kDyBytes = kTokens * kStageRows * 2;
  static constexpr int kStageBytes = kWeightBytes + kDyBytes;
  // The table, the dynamic map, scales [2 stages][2 blocks of columns][64 rows], the ring.
  static constexpr int kMap = kNf4 ? kTableBytes : 0, kScales = kMap + (kNf4 ? 1024 : 0);
  static constexpr int kRing = kScales + (kNf4 ? 2 * 2 * kStageRows * 4 : 0);
  static constexpr int kBytes = kRing + kStages * kStageBytes;
  static_assert(kBytes >= kTokens * kColumns * 4, "half of the warps pass their sums on through it");
};

struct Problem : LoraLinear {  // x is dy [T, N], h is g [T, r] and y is dx [T, K]
  Matrix dy;
  int64_t g_stride;
  Dropout dropout;
  Global<float> partial;      // [tile][slice][kTokens][kColumns]
  Global<uint32_t> counters;  // [tiles], zero between launches
  int slice_n, slices, column_tiles;
};

template <int kDtype, bool kNf4, int kTokens>
struct Kernel {
  using S = Shape<kNf4, kTokens>;
  static constexpr int kTiles = kTokens / 8;  // n8
  using Sums = float[2][kTiles][4];

  // 16-byte pieces, permuted so that what a warp reads at once lies in different banks.
  static __device__ __forceinline__ int weight_place(int row, int piece) {
    const int t = row / 8 % 4;
    return row * S::kRowBytes + 16 * (piece ^ (kNf4 ? t : 2 * t));
  }
  static __device__ __forceinline__ int dy_place(int token, int piece) {
    return token * 2 * kStageRows + 16 * (piece ^ token % 2 * 4);
  }

  static __device__ __forceinline__ void start_stage(const Problem& p, Shared<char> stage, int64_t row0,
                                                     int64_t row_end, int64_t token0, int64_t col0,
                                                     int thread) {
    constexpr int kPieces = S::kRowBytes / 16, kPerPiece = kColumns / kPieces;
#pragma unroll
    for (int i = 0; i < kStageRows * kPieces / kThreads; ++i) {
      const int id = thread + i * kThreads, row = id / kPieces, piece = id % kPieces;
      const int64_t col = col0 + piece * kPerPiece;
      const bool there = row0 + row < row_end && col < p.k;
      const int64_t at = there ? (row0 + row) * (kNf4 ? p.k : p.dense_stride) + col : 0;
      const Global<const void> from =
          kNf4 ? Global<const void>(p.nf4.packed + at / 2) : Global<const void>(p.dense + at);
      ptx::cp_async<16>(stage + weight_place(row, piece), from, there ? 16 : 0);
    }
    for (int id = thread; id < kTokens * 8; id += kThreads) {
      const int token = id / 8, piece = id % 8;
      const int there = token0 + token < p.tokens ? clamped(row_end - row0 - 8 * piece, 8) : 0;
      start_piece<kDtype>(stage + (S::kWeightBytes + dy_place(token, piece)), p.dy, token0 + token,
                          row0 + 8 * piece, there);
    }
  }

  static __device__ __forceinline__ void fill_table(Shared<char> table, int thread) {
    for (int i = thread; i < 256 * 8; i += kThreads) {
      const int e = i / 8;
      const uint32_t first = __float_as_uint(kNf4Tables.codebook[e >> 4]),
                     second = __float_as_uint(kNf4Tables.codebook[e & 15]);
      cast<uint4>(table + (e * 128 + i % 8 * 16))[0] = make_uint4(first, second, first, second);
    }
  }

  static __device__ __forceinline__ void run(const Problem& p, Shared<char> shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int group = warp / 4, strip = warp % 4;  // which rows of a stage, which columns
    const int slice = static_cast<int>(blockIdx.x) % p.slices, tile = static_cast<int>(blockIdx.x) / p.slices;
    const int64_t col0 = int64_t{tile % p.column_tiles} * kColumns;
    const int64_t token0 = int64_t{tile / p.column_tiles} * kTokens;
    const int64_t row0 = int64_t{slice} * p.slice_n;
    const int64_t row_end = p.n < row0 + p.slice_n ? p.n : row0 + p.slice_n;
    const int steps = static_cast<int>((row_end - row0 + kStageRows - 1) / kStageRows);
    const auto stage = [&](int step) { return shared + S::kRing + step % kStages * S::kStageBytes; };
    const auto start = [&](int step) {
      if (step < steps) {
        start_stage(p, stage(step), row0 + int64_t{step} * kStageRows, row_end, token0, col0, thread);
      }
      ptx::cp_async_commit();
    };
    for (int step = 0; step < kStages - 1; ++step) start(step);
    const Shared<float> dynamic_map = cast<float>(shared + S::kMap),
                        scales = cast<float>(shared + S::kScales);
    // Threads 0..127 decode the scales of a stage: 64 rows, two blocks of columns.
    const auto scale_of = [&](int step) {
      const int64_t row = row0 + int64_t{step} * kStageRows + thread % kStageRows;
      const int64_t col = col0 + thread / kStageRows * 64;
      if (thread >= 2 * kStageRows || row >= row_end || col >= p.k) return 0.0f;
      return block_scale(p.nf4, (row * p.k + col) >> p.nf4.block_shift, dynamic_map);
    };
    float next_scale = 0;
    if constexpr (kNf4) {
      fill_table(shared, thread);
      for (int i = thread; i < 256; i += kThreads) dynamic_map[i] = kNf4Tables.dynamic_map[i];
      __syncthreads();
      next_scale = scale_of(0);
    }

    Sums acc = {};
    const int64_t column = col0 + 32 * strip + lane / 4 * 4;  // the first of this lane's four
    if (group == 0 && slice == 0 && p.rank > 0) {
      add_low_rank(p, token0, column, lane, acc);
      if (p.dropout.rng != nullptr) mask(p, token0, column, lane, acc);
    }
    for (int step = 0; step < steps; ++step) {
      const Shared<float> stage_scales = scales + step % 2 * 2 * kStageRows;
      if constexpr (kNf4) {
        if (thread < 2 * kStageRows) stage_scales[thread] = next_scale;
      }
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // the stage is there, and the one that is filled next has been read
      start(step + kStages - 1);
      if constexpr (kNf4) next_scale = scale_of(step + 1);
      const int rows = 32 * group + lane % 4 * 8;  // the first of this lane's eight
      const Shared<const char> weights = stage(step);
      const Shared<const float> mine = stage_scales + (strip / 2 * kStageRows + rows);
      multiply(shared, weights, weights + S::kWeightBytes, mine, rows, strip, lane, acc);
    }
    __syncthreads();  // everything in shared memory has been read; the copies on their way are empty
    join(shared, acc, group, strip, lane);
    if (p.slices == 1) {
      if (group == 0) store(p, acc, token0, column, lane);
      return;
    }
    const auto sums = [&](int s) { return (int64_t{tile} * p.slices + s) * kTokens * kColumns; };
    if (group == 0) {
#pragma unroll
      for (int c = 0; c < kTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = 8 * c + lane % 4 * 2 + e;
          cast<float4>(p.partial + (sums(slice) + token * kColumns + (column - col0)))[0] =
              make_float4(acc[0][c][e], acc[0][c][2 + e], acc[1][c][e], acc[1][c][2 + e]);
        }
      }
    }
    if (!last_to_arrive(p.counters + tile, p.slices, cast<uint32_t>(shared), thread)) return;
#pragma unroll 4
    for (int i = 4 * thread; i < kTokens * kColumns; i += 4 * kThreads) {
      const int64_t token = token0 + i / kColumns, col = col0 + i % kColumns;
      if (token < p.tokens && col < p.k) {
        put(p, token, col, add_partial(p.partial + (sums(0) + i), kTokens * kColumns, p.slices));
      }
    }
    if (thread == 0) p.counters[tile] = 0;
  }

  // acc += W0[32 rows of the group, 32 columns]ᵀ · dy[kTokens, 32]ᵀ.
  static __device__ __forceinline__ void multiply(Shared<const char> table, Shared<const char> weights,
                                                  Shared<const char> dy, Shared<const float> scales, int rows,
                                                  int strip, int lane, Sums& acc) {
    const int g = lane / 4;
    uint32_t a[2][2][4];  // [four of the rows][two of the columns]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      decode(table, weights, scales, rows + 4 * half, half, strip, lane, a[half]);
    }
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
      const uint4 right = cast<const uint4>(dy + dy_place(8 * c + g, rows / 8))[0];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma<kDtype>(acc[m][c], a[0][m], {right.x, right.y});
        mma<kDtype>(acc[m][c], a[1][m], {right.z, right.w});
      }
    }
  }

  // Rows row..row+3 of this lane's four columns: a[m] of columns 2m and 2m + 1.
  static __device__ __forceinline__ void decode(Shared<const char> table, Shared<const char> weights,
                                                Shared<const float> scales, int row, int half, int strip,
                                                int lane, uint32_t (&a)[2][4]) {
    const int g = lane / 4;
    if constexpr (kNf4) {
      const float4 four = cast<const float4>(scales + 4 * half)[0];
      const float scale[4] = {four.x, four.y, four.z, four.w};
      const uint32_t copy = static_cast<uint32_t>(lane % 16 * 8);
      uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        codes[i] = cast<const uint16_t>(weights + (weight_place(row + i, strip) + 2 * g))[0];
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float2 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t shifted = m == 0 ? codes[i] << 7 : codes[i] >> 1;
          w[i] = cast<const float2>(table + ((shifted & 0x7f80u) | copy))[0];
          w[i].x = __fmul_rn(w[i].x, scale[i]), w[i].y = __fmul_rn(w[i].y, scale[i]);
        }
        a[m][0] = round_pair<kDtype>(w[0].x, w[1].x), a[m][1] = round_pair<kDtype>(w[0].y, w[1].y);
        a[m][2] = round_pair<kDtype>(w[2].x, w[3].x), a[m][3] = round_pair<kDtype>(w[2].y, w[3].y);
      }
    } else {
      uint2 w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = cast<const uint2>(weights + (weight_place(row + i, 4 * strip + g / 2) + g % 2 * 8))[0];
      }
      pair_rows(w, a);
    }
  }

  // Four columns of each of four rows: a[m] of columns 2m and 2m + 1, pairs of rows.
  static __device__ __forceinline__ void pair_rows(const uint2 (&w)[4], uint32_t (&a)[2][4]) {
    constexpr uint32_t kLow = 0x5410, kHigh = 0x7632;
    a[0][0] = ptx::prmt(w[0].x, w[1].x, kLow), a[0][1] = ptx::prmt(w[0].x, w[1].x, kHigh);
    a[0][2] = ptx::prmt(w[2].x, w[3].x, kLow), a[0][3] = ptx::prmt(w[2].x, w[3].x, kHigh);
    a[1][0] = ptx::prmt(w[0].y, w[1].y, kLow), a[1][1] = ptx::prmt(w[0].y, w[1].y, kHigh);
    a[1][2] = ptx::prmt(w[2].y, w[3].y, kLow), a[1][3] = ptx::prmt(w[2].y, w[3].y, kHigh);
  }

  // acc += A[r, this lane's columns]ᵀ · g[kTokens, r]ᵀ.
  static __device__ __forceinline__ void add_low_rank(const Problem& p, int64_t token0, int64_t column,
                                                      int lane, Sums& acc) {
    const int t = lane % 4;
    for (int first = 0; first < p.rank; first += 16) {
      uint2 A[4];  // ranks 2t, 2t + 1, 2t + 8, 2t + 9 of four columns
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int rank = first + 2 * t + i % 2 + i / 2 * 8;
        const Global<const uint16_t> row = cast<const uint16_t>(p.lora_A) + rank * p.A_stride;
        A[i] = make_uint2(0, 0);
        if (rank < p.rank && column < p.k) A[i] = cast<const uint2>(row + column)[0];
      }
      uint32_t a[2][4];
      pair_rows(A, a);
#pragma unroll
      for (int c = 0; c < kTiles; ++c) {
        const int64_t token = token0 + 8 * c + lane / 4;
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t two[2] = {};
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int rank = first + 2 * t + e + 8 * i;
            if (token < p.tokens && rank < p.rank) two[e] = p.h[token * p.g_stride + rank];
          }
          b[i] = two[0] | two[1] << 16;
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) mma<kDtype>(acc[m][c], a[m], b);
      }
    }
  }

  static __device__ __forceinline__ void mask(const Problem& p, int64_t token0, int64_t column, int lane,
                                              Sums& acc) {
    const Mask drawn(p.dropout);
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t token = token0 + 8 * c + lane % 4 * 2 + e;
        const uint32_t kept = drawn.kept4(static_cast<uint64_t>(token * p.k + column) / 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = acc[i / 2][c][i % 2 * 2 + e];
          sum = kept >> i & 1 ? sum : 0;
        }
      }
    }
  }

  // The sums of the second group's warps into those of the first's.
  static __device__ __forceinline__ void join(Shared<char> shared, Sums& acc, int group, int strip,
                                              int lane) {
    const Shared<float4> place = cast<float4>(shared) + (strip * 32 + lane);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float (&sum)[4] = acc[i % 2][i / 2];
      if (group == 1) place[i * 128] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float (&sum)[4] = acc[i % 2][i / 2];
      if (group == 0) {
        const float4 other = place[i * 128];
        sum[0] += other.x, sum[1] += other.y, sum[2] += other.z, sum[3] += other.w;
      }
    }
  }

  static __device__ __forceinline__ void put(const Problem& p, int64_t token, int64_t column, float4 sum) {
    cast<uint2>(p.y + (token * p.k + column))[0] =
        make_uint2(round_pair<kDtype>(sum.x, sum.y), round_pair<kDtype>(sum.z, sum.w));
  }
  static __device__ __forceinline__ void store(const Problem& p, const Sums& acc, int64_t token0,
                                               int64_t column, int lane) {
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t token = token0 + 8 * c + lane % 4 * 2 + e;
        if (token < p.tokens && column < p.k) {
          put(p, token, column, make_float4(acc[0][c][e], acc[0][c][2 + e], acc[1][c][e], acc[1][c][2 + e]));
        }
      }
    }
  }
};

template <int kDtype, bool kNf4, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens == 64 ? 1 : 2) lora_linear_backward_dx(const Problem p) {
  LK_DYNAMIC_SHARED(shared);
  Kernel<kDtype, kNf4, kTokens>::run(p, shared);
}

// How a problem is cut up. A pure function of sizes and the number of multiprocessors.
struct Plan {
  int token_tile;  // 16, 32 or 64
  int slice_n, slices, column_tiles;
  int64_t tiles;

  int64_t workspace_floats() const { return slices == 1 ? 0 : tiles * slices * token_tile * kColumns; }
};

inline Plan make_plan(int64_t tokens, int64_t n, int64_t k, int multiprocessors) {
  const int token_tile = tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
  const int64_t column_tiles = (k + kColumns - 1) / kColumns,
                tiles = column_tiles * ((tokens + token_tile - 1) / token_tile);
  // As many slices as fill the multiprocessors once, each at least 512 long, as in lora_linear_mixed.
  int slices = 1;
  while (slices < kMostSlices && tiles * slices * 2 <= multiprocessors && n / (slices * 2) >= 512)
    slices *= 2;
  const int64_t slice_n = ((n + slices - 1) / slices + kStageRows - 1) / kStageRows * kStageRows;
  return {token_tile, static_cast<int>(slice_n), static_cast<int>((n + slice_n - 1) / slice_n),
          static_cast<int>(column_tiles), tiles};
}

}  // namespace lk::cuda::backward_dx

// lora_linear for 9 tokens to a few hundred, in one launch on any GPU from sm_80 on:
//   y [T, N] = x·W0ᵀ + s·h·Bᵀ + bias,  h [T, r] = x·Aᵀ  (or given, where dropout or a large rank make it a
//   kernel's work)
//
// Yᵀ = W·Xᵀ: rows of W0 are the m16 operand of mma.m16n8k16, decoded in registers, tokens its n8. A block
// owns 128 rows, kTokens tokens and one slice of K; a warp 32 of the rows and all of the tokens:
//
//                      kTokens tokens
//                 ┌─────────────────────┐     warp w: rows 32w.., 2 x (kTokens / 8) fragments of fp32 sums
//     rows  ┌ 32 ▒│ warp 0              │
//      128  │ 32  │ warp 1              │     ▒ a stage: kStageK of K, of 128 rows of W0 and of kTokens
//           │ 32  │ warp 2              │       tokens of x; a ring of them by cp.async
//           └ 32  │ warp 3              │
//                 └─────────────────────┘
//     A     [ r ▒ ]  its rows are 16 more: each warp multiplies them with a quarter of the tokens
//
// As in lora_linear_decode the order of K within 64 is free: a thread takes 16 successive weights of a row
// and the same 16 elements of a token, so neither is repacked. A block's scale multiplies the fragment once
// per 64 of K. The low-rank term is a tail of the same fragments over k = r: B's rows times h, rounded to T
// as eager rounds it, times s in fp32 (s·h may be beyond fp16). Slices are added in their order by the last
// block of a tile (GlobalExchange's counters, as in decode).
//
// Bytes: W0 once per kTokens tokens, x once per 128 rows (from L2); operations 2·T·N·K. The floor is the
// larger of W0's bytes over the bandwidth and the operations over the tensor cores' rate.
#pragma once
#include <algorithm>

#include "lora_linear.cuh"
#include "tile.cuh"

namespace lk::cuda::mixed {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 32 * kWarps;  // of a block
constexpr int kUnit = 64;           // weights of a row that share a scale fragment
constexpr int kMostFusedRank = 16;  // h beside y, in registers
constexpr int kMostRank = 256;
constexpr int kMostSlices = 8;

// A stage: of NF4 64 bytes of a row, of a dense W 128.
template <bool kNf4>
constexpr int kStageK = kNf4 ? 128 : 64;
template <bool kNf4>
constexpr int kRowBytes = kNf4 ? 64 : 128;

template <bool kNf4, int kTokens>
struct Shape {
  static constexpr int kStages = kTokens <= 32 ? 3 : 2;
  static constexpr int kWeightBytes = kRows * kRowBytes<kNf4>, kXBytes = kTokens * kStageK<kNf4> * 2;
  static constexpr int kStageBytes = kWeightBytes + kXBytes;
  // The pair table of 32 KiB (stride 128: two instructions more for a pair than decode's, for 64 KiB less),
  // the dynamic map, the ring. At the end h [token][rank] takes the ring's place: beside it, 64 tokens of
  // rank 256 would be more than the 99 KiB that compute capability 8.6, 8.9 and 12.0 give a block.
  static constexpr int kTable = 0, kMap = kNf4 ? 256 * 128 : 0, kRing = kMap + (kNf4 ? 1024 : 0);
  static constexpr int kH = kRing, kBytes = kRing + kStages * kStageBytes;
  // Pairs of ranks of eight tokens in different banks.
  static __host__ __device__ constexpr int h_stride(int rank) { return (rank + 15) / 16 * 16 + 8; }
};

struct Problem : LoraLinear {
  bool h_given;
  Global<const uint16_t> given_h;  // [T, r] where h_given
  Global<float> partial;           // [tile][slice][kTokens][kRows], then of h [token tile][slice][kTokens][r]
  Global<uint32_t> counters;       // [tiles], zero between launches
  int slice_k, slices, row_tiles;
};

template <int kDtype, bool kNf4, int kTokens>
struct Kernel {
  using S = Shape<kNf4, kTokens>;
  static_assert(S::kH + kTokens * S::h_stride(kMostRank) * 2 <= S::kBytes, "h fits where the ring was");
  static constexpr int kColumns = kTokens / 8;      // n8 tiles
  static constexpr int kMine = (kColumns + 3) / 4;  // of which a warp multiplies A with these many

  // 16-byte pieces: of x 16 (or 8) of a token, of codes 4 of a row. Permuted, so that what a fragment reads
  // at once lies in different banks.
  static __device__ __forceinline__ int weight_place(int row, int piece) {
    return kNf4 ? row * 64 + 16 * (piece ^ (row >> 1 & 1) * 2) : row * 128 + 16 * swizzled(row, piece);
  }
  static __device__ __forceinline__ int x_place(int token, int piece) {
    return token * 2 * kStageK<kNf4> + 16 * swizzled(token, piece);
  }

  static __device__ __forceinline__ void start_stage(const Problem& p, Shared<char> stage, int64_t row0,
                                                     int64_t token0, int64_t col0, int64_t col_end,
                                                     int thread) {
    constexpr int kPieces = kRowBytes<kNf4> / 16, kPerPiece = kStageK<kNf4> / kPieces;
#pragma unroll
    for (int i = 0; i < kRows * kPieces / kThreads; ++i) {
      const int id = thread + i * kThreads, row = id / kPieces, piece = id % kPieces;
      const int64_t col = col0 + piece * kPerPiece;
      const bool there = row0 + row < p.n && col < col_end;
      const int64_t at = there ? (row0 + row) * (kNf4 ? p.k : p.dense_stride) + col : 0;
      const Global<const void> from =
          kNf4 ? Global<const void>(p.nf4.packed + at / 2) : Global<const void>(p.dense + at);
      ptx::cp_async<16>(stage + weight_place(row, piece), from, there ? 16 : 0);
    }
    constexpr int kXPieces = kStageK<kNf4> / 8;
    const Shared<char> x = stage + S::kWeightBytes;
    for (int id = thread; id < kTokens * kXPieces; id += kThreads) {
      const int token = id / kXPieces, piece = id % kXPieces;
      const int64_t col = col0 + 8 * piece;
      const bool there = token0 + token < p.tokens && col < col_end;
      const int64_t at = there ? (token0 + token) * p.x_stride + col : 0;
      ptx::cp_async<16>(x + x_place(token, piece), p.x + at, there ? 16 : 0);
    }
  }

  // Two pairs of weights out of one byte each of `top` and `bottom`, twice: a fragment of m16k16.
  template <int kByte>
  static __device__ __forceinline__ void decode(Shared<const char> table, uint32_t top, uint32_t bottom,
                                                uint32_t lane_address, uint32_t (&a)[4]) {
    a[0] = pair<kByte>(table, top, lane_address), a[1] = pair<kByte>(table, bottom, lane_address);
    a[2] = pair<kByte + 1>(table, top, lane_address), a[3] = pair<kByte + 1>(table, bottom, lane_address);
  }
  template <int kByte>
  static __device__ __forceinline__ uint32_t pair(Shared<const char> table, uint32_t codes,
                                                  uint32_t lane_address) {
    const uint32_t shifted = kByte == 0 ? codes << 7 : codes >> (8 * kByte - 7);
    return cast<const uint32_t>(table + ((shifted & 0x7f80u) | lane_address))[0];
  }

  // 16 elements of K of row (or token) `row`, as 8 pairs.
  static __device__ __forceinline__ void load_pairs(Shared<const char> rows, int first, int second,
                                                    uint32_t (&pairs)[8]) {
    const uint4 low = cast<const uint4>(rows + first)[0], high = cast<const uint4>(rows + second)[0];
    pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
    pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
  }

  static __device__ __forceinline__ void run(const Problem& p, Shared<char> shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int g = lane / 4, t = lane % 4;
    const int slice = static_cast<int>(blockIdx.x) % p.slices, tile = static_cast<int>(blockIdx.x) / p.slices;
    const int row_tile = tile % p.row_tiles, token_tile = tile / p.row_tiles;
    const int64_t row0 = int64_t{row_tile} * kRows, token0 = int64_t{token_tile} * kTokens;
    const int64_t col0 = int64_t{slice} * p.slice_k;
    const int64_t col_end = p.k < col0 + p.slice_k ? p.k : col0 + p.slice_k;
    const int steps = static_cast<int>((col_end - col0 + kStageK<kNf4> - 1) / kStageK<kNf4>);
    const Shared<float> dynamic_map = cast<float>(shared + S::kMap);
    const bool fused_h = p.rank > 0 && !p.h_given;
    const uint32_t lane_address = static_cast<uint32_t>(4 * lane);
    const auto stage = [&](int step) { return shared + S::kRing + step % S::kStages * S::kStageBytes; };
    const auto start = [&](int step) {
      if (step < steps) {
        start_stage(p, stage(step), row0, token0, col0 + int64_t{step} * kStageK<kNf4>, col_end, thread);
      }
      ptx::cp_async_commit();
    };
    for (int step = 0; step < S::kStages - 1; ++step) start(step);
    if constexpr (kNf4) {
      fill_pair_table<kDtype, 128>(shared + S::kTable, thread, kThreads);
      for (int i = thread; i < 256; i += kThreads) dynamic_map[i] = kNf4Tables.dynamic_map[i];
      __syncthreads();
    }

    float acc[2][kColumns][4] = {}, low[kMine][4] = {};  // y; h of up to 16 ranks
    const int64_t scale_row = row0 + 32 * warp + lane;   // whose scales this lane decodes
    for (int step = 0; step < steps; ++step) {
      const int64_t at = col0 + int64_t{step} * kStageK<kNf4>;
      float scale[kStageK<kNf4> / kUnit] = {};
      if constexpr (kNf4) {
#pragma unroll
        for (int u = 0; u < kStageK<kNf4> / kUnit; ++u) {
          if (scale_row < p.n && at + u * kUnit < col_end) {
            const int64_t block = (scale_row * p.k + at + u * kUnit) >> p.nf4.block_shift;
            scale[u] = block_scale(p.nf4, block, dynamic_map) * (1 / kBalance<kDtype>);
          }
        }
      }
      ptx::cp_async_wait<S::kStages - 2>();
      __syncthreads();  // the stage is there, and the one that is filled next has been read
      start(step + S::kStages - 1);
      const Shared<const char> weights = stage(step), x = stage(step) + S::kWeightBytes;
#pragma unroll 1  // both units at once would need more registers than there are
      for (int u = 0; u < kStageK<kNf4> / kUnit; ++u) {
        const float unit_scale = u == 0 ? scale[0] : scale[kStageK<kNf4> / kUnit - 1];
        multiply_unit(p, shared, weights, x, u, unit_scale, lane_address, lane, warp, acc);
        if (fused_h && at + u * kUnit < col_end) multiply_A(p, x, u, at + u * kUnit, lane, warp, low);
      }
    }
    if (p.rank > 0) {
      __syncthreads();  // the ring has been read
      put_h(p, shared, low, token_tile, row_tile, slice, lane, warp, thread);
      __syncthreads();  // h is there
      add_low_rank(p, shared, row0 + 32 * warp, lane, acc);
    }
    if (p.slices == 1) {
      store(p, acc, row0, token0, lane, warp);
    } else {
      put_and_reduce(p, shared, acc, tile, row_tile, token_tile, slice, row0, token0, g, t, warp, thread);
    }
  }

  // acc += W[32 rows of the warp, 64] · x[kTokens, 64]ᵀ of unit u of the stage.
  static __device__ __forceinline__ void multiply_unit(const Problem&, Shared<char> shared,
                                                       Shared<const char> weights, Shared<const char> x,
                                                       int u, float scale, uint32_t lane_address, int lane,
                                                       int warp, float (&acc)[2][kColumns][4]) {
    const int g = lane / 4, t = lane % 4;
    uint32_t a[2][4][4];
    float scales[2][2] = {};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int top_row = 32 * warp + 16 * m + g, bottom_row = top_row + 8;
      if constexpr (kNf4) {
        const int piece = 2 * u + t / 2, half = t % 2 * 8;
        const uint2 top = cast<const uint2>(weights + weight_place(top_row, piece) + half)[0];
        const uint2 bottom = cast<const uint2>(weights + weight_place(bottom_row, piece) + half)[0];
        const Shared<const char> table = shared + S::kTable;
        decode<0>(table, top.x, bottom.x, lane_address, a[m][0]),
            decode<2>(table, top.x, bottom.x, lane_address, a[m][1]);
        decode<0>(table, top.y, bottom.y, lane_address, a[m][2]),
            decode<2>(table, top.y, bottom.y, lane_address, a[m][3]);
        scales[m][0] = __shfl_sync(0xffffffffu, scale, 16 * m + g);
        scales[m][1] = __shfl_sync(0xffffffffu, scale, 16 * m + g + 8);
      } else {
        uint32_t top[8], bottom[8];
        load_pairs(weights, weight_place(top_row, 2 * t), weight_place(top_row, 2 * t + 1), top);
        load_pairs(weights, weight_place(bottom_row, 2 * t), weight_place(bottom_row, 2 * t + 1), bottom);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[m][j][0] = top[2 * j], a[m][j][1] = bottom[2 * j], a[m][j][2] = top[2 * j + 1],
          a[m][j][3] = bottom[2 * j + 1];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float part[2][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // 8 of the thread's 16 elements at a time: registers are short
        const uint4 right = cast<const uint4>(x + x_place(8 * c + g, 8 * u + 2 * t + half))[0];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float (&sum)[4] = kNf4 ? part[m] : acc[m][c];
          mma<kDtype>(sum, a[m][2 * half], {right.x, right.y});
          mma<kDtype>(sum, a[m][2 * half + 1], {right.z, right.w});
        }
      }
      if constexpr (kNf4) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][c][i] = __fmaf_rn(scales[m][i / 2], part[m][i], acc[m][c][i]);
        }
      }
    }
  }

  // low += A[16, 64] · x[tokens of this warp's columns, 64]ᵀ.
  static __device__ __forceinline__ void multiply_A(const Problem& p, Shared<const char> x, int u,
                                                    int64_t col, int lane, int warp, float (&low)[kMine][4]) {
    const int g = lane / 4, t = lane % 4;
    uint32_t top[8] = {}, bottom[8] = {};
    // Nothing but whole pieces of T: other loads beside them leave sm_120 short of registers.
    if (g < p.rank) load_A<kDtype, true>(p, g, col + 16 * t, top);
    if (g + 8 < p.rank) load_A<kDtype, true>(p, g + 8, col + 16 * t, bottom);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int c = warp + 4 * i;
      if (c >= kColumns) break;
      uint32_t right[8];
      load_pairs(x, x_place(8 * c + g, 8 * u + 2 * t), x_place(8 * c + g, 8 * u + 2 * t + 1), right);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        mma<kDtype>(low[i], {top[2 * j], bottom[2 * j], top[2 * j + 1], bottom[2 * j + 1]},
                    {right[2 * j], right[2 * j + 1]});
      }
    }
  }

  static __device__ __forceinline__ int64_t h_sums(const Problem& p, int token_tile, int slice) {
    const int64_t token_tiles = (p.tokens + kTokens - 1) / kTokens;
    return token_tiles * p.row_tiles * p.slices * kTokens * kRows +
           (int64_t{token_tile} * p.slices + slice) * kTokens * p.rank;
  }

  // h of the slice (given: of the first slice, which is then the only one that adds it) to shared memory as
  // T, zeros up to a multiple of 16 ranks; h itself, or its sums, out.
  static __device__ __forceinline__ void put_h(const Problem& p, Shared<char> shared,
                                               const float (&low)[kMine][4], int token_tile, int row_tile,
                                               int slice, int lane, int warp, int thread) {
    const Shared<uint16_t> h = cast<uint16_t>(shared + S::kH);
    const int stride = S::h_stride(p.rank), ranks = (p.rank + 15) / 16 * 16;
    const int64_t token0 = int64_t{token_tile} * kTokens;
    if (p.h_given) {
      for (int i = thread; i < kTokens * ranks; i += kThreads) {
        const int token = i / ranks, j = i % ranks;
        float value = 0;
        if (slice == 0 && token0 + token < p.tokens && j < p.rank) {
          value = to_float<kDtype>(p.given_h[(token0 + token) * p.rank + j]);
        }
        h[token * stride + j] = round_to<kDtype>(value);
      }
      return;
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (warp + 4 * i >= kColumns) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = g + e / 2 * 8, token = 8 * (warp + 4 * i) + 2 * t + e % 2;
        h[token * stride + j] = round_to<kDtype>(low[i][e]);
        if (row_tile != 0 || j >= p.rank || token0 + token >= p.tokens) continue;
        if (p.slices == 1) {
          p.h[(token0 + token) * p.rank + j] = round_to<kDtype>(low[i][e]);
        } else {
          p.partial[h_sums(p, token_tile, slice) + token * p.rank + j] = low[i][e];
        }
      }
    }
  }

  // acc += s·B[32 rows of the warp, r]·h[kTokens, r]ᵀ, 16 ranks at a time.
  static __device__ __forceinline__ void add_low_rank(const Problem& p, Shared<char> shared, int64_t row,
                                                      int lane, float (&acc)[2][kColumns][4]) {
    const int g = lane / 4, t = lane % 4, stride = S::h_stride(p.rank);
    const Shared<const uint16_t> h = cast<const uint16_t>(shared + S::kH);
    for (int first = 0; first < p.rank; first += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[m][i] = load_B_pair<kDtype>(p, row + 16 * m + g + i % 2 * 8, first + 2 * t + i / 2 * 8);
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const Shared<const uint32_t> pairs = cast<const uint32_t>(h + (8 * c + g) * stride + first);
        const uint32_t b[2] = {pairs[t], pairs[t + 4]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float low[4] = {};
          mma<kDtype>(low, a[m], b);
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][c][i] = __fmaf_rn(p.scaling, low[i], acc[m][c][i]);
        }
      }
    }
  }

  static __device__ __forceinline__ void store(const Problem& p, const float (&acc)[2][kColumns][4],
                                               int64_t row0, int64_t token0, int lane, int warp) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = row0 + 32 * warp + 16 * m + g + i / 2 * 8,
                        token = token0 + 8 * c + 2 * t + i % 2;
          if (row < p.n && token < p.tokens) finish<kDtype>(p, row, token, acc[m][c][i]);
        }
      }
    }
  }

  // Sums of the slice to global memory; the last block of the tile adds all slices and leaves the counter at
  // zero.
  static __device__ __forceinline__ void put_and_reduce(const Problem& p, Shared<char> shared,
                                                        const float (&acc)[2][kColumns][4], int tile,
                                                        int row_tile, int token_tile, int slice, int64_t row0,
                                                        int64_t token0, int g, int t, int warp, int thread) {
    const auto sums = [&](int s) { return (int64_t{tile} * p.slices + s) * kTokens * kRows; };
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 32 * warp + 16 * m + g + i / 2 * 8, token = 8 * c + 2 * t + i % 2;
          p.partial[sums(slice) + token * kRows + row] = acc[m][c][i];
        }
      }
    }
    if (!last_to_arrive(p.counters + tile, p.slices, cast<uint32_t>(shared), thread)) return;
#pragma unroll 1  // eight loads are on their way as it is, and twice as many were a spill on sm_120
    for (int i = 4 * thread; i < kTokens * kRows; i += 4 * kThreads) {
      const int64_t token = token0 + i / kRows, row = row0 + i % kRows;
      if (token >= p.tokens || row >= p.n) continue;
      const float4 sum = add_partial(p.partial + (sums(0) + i), kTokens * kRows, p.slices);
      finish<kDtype>(p, row, token, sum.x);
      if (row + 1 < p.n) finish<kDtype>(p, row + 1, token, sum.y);
      if (row + 2 < p.n) finish<kDtype>(p, row + 2, token, sum.z);
      if (row + 3 < p.n) finish<kDtype>(p, row + 3, token, sum.w);
    }
    for (int i = thread; row_tile == 0 && !p.h_given && i < kTokens * p.rank; i += kThreads) {
      const int64_t token = token0 + i / p.rank;
      if (token >= p.tokens) break;
      float sum = 0;
      for (int s = 0; s < p.slices; ++s) sum += p.partial[h_sums(p, token_tile, s) + i];
      p.h[token * p.rank + i % p.rank] = round_to<kDtype>(sum);
    }
    if (thread == 0) p.counters[tile] = 0;
  }
};

template <int kDtype, bool kNf4, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens == 64 ? 1 : 2) lora_linear_mixed(const Problem p) {
  LK_DYNAMIC_SHARED(shared);
  Kernel<kDtype, kNf4, kTokens>::run(p, shared);
}

// How a problem is cut up. A pure function of sizes and the number of multiprocessors.
struct Plan {
  int token_tile;  // 16, 32 or 64
  int slice_k, slices, row_tiles;
  int64_t tiles;

  int64_t workspace_floats(int64_t rank) const {
    if (slices == 1) return 0;
    return tiles * slices * token_tile * kRows + tiles / row_tiles * slices * token_tile * rank;
  }
};

inline Plan make_plan(int64_t tokens, int64_t n, int64_t k, int multiprocessors) {
  const int token_tile = tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
  const int64_t row_tiles = (n + kRows - 1) / kRows,
                tiles = row_tiles * ((tokens + token_tile - 1) / token_tile);
  // As many slices as fill the multiprocessors once, each at least 512 long: a slice costs its sums, written
  // and read.
  int slices = 1;
  while (slices < kMostSlices && tiles * slices * 2 <= multiprocessors && k / (slices * 2) >= 512)
    slices *= 2;
  const int64_t slice_k = ((k + slices - 1) / slices + 127) / 128 * 128;
  return {token_tile, static_cast<int>(slice_k), static_cast<int>((k + slice_k - 1) / slice_k),
          static_cast<int>(row_tiles), tiles};
}

}  // namespace lk::cuda::mixed

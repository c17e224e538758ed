// lora_linear for T <= 8 tokens, in one launch:  y [T, N] = x·W0ᵀ + s·h·Bᵀ + bias,  h [T, r] = x·Aᵀ
//
// W0 is the m16 operand of mma.m16n8k16 and the tokens are its n8. A block owns `rows` rows of W0 and one of `slices`
// slices of K; a warp 16 of those rows at a time:
//
//                 K: one slice per block (or, clustered, per rank)
//              ┌───────────┬───────────┬ ─ ─ ─
//        64 ┌  │ warp 0 ▒▒ │           │          ▒ a chunk: 16 rows x 128 bytes (256 NF4 or 64 dense weights), the
//    rows   │  │ warp 1    │           │            unit of the warp's own ring of cp.async
//    a pass └  │ 2, 3      │           │
//              │ next pass │           │
//              └───────────┴───────────┴ ─ ─ ─
//
// Within 64 weights of a row the order of K is free, so a thread takes 16 successive ones (8 bytes of codes): the
// fragments of A and of x come from memory as they lie there and nothing is repacked. Codes become 16-bit pairs by the
// table of nf4.cuh, the block's scale multiplies the fp32 fragment once per 64 weights. h of the slice is computed by
// every block beside it (it is linear: partial sums add up) and s·B·h is added to the slice's sums before these are
// reduced, in the order of the slices: by the last block of a group through global memory, or, clustered, through
// distributed shared memory. Nothing depends on timing.
//
// Bytes per weight 0.516 (NF4) or 2; instructions per weight 1.4 (tests/test_sass.py counts them); the floor is
// W0's bytes over the bandwidth.
#pragma once
#include <algorithm>

#include "nf4.cuh"

namespace lk::cuda::decode {

constexpr int kMostTokens = 8;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPassRows = 16 * kWarps;
constexpr int kStages = 4;
constexpr int kChunkBytes = 128;    // of a row
constexpr int kChunks = kWarps * kStages * 16;
constexpr int kUnit = 64;           // weights of a row that share a scale fragment
constexpr int kMostSlices = 8;      // a cluster has at most 8 blocks
constexpr int kMostRank = 256;
constexpr int64_t kMostShared = 96 << 10;  // sm_86 and 89 give a block 99 KiB
static_assert(kChunks == 256, "the ring fills the gaps of the pair table");

template <bool kNf4>
constexpr int kChunkWeights = kNf4 ? 256 : 64;

// How a problem is cut up. A pure function of sizes and the number of multiprocessors.
struct Plan {
  int rows;     // of a block: a multiple of kPassRows
  int slice_k;  // of K: a multiple of 256
  int slices, groups;
  int64_t shared_bytes;

  int64_t workspace_floats(int64_t tokens, int64_t rank, bool clustered) const {
    if (slices == 1 || clustered) return 0;
    return int64_t{slices} * tokens * (int64_t{groups} * rows + rank);
  }
};

// Where things lie in a block's shared memory.
struct Layout {
  int x, codes, scales, dynamic_map, h, warp_sums, flag, partial, end;
};
__host__ __device__ constexpr Layout layout(bool nf4, int rows, int slice_k, int rank, bool clustered) {
  const auto up = [](int n) { return (n + 15) / 16 * 16; };
  Layout l{};
  l.x = nf4 ? kPairBytes : kChunks * kChunkBytes;
  l.codes = l.x + kMostTokens * (2 * slice_k + 16);
  l.scales = l.codes + (nf4 ? up(rows * (slice_k / kUnit)) : 0);
  l.dynamic_map = l.scales + (nf4 ? 4 * kPassRows * (slice_k / kUnit) : 0);
  l.h = l.dynamic_map + (nf4 ? 4 * 256 : 0);
  l.warp_sums = l.h + 4 * kMostTokens * ((rank + 15) / 16 * 16);
  l.flag = l.warp_sums + 4 * kWarps * 16 * kMostTokens;
  l.partial = l.flag + 16;
  l.end = l.partial + (clustered ? 4 * kMostTokens * rows : 0);
  return l;
}

inline Plan make_plan(bool nf4, int64_t n, int64_t k, int64_t rank, int multiprocessors, bool clustered) {
  Plan best{};
  double best_cost = 0;
  for (int wanted = 1; wanted <= kMostSlices; wanted *= 2) {
    const int64_t slice_k = ((k + wanted - 1) / wanted + 255) / 256 * 256;
    const int slices = static_cast<int>((k + slice_k - 1) / slice_k);
    if (slices != wanted || slice_k > 8192) continue;
    for (int passes = 1; passes <= 32; passes *= 2) {
      const int rows = passes * kPassRows;
      const Layout l = layout(nf4, rows, static_cast<int>(slice_k), static_cast<int>(rank), clustered);
      if (l.end > kMostShared) continue;
      const int64_t groups = (n + rows - 1) / rows, blocks = groups * slices;
      const double waves = static_cast<double>((blocks + multiprocessors - 1) / multiprocessors);
      // Bytes of a block, and what it does besides in bytes' worth: the table (a microsecond), its slice of A (from
      // L2, twice as fast), the sums that are reduced. A model until it is measured.
      const double weight = nf4 ? 0.516 : 2;
      const double block = weight * rows * static_cast<double>(slice_k) + 24e3 +
                           static_cast<double>(rank) * static_cast<double>(slice_k) + (slices > 1 ? 8.0 * rows : 0);
      const double cost = waves * block + (slices > 1 ? 8e3 : 0);
      if (best.rows == 0 || cost < best_cost) {
        best = {rows, static_cast<int>(slice_k), slices, static_cast<int>(groups), l.end};
        best_cost = cost;
      }
    }
  }
  return best;
}

struct Problem {
  int tokens;
  int64_t n, k;
  Global<const uint16_t> x;  // [T, K]
  int64_t x_stride;
  Nf4Weight nf4;
  Global<const uint16_t> dense;  // [N, K]
  int64_t dense_stride;
  Global<const void> lora_A, lora_B;  // [r, K], [N, r]
  int A_dtype, B_dtype;
  int64_t A_stride, B_stride;
  int rank;
  float scaling;
  Global<const void> bias;  // [N] or null
  int bias_dtype;
  Global<uint16_t> y, h;       // [T, N], [T, r]
  Global<float> partial;       // [group][slice][T][rows], then [slice][T][r] of h
  Global<uint32_t> counters;   // [groups], zero between launches
  int rows, slice_k, slices;
  bool x_aligned, A_aligned;   // rows start on 16 bytes
};

// 16 elements of a row of A from element `at`, as 8 pairs of T.
template <int kDtype>
__device__ __forceinline__ void load_A(const Problem& p, int64_t row, int64_t at, uint32_t (&pairs)[8]) {
  const int64_t i = row * p.A_stride + at;
  if (p.A_aligned && p.A_dtype == kDtype) {
    const Global<const uint4> from = cast<const uint4>(cast<const uint16_t>(p.lora_A) + i);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const uint4 four = from[v];
      pairs[4 * v] = four.x, pairs[4 * v + 1] = four.y, pairs[4 * v + 2] = four.z, pairs[4 * v + 3] = four.w;
    }
  } else if (p.A_aligned && p.A_dtype == LK_F32) {
    const Global<const float4> from = cast<const float4>(cast<const float>(p.lora_A) + i);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float4 four = from[v];
      pairs[2 * v] = round_pair<kDtype>(four.x, four.y);
      pairs[2 * v + 1] = round_pair<kDtype>(four.z, four.w);
    }
  } else {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      pairs[v] = round_pair<kDtype>(load_float(p.lora_A, p.A_dtype, i + 2 * v),
                                    load_float(p.lora_A, p.A_dtype, i + 2 * v + 1));
    }
  }
}

// The 16 elements of x that this thread's column of the n8 operand needs of 64: token lane / 4.
__device__ __forceinline__ void load_x(Shared<const char> x, int slice_k, int unit, int lane, uint32_t (&pairs)[8]) {
  const Shared<const uint4> from =
      cast<const uint4>(x + (lane / 4) * (2 * slice_k + 16) + unit * 2 * kUnit + (lane % 4) * 32);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const uint4 four = from[v];
    pairs[4 * v] = four.x, pairs[4 * v + 1] = four.y, pairs[4 * v + 2] = four.z, pairs[4 * v + 3] = four.w;
  }
}

// y of a row and token, rounded once.
template <int kDtype>
__device__ __forceinline__ void finish(const Problem& p, int64_t row, int token, float sum) {
  if (p.bias != nullptr) sum += load_float(p.bias, p.bias_dtype, row);
  p.y[token * p.n + row] = round_to<kDtype>(sum);
}

// How the slices of a group meet. An exchange says where a slice's sums go and adds them up in the order of the slices.
//
// Through global memory: the block that arrives last at the group's counter adds, and leaves the counter at zero for
// the next launch. (The other one, of clusters, is in lora_linear_decode_sm90.cu.)
struct GlobalExchange {
  static constexpr bool kClustered = false;

  static __device__ __forceinline__ int64_t sums(const Problem& p, int group, int slice) {  // [T][rows]
    return (int64_t{group} * p.slices + slice) * p.tokens * p.rows;
  }
  static __device__ __forceinline__ int64_t h_sums(const Problem& p, int slice) {  // [T][r], of group 0
    return sums(p, static_cast<int>((p.n + p.rows - 1) / p.rows), 0) + int64_t{slice} * p.tokens * p.rank;
  }
  static __device__ __forceinline__ void put(const Problem& p, Shared<char>, const Layout&, int group, int slice,
                                             int row, int token, float sum) {
    p.partial[sums(p, group, slice) + token * p.rows + row] = sum;
  }

  template <int kDtype>
  static __device__ __forceinline__ void reduce(const Problem& p, Shared<char> shared, const Layout& l, int group,
                                                int slice, int64_t first_row, int rows, int thread) {
    const Shared<float> h = cast<float>(shared + l.h);
    if (group == 0) {
      for (int i = thread; i < p.rank * p.tokens; i += kThreads) {
        p.partial[h_sums(p, slice) + i] = h[i % p.rank * kMostTokens + i / p.rank];
      }
    }
    const Shared<uint32_t> last = cast<uint32_t>(shared + l.flag);
    __syncthreads();  // the block's sums are written, and the release below is of all of them
    if (thread == 0) {
      last[0] = ptx::atomic_add_acq_rel(p.counters + group, 1) + 1 == static_cast<uint32_t>(p.slices) ? 1 : 0;
    }
    __syncthreads();
    if (last[0] == 0) return;
    for (int i = thread; i < p.tokens * rows; i += kThreads) {
      const int token = i / rows, row = i % rows;
      float sum = 0;
      for (int s = 0; s < p.slices; ++s) sum += p.partial[sums(p, group, s) + token * p.rows + row];
      finish<kDtype>(p, first_row + row, token, sum);
    }
    for (int i = thread; group == 0 && i < p.rank * p.tokens; i += kThreads) {
      float sum = 0;
      for (int s = 0; s < p.slices; ++s) sum += p.partial[h_sums(p, s) + i];
      p.h[i] = round_to<kDtype>(sum);
    }
    if (thread == 0) p.counters[group] = 0;
  }
};

template <int kDtype, bool kNf4, class Exchange>
struct Kernel {
  static constexpr int kRowStride = kNf4 ? kPairStride : kChunkBytes;  // between chunks of the ring
  static constexpr int kRingStart = kNf4 ? kPairStride - kChunkBytes : 0;

  static __device__ __forceinline__ Shared<char> chunk(Shared<char> shared, int warp, int stage, int row) {
    return shared + ((warp * kStages + stage) * 16 + row) * kRowStride + kRingStart;
  }

  // Starts the copy of a warp's 16 rows x 128 bytes. 16-byte pieces of a row are permuted by the row, so that the
  // eight rows of a fragment lie in different banks. Rows and columns that are not there become zeros.
  static __device__ __forceinline__ void start_chunk(const Problem& p, Shared<char> shared, int stage, int64_t row,
                                                     int64_t k0, int slice, int lane, int warp, uint64_t policy) {
    constexpr int kWeightsPerPiece = kChunkWeights<kNf4> / 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = (lane + 32 * i) / 8, piece = lane % 8;
      const int64_t col = k0 + int64_t{slice} * kChunkWeights<kNf4> + piece * kWeightsPerPiece;
      const bool there = row + r < p.n && col < p.k;
      const int64_t at = there ? (row + r) * (kNf4 ? p.k : p.dense_stride) + col : 0;
      const Global<const void> from = kNf4 ? Global<const void>(p.nf4.packed + at / 2)
                                           : Global<const void>(p.dense + at);
      const Shared<char> to = chunk(shared, warp, stage, r) + ((piece ^ (r & 7)) * 16);
      ptx::cp_async_hint(to, from, policy, there ? 16 : 0);
    }
  }

  // acc [16 rows, 8 tokens] += W[16 rows, 64] · x[8 tokens, 64]ᵀ of unit `unit` of the chunk.
  static __device__ __forceinline__ void multiply_unit(Shared<char> shared, int stage, int unit,
                                                       const uint32_t (&x)[8], Shared<const float> scales, int lane,
                                                       int warp, float (&acc)[4]) {
    const int g = lane / 4, t = lane % 4;
    float part[4] = {0, 0, 0, 0};
    if constexpr (kNf4) {
      const int piece = ((2 * unit + t / 2) ^ (g & 7)) * 16 + t % 2 * 8;
      const uint2 low = cast<uint2>(chunk(shared, warp, stage, g) + piece)[0];
      const uint2 high = cast<uint2>(chunk(shared, warp, stage, g + 8) + piece)[0];
      const uint32_t lane_address = static_cast<uint32_t>(4 * lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t top = j < 2 ? low.x : low.y, bottom = j < 2 ? high.x : high.y;
        uint32_t a[4];
        if (j % 2 == 0) {
          a[0] = decode_pair<0>(shared, top, lane_address), a[1] = decode_pair<0>(shared, bottom, lane_address);
          a[2] = decode_pair<1>(shared, top, lane_address), a[3] = decode_pair<1>(shared, bottom, lane_address);
        } else {
          a[0] = decode_pair<2>(shared, top, lane_address), a[1] = decode_pair<2>(shared, bottom, lane_address);
          a[2] = decode_pair<3>(shared, top, lane_address), a[3] = decode_pair<3>(shared, bottom, lane_address);
        }
        const uint32_t b[2] = {x[2 * j], x[2 * j + 1]};
        mma<kDtype>(part, a, b);
      }
      const float scale_g = scales[g], scale_8 = scales[g + 8];
      acc[0] = __fmaf_rn(scale_g, part[0], acc[0]), acc[1] = __fmaf_rn(scale_g, part[1], acc[1]);
      acc[2] = __fmaf_rn(scale_8, part[2], acc[2]), acc[3] = __fmaf_rn(scale_8, part[3], acc[3]);
    } else {
      uint32_t top[8], bottom[8];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int piece = ((2 * t + v) ^ (g & 7)) * 16;
        const uint4 upper = cast<uint4>(chunk(shared, warp, stage, g) + piece)[0];
        const uint4 lower = cast<uint4>(chunk(shared, warp, stage, g + 8) + piece)[0];
        top[4 * v] = upper.x, top[4 * v + 1] = upper.y, top[4 * v + 2] = upper.z, top[4 * v + 3] = upper.w;
        bottom[4 * v] = lower.x, bottom[4 * v + 1] = lower.y, bottom[4 * v + 2] = lower.z, bottom[4 * v + 3] = lower.w;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a[4] = {top[2 * j], bottom[2 * j], top[2 * j + 1], bottom[2 * j + 1]};
        const uint32_t b[2] = {x[2 * j], x[2 * j + 1]};
        mma<kDtype>(part, a, b);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] += part[i];
    }
  }

  // x of the slice into shared memory, zeros for tokens and columns that are not there.
  static __device__ __forceinline__ void stage_x(const Problem& p, Shared<char> to, int64_t k0, int thread) {
    const int per_row = p.slice_k / 8;
    for (int i = thread; i < kMostTokens * per_row; i += kThreads) {
      const int token = i / per_row, col = i % per_row * 8;
      uint4 eight = make_uint4(0, 0, 0, 0);
      if (token < p.tokens && k0 + col < p.k) {
        const Global<const uint16_t> from = p.x + token * p.x_stride + k0 + col;
        if (p.x_aligned) {
          eight = cast<const uint4>(from)[0];
        } else {
          eight.x = uint32_t{from[0]} | uint32_t{from[1]} << 16;
          eight.y = uint32_t{from[2]} | uint32_t{from[3]} << 16;
          eight.z = uint32_t{from[4]} | uint32_t{from[5]} << 16;
          eight.w = uint32_t{from[6]} | uint32_t{from[7]} << 16;
        }
      }
      cast<uint4>(to + token * (2 * p.slice_k + 16) + 2 * col)[0] = eight;
    }
  }

  // h [rank][token] of the slice, by all warps: each takes every fourth unit of 64, and their sums are added in the
  // order of the warps.
  static __device__ __forceinline__ void compute_h(const Problem& p, Shared<char> x, Shared<float> h,
                                                   Shared<float> warp_sums, int64_t k0, int units, int thread) {
    const int lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    for (int first = 0; first < p.rank; first += 16) {
      float acc[4] = {0, 0, 0, 0};
      for (int unit = warp; unit < units; unit += kWarps) {
        uint32_t top[8] = {}, bottom[8] = {}, right[8];
        const int64_t at = k0 + unit * kUnit + 16 * t;
        if (first + g < p.rank) load_A<kDtype>(p, first + g, at, top);
        if (first + g + 8 < p.rank) load_A<kDtype>(p, first + g + 8, at, bottom);
        load_x(x, p.slice_k, unit, lane, right);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t a[4] = {top[2 * j], bottom[2 * j], top[2 * j + 1], bottom[2 * j + 1]};
          const uint32_t b[2] = {right[2 * j], right[2 * j + 1]};
          mma<kDtype>(acc, a, b);
        }
      }
      const Shared<float> mine = warp_sums + warp * 16 * kMostTokens;
      mine[g * kMostTokens + 2 * t] = acc[0], mine[g * kMostTokens + 2 * t + 1] = acc[1];
      mine[(g + 8) * kMostTokens + 2 * t] = acc[2], mine[(g + 8) * kMostTokens + 2 * t + 1] = acc[3];
      __syncthreads();
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warp_sums[w * 16 * kMostTokens + thread];
      h[first * kMostTokens + thread] = sum;  // 128 threads: 16 ranks x 8 tokens
      __syncthreads();
    }
  }

  // The fp32 scales of the warp's 16 rows, c folded in: [unit][row].
  static __device__ __forceinline__ void decode_scales(const Problem& p, Shared<const uint8_t> codes,
                                                       Shared<const float> dynamic_map, int64_t row, int local_row,
                                                       int64_t k0, int units, Shared<float> scales, int lane) {
    for (int i = lane; i < 16 * units; i += 32) {
      const int r = i % 16, unit = i / 16;
      float scale = 0;
      if (row + r < p.n) {
        const int64_t block = ((row + r) * p.k + k0 + unit * kUnit) >> p.nf4.block_shift;
        scale = p.nf4.codes == nullptr
                    ? float(p.nf4.absmax[block])
                    : nested_scale(p.nf4, block, codes[(local_row + r) * units + unit], dynamic_map);
      }
      scales[i] = scale * (1 / kBalance<kDtype>);
    }
  }

  static __device__ __forceinline__ void run(const Problem& p, Shared<char> shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int g = lane / 4, t = lane % 4;
    const int slice = static_cast<int>(blockIdx.x) % p.slices, group = static_cast<int>(blockIdx.x) / p.slices;
    const Layout l = layout(kNf4, p.rows, p.slice_k, p.rank, Exchange::kClustered);
    const int64_t first_row = int64_t{group} * p.rows, k0 = int64_t{slice} * p.slice_k;
    const int cols = static_cast<int>(p.k - k0 < p.slice_k ? p.k - k0 : p.slice_k), units = cols / kUnit;
    const int64_t rows_left = p.n - first_row;
    const int rows = static_cast<int>(rows_left < p.rows ? rows_left : p.rows);
    const int chunks = (cols + kChunkWeights<kNf4> - 1) / kChunkWeights<kNf4>;
    const int passes = (rows + kPassRows - 1) / kPassRows, steps = passes * chunks;
    const Shared<float> scales = cast<float>(shared + l.scales) + warp * 16 * (p.slice_k / kUnit);
    const Shared<float> h = cast<float>(shared + l.h), dynamic_map = cast<float>(shared + l.dynamic_map);
    const Shared<uint8_t> codes = cast<uint8_t>(shared + l.codes);
    const uint64_t policy = ptx::evict_first_policy();

    const auto start = [&](int step) {
      if (step < steps) {
        const int pass = step / chunks;
        start_chunk(p, shared, step % kStages, first_row + pass * kPassRows + warp * 16, k0, step % chunks, lane, warp,
                    policy);
      }
      ptx::cp_async_commit();  // an empty group keeps the count
    };
    for (int step = 0; step < kStages - 1; ++step) start(step);

    if constexpr (kNf4) {
      fill_pair_table<kDtype>(shared, thread, kThreads);
      for (int i = thread; i < 256; i += kThreads) dynamic_map[i] = kNf4Tables.dynamic_map[i];
      if (p.nf4.codes != nullptr) {
        for (int i = thread; i < rows * units; i += kThreads) {
          codes[i] = p.nf4.codes[((first_row + i / units) * p.k + k0 + i % units * kUnit) >> p.nf4.block_shift];
        }
      }
    }
    stage_x(p, shared + l.x, k0, thread);
    __syncthreads();
    compute_h(p, shared + l.x, h, cast<float>(shared + l.warp_sums), k0, units, thread);

    float acc[4] = {0, 0, 0, 0};
    for (int step = 0; step < steps; ++step) {
      const int pass = step / chunks, in_slice = step % chunks;
      const int local_row = pass * kPassRows + warp * 16;
      if (kNf4 && in_slice == 0) {
        __syncwarp();  // the scales of the pass before have been read
        decode_scales(p, codes, dynamic_map, first_row + local_row, local_row, k0, units, scales, lane);
      }
      ptx::cp_async_wait<kStages - 2>();
      __syncwarp();  // every lane's pieces are there, and the stage that is filled next has been read
      start(step + kStages - 1);
#pragma unroll
      for (int u = 0; u < kChunkWeights<kNf4> / kUnit; ++u) {
        const int unit = in_slice * (kChunkWeights<kNf4> / kUnit) + u;
        if (unit >= units) break;
        uint32_t right[8];
        load_x(shared + l.x, p.slice_k, unit, lane, right);
        multiply_unit(shared, step % kStages, u, right, scales + unit * 16, lane, warp, acc);
      }
      if (in_slice + 1 < chunks) continue;
      // The pass is done: s·B·h of the slice, and out with it.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int local = local_row + g + 8 * half;
        const int64_t row = first_row + local;
        if (row < p.n) {
          float low[2] = {0, 0};
          for (int j = 0; j < p.rank; ++j) {
            const float b = load_float(p.lora_B, p.B_dtype, row * p.B_stride + j);
            low[0] = __fmaf_rn(b, h[j * kMostTokens + 2 * t], low[0]);
            low[1] = __fmaf_rn(b, h[j * kMostTokens + 2 * t + 1], low[1]);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int token = 2 * t + i;
            const float sum = __fmaf_rn(p.scaling, low[i], acc[2 * half + i]);
            if (token >= p.tokens) continue;
            if (p.slices == 1) {
              finish<kDtype>(p, row, token, sum);
            } else {
              Exchange::put(p, shared, l, group, slice, local, token, sum);
            }
          }
        }
        acc[2 * half] = acc[2 * half + 1] = 0;
      }
    }
    if (p.slices > 1) {
      Exchange::template reduce<kDtype>(p, shared, l, group, slice, first_row, rows, thread);
    } else if (group == 0) {
      for (int i = thread; i < p.rank * p.tokens; i += kThreads) {
        p.h[i] = round_to<kDtype>(h[i % p.rank * kMostTokens + i / p.rank]);
      }
    }
  }
};

template <int kDtype, bool kNf4, class Exchange>
__global__ void __launch_bounds__(kThreads) lora_linear_decode(const Problem p) {
  LK_DYNAMIC_SHARED(shared);
  Kernel<kDtype, kNf4, Exchange>::run(p, shared);
}

// What both launchers do: the plan, the parameters, the choice among the instances.
inline bool aligned_rows(const void* data, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_bytes % 16 == 0;
}
inline int64_t element_bytes(int dtype) { return dtype == LK_F32 ? 4 : 2; }

template <class Exchange>
int run(const char* name, const lk_matrix* x, int64_t tokens, const lk_base_weight* base, const lk_adapter* adapter,
        const lk_matrix* bias, void* y, void* h, void* workspace, uint32_t* counters, void* stream) {
  if (x->dtype != LK_BF16 && x->dtype != LK_F16) return LK_UNSUPPORTED_DTYPE;
  const bool nf4 = base->nf4 != nullptr;
  const int64_t n = base->out_features, k = base->in_features;
  const Plan plan = make_plan(nf4, n, k, adapter->rank, device_info().multiprocessors, Exchange::kClustered);
  const lk_nf4_weight none = {nullptr, nullptr, nullptr, nullptr, 64};
  const lk_matrix &A = adapter->lora_A, &B = adapter->lora_B;
  Problem p{static_cast<int>(tokens),
            n,
            k,
            Global<const uint16_t>(static_cast<const uint16_t*>(x->data)),
            x->stride,
            Nf4Weight(nf4 ? *base->nf4 : none),
            Global<const uint16_t>(static_cast<const uint16_t*>(base->dense.data)),
            base->dense.stride,
            Global<const void>(A.data),
            Global<const void>(B.data),
            A.dtype,
            B.dtype,
            A.stride,
            B.stride,
            static_cast<int>(adapter->rank),
            static_cast<float>(adapter->scaling),
            Global<const void>(bias->data),
            bias->dtype,
            Global<uint16_t>(static_cast<uint16_t*>(y)),
            Global<uint16_t>(static_cast<uint16_t*>(h)),
            Global<float>(static_cast<float*>(workspace)),
            Global<uint32_t>(counters),
            plan.rows,
            plan.slice_k,
            plan.slices,
            aligned_rows(x->data, x->stride, 2),
            aligned_rows(A.data, A.stride, element_bytes(A.dtype))};
  const LaunchShape shape{static_cast<unsigned>(plan.groups * plan.slices), 1, 1, kThreads,
                          static_cast<size_t>(plan.shared_bytes),
                          Exchange::kClustered ? static_cast<unsigned>(plan.slices) : 1};
  if (x->dtype == LK_BF16) {
    return nf4 ? launch(name, lora_linear_decode<LK_BF16, true, Exchange>, shape, stream, p)
               : launch(name, lora_linear_decode<LK_BF16, false, Exchange>, shape, stream, p);
  }
  return nf4 ? launch(name, lora_linear_decode<LK_F16, true, Exchange>, shape, stream, p)
             : launch(name, lora_linear_decode<LK_F16, false, Exchange>, shape, stream, p);
}

}  // namespace lk::cuda::decode

// lora_linear for T <= 8 tokens, in one launch:  y [T, N] = x·W0ᵀ + s·h·Bᵀ + bias,  h [T, r] = x·Aᵀ
//
// W0 is the m16 operand of mma.m16n8k16 and the tokens are its n8. A block owns `rows` rows of W0 and one of
// `slices` slices of K; a warp 16 of those rows at a time:
//
//                 K: one slice per block (or, clustered, per rank)
//              ┌───────────┬───────────┬ ─ ─ ─
//        64 ┌  │ warp 0 ▒▒ │           │          ▒ a chunk: 16 rows x 128 bytes (256 NF4
//    rows   │  │ warp 1    │           │            or 64 dense weights), the unit of the
//    a pass └  │ 2, 3      │           │            warp's own ring of cp.async
//              │ next pass │           │
//              └───────────┴───────────┴ ─ ─ ─
//
// Within 64 weights of a row the order of K is free, so a thread takes 16 successive ones (8 bytes of codes):
// the fragments of A and of x come from memory as they lie there and nothing is repacked. Codes become 16-bit
// pairs by the table of nf4.cuh, the block's scale multiplies the fp32 fragment once per 64 weights. h of the
// slice is computed by every block beside it (it is linear: partial sums add up) and s·B·h is added to the
// slice's sums before these are reduced, in the order of the slices: by the last block of a group through
// global memory, or, clustered, through distributed shared memory. Nothing depends on timing.
//
// Bytes per weight 0.516 (NF4) or 2; instructions per weight 1.7 (tests/test_sass.py counts them); the floor
// is W0's bytes over the bandwidth.
#pragma once
#include <algorithm>

#include "lora_linear.cuh"

namespace lk::cuda::decode {

constexpr int kMostTokens = 8;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPassRows = 16 * kWarps;
constexpr int kStages = 4;
constexpr int kChunkBytes = 128;  // of a row
constexpr int kChunks = kWarps * kStages * 16;
constexpr int kUnit = 64;  // weights of a row that share a scale fragment
constexpr int kMostSlices = 64;
constexpr int kMostCluster = 8;  // slices that are the blocks of a cluster
constexpr int64_t kMostShared = 96 << 10;  // sm_86 and 89 give a block 99 KiB; sm_80 and 90 have room for two
static_assert(kChunks == 256, "the ring fills the gaps of the pair table");

template <bool kNf4>
constexpr int kChunkWeights = kNf4 ? 256 : 64;

// How a problem is cut up. A pure function of sizes and of the device.
struct Plan {
  int rows;     // of a block: a multiple of kPassRows; 0: there is no way
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

// The cheapest way with blocks of up to kMostShared and up to 8 slices. Where K is too long for both: more
// slices, or, since a cluster has at most 8 blocks, as much shared memory as a block can have.
inline Plan make_plan(bool nf4, int64_t n, int64_t k, int64_t rank, const DeviceInfo& device,
                      bool clustered) {
  Plan best{};
  double best_cost = 0;
  const int64_t whole = clustered && device.capability < 120 ? 227 << 10 : kMostShared;
  for (const int64_t most_shared : {kMostShared, whole}) {
    for (int wanted = 1; wanted <= (clustered ? kMostCluster : kMostSlices); wanted *= 2) {
      if (wanted > kMostCluster && best.rows > 0) break;
      const int64_t slice_k = ((k + wanted - 1) / wanted + 255) / 256 * 256;
      const int slices = static_cast<int>((k + slice_k - 1) / slice_k);
      if ((slices != wanted && wanted <= kMostCluster) || slice_k > 8192) continue;
      for (int passes = 1; passes <= 32; passes *= 2) {
        const int rows = passes * kPassRows;
        const Layout l = layout(nf4, rows, static_cast<int>(slice_k), static_cast<int>(rank), clustered);
        if (l.end > most_shared) continue;
        const int64_t groups = (n + rows - 1) / rows, blocks = groups * slices;
        const double waves =
            static_cast<double>((blocks + device.multiprocessors - 1) / device.multiprocessors);
        // Bytes of a block, and what it does besides in bytes' worth: the table (a microsecond), its slice of
        // A (from L2, twice as fast), the sums that are reduced. A model until it is measured.
        const double weight = nf4 ? 0.516 : 2;
        const double block = weight * rows * static_cast<double>(slice_k) + 24e3 +
                             static_cast<double>(rank) * static_cast<double>(slice_k) +
                             (slices > 1 ? 8.0 * rows : 0);
        const double cost = waves * block + (slices > 1 ? 8e3 : 0);
        if (best.rows == 0 || cost < best_cost) {
          best = {rows, static_cast<int>(slice_k), slices, static_cast<int>(groups), l.end};
          best_cost = cost;
        }
      }
    }
    if (best.rows > 0) break;
  }
  return best;
}

struct Problem : LoraLinear {
  Global<float> partial;      // [group][slice][T][rows], then [slice][T][r] of h
  Global<uint32_t> counters;  // [groups], zero between launches
  int rows, slice_k, slices, groups;
  bool codes_aligned;  // a scale's code for each unit, and rows of codes start on 4 bytes
};

// The 16 elements of x that this thread's column of the n8 operand needs of 64.
__device__ __forceinline__ void load_x(Shared<const char> x, uint32_t (&pairs)[8]) {
  const Shared<const uint4> from = cast<const uint4>(x);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const uint4 four = from[v];
    pairs[4 * v] = four.x, pairs[4 * v + 1] = four.y, pairs[4 * v + 2] = four.z, pairs[4 * v + 3] = four.w;
  }
}

// low[half][i] += sum over j of B[rows[half], j] · h[j, token + i], in the order of j: several j at a time
// where rows of B lie on 16 bytes.
template <int kDtype>
__device__ __forceinline__ void multiply_B(const Problem& p, Shared<const float> h, const int64_t (&rows)[2],
                                           int token, float (&low)[2][2]) {
  const int64_t at[2] = {rows[0] * p.B_stride, rows[1] * p.B_stride};
  const auto add = [&](int j, float b0, float b1) {
    const float2 two = cast<const float2>(h + (j * kMostTokens + token))[0];
    low[0][0] = __fmaf_rn(b0, two.x, low[0][0]), low[0][1] = __fmaf_rn(b0, two.y, low[0][1]);
    low[1][0] = __fmaf_rn(b1, two.x, low[1][0]), low[1][1] = __fmaf_rn(b1, two.y, low[1][1]);
  };
  const auto low_half = [](uint32_t pair) { return to_float<kDtype>(static_cast<uint16_t>(pair)); };
  const auto high_half = [](uint32_t pair) { return to_float<kDtype>(static_cast<uint16_t>(pair >> 16)); };
  int j = 0;
  if (p.B_aligned && p.B_dtype == kDtype) {
    const Global<const uint16_t> B = cast<const uint16_t>(p.lora_B);
#pragma unroll 2
    for (; j + 8 <= p.rank; j += 8) {
      const uint4 first = cast<const uint4>(B + (at[0] + j))[0];
      const uint4 second = cast<const uint4>(B + (at[1] + j))[0];
      add(j, low_half(first.x), low_half(second.x)), add(j + 1, high_half(first.x), high_half(second.x));
      add(j + 2, low_half(first.y), low_half(second.y)), add(j + 3, high_half(first.y), high_half(second.y));
      add(j + 4, low_half(first.z), low_half(second.z)), add(j + 5, high_half(first.z), high_half(second.z));
      add(j + 6, low_half(first.w), low_half(second.w)), add(j + 7, high_half(first.w), high_half(second.w));
    }
  } else if (p.B_aligned && p.B_dtype == LK_F32) {
    const Global<const float> B = cast<const float>(p.lora_B);
#pragma unroll 4
    for (; j + 4 <= p.rank; j += 4) {
      const float4 first = cast<const float4>(B + (at[0] + j))[0];
      const float4 second = cast<const float4>(B + (at[1] + j))[0];
      add(j, first.x, second.x), add(j + 1, first.y, second.y);
      add(j + 2, first.z, second.z), add(j + 3, first.w, second.w);
    }
  }
#pragma unroll 1
  for (; j < p.rank; ++j) {
    add(j, load_float(p.lora_B, p.B_dtype, at[0] + j), load_float(p.lora_B, p.B_dtype, at[1] + j));
  }
}

// How the slices of a group meet. An exchange says where a slice's sums go and adds them up in the order of
// the slices.
//
// Through global memory: the block that arrives last at the group's counter adds, and leaves the counter at
// zero for the next launch. (The other one, of clusters, is in lora_linear_decode_sm90.cu.)
struct GlobalExchange {
  static constexpr bool kClustered = false;

  static __device__ __forceinline__ int64_t sums(const Problem& p, int group, int slice) {  // [T][rows]
    return (int64_t{group} * p.slices + slice) * p.tokens * p.rows;
  }
  static __device__ __forceinline__ int64_t h_sums(const Problem& p, int slice) {  // [T][r], of group 0
    return sums(p, p.groups, 0) + int64_t{slice} * p.tokens * p.rank;
  }
  static __device__ __forceinline__ void put(const Problem& p, Shared<char>, const Layout&, int group,
                                             int slice, int row, int token, float sum) {
    p.partial[sums(p, group, slice) + token * p.rows + row] = sum;
  }

  template <int kDtype>
  static __device__ __forceinline__ void reduce(const Problem& p, Shared<char> shared, const Layout& l,
                                                int group, int slice, int64_t first_row, int rows,
                                                int thread) {
    const Shared<float> h = cast<float>(shared + l.h);
    if (group == 0) {
      for (int i = thread; i < p.rank * p.tokens; i += kThreads) {
        p.partial[h_sums(p, slice) + i] = h[i % p.rank * kMostTokens + i / p.rank];
      }
    }
    const Shared<uint32_t> flag = cast<uint32_t>(shared + l.flag);
    if (!last_to_arrive(p.counters + group, p.slices, flag, thread)) return;
    for (int i = thread; i < static_cast<int>(p.tokens) * rows; i += kThreads) {
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
  static constexpr int kStageStride = 16 * kRowStride, kWarpStride = kStages * kStageStride;

  // A lane's part in the copies of a warp's chunks: 16 bytes, piece lane % 8, of each of the rows lane / 8 +
  // 4i. Copies run kStages - 1 chunks ahead of the products and come to the next pass before them: their
  // counters are their own.
  struct Feed {
    Global<const char> slice;  // the lane's piece of the block's first row
    int64_t row_bytes;
    int row, rows;            // the lane's first row in the pass; rows of the block
    int passes;               // that are left, with this one
    unsigned pass_bytes, at;  // of a row: those of all chunks, and where the next one starts
    unsigned there;           // from here on the lane's pieces are beyond K
    int to;                   // where in a stage the piece of its first row goes
    Global<const char> from[4];

    __device__ __forceinline__ Feed(const Problem& p, int64_t first_row, int64_t k0, int rows, int cols,
                                    int chunks, int lane, int warp)
        : row_bytes(kNf4 ? p.k / 2 : 2 * p.dense_stride),
          row(warp * 16 + lane / 8),
          rows(rows),
          passes((rows + kPassRows - 1) / kPassRows),
          pass_bytes(static_cast<unsigned>(chunks * kChunkBytes)) {
      const int piece = lane % 8, bytes = kNf4 ? cols / 2 : 2 * cols;
      slice = (kNf4 ? cast<const char>(p.nf4.packed) + k0 / 2 : cast<const char>(p.dense) + 2 * k0) +
              first_row * row_bytes + 16 * piece;
      there = bytes > 16 * piece ? static_cast<unsigned>(bytes - 16 * piece) : 0;
      to = warp * kWarpStride + kRingStart + lane / 8 * kRowStride + (piece ^ lane / 8) * 16;
      start_pass();
    }

    // Rows that are not there are copied from the last one: nothing of them is stored.
    __device__ __forceinline__ void start_pass() {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        from[i] = slice + int64_t{row + 4 * i < rows ? row + 4 * i : rows - 1} * row_bytes;
      }
      at = 0;
    }

    // The next chunk into a stage. Pieces are permuted by their row, so that the eight rows of a fragment lie
    // in different banks; those beyond K become zeros.
    __device__ __forceinline__ void start_chunk(Shared<char> stage, uint64_t policy) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::cp_async_hint(stage + (4 * i * kRowStride + (to ^ i % 2 * 64)), from[i] + at, policy,
                           at < there ? 16 : 0);
      }
      at += kChunkBytes;
    }

    // Chunks to start until the pass ends.
    __device__ __forceinline__ int left() const { return static_cast<int>((pass_bytes - at) / kChunkBytes); }

    // After the last pass the next chunks stay beyond K: zeros, which nobody reads, keep the count of groups.
    __device__ __forceinline__ void end_pass() {
      row += kPassRows;
      if (--passes > 0) start_pass();
    }
  };

  // acc [16 rows, 8 tokens] += W[16 rows, 64] · x[8 tokens, 64]ᵀ of unit `unit` of the chunk in `stage`;
  // `scales` are the unit's, from row g on.
  static __device__ __forceinline__ void multiply_unit(Shared<char> shared, Shared<const char> stage,
                                                       int unit, const uint32_t (&x)[8],
                                                       Shared<const float> scales, int lane, int warp,
                                                       float (&acc)[4]) {
    const int g = lane / 4, t = lane % 4;
    const int row = warp * kWarpStride + kRingStart + g * kRowStride;
    float part[4] = {0, 0, 0, 0};
    if constexpr (kNf4) {
      const int at = ((t / 2 ^ g) * 16 + t % 2 * 8) ^ (32 * unit);  // piece 2·unit + t / 2, permuted
      const uint2 low = cast<const uint2>(stage + (row + at))[0];
      const uint2 high = cast<const uint2>(stage + (row + at + 8 * kRowStride))[0];
      const uint32_t lane_address = static_cast<uint32_t>(4 * lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t top = j < 2 ? low.x : low.y, bottom = j < 2 ? high.x : high.y;
        uint32_t a[4];
        if (j % 2 == 0) {
          a[0] = decode_pair<0>(shared, top, lane_address);
          a[1] = decode_pair<0>(shared, bottom, lane_address);
          a[2] = decode_pair<1>(shared, top, lane_address);
          a[3] = decode_pair<1>(shared, bottom, lane_address);
        } else {
          a[0] = decode_pair<2>(shared, top, lane_address);
          a[1] = decode_pair<2>(shared, bottom, lane_address);
          a[2] = decode_pair<3>(shared, top, lane_address);
          a[3] = decode_pair<3>(shared, bottom, lane_address);
        }
        const uint32_t b[2] = {x[2 * j], x[2 * j + 1]};
        mma<kDtype>(part, a, b);
      }
      const float scale_g = scales[0], scale_8 = scales[8];
      acc[0] = __fmaf_rn(scale_g, part[0], acc[0]), acc[1] = __fmaf_rn(scale_g, part[1], acc[1]);
      acc[2] = __fmaf_rn(scale_8, part[2], acc[2]), acc[3] = __fmaf_rn(scale_8, part[3], acc[3]);
    } else {
      uint32_t top[8], bottom[8];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int at = ((2 * t + v) ^ g) * 16;
        const uint4 high = cast<const uint4>(stage + (row + at))[0];
        const uint4 low = cast<const uint4>(stage + (row + at + 8 * kRowStride))[0];
        top[4 * v] = high.x, top[4 * v + 1] = high.y, top[4 * v + 2] = high.z, top[4 * v + 3] = high.w;
        bottom[4 * v] = low.x, bottom[4 * v + 1] = low.y;
        bottom[4 * v + 2] = low.z, bottom[4 * v + 3] = low.w;
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
    for (int token = 0; token < kMostTokens; ++token) {
      for (int col = 8 * thread; col < p.slice_k; col += 8 * kThreads) {
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (token < p.tokens && k0 + col < p.k) {
          const Global<const uint16_t> from = p.x + (token * p.x_stride + k0 + col);
          if (p.x_aligned) {
            eight = cast<const uint4>(from)[0];
          } else {
            eight.x = uint32_t{from[0]} | uint32_t{from[1]} << 16;
            eight.y = uint32_t{from[2]} | uint32_t{from[3]} << 16;
            eight.z = uint32_t{from[4]} | uint32_t{from[5]} << 16;
            eight.w = uint32_t{from[6]} | uint32_t{from[7]} << 16;
          }
        }
        cast<uint4>(to + (token * (2 * p.slice_k + 16) + 2 * col))[0] = eight;
      }
    }
  }

  // acc [16 ranks, 8 tokens] += A·xᵀ over every kWarps-th unit of the slice. Four units' loads are under way
  // at once: they come from L2, and nothing else hides their latency.
  template <bool kDirect>
  static __device__ __forceinline__ void multiply_A(const Problem& p, Shared<const char> lane_x, int first,
                                                    int64_t k0, int units, int lane, int warp,
                                                    float (&acc)[4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll(kDirect ? 4 : 1)
    for (int unit = warp; unit < units; unit += kWarps) {
      uint32_t top[8] = {}, bottom[8] = {}, right[8];
      const int64_t at = k0 + unit * kUnit + 16 * t;
      if (first + g < p.rank) load_A<kDtype, kDirect>(p, first + g, at, top);
      if (first + g + 8 < p.rank) load_A<kDtype, kDirect>(p, first + g + 8, at, bottom);
      load_x(lane_x + unit * (2 * kUnit), right);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a[4] = {top[2 * j], bottom[2 * j], top[2 * j + 1], bottom[2 * j + 1]};
        const uint32_t b[2] = {right[2 * j], right[2 * j + 1]};
        mma<kDtype>(acc, a, b);
      }
    }
  }

  // h [rank][token] of the slice: the sums of all warps, in their order.
  static __device__ __forceinline__ void compute_h(const Problem& p, Shared<const char> lane_x,
                                                   Shared<float> h, Shared<float> warp_sums, int64_t k0,
                                                   int units, int thread) {
    const int lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    for (int first = 0; first < p.rank; first += 16) {
      float acc[4] = {0, 0, 0, 0};
      if (p.A_aligned && p.A_dtype == kDtype) {
        multiply_A<true>(p, lane_x, first, k0, units, lane, warp, acc);
      } else {
        multiply_A<false>(p, lane_x, first, k0, units, lane, warp, acc);
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

  // The codes of the block's scales, [row][unit]: a group of cp.async where a row's lie on 4 bytes, one for
  // each unit.
  static __device__ __forceinline__ void stage_codes(const Problem& p, Shared<uint8_t> codes,
                                                     int64_t first_row, int64_t k0, int rows, int units,
                                                     int thread) {
    if (p.codes_aligned) {
      const Global<const uint8_t> from = p.nf4.codes + (first_row * p.k + k0) / kUnit;
      const int per_row = units / 4;
      for (int i = thread; i < rows * per_row; i += kThreads) {
        ptx::cp_async<4>(codes + 4 * i, from + (i / per_row * (p.k / kUnit) + i % per_row * 4));
      }
    } else {
      for (int i = thread; i < rows * units; i += kThreads) {
        codes[i] = p.nf4.codes[((first_row + i / units) * p.k + k0 + i % units * kUnit) >> p.nf4.block_shift];
      }
    }
  }

  // The fp32 scales of the warp's 16 rows, c folded in: [unit][row], zeros for what is not there. Half a warp
  // takes the even units, half the odd ones.
  static __device__ __forceinline__ void decode_scales(const Problem& p, Shared<const uint8_t> codes,
                                                       Shared<const float> dynamic_map, int64_t row,
                                                       int local_row, int64_t k0, int units, int chunks,
                                                       Shared<float> scales, int lane) {
    const int r = lane % 16;
    const int here = row + r < p.n ? units : 0;
    const int64_t row_block = (row + r) * p.k >> p.nf4.block_shift;
    for (int unit = lane / 16; unit < chunks * (kChunkWeights<kNf4> / kUnit); unit += 2) {
      float scale = 0;
      if (unit < here) {
        const int64_t block = row_block + ((k0 + unit * kUnit) >> p.nf4.block_shift);
        scale = p.nf4.codes == nullptr
                    ? float(p.nf4.absmax[block])
                    : nested_scale(p.nf4, block, codes[(local_row + r) * units + unit], dynamic_map);
      }
      scales[unit * 16 + r] = scale * (1 / kBalance<kDtype>);
    }
  }

  static __device__ __forceinline__ void run(const Problem& p, Shared<char> shared) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int g = lane / 4, t = lane % 4;
    const int block = static_cast<int>(blockIdx.x), slice = block % p.slices, group = block / p.slices;
    const Layout l = layout(kNf4, p.rows, p.slice_k, p.rank, Exchange::kClustered);
    const int64_t first_row = int64_t{group} * p.rows, k0 = int64_t{slice} * p.slice_k;
    const int cols = static_cast<int>(p.k - k0 < p.slice_k ? p.k - k0 : p.slice_k), units = cols / kUnit;
    const int64_t rows_left = p.n - first_row;
    const int rows = static_cast<int>(rows_left < p.rows ? rows_left : p.rows);
    const int chunks = (cols + kChunkWeights<kNf4> - 1) / kChunkWeights<kNf4>;
    const Shared<float> scales = cast<float>(shared + l.scales) + warp * 16 * (p.slice_k / kUnit);
    const Shared<float> h = cast<float>(shared + l.h), dynamic_map = cast<float>(shared + l.dynamic_map);
    const Shared<uint8_t> codes = cast<uint8_t>(shared + l.codes);
    const Shared<const char> lane_x = shared + l.x + g * (2 * p.slice_k + 16) + t * 32;  // token g's row
    const uint64_t policy = ptx::evict_first_policy();

    if (kNf4 && p.nf4.codes != nullptr) stage_codes(p, codes, first_row, k0, rows, units, thread);
    ptx::cp_async_commit();
    // Rows of B are read at the end of a pass, where nothing hides their latency.
    for (int i = thread; p.rank > 0 && i < rows; i += kThreads) {
      const int64_t at = (first_row + i) * p.B_stride * (p.B_dtype == LK_F32 ? 4 : 2);
      ptx::prefetch_l2(cast<const char>(p.lora_B) + at);
    }
    Feed feed(p, first_row, k0, rows, cols, chunks, lane, warp);
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) {
      feed.start_chunk(shared + stage * kStageStride, policy);
      ptx::cp_async_commit();
      if (feed.left() == 0) feed.end_pass();
    }

    if constexpr (kNf4) {
      fill_pair_table<kDtype>(shared, thread, kThreads);
      for (int i = thread; i < 256; i += kThreads) dynamic_map[i] = kNf4Tables.dynamic_map[i];
    }
    stage_x(p, shared + l.x, k0, thread);
    ptx::cp_async_wait<kStages - 1>();  // the codes
    __syncthreads();
    compute_h(p, lane_x, h, cast<float>(shared + l.warp_sums), k0, units, thread);

    const int passes = (rows + kPassRows - 1) / kPassRows;
    unsigned stage = 0, freed = (kStages - 1) * kStageStride;
    for (int pass = 0; pass < passes; ++pass) {
      const int local_row = pass * kPassRows + warp * 16;
      if constexpr (kNf4) {
        __syncwarp();  // the scales of the pass before have been read
        decode_scales(p, codes, dynamic_map, first_row + local_row, local_row, k0, units, chunks, scales,
                      lane);
      }
      float acc[4] = {0, 0, 0, 0};
      Shared<const char> x_at = lane_x;
      Shared<const float> scales_at = scales + g;
      for (int left = chunks; left > 0;) {
        // Until the products or the copies are through their pass, so that the inner loop need not ask: it
        // has room for 33 instructions beside the 184 that decode and multiply.
        const int run = feed.passes > 0 && feed.left() < left ? feed.left() : left;
        left -= run;
        for (const unsigned end = feed.at + static_cast<unsigned>(run * kChunkBytes); feed.at != end;) {
          ptx::cp_async_wait<kStages - 2>();
          __syncwarp();  // every lane's pieces are there, and the stage that is filled next has been read
          feed.start_chunk(shared + freed, policy);
          ptx::cp_async_commit();
          // Beyond the last unit of the slice x and the scales are zeros.
#pragma unroll
          for (int u = 0; u < kChunkWeights<kNf4> / kUnit; ++u) {
            uint32_t right[8];
            load_x(x_at + u * (2 * kUnit), right);
            multiply_unit(shared, shared + stage, u, right, scales_at + u * 16, lane, warp, acc);
          }
          x_at += 2 * kChunkWeights<kNf4>;
          scales_at += kChunkWeights<kNf4> / kUnit * 16;
          freed = stage;
          stage = (stage + kStageStride) % kWarpStride;
        }
        if (feed.passes > 0 && feed.left() == 0) feed.end_pass();
      }
      // The pass is done: s·B·h of the slice, and out with it. For a row that is not there the last is read.
      const int64_t row = first_row + local_row + g;
      const int64_t stored[2] = {row < p.n ? row : p.n - 1, row + 8 < p.n ? row + 8 : p.n - 1};
      float low[2][2] = {};
      multiply_B<kDtype>(p, h, stored, 2 * t, low);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = 2 * t + i;
          const float sum = __fmaf_rn(p.scaling, low[half][i], acc[2 * half + i]);
          if (row + 8 * half >= p.n || token >= p.tokens) continue;
          if (p.slices == 1) {
            finish<kDtype>(p, row + 8 * half, token, sum);
          } else {
            Exchange::put(p, shared, l, group, slice, local_row + g + 8 * half, token, sum);
          }
        }
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

// Two blocks fit a multiprocessor's shared memory; told so, ptxas keeps a chunk's decoding in flight and
// spills nothing.
template <int kDtype, bool kNf4, class Exchange>
__global__ void __launch_bounds__(kThreads, 2) lora_linear_decode(const Problem p) {
  LK_DYNAMIC_SHARED(shared);
  Kernel<kDtype, kNf4, Exchange>::run(p, shared);
}

// What both launchers do: the plan, the parameters, the choice among the instances.
template <class Exchange>
int run(const char* name, const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
        const lk_adapter* adapter, const lk_matrix* bias, void* y, void* h, void* workspace,
        uint32_t* counters, void* stream) {
  if (x->dtype != LK_BF16 && x->dtype != LK_F16) return LK_UNSUPPORTED_DTYPE;
  const bool nf4 = base->nf4 != nullptr;
  const int64_t n = base->out_features, k = base->in_features;
  const Plan plan = make_plan(nf4, n, k, adapter->rank, device_info(), Exchange::kClustered);
  const Problem p{lora_linear_operands(*x, tokens, *base, *adapter, *bias, y, h),
                  Global<float>(static_cast<float*>(workspace)),
                  Global<uint32_t>(counters),
                  plan.rows,
                  plan.slice_k,
                  plan.slices,
                  plan.groups,
                  nf4 && base->nf4->nested_absmax != nullptr && base->nf4->blocksize == kUnit &&
                      k % (4 * kUnit) == 0 && reinterpret_cast<uintptr_t>(base->nf4->absmax) % 4 == 0};
  const LaunchShape shape{static_cast<unsigned>(plan.groups * plan.slices),
                          1,
                          1,
                          kThreads,
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

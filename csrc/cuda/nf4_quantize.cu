// nf4_quantize on a GPU: weight [n] -> packed [ceil(n / 2)], absmax [blocks], and of these the second level.
//
//   block b of W: m = max|w|;  s = w * (1 / max(m, 1e-38));  code = #{k : s > midpoint[k]}
//   A short last block divides by max(m, 1e-38) instead, and stores that clamped m.
//   offset = mean(absmax), summed in double in index order, rounded to fp32
//   v = absmax[b] - offset;  nested = max|v| over 256 scales;  code = #{k : v > midpoint[k] * nested}
//
// First level, aligned kernel (whole blocks, weight on 16 bytes, packed on 4). A warp owns 1024 weights, as 4
// (16-bit) or 8 (fp32) vectors of 16 bytes a lane, all loaded before the first is used:
//
//               lane 0   lane 1        lane 31
//   vector 0   |8 weights|   8   | … |   8   |     a block of 32 weights is 4 lanes of a vector (8 in fp32),
//   vector 1   |    8    |   8   | … |   8   |     one of 256 a whole vector (2), one of 1024 all of them,
//      …            `- 4 bytes of codes            one of 2048 or 4096 is 2 or 4 warps, which meet in shared
//                                                  memory
//
// The maximum is taken of bit patterns without their sign: for finite numbers that is the order of the
// values, and a NaN or an infinity is above them; those set `nonfinite`, which is read when the work is done.
// Of the lanes that share blocks, each divides for the blocks of one vector. The code of s takes one
// comparison: 14·s, rounded, is one of 29 bins, narrower than any two midpoints are apart, so a bin knows its
// midpoint and the codes below it. Bins lie in shared memory once for each lane of a half-warp, in banks of
// its own; an FMA and a LOP make the address. No clamp: |s| exceeds 1 by a rounding, and no midpoint is near.
//
// General kernel: a warp owns a block, which may start anywhere and be short; a lane two weights at a time.
//
// Bytes per weight: sizeof(T) read, 0.5 + 4 / blocksize written, once: 43 MB for 4096 x 4096 of bf16, which
// is 12.8 us at 3.35 TB/s. Instructions per weight: 14 (bf16, blocks of 64, in the SASS of sm_90a), two
// thirds of what an H100 issues in that time.
//
// Second level: 4 bytes read twice and 1 written per scale, in two launches. The format fixes the order of
// the sum, and a chain of additions of doubles, 8 cycles each or more, takes over a millisecond for the 2^18
// scales of that weight. So blocks add up parts in another order. The last one to arrive knows that the sum
// in index order lies within (1.01·n + 64)·2^-53 of theirs, relatively, because no term is negative. Where
// both ends of that interval give the same fp32 mean, it is the mean. Else (in about n·2^-28 of all cases,
// and always where the mean is a tie in fp32) one thread of that block adds them up in index order. A thread
// of the second launch owns one scale: a binary search, whose products of a midpoint and `nested` are exact
// in double.
#include <limits>

#include "nf4.cuh"

namespace lk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWarpTile = 1024, kTile = kWarps * kWarpTile;  // weights
constexpr int kBlocksPerMultiprocessor = 8;  // each takes several tiles, and fills the bins once
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kLargestFloat = std::numeric_limits<float>::max();

template <int kDtype>
constexpr int kWeightsPerVector = kDtype == LK_F32 ? 4 : 8;  // 16 bytes

// ---- bins -------------------------------------------------------------------------------------------------

// Bin v = floor(14·s + 0.5) in -14..14, at index v mod 32: the midpoint in it (infinity where none is) and
// the number of midpoints below it. Adding 1.5·2^16 leaves v in bits 7 to 11 of the sum, whose last bit is
// worth 2^-7.
constexpr float kBinsPerUnit = 14.0f;
constexpr float kBinOrigin = 98304.5f;
constexpr int kBinStride = 128;  // bytes: 16 copies, of 8 bytes each
constexpr uint32_t kBinMask = 31 * kBinStride;
constexpr int kBinBytes = 32 * kBinStride;

struct Bins {
  float midpoint[32];
  uint32_t below[32];
};
constexpr Bins make_bins() {
  Bins bins{};
  for (int v = -14; v <= 14; ++v) {
    float inside = std::numeric_limits<float>::infinity();
    uint32_t below = 0;
    for (const float mid : nf4::kMidpoints) {
      const double place = static_cast<double>(mid) * kBinsPerUnit;
      below += place < v - 0.5;
      if (place > v - 0.5 && place < v + 0.5) inside = mid;
    }
    bins.midpoint[v & 31] = inside;
    bins.below[v & 31] = below;
  }
  return bins;
}
static __constant__ Bins kBins = make_bins();

// The rounding of 14·s to 2^-7 may put an s beside a bin's border on its other side; no midpoint is that near
// to one, and no two share a bin.
constexpr bool bins_are_exact() {
  for (int k = 0; k < nf4::kCodes - 1; ++k) {
    const double place = static_cast<double>(nf4::kMidpoints[k]) * kBinsPerUnit + 16.5;
    const double into = place - static_cast<int>(place);
    if (into < 1.0 / 64 || into > 1 - 1.0 / 64) return false;
    if (k > 0 && (nf4::kMidpoints[k] - nf4::kMidpoints[k - 1]) * kBinsPerUnit < 1) return false;
  }
  return true;
}
static_assert(bins_are_exact());

__device__ __forceinline__ void fill_bins(Shared<char> bins, int thread) {
  for (int i = thread; i < kBinBytes / 8; i += kThreads) {
    const int bin = i / 16;
    cast<uint2>(bins)[i] = make_uint2(__float_as_uint(kBins.midpoint[bin]), kBins.below[bin]);
  }
}

// Appends the code of s to `codes`. `copy` is 8 · (lane mod 16).
__device__ __forceinline__ uint32_t append_code(uint32_t codes, float s, Shared<const char> bins,
                                                uint32_t copy) {
  const uint32_t at = (__float_as_uint(__fmaf_rn(s, kBinsPerUnit, kBinOrigin)) & kBinMask) | copy;
  const uint2 bin = cast<const uint2>(bins + at)[0];
  const float above = __fadd_rn(__uint_as_float(bin.x), -s);  // negative exactly where s > midpoint
  return (codes << 4) + bin.y + (__float_as_uint(above) >> 31);
}

// ---- magnitudes -------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The largest magnitude of 16 bytes of weights, in the high bits: 31 of fp32, else 15 (anything below them).
template <int kDtype>
__device__ __forceinline__ uint32_t largest_of(uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t most = 0;
#pragma unroll
  for (const uint32_t word : words) {
    most = larger(most, word << 1);
    if constexpr (kDtype != LK_F32) most = larger(most, word << 17);
  }
  return most;
}
template <int kDtype>
__device__ __forceinline__ float magnitude(uint32_t most) {
  if constexpr (kDtype == LK_F32) return __uint_as_float(most >> 1);
  return to_float<kDtype>(static_cast<uint16_t>(most >> 17));
}

__device__ __forceinline__ bool is_finite(float magnitude) { return magnitude <= kLargestFloat; }
__device__ __forceinline__ float divisor_of(float magnitude) {
  return magnitude > nf4::kMinAbsmax ? magnitude : nf4::kMinAbsmax;
}

// ---- the first level --------------------------------------------------------------------------------------

struct Problem {
  Global<const void> weight;  // [n]
  int64_t n, first, blocks;   // of this launch: blocks [first, blocks)
  int blocksize, block_shift;
  Global<uint8_t> packed;      // [ceil(n / 2)]
  Global<float> absmax;        // [blocks]
  Global<uint32_t> nonfinite;  // [1], set where a weight is a NaN or an infinity
};

// The codes of one lane's vector: 32 bits, or in fp32 the lower 16.
template <int kDtype>
__device__ __forceinline__ uint32_t codes_of(uint4 v, float inverse, Shared<const char> bins, uint32_t copy) {
  constexpr int kWeights = kWeightsPerVector<kDtype>;
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kWeights; ++i) {
    const int at = (kWeights - 2 - i / 2 * 2) + i % 2;  // the last byte first, of each the high nibble first
    float w;
    if constexpr (kDtype == LK_F32) {
      w = __uint_as_float(words[at]);
    } else {
      w = to_float<kDtype>(static_cast<uint16_t>(words[at / 2] >> (16 * (at % 2))));
    }
    codes = append_code(codes, __fmul_rn(w, inverse), bins, copy);
  }
  return codes;
}

template <int kDtype>
__global__ void __launch_bounds__(kThreads, 4) quantize_aligned(const Problem p) {
  constexpr int kWeights = kWeightsPerVector<kDtype>, kRow = 32 * kWeights, kVectors = kWarpTile / kRow;
  LK_DYNAMIC_SHARED(shared);
  const Shared<uint32_t> warp_most = cast<uint32_t>(shared + kBinBytes);  // [warps]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const uint32_t copy = static_cast<uint32_t>(lane % 16 * 8);
  fill_bins(shared, thread);
  __syncthreads();

  // How many lanes, vectors and warps share a block; 0 where less than one does.
  const int lanes = p.blocksize / kWeights, vectors = p.blocksize / kRow, warps = p.blocksize / kWarpTile;
  // Of the lanes that share a block, each looks after one vector's: it divides and stores.
  const int my_vector = lane % kVectors, first_lane = lane & ~(lanes - 1) & 31;
  const int64_t end = p.blocks << p.block_shift;
  uint32_t worst = 0;
  for (int64_t tile = int64_t{blockIdx.x} * kTile; tile < end; tile += int64_t{gridDim.x} * kTile) {
    const int64_t warp_first = tile + warp * kWarpTile, first = warp_first + lane * kWeights;
    const int64_t to_end = end - first;  // negative behind it
    const int left = static_cast<int>(to_end < kWarpTile ? to_end : kWarpTile);
    const Global<const uint4> from = cast<const uint4>(p.weight) + first / kWeights;
    uint4 weights[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = v * kRow < left ? ptx::load_stream(from + v * 32) : make_uint4(0, 0, 0, 0);
    }
    uint32_t most[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) most[v] = largest_of<kDtype>(weights[v]);
#pragma unroll
    for (int apart = 1; apart < kVectors; apart *= 2) {
      if (vectors <= apart) break;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if ((v & apart) == 0) most[v] = most[v | apart] = larger(most[v], most[v | apart]);
      }
    }
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
      if (lanes <= apart) break;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        most[v] = larger(most[v], __shfl_xor_sync(kAllLanes, most[v], apart));
      }
    }
    uint32_t mine = most[0];
#pragma unroll
    for (int v = 1; v < kVectors; ++v) mine = v == my_vector ? most[v] : mine;
    if (warps > 1) {
      if (lane == 0) warp_most[warp] = mine;
      __syncthreads();
#pragma unroll 1
      for (int w = warp / warps * warps, last = w + warps; w < last; ++w) mine = larger(mine, warp_most[w]);
      __syncthreads();  // read, before the next tile's are written
    }
    const float absmax = magnitude<kDtype>(mine), inverse = __fdiv_rn(1.0f, divisor_of(absmax));
    worst = larger(worst, mine);
    const int64_t begin = warp_first + first_lane * kWeights + my_vector * kRow;
    if (lane - first_lane < kVectors && begin < end && (static_cast<int>(begin) & (p.blocksize - 1)) == 0) {
      p.absmax[begin >> p.block_shift] = absmax;
    }

    uint32_t codes[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float scale = __shfl_sync(kAllLanes, inverse, lane - my_vector + v);
      codes[v] = codes_of<kDtype>(weights[v], scale, shared, copy);
    }
    if constexpr (kWeights == 8) {
      const Global<uint32_t> to = cast<uint32_t>(p.packed + first / 2);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v * kRow < left) to[v * 32] = codes[v];
      }
    } else {
      // Two lanes trade halves: the even one gets both of this vector, the odd one both of the next.
      const bool odd = lane % 2 != 0;
      const int shift = odd ? kRow - kWeights : 0;
      const Global<uint32_t> to = cast<uint32_t>(p.packed + (first + shift) / 2);
#pragma unroll
      for (int v = 0; v < kVectors; v += 2) {
        const uint32_t kept = odd ? codes[v + 1] : codes[v];
        const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? codes[v] : codes[v + 1], 1);
        if (v * kRow + shift < left) to[v * 16] = odd ? kept << 16 | got : got << 16 | kept;
      }
    }
  }
  if (!is_finite(magnitude<kDtype>(worst))) p.nonfinite[0] = 1;
}

template <int kDtype>
__global__ void __launch_bounds__(kThreads) quantize_general(const Problem p) {
  LK_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const uint32_t copy = static_cast<uint32_t>(lane % 16 * 8);
  fill_bins(shared, thread);
  __syncthreads();
  for (int64_t block = p.first + int64_t{blockIdx.x} * kWarps + warp; block < p.blocks;
       block += int64_t{gridDim.x} * kWarps) {
    const int64_t begin = block << p.block_shift;
    const bool whole = p.n - begin >= p.blocksize;
    const int count = whole ? p.blocksize : static_cast<int>(p.n - begin);
    uint32_t most = 0;
    for (int i = lane; i < count; i += 32) {
      most = larger(most, __float_as_uint(load_float(p.weight, kDtype, begin + i)) << 1);
    }
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, apart));
    const float largest = __uint_as_float(most >> 1), divisor = divisor_of(largest);
    const float inverse = __fdiv_rn(1.0f, divisor);
    const auto scaled = [&](int i) {
      const float w = load_float(p.weight, kDtype, begin + i);
      return whole ? __fmul_rn(w, inverse) : __fdiv_rn(w, divisor);
    };
    for (int i = 2 * lane; i < count; i += 64) {
      const uint32_t high = append_code(0, scaled(i), shared, copy);
      p.packed[(begin + i) / 2] = static_cast<uint8_t>(
          i + 1 < count ? append_code(high, scaled(i + 1), shared, copy) : high << 4 | nf4::kPadCode);
    }
    if (lane == 0) {
      p.absmax[block] = whole ? largest : divisor;
      if (!is_finite(largest)) p.nonfinite[0] = 1;
    }
  }
}

// Blocks for `work` of which each takes `per_block`: as many as fill the device.
unsigned grid_for(int64_t work, int64_t per_block) {
  const int64_t wanted = (work + per_block - 1) / per_block;
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * device_info().multiprocessors;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

bool aligned_to(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <int kDtype>
int quantize(const void* weight, int64_t n, int64_t blocksize, uint8_t* packed, float* absmax,
             uint32_t* nonfinite, void* stream) {
  int shift = 0;
  while ((int64_t{1} << shift) < blocksize) ++shift;
  const int64_t blocks = (n + blocksize - 1) / blocksize;
  const int64_t wide = aligned_to(weight, 16) && aligned_to(packed, 4) ? n / blocksize : 0;
  Problem p{Global<const void>(weight),
            n,
            0,
            wide,
            static_cast<int>(blocksize),
            shift,
            Global<uint8_t>(packed),
            Global<float>(absmax),
            Global<uint32_t>(nonfinite)};
  constexpr size_t kSharedBytes = kBinBytes + sizeof(uint32_t) * kWarps;
  if (wide > 0) {
    const LaunchShape shape{grid_for(wide * blocksize, kTile), 1, 1, kThreads, kSharedBytes};
    const int status = launch("nf4_quantize", quantize_aligned<kDtype>, shape, stream, p);
    if (status != LK_OK) return status;
  }
  if (wide == blocks) return LK_OK;
  p.first = wide, p.blocks = blocks;
  const LaunchShape shape{grid_for(blocks - wide, kWarps), 1, 1, kThreads, kSharedBytes};
  return launch("nf4_quantize (general)", quantize_general<kDtype>, shape, stream, p);
}

// ---- the second level -------------------------------------------------------------------------------------

struct Scales {
  Global<const float> absmax;  // [blocks]
  int64_t blocks;
  Global<uint8_t> codes;        // [blocks]
  Global<float> nested_absmax;  // [ceil(blocks / 256)]
  Global<float> offset;         // [1]
  Global<uint32_t> arrivals;    // [1], zero before
  Global<double> partial_sums;  // [grid of average]
};

constexpr int kStaged = 1024;  // scales that wait in shared memory for the thread that adds them up
constexpr int kScalesPerThread = 4;

// The sum over the block, the same for every thread. Between two calls with the same `sums` [warps] comes a
// barrier.
__device__ __forceinline__ double block_sum(double x, Shared<double> sums, int thread) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(kAllLanes, x, apart);
  if (thread % 32 == 0) sums[thread / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += sums[w];
  return sum;
}

// The sum in index order, of thread 0.
__device__ __forceinline__ double sum_in_order(const Scales& p, Shared<double> staged, int thread) {
  double sum = 0;
  for (int64_t first = 0; first < p.blocks; first += kStaged) {
    for (int i = thread; i < kStaged; i += kThreads) {
      staged[i] = first + i < p.blocks ? static_cast<double>(float(p.absmax[first + i])) : 0;
    }
    __syncthreads();
    if (thread == 0) {
      for (int i = 0; i < kStaged; ++i) sum += staged[i];
    }
    __syncthreads();
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) average(const Scales p) {
  LK_DYNAMIC_SHARED(shared);
  const Shared<double> sums = cast<double>(shared), staged = cast<double>(shared) + kWarps;
  const Shared<uint32_t> last = cast<uint32_t>(staged);
  const int thread = static_cast<int>(threadIdx.x);
  double part = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + thread; i < p.blocks;
       i += int64_t{gridDim.x} * kThreads) {
    part += static_cast<double>(float(p.absmax[i]));
  }
  part = block_sum(part, sums, thread);
  if (thread == 0) {
    p.partial_sums[blockIdx.x] = part;
    last[0] = ptx::atomic_add_acq_rel(p.arrivals, 1) + 1 == gridDim.x ? 1 : 0;
  }
  __syncthreads();
  if (last[0] == 0) return;  // the barrier of block_sum comes before scales are staged there
  static_assert(LK_NF4_PARTIAL_SUMS <= kThreads);
  const bool mine = thread < static_cast<int>(gridDim.x);
  const double sum = block_sum(mine ? double(p.partial_sums[thread]) : 0, sums, thread);
  // n - 1 additions in index order and at most n / 2^16 + 32 here, each off by at most 2^-53 of the sum. The
  // rest is for the roundings of these lines and, up to n = 2^45, for the second order of n·2^-53.
  const double count = p.blocks > 0 ? static_cast<double>(p.blocks) : 1;  // of none the mean is 0
  const double slack = sum * ((1.01 * count + 64) * 0x1p-53);
  float mean = static_cast<float>((sum - slack) / count);
  if (mean != static_cast<float>((sum + slack) / count)) {
    mean = static_cast<float>(sum_in_order(p, staged, thread) / count);
  }
  if (thread == 0) p.offset[0] = mean;
}

__global__ void __launch_bounds__(kThreads) quantize_scales(const Scales p) {
  LK_DYNAMIC_SHARED(shared);
  const Shared<double> midpoints = cast<double>(shared);  // [255]
  const Shared<uint32_t> warp_most = cast<uint32_t>(shared + 256 * sizeof(double));
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 255) {
    midpoints[thread] =
        (static_cast<double>(kNf4Tables.dynamic_map[thread]) + kNf4Tables.dynamic_map[thread + 1]) / 2;
  }
  const float mean = p.offset[0];
  static_assert(nf4::kNestedBlock == kThreads);
  for (int64_t block = blockIdx.x; block * kThreads < p.blocks; block += gridDim.x) {
    const int64_t i = block * kThreads + thread;
    const float centred = i < p.blocks ? __fadd_rn(p.absmax[i], -mean) : 0;
    uint32_t most = __float_as_uint(centred) & 0x7fffffffu;
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) most = larger(most, __shfl_xor_sync(kAllLanes, most, apart));
    if (thread % 32 == 0) warp_most[thread / 32] = most;
    __syncthreads();  // the midpoints are there too
    for (int w = 0; w < kWarps; ++w) most = larger(most, warp_most[w]);
    __syncthreads();
    const float nested = __uint_as_float(most);
    const double v = centred, unit = nested;
    int code = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) code += v > midpoints[code + step - 1] * unit ? step : 0;
    if (i < p.blocks) p.codes[i] = static_cast<uint8_t>(code);
    if (thread == 0) p.nested_absmax[block] = nested;
  }
}

}  // namespace
}  // namespace lk::cuda

extern "C" int lk_cuda_nf4_quantize(const void* weight, int dtype, int64_t n, int64_t blocksize,
                                    uint8_t* packed, float* absmax, uint32_t* nonfinite, void* stream) {
  using namespace lk::cuda;
  switch (dtype) {
    case LK_F32: return quantize<LK_F32>(weight, n, blocksize, packed, absmax, nonfinite, stream);
    case LK_F16: return quantize<LK_F16>(weight, n, blocksize, packed, absmax, nonfinite, stream);
    case LK_BF16: return quantize<LK_BF16>(weight, n, blocksize, packed, absmax, nonfinite, stream);
  }
  return LK_UNSUPPORTED_DTYPE;
}

extern "C" int lk_cuda_nf4_quantize_absmax(const float* absmax, int64_t blocks, uint8_t* codes,
                                           float* nested_absmax, float* offset, uint32_t* arrivals,
                                           double* partial_sums, void* stream) {
  using namespace lk::cuda;
  using lk::Global;
  const Scales p{Global<const float>(absmax), blocks,
                 Global<uint8_t>(codes),      Global<float>(nested_absmax),
                 Global<float>(offset),       Global<uint32_t>(arrivals),
                 Global<double>(partial_sums)};
  const int64_t wanted = (blocks + kThreads * kScalesPerThread - 1) / (kThreads * kScalesPerThread);
  const int64_t parts = wanted < 1 ? 1 : wanted < LK_NF4_PARTIAL_SUMS ? wanted : LK_NF4_PARTIAL_SUMS;
  const LaunchShape sum_shape{static_cast<unsigned>(parts), 1, 1, kThreads,
                              sizeof(double) * (kWarps + kStaged)};
  const int status = launch("nf4_quantize (mean of the scales)", average, sum_shape, stream, p);
  if (status != LK_OK || blocks == 0) return status;
  const LaunchShape shape{grid_for(blocks, kThreads), 1, 1, kThreads,
                          sizeof(double) * 256 + sizeof(uint32_t) * kWarps};
  return launch("nf4_quantize (scales)", quantize_scales, shape, stream, p);
}

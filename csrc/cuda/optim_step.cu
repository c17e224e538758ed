// adamw_step, adamw8bit_step, lion_step and lion8bit_step on a GPU: one step of all pieces of state in a run
// of pages (../optim_state.h has their layout and the 8-bit code; lora_kernels/reference_optim.py the order
// of every operation, each of which is rounded by itself).
//
//   AdamW  m ← β1·m + (1-β1)·g;  v ← β2·v + (1-β2)·g²;  p ← p·(1-lr·wd) - lr/(1-β1^t)·m / (√v/√(1-β2^t) +
//   eps) Lion   p ← p·(1-lr·wd) - lr·sign(β1·m + (1-β1)·g);  m ← β2·m + (1-β2)·g
//
// The table of segments and pages is the kernel's parameter, so that some hundred pieces, of as many
// parameters, are one launch and nothing is copied to the device. A chunk is 2048 elements of a segment;
// blocks take chunks in turn and find the segment by bisection.
//
//   chunk    | warp 0     | warp 1     | … | warp 7     |     a warp owns 256 elements, which share an absmax
//   warp     | 8 elements of lane 0 | … | 8 of lane 31 |     16 bytes of a 16-bit type, twice 16 of fp32
//
//   8-bit    codes ──table in shared memory──> m, v ──update──> |max| over the warp ──bins in shared
//   memory──>
//            codes (32 banks at random: 3 or 4 cycles a look-up of the warp)
//
// A page is done when its header holds the tick. Every chunk of it counts at byte 8 of the header; who finds
// that all have done so sets the tick, and the counter back to 0. So no chunk sees its own page done,
// whichever launch of a call it is in.
//
//   bytes    per element of AdamW in fp32 16 read and 12 written; 8-bit state 10 + 6 with fp32 parameters, 6
//   + 4
//            with 16-bit ones: 16.8 M elements in fp32 are 470 MB, 0.14 ms at 3.35 TB/s
#include <limits>
#include <vector>

#include "../optim_table.h"
#include "nf4.cuh"

namespace lk::cuda {
namespace {

using namespace lk::optim;

constexpr int kThreads = 256, kWarps = kThreads / 32, kLaneElements = 8;
constexpr int64_t kChunk = kWarps * kBlock;
constexpr uint32_t kAllLanes = 0xffffffffu, kMagnitude = 0x7fffffffu;
constexpr float kInf = std::numeric_limits<float>::infinity();
static_assert(kBlock == 32 * kLaneElements);

// Blocks that a multiprocessor holds by their registers, 64 a thread or 80; each fills the tables once.
template <int kOp>
constexpr int kBlocksPerMultiprocessor = kOp == LK_ADAMW8BIT ? 3 : 4;

// ---- the table --------------------------------------------------------------------------------------------

struct Segment {
  Global<char> param;  // its first element
  Global<const char> grad;
  Global<char> state;
  Correction correction;
  uint32_t count, first_block;  // first / 256
  uint32_t step, id;
  uint32_t first_chunk;  // of this launch
  uint16_t page;
  bool grad_is_f32, aligned;  // aligned: param and grad start on 16 bytes
};
struct Page {
  Global<char> data;
  uint32_t chunks;  // of this call
};

#ifdef LK_SIMT
constexpr int kMostSegments = 12, kMostPages = 5;  // so that tests need several launches
#else
constexpr int kMostSegments = 556, kMostPages = 88;
#endif

struct Launch {
  Numbers numbers;
  int64_t tick;
  uint64_t seed;
  int rounding, segment_count, page_count;
  uint32_t chunks;
  Page pages[kMostPages];
  Segment segments[kMostSegments];
};
#ifndef LK_SIMT
static_assert(sizeof(Launch) <= 32764);  // what a kernel's parameters may be since CUDA 12.1
#endif

__device__ __forceinline__ int segment_of(const Launch& p, uint32_t chunk) {
  int low = 0, high = p.segment_count;  // the last segment that starts at or before the chunk
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.segments[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

// ---- runs of eight elements -------------------------------------------------------------------------------

struct Eight {
  float x[kLaneElements];
};

// Elements [at, at + there) of `from`; zeros behind them.
template <int kDtype>
__device__ __forceinline__ Eight load(Global<const char> from, int64_t at, int there, bool aligned) {
  Eight out;
  if (there == kLaneElements && aligned) {
    if constexpr (kDtype == LK_F32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 four = cast<const float4>(from + at * 4)[half];
        out.x[4 * half] = four.x, out.x[4 * half + 1] = four.y;
        out.x[4 * half + 2] = four.z, out.x[4 * half + 3] = four.w;
      }
    } else {
      const uint4 pairs = cast<const uint4>(from + at * 2)[0];
      const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out.x[2 * i] = to_float<kDtype>(static_cast<uint16_t>(words[i]));
        out.x[2 * i + 1] = to_float<kDtype>(static_cast<uint16_t>(words[i] >> 16));
      }
    }
    return out;
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    out.x[i] = 0;
    if (i >= there) continue;
    if constexpr (kDtype == LK_F32) {
      out.x[i] = cast<const float>(from)[at + i];
    } else {
      out.x[i] = to_float<kDtype>(cast<const uint16_t>(from)[at + i]);
    }
  }
  return out;
}

__device__ __forceinline__ void store_f32(Global<char> to, int64_t at, int there, bool aligned,
                                          const Eight& v) {
  if (there == kLaneElements && aligned) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      cast<float4>(to + at * 4)[half] =
          make_float4(v.x[4 * half], v.x[4 * half + 1], v.x[4 * half + 2], v.x[4 * half + 3]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    if (i < there) cast<float>(to)[at + i] = v.x[i];
  }
}

__device__ __forceinline__ void store_16(Global<char> to, int64_t at, int there, bool aligned,
                                         const uint16_t (&bits)[kLaneElements]) {
  if (there == kLaneElements && aligned) {
    const auto pair = [&](int i) { return uint32_t{bits[2 * i]} | uint32_t{bits[2 * i + 1]} << 16; };
    cast<uint4>(to + at * 2)[0] = make_uint4(pair(0), pair(1), pair(2), pair(3));
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    if (i < there) cast<uint16_t>(to)[at + i] = bits[i];
  }
}

// ---- 8-bit state ------------------------------------------------------------------------------------------

struct Tables {
  float signed_map[256];
  uint32_t signed_bins[kBins];
  float unsigned_map[256];
  uint32_t unsigned_bins[kBins];
};
constexpr Tables make_tables() {
  Tables tables{};
  for (int i = 0; i < 256; ++i) {
    tables.signed_map[i] = nf4::kDynamicMap[i];
    tables.unsigned_map[i] = nf4::kUnsignedDynamicMap[i];
  }
  for (int i = 0; i < kBins; ++i) {
    tables.signed_bins[i] = kSignedCodes.bins[i];
    tables.unsigned_bins[i] = kUnsignedCodes.bins[i];
  }
  return tables;
}
static __device__ const Tables kTables = make_tables();
constexpr int kTableWords = 256 + kBins;  // of one map: it and its bins

// What an op needs of them: the signed half, or both.
template <int kOp>
constexpr int kSharedWords = !is_8bit(kOp)   ? 0
                             : is_adamw(kOp) ? 2 * kTableWords
                                             : kTableWords;

template <int kOp>
__device__ __forceinline__ void fill_tables(Shared<char> shared, int thread) {
  for (int i = thread; i < kTableWords; i += kThreads) {
    cast<uint32_t>(shared)[i] =
        i < 256 ? __float_as_uint(kTables.signed_map[i]) : kTables.signed_bins[i - 256];
    if constexpr (kOp == LK_ADAMW8BIT) {
      cast<uint32_t>(shared)[kTableWords + i] =
          i < 256 ? __float_as_uint(kTables.unsigned_map[i]) : kTables.unsigned_bins[i - 256];
    }
  }
}

// Codes lie at a multiple of 8 bytes: a piece's parts are aligned to 16, a lane's elements are eight.
__device__ __forceinline__ Eight decode(Global<const char> codes, int64_t at, int there, float absmax,
                                        Shared<const char> table) {
  uint32_t words[2] = {0, 0};
  if (there == kLaneElements) {
    const uint2 both = cast<const uint2>(codes + at)[0];
    words[0] = both.x, words[1] = both.y;
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (i < there) words[i / 4] |= uint32_t{cast<const uint8_t>(codes)[at + i]} << 8 * (i % 4);
    }
  }
  Eight out;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const float entry = cast<const float>(table)[words[i / 4] >> 8 * (i % 4) & 255];
    out.x[i] = i < there ? __fmul_rn(entry, absmax) : 0.0f;
  }
  return out;
}

// All lanes of the warp; elements that are not there are 0. Returns absmax.
template <bool kSigned>
__device__ __forceinline__ float encode(const Eight& v, Global<char> codes, int64_t at, int there,
                                        Shared<const char> table) {
  uint32_t most = 0;
#pragma unroll
  for (const float x : v.x) {
    const uint32_t magnitude = __float_as_uint(x) & kMagnitude;
    most = magnitude > most ? magnitude : most;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, most, lanes);
    most = other > most ? other : most;
  }
  const float absmax = __uint_as_float(most), inverse = inverse_of(absmax);
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const uint32_t bits = __float_as_uint(__fmul_rn(v.x[i], inverse)), magnitude = bits & kMagnitude;
    const uint32_t below = midpoints_below(magnitude, cast<const uint32_t>(table)[256 + bin_of(magnitude)]);
    words[i / 4] |= code_of<kSigned>(bits, below) << 8 * (i % 4);
  }
  if (there == kLaneElements) {
    cast<uint2>(codes + at)[0] = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (i < there) cast<uint8_t>(codes)[at + i] = static_cast<uint8_t>(words[i / 4] >> 8 * (i % 4));
    }
  }
  return absmax;
}

// ---- the update -------------------------------------------------------------------------------------------

// kGuarded: an element whose new state is not finite keeps its values.
template <bool kGuarded>
__device__ __forceinline__ void update_adamw(const Numbers& k, const Correction& c, const Eight& grad,
                                             Eight& p, Eight& m, Eight& v) {
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const float g = grad.x[i];
    const float new_m = __fadd_rn(__fmul_rn(k.beta1, m.x[i]), __fmul_rn(k.rest1, g));
    const float new_v = __fadd_rn(__fmul_rn(k.beta2, v.x[i]), __fmul_rn(__fmul_rn(k.rest2, g), g));
    const float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(new_v), c.root), k.eps);
    const float change = __fdiv_rn(__fmul_rn(c.step_size, new_m), denominator);
    const float new_p = __fadd_rn(__fmul_rn(p.x[i], k.decay), -change);
    if (kGuarded && !(new_v < kInf)) continue;
    m.x[i] = new_m, v.x[i] = new_v, p.x[i] = new_p;
  }
}

template <bool kGuarded>
__device__ __forceinline__ void update_lion(const Numbers& k, const Eight& grad, Eight& p, Eight& m) {
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const float g = grad.x[i];
    const float c = __fadd_rn(__fmul_rn(k.beta1, m.x[i]), __fmul_rn(k.rest1, g));
    const float sign = (c > 0 ? 1.0f : 0.0f) - (c < 0 ? 1.0f : 0.0f);
    const float new_p = __fadd_rn(__fmul_rn(p.x[i], k.decay), -__fmul_rn(k.lr, sign));
    const float new_m = __fadd_rn(__fmul_rn(k.beta2, m.x[i]), __fmul_rn(k.rest2, g));
    if (kGuarded && !((__float_as_uint(new_m) & kMagnitude) < __float_as_uint(kInf))) continue;
    m.x[i] = new_m, p.x[i] = new_p;
  }
}

// ---- the parameters' rounding -----------------------------------------------------------------------------

template <int kDtype>
__device__ __forceinline__ uint16_t stochastic(float x, uint32_t word) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & kMagnitude;
  if (magnitude >= (kDtype == LK_BF16 ? kBf16Infinity : kF16Infinity)) return round_to<kDtype>(x);
  const uint32_t rounded =
      kDtype == LK_BF16 ? stochastic_bf16(magnitude, word) : stochastic_f16(magnitude, word);
  return static_cast<uint16_t>(rounded | bits >> 31 << 15);
}

template <int kDtype>
__device__ __forceinline__ void store_params(const Launch& p, const Segment& s, int64_t compensation,
                                             int64_t at, int there, const Eight& v) {
  if constexpr (kDtype == LK_F32) {
    store_f32(s.param, at, there, s.aligned, v);
  } else {
    uint16_t bits[kLaneElements];
    if (p.rounding == LK_STOCHASTIC) {
      const uint64_t counter = (s.first_block * uint64_t{kBlock} + static_cast<uint64_t>(at)) / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const PhiloxWords words = philox4x32_10(counter + half, stream_of(s.step, s.id), p.seed);
#pragma unroll
        for (int i = 0; i < 4; ++i) bits[4 * half + i] = stochastic<kDtype>(v.x[4 * half + i], words.w[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) bits[i] = round_to<kDtype>(v.x[i]);
    }
    store_16(s.param, at, there, s.aligned, bits);
    if (p.rounding == LK_KAHAN) {  // what the rounding lost; nothing where the parameter overflowed
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        const float rest = __fadd_rn(v.x[i], -to_float<kDtype>(bits[i]));
        const bool finite = (__float_as_uint(rest) & kMagnitude) < __float_as_uint(kInf);
        bits[i] = round_to<kDtype>(finite ? rest : 0.0f);
      }
      store_16(s.state + compensation, at, there, true, bits);
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------

// Elements [256·block, +256) of a segment, by one warp.
template <int kOp, int kDtype>
__device__ __forceinline__ void update_block(const Launch& p, const Segment& s, int64_t block, int lane,
                                             Shared<const char> tables) {
  const StateLayout layout = state_layout(kOp, s.count, kDtype, p.rounding);
  const int64_t at = block * kBlock + lane * kLaneElements, left = s.count - at;
  const int there = left < kLaneElements ? static_cast<int>(left) : kLaneElements;  // or negative
  Eight x = load<kDtype>(s.param, at, there, s.aligned);
  const Eight g = kDtype == LK_F32 || s.grad_is_f32 ? load<LK_F32>(s.grad, at, there, s.aligned)
                                                    : load<kDtype>(s.grad, at, there, s.aligned);
  if constexpr (kDtype != LK_F32) {
    if (layout.compensation >= 0) {
      const Eight rest = load<kDtype>(s.state + layout.compensation, at, there, true);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) x.x[i] = __fadd_rn(x.x[i], rest.x[i]);
    }
  }
  if constexpr (is_8bit(kOp)) {
    const Global<float> absmax1 = cast<float>(s.state + layout.absmax1) + block;
    Eight m = decode(s.state + layout.state1, at, there, absmax1[0], tables);
    if constexpr (is_adamw(kOp)) {
      const Global<float> absmax2 = cast<float>(s.state + layout.absmax2) + block;
      const Shared<const char> unsigned_tables = tables + 4 * kTableWords;
      Eight v = decode(s.state + layout.state2, at, there, absmax2[0], unsigned_tables);
      update_adamw<true>(p.numbers, s.correction, g, x, m, v);
      const float absmax = encode<false>(v, s.state + layout.state2, at, there, unsigned_tables);
      if (lane == 0) absmax2[0] = absmax;
    } else {
      update_lion<true>(p.numbers, g, x, m);
    }
    const float absmax = encode<true>(m, s.state + layout.state1, at, there, tables);
    if (lane == 0) absmax1[0] = absmax;
  } else {
    Eight m = load<LK_F32>(s.state + layout.state1, at, there, true);
    if constexpr (is_adamw(kOp)) {
      Eight v = load<LK_F32>(s.state + layout.state2, at, there, true);
      update_adamw<false>(p.numbers, s.correction, g, x, m, v);
      store_f32(s.state + layout.state2, at, there, true, v);
    } else {
      update_lion<false>(p.numbers, g, x, m);
    }
    store_f32(s.state + layout.state1, at, there, true, m);
  }
  store_params<kDtype>(p, s, layout.compensation, at, there, x);
}

template <int kOp, int kDtype>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<kOp>)
    optim_step(const __grid_constant__ Launch p) {
  LK_DYNAMIC_SHARED(tables);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if constexpr (is_8bit(kOp)) {
    fill_tables<kOp>(tables, thread);
    __syncthreads();
  }
  for (uint32_t chunk = blockIdx.x; chunk < p.chunks; chunk += gridDim.x) {
    const Segment& s = p.segments[segment_of(p, chunk)];
    const Page& page = p.pages[s.page];
    if (cast<const int64_t>(page.data)[0] == p.tick) continue;  // the same for all threads: see the top
    const int64_t block = int64_t{chunk - s.first_chunk} * kWarps + warp;
    if (block * kBlock < s.count) update_block<kOp, kDtype>(p, s, block, lane, tables);
    __syncthreads();
    if (thread == 0) {
      const Global<uint32_t> counter = cast<uint32_t>(page.data + 8);
      if (ptx::atomic_add_acq_rel(counter, 1) + 1 == page.chunks) {
        counter[0] = 0;
        cast<int64_t>(page.data)[0] = p.tick;
      }
    }
  }
}

template <int kOp, int kDtype>
int run(const Launch& p, void* stream) {
  const uint32_t most = static_cast<uint32_t>(device_info().multiprocessors * kBlocksPerMultiprocessor<kOp>);
  const LaunchShape shape{p.chunks < most ? p.chunks : most, 1, 1, kThreads, 4 * kSharedWords<kOp>};
  return launch("optim_step", optim_step<kOp, kDtype>, shape, stream, p);
}
template <int kOp>
int run(int dtype, const Launch& p, void* stream) {
  switch (dtype) {
    case LK_F32: return run<kOp, LK_F32>(p, stream);
    case LK_F16: return run<kOp, LK_F16>(p, stream);
    case LK_BF16: return run<kOp, LK_BF16>(p, stream);
  }
  return LK_UNSUPPORTED_DTYPE;
}
int run(int op, int dtype, const Launch& p, void* stream) {
  switch (op) {
    case LK_ADAMW: return run<LK_ADAMW>(dtype, p, stream);
    case LK_ADAMW8BIT: return run<LK_ADAMW8BIT>(dtype, p, stream);
    case LK_LION: return run<LK_LION>(dtype, p, stream);
    default: return run<LK_LION8BIT>(dtype, p, stream);
  }
}

// Fills tables with segments and launches each that is full.
class Launches {
 public:
  Launches(const lk_optim_step& s, void* stream)
      : s_(s), stream_(stream), chunks_(static_cast<size_t>(s.page_count)), slots_(chunks_.size(), -1) {
    launch_.numbers = numbers_of(s), launch_.tick = s.tick, launch_.seed = static_cast<uint64_t>(s.seed);
    launch_.rounding = s.rounding;
    for (int64_t i = 0; i < s.segment_count; ++i) {
      chunks_[static_cast<size_t>(s.segments[i].page)] += chunks_of(s.segments[i].count);
    }
  }

  int all() {
    int64_t known = 0;  // the step that `correction` is of: most parameters are at the same one
    Correction correction{};
    for (int64_t i = 0; i < s_.segment_count; ++i) {
      const lk_optim_segment& row = s_.segments[i];
      if (row.count == 0) continue;
      if (row.step != known) known = row.step, correction = correction_of(s_, known);
      const lk_optim_parameter& parameter = s_.parameters[row.parameter];
      const bool grad_is_f32 = parameter.grad_dtype == LK_F32;
      Segment segment{};
      segment.param =
          Global<char>(static_cast<char*>(parameter.param)) + row.first * (s_.dtype == LK_F32 ? 4 : 2);
      segment.grad =
          Global<const char>(static_cast<const char*>(parameter.grad)) + row.first * (grad_is_f32 ? 4 : 2);
      segment.correction = correction;
      segment.count = static_cast<uint32_t>(row.count);
      segment.first_block = static_cast<uint32_t>(row.first / kBlock);
      segment.step = static_cast<uint32_t>(row.step), segment.id = static_cast<uint32_t>(row.id);
      segment.grad_is_f32 = grad_is_f32;
      segment.aligned = reinterpret_cast<uintptr_t>(parameter.param) % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(parameter.grad) % 16 == 0;
      if (const int status = add(segment, row.page, row.offset, chunks_of(row.count)); status != LK_OK)
        return status;
    }
    for (int64_t page = 0; page < s_.page_count; ++page) {  // nothing to update, but a tick to set
      if (chunks_[static_cast<size_t>(page)] > 0) continue;
      chunks_[static_cast<size_t>(page)] = 1;
      if (const int status = add(Segment{}, page, 0, 1); status != LK_OK) return status;
    }
    return flush();
  }

 private:
  static uint32_t chunks_of(int64_t count) { return static_cast<uint32_t>((count + kChunk - 1) / kChunk); }

  int add(Segment segment, int64_t page, int64_t offset, uint32_t chunks) {
    int& slot = slots_[static_cast<size_t>(page)];
    if (launch_.segment_count == kMostSegments || (slot < 0 && launch_.page_count == kMostPages)) {
      if (const int status = flush(); status != LK_OK) return status;
    }
    const Global<char> data(static_cast<char*>(s_.pages[page].data));
    if (slot < 0) {
      slot = launch_.page_count++;
      launch_.pages[slot] = {data, chunks_[static_cast<size_t>(page)]};
      used_.push_back(page);
    }
    segment.state = data + offset, segment.page = static_cast<uint16_t>(slot);
    segment.first_chunk = launch_.chunks;
    launch_.chunks += chunks;
    launch_.segments[launch_.segment_count++] = segment;
    return LK_OK;
  }

  int flush() {
    if (launch_.segment_count == 0) return LK_OK;
    const int status = run(s_.op, s_.dtype, launch_, stream_);
    for (const int64_t page : used_) slots_[static_cast<size_t>(page)] = -1;
    used_.clear();
    launch_.segment_count = launch_.page_count = 0, launch_.chunks = 0;
    return status;
  }

  const lk_optim_step& s_;
  void* stream_;
  std::vector<uint32_t> chunks_;  // of each page
  std::vector<int> slots_;        // of each page in this launch; -1: none
  std::vector<int64_t> used_;     // pages with a slot
  Launch launch_{};
};

}  // namespace
}  // namespace lk::cuda

extern "C" int lk_cuda_optim_step(const lk_optim_step* s, void* stream) {
  if (!lk::optim::table_fits(*s)) return LK_BAD_ARGUMENTS;
  return lk::cuda::Launches(*s, stream).all();
}

// The dropout mask inside a kernel: which elements of x are kept, drawn where they are needed (../philox.h).
#pragma once
#include "../philox.h"
#include "ptx.cuh"

namespace lk::cuda {

// p of api.h's adapters; no mask where rng is null.
struct Dropout {
  Global<const int64_t> rng;  // [2] (seed, offset)
  uint32_t threshold;         // words below it are dropped
};
inline Dropout dropout_of(double p, const int64_t* rng) {
  return {Global<const int64_t>(p > 0 ? rng : nullptr), dropout_threshold(p)};
}

// One mask, its key in registers.
struct Mask {
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;

  __device__ __forceinline__ explicit Mask(const Dropout& d) : threshold(d.threshold) {
    if (d.rng != nullptr) seed = static_cast<uint64_t>(d.rng[0]), offset = static_cast<uint64_t>(d.rng[1]);
  }
  __device__ __forceinline__ PhiloxWords words(uint64_t counter) const {
    return philox4x32_10(counter, offset, seed, [](uint32_t a, uint32_t b) { return ptx::mul_wide(a, b); });
  }
  // Bit i: whether element 4·counter + i is kept.
  __device__ __forceinline__ uint32_t kept4(uint64_t counter) const {
    const PhiloxWords drawn = words(counter);
    return (drawn.w[0] >= threshold ? 1u : 0u) | (drawn.w[1] >= threshold ? 2u : 0u) |
           (drawn.w[2] >= threshold ? 4u : 0u) | (drawn.w[3] >= threshold ? 8u : 0u);
  }
  // Bit i of eight: whether element `first` + i is kept. A third counter where the eight do not start one.
  __device__ __forceinline__ uint32_t kept8(uint64_t first) const {
    const uint32_t shift = static_cast<uint32_t>(first & 3);
    uint32_t bits = kept4(first / 4) | kept4(first / 4 + 1) << 4;
    if (shift != 0) bits = (bits | kept4(first / 4 + 2) << 8) >> shift;
    return bits & 0xffu;
  }
  // The eight elements of `counter` and the next, dropped ones zeroed: from words to masks, without bits.
  __device__ __forceinline__ uint4 keep(uint4 pairs, uint64_t counter) const {
    const PhiloxWords low = words(counter), high = words(counter + 1);
    const auto of_pair = [&](uint32_t pair, uint32_t first, uint32_t second) {
      if (first < threshold) pair &= 0xffff0000u;
      if (second < threshold) pair &= 0x0000ffffu;
      return pair;
    };
    return make_uint4(of_pair(pairs.x, low.w[0], low.w[1]), of_pair(pairs.y, low.w[2], low.w[3]),
                      of_pair(pairs.z, high.w[0], high.w[1]), of_pair(pairs.w, high.w[2], high.w[3]));
  }
};

// kept8, for the way that is rarely taken: rows that do not start with a counter of the mask.
inline __device__ __noinline__ uint32_t kept_anywhere(Mask mask, uint64_t first) { return mask.kept8(first); }

// Two 16-bit elements, each kept where its bit (0 and 1 of `bits`) is set.
__device__ __forceinline__ uint32_t keep_pair(uint32_t pair, uint32_t bits) {
  return pair & ((bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u));
}
// Eight of them.
__device__ __forceinline__ uint4 keep_eight(uint4 pairs, uint32_t bits) {
  return make_uint4(keep_pair(pairs.x, bits), keep_pair(pairs.y, bits >> 2), keep_pair(pairs.z, bits >> 4),
                    keep_pair(pairs.w, bits >> 6));
}

}  // namespace lk::cuda

// Inline PTX primitives, and nothing but primitives. No kernel contains inline PTX of its own.
#pragma once
#include <cstdint>

namespace lk::ptx {

// float -> bf16 bits, round to nearest even. sm_80 and later.
__device__ __forceinline__ uint16_t cvt_rn_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// float -> fp16 bits, round to nearest even.
__device__ __forceinline__ uint16_t cvt_rn_f16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

}  // namespace lk::ptx

// fp16 and bf16 as bits: conversions with round-to-nearest-even, written so that the compiler vectorises
// loops over them on every instruction set (no branches, no library calls).
#pragma once
#include <cstdint>
#include <cstring>

namespace lk::cpu {

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Shifted into fp32 position the exponent is 112 too small; a multiplication by 2^112 mends it and
  // normalises subnormals. Infinities and NaNs get the fp32 exponent set in full instead.
  const float scaled = float_of(magnitude << 13) * float_of(0x77800000u);
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return float_of(sign | (magnitude >= 0x7c00u ? special : bits_of(scaled)));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
template <>
inline Half from_float<Half>(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Normal results: rebias the exponent by -112 and round off 13 bits; a carry runs into the exponent as it
  // should.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results (|x| < 2^-14): adding 0.5 aligns the last fp16 bit with the last fp32 bit, and the FPU
  // rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;  // 65536 and above: infinity
  result = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : result;  // NaN stays NaN
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace lk::cpu

// NF4 and its double-quantised scales: the one statement of the format in C++, used by every backend.
//
//   W [N, K] is flattened row-major to n = N*K elements, in blocks of `blocksize`; a block may straddle rows.
//   w[i] = codebook[nibble(i)] * absmax[i / blocksize]     product in fp32, one rounding to the output type
//   nibble(i): byte i/2 of `packed`; an even i is the HIGH nibble, an odd i the low one.
//   Double quantisation: absmax[b] = dynamic_map[q[b]] * nested_absmax[b / 256] + offset   (in fp32, rounded
//   after the product and after the sum)
//
// Codebook: QLoRA (Dettmers et al. 2023), appendix E. Byte layout and dynamic map: bitsandbytes.
#pragma once
#include <array>
#include <cstdint>

namespace lk::nf4 {

inline constexpr int kCodes = 16;
inline constexpr int kNestedBlock = 256;     // scales per second-level block
inline constexpr float kMinAbsmax = 1e-38f;  // keeps the reciprocal of a zero block finite
inline constexpr int kPadCode = 7;           // the code of 0.0, which fills the last nibble of an odd n

inline constexpr std::array<float, kCodes> kCodebook = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// A kernel that multiplies codes rounded to T and applies the block's scale afterwards takes T(c·code) and c
// in the scale, because the rounding errors of the plain codes have a mean, which adds up on inputs that have
// one: at K = 4096 that is 2.4e-2 of y in bf16, and 1.6e-3 with this c (fp16: 1.6e-3 and 1.7e-4).
inline constexpr float kBalanceBf16 = 1.1664f, kBalanceF16 = 1.255f;

// A scaled weight s gets the code #{k : s > kMidpoints[k]}: the nearest entry, a tie going down.
constexpr std::array<float, kCodes - 1> make_midpoints() {
  std::array<float, kCodes - 1> mid{};
  for (int k = 0; k + 1 < kCodes; ++k) {
    mid[k] = static_cast<float>((static_cast<double>(kCodebook[k]) + kCodebook[k + 1]) / 2);
  }
  return mid;
}
inline constexpr std::array<float, kCodes - 1> kMidpoints = make_midpoints();

// The 8-bit dynamic map: for each decade 10^(i-6), i = 0..6, the midpoints of a linear grid on [0.1, 1] of
// 2^i cells with both signs, or unsigned of 2^(i+1) cells; then 0 and 1. The grid is computed in fp32 with
// one fused multiply-add a point, counted from the nearer end, because that is how the published 256 values
// came about (a double holds each product exactly).
constexpr std::array<float, 256> make_dynamic_map(bool has_sign) {
  std::array<float, 256> map{};
  int used = 0;
  double decade = 1e-6;
  for (int i = 0; i < 7; ++i, decade *= 10) {
    const int cells = has_sign ? 1 << i : 2 << i;
    const float lo = 0.1f, hi = 1.0f, step = (hi - lo) / static_cast<float>(cells);
    const auto point = [&](int j) {
      return j < (cells + 1) / 2 ? static_cast<float>(static_cast<double>(step) * j + lo)
                                 : static_cast<float>(static_cast<double>(-step) * (cells - j) + hi);
    };
    for (int j = 0; j < cells; ++j) {
      const float value = static_cast<float>(decade) * ((point(j) + point(j + 1)) / 2.0f);
      map[used++] = value;
      if (has_sign) map[used++] = -value;
    }
  }
  map[used++] = 0.0f;
  map[used++] = 1.0f;
  for (int i = 1; i < 256; ++i) {  // insertion sort: 256 values, at compile time
    const float value = map[i];
    int j = i;
    for (; j > 0 && map[j - 1] > value; --j) map[j] = map[j - 1];
    map[j] = value;
  }
  return map;
}
inline constexpr std::array<float, 256> kDynamicMap = make_dynamic_map(true);           // scales, state1
inline constexpr std::array<float, 256> kUnsignedDynamicMap = make_dynamic_map(false);  // state2

}  // namespace lk::nf4

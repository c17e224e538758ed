// How optimizer state lies in a page, and its 8-bit block-wise code: the one statement of both in C++, used
// by the CPU and the CUDA kernels. lora_kernels/optim_state.py is its Python twin, and says what the parts
// mean.
//
//   page    uint8 [page_bytes], aligned to 64: a header of 64 bytes (int64 tick at byte 0, the rest zero),
//   then
//           pieces, each at a multiple of 64 bytes
//   piece   the state of `count` consecutive elements of one parameter: its parts in the order of
//           StateLayout, each from a multiple of 16 bytes on; its size is rounded up to 64
#pragma once
#include <array>
#include <bit>
#include <cstdint>

#include "api.h"
#include "nf4.h"
#include "philox.h"

#ifdef __CUDACC__
#define LK_HOST_DEVICE __host__ __device__
#else
#define LK_HOST_DEVICE
#endif

namespace lk::optim {

inline constexpr int64_t kBlock = 256;  // elements that share an absmax
inline constexpr int64_t kHeaderBytes = 64, kPieceAlignment = 64, kPartAlignment = 16;
inline constexpr float kMinAbsmax = 0x1p-126f;  // blocks below it are coded as zeros

LK_HOST_DEVICE constexpr bool is_adamw(int op) { return op == LK_ADAMW || op == LK_ADAMW8BIT; }
LK_HOST_DEVICE constexpr bool is_8bit(int op) { return op == LK_ADAMW8BIT || op == LK_LION8BIT; }

LK_HOST_DEVICE constexpr int64_t aligned(int64_t size, int64_t to) { return (size + to - 1) / to * to; }
LK_HOST_DEVICE constexpr int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

// Offsets from the piece's start; -1 where an op has no such part. state1 and state2 are fp32 or codes.
struct StateLayout {
  int64_t state1, absmax1, state2, absmax2, compensation;
  int64_t bytes;  // of the piece
};
LK_HOST_DEVICE constexpr StateLayout state_layout(int op, int64_t count, int dtype, int rounding) {
  const int64_t state = count * (is_8bit(op) ? 1 : 4), absmax = blocks_of(count) * 4;
  StateLayout layout{-1, -1, -1, -1, -1, 0};
  int64_t end = 0;
  const auto part = [&end](int64_t bytes) {
    const int64_t at = aligned(end, kPartAlignment);
    end = at + bytes;
    return at;
  };
  layout.state1 = part(state);
  if (is_8bit(op)) layout.absmax1 = part(absmax);
  if (is_adamw(op)) layout.state2 = part(state);
  if (op == LK_ADAMW8BIT) layout.absmax2 = part(absmax);
  if (rounding == LK_KAHAN && dtype != LK_F32) layout.compensation = part(count * 2);
  layout.bytes = aligned(end, kPieceAlignment);
  return layout;
}

// ---- the 8-bit code
// ----------------------------------------------------------------------------------------
//
// r = x·(1/absmax) gets the nearest entry of the dynamic map, a tie going to the entry nearer zero. The map's
// entries >= 0 are numbered 0, 1, ... (0.0, ..., 1.0); the signed map has those below zero mirrored, but for
// 1.0. So with n = #{k : |r| > midpoint[k]} the code is n, or signed 127 + n for r >= 0 and 127 - min(n, 127)
// below.
//
// No search: the exponent and the 7 leading bits of the fraction of |r| name a bin with at most one midpoint
// in it; an entry of the table holds the number of midpoints below the bin in the upper half, and in the
// lower one what the other 16 bits of |r| must exceed to count the one inside (0xffff where there is none).

inline constexpr int kZeroCode = 127;  // of the signed map; 0 in the unsigned one
inline constexpr int kLowBits = 16;
inline constexpr uint32_t kFirstBin = (127 - 24) << (23 - kLowBits);  // of 2^-24, which no midpoint is below
inline constexpr uint32_t kLastBin = 127 << (23 - kLowBits);          // of 1, which no midpoint is above
inline constexpr int kBins = static_cast<int>(kLastBin - kFirstBin) + 1;

struct CodeTable {
  std::array<uint32_t, kBins> bins{};
  bool one_midpoint_a_bin = true;
};

constexpr CodeTable make_code_table(const std::array<float, 256>& map) {
  CodeTable table;
  int below = 0, k = 0;
  while (map[k] < 0) ++k;
  for (int bin = 0; bin < kBins; ++bin) {
    const int before = below;
    uint32_t inside = 0xffff;
    for (; k < 255; ++k, ++below) {
      // Rounded down to fp32: r > midpoint exactly where r > that.
      const double middle = (static_cast<double>(map[k]) + map[k + 1]) / 2;
      const float nearest = static_cast<float>(middle);
      const uint32_t bits = std::bit_cast<uint32_t>(nearest) - (nearest > middle ? 1 : 0);
      if ((bits >> kLowBits) - kFirstBin != static_cast<uint32_t>(bin)) break;
      table.one_midpoint_a_bin = table.one_midpoint_a_bin && below == before;
      inside = bits & 0xffff;
    }
    table.bins[bin] = static_cast<uint32_t>(before) << kLowBits | inside;
  }
  table.one_midpoint_a_bin = table.one_midpoint_a_bin && k == 255;  // and none was left
  return table;
}
inline constexpr CodeTable kSignedCodes = make_code_table(nf4::kDynamicMap);
inline constexpr CodeTable kUnsignedCodes = make_code_table(nf4::kUnsignedDynamicMap);
static_assert(kSignedCodes.one_midpoint_a_bin && kUnsignedCodes.one_midpoint_a_bin);

// The bin of a magnitude's bits, and with its entry the number of midpoints below the magnitude.
LK_HOST_DEVICE constexpr int bin_of(uint32_t magnitude) {
  const int bin = static_cast<int>(magnitude >> kLowBits) - static_cast<int>(kFirstBin);
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}
LK_HOST_DEVICE constexpr uint32_t midpoints_below(uint32_t magnitude, uint32_t entry) {
  return (entry >> kLowBits) + ((magnitude & 0xffff) > (entry & 0xffff) ? 1 : 0);
}
// `bits` of r, and the midpoints below |r|.
template <bool kSigned>
LK_HOST_DEVICE constexpr uint32_t code_of(uint32_t bits, uint32_t below) {
  if (!kSigned) return below;
  return bits >> 31 != 0 ? (below < kZeroCode ? kZeroCode - below : 0) : kZeroCode + below;
}
// 1/absmax as the code wants it.
LK_HOST_DEVICE constexpr float inverse_of(float absmax) { return absmax < kMinAbsmax ? 0.0f : 1.0f / absmax; }

// ---- stochastic rounding
// -----------------------------------------------------------------------------------
//
// Element i of parameter `id` reads word i % 4 of philox(counter = (i / 4, step + 2^32·id), key = seed). The
// word's top bits are added to the bits of x that the result does not have, and those cut off.

LK_HOST_DEVICE constexpr uint64_t stream_of(int64_t step, int64_t id) {
  return static_cast<uint64_t>(step) | static_cast<uint64_t>(id) << 32;
}

// Of x below 2^(largest exponent + 1), which becomes at most the largest finite value: the result's
// magnitude.
LK_HOST_DEVICE constexpr uint32_t stochastic_bf16(uint32_t magnitude, uint32_t word) {
  const uint32_t rounded = (magnitude + (word >> 16)) >> 16;
  return rounded < 0x7f7f ? rounded : 0x7f7f;
}
LK_HOST_DEVICE constexpr uint32_t stochastic_f16(uint32_t magnitude, uint32_t word) {
  const uint32_t exponent = magnitude >> 23;
  const uint32_t normal = (magnitude - (112u << 23) + (word >> 19)) >> 13;
  // A subnormal result's unit is 2^-24: 14 to 31 bits go; before that, those that no word reaches.
  const uint32_t down = exponent < 112 ? 126 - exponent : 14;
  const uint32_t shift = down < 31 ? down : 31;
  const uint32_t beyond = down - shift < 31 ? down - shift : 31;
  const uint32_t significand = ((magnitude & 0x7fffff) | 0x800000) >> beyond;
  const uint32_t subnormal = (significand + (word >> (32 - shift))) >> shift;
  const uint32_t rounded = exponent < 113 ? subnormal : normal;
  return rounded < 0x7bff ? rounded : 0x7bff;
}
inline constexpr uint32_t kBf16Infinity = 0x7f800000, kF16Infinity = 0x47800000;  // from here on: to nearest

}  // namespace lk::optim

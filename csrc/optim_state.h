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
#include <cstdint>

#include "api.h"
#include "nf4.h"
#include "philox.h"

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

struct CodeTables {
  std::array<uint32_t, kBins> bins;
};

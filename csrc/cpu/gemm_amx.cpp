// gemm_bf16.h with AMX: two by two tiles of sums, so that four products of 16 x 16 x 32 share two loads of
// either factor.
//
// Which tiles there are is a state of the thread that other libraries use too, and keep in mind: what was
// there before is there again afterwards.
#include "gemm_bf16.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "isa.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")

namespace lk::cpu::amx {
namespace {

// What _tile_loadconfig reads.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == kSavedBytes);
// Not on the stack: g++ 12's intrinsic claims to read 8 bytes only, so that stores of the others vanish.
constexpr Configuration kConfiguration;

// 0 to 3: sums; 4, 5: left; 6, 7: P.
void begin(void* saved) {
  _tile_storeconfig(saved);
  _tile_loadconfig(&kConfiguration);
}

void end(const void* saved) {
  if (*static_cast<const uint8_t*>(saved) == 0) {
    _tile_release();
  } else {
    _tile_loadconfig(saved);
  }
}

// Steps that the left factor's tiles, which come from the second level of cache, are prefetched ahead:
// hardware does not follow tile loads.
constexpr int kAhead = 2;

// R x C tiles.
template <int R, int C>
void tiles_of(const Stretch* stretches, int stretch_count, const Bits* panel, bool panel_is_rows, bool first,
              float* sums) {
  constexpr int64_t kSumRow = kPanel * sizeof(float);
  float* below = sums + 16 * kPanel;
  if (first) {
    _tile_zero(0);
    if constexpr (C == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && C == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kSumRow);
    if constexpr (C == 2) _tile_loadd(1, sums + 16, kSumRow);
    if constexpr (R == 2) _tile_loadd(2, below, kSumRow);
    if constexpr (R == 2 && C == 2) _tile_loadd(3, below + 16, kSumRow);
  }
  for (int i = 0; i < stretch_count; ++i) {
    const auto [left, next_tile, steps] = stretches[i];
    const Bits *rows = panel_is_rows ? panel : left, *pairs = panel_is_rows ? left : panel;
    const int64_t row_tile = panel_is_rows ? kTileElements : next_tile;
    const int64_t pair_tile = panel_is_rows ? next_tile : kTileElements;
    const int64_t row_step = (panel_is_rows ? 2 : 1) * kTileElements,
                  pair_step = 3 * kTileElements - row_step;
    const Bits *far = left + kAhead * kTileElements, *far_below = far + next_tile;
    for (int64_t s = 0; s < steps; ++s, rows += row_step, pairs += pair_step) {
      if (s + kAhead == steps) {  // what is multiplied next: the next stretch, or the next tokens' first
        const bool last = i + 1 == stretch_count;
        const Stretch& next = stretches[last ? 0 : i + 1];
        far = next.left + (last ? 2 * next.next_tile : 0), far_below = far + next.next_tile;
      }
#pragma GCC unroll 16
      for (int line = 0; line < kTileElements; line += kTileInner) {
        _mm_prefetch(reinterpret_cast<const char*>(far + line), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(far_below + line), _MM_HINT_T0);
      }
      far += kTileElements, far_below += kTileElements;
      _tile_loadd(4, rows, 64);
      _tile_loadd(6, pairs, 64);
      if constexpr (R == 2) _tile_loadd(5, rows + row_tile, 64);
      if constexpr (C == 2) _tile_loadd(7, pairs + pair_tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (C == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
    }
    panel += steps * 2 * kTileElements;
  }
  _tile_stored(0, sums, kSumRow);
  if constexpr (C == 2) _tile_stored(1, sums + 16, kSumRow);
  if constexpr (R == 2) _tile_stored(2, below, kSumRow);
  if constexpr (R == 2 && C == 2) _tile_stored(3, below + 16, kSumRow);
}

void multiply(const Stretch* stretches, int stretch_count, const Bits* panel, bool panel_is_rows,
              int64_t row_count, int64_t column_count, bool first, float* sums) {
  const bool wide = column_count > 16;
  const auto run = row_count > 16 ? (wide ? tiles_of<2, 2> : tiles_of<2, 1>)
                   : wide         ? tiles_of<1, 2>
                                  : tiles_of<1, 1>;
  run(stretches, stretch_count, panel, panel_is_rows, first, sums);
}

}  // namespace

const Bf16Kernels kGemm = {begin, end, multiply};

}  // namespace lk::cpu::amx
#pragma GCC pop_options
#endif

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

// Steps that tiles from the second level of cache are prefetched ahead: hardware does not follow tile loads.
constexpr int kAhead = 2;

// R x C tiles.
template <int R, int C>
void tiles_of(const Tiles& rows, const Tiles& pairs, int64_t steps, bool first, float* sums) {
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
  const Bits *left = rows.data, *right = pairs.data;
  const Bits* far = (rows.far ? left : right) + kAhead * kTileElements;
  const int64_t far_tile = rows.far ? rows.next_tile : pairs.next_tile;
  for (int64_t s = 0; s < steps;
       ++s, left += rows.next_step, right += pairs.next_step, far += kTileElements) {
    // The last steps fetch what the next two tiles begin with.
    if (s == steps - kAhead) far += 2 * far_tile - steps * kTileElements;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(far + i * 32), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(far + far_tile + i * 32), _MM_HINT_T0);
    }
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    if constexpr (R == 2) _tile_loadd(5, left + rows.next_tile, 64);
    if constexpr (C == 2) _tile_loadd(7, right + pairs.next_tile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kSumRow);
  if constexpr (C == 2) _tile_stored(1, sums + 16, kSumRow);
  if constexpr (R == 2) _tile_stored(2, below, kSumRow);
  if constexpr (R == 2 && C == 2) _tile_stored(3, below + 16, kSumRow);
}

void multiply(const Tiles& rows, int64_t row_count, const Tiles& pairs, int64_t column_count, int64_t steps,
              bool first, float* sums) {
  const bool wide = column_count > 16;
  const auto run = row_count > 16 ? (wide ? tiles_of<2, 2> : tiles_of<2, 1>)
                   : wide         ? tiles_of<1, 2>
                                  : tiles_of<1, 1>;
  run(rows, pairs, steps, first, sums);
}

}  // namespace

const Bf16Kernels kGemm = {begin, end, multiply};

}  // namespace lk::cpu::amx
#pragma GCC pop_options
#endif

// gemm_bf16.h with vdpbf16ps: 8 rows x 32 columns in 16 registers of sums, or 16 x 16, a pair of inner
// elements at a time. And the decoding, which AMX shares.
//
// NF4 codes are looked up 32 at a time in tables of the products codebook · scale, rounded to bf16: one table
// to a block of a row, or to the blocks of two rows that are woven together. Per 32 weights: a load, a byte
// shuffle, a shift, a permute and a store, and for two rows a broadcast and a logical operation; and half a
// table.
#include "gemm_bf16.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>

#include "../nf4.h"
#include "convert.h"
#include "isa.h"
#include "nf4_decode.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prefer-vector-width=512")

namespace lk::cpu::avx512bf16 {
namespace {

#include "transpose_avx512.h"

constexpr int64_t kPairs = kTileInner / 2;
// Rows of W that are prefetched ahead: they are too far apart for hardware to follow.
constexpr int64_t kRowsAhead = 24;

LK_INLINE __m512bh as_bf16(__m512 v) { return reinterpret_cast<__m512bh>(v); }
LK_INLINE __m512i bits(__m512bh v) { return reinterpret_cast<__m512i>(v); }

// ---- the product ----

// M rows from row `i` on x N tiles of columns.
template <int M, int N>
void block(const Stretch* stretches, int stretch_count, const Bits* panel, bool panel_is_rows, int64_t i,
           bool first, float* sums) {
  __m512 acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
      acc[m][j] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + m * kPanel + 16 * j);
    }
  }
  for (const Stretch* stretch = stretches; stretch < stretches + stretch_count; ++stretch) {
    const Bits* rows = panel_is_rows ? panel : stretch->left;
    const Bits* pairs = panel_is_rows ? stretch->left : panel;
    const int64_t row_tile = panel_is_rows ? kTileElements : stretch->next_tile;
    const int64_t pair_tile = panel_is_rows ? stretch->next_tile : kTileElements;
    const int64_t row_step = (panel_is_rows ? 2 : 1) * kTileElements,
                  pair_step = 3 * kTileElements - row_step;
    rows += i / kTileTokens * row_tile + i % kTileTokens * kTileInner;
    for (int64_t s = 0; s < stretch->steps; ++s, rows += row_step, pairs += pair_step) {
      for (int64_t pair = 0; pair < kPairs; ++pair) {
        __m512bh p[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) p[j] = as_bf16(_mm512_loadu_ps(pairs + j * pair_tile + pair * 32));
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          float both;
          __builtin_memcpy(&both, rows + m * kTileInner + 2 * pair, sizeof both);
          const __m512bh l = as_bf16(_mm512_set1_ps(both));
#pragma GCC unroll 2
          for (int j = 0; j < N; ++j) acc[m][j] = _mm512_dpbf16_ps(acc[m][j], l, p[j]);
        }
      }
    }
    panel += stretch->steps * 2 * kTileElements;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) _mm512_storeu_ps(sums + m * kPanel + 16 * j, acc[m][j]);
  }
}

void multiply(const Stretch* stretches, int stretch_count, const Bits* panel, bool panel_is_rows,
              int64_t row_count, int64_t column_count, bool first, float* sums) {
  const bool wide = column_count > 16;
  const auto run = wide ? block<8, 2> : block<16, 1>;
  for (int64_t i = 0; i < row_count; i += wide ? 8 : 16) {
    run(stretches, stretch_count, panel, panel_is_rows, i, first, sums + i * kPanel);
  }
}

void begin(void*) {}
void end(const void*) {}

// ---- rounding of fp32 panels ----

// v without its first `part` bf16 parts; 0 where that is no number (an infinity is in part 0).
LK_INLINE __m512 rest(__m512 v, int part) {
  constexpr int kNan = 0x81, kInfinities = 0x18;
  for (int p = 0; p < part; ++p) {
    const __m512i rounded = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
    v = _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16)));
    v = _mm512_maskz_mov_ps(static_cast<__mmask16>(~_mm512_fpclass_ps_mask(v, kNan | kInfinities)), v);
  }
  return v;
}

LK_INLINE __mmask16 first16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
LK_INLINE __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// [rows][kPanel] fp32, of which the first `count` columns are inner elements -> the rows of two tiles.
void round_rows(const float* panel, int64_t rows, int64_t count, int part, Bits* tiles) {
  for (int64_t i = 0; i < rows; ++i, panel += kPanel) {
    const __m512 low = rest(_mm512_maskz_loadu_ps(first16(count), panel), part);
    const __m512 high = rest(_mm512_maskz_loadu_ps(first16(count - 16), panel + 16), part);
    Bits* to = tiles + i / kTileTokens * kTileElements + i % kTileTokens * kTileInner;
    _mm512_storeu_si512(to, bits(_mm512_cvtne2ps_pbh(high, low)));
  }
}

// Words 0..15 of two registers or of a register's halves, one by one: 0, 16, 1, 17, ... (+ first).
LK_INLINE __m512i weave(int half_width, int first) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(half_width)), 16));
}

LK_INLINE Bits* pair_in_tiles(Bits* tiles, int64_t pair) {
  return tiles + pair / kPairs * 2 * kTileElements + pair % kPairs * 32;
}

// [count][kPanel] fp32 -> pairs of the rows; zeros behind the last one.
void round_pairs(const float* panel, int64_t count, int part, Bits* tiles) {
  const __m512i order = weave(16, 0);
  for (int64_t pair = 0; pair < padded(count, kTileInner) / 2; ++pair) {
    Bits* to = pair_in_tiles(tiles, pair);
    for (int64_t half = 0; half < 2; ++half) {
      const float* from = panel + 2 * pair * kPanel + 16 * half;
      __m512 even = _mm512_setzero_ps(), odd = even;
      if (2 * pair < count) even = rest(_mm512_loadu_ps(from), part);
      if (2 * pair + 1 < count) odd = rest(_mm512_loadu_ps(from + kPanel), part);
      const __m512i both = bits(_mm512_cvtne2ps_pbh(odd, even));
      _mm512_storeu_si512(to + half * kTileElements, _mm512_permutexvar_epi16(order, both));
    }
  }
}

// ---- decoding ----

const Bits* dense_row(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const Bits*>(m.data) + row * m.stride + col;
}

void dense_rows(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count, Bits* tiles) {
  for (int64_t i = 0; i < width; ++i) {
    const Bits* from = dense_row(m, output + i, inner);
    Bits* to = tiles + i / kTileTokens * kTileElements + i % kTileTokens * kTileInner;
    for (int64_t c = 0; c < count; c += kTileInner, to += 2 * kTileElements) {
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(first32(count - c), from + c));
    }
  }
}

void dense_pairs(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count, Bits* tiles) {
  const __m512i low = weave(32, 0), high = weave(32, 16);
  for (int64_t pair = 0; pair < padded(count, kTileInner) / 2; ++pair) {
    Bits* to = pair_in_tiles(tiles, pair);
    for (int64_t p = 0; p < width; p += kPanel) {
      const __mmask32 columns = first32(width - p);
      __m512i even = _mm512_setzero_si512(), odd = even;
      if (2 * pair < count)
        even = _mm512_maskz_loadu_epi16(columns, dense_row(m, inner + 2 * pair, output + p));
      if (2 * pair + 1 < count) {
        odd = _mm512_maskz_loadu_epi16(columns, dense_row(m, inner + 2 * pair + 1, output + p));
      }
      _mm512_storeu_si512(to + p * kMostDepth, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + p * kMostDepth + kTileElements, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

LK_INLINE __m512 scaled_codebook(float scale) {
  return _mm512_mul_ps(_mm512_loadu_ps(nf4::kCodebook.data()), _mm512_set1_ps(scale));
}

// 16 bytes of a row's codes, in all four lanes -> 32 words, whose low 4 bits are the codes, in order. The
// bits above are those of other codes, or nothing.
LK_INLINE __m512i codes_of_row(__m512i bytes) {
  // Lane l, word w: byte 4l + w/2, whose high nibble comes first.
  const __m512i pick =
      _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_setr_epi8(0, -128, 0, -128, 1, -128, 1, -128, 2, -128, 2,
                                                           -128, 3, -128, 3, -128)),
                      _mm512_set_epi64(0x000c000c000c000c, 0x000c000c000c000c, 0x0008000800080008,
                                       0x0008000800080008, 0x0004000400040004, 0x0004000400040004, 0, 0));
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, pick), _mm512_set1_epi32(4));
}

LK_INLINE __m512i bf16_table(float first, float second) {
  return bits(_mm512_cvtne2ps_pbh(scaled_codebook(second), scaled_codebook(first)));
}

// What is decoded after the codes of a row from inner element `inner` on, kDepth of them: the next ones, or
// behind the row's end the first of the row a panel further, which a thread mostly takes
// next where tokens are few and decoding counts.
LK_INLINE const uint8_t* next_codes(const Matrix& m, const uint8_t* codes, int64_t inner) {
  const int64_t left = m.cols - inner;
  return codes + (left > kDepth ? kDepth : left + (kPanel - 1) * m.cols) / 2;
}

LK_INLINE void prefetch_depth(const uint8_t* codes) {
#pragma GCC unroll 8
  for (int64_t byte = 0; byte < kDepth / 2; byte += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + byte), _MM_HINT_T0);
  }
}

// Of rows whose blocks fit them.
void nf4_rows(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count,
              const float* scales, Bits* tiles) {
  const int shift = blocksize_shift(m);
  const int64_t blocks = row_blocks(m), in_block = std::min(m.nf4->blocksize, count);
  for (int64_t i = 0; i < width; ++i) {
    const uint8_t* from = m.nf4->packed + flat_index(m, output + i, inner) / 2;
    const float* scale = scales + i * blocks + (inner >> shift);
    Bits* to = tiles + i / kTileTokens * kTileElements + i % kTileTokens * kTileInner;
    prefetch_depth(next_codes(m, from, inner));
    for (const uint8_t* end = from + count / 2; from < end; ++scale) {
      const __m512i table = bf16_table(*scale, *scale);  // twice: bit 4 of a word is any
      for (const uint8_t* stop = from + in_block / 2; from < stop; from += kTileInner / 2) {
        const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(codes_of_row(bytes), table));
        to += 2 * kTileElements;
      }
    }
  }
}

// Of rows that start on a byte, and wherever in a block: 32 weights lie in up to two, whose tables are the
// two halves of one.
void nf4_rows_across(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count,
                     const float* scales, Bits* tiles) {
  const int shift = blocksize_shift(m);
  const __m512i low4 = _mm512_set1_epi16(15);
  for (int64_t i = 0; i < width; ++i) {
    const int64_t start = flat_index(m, output + i, 0), first = start >> shift;
    const uint8_t* from = m.nf4->packed + (start + inner) / 2;
    const float* scale = scales + i * row_blocks(m);
    Bits* to = tiles + i / kTileTokens * kTileElements + i % kTileTokens * kTileInner;
    prefetch_depth(next_codes(m, from, inner));
    int64_t block = -1;
    __m512i table = _mm512_setzero_si512();
    for (int64_t c = 0; c < count; c += kTileInner, to += 2 * kTileElements) {
      const int64_t flat = start + inner + c;
      if (flat >> shift != block) {
        block = flat >> shift;
        table = bf16_table(scale[block - first], scale[block - first + 1]);
      }
      const int64_t next = ((block + 1) << shift) - flat;  // the first column of the next block
      const __m512i half =
          _mm512_maskz_mov_epi16(next >= kTileInner ? 0 : ~0u << next, _mm512_set1_epi16(16));
      const __mmask16 bytes = first16((count - c + 1) / 2);
      const __m512i words = codes_of_row(_mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(bytes, from + c / 2)));
      // (words & low4) | half
      const __m512i index = _mm512_ternarylogic_epi32(words, low4, half, 0xea);
      _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(first32(count - c), index, table));
    }
  }
}

// 16 bytes, 8 of either of two rows that are woven together -> 32 words: the codes, or'ed with `more`.
LK_INLINE __m512i codes_of_pair(__m128i bytes, __m512i more) {
  // Lane l, dword d takes column 4l + d of both rows, byte 2l + d/2 and 8 behind it.
  const __m512i pick =
      _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_setr_epi8(0, -128, 8, -128, 0, -128, 8, -128, 1, -128, 9,
                                                           -128, 1, -128, 9, -128)),
                      _mm512_set_epi64(0x0006000600060006, 0x0006000600060006, 0x0004000400040004,
                                       0x0004000400040004, 0x0002000200020002, 0x0002000200020002, 0, 0));
  const __m512i nibble = _mm512_set1_epi64(0x0000000000040004);
  const __m512i words = _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), pick), nibble);
  return _mm512_ternarylogic_epi32(words, _mm512_set1_epi16(15), more, 0xea);  // (words & 15) | more
}

void zero_pair(Bits* to, int64_t width) {
  for (int64_t p = 0; p < width; p += kPanel) {
    _mm512_storeu_si512(to + p * kMostDepth, _mm512_setzero_si512());
    _mm512_storeu_si512(to + p * kMostDepth + kTileElements, _mm512_setzero_si512());
  }
}

// Of rows whose blocks fit them.
void nf4_pairs(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count, Bits* tiles) {
  const int shift = blocksize_shift(m);
  const __m512i second = _mm512_set1_epi32(16 << 16);  // half of the table
  const uint8_t* packed = m.nf4->packed + flat_index(m, inner, output) / 2;
  const int64_t stride = m.cols / 2;
  for (int64_t pair = 0; pair < padded(count, kTileInner) / 2; ++pair) {
    const bool two = 2 * pair + 1 < count;
    const uint8_t *even = packed + 2 * pair * stride, *odd = two ? even + stride : even;
    Bits* to = pair_in_tiles(tiles, pair);
    if (2 * pair >= count) {
      zero_pair(to, width);
      continue;
    }
    _mm_prefetch(reinterpret_cast<const char*>(even + kRowsAhead * stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(odd + kRowsAhead * stride), _MM_HINT_T0);
    int64_t block = -1;
    __m512i table = _mm512_setzero_si512();
    for (int64_t p = 0; p < width; p += kPanel) {
      const int64_t flat = flat_index(m, inner + 2 * pair, output + p);
      if (flat >> shift != block) {
        block = flat >> shift;
        const float other = two ? block_scale(*m.nf4, (flat + m.cols) >> shift) : 0.0f;
        table = bf16_table(block_scale(*m.nf4, block), other);
      }
      const __m128i e = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even + p / 2));
      const __m128i o = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd + p / 2));
      const auto look_up = [&](__m128i bytes) {
        return _mm512_permutexvar_epi16(codes_of_pair(bytes, second), table);
      };
      _mm512_storeu_si512(to + p * kMostDepth, look_up(_mm_unpacklo_epi64(e, o)));
      _mm512_storeu_si512(to + p * kMostDepth + kTileElements, look_up(_mm_unpackhi_epi64(e, o)));
    }
  }
}

// Of rows that start on a byte, and wherever in a block: four tables, those of the second blocks in a second
// register.
void nf4_pairs_across(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count,
                      Bits* tiles) {
  const int shift = blocksize_shift(m);
  const int64_t last_block = (m.rows * m.cols - 1) >> shift;
  const __m512i second = _mm512_set1_epi32(16 << 16), behind = _mm512_set1_epi16(32);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first_columns = _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16));
  const __m512i other_columns = _mm512_add_epi16(first_columns, _mm512_set1_epi16(16));
  for (int64_t pair = 0; pair < padded(count, kTileInner) / 2; ++pair) {
    Bits* to = pair_in_tiles(tiles, pair);
    if (2 * pair >= count) {
      zero_pair(to, width);
      continue;
    }
    const bool two = 2 * pair + 1 < count;
    const int64_t start[2] = {flat_index(m, inner + 2 * pair, output),
                              flat_index(m, inner + 2 * pair + (two ? 1 : 0), output)};
    for (const int64_t flat : start) {
      _mm_prefetch(reinterpret_cast<const char*>(m.nf4->packed + (flat + kRowsAhead * m.cols) / 2),
                   _MM_HINT_T0);
    }
    int64_t block[2] = {-1, -1};
    __m512i tables[2] = {};
    for (int64_t p = 0; p < width; p += kPanel) {
      bool changed = false;
      int64_t next[2];  // the first column of the next block
      __m128i bytes[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t flat = start[i] + p;
        changed |= flat >> shift != block[i];
        block[i] = flat >> shift;
        next[i] = std::min(((block[i] + 1) << shift) - flat, kPanel);
        bytes[i] = _mm_maskz_loadu_epi8(first16((width - p + 1) / 2), m.nf4->packed + flat / 2);
      }
      if (changed) {
        for (int i = 0; i < 2; ++i) {
          const auto scale = [&](int64_t b) { return block_scale(*m.nf4, std::min(b + i, last_block)); };
          tables[i] = bf16_table(scale(block[0]), two ? scale(block[1]) : 0.0f);
        }
      }
      const __m512i bounds = _mm512_set1_epi32(static_cast<int>(next[0] | next[1] << 16));
      const auto look_up = [&](__m128i codes, __m512i columns) {
        const __mmask32 passed = _mm512_cmpge_epi16_mask(columns, bounds);
        const __m512i index = codes_of_pair(codes, second);
        return _mm512_permutex2var_epi16(tables[0], _mm512_mask_add_epi16(index, passed, index, behind),
                                         tables[1]);
      };
      _mm512_storeu_si512(to + p * kMostDepth,
                          look_up(_mm_unpacklo_epi64(bytes[0], bytes[1]), first_columns));
      _mm512_storeu_si512(to + p * kMostDepth + kTileElements,
                          look_up(_mm_unpackhi_epi64(bytes[0], bytes[1]), other_columns));
    }
  }
}

}  // namespace

void decode(const Right& right, int64_t output, int64_t width, int64_t inner, int64_t count, int part,
            const float* scales, float* space, Bits* tiles) {
  const Matrix& m = right.matrix;
  if (m.nf4 == nullptr && m.dtype == LK_BF16) {
    return (right.rows_are_outputs ? dense_rows : dense_pairs)(m, output, width, inner, count, tiles);
  }
  const bool on_bytes = m.nf4 != nullptr && m.cols % 2 == 0;  // its rows start
  if (right.rows_are_outputs) {
    if (on_bytes) {
      const auto run = blocks_fit_rows(m) ? nf4_rows : nf4_rows_across;
      return run(m, output, width, inner, count, scales, tiles);
    }
    for (int64_t c = 0; c < count; c += kTileInner, tiles += 2 * kTileElements) {
      const int64_t n = std::min(kTileInner, count - c);
      gemm_kernels().decode({m, false}, inner + c, n, output, width, nullptr, space);
      round_rows(space, width, n, part, tiles);
    }
    return;
  }
  if (on_bytes) {
    return (blocks_fit_rows(m) ? nf4_pairs : nf4_pairs_across)(m, output, width, inner, count, tiles);
  }
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = std::min(kChunk, count - i);
    gemm_kernels().decode(right, output, width, inner + i, n, nullptr, space);
    for (int64_t p = 0; p < width; p += kPanel) {
      round_pairs(space + p * kChunk, n, part, tiles + p * kMostDepth + i * kPanel);
    }
  }
}

void transpose_tile(Bits* tile) { copy_tile(tile, kTileInner, kTileTokens, Layout::pairs, tile); }

void copy_tile(const Bits* from, int64_t stride, int64_t rows, Layout layout, Bits* tile) {
  Rows r;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_loadu_ps(from + i * stride) : _mm512_setzero_ps();
  if (layout == Layout::pairs) transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(tile + i * kTileInner, r[i]);
}

void transpose_sums(float* sums) {
  const auto load = [](const float* from, Rows& r) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * kPanel);
    transpose(r);
  };
  const auto store = [](const Rows& r, float* to) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * kPanel, r[i]);
  };
  Rows a, b;
  load(sums, a);
  store(a, sums);
  load(sums + 16 * kPanel + 16, a);
  store(a, sums + 16 * kPanel + 16);
  load(sums + 16, a);
  load(sums + 16 * kPanel, b);
  store(a, sums + 16 * kPanel);
  store(b, sums + 16);
}

void store(const Output& out, int64_t row, int64_t tokens, int64_t column, int64_t width, bool transposed,
           const float* sums) {
  alignas(64) float bias[kPanel] = {};
  if (out.bias != nullptr) read_floats(out.bias, out.bias_dtype, column, width, bias);
  const __m512 bias_low = _mm512_load_ps(bias), bias_high = _mm512_load_ps(bias + 16);
  const __m512 scale = _mm512_set1_ps(out.scale);
  const __mmask32 columns = first32(width);
  const auto store_row = [&](int64_t t, __m512 low, __m512 high) {
    Bits* to = static_cast<Bits*>(out.data) + (row + t) * out.stride + column;
    low = _mm512_add_ps(_mm512_mul_ps(low, scale), bias_low);
    high = _mm512_add_ps(_mm512_mul_ps(high, scale), bias_high);
    if (out.accumulate) {
      const __m512i before = _mm512_maskz_loadu_epi16(columns, to);
      const auto half = [&](__m256i words) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
      };
      low = _mm512_add_ps(low, half(_mm512_castsi512_si256(before)));
      high = _mm512_add_ps(high, half(_mm512_extracti64x4_epi64(before, 1)));
    }
    _mm512_mask_storeu_epi16(to, columns, bits(_mm512_cvtne2ps_pbh(high, low)));
  };
  if (!transposed) {
    for (int64_t t = 0; t < tokens; ++t) {
      store_row(t, _mm512_loadu_ps(sums + t * kPanel), _mm512_loadu_ps(sums + t * kPanel + 16));
    }
    return;
  }
  for (int64_t first = 0; first < tokens; first += 16) {
    Rows low, high;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) low[i] = _mm512_loadu_ps(sums + i * kPanel + first);
    transpose(low);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) high[i] = _mm512_loadu_ps(sums + (16 + i) * kPanel + first);
    transpose(high);
    const int64_t rows = std::min<int64_t>(16, tokens - first);
    for (int64_t i = 0; i < rows; ++i) store_row(first + i, low[i], high[i]);
  }
}

const Bf16Kernels kGemm = {begin, end, multiply};

}  // namespace lk::cpu::avx512bf16
#pragma GCC pop_options
#endif

// gemm.h with AVX-512: 12 tokens x 32 outputs in 24 of the 32 registers, two fp32 FMAs a cycle.
//
// Decoding is by register permutes: the low four bits of every 32-bit lane pick one of the 16 codebook
// entries. For P = Wᵀ a row's 64 bytes (128 weights) are one load; the dwords of 16 rows are transposed, so
// that a lane holds eight successive weights of its row, and eight shifts feed eight permutes: 2 to 3
// operations for 16 weights, used for every token of the block.
#include "gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>

#include "../nf4.h"
#include "convert.h"
#include "isa.h"
#include "nf4_decode.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")

namespace lk::cpu::avx512 {
namespace {

#include "transpose_avx512.h"

struct Vec {
  using V = __m512;
  static constexpr int kLanes = 16, kRows = 12;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    Rows r;
    for (int i = 0; i < 16; ++i) r[i] = load(from + i * stride);
    avx512::transpose(r);
    for (int i = 0; i < 16; ++i) store(to + i * to_stride, r[i]);
  }
};

#include "gemm_kernels.h"

// Up to 16 elements of a dense row from element `at`, zeros behind them.
LK_INLINE __m512 load16(const Matrix& m, int64_t at, int64_t n) {
  const __mmask16 mask = n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
  if (m.dtype == LK_F32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(m.data) + at);
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(m.data) + at);
  if (m.dtype == LK_F16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Rows [row, row + rows) x columns [col, col + n) of a dense matrix, up to 16 x 16, transposed.
LK_INLINE void load_transposed(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t n, Rows& r) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = i < rows ? load16(m, (row + i) * m.stride + col, n) : _mm512_setzero_ps();
  }
  transpose(r);
}

void pack_tile_dense(const Matrix& m, int64_t row, int64_t tokens, int64_t inner, float scale,
                     float* packed) {
  const __mmask16 mask = static_cast<__mmask16>((1u << tokens) - 1);
  const __m512 factor = _mm512_set1_ps(scale);
  Rows r;
  for (int64_t c = 0; c < inner; c += 16) {
    const int64_t n = std::min<int64_t>(16, inner - c);
    load_transposed(m, row, tokens, c, n, r);
    for (int64_t i = 0; i < n; ++i) {
      _mm512_mask_storeu_ps(packed + (c + i) * tokens, mask, _mm512_mul_ps(r[i], factor));
    }
  }
}

// ---- decoding ----

// Rows (P = W) and chunks (P = Wᵀ) that are prefetched ahead: neither is a stream that hardware would follow.
constexpr int64_t kRowsAhead = 24;
constexpr int64_t kChunksAhead = 2;

LK_INLINE __m512 codebook() { return _mm512_loadu_ps(nf4::kCodebook.data()); }

// The dense P = Wᵀ: transposed 16 x 16 at a time.
void decode_dense_rows(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count,
                       float* panel) {
  Rows r;
  for (int64_t half = 0; half < width; half += 16) {
    const int64_t rows = std::min<int64_t>(16, width - half);
    for (int64_t c = 0; c < count; c += 16) {
      const int64_t n = std::min<int64_t>(16, count - c);
      load_transposed(m, output + half, rows, inner + c, n, r);
      for (int64_t i = 0; i < n; ++i) _mm512_storeu_ps(panel + (c + i) * kPanel + half, r[i]);
    }
  }
}

// The dense P = W.
void decode_dense_columns(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count,
                          float* panel) {
  for (int64_t c = 0; c < count; ++c) {
    const int64_t at = (inner + c) * m.stride + output;
    _mm512_storeu_ps(panel + c * kPanel, load16(m, at, width));
    if (width > 16) _mm512_storeu_ps(panel + c * kPanel + 16, load16(m, at + 16, width - 16));
  }
}

// NF4, P = Wᵀ: up to a chunk of 128 weights of up to 16 rows that start on whole dwords of codes; scales: of
// these rows, as panel_scales has them. Fit: blocks lie in one row each, so that all rows change theirs at
// once. What is behind `count` is finite.
template <bool Fit>
void decode_nf4_rows(const Matrix& m, int64_t output, int64_t rows, int64_t inner, int64_t count,
                     const float* scales, float* panel) {
  const int shift = blocksize_shift(m);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i row = _mm512_min_epi32(lane, _mm512_set1_epi32(static_cast<int>(rows - 1)));
  const __m512i at = _mm512_mullo_epi32(row, _mm512_set1_epi32(static_cast<int>(row_blocks(m))));
  // How far behind its first block's start each row starts.
  const __m512i start =
      _mm512_and_si512(_mm512_add_epi32(_mm512_mullo_epi32(row, _mm512_set1_epi32(static_cast<int>(m.cols))),
                                        _mm512_set1_epi32(static_cast<int>(flat_index(m, output, 0)))),
                       _mm512_set1_epi32(static_cast<int>(m.nf4->blocksize - 1)));
  const __m512 table = codebook();
  const __mmask64 bytes = count == kChunk ? ~__mmask64{0} : (__mmask64{1} << (count + 1) / 2) - 1;
  Rows r;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const uint8_t* from = m.nf4->packed + flat_index(m, output + std::min<int64_t>(i, rows - 1), inner) / 2;
    _mm_prefetch(reinterpret_cast<const char*>(from + kChunksAhead * kChunk / 2), _MM_HINT_T0);
    r[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(bytes, from));
  }
  transpose(r);
  __m512 scale = _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int d = 0; d < 16; ++d) {
    if (8 * d >= count) break;
    if constexpr (!Fit) {
      const __m512i behind = _mm512_add_epi32(start, _mm512_set1_epi32(static_cast<int>(inner + 8 * d)));
      const __m512i block = _mm512_srl_epi32(behind, _mm_cvtsi32_si128(shift));
      scale = _mm512_i32gather_ps(_mm512_add_epi32(at, block), scales, 4);
    } else if (d % 4 == 0) {  // 32 weights: the smallest block
      scale = _mm512_i32gather_ps(at, scales + ((inner + 8 * d) >> shift), 4);
    }
    const __m512i codes = _mm512_castps_si512(r[d]);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {  // the high nibble of a byte comes first
      const __m512i index = _mm512_srli_epi32(codes, j % 2 == 0 ? 4 * j + 4 : 4 * j - 4);
      const __m512 value = _mm512_mul_ps(_mm512_permutexvar_ps(index, table), scale);
      _mm512_storeu_ps(panel + (8 * d + j) * kPanel, value);
    }
  }
}

// The scales of blocks first, first + stride, ...: those of one column of blocks.
void strided_scales(const lk_nf4_weight& w, int64_t first, int64_t stride, int64_t count, float* out) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
  const auto* plain = static_cast<const float*>(w.absmax);
  const auto* codes = static_cast<const uint8_t*>(w.absmax);
  int64_t i = 0;
  if (w.nested_absmax == nullptr) {
    for (; i + 16 <= count; i += 16) {
      _mm512_storeu_ps(out + i, _mm512_i32gather_ps(offsets, plain + first + i * stride, 4));
    }
  } else {
    const __m512 offset = _mm512_set1_ps(*w.offset);
    // A gather reads three bytes behind its last code, which the rows after it must have.
    for (; i + 16 <= count && (count - i - 16) * stride >= 3; i += 16) {
      const int64_t block = first + i * stride, nested = block / nf4::kNestedBlock;
      const __m512i in_nested =
          _mm512_add_epi32(offsets, _mm512_set1_epi32(static_cast<int>(block % nf4::kNestedBlock)));
      const __m512i code =
          _mm512_and_si512(_mm512_i32gather_epi32(offsets, codes + block, 1), _mm512_set1_epi32(255));
      const __m512 factor = _mm512_i32gather_ps(_mm512_srli_epi32(in_nested, 8), w.nested_absmax + nested, 4);
      const __m512 value = _mm512_mul_ps(_mm512_i32gather_ps(code, nf4::kDynamicMap.data(), 4), factor);
      _mm512_storeu_ps(out + i, _mm512_add_ps(value, offset));  // two roundings, as the format says
    }
  }
  for (; i < count; ++i) out[i] = block_scale(w, first + i * stride);
}

// 32 codes, 16 bytes in all four lanes of a register -> two registers of weights.
struct Halves {
  __m512 first, second;
};
LK_INLINE Halves look_up(__m512i bytes, __m512 table) {
  // Dword l of the first (second) 16 weights looks at byte l/2 (8 + l/2), shifted to its nibble.
  const __m512i first =
      _mm512_set_epi64(0x0707070707070707, 0x0606060606060606, 0x0505050505050505, 0x0404040404040404,
                       0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  const __m512i second = _mm512_or_si512(first, _mm512_set1_epi8(8));
  const __m512i nibble = _mm512_set1_epi64(4);  // 4, 0, 4, 0, ...
  return {_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, first), nibble), table),
          _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, second), nibble), table)};
}

// NF4, P = W: up to 128 successive weights of each row, in multiples of 32, which lie in one block and start
// on a byte.
void decode_nf4_columns(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count,
                        float* panels) {
  const __m512 table = codebook();
  const int shift = blocksize_shift(m);
  alignas(64) float scales[kGroup][kChunk];
  for (int64_t p = 0; p * kPanel < width; ++p) {
    const int64_t block = (output + p * kPanel) >> shift, before = (output + (p - 1) * kPanel) >> shift;
    if (p > 0 && block == before) {
      std::copy_n(scales[p - 1], count, scales[p]);
    } else {
      const int64_t blocks = row_blocks(m);
      strided_scales(*m.nf4, inner * blocks + block, blocks, count, scales[p]);
    }
  }
  const uint8_t* packed = m.nf4->packed + flat_index(m, inner, output) / 2;
  const int64_t stride = m.cols / 2;
  for (int64_t c = 0; c < count; ++c, packed += stride) {
    _mm_prefetch(reinterpret_cast<const char*>(packed + kRowsAhead * stride), _MM_HINT_T0);
    float* to = panels + c * kPanel;
    for (int64_t p = 0; p * kPanel < width; ++p, to += kChunk * kPanel) {
      const __m512 scale = _mm512_set1_ps(scales[p][c]);
      const auto weights = look_up(
          _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + 16 * p))), table);
      _mm512_storeu_ps(to, _mm512_mul_ps(weights.first, scale));
      _mm512_storeu_ps(to + 16, _mm512_mul_ps(weights.second, scale));
    }
  }
}

// The same of rows that start on a byte, and wherever in a block: 32 weights lie in up to two.
void decode_nf4_columns_across(const Matrix& m, int64_t output, int64_t width, int64_t inner, int64_t count,
                               float* panels) {
  const __m512 table = codebook();
  const int shift = blocksize_shift(m);
  constexpr int64_t kMostScales = kGroup * kPanel / 32 + 1;
  float scales[kMostScales + 1] = {};  // one more is read, and not used
  for (int64_t c = 0; c < count; ++c) {
    const int64_t flat = flat_index(m, inner + c, output), first = flat >> shift;
    decode_scales(*m.nf4, first, ((flat + width - 1) >> shift) - first + 1, scales);
    const uint8_t* packed = m.nf4->packed + flat / 2;
    _mm_prefetch(reinterpret_cast<const char*>(packed + kRowsAhead * m.cols / 2), _MM_HINT_T0);
    float* to = panels + c * kPanel;
    for (int64_t p = 0; p < width; p += kPanel, to += kChunk * kPanel) {
      const int64_t bytes = std::min<int64_t>(16, (width - p + 1) / 2);
      const int64_t block = ((flat + p) >> shift) - first;
      const int64_t next = ((first + block + 1) << shift) - flat - p;  // the first column of the next block
      const uint32_t behind = next >= kPanel ? 0 : ~0u << next;
      const auto weights = look_up(_mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(
                                       static_cast<__mmask16>((1u << bytes) - 1), packed + p / 2)),
                                   table);
      const __m512 scale = _mm512_set1_ps(scales[block]), other = _mm512_set1_ps(scales[block + 1]);
      const auto scaled = [&](__m512 v, uint32_t mask) {
        return _mm512_mul_ps(v, _mm512_mask_mov_ps(scale, static_cast<__mmask16>(mask), other));
      };
      _mm512_storeu_ps(to, scaled(weights.first, behind & 0xffff));
      _mm512_storeu_ps(to + 16, scaled(weights.second, behind >> 16));
    }
  }
}

void decode_panels(const Right& right, int64_t output, int64_t width, int64_t inner, int64_t count,
                   const float* scales, float* panels) {
  const Matrix& m = right.matrix;
  if (m.nf4 == nullptr) {
    const auto run = right.rows_are_outputs ? decode_dense_rows : decode_dense_columns;
    for (int64_t p = 0; p < width; p += kPanel) {
      run(m, output + p, std::min(kPanel, width - p), inner, count, panels + p * kChunk);
    }
  } else if (!right.rows_are_outputs && m.cols % 2 == 0) {
    const auto run = blocks_fit_rows(m) ? decode_nf4_columns : decode_nf4_columns_across;
    run(m, output, width, inner, count, panels);
  } else if (right.rows_are_outputs && m.cols % 8 == 0) {
    const auto run = blocks_fit_rows(m) ? decode_nf4_rows<true> : decode_nf4_rows<false>;
    run(m, output, std::min<int64_t>(16, width), inner, count, scales, panels);
    if (width > 16) run(m, output + 16, width - 16, inner, count, scales + 16 * row_blocks(m), panels + 16);
  } else {
    decode(right, output, width, inner, count, scales, panels);
  }
}

void pack_rows(const Matrix& m, int64_t row, int64_t tokens, int64_t inner, float scale, float* packed) {
  pack_tile_dense(m, row, tokens, inner, scale, packed);
}

}  // namespace

const GemmKernels kGemm = {pack_rows, decode_panels, multiply, store};

}  // namespace lk::cpu::avx512
#pragma GCC pop_options
#endif

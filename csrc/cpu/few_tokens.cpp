// For T <= 4 tokens. 64 bytes of a row's codes, a line, are one register: 128 weights, dword l of which holds
// those of columns 8l..8l+7, which lie in one block. Eight shifts and permutes give eight registers of
// weights, register j of them columns j, 8+j, 16+j, ...; so x is laid out in that order first ("planes") and
// nothing is shuffled in the loop:
//
//   forward    a thread owns rows n:    y[t, n] = Σ_lines scale ⊙ Σ_j w_j ⊙ x[t, line, j]
//   backward   a thread owns lines:     sums[t, line, j] += Σ_n (dy[t, n]·scale) ⊙ w_j, four rows at a time
//
// Per 16 weights: a shift, a permute and T FMAs on two ports (1.5 cycles at T = 1), 8.25 bytes of W0. From a
// warm cache a core takes 0.86 ms for 4096x4096 at T = 1; from memory two cores take about as long as the
// codes' 8.7 MB take to be read.
#include "few_tokens.h"

#include <algorithm>
#include <bit>

#include "convert.h"
#include "isa.h"
#include "nf4_decode.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lk::cpu {

bool few_tokens(int64_t tokens, const Matrix& weight) {
#if defined(__x86_64__)
  return tokens > 0 && tokens <= kFewTokens && isa() >= Isa::avx512 && weight.nf4 != nullptr &&
         weight.cols > 0 && weight.cols % 8 == 0;
#else
  (void)tokens, (void)weight;
  return false;
#endif
}

}  // namespace lk::cpu

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")

namespace lk::cpu {

void few_tokens_rows(const Matrix& m, float scale, const Dropout& dropout, float* out) {
  for (int64_t t = 0; t < m.rows; ++t, out += m.cols) {
    read_floats(m.data, m.dtype, t * m.stride, m.cols, out);
    if (scale != 1) {
      for (int64_t c = 0; c < m.cols; ++c) out[c] *= scale;
    }
    if (dropout.p > 0) {
      lk_cpu_lora_dropout(out, LK_F32, m.cols, dropout.first + t * m.cols, dropout.p, dropout.rng, out);
    }
  }
}

void few_tokens_outer(int64_t tokens, const float* left, int64_t rows, const float* right, int64_t cols,
                      int dtype, void* out) {
  constexpr int64_t kPiece = 256;
  parallel_for(rows, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(cols, 1)),
               [&](int64_t begin, int64_t end) {
                 alignas(64) float sums[kPiece];
                 for (int64_t i = begin; i < end; ++i) {
                   for (int64_t c = 0; c < cols; c += kPiece) {
                     const int64_t n = std::min(kPiece, cols - c);
                     for (int64_t t = 0; t < tokens; ++t) {
                       const float factor = left[t * rows + i];
                       const float* from = right + t * cols + c;
                       if (t == 0) {
                         for (int64_t j = 0; j < n; ++j) sums[j] = factor * from[j];
                       } else {
                         for (int64_t j = 0; j < n; ++j) sums[j] += factor * from[j];
                       }
                     }
                     write_floats(sums, n, out, dtype, i * cols + c);
                   }
                 }
               });
}

namespace {

constexpr int64_t kRows = 4;           // of W0 at a time, in the backward
constexpr int64_t kMostBlocks = 1024;  // of a row whose scales are decoded at a time

// How far to shift a dword to bring weight j of its eight into the low four bits: a byte's high nibble is
// first.
constexpr int nibble_shift(int j) { return j % 2 == 0 ? 4 * j + 4 : 4 * j - 4; }

LK_INLINE __m512 codebook() { return _mm512_loadu_ps(nf4::kCodebook.data()); }

LK_INLINE __m512 weights(__m512i codes, int j, __m512 table) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(nibble_shift(j))), table);
}

// Where a row (or a part of one) starts, `start` weights behind the start of the block of its first scale.
struct Scales {
  const float* first;
  int64_t start;
  int shift;

  // The block of each dword of a line, counted from that in which the line starts.
  LK_INLINE __m512i of_dwords(int64_t line) const {
    const int behind = static_cast<int>((start + line * kLine) & ((1 << shift) - 1));
    const __m512i dword = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    return _mm512_srl_epi32(_mm512_add_epi32(dword, _mm512_set1_epi32(behind)), _mm_cvtsi32_si128(shift));
  }
  // The scales of the dwords of a line. `which`: of_dwords(0), which is that of every line unless blocks are
  // longer than a line.
  LK_INLINE __m512 of_line(int64_t line, __m512i which) const {
    if (1 << shift > kLine) which = of_dwords(line);
    const float* at = first + ((start + line * kLine) >> shift);
    return _mm512_permutexvar_ps(which, _mm512_castps256_ps512(_mm256_loadu_ps(at)));  // up to five
  }
};

// Decodes the scales of the weights [flat, flat + count), `space` has room for, and zeros behind them.
LK_INLINE Scales decode_scales_of(const Matrix& m, int64_t flat, int64_t count, float* space) {
  const int shift = blocksize_shift(m);
  const int64_t block = flat >> shift, blocks = ((flat + count - 1) >> shift) - block + 1;
  decode_scales(*m.nf4, block, blocks, space);
  std::fill_n(space + blocks, kScalesBehind, 0.0f);
  return {space, flat - (block << shift), shift};
}

// Line `line` of `count` weights from `packed` on; codes 0 behind the last.
LK_INLINE __m512i load_line(const uint8_t* packed, int64_t line, int64_t count) {
  const int64_t bytes = (count - line * kLine) / 2;
  const uint8_t* from = packed + line * kLine / 2;
  if (bytes >= 64) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << bytes) - 1, from);
}

LK_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}

LK_INLINE __m512 load16(const Matrix& m, int64_t at, int64_t n) {
  const __mmask16 mask = first_lanes(n);
  if (m.dtype == LK_F32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(m.data) + at);
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(m.data) + at);
  if (m.dtype == LK_F16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// ---- forward ----

// x [K] -> planes [line][j][lane] = x[128·line + 8·lane + j], zeros behind the last.
void to_planes(const float* x, int64_t k, float* planes) {
  for (int64_t line = 0; line < k; line += kLine) {
    for (int64_t j = 0; j < 8; ++j) {
      for (int64_t lane = 0; lane < 16; ++lane) {
        const int64_t c = line + 8 * lane + j;
        planes[line + 16 * j + lane] = c < k ? x[c] : 0.0f;
      }
    }
  }
}

// Rows of W0 at a time in the forward: each x that is loaded is used for both (four tokens of x do not fit
// L1).
constexpr int kPair = 2;

template <int T>
void forward_rows(const Matrix& w, const float* planes, const float* h, const Matrix& lora_B, const Output& y,
                  int64_t begin, int64_t end) {
  const int64_t k = w.cols, r = lora_B.cols, stride = padded(k, kLine);
  const int64_t most = kMostBlocks * w.nf4->blocksize;  // weights of a row at a time
  const __m512 table = codebook();
  alignas(64) float space[kPair][kMostBlocks + 2 + kScalesBehind];
  for (int64_t n = begin; n < end; n += kPair) {
    const int64_t rows[kPair] = {n, std::min(n + 1, end - 1)};  // an odd last row is computed twice
    __m512 sum[kPair][T];
#pragma GCC unroll 2
    for (int i = 0; i < kPair; ++i) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[i][t] = _mm512_setzero_ps();
    }
    for (int64_t first = 0; first < k; first += most) {
      const int64_t count = std::min(most, k - first);
      const uint8_t* packed[kPair];
      Scales scales[kPair];
      __m512i which[kPair];
#pragma GCC unroll 2
      for (int i = 0; i < kPair; ++i) {
        const int64_t flat = flat_index(w, rows[i], first);
        scales[i] = decode_scales_of(w, flat, count, space[i]);
        which[i] = scales[i].of_dwords(0);
        packed[i] = w.nf4->packed + flat / 2;
      }
      for (int64_t line = 0; line * kLine < count; ++line) {
        __m512i codes[kPair];
        __m512 part[kPair][T];
#pragma GCC unroll 2
        for (int i = 0; i < kPair; ++i) {
          codes[i] = load_line(packed[i], line, count);
          _mm_prefetch(reinterpret_cast<const char*>(packed[i] + line * kLine / 2 + kPair * k / 2),
                       _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          __m512 value[kPair];
#pragma GCC unroll 2
          for (int i = 0; i < kPair; ++i) value[i] = weights(codes[i], j, table);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            const __m512 xs = _mm512_loadu_ps(planes + t * stride + first + line * kLine + 16 * j);
#pragma GCC unroll 2
            for (int i = 0; i < kPair; ++i) {
              part[i][t] = j == 0 ? _mm512_mul_ps(value[i], xs) : _mm512_fmadd_ps(value[i], xs, part[i][t]);
            }
          }
        }
#pragma GCC unroll 2
        for (int i = 0; i < kPair; ++i) {
          const __m512 scale = scales[i].of_line(line, which[i]);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) sum[i][t] = _mm512_fmadd_ps(part[i][t], scale, sum[i][t]);
        }
      }
    }
    for (int i = 0; i < kPair && n + i < end; ++i) {
      for (int64_t c = 0; c < r; c += 16) {
        const __m512 b = load16(lora_B, rows[i] * lora_B.stride + c, r - c);
        const __mmask16 mask = first_lanes(r - c);
        for (int t = 0; t < T; ++t) {
          sum[i][t] = _mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(mask, h + t * r + c), sum[i][t]);
        }
      }
      float bias = 0;
      if (y.bias != nullptr) read_floats(y.bias, y.bias_dtype, n + i, 1, &bias);
      for (int t = 0; t < T; ++t) {
        const float value = _mm512_reduce_add_ps(sum[i][t]) + bias;
        write_floats(&value, 1, y.data, y.dtype, t * y.stride + n + i);
      }
    }
  }
}

// ---- backward ----

// Of a task: 512 bytes of codes of a row, 4 KiB of sums a token.
constexpr int64_t kLinesAtOnce = 8;

// sums [T][lines][8][16] of the lines [line, line + lines) over the rows [begin, end) of W0; anything behind
// the last column.
template <int T>
void backward_lines(const Matrix& w, const float* dy, int64_t begin, int64_t end, int64_t line, int64_t lines,
                    float* sums) {
  const int64_t k = w.cols, n = w.rows, first = line * kLine, count = std::min(lines * kLine, k - first);
  const __m512 table = codebook();
  alignas(64) float space[kRows][kLinesAtOnce * kLine / 32 + 2 + kScalesBehind];
  std::fill(sums, sums + T * lines * kLine, 0.0f);
  for (int64_t row = begin; row < end; row += kRows) {
    const int rows = static_cast<int>(std::min(kRows, end - row));
    const uint8_t* packed[kRows];
    Scales scales[kRows];
    __m512i which[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {  // a row that is not there is the last one, and counts zero times
      const int64_t flat = flat_index(w, row + std::min(i, rows - 1), first);
      packed[i] = w.nf4->packed + flat / 2;
      scales[i] = decode_scales_of(w, flat, count, space[i]);
      which[i] = scales[i].of_dwords(0);
    }
    for (int64_t l = 0; l < lines; ++l) {
      __m512i codes[kRows];
      __m512 factor[kRows][T];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        codes[i] = load_line(packed[i], l, count);
        _mm_prefetch(reinterpret_cast<const char*>(packed[i] + l * kLine / 2 + 2 * kRows * k / 2),
                     _MM_HINT_T0);
        const __m512 scale = scales[i].of_line(l, which[i]);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          factor[i][t] = _mm512_mul_ps(scale, _mm512_set1_ps(i < rows ? dy[t * n + row + i] : 0.0f));
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        __m512 total[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) total[t] = _mm512_loadu_ps(sums + (t * lines + l) * kLine + 16 * j);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const __m512 value = weights(codes[i], j, table);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) total[t] = _mm512_fmadd_ps(value, factor[i][t], total[t]);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) _mm512_storeu_ps(sums + (t * lines + l) * kLine + 16 * j, total[t]);
      }
    }
  }
}

void finish_lines(int64_t tokens, int64_t line, int64_t lines, const float* sums, const float* g,
                  const Matrix& lora_A, const Dropout& dropout, const Output& dx) {
  const int64_t first = line * kLine, r = lora_A.rows, cols = std::min(lines * kLine, dx.stride - first);
  alignas(64) float low[kLinesAtOnce * kLine];
  for (int64_t t = 0; t < tokens; ++t) {
    std::fill(low, low + lines * kLine, 0.0f);
    for (int64_t i = 0; i < r; ++i) {
      const __m512 factor = _mm512_set1_ps(g[t * r + i]);
      for (int64_t c = 0; c < cols; c += 16) {
        const __m512 a = load16(lora_A, i * lora_A.stride + first + c, cols - c);
        _mm512_store_ps(low + c, _mm512_fmadd_ps(a, factor, _mm512_load_ps(low + c)));
      }
    }
    if (dropout.p > 0 && r > 0) {
      lk_cpu_lora_dropout(low, LK_F32, cols, dropout.first + t * dx.stride + first, dropout.p, dropout.rng,
                          low);
    }
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t plane = c / kLine * kLine + c % 8 * 16 + c % kLine / 8;
      low[c] += sums[t * lines * kLine + plane];
    }
    write_floats(low, cols, dx.data, dx.dtype, t * dx.stride + first);
  }
}

}  // namespace

void few_tokens_forward(int64_t tokens, const float* x, const Matrix& weight, const float* h,
                        const Matrix& lora_B, const Output& y, float* x_space) {
  const int64_t k = weight.cols, stride = padded(k, kLine);
  for (int64_t t = 0; t < tokens; ++t) to_planes(x + t * k, k, x_space + t * stride);
  const auto rows = tokens == 1   ? forward_rows<1>
                    : tokens == 2 ? forward_rows<2>
                    : tokens == 3 ? forward_rows<3>
                                  : forward_rows<4>;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 17) / k);
  parallel_for(weight.rows, grain,
               [&](int64_t begin, int64_t end) { rows(weight, x_space, h, lora_B, y, begin, end); });
}

void few_tokens_backward(int64_t tokens, const float* dy, const Matrix& weight, const float* g,
                         const Matrix& lora_A, const Dropout& dropout, const Output& dx) {
  const auto run = tokens == 1   ? backward_lines<1>
                   : tokens == 2 ? backward_lines<2>
                   : tokens == 3 ? backward_lines<3>
                                 : backward_lines<4>;
  const int64_t all = ceil_div(weight.cols, kLine), n = weight.rows;
  parallel_for(ceil_div(all, kLinesAtOnce), 1, [&](int64_t begin, int64_t end) {
    alignas(64) float part[kFewTokens * kLinesAtOnce * kLine], sums[kFewTokens * kLinesAtOnce * kLine];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t line = task * kLinesAtOnce, lines = std::min(kLinesAtOnce, all - line);
      const int64_t floats = tokens * lines * kLine;
      std::fill(sums, sums + floats, 0.0f);
      for (int64_t row = 0; row < n; row += kChunk) {  // short sums first: they lose less
        run(weight, dy, row, std::min(n, row + kChunk), line, lines, part);
        for (int64_t i = 0; i < floats; ++i) sums[i] += part[i];
      }
      finish_lines(tokens, line, lines, sums, g, lora_A, dropout, dx);
    }
  });
}

void few_tokens_product(int64_t tokens, const float* left, int64_t inner, const Right& right, int64_t outputs,
                        float scale, float* out) {
  const Matrix& m = right.matrix;
  // Sums over kChunk elements first: short ones lose less.
  if (right.rows_are_outputs) {
    for (int64_t i = 0; i < outputs; ++i) {
      __m512 sum[kFewTokens];
      for (auto& total : sum) total = _mm512_setzero_ps();
      for (int64_t chunk = 0; chunk < inner; chunk += 8 * kChunk) {
        const int64_t stop = std::min(inner, chunk + 8 * kChunk);
        __m512 part[kFewTokens];
        for (auto& total : part) total = _mm512_setzero_ps();
        for (int64_t c = chunk; c < stop; c += 16) {
          const __m512 a = load16(m, i * m.stride + c, stop - c);
          const __mmask16 mask = first_lanes(stop - c);
          for (int64_t t = 0; t < tokens; ++t) {
            part[t] = _mm512_fmadd_ps(a, _mm512_maskz_loadu_ps(mask, left + t * inner + c), part[t]);
          }
        }
        for (int64_t t = 0; t < tokens; ++t) sum[t] = _mm512_add_ps(sum[t], part[t]);
      }
      for (int64_t t = 0; t < tokens; ++t) out[t * outputs + i] = scale * _mm512_reduce_add_ps(sum[t]);
    }
    return;
  }
  for (int64_t i = 0; i < outputs; i += 16) {
    const int64_t width = std::min<int64_t>(16, outputs - i);
    __m512 sum[kFewTokens];
    for (auto& total : sum) total = _mm512_setzero_ps();
    for (int64_t chunk = 0; chunk < inner; chunk += kChunk) {
      __m512 part[kFewTokens];
      for (auto& total : part) total = _mm512_setzero_ps();
      for (int64_t c = chunk; c < std::min(inner, chunk + kChunk); ++c) {
        const __m512 b = load16(m, c * m.stride + i, width);
        for (int64_t t = 0; t < tokens; ++t) {
          part[t] = _mm512_fmadd_ps(b, _mm512_set1_ps(left[t * inner + c]), part[t]);
        }
      }
      for (int64_t t = 0; t < tokens; ++t) sum[t] = _mm512_add_ps(sum[t], part[t]);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      _mm512_mask_storeu_ps(out + t * outputs + i, first_lanes(width),
                            _mm512_mul_ps(sum[t], _mm512_set1_ps(scale)));
    }
  }
}

}  // namespace lk::cpu
#pragma GCC pop_options
#else
namespace lk::cpu {

void few_tokens_rows(const Matrix&, float, const Dropout&, float*) {}
void few_tokens_forward(int64_t, const float*, const Matrix&, const float*, const Matrix&, const Output&,
                        float*) {}
void few_tokens_backward(int64_t, const float*, const Matrix&, const float*, const Matrix&, const Dropout&,
                         const Output&) {}
void few_tokens_product(int64_t, const float*, int64_t, const Right&, int64_t, float, float*) {}
void few_tokens_outer(int64_t, const float*, int64_t, const float*, int64_t, int, void*) {}

}  // namespace lk::cpu
#endif

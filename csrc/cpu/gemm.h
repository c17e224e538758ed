// The one matrix product behind lora_linear and its backward on a CPU: fp32 sums of
//
//   out[t, m] = Σ_terms Σ_c left[t, c] · P[c, m]  (+ bias[m])      P[c, m] = W[m, c]  or  W[c, m]
//
// where W is NF4 or dense in any of the three dtypes, and is decoded a chunk at a time into L1:
//
//               m: a panel of kPanel outputs
//             ┌────────────┐
//     c: kChunk  P  (fp32) │  decoded once per panel and kBlock tokens, 16 KiB
//             └────────────┘
//   ┌──────┐  ┌────────────┐
//   │ left │  │   tile     │  kTile x kPanel sums in registers over a quarter chunk, then added to the
//   panel's ├──────┤  ├────────────┤  sums [tokens, kPanel], which are stored once, after the last term │ ...
//   │  │   ...      │
//
// The left factor is packed first, fp32, in tiles of up to kTile tokens: [tile][c][token]. A thread owns
// whole panels (or, where there are few panels, some tiles of one), so every sum has one order, whatever the
// number of threads: within a chunk in order of c, then over chunks and terms, kLongSum at a time.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>

#include "../api.h"

namespace lk::cpu {

constexpr int64_t kTile = 12;    // tokens: 12 x 2 registers of sums, of the 32 that AVX-512 has
constexpr int64_t kPanel = 32;   // outputs: two AVX-512 registers
constexpr int64_t kChunk = 128;  // of the inner dimension: P is 16 KiB
// Products that are summed in a register before they go to the panel's sums: sums of sums lose less.
constexpr int64_t kShortSum = 32;
// And elements of the inner dimension after which the panel's sums go to totals. Without, dx of N = 14336 was
// 1.17 times as far from the truth as that of torch's GEMM, its worst element up to 2.7 times.
constexpr int64_t kLongSum = 4096;
// Panels decoded together: the 128 weights of a cache line of NF4 codes, where its rows are the inner
// dimension. One at a time would fetch each line four times, from afar: rows that are a power of two apart
// share few sets of a cache (dx, N = K = 4096, one token and thread: 3.5 ms against 2.9).
constexpr int64_t kGroup = 4;
// Work that is worth waking another thread for, in multiplications.
constexpr int64_t kTaskWork = 1 << 18;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// A factor as it lies in memory: [rows, cols] of one dtype with unit column stride, or an NF4 weight.
struct Matrix {
  const void* data = nullptr;
  int dtype = LK_F32;
  int64_t stride = 0;                  // elements from row to row
  const lk_nf4_weight* nf4 = nullptr;  // instead of data; W [rows, cols] of the format
  int64_t rows = 0, cols = 0;
};

// What P is: Wᵀ where the rows of W are the outputs (y = x·Wᵀ), else W.
struct Right {
  Matrix matrix;
  bool rows_are_outputs;
};

struct Term {
  const float* left;  // packed [tokens, inner]
  int64_t inner;
  Right right;
};

struct Output {
  void* data;  // [tokens, outputs]
  int dtype;
  int64_t stride;
  float scale = 1;             // out = scale · sum + bias
  const void* bias = nullptr;  // [outputs]
  int bias_dtype = LK_F32;
  bool accumulate = false;  // adds what is in `data` to the sum
};

// Tokens are cut into equal tiles of at most kTile: 16 of them into 8 + 8.
inline int64_t tile_tokens(int64_t tokens) {
  const int64_t tiles = ceil_div(tokens, kTile);
  return tiles == 0 ? 1 : ceil_div(tokens, tiles);
}

// Dropout of the left factor's elements: the flat index of (t, c) in the whole input is first + t*inner + c.
struct Dropout {
  double p = 0;
  const int64_t* rng = nullptr;
  int64_t first = 0;
};

// dropout(matrix [tokens, inner]) · scale -> packed.
void pack(const Matrix& matrix, int64_t tokens, int64_t inner, float scale, const Dropout& dropout,
          float* packed);

// matrixᵀ · scale -> packed, of a dense and small matrix [inner, tokens].
void pack_transposed(const Matrix& matrix, int64_t tokens, int64_t inner, float scale, float* packed);

void gemm(int64_t tokens, int64_t outputs, const Term* terms, int term_count, const Output& output);

// What one task of a product computes: outputs [column, column + width) of rows [row, row + rows).
struct Piece {
  int64_t column, width, row, rows;
};

// Tasks are cut into spans of outputs, each into groups of tokens; the last group may be empty.
inline Piece piece_of(int64_t task, int64_t groups, int64_t span, int64_t outputs, int64_t group_tokens,
                      int64_t tokens) {
  const int64_t column = task / groups * span, row = task % groups * group_tokens;
  return {column, std::min(span, outputs - column), row, std::min(group_tokens, tokens - row)};
}

// What differs between instruction sets.
struct GemmKernels {
  // One tile: rows [0, tokens) of matrix from row pointers -> packed [inner][tokens].
  void (*pack_tile)(const Matrix& matrix, int64_t row, int64_t tokens, int64_t inner, float scale,
                    float* packed);
  // The outputs [output, output + width), inner dimension [inner, inner + count): up to kGroup panels P
  // [count][kPanel], kChunk * kPanel apart; columns behind the last output hold anything, which reaches none
  // but their own sums. scales: those of panel_scales.
  void (*decode)(const Right& right, int64_t output, int64_t width, int64_t inner, int64_t count,
                 const float* scales, float* panels);
  // sums [tokens][kPanel] (+)= left [count][tokens] · panel [count][kPanel]
  void (*multiply)(int64_t tokens, const float* left, const float* panel, int64_t count, int64_t width,
                   bool first, float* sums);
  // sums [tokens][kPanel] -> the output's columns [column, column + width) of rows [row, row + tokens)
  void (*store)(const Output& output, int64_t row, int64_t tokens, int64_t column, int64_t width,
                const float* sums);
};
const GemmKernels& gemm_kernels();

// Whether no block of an NF4 weight lies in two rows.
inline bool blocks_fit_rows(const Matrix& m) { return m.cols % m.nf4->blocksize == 0; }

inline int blocksize_shift(const Matrix& m) {
  return std::countr_zero(static_cast<uint64_t>(m.nf4->blocksize));
}

// At most so many blocks have weights in one row, and that many of its scales are kept.
inline int64_t row_blocks(const Matrix& m) {
  return m.cols / m.nf4->blocksize + (blocks_fit_rows(m) ? 0 : 2);
}

// The flat index of W[row, col].
inline int64_t flat_index(const Matrix& m, int64_t row, int64_t col) { return row * m.cols + col; }

// For an NF4 P = Wᵀ the scales of a panel's rows, [width][row_blocks], each row's from the block on in which
// it starts; otherwise null. Behind the last there is room for kScalesBehind, which decoders may read.
const float* panel_scales(const Right& right, int64_t output, int64_t width, float* to);
constexpr int64_t kScalesBehind = 16;

namespace portable {
extern const GemmKernels kGemm;
}
namespace avx2 {
extern const GemmKernels kGemm;
}
namespace avx512 {
extern const GemmKernels kGemm;
}

}  // namespace lk::cpu

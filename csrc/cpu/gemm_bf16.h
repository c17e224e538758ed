// The product of gemm.h for bf16 tokens on a processor's bf16 units (AMX tiles, or vdpbf16ps):
//
//   out[t, m] = Σ_terms Σ_c left[t, c] · P[c, m]  (+ bias[m])      fp32 sums of products of bf16 factors
//
// P is decoded and rounded to bf16 once, to the values that a dequantised weight has. Both kinds of unit take
// rows of one factor, 16 by 32 inner elements, and of the other, 16 columns, pairs of inner elements side by
// side:
//
//   rows   [16][32]           tile[i][c] = a[i, c]
//   pairs  [32 / 2][16][2]    tile[c / 2][j][c % 2] = b[c, j]
//
// Decoding is to leave the weights in the order in which their codes lie. So where the rows of W are the
// outputs (P = Wᵀ) they are `rows`, the tokens are `pairs`, and what is summed is outᵀ, which is transposed
// when it is stored; where they are the inner dimension (P = W) two of them are woven into `pairs`, and the
// tokens are `rows`. Left factors are packed tile by tile, [inner / kDepth][token / 16][inner % kDepth / 32]
// [tile], so that what meets a P lies together (left_offset), P [panel][inner / 32][half of the panel][tile].
//
// A task is kSpan outputs (in the forward of few tokens: a panel) and a group of the tokens. Its P of up to
// kMostDepth inner elements (of kDepth and 128 outputs 128 KiB), its sums and the left factors' parts that
// meet that P stay in L2, so that W0 is decoded once for up to kMostTokens tokens. A P may hold several
// terms: the sums of a panel are loaded and stored once for all of it. Every sum has one order, whatever the
// number of threads: in a tile by the unit, then over tiles and terms.
//
// Factors that are not bf16 (float32 adapters, s'·h, g) are split into bf16 parts, v = part 0 + part 1 + part
// 2 + ...: two keep 16 bits of v, three all 24. A product of split factors is several terms. An infinity has
// one part; multiplied by the parts of the other factor it may become a NaN. Subnormal numbers count as 0, as
// the units have it.
#pragma once
#include <algorithm>
#include <cstddef>

#include "gemm.h"

namespace lk::cpu {

constexpr int64_t kTileTokens = 16, kTileInner = 32;
constexpr int64_t kTileElements = kTileTokens * kTileInner;
constexpr int64_t kDepth = 4 * kChunk;
constexpr int64_t kMostDepth = kDepth + 192;  // a panel of that many fits the first level of cache
constexpr int64_t kSpan = kGroup * kPanel;
constexpr int64_t kMostTokens = 512;

// bf16 as bits.
using Bits = uint16_t;

// Elements of a packed left factor.
inline int64_t packed_bf16(int64_t tokens, int64_t inner) {
  return padded(tokens, kTileTokens) * padded(inner, kTileInner);
}

// How many inner elements are taken together from `c` on, a multiple of kDepth: kDepth, and what little is
// behind the last.
inline int64_t depth_at(int64_t inner, int64_t c) {
  return inner - c <= kDepth + kChunk ? inner - c : kDepth;
}

// Where the tile of `token` and inner element `c` is, multiples of kTileTokens and kDepth; the next
// kTileInner inner elements are kTileElements behind, the next kTileTokens tokens left_stride.
inline int64_t left_stride(int64_t inner, int64_t c) {
  return kTileTokens * padded(depth_at(inner, c), kTileInner);
}
inline int64_t left_offset(int64_t tokens, int64_t inner, int64_t token, int64_t c) {
  return c * padded(tokens, kTileTokens) + token / kTileTokens * left_stride(inner, c);
}

struct Bf16Term {
  const Bits* left;  // packed [tokens, inner], zeros behind either end
  int64_t inner;
  Right right;
  int part = 0;  // of the right factor
};

enum class Layout { rows, pairs };

// Part `part` of dropout(matrix [tokens, inner]) · scale -> packed; `pairs` beside a right factor whose rows
// are the outputs, else `rows`.
void pack_bf16(const Matrix& matrix, int64_t tokens, int64_t inner, float scale, const Dropout& dropout,
               int part, Layout layout, Bits* packed);

constexpr int kLeftParts = 2;  // of a left factor that is split: s'·h and g

// Parts 0, ..., kLeftParts - 1, one after the other.
inline void pack_bf16_parts(const Matrix& matrix, int64_t tokens, int64_t inner, float scale, Layout layout,
                            Bits* packed) {
  for (int part = 0; part < kLeftParts; ++part) {
    pack_bf16(matrix, tokens, inner, scale, {}, part, layout, packed + part * packed_bf16(tokens, inner));
  }
}

// The terms of a product, in the order in which they are summed.
class Bf16Terms {
 public:
  // left · right, of a left factor in `left_parts` parts: all pairs of parts whose product matters beside the
  // first's rounding in fp32 (one part) or bf16 (more).
  void add(const Bits* left, int left_parts, int64_t tokens, int64_t inner, const Right& right) {
    const Matrix& m = right.matrix;
    const bool exact = m.nf4 != nullptr || m.dtype == LK_BF16;
    const int right_parts = exact ? 1 : left_parts == 1 ? 3 : 2;
    for (int i = left_parts - 1; i >= 0; --i) {
      for (int j = right_parts - 1; j >= 0; --j) {
        if (i + j < std::max(left_parts, right_parts)) {
          terms_[count_++] = {left + i * packed_bf16(tokens, inner), inner, right, j};
        }
      }
    }
  }
  const Bf16Term* begin() const { return terms_; }
  int count() const { return count_; }

 private:
  Bf16Term terms_[4];
  int count_ = 0;
};

// All terms of a product have right factors of one kind: rows_are_outputs or not.
void gemm_bf16(int64_t tokens, int64_t outputs, const Bf16Term* terms, int term_count, const Output& output);

// Whether this process uses bf16 units (isa.h).
bool has_bf16_units();

// A part of the inner dimension, `steps` tiles long: where the first 16 tokens' tiles of it begin, one behind
// the other, and how far behind them those of the next 16 tokens.
struct Stretch {
  const Bits* left;
  int64_t next_tile;
  int64_t steps;
};

// What differs between the units.
struct Bf16Kernels {
  // Before and after the products of a task.
  void (*begin)(void* saved);
  void (*end)(const void* saved);
  // sums [kPanel][kPanel] (+)= rows · pairs over all stretches; of up to two tiles each, only as many as the
  // first `row_count` and `column_count` sums need. panel: the P that meets the stretches, one behind the
  // other; it is `rows`, and the left factor `pairs`, or the other way round.
  void (*multiply)(const Stretch* stretches, int stretch_count, const Bits* panel, bool panel_is_rows,
                   int64_t row_count, int64_t column_count, bool first, float* sums);
};
constexpr size_t kSavedBytes = 64;  // what `begin` saves

namespace avx512bf16 {
// Part `part` of the right factor, outputs [output, output + width), inner dimension [inner, inner + count),
// up to kMostDepth -> P, one panel kMostDepth * kPanel behind the other. The inner dimension is filled up to
// a multiple of kTileInner with zeros; outputs behind the last hold anything, which reaches
// none but their own sums. width: up to kPanel where
// the rows are the outputs, up to kSpan where not. scales: see GemmKernels. space: kChunk * kSpan floats.
void decode(const Right& right, int64_t output, int64_t width, int64_t inner, int64_t count, int part,
            const float* scales, float* space, Bits* tiles);
// 16 x 16 dwords, in place: one layout of a tile from the other.
void transpose_tile(Bits* tile);
// kTileInner elements of `rows` rows -> a tile, zeros behind the last row.
void copy_tile(const Bits* from, int64_t stride, int64_t rows, Layout layout, Bits* tile);
// [kPanel][kPanel], in place.
void transpose_sums(float* sums);
// sums [kPanel][kPanel], of tokens or, transposed, of outputs -> a bf16 output's columns [column, column +
// width) of rows [row, row + tokens), up to kPanel of either.
void store(const Output& output, int64_t row, int64_t tokens, int64_t column, int64_t width, bool transposed,
           const float* sums);
extern const Bf16Kernels kGemm;
}  // namespace avx512bf16
namespace amx {
extern const Bf16Kernels kGemm;
}

}  // namespace lk::cpu

#include "gemm.h"

#include <algorithm>

#include "convert.h"
#include "isa.h"
#include "nf4_decode.h"
#include "parallel.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

// One tile of dropout(matrix), by pieces of a row that stay in L1.
void pack_dropped(const Matrix& m, int64_t row, int64_t tokens, int64_t inner, float scale,
                  const Dropout& dropout, float* packed) {
  constexpr int64_t kColumns = 256;
  alignas(64) char dropped[kTile * kColumns * sizeof(float)];
  const int64_t size = m.dtype == LK_F32 ? 4 : 2;
  const Matrix piece{dropped, m.dtype, kColumns, nullptr, tokens, kColumns};
  for (int64_t c = 0; c < inner; c += kColumns) {
    const int64_t n = std::min(kColumns, inner - c);
    for (int64_t t = 0; t < tokens; ++t) {
      lk_cpu_lora_dropout(static_cast<const char*>(m.data) + ((row + t) * m.stride + c) * size, m.dtype, n,
                          dropout.first + (row + t) * inner + c, dropout.p, dropout.rng,
                          dropped + t * kColumns * size);
    }
    gemm_kernels().pack_tile(piece, 0, tokens, n, scale, packed + c * tokens);
  }
}

}  // namespace

const float* panel_scales(const Right& right, int64_t output, int64_t width, float* to) {
  const Matrix& m = right.matrix;
  if (m.nf4 == nullptr || !right.rows_are_outputs) return nullptr;
  const int64_t blocks = row_blocks(m);
  if (blocks_fit_rows(m)) {
    decode_scales(*m.nf4, output * blocks, width * blocks, to);
    return to;
  }
  const int shift = blocksize_shift(m);
  for (int64_t i = 0; i < width && m.cols > 0; ++i) {
    const int64_t first = flat_index(m, output + i, 0) >> shift;
    const int64_t last = flat_index(m, output + i, m.cols - 1) >> shift;
    decode_scales(*m.nf4, first, last - first + 1, to + i * blocks);
  }
  return to;
}

const GemmKernels& gemm_kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::kGemm;
  if (isa() == Isa::avx2) return avx2::kGemm;
#endif
  return portable::kGemm;
}

void pack(const Matrix& matrix, int64_t tokens, int64_t inner, float scale, const Dropout& dropout,
          float* packed) {
  const int64_t tile = tile_tokens(tokens);
  const auto& kernels = gemm_kernels();
  const int64_t grain = std::max<int64_t>(1, kTaskWork / (tile * std::max<int64_t>(inner, 1)));
  parallel_for(ceil_div(tokens, tile), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * tile, rows = std::min(tile, tokens - row);
      float* to = packed + row * inner;
      if (dropout.p == 0) {
        kernels.pack_tile(matrix, row, rows, inner, scale, to);
      } else {
        pack_dropped(matrix, row, rows, inner, scale, dropout, to);
      }
    }
  });
}

void pack_transposed(const Matrix& matrix, int64_t tokens, int64_t inner, float scale, float* packed) {
  const int64_t tile = tile_tokens(tokens);
  for (int64_t row = 0; row < tokens; row += tile) {
    const int64_t rows = std::min(tile, tokens - row);
    float* to = packed + row * inner;
    for (int64_t c = 0; c < inner; ++c) {
      read_floats(matrix.data, matrix.dtype, c * matrix.stride + row, rows, to + c * rows);
      for (int64_t t = 0; t < rows; ++t) to[c * rows + t] *= scale;
    }
  }
}

void gemm(int64_t tokens, int64_t outputs, const Term* terms, int term_count, const Output& output) {
  if (tokens == 0 || outputs == 0) return;
  const int64_t tile = tile_tokens(tokens), tiles = ceil_div(tokens, tile);
  int64_t inner = 0;
  size_t scale_floats = 0;
  for (int i = 0; i < term_count; ++i) {
    inner += terms[i].inner;
    const Matrix& m = terms[i].right.matrix;
    if (m.nf4 != nullptr) {
      scale_floats = std::max(scale_floats, static_cast<size_t>(kPanel * row_blocks(m) + kScalesBehind));
    }
  }
  const bool long_sums = inner > kLongSum;
  const bool columns_of_nf4 =
      terms[term_count - 1].right.matrix.nf4 && !terms[term_count - 1].right.rows_are_outputs;
  const int64_t span = columns_of_nf4 ? kGroup * kPanel : kPanel, spans = ceil_div(outputs, span);
  // Where there are few panels the tiles of one are cut into groups, each of which decodes P for itself.
  const int64_t groups = std::min(tiles, ceil_div(16, spans));
  const int64_t group_tokens = ceil_div(tiles, groups) * tile;
  const int64_t grain = std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, group_tokens * span * inner));
  const auto& kernels = gemm_kernels();
  parallel_for(spans * groups, grain, [&](int64_t begin, int64_t end) {
    float* panels = scratch((kChunk + (long_sums ? 2 : 1) * group_tokens) * span + scale_floats);
    float* scale_space = panels + kChunk * span;
    float* sums = scale_space + scale_floats;    // [panel][token][kPanel]
    float* totals = sums + group_tokens * span;  // likewise, of the long sums that are complete
    for (int64_t task = begin; task < end; ++task) {
      const auto [column, width, row, rows] = piece_of(task, groups, span, outputs, group_tokens, tokens);
      if (rows <= 0) continue;
      if (inner == 0) std::fill(sums, sums + group_tokens * span, 0.0f);
      const auto each_sum = [&, width = width, rows = rows](const auto& run) {
        for (int64_t m = 0; m < width; m += kPanel) {
          for (int64_t j = m * group_tokens; j < m * group_tokens + rows * kPanel; ++j)
            run(sums[j], totals[j]);
        }
      };
      bool first = true, first_total = true;
      int64_t summed = 0;
      for (int i = 0; i < term_count; ++i) {
        const Term& term = terms[i];
        const float* scales = panel_scales(term.right, column, width, scale_space);
        for (int64_t c = 0; c < term.inner; c += kChunk) {
          const int64_t count = std::min(kChunk, term.inner - c);
          if (summed >= kLongSum) {
            each_sum([first_total](float sum, float& total) { total = first_total ? sum : total + sum; });
            first = true, first_total = false, summed = 0;
          }
          summed += count;
          kernels.decode(term.right, column, width, c, count, scales, panels);
          for (int64_t m = 0; m < width; m += kPanel) {
            for (int64_t t = 0; t < rows; t += tile) {
              const int64_t height = std::min(tile, rows - t);
              const float* left = term.left + (row + t) * term.inner + c * height;
              kernels.multiply(height, left, panels + m * kChunk, count, std::min(kPanel, width - m), first,
                               sums + m * group_tokens + t * kPanel);
            }
          }
          first = false;
        }
      }
      if (!first_total) each_sum([](float& sum, float total) { sum += total; });
      for (int64_t m = 0; m < width; m += kPanel) {
        kernels.store(output, row, rows, column + m, std::min(kPanel, width - m), sums + m * group_tokens);
      }
    }
  });
}

}  // namespace lk::cpu

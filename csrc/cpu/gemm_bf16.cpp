#include "gemm_bf16.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

// One row of a tile: part `part` of n fp32 values, zeros behind them.
void round_row(const float* values, int64_t n, int part, Bits* to) {
  for (int64_t i = 0; i < n; ++i) {
    float v = values[i];
    for (int p = 0; p < part; ++p) {
      v -= to_float(from_float<BFloat16>(v));
      if (!(std::fabs(v) <= std::numeric_limits<float>::max())) v = 0;  // an infinity or NaN is in part 0
    }
    to[i] = from_float<BFloat16>(v).bits;
  }
  std::fill(to + n, to + kTileInner, Bits{0});
}

}  // namespace

bool has_bf16_units() { return isa() >= Isa::avx512bf16; }

#if defined(__x86_64__)
namespace {

const Bf16Kernels& bf16_kernels() { return isa() >= Isa::amx ? amx::kGemm : avx512bf16::kGemm; }

}  // namespace

void pack_bf16(const Matrix& m, int64_t tokens, int64_t inner, float scale, const Dropout& dropout, int part,
               Layout layout, Bits* packed) {
  const int64_t size = m.dtype == LK_F32 ? 4 : 2;
  const bool as_it_is = m.dtype == LK_BF16 && scale == 1 && part == 0;
  const int64_t grain = std::max<int64_t>(1, kTaskWork / (kTileTokens * std::max<int64_t>(inner, 1)));
  // kDepth elements of a row at a time, which stay in L1.
  const auto pack_row = [&](int64_t row, int64_t c, int64_t n, Bits* to) {
    alignas(64) char dropped[(kDepth + kChunk) * sizeof(float)];
    alignas(64) float values[kTileInner];
    const char* from = static_cast<const char*>(m.data) + (row * m.stride + c) * size;
    if (dropout.p > 0) {
      lk_cpu_lora_dropout(from, m.dtype, n, dropout.first + row * inner + c, dropout.p, dropout.rng, dropped);
      from = dropped;
    }
    for (int64_t i = 0; i < n; i += kTileInner, to += kTileElements) {
      const int64_t count = std::min(kTileInner, n - i);
      read_floats(from, m.dtype, i, count, values);
      for (int64_t j = 0; j < count; ++j) values[j] *= scale;
      round_row(values, count, part, to);
    }
  };
  parallel_for(ceil_div(tokens, kTileTokens), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin * kTileTokens; token < end * kTileTokens; token += kTileTokens) {
      for (int64_t c = 0, n; c < inner; c += n) {
        n = depth_at(inner, c);
        const int64_t whole = as_it_is && dropout.p == 0 ? n / kTileInner * kTileInner : 0;
        Bits* to = packed + left_offset(tokens, inner, token, c);
        for (int64_t i = 0; i < whole; i += kTileInner, to += kTileElements) {
          avx512bf16::copy_tile(static_cast<const Bits*>(m.data) + token * m.stride + c + i, m.stride,
                                std::min(kTileTokens, tokens - token), layout, to);
        }
        const int64_t stop = left_stride(inner, c) - whole * kTileTokens;
        for (int64_t t = 0; t < kTileTokens; ++t) {
          if (token + t < tokens) {
            pack_row(token + t, c + whole, n - whole, to + t * kTileInner);
          } else {
            for (int64_t i = 0; i < stop; i += kTileElements) {
              std::fill_n(to + i + t * kTileInner, kTileInner, Bits{0});
            }
          }
        }
        if (layout == Layout::pairs) {
          for (int64_t i = 0; i < stop; i += kTileElements) avx512bf16::transpose_tile(to + i);
        }
      }
    }
  });
}

namespace {

// P of the outputs [column, column + width), inner elements [c, c + count) of a term.
void decode_span(const Bf16Term& term, int64_t column, int64_t width, int64_t c, int64_t count,
                 const float* scales, int64_t scale_floats, float* space, Bits* tiles) {
  if (!term.right.rows_are_outputs) {
    return avx512bf16::decode(term.right, column, width, c, count, term.part, nullptr, space, tiles);
  }
  for (int64_t m = 0; m < width; m += kPanel) {
    avx512bf16::decode(term.right, column + m, std::min(kPanel, width - m), c, count, term.part,
                       scales + m / kPanel * scale_floats, space, tiles + m * kMostDepth);
  }
}

// The inner elements [c, c + count) of a term, in a P behind `before` others.
struct Section {
  const Bf16Term* term;
  int64_t c, count, before;
};

// The sections of all terms, in their order.
class Sections {
 public:
  Sections(const Bf16Term* terms, int count) : term_(terms), end_(terms + count) {}

  // Those of the next P; none behind the last.
  int next(Section* sections) {
    int count = 0;
    for (int64_t depth = 0; term_ < end_ && count < kMostSections;) {
      if (c_ >= term_->inner) {
        ++term_, c_ = 0;
        continue;
      }
      const int64_t n = depth_at(term_->inner, c_);
      if (count > 0 && depth + padded(n, kTileInner) > kMostDepth) break;
      sections[count++] = {term_, c_, n, depth};
      depth += padded(n, kTileInner);
      c_ += n;
    }
    return count;
  }
  static constexpr int kMostSections = 8;

 private:
  const Bf16Term *term_, *end_;
  int64_t c_ = 0;
};

}  // namespace

void gemm_bf16(int64_t tokens, int64_t outputs, const Bf16Term* terms, int term_count, const Output& output) {
  if (tokens == 0 || outputs == 0) return;
  int64_t inner = 0, scale_floats = 0;
  const bool transposed = terms[0].right.rows_are_outputs;
  for (int i = 0; i < term_count; ++i) {
    inner += terms[i].inner;
    const Matrix& m = terms[i].right.matrix;
    if (m.nf4 != nullptr) scale_floats = std::max(scale_floats, kPanel * row_blocks(m) + kScalesBehind);
  }
  const int64_t span = tokens <= kSpan && transposed ? kPanel : kSpan, spans = ceil_div(outputs, span);
  // Few tokens leave little to keep P for, and narrow spans more to share among threads. Many tokens are cut
  // into groups, each of which decodes P for itself: at most kMostTokens, and where there are few spans less.
  const int64_t groups =
      std::max(ceil_div(tokens, kMostTokens), std::min(ceil_div(tokens, kSpan), ceil_div(16, spans)));
  const int64_t group_tokens = padded(ceil_div(tokens, groups), kPanel);
  const int64_t grain = std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, group_tokens * span * inner));
  const auto& decoder = gemm_kernels();
  const auto& kernels = bf16_kernels();
  parallel_for(spans * groups, grain, [&](int64_t begin, int64_t end) {
    const int64_t panel_count = span / kPanel;
    float* space = scratch(static_cast<size_t>(kChunk * kSpan + (group_tokens + kMostDepth / 2) * span +
                                               panel_count * scale_floats));
    float* sums = space + kChunk * kSpan;  // [panel][kPanel tokens][kPanel][kPanel]
    Bits* tiles = reinterpret_cast<Bits*>(sums + group_tokens * span);  // [panel][kMostDepth * kPanel]
    float* scales = sums + (group_tokens + kMostDepth / 2) * span;      // [panel][scale_floats], of one term
    alignas(64) char saved[kSavedBytes];
    kernels.begin(saved);
    for (int64_t task = begin; task < end; ++task) {
      const auto [column, width, row, rows] = piece_of(task, groups, span, outputs, group_tokens, tokens);
      if (rows <= 0) continue;
      if (inner == 0) std::fill(sums, sums + group_tokens * span, 0.0f);
      Sections all(terms, term_count);
      Section sections[Sections::kMostSections];
      Stretch stretches[Sections::kMostSections];
      bool first = true;
      for (int count; (count = all.next(sections)) > 0; first = false) {
        for (int i = 0; i < count; ++i) {
          const auto& [term, c, n, before] = sections[i];
          for (int64_t m = 0; c == 0 && m < width; m += kPanel) {
            panel_scales(term->right, column + m, std::min(kPanel, width - m),
                         scales + m / kPanel * scale_floats);
          }
          decode_span(*term, column, width, c, n, scales, scale_floats, space, tiles + before * kPanel);
        }
        for (int64_t m = 0; m < width; m += kPanel) {
          for (int64_t t = 0; t < rows; t += kPanel) {
            const int64_t height = std::min(kPanel, rows - t), across = std::min(kPanel, width - m);
            for (int i = 0; i < count; ++i) {
              const auto& [term, c, n, before] = sections[i];
              stretches[i] = {term->left + left_offset(tokens, term->inner, row + t, c),
                              left_stride(term->inner, c), ceil_div(n, kTileInner)};
            }
            kernels.multiply(stretches, count, tiles + m * kMostDepth, transposed,
                             transposed ? across : height, transposed ? height : across, first,
                             sums + m * group_tokens + t * kPanel);
          }
        }
      }
      for (int64_t t = 0; t < rows; t += kPanel) {  // the panels of a row side by side
        for (int64_t m = 0; m < width; m += kPanel) {
          float* from = sums + m * group_tokens + t * kPanel;
          const int64_t height = std::min(kPanel, rows - t), across = std::min(kPanel, width - m);
          if (output.dtype == LK_BF16) {
            avx512bf16::store(output, row + t, height, column + m, across, transposed, from);
          } else {
            if (transposed) avx512bf16::transpose_sums(from);
            decoder.store(output, row + t, height, column + m, across, from);
          }
        }
      }
    }
    kernels.end(saved);
  });
}
#else
void pack_bf16(const Matrix&, int64_t, int64_t, float, const Dropout&, int, Layout, Bits*) {}
void gemm_bf16(int64_t, int64_t, const Bf16Term*, int, const Output&) {}
#endif

}  // namespace lk::cpu

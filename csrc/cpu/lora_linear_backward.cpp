// lora_linear_backward on a CPU, with s' = s/(1-p) and the mask m of the forward:
//
//   g [T, r] = s'·dy·B      dx [T, K] = dy·W0 + m⊙(g·A)      dA [r, K] = gᵀ·(m⊙x)      dB [N, r] = s'·dyᵀ·h
//
// By blocks of tokens: dy is packed once as fp32 and serves g and dx; without dropout dx is one product with
// two terms, (g, A) and (dy, W0), rounded once. With it g·A is stored in dx, masked there, and the base
// product is added to it. dA and dB are summed in fp32 over the blocks, in their order, and rounded once.
// Operations: 2·T·N·K for dx, 2·T·r·(2K + 2N) for the rest; bytes: W0 once a block (on bf16 units
// once for kMostTokens), dy, x, h, dx.
#include <cstring>

#include "half.h"
#include "lora_linear.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

// fp32 sums [rows, cols] -> out [rows, cols], or its transpose [cols, rows].
template <class T>
void convert(const float* sums, int64_t rows, int64_t cols, bool transposed, T* out) {
  parallel_for(transposed ? cols : rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (transposed) {
        for (int64_t j = 0; j < rows; ++j) out[i * rows + j] = from_float<T>(sums[j * cols + i]);
      } else {
        for (int64_t j = 0; j < cols; ++j) out[i * cols + j] = from_float<T>(sums[i * cols + j]);
      }
    }
  });
}

void convert(const float* sums, int64_t rows, int64_t cols, bool transposed, int dtype, void* out) {
  switch (dtype) {
    case LK_F32: return convert(sums, rows, cols, transposed, static_cast<float*>(out));
    case LK_F16: return convert(sums, rows, cols, transposed, static_cast<Half*>(out));
    default: return convert(sums, rows, cols, transposed, static_cast<BFloat16*>(out));
  }
}

// dropout(matrix), whose first element has flat index `first` -> contiguous out, which may be the matrix
// itself.
void drop_rows(const Matrix& m, const lk_adapter& adapter, int64_t first, void* out) {
  const int64_t size = dtype_size(m.dtype);
  parallel_for(m.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(m.cols, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   lk_cpu_lora_dropout(static_cast<const char*>(m.data) + i * m.stride * size, m.dtype,
                                       m.cols, first + i * m.cols, adapter.dropout_p, adapter.rng,
                                       static_cast<char*>(out) + i * m.cols * size);
                 }
               });
}

void few(const Matrix& dy, const Matrix& x, const Matrix& h, const Matrix& W, const lk_adapter& adapter,
         const Matrix& A, const Matrix& B, const lk_gradients& gradients, Workspace space) {
  const int64_t tokens = dy.rows, n = dy.cols, k = W.cols, r = adapter.rank;
  const float scale = static_cast<float>(adapter.scaling / (1 - adapter.dropout_p));
  float *dy_rows = space.take<float>(tokens * n), *x_rows = space.take<float>(tokens * k);
  float *g = space.take<float>(tokens * r), *h_rows = space.take<float>(tokens * r);
  few_tokens_rows(dy, 1, {}, dy_rows);
  if (r > 0) few_tokens_product(tokens, dy_rows, n, {B, false}, r, scale, g);
  if (gradients.dx != nullptr) {
    few_tokens_backward(tokens, dy_rows, W, g, A, {adapter.dropout_p, adapter.rng, 0},
                        {gradients.dx, dy.dtype, k});
  }
  if (gradients.dA != nullptr) {
    few_tokens_rows(x, 1, {adapter.dropout_p, adapter.rng, 0}, x_rows);
    few_tokens_outer(tokens, g, r, x_rows, k, gradients.dA_dtype, gradients.dA);
  }
  if (gradients.dB != nullptr) {
    few_tokens_rows(h, scale, {}, h_rows);
    few_tokens_outer(tokens, dy_rows, n, h_rows, r, gradients.dB_dtype, gradients.dB);
  }
}

// A block of tokens of the backward: what g and dx are made of, and where they go.
struct Block {
  Matrix dy;      // [rows, N]
  int64_t first;  // token
  const lk_adapter& adapter;
  Matrix W, A, B;
  float scale;  // s'
  float* g;     // [rows, r], null where it is not needed
  void* dx;     // [rows, K], likewise
};

// dx = m⊙(g·A) + dy·W0 of products that `low`, `full` and `both` compute into an output.
template <class Low, class Full, class Both>
void add_up(const Block& block, const Low& low, const Full& full, const Both& both) {
  const int64_t k = block.W.cols;
  Output out{block.dx, block.dy.dtype, k};
  if (block.adapter.rank == 0) {
    full(out);
  } else if (block.adapter.dropout_p > 0) {
    low(out);
    drop_rows({block.dx, block.dy.dtype, k, nullptr, block.dy.rows, k}, block.adapter, block.first * k,
              block.dx);
    out.accumulate = true;
    full(out);
  } else {
    both(out);
  }
}

void fp32_products(const Block& block, Workspace space) {
  const int64_t rows = block.dy.rows, n = block.dy.cols, k = block.W.cols, r = block.adapter.rank;
  float* dy_packed = space.take<float>(rows * n);
  float* g_packed = space.take<float>(rows * r);
  pack(block.dy, rows, n, 1, {}, dy_packed);
  if (block.g != nullptr) {
    const Term up{dy_packed, n, {block.B, false}};
    Output out{block.g, LK_F32, r};
    out.scale = block.scale;
    gemm(rows, r, &up, 1, out);
  }
  if (block.dx == nullptr) return;
  if (r > 0) pack({block.g, LK_F32, r, nullptr, rows, r}, rows, r, 1, {}, g_packed);
  const Term terms[2] = {{g_packed, r, {block.A, false}}, {dy_packed, n, {block.W, false}}};
  const auto product = [&](int first, int count) {
    return [=, &terms](const Output& out) { gemm(rows, k, terms + first, count, out); };
  };
  add_up(block, product(0, 1), product(1, 1), product(0, 2));
}

void bf16_products(const Block& block, Workspace space) {
  const int64_t rows = block.dy.rows, n = block.dy.cols, k = block.W.cols, r = block.adapter.rank;
  Bits* dy_packed = space.take<Bits>(packed_bf16(rows, n));
  Bits* g_packed = space.take<Bits>(kLeftParts * packed_bf16(rows, r));
  pack_bf16(block.dy, rows, n, 1, {}, 0, Layout::rows, dy_packed);
  if (block.g != nullptr) {
    Bf16Terms up;
    up.add(dy_packed, 1, rows, n, {block.B, false});
    Output out{block.g, LK_F32, r};
    out.scale = block.scale;
    gemm_bf16(rows, r, up.begin(), up.count(), out);
  }
  if (block.dx == nullptr) return;
  Bf16Terms terms;
  if (r > 0) {
    pack_bf16_parts({block.g, LK_F32, r, nullptr, rows, r}, rows, r, 1, Layout::rows, g_packed);
    terms.add(g_packed, kLeftParts, rows, r, {block.A, false});
  }
  const int low = terms.count();
  terms.add(dy_packed, 1, rows, n, {block.W, false});
  const auto product = [&](int first, int count) {
    return [=, &terms](const Output& out) { gemm_bf16(rows, k, terms.begin() + first, count, out); };
  };
  add_up(block, product(0, low), product(low, 1), product(0, low + 1));
}

}  // namespace
}  // namespace lk::cpu

namespace lk::cpu {
namespace {

// dy is packed, and x dropped, by blocks of so many tokens.
int64_t block_tokens_of(Product product, int64_t n, int64_t k) {
  return product == Product::gemm_bf16 ? block_tokens_bf16(std::max(n, k)) : block_tokens(n);
}

}  // namespace
}  // namespace lk::cpu

extern "C" int64_t lk_cpu_lora_linear_backward_workspace(int64_t tokens, int dtype, int64_t out_features,
                                                         int64_t in_features, int64_t rank, int has_dropout) {
  using namespace lk::cpu;
  const int64_t n = out_features, k = in_features;
  const int64_t sums = Workspace::bytes(4 * rank * k) + Workspace::bytes(4 * rank * n);
  const auto needs = [&](Product product) {
    const int64_t block = std::min(tokens, block_tokens_of(product, n, k));
    const int64_t low = Workspace::bytes(4 * block * rank);
    const int64_t row = tokens <= kFewTokens ? 4 : has_dropout ? dtype_size(dtype) : 0;
    const int64_t packed = product == Product::gemm_bf16 ? workspace_bf16(block, n, rank)
                                                         : Workspace::bytes(4 * block * n) + low;
    return 3 * low + sums + Workspace::bytes(row * block * k) + packed;
  };
  const int64_t fp32 = needs(Product::gemm);
  return may_use_bf16_units(dtype) ? std::max(fp32, needs(Product::gemm_bf16)) : fp32;
}

extern "C" int lk_cpu_lora_linear_backward(const lk_matrix* dy, int64_t tokens, const lk_matrix* x,
                                           const lk_matrix* h, const lk_base_weight* base,
                                           const lk_adapter* adapter, const lk_gradients* gradients,
                                           void* workspace) {
  using namespace lk::cpu;
  const int64_t n = base->out_features, k = base->in_features, r = adapter->rank;
  if (!supported(dy->dtype) ||
      (r > 0 && !(supported(adapter->lora_A.dtype) && supported(adapter->lora_B.dtype)))) {
    return LK_UNSUPPORTED_DTYPE;
  }
  const bool need_dx = gradients->dx != nullptr, need_dA = gradients->dA != nullptr,
             need_dB = gradients->dB != nullptr, drops = adapter->dropout_p > 0;
  const Product product = product_for(tokens, dy->dtype, *base);
  const int64_t block = std::min(tokens, block_tokens_of(product, n, k)), size = dtype_size(dy->dtype);
  const Matrix A = dense(adapter->lora_A, r, k), B = dense(adapter->lora_B, n, r), W = base_matrix(*base);
  Workspace space(workspace);
  if (product == Product::few_tokens) {
    few(dense(*dy, tokens, n), dense(*x, tokens, k), dense(*h, tokens, r), W, *adapter, A, B, *gradients,
        space);
    return LK_OK;
  }
  float* g = space.take<float>(block * r);
  float* g_transposed = space.take<float>(block * r);
  float* h_transposed = space.take<float>(block * r);
  float* dA_sums = space.take<float>(r * k);   // [r, K]
  float* dBt_sums = space.take<float>(r * n);  // [r, N]
  void* dropped = drops ? space.take<char>(block * k * size) : nullptr;
  const float scale = static_cast<float>(adapter->scaling / (1 - adapter->dropout_p));
  const Matrix g_matrix{g, LK_F32, r, nullptr, block, r};

  for (int64_t t = 0; t < tokens; t += block) {
    const int64_t rows = std::min(block, tokens - t);
    const Matrix dy_block = rows_of(dense(*dy, tokens, n), t, rows);
    const bool need_g = r > 0 && (need_dx || need_dA);
    if (need_dx || need_g) {
      void* dx = need_dx ? static_cast<char*>(gradients->dx) + t * k * size : nullptr;
      const auto products = product == Product::gemm_bf16 ? bf16_products : fp32_products;
      products({dy_block, t, *adapter, W, A, B, scale, need_g ? g : nullptr, dx}, space);
    }
    if (need_dA) {
      Matrix x_block = rows_of(dense(*x, tokens, k), t, rows);
      if (drops) {
        drop_rows(x_block, *adapter, t * k, dropped);
        x_block = {dropped, x_block.dtype, k, nullptr, rows, k};
      }
      pack_transposed(g_matrix, r, rows, 1, g_transposed);
      const Term term{g_transposed, rows, {x_block, false}};
      Output out{dA_sums, LK_F32, k};
      out.accumulate = t > 0;
      gemm(r, k, &term, 1, out);
    }
    if (need_dB) {
      pack_transposed(rows_of(dense(*h, tokens, r), t, rows), r, rows, scale, h_transposed);
      const Term term{h_transposed, rows, {dy_block, false}};
      Output out{dBt_sums, LK_F32, n};
      out.accumulate = t > 0;
      gemm(r, n, &term, 1, out);
    }
  }
  if (need_dA) convert(dA_sums, r, k, false, gradients->dA_dtype, gradients->dA);
  if (need_dB) convert(dBt_sums, r, n, true, gradients->dB_dtype, gradients->dB);
  return LK_OK;
}

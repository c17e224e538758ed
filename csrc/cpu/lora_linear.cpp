// lora_linear on a CPU:  y [T, N] = x·W0ᵀ + s'·h·Bᵀ + bias,  h [T, r] = dropout(x)·Aᵀ,  s' = s/(1-p)
//
// By blocks of tokens: x is packed once as fp32, h is one small product of it, and y is one product with two
// terms, (x, W0) and (s'·h, B), whose fp32 sum gets the bias and is rounded once (gemm.h). So W0 is read and
// decoded once for a block of tokens (on bf16 units for kMostTokens), and nothing is written but h and y. On
// bf16 units (gemm_bf16.h) x is packed as it is, and s'·h and float32 adapters in bf16 parts. Operations:
// 2·T·N·K, and 2·T·r·(N + K) for the adapter; bytes: W0 once (0.52 a weight in NF4), x, y and h.
#include "lora_linear.h"

#include "convert.h"

namespace lk::cpu {
namespace {

int64_t packed_x(int64_t tokens, int64_t k) { return std::min(tokens, block_tokens(k)) * k; }

void few(const Matrix& x, const Matrix& W, const lk_adapter& adapter, const Matrix& A, const Matrix& B,
         void* h, Output y, Workspace space) {
  const int64_t tokens = x.rows, k = x.cols, r = adapter.rank;
  float *rows = space.take<float>(tokens * k), *planes = space.take<float>(tokens * padded(k, kLine));
  float* low = space.take<float>(tokens * r);
  if (r > 0) {
    few_tokens_rows(x, 1, {adapter.dropout_p, adapter.rng, 0}, rows);
    few_tokens_product(tokens, rows, k, {A, true}, r, 1, low);
    const Matrix h_matrix{h, x.dtype, r, nullptr, tokens, r};
    write_floats(low, tokens * r, h, x.dtype, 0);
    few_tokens_rows(h_matrix, static_cast<float>(adapter.scaling / (1 - adapter.dropout_p)), {}, low);
  }
  if (r == 0 || adapter.dropout_p > 0) few_tokens_rows(x, 1, {}, rows);
  few_tokens_forward(tokens, rows, W, low, B, y, planes);
}

void bf16_units(const Matrix& x, const Matrix& W, const lk_adapter& adapter, const Matrix& A, const Matrix& B,
                void* h, Output out, Workspace space) {
  const int64_t k = x.cols, n = out.stride, r = adapter.rank, size = dtype_size(x.dtype);
  const int64_t block = std::min(x.rows, block_tokens_bf16(k));
  const float scale = static_cast<float>(adapter.scaling / (1 - adapter.dropout_p));
  Bits* x_packed = space.take<Bits>(packed_bf16(block, k));
  Bits* h_packed = space.take<Bits>(kLeftParts * packed_bf16(block, r));
  char* y = static_cast<char*>(out.data);
  for (int64_t t = 0; t < x.rows; t += block) {
    const int64_t rows = std::min(block, x.rows - t);
    const Matrix x_block = rows_of(x, t, rows);
    Bf16Terms terms;
    if (r > 0) {
      const Matrix h_block{static_cast<char*>(h) + t * r * size, x.dtype, r, nullptr, rows, r};
      pack_bf16(x_block, rows, k, 1, {adapter.dropout_p, adapter.rng, t * k}, 0, Layout::pairs, x_packed);
      Bf16Terms down;
      down.add(x_packed, 1, rows, k, {A, true});
      gemm_bf16(rows, r, down.begin(), down.count(), {const_cast<void*>(h_block.data), x.dtype, r});
      pack_bf16_parts(h_block, rows, r, scale, Layout::pairs, h_packed);
      terms.add(h_packed, kLeftParts, rows, r, {B, true});
    }
    if (r == 0 || adapter.dropout_p > 0) pack_bf16(x_block, rows, k, 1, {}, 0, Layout::pairs, x_packed);
    terms.add(x_packed, 1, rows, k, {W, true});
    out.data = y + t * n * size;
    gemm_bf16(rows, n, terms.begin(), terms.count(), out);
  }
}

}  // namespace
}  // namespace lk::cpu

extern "C" int64_t lk_cpu_lora_linear_workspace(int64_t tokens, int dtype, int64_t in_features,
                                                int64_t rank) {
  using namespace lk::cpu;
  const int64_t block = std::min(tokens, block_tokens(in_features));
  const int64_t planes = tokens <= kFewTokens ? Workspace::bytes(4 * tokens * padded(in_features, kLine)) : 0;
  const int64_t fp32 =
      Workspace::bytes(4 * packed_x(tokens, in_features)) + planes + Workspace::bytes(4 * block * rank);
  const int64_t bf16_tokens = std::min(tokens, block_tokens_bf16(in_features));
  return may_use_bf16_units(dtype) ? std::max(fp32, workspace_bf16(bf16_tokens, in_features, rank)) : fp32;
}

extern "C" const char* lk_cpu_lora_linear_kernel(int64_t tokens, int dtype, const lk_base_weight* base,
                                                 int64_t* forward_tokens, int64_t* backward_tokens) {
  using namespace lk::cpu;
  const Product product = product_for(tokens, dtype, *base);
  const bool bf16 = product == Product::gemm_bf16;
  *forward_tokens = bf16 ? kMostTokens : block_tokens(base->in_features);
  *backward_tokens = bf16 ? kMostTokens : block_tokens(base->out_features);
  return product == Product::few_tokens ? "few_tokens" : product == Product::gemm ? "gemm" : "gemm_bf16";
}

extern "C" int lk_cpu_lora_linear(const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
                                  const lk_adapter* adapter, const lk_matrix* bias, void* y, void* h,
                                  void* workspace) {
  using namespace lk::cpu;
  const int64_t n = base->out_features, k = base->in_features, r = adapter->rank;
  if (!supported(x->dtype) ||
      (r > 0 && !(supported(adapter->lora_A.dtype) && supported(adapter->lora_B.dtype))) ||
      (bias->data != nullptr && !supported(bias->dtype))) {
    return LK_UNSUPPORTED_DTYPE;
  }
  const int64_t block = std::min(tokens, block_tokens(k)), size = dtype_size(x->dtype);
  const Matrix A = dense(adapter->lora_A, r, k), B = dense(adapter->lora_B, n, r), W = base_matrix(*base);
  Workspace space(workspace);
  Output out{y, x->dtype, n};
  out.bias = bias->data, out.bias_dtype = bias->dtype;
  const Product product = product_for(tokens, x->dtype, *base);
  if (product != Product::gemm) {
    const auto run = product == Product::few_tokens ? few : bf16_units;
    run(dense(*x, tokens, k), W, *adapter, A, B, h, out, space);
    return LK_OK;
  }
  float* x_packed = space.take<float>(packed_x(tokens, k));
  float* h_packed = space.take<float>(block * r);
  const float scale = static_cast<float>(adapter->scaling / (1 - adapter->dropout_p));

  for (int64_t t = 0; t < tokens; t += block) {
    const int64_t rows = std::min(block, tokens - t);
    const Matrix x_block = rows_of(dense(*x, tokens, k), t, rows);
    Term terms[2] = {{x_packed, k, {W, true}}, {h_packed, r, {B, true}}};
    if (r > 0) {
      const Matrix h_block{static_cast<char*>(h) + t * r * size, x->dtype, r, nullptr, rows, r};
      pack(x_block, rows, k, 1, {adapter->dropout_p, adapter->rng, t * k}, x_packed);
      const Term down{x_packed, k, {A, true}};
      gemm(rows, r, &down, 1, {const_cast<void*>(h_block.data), x->dtype, r});
      pack(h_block, rows, r, scale, {}, h_packed);
    }
    if (r == 0 || adapter->dropout_p > 0) pack(x_block, rows, k, 1, {}, x_packed);
    out.data = static_cast<char*>(y) + t * n * size;
    gemm(rows, n, terms, r > 0 ? 2 : 1, out);
  }
  return LK_OK;
}

// lora_linear and dx for so few tokens that the time goes into decoding W0 rather than into products: NF4
// whose rows are whole dwords of codes, AVX-512.
#pragma once
#include "gemm.h"

namespace lk::cpu {

constexpr int64_t kFewTokens = 4;
constexpr int64_t kLine = 128;  // weights to 64 bytes of codes

// Whether these kernels take the product.
bool few_tokens(int64_t tokens, const Matrix& weight);

// dropout(matrix [tokens, cols]) · scale -> fp32, contiguous.
void few_tokens_rows(const Matrix& matrix, float scale, const Dropout& dropout, float* out);

// y [tokens, N] = x·W0ᵀ + h·Bᵀ + bias. x [tokens, K] and h [tokens, r] fp32, contiguous, h scaled already;
// x_space: as many floats as x has when its rows are filled up to whole lines.
void few_tokens_forward(int64_t tokens, const float* x, const Matrix& weight, const float* h,
                        const Matrix& lora_B, const Output& y, float* x_space);

// dx [tokens, K] = dy·W0 + m⊙(g·A). dy [tokens, N] and g [tokens, r] fp32, contiguous.
void few_tokens_backward(int64_t tokens, const float* dy, const Matrix& weight, const float* g,
                         const Matrix& lora_A, const Dropout& dropout, const Output& dx);

// out [tokens, outputs] = scale · left [tokens, inner] · P of a dense right factor, both fp32 and contiguous:
// the products with A and B, on one thread.
void few_tokens_product(int64_t tokens, const float* left, int64_t inner, const Right& right, int64_t outputs,
                        float scale, float* out);

// out [rows, cols] of `dtype`, contiguous, = leftᵀ·right of left [tokens, rows] and right [tokens, cols]: dA,
// dB.
void few_tokens_outer(int64_t tokens, const float* left, int64_t rows, const float* right, int64_t cols,
                      int dtype, void* out);

}  // namespace lk::cpu

// What lora_linear and its backward share.
#pragma once
#include <algorithm>

#include "few_tokens.h"
#include "gemm_bf16.h"
#include "isa.h"

namespace lk::cpu {

// Tokens whose packed rows of `inner` fp32 elements are at most 8 MiB, which a last-level cache holds: a
// block decodes the whole weight once, for all of its tokens.
inline int64_t block_tokens(int64_t inner) {
  const int64_t fit = (int64_t{8} << 20) / (4 * std::max<int64_t>(inner, 1));
  return std::clamp<int64_t>(fit / kTile * kTile, 4 * kTile, 32 * kTile);
}

// Of gemm_bf16: as many of 8 MiB, or the kMostTokens that share one decoding of W0 where those are more.
inline int64_t block_tokens_bf16(int64_t inner) {
  const int64_t fit = (int64_t{8} << 20) / (2 * std::max<int64_t>(inner, 1));
  return std::clamp<int64_t>(fit / kPanel * kPanel, kMostTokens, 8 * kMostTokens);
}

inline int64_t dtype_size(int dtype) { return dtype == LK_F32 ? 4 : 2; }

// Whether products of tokens of `dtype` may take gemm_bf16 here, which decides how large a workspace must be.
inline bool may_use_bf16_units(int dtype) { return dtype == LK_BF16 && has_bf16_units(); }

inline bool supported(int dtype) { return dtype >= LK_F32 && dtype <= LK_BF16; }

inline Matrix dense(const lk_matrix& m, int64_t rows, int64_t cols) {
  return {m.data, m.dtype, m.stride, nullptr, rows, cols};
}

inline Matrix base_matrix(const lk_base_weight& base) {
  return {base.dense.data, base.dense.dtype,  base.dense.stride,
          base.nf4,        base.out_features, base.in_features};
}

// The kernels that a product of lora_linear or its backward takes.
enum class Product { few_tokens, gemm, gemm_bf16 };

// vdpbf16ps takes tiles of 16 tokens, and twice as many operations at a time as an fp32 FMA at best: on a
// Xeon with AMX, two cores, NF4 4096x4096, gemm took 3.0, 4.4, 6.7 and 15 ms for 8, 16, 32 and 64 tokens,
// gemm_bf16 with vdpbf16ps 6.0, 5.7, 9.4 and 9.9.
constexpr int64_t kFewestForDotProducts = 48;

inline Product product_for(int64_t tokens, int dtype, const lk_base_weight& base) {
  if (few_tokens(tokens, base_matrix(base))) return Product::few_tokens;
  const bool bf16 = may_use_bf16_units(dtype) && (base.nf4 != nullptr || base.dense.dtype == LK_BF16);
  const int64_t fewest = isa() >= Isa::amx ? 0 : kFewestForDotProducts;
  return bf16 && tokens >= fewest ? Product::gemm_bf16 : Product::gemm;
}

// Rows [first, first + rows).
inline Matrix rows_of(const Matrix& m, int64_t first, int64_t rows) {
  return {static_cast<const char*>(m.data) + first * m.stride * dtype_size(m.dtype),
          m.dtype,
          m.stride,
          nullptr,
          rows,
          m.cols};
}

// Cuts a workspace into pieces on cache-line borders.
class Workspace {
 public:
  explicit Workspace(void* start) : at_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    char* here = at_;
    at_ += bytes(count * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(here);
  }
  static int64_t bytes(int64_t size) { return (size + 63) / 64 * 64; }

 private:
  char* at_;
};

// What gemm_bf16 needs for the left factors of so many tokens: [tokens, inner], and [tokens, rank] in parts.
inline int64_t workspace_bf16(int64_t tokens, int64_t inner, int64_t rank) {
  const int64_t size = sizeof(Bits);
  return Workspace::bytes(size * packed_bf16(tokens, inner)) +
         Workspace::bytes(size * kLeftParts * packed_bf16(tokens, rank));
}

}  // namespace lk::cpu

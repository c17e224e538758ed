// What the kernels of lora_linear share: the operands, fragments of the adapter, the end of an output, the
// meeting of slices.
#pragma once
#include "nf4.cuh"

namespace lk::cuda {

// The operands, with pointers of this side; x, y, h and a dense W0 in the 16-bit type T.
struct LoraLinear {
  int64_t tokens, n, k;      // T, N, K
  Global<const uint16_t> x;  // [T, K]
  int64_t x_stride;
  Nf4Weight nf4;
  Global<const uint16_t> dense;  // [N, K]
  int64_t dense_stride;
  Global<const void> lora_A, lora_B;  // [r, K], [N, r], of any dtype
  int A_dtype, B_dtype;
  int64_t A_stride, B_stride;
  int rank;
  float scaling;
  Global<const void> bias;  // [N] or null
  int bias_dtype;
  Global<uint16_t> y, h;                 // [T, N], [T, r]
  bool x_aligned, A_aligned, B_aligned;  // rows start on 16 bytes
};

inline bool aligned_rows(const void* data, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_bytes % 16 == 0;
}
inline int64_t element_bytes(int dtype) { return dtype == LK_F32 ? 4 : 2; }

inline LoraLinear lora_linear_operands(const lk_matrix& x, int64_t tokens, const lk_base_weight& base,
                                       const lk_adapter& adapter, const lk_matrix& bias, void* y, void* h) {
  const lk_nf4_weight none = {nullptr, nullptr, nullptr, nullptr, 64};
  const lk_matrix &A = adapter.lora_A, &B = adapter.lora_B;
  const auto elements = [](const void* p) { return Global<const uint16_t>(static_cast<const uint16_t*>(p)); };
  return {tokens,
          base.out_features,
          base.in_features,
          elements(x.data),
          x.stride,
          Nf4Weight(base.nf4 != nullptr ? *base.nf4 : none),
          elements(base.dense.data),
          base.dense.stride,
          Global<const void>(A.data),
          Global<const void>(B.data),
          A.dtype,
          B.dtype,
          A.stride,
          B.stride,
          static_cast<int>(adapter.rank),
          static_cast<float>(adapter.scaling / (1 - adapter.dropout_p)),
          Global<const void>(bias.data),
          bias.dtype,
          Global<uint16_t>(static_cast<uint16_t*>(y)),
          Global<uint16_t>(static_cast<uint16_t*>(h)),
          aligned_rows(x.data, x.stride, 2),
          aligned_rows(A.data, A.stride, element_bytes(A.dtype)),
          aligned_rows(B.data, B.stride, element_bytes(B.dtype))};
}

// 16 elements of a row of A from element `at`, as 8 pairs of T. kDirect: A is of T, and its rows lie on 16
// bytes.
template <int kDtype, bool kDirect>
__device__ __forceinline__ void load_A(const LoraLinear& p, int64_t row, int64_t at, uint32_t (&pairs)[8]) {
  const int64_t i = row * p.A_stride + at;
  if constexpr (kDirect) {
    const Global<const uint4> from = cast<const uint4>(cast<const uint16_t>(p.lora_A) + i);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const uint4 four = from[v];
      pairs[4 * v] = four.x, pairs[4 * v + 1] = four.y, pairs[4 * v + 2] = four.z, pairs[4 * v + 3] = four.w;
    }
  } else if (p.A_aligned && p.A_dtype == LK_F32) {
    const Global<const float4> from = cast<const float4>(cast<const float>(p.lora_A) + i);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float4 four = from[v];
      pairs[2 * v] = round_pair<kDtype>(four.x, four.y);
      pairs[2 * v + 1] = round_pair<kDtype>(four.z, four.w);
    }
  } else {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      pairs[v] = round_pair<kDtype>(load_float(p.lora_A, p.A_dtype, i + 2 * v),
                                    load_float(p.lora_A, p.A_dtype, i + 2 * v + 1));
    }
  }
}

// Ranks j and j + 1 of row `row` of B as T, zeros where there are none.
template <int kDtype>
__device__ __forceinline__ uint32_t load_B_pair(const LoraLinear& p, int64_t row, int j) {
  float low = 0, high = 0;
  if (row < p.n && j < p.rank) low = load_float(p.lora_B, p.B_dtype, row * p.B_stride + j);
  if (row < p.n && j + 1 < p.rank) high = load_float(p.lora_B, p.B_dtype, row * p.B_stride + j + 1);
  return round_pair<kDtype>(low, high);
}

// y of a row of W0 and a token: bias on top, rounded once.
template <int kDtype>
__device__ __forceinline__ void finish(const LoraLinear& p, int64_t row, int64_t token, float sum) {
  if (p.bias != nullptr) sum += load_float(p.bias, p.bias_dtype, row);
  p.y[token * p.n + row] = round_to<kDtype>(sum);
}

// For all threads of a block that has written its share of something to global memory: whether it is the last
// of `count` blocks at `counter`, and so sees the shares of all. The counter is left at count: whoever is
// last sets it to zero. `flag` is a word of shared memory that nobody else uses meanwhile.
__device__ __forceinline__ bool last_to_arrive(Global<uint32_t> counter, int count, Shared<uint32_t> flag,
                                               int thread) {
  __syncthreads();  // the block's share is written, and the release below is of all of it
  if (thread == 0) flag[0] = ptx::atomic_add_acq_rel(counter, 1) + 1 == static_cast<uint32_t>(count) ? 1 : 0;
  __syncthreads();
  return flag[0] != 0;
}

// The sum of `count` partial sums of four neighbours, `stride` floats apart, in their order; eight of them on
// their way at a time.
__device__ __forceinline__ float4 add_partial(Global<const float> first, int64_t stride, int count) {
  float4 sum = make_float4(0, 0, 0, 0);
  for (int s = 0; s < count; s += 8) {
    float4 four[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (s + i < count) four[i] = cast<const float4>(first + (s + i) * stride)[0];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (s + i < count) {
        sum = make_float4(sum.x + four[i].x, sum.y + four[i].y, sum.z + four[i].z, sum.w + four[i].w);
      }
    }
  }
  return sum;
}

}  // namespace lk::cuda

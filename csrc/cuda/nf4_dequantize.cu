// nf4_dequantize on a GPU: a region [row, row+rows) x [col, col+cols) of W [N, K] -> out [rows, cols].
//
//   out = T(codebook[nibble] * absmax[block]),   absmax[b] = dynamic_map[q[b]] * nested_absmax[b / 256] +
//   offset
//
// Aligned kernel (K, col, cols and the row stride of out divisible by 16): a thread owns 16 consecutive
// weights of one row, which lie in one block:
//
//     thread t:  packed 8 bytes ──lookup in shared codebook──> 16 products ──round──> 32 (16-bit T) or 64
//     bytes out
//
// General kernel: a thread owns one weight; any K, any column range.
// Bytes per weight: 0.52 read, sizeof(T) written, so the floor for bf16 is 2.52 bytes over the copy
// bandwidth.
#include "../api.h"
#include "../nf4.h"
#include "ptx.cuh"

namespace lk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWeightsPerThread = 16;

struct Tables {
  float codebook[nf4::kCodes];
  float dynamic_map[256];
};
constexpr Tables make_tables() {
  Tables tables{};
  for (int i = 0; i < nf4::kCodes; ++i) tables.codebook[i] = nf4::kCodebook[i];
  for (int i = 0; i < 256; ++i) tables.dynamic_map[i] = nf4::kDynamicMap[i];
  return tables;
}
__constant__ Tables kTables = make_tables();

template <int Dtype>
struct Output;
template <>
struct Output<LK_F32> {
  using type = float;
  static __device__ float round(float x) { return x; }
};
template <>
struct Output<LK_F16> {
  using type = uint16_t;
  static __device__ uint16_t round(float x) { return ptx::cvt_rn_f16(x); }
};
template <>
struct Output<LK_BF16> {
  using type = uint16_t;
  static __device__ uint16_t round(float x) { return ptx::cvt_rn_bf16(x); }
};

__device__ float block_scale(const lk_nf4_weight& w, int64_t block, const float* dynamic_map) {
  if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax)[block];
  const float scaled = __fmul_rn(dynamic_map[static_cast<const uint8_t*>(w.absmax)[block]],
                                 w.nested_absmax[block / nf4::kNestedBlock]);
  return __fadd_rn(scaled, *w.offset);  // two roundings, as the format says; never one fused one
}

__device__ void load_tables(float* codebook, float* dynamic_map) {
  for (int i = threadIdx.x; i < 256; i += kThreads) {
    dynamic_map[i] = kTables.dynamic_map[i];
    if (i < nf4::kCodes) codebook[i] = kTables.codebook[i];
  }
  __syncthreads();
}

template <int Dtype>
__global__ void __launch_bounds__(kThreads)
    dequantize_aligned(const lk_nf4_weight w, const lk_region r, typename Output<Dtype>::type* out,
                       int64_t out_stride) {
  using T = typename Output<Dtype>::type;
  __shared__ float codebook[nf4::kCodes], dynamic_map[256];
  load_tables(codebook, dynamic_map);
  const int64_t per_row = r.cols / kWeightsPerThread, total = r.rows * per_row;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / per_row, col = (i % per_row) * kWeightsPerThread;
    const int64_t flat = (r.row + row) * r.in_features + r.col + col;
    const float scale = block_scale(w, flat / w.blocksize, dynamic_map);
    const uint2 bytes = *reinterpret_cast<const uint2*>(w.packed + flat / 2);
    alignas(16) T values[kWeightsPerThread];
#pragma unroll
    for (int b = 0; b < kWeightsPerThread / 2; ++b) {
      const uint32_t byte = ((b < 4 ? bytes.x : bytes.y) >> (8 * (b % 4))) & 0xffu;
      values[2 * b] = Output<Dtype>::round(__fmul_rn(codebook[byte >> 4], scale));
      values[2 * b + 1] = Output<Dtype>::round(__fmul_rn(codebook[byte & 15], scale));
    }
    uint4* to = reinterpret_cast<uint4*>(out + row * out_stride + col);
#pragma unroll
    for (int v = 0; v < static_cast<int>(sizeof values / sizeof(uint4)); ++v) {
      to[v] = reinterpret_cast<const uint4*>(values)[v];
    }
  }
}

template <int Dtype>
__global__ void __launch_bounds__(kThreads)
    dequantize_general(const lk_nf4_weight w, const lk_region r, typename Output<Dtype>::type* out,
                       int64_t out_stride) {
  __shared__ float codebook[nf4::kCodes], dynamic_map[256];
  load_tables(codebook, dynamic_map);
  const int64_t total = r.rows * r.cols;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / r.cols, col = i % r.cols;
    const int64_t flat = (r.row + row) * r.in_features + r.col + col;
    const uint32_t byte = w.packed[flat / 2];
    const float code = codebook[flat & 1 ? byte & 15 : byte >> 4];
    out[row * out_stride + col] =
        Output<Dtype>::round(__fmul_rn(code, block_scale(w, flat / w.blocksize, dynamic_map)));
  }
}

bool aligned_to(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <int Dtype>
int dequantize(const lk_nf4_weight& w, const lk_region& r, void* out, int64_t out_stride,
               cudaStream_t stream) {
  using T = typename Output<Dtype>::type;
  if (r.rows == 0 || r.cols == 0) return LK_OK;
  const bool aligned = r.in_features % kWeightsPerThread == 0 && r.col % kWeightsPerThread == 0 &&
                       r.cols % kWeightsPerThread == 0 && out_stride % kWeightsPerThread == 0 &&
                       aligned_to(out, 16) && aligned_to(w.packed, 8);
  const int64_t work = r.rows * r.cols / (aligned ? kWeightsPerThread : 1);
  const int64_t blocks = (work + kThreads - 1) / kThreads, most = 1 << 20;
  const unsigned grid = static_cast<unsigned>(blocks < most ? blocks : most);
  if (aligned) {
    dequantize_aligned<Dtype><<<grid, kThreads, 0, stream>>>(w, r, static_cast<T*>(out), out_stride);
  } else {
    dequantize_general<Dtype><<<grid, kThreads, 0, stream>>>(w, r, static_cast<T*>(out), out_stride);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? LK_OK : LK_LAUNCH_FAILED + static_cast<int>(error);
}

}  // namespace
}  // namespace lk::cuda

extern "C" int lk_cuda_nf4_dequantize(const lk_nf4_weight* weight, const lk_region* region, void* out,
                                      int dtype, int64_t out_stride, void* stream) {
  using namespace lk::cuda;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case LK_F32: return dequantize<LK_F32>(*weight, *region, out, out_stride, s);
    case LK_F16: return dequantize<LK_F16>(*weight, *region, out, out_stride, s);
    case LK_BF16: return dequantize<LK_BF16>(*weight, *region, out, out_stride, s);
  }
  return LK_UNSUPPORTED_DTYPE;
}

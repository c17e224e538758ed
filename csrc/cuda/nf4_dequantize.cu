// nf4_dequantize on a GPU: a region [row, row+rows) x [col, col+cols) of W [N, K] -> out [rows, cols].
//
//   out = T(codebook[nibble] * absmax[block]),  absmax[b] = dynamic_map[q[b]] * nested_absmax[b / 256] +
//   offset
//
// Aligned kernel (K, col and cols divisible by 16, rows of out on 16 bytes): a thread owns 16 consecutive
// weights of one row, which lie in one block:
//
//     thread t:  8 bytes of codes ──lookup in a shared codebook──> 16 products ──round──> 2 (T of 16 bits) or
//     4 stores of 16 bytes
//
// General kernel: a thread owns one weight; any K, any column range.
// Bytes per weight: 0.52 read, sizeof(T) written, so the floor for bf16 is 2.52 bytes over the copy
// bandwidth.
#include "nf4.cuh"

namespace lk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWeightsPerThread = 16;

template <int kDtype>
using Element = std::conditional_t<kDtype == LK_F32, float, uint16_t>;

struct Problem {
  Nf4Weight weight;
  lk_region region;
  int64_t out_stride;
};

// Shared memory: the codebook, then the dynamic map.
constexpr size_t kSharedBytes = 4 * (nf4::kCodes + 256);

struct Tables {
  Shared<float> codebook, dynamic_map;
};
__device__ __forceinline__ Tables load_tables(Shared<char> shared) {
  const Tables tables{cast<float>(shared), cast<float>(shared) + nf4::kCodes};
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) {
    tables.dynamic_map[i] = kNf4Tables.dynamic_map[i];
    if (i < nf4::kCodes) tables.codebook[i] = kNf4Tables.codebook[i];
  }
  __syncthreads();
  return tables;
}

template <int kDtype>
__global__ void __launch_bounds__(kThreads) dequantize_aligned(const Problem p, Global<Element<kDtype>> out) {
  LK_DYNAMIC_SHARED(shared);
  const Tables tables = load_tables(shared);
  const lk_region r = p.region;
  const int64_t per_row = r.cols / kWeightsPerThread, total = r.rows * per_row;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / per_row, col = i % per_row * kWeightsPerThread;
    const int64_t flat = (r.row + row) * r.in_features + r.col + col;
    const float scale = block_scale(p.weight, flat >> p.weight.block_shift, tables.dynamic_map);
    const uint2 bytes = ptx::load_stream(cast<const uint2>(p.weight.packed + flat / 2));
    const Global<uint4> to = cast<uint4>(out + row * p.out_stride + col);
    float w[kWeightsPerThread];
#pragma unroll
    for (int b = 0; b < kWeightsPerThread / 2; ++b) {
      const uint32_t byte = ((b < 4 ? bytes.x : bytes.y) >> (8 * (b % 4))) & 0xffu;
      w[2 * b] = __fmul_rn(tables.codebook[byte >> 4], scale);
      w[2 * b + 1] = __fmul_rn(tables.codebook[byte & 15], scale);
    }
    if constexpr (kDtype == LK_F32) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float* four = w + 4 * v;
        ptx::store_stream(to + v, make_uint4(__float_as_uint(four[0]), __float_as_uint(four[1]),
                                             __float_as_uint(four[2]), __float_as_uint(four[3])));
      }
    } else {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float* eight = w + 8 * v;
        ptx::store_stream(
            to + v,
            make_uint4(round_pair<kDtype>(eight[0], eight[1]), round_pair<kDtype>(eight[2], eight[3]),
                       round_pair<kDtype>(eight[4], eight[5]), round_pair<kDtype>(eight[6], eight[7])));
      }
    }
  }
}

template <int kDtype>
__global__ void __launch_bounds__(kThreads) dequantize_general(const Problem p, Global<Element<kDtype>> out) {
  LK_DYNAMIC_SHARED(shared);
  const Tables tables = load_tables(shared);
  const lk_region r = p.region;
  const int64_t total = r.rows * r.cols;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / r.cols, col = i % r.cols;
    const int64_t flat = (r.row + row) * r.in_features + r.col + col;
    const uint32_t byte = p.weight.packed[flat / 2];
    const float code = tables.codebook[flat % 2 == 0 ? byte >> 4 : byte & 15];
    const float w = __fmul_rn(code, block_scale(p.weight, flat >> p.weight.block_shift, tables.dynamic_map));
    if constexpr (kDtype == LK_F32) {
      out[row * p.out_stride + col] = w;
    } else {
      out[row * p.out_stride + col] = round_to<kDtype>(w);
    }
  }
}

bool aligned_to(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <int kDtype>
int dequantize(const lk_nf4_weight& w, const lk_region& r, void* out, int64_t out_stride, void* stream) {
  if (r.rows == 0 || r.cols == 0) return LK_OK;
  const bool aligned = r.in_features % kWeightsPerThread == 0 && r.col % kWeightsPerThread == 0 &&
                       r.cols % kWeightsPerThread == 0 &&
                       out_stride * int64_t{sizeof(Element<kDtype>)} % 16 == 0 && aligned_to(out, 16) &&
                       aligned_to(w.packed, 8);
  const int64_t work = r.rows * r.cols / (aligned ? kWeightsPerThread : 1);
  const int64_t blocks = (work + kThreads - 1) / kThreads, most = 1 << 20;
  const LaunchShape shape{static_cast<unsigned>(blocks < most ? blocks : most), 1, 1, kThreads, kSharedBytes};
  const Problem p{Nf4Weight(w), r, out_stride};
  const Global<Element<kDtype>> to(static_cast<Element<kDtype>*>(out));
  return launch("nf4_dequantize", aligned ? dequantize_aligned<kDtype> : dequantize_general<kDtype>, shape,
                stream, p, to);
}

}  // namespace
}  // namespace lk::cuda

extern "C" int lk_cuda_nf4_dequantize(const lk_nf4_weight* weight, const lk_region* region, void* out,
                                      int dtype, int64_t out_stride, void* stream) {
  using namespace lk::cuda;
  switch (dtype) {
    case LK_F32: return dequantize<LK_F32>(*weight, *region, out, out_stride, stream);
    case LK_F16: return dequantize<LK_F16>(*weight, *region, out, out_stride, stream);
    case LK_BF16: return dequantize<LK_BF16>(*weight, *region, out, out_stride, stream);
  }
  return LK_UNSUPPORTED_DTYPE;
}

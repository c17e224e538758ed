// The plain C boundary between torch_ops.cpp and the kernels: every launcher, its shapes, its status codes.
//
// Launchers compute and nothing else: arguments are checked and outputs allocated in lora_kernels/ops.py, so
// pointers are valid, sizes agree and dtypes are supported when a launcher is called. All tensors are
// contiguous unless a stride is passed. Sizes are int64: a flat index may exceed 2^31.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lk_dtype { LK_F32 = 0, LK_F16 = 1, LK_BF16 = 2 } lk_dtype;

// Status codes of every launcher. lora_kernels/backends/native.py turns them into Python exceptions.
typedef enum lk_status {
  LK_OK = 0,
  LK_NONFINITE = 1,          // a weight to be quantised holds a NaN or an infinity
  LK_UNSUPPORTED_DTYPE = 2,  // a dtype that this launcher has no kernel for
  LK_NO_STREAM = 3,          // this torch has no current CUDA stream to launch on
  LK_UNSUPPORTED_ISA = 4,    // no such instruction set, or not on this machine
  LK_NO_KERNEL = 5,          // the library has no code for this kernel: it was built for older GPUs only
  LK_LAUNCH_FAILED = 1000,   // 1000 + the cudaError_t of a launch
} lk_status;

// An NF4 weight: W [N, K] flattened to n = N*K codes. See nf4.h for the format.
typedef struct lk_nf4_weight {
  const uint8_t* packed;       // [ceil(n / 2)]
  const void* absmax;          // [ceil(n / blocksize)]: fp32, or uint8 codes when nested_absmax is given
  const float* nested_absmax;  // [ceil(blocks / 256)] or null
  const float* offset;         // [1], null exactly when nested_absmax is
  int64_t blocksize;           // a power of two, 32..4096
} lk_nf4_weight;

// A rectangle of W [N, K], as the panel loops ask for it.
typedef struct lk_region {
  int64_t in_features;  // K
  int64_t row, rows;    // rows [row, row + rows) of N
  int64_t col, cols;    // columns [col, col + cols) of K
} lk_region;

// nf4_quantize: weight [n] -> packed [ceil(n/2)], absmax fp32 [ceil(n/blocksize)]. LK_NONFINITE leaves the
// outputs unspecified. A GPU tells later: it sets nonfinite[0], which is zero before, to 1, and returns
// LK_OK.
int lk_cpu_nf4_quantize(const void* weight, int dtype, int64_t n, int64_t blocksize, uint8_t* packed,
                        float* absmax);
int lk_cuda_nf4_quantize(const void* weight, int dtype, int64_t n, int64_t blocksize, uint8_t* packed,
                         float* absmax, uint32_t* nonfinite, void* stream);

// The second level: absmax [blocks] -> codes [blocks], nested_absmax [ceil(blocks / 256)], offset [1].
// offset = mean(absmax), summed in double in index order; a code is the true nearest entry, a tie going down.
// On a GPU arrivals[0] is zero before, and partial_sums scratch of LK_NF4_PARTIAL_SUMS doubles.
enum { LK_NF4_PARTIAL_SUMS = 256 };
int lk_cpu_nf4_quantize_absmax(const float* absmax, int64_t blocks, uint8_t* codes, float* nested_absmax,
                               float* offset);
int lk_cuda_nf4_quantize_absmax(const float* absmax, int64_t blocks, uint8_t* codes, float* nested_absmax,
                                float* offset, uint32_t* arrivals, double* partial_sums, void* stream);

// nf4_dequantize: the region of W -> out [rows, cols], `out_stride` elements from row to row.
int lk_cpu_nf4_dequantize(const lk_nf4_weight* weight, const lk_region* region, void* out, int dtype,
                          int64_t out_stride);
int lk_cuda_nf4_dequantize(const lk_nf4_weight* weight, const lk_region* region, void* out, int dtype,
                           int64_t out_stride, void* stream);

// lora_dropout: out[i] = x[i] where the Philox word of element first + i is kept, else 0. Not scaled.
// rng: [2] int64 (seed, offset).
int lk_cpu_lora_dropout(const void* x, int dtype, int64_t n, int64_t first, double p, const int64_t* rng,
                        void* out);
int lk_cuda_lora_dropout(const void* x, int dtype, int64_t n, int64_t first, double p, const int64_t* rng,
                         void* out, void* stream);

// A row-major matrix with unit column stride, `stride` elements from row to row; data is null where there is
// none.
typedef struct lk_matrix {
  const void* data;
  int dtype;
  int64_t stride;
} lk_matrix;

// The frozen weight W0 [N, K]: NF4, or dense where nf4 is null.
typedef struct lk_base_weight {
  const lk_nf4_weight* nf4;
  lk_matrix dense;
  int64_t out_features, in_features;  // N, K
} lk_base_weight;

// The adapter s·B·A; rank 0 where there is none.
typedef struct lk_adapter {
  lk_matrix lora_A, lora_B;  // [r, K], [N, r], of any dtype
  int64_t rank;
  double scaling;      // s
  double dropout_p;    // on the adapter's input
  const int64_t* rng;  // [2] (seed, offset), null where dropout_p is 0
} lk_adapter;

// lora_linear: y [T, N] = x·W0ᵀ + s/(1-p)·h·Bᵀ + bias and h [T, r] = dropout(x)·Aᵀ; x [T, K], y and h of one
// dtype, y and h contiguous. `workspace` has the bytes that lk_cpu_lora_linear_workspace says.
int lk_cpu_lora_linear(const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
                       const lk_adapter* adapter, const lk_matrix* bias, void* y, void* h, void* workspace);
int64_t lk_cpu_lora_linear_workspace(int64_t tokens, int64_t in_features, int64_t rank);

int64_t lk_cpu_lora_linear_block_tokens(int64_t in_features);  // tokens that share one decoding of W0

// The kernel that lora_linear and its backward take for so many tokens and such a base: "few_tokens" or
// "gemm".
const char* lk_cpu_lora_linear_kernel(int64_t tokens, const lk_base_weight* base);

// lora_linear_backward: with g = s/(1-p)·dy·B,
//   dx [T, K] = dy·W0 + m⊙(g·A),  dA [r, K] = gᵀ·(m⊙x),  dB [N, r] = s/(1-p)·dyᵀ·h
// dx in dy's dtype, dA and dB in their own; an output whose data is null is not computed, and x or h may be
// null where nothing needs it.
typedef struct lk_gradients {
  void* dx;
  void *dA, *dB;
  int dA_dtype, dB_dtype;
} lk_gradients;
int lk_cpu_lora_linear_backward(const lk_matrix* dy, int64_t tokens, const lk_matrix* x, const lk_matrix* h,
                                const lk_base_weight* base, const lk_adapter* adapter,
                                const lk_gradients* gradients, void* workspace);
int64_t lk_cpu_lora_linear_backward_workspace(int64_t tokens, int64_t out_features, int64_t in_features,
                                              int64_t rank, int has_dropout);

// lora_linear without dropout for few tokens (`takes` says which problems) on a GPU, in one launch on
// `stream`. `workspace` and `counters` have the sizes that `scratch` says; the counters are zero before and
// after. `clustered`: the slices of K meet in a cluster (sm_90 and later), without workspace and counters.
typedef struct lk_scratch {
  int64_t workspace;  // bytes
  int64_t counters;
} lk_scratch;
int lk_cuda_lora_linear_decode(const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
                               const lk_adapter* adapter, const lk_matrix* bias, void* y, void* h,
                               void* workspace, uint32_t* counters, void* stream);
int lk_cuda_lora_linear_decode_clustered(const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
                                         const lk_adapter* adapter, const lk_matrix* bias, void* y, void* h,
                                         void* stream);
int lk_cuda_lora_linear_decode_takes(int64_t tokens, const lk_base_weight* base, int64_t rank);
lk_scratch lk_cuda_lora_linear_decode_scratch(int64_t tokens, int64_t out_features, int64_t in_features,
                                              int64_t rank, int nf4, int clustered);

// lora_linear for more tokens, in one launch. `given_h` [T, r]: h where it is computed already (dropout, or a
// rank over 16); else null, and h is written. The base is as lora_linear_decode takes it.
int lk_cuda_lora_linear_mixed(const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
                              const lk_adapter* adapter, const lk_matrix* bias, const void* given_h, void* y,
                              void* h, void* workspace, uint32_t* counters, void* stream);
lk_scratch lk_cuda_lora_linear_mixed_scratch(int64_t tokens, int64_t out_features, int64_t in_features,
                                             int64_t rank);

// The instruction set of the CPU kernels: the one in use, the highest this machine supports (of "portable",
// "avx2", "avx512", "avx512bf16", each of which includes those before it), and the choice of another one.
const char* lk_cpu_isa(void);
const char* lk_cpu_best_isa(void);
int lk_cpu_select_isa(const char* name);

// Whether this machine multiplies bf16 much faster than fp32, by AMX or a full-rate vdpbf16ps: torch's bf16
// GEMM is then faster than fp32 kernels.
int lk_cpu_fast_bf16(void);

#ifdef __cplusplus
}
#endif

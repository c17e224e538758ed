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
  LK_BAD_ARGUMENTS = 6,      // the arguments do not fit together; nothing was done
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
int64_t lk_cpu_lora_linear_workspace(int64_t tokens, int dtype, int64_t in_features, int64_t rank);

// The kernel that lora_linear and its backward take for so many tokens of `dtype` and such a base:
// "few_tokens", "gemm" or "gemm_bf16"; and how many tokens share one decoding of W0.
const char* lk_cpu_lora_linear_kernel(int64_t tokens, int dtype, const lk_base_weight* base,
                                      int64_t* forward_tokens, int64_t* backward_tokens);

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
int64_t lk_cpu_lora_linear_backward_workspace(int64_t tokens, int dtype, int64_t out_features,
                                              int64_t in_features, int64_t rank, int has_dropout);

// lora_linear without dropout for few tokens on a GPU, in one launch on `stream`. `workspace` and `counters`
// have the sizes that `scratch` says; the counters are zero before and after. `clustered`: the slices of K
// meet in a cluster (sm_90 and later), without workspace and counters. `takes`: whether a slice of K fits a
// block of the current device that way; besides, the base is as lora_linear_mixed takes it.
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
int lk_cuda_lora_linear_decode_takes(int64_t out_features, int64_t in_features, int64_t rank, int nf4,
                                     int clustered);
lk_scratch lk_cuda_lora_linear_decode_scratch(int64_t tokens, int64_t out_features, int64_t in_features,
                                              int64_t rank, int nf4, int clustered);

// lora_linear for more tokens, in one launch. `given_h` [T, r]: h where it is computed already (dropout, or a
// rank over 16); else null, h is written, and A has to be of x's dtype with rows that start on 16 bytes.
// `takes`: whether this kernel and lora_linear_backward_dx take the base: rows of 64 weights that share a
// scale, which 16 bytes divide, and a rank up to 256.
int lk_cuda_lora_linear_mixed(const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
                              const lk_adapter* adapter, const lk_matrix* bias, const void* given_h, void* y,
                              void* h, void* workspace, uint32_t* counters, void* stream);
int lk_cuda_lora_linear_mixed_takes(const lk_base_weight* base, int64_t rank);
lk_scratch lk_cuda_lora_linear_mixed_scratch(int64_t tokens, int64_t out_features, int64_t in_features,
                                             int64_t rank);

// The low-rank products on a GPU, of one adapter or of up to LK_MOST_ADAPTERS, each with rows of its own:
// adapter a's are order[begins[a]], ..., order[begins[a + 1] - 1] of `count`. Without order (null) there is
// one adapter, and every row is its. Dropout is the first adapter's.
enum { LK_MOST_ADAPTERS = 64 };
typedef struct lk_rows {
  int64_t count;
  const int64_t* order;   // [count] or null
  const int64_t* begins;  // [adapters + 1] or null
  int64_t adapters;
} lk_rows;

// h [T, r] = scaling·dropout(x)·Aᵀ, `h_stride` elements from row to row; rows of no adapter, and ranks that a
// row's adapter does not have, are left alone. Workspace and counters as above.
int lk_cuda_lora_shrink(const lk_matrix* x, int64_t in_features, const lk_rows* rows,
                        const lk_adapter* adapters, void* h, int64_t h_stride, void* workspace,
                        uint32_t* counters, void* stream);
lk_scratch lk_cuda_lora_shrink_scratch(int64_t rows, int64_t adapters, int sorted, int64_t in_features,
                                       int64_t most_rank);

// out [T, columns] (+)= s/(1-p)·v·Bᵀ, or backward v·A with the mask; added to what is there where `add`.
int lk_cuda_lora_expand(const lk_matrix* v, const lk_rows* rows, const lk_adapter* adapters, int backward,
                        int add, void* out, int64_t columns, int64_t out_stride, void* stream);

// The backward's sweep over dy: g [T, r] = s/(1-p)·dy·B in dy's dtype (null: not wanted), dB [N, r] =
// s/(1-p)·dyᵀ·h of each adapter (an array, or null; data null: not wanted), and dbias [N], the sum of all
// rows (null: not wanted; with one adapter only).
int lk_cuda_lora_linear_backward_dy(const lk_matrix* dy, int64_t out_features, const lk_rows* rows,
                                    const lk_adapter* adapters, const lk_matrix* h, void* g, int64_t g_stride,
                                    const lk_matrix* dB, float* dbias, void* workspace, void* stream);
// Its sweep over x: dA [r, K] = gᵀ·dropout(x) of each adapter.
int lk_cuda_lora_linear_backward_x(const lk_matrix* x, int64_t in_features, const lk_rows* rows,
                                   const lk_adapter* adapters, const lk_matrix* g, const lk_matrix* dA,
                                   void* workspace, void* stream);
// Bytes of either's workspace for `columns` of dy or x; g_stride 0: without g.
int64_t lk_cuda_lora_linear_backward_sweep_workspace(int64_t rows, int64_t adapters, int64_t columns,
                                                     int64_t most_rank, int64_t g_stride);

// dx [T, K] = dy·W0 + m⊙(g·A) for few to some hundred tokens, in one launch; the base is as
// lora_linear_decode takes it, g [T, r] with `g_stride` elements from row to row, A of dy's dtype
// with rows that start on 16 bytes.
int lk_cuda_lora_linear_backward_dx(const lk_matrix* dy, int64_t tokens, const lk_base_weight* base,
                                    const lk_adapter* adapter, const void* g, int64_t g_stride, void* dx,
                                    void* workspace, uint32_t* counters, void* stream);
lk_scratch lk_cuda_lora_linear_backward_dx_scratch(int64_t tokens, int64_t out_features, int64_t in_features);

// adamw_step, adamw8bit_step, lion_step, lion8bit_step: one step of pieces of parameters whose state lies in
// pages (optim_state.h). A page whose header holds `tick` is left alone, with its segments; the header of
// every other one is set when its segments are done.
enum { LK_ADAMW = 0, LK_ADAMW8BIT = 1, LK_LION = 2, LK_LION8BIT = 3 };
enum { LK_NEAREST = 0, LK_STOCHASTIC = 1, LK_KAHAN = 2 };  // the rounding of 16-bit parameters

typedef struct lk_optim_parameter {
  void* param;       // [n], all of one dtype
  const void* grad;  // [n] of that dtype or fp32
  int64_t n;
  int grad_dtype;
} lk_optim_parameter;

// A row of the table `segments`: state of elements [first, first + count) of a parameter.
typedef struct lk_optim_segment {
  int64_t page, offset;             // offset in bytes, a multiple of 64
  int64_t parameter, first, count;  // first a multiple of 256
  int64_t step;                     // of the parameter, from 1
  int64_t id;                       // of the parameter, for the random stream
} lk_optim_segment;

typedef struct lk_optim_page {
  void* data;  // aligned to 64
  int64_t bytes;
} lk_optim_page;

typedef struct lk_optim_step {
  int op, rounding;
  double lr, beta1, beta2, eps, weight_decay;
  int64_t seed, tick;
  int dtype;  // of the parameters
  const lk_optim_parameter* parameters;
  int64_t parameter_count;
  const lk_optim_page* pages;
  int64_t page_count;
  const lk_optim_segment* segments;
  int64_t segment_count;
} lk_optim_step;

// These check the table, since a check in Python would take longer than a step of many small parameters:
// LK_BAD_ARGUMENTS where a segment lies outside its page or its parameter.
int lk_cpu_optim_step(const lk_optim_step* step);
int lk_cuda_optim_step(const lk_optim_step* step, void* stream);

// The offsets of the parts of a piece (state1, absmax1, state2, absmax2, compensation; -1: none), and its
// size.
void lk_optim_state_layout(int op, int64_t count, int dtype, int rounding, int64_t offsets[5],
                           int64_t* bytes);

// The instruction set of the CPU kernels: the one in use, the highest this machine supports (of "portable",
// "avx2", "avx512", "avx512bf16", "amx", each of which includes those before it), and the choice of another
// one.
const char* lk_cpu_isa(void);
const char* lk_cpu_best_isa(void);
int lk_cpu_select_isa(const char* name);

#ifdef __cplusplus
}
#endif

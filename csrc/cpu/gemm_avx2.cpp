// gemm.h with AVX2 and FMA: 6 tokens x 16 outputs in registers.
#include "gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>

#include "../nf4.h"
#include "convert.h"
#include "isa.h"
#include "nf4_decode.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace lk::cpu::avx2 {
namespace {

struct Vec {
  using V = __m256;
  static constexpr int kLanes = 8, kRows = 6;
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
};

#include "gemm_kernels.h"

}  // namespace

const GemmKernels kGemm = {pack_tile, decode, multiply, store};

}  // namespace lk::cpu::avx2
#pragma GCC pop_options
#endif

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
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    V a[8], b[8];
    for (int i = 0; i < 4; ++i) {
      const V x = load(from + 2 * i * stride), y = load(from + (2 * i + 1) * stride);
      a[2 * i] = _mm256_unpacklo_ps(x, y), a[2 * i + 1] = _mm256_unpackhi_ps(x, y);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
        b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
      }
    }
    // b[i]: columns i and 4 + i of the first four rows, b[4 + i] of the others.
    for (int i = 0; i < 4; ++i) {
      store(to + i * to_stride, _mm256_permute2f128_ps(b[i], b[4 + i], 0x20));
      store(to + (4 + i) * to_stride, _mm256_permute2f128_ps(b[i], b[4 + i], 0x31));
    }
  }
};

#include "gemm_kernels.h"

}  // namespace

const GemmKernels kGemm = {pack_tile, decode, multiply, store};

}  // namespace lk::cpu::avx2
#pragma GCC pop_options
#endif

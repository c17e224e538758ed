// gemm.h for any machine: four floats at a time, which the compiler turns into SSE, NEON or plain code.
#include <algorithm>

#include "../nf4.h"
#include "convert.h"
#include "gemm.h"
#include "isa.h"
#include "nf4_decode.h"

namespace lk::cpu::portable {
namespace {

struct Vec {
  typedef float V __attribute__((vector_size(16), aligned(16)));
  static constexpr int kLanes = 4, kRows = 4;
  static V zero() { return V{}; }
  static V load(const float* p) { return *reinterpret_cast<const V*>(p); }
  static void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }
  static V broadcast(const float* p) { return V{*p, *p, *p, *p}; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V add(V a, V b) { return a + b; }
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j) to[i * to_stride + j] = from[j * stride + i];
    }
  }
};

#include "gemm_kernels.h"

}  // namespace

const GemmKernels kGemm = {pack_tile, decode, multiply, store};

}  // namespace lk::cpu::portable

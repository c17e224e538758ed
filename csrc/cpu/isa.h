// The run-time choice of instruction set, one for all CPU kernels of the process.
#pragma once

namespace lk::cpu {

// In ascending order; a machine that supports one supports those before it.
//   avx2         AVX2, FMA, F16C
//   avx512       AVX-512 F, BW, DQ, VL
//   avx512bf16   avx512 and vdpbf16ps, which multiplies pairs of bf16
//   amx          avx512bf16 and AMX tiles of bf16
enum class Isa { portable, avx2, avx512, avx512bf16, amx };

Isa isa();

}  // namespace lk::cpu

// A kernel body is written once, always inline, and called from one small function per instruction set:
// LK_AVX512 on that function makes the compiler vectorise the body with 512-bit registers.
#define LK_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define LK_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LK_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")))
#else
#define LK_AVX2
#define LK_AVX512
#endif

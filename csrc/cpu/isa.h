// The run-time choice of instruction set, made once per process. LORA_KERNELS_CPU_ISA=portable|avx512 forces
// one; lora_kernels/backends/native.py refuses a value that this machine cannot run.
#pragma once

namespace lk::cpu {

enum class Isa { portable, avx512 };

Isa isa();

}  // namespace lk::cpu

// A kernel body is written once, always inline, and called from one small function per instruction set:
// LK_AVX512 on that function makes the compiler vectorise the body with 512-bit registers.
#define LK_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define LK_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#else
#define LK_AVX512
#endif

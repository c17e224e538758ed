#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstring>

#include "../api.h"

namespace lk::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__)
// Whether the processor has AMX for bf16, the system saves its registers (XCR0 bits 17 and 18), and lets this
// process use them, which Linux wants to be asked for.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, ...)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa find_best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return has_amx() ? Isa::amx : Isa::avx512bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::portable;
}

Isa best_supported() {
  static const Isa best = find_best();
  return best;
}

// What a process starts with. vdpbf16ps does 64 operations and an fp32 FMA 32, but Intel's cores without AMX
// run a quarter as many of the former (Xeon family 6 model 207: 1.35 against 5.5 thousand million a second
// and core), so there the fp32 kernels are the faster ones.
Isa fastest() {
  const Isa best = best_supported();
#if defined(__x86_64__)
  if (best == Isa::avx512bf16 && __builtin_cpu_is("intel")) return Isa::avx512;
#endif
  return best;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{fastest()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

}  // namespace lk::cpu

extern "C" const char* lk_cpu_isa(void) { return lk::cpu::kNames[static_cast<int>(lk::cpu::isa())]; }

extern "C" const char* lk_cpu_best_isa(void) {
  return lk::cpu::kNames[static_cast<int>(lk::cpu::best_supported())];
}

extern "C" int lk_cpu_select_isa(const char* name) {
  for (int i = 0; i <= static_cast<int>(lk::cpu::best_supported()); ++i) {
    if (std::strcmp(name, lk::cpu::kNames[i]) == 0) {
      lk::cpu::chosen().store(static_cast<lk::cpu::Isa>(i), std::memory_order_relaxed);
      return LK_OK;
    }
  }
  return LK_UNSUPPORTED_ISA;
}

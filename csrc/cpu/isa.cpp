#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "../api.h"

namespace lk::cpu {

static Isa choose() {
  const char* forced = std::getenv("LORA_KERNELS_CPU_ISA");
#if defined(__x86_64__)
  if (forced != nullptr && std::strcmp(forced, "portable") == 0) return Isa::portable;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
#else
  (void)forced;
#endif
  return Isa::portable;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace lk::cpu

extern "C" const char* lk_cpu_isa(void) {
  return lk::cpu::isa() == lk::cpu::Isa::avx512 ? "avx512" : "portable";
}

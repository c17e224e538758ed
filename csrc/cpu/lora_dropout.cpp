// lora_dropout on a CPU: out[i] = x[i] where the Philox word of flat element first + i is kept, else 0
// (philox.h).
//
// Words come four to a counter. A task walks its elements in chunks of 64 counters: the words of a chunk are
// computed into an array first (that loop vectorises over counters), then the elements are selected. About 60
// integer operations per element of the ten rounds; they bound it, not memory.
#include <algorithm>

#include "../api.h"
#include "../philox.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

constexpr int64_t kCounters = 64;

template <class T>
LK_INLINE void drop(const T* x, int64_t begin, int64_t end, int64_t first, uint32_t threshold, uint64_t seed,
                    uint64_t offset, T* out) {
  alignas(64) uint32_t words[4][kCounters];
  for (int64_t i = begin; i < end;) {
    const int64_t flat = first + i, counter = flat / 4;
    for (int64_t c = 0; c < kCounters; ++c) {
      const PhiloxWords drawn = philox4x32_10(static_cast<uint64_t>(counter + c), offset, seed);
      for (int k = 0; k < 4; ++k) words[k][c] = drawn.w[k];
    }
    const int64_t stop = std::min(end, (counter + kCounters) * 4 - first);
    for (; i < stop; ++i) {
      const int64_t e = first + i - counter * 4;
      out[i] = words[e % 4][e / 4] >= threshold ? x[i] : T{};
    }
  }
}

template <class T>
void drop_portable(const T* x, int64_t begin, int64_t end, int64_t first, uint32_t threshold, uint64_t seed,
                   uint64_t offset, T* out) {
  drop(x, begin, end, first, threshold, seed, offset, out);
}
template <class T>
LK_AVX512 void drop_avx512(const T* x, int64_t begin, int64_t end, int64_t first, uint32_t threshold,
                           uint64_t seed, uint64_t offset, T* out) {
  drop(x, begin, end, first, threshold, seed, offset, out);
}

template <class T>
int dropout(const void* x, int64_t n, int64_t first, double p, const int64_t* rng, void* out) {
  const auto run = isa() >= Isa::avx512 ? drop_avx512<T> : drop_portable<T>;
  parallel_for(n, 8192, [&](int64_t begin, int64_t end) {
    run(static_cast<const T*>(x), begin, end, first, dropout_threshold(p), static_cast<uint64_t>(rng[0]),
        static_cast<uint64_t>(rng[1]), static_cast<T*>(out));
  });
  return LK_OK;
}

}  // namespace
}  // namespace lk::cpu

extern "C" int lk_cpu_lora_dropout(const void* x, int dtype, int64_t n, int64_t first, double p,
                                   const int64_t* rng, void* out) {
  using namespace lk::cpu;
  switch (dtype) {
    case LK_F32: return dropout<float>(x, n, first, p, rng, out);
    case LK_F16: return dropout<Half>(x, n, first, p, rng, out);
    case LK_BF16: return dropout<BFloat16>(x, n, first, p, rng, out);
  }
  return LK_UNSUPPORTED_DTYPE;
}

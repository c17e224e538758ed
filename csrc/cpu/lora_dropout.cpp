// lora_dropout on a CPU: out[i] = x[i] where the Philox word of flat element first + i is kept, else 0
// (philox.h).
//
// Words come four to a counter. With AVX-512 sixteen counters are a vector; the words' comparisons with the
// threshold become 64 bits, one an element, which are the masks of the loads. Elsewhere a task walks its
// elements in chunks of 64 counters: the words of a chunk are computed into an array first (that loop
// vectorises over counters), then the elements are selected. The integer operations of the ten rounds bound
// it, not memory: 160 for 64 elements with AVX-512.
#include <algorithm>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
LK_AVX2 void drop_avx2(const T* x, int64_t begin, int64_t end, int64_t first, uint32_t threshold,
                       uint64_t seed, uint64_t offset, T* out) {
  drop(x, begin, end, first, threshold, seed, offset, out);
}

#if defined(__x86_64__)
#define LK_AVX512_BMI2 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi2,prefer-vector-width=512")))

struct Product {
  __m512i low, high;
};

// 16 products of 32 x 32 bits: the even lanes, the odd ones, and their halves put together again.
LK_AVX512_BMI2 LK_INLINE Product multiply(__m512i a, __m512i factor) {
  const __m512i even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  return {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)),
          _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
}

// Bit i of the result: whether element i of the 64 of the counters [counter, counter + 16) is kept.
LK_AVX512_BMI2 LK_INLINE uint64_t keep_bits(uint64_t counter, uint64_t offset, uint64_t seed,
                                            __m512i threshold) {
  const __m512i start = _mm512_set1_epi64(static_cast<long long>(counter));
  const __m512i lower = _mm512_add_epi64(start, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i upper = _mm512_add_epi64(start, _mm512_setr_epi64(8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_or_si512(evens, _mm512_set1_epi32(1));
  __m512i c0 = _mm512_permutex2var_epi32(lower, evens, upper),
          c1 = _mm512_permutex2var_epi32(lower, odds, upper);
  __m512i c2 = _mm512_set1_epi32(static_cast<int>(offset)),
          c3 = _mm512_set1_epi32(static_cast<int>(offset >> 32));
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Product p0 = multiply(c0, m0), p1 = multiply(c2, m1);
    c0 = _mm512_ternarylogic_epi32(p1.high, c1, _mm512_set1_epi32(static_cast<int>(k0)), 0x96);  // a ^ b ^ c
    c1 = p1.low;
    c2 = _mm512_ternarylogic_epi32(p0.high, c3, _mm512_set1_epi32(static_cast<int>(k1)), 0x96);
    c3 = p0.low;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  // Word w of counter c belongs to element 4c + w.
  return _pdep_u64(_mm512_cmpge_epu32_mask(c0, threshold), 0x1111111111111111) |
         _pdep_u64(_mm512_cmpge_epu32_mask(c1, threshold), 0x2222222222222222) |
         _pdep_u64(_mm512_cmpge_epu32_mask(c2, threshold), 0x4444444444444444) |
         _pdep_u64(_mm512_cmpge_epu32_mask(c3, threshold), 0x8888888888888888);
}

template <class T>
LK_AVX512_BMI2 void drop_avx512(const T* x, int64_t begin, int64_t end, int64_t first, uint32_t threshold,
                                uint64_t seed, uint64_t offset, T* out) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  for (int64_t i = begin; i < end;) {
    const int64_t flat = first + i, skip = flat % 4, count = std::min<int64_t>(64 - skip, end - i);
    uint64_t keep = keep_bits(static_cast<uint64_t>(flat / 4), offset, seed, limit) >> skip;
    for (int64_t e = 0; e < count; e += kLanes, keep >>= kLanes % 64) {
      const int64_t left = count - e;
      const uint64_t valid = left >= kLanes ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
      if constexpr (sizeof(T) == 2) {
        const auto there = static_cast<__mmask32>(valid), kept = static_cast<__mmask32>(keep & valid);
        _mm512_mask_storeu_epi16(out + i + e, there, _mm512_maskz_loadu_epi16(kept, x + i + e));
      } else {
        const auto there = static_cast<__mmask16>(valid), kept = static_cast<__mmask16>(keep & valid);
        _mm512_mask_storeu_epi32(out + i + e, there, _mm512_maskz_loadu_epi32(kept, x + i + e));
      }
    }
    i += count;
  }
}
#endif

template <class T>
int dropout(const void* x, int64_t n, int64_t first, double p, const int64_t* rng, void* out) {
  auto run = drop_portable<T>;
#if defined(__x86_64__)
  if (isa() >= Isa::avx2) run = drop_avx2<T>;
  if (isa() >= Isa::avx512) run = drop_avx512<T>;
#endif
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

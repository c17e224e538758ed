// lora_dropout on a CPU: out[i] = x[i] where the Philox word of flat element first + i is kept, else 0
// (philox.h).
//
// Words come four to a counter: element e reads word e % 4 of counter e / 4. A vector holds one 32-bit number
// of 8 (AVX2: 4) counters, each in the low half of a 64-bit lane, because that is where the widening
// multiplication reads its factors and leaves room for its products. What the upper halves hold is nobody's
// business until the last round. Words 0 and 1 of a counter then share a lane, as do 2 and 3, and an
// interleave of 64-bit lanes puts the four side by side, so that a comparison yields the mask of x in the
// order of x.
//
//   threads  a run of elements each; `out` may be x
//   bytes    sizeof(T) read and written per element; the integer operations of the ten rounds bound it:
//            2048x4096 bf16 takes 2.0 ms on two AVX-512 cores, 4.2 with AVX2, 10.9 without either
#include <algorithm>
#include <cstring>
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

// The mask of one call, apart from where it begins.
struct Mask {
  uint32_t threshold;
  uint64_t seed, offset;
};

template <class T>
LK_INLINE T kept(T x, uint32_t word, uint32_t threshold) {
  return word >= threshold ? x : T{};
}

// n elements from word `skip` of `counter`.
template <class T>
LK_INLINE void drop_some(const T* x, int64_t n, uint64_t counter, int64_t skip, const Mask& mask, T* out) {
  for (int64_t i = -skip; i < n; i += 4, ++counter) {
    const PhiloxWords drawn = philox4x32_10(counter, mask.offset, mask.seed);
    for (int64_t k = std::max<int64_t>(0, -i); k < std::min<int64_t>(4, n - i); ++k) {
      out[i + k] = kept(x[i + k], drawn.w[k], mask.threshold);
    }
  }
}

// The elements of `groups` times kCounters counters from `counter` on.
template <class T>
using DropGroups = void (*)(const T* x, int64_t groups, uint64_t counter, const Mask& mask, T* out);

constexpr int64_t kCounters = 32;  // of one group: enough independent multiplications to hide their latency

// The words of a group first, in a loop over counters that the compiler vectorises.
template <class T>
void drop_portable(const T* x, int64_t groups, uint64_t counter, const Mask& mask, T* out) {
  uint32_t words[4][kCounters];
  for (int64_t g = 0; g < groups; ++g, counter += kCounters, x += 4 * kCounters, out += 4 * kCounters) {
    for (int64_t c = 0; c < kCounters; ++c) {
      const PhiloxWords drawn = philox4x32_10(counter + static_cast<uint64_t>(c), mask.offset, mask.seed);
      for (int k = 0; k < 4; ++k) words[k][c] = drawn.w[k];
    }
    for (int64_t c = 0; c < kCounters; ++c) {
      for (int k = 0; k < 4; ++k) out[4 * c + k] = kept(x[4 * c + k], words[k][c], mask.threshold);
    }
  }
}

#if defined(__x86_64__)

// One multiplier or key of each round, for every lane.
constexpr int64_t kFirstFactor = kPhiloxM0, kSecondFactor = kPhiloxM1;

struct Keys {
  int64_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};
LK_INLINE Keys round_keys(uint64_t seed) {
  Keys keys;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    keys.k0[round] = k0;
    keys.k1[round] = k1;
  }
  return keys;
}

// --- AVX2

// Four counters: words 0 and 1 of each (low, high half of a lane) and words 2 and 3.
template <int kVectors>
LK_AVX2 LK_INLINE void philox_avx2(__m256i (&c0)[kVectors], uint64_t offset, const Keys& keys,
                                   __m256i (&words01)[kVectors], __m256i (&words23)[kVectors]) {
  const __m256i m0 = _mm256_set1_epi64x(kFirstFactor), m1 = _mm256_set1_epi64x(kSecondFactor);
  __m256i c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    c1[v] = _mm256_srli_epi64(c0[v], 32);
    c2[v] = _mm256_set1_epi64x(static_cast<int64_t>(offset));
    c3[v] = _mm256_set1_epi64x(static_cast<int64_t>(offset >> 32));
  }
  for (int round = 0; round < kPhiloxRounds - 1; ++round) {
    const __m256i k0 = _mm256_set1_epi64x(keys.k0[round]), k1 = _mm256_set1_epi64x(keys.k1[round]);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i p0 = _mm256_mul_epu32(m0, c0[v]), p1 = _mm256_mul_epu32(m1, c2[v]);
      c0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[v]), k0);
      c2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[v]), k1);
      c1[v] = p1;
      c3[v] = p0;
    }
  }
  const __m256i k0 = _mm256_set1_epi64x(keys.k0[kPhiloxRounds - 1]),
                k1 = _mm256_set1_epi64x(keys.k1[kPhiloxRounds - 1]);
  const __m256i zero = _mm256_setzero_si256();
  for (int v = 0; v < kVectors; ++v) {
    // A product with its halves exchanged is (high, low) = (word 0 before the keys, word 1).
    const __m256i p0 = _mm256_shuffle_epi32(_mm256_mul_epu32(m0, c0[v]), 0xb1);
    const __m256i p1 = _mm256_shuffle_epi32(_mm256_mul_epu32(m1, c2[v]), 0xb1);
    words01[v] = _mm256_xor_si256(p1, _mm256_blend_epi32(_mm256_xor_si256(c1[v], k0), zero, 0xaa));
    words23[v] = _mm256_xor_si256(p0, _mm256_blend_epi32(_mm256_xor_si256(c3[v], k1), zero, 0xaa));
  }
}

template <class T>
LK_AVX2 void drop_avx2(const T* x, int64_t groups, uint64_t counter, const Mask& mask, T* out) {
  constexpr int kVectors = 2;  // 16 registers
  const Keys keys = round_keys(mask.seed);
  const __m256i threshold = _mm256_set1_epi32(static_cast<int>(mask.threshold));
  // An interleave works on halves of a register; so do the stores of fp32. 16-bit masks are packed, half by
  // half too, which undoes it.
  const __m256i lanes = sizeof(T) == 2 ? _mm256_setr_epi64x(0, 1, 2, 3) : _mm256_setr_epi64x(0, 2, 1, 3);
  constexpr int64_t kStep = 4 * kVectors;
  for (int64_t left = groups * kCounters; left > 0; left -= kStep, counter += kStep) {
    __m256i c0[kVectors], words01[kVectors], words23[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter) + 4 * v), lanes);
    }
    philox_avx2(c0, mask.offset, keys, words01, words23);
    for (int v = 0; v < kVectors; ++v, x += 16, out += 16) {
      const __m256i a = _mm256_unpacklo_epi64(words01[v], words23[v]);
      const __m256i b = _mm256_unpackhi_epi64(words01[v], words23[v]);
      const __m256i keep_a = _mm256_cmpeq_epi32(_mm256_max_epu32(a, threshold), a);
      const __m256i keep_b = _mm256_cmpeq_epi32(_mm256_max_epu32(b, threshold), b);
      const __m256i* from = reinterpret_cast<const __m256i*>(x);
      __m256i* to = reinterpret_cast<__m256i*>(out);
      if constexpr (sizeof(T) == 2) {
        _mm256_storeu_si256(to,
                            _mm256_and_si256(_mm256_loadu_si256(from), _mm256_packs_epi32(keep_a, keep_b)));
      } else {
        _mm256_storeu_si256(to, _mm256_and_si256(_mm256_loadu_si256(from), keep_a));
        _mm256_storeu_si256(to + 1, _mm256_and_si256(_mm256_loadu_si256(from + 1), keep_b));
      }
    }
  }
}

// --- AVX-512

constexpr int kXor3 = 0x96;  // vpternlog: a ^ b ^ c

// Eight counters: words 0 and 1 of each (low, high half of a lane) and words 2 and 3.
template <int kVectors>
LK_AVX512 LK_INLINE void philox_avx512(__m512i (&c0)[kVectors], uint64_t offset, const Keys& keys,
                                       __m512i (&words01)[kVectors], __m512i (&words23)[kVectors]) {
  const __m512i m0 = _mm512_set1_epi64(kFirstFactor), m1 = _mm512_set1_epi64(kSecondFactor);
  __m512i c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    c1[v] = _mm512_srli_epi64(c0[v], 32);
    c2[v] = _mm512_set1_epi64(static_cast<int64_t>(offset));
    c3[v] = _mm512_set1_epi64(static_cast<int64_t>(offset >> 32));
  }
  for (int round = 0; round < kPhiloxRounds - 1; ++round) {
    const __m512i k0 = _mm512_set1_epi64(keys.k0[round]), k1 = _mm512_set1_epi64(keys.k1[round]);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i p0 = _mm512_mul_epu32(m0, c0[v]), p1 = _mm512_mul_epu32(m1, c2[v]);
      c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[v], k0, kXor3);
      c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[v], k1, kXor3);
      c1[v] = p1;
      c3[v] = p0;
    }
  }
  const __m512i k0 = _mm512_set1_epi64(keys.k0[kPhiloxRounds - 1]),
                k1 = _mm512_set1_epi64(keys.k1[kPhiloxRounds - 1]);
  constexpr __mmask16 kLow = 0x5555;
  for (int v = 0; v < kVectors; ++v) {
    // A product with its halves exchanged is (high, low) = (word 0 before the keys, word 1).
    const __m512i p0 = _mm512_ror_epi64(_mm512_mul_epu32(m0, c0[v]), 32);
    const __m512i p1 = _mm512_ror_epi64(_mm512_mul_epu32(m1, c2[v]), 32);
    words01[v] = _mm512_mask_ternarylogic_epi32(p1, kLow, c1[v], k0, kXor3);
    words23[v] = _mm512_mask_ternarylogic_epi32(p0, kLow, c3[v], k1, kXor3);
  }
}

template <class T>
LK_AVX512 void drop_avx512(const T* x, int64_t groups, uint64_t counter, const Mask& mask, T* out) {
  constexpr int kVectors = 4;
  static_assert(8 * kVectors == kCounters);
  const Keys keys = round_keys(mask.seed);
  const __m512i threshold = _mm512_set1_epi32(static_cast<int>(mask.threshold));
  const __m512i lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (; groups > 0; --groups, counter += kCounters) {
    __m512i c0[kVectors], words01[kVectors], words23[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter) + 8 * v), lanes);
    }
    philox_avx512(c0, mask.offset, keys, words01, words23);
    for (int v = 0; v < kVectors; ++v, x += 32, out += 32) {
      const __m512i a = _mm512_unpacklo_epi64(words01[v], words23[v]);
      const __m512i b = _mm512_unpackhi_epi64(words01[v], words23[v]);
      const __mmask16 keep_a = _mm512_cmpge_epu32_mask(a, threshold);
      const __mmask16 keep_b = _mm512_cmpge_epu32_mask(b, threshold);
      if constexpr (sizeof(T) == 2) {
        const __mmask32 keep = _mm512_kunpackw(keep_b, keep_a);
        _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(keep, x));
      } else {
        _mm512_storeu_si512(out, _mm512_maskz_loadu_epi32(keep_a, x));
        _mm512_storeu_si512(out + 16, _mm512_maskz_loadu_epi32(keep_b, x + 16));
      }
    }
  }
}
#endif

template <class T>
DropGroups<T> kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return drop_avx512<T>;
  if (isa() >= Isa::avx2) return drop_avx2<T>;
#endif
  return drop_portable<T>;
}

// n elements from flat index `first`: what is left of a counter, whole groups, the rest.
template <class T>
void drop(const T* x, int64_t n, int64_t first, const Mask& mask, DropGroups<T> groups, T* out) {
  const int64_t skip = first % 4, head = std::min(n, (4 - skip) % 4);
  if (head > 0) drop_some(x, head, static_cast<uint64_t>(first / 4), skip, mask, out);
  const uint64_t counter = static_cast<uint64_t>((first + 3) / 4);
  const int64_t whole = (n - head) / (4 * kCounters), done = head + whole * 4 * kCounters;
  groups(x + head, whole, counter, mask, out + head);
  drop_some(x + done, n - done, counter + static_cast<uint64_t>(whole * kCounters), 0, mask, out + done);
}

template <class T>
int dropout(const void* x, int64_t n, int64_t first, double p, const int64_t* rng, void* out) {
  const Mask mask{dropout_threshold(p), static_cast<uint64_t>(rng[0]), static_cast<uint64_t>(rng[1])};
  const DropGroups<T> groups = kernel<T>();
  parallel_for(n, 8192, [&](int64_t begin, int64_t end) {
    drop(static_cast<const T*>(x) + begin, end - begin, first + begin, mask, groups,
         static_cast<T*>(out) + begin);
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

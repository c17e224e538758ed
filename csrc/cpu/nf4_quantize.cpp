// nf4_quantize on a CPU.
//
//   block b of W: m = max|w|;  s = clamp(w * (1 / max(m, 1e-38)), -1, 1);  code = #{k : s > midpoint[k]}
//   A short last block divides by max(m, 1e-38) instead of multiplying by the reciprocal, and stores that
//   clamped m (bitsandbytes does so, and the bytes must agree).
//
// The code of s is exact without 15 comparisons. All of [-1, 1] is cut into 31 bins, narrower than any two
// midpoints are apart, so a bin knows the code up to one comparison with the one midpoint in it (kBins).
// AVX-512 keeps the bins in four registers; AVX2, whose permute sees 8 entries, halves the midpoints four
// times. The clamp is left out: |s| exceeds 1 by at most one rounding, and no midpoint is near 1.
//
//   threads  whole blocks each
//   bytes    sizeof(T) read and 0.5 written per weight, from memory once: the second pass over a block finds
//            it in L1. 4096x4096 bf16 takes 3.4 ms on two AVX-512 cores, 5.4 with AVX2, 13.7 without either.
#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../api.h"
#include "../nf4.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

// Bin v = round(kBinsPerUnit * s) in -15..15, at index v mod 32: the midpoint in it (infinity where none is)
// and the number of midpoints below it.
constexpr float kBinsPerUnit = 15.0f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits

struct Bins {
  alignas(64) float midpoint[32];
  alignas(64) int32_t below[32];
};
constexpr Bins make_bins() {
  Bins bins{};
  for (int v = -15; v <= 15; ++v) {
    float inside = std::numeric_limits<float>::infinity();
    int below = 0;
    for (const float mid : nf4::kMidpoints) {
      const double place = static_cast<double>(mid) * kBinsPerUnit;
      below += place < v - 0.5;
      if (place > v - 0.5 && place < v + 0.5) inside = mid;
    }
    bins.midpoint[v & 31] = inside;
    bins.below[v & 31] = below;
  }
  return bins;
}
constexpr Bins kBins = make_bins();

// The rounding of s * 15 may put an s beside a bin's border on its other side; no midpoint is that near to
// one, and no two share a bin.
constexpr bool bins_are_exact() {
  for (int k = 0; k < nf4::kCodes - 1; ++k) {
    const double place = static_cast<double>(nf4::kMidpoints[k]) * kBinsPerUnit + 16;
    const double into = place + 0.5 - static_cast<int>(place + 0.5);
    if (into < 1e-3 || into > 1 - 1e-3) return false;
    if (k > 0 && (nf4::kMidpoints[k] - nf4::kMidpoints[k - 1]) * kBinsPerUnit < 1) return false;
  }
  return true;
}
static_assert(bins_are_exact());

LK_INLINE int encode(float s) {
  const uint32_t bin = bits_of(s * kBinsPerUnit + kRound) & 31;
  return kBins.below[bin] + (s > kBins.midpoint[bin]);
}

// The largest bit pattern of |x|: for finite floats the order of the bits is the order of the values, and a
// result of 0x7f800000 or more says that an infinity or NaN is among them. An integer maximum vectorises; a
// float one does not.
template <class T>
LK_INLINE uint32_t max_magnitude_bits(const T* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, bits_of(to_float(x[i])) & 0x7fffffffu);
  return most;
}
constexpr uint32_t kInfinity = 0x7f800000u;

// One block of any length. Returns false where it holds a NaN or an infinity.
template <class T>
LK_INLINE bool quantize_block(const T* w, int64_t n, bool full, uint8_t* packed, float* absmax) {
  const uint32_t most = max_magnitude_bits(w, n);
  if (most >= kInfinity) return false;
  const float largest = float_of(most), divisor = std::max(largest, nf4::kMinAbsmax);
  const float inverse = 1.0f / divisor;
  const auto code = [&](int64_t i) {
    return encode(full ? to_float(w[i]) * inverse : to_float(w[i]) / divisor);
  };
  for (int64_t i = 0; i < n / 2; ++i) packed[i] = static_cast<uint8_t>(code(2 * i) << 4 | code(2 * i + 1));
  if (n % 2) packed[n / 2] = static_cast<uint8_t>(code(n - 1) << 4 | nf4::kPadCode);
  *absmax = full ? largest : divisor;
  return true;
}

// `blocks` full blocks: w [blocks * blocksize] -> packed [blocks * blocksize / 2], absmax [blocks]. Returns
// false where one holds a NaN or an infinity.
template <class T>
using QuantizeBlocks = bool (*)(const T* w, int64_t blocks, int64_t blocksize, uint8_t* packed,
                                float* absmax);

template <class T>
bool blocks_portable(const T* w, int64_t blocks, int64_t blocksize, uint8_t* packed, float* absmax) {
  for (int64_t b = 0; b < blocks; ++b, w += blocksize, packed += blocksize / 2) {
    if (!quantize_block(w, blocksize, true, packed, absmax + b)) return false;
  }
  return true;
}

#if defined(__x86_64__)

// The largest of 8 unsigned 16-bit numbers.
LK_AVX2 LK_INLINE uint32_t max_of(__m128i x) {
  const __m128i ones = _mm_set1_epi32(-1);
  return 0xffff & ~static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(x, ones))));
}

// --- AVX2: 8 pairs of weights at a time

// 16 weights -> the even and the odd ones, in fp32. fp32 pairs come in the order 0 1 4 5 2 3 6 7 (in_order).
LK_AVX2 LK_INLINE void load_pairs(const BFloat16* w, __m256& even, __m256& odd) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
LK_AVX2 LK_INLINE void load_pairs(const Half* w, __m256& even, __m256& odd) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(x, 16);
  const __m256i apart = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  even = _mm256_cvtph_ps(_mm256_castsi256_si128(apart));
  odd = _mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1));
}
LK_AVX2 LK_INLINE void load_pairs(const float* w, __m256& even, __m256& odd) {
  const __m256 a = _mm256_loadu_ps(w), b = _mm256_loadu_ps(w + 8);
  even = _mm256_shuffle_ps(a, b, 0x88);
  odd = _mm256_shuffle_ps(a, b, 0xdd);
}
template <class T>
LK_AVX2 LK_INLINE __m256i in_order(__m256i pairs) {
  if constexpr (std::is_same_v<T, float>) return _mm256_permute4x64_epi64(pairs, 0xd8);
  return pairs;
}

template <class T>
LK_AVX2 LK_INLINE uint32_t max_magnitude_avx2(const T* w, int64_t n) {
  __m256i most = _mm256_setzero_si256();
  if constexpr (sizeof(T) == 2) {
    for (int64_t i = 0; i < n; i += 16) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i));
      most = _mm256_max_epu16(most, _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)));
    }
    const uint32_t bits =
        max_of(_mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1)));
    return bits_of(to_float(T{static_cast<uint16_t>(bits)}));
  } else {
    for (int64_t i = 0; i < n; i += 8) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i));
      most = _mm256_max_epi32(most, _mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
  }
}

// MINUS the code of s: comparisons give -1, and a permute takes its index modulo 8, so nothing is negated. A
// step knows j of the midpoints to be below s (in units of what is left to tell) and asks for the next one.
LK_AVX2 LK_INLINE __m256i minus_code(__m256 s) {
  const auto& mid = nf4::kMidpoints;
  const __m256 quarters = _mm256_setr_ps(mid[1], 0, 0, 0, 0, mid[13], mid[9], mid[5]);
  const __m256 eighths = _mm256_setr_ps(mid[0], mid[14], mid[12], mid[10], mid[8], mid[6], mid[4], mid[2]);
  const __m256 half = _mm256_cmp_ps(s, _mm256_set1_ps(mid[7]), _CMP_GT_OQ);
  const __m256 second = _mm256_blendv_ps(_mm256_set1_ps(mid[3]), _mm256_set1_ps(mid[11]), half);
  __m256i j = _mm256_castps_si256(half);
  j = _mm256_add_epi32(_mm256_add_epi32(j, j), _mm256_castps_si256(_mm256_cmp_ps(s, second, _CMP_GT_OQ)));
  const __m256 third = _mm256_permutevar8x32_ps(quarters, j);
  j = _mm256_add_epi32(_mm256_add_epi32(j, j), _mm256_castps_si256(_mm256_cmp_ps(s, third, _CMP_GT_OQ)));
  const __m256 fourth = _mm256_permutevar8x32_ps(eighths, j);
  return _mm256_add_epi32(_mm256_add_epi32(j, j), _mm256_castps_si256(_mm256_cmp_ps(s, fourth, _CMP_GT_OQ)));
}

template <class T>
LK_AVX2 LK_INLINE __m256i pack_avx2(const T* w, __m256 inverse) {  // 16 weights -> 8 bytes, one in each lane
  __m256 even, odd;
  load_pairs(w, even, odd);
  const __m256i e = minus_code(_mm256_mul_ps(even, inverse)), o = minus_code(_mm256_mul_ps(odd, inverse));
  return in_order<T>(_mm256_sub_epi32(_mm256_setzero_si256(), _mm256_add_epi32(_mm256_slli_epi32(e, 4), o)));
}

template <class T>
LK_AVX2 bool blocks_avx2(const T* w, int64_t blocks, int64_t blocksize, uint8_t* packed, float* absmax) {
  for (int64_t b = 0; b < blocks; ++b, w += blocksize, packed += blocksize / 2) {
    const uint32_t most = max_magnitude_avx2(w, blocksize);
    if (most >= kInfinity) return false;
    absmax[b] = float_of(most);
    const __m256 inverse = _mm256_set1_ps(1.0f / std::max(absmax[b], nf4::kMinAbsmax));
    for (int64_t i = 0; i < blocksize; i += 32) {
      const __m256i words = _mm256_permute4x64_epi64(
          _mm256_packus_epi32(pack_avx2(w + i, inverse), pack_avx2(w + i + 16, inverse)), 0xd8);
      const __m128i bytes =
          _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), bytes);
    }
  }
  return true;
}

// --- AVX-512: 16 pairs of weights at a time

LK_AVX512 LK_INLINE void load_pairs(const BFloat16* w, __m512& even, __m512& odd) {
  const __m512i x = _mm512_loadu_si512(w);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
LK_AVX512 LK_INLINE void load_pairs(const Half* w, __m512& even, __m512& odd) {
  const __m512i x = _mm512_loadu_si512(w);
  even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
  odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}
LK_AVX512 LK_INLINE void load_pairs(const float* w, __m512& even, __m512& odd) {
  const __m512 a = _mm512_loadu_ps(w), b = _mm512_loadu_ps(w + 16);
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, evens, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b);
}

template <class T>
LK_AVX512 LK_INLINE uint32_t max_magnitude_avx512(const T* w, int64_t n) {
  __m512i most = _mm512_setzero_si512();
  if constexpr (sizeof(T) == 2) {
    for (int64_t i = 0; i < n; i += 32) {
      most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(w + i), _mm512_set1_epi16(0x7fff)));
    }
    const __m256i m = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    const uint32_t bits = max_of(_mm_max_epu16(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1)));
    return bits_of(to_float(T{static_cast<uint16_t>(bits)}));
  } else {
    for (int64_t i = 0; i < n; i += 16) {
      most =
          _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(w + i), _mm512_set1_epi32(0x7fffffff)));
    }
    return _mm512_reduce_max_epu32(most);
  }
}

// codes [16] << kShift, from tables of the bins in two registers each.
template <int kShift>
LK_AVX512 LK_INLINE __m512i codes_avx512(__m512 s, const __m512 (&midpoint)[2], const __m512i (&below)[2]) {
  const __m512i bin =
      _mm512_castps_si512(_mm512_fmadd_ps(s, _mm512_set1_ps(kBinsPerUnit), _mm512_set1_ps(kRound)));
  const __mmask16 above =
      _mm512_cmp_ps_mask(s, _mm512_permutex2var_ps(midpoint[0], bin, midpoint[1]), _CMP_GT_OQ);
  const __m512i code = _mm512_permutex2var_epi32(below[0], bin, below[1]);
  return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1 << kShift));
}

template <class T>
LK_AVX512 bool blocks_avx512(const T* w, int64_t blocks, int64_t blocksize, uint8_t* packed, float* absmax) {
  const __m512 midpoint[2] = {_mm512_load_ps(kBins.midpoint), _mm512_load_ps(kBins.midpoint + 16)};
  const __m512i odd_below[2] = {_mm512_load_si512(kBins.below), _mm512_load_si512(kBins.below + 16)};
  const __m512i even_below[2] = {_mm512_slli_epi32(odd_below[0], 4), _mm512_slli_epi32(odd_below[1], 4)};
  for (int64_t b = 0; b < blocks; ++b, w += blocksize, packed += blocksize / 2) {
    const uint32_t most = max_magnitude_avx512(w, blocksize);
    if (most >= kInfinity) return false;
    absmax[b] = float_of(most);
    const __m512 inverse = _mm512_set1_ps(1.0f / std::max(absmax[b], nf4::kMinAbsmax));
    for (int64_t i = 0; i < blocksize; i += 32) {
      __m512 even, odd;
      load_pairs(w + i, even, odd);
      const __m512i high = codes_avx512<4>(_mm512_mul_ps(even, inverse), midpoint, even_below);
      const __m512i low = codes_avx512<0>(_mm512_mul_ps(odd, inverse), midpoint, odd_below);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2),
                       _mm512_cvtepi32_epi8(_mm512_or_si512(high, low)));
    }
  }
  return true;
}
#endif

template <class T>
QuantizeBlocks<T> kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return blocks_avx512<T>;
  if (isa() >= Isa::avx2) return blocks_avx2<T>;
#endif
  return blocks_portable<T>;
}

template <class T>
int quantize(const void* weight, int64_t n, int64_t blocksize, uint8_t* packed, float* absmax) {
  const T* w = static_cast<const T*>(weight);
  const QuantizeBlocks<T> blocks = kernel<T>();
  const int64_t full = n / blocksize, rest = n % blocksize;
  std::atomic<bool> finite{true};
  parallel_for(full, std::max<int64_t>(1, 16384 / blocksize), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * blocksize;
    if (!blocks(w + first, end - begin, blocksize, packed + first / 2, absmax + begin)) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  if (rest > 0 && !quantize_block(w + n - rest, rest, false, packed + (n - rest) / 2, absmax + full))
    finite = false;
  return finite ? LK_OK : LK_NONFINITE;
}

}  // namespace
}  // namespace lk::cpu

extern "C" int lk_cpu_nf4_quantize(const void* weight, int dtype, int64_t n, int64_t blocksize,
                                   uint8_t* packed, float* absmax) {
  using namespace lk::cpu;
  switch (dtype) {
    case LK_F32: return quantize<float>(weight, n, blocksize, packed, absmax);
    case LK_F16: return quantize<Half>(weight, n, blocksize, packed, absmax);
    case LK_BF16: return quantize<BFloat16>(weight, n, blocksize, packed, absmax);
  }
  return LK_UNSUPPORTED_DTYPE;
}

// nf4_dequantize on a CPU: a region [row, row+rows) x [col, col+cols) of W [N, K] -> out [rows, cols].
//
//   out = T(codebook[nibble] * absmax[block])
//
// A row of the region is a run of consecutive flat indices, cut at block borders into segments with one
// scale. All 16 possible values of a block are computed once, in T, and a segment only looks codes up: the
// product is the same fp32 product and the same single rounding as a multiplication per weight. With AVX-512
// the 16 values sit in one register and a permute looks up 32 (16-bit T) or 16 (fp32) weights at a time.
// Bytes per weight: 0.53 read, sizeof(T) written; the stores bound it.
#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../api.h"
#include "../nf4.h"
#include "half.h"
#include "isa.h"
#include "nf4_decode.h"
#include "parallel.h"

namespace lk::cpu {
namespace {

template <class T>
LK_INLINE void block_values(float scale, T* values) {
  for (int c = 0; c < nf4::kCodes; ++c) values[c] = from_float<T>(nf4::kCodebook[c] * scale);
}

// Looks up `pairs` bytes, two weights each, in order (high nibble first).
template <class T>
LK_INLINE void lookup_portable(const uint8_t* packed, int64_t pairs, const T* values, T* out) {
  for (int64_t i = 0; i < pairs; ++i) {
    out[2 * i] = values[packed[i] >> 4];
    out[2 * i + 1] = values[packed[i] & 15];
  }
}

#if defined(__x86_64__)
// 16-bit values: their low and their high bytes are looked up apart (pshufb) and interleaved. 32-bit ones: in
// the lower and the upper half of the table, chosen by the code's highest bit.
template <class T>
LK_AVX2 LK_INLINE void lookup_avx2(const uint8_t* packed, int64_t pairs, const T* values, T* out) {
  int64_t i = 0;
  const __m128i nibble = _mm_set1_epi8(15);
  if constexpr (sizeof(T) == 2) {
    const __m128i even = _mm_set1_epi16(255);
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8));
    const __m128i lows = _mm_packus_epi16(_mm_and_si128(first, even), _mm_and_si128(second, even));
    const __m128i highs = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    for (; i + 16 <= pairs; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i));
      const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble),
                    low = _mm_and_si128(bytes, nibble);
      const __m128i codes[2] = {_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low)};
      for (int half = 0; half < 2; ++half) {
        const __m128i l = _mm_shuffle_epi8(lows, codes[half]), h = _mm_shuffle_epi8(highs, codes[half]);
        __m128i* to = reinterpret_cast<__m128i*>(out + 2 * i + 16 * half);
        _mm_storeu_si128(to, _mm_unpacklo_epi8(l, h));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(l, h));
      }
    }
  } else {
    const __m256 lower = _mm256_loadu_ps(values), upper = _mm256_loadu_ps(values + 8);
    for (; i + 8 <= pairs; i += 8) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i));
      const __m128i codes =
          _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), _mm_and_si128(bytes, nibble));
      const __m256i index[2] = {_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))};
      for (int half = 0; half < 2; ++half) {
        const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(index[half], 28));
        const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index[half]),
                                              _mm256_permutevar8x32_ps(upper, index[half]), choice);
        _mm256_storeu_ps(out + 2 * i + 8 * half, value);
      }
    }
  }
  lookup_portable(packed + i, pairs - i, values, out + 2 * i);
}

template <class T>
LK_AVX512 LK_INLINE void block_values_avx512(float scale, T* values) {
  const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(nf4::kCodebook.data()), _mm512_set1_ps(scale));
  if constexpr (std::is_same_v<T, float>) {
    _mm512_storeu_ps(values, product);
  } else if constexpr (std::is_same_v<T, Half>) {
    const __m256i rounded = _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), rounded);
  } else {
    const __m512i bits = _mm512_castps_si512(product), high = _mm512_srli_epi32(bits, 16);
    const __m512i half =
        _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, _mm512_set1_epi32(1)));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm512_cvtepi32_epi16(result));
  }
}

// Stream: stores that go past the caches, to 64-byte borders.
template <bool Stream, class T>
LK_AVX512 LK_INLINE void store64(T* to, __m512i value) {
  if constexpr (Stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value);
  } else {
    _mm512_storeu_si512(to, value);
  }
}

template <bool Stream, class T>
LK_AVX512 LK_INLINE void lookup_avx512(const uint8_t* packed, int64_t pairs, const T* values, T* out) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 2) {
    const __m512i table =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    for (; i + 16 <= pairs; i += 16) {
      // Each byte widens to a 32-bit lane that holds the indices of its two weights in its two halves.
      const __m512i byte =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i)));
      const __m512i low = _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(15)), 16);
      const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), low);
      store64<Stream>(out + 2 * i, _mm512_permutexvar_epi16(index, table));
    }
  } else {
    const __m512i table = _mm512_loadu_si512(values);
    for (; i + 8 <= pairs; i += 8) {
      const __m512i byte =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i)));
      const __m512i low = _mm512_slli_epi64(_mm512_and_si512(byte, _mm512_set1_epi64(15)), 32);
      const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), low);
      store64<Stream>(out + 2 * i, _mm512_permutexvar_epi32(index, table));
    }
  }
  lookup_portable(packed + i, pairs - i, values, out + 2 * i);
}
#endif

// How far ahead codes are fetched, in bytes: the hardware's prefetchers end at a page.
constexpr int64_t kPrefetch = 1024;
constexpr int64_t kScales = 256;  // decoded at a time

// The run of `length` weights from flat index `first`.
template <class T, class Values, class Lookup>
LK_INLINE void dequantize_run(const lk_nf4_weight& w, int64_t first, int64_t length, T* out,
                              const Values& block_values, const Lookup& lookup) {
  const int shift = std::countr_zero(static_cast<uint64_t>(w.blocksize));
  alignas(64) T values[nf4::kCodes];
  alignas(64) float scales[kScales];
  const int64_t last = (first + length - 1) >> shift;
  int64_t decoded = 0, from = 0;  // scales holds those of blocks [from, from + decoded)
  for (const int64_t end = first + length; first < end;) {
    const int64_t block = first >> shift;
    const int64_t segment = std::min(end, (block + 1) << shift) - first;
    if (block >= from + decoded) {
      from = block, decoded = std::min(kScales, last + 1 - block);
      decode_scales(w, from, decoded, scales);
    }
    block_values(scales[block - from], values);
    __builtin_prefetch(w.packed + first / 2 + kPrefetch);
    const int64_t odd_head = first & 1;  // the run starts in the middle of a byte
    if (odd_head) out[0] = values[w.packed[first / 2] & 15];
    const int64_t pairs = (segment - odd_head) / 2;
    lookup(w.packed + (first + odd_head) / 2, pairs, values, out + odd_head);
    const int64_t done = odd_head + 2 * pairs;
    if (done < segment) out[done] = values[w.packed[(first + done) / 2] >> 4];
    first += segment;
    out += segment;
  }
}

template <class T>
void rows_portable(const lk_nf4_weight& w, const lk_region& r, int64_t begin, int64_t end, T* out,
                   int64_t stride) {
  for (int64_t i = begin; i < end; ++i) {
    dequantize_run(w, (r.row + i) * r.in_features + r.col, r.cols, out + i * stride, block_values<T>,
                   lookup_portable<T>);
  }
}

#if defined(__x86_64__)
template <class T>
LK_AVX2 void rows_avx2(const lk_nf4_weight& w, const lk_region& r, int64_t begin, int64_t end, T* out,
                       int64_t stride) {
  const auto values = [](float scale, T* to) LK_AVX2 { block_values(scale, to); };
  const auto lookup = [](const uint8_t* packed, int64_t pairs, const T* values, T* to)
                          LK_AVX2 { lookup_avx2(packed, pairs, values, to); };
  for (int64_t i = begin; i < end; ++i) {
    dequantize_run(w, (r.row + i) * r.in_features + r.col, r.cols, out + i * stride, values, lookup);
  }
}

template <bool Stream, class T>
LK_AVX512 void rows_avx512(const lk_nf4_weight& w, const lk_region& r, int64_t begin, int64_t end, T* out,
                           int64_t stride) {
  const auto values = [](float scale, T* to) LK_AVX512 { block_values_avx512(scale, to); };
  const auto lookup = [](const uint8_t* packed, int64_t pairs, const T* values, T* to)
                          LK_AVX512 { lookup_avx512<Stream>(packed, pairs, values, to); };
  for (int64_t i = begin; i < end; ++i) {
    dequantize_run(w, (r.row + i) * r.in_features + r.col, r.cols, out + i * stride, values, lookup);
  }
  if constexpr (Stream) _mm_sfence();
}

// Streaming saves reading the output before writing it (@), but the output is then in memory and not in a
// cache: only for outputs larger than a panel that is multiplied next (8 MiB, lora_kernels/panels.py). Every
// store must be to a 64-byte border: rows of whole blocks, of at least 64 bytes, from such a border.
template <class T>
bool streams(const lk_nf4_weight& w, const lk_region& r, const T* out, int64_t stride) {
  const int64_t size = sizeof(T);
  return r.rows * r.cols * size > (int64_t{16} << 20) && r.in_features % w.blocksize == 0 &&
         r.col % w.blocksize == 0 && r.cols % w.blocksize == 0 && stride * size % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}
#endif

template <class T>
using Rows = void (*)(const lk_nf4_weight&, const lk_region&, int64_t begin, int64_t end, T*, int64_t stride);

template <class T>
Rows<T> rows_kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return rows_avx512<false, T>;
  if (isa() >= Isa::avx2) return rows_avx2<T>;
#endif
  return rows_portable<T>;
}

template <class T>
int dequantize(const lk_nf4_weight& w, const lk_region& r, T* out, int64_t stride) {
  auto rows = rows_kernel<T>();
#if defined(__x86_64__)
  if (isa() >= Isa::avx512 && streams(w, r, out, stride)) rows = rows_avx512<true, T>;
#endif
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, r.cols));
  parallel_for(r.rows, grain, [&](int64_t begin, int64_t end) { rows(w, r, begin, end, out, stride); });
  return LK_OK;
}

}  // namespace

void decode_weights(const lk_nf4_weight& w, const lk_region& region, float* out, int64_t stride) {
  rows_kernel<float>()(w, region, 0, region.rows, out, stride);
}

}  // namespace lk::cpu

extern "C" int lk_cpu_nf4_dequantize(const lk_nf4_weight* weight, const lk_region* region, void* out,
                                     int dtype, int64_t out_stride) {
  using namespace lk::cpu;
  switch (dtype) {
    case LK_F32: return dequantize(*weight, *region, static_cast<float*>(out), out_stride);
    case LK_F16: return dequantize(*weight, *region, static_cast<Half*>(out), out_stride);
    case LK_BF16: return dequantize(*weight, *region, static_cast<BFloat16*>(out), out_stride);
  }
  return LK_UNSUPPORTED_DTYPE;
}

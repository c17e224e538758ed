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
#include <cstring>
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

LK_INLINE float block_scale(const lk_nf4_weight& w, int64_t block) {
  if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax)[block];
  const float scaled = nf4::kDynamicMap[static_cast<const uint8_t*>(w.absmax)[block]] *
                       w.nested_absmax[block / nf4::kNestedBlock];
  return scaled + *w.offset;  // compiled without contraction: two roundings, as the format says
}

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
template <class T>
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
      _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(index, table));
    }
  } else {
    const __m512 table = _mm512_loadu_ps(values);
    for (; i + 8 <= pairs; i += 8) {
      const __m512i byte =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i)));
      const __m512i low = _mm512_slli_epi64(_mm512_and_si512(byte, _mm512_set1_epi64(15)), 32);
      const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), low);
      _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(index, table));
    }
  }
  lookup_portable(packed + i, pairs - i, values, out + 2 * i);
}
#endif

// The run of `length` weights from flat index `first`.
template <class T, class Lookup>
LK_INLINE void dequantize_run(const lk_nf4_weight& w, int64_t first, int64_t length, T* out,
                              const Lookup& lookup) {
  alignas(64) T values[nf4::kCodes];
  while (length > 0) {
    const int64_t block = first / w.blocksize;
    const int64_t segment = std::min(length, (block + 1) * w.blocksize - first);
    block_values(block_scale(w, block), values);
    const int64_t odd_head = first & 1;  // the run starts in the middle of a byte
    if (odd_head) out[0] = values[w.packed[first / 2] & 15];
    const int64_t pairs = (segment - odd_head) / 2;
    lookup(w.packed + (first + odd_head) / 2, pairs, values, out + odd_head);
    const int64_t done = odd_head + 2 * pairs;
    if (done < segment) out[done] = values[w.packed[(first + done) / 2] >> 4];
    first += segment;
    out += segment;
    length -= segment;
  }
}

template <class T>
void rows_portable(const lk_nf4_weight& w, const lk_region& r, int64_t begin, int64_t end, T* out,
                   int64_t stride) {
  for (int64_t i = begin; i < end; ++i) {
    dequantize_run(w, (r.row + i) * r.in_features + r.col, r.cols, out + i * stride, lookup_portable<T>);
  }
}

#if defined(__x86_64__)
template <class T>
LK_AVX512 void rows_avx512(const lk_nf4_weight& w, const lk_region& r, int64_t begin, int64_t end, T* out,
                           int64_t stride) {
  const auto lookup = [](const uint8_t* packed, int64_t pairs, const T* values, T* to)
                          LK_AVX512 { lookup_avx512(packed, pairs, values, to); };
  for (int64_t i = begin; i < end; ++i) {
    dequantize_run(w, (r.row + i) * r.in_features + r.col, r.cols, out + i * stride, lookup);
  }
}
#endif

template <class T>
int dequantize(const lk_nf4_weight& w, const lk_region& r, void* out, int64_t stride) {
  auto rows = rows_portable<T>;
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) rows = rows_avx512<T>;
#endif
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, r.cols));
  parallel_for(r.rows, grain,
               [&](int64_t begin, int64_t end) { rows(w, r, begin, end, static_cast<T*>(out), stride); });
  return LK_OK;
}

}  // namespace
}  // namespace lk::cpu

extern "C" int lk_cpu_nf4_dequantize(const lk_nf4_weight* weight, const lk_region* region, void* out,
                                     int dtype, int64_t out_stride) {
  using namespace lk::cpu;
  switch (dtype) {
    case LK_F32: return dequantize<float>(*weight, *region, out, out_stride);
    case LK_F16: return dequantize<Half>(*weight, *region, out, out_stride);
    case LK_BF16: return dequantize<BFloat16>(*weight, *region, out, out_stride);
  }
  return LK_UNSUPPORTED_DTYPE;
}

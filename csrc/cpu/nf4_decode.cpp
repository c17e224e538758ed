#include "nf4_decode.h"

#include <algorithm>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lk::cpu {
namespace {

// A run of codes under one second-level scale: two roundings each, as the format says.
LK_INLINE void decode_run(const uint8_t* codes, int64_t n, float nested, float offset, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = nf4::kDynamicMap[codes[i]] * nested;
    out[i] = scaled + offset;
  }
}

#if defined(__x86_64__)
LK_AVX2 void decode_run_avx2(const uint8_t* codes, int64_t n, float nested, float offset, float* out) {
  const __m256 factor = _mm256_set1_ps(nested), addend = _mm256_set1_ps(offset);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256 scaled = _mm256_mul_ps(_mm256_i32gather_ps(nf4::kDynamicMap.data(), index, 4), factor);
    _mm256_storeu_ps(out + i, _mm256_add_ps(scaled, addend));
  }
  decode_run(codes + i, n - i, nested, offset, out + i);
}

LK_AVX512 void decode_run_avx512(const uint8_t* codes, int64_t n, float nested, float offset, float* out) {
  const __m512 factor = _mm512_set1_ps(nested), addend = _mm512_set1_ps(offset);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m512 scaled = _mm512_mul_ps(_mm512_i32gather_ps(index, nf4::kDynamicMap.data(), 4), factor);
    _mm512_storeu_ps(out + i, _mm512_add_ps(scaled, addend));
  }
  decode_run(codes + i, n - i, nested, offset, out + i);
}
#endif

}  // namespace

void decode_scales(const lk_nf4_weight& w, int64_t first_block, int64_t count, float* out) {
  if (w.nested_absmax == nullptr) {
    std::copy_n(static_cast<const float*>(w.absmax) + first_block, count, out);
    return;
  }
  auto run = [](const uint8_t* codes, int64_t n, float nested, float offset, float* to) {
    decode_run(codes, n, nested, offset, to);
  };
  void (*decode)(const uint8_t*, int64_t, float, float, float*) = run;
#if defined(__x86_64__)
  if (isa() >= Isa::avx2) decode = decode_run_avx2;
  if (isa() >= Isa::avx512) decode = decode_run_avx512;
#endif
  const auto* codes = static_cast<const uint8_t*>(w.absmax);
  for (int64_t block = first_block, end = first_block + count; block < end;) {
    const int64_t nested = block / nf4::kNestedBlock, stop = std::min(end, (nested + 1) * nf4::kNestedBlock);
    decode(codes + block, stop - block, w.nested_absmax[nested], *w.offset, out + (block - first_block));
    block = stop;
  }
}

}  // namespace lk::cpu

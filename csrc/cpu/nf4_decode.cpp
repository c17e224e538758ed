// decode_scales on a CPU: see nf4_decode.h.
//
// Runs on the thread that calls it, a few dozen scales at a time. 1 byte read and 4 written per scale, which
// stay in the caches: what bounds it is the look-up in the map of 256 entries (1 KiB, in L1), a gather.
#include "nf4_decode.h"

#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lk::cpu {
namespace {

// `count` scale codes of one second-level block.
void decode_portable(const uint8_t* codes, int64_t count, float nested, float offset, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = nf4::kDynamicMap[codes[i]] * nested + offset;
}

#if defined(__x86_64__)
LK_AVX2 void decode_avx2(const uint8_t* codes, int64_t count, float nested, float offset, float* out) {
  const __m256 factor = _mm256_set1_ps(nested), shift = _mm256_set1_ps(offset);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256 entry = _mm256_i32gather_ps(nf4::kDynamicMap.data(), index, 4);
    _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_mul_ps(entry, factor), shift));
  }
  decode_portable(codes + i, count - i, nested, offset, out + i);
}

LK_AVX512 void decode_avx512(const uint8_t* codes, int64_t count, float nested, float offset, float* out) {
  const __m512 factor = _mm512_set1_ps(nested), shift = _mm512_set1_ps(offset);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, codes + i));
    const __m512 entry = _mm512_i32gather_ps(index, nf4::kDynamicMap.data(), 4);
    _mm512_mask_storeu_ps(out + i, lanes, _mm512_add_ps(_mm512_mul_ps(entry, factor), shift));
  }
}
#endif

}  // namespace

void decode_scales(const lk_nf4_weight& w, int64_t first_block, int64_t count, float* out) {
  if (count <= 0) return;
  if (w.nested_absmax == nullptr) {
    std::memcpy(out, static_cast<const float*>(w.absmax) + first_block,
                static_cast<size_t>(count) * sizeof(float));
    return;
  }
  auto decode = decode_portable;
#if defined(__x86_64__)
  if (isa() >= Isa::avx2) decode = isa() >= Isa::avx512 ? decode_avx512 : decode_avx2;
#endif
  const uint8_t* codes = static_cast<const uint8_t*>(w.absmax);
  const float offset = *w.offset;
  for (int64_t block = first_block, end = first_block + count; block < end;) {
    const int64_t nested = block / nf4::kNestedBlock;
    const int64_t stop = std::min(end, (nested + 1) * nf4::kNestedBlock);
    decode(codes + block, stop - block, w.nested_absmax[nested], offset, out + (block - first_block));
    block = stop;
  }
}

}  // namespace lk::cpu

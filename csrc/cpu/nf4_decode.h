// What decodes an NF4 weight inside other kernels, on the thread that calls it. Its scales, one at a time and
// many at a time:
//
//   scale[b] = dynamic_map[q[b]] * nested_absmax[b / 256] + offset      (two roundings; nf4.h)
//
// or absmax[b] as it is, where the scales are not quantised themselves. And its weights, as nf4_dequantize
// has them in fp32.
#pragma once
#include <cstdint>

#include "../api.h"
#include "../nf4.h"
#include "isa.h"

namespace lk::cpu {

LK_INLINE float block_scale(const lk_nf4_weight& w, int64_t block) {
  if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax)[block];
  const float scaled = nf4::kDynamicMap[static_cast<const uint8_t*>(w.absmax)[block]] *
                       w.nested_absmax[block / nf4::kNestedBlock];
  return scaled + *w.offset;  // compiled without contraction: two roundings, as the format says
}

// out[i] = block_scale(w, first_block + i), i < count: the same bits. Made for a row's scales at a time:
// each call chooses the instruction set anew.
void decode_scales(const lk_nf4_weight& w, int64_t first_block, int64_t count, float* out);

// The region of W -> out [rows, cols], wherever its rows start and its blocks lie (nf4_dequantize.cpp).
void decode_weights(const lk_nf4_weight& w, const lk_region& region, float* out, int64_t stride);

}  // namespace lk::cpu

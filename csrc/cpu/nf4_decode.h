// Scales of an NF4 weight, for every CPU kernel that decodes one.
#pragma once
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

// The fp32 scales of blocks [first_block, first_block + count).
void decode_scales(const lk_nf4_weight& w, int64_t first_block, int64_t count, float* out);

}  // namespace lk::cpu

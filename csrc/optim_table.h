// The table of an optimizer's step on the host: its check, and the numbers that all elements of a step share.
#pragma once
#include <cmath>

#include "optim_state.h"

namespace lk::optim {

// Whether every segment lies inside its page and its parameter, at the alignments that the kernels rely on.
inline bool table_fits(const lk_optim_step& s) {
  for (int64_t i = 0; i < s.segment_count; ++i) {
    const lk_optim_segment& row = s.segments[i];
    if (row.page < 0 || row.page >= s.page_count || row.parameter < 0 || row.parameter >= s.parameter_count) {
      return false;
    }
    const int64_t n = s.parameters[row.parameter].n;
    if (row.first < 0 || row.first % kBlock != 0 || row.count < 0 || row.count > INT32_MAX || row.count > n ||
        row.first > n - row.count)
      return false;
    const int64_t bytes = state_layout(s.op, row.count, s.dtype, s.rounding).bytes;
    if (row.offset < kHeaderBytes || row.offset % kPieceAlignment != 0 ||
        row.offset > s.pages[row.page].bytes - bytes) {
      return false;
    }
    if (row.step < 1 || row.step > INT32_MAX || row.id < 0 || row.id > UINT32_MAX) return false;
  }
  return true;
}

// What the elements of a call share. Computed in double, rounded once.
struct Numbers {
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float lr, decay, eps;              // decay = 1 - lr·weight_decay
};
inline Numbers numbers_of(const lk_optim_step& s) {
  return {static_cast<float>(s.beta1), static_cast<float>(1 - s.beta1),
          static_cast<float>(s.beta2), static_cast<float>(1 - s.beta2),
          static_cast<float>(s.lr),    static_cast<float>(1 - s.lr * s.weight_decay),
          static_cast<float>(s.eps)};
}

// What those of a parameter share: lr/(1-β1^t) and 1/√(1-β2^t).
struct Correction {
  float step_size, root;
};
inline Correction correction_of(const lk_optim_step& s, int64_t t) {
  const double step = static_cast<double>(t);
  return {static_cast<float>(s.lr / (1 - std::pow(s.beta1, step))),
          static_cast<float>(1 / std::sqrt(1 - std::pow(s.beta2, step)))};
}

}  // namespace lk::optim

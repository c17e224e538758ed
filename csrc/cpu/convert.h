// Runs of elements of any of the three dtypes, from and to fp32. Always inline: compiled for the instruction
// set of the caller.
#pragma once
#include "../api.h"
#include "half.h"
#include "isa.h"

namespace lk::cpu {

template <class T>
LK_INLINE void read_run(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

template <class T>
LK_INLINE void write_run(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
}

// Elements [at, at + n) of `data`.
LK_INLINE void read_floats(const void* data, int dtype, int64_t at, int64_t n, float* to) {
  switch (dtype) {
    case LK_F32: return read_run(static_cast<const float*>(data) + at, n, to);
    case LK_F16: return read_run(static_cast<const Half*>(data) + at, n, to);
    default: return read_run(static_cast<const BFloat16*>(data) + at, n, to);
  }
}

LK_INLINE void write_floats(const float* from, int64_t n, void* data, int dtype, int64_t at) {
  switch (dtype) {
    case LK_F32: return write_run(from, n, static_cast<float*>(data) + at);
    case LK_F16: return write_run(from, n, static_cast<Half*>(data) + at);
    default: return write_run(from, n, static_cast<BFloat16*>(data) + at);
  }
}

}  // namespace lk::cpu

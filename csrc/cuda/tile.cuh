// Tiles in shared memory and the rings that bring them, built on ptx.cuh.
#pragma once
#include "ptx.cuh"

namespace lk {

// Where 16-byte chunk `chunk` (of 8) of row `row` of a tile of 128-byte rows lies: eight rows of one chunk,
// which is what ldmatrix and fragments read at a time, are then in different banks. TMA's 128-byte swizzle is
// the same.
__host__ __device__ __forceinline__ int swizzled(int row, int chunk) { return chunk ^ (row & 7); }

// Where a pipeline of kStages stages is: the stage, and the parity of the round, which is what mbarriers wait
// for.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

}  // namespace lk

// Memory of a thread's own for the panels and sums of a product: kept for the life of the thread, grown to
// the largest use. One caller at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace lk::cpu {

// At least `floats` floats from a cache line's start, of any content.
inline float* scratch(size_t floats) {
  struct Memory {
    std::unique_ptr<float[]> storage;
    size_t size = 0;
  };
  thread_local Memory mine;
  if (floats > mine.size) {
    mine.storage.reset(new float[floats + 16]);
    mine.size = floats;
  }
  const auto address = reinterpret_cast<uintptr_t>(mine.storage.get());
  return mine.storage.get() + (64 - address % 64) % 64 / sizeof(float);
}

}  // namespace lk::cpu

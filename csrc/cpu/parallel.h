// torch's thread pool through its stable C interface, so that our kernels and torch's never oversubscribe the
// cores.
#pragma once
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lk::cpu {

// Calls f(begin, end) on ranges that cover [0, n), each of at least `grain` items (but the last). f must not
// throw. Threads take the next range when they are done with one: a thread that wakes up late, or whose core
// is busy with something else, then holds up nobody. Which thread gets which range is not determined, so f's
// results may not depend on it.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  constexpr int64_t kMostRanges = 64;
  const int64_t step = std::max({grain, int64_t{1}, (n + kMostRanges - 1) / kMostRanges});
  struct Work {
    const F& f;
    int64_t n, step;
    std::atomic<int64_t> next{0};
  } work{f, n, step};
  const auto call = [](int64_t, int64_t, void* context) {
    Work& mine = *static_cast<Work*>(context);
    for (int64_t begin; (begin = mine.next.fetch_add(mine.step, std::memory_order_relaxed)) < mine.n;) {
      mine.f(begin, std::min(mine.n, begin + mine.step));
    }
  };
  torch_parallel_for(0, (n + step - 1) / step, 1, call, &work);
}

}  // namespace lk::cpu

// torch's thread pool through its stable C interface, so that our kernels and torch's never oversubscribe the
// cores.
#pragma once
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>

namespace lk::cpu {

// Calls f(begin, end) on ranges that cover [0, n), each of at least `grain` items. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  torch_parallel_for(0, n, std::max<int64_t>(grain, 1), call, const_cast<F*>(&f));
}

}  // namespace lk::cpu

// lora_linear for T <= 8 on sm_90 and later: the slices of K are the blocks of a cluster, and meet through
// distributed shared memory. No workspace, no counters. The kernel is in lora_linear_decode.cuh.
#include "lora_linear_decode.cuh"
#include "ptx_sm90.cuh"

namespace lk::cuda::decode {
namespace {

// Each block keeps its sums [T][rows]; then every block adds a part of the rows, over the ranks in their
// order.
struct ClusterExchange {
  static constexpr bool kClustered = true;

  static __device__ __forceinline__ void put(const Problem& p, Shared<char> shared, const Layout& l, int, int,
                                             int row, int token, float sum) {
    cast<float>(shared + l.partial)[token * p.rows + row] = sum;
  }

  template <int kDtype>
  static __device__ __forceinline__ void reduce(const Problem& p, Shared<char> shared, const Layout& l,
                                                int group, int slice, int64_t first_row, int rows,
                                                int thread) {
    ptx::cluster_arrive();
    ptx::cluster_wait();  // every block's sums and h are there
    for (int i = slice * kThreads + thread; i < p.tokens * rows; i += p.slices * kThreads) {
      const int token = i / rows, row = i % rows;
      float sum = 0;
      for (int s = 0; s < p.slices; ++s) {
        const Shared<float> theirs =
            cast<float>(ptx::map_shared_rank(shared + l.partial, static_cast<uint32_t>(s)));
        sum += theirs[token * p.rows + row];
      }
      finish<kDtype>(p, first_row + row, token, sum);
    }
    for (int i = slice * kThreads + thread; group == 0 && i < p.rank * p.tokens; i += p.slices * kThreads) {
      float sum = 0;
      for (int s = 0; s < p.slices; ++s) {
        const Shared<float> theirs =
            cast<float>(ptx::map_shared_rank(shared + l.h, static_cast<uint32_t>(s)));
        sum += theirs[i % p.rank * kMostTokens + i / p.rank];
      }
      p.h[i] = round_to<kDtype>(sum);
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();  // nobody leaves while its shared memory is read
  }
};

}  // namespace
}  // namespace lk::cuda::decode

extern "C" int lk_cuda_lora_linear_decode_clustered(const lk_matrix* x, int64_t tokens,
                                                    const lk_base_weight* base, const lk_adapter* adapter,
                                                    const lk_matrix* bias, void* y, void* h, void* stream) {
  return lk::cuda::decode::run<lk::cuda::decode::ClusterExchange>(
      "lora_linear_decode_clustered", x, tokens, base, adapter, bias, y, h, nullptr, nullptr, stream);
}

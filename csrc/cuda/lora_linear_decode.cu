// lora_linear for T <= 8 on sm_80 and later: slices of K meet through global memory. The kernel is in
// lora_linear_decode.cuh; sm_90 and later have lora_linear_decode_sm90.cu besides.
#include "lora_linear_decode.cuh"

extern "C" int lk_cuda_lora_linear_decode(const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
                                          const lk_adapter* adapter, const lk_matrix* bias, void* y, void* h,
                                          void* workspace, uint32_t* counters, void* stream) {
  return lk::cuda::decode::run<lk::cuda::decode::GlobalExchange>(
      "lora_linear_decode", x, tokens, base, adapter, bias, y, h, workspace, counters, stream);
}

extern "C" lk_scratch lk_cuda_lora_linear_decode_scratch(int64_t tokens, int64_t out_features,
                                                         int64_t in_features, int64_t rank, int nf4,
                                                         int clustered) {
  using namespace lk::cuda;
  const decode::Plan plan =
      decode::make_plan(nf4 != 0, out_features, in_features, rank, device_info(), clustered != 0);
  return {4 * plan.workspace_floats(tokens, rank, clustered != 0), clustered != 0 ? 0 : plan.groups};
}

// Whether the kernel takes a problem: rows of 64 weights that share a scale, which 16 bytes divide, and a
// slice of K that fits a block's shared memory.
extern "C" int lk_cuda_lora_linear_decode_takes(int64_t tokens, const lk_base_weight* base, int64_t rank) {
  using namespace lk::cuda::decode;
  using lk::cuda::aligned_rows;
  const int64_t k = base->in_features;
  if (tokens < 1 || tokens > kMostTokens || k < kUnit || k % kUnit != 0 || base->out_features < 1 ||
      rank > kMostRank) {
    return 0;
  }
  const bool nf4 = base->nf4 != nullptr;
  const lk::cuda::DeviceInfo device = lk::cuda::device_info();
  if (make_plan(nf4, base->out_features, k, rank, device, false).rows == 0 ||
      (device.capability >= 90 && make_plan(nf4, base->out_features, k, rank, device, true).rows == 0)) {
    return 0;
  }
  if (!nf4) return aligned_rows(base->dense.data, base->dense.stride, 2) ? 1 : 0;
  return base->nf4->blocksize >= kUnit && k % base->nf4->blocksize == 0 &&
         aligned_rows(base->nf4->packed, k / 2, 1);
}

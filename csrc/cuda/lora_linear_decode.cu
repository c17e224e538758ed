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

extern "C" int lk_cuda_lora_linear_decode_takes(int64_t out_features, int64_t in_features, int64_t rank,
                                                int nf4, int clustered) {
  using namespace lk::cuda;
  return in_features > 0 &&
         decode::make_plan(nf4 != 0, out_features, in_features, rank, device_info(), clustered != 0).rows > 0;
}

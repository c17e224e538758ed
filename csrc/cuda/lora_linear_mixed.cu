// The launcher of lora_linear_mixed.cuh.
#include "lora_linear_mixed.cuh"

namespace lk::cuda::mixed {
namespace {

template <int kDtype, bool kNf4, int kTokens>
int run(const Problem& p, const Plan& plan, void* stream) {
  const LaunchShape shape{static_cast<unsigned>(plan.tiles * plan.slices), 1, 1, kThreads,
                          Shape<kNf4, kTokens>::kBytes};
  return launch("lora_linear_mixed", lora_linear_mixed<kDtype, kNf4, kTokens>, shape, stream, p);
}

template <int kDtype, bool kNf4>
int run_tokens(const Problem& p, const Plan& plan, void* stream) {
  switch (plan.token_tile) {
    case 16: return run<kDtype, kNf4, 16>(p, plan, stream);
    case 32: return run<kDtype, kNf4, 32>(p, plan, stream);
    default: return run<kDtype, kNf4, 64>(p, plan, stream);
  }
}

}  // namespace
}  // namespace lk::cuda::mixed

extern "C" int lk_cuda_lora_linear_mixed(const lk_matrix* x, int64_t tokens, const lk_base_weight* base,
                                         const lk_adapter* adapter, const lk_matrix* bias,
                                         const void* given_h, void* y, void* h, void* workspace,
                                         uint32_t* counters, void* stream) {
  using namespace lk::cuda;
  if (x->dtype != LK_BF16 && x->dtype != LK_F16) return LK_UNSUPPORTED_DTYPE;
  if (given_h == nullptr && adapter->rank > 0 && adapter->lora_A.dtype != x->dtype) {
    return LK_UNSUPPORTED_DTYPE;
  }
  const mixed::Plan plan =
      mixed::make_plan(tokens, base->out_features, base->in_features, device_info().multiprocessors);
  const mixed::Problem p{lora_linear_operands(*x, tokens, *base, *adapter, *bias, y, h),
                         given_h != nullptr,
                         lk::Global<const uint16_t>(static_cast<const uint16_t*>(given_h)),
                         lk::Global<float>(static_cast<float*>(workspace)),
                         lk::Global<uint32_t>(counters),
                         plan.slice_k,
                         plan.slices,
                         plan.row_tiles};
  const bool nf4 = base->nf4 != nullptr;
  if (x->dtype == LK_BF16) {
    return nf4 ? mixed::run_tokens<LK_BF16, true>(p, plan, stream)
               : mixed::run_tokens<LK_BF16, false>(p, plan, stream);
  }
  return nf4 ? mixed::run_tokens<LK_F16, true>(p, plan, stream)
             : mixed::run_tokens<LK_F16, false>(p, plan, stream);
}

extern "C" int lk_cuda_lora_linear_mixed_takes(const lk_base_weight* base, int64_t rank) {
  using lk::cuda::aligned_rows, lk::cuda::mixed::kUnit;
  const int64_t k = base->in_features;
  if (k < kUnit || k % kUnit != 0 || base->out_features < 1 || rank > lk::cuda::mixed::kMostRank) return 0;
  if (base->nf4 == nullptr) return aligned_rows(base->dense.data, base->dense.stride, 2) ? 1 : 0;
  return base->nf4->blocksize >= kUnit && k % base->nf4->blocksize == 0 &&
         aligned_rows(base->nf4->packed, k / 2, 1);
}

extern "C" lk_scratch lk_cuda_lora_linear_mixed_scratch(int64_t tokens, int64_t out_features,
                                                        int64_t in_features, int64_t rank) {
  using namespace lk::cuda;
  const mixed::Plan plan = mixed::make_plan(tokens, out_features, in_features, device_info().multiprocessors);
  return {4 * plan.workspace_floats(rank), plan.slices > 1 ? plan.tiles : 0};
}

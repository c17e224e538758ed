// The launcher of lora_linear_backward_dx.cuh.
#include "lora_linear_backward_dx.cuh"

namespace lk::cuda::backward_dx {
namespace {

template <int kDtype, bool kNf4, int kTokens>
int run(const Problem& p, const Plan& plan, void* stream) {
  const LaunchShape shape{static_cast<unsigned>(plan.tiles * plan.slices), 1, 1, kThreads,
                          Shape<kNf4, kTokens>::kBytes};
  return launch("lora_linear_backward_dx", lora_linear_backward_dx<kDtype, kNf4, kTokens>, shape, stream, p);
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
}  // namespace lk::cuda::backward_dx

extern "C" int lk_cuda_lora_linear_backward_dx(const lk_matrix* dy, int64_t tokens,
                                               const lk_base_weight* base, const lk_adapter* adapter,
                                               const void* g, int64_t g_stride, void* dx, void* workspace,
                                               uint32_t* counters, void* stream) {
  using namespace lk::cuda;
  if (dy->dtype != LK_BF16 && dy->dtype != LK_F16) return LK_UNSUPPORTED_DTYPE;
  if (adapter->rank > 0 && adapter->lora_A.dtype != dy->dtype) return LK_UNSUPPORTED_DTYPE;
  const backward_dx::Plan plan =
      backward_dx::make_plan(tokens, base->out_features, base->in_features, device_info().multiprocessors);
  const lk_matrix none = {nullptr, LK_F32, 0};
  const backward_dx::Problem p{
      lora_linear_operands(*dy, tokens, *base, *adapter, none, dx, const_cast<void*>(g)),
      matrix_of(*dy),
      g_stride,
      dropout_of(adapter->dropout_p, adapter->rng),
      lk::Global<float>(static_cast<float*>(workspace)),
      lk::Global<uint32_t>(counters),
      plan.slice_n,
      plan.slices,
      plan.column_tiles};
  const bool nf4 = base->nf4 != nullptr;
  if (dy->dtype == LK_BF16) {
    return nf4 ? backward_dx::run_tokens<LK_BF16, true>(p, plan, stream)
               : backward_dx::run_tokens<LK_BF16, false>(p, plan, stream);
  }
  return nf4 ? backward_dx::run_tokens<LK_F16, true>(p, plan, stream)
             : backward_dx::run_tokens<LK_F16, false>(p, plan, stream);
}

extern "C" lk_scratch lk_cuda_lora_linear_backward_dx_scratch(int64_t tokens, int64_t out_features,
                                                              int64_t in_features) {
  using namespace lk::cuda;
  const backward_dx::Plan plan =
      backward_dx::make_plan(tokens, out_features, in_features, device_info().multiprocessors);
  return {4 * plan.workspace_floats(), plan.slices > 1 ? plan.tiles : 0};
}

// The launchers of lora_linear_backward_sweep.cuh.
#include "lora_linear_backward_sweep.cuh"

namespace lk::cuda::sweep {
namespace {

template <int kDtype, int kRankTiles>
int run(const Problem& p, const Plan& plan, void* stream) {
  const LaunchShape shape{static_cast<unsigned>(plan.strips), static_cast<unsigned>(plan.spans),
                          static_cast<unsigned>(plan.chunks), kThreads, Shape<kRankTiles>::kBytes};
  const int status = p.ones_out != nullptr
                         ? launch("lora_linear_backward_sweep",
                                  lora_linear_backward_sweep<kDtype, kRankTiles, true>, shape, stream, p)
                         : launch("lora_linear_backward_sweep",
                                  lora_linear_backward_sweep<kDtype, kRankTiles, false>, shape, stream, p);
  const int ranks = Shape<kRankTiles>::kRanks;
  const int64_t row_elements = p.row_out != nullptr && p.strips > 1 ? p.rows.count * p.row_stride : 0;
  const int64_t elements =
      p.tokens_wanted && plan.slots > 0 ? p.rows.adapters * p.columns * p.chunks * (ranks + 1) : 0;
  if (status != LK_OK || row_elements + elements == 0) return status;
  const LaunchShape reduce{static_cast<unsigned>((row_elements + elements + 255) / 256), 1, 1, 256};
  return launch("lora_linear_backward_reduce", lora_linear_backward_reduce<kDtype>, reduce, stream, p, ranks,
                row_elements, elements);
}

template <int kDtype>
int run_ranks(const Problem& p, const Plan& plan, void* stream) {
  switch (plan.rank_tiles) {
    case 2: return run<kDtype, 2>(p, plan, stream);
    case 4: return run<kDtype, 4>(p, plan, stream);
    default: return run<kDtype, 8>(p, plan, stream);
  }
}

Problem operands(const lk_matrix& z, int64_t columns, const lk_rows& rows, const lk_matrix& v,
                 const Plan& plan, void* workspace, int64_t row_floats) {
  Problem p{};
  p.rows = rows_of(rows), p.columns = columns, p.z = matrix_of(z), p.v = matrix_of(v);
  p.row_partial = Global<float>(static_cast<float*>(workspace));
  p.partial = p.row_partial + row_floats;
  p.span_rows = plan.span_rows, p.strips = plan.strips, p.chunks = plan.chunks;
  return p;
}

int launch_it(const Problem& p, const Plan& plan, int dtype, void* stream) {
  return dtype == LK_BF16 ? run_ranks<LK_BF16>(p, plan, stream) : run_ranks<LK_F16>(p, plan, stream);
}

}  // namespace
}  // namespace lk::cuda::sweep

extern "C" int lk_cuda_lora_linear_backward_dy(const lk_matrix* dy, int64_t out_features, const lk_rows* rows,
                                               const lk_adapter* adapters, const lk_matrix* h, void* g,
                                               int64_t g_stride, const lk_matrix* dB, float* dbias,
                                               void* workspace, void* stream) {
  using namespace lk::cuda;
  if (dy->dtype != LK_BF16 && dy->dtype != LK_F16) return LK_UNSUPPORTED_DTYPE;
  const int64_t rank = most_rank(*rows, adapters);
  const sweep::Plan plan =
      sweep::make_plan(rows->count, rows->adapters, out_features, rank, device_info().multiprocessors);
  const int64_t row_floats = g != nullptr ? plan.row_floats(rows->count, g_stride) : 0;
  sweep::Problem p = sweep::operands(*dy, out_features, *rows, *h, plan, workspace, row_floats);
  p.row_out = lk::Global<uint16_t>(static_cast<uint16_t*>(g)), p.row_stride = g_stride;
  p.ones_out = lk::Global<float>(dbias);
  p.tokens_wanted = dbias != nullptr;
  for (int64_t a = 0; a < rows->adapters; ++a) {
    const lk_adapter& from = adapters[a];
    p.w[a] = matrix_of(from.lora_B), p.rank[a] = static_cast<int>(from.rank);
    p.scale[a] = static_cast<float>(from.scaling / (1 - from.dropout_p));
    if (dB != nullptr && dB[a].data != nullptr) {
      p.out[a] = {lk::Global<void>(const_cast<void*>(dB[a].data)), dB[a].dtype};
      p.tokens_wanted = true;
    }
  }
  return sweep::launch_it(p, plan, dy->dtype, stream);
}

extern "C" int lk_cuda_lora_linear_backward_x(const lk_matrix* x, int64_t in_features, const lk_rows* rows,
                                              const lk_adapter* adapters, const lk_matrix* g,
                                              const lk_matrix* dA, void* workspace, void* stream) {
  using namespace lk::cuda;
  if (x->dtype != LK_BF16 && x->dtype != LK_F16) return LK_UNSUPPORTED_DTYPE;
  const int64_t rank = most_rank(*rows, adapters);
  const sweep::Plan plan =
      sweep::make_plan(rows->count, rows->adapters, in_features, rank, device_info().multiprocessors);
  sweep::Problem p = sweep::operands(*x, in_features, *rows, *g, plan, workspace, 0);
  p.tokens_wanted = p.transposed = true;
  p.dropout = dropout_of(adapters[0].dropout_p, adapters[0].rng);
  for (int64_t a = 0; a < rows->adapters; ++a) {
    p.rank[a] = static_cast<int>(adapters[a].rank), p.scale[a] = 1;
    if (dA[a].data != nullptr) {
      p.out[a] = {lk::Global<void>(const_cast<void*>(dA[a].data)), dA[a].dtype};
    }
  }
  return sweep::launch_it(p, plan, x->dtype, stream);
}

extern "C" int64_t lk_cuda_lora_linear_backward_sweep_workspace(int64_t rows, int64_t adapters,
                                                                int64_t columns, int64_t most_rank,
                                                                int64_t row_stride) {
  using namespace lk::cuda;
  const sweep::Plan plan =
      sweep::make_plan(rows, adapters, columns, most_rank, device_info().multiprocessors);
  return 4 * (plan.row_floats(rows, row_stride) + plan.partial_floats(columns));
}

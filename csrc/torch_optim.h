// From the tensors of adamw_step and its relatives to the struct of api.h. These tensors are checked here,
// and not in Python: of some thousand small parameters that would take longer than their step.
#pragma once
#include "torch_tensors.h"

namespace lk::glue {

class OptimStep {
 public:
  OptimStep(int op, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
            const std::vector<Tensor>& pages, const Tensor& segments, int64_t tick, double lr, double beta1,
            double beta2, double eps, double weight_decay, int64_t rounding, int64_t seed)
      : step_{} {
    fits_ = params.size() == grads.size() && is(segments, ScalarType::Long, 2) && segments.is_cpu() &&
            segments.size(1) == kColumns && segments.is_contiguous();
    if (!fits_) return;
    const Tensor& first = !pages.empty() ? pages[0] : !params.empty() ? params[0] : segments;
    const auto here = [device = first.get_device(), cpu = first.is_cpu()](const Tensor& t) {
      return t.get_device() == device && t.is_cpu() == cpu && t.is_contiguous();
    };
    const ScalarType dtype = params.empty() ? ScalarType::Float : params[0].scalar_type();
    parameters_.reserve(params.size()), pages_.reserve(pages.size());
    for (size_t i = 0; i < params.size(); ++i) {
      const Tensor &p = params[i], &g = grads[i];
      const ScalarType grad_dtype = g.scalar_type();
      fits_ = fits_ && p.scalar_type() == dtype && dtype_of(p) >= 0 && here(p) && here(g) &&
              g.numel() == p.numel() && (grad_dtype == dtype || grad_dtype == ScalarType::Float);
      if (!fits_) return;
      parameters_.push_back({p.mutable_data_ptr(), g.const_data_ptr(), p.numel(), dtype_of(g)});
    }
    for (const Tensor& page : pages) {
      void* data = page.mutable_data_ptr();
      fits_ = fits_ && is(page, ScalarType::Byte, 1) && here(page) && page.size(0) >= kLeastPage &&
              reinterpret_cast<uintptr_t>(data) % 64 == 0;
      if (!fits_) return;
      pages_.push_back({data, page.size(0)});
    }
    static_assert(sizeof(lk_optim_segment) == kColumns * sizeof(int64_t));
    step_ = {op,
             static_cast<int>(rounding),
             lr,
             beta1,
             beta2,
             eps,
             weight_decay,
             seed,
             tick,
             params.empty() ? LK_F32 : dtype_of(params[0]),
             parameters_.data(),
             static_cast<int64_t>(parameters_.size()),
             pages_.data(),
             static_cast<int64_t>(pages_.size()),
             static_cast<const lk_optim_segment*>(segments.const_data_ptr()),
             segments.size(0)};
  }
  OptimStep(const OptimStep&) = delete;
  OptimStep& operator=(const OptimStep&) = delete;

  bool fits() const { return fits_; }
  const lk_optim_step* get() const { return &step_; }

 private:
  static constexpr int64_t kColumns = 7, kLeastPage = 64;
  static bool is(const Tensor& t, ScalarType dtype, int64_t dimensions) {
    return t.scalar_type() == dtype && t.dim() == dimensions;
  }

  bool fits_;
  std::vector<lk_optim_parameter> parameters_;
  std::vector<lk_optim_page> pages_;
  lk_optim_step step_;
};

// One schema for the four of them; Lion's eps is not used.
template <class Library>
void define_optim_overloads(Library& m) {
#define LK_OPTIM_SCHEMA(name)                                                                               \
  name ".status(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] pages, Tensor segments, int tick, float " \
       "lr, float beta1, float beta2, float eps, float weight_decay, int rounding, int seed) -> int"
  m.def(LK_OPTIM_SCHEMA("adamw_step"));
  m.def(LK_OPTIM_SCHEMA("adamw8bit_step"));
  m.def(LK_OPTIM_SCHEMA("lion_step"));
  m.def(LK_OPTIM_SCHEMA("lion8bit_step"));
#undef LK_OPTIM_SCHEMA
}

}  // namespace lk::glue

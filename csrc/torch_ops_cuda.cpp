// Dispatch glue of the CUDA launchers on torch's stable ABI. Compiled with LK_SIMT it is the glue of the same
// launchers on the host stand-in: the ops of namespace lora_kernels_simt, which take CPU tensors and tell the
// stand-in which memory a kernel may read and write.
#include "torch_optim.h"
#include "torch_tensors.h"

#ifdef LK_SIMT
#include "simt/device.h"
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// A CPU build of torch does not have this symbol: weak, and looked at before use.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace {

using namespace lk::glue;

#ifdef LK_SIMT

// One launch and the memory it may touch.
class Call {
 public:
  explicit Call(const Tensor&) { simt::clear_memory(); }
  ~Call() { simt::clear_memory(); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void input(const char* name, const Tensor& t) { add(name, t, simt::Use::input); }
  void input(const char* name, const std::optional<Tensor>& t) {
    if (t) input(name, *t);
  }
  // Every byte of an output is poisoned, and must be written. Rows of a larger tensor hold what lies between
  // them.
  void output(const char* name, const Tensor& t) {
    const bool whole = t.dim() < 2 || t.size(0) <= 1 || t.stride(0) == t.size(1);
    add(name, t, whole ? simt::Use::output : simt::Use::inout);
  }
  void output(const char* name, const std::optional<Tensor>& t) {
    if (t) output(name, *t);
  }
  void inout(const char* name, const Tensor& t) { add(name, t, simt::Use::inout); }

  void* stream() const { return nullptr; }
  bool ready() const { return true; }
  int64_t end(int64_t status) const {
    if (status != LK_OK) return status;
    try {
      simt::check_outputs_written();
    } catch (const simt::Error& error) {
      lk::cuda::last_error() = error.what();
      return LK_LAUNCH_FAILED;
    }
    return LK_OK;
  }

 private:
  static void add(const char* name, const Tensor& t, simt::Use use) {
    if (t.numel() == 0) return;
    int64_t elements = 1;
    for (int64_t d = 0; d < t.dim(); ++d) elements += (t.size(d) - 1) * t.stride(d);
    simt::add_memory(name, const_cast<void*>(t.const_data_ptr()),
                     static_cast<size_t>(elements) * t.element_size(), use);
  }
};

#else

// The device and the stream of a launch.
class Call {
 public:
  explicit Call(const Tensor& on) : guard_(on.get_device()) {
    ready_ = aoti_torch_get_current_cuda_stream != nullptr &&
             aoti_torch_get_current_cuda_stream(on.get_device(), &stream_) == AOTI_TORCH_SUCCESS;
  }
  template <class T>
  void input(const char*, const T&) {}
  template <class T>
  void output(const char*, const T&) {}
  template <class T>
  void inout(const char*, const T&) {}
  void* stream() const { return stream_; }
  bool ready() const { return ready_; }
  int64_t end(int64_t status) const { return status; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  bool ready_ = false;
};

#endif

// scratch: int64 [2 + LK_NF4_PARTIAL_SUMS]. Zero before: [0], not zero after a NaN or an infinity; [1], the
// arrivals.
int64_t nf4_quantize_cuda(const Tensor weight, int64_t blocksize, Tensor packed, Tensor absmax,
                          std::optional<Tensor> codes, std::optional<Tensor> nested_absmax,
                          std::optional<Tensor> offset, std::optional<Tensor> scratch) {
  if (!scratch) return LK_LAUNCH_FAILED + 1;  // cudaErrorInvalidValue
  Call call(packed);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("weight", weight), call.output("packed", packed), call.output("absmax", absmax);
  call.output("codes", codes), call.output("nested_absmax", nested_absmax), call.output("offset", offset);
  call.inout("scratch", *scratch);
  int64_t* words = static_cast<int64_t*>(scratch->mutable_data_ptr());
  float* scales = static_cast<float*>(absmax.mutable_data_ptr());
  const int status = lk_cuda_nf4_quantize(weight.const_data_ptr(), dtype_of(weight), weight.numel(),
                                          blocksize, static_cast<uint8_t*>(packed.mutable_data_ptr()), scales,
                                          reinterpret_cast<uint32_t*>(words), call.stream());
  if (status != LK_OK || !codes) return call.end(status);
  return call.end(lk_cuda_nf4_quantize_absmax(
      scales, absmax.numel(), static_cast<uint8_t*>(codes->mutable_data_ptr()),
      static_cast<float*>(nested_absmax->mutable_data_ptr()), static_cast<float*>(offset->mutable_data_ptr()),
      reinterpret_cast<uint32_t*>(words + 1), reinterpret_cast<double*>(words + 2), call.stream()));
}

int64_t nf4_dequantize_cuda(const Tensor packed, const Tensor absmax, std::optional<Tensor> nested_absmax,
                            std::optional<Tensor> offset, int64_t blocksize, int64_t in_features, int64_t row,
                            int64_t col, Tensor out) {
  Call call(out);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("packed", packed), call.input("absmax", absmax), call.input("nested_absmax", nested_absmax);
  call.input("offset", offset), call.output("out", out);
  const lk_nf4_weight weight = nf4_weight(packed, absmax, nested_absmax, offset, blocksize);
  const lk_region region = {in_features, row, out.size(0), col, out.size(1)};
  return call.end(lk_cuda_nf4_dequantize(&weight, &region, out.mutable_data_ptr(), dtype_of(out),
                                         out.stride(0), call.stream()));
}

int64_t lora_dropout_cuda(const Tensor x, double p, const Tensor rng, int64_t first, Tensor out) {
  Call call(out);
  if (!call.ready()) return LK_NO_STREAM;
  // In place: what is read is what is written.
  const bool in_place = x.const_data_ptr() == out.const_data_ptr();
  if (in_place) {
    call.inout("x", out);
  } else {
    call.input("x", x), call.output("out", out);
  }
  call.input("rng", rng);
  return call.end(lk_cuda_lora_dropout(x.const_data_ptr(), dtype_of(x), x.numel(), first, p,
                                       static_cast<const int64_t*>(rng.const_data_ptr()),
                                       out.mutable_data_ptr(), call.stream()));
}

int64_t lora_linear_decode_cuda(const Tensor x, const Tensor weight, std::optional<Tensor> absmax,
                                std::optional<Tensor> nested_absmax, std::optional<Tensor> offset,
                                int64_t blocksize, std::optional<Tensor> lora_A, std::optional<Tensor> lora_B,
                                double scaling, std::optional<Tensor> bias, bool clustered, Tensor y,
                                Tensor h, Tensor workspace, Tensor counters) {
  Call call(y);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("x", x), call.input("weight", weight), call.input("absmax", absmax);
  call.input("nested_absmax", nested_absmax), call.input("offset", offset), call.input("lora_A", lora_A);
  call.input("lora_B", lora_B), call.input("bias", bias), call.output("y", y), call.output("h", h);
  call.output("workspace", workspace), call.inout("counters", counters);
  lk_nf4_weight nf4;
  const lk_base_weight base =
      base_weight(weight, absmax, nested_absmax, offset, blocksize, y.size(1), x.size(1), &nf4);
  const lk_adapter lora = adapter(lora_A, lora_B, scaling, 0, std::nullopt);
  const lk_matrix rows = matrix(x), addend = matrix(bias);
  if (clustered) {
#ifndef LK_WITH_SM90
    return LK_NO_KERNEL;
#else
    return call.end(lk_cuda_lora_linear_decode_clustered(
        &rows, x.size(0), &base, &lora, &addend, y.mutable_data_ptr(), h.mutable_data_ptr(), call.stream()));
#endif
  }
  return call.end(lk_cuda_lora_linear_decode(
      &rows, x.size(0), &base, &lora, &addend, y.mutable_data_ptr(), h.mutable_data_ptr(),
      workspace.mutable_data_ptr(), static_cast<uint32_t*>(counters.mutable_data_ptr()), call.stream()));
}

int64_t lora_linear_decode_takes_cuda(const Tensor weight, int64_t out_features, int64_t in_features,
                                      int64_t rank, bool nf4, bool clustered) {
  Call call(weight);
  return lk_cuda_lora_linear_decode_takes(out_features, in_features, rank, nf4, clustered);
}

std::tuple<int64_t, int64_t> lora_linear_decode_scratch_cuda(const Tensor weight, int64_t tokens,
                                                             int64_t out_features, int64_t in_features,
                                                             int64_t rank, bool nf4, bool clustered) {
  Call call(weight);
  const lk_scratch space =
      lk_cuda_lora_linear_decode_scratch(tokens, out_features, in_features, rank, nf4, clustered);
  return {space.workspace, space.counters};
}

int64_t lora_linear_mixed_cuda(const Tensor x, const Tensor weight, std::optional<Tensor> absmax,
                               std::optional<Tensor> nested_absmax, std::optional<Tensor> offset,
                               int64_t blocksize, std::optional<Tensor> lora_A, std::optional<Tensor> lora_B,
                               double scaling, std::optional<Tensor> bias, std::optional<Tensor> given_h,
                               Tensor y, std::optional<Tensor> h, Tensor workspace, Tensor counters) {
  Call call(y);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("x", x), call.input("weight", weight), call.input("absmax", absmax);
  call.input("nested_absmax", nested_absmax), call.input("offset", offset), call.input("lora_A", lora_A);
  call.input("lora_B", lora_B), call.input("bias", bias), call.input("given_h", given_h), call.output("y", y);
  call.output("h", h), call.output("workspace", workspace), call.inout("counters", counters);
  lk_nf4_weight nf4;
  const lk_base_weight base =
      base_weight(weight, absmax, nested_absmax, offset, blocksize, y.size(1), x.size(1), &nf4);
  const lk_adapter lora = adapter(lora_A, lora_B, scaling, 0, std::nullopt);
  const lk_matrix rows = matrix(x), addend = matrix(bias);
  return call.end(lk_cuda_lora_linear_mixed(
      &rows, x.size(0), &base, &lora, &addend, given_h ? given_h->const_data_ptr() : nullptr,
      y.mutable_data_ptr(), h ? h->mutable_data_ptr() : nullptr, workspace.mutable_data_ptr(),
      static_cast<uint32_t*>(counters.mutable_data_ptr()), call.stream()));
}

int64_t lora_linear_mixed_takes_cuda(const Tensor weight, int64_t out_features, int64_t in_features,
                                     int64_t blocksize, int64_t rank) {
  lk_nf4_weight nf4 = {static_cast<const uint8_t*>(weight.const_data_ptr()), nullptr, nullptr, nullptr,
                       blocksize};
  lk_base_weight base = {&nf4, {nullptr, LK_F32, 0}, out_features, in_features};
  if (blocksize == 0) base.nf4 = nullptr, base.dense = matrix(weight);
  return lk_cuda_lora_linear_mixed_takes(&base, rank);
}

std::tuple<int64_t, int64_t> lora_linear_mixed_scratch_cuda(const Tensor weight, int64_t tokens,
                                                            int64_t out_features, int64_t in_features,
                                                            int64_t rank) {
  Call call(weight);
  const lk_scratch scratch = lk_cuda_lora_linear_mixed_scratch(tokens, out_features, in_features, rank);
  return {scratch.workspace, scratch.counters};
}

// ---- the low-rank products

lk_rows rows_of(Call& call, int64_t count, int64_t adapters, const std::optional<Tensor>& order,
                const std::optional<Tensor>& begins) {
  call.input("order", order), call.input("begins", begins);
  const auto words = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
  };
  return {count, words(order), words(begins), adapters};
}

// An output of each adapter; none where it has no elements.
std::vector<lk_matrix> outputs_of(Call& call, const char* name, const std::vector<Tensor>& tensors) {
  std::vector<lk_matrix> matrices;
  for (const Tensor& t : tensors) {
    call.output(name, t);
    matrices.push_back(t.numel() == 0 ? lk_matrix{nullptr, LK_F32, 0} : matrix(t));
  }
  return matrices;
}

// Sorted rows leave those of no adapter alone.
void rows_output(Call& call, const char* name, const Tensor& t, const std::optional<Tensor>& order) {
  if (order) {
    call.inout(name, t);
  } else {
    call.output(name, t);
  }
}

int64_t lora_shrink_cuda(const Tensor x, std::vector<Tensor> lora_A, std::vector<double> scaling, double p,
                         std::optional<Tensor> rng, std::optional<Tensor> order, std::optional<Tensor> begins,
                         Tensor h, Tensor workspace, Tensor counters) {
  Call call(h);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("x", x), call.input("rng", rng), rows_output(call, "h", h, order);
  call.output("workspace", workspace), call.inout("counters", counters);
  std::vector<lk_adapter> adapters;
  for (size_t a = 0; a < lora_A.size(); ++a) {
    call.input("lora_A", lora_A[a]);
    adapters.push_back(adapter(lora_A[a], std::nullopt, scaling[a], p, rng));
  }
  const lk_rows rows =
      rows_of(call, order ? order->numel() : x.size(0), static_cast<int64_t>(adapters.size()), order, begins);
  const lk_matrix from = matrix(x);
  return call.end(lk_cuda_lora_shrink(&from, x.size(1), &rows, adapters.data(), h.mutable_data_ptr(),
                                      h.stride(0), workspace.mutable_data_ptr(),
                                      static_cast<uint32_t*>(counters.mutable_data_ptr()), call.stream()));
}

std::tuple<int64_t, int64_t> lora_shrink_scratch_cuda(const Tensor x, int64_t adapters, bool sorted,
                                                      int64_t most_rank) {
  Call call(x);
  const lk_scratch scratch = lk_cuda_lora_shrink_scratch(x.size(0), adapters, sorted, x.size(1), most_rank);
  return {scratch.workspace, scratch.counters};
}

int64_t lora_expand_cuda(const Tensor v, std::vector<Tensor> weights, std::vector<double> scaling,
                         bool backward, bool add, double p, std::optional<Tensor> rng,
                         std::optional<Tensor> order, std::optional<Tensor> begins, Tensor out) {
  Call call(out);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("v", v), call.input("rng", rng);
  if (add) {
    call.inout("out", out);
  } else {
    rows_output(call, "out", out, order);
  }
  std::vector<lk_adapter> adapters;
  for (size_t a = 0; a < weights.size(); ++a) {
    call.input("weights", weights[a]);
    lk_adapter one = backward ? adapter(weights[a], std::nullopt, 1, p, rng)
                              : adapter(std::nullopt, weights[a], scaling[a], 0, std::nullopt);
    one.rank = weights[a].size(backward ? 0 : 1);
    adapters.push_back(one);
  }
  const lk_rows rows =
      rows_of(call, order ? order->numel() : v.size(0), static_cast<int64_t>(adapters.size()), order, begins);
  const lk_matrix from = matrix(v);
  return call.end(lk_cuda_lora_expand(&from, &rows, adapters.data(), backward, add, out.mutable_data_ptr(),
                                      out.size(1), out.stride(0), call.stream()));
}

int64_t lora_linear_backward_dy_cuda(const Tensor dy, std::optional<Tensor> h, std::vector<Tensor> lora_B,
                                     std::vector<double> scaling, std::optional<Tensor> order,
                                     std::optional<Tensor> begins, std::optional<Tensor> g,
                                     std::vector<Tensor> dB, std::optional<Tensor> dbias, Tensor workspace) {
  Call call(dy);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("dy", dy), call.input("h", h), call.output("dbias", dbias);
  call.output("workspace", workspace);
  if (g) rows_output(call, "g", *g, order);
  std::vector<lk_adapter> adapters;
  for (size_t a = 0; a < lora_B.size(); ++a) {
    call.input("lora_B", lora_B[a]);
    adapters.push_back(adapter(std::nullopt, lora_B[a], scaling[a], 0, std::nullopt));
    adapters.back().rank = lora_B[a].size(1);
  }
  if (adapters.empty()) adapters.push_back(adapter(std::nullopt, std::nullopt, 1, 0, std::nullopt));
  const std::vector<lk_matrix> gradients = outputs_of(call, "dB", dB);
  const lk_rows rows = rows_of(call, order ? order->numel() : dy.size(0),
                               static_cast<int64_t>(adapters.size()), order, begins);
  const lk_matrix from = matrix(dy), low = matrix(h);
  return call.end(lk_cuda_lora_linear_backward_dy(
      &from, dy.size(1), &rows, adapters.data(), &low, g ? g->mutable_data_ptr() : nullptr,
      g ? g->stride(0) : 0, gradients.empty() ? nullptr : gradients.data(),
      dbias ? static_cast<float*>(dbias->mutable_data_ptr()) : nullptr, workspace.mutable_data_ptr(),
      call.stream()));
}

int64_t lora_linear_backward_x_cuda(const Tensor x, const Tensor g, double p, std::optional<Tensor> rng,
                                    std::optional<Tensor> order, std::optional<Tensor> begins,
                                    std::vector<Tensor> dA, Tensor workspace) {
  Call call(x);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("x", x), call.input("g", g), call.input("rng", rng), call.output("workspace", workspace);
  const std::vector<lk_matrix> gradients = outputs_of(call, "dA", dA);
  std::vector<lk_adapter> adapters;
  for (const Tensor& one : dA) {
    adapters.push_back(adapter(std::nullopt, std::nullopt, 1, p, rng));
    adapters.back().rank = one.numel() == 0 ? 0 : one.size(0);
  }
  const lk_rows rows =
      rows_of(call, order ? order->numel() : x.size(0), static_cast<int64_t>(adapters.size()), order, begins);
  const lk_matrix from = matrix(x), low = matrix(g);
  return call.end(lk_cuda_lora_linear_backward_x(&from, x.size(1), &rows, adapters.data(), &low,
                                                 gradients.data(), workspace.mutable_data_ptr(),
                                                 call.stream()));
}

int64_t lora_linear_backward_sweep_workspace_cuda(const Tensor z, int64_t adapters, int64_t most_rank,
                                                  int64_t g_stride) {
  Call call(z);
  return lk_cuda_lora_linear_backward_sweep_workspace(z.size(0), adapters, z.size(1), most_rank, g_stride);
}

int64_t lora_linear_backward_dx_cuda(const Tensor dy, const Tensor weight, std::optional<Tensor> absmax,
                                     std::optional<Tensor> nested_absmax, std::optional<Tensor> offset,
                                     int64_t blocksize, std::optional<Tensor> lora_A, std::optional<Tensor> g,
                                     double p, std::optional<Tensor> rng, Tensor dx, Tensor workspace,
                                     Tensor counters) {
  Call call(dx);
  if (!call.ready()) return LK_NO_STREAM;
  call.input("dy", dy), call.input("weight", weight), call.input("absmax", absmax);
  call.input("nested_absmax", nested_absmax), call.input("offset", offset), call.input("lora_A", lora_A);
  call.input("g", g), call.input("rng", rng), call.output("dx", dx);
  call.output("workspace", workspace), call.inout("counters", counters);
  lk_nf4_weight nf4;
  const lk_base_weight base =
      base_weight(weight, absmax, nested_absmax, offset, blocksize, dy.size(1), dx.size(1), &nf4);
  const lk_adapter lora = adapter(lora_A, std::nullopt, 1, p, rng);
  const lk_matrix rows = matrix(dy);
  return call.end(lk_cuda_lora_linear_backward_dx(
      &rows, dy.size(0), &base, &lora, g ? g->const_data_ptr() : nullptr, g ? g->stride(0) : 0,
      dx.mutable_data_ptr(), workspace.mutable_data_ptr(),
      static_cast<uint32_t*>(counters.mutable_data_ptr()), call.stream()));
}

std::tuple<int64_t, int64_t> lora_linear_backward_dx_scratch_cuda(const Tensor weight, int64_t tokens,
                                                                  int64_t out_features, int64_t in_features) {
  Call call(weight);
  const lk_scratch scratch = lk_cuda_lora_linear_backward_dx_scratch(tokens, out_features, in_features);
  return {scratch.workspace, scratch.counters};
}

// ---- the optimizers' steps

template <int kOp>
int64_t optim_step_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> pages,
                        const Tensor segments, int64_t tick, double lr, double beta1, double beta2,
                        double eps, double weight_decay, int64_t rounding, int64_t seed) {
  const OptimStep step(kOp, params, grads, pages, segments, tick, lr, beta1, beta2, eps, weight_decay,
                       rounding, seed);
  if (!step.fits()) return LK_BAD_ARGUMENTS;
  if (pages.empty()) return LK_OK;
  Call call(pages[0]);
  if (!call.ready()) return LK_NO_STREAM;
  for (const Tensor& t : params) call.inout("params", t);
  for (const Tensor& t : grads) call.input("grads", t);
  for (const Tensor& t : pages) call.inout("pages", t);
  return call.end(lk_cuda_optim_step(step.get(), call.stream()));
}
// GCC 12 does not instantiate a function template whose address only another template takes.
[[maybe_unused]] constexpr auto kOptimSteps = {&optim_step_cuda<LK_ADAMW>, &optim_step_cuda<LK_ADAMW8BIT>,
                                               &optim_step_cuda<LK_LION>, &optim_step_cuda<LK_LION8BIT>};

template <class Library>
void implement(Library& m) {
  m.impl("adamw_step.status", TORCH_BOX(&optim_step_cuda<LK_ADAMW>));
  m.impl("adamw8bit_step.status", TORCH_BOX(&optim_step_cuda<LK_ADAMW8BIT>));
  m.impl("lion_step.status", TORCH_BOX(&optim_step_cuda<LK_LION>));
  m.impl("lion8bit_step.status", TORCH_BOX(&optim_step_cuda<LK_LION8BIT>));
  m.impl("nf4_quantize.out", TORCH_BOX(&nf4_quantize_cuda));
  m.impl("nf4_dequantize.out", TORCH_BOX(&nf4_dequantize_cuda));
  m.impl("lora_dropout.out", TORCH_BOX(&lora_dropout_cuda));
  m.impl("lora_linear_decode.out", TORCH_BOX(&lora_linear_decode_cuda));
  m.impl("lora_linear_decode_takes", TORCH_BOX(&lora_linear_decode_takes_cuda));
  m.impl("lora_linear_mixed_takes", TORCH_BOX(&lora_linear_mixed_takes_cuda));
  m.impl("lora_linear_decode_scratch", TORCH_BOX(&lora_linear_decode_scratch_cuda));
  m.impl("lora_linear_mixed.out", TORCH_BOX(&lora_linear_mixed_cuda));
  m.impl("lora_linear_mixed_scratch", TORCH_BOX(&lora_linear_mixed_scratch_cuda));
  m.impl("lora_shrink.out", TORCH_BOX(&lora_shrink_cuda));
  m.impl("lora_shrink_scratch", TORCH_BOX(&lora_shrink_scratch_cuda));
  m.impl("lora_expand.out", TORCH_BOX(&lora_expand_cuda));
  m.impl("lora_linear_backward_dy.out", TORCH_BOX(&lora_linear_backward_dy_cuda));
  m.impl("lora_linear_backward_x.out", TORCH_BOX(&lora_linear_backward_x_cuda));
  m.impl("lora_linear_backward_sweep_workspace", TORCH_BOX(&lora_linear_backward_sweep_workspace_cuda));
  m.impl("lora_linear_backward_dx.out", TORCH_BOX(&lora_linear_backward_dx_cuda));
  m.impl("lora_linear_backward_dx_scratch", TORCH_BOX(&lora_linear_backward_dx_scratch_cuda));
}

}  // namespace

#ifdef LK_SIMT
STABLE_TORCH_LIBRARY(lora_kernels_simt, m) {
  define_out_overloads(m);
  define_optim_overloads(m);
}
STABLE_TORCH_LIBRARY_IMPL(lora_kernels_simt, CPU, m) { implement(m); }

// For tests: the message of the last failure, the seed of the next launches, the device that launchers see.
extern "C" __attribute__((visibility("default"))) const char* lk_simt_last_error() {
  return lk::cuda::last_error().c_str();
}
extern "C" __attribute__((visibility("default"))) void lk_simt_set_seed(uint64_t seed) {
  simt::set_seed(seed);
}
extern "C" __attribute__((visibility("default"))) void lk_simt_pretend(int multiprocessors, int capability) {
  lk::cuda::pretended_device() = {multiprocessors, capability};
}
#else
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) { implement(m); }
#endif

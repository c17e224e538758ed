// Dispatch glue of the CPU launchers on torch's stable ABI, and the Python module: unpacks tensors into the
// structs of api.h, and nothing else. The CUDA launchers have theirs in torch_ops_cuda.cpp.
//
// These are the `out` overloads, which compute into tensors that lora_kernels/ops.py has allocated; the ops
// that users see (`lora_kernels::nf4_quantize`, ...) are defined there. An exception that crosses the stable
// ABI of torch 2.11 loses its message, so nothing here throws on user error: every op returns an lk_status.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "torch_optim.h"
#include "torch_tensors.h"

// A CPU build of torch does not have this symbol: weak, and looked at before use.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using namespace lk::glue;

int64_t nf4_quantize_cpu(const Tensor weight, int64_t blocksize, Tensor packed, Tensor absmax,
                         std::optional<Tensor> codes, std::optional<Tensor> nested_absmax,
                         std::optional<Tensor> offset, std::optional<Tensor>) {
  float* scales = static_cast<float*>(absmax.mutable_data_ptr());
  const int status = lk_cpu_nf4_quantize(weight.const_data_ptr(), dtype_of(weight), weight.numel(), blocksize,
                                         static_cast<uint8_t*>(packed.mutable_data_ptr()), scales);
  if (status != LK_OK || !codes) return status;
  return lk_cpu_nf4_quantize_absmax(scales, absmax.numel(), static_cast<uint8_t*>(codes->mutable_data_ptr()),
                                    static_cast<float*>(nested_absmax->mutable_data_ptr()),
                                    static_cast<float*>(offset->mutable_data_ptr()));
}

int64_t nf4_dequantize_cpu(const Tensor packed, const Tensor absmax, std::optional<Tensor> nested_absmax,
                           std::optional<Tensor> offset, int64_t blocksize, int64_t in_features, int64_t row,
                           int64_t col, Tensor out) {
  const lk_nf4_weight weight = nf4_weight(packed, absmax, nested_absmax, offset, blocksize);
  const lk_region region = {in_features, row, out.size(0), col, out.size(1)};
  return lk_cpu_nf4_dequantize(&weight, &region, out.mutable_data_ptr(), dtype_of(out), out.stride(0));
}

int64_t lora_dropout_cpu(const Tensor x, double p, const Tensor rng, int64_t first, Tensor out) {
  return lk_cpu_lora_dropout(x.const_data_ptr(), dtype_of(x), x.numel(), first, p,
                             static_cast<const int64_t*>(rng.const_data_ptr()), out.mutable_data_ptr());
}

int64_t lora_linear_cpu(const Tensor x, const Tensor weight, std::optional<Tensor> absmax,
                        std::optional<Tensor> nested_absmax, std::optional<Tensor> offset, int64_t blocksize,
                        std::optional<Tensor> lora_A, std::optional<Tensor> lora_B, double scaling,
                        std::optional<Tensor> bias, double p, std::optional<Tensor> rng, Tensor y, Tensor h,
                        Tensor workspace) {
  lk_nf4_weight nf4;
  const lk_base_weight base =
      base_weight(weight, absmax, nested_absmax, offset, blocksize, y.size(1), x.size(1), &nf4);
  const lk_adapter lora = adapter(lora_A, lora_B, scaling, p, rng);
  const lk_matrix rows = matrix(x), addend = matrix(bias);
  return lk_cpu_lora_linear(&rows, x.size(0), &base, &lora, &addend, y.mutable_data_ptr(),
                            h.mutable_data_ptr(), workspace.mutable_data_ptr());
}

int64_t lora_linear_backward_cpu(const Tensor dy, std::optional<Tensor> x, std::optional<Tensor> h,
                                 const Tensor weight, std::optional<Tensor> absmax,
                                 std::optional<Tensor> nested_absmax, std::optional<Tensor> offset,
                                 int64_t blocksize, int64_t in_features, std::optional<Tensor> lora_A,
                                 std::optional<Tensor> lora_B, double scaling, double p,
                                 std::optional<Tensor> rng, std::optional<Tensor> dx,
                                 std::optional<Tensor> dA, std::optional<Tensor> dB, Tensor workspace) {
  lk_nf4_weight nf4;
  const lk_base_weight base =
      base_weight(weight, absmax, nested_absmax, offset, blocksize, dy.size(1), in_features, &nf4);
  const lk_adapter lora = adapter(lora_A, lora_B, scaling, p, rng);
  const lk_matrix dy_rows = matrix(dy), x_rows = matrix(x), h_rows = matrix(h);
  const lk_gradients gradients = {
      dx ? dx->mutable_data_ptr() : nullptr, dA ? dA->mutable_data_ptr() : nullptr,
      dB ? dB->mutable_data_ptr() : nullptr, dA ? dtype_of(*dA) : LK_F32, dB ? dtype_of(*dB) : LK_F32};
  return lk_cpu_lora_linear_backward(&dy_rows, dy.size(0), &x_rows, &h_rows, &base, &lora, &gradients,
                                     workspace.mutable_data_ptr());
}

template <int kOp>
int64_t optim_step_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> pages,
                       const Tensor segments, int64_t tick, double lr, double beta1, double beta2, double eps,
                       double weight_decay, int64_t rounding, int64_t seed) {
  const OptimStep step(kOp, params, grads, pages, segments, tick, lr, beta1, beta2, eps, weight_decay,
                       rounding, seed);
  return step.fits() ? lk_cpu_optim_step(step.get()) : LK_BAD_ARGUMENTS;
}

}  // namespace

STABLE_TORCH_LIBRARY(lora_kernels, m) {
  define_out_overloads(m);
  define_optim_overloads(m);
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_linear.out", TORCH_BOX(&lora_linear_cpu));
  m.impl("lora_linear_backward.out", TORCH_BOX(&lora_linear_backward_cpu));
  m.impl("nf4_quantize.out", TORCH_BOX(&nf4_quantize_cpu));
  m.impl("nf4_dequantize.out", TORCH_BOX(&nf4_dequantize_cpu));
  m.impl("lora_dropout.out", TORCH_BOX(&lora_dropout_cpu));
  m.impl("adamw_step.status", TORCH_BOX(&optim_step_cpu<LK_ADAMW>));
  m.impl("adamw8bit_step.status", TORCH_BOX(&optim_step_cpu<LK_ADAMW8BIT>));
  m.impl("lion_step.status", TORCH_BOX(&optim_step_cpu<LK_LION>));
  m.impl("lion8bit_step.status", TORCH_BOX(&optim_step_cpu<LK_LION8BIT>));
}

static PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(lk_cpu_isa()); }

static PyObject* select_cpu_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  const int status = lk_cpu_select_isa(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyLong_FromLong(status);
}

// (tokens, dtype, in_features, blocksize; 0: dense) -> (kernel, tokens that share a decoding of W0)
static PyObject* lora_linear_kernel(PyObject*, PyObject* args) {
  long long tokens, out_features, in_features, blocksize;
  int dtype;
  if (!PyArg_ParseTuple(args, "LiLLL", &tokens, &dtype, &out_features, &in_features, &blocksize))
    return nullptr;
  const lk_nf4_weight nf4 = {nullptr, nullptr, nullptr, nullptr, blocksize};
  const lk_base_weight base = {
      blocksize > 0 ? &nf4 : nullptr, {nullptr, dtype, 0}, out_features, in_features};
  int64_t forward, backward;
  const char* kernel = lk_cpu_lora_linear_kernel(tokens, dtype, &base, &forward, &backward);
  return Py_BuildValue("sLL", kernel, static_cast<long long>(forward), static_cast<long long>(backward));
}

static PyObject* lora_linear_workspace(PyObject*, PyObject* args) {
  long long tokens, in_features, rank;
  int dtype;
  if (!PyArg_ParseTuple(args, "LiLL", &tokens, &dtype, &in_features, &rank)) return nullptr;
  return PyLong_FromLongLong(lk_cpu_lora_linear_workspace(tokens, dtype, in_features, rank));
}

static PyObject* lora_linear_backward_workspace(PyObject*, PyObject* args) {
  long long tokens, out_features, in_features, rank;
  int dtype, has_dropout;
  if (!PyArg_ParseTuple(args, "LiLLLp", &tokens, &dtype, &out_features, &in_features, &rank, &has_dropout))
    return nullptr;
  return PyLong_FromLongLong(
      lk_cpu_lora_linear_backward_workspace(tokens, dtype, out_features, in_features, rank, has_dropout));
}

static PyObject* optim_state_layout(PyObject*, PyObject* args) {
  int op, dtype, rounding;
  long long count;
  if (!PyArg_ParseTuple(args, "iLii", &op, &count, &dtype, &rounding)) return nullptr;
  int64_t at[5], bytes;
  lk_optim_state_layout(op, count, dtype, rounding, at, &bytes);
  return Py_BuildValue("LLLLLL", static_cast<long long>(at[0]), static_cast<long long>(at[1]),
                       static_cast<long long>(at[2]), static_cast<long long>(at[3]),
                       static_cast<long long>(at[4]), static_cast<long long>(bytes));
}

// `import lora_kernels._C` loads the library, which registers the ops above. The module itself carries what
// was built.
PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"cpu_isa", cpu_isa, METH_NOARGS, nullptr},
      {"select_cpu_isa", select_cpu_isa, METH_O, nullptr},
      {"lora_linear_kernel", lora_linear_kernel, METH_VARARGS, nullptr},
      {"lora_linear_workspace", lora_linear_workspace, METH_VARARGS, nullptr},
      {"lora_linear_backward_workspace", lora_linear_backward_workspace, METH_VARARGS, nullptr},
      {"optim_state_layout", optim_state_layout, METH_VARARGS, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "cpu_best_isa", lk_cpu_best_isa()) < 0 ||
      PyModule_AddStringConstant(module, "cuda_archs", LK_CUDA_ARCHS) < 0 ||
      PyModule_AddStringConstant(module, "cuda_version", LK_CUDA_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "torch_headers", LK_TORCH_HEADERS) < 0 ||
      PyModule_AddStringConstant(module, "compiler", __VERSION__) < 0 ||
      PyModule_AddIntConstant(module, "cuda_stream_bound", aoti_torch_get_current_cuda_stream != nullptr) <
          0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

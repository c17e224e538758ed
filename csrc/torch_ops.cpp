// Op schemas and dispatch glue on torch's stable ABI: unpacks tensors into the structs of api.h, and nothing
// else.
//
// These are the `out` overloads, which compute into tensors that lora_kernels/ops.py has allocated; the ops
// that users see (`lora_kernels::nf4_quantize`, ...) are defined there. An exception that crosses the stable
// ABI of torch 2.11 loses its message, so nothing here throws on user error: every op returns an lk_status.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "api.h"

// A CPU build of torch does not have this symbol: weak, and looked at before use.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return LK_F32;
    case ScalarType::Half: return LK_F16;
    case ScalarType::BFloat16: return LK_BF16;
    default: return -1;  // every launcher answers LK_UNSUPPORTED_DTYPE to it
  }
}

lk_nf4_weight nf4_weight(const Tensor& packed, const Tensor& absmax,
                         const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                         int64_t blocksize) {
  return {static_cast<const uint8_t*>(packed.const_data_ptr()), absmax.const_data_ptr(),
          nested_absmax ? static_cast<const float*>(nested_absmax->const_data_ptr()) : nullptr,
          offset ? static_cast<const float*>(offset->const_data_ptr()) : nullptr, blocksize};
}

int64_t nf4_quantize_cpu(const Tensor weight, int64_t blocksize, Tensor packed, Tensor absmax,
                         std::optional<Tensor> codes, std::optional<Tensor> nested_absmax,
                         std::optional<Tensor> offset) {
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

#ifdef LK_WITH_CUDA
int64_t nf4_dequantize_cuda(const Tensor packed, const Tensor absmax, std::optional<Tensor> nested_absmax,
                            std::optional<Tensor> offset, int64_t blocksize, int64_t in_features, int64_t row,
                            int64_t col, Tensor out) {
  const int32_t device = out.get_device();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    return LK_NO_STREAM;
  }
  const lk_nf4_weight weight = nf4_weight(packed, absmax, nested_absmax, offset, blocksize);
  const lk_region region = {in_features, row, out.size(0), col, out.size(1)};
  return lk_cuda_nf4_dequantize(&weight, &region, out.mutable_data_ptr(), dtype_of(out), out.stride(0),
                                stream);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(lora_kernels, m) {
  m.def(
      "nf4_quantize.out(Tensor weight, int blocksize, *, Tensor(a!) packed, Tensor(b!) absmax, Tensor(c!)? "
      "codes, Tensor(d!)? nested_absmax, Tensor(e!)? offset) -> int");
  m.def(
      "nf4_dequantize.out(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int "
      "blocksize, int in_features, int row, int col, *, Tensor(a!) out) -> int");
  m.def("lora_dropout.out(Tensor x, float p, Tensor rng, int first, *, Tensor(a!) out) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("nf4_quantize.out", TORCH_BOX(&nf4_quantize_cpu));
  m.impl("nf4_dequantize.out", TORCH_BOX(&nf4_dequantize_cpu));
  m.impl("lora_dropout.out", TORCH_BOX(&lora_dropout_cpu));
}

#ifdef LK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("nf4_dequantize.out", TORCH_BOX(&nf4_dequantize_cuda));
}
#endif

static PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(lk_cpu_isa()); }

static PyObject* select_cpu_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  const int status = lk_cpu_select_isa(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyLong_FromLong(status);
}

// `import lora_kernels._C` loads the library, which registers the ops above. The module itself carries what
// was built.
PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {{"cpu_isa", cpu_isa, METH_NOARGS, nullptr},
                                  {"select_cpu_isa", select_cpu_isa, METH_O, nullptr},
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

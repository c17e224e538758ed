// What the glue of the CPU and of the CUDA launchers share: op schemas, and from torch's tensors to api.h's
// structs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "api.h"

namespace lk::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return LK_F32;
    case ScalarType::Half: return LK_F16;
    case ScalarType::BFloat16: return LK_BF16;
    default: return -1;  // every launcher answers LK_UNSUPPORTED_DTYPE to it
  }
}

inline lk_nf4_weight nf4_weight(const Tensor& packed, const Tensor& absmax,
                                const std::optional<Tensor>& nested_absmax,
                                const std::optional<Tensor>& offset, int64_t blocksize) {
  return {static_cast<const uint8_t*>(packed.const_data_ptr()), absmax.const_data_ptr(),
          nested_absmax ? static_cast<const float*>(nested_absmax->const_data_ptr()) : nullptr,
          offset ? static_cast<const float*>(offset->const_data_ptr()) : nullptr, blocksize};
}

inline lk_matrix matrix(const std::optional<Tensor>& t) {
  if (!t) return {nullptr, LK_F32, 0};
  return {t->const_data_ptr(), dtype_of(*t), t->dim() == 2 ? t->stride(0) : t->numel()};
}

inline lk_adapter adapter(const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B,
                          double scaling, double p, const std::optional<Tensor>& rng) {
  const int64_t rank = lora_A ? lora_A->size(0) : 0;
  return {matrix(lora_A),
          matrix(lora_B),
          rank,
          scaling,
          p,
          rng ? static_cast<const int64_t*>(rng->const_data_ptr()) : nullptr};
}

// The base weight as the ops pass it; `nf4` is where its parts are put when it is quantised.
inline lk_base_weight base_weight(const Tensor& weight, const std::optional<Tensor>& absmax,
                                  const std::optional<Tensor>& nested_absmax,
                                  const std::optional<Tensor>& offset, int64_t blocksize,
                                  int64_t out_features, int64_t in_features, lk_nf4_weight* nf4) {
  if (!absmax) return {nullptr, matrix(weight), out_features, in_features};
  *nf4 = nf4_weight(weight, *absmax, nested_absmax, offset, blocksize);
  return {nf4, {nullptr, LK_F32, 0}, out_features, in_features};
}

// The schemas, in whichever namespace `m` is of.
template <class Library>
void define_out_overloads(Library& m) {
  m.def(
      "nf4_quantize.out(Tensor weight, int blocksize, *, Tensor(a!) packed, Tensor(b!) absmax, Tensor(c!)? "
      "codes, Tensor(d!)? nested_absmax, Tensor(e!)? offset, Tensor(f!)? scratch=None) -> int");
  m.def(
      "nf4_dequantize.out(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int "
      "blocksize, int in_features, int row, int col, *, Tensor(a!) out) -> int");
  m.def("lora_dropout.out(Tensor x, float p, Tensor rng, int first, *, Tensor(a!) out) -> int");
  m.def(
      "lora_linear.out(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int "
      "blocksize, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? bias, float p, Tensor? rng, *, "
      "Tensor(a!) y, Tensor(b!) h, Tensor(c!) workspace) -> int");
  m.def(
      "lora_linear_backward.out(Tensor dy, Tensor? x, Tensor? h, Tensor weight, Tensor? absmax, Tensor? "
      "nested_absmax, Tensor? offset, int blocksize, int in_features, Tensor? lora_A, Tensor? lora_B, float "
      "scaling, float p, Tensor? rng, *, Tensor(a!)? dx, Tensor(b!)? dA, Tensor(c!)? dB, Tensor(d!) "
      "workspace) -> int");
  m.def(
      "lora_linear_decode.out(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? "
      "offset, "
      "int blocksize, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? bias, bool clustered, *, "
      "Tensor(a!) y, Tensor(b!) h, Tensor(c!) workspace, Tensor(d!) counters) -> int");
  m.def(
      "lora_linear_decode_takes(Tensor weight, int out_features, int in_features, int rank, bool nf4, bool "
      "clustered) -> int");
  m.def(
      "lora_linear_decode_scratch(Tensor weight, int tokens, int out_features, int in_features, int rank, "
      "bool "
      "nf4, bool clustered) -> (int workspace, int counters)");
  m.def(
      "lora_linear_mixed.out(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, "
      "int blocksize, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? bias, Tensor? given_h, *, "
      "Tensor(a!) y, Tensor(b!)? h, Tensor(c!) workspace, Tensor(d!) counters) -> int");
  m.def(
      "lora_linear_mixed_takes(Tensor weight, int out_features, int in_features, int blocksize, int rank) -> "
      "int");
  m.def(
      "lora_linear_mixed_scratch(Tensor weight, int tokens, int out_features, int in_features, int rank) -> "
      "(int workspace, int counters)");
  // Of the low-rank products: a list entry without elements is an output that is not wanted.
  m.def(
      "lora_shrink.out(Tensor x, Tensor[] lora_A, float[] scaling, float p, Tensor? rng, Tensor? order, "
      "Tensor? begins, *, "
      "Tensor(a!) h, Tensor(b!) workspace, Tensor(c!) counters) -> int");
  m.def(
      "lora_shrink_scratch(Tensor x, int adapters, bool sorted, int most_rank) -> (int workspace, int "
      "counters)");
  m.def(
      "lora_expand.out(Tensor v, Tensor[] weights, float[] scaling, bool backward, bool add, float p, "
      "Tensor? "
      "rng, Tensor? order, Tensor? begins, *, Tensor(a!) out) -> int");
  m.def(
      "lora_linear_backward_dy.out(Tensor dy, Tensor? h, Tensor[] lora_B, float[] scaling, Tensor? order, "
      "Tensor? begins, *, Tensor(a!)? g, Tensor(b!)[] dB, Tensor(c!)? dbias, Tensor(d!) workspace) -> int");
  m.def(
      "lora_linear_backward_x.out(Tensor x, Tensor g, float p, Tensor? rng, Tensor? order, Tensor? begins, "
      "*, "
      "Tensor(a!)[] dA, Tensor(b!) workspace) -> int");
  m.def("lora_linear_backward_sweep_workspace(Tensor z, int adapters, int most_rank, int g_stride) -> int");
  m.def(
      "lora_linear_backward_dx.out(Tensor dy, Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? "
      "offset, int blocksize, Tensor? lora_A, Tensor? g, float p, Tensor? rng, *, Tensor(a!) dx, Tensor(b!) "
      "workspace, Tensor(c!) counters) -> int");
  m.def(
      "lora_linear_backward_dx_scratch(Tensor weight, int tokens, int out_features, int in_features) -> (int "
      "workspace, int counters)");
}

}  // namespace lk::glue

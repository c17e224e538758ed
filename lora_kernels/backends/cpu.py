"""The CPU backend: C++ for NF4 and dropout, panels around torch's GEMM for the products."""

import torch

from lora_kernels import panels
from lora_kernels.backends.native import cpu_isa, lora_dropout, nf4_dequantize, nf4_quantize
from lora_kernels.base_weight import BaseWeight

__all__ = ["explain", "lora_dropout", "lora_linear", "lora_linear_backward", "nf4_dequantize", "nf4_quantize"]

_kernels = panels.Kernels(nf4_dequantize=nf4_dequantize, lora_dropout=lora_dropout)
lora_linear = panels.bind(panels.lora_linear, _kernels)
lora_linear_backward = panels.bind(panels.lora_linear_backward, _kernels)


def explain(base: BaseWeight, tokens: int, dtype: torch.dtype) -> list[str]:
    return panels.explain(base, dtype, decoder=f"C++ nf4_dequantize ({cpu_isa()})")

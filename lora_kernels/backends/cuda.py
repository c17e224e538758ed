"""The CUDA backend: the compiled nf4_dequantize, panels around torch's GEMM.

nf4_quantize and the dropout mask have no CUDA kernel of their own yet: they run the specification's PyTorch
code on the device, which gives the same bytes and the same mask; `explain` says so.
"""

import functools

import torch
from torch import Tensor

from lora_kernels import composed, panels
from lora_kernels.backends import native
from lora_kernels.backends.reference import lora_dropout, nf4_quantize
from lora_kernels.base_weight import BaseWeight

__all__ = [
    "dora_linear",
    "dora_linear_backward",
    "explain",
    "lora_dropout",
    "lora_linear",
    "lora_linear_backward",
    "lora_linear_batched",
    "lora_linear_batched_backward",
    "nf4_dequantize",
    "nf4_quantize",
]


def nf4_dequantize(base: BaseWeight, row: int, col: int, out: Tensor) -> None:
    if not native._C.cuda_archs:
        raise RuntimeError(
            "lora_kernels was built without CUDA (no nvcc was found). Install CUDA's compiler and build "
            'again, or choose the slow pure-PyTorch backend with lora_kernels.use_backend("reference")'
        )
    native.nf4_dequantize(base, row, col, out)


_kernels = panels.Kernels(nf4_dequantize=nf4_dequantize, lora_dropout=lora_dropout)
lora_linear = panels.bind(panels.lora_linear, _kernels)
lora_linear_backward = panels.bind(panels.lora_linear_backward, _kernels)
_composed = composed.Kernels(lora_linear, lora_linear_backward, _kernels)
lora_linear_batched = functools.partial(composed.lora_linear_batched, _composed)
lora_linear_batched_backward = functools.partial(composed.lora_linear_batched_backward, _composed)
dora_linear = functools.partial(composed.dora_linear, _composed)
dora_linear_backward = functools.partial(composed.dora_linear_backward, _composed)


def explain(base: BaseWeight, tokens: int, dtype: torch.dtype) -> list[str]:
    lines = panels.explain(
        base, dtype, decoder=f"CUDA nf4_dequantize ({native._C.cuda_archs or 'not built'})"
    )
    return [*lines, "dropout mask: the specification's PyTorch code on the device (no CUDA kernel yet)"]

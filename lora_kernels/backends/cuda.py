"""The CUDA backend: fused kernels where there are some, else panels around torch's GEMM.

The dropout mask has no CUDA kernel of its own yet: it runs the specification's PyTorch code on the device,
which gives the same mask; `explain` says so.
"""

import functools

import torch
from torch import Tensor

from lora_kernels import composed, panels
from lora_kernels.backends import native, reference
from lora_kernels.backends.cuda_launchers import CudaLaunchers
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


class CudaBackend:
    """The functions of a backend over one library of CUDA launchers."""

    lora_dropout = staticmethod(reference.lora_dropout)

    def __init__(self, launchers: CudaLaunchers, archs: str) -> None:
        self._launchers, self._archs = launchers, archs
        self._panels = panels.Kernels(nf4_dequantize=self.nf4_dequantize, lora_dropout=self.lora_dropout)
        self.lora_linear_backward = panels.bind(panels.lora_linear_backward, self._panels)
        kernels = composed.Kernels(self.lora_linear, self.lora_linear_backward, self._panels)
        self.lora_linear_batched = functools.partial(composed.lora_linear_batched, kernels)
        self.lora_linear_batched_backward = functools.partial(composed.lora_linear_batched_backward, kernels)
        self.dora_linear = functools.partial(composed.dora_linear, kernels)
        self.dora_linear_backward = functools.partial(composed.dora_linear_backward, kernels)

    def _check_built(self) -> None:
        if not self._archs:
            raise RuntimeError(
                "lora_kernels was built without CUDA (no nvcc was found). Install CUDA's compiler and build "
                'again, or choose the slow pure-PyTorch backend with lora_kernels.use_backend("reference")'
            )

    def nf4_quantize(
        self,
        weight: Tensor,
        blocksize: int,
        packed: Tensor,
        absmax: Tensor,
        codes: Tensor | None,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
    ) -> None:
        self._check_built()
        self._launchers.nf4_quantize(weight, blocksize, packed, absmax, codes, nested_absmax, offset)

    def nf4_dequantize(self, base: BaseWeight, row: int, col: int, out: Tensor) -> None:
        self._check_built()
        self._launchers.nf4_dequantize(base, row, col, out)

    def lora_linear(
        self,
        x: Tensor,
        base: BaseWeight,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        bias: Tensor | None,
        dropout_p: float,
        rng: Tensor | None,
        y: Tensor,
        h: Tensor,
    ) -> None:
        self._check_built()
        others = (lora_A, lora_B, bias)
        if dropout_p == 0 and self._launchers.why_no_decode(base, *x.shape[:1], x.dtype, h.shape[1], *others) is None:
            self._launchers.lora_linear_decode(x, base, lora_A, lora_B, scaling, bias, y, h)
        else:
            arguments = (x, base, lora_A, lora_B, scaling, bias, dropout_p, rng, y, h)
            panels.lora_linear(self._panels, *arguments)

    def explain(self, base: BaseWeight, tokens: int, dtype: torch.dtype) -> list[str]:
        lines = panels.explain(base, dtype, decoder=f"CUDA nf4_dequantize ({self._archs or 'not built'})")
        if self._archs:
            reason = self._launchers.why_no_decode(base, tokens, dtype, 16)
            if reason is None:
                meet = "in a cluster" if self._launchers.clustered(base.data.device) else "through global memory"
                lines[0] = (
                    "forward without dropout: CUDA lora_linear_decode: one launch, W0 decoded in registers for all "
                    f"tokens, slices of K added {meet}; with dropout: " + lines[0].removeprefix("forward: ")
                )
            else:
                lines.insert(1, f"why not CUDA lora_linear_decode: {reason}")
        return [*lines, "dropout mask: the specification's PyTorch code on the device (no CUDA kernel yet)"]


@functools.cache
def _capability(device: torch.device) -> int:
    """Of the device, as far as the library has code for it: clusters are in the code for sm_90 and later."""
    major, minor = torch.cuda.get_device_capability(device)
    built = (int(arch.removeprefix("ptx").rstrip("a")) for arch in native._C.cuda_archs.split(";"))
    return 10 * major + minor if any(arch >= 90 for arch in built) else min(10 * major + minor, 89)


_backend = CudaBackend(
    CudaLaunchers(torch.ops.lora_kernels, _capability, native.cuda_failure), native._C.cuda_archs
)
nf4_quantize, nf4_dequantize = _backend.nf4_quantize, _backend.nf4_dequantize
lora_dropout, explain = _backend.lora_dropout, _backend.explain
lora_linear, lora_linear_backward = _backend.lora_linear, _backend.lora_linear_backward
lora_linear_batched = _backend.lora_linear_batched
lora_linear_batched_backward = _backend.lora_linear_batched_backward
dora_linear, dora_linear_backward = _backend.dora_linear, _backend.dora_linear_backward

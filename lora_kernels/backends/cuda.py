"""The CUDA backend: fused kernels where there are some, else panels around torch's GEMM."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import composed, panels
from lora_kernels.backends import native
from lora_kernels.backends.cuda_launchers import MOST_DECODE_TOKENS, MOST_FUSED_RANK, CudaLaunchers
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


class Crossover(NamedTuple):
    """Up to `tokens` tokens `op` is computed by `kernel`, on any GPU that the package runs on."""

    op: str
    kernel: str
    tokens: int
    why: str


# From few tokens to many; behind the last one, panels around torch's GEMM.
CROSSOVERS = (
    Crossover("lora_linear", "lora_linear_decode", MOST_DECODE_TOKENS, "its tile is 8 tokens wide"),
    Crossover(
        "lora_linear",
        "lora_linear_mixed",
        512,
        "model, not measured: decoding in the loop at a share e of the GEMM's rate beats decoding once below "
        "231 e / (1 - e) tokens, and e = 0.7 is hoped for",
    ),
)


class CudaBackend:
    """The functions of a backend over one library of CUDA launchers."""

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

    def lora_dropout(self, x: Tensor, p: float, rng: Tensor, first: int, out: Tensor) -> None:
        self._check_built()
        self._launchers.lora_dropout(x, p, rng, first, out)

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
        kernel, _ = self._kernel(base, x.shape[0], x.dtype, h.shape[1], lora_A, lora_B, bias)
        if kernel == "panels":
            arguments = (x, base, lora_A, lora_B, scaling, bias, dropout_p, rng, y, h)
            panels.lora_linear(self._panels, *arguments)
        elif kernel == "lora_linear_decode" and dropout_p == 0:
            self._launchers.lora_linear_decode(x, base, lora_A, lora_B, scaling, bias, y, h)
        else:
            h_given = lora_A is not None and (dropout_p > 0 or h.shape[1] > MOST_FUSED_RANK)
            if h_given:
                panels.shrink(self._panels, x, lora_A, dropout_p, rng, h)
            arguments = (x, base, lora_A, lora_B, scaling / (1 - dropout_p), bias, y, h, h_given)
            self._launchers.lora_linear_mixed(*arguments)

    def _kernel(
        self, base: BaseWeight, tokens: int, dtype: torch.dtype, rank: int, *others: Tensor | None
    ) -> tuple[str, str]:
        """The kernel of lora_linear without dropout, or "panels", and why."""
        reason = self._launchers.why_not_fused(base, dtype, rank, *others)
        if reason is not None:
            return "panels", reason
        for crossover in CROSSOVERS:
            if tokens <= crossover.tokens:
                return crossover.kernel, f"up to {crossover.tokens} tokens: {crossover.why}"
        return "panels", f"more than {CROSSOVERS[-1].tokens} tokens: {CROSSOVERS[-1].why}"

    def explain(self, base: BaseWeight, tokens: int, dtype: torch.dtype) -> list[str]:
        lines = panels.explain(base, dtype, decoder=f"CUDA nf4_dequantize ({self._archs or 'not built'})")
        if not self._archs:
            return lines
        kernel, why = self._kernel(base, tokens, dtype, 16)
        if kernel == "panels":
            return [*lines, f"why: {why}"]
        clustered = self._launchers.clustered(base.data.device) and kernel == "lora_linear_decode"
        lines[0] = (
            f"forward: CUDA {kernel}: one launch, W0 decoded in registers for all tokens, slices of K added "
            f"{'in a cluster' if clustered else 'through global memory'}; with dropout: lora_linear_mixed, "
            "and h from CUDA lora_dropout and torch's GEMM"
        )
        return [*lines, f"why: {why}"]


@functools.cache
def _capability(device: torch.device) -> int:
    """Of the device, as far as the library has code for it: clusters are in the code for sm_90 and later."""
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor

    def has_clusters(arch: str) -> bool:
        number = int(arch.removeprefix("ptx").rstrip("a"))
        runs_here = number <= capability and (arch.startswith("ptx") or number // 10 == major)
        return runs_here and number >= 90

    return capability if any(map(has_clusters, native._C.cuda_archs.split(";"))) else min(capability, 89)


_backend = CudaBackend(
    CudaLaunchers(torch.ops.lora_kernels, _capability, native.cuda_failure), native._C.cuda_archs
)
nf4_quantize, nf4_dequantize = _backend.nf4_quantize, _backend.nf4_dequantize
lora_dropout, explain = _backend.lora_dropout, _backend.explain
lora_linear, lora_linear_backward = _backend.lora_linear, _backend.lora_linear_backward
lora_linear_batched = _backend.lora_linear_batched
lora_linear_batched_backward = _backend.lora_linear_batched_backward
dora_linear, dora_linear_backward = _backend.dora_linear, _backend.dora_linear_backward

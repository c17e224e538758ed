"""The CPU backend: C++ kernels, and panels around torch's GEMM where that is faster or the only way."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import composed, panels
from lora_kernels.backends import native
from lora_kernels.backends.native import (
    _C,
    DTYPE_CODES,
    adamw8bit_step,
    adamw_step,
    cpu_isa,
    lion8bit_step,
    lion_step,
    lora_dropout,
    nf4_dequantize,
    nf4_quantize,
)
from lora_kernels.base_weight import BaseWeight

__all__ = [
    "adamw8bit_step",
    "adamw_step",
    "dora_linear",
    "dora_linear_backward",
    "explain",
    "lion8bit_step",
    "lion_step",
    "lora_dropout",
    "lora_linear",
    "lora_linear_backward",
    "lora_linear_batched",
    "lora_linear_batched_backward",
    "nf4_dequantize",
    "nf4_quantize",
]

_kernels = panels.Kernels(nf4_dequantize=nf4_dequantize, lora_dropout=lora_dropout)


class Crossover(NamedTuple):
    """From `tokens` on, torch's GEMM on decoded panels takes over from the fused kernels."""

    dtype: torch.dtype
    isa: str
    tokens: int
    why: str


# Everywhere else the fused kernels win for every T. On a Xeon without AMX (family 6, model 207, 2 cores, NF4
# 4096x4096, r = 16) torch's bf16 GEMM does 168 GFLOP/s, the fp32 kernels 270 to 290. On one with AMX
# gemm_bf16 takes 0.65 to 1.01 times as long as dense F.linear alone for 8 to 2048 tokens, backward 0.82 to
# 1.10 times dx alone, panels 1.12 to 2.48 times
# (bench/results/intel-xeon-processor-amx-2c/2026-11-28_233721_crossovers.md).
CROSSOVERS = (
    Crossover(
        torch.bfloat16,
        isa="avx512bf16",
        tokens=12,
        why="on two cores of a Zen 5 torch's bf16 GEMM does 800 GFLOP/s and a 4096x4096 weight is decoded in "
        "0.9 ms, measured; the vdpbf16ps kernels there: not measured",
    ),
)

forced_kernel: str | None = None  # "fused" or "panels": for tests and measurements


def _kernel(tokens: int, dtype: torch.dtype, *others: Tensor | None) -> tuple[str, str]:
    """'fused' or 'panels', and why."""
    if dtype == torch.float64 or any(t is not None and t.dtype == torch.float64 for t in others):
        return "panels", "the compiled kernels do not take float64"
    if forced_kernel is not None:
        return forced_kernel, "forced"
    for crossover in CROSSOVERS:
        if crossover.dtype == dtype and crossover.isa == cpu_isa():
            if tokens >= crossover.tokens:
                return "panels", crossover.why
            return "fused", f"fewer than {crossover.tokens} tokens: {crossover.why}"
    return "fused", "codes decoded where they are multiplied beat torch's GEMM here for every T"


def lora_linear(
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
    arguments = (x, base, lora_A, lora_B, scaling, bias, dropout_p, rng, y, h)
    if _kernel(x.shape[0], x.dtype, lora_A, lora_B, bias)[0] == "fused":
        native.lora_linear(*arguments)
    else:
        panels.lora_linear(_kernels, *arguments)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    base: BaseWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    dx: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
    dbias: Tensor | None,
) -> None:
    arguments = (dy, x, h, base, lora_A, lora_B, scaling, dropout_p, rng, dx, dA, dB, dbias)
    if _kernel(dy.shape[0], dy.dtype, lora_A, lora_B)[0] == "fused":
        native.lora_linear_backward(*arguments)
    else:
        panels.lora_linear_backward(_kernels, *arguments)


_composed = composed.Kernels(lora_linear, lora_linear_backward, _kernels)
lora_linear_batched = functools.partial(composed.lora_linear_batched, _composed)
lora_linear_batched_backward = functools.partial(composed.lora_linear_batched_backward, _composed)
dora_linear = functools.partial(composed.dora_linear, _composed)
dora_linear_backward = functools.partial(composed.dora_linear_backward, _composed)


_FUSED = {
    "few_tokens": "C++ few_tokens ({isa}): each 64 bytes of codes are decoded in registers and used at "
    "once, for all tokens",
    "gemm": "C++ gemm ({isa}): blocks of up to {block} tokens; W0 is decoded into L1, 32 outputs x 128 "
    "inputs at a time, for the whole block, and the LoRA product is a second term of the same fp32 sum",
    "gemm_bf16": "C++ gemm_bf16 ({isa}): blocks of up to {block} tokens; W0 is decoded to bf16 tiles, up to "
    "640 inputs at a time, for the whole block, and the LoRA product is a second term of the same fp32 sum",
}


def explain(base: BaseWeight, tokens: int, dtype: torch.dtype) -> list[str]:
    kernel, why = _kernel(tokens, dtype)
    if kernel == "panels":
        lines = panels.explain(base, dtype, decoder=f"C++ nf4_dequantize ({cpu_isa()})")
    else:
        blocksize = base.blocksize if base.quantized else 0
        code, shape = DTYPE_CODES[dtype], (base.out_features, base.in_features)
        fused, block, backward = _C.lora_linear_kernel(tokens, code, *shape, blocksize)
        if block != backward:
            block = f"{block} (backward {backward})"
        lines = ["forward, backward: " + _FUSED[fused].format(isa=cpu_isa(), block=block)]
    n, k = base.out_features, base.in_features
    stored = sum(t.nbytes for t in base[:4] if t is not None)
    return [
        *lines,
        f"why: {why}",
        f"floor: {stored / 1e6:.1f} MB of W0 read once, {2 * tokens * n * k / 1e9:.2f} G operations, "
        f"{tokens * (n + k) * dtype.itemsize / 1e6:.1f} MB of x and y",
    ]

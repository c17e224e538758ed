"""Random problems, rotating copies of them, and the check against float64 truth that precedes a timing."""

import math

import torch
from torch import Tensor

import lora_kernels as lk
from bench.shapes import BLOCKSIZE, RANK, SCALING
from lora_kernels import reference

# Largest error by norm, of what was computed in this dtype from inputs in this dtype.
LIMIT = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
CHECKED_ROWS = 64  # of the first tokens and as many of the last: enough for a norm, and cheap in float64


class Base:
    """One frozen weight W0 [N, K]: its NF4 form, its exact values, and the adapter that belongs to it."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device, rank: int = RANK) -> None:
        self.n, self.k, self.dtype, self.device = n, k, dtype, device
        values = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
        self.nf4 = lk.nf4_quantize(values, BLOCKSIZE)
        self.lora_A = (torch.randn(rank, k, device=device) * k**-0.5).to(dtype)  # [r, K]
        self.lora_B = (torch.randn(n, rank, device=device) * rank**-0.5).to(dtype)  # [N, r]
        self._truth: Tensor | None = None

    def truth(self) -> Tensor:
        """codebook·absmax [N, K], unrounded, float64."""
        if self._truth is None:
            parts = self.nf4.base_weight()[:4]
            self._truth = reference.nf4_dequantize(
                *parts, (self.n, self.k), self.nf4.blocksize, torch.float64
            )
        return self._truth

    def dense(self) -> Tensor:
        """The same weight rounded to `dtype`, as a dense layer would hold it."""
        return self.truth().to(self.dtype)


def copy_nf4(weight: lk.NF4Weight) -> lk.NF4Weight:
    """The same weight in other memory."""
    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    copies = (None if part is None else part.clone() for part in parts)
    return lk.NF4Weight(*copies, tuple(weight.shape), weight.blocksize, weight.dtype)


def set_count(bytes_per_set: int, cache_bytes: int, most: int = 64) -> int:
    """How many copies are together larger than three times the cache: 2 at least, `most` at most."""
    return max(2, min(most, math.ceil(3 * cache_bytes / max(1, bytes_per_set))))


def checked_rows(t: int) -> slice | Tensor:
    """The tokens whose outputs are compared: all, or the first and the last CHECKED_ROWS."""
    if t <= 2 * CHECKED_ROWS:
        return slice(None)
    return torch.cat([torch.arange(CHECKED_ROWS), torch.arange(t - CHECKED_ROWS, t)])


def relative_error(out: Tensor, truth: Tensor) -> float:
    """‖out − truth‖ / ‖truth‖; infinite where out is not finite."""
    error = float((out.double() - truth).norm() / truth.norm())
    return error if math.isfinite(error) else math.inf


def forward_error(
    y: Tensor, x: Tensor, base: Base, *, lora: bool = True, p: float = 0.0, rng: Tensor | None = None
) -> float:
    """Error of y [T, N] = x·W0ᵀ (+ s·(dropout(x)·Aᵀ)·Bᵀ) on the checked rows."""
    rows = checked_rows(x.shape[0])
    truth = x[rows].double() @ base.truth().T
    if lora:
        dropped = reference.lora_dropout(x, p, rng)[rows].double()
        truth += SCALING / (1 - p) * (dropped @ base.lora_A.double().T) @ base.lora_B.double().T
    return relative_error(y[rows], truth)


def backward_error(
    grads: tuple[Tensor, Tensor, Tensor],  # dx [T, K], dA [r, K], dB [N, r]
    dy: Tensor,
    x: Tensor,
    base: Base,
    *,
    p: float = 0.0,
    rng: Tensor | None = None,
) -> float:
    """The largest error of dx (on the checked rows), dA and dB."""
    rows, s = checked_rows(x.shape[0]), SCALING / (1 - p)
    A, B = base.lora_A.double(), base.lora_B.double()
    dropped = reference.lora_dropout(x, p, rng).double()
    g = s * (dy.double() @ B)  # [T, r]
    mask = 1.0 if p == 0 else reference.dropout_mask(tuple(x.shape), p, rng)[rows].double()
    dx = dy[rows].double() @ base.truth() + mask * (g[rows] @ A)
    truths = (dx, g.T @ dropped, s * (dy.double().T @ (dropped @ A.T)))
    outs = (grads[0][rows], *grads[1:])
    return max(relative_error(out, truth) for out, truth in zip(outs, truths, strict=True))


def assert_error(error: float, limit: float, what: str) -> float:
    """The error itself, for the record; a wrong result is not worth timing."""
    if not error <= limit:
        raise AssertionError(f"{what}: relative error {error:.2e} is over {limit:.0e}; not timed")
    return error

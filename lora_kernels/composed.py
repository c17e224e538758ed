"""lora_linear_batched and dora_linear out of a backend's lora_linear: the large products are its kernels.

Used by the cpu and cuda backends. What is computed here beside them has the size of the adapters and of one
factor T x N: the low-rank products of each adapter's rows, DoRA's norms, scaling by columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import panels
from lora_kernels.base_weight import BaseWeight
from lora_kernels.panels import zero_behind_rows


class Kernels(NamedTuple):
    """A backend's functions, and what its panel loops take."""

    lora_linear: Callable[..., None]
    lora_linear_backward: Callable[..., None]
    panels: panels.Kernels


def _base_product(kernels: Kernels, x: Tensor, base: BaseWeight, bias: Tensor | None, y: Tensor) -> None:
    """y [T, N] = x·W0ᵀ + bias."""
    h = x.new_empty(x.shape[0], 0)
    kernels.lora_linear(x, base, None, None, 1.0, bias, 0.0, None, y, h)


def _base_gradient(kernels: Kernels, dy: Tensor, base: BaseWeight, dx: Tensor) -> None:
    """dx [T, K] = dy·W0."""
    nothing = (None, None, 1.0, 0.0, None)
    kernels.lora_linear_backward(dy, None, None, base, *nothing, dx, None, None, None)


def _dropped(kernels: Kernels, x: Tensor, p: float, rng: Tensor | None) -> Tensor:
    """m⊙x."""
    if p == 0:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.panels.lora_dropout(x, p, rng, 0, out)
    return out


# ---- lora_linear_batched -----------------------------------------------------------------------------------


def _rows_by_adapter(adapter_index: Tensor, adapters: int) -> list[Tensor]:
    """The rows of every adapter, ascending: one sort for all. Rows of no adapter, and on a GPU of one that
    does not exist, are nobody's."""
    index = adapter_index.clamp(-1, adapters) + 1
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=adapters + 2).tolist()
    return list(order.split(counts)[1:-1])


def lora_linear_batched(
    kernels: Kernels,
    x: Tensor,  # [T, K]
    base: BaseWeight,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    adapter_index: Tensor,  # int64 [T]
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    y: Tensor,  # [T, N]
    h: Tensor,  # [T, max r]
) -> None:
    _base_product(kernels, x, base, bias, y)
    h.zero_()
    if not lora_A:
        return
    dropped = _dropped(kernels, x, dropout_p, rng)
    for rows, a, b, s in zip(
        _rows_by_adapter(adapter_index, len(lora_A)), lora_A, lora_B, scaling, strict=True
    ):
        if rows.numel() == 0:
            continue
        part = zero_behind_rows(dropped[rows]) @ a.to(x.dtype).T  # [rows, r_i]
        h[rows, : a.shape[0]] = part
        y[rows] = torch.addmm(y[rows], zero_behind_rows(part), b.to(x.dtype).T, alpha=s / (1 - dropout_p))


def lora_linear_batched_backward(
    kernels: Kernels,
    dy: Tensor,  # [T, N]
    x: Tensor | None,  # [T, K], needed for dA
    h: Tensor | None,  # [T, max r], needed for dB
    base: BaseWeight,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    adapter_index: Tensor,
    dropout_p: float,
    rng: Tensor | None,
    dx: Tensor | None,
    dA: list[Tensor | None],
    dB: list[Tensor | None],
    dbias: Tensor | None,
) -> None:
    """Sums over an adapter's rows run in the order of the rows: nothing is accumulated by atomics."""
    if dbias is not None:
        torch.sum(dy, dim=0, dtype=dbias.dtype, out=dbias)
    if dx is not None:
        _base_gradient(kernels, dy, base, dx)
    dropped = None if all(out is None for out in dA) else _dropped(kernels, x, dropout_p, rng)
    low = torch.zeros_like(dx) if dx is not None and dropout_p > 0 else None
    groups = zip(_rows_by_adapter(adapter_index, len(lora_A)), lora_A, lora_B, scaling, dA, dB, strict=True)
    for rows, a, b, s, dA_i, dB_i in groups:
        dy_i, scale = zero_behind_rows(dy[rows]), s / (1 - dropout_p)
        if dx is not None or dA_i is not None:
            g = dy.new_empty(rows.numel(), a.shape[0])
            torch.addmm(g, dy_i, b.to(dy.dtype), beta=0, alpha=scale, out=g)
            g = zero_behind_rows(g)
        if dB_i is not None:
            panels.token_product(dB_i, dy_i, h[rows, : a.shape[0]], scale)
        if dA_i is not None:
            panels.token_product(dA_i, g, dropped[rows], 1.0)
        if dx is None:
            continue
        if low is None:
            dx[rows] = torch.addmm(dx[rows], g, a.to(dy.dtype))
        else:
            low[rows] = g @ a.to(dy.dtype)
    if low is not None:
        kernels.panels.lora_dropout(low, dropout_p, rng, 0, low)
        dx.add_(low)


# ---- dora_linear -------------------------------------------------------------------------------------------


def dora_norm(
    kernels: Kernels, base: BaseWeight, lora_A: Tensor, lora_B: Tensor, s: float, norm: Tensor
) -> None:
    """‖W0 + s·B·A‖₂ of every row -> norm [N], by panels of rows: neither W0 nor the sum is ever whole.

    ‖w + s·Aᵀb‖² = ‖w‖² + 2s·(A·w)·b + s²·bᵀ(A·Aᵀ)b of a row w of W0 and b of B.
    """
    A, B = lora_A.to(norm.dtype), lora_B.to(norm.dtype)
    gram = A @ A.T
    for n0, n1, panel in panels.row_panels(kernels.panels, base, torch.float32):
        for first in range(n0, n1, 1024):  # a dense weight is one panel, of its own dtype
            last = min(first + 1024, n1)
            rows, b = panel[first - n0 : last - n0].to(norm.dtype), B[first:last]
            cross = (rows @ A.T * b).sum(dim=1)
            square = rows.square().sum(dim=1) + 2 * s * cross + s * s * ((b @ gram) * b).sum(dim=1)
            norm[first:last] = square.clamp_(min=0).sqrt()


def dora_linear(
    kernels: Kernels,
    x: Tensor,  # [T, K]
    base: BaseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,  # [N]
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    y: Tensor,  # [T, N]
    h: Tensor,  # [T, r]
    norm: Tensor,  # fp32 [N]
) -> None:
    """Without dropout y = c·u + bias with u = (W0 + s·B·A)·x, one product; with it W0·x takes another."""
    dora_norm(kernels, base, lora_A, lora_B, scaling, norm)
    c = magnitude.to(norm.dtype) / norm
    if dropout_p == 0:
        kernels.lora_linear(x, base, lora_A, lora_B, scaling, None, 0.0, None, y, h)
        y.mul_(c)  # an fp32 factor: one rounding
        if bias is not None:
            y.add_(bias)
        return
    dropped, keep = _dropped(kernels, x, dropout_p, rng), 1 / (1 - dropout_p)
    changed = torch.empty_like(y)  # (c-1)·W0·x' + c·s·B·h, up to keep
    torch.mm(zero_behind_rows(dropped), lora_A.to(x.dtype).T, out=h)
    _base_product(kernels, dropped, base, None, changed)
    changed.mul_(c - 1).add_((zero_behind_rows(h) @ lora_B.to(x.dtype).T).mul_(scaling * c))
    _base_product(kernels, x, base, bias, y)
    y.add_(changed, alpha=keep)


def dora_linear_backward(
    kernels: Kernels,
    dy: Tensor,  # [T, N]
    x: Tensor,  # [T, K]
    h: Tensor,  # [T, r]
    norm: Tensor,  # [N]
    base: BaseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    dx: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
    dmagnitude: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """dmagnitude needs u = W0·x' + s·B·h again: a product more, in place of keeping a T x N tensor."""
    keep, c = 1 / (1 - dropout_p), magnitude.to(norm.dtype) / norm
    if dbias is not None:
        torch.sum(dy, dim=0, dtype=dbias.dtype, out=dbias)
    if dmagnitude is not None:
        u, again = torch.empty_like(dy), torch.empty_like(h)
        dropped = _dropped(kernels, x, dropout_p, rng)
        kernels.lora_linear(dropped, base, lora_A, lora_B, scaling, None, 0.0, None, u, again)
        total = torch.zeros_like(norm)
        for piece, other in zip(dy.split(256), u.split(256), strict=True):
            total += (piece.to(norm.dtype) * other.to(norm.dtype)).sum(dim=0)
        dmagnitude.copy_(keep * total / norm)
        del u
    if dA is not None or dB is not None:
        # c goes into the factors of rank r, in c's precision: dA and dB are rounded once.
        whole = None if dB is None else lora_B.new_empty(lora_B.shape, dtype=norm.dtype)
        columns = c.unsqueeze(1)
        arguments = (dy, x, h, base, lora_A, columns * lora_B.to(norm.dtype), scaling, dropout_p, rng)
        kernels.lora_linear_backward(*arguments, None, dA, whole, None)
        if dB is not None:
            dB.copy_(whole.mul_(columns))
    if dx is None:
        return
    scaled = torch.mul(dy, c, out=torch.empty_like(dy))  # dy of u
    if dropout_p == 0:
        arguments = (scaled, None, None, base, lora_A, lora_B, scaling, 0.0, None)
        kernels.lora_linear_backward(*arguments, dx, None, None, None)
        return
    _base_gradient(kernels, torch.mul(dy, c - 1, out=torch.empty_like(dy)), base, dx)
    g = (zero_behind_rows(scaled) @ lora_B.to(dy.dtype)).mul_(scaling)
    dx.addmm_(zero_behind_rows(g), lora_A.to(dy.dtype)).mul_(keep)
    kernels.panels.lora_dropout(dx, dropout_p, rng, 0, dx)
    straight = torch.empty_like(dx)
    _base_gradient(kernels, dy, base, straight)
    dx.add_(straight)

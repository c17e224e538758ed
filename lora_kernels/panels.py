"""lora_linear and its backward as loops over panels of W0 around torch's GEMM.

An NF4 weight is never dequantised as a whole: a panel of its rows (forward) or a slab of its columns (dx) is
decoded into a workspace of about PANEL_BYTES (or the backend's own), multiplied, and the workspace is used
again. Row panels for y and column slabs for dx, so that every output element is one GEMM's fp32 sum over its
whole inner dimension: summing dx over row panels would round it to T once per panel.

The LoRA term of y has three ways, of which a backend may choose:
  FIRST   it is written, and the base product accumulates onto it: y is written twice and read once; one
          rounding of the small term instead of one more of the large sum
  LAST    the base product is written, and the backend's kernel adds the term to it: as many passes
  JOINED  y = [x | h]·[W0 | s·B]ᵀ, one GEMM over K + r: y is written once and rounded once, but x is copied
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.base_weight import BaseWeight

LONGEST_SUM = 2048  # of fp32 products that one call of the BLAS adds up
# Of a CPU: the GEMM of a panel amortises its start, and the panel stays in a last-level cache.
PANEL_BYTES = 8 << 20
FIRST, LAST, JOINED = "first", "last", "joined"


class Kernels(NamedTuple):
    """What a backend brings: `nf4_dequantize(base, row, col, out)`, `lora_dropout(x, p, rng, first, out)`.

    `start_shrink(x, lora_A, p, rng, h)` starts on h [T, r] = dropout(x)·Aᵀ, perhaps beside what follows; h is
    there when what it returns has been called. Without one, torch's GEMM is used. `panel_bytes`: of the
    workspace; None: PANEL_BYTES. `low_rank_way(x, base, rank)`: FIRST, LAST or (of an NF4 weight) JOINED;
    without one FIRST. `add_low_rank(h, lora_B, s, y)`: y [T, N] += s·h·Bᵀ, for LAST.
    """

    nf4_dequantize: Callable[[BaseWeight, int, int, Tensor], None]
    lora_dropout: Callable[[Tensor, float, Tensor, int, Tensor], None]
    start_shrink: Callable[[Tensor, Tensor, float, Tensor | None, Tensor], Callable[[], None]] | None = None
    panel_bytes: int | None = None
    low_rank_way: Callable[[Tensor, BaseWeight, int], str] | None = None
    add_low_rank: Callable[[Tensor, Tensor, float, Tensor], None] | None = None


def bind(function: Callable[..., None], kernels: Kernels) -> Callable[..., None]:
    return functools.partial(function, kernels)


def _spans(length: int, other: int, itemsize: int, panel_bytes: int | None) -> Iterator[tuple[int, int]]:
    """Cuts `length` lines of `other` elements into even spans of about panel_bytes, multiples of 64 lines."""
    most = PANEL_BYTES if panel_bytes is None else panel_bytes
    pieces = max(1, -(-length * other * itemsize // most))
    step = max(1, -(-length // pieces))
    step = min(length, -(-step // 64) * 64)
    for start in range(0, length, max(step, 1)):
        yield start, min(length, start + step)


def row_panels(
    kernels: Kernels, base: BaseWeight, dtype: torch.dtype, more: int = 0
) -> Iterator[tuple[int, int, Tensor]]:
    """(n0, n1, W0[n0:n1] in dtype); a panel is valid until the next one is asked for.

    `more`: of an NF4 weight, columns behind those of W0 for the caller to fill.
    """
    n, k = base.out_features, base.in_features
    if not base.quantized:
        yield 0, n, base.data
        return
    workspace = None
    for n0, n1 in _spans(n, k + more, dtype.itemsize, kernels.panel_bytes):
        if workspace is None:
            workspace = torch.empty(n1 - n0, k + more, dtype=dtype, device=base.data.device)
        panel = workspace[: n1 - n0]
        kernels.nf4_dequantize(base, n0, 0, panel[:, :k])
        yield n0, n1, panel


def _column_slabs(
    kernels: Kernels, base: BaseWeight, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """(k0, k1, W0[:, k0:k1] in dtype); a slab is valid until the next one is asked for."""
    n, k = base.out_features, base.in_features
    if not base.quantized:
        yield 0, k, base.data
        return
    workspace = None
    for k0, k1 in _spans(k, n, dtype.itemsize, kernels.panel_bytes):
        if workspace is None:
            workspace = torch.empty(n * (k1 - k0), dtype=dtype, device=base.data.device)
        slab = workspace[: n * (k1 - k0)].view(n, k1 - k0)
        kernels.nf4_dequantize(base, 0, k0, slab)
        yield k0, k1, slab


def zero_behind_rows(left: Tensor) -> Tensor:
    """`left` [M, L] as the left factor of a product: on a CPU, where that may matter, with zeros behind rows.

    With AMX, torch's bf16 GEMM (measured: 2.13) reads the rows of its left factor in steps of 2, and from 32
    elements on of 32, and multiplies what it finds behind their ends by zero: a NaN or an infinity there, of
    the next row or of no tensor at all, would make this row NaN.
    """
    length = left.shape[1]
    safe = length % 32 == 0 or (length < 32 and length % 2 == 0)
    if safe or left.device.type != "cpu" or left.element_size() != 2:
        return left
    wide = left.new_empty(left.shape[0], -(-length // 32) * 32)
    wide[:, length:] = 0
    return wide[:, :length].copy_(left)


def _dropped(kernels: Kernels, x: Tensor, p: float, rng: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """(t0, t1, (m⊙x)[t0:t1]): x itself without dropout, else chunks of about panel_bytes."""
    t, k = x.shape
    if p == 0:
        yield 0, t, x
        return
    for t0, t1 in _spans(t, k, x.element_size(), kernels.panel_bytes):
        chunk = x[t0:t1].contiguous()
        out = torch.empty_like(chunk)
        kernels.lora_dropout(chunk, p, rng, t0 * k, out)
        yield t0, t1, out


def shrink(
    kernels: Kernels, x: Tensor, lora_A: Tensor, dropout_p: float, rng: Tensor | None, h: Tensor
) -> None:
    """h [T, r] = dropout(x)·Aᵀ, by chunks of tokens where there is dropout."""
    a = lora_A.to(x.dtype)
    for t0, t1, dropped in _dropped(kernels, x, dropout_p, rng):
        _small_product(h[t0:t1], dropped, a.T, 1.0)


def lora_linear(
    kernels: Kernels,
    x: Tensor,  # [T, K]
    base: BaseWeight,
    lora_A: Tensor | None,  # [r, K]
    lora_B: Tensor | None,  # [N, r]
    scaling: float,
    bias: Tensor | None,  # [N]
    dropout_p: float,
    rng: Tensor | None,  # int64 [2]
    y: Tensor,  # [T, N]
    h: Tensor,  # [T, r]
) -> None:
    finish_shrink, rank, way = nothing, 0, FIRST
    s, k = scaling / (1 - dropout_p), x.shape[1]
    if lora_A is not None:
        b, rank = lora_B.to(x.dtype), lora_A.shape[0]
        if kernels.low_rank_way is not None:
            way = kernels.low_rank_way(x, base, rank)
        if kernels.start_shrink is None:
            shrink(kernels, x, lora_A, dropout_p, rng, h)
        else:
            finish_shrink = kernels.start_shrink(x, lora_A, dropout_p, rng, h)
    try:
        more = joined_columns(k, rank) if way == JOINED else 0
        left, low = _with_columns(x, more) if more else zero_behind_rows(x), None
        for n0, n1, panel in row_panels(kernels, base, x.dtype, more):
            out = y[:, n0:n1]
            start = None if bias is None else bias[n0:n1].to(x.dtype)
            if way != LAST and low is None:  # the first panel has been decoded beside it
                finish_shrink()
                finish_shrink, low = nothing, zero_behind_rows(h)
                if more:
                    left[:, k : k + rank] = h
            if more:
                torch.mul(b[n0:n1], s, out=panel[:, k : k + rank])
                panel[:, k + rank :] = 0
            elif lora_A is not None and way == FIRST:
                beta = 0 if start is None else 1  # with beta = 0 the addend is not read
                addend = out if start is None else start
                torch.addmm(addend, low, b[n0:n1].T, beta=beta, alpha=s, out=out)
                out.addmm_(left, panel.T)
                continue
            if start is not None:
                torch.addmm(start, left, panel.T, out=out)
            else:
                torch.mm(left, panel.T, out=out)
    finally:
        finish_shrink()  # whatever came: what is beside reads x and writes h
    if way == LAST:
        kernels.add_low_rank(h, lora_B, s, y)


def joined_columns(k: int, rank: int) -> int:
    """Behind K: the rank, and up to a multiple of 16, as GEMMs and nf4_dequantize like rows."""
    return -(-(k + rank) // 16) * 16 - k


def _with_columns(x: Tensor, more: int) -> Tensor:
    """A copy of x [T, K] with `more` zeros behind each row."""
    wide = x.new_empty(x.shape[0], x.shape[1] + more)
    wide[:, x.shape[1] :] = 0
    wide[:, : x.shape[1]] = x
    return zero_behind_rows(wide)


def nothing() -> None:
    pass


def _add_token_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total += scale · leftᵀ·right in fp32, a bounded piece of the tokens at a time."""
    rows = max(1, PANEL_BYTES // (4 * max(left.shape[1], right.shape[1], 1)))
    for piece, other in zip(left.split(rows), right.split(rows), strict=True):
        total.addmm_(piece.float().T, other.float(), alpha=scale)


def token_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out [M, L] = scale · leftᵀ·right of left [T, M] and right [T, L]: an fp32 sum, rounded once."""
    if left.dtype == out.dtype:
        torch.addmm(out, left.T, right, beta=0, alpha=scale, out=out)
        return
    total = out.zero_() if out.dtype == torch.float32 else torch.zeros_like(out, dtype=torch.float32)
    _add_token_product(total, left, right, scale)
    if total is not out:
        out.copy_(total)


def gradient_of_h(g: Tensor, dy: Tensor, lora_B: Tensor, scale: float) -> None:
    """g [T, r] = scale·dy·B: an fp32 sum, rounded once."""
    _small_product(g, dy, lora_B.to(dy.dtype), scale)


def _small_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out [T, r] = scale·left·right of left [T, L] and right [L, r], rounded once.

    In fp32 the sum of products of LONGEST_SUM: a BLAS that adds up all of L = 14336 in one chain (measured on
    a Zen 5) is 2.1 to 2.4e-6 off by norm, and 0.7 to 0.9e-6 so.
    """
    left, length = zero_behind_rows(left), left.shape[1]
    if out.dtype != torch.float32 or length <= LONGEST_SUM:
        torch.addmm(out, left, right, beta=0, alpha=scale, out=out)
        return
    torch.mm(left[:, :LONGEST_SUM], right[:LONGEST_SUM], out=out)
    for begin in range(LONGEST_SUM, length, LONGEST_SUM):
        out += left[:, begin : begin + LONGEST_SUM] @ right[begin : begin + LONGEST_SUM]
    out *= scale


def lora_linear_backward(
    kernels: Kernels,
    dy: Tensor,  # [T, N]
    x: Tensor | None,  # [T, K], needed for dA
    h: Tensor | None,  # [T, r], needed for dB
    base: BaseWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    dx: Tensor | None,  # [T, K]; an output that is None is not computed
    dA: Tensor | None,  # [r, K]
    dB: Tensor | None,  # [N, r]
    dbias: Tensor | None,  # [N] fp32
) -> None:
    s = scaling / (1 - dropout_p)
    g = None
    if lora_A is not None and (dx is not None or dA is not None):
        g = dy.new_empty(dy.shape[0], lora_A.shape[0])  # [T, r]
        gradient_of_h(g, dy, lora_B, s)
    if dbias is not None:
        torch.sum(dy, dim=0, dtype=dbias.dtype, out=dbias)
    if dB is not None:
        token_product(dB, dy, h, s)
    if dA is not None:
        if dropout_p == 0:
            token_product(dA, g, x, 1.0)
        else:
            total = torch.zeros_like(dA, dtype=torch.float32)
            for t0, t1, dropped in _dropped(kernels, x, dropout_p, rng):
                _add_token_product(total, g[t0:t1], dropped, 1.0)
            dA.copy_(total)
    if dx is not None:
        if g is not None:  # head, then mask, then the base product on top
            torch.mm(zero_behind_rows(g), lora_A.to(dy.dtype), out=dx)
            if dropout_p > 0:
                kernels.lora_dropout(dx, dropout_p, rng, 0, dx)
        base_gradient(kernels, dy, base, dx, add=g is not None)


def base_gradient(kernels: Kernels, dy: Tensor, base: BaseWeight, dx: Tensor, add: bool) -> None:
    """dx [T, K] = dy·W0, on top of what it holds where `add`."""
    dy = zero_behind_rows(dy)
    for k0, k1, slab in _column_slabs(kernels, base, dy.dtype):
        out = dx[:, k0:k1]
        if add:
            out.addmm_(dy, slab)
        else:
            torch.mm(dy, slab, out=out)


def explain(base: BaseWeight, dtype: torch.dtype, decoder: str, panel_bytes: int | None = None) -> list[str]:
    n, k = base.out_features, base.in_features
    if not base.quantized:
        return ["forward: torch's GEMM on the dense weight", "backward: torch's GEMM on the dense weight"]
    rows = list(_spans(n, k, dtype.itemsize, panel_bytes))
    cols = list(_spans(k, n, dtype.itemsize, panel_bytes))

    def line(name: str, spans: list[tuple[int, int]], what: str, length: int) -> str:
        size = spans[0][1] - spans[0][0]
        workspace = size * length * dtype.itemsize / 2**20
        return (
            f"{name}: {len(spans)} panel(s) of {size} {what} of W0, each decoded by {decoder} into a "
            f"workspace of {workspace:.1f} MiB and multiplied by torch's GEMM"
        )

    return [line("forward", rows, "rows", k), line("backward (dx)", cols, "columns", n)]

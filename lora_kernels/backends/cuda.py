"""The CUDA backend: fused kernels where there are some, else panels around torch's GEMM."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import composed, panels
from lora_kernels.backends import native
from lora_kernels.backends.cuda_launchers import (
    CLUSTER,
    MOST_ADAPTERS,
    MOST_DECODE_TOKENS,
    MOST_FUSED_RANK,
    CudaLaunchers,
    SortedRows,
    rank_rows,
)
from lora_kernels.base_weight import BaseWeight
from lora_kernels.optim_state import OPS

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


class Crossover(NamedTuple):
    """Up to `tokens` tokens `op` is computed by `kernel`.

    capability: of the GPUs from which on (10 * major + minor) the row holds; weights: N·K from which on. The
    first row of a kernel that fits counts.
    """

    op: str
    kernel: str
    tokens: int
    why: str  # a measurement, or "model, not measured"
    capability: int = 0
    weights: int = 0


class RankCrossover(NamedTuple):
    """Up to rank `rank` of the adapter `result` comes out of `kernel`, above it out of `beyond`."""

    result: str
    kernel: str
    rank: int
    beyond: str
    why: str


# From few tokens to many; behind the last one, panels around torch's GEMM.
CROSSOVERS = (
    Crossover(
        "lora_linear",
        "lora_linear_decode",
        MOST_DECODE_TOKENS,
        "model, not measured: its tile is 8 tokens wide, and up to there one pass over W0, bound by memory, "
        "is all that there is to do",
    ),
    Crossover(
        "lora_linear",
        "lora_linear_mixed",
        512,
        "model, not measured: decoding in the loop at a share e of the GEMM's rate beats decoding once below "
        "231 e / (1 - e) tokens, and e = 0.7 is hoped for",
    ),
    Crossover(
        "lora_linear_backward",
        "lora_linear_backward_dx",
        256,
        "model, not measured: as the forward's, with e = 0.55, since a weight takes twice the instructions",
    ),
)


PANEL_BYTES = 64 << 20
"""Of the workspace that holds a panel of W0 (all of it, where that is less).

Model, not measured: the GEMM of a panel has to fill the multiprocessors. Of a 4096 x 14336 weight in 16 bits,
8 MiB are 320 rows, for 2048 tokens 3 x 16 blocks of 128 x 128 for the 132 of an H100; 64 MiB are 2048 rows,
256 blocks.
"""

FUSED_H = RankCrossover(
    "h",
    "lora_linear_mixed",
    MOST_FUSED_RANK,
    "lora_shrink",
    "by its registers, not measured: the sums of h of 16 ranks lie beside those of y, and no more are left",
)

GRADIENT_OF_H = RankCrossover(
    "g",
    "lora_linear_backward_sweep",
    32,
    "torch's GEMM, or lora_shrink where there are several adapters",
    "model, not measured: partial sums of g are T·N/strip·r fp32 numbers, written and read, of strips of 512 "
    "columns (r <= 16), 256 (r <= 32) or 128: 1/8, 1/2 and r/32 of dy's bytes; reading dy once more is 1",
)


class WayCrossover(NamedTuple):
    """From N = `ratio`·K on panels take `way` (of panels.py) for the LoRA term, below it `below`."""

    way: str
    ratio: float
    below: str
    why: str


LOW_RANK_WAY = WayCrossover(
    panels.JOINED,
    2,
    panels.FIRST,
    "model, not measured: copying x moves 4·T·K bytes, y once more 4·T·N; at N = K the two are equal, and "
    "the copy takes a workspace",
)
WAYS = {
    panels.FIRST: "is written first, and the product accumulates onto it",
    panels.LAST: "is added by lora_expand",
    panels.JOINED: "in the same GEMM, of [x | h] and [W0 | s B]",
}
MOST_JOINED = 2
"""Workspaces of panels that the copy of x may take: 16384 tokens of K = 4096."""


class CudaBackend:
    """The functions of a backend over one library of CUDA launchers.

    `crossovers`: which kernel takes how many tokens; `panel_bytes`: of the workspace that a panel of W0 is
    decoded into; `low_rank_way`: the one way that panels take for the LoRA term, instead of LOW_RANK_WAY's.
    Benchmarks and tests bring their own.
    """

    def __init__(
        self,
        launchers: CudaLaunchers,
        archs: str,
        crossovers: tuple[Crossover, ...] = CROSSOVERS,
        panel_bytes: int = PANEL_BYTES,
        low_rank_way: str | None = None,
    ) -> None:
        self._launchers, self._archs, self._crossovers = launchers, archs, crossovers
        self._forced_way = low_rank_way
        self._panels = panels.Kernels(
            *(self.nf4_dequantize, self.lora_dropout, self._start_shrink, panel_bytes),
            *(self._low_rank_way, self._add_low_rank),
        )
        kernels = composed.Kernels(self.lora_linear, self.lora_linear_backward, self._panels)
        self._composed = kernels
        for op in OPS:
            setattr(self, op, functools.partial(self._step, op))
        self.dora_linear = functools.partial(composed.dora_linear, kernels)
        self.dora_linear_backward = functools.partial(composed.dora_linear_backward, kernels)

    def _check_built(self) -> None:
        if not self._archs:
            raise RuntimeError(
                "lora_kernels was built without CUDA (no nvcc was found). Install CUDA's compiler and build "
                'again, or choose the slow pure-PyTorch backend with lora_kernels.use_backend("reference")'
            )

    def _step(self, op: str, *arguments) -> bool:
        self._check_built()
        return getattr(self._launchers.optim_steps, op)(*arguments)

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
        others = (lora_A, lora_B, bias)
        kernel, _ = self._kernel("lora_linear", base, x.shape[0], x.dtype, h.shape[1], *others)
        if kernel == "panels":
            arguments = (x, base, lora_A, lora_B, scaling, bias, dropout_p, rng, y, h)
            panels.lora_linear(self._panels, *arguments)
        elif kernel == "lora_linear_decode" and dropout_p == 0:
            self._launchers.lora_linear_decode(x, base, lora_A, lora_B, scaling, bias, y, h)
        else:
            h_given = lora_A is not None and (dropout_p > 0 or h.shape[1] > FUSED_H.rank)
            if h_given:
                self._launchers.lora_shrink(x, [lora_A], dropout_p, rng, h)
            arguments = (x, base, lora_A, lora_B, scaling / (1 - dropout_p), bias, y, h, h_given)
            self._launchers.lora_linear_mixed(*arguments)

    def _start_shrink(
        self, x: Tensor, lora_A: Tensor, dropout_p: float, rng: Tensor | None, h: Tensor
    ) -> Callable[[], None]:
        """h beside what follows on the current stream, on a stream of its own; wait for it by calling."""
        if self._launchers.why_not_low_rank(x.dtype, lora_A) is not None:
            panels.shrink(self._panels, x, lora_A, dropout_p, rng, h)
            return panels.nothing
        if x.device.type != "cuda":
            self._launchers.lora_shrink(x, [lora_A], dropout_p, rng, h)
            return panels.nothing
        current, beside = torch.cuda.current_stream(x.device), _second_stream(x.device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            self._launchers.lora_shrink(x, [lora_A], dropout_p, rng, h)
        return lambda: current.wait_stream(beside)

    def _low_rank_way(self, x: Tensor, base: BaseWeight, rank: int) -> str:
        return self._way(base, x.shape[0], x.dtype, rank)

    def _way(self, base: BaseWeight, tokens: int, dtype: torch.dtype, rank: int) -> str:
        """Of panels: how the LoRA term comes to y."""
        if self._launchers.why_not_low_rank(dtype) is not None or rank == 0:
            return panels.FIRST
        k = base.in_features
        way = LOW_RANK_WAY.way if base.out_features >= LOW_RANK_WAY.ratio * k else LOW_RANK_WAY.below
        way = self._forced_way or way
        fits = tokens * k * dtype.itemsize <= MOST_JOINED * self._panels.panel_bytes
        return way if way != panels.JOINED or (fits and base.quantized) else LOW_RANK_WAY.below

    def _add_low_rank(self, h: Tensor, lora_B: Tensor, scaling: float, y: Tensor) -> None:
        self._launchers.lora_expand_forward(h, [lora_B], [scaling], y, add=True)

    def lora_linear_backward(
        self,
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
        """One sweep over dy, one over x, and dx on top of what they have in common: g.

        g of a large rank is a product of its own, since its partial sums would be larger than dy. A sweep
        takes 64 ranks: of more it reads its operand as many times.
        """
        self._check_built()
        if self._launchers.why_not_low_rank(dy.dtype, lora_A, lora_B) is not None:
            arguments = (dy, x, h, base, lora_A, lora_B, scaling, dropout_p, rng, dx, dA, dB, dbias)
            panels.lora_linear_backward(self._panels, *arguments)
            return
        g = None
        if lora_A is not None and lora_A.shape[0] > 0 and (dx is not None or dA is not None):
            g = rank_rows(dy, lora_A.shape[0])
        swept = g
        if g is not None and g.shape[1] > GRADIENT_OF_H.rank:
            panels.gradient_of_h(g, dy, lora_B, scaling / (1 - dropout_p))
            swept = None
        if swept is not None or dB is not None or dbias is not None:
            needless = lora_B is None or (swept is None and dB is None)  # dbias alone takes one pass over dy
            adapters = ([], []) if needless else ([lora_B], [scaling / (1 - dropout_p)])
            self._launchers.lora_linear_backward_dy(
                dy, h if dB is not None else None, *adapters, swept, [] if dB is None else [dB], dbias
            )
        if dA is not None and g is not None:
            self._launchers.lora_linear_backward_x(x, g, dropout_p, rng, [dA])
        if dx is None:
            return
        kernel, _ = self._kernel("lora_linear_backward", base, dy.shape[0], dy.dtype, 0, lora_A)
        if kernel != "panels":
            self._launchers.lora_linear_backward_dx(dy, base, lora_A, g, dropout_p, rng, dx)
            return
        if g is not None and dropout_p > 0:  # masked as it is written
            self._launchers.lora_expand_backward(g, [lora_A], dropout_p, rng, dx, add=False)
        elif g is not None:
            torch.mm(g, lora_A.to(dy.dtype), out=dx)
        panels.base_gradient(self._panels, dy, base, dx, add=g is not None)

    def lora_linear_batched(
        self,
        x: Tensor,
        base: BaseWeight,
        lora_A: list[Tensor],
        lora_B: list[Tensor],
        scaling: list[float],
        adapter_index: Tensor,
        bias: Tensor | None,
        dropout_p: float,
        rng: Tensor | None,
        y: Tensor,
        h: Tensor,
    ) -> None:
        """The base product of all rows, then each adapter's term on its own rows: two launches more."""
        self._check_built()
        arguments = (x, base, lora_A, lora_B, scaling, adapter_index, bias, dropout_p, rng, y, h)
        if self._launchers.why_not_low_rank(x.dtype, *lora_A, *lora_B) is not None:
            composed.lora_linear_batched(self._composed, *arguments)
            return
        self.lora_linear(x, base, None, None, 1.0, bias, 0.0, None, y, x.new_empty(x.shape[0], 0))
        h.zero_()
        for some, rows in _sorted_rows(adapter_index, len(lora_A)):
            if all(a.shape[0] == 0 for a in lora_A[some]):
                continue
            keep = [s / (1 - dropout_p) for s in scaling[some]]
            self._launchers.lora_shrink(x, lora_A[some], dropout_p, rng, h, rows)
            self._launchers.lora_expand_forward(h, lora_B[some], keep, y, add=True, rows=rows)

    def lora_linear_batched_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
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
        self._check_built()
        if self._launchers.why_not_low_rank(dy.dtype, *lora_A, *lora_B) is not None:
            arguments = (dy, x, h, base, lora_A, lora_B, scaling, adapter_index, dropout_p, rng)
            composed.lora_linear_batched_backward(self._composed, *arguments, dx, dA, dB, dbias)
            return
        nothing = (None, None, 1.0, 0.0, None)
        if dx is not None or dbias is not None:
            self.lora_linear_backward(dy, None, None, base, *nothing, dx, None, None, dbias)
        wanted = [out is not None for out in dA]
        for some, rows in _sorted_rows(adapter_index, len(lora_A)):
            rank = max(a.shape[0] for a in lora_A[some])
            if rank == 0:
                continue
            g = rank_rows(dy, rank) if dx is not None or any(wanted[some]) else None
            keep = [s / (1 - dropout_p) for s in scaling[some]]
            need_dB = any(out is not None for out in dB[some])
            swept = g
            if g is not None and rank > GRADIENT_OF_H.rank:
                heads = [b.T for b in lora_B[some]]
                self._launchers.lora_shrink(dy, heads, 0.0, None, g, rows, keep)
                swept = None
            if swept is not None or need_dB:
                self._launchers.lora_linear_backward_dy(
                    *(dy, h if need_dB else None, lora_B[some], keep, swept),
                    *(dB[some] if need_dB else [], None, rows),
                )
            if any(wanted[some]):
                self._launchers.lora_linear_backward_x(x, g, dropout_p, rng, dA[some], rows)
            if dx is not None:
                self._launchers.lora_expand_backward(g, lora_A[some], dropout_p, rng, dx, add=True, rows=rows)

    def _kernel(
        self, op: str, base: BaseWeight, tokens: int, dtype: torch.dtype, rank: int, *others: Tensor | None
    ) -> tuple[str, str]:
        """The kernel that multiplies by W0 in `op`, without dropout, or "panels", and why."""
        reason = self._launchers.why_not_fused(base, dtype, rank, *others)
        if reason is not None:
            return "panels", reason
        capability = self._launchers.capability(base.data.device)
        weights = base.out_features * base.in_features
        rows: dict[str, Crossover] = {}
        for row in self._crossovers:
            if row.op == op and row.capability <= capability and row.weights <= weights:
                rows.setdefault(row.kernel, row)
        for row in rows.values():
            if tokens <= row.tokens and not self._too_long(row.kernel, base, rank):
                return row.kernel, f"up to {row.tokens} tokens: {row.why}"
        last = list(rows.values())[-1]
        return "panels", f"more than {last.tokens} tokens: {last.why}"

    def _too_long(self, kernel: str, base: BaseWeight, rank: int) -> bool:
        return kernel == "lora_linear_decode" and self._launchers.decode_exchange(base, rank) is None

    def explain(self, base: BaseWeight, tokens: int, dtype: torch.dtype) -> list[str]:
        decoder = f"CUDA nf4_dequantize ({self._archs or 'not built'})"
        lines = panels.explain(base, dtype, decoder, self._panels.panel_bytes)
        if not self._archs:
            return lines
        kernel, why = self._kernel("lora_linear", base, tokens, dtype, 16)
        whys = [f"why: {why}"]
        if kernel != "panels":
            decodes = kernel == "lora_linear_decode"
            clustered = decodes and self._launchers.decode_exchange(base, 16) == CLUSTER
            lines[0] = (
                f"forward: CUDA {kernel}: one launch, W0 decoded in registers for all tokens, slices of K "
                f"added {'in a cluster' if clustered else 'through global memory'}; with dropout: "
                "lora_linear_mixed, and h from lora_shrink, which draws the mask as it reads x"
            )
        elif self._launchers.why_not_low_rank(dtype) is None:
            way = self._way(base, tokens, dtype, 16)
            lines[0] += f"; the LoRA term {WAYS[way]}"
            whys.append(
                f"why (LoRA term): joined from N = {LOW_RANK_WAY.ratio} K on, {LOW_RANK_WAY.below} below: "
                f"{LOW_RANK_WAY.why}"
            )
        kernel, why = self._kernel("lora_linear_backward", base, tokens, dtype, 0)
        if kernel != "panels":
            lines[1] = (
                f"backward (dx): CUDA {kernel}: one launch, W0 decoded in registers, the adapter's term and "
                "its mask in the same sums"
            )
            whys.append(f"why (backward): {why}")
        if self._launchers.why_not_low_rank(dtype) is None:
            lines.append(
                "gradients: CUDA lora_linear_backward_sweep: one sweep over dy for dB and dbias, and up to "
                f"rank {GRADIENT_OF_H.rank} for g (else by {GRADIENT_OF_H.beyond}), one over x for dA, the "
                "mask drawn again"
            )
        return [*lines, *whys]


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _sorted_rows(adapter_index: Tensor, adapters: int) -> list[tuple[slice, SortedRows]]:
    """The rows of every adapter, ascending, for as many adapters at a time as a launch takes: one sort."""
    index, order = torch.sort(adapter_index, stable=True)
    edges = torch.arange(adapters + 1, device=index.device)
    begins = torch.searchsorted(index, edges)
    pieces = [slice(a, min(a + MOST_ADAPTERS, adapters)) for a in range(0, adapters, MOST_ADAPTERS)]
    return [(some, SortedRows(order, begins[some.start : some.stop + 1])) for some in pieces]


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
adamw_step, adamw8bit_step, lion_step, lion8bit_step = (getattr(_backend, op) for op in OPS)

"""The CUDA launchers of one library: those of `_C`, or in the tests those of the host stand-in."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.native import _NONFINITE, OptimSteps, raise_for, unit_columns
from lora_kernels.base_weight import BaseWeight

_16_BIT = (torch.bfloat16, torch.float16)
_COMPILED = (torch.float32, *_16_BIT)
MOST_DECODE_TOKENS = 8
MOST_FUSED_RANK = 16  # h beside y in lora_linear_mixed
CLUSTER, GLOBAL_MEMORY = "a cluster", "global memory"
_QUANTIZE_SCRATCH = 2 + 256
"""int64 elements: whether a NaN or an infinity was met, a counter, LK_NF4_PARTIAL_SUMS of csrc/api.h."""


MOST_ADAPTERS = 64
"""Of one launch: LK_MOST_ADAPTERS of csrc/api.h."""


class SortedRows(NamedTuple):
    """Rows by adapter: those of adapter a are order[begins[a] : begins[a + 1]]."""

    order: Tensor  # int64 [T]
    begins: Tensor  # int64 [adapters + 1]


def rank_rows(like: Tensor, rank: int) -> Tensor:
    """An empty [T, r] of `like`'s dtype for its rows, each of which starts on 16 bytes."""
    return like.new_empty(like.shape[0], -(-rank // 8) * 8)[:, :rank]


def _in_pieces(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Matrices as kernels copy them: of `dtype`, to which they would be rounded anyway, rows on 16 bytes.

    Those that are not are copied, together: what has rank r is small, and read by every block.
    """
    ready = [
        m.dtype == dtype and m.stride(-1) == 1 and m.data_ptr() % 16 == 0 and m.stride(0) % 8 == 0
        for m in matrices
    ]
    others = [m for m, as_it_is in zip(matrices, ready, strict=True) if not as_it_is]
    if not others:
        return list(matrices)
    copies = [m.new_empty(m.shape[0], -(-m.shape[1] // 8) * 8, dtype=dtype)[:, : m.shape[1]] for m in others]
    torch._foreach_copy_(copies, others)
    rest = iter(copies)
    return [m if as_it_is else next(rest) for m, as_it_is in zip(matrices, ready, strict=True)]


class CudaLaunchers:
    """Calls launchers, allocates their scratch, turns their status codes into exceptions.

    ops: the namespace of their `out` overloads. capability: of a device, 10 * major + minor, or less where
    the library has no code for so new a one. failure: what a failed launch's cudaError_t is called.
    """

    def __init__(
        self, ops: object, capability: Callable[[torch.device], int], failure: Callable[[int], str]
    ) -> None:
        self._nf4_quantize = ops.nf4_quantize.out
        self._nf4_dequantize = ops.nf4_dequantize.out
        self._decode = ops.lora_linear_decode.out
        self._decode_takes = ops.lora_linear_decode_takes.default
        self._decode_scratch = ops.lora_linear_decode_scratch.default
        self._mixed, self._mixed_scratch = ops.lora_linear_mixed.out, ops.lora_linear_mixed_scratch.default
        self._mixed_takes = ops.lora_linear_mixed_takes.default
        self._lora_dropout = ops.lora_dropout.out
        self._shrink, self._shrink_scratch = ops.lora_shrink.out, ops.lora_shrink_scratch.default
        self._expand = ops.lora_expand.out
        self._backward_dy, self._backward_x = ops.lora_linear_backward_dy.out, ops.lora_linear_backward_x.out
        self._sweep_workspace = ops.lora_linear_backward_sweep_workspace.default
        self._backward_dx = ops.lora_linear_backward_dx.out
        self._backward_dx_scratch = ops.lora_linear_backward_dx_scratch.default
        self.optim_steps = OptimSteps(ops, failure)
        self._capability, self._failure = capability, failure
        # Of the kernels whose blocks meet at a counter: zero between launches, so one set serves every launch
        # on a stream, and no two streams may share one.
        self._counters: dict[tuple[torch.device, int], Tensor] = {}
        self._exchanges: dict[tuple, str | None] = {}

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
        """Waits for the device to learn whether the weight is finite; in a CUDA graph it never learns."""
        scratch = weight.new_zeros(_QUANTIZE_SCRATCH, dtype=torch.int64)
        outputs = {"codes": codes, "nested_absmax": nested_absmax, "offset": offset, "scratch": scratch}
        status = self._nf4_quantize(weight, blocksize, packed=packed, absmax=absmax, **outputs)
        capturing = weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if status == 0 and not capturing and scratch[0].item() != 0:
            status = _NONFINITE
        raise_for(status, "nf4_quantize", "weight", weight.dtype, self._failure)

    def nf4_dequantize(self, base: BaseWeight, row: int, col: int, out: Tensor) -> None:
        """The rectangle of W at (row, col) of out's shape -> out [rows, cols] with unit column stride."""
        status = self._nf4_dequantize(
            *(
                base.data,
                base.absmax,
                base.nested_absmax,
                base.offset,
                base.blocksize,
                base.in_features,
                row,
                col,
            ),
            out=out,
        )
        raise_for(status, "nf4_dequantize", "out", out.dtype, self._failure)

    def capability(self, device: torch.device) -> int:
        """Of a device, as far as the library has code for it: 10 * major + minor."""
        return self._capability(device)

    def decode_exchange(self, base: BaseWeight, rank: int) -> str | None:
        """Where slices of K of lora_linear_decode meet, of a base that `why_not_fused` has nothing against.

        CLUSTER or GLOBAL_MEMORY; None where K is too long for either, since a block holds a slice of x whole.
        """
        sizes = (base.out_features, base.in_features, rank, base.quantized)
        key = (base.data.device, self._capability(base.data.device), *sizes)
        if key not in self._exchanges:
            ways = (CLUSTER, GLOBAL_MEMORY) if key[1] >= 90 else (GLOBAL_MEMORY,)
            taken = (way for way in ways if self._decode_takes(base.data, *sizes, way == CLUSTER))
            self._exchanges[key] = next(taken, None)
        return self._exchanges[key]

    def why_not_fused(
        self, base: BaseWeight, dtype: torch.dtype, rank: int, *others: Tensor | None
    ) -> str | None:
        """Why the fused kernels do not take a call; None where they do."""
        if dtype not in _16_BIT:
            return f"{dtype} is not a 16-bit type"
        if any(t is not None and t.dtype not in _COMPILED for t in others):
            return "an adapter or bias in float64"
        if not base.quantized and base.data.stride(-1) != 1:
            return "columns of W0 do not lie beside each other, which torch's GEMM takes as it is"
        sizes = (base.out_features, base.in_features, base.blocksize if base.quantized else 0, rank)
        if not self._mixed_takes(base.data, *sizes):
            return (
                "the fused kernels need K % 64 = 0, NF4 blocks of 64 or more that do not straddle rows, rows "
                "that start on 16 bytes, and r <= 256"
            )
        return None

    def lora_linear_decode(
        self,
        x: Tensor,
        base: BaseWeight,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        bias: Tensor | None,
        y: Tensor,
        h: Tensor,
    ) -> None:
        clustered = self.decode_exchange(base, h.shape[1]) == CLUSTER
        sizes = (x.shape[0], base.out_features, base.in_features, h.shape[1], base.quantized, clustered)
        workspace, groups = self._decode_scratch(base.data, *sizes)
        status = self._decode(
            x,
            *(unit_columns(base.data), base.absmax, base.nested_absmax, base.offset, base.blocksize),
            *(unit_columns(lora_A), unit_columns(lora_B), scaling, unit_columns(bias), clustered),
            y=y,
            h=h,
            workspace=x.new_empty(workspace, dtype=torch.uint8),
            counters=self._counters_for(x.device, groups),
        )
        raise_for(status, "lora_linear_decode", "x", x.dtype, self._failure)

    def lora_linear_mixed(
        self,
        x: Tensor,
        base: BaseWeight,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        bias: Tensor | None,
        y: Tensor,
        h: Tensor,
        h_given: bool,
    ) -> None:
        """h is an output, or where it is given (dropout, or r > MOST_FUSED_RANK) an input."""
        (x,) = _in_pieces([x], x.dtype)
        if lora_A is not None and not h_given:  # where h is given, only its shape counts
            (lora_A,) = _in_pieces([lora_A], x.dtype)
        sizes = (x.shape[0], base.out_features, base.in_features, 0 if h_given else h.shape[1])
        workspace, counters = self._mixed_scratch(base.data, *sizes)
        status = self._mixed(
            x,
            *(unit_columns(base.data), base.absmax, base.nested_absmax, base.offset, base.blocksize),
            *(unit_columns(lora_A), unit_columns(lora_B), scaling, unit_columns(bias)),
            h if h_given else None,
            y=y,
            h=None if h_given else h,
            workspace=x.new_empty(workspace, dtype=torch.uint8),
            counters=self._counters_for(x.device, counters),
        )
        raise_for(status, "lora_linear_mixed", "x", x.dtype, self._failure)

    def why_not_low_rank(self, dtype: torch.dtype, *others: Tensor | None) -> str | None:
        """Why the kernels of the low-rank products do not take a call; None where they do."""
        if dtype not in _16_BIT:
            return f"{dtype} is not a 16-bit type"
        if any(t is not None and t.dtype not in _COMPILED for t in others):
            return "an adapter in float64"
        return None

    def lora_shrink(
        self,
        x: Tensor,
        lora_A: Sequence[Tensor],
        dropout_p: float,
        rng: Tensor | None,
        h: Tensor,
        rows: SortedRows | None = None,
        scaling: Sequence[float] | None = None,
    ) -> None:
        """h [T, r] = scaling·dropout(x)·Aᵀ of one adapter, or of up to MOST_ADAPTERS by `rows`."""
        rank = max(a.shape[0] for a in lora_A)
        workspace, counters = self._shrink_scratch(x, len(lora_A), rows is not None, rank)
        status = self._shrink(
            *(x, _in_pieces(lora_A, x.dtype), [1.0] * len(lora_A) if scaling is None else list(scaling)),
            *(dropout_p, rng if dropout_p > 0 else None),
            *(rows or (None, None)),
            h=h,
            workspace=x.new_empty(workspace, dtype=torch.uint8),
            counters=self._counters_for(x.device, counters),
        )
        raise_for(status, "lora_shrink", "x", x.dtype, self._failure)

    def lora_expand_forward(
        self,
        h: Tensor,
        lora_B: Sequence[Tensor],
        scaling: Sequence[float],
        y: Tensor,
        add: bool,
        rows: SortedRows | None = None,
    ) -> None:
        """y [T, N] (+)= scaling·h·Bᵀ."""
        (h,) = _in_pieces([h], h.dtype)
        arguments = (h, _in_pieces(lora_B, h.dtype), list(scaling), False, add, 0.0, None)
        status = self._expand(*arguments, *(rows or (None, None)), out=y)
        raise_for(status, "lora_expand", "h", h.dtype, self._failure)

    def lora_expand_backward(
        self,
        g: Tensor,
        lora_A: Sequence[Tensor],
        dropout_p: float,
        rng: Tensor | None,
        dx: Tensor,
        add: bool,
        rows: SortedRows | None = None,
    ) -> None:
        """dx [T, K] (+)= m⊙(g·A)."""
        rng = rng if dropout_p > 0 else None
        arguments = (g, _in_pieces(lora_A, g.dtype), [], True, add, dropout_p, rng)
        status = self._expand(*arguments, *(rows or (None, None)), out=dx)
        raise_for(status, "lora_expand", "g", g.dtype, self._failure)

    def lora_linear_backward_dy(
        self,
        dy: Tensor,
        h: Tensor | None,
        lora_B: Sequence[Tensor],
        scaling: Sequence[float],
        g: Tensor | None,
        dB: Sequence[Tensor | None],
        dbias: Tensor | None,
        rows: SortedRows | None = None,
    ) -> None:
        """One sweep over dy: g = scaling·dy·B, dB = scaling·dyᵀ·h, dbias; what is None is not computed."""
        rank = max((b.shape[1] for b in lora_B), default=0)
        g_stride = 0 if g is None else g.stride(0)
        workspace = self._sweep_workspace(dy, max(len(lora_B), 1), rank, g_stride)
        status = self._backward_dy(
            *(dy, None if h is None else _in_pieces([h], dy.dtype)[0]),
            *(_in_pieces(lora_B, dy.dtype), list(scaling)),
            *(rows or (None, None)),
            g=g,
            dB=[dy.new_empty(0) if out is None else out for out in dB],
            dbias=dbias,
            workspace=dy.new_empty(workspace, dtype=torch.uint8),
        )
        raise_for(status, "lora_linear_backward_dy", "dy", dy.dtype, self._failure)

    def lora_linear_backward_x(
        self,
        x: Tensor,
        g: Tensor,
        dropout_p: float,
        rng: Tensor | None,
        dA: Sequence[Tensor | None],
        rows: SortedRows | None = None,
    ) -> None:
        """One sweep over x: dA [r, K] = gᵀ·dropout(x)."""
        rank = max((out.shape[0] for out in dA if out is not None), default=0)
        workspace = self._sweep_workspace(x, len(dA), rank, 0)
        status = self._backward_x(
            *(x, g, dropout_p, rng if dropout_p > 0 else None),
            *(rows or (None, None)),
            dA=[x.new_empty(0) if out is None else out for out in dA],
            workspace=x.new_empty(workspace, dtype=torch.uint8),
        )
        raise_for(status, "lora_linear_backward_x", "x", x.dtype, self._failure)

    def lora_linear_backward_dx(
        self,
        dy: Tensor,
        base: BaseWeight,
        lora_A: Tensor | None,
        g: Tensor | None,
        dropout_p: float,
        rng: Tensor | None,
        dx: Tensor,
    ) -> None:
        """dx [T, K] = dy·W0 + m⊙(g·A) in one launch; g None: without the adapter."""
        if g is not None:
            (lora_A,) = _in_pieces([lora_A], dy.dtype)
        sizes = (dy.shape[0], base.out_features, base.in_features)
        workspace, counters = self._backward_dx_scratch(base.data, *sizes)
        status = self._backward_dx(
            *(dy, unit_columns(base.data), base.absmax, base.nested_absmax, base.offset, base.blocksize),
            *(None if g is None else lora_A, g, dropout_p, rng if dropout_p > 0 else None),
            dx=dx,
            workspace=dy.new_empty(workspace, dtype=torch.uint8),
            counters=self._counters_for(dy.device, counters),
        )
        raise_for(status, "lora_linear_backward_dx", "dy", dy.dtype, self._failure)

    def lora_dropout(self, x: Tensor, p: float, rng: Tensor, first: int, out: Tensor) -> None:
        """Contiguous x, whose first element is number `first` of the whole input -> out, or in place."""
        raise_for(self._lora_dropout(x, p, rng, first, out=out), "lora_dropout", "x", x.dtype, self._failure)

    def _counters_for(self, device: torch.device, count: int) -> Tensor:
        def fresh(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return fresh(count)  # belongs to the graph, as its workspace does
            stream = torch.cuda.current_stream(device).cuda_stream
        known = self._counters.get((device, stream))
        if known is None or known.numel() < count:
            known = self._counters[device, stream] = fresh(max(count, 1024))
        return known

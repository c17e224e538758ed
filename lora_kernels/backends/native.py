"""Loads the compiled library, calls its launchers, turns their status codes (csrc/api.h) into exceptions."""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.base_weight import BaseWeight
from lora_kernels.optim_state import OPS, ROUNDINGS
from lora_kernels.reference_optim import Hyper

try:
    from lora_kernels import _C
except ImportError as error:
    raise ImportError(
        "lora_kernels._C, the compiled kernels, could not be loaded. In a checkout, build it with "
        f"`python setup.py build_ext --inplace`. The loader said: {error}"
    ) from error

_ALL_ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
CPU_ISAS = _ALL_ISAS[: _ALL_ISAS.index(_C.cpu_best_isa) + 1]
"""The instruction sets of the CPU kernels that this machine has."""

cpu_isa = _C.cpu_isa  # () -> the one in use

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/api.h
_OTHER_DTYPE = -1  # which the launchers refuse


def select_cpu_isa(name: str) -> None:
    """Makes the CPU kernels use the instruction set `name`, in the whole process.

    Raises:
        ValueError: there is no such one, or this machine does not have it.
    """
    if _C.select_cpu_isa(name) != _OK:
        here = "this machine has" if name in _ALL_ISAS else "expected one of"
        raise ValueError(f"CPU instruction set: got {name!r}; {here} {', '.join(CPU_ISAS)}")


# The overloads themselves: choosing one by its arguments costs more than many a kernel.
_nf4_quantize = torch.ops.lora_kernels.nf4_quantize.out
_nf4_dequantize = torch.ops.lora_kernels.nf4_dequantize.out
_lora_dropout = torch.ops.lora_kernels.lora_dropout.out
_lora_linear = torch.ops.lora_kernels.lora_linear.out
_lora_linear_backward = torch.ops.lora_kernels.lora_linear_backward.out

_OK, _NONFINITE, _UNSUPPORTED_DTYPE, _NO_STREAM, _BAD_ARGUMENTS, _LAUNCH_FAILED = 0, 1, 2, 3, 6, 1000


def cuda_failure(code: int) -> str:
    return f"the CUDA launch failed with cudaError_t {code}"


def raise_for(
    status: int, op: str, tensor: str, dtype: torch.dtype, failure: Callable[[int], str] = cuda_failure
) -> None:
    """The exception that a launcher's status stands for; nothing where it is LK_OK."""
    if status == _OK:
        return
    if status == _NONFINITE:
        raise ValueError(f"{op}: {tensor} holds a NaN or an infinity; only finite values can be quantised")
    if status == _UNSUPPORTED_DTYPE:
        raise TypeError(
            f"{op}: {tensor} is {dtype}; the compiled kernels take float32, float16 and bfloat16 "
            '(lora_kernels.use_backend("reference") takes float64 too)'
        )
    if status == _NO_STREAM:
        raise RuntimeError(f"{op}: this build of torch has no CUDA stream; install torch with CUDA")
    raise RuntimeError(f"{op}: {failure(status - _LAUNCH_FAILED)}")


def nf4_quantize(
    weight: Tensor,
    blocksize: int,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
) -> None:
    status = _nf4_quantize(
        weight,
        blocksize,
        packed=packed,
        absmax=absmax,
        codes=codes,
        nested_absmax=nested_absmax,
        offset=offset,
    )
    raise_for(status, "nf4_quantize", "weight", weight.dtype)


def nf4_dequantize(base: BaseWeight, row: int, col: int, out: Tensor) -> None:
    """The rectangle of W at (row, col) of out's shape -> out [rows, cols], which has unit column stride."""
    status = _nf4_dequantize(
        base.data,
        base.absmax,
        base.nested_absmax,
        base.offset,
        base.blocksize,
        base.in_features,
        row,
        col,
        out=out,
    )
    raise_for(status, "nf4_dequantize", "out", out.dtype)


def lora_dropout(x: Tensor, p: float, rng: Tensor, first: int, out: Tensor) -> None:
    """Contiguous x, whose first element is element `first` of the whole input -> out; out may be x itself."""
    status = _lora_dropout(x, p, rng, first, out=out)
    raise_for(status, "lora_dropout", "x", x.dtype)


def unit_columns(matrix: Tensor | None) -> Tensor | None:
    """The matrix itself where the elements of a row lie side by side, else a copy in which they do."""
    return matrix if matrix is None or matrix.stride(-1) == 1 else matrix.contiguous()


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
    size = _C.lora_linear_workspace(
        x.shape[0], DTYPE_CODES.get(x.dtype, _OTHER_DTYPE), x.shape[1], h.shape[1]
    )
    status = _lora_linear(
        x,
        *(unit_columns(base.data), base.absmax, base.nested_absmax, base.offset, base.blocksize),
        *(unit_columns(lora_A), unit_columns(lora_B), scaling, unit_columns(bias), dropout_p, rng),
        y=y,
        h=h,
        workspace=x.new_empty(size, dtype=torch.uint8),
    )
    raise_for(status, "lora_linear", "x", x.dtype)


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
    if dbias is not None:
        torch.sum(dy, dim=0, dtype=dbias.dtype, out=dbias)
    if dx is None and dA is None and dB is None:
        return
    rank = 0 if lora_A is None else lora_A.shape[0]
    (tokens, n), dtype = dy.shape, DTYPE_CODES.get(dy.dtype, _OTHER_DTYPE)
    size = _C.lora_linear_backward_workspace(tokens, dtype, n, base.in_features, rank, dropout_p > 0)
    status = _lora_linear_backward(
        *(dy, x, h),
        *(unit_columns(base.data), base.absmax, base.nested_absmax, base.offset, base.blocksize),
        *(base.in_features, unit_columns(lora_A), unit_columns(lora_B), scaling, dropout_p, rng),
        dx=dx,
        dA=dA,
        dB=dB,
        workspace=dy.new_empty(size, dtype=torch.uint8),
    )
    raise_for(status, "lora_linear_backward", "dy", dy.dtype)


class OptimSteps:
    """adamw_step and its relatives, in `ops`: torch.ops of one namespace. False: the arguments do not fit
    together, and nothing was done."""

    def __init__(self, ops: object, failure: Callable[[int], str] = cuda_failure) -> None:
        for op in OPS:
            overload = getattr(ops, op).status
            setattr(self, op, functools.partial(self._step, op, overload, failure))

    @staticmethod
    def _step(
        op: str,
        overload: Callable[..., int],
        failure: Callable[[int], str],
        params: list[Tensor],
        grads: list[Tensor],
        pages: list[Tensor],
        segments: Tensor,
        tick: int,
        h: Hyper,
    ) -> bool:
        rounding = ROUNDINGS.index(h.rounding)
        status = overload(params, grads, pages, segments, tick, *h[:5], rounding, h.seed)
        if status == _BAD_ARGUMENTS:
            return False
        raise_for(status, op, "params", params[0].dtype if params else torch.float32, failure)
        return True


_optim = OptimSteps(torch.ops.lora_kernels)
adamw_step, adamw8bit_step, lion_step, lion8bit_step = (getattr(_optim, op) for op in OPS)

if os.environ.get("LORA_KERNELS_CPU_ISA"):
    try:
        select_cpu_isa(os.environ["LORA_KERNELS_CPU_ISA"])
    except ValueError as error:
        raise ImportError(f"LORA_KERNELS_CPU_ISA: {error}") from error

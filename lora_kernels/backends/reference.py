"""The specification as a backend: what `lora_kernels.reference` returns, copied into the outputs."""

import functools

import torch
from torch import Tensor

from lora_kernels import reference, reference_optim
from lora_kernels.base_weight import BaseWeight
from lora_kernels.checks_optim import check_step
from lora_kernels.optim_state import OPS


def _dense(base: BaseWeight, dtype: torch.dtype) -> Tensor:
    if not base.quantized:
        return base.data
    shape = (base.out_features, base.in_features)
    return reference.nf4_dequantize(
        base.data, base.absmax, base.nested_absmax, base.offset, shape, base.blocksize, dtype
    )


def _copy(outputs: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...]) -> None:
    for out, result in zip(outputs, results, strict=True):
        if out is not None:
            out.copy_(result)


def nf4_quantize(
    weight: Tensor,
    blocksize: int,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            "nf4_quantize: weight holds a NaN or an infinity; only finite values can be quantised"
        )
    results = reference.nf4_quantize(weight, blocksize, double_quant=codes is not None)
    outputs = (packed, absmax) if codes is None else (packed, codes, nested_absmax, offset)
    for out, result in zip(outputs, results, strict=False):
        out.copy_(result)


def nf4_dequantize(base: BaseWeight, row: int, col: int, out: Tensor) -> None:
    rows, cols = out.shape
    out.copy_(_dense(base, out.dtype)[row : row + rows, col : col + cols])


def lora_dropout(x: Tensor, p: float, rng: Tensor, first: int, out: Tensor) -> None:
    keep = reference.dropout_mask(x.shape, p, rng, first)
    out.copy_(torch.where(keep, x, torch.zeros_like(x)))


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
    weight = _dense(base, x.dtype)
    y_result, h_result = reference.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p, rng)
    y.copy_(y_result)
    h.copy_(h_result)


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
    rank = 0 if lora_A is None else lora_A.shape[0]
    results = reference.lora_linear_backward(
        dy,
        dy.new_zeros(dy.shape[0], base.in_features) if x is None else x,
        dy.new_zeros(dy.shape[0], rank) if h is None else h,
        _dense(base, dy.dtype),
        lora_A,
        lora_B,
        scaling,
        dropout_p,
        rng,
    )
    _copy((dx, dA, dB, dbias), results)


def lora_linear_batched(
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
    arguments = (lora_A, lora_B, scaling, adapter_index, bias, dropout_p, rng)
    _copy((y, h), reference.lora_linear_batched(x, _dense(base, x.dtype), *arguments))


def lora_linear_batched_backward(
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
    rank = max((a.shape[0] for a in lora_A), default=0)
    x = dy.new_zeros(dy.shape[0], base.in_features) if x is None else x
    h = dy.new_zeros(dy.shape[0], rank) if h is None else h
    arguments = (lora_A, lora_B, scaling, adapter_index, dropout_p, rng)
    results = reference.lora_linear_batched_backward(dy, x, h, _dense(base, dy.dtype), *arguments)
    _copy((dx, *dA, *dB, dbias), (results[0], *results[1], *results[2], results[3]))


def dora_linear(
    x: Tensor,
    base: BaseWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    y: Tensor,
    h: Tensor,
    norm: Tensor,
) -> None:
    arguments = (lora_A, lora_B, magnitude, scaling, bias, dropout_p, rng)
    _copy((y, h, norm), reference.dora_linear(x, _dense(base, x.dtype), *arguments))


def dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    norm: Tensor,
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
    arguments = (lora_A, lora_B, magnitude, scaling, dropout_p, rng)
    results = reference.dora_linear_backward(dy, x, h, norm, _dense(base, dy.dtype), *arguments)
    _copy((dx, dA, dB, dmagnitude, dbias), results)


def _step(op: str, params, grads, pages, segments: Tensor, tick: int, h: reference_optim.Hyper) -> bool:
    check_step(op, params, grads, pages, segments, h.rounding)
    reference_optim.step_pages(op, params, grads, pages, segments, tick, h)
    return True


adamw_step, adamw8bit_step, lion_step, lion8bit_step = (functools.partial(_step, op) for op in OPS)


def explain(base: BaseWeight, tokens: int, dtype: torch.dtype) -> list[str]:
    return ["forward, backward: the pure-PyTorch specification (slow; for tests and float64)"]

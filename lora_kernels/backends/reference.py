"""The specification as a backend: what `lora_kernels.reference` returns, copied into the outputs."""

import torch
from torch import Tensor

from lora_kernels import reference
from lora_kernels.base_weight import BaseWeight


def _dense(base: BaseWeight, dtype: torch.dtype) -> Tensor:
    if not base.quantized:
        return base.data
    shape = (base.out_features, base.in_features)
    return reference.nf4_dequantize(
        base.data, base.absmax, base.nested_absmax, base.offset, shape, base.blocksize, dtype
    )


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
    for out, result in zip((dx, dA, dB, dbias), results, strict=True):
        if out is not None:
            out.copy_(result)


def explain(base: BaseWeight, tokens: int, dtype: torch.dtype) -> list[str]:
    return ["forward, backward: the pure-PyTorch specification (slow; for tests and float64)"]

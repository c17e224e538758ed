"""The ops of namespace `lora_kernels`: schema, checks, allocation, fake kernels, and the call into a backend.

Every op checks its arguments (ValueError or TypeError naming the argument, what it got and what it may be)
and allocates its outputs here; backends only compute. The same checks and allocations serve the fake kernels,
so an error under torch.compile is the error of eager mode. Autograd is in `lora_kernels.functional`.

An NF4 weight travels as (weight, absmax, nested_absmax, offset, blocksize); a dense one as weight alone.
"""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.backends import backend_for
from lora_kernels.base_weight import BaseWeight
from lora_kernels.checks import (
    FLOATS,
    ceil_div,
    check_adapter,
    check_adapter_index_values,
    check_adapters,
    check_base,
    check_blocksize,
    check_device,
    check_dtype,
    check_scalars,
    check_shape,
    check_x,
)
from lora_kernels.reference import NESTED_BLOCKSIZE

_WEIGHT = "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int blocksize"

_library = torch.library.Library("lora_kernels", "FRAGMENT")


# ---- the way into a backend --------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """[..., K] as [T, K] with unit column stride and rows that do not overlap: a view where it can be."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    plain = flat.stride(1) == 1 and flat.stride(0) >= max(1, flat.shape[1])
    return flat if plain else flat.contiguous()


def _as_rows(out: Tensor) -> Tensor:
    """An output [..., K] as a view [T, K]; view(-1, K) does not know T where K is 0."""
    return out.view(math.prod(out.shape[:-1]), out.shape[-1])


def _dense(small: Tensor | None) -> Tensor | None:
    """rng, h and norm as the kernels read them: without their strides."""
    return None if small is None else small.contiguous()


def _contiguous(base: BaseWeight) -> BaseWeight:
    if not base.quantized:
        return base
    tensors = (t if t is None else t.contiguous() for t in base[:4])
    return BaseWeight(*tensors, *base[4:])


def _without_autocast(function: Callable) -> Callable:
    """An op computes in the dtypes it was given: autocast is the business of whoever calls it."""

    def run(*args):
        device_type = next(a.device.type for a in args if isinstance(a, Tensor))
        off = contextlib.nullcontext()
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            off = torch.autocast(device_type, enabled=False)
        with off:
            return function(*args)

    return run


def define_op(schema: str, function: Callable, fake: Callable) -> Callable:
    """Registers the op. Returns its function, for callers that need no dispatcher."""
    name = schema.split("(", 1)[0]
    eager = _without_autocast(function)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{name}", fake, lib=_library)
    return eager


# ---- nf4_quantize ------------------------------------------------------------------------------------------


def _nf4_quantize_outputs(
    weight: Tensor, blocksize: int = 64, double_quant: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "nf4_quantize"
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected 2 dimensions [N, K]")
    check_dtype(op, "weight", weight, (torch.float32, torch.float16, torch.bfloat16))
    check_blocksize(op, blocksize)
    n = weight.numel()
    blocks = ceil_div(n, blocksize)
    packed = weight.new_empty((ceil_div(n, 2), 1), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = weight.new_empty(ceil_div(blocks, NESTED_BLOCKSIZE) if double_quant else 0, dtype=torch.float32)
    return packed, absmax, nested, weight.new_empty((), dtype=torch.float32)


def _nf4_quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = True):
    packed, absmax, nested_absmax, offset = _nf4_quantize_outputs(weight, blocksize, double_quant)
    if weight.device.type == "meta":
        return packed, absmax, nested_absmax, offset
    quantize = backend_for(weight.device).nf4_quantize
    weight = weight.contiguous()
    if double_quant:
        scales = weight.new_empty(absmax.shape, dtype=torch.float32)
        quantize(weight, blocksize, packed, scales, absmax, nested_absmax, offset)
    else:
        quantize(weight, blocksize, packed, absmax, None, None, None)
        offset.zero_()
    return packed, absmax, nested_absmax, offset


define_op(
    "nf4_quantize(Tensor weight, int blocksize=64, bool double_quant=True) -> "
    "(Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset)",
    _nf4_quantize,
    _nf4_quantize_outputs,
)

# ---- nf4_dequantize ----------------------------------------------------------------------------------------


def _nf4_dequantize_output(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[BaseWeight, Tensor]:
    op = "nf4_dequantize"
    if len(shape) != 2:
        raise ValueError(f"{op}: shape is {tuple(shape)}, expected two sizes [N, K]")
    base = BaseWeight(weight, absmax, nested_absmax, offset, blocksize, *shape)
    out = weight.new_empty(tuple(shape), dtype=dtype)
    check_dtype(op, "dtype", out, FLOATS)
    check_base(op, base, weight, "weight")
    return base, out


def _nf4_dequantize(*args) -> Tensor:
    base, out = _nf4_dequantize_output(*args)
    if out.numel() and out.device.type != "meta":
        backend_for(out.device).nf4_dequantize(_contiguous(base), 0, 0, out)
    return out


define_op(
    "nf4_dequantize(Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int blocksize, "
    "SymInt[] shape, ScalarType dtype) -> Tensor",
    _nf4_dequantize,
    lambda *args: _nf4_dequantize_output(*args)[1],
)

# ---- lora_linear -------------------------------------------------------------------------------------------


def _lora_linear_outputs(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out_features: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
) -> tuple[BaseWeight, Tensor, Tensor]:
    op = "lora_linear"
    base = check_x(op, x, weight, absmax, nested_absmax, offset, blocksize, out_features, bias)
    check_adapter(op, base, x.device, lora_A, lora_B)
    check_scalars(op, scaling, dropout_p, rng, x.device)
    tokens = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], out_features))
    return base, y, x.new_empty((tokens, 0 if lora_A is None else lora_A.shape[0]))


def _lora_linear(*args) -> tuple[Tensor, Tensor]:
    base, y, h = _lora_linear_outputs(*args)
    x, lora_A, lora_B, scaling, bias, dropout_p, rng = args[0], *args[7:]
    if y.device.type != "meta" and h.shape[0] > 0:
        y2 = y.view(h.shape[0], base.out_features)
        base, x2 = _contiguous(base), _rows(x)
        arguments = (lora_A, lora_B, scaling, bias, dropout_p, _dense(rng))
        backend_for(x.device).lora_linear(x2, base, *arguments, y2, h)
    return y, h


lora_linear = define_op(
    f"lora_linear(Tensor x, {_WEIGHT}, SymInt out_features, Tensor? lora_A, Tensor? lora_B, float scaling, "
    "Tensor? bias, float dropout_p, Tensor? rng) -> (Tensor y, Tensor h)",
    _lora_linear,
    lambda *args: _lora_linear_outputs(*args)[1:],
)

# ---- lora_linear_backward ----------------------------------------------------------------------------------


def _lora_linear_backward_outputs(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    in_features: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    needs: list[bool],
) -> tuple[BaseWeight, list[Tensor | None]]:
    op = "lora_linear_backward"
    check_dtype(op, "dy", dy, FLOATS)
    base = BaseWeight(weight, absmax, nested_absmax, offset, blocksize, dy.shape[-1], in_features)
    check_base(op, base, dy, "dy")
    check_adapter(op, base, dy.device, lora_A, lora_B)
    check_scalars(op, scaling, dropout_p, rng, dy.device)
    need_dx, need_dA, need_dB, need_dbias = needs
    if (need_dA or need_dB) and lora_A is None:
        raise ValueError(f"{op}: needs asks for dA or dB, but there is no adapter")
    tokens = math.prod(dy.shape[:-1])
    if need_dA:
        if x is None:
            raise ValueError(f"{op}: dA needs x")
        check_shape(op, "x", x, (*dy.shape[:-1], in_features), "[..., K]")
        check_dtype(op, "x", x, (dy.dtype,))
    if need_dB:
        if h is None:
            raise ValueError(f"{op}: dB needs h")
        check_shape(op, "h", h, (tokens, lora_A.shape[0]), "[T, r]")
        check_dtype(op, "h", h, (dy.dtype,))
    check_device(op, dy.device, x=x, h=h)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return base, [
        dy.new_empty((*dy.shape[:-1], in_features)) if need_dx else None,
        lora_A.new_empty(lora_A.shape) if need_dA else None,
        lora_B.new_empty(lora_B.shape) if need_dB else None,
        dy.new_empty(dy.shape[-1], dtype=wide) if need_dbias else None,
    ]


def _present(outputs: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors: one that was not asked for is empty."""
    return tuple(like.new_empty(0) if out is None else out for out in outputs)


def _lora_linear_backward(*args) -> tuple[Tensor, ...]:
    base, outputs = _lora_linear_backward_outputs(*args)
    dy, x, h = args[:3]
    lora_A, lora_B, scaling, dropout_p, rng, needs = args[9:]
    if dy.device.type == "meta":
        return _present(outputs, dy)
    if math.prod(dy.shape[:-1]) == 0:
        for out in outputs:
            if out is not None:
                out.zero_()
        return _present(outputs, dy)
    dx = None if outputs[0] is None else _as_rows(outputs[0])
    x = _rows(x) if needs[1] else None
    h = _dense(h) if needs[2] else None
    backend_for(dy.device).lora_linear_backward(
        *(_rows(dy), x, h, _contiguous(base), lora_A, lora_B, scaling, dropout_p, _dense(rng)),
        *(dx, *outputs[1:]),
    )
    return _present(outputs, dy)


lora_linear_backward = define_op(
    f"lora_linear_backward(Tensor dy, Tensor? x, Tensor? h, {_WEIGHT}, SymInt in_features, Tensor? lora_A, "
    "Tensor? lora_B, float scaling, float dropout_p, Tensor? rng, bool[] needs) -> "
    "(Tensor dx, Tensor dA, Tensor dB, Tensor dbias)",
    _lora_linear_backward,
    lambda *args: _present(_lora_linear_backward_outputs(*args)[1], args[0]),
)

# ---- lora_linear_batched -----------------------------------------------------------------------------------


def _lora_linear_batched_outputs(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out_features: int,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    adapter_index: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
) -> tuple[BaseWeight, Tensor, Tensor]:
    op = "lora_linear_batched"
    base = check_x(op, x, weight, absmax, nested_absmax, offset, blocksize, out_features, bias)
    check_scalars(op, 1.0, dropout_p, rng, x.device)
    check_adapters(op, base, x, lora_A, lora_B, scaling, adapter_index, x.shape[:-1])
    tokens = math.prod(x.shape[:-1])
    rank = max((a.shape[0] for a in lora_A), default=0)
    return base, x.new_empty((*x.shape[:-1], out_features)), x.new_empty((tokens, rank))


def _lora_linear_batched(*args) -> tuple[Tensor, Tensor]:
    base, y, h = _lora_linear_batched_outputs(*args)
    x, lora_A, lora_B, scaling, adapter_index, bias, dropout_p, rng = args[0], *args[7:]
    if y.device.type != "meta" and h.shape[0] > 0:
        check_adapter_index_values("lora_linear_batched", adapter_index, len(lora_A))
        index, y2 = adapter_index.reshape(-1), y.view(h.shape[0], base.out_features)
        arguments = (lora_A, lora_B, scaling, index, bias, dropout_p, _dense(rng), y2, h)
        backend_for(x.device).lora_linear_batched(_rows(x), _contiguous(base), *arguments)
    return y, h


define_op(
    f"lora_linear_batched(Tensor x, {_WEIGHT}, SymInt out_features, Tensor[] lora_A, Tensor[] lora_B, "
    "float[] scaling, Tensor adapter_index, Tensor? bias, float dropout_p, Tensor? rng) -> "
    "(Tensor y, Tensor h)",
    _lora_linear_batched,
    lambda *args: _lora_linear_batched_outputs(*args)[1:],
)


def _lora_linear_batched_backward_outputs(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    in_features: int,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    adapter_index: Tensor,
    dropout_p: float,
    rng: Tensor | None,
    needs: list[bool],
) -> tuple[BaseWeight, Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    """`needs`: dx, dbias, then dA of every adapter, then dB of every adapter."""
    op = "lora_linear_batched_backward"
    check_dtype(op, "dy", dy, FLOATS)
    base = BaseWeight(weight, absmax, nested_absmax, offset, blocksize, dy.shape[-1], in_features)
    check_base(op, base, dy, "dy")
    check_scalars(op, 1.0, dropout_p, rng, dy.device)
    check_adapters(op, base, dy, lora_A, lora_B, scaling, adapter_index, dy.shape[:-1])
    count = len(lora_A)
    need_A, need_B = needs[2 : 2 + count], needs[2 + count :]
    if (any(need_A) and x is None) or (any(need_B) and h is None):
        raise ValueError(f"{op}: dA needs x and dB needs h")
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return (
        base,
        dy.new_empty((*dy.shape[:-1], in_features)) if needs[0] else None,
        [a.new_empty(a.shape) if need else None for a, need in zip(lora_A, need_A, strict=True)],
        [b.new_empty(b.shape) if need else None for b, need in zip(lora_B, need_B, strict=True)],
        dy.new_empty(dy.shape[-1], dtype=wide) if needs[1] else None,
    )


def _present_lists(dy: Tensor, dx, dA, dB, dbias) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    head = _present([dx, dbias], dy)
    return head[0], list(_present(dA, dy)), list(_present(dB, dy)), head[1]


def _lora_linear_batched_backward(*args):
    base, dx, dA, dB, dbias = _lora_linear_batched_backward_outputs(*args)
    dy, x, h = args[:3]
    lora_A, lora_B, scaling, adapter_index, dropout_p, rng, _ = args[9:]
    if dy.device.type == "meta":
        return _present_lists(dy, dx, dA, dB, dbias)
    if math.prod(dy.shape[:-1]) == 0:
        for out in (dx, *dA, *dB, dbias):
            if out is not None:
                out.zero_()
        return _present_lists(dy, dx, dA, dB, dbias)
    backend_for(dy.device).lora_linear_batched_backward(
        _rows(dy),
        None if x is None else _rows(x),
        _dense(h),
        _contiguous(base),
        *(lora_A, lora_B, scaling, adapter_index.reshape(-1), dropout_p, _dense(rng)),
        *(None if dx is None else _as_rows(dx), dA, dB, dbias),
    )
    return _present_lists(dy, dx, dA, dB, dbias)


define_op(
    f"lora_linear_batched_backward(Tensor dy, Tensor? x, Tensor? h, {_WEIGHT}, SymInt in_features, "
    "Tensor[] lora_A, Tensor[] lora_B, float[] scaling, Tensor adapter_index, float dropout_p, Tensor? rng, "
    "bool[] needs) -> (Tensor dx, Tensor[] dA, Tensor[] dB, Tensor dbias)",
    _lora_linear_batched_backward,
    lambda *args: _present_lists(args[0], *_lora_linear_batched_backward_outputs(*args)[1:]),
)

# ---- dora_linear -------------------------------------------------------------------------------------------


def _check_magnitude(op: str, base: BaseWeight, like: Tensor, lora_A: Tensor, magnitude: Tensor) -> None:
    if lora_A is None:
        raise ValueError(f"{op}: got no lora_A and lora_B; DoRA needs an adapter")
    check_dtype(op, "magnitude", magnitude, FLOATS)
    check_shape(op, "magnitude", magnitude, (base.out_features,), "[N]")
    check_device(op, like.device, magnitude=magnitude)


def _dora_linear_outputs(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out_features: int,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
) -> tuple[BaseWeight, Tensor, Tensor, Tensor]:
    op = "dora_linear"
    base = check_x(op, x, weight, absmax, nested_absmax, offset, blocksize, out_features, bias)
    check_adapter(op, base, x.device, lora_A, lora_B)
    _check_magnitude(op, base, x, lora_A, magnitude)
    check_scalars(op, scaling, dropout_p, rng, x.device)
    y = x.new_empty((*x.shape[:-1], out_features))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = x.new_empty(out_features, dtype=wide)
    return base, y, x.new_empty((math.prod(x.shape[:-1]), lora_A.shape[0])), norm


def _dora_linear(*args) -> tuple[Tensor, Tensor, Tensor]:
    base, y, h, norm = _dora_linear_outputs(*args)
    x, lora_A, lora_B, magnitude, scaling, bias, dropout_p, rng = args[0], *args[7:]
    if y.device.type != "meta" and base.in_features == 0:  # the norms are 0: no magnitude / norm
        y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        h.zero_()
        norm.zero_()
    elif y.device.type != "meta":
        arguments = (lora_A, lora_B, magnitude, scaling, bias, dropout_p, _dense(rng))
        y2 = y.view(h.shape[0], base.out_features)
        backend_for(x.device).dora_linear(_rows(x), _contiguous(base), *arguments, y2, h, norm)
    return y, h, norm


define_op(
    f"dora_linear(Tensor x, {_WEIGHT}, SymInt out_features, Tensor lora_A, Tensor lora_B, Tensor magnitude, "
    "float scaling, Tensor? bias, float dropout_p, Tensor? rng) -> (Tensor y, Tensor h, Tensor norm)",
    _dora_linear,
    lambda *args: _dora_linear_outputs(*args)[1:],
)


def _dora_linear_backward_outputs(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    norm: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    in_features: int,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    needs: list[bool],
) -> tuple[BaseWeight, list[Tensor | None]]:
    """`needs`: dx, dA, dB, dmagnitude, dbias."""
    op = "dora_linear_backward"
    check_dtype(op, "dy", dy, FLOATS)
    base = BaseWeight(weight, absmax, nested_absmax, offset, blocksize, dy.shape[-1], in_features)
    check_base(op, base, dy, "dy")
    check_adapter(op, base, dy.device, lora_A, lora_B)
    _check_magnitude(op, base, dy, lora_A, magnitude)
    check_scalars(op, scaling, dropout_p, rng, dy.device)
    check_shape(op, "x", x, (*dy.shape[:-1], in_features), "[..., K]")
    check_shape(op, "h", h, (math.prod(dy.shape[:-1]), lora_A.shape[0]), "[T, r]")
    check_shape(op, "norm", norm, (base.out_features,), "[N]")
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return base, [
        dy.new_empty((*dy.shape[:-1], in_features)) if needs[0] else None,
        lora_A.new_empty(lora_A.shape) if needs[1] else None,
        lora_B.new_empty(lora_B.shape) if needs[2] else None,
        magnitude.new_empty(magnitude.shape) if needs[3] else None,
        dy.new_empty(dy.shape[-1], dtype=wide) if needs[4] else None,
    ]


def _dora_linear_backward(*args) -> tuple[Tensor, ...]:
    base, outputs = _dora_linear_backward_outputs(*args)
    dy, x, h, norm = args[:4]
    if dy.device.type == "meta":
        return _present(outputs, dy)
    if math.prod(dy.shape[:-1]) == 0 or base.in_features == 0:
        for out in outputs:
            if out is not None:
                out.zero_()
        if outputs[4] is not None:
            torch.sum(_rows(dy), dim=0, dtype=outputs[4].dtype, out=outputs[4])
        return _present(outputs, dy)
    dx = None if outputs[0] is None else _as_rows(outputs[0])
    backend_for(dy.device).dora_linear_backward(
        *(_rows(dy), _rows(x), _dense(h), _dense(norm), _contiguous(base), *args[10:15], _dense(args[15])),
        *(dx, *outputs[1:]),
    )
    return _present(outputs, dy)


define_op(
    f"dora_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor norm, {_WEIGHT}, SymInt in_features, "
    "Tensor lora_A, Tensor lora_B, Tensor magnitude, float scaling, float dropout_p, Tensor? rng, "
    "bool[] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dmagnitude, Tensor dbias)",
    _dora_linear_backward,
    lambda *args: _present(_dora_linear_backward_outputs(*args)[1], args[0]),
)

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
from lora_kernels.reference import NESTED_BLOCKSIZE, NF4_BLOCKSIZES

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WEIGHT = "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int blocksize"

_library = torch.library.Library("lora_kernels", "FRAGMENT")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- checks ------------------------------------------------------------------------------------------------


def _check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        expected = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {expected}")


def _check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], formula: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {formula} = {shape}")


def _check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but the other tensors are on {device}")


def _check_blocksize(op: str, blocksize: int) -> None:
    if blocksize not in NF4_BLOCKSIZES:
        raise ValueError(f"{op}: blocksize is {blocksize}, expected one of {NF4_BLOCKSIZES}")


def check_nf4(base: BaseWeight, op: str, weight_name: str = "weight", separator: str = "") -> None:
    """Raises ValueError or TypeError where the tensors of an NF4 weight do not fit its shape.

    Messages name them weight, absmax, ..., or with a separator "." weight, weight.absmax, ...
    """

    def name(part: str) -> str:
        return weight_name + separator + part if separator else part

    _check_blocksize(op, base.blocksize)
    n = base.out_features * base.in_features
    blocks = _ceil_div(n, base.blocksize)
    _check_dtype(op, weight_name, base.data, (torch.uint8,))
    if base.data.numel() != _ceil_div(n, 2):
        raise ValueError(
            f"{op}: {weight_name} holds {base.data.numel()} bytes of NF4 codes, expected ceil(N*K/2) = "
            f"{_ceil_div(n, 2)} for N = {base.out_features}, K = {base.in_features}"
        )
    _check_shape(op, name("absmax"), base.absmax, (blocks,), "[ceil(N*K / blocksize)]")
    if (base.nested_absmax is None) != (base.offset is None):
        raise ValueError(f"{op}: nested_absmax and offset go together; got only one of them")
    if base.nested_absmax is None:
        _check_dtype(op, name("absmax") + " (not double-quantised)", base.absmax, (torch.float32,))
        return
    _check_dtype(op, name("absmax") + " (double-quantised)", base.absmax, (torch.uint8,))
    _check_dtype(op, name("nested_absmax"), base.nested_absmax, (torch.float32,))
    _check_dtype(op, name("offset"), base.offset, (torch.float32,))
    nested_blocks = _ceil_div(blocks, NESTED_BLOCKSIZE)
    _check_shape(op, name("nested_absmax"), base.nested_absmax, (nested_blocks,), "[ceil(blocks / 256)]")
    _check_shape(op, name("offset"), base.offset, (), "[]")


def _check_base(op: str, base: BaseWeight, like: Tensor, like_name: str) -> None:
    if base.out_features < 0 or base.in_features < 0:
        raise ValueError(f"{op}: got N = {base.out_features}, K = {base.in_features}, expected sizes >= 0")
    if base.quantized:
        check_nf4(base, op)
    else:
        shape = (base.out_features, base.in_features)
        _check_shape(op, "weight", base.data, shape, "[N, K]")
        _check_dtype(op, f"weight ({like_name} is {like.dtype})", base.data, (like.dtype,))
    _check_device(
        op,
        like.device,
        weight=base.data,
        absmax=base.absmax,
        nested_absmax=base.nested_absmax,
        offset=base.offset,
    )


def _check_adapter(
    op: str, base: BaseWeight, device: torch.device, lora_A: Tensor | None, lora_B: Tensor | None
) -> None:
    if (lora_A is None) != (lora_B is None):
        raise ValueError(f"{op}: lora_A and lora_B go together; got only one of them")
    if lora_A is None:
        return
    for name, matrix in (("lora_A", lora_A), ("lora_B", lora_B)):
        if matrix.dim() != 2:
            raise ValueError(f"{op}: {name} has {matrix.dim()} dimensions, expected 2")
        _check_dtype(op, name, matrix, _FLOATS)
    rank = lora_A.shape[0]
    if rank < 1:
        raise ValueError(f"{op}: lora_A has rank 0, expected r >= 1")
    _check_shape(op, "lora_A", lora_A, (rank, base.in_features), "[r, K]")
    _check_shape(op, "lora_B", lora_B, (base.out_features, rank), "[N, r]")
    _check_device(op, device, lora_A=lora_A, lora_B=lora_B)


def _check_scalars(
    op: str, scaling: float, dropout_p: float, rng: Tensor | None, device: torch.device
) -> None:
    if not math.isfinite(scaling):
        raise ValueError(f"{op}: scaling is {scaling}, expected a finite number")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected 0 <= p < 1")
    if dropout_p > 0:
        if rng is None:
            raise ValueError(
                f"{op}: dropout_p is {dropout_p}, which needs rng, an int64 tensor (seed, offset)"
            )
        _check_dtype(op, "rng", rng, (torch.int64,))
        _check_shape(op, "rng", rng, (2,), "(seed, offset)")
        _check_device(op, device, rng=rng)


# ---- the way into a backend --------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """[..., K] as [T, K] with unit column stride and rows that do not overlap: a view where it can be."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    plain = flat.stride(1) == 1 and flat.stride(0) >= max(1, flat.shape[1])
    return flat if plain else flat.contiguous()


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


def _define(schema: str, function: Callable, fake: Callable) -> Callable:
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
    _check_dtype(op, "weight", weight, (torch.float32, torch.float16, torch.bfloat16))
    _check_blocksize(op, blocksize)
    n = weight.numel()
    blocks = _ceil_div(n, blocksize)
    packed = weight.new_empty((_ceil_div(n, 2), 1), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = weight.new_empty(_ceil_div(blocks, NESTED_BLOCKSIZE) if double_quant else 0, dtype=torch.float32)
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


_define(
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
    _check_dtype(op, "dtype", out, _FLOATS)
    _check_base(op, base, weight, "weight")
    return base, out


def _nf4_dequantize(*args) -> Tensor:
    base, out = _nf4_dequantize_output(*args)
    if out.numel() and out.device.type != "meta":
        backend_for(out.device).nf4_dequantize(_contiguous(base), 0, 0, out)
    return out


_define(
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
    _check_dtype(op, "x", x, _FLOATS)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has no dimensions, expected [..., K]")
    in_features = x.shape[-1]
    if absmax is None and weight.dim() == 2 and weight.shape[1] != in_features:
        raise ValueError(
            f"{op}: x has last dimension {in_features}, but weight [N, K] = {tuple(weight.shape)} takes "
            f"K = {weight.shape[1]}"
        )
    base = BaseWeight(weight, absmax, nested_absmax, offset, blocksize, out_features, in_features)
    _check_base(op, base, x, "x")
    _check_adapter(op, base, x.device, lora_A, lora_B)
    _check_scalars(op, scaling, dropout_p, rng, x.device)
    if bias is not None:
        _check_shape(op, "bias", bias, (out_features,), "[N]")
        _check_dtype(op, "bias", bias, _FLOATS)
        _check_device(op, x.device, bias=bias)
    tokens = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], out_features))
    return base, y, x.new_empty((tokens, 0 if lora_A is None else lora_A.shape[0]))


def _lora_linear(*args) -> tuple[Tensor, Tensor]:
    base, y, h = _lora_linear_outputs(*args)
    x, lora_A, lora_B, scaling, bias, dropout_p, rng = args[0], *args[7:]
    if y.device.type != "meta" and h.shape[0] > 0:
        y2 = y.view(h.shape[0], base.out_features)
        base, x2 = _contiguous(base), _rows(x)
        backend_for(x.device).lora_linear(x2, base, lora_A, lora_B, scaling, bias, dropout_p, rng, y2, h)
    return y, h


lora_linear = _define(
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
    _check_dtype(op, "dy", dy, _FLOATS)
    base = BaseWeight(weight, absmax, nested_absmax, offset, blocksize, dy.shape[-1], in_features)
    _check_base(op, base, dy, "dy")
    _check_adapter(op, base, dy.device, lora_A, lora_B)
    _check_scalars(op, scaling, dropout_p, rng, dy.device)
    need_dx, need_dA, need_dB, need_dbias = needs
    if (need_dA or need_dB) and lora_A is None:
        raise ValueError(f"{op}: needs asks for dA or dB, but there is no adapter")
    tokens = math.prod(dy.shape[:-1])
    if need_dA:
        if x is None:
            raise ValueError(f"{op}: dA needs x")
        _check_shape(op, "x", x, (*dy.shape[:-1], in_features), "[..., K]")
        _check_dtype(op, "x", x, (dy.dtype,))
    if need_dB:
        if h is None:
            raise ValueError(f"{op}: dB needs h")
        _check_shape(op, "h", h, (tokens, lora_A.shape[0]), "[T, r]")
        _check_dtype(op, "h", h, (dy.dtype,))
    _check_device(op, dy.device, x=x, h=h)
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
    dx = None if outputs[0] is None else outputs[0].view(-1, base.in_features)
    x = _rows(x) if needs[1] else None
    h = h if needs[2] else None
    backend_for(dy.device).lora_linear_backward(
        _rows(dy), x, h, _contiguous(base), lora_A, lora_B, scaling, dropout_p, rng, dx, *outputs[1:]
    )
    return _present(outputs, dy)


lora_linear_backward = _define(
    f"lora_linear_backward(Tensor dy, Tensor? x, Tensor? h, {_WEIGHT}, SymInt in_features, Tensor? lora_A, "
    "Tensor? lora_B, float scaling, float dropout_p, Tensor? rng, bool[] needs) -> "
    "(Tensor dx, Tensor dA, Tensor dB, Tensor dbias)",
    _lora_linear_backward,
    lambda *args: _present(_lora_linear_backward_outputs(*args)[1], args[0]),
)

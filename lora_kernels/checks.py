"""What the ops ask of their arguments. Errors name the argument, what it got and what it may be."""

import math

import torch
from torch import Tensor

from lora_kernels.base_weight import BaseWeight
from lora_kernels.reference import NESTED_BLOCKSIZE, NF4_BLOCKSIZES

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a Tensor")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        expected = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {expected}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], formula: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {formula} = {shape}")


def check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but the other tensors are on {device}")


def check_blocksize(op: str, blocksize: int) -> None:
    if blocksize not in NF4_BLOCKSIZES:
        raise ValueError(f"{op}: blocksize is {blocksize}, expected one of {NF4_BLOCKSIZES}")


def check_nf4(base: BaseWeight, op: str, weight_name: str = "weight", separator: str = "") -> None:
    """Raises ValueError or TypeError where the tensors of an NF4 weight do not fit its shape.

    Messages name them weight, absmax, ..., or with a separator "." weight, weight.absmax, ...
    """

    def name(part: str) -> str:
        return weight_name + separator + part if separator else part

    check_blocksize(op, base.blocksize)
    n = base.out_features * base.in_features
    blocks = ceil_div(n, base.blocksize)
    check_dtype(op, weight_name, base.data, (torch.uint8,))
    if base.data.numel() != ceil_div(n, 2):
        raise ValueError(
            f"{op}: {weight_name} holds {base.data.numel()} bytes of NF4 codes, expected ceil(N*K/2) = "
            f"{ceil_div(n, 2)} for N = {base.out_features}, K = {base.in_features}"
        )
    check_shape(op, name("absmax"), base.absmax, (blocks,), "[ceil(N*K / blocksize)]")
    if (base.nested_absmax is None) != (base.offset is None):
        raise ValueError(f"{op}: nested_absmax and offset go together; got only one of them")
    if base.nested_absmax is None:
        check_dtype(op, name("absmax") + " (not double-quantised)", base.absmax, (torch.float32,))
        return
    check_dtype(op, name("absmax") + " (double-quantised)", base.absmax, (torch.uint8,))
    check_dtype(op, name("nested_absmax"), base.nested_absmax, (torch.float32,))
    check_dtype(op, name("offset"), base.offset, (torch.float32,))
    nested_blocks = ceil_div(blocks, NESTED_BLOCKSIZE)
    check_shape(op, name("nested_absmax"), base.nested_absmax, (nested_blocks,), "[ceil(blocks / 256)]")
    check_shape(op, name("offset"), base.offset, (), "[]")


def check_base(op: str, base: BaseWeight, like: Tensor, like_name: str) -> None:
    if base.out_features < 0 or base.in_features < 0:
        raise ValueError(f"{op}: got N = {base.out_features}, K = {base.in_features}, expected sizes >= 0")
    if base.quantized:
        check_nf4(base, op)
    else:
        shape = (base.out_features, base.in_features)
        check_shape(op, "weight", base.data, shape, "[N, K]")
        check_dtype(op, f"weight ({like_name} is {like.dtype})", base.data, (like.dtype,))
    check_device(
        op,
        like.device,
        weight=base.data,
        absmax=base.absmax,
        nested_absmax=base.nested_absmax,
        offset=base.offset,
    )


def check_x(
    op: str,
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> BaseWeight:
    """x [..., K], the base weight and the bias of a forward; returns the base."""
    check_dtype(op, "x", x, FLOATS)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has no dimensions, expected [..., K]")
    in_features = x.shape[-1]
    if absmax is None and weight.dim() == 2 and weight.shape[1] != in_features:
        raise ValueError(
            f"{op}: x has last dimension {in_features}, but weight [N, K] = {tuple(weight.shape)} takes "
            f"K = {weight.shape[1]}"
        )
    base = BaseWeight(weight, absmax, nested_absmax, offset, blocksize, out_features, in_features)
    check_base(op, base, x, "x")
    if bias is not None:
        check_shape(op, "bias", bias, (out_features,), "[N]")
        check_dtype(op, "bias", bias, FLOATS)
        check_device(op, x.device, bias=bias)
    return base


def check_adapter(
    op: str, base: BaseWeight, device: torch.device, lora_A: Tensor | None, lora_B: Tensor | None
) -> None:
    if (lora_A is None) != (lora_B is None):
        raise ValueError(f"{op}: lora_A and lora_B go together; got only one of them")
    if lora_A is None:
        return
    for name, matrix in (("lora_A", lora_A), ("lora_B", lora_B)):
        if matrix.dim() != 2:
            raise ValueError(f"{op}: {name} has {matrix.dim()} dimensions, expected 2")
        check_dtype(op, name, matrix, FLOATS)
    rank = lora_A.shape[0]
    if rank < 1:
        raise ValueError(f"{op}: lora_A has rank 0, expected r >= 1")
    check_shape(op, "lora_A", lora_A, (rank, base.in_features), "[r, K]")
    check_shape(op, "lora_B", lora_B, (base.out_features, rank), "[N, r]")
    check_device(op, device, lora_A=lora_A, lora_B=lora_B)


def check_scalars(
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
        check_dtype(op, "rng", rng, (torch.int64,))
        check_shape(op, "rng", rng, (2,), "(seed, offset)")
        check_device(op, device, rng=rng)


def check_adapters(
    op: str,
    base: BaseWeight,
    like: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    adapter_index: Tensor,
    leading: tuple[int, ...],
) -> None:
    """Several adapters, and the index that says which one a row of x takes."""
    if not len(lora_A) == len(lora_B) == len(scaling):
        raise ValueError(
            f"{op}: lora_A, lora_B and scaling have {len(lora_A)}, {len(lora_B)} and {len(scaling)} entries, "
            "expected as many of each as there are adapters"
        )
    for i, (a, b, s) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        check_adapter(f"{op}: adapter {i}", base, like.device, a, b)
        if not math.isfinite(s):
            raise ValueError(f"{op}: scaling[{i}] is {s}, expected a finite number")
    check_dtype(op, "adapter_index", adapter_index, (torch.int64,))
    check_shape(op, "adapter_index", adapter_index, tuple(leading), "the leading sizes of x")
    check_device(op, like.device, adapter_index=adapter_index)


def check_adapter_index_values(op: str, adapter_index: Tensor, adapters: int) -> None:
    """Of a CPU tensor; on a GPU reading the values would make every call wait for the device."""
    if adapter_index.device.type != "cpu" or adapter_index.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(adapter_index))
    if low < -1 or high >= adapters:
        got = low if low < -1 else high
        raise ValueError(f"{op}: adapter_index holds {got}, expected -1 (base alone) to {adapters - 1}")

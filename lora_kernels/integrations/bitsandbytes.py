"""To and from bitsandbytes' Params4bit and Linear4bit: the same bytes, no requantisation."""

import torch
from torch import Tensor, nn

from lora_kernels import reference
from lora_kernels.nf4 import NF4Weight


def from_linear4bit(linear: nn.Module) -> NF4Weight:
    """The NF4Weight that shares the tensors of a Linear4bit. Raises TypeError for any other layer."""
    import bitsandbytes

    if not isinstance(linear, bitsandbytes.nn.Linear4bit):
        raise TypeError(f"got a {type(linear).__name__}, expected bitsandbytes' Linear4bit")
    return NF4Weight.from_params4bit(linear.weight)


def to_params4bit(weight: NF4Weight) -> Tensor:
    """The bitsandbytes Params4bit that shares the tensors of `weight`."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    nested = None
    if weight.double_quant:
        nested = QuantState(
            absmax=weight.nested_absmax,
            blocksize=reference.NESTED_BLOCKSIZE,
            code=reference.dynamic_map(weight.device),
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=weight.absmax,
        shape=weight.shape,
        code=reference.codebook(weight.device),
        blocksize=weight.blocksize,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=weight.offset,
        state2=nested,
    )
    return bitsandbytes.nn.Params4bit(
        weight.packed,
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.double_quant,
        quant_type="nf4",
        bnb_quantized=True,
    )


def to_linear4bit(weight: NF4Weight, bias: Tensor | None = None) -> nn.Module:
    """A bitsandbytes Linear4bit around the tensors of `weight`, computing in the weight's original dtype."""
    import bitsandbytes

    n, k = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        k,
        n,
        bias=bias is not None,
        compute_dtype=weight.dtype,
        compress_statistics=weight.double_quant,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = to_params4bit(weight)
    layer.weight.module = layer
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer

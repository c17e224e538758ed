"""To and from bitsandbytes' Params4bit and Linear4bit: the same bytes, no requantisation."""

import torch
from torch import Tensor, nn

from lora_kernels import reference
from lora_kernels.nf4 import NF4Weight


def from_params4bit(params: Tensor) -> NF4Weight:
    """The NF4Weight that shares the tensors of a bitsandbytes Params4bit.

    Raises:
        ValueError: not quantised yet (bitsandbytes does that on `.to(device)`), or not nf4, or another block
            format.
    """
    state = getattr(params, "quant_state", None)
    if state is None:
        raise ValueError(
            "the Params4bit is not quantised yet: bitsandbytes quantises when the layer is moved, as by "
            "layer.to('cpu')"
        )
    if state.quant_type != "nf4":
        raise ValueError(f"the Params4bit has quant_type {state.quant_type!r}, expected 'nf4'")
    nested_absmax = offset = None
    if state.nested:
        if state.state2.blocksize != reference.NESTED_BLOCKSIZE:
            raise ValueError(
                f"the Params4bit has nested_blocksize {state.state2.blocksize}, expected "
                f"{reference.NESTED_BLOCKSIZE}"
            )
        nested_absmax, offset = state.state2.absmax, state.offset.float().reshape(())
    packed = params.detach()
    if packed.dtype != torch.uint8:
        packed = packed.contiguous().view(torch.uint8)
    weight = NF4Weight(
        packed.reshape(-1, 1),
        state.absmax,
        nested_absmax,
        offset,
        tuple(state.shape),
        state.blocksize,
        state.dtype,
    )
    weight.check("Params4bit")
    return weight


def from_linear4bit(linear: nn.Module) -> NF4Weight:
    """The NF4Weight of a bitsandbytes Linear4bit. Raises TypeError for any other layer of bitsandbytes."""
    import bitsandbytes

    if not isinstance(linear, bitsandbytes.nn.Linear4bit):
        raise TypeError(f"got bitsandbytes' {type(linear).__name__}, expected Linear4bit")
    return from_params4bit(linear.weight)


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

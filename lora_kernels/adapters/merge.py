"""Merging the active adapter of every layer of a model into its weights."""

from dataclasses import dataclass

import torch
from torch import nn

from lora_kernels.adapters.inject import lora_layers, replace_modules
from lora_kernels.linear import FusedLoRALinear
from lora_kernels.nf4 import nf4_quantize


@dataclass(frozen=True)
class MergeError:
    """What requantising a merged weight W to NF4 cost, in Frobenius norms."""

    layer: str
    relative_error: float  # ‖Q(W) - W‖ / ‖W‖
    error_over_delta: float  # ‖Q(W) - W‖ / ‖s·B·A‖: above 1 the error outweighs what the adapter has learnt


def _layers(model: nn.Module) -> list[tuple[str, FusedLoRALinear]]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("the model has no FusedLoRALinear: inject() or load_adapter() first")
    return layers


def merge(model: nn.Module) -> None:
    """FusedLoRALinear.merge() on every layer with an active adapter: the same outputs, to rounding."""
    for _, layer in _layers(model):
        if layer.active_adapter is not None and not layer.merged:
            layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes `merge` exactly."""
    for _, layer in _layers(model):
        if layer.merged:
            layer.unmerge()


@torch.no_grad()
def merge_and_unload(model: nn.Module, requantize: bool = False) -> list[MergeError]:
    """Replaces every FusedLoRALinear, in place, by a plain layer with its active adapter merged in.

    The weight is T(W0 + s·B·A): a float32 sum, rounded once to the base's dtype; the layer becomes nn.Linear.
    With `requantize` an NF4 base stays NF4, as a FusedLoRALinear without adapters, and the error that this
    makes is reported: it is often as large as what the adapter contributes, so look at `error_over_delta`
    before using it.

    Returns:
        One MergeError for every requantised layer; empty without `requantize`.
    """
    errors = []
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in _layers(model):
        weight = layer.dequantized_weight(torch.float32)
        delta = None
        name_of_adapter = layer.merged_adapter or layer.active_adapter
        if name_of_adapter is not None:
            delta = layer.delta_weight(name_of_adapter)
            weight = weight + delta
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(layer.base_dtype), requires_grad=False)
        linear.bias = layer.bias
        new: nn.Module = linear
        if requantize and layer.quantize == "nf4":
            packed = nf4_quantize(
                linear.weight, layer.blocksize, double_quant=layer.nested_absmax is not None
            )
            lost = (packed.dequantize(torch.float32) - weight).norm()
            change = 0.0 if delta is None else float(delta.norm())
            relative = float(lost / weight.norm().clamp(min=1e-38))
            errors.append(MergeError(name, relative, float(lost) / change if change else float("inf")))
            new = FusedLoRALinear.from_linear(
                linear,
                r=None,
                quantize="nf4",
                blocksize=layer.blocksize,
                double_quant=layer.nested_absmax is not None,
            )
        replaced[layer] = new.train(layer.training)
    replace_modules(model, replaced)
    return errors

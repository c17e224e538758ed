"""Replacing the linear layers of a model by FusedLoRALinear."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_kernels.linear import FusedLoRALinear

ALL_LINEAR = "all-linear"
_CLASSIFIER_HEADS = ("score", "classifier")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, FusedLoRALinear]]:
    """(name, layer) of every FusedLoRALinear in the model, each layer once."""
    for name, module in model.named_modules():
        if isinstance(module, FusedLoRALinear):
            yield name, module


def uncompiled(name: str) -> str:
    """A module's path without the wrappers that torch.compile(module) puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def bypassed_layers(model: nn.Module) -> set[str]:
    """Names of linear layers whose forward is never called, so that an adapter there would do nothing.

    nn.MultiheadAttention hands the weight of its out_proj, an nn.Linear, to one function of its own.
    """
    return {
        f"{name}.out_proj" if name else "out_proj"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention)
    }


def refuse_bypassed(names: Iterable[str], argument: str) -> None:
    """Raises ValueError where an adapter is asked for on layers whose forward is never called."""
    names = sorted(names)
    if names:
        raise ValueError(
            f"{argument}: {names[0]} is the out_proj of an nn.MultiheadAttention, which uses its weight "
            "without calling it, so that an adapter there would do nothing; leave it out"
        )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer of everything an adapter can go on: nn.Linear (and subclasses) and FusedLoRALinear.

    Without those whose forward is never called (`bypassed_layers`).
    """
    layers: dict[str, nn.Module] = {}
    bypassed = bypassed_layers(model)
    inside = None  # the lora_A and lora_B of a FusedLoRALinear are nn.Linear too, and no targets
    for name, module in model.named_modules():
        if name in bypassed:
            continue
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, FusedLoRALinear):
            layers[name] = module
            inside = name + "." if name else ""
        elif isinstance(module, nn.Linear):
            layers[name] = module
    return layers


def matches(name: str, target: str) -> bool:
    """Whether a target names this module: it is the whole path, or its end after a dot, as PEFT reads it."""
    return name == target or name.endswith("." + target)


def _output_heads(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    """The layers that make the model's output, which "all-linear" leaves alone, as PEFT does."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        return {name for name, layer in layers.items() if layer is head}
    if hasattr(model, "config"):
        return {name for name in layers if name.rsplit(".", 1)[-1] in _CLASSIFIER_HEADS}
    return set()


def _targets(
    model: nn.Module, layers: dict[str, nn.Module], target_modules: str | Iterable[str]
) -> list[str]:
    if target_modules == ALL_LINEAR:
        heads = _output_heads(model, layers)
        found = [name for name in layers if name not in heads]
        if not found:
            raise ValueError(
                "target_modules is 'all-linear', but the model has no nn.Linear besides its output head"
            )
        return found
    bypassed = bypassed_layers(model)
    names = sorted({name.rsplit(".", 1)[-1] for name in layers})
    hint = f"the model's linear layers end in: {', '.join(names) or '(it has none)'}"
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules: {target_modules!r} is not a regular expression: {error}"
            ) from None
        refuse_bypassed(filter(pattern.fullmatch, bypassed), f"target_modules {target_modules!r}")
        found = [name for name in layers if pattern.fullmatch(name)]
        if not found:
            raise ValueError(f"target_modules: {target_modules!r} matches no linear layer; {hint}")
        return found
    targets = list(target_modules)
    if not targets:
        raise ValueError(f"target_modules is empty; {hint}")
    for target in targets:
        refuse_bypassed((name for name in bypassed if matches(name, target)), f"target_modules {target!r}")
        if not any(matches(name, target) for name in layers):
            raise ValueError(f"target_modules: {target!r} matches no linear layer; {hint}")
    return [name for name in layers if any(matches(name, target) for target in targets)]


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new modules in place of old ones, wherever the model uses them: what was shared stays shared."""
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m in replacements]
    for name, old in places:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, replacements[old])
        if isinstance(owner, nn.TransformerEncoderLayer):
            # In eval mode it would compute from linear1.weight and linear2.weight without calling them, were
            # its activation one that its fast path knows. The slow path calls the activation itself.
            owner.activation_relu_or_gelu = 0


def convert(name: str, layer: nn.Module, **options: Any) -> FusedLoRALinear:
    """FusedLoRALinear.from_linear(layer, **options); its errors name the layer."""
    try:
        return FusedLoRALinear.from_linear(layer, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error


def inject(
    model: nn.Module,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    *,
    r: int = 16,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    quantize: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    adapter_dtype: torch.dtype | None = None,
    adapter_name: str = "default",
    quantize_device: torch.device | str | None = None,
) -> list[str]:
    """Puts an adapter on the model's linear layers, in place, and freezes everything else.

    Args:
        model: any module; a Hugging Face model is one.
        target_modules: names as in PEFT (["q_proj", "v_proj"]: the end of a module's path), a regular
            expression for whole paths, or "all-linear": every nn.Linear but the output head and the
            out_proj of nn.MultiheadAttention, which computes with its weight directly.
        quantize: "nf4" also quantises the weights of the layers it replaces; None leaves them as they are.
        quantize_device: where, one layer after the other, if not where the weights are; the model stays where
            it is.

    The other arguments are those of FusedLoRALinear. A layer that is a FusedLoRALinear already gets the
    adapter in addition, and it becomes the active one. A module that the model uses in two places stays one
    module.

    Returns:
        The names of the layers, in the model's order.

    Raises:
        ValueError: no layer matches, or one whose forward is never called; r < 1, and what FusedLoRALinear
            raises; the model is then unchanged.
    """
    layers = linear_layers(model)
    if "" in layers:
        raise ValueError("the model is itself a linear layer: use FusedLoRALinear.from_linear")
    targets = _targets(model, layers, target_modules)
    spec: dict[str, Any] = {
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "init_lora_weights": init_lora_weights,
    }
    for name in targets:
        layer = layers[name]
        if isinstance(layer, FusedLoRALinear) and (layer.merged or adapter_name in layer.adapter_specs):
            state = (
                f"has adapter {layer.merged_adapter!r} merged"
                if layer.merged
                else f"has an adapter {adapter_name!r}"
            )
            raise ValueError(f"{name} {state} already")
    # All new layers are made before the first is put in place, so that an error leaves the model as it was.
    made: dict[nn.Module, FusedLoRALinear] = {}
    for name in targets:
        layer = layers[name]
        if isinstance(layer, FusedLoRALinear) or layer in made:
            continue
        made[layer] = convert(
            name,
            layer,
            r=r,
            lora_alpha=lora_alpha,
            quantize=quantize,
            blocksize=blocksize,
            double_quant=double_quant,
            adapter_dtype=adapter_dtype,
            adapter_name=adapter_name,
            quantize_device=quantize_device,
            **spec,
        )
    for name in targets:
        layer = layers[name]
        if isinstance(layer, FusedLoRALinear):
            layer.add_adapter(adapter_name, r, lora_alpha, dtype=adapter_dtype, **spec)
    replace_modules(model, made)
    model.requires_grad_(False)
    for name in targets:
        layer = model.get_submodule(name)
        layer.set_adapter(adapter_name)
        layer.lora_A[adapter_name].requires_grad_(True)
        layer.lora_B[adapter_name].requires_grad_(True)
    return targets

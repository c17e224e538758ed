"""Adapters on disk, in PEFT's files: adapter_config.json and adapter_model.safetensors.

PEFT reads what `save_adapter` writes and the reverse. Keys are
`base_model.model.<module path>.lora_A.weight` and `.lora_B.weight`, without the adapter's name.
"""

import contextlib
import glob
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora_kernels.adapters.inject import (
    bypassed_layers,
    convert,
    linear_layers,
    lora_layers,
    matches,
    refuse_bypassed,
    replace_modules,
    uncompiled,
)
from lora_kernels.linear import FusedLoRALinear, LoRASpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
# Entries of adapter_config.json that are read here, and those that tell what the matrices were trained on and
# how they started: whatever they hold, the matrices mean the same. An entry that is neither may change what
# the adapter computes, as one of a later PEFT would.
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"),
    *("runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# Initialisations that also change the base weights: the adapter alone does not say what the model was.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a crash at any time, sees the old content or the new, never a part.

    Raises OSError (a full disk, no permission) with the old content still in place and nothing left beside
    it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def remove_parts(path: Path) -> None:
    """Removes what `write_atomically(path)` of a process that was killed has left beside the file.

    Nobody else may be writing the file.
    """
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        part.unlink(missing_ok=True)


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The shortest target_modules that mean exactly `names`: last path components where those do."""
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    layers = map(uncompiled, linear_layers(model))
    meant = {name for name in layers if any(matches(name, target) for target in short)}
    return short if meant == set(names) else sorted(names)


def _most_common(values: list[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)


def adapter_config(model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """The content of adapter_config.json; a rank or alpha other than the most common goes into a pattern."""
    specs = {name: layer.adapter_specs[adapter_name] for name, layer in _carriers(model, adapter_name)}
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    r = _most_common([spec.r for spec in specs.values()])
    alpha = _most_common([spec.lora_alpha for spec in specs.values()])
    for what in ("lora_dropout", "use_rslora"):
        values = {getattr(spec, what) for spec in specs.values()}
        if len(values) > 1:
            raise ValueError(
                f"adapter {adapter_name!r}: its layers differ in {what} ({values}); one file holds one value"
            )
    first = next(iter(specs.values()))
    return {
        "alpha_pattern": {n: s.lora_alpha for n, s in specs.items() if s.lora_alpha != alpha},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {n: s.r for n, s in specs.items() if s.r != r},
        "target_modules": _target_modules(model, list(specs)),
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "use_dora": False,
        "use_rslora": first.use_rslora,
    }


def _carriers(model: nn.Module, adapter_name: str) -> list[tuple[str, FusedLoRALinear]]:
    """The layers with that adapter, by the names that they have in a model that is not compiled."""
    found = [(n, layer) for n, layer in lora_layers(model) if adapter_name in layer.adapter_specs]
    if not found:
        raise ValueError(f"no layer of the model has an adapter {adapter_name!r}")
    return [(uncompiled(name), layer) for name, layer in found]


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Key -> matrix, as in adapter_model.safetensors; the tensors are the parameters' own, detached."""
    tensors = {}
    for name, layer in _carriers(model, adapter_name):
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[adapter_name].weight.detach()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[adapter_name].weight.detach()
    return tensors


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes adapter_config.json and adapter_model.safetensors into the folder `path`, each one atomically.

    Raises:
        ValueError: the model has no such adapter, or one file cannot describe it.
        OSError: the folder cannot be made or written.
    """
    config = adapter_config(model, adapter_name)
    tensors = {k: t.contiguous().cpu() for k, t in adapter_state_dict(model, adapter_name).items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE} in it, so this is not an adapter's folder")
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:  # syntax, encoding, endless brackets or digits
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file}: peft_type is {kind!r}, expected 'LORA'")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGED_BASE):
        raise ValueError(
            f"{file}: init_lora_weights is {init!r}, which changed the base weights as well; convert the "
            "adapter with PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...)) first"
        )
    for feature, value in config.items():
        if value and feature not in _UNDERSTOOD:  # PEFT's default of everything else is null, false or empty
            raise ValueError(f"{file}: {feature} is {value!r}, which FusedLoRALinear does not support")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias is {config['bias']!r}, expected 'none'")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), int | float):
            raise ValueError(f"{file}: {field} is {config.get(field)!r}, expected a number")
    return config


def _read_matrices(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Module path -> {"A": [r, K], "B": [N, r]}."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: no {WEIGHTS_FILE} in it")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file, or cut short: {error}") from None
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{file}: {key!r} is not the A or B matrix of a linear layer; only those are supported"
            )
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{file}: {key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected a float matrix"
            )
        matrices.setdefault(match["module"], {})[match["matrix"]] = tensor
    for module, pair in matrices.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{file}: {module} has lora_{'A' if 'A' in pair else 'B'} alone")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(
                f"{file}: {module} has rank {pair['A'].shape[0]} in lora_A, {pair['B'].shape[1]} in lora_B"
            )
    if not matrices:
        raise ValueError(f"{file}: holds no tensors")
    return matrices


def _from_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value whose key, a regular expression, matches the module's path or its end, as PEFT reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    quantize: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    adapter_dtype: torch.dtype | None = None,
    is_trainable: bool = False,
) -> list[str]:
    """Loads an adapter that `save_adapter` or PEFT wrote, as `adapter_name`, and makes it the active one.

    A target that is a FusedLoRALinear gets the adapter; an nn.Linear becomes a FusedLoRALinear first, with
    its weight quantised where `quantize` is "nf4". Everything but the adapter is frozen, and the adapter too
    unless `is_trainable`.

    Args:
        adapter_dtype: of A and B. Default: float32 where the file has float16 or bfloat16, as PEFT does.

    Returns:
        The names of the layers that carry the adapter.

    Raises:
        ValueError: not an adapter's folder, a feature or tensor that is not supported, a module the model
            lacks, a shape that does not fit, an adapter of that name already there. The model is then
            unchanged.
    """
    folder = Path(path)
    config, matrices = _read_config(folder), _read_matrices(folder)
    places = {uncompiled(name): name for name in linear_layers(model)}
    layers = {name: model.get_submodule(place) for name, place in places.items()}
    refuse_bypassed(matrices.keys() & map(uncompiled, bypassed_layers(model)), str(folder))
    specs: dict[str, LoRASpec] = {}
    for module, pair in matrices.items():
        layer = layers.get(module)
        if layer is None:
            raise ValueError(
                f"{folder}: the adapter has matrices for {module!r}, but the model has no such linear layer"
            )
        if isinstance(layer, FusedLoRALinear) and (layer.merged or adapter_name in layer.adapter_specs):
            state = "merged" if layer.merged else f"carrying an adapter {adapter_name!r}"
            raise ValueError(f"{module}: is {state} already")
        got = (pair["B"].shape[0], pair["A"].shape[1])
        if got != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{folder}: the adapter of {module} is for [N, K] = {got}, the layer has "
                f"{(layer.out_features, layer.in_features)}"
            )
        specs[module] = LoRASpec(
            r=pair["A"].shape[0],
            lora_alpha=_from_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]),
            lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
        )
    made: dict[nn.Module, FusedLoRALinear] = {}
    for module in matrices:
        layer = layers[module]
        if not isinstance(layer, FusedLoRALinear):
            made[layer] = convert(
                module,
                layer,
                r=None,
                quantize=quantize,
                blocksize=blocksize,
                double_quant=double_quant,
            )
    replace_modules(model, made)
    model.requires_grad_(False)
    for module, pair in matrices.items():
        layer, spec = model.get_submodule(places[module]), specs[module]
        half = pair["A"].dtype in (torch.float16, torch.bfloat16)
        dtype = adapter_dtype or (torch.float32 if half else pair["A"].dtype)
        layer.add_adapter(
            adapter_name,
            spec.r,
            spec.lora_alpha,
            lora_dropout=spec.lora_dropout,
            use_rslora=spec.use_rslora,
            dtype=dtype,
        )
        with torch.no_grad():
            layer.lora_A[adapter_name].weight.copy_(pair["A"])
            layer.lora_B[adapter_name].weight.copy_(pair["B"])
        layer.lora_A[adapter_name].requires_grad_(is_trainable)
        layer.lora_B[adapter_name].requires_grad_(is_trainable)
        layer.set_adapter(adapter_name)
    return list(matrices)

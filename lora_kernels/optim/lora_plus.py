"""LoRA+ learning rates."""

import math
from typing import Any

from torch import nn


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups in which B learns `ratio` times as fast as A.

    Four groups, as the paper's code and PEFT make them: A and other matrices at lr; trained embeddings
    (lora_embedding_*) at embedding_lr; B and all vectors at lr·ratio, and of these biases and what is in a
    LayerNorm without weight decay. Only parameters that require a gradient are in them; empty groups are left
    out. Each group has a "name".

    Args:
        lr: learning rate of A, > 0.
        ratio: η_B / η_A, >= 1. The paper recommends about 16 with an lr tuned for it; 1 is plain LoRA.

    Raises:
        ValueError: lr or ratio out of range, or nothing to train.

    Source: Hayou, Ghosh, Yu 2024 (LoRA+), section 4.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr is {lr}, expected a number > 0")
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"ratio is {ratio}, expected a number >= 1")
    groups: dict[str, dict[str, Any]] = {
        "A": {"lr": lr, "weight_decay": weight_decay},
        "embedding": {"lr": embedding_lr, "weight_decay": weight_decay},
        "B": {"lr": lr * ratio, "weight_decay": weight_decay},
        "B_no_decay": {"lr": lr * ratio, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding" in name:
            members["embedding"].append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            layer = model.get_submodule(name.rpartition(".")[0])
            undecayed = "bias" in name or isinstance(layer, nn.LayerNorm)
            members["B_no_decay" if undecayed else "B"].append(parameter)
        else:
            members["A"].append(parameter)
    if not any(members.values()):
        raise ValueError("the model has no parameter that requires a gradient: inject() an adapter first")
    return [
        {"params": members[name], "name": name, **group} for name, group in groups.items() if members[name]
    ]

"""What a paged optimizer may be asked for."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["LEAST_PAGE_BYTES", "PAGE_BYTES", "check_hyperparameters", "check_options", "page_bytes_for"]

PAGE_BYTES = 2 << 20
LEAST_PAGE_BYTES = 64 << 10
PAGES_OF_A_BUDGET = 8  # of a small one: pages become smaller, so that some come while others are updated


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Raises ValueError or TypeError naming the hyperparameter that cannot be."""
    for name in ("lr", "weight_decay", "eps"):
        if name in group and not (math.isfinite(_number(name, group[name])) and group[name] >= 0):
            raise ValueError(f"{name} is {group[name]}, expected a number >= 0")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}, expected two numbers in [0, 1)")
    if not all(0 <= _number("betas", beta) < 1 for beta in betas):
        raise ValueError(f"betas is {betas}, expected two numbers in [0, 1)")
    check_options(group)


def _number(name: str, value: Any) -> float:
    if isinstance(value, (float, int, Tensor, numbers.Real)):  # in this order: the last is slow
        return float(value)
    raise TypeError(f"{name} is {value!r}, expected a number")


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError where a group asks for what torch's optimizers do and these do not."""
    asked = [name for name in ("amsgrad", "maximize", "differentiable") if group.get(name)]
    if group.get("decoupled_weight_decay") is False and group.get("weight_decay"):
        asked.append("decoupled_weight_decay=False and a weight decay, as torch.optim.Adam has it")
    if asked:
        raise ValueError(f"a parameter group asks for {', '.join(asked)}, which these optimizers do not have")


def page_bytes_for(resident_bytes: int | None, group_bytes: int) -> int:
    """The size of pages, where none is asked for: small ones for a small budget, and for groups of little
    state, each of which has pages of its own."""
    page_bytes = LEAST_PAGE_BYTES
    while page_bytes < min(PAGE_BYTES, group_bytes):
        page_bytes *= 2
    while resident_bytes is not None and page_bytes > max(
        LEAST_PAGE_BYTES, resident_bytes // PAGES_OF_A_BUDGET
    ):
        page_bytes //= 2
    return page_bytes

"""What a paged optimizer may be asked for."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lora_kernels import optim_state

__all__ = ["PAGE_BYTES", "check_hyperparameters", "check_options", "check_settings", "page_bytes_for"]

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


def check_settings(
    state_bits: int,
    rounding: str,
    resident_bytes: int | None,
    page_bytes: int | None,
    min_8bit_size: int,
    seed: int,
) -> None:
    """Raises ValueError or TypeError naming the setting of an optimizer that cannot be."""
    for name, number in (
        ("resident_bytes", resident_bytes),
        ("page_bytes", page_bytes),
        ("min_8bit_size", min_8bit_size),
        ("seed", seed),
    ):
        if number is not None and not hasattr(number, "__index__"):
            raise TypeError(f"{name} is {number!r}, expected an integer")
    if state_bits not in (8, 32):
        raise ValueError(f"state_bits is {state_bits}, expected 8 or 32")
    if rounding not in optim_state.ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}, expected one of {', '.join(optim_state.ROUNDINGS)}")
    if resident_bytes is not None and resident_bytes <= 0:
        raise ValueError(f"resident_bytes is {resident_bytes}, expected a number of bytes > 0, or None")
    if page_bytes is not None and (page_bytes < LEAST_PAGE_BYTES or page_bytes & (page_bytes - 1)):
        raise ValueError(
            f"page_bytes is {page_bytes}, expected a power of two of at least {LEAST_PAGE_BYTES}"
        )
    if min_8bit_size < 0:
        raise ValueError(f"min_8bit_size is {min_8bit_size}, expected a number >= 0")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected an integer from 0 to 2^63 - 1")


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

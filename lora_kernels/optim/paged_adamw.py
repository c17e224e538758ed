"""AdamW with paged state."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_kernels.optim.paged import MIN_8BIT_SIZE, PagedOptimizer

__all__ = ["AdamW", "PagedAdamW", "PagedAdamW8bit"]


class PagedAdamW(PagedOptimizer):
    """AdamW whose state never competes with activations for memory.

    With g the gradient, t the step of the parameter, fp32 arithmetic:

        p ← p·(1 - lr·weight_decay)
        m ← β1·m + (1-β1)·g,  v ← β2·v + (1-β2)·g²
        p ← p - lr/(1-β1ᵗ) · m / (√v/√(1-β2ᵗ) + eps)

    as torch.optim.AdamW computes it (Loshchilov and Hutter 2019).

    Args:
        params: parameters or groups, as every optimizer of torch takes them. Each group may have its own lr,
            betas, eps, weight_decay.
        state_bits: 32 or 8 (Dettmers et al. 2022: block-wise dynamic quantisation, blocks of 256); None: what
            the class is named for.
        rounding, resident_bytes, page_bytes, directory: see PagedOptimizer.
        seed: of stochastic rounding.

    Raises:
        ValueError: a hyperparameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int | None = None,
        rounding: str = "nearest",
        resident_bytes: int | None = None,
        page_bytes: int | None = None,
        directory: str | Path | None = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            ops=("adamw_step", "adamw8bit_step"),
            states=("exp_avg", "exp_avg_sq"),
            state_bits=state_bits,
            rounding=rounding,
            resident_bytes=resident_bytes,
            page_bytes=page_bytes,
            directory=directory,
            min_8bit_size=min_8bit_size,
            seed=seed,
        )

    def _hyperparameters(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"]


class PagedAdamW8bit(PagedAdamW):
    """PagedAdamW with state_bits=8, under the name that bitsandbytes has for it."""

    default_bits = 8


class AdamW(PagedAdamW):
    """The same kernels and packed state without paging: everything stays resident.

    Raises:
        TypeError: resident_bytes or directory, which only pages have.
    """

    paged = False

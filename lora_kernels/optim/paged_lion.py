"""Lion with paged state."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_kernels.optim.paged import MIN_8BIT_SIZE, PagedOptimizer

__all__ = ["PagedLion", "PagedLion8bit"]


class PagedLion(PagedOptimizer):
    """Lion, with half of AdamW's state, in pages.

        u = sign(β1·m + (1-β1)·g)
        p ← p·(1 - lr·weight_decay) - lr·u
        m ← β2·m + (1-β2)·g

    Args: as PagedAdamW's; a learning rate 3 to 10 times smaller and a decay as much larger than AdamW's
        suit it.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_bits: int | None = None,
        rounding: str = "nearest",
        resident_bytes: int | None = None,
        page_bytes: int | None = None,
        directory: str | Path | None = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            ops=("lion_step", "lion8bit_step"),
            states=("exp_avg",),
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
        return float(group["lr"]), beta1, beta2, group["weight_decay"]


class PagedLion8bit(PagedLion):
    """PagedLion with state_bits=8."""

    default_bits = 8

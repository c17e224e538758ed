"""Optimizers for adapters."""

from lora_kernels.optim.lora_plus import lora_plus_groups
from lora_kernels.optim.paged import PagedOptimizer
from lora_kernels.optim.paged_adamw import AdamW, PagedAdamW, PagedAdamW8bit
from lora_kernels.optim.paged_lion import PagedLion, PagedLion8bit

__all__ = [
    "AdamW",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedOptimizer",
    "lora_plus_groups",
]

"""Optimizers for adapters."""

from lora_kernels.optim.lora_plus import lora_plus_groups

__all__ = ["lora_plus_groups"]

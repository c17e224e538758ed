"""Optimizers for adapters."""

from lora_kernels import ops_optim  # noqa: F401  registers torch.ops.lora_kernels.adamw_step and the others
from lora_kernels.optim.lora_plus import lora_plus_groups

__all__ = ["lora_plus_groups"]

"""Fused LoRA and QLoRA kernels for PyTorch."""

from lora_kernels import optim
from lora_kernels.adapters import inject, load_adapter, merge, merge_and_unload, save_adapter, unmerge
from lora_kernels.backends import use_backend
from lora_kernels.functional import dora_linear, dropout_rng, lora_linear, lora_linear_batched
from lora_kernels.linear import FusedLoRALinear
from lora_kernels.nf4 import NF4Weight, nf4_quantize
from lora_kernels.report import explain, memory_report

__version__ = "0.1.0"

__all__ = [
    "FusedLoRALinear",
    "NF4Weight",
    "dora_linear",
    "dropout_rng",
    "explain",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linear_batched",
    "memory_report",
    "merge",
    "merge_and_unload",
    "nf4_quantize",
    "optim",
    "save_adapter",
    "unmerge",
    "use_backend",
]

"""Adapters of a whole model: inject, save and load in PEFT's files, merge."""

from lora_kernels.adapters.files import load_adapter, save_adapter
from lora_kernels.adapters.inject import inject, lora_layers
from lora_kernels.adapters.merge import merge, merge_and_unload, unmerge

__all__ = ["inject", "load_adapter", "lora_layers", "merge", "merge_and_unload", "save_adapter", "unmerge"]

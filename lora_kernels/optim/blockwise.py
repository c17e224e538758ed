"""The 8-bit block-wise code of optimizer state (`lora_kernels.optim_state`, where the ops can see it too)."""

from lora_kernels.optim_state import dequantize_blockwise, quantize_blockwise

__all__ = ["dequantize_blockwise", "quantize_blockwise"]

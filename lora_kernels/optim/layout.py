"""How optimizer state lies in a page (`lora_kernels.optim_state`, where the ops can see it too)."""

from lora_kernels.optim_state import (
    BLOCK,
    HEADER_BYTES,
    OPS,
    ROUNDINGS,
    Part,
    optim_state_bytes,
    optim_state_parts,
)
from lora_kernels.reference import dynamic_map as _dynamic_map

__all__ = [
    "BLOCK",
    "HEADER_BYTES",
    "OPS",
    "ROUNDINGS",
    "Part",
    "dynamic_map",
    "optim_state_bytes",
    "optim_state_parts",
]


def dynamic_map(signed: bool):
    """What the 8-bit codes mean: fp32 [256], ascending; signed for state1, unsigned for state2."""
    return _dynamic_map(signed=signed)

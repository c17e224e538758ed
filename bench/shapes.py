"""The shapes that every benchmark uses, and the operations and bytes that an op cannot avoid on them."""

from typing import NamedTuple

import torch

from lora_kernels.nf4 import nf4_bytes

RANK = 16
BLOCKSIZE = 64
LORA_ALPHA = 2 * RANK
SCALING = LORA_ALPHA / RANK


class Shape(NamedTuple):
    n: int  # out_features
    k: int  # in_features
    where: str

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


# In the order of their importance: a measurement that runs out of time has done the first ones.
SHAPES = (
    Shape(4096, 4096, "Llama-3-8B q, o"),
    Shape(14336, 4096, "Llama-3-8B gate, up"),
    Shape(4096, 14336, "Llama-3-8B down"),
    Shape(1024, 4096, "Llama-3-8B k, v"),
    Shape(8192, 8192, "70B q, o"),
    Shape(28672, 8192, "70B gate, up"),
    Shape(576, 576, "a small model"),
    Shape(1536, 576, "a small model"),
    Shape(3420, 1000, "divisible by nothing"),
)
TOKENS_GPU = (1, 8, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)


class Case(NamedTuple):
    """One row of the CPU suite. `quick`: part of the short run."""

    n: int
    k: int
    t: int  # tokens; 0 where an op has none
    dtype: torch.dtype = torch.bfloat16
    p: float = 0.0  # dropout
    quick: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        tokens = f"-T{self.t}" if self.t else ""
        dropout = f"-p{self.p}" if self.p else ""
        return f"{self.n}x{self.k}{tokens}-{self.dtype_name}{dropout}"


def linear_flops(n: int, k: int, t: int) -> int:
    """Operations of one product with W0 [N, K] for T tokens: y = x·W0ᵀ, or dx = dy·W0."""
    return 2 * t * n * k


def lora_flops(n: int, k: int, t: int, r: int = RANK) -> int:
    """Operations of h = x·Aᵀ and h·Bᵀ."""
    return 2 * t * r * (n + k)


def lora_backward_flops(n: int, k: int, t: int, r: int = RANK) -> int:
    """Operations of dx (base and adapter path), dA and dB: dy·W0, dy·B, g·A, gᵀ·x, dyᵀ·h."""
    return linear_flops(n, k, t) + 2 * lora_flops(n, k, t, r)


def weight_bytes(n: int, k: int) -> int:
    """Bytes of a double-quantised NF4 weight."""
    return nf4_bytes(n * k, BLOCKSIZE, double_quant=True)

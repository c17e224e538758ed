"""Small training problems for the paged optimizers' tests."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

SHAPES = (
    (16, 1024),
    (1000, 16),
    (7,),
    (),
    (300, 301),
    (70_001,),
)
PAGE = 64 << 10


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(steps: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Iterator[list[Tensor]]:
    """Gradients of one size for each tensor and step, from 1e-4 to 1e2."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        sizes = 10 ** (torch.rand(len(SHAPES), generator=generator) * 6 - 4)
        yield [
            (torch.randn(shape, generator=generator) * size).to(dtype)
            for shape, size in zip(SHAPES, sizes, strict=True)
        ]


def train(optimizer: torch.optim.Optimizer, steps: Iterator[list[Tensor]]) -> list[nn.Parameter]:
    """Steps with given gradients; the parameters of all groups."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for given in steps:
        for p, gradient in zip(trained, given, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return trained


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(flat(a), flat(b), strict=True)
    )


def flat(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().reshape(-1) for t in tensors]

"""Muon, for training the built-in base in little time.

Measured on the base, two cores: held-out loss 1.56 after 280 steps; AdamW reaches 1.82 after 400 and as long.

The update of a matrix is its momentum with all singular values brought near 1 by Newton-Schulz iterations

    X <- a·X + (b·X·Xᵀ + c·(X·Xᵀ)²)·X,      (a, b, c) = (3.4445, -4.7750, 2.0315)

of X = momentum / ‖momentum‖. Matrices of one shape are iterated as one batch, in float32: on a CPU without
matrix instructions that takes 0.14 s a step against 0.24 s one at a time in bfloat16.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale
0.2·√max(N, K), which makes AdamW's learning rates fit: Liu et al. 2025, "Muon is scalable for LLM training",
section 2.2.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """U·Vᵀ of each matrix's singular value decomposition U·S·Vᵀ, roughly: S becomes about 0.7 ... 1.2.

    Args:
        matrices: [count, N, K] float32.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller side first: cheaper products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT  # [count, n, n]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices [N, K]."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter from its gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                momenta = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    momenta.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalized(torch.stack(momenta)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

"""What every ratio of the CPU suite is taken to: torch's product with the dense weight, of the same shape."""

import torch

from bench.problem import LIMIT, Base, assert_error, forward_error, relative_error
from bench.shapes import Case, linear_flops


def _copies(base: Base, case: Case, sets) -> list[torch.Tensor]:
    weight = base.dense()
    return [weight, *(weight.clone() for _ in range(sets(weight.nbytes) - 1))]


def _bytes(case: Case, t: int) -> int:
    return (case.n * case.k + t * (case.n + case.k)) * case.dtype.itemsize


def time_forward(op: str, base: Base, case: Case, sets, timed) -> None:
    """y = x·Wᵀ for the case's tokens; for one token where the op has none."""
    t = case.t or 1
    weights = _copies(base, case, sets)
    xs = [torch.randn(t, case.k).to(case.dtype) for _ in weights]  # [T, K]
    calls = [lambda x=x, w=w: torch.nn.functional.linear(x, w) for x, w in zip(xs, weights, strict=True)]
    assert_error(forward_error(calls[0](), xs[0], base, lora=False), LIMIT[case.dtype], "F.linear")
    timed(calls, op=op, variant="dense", flops=linear_flops(case.n, case.k, t), bytes=_bytes(case, t))


def time_backward(op: str, base: Base, case: Case, sets, timed) -> None:
    """dx = dy·W: the backward of F.linear with a frozen weight."""
    weights = _copies(base, case, sets)
    dys = [torch.randn(case.t, case.n).to(case.dtype) for _ in weights]  # [T, N]
    calls = [lambda dy=dy, w=w: dy @ w for dy, w in zip(dys, weights, strict=True)]
    truth = dys[0].double() @ base.truth()
    assert_error(relative_error(calls[0](), truth), LIMIT[case.dtype], "dy @ W")
    flops = linear_flops(case.n, case.k, case.t)
    timed(calls, op=op, variant="dense", flops=flops, bytes=_bytes(case, case.t))

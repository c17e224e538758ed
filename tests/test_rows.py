"""What stands in one row of x or dy stays in that row of y and dx, whatever lies behind the rows."""

import pytest
import torch

import lora_kernels as lk

RANKS = (5, 3)


def _run(op, x, weight, p):
    """y of `op` with adapters of odd ranks."""
    n, k = weight.shape
    A = [torch.randn(r, k).to(x.dtype) for r in RANKS]
    B = [torch.randn(n, r).to(x.dtype) for r in RANKS]
    options = {"bias": torch.randn(n).to(x.dtype), "dropout_p": p}
    if op == "lora_linear_batched":
        index = torch.arange(len(x)) // 2 % 3 - 1
        return lk.lora_linear_batched(x, weight, A, B, [0.5, 2.0], index, **options)
    if op == "dora_linear":
        return lk.dora_linear(x, weight, A[0], B[0], torch.rand(n) + 0.5, **options)
    return lk.lora_linear(x, weight, A[0], B[0], **options)


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_batched", "dora_linear"])
@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("tokens", [40, 600])
def test_a_nan_stays_in_its_row(op, nf4, dtype, p, tokens, kernels):
    """N, K and r of no round length: what a GEMM reads behind a row it must not use."""
    n, k = 71, 193
    weight = (torch.randn(n, k) * k**-0.5).to(dtype)
    weight = lk.nf4_quantize(weight) if nf4 else weight
    bad = torch.zeros(tokens, dtype=torch.bool)
    bad[torch.randperm(tokens)[: tokens // 4]] = True
    x, dy = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype)
    x[bad, 0] = float("nan")  # the first of a row is behind the last of the one before
    dy[bad, 0] = float("inf")
    x.requires_grad_()
    y = _run(op, x, weight, p)
    y.backward(dy)
    for name, got in (("y", y), ("dx", x.grad)):
        spread = ~torch.isfinite(got).all(dim=1) & ~bad
        assert not bool(spread.any()), f"{name}: rows {spread.nonzero().flatten().tolist()[:8]}"
        assert not bool(torch.isfinite(got[bad]).all(dim=1).any()), f"{name}: a bad row became numbers"

"""How tensors lie in memory changes nothing, nor what lies beside them, on every backend."""

import pytest
import torch

import lora_kernels as lk

RANKS = (5, 3)
OPS = ("lora_linear", "lora_linear_batched", "dora_linear")


def _run(op, x, weight, A, B, magnitude, bias, p, rng):
    options = {"bias": bias, "dropout_p": p, "rng": rng}
    if op == "lora_linear_batched":
        index = torch.arange(len(x)) // 2 % 3 - 1
        return lk.lora_linear_batched(x, weight, A, B, [0.5, 2.0], index, **options)
    if op == "dora_linear":
        return lk.dora_linear(x, weight, A[0], B[0], magnitude, **options)
    return lk.lora_linear(x, weight, A[0], B[0], **options)


def _tensors(n, k, dtype, p):
    """A, B, magnitude, bias, rng: those of _run."""
    A = [(torch.randn(r, k) * k**-0.5).to(dtype) for r in RANKS]
    B = [torch.randn(n, r).to(dtype) for r in RANKS]
    rng = torch.randint(0, 2**63 - 1, (2,)) if p else None
    return A, B, torch.rand(n) + 0.5, torch.randn(n).to(dtype), rng


@pytest.mark.parametrize("op", OPS)
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
    A, B, magnitude, bias, rng = _tensors(n, k, dtype, p)
    y = _run(op, x, weight, A, B, magnitude, bias, p, rng)
    y.backward(dy)
    for name, got in (("y", y), ("dx", x.grad)):
        spread = ~torch.isfinite(got).all(dim=1) & ~bad
        assert not bool(spread.any()), f"{name}: rows {spread.nonzero().flatten().tolist()[:8]}"
        assert not bool(torch.isfinite(got[bad]).all(dim=1).any()), f"{name}: a bad row became numbers"


def _strided(t):
    """The same values, in memory column by column, or every third element."""
    if t is None:
        return None
    return t.T.contiguous().T if t.dim() == 2 else torch.stack([t, t, t], dim=1)[:, 1]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("tokens", [3, 40])
def test_strides_change_no_value(op, dtype, p, tokens, kernels):
    n, k = 70, 192
    weight = lk.nf4_quantize(torch.randn(n, k) * k**-0.5)
    x, dy = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype)
    A, B, magnitude, bias, rng = _tensors(n, k, dtype, p)

    def computed(lie):
        leaves = [lie(t).requires_grad_() for t in (x, magnitude, bias, *A, *B)]
        parts = leaves[3 : 3 + len(A)], leaves[3 + len(A) :]
        y = _run(op, leaves[0], weight, *parts, *leaves[1:3], p, lie(rng))
        return y, *torch.autograd.grad(y, leaves, lie(dy), allow_unused=True)

    plain = computed(lambda t: t if t is None else t.detach().clone())
    for wanted, got in zip(plain, computed(_strided), strict=True):
        assert (wanted is None) == (got is None)
        if got is not None:  # a BLAS may sum in another order
            limit = 1e-5 if dtype == torch.float32 else 8e-3
            assert (got.double() - wanted.double()).norm() <= limit * wanted.double().norm()

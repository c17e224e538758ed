"""lora_linear forward on this machine's CPU: NF4 weight, r = 16, no gradients."""

import pytest
import torch

import lora_kernels as lk
from bench import dense
from bench.problem import LIMIT, assert_error, copy_nf4, forward_error
from bench.shapes import SCALING, Case, linear_flops, lora_flops, weight_bytes

CASES = (
    *(Case(4096, 4096, t) for t in (1, 8, 64, 512)),
    Case(4096, 4096, 512, p=0.1),
    Case(4096, 4096, 64, torch.float32),
    *(Case(14336, 4096, t) for t in (1, 64)),
    *(Case(1536, 576, t, quick=True) for t in (1, 64)),
    Case(1536, 576, 512),
    Case(1536, 576, 512, p=0.1),
    Case(3420, 1000, 1, quick=True),
    Case(3420, 1000, 64, quick=True),
    Case(3420, 1000, 64, torch.float32),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear(case, base, sets, timed):
    n, k, t, dtype, p = case[:5]
    moved = weight_bytes(n, k) + t * (n + k) * dtype.itemsize
    copies = [copy_nf4(base.nf4) for _ in range(sets(moved))]
    xs = [torch.randn(t, k).to(dtype) for _ in copies]  # [T, K]
    rng = lk.dropout_rng("cpu") if p else None

    def forward(x, weight):
        options = {"scaling": SCALING, "dropout_p": p, "rng": rng}
        return lk.lora_linear(x, weight, base.lora_A, base.lora_B, **options)

    calls = [lambda x=x, w=w: forward(x, w) for x, w in zip(xs, copies, strict=True)]
    error = forward_error(calls[0](), xs[0], base, p=p, rng=rng)
    assert_error(error, LIMIT[dtype], "lora_linear")
    timed(
        calls,
        op="lora_linear",
        variant="lora_kernels",
        flops=linear_flops(n, k, t) + lora_flops(n, k, t),
        bytes=moved,
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.p == 0], ids=str)
def test_dense_linear(case, base, sets, timed):
    dense.time_forward("lora_linear", base, case, sets, timed)

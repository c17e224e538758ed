"""lora_linear_backward on this machine's CPU: dx, dA and dB of an NF4 weight, r = 16."""

import pytest
import torch

import lora_kernels as lk
from bench import dense
from bench.problem import LIMIT, assert_error, backward_error, copy_nf4
from bench.shapes import SCALING, Case, lora_backward_flops, weight_bytes
from lora_kernels import reference

CASES = (
    *(Case(4096, 4096, t) for t in (8, 64, 512)),
    Case(4096, 4096, 512, p=0.1),
    Case(4096, 4096, 64, torch.float32),
    Case(1536, 576, 64, quick=True),
    Case(1536, 576, 512),
    Case(1536, 576, 512, p=0.1),
    Case(3420, 1000, 64, quick=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear_backward(case, base, sets, timed):
    n, k, t, dtype, p = case[:5]
    moved = weight_bytes(n, k) + 2 * t * (n + k) * dtype.itemsize
    copies = [copy_nf4(base.nf4) for _ in range(sets(moved))]
    xs = [torch.randn(t, k).to(dtype) for _ in copies]  # [T, K]
    dys = [torch.randn(t, n).to(dtype) for _ in copies]  # [T, N]
    rng = lk.dropout_rng("cpu") if p else None
    h = reference.lora_dropout(xs[0], p, rng) @ base.lora_A.T  # [T, r]

    def backward(dy, x, weight):
        return torch.ops.lora_kernels.lora_linear_backward(
            *(dy, x, h, *weight.base_weight()[:5], k),
            *(base.lora_A, base.lora_B, SCALING, p, rng, [True, True, True, False]),
        )[:3]

    calls = [lambda dy=dy, x=x, w=w: backward(dy, x, w) for dy, x, w in zip(dys, xs, copies, strict=True)]
    error = backward_error(calls[0](), dys[0], xs[0], base, p=p, rng=rng)
    assert_error(error, LIMIT[dtype], "lora_linear_backward")
    flops = lora_backward_flops(n, k, t)
    timed(calls, op="lora_linear_backward", variant="lora_kernels", flops=flops, bytes=moved)


@pytest.mark.parametrize("case", [case for case in CASES if case.p == 0], ids=str)
def test_dense_backward(case, base, sets, timed):
    dense.time_backward("lora_linear_backward", base, case, sets, timed)

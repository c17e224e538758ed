"""adamw_step, adamw8bit_step, lion_step, lion8bit_step: every backend against the reference, and what holds
for all of them."""

import pytest
import torch
from optim_cases import DTYPES, OPS, ROUNDINGS, Problem

import lora_kernels as lk

SIZES = (1, 255, 256, 257, 700, 2048, 5003)  # tails of every kind, and an empty parameter


def tensors(dtype, sizes=SIZES, scale=1.0):
    return [(scale * torch.randn(n)).to(dtype) for n in sizes]


def modes(dtype):
    return ("nearest",) if dtype == torch.float32 else ROUNDINGS


CASES = [(op, dtype, rounding) for op in OPS for dtype in DTYPES for rounding in modes(dtype)]


@pytest.mark.parametrize(("op", "dtype", "rounding"), CASES)
def test_every_backend_gives_the_bits_of_the_reference(kernels, op, dtype, rounding):
    params = tensors(dtype, (*SIZES, 0))
    mine, reference = (Problem(op, params, rounding) for _ in range(2))
    for step in range(1, 5):
        grad_dtype = dtype if step % 2 else torch.float32
        grads = [g.to(grad_dtype) for g in tensors(torch.float32, (*SIZES, 0), 10.0 ** (step - 3))]
        mine.step(grads, step)
        with lk.use_backend("reference"):
            reference.step(grads, step)
        mine.assert_same(reference)
    for page in mine.pages:
        assert page[:8].view(torch.int64).item() == 4 and not page[8:64].any()

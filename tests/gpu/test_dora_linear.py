"""dora_linear on the device: the norm, forward and gradients by its kernels, and the CPU's results."""

import pytest
import torch
from dora_case import Case
from numerics import LIMIT, relative_error
from problems import moved

import lora_kernels as lk

pytestmark = pytest.mark.stand_in
NAMES = ("y", "dx", "dA", "dB", "dmagnitude", "dbias")
HALVES = (torch.bfloat16, torch.float16)
# Few tokens, some, many: each kernel of the products below.
TOKENS = (1, 9, 40, 300, 600)


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize("t", TOKENS)
def test_forward_and_gradients(t, dtype, p, nf4, device, affordable):
    affordable(t, 200, 320)
    case = Case(t, 200, 320, 16, dtype, p=p, nf4=nf4)
    found = [out.cpu() for out in moved(case, device).computed()]
    for name, out, truth in zip(NAMES, found, case.expected(torch.float64), strict=True):
        assert relative_error(out, truth) <= 2 * LIMIT[dtype], name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n, k, r", [(191, 333, 5), (1, 64, 16), (70, 1088, 64)], ids=str)
def test_odd_sizes_and_float32_adapters_give_the_cpus_results(n, k, r, dtype, device):
    """Up to roundings to the dtype: of results, and of h, g and u between them."""
    case = Case(37, n, k, r, dtype, p=0.1, adapter_dtype=torch.float32)
    there = moved(case, device).computed()
    with lk.use_backend("cpu"):
        here = case.computed()
    for name, out, want in zip(NAMES, there, here, strict=True):
        assert out.dtype == want.dtype
        assert relative_error(out.cpu(), want.double()) <= 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
def test_two_runs_give_the_same_bits(dtype, device):
    case = moved(Case(40, 130, 192, 8, dtype, p=0.1), device)
    assert all(torch.equal(a, b) for a, b in zip(case.computed(), case.computed(), strict=True))

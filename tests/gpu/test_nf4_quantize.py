"""nf4_quantize on the device gives the CPU's bytes: a checkpoint does not depend on where it was made."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def spread(*shape):
    """Normal values over forty decades, subnormal ones among them."""
    return torch.randn(*shape) * 10.0 ** torch.randint(-40, 4, (shape[0], 1)).double().float()


def ties(n, k):
    """Every block holds its absmax and exact midpoints between neighbouring codes, where a tie goes down."""
    codes = reference.codebook().double()
    midpoints = ((codes[1:] + codes[:-1]) / 2).float()
    values = midpoints[torch.randint(15, (n, k))]
    values[:, ::32] = 1.0
    return values


def near_ties(n, k):
    """A few ulp from midpoint·absmax, where x/m, x·(1/m) and an inexact reciprocal get other codes."""
    values = ties(n, k) * (torch.rand(()) + 0.5)
    nudge = torch.randint(-2, 3, (n, k), dtype=torch.int32)
    nudge[:, ::32] = 0
    return (values.view(torch.int32) + nudge).view(torch.float32)


def single_outlier(n, k):
    values = torch.randn(n, k) * 1e-3
    values[n // 2, k // 2] = 1e4
    return values


KINDS = {
    "normal": torch.randn,
    "spread": spread,
    "ties": ties,
    "near ties": near_ties,
    "zeros": torch.zeros,
    "outlier": single_outlier,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_bytes_are_those_of_the_cpu(kind, dtype, double_quant, device):
    for (n, k), blocksize in (((64, 1024), 64), ((33, 91), 64), ((7, 1001), 128), ((300, 256), 4096)):
        w = KINDS[kind](n, k).to(dtype)
        here = lk.nf4_quantize(w, blocksize, double_quant).tensors()
        there = lk.nf4_quantize(w.to(device), blocksize, double_quant).tensors()
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            assert there[name].device == device
            assert torch.equal(there[name].cpu(), tensor), (name, n, k, blocksize)


def test_a_nan_or_an_infinity_is_named(device):
    for bad in (float("nan"), float("inf")):
        w = torch.randn(8, 64, device=device)
        w[3, 5] = bad
        with pytest.raises(ValueError, match="NaN or an infinity"):
            lk.nf4_quantize(w)

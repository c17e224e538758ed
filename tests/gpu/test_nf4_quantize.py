"""nf4_quantize on the device gives the CPU's bytes: a checkpoint does not depend on where it was made."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import cuda

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_same(got: lk.NF4Weight, wanted: lk.NF4Weight) -> None:
    for name, tensor in wanted.tensors().items():
        assert torch.equal(got.tensors()[name].cpu(), tensor.cpu()), name


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


@pytest.mark.parametrize("blocksize", reference.NF4_BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_size_at_every_size(blocksize, dtype, device):
    """Whole blocks, a short one behind them, odd sizes; from one weight to more than a device holds."""
    many = 8192 * 2500
    for n in (1, blocksize - 1, blocksize, 3 * blocksize + 1, 8192 * 50 + 17, many + 3 * blocksize + 31):
        w = (torch.randn(1, n) * 10.0 ** torch.randint(-3, 3, (1, n))).to(dtype)
        assert_same(lk.nf4_quantize(w.to(device), blocksize), lk.nf4_quantize(w, blocksize))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_bytes_may_start_anywhere(dtype, device):
    """Views that start at any element and byte: wide loads and stores must not be used."""
    for n, blocksize in ((64 * 4000, 64), (50 * 4096 + 17, 4096), (333, 32)):
        storage = torch.randn(n + 16).to(dtype)
        on_device = storage.to(device)
        for weight_shift, packed_shift in ((0, 0), (0, 1), (0, 2), (1, 0), (3, 3), (8, 4)):
            wanted = lk.nf4_quantize(storage[weight_shift : weight_shift + n].view(1, n), blocksize, False)
            w = on_device[weight_shift : weight_shift + n].view(1, n)
            around = torch.full(((n + 1) // 2 + 8,), 0xA5, dtype=torch.uint8, device=device)
            packed = around[packed_shift : packed_shift + (n + 1) // 2].view(-1, 1)
            absmax = torch.full(wanted.absmax.shape, float("nan"), device=device)
            cuda.nf4_quantize(w, blocksize, packed, absmax, None, None, None)
            assert torch.equal(packed.cpu(), wanted.packed) and torch.equal(absmax.cpu(), wanted.absmax)
            assert bool((around[:packed_shift] == 0xA5).all())
            assert bool((around[packed_shift + len(packed) :] == 0xA5).all())


def test_the_mean_of_the_scales_is_the_cpus(device):
    """Of scales whose mean depends on the order of the sum (tests/test_nf4_quantize.py), ties, others."""
    vanishing = torch.tensor([1.0, 2.0**-24, *[2.0**-54] * 4094])
    growing = torch.tensor([1.0, 2.0**-24 - 4094 * 1.75 * 2.0**-53, *[1.5 * 2.0**-53] * 4094])
    tie = torch.tensor([1.0, 1 + 2.0**-23] * 100_000)
    random = [torch.rand(1 << 20) * 2.0 ** torch.randint(-top, top, (1 << 20,)) for top in (1, 5, 100)]
    for scales in (vanishing, growing, vanishing.flip(0), growing.flip(0), tie, *random):
        w = torch.zeros(len(scales), 32)
        w[:, 7] = scales
        assert_same(lk.nf4_quantize(w.to(device), 32), lk.nf4_quantize(w, 32))


def test_bytes_are_the_same_every_time(device):
    w = torch.randn(2048, 4096, device=device).bfloat16()
    first = lk.nf4_quantize(w)
    for _ in range(20):
        assert_same(lk.nf4_quantize(w), first)


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_or_an_infinity_is_named(blocksize, dtype, device):
    n = 8192 * 2500 + 4096 + 21
    w = torch.randn(1, n, device=device).to(dtype)
    for at in (5, n // 2, n - 22, n - 1):  # the last two: in the last whole block, in the short one
        for bad in (float("nan"), float("inf"), -float("inf")):
            before = w[0, at].clone()
            w[0, at] = bad
            for double_quant in (False, True):
                with pytest.raises(ValueError, match="NaN or an infinity"):
                    lk.nf4_quantize(w, blocksize, double_quant)
            w[0, at] = before
            lk.nf4_quantize(w, blocksize)  # what was found there is forgotten


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_quantize_reads_the_weight_of_the_replay(dtype, double_quant, device):
    """It never waits for the device, so a NaN goes unnoticed; the next eager call is not blamed for it."""
    w = torch.randn(300, 777, device=device).to(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lk.nf4_quantize(w, 64, double_quant)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = lk.nf4_quantize(w, 64, double_quant)
    for _ in range(3):
        w.normal_()
        for tensor in captured.tensors().values():
            tensor.fill_(7)
        graph.replay()
        assert_same(captured, lk.nf4_quantize(w.cpu(), 64, double_quant))
    w[7, 7] = float("nan")
    graph.replay()
    w[7, 7] = 0
    assert_same(lk.nf4_quantize(w, 64, double_quant), lk.nf4_quantize(w.cpu(), 64, double_quant))
    graph.replay()
    assert_same(captured, lk.nf4_quantize(w.cpu(), 64, double_quant))


def test_a_weight_of_more_than_2_to_the_31_elements(device):
    """Flat indices need 64 bits."""
    n, k = 2**16 + 2, 2**15
    free, _ = torch.cuda.mem_get_info(device)
    if free < 12 << 30:
        pytest.skip(f"needs 12 GiB of free device memory, {free / 2**30:.1f} GiB are free")
    w = torch.empty(n, k, dtype=torch.bfloat16, device=device).normal_()
    got = lk.nf4_quantize(w, 64, double_quant=False)
    for first in (0, n // 2 - 1, n - 3):
        wanted = lk.nf4_quantize(w[first : first + 3].cpu(), 64, double_quant=False)
        assert torch.equal(got.packed[first * k // 2 : (first + 3) * k // 2].cpu(), wanted.packed)
        assert torch.equal(got.absmax[first * k // 64 : (first + 3) * k // 64].cpu(), wanted.absmax)


def test_no_element_at_all(device):
    for shape in ((0, 64), (5, 0)):
        weight = lk.nf4_quantize(torch.empty(shape, device=device))
        assert weight.packed.numel() == 0 and weight.offset.item() == 0

"""nf4_dequantize on the device: the specification's bits, for every shape, region and scale."""

import random

import pytest
import torch

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import cuda
from lora_kernels.base_weight import BaseWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {4: torch.int32, 2: torch.int16}
# K a multiple of the block size; of 16 only (aligned kernel, blocks that straddle rows); odd K; odd N·K.
SHAPES = ((64, 4096), (33, 144), (7, 1000), (37, 91), (3, 5), (1, 1), (128, 14336))


def random_weight(n: int, k: int, blocksize: int, double_quant: bool) -> lk.NF4Weight:
    """Random bytes on the CPU: every code and every scale code among them, scales over ten decades."""
    blocks = -(-n * k // blocksize)
    packed = torch.randint(256, (-(-n * k // 2), 1), dtype=torch.uint8)
    if not double_quant:
        absmax = torch.randn(blocks).abs() * 10.0 ** torch.randint(-6, 4, (blocks,))
        return lk.NF4Weight(packed, absmax, None, None, (n, k), blocksize, torch.float32)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8)
    nested = torch.rand(-(-blocks // 256))
    return lk.NF4Weight(packed, absmax, nested, torch.rand(()), (n, k), blocksize, torch.float32)


def expected(weight: lk.NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    return reference.nf4_dequantize(*weight.base_weight()[:4], tuple(weight.shape), weight.blocksize, dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bytes: -0.0 is not 0.0, and a NaN equals only itself."""
    bits = BITS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.cpu().view(bits), b.cpu().view(bits))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_bit_exact(shape, blocksize, double_quant, device):
    weight = random_weight(*shape, blocksize, double_quant)
    for dtype in DTYPES:
        assert same_bits(weight.to(device).dequantize(dtype), expected(weight, dtype)), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [91, 128, 144, 300], ids="K={}".format)
def test_a_region_is_that_part_of_the_whole(k, dtype, device):
    """Rectangles at any row and column, into outputs with a row stride; nothing around them changes."""
    n = 24
    weight = random_weight(n, k, 64, True)
    base, whole = weight.to(device).base_weight(), expected(weight, dtype)
    regions = [(0, n, 0, k), (n - 1, 1, k - 1, 1), (1, 2, 16, 64), (0, n, 1, 32), (3, 5, 32, 16)]
    for _ in range(40):
        row, col = random.randrange(n), random.randrange(k)
        regions.append((row, random.randint(1, n - row), col, random.randint(1, k - col)))
    for row, rows, col, cols in regions:
        for left, right in ((0, 0), (3, 6), (16, 16)):
            buffer = torch.full((rows, left + cols + right), float("nan"), dtype=dtype, device=device)
            cuda.nf4_dequantize(base, row, col, buffer[:, left : left + cols])
            inside = buffer[:, left : left + cols].contiguous()
            region = whole[row : row + rows, col : col + cols].contiguous()
            assert same_bits(inside, region), (row, rows, col, cols, left, right)
            assert bool(buffer[:, :left].isnan().all()) and bool(buffer[:, left + cols :].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_codes_need_no_alignment(dtype, device):
    """A packed tensor that is a view at an odd byte: the aligned kernel's wide loads must not be used."""
    weight = random_weight(16, 128, 64, True).to(device)
    storage = torch.zeros(weight.packed.numel() + 8, dtype=torch.uint8, device=device)
    for shift in (1, 4):
        packed = storage[shift : shift + weight.packed.numel()].view(-1, 1)
        packed.copy_(weight.packed)
        base = weight.base_weight()._replace(data=packed)
        out = torch.full((16, 128), float("nan"), dtype=dtype, device=device)
        cuda.nf4_dequantize(base, 0, 0, out)
        assert same_bits(out, weight.dequantize(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [64, 63], ids=["aligned kernel", "general kernel"])
def test_extreme_scales_round_as_the_format_says(dtype, cols, device):
    """Overflow to infinity, subnormal results and zero: one rounding of the fp32 product, nothing flushed."""
    scales = torch.tensor([0.0, 1e-45, 1e-40, 6e-8, 5.9e-8, 6.1e-5, 1.0, 65504.0, 65520.0, 1e30, 3.4e38])
    packed = (torch.arange(16) * 16 + torch.arange(16).flip(0)).to(torch.uint8).repeat(2 * len(scales))
    weight = lk.NF4Weight(packed.view(-1, 1), scales, None, None, (len(scales), 64), 64, dtype)
    out = torch.full((len(scales), cols), float("nan"), dtype=dtype, device=device)
    cuda.nf4_dequantize(weight.to(device).base_weight(), 0, 0, out)
    assert same_bits(out, expected(weight, dtype)[:, :cols].contiguous())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written(shape, device):
    weight = random_weight(*shape, 64, True).to(device)
    for dtype in DTYPES:
        out = torch.full(shape, float("nan"), dtype=dtype, device=device)
        cuda.nf4_dequantize(weight.base_weight(), 0, 0, out)
        assert not bool(out.isnan().any())


def test_no_element_at_all(device):
    for shape in ((0, 64), (5, 0)):
        weight = lk.nf4_quantize(torch.empty(shape, device=device))
        assert weight.dequantize(torch.bfloat16).shape == shape


def test_a_weight_of_more_than_2_to_the_31_elements(device):
    """Flat indices need 64 bits, and the grid is smaller than the work: its stride loop is taken."""
    n, k = 2**16 + 2, 2**15
    free, _ = torch.cuda.mem_get_info(device)
    if free < 12 << 30:
        pytest.skip(f"needs 12 GiB of free device memory, {free / 2**30:.1f} GiB are free")
    packed = torch.randint(256, (n * k // 2, 1), dtype=torch.uint8, device=device)
    absmax = torch.rand(n * k // 4096, device=device)
    base = BaseWeight(packed, absmax, None, None, 4096, n, k)
    out = torch.full((n, k), float("nan"), dtype=torch.bfloat16, device=device)
    cuda.nf4_dequantize(base, 0, 0, out)
    for first in (0, n // 2 - 1, n - 3):  # three rows each: 3·K codes and 3·K/4096 scales of their own
        part = packed[first * k // 2 : (first + 3) * k // 2].cpu()
        scales = absmax[first * k // 4096 : (first + 3) * k // 4096].cpu()
        wanted = reference.nf4_dequantize(part, scales, None, None, (3, k), 4096, torch.bfloat16)
        assert same_bits(out[first : first + 3], wanted)
    assert not bool(out.isnan().any())
    unaligned = torch.full((2, 777), float("nan"), device=device)
    cuda.nf4_dequantize(base, n - 2, 31, unaligned)
    assert same_bits(unaligned.bfloat16(), out[n - 2 :, 31 : 31 + 777].contiguous())


def test_tensors_on_two_devices_are_named(device):
    weight = random_weight(8, 64, 64, True)
    mixed = weight.to(device)
    mixed = lk.NF4Weight(
        mixed.packed, weight.absmax, mixed.nested_absmax, mixed.offset, (8, 64), 64, torch.float32
    )
    with pytest.raises(ValueError, match="absmax is on cpu"):
        mixed.dequantize()


def test_float64_is_refused_with_a_reason(device):
    with pytest.raises(TypeError, match="float64"):
        random_weight(8, 64, 64, True).to(device).dequantize(torch.float64)

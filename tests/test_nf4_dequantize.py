"""nf4_dequantize on every backend: the exact product, rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import KERNELS, VARIANTS, module, variant

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.base_weight import BaseWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_weight(n: int, k: int, blocksize: int, double_quant: bool) -> lk.NF4Weight:
    """Random bytes, every code and every scale code among them; not the result of a quantisation."""
    blocks = -(-n * k // blocksize)
    packed = torch.randint(256, (-(-n * k // 2), 1), dtype=torch.uint8)
    if not double_quant:
        absmax = torch.randn(blocks).abs() * 10.0 ** torch.randint(-6, 4, (blocks,))
        return lk.NF4Weight(packed, absmax, None, None, (n, k), blocksize, torch.float32)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8)
    nested = torch.rand(-(-blocks // 256))
    return lk.NF4Weight(packed, absmax, nested, torch.rand(()), (n, k), blocksize, torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 30),
    k=st.integers(1, 400),
    blocksize=st.sampled_from(reference.NF4_BLOCKSIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_every_shape_is_bit_exact(n, k, blocksize, double_quant, dtype):
    weight = random_weight(n, k, blocksize, double_quant)
    wanted = reference.nf4_dequantize(*weight.base_weight()[:4], (n, k), blocksize, dtype)
    for name in KERNELS:
        with variant(name):
            assert torch.equal(weight.dequantize(dtype), wanted), name


def test_scales_of_many_second_level_blocks_are_bit_exact(kernels):
    """Rows that start and end inside second-level blocks, with every remainder of the vector widths."""
    for k in (257, 8191, 33333):
        weight = random_weight(9, k, 32, True)
        wanted = reference.nf4_dequantize(*weight.base_weight()[:4], (9, k), 32, torch.float32)
        for cols in (k, k - 33, k // 3, 70):
            out = torch.full((9, cols), float("nan"))
            module().nf4_dequantize(weight.base_weight(), 0, k - cols, out)
            assert torch.equal(out, wanted[:, k - cols :])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), name=st.sampled_from(VARIANTS))
def test_a_region_is_that_part_of_the_whole(data, dtype, name):
    """Any rectangle, into an output with a row stride; elements around it stay untouched."""
    n, k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 300))
    row, col = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, k - 1))
    rows, cols = data.draw(st.integers(1, n - row)), data.draw(st.integers(1, k - col))
    weight = random_weight(n, k, 64, True)
    whole = reference.nf4_dequantize(*weight.base_weight()[:4], (n, k), 64, dtype)
    buffer = torch.full((rows, cols + 9), float("nan"), dtype=dtype)
    with variant(name):
        module().nf4_dequantize(weight.base_weight(), row, col, buffer[:, 3 : 3 + cols])
    assert torch.equal(buffer[:, 3 : 3 + cols], whole[row : row + rows, col : col + cols])
    assert bool(buffer[:, :3].isnan().all()) and bool(buffer[:, 3 + cols :].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_aligned_region_goes_into_part_of_a_larger_tensor(dtype, kernels):
    """Whole rows and parts of them, starting on 16 bytes, as where W0 lies beside s·B in one matrix."""
    weight = random_weight(9, 256, 64, True)
    whole = reference.nf4_dequantize(*weight.base_weight()[:4], (9, 256), 64, dtype)
    for row, cols in ((0, 256), (4, 256), (2, 64)):
        buffer = torch.full((9 - row, cols + 24), float("nan"), dtype=dtype)
        module().nf4_dequantize(weight.base_weight(), row, 256 - cols, buffer[:, 8 : 8 + cols])
        assert torch.equal(buffer[:, 8 : 8 + cols], whole[row:, 256 - cols :])
        assert bool(buffer[:, :8].isnan().all()) and bool(buffer[:, 8 + cols :].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_equals_bitsandbytes(dtype, blocksize, backend):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(96, 200).to(dtype)
    for nested in (False, True):
        packed, state = functional.quantize_4bit(
            w, blocksize=blocksize, quant_type="nf4", compress_statistics=nested
        )
        pair = (state.state2.absmax, state.offset) if nested else (None, None)
        ours = lk.NF4Weight(packed, state.absmax, *pair, tuple(w.shape), blocksize, dtype)
        assert torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_scales_round_as_the_format_says(dtype, backend):
    """Overflow, subnormal results, zero, exact ties: one rounding to even of the fp32 product."""
    extreme = [0.0, 1e-45, 1e-40, 6e-8, 5.9e-8, 6.1e-5, 1.0, 65504.0, 65520.0, 1e30, 3.4e38]
    ties = [1 + odd * 2.0**-bits for bits in (8, 11) for odd in (1, 3)]  # halfway in bf16, in fp16
    scales = torch.tensor(extreme + ties + [2.0**-24 * 0.5, 2.0**-24 * 1.5])
    packed = (torch.arange(16) * 16 + torch.arange(16).flip(0)).to(torch.uint8).repeat(2 * len(scales), 1)
    weight = lk.NF4Weight(packed.reshape(-1, 1), scales, None, None, (len(scales), 64), 64, dtype)
    codes = torch.stack([packed.long() >> 4, packed.long() & 15], -1).reshape(len(scales), 64)
    wanted = (reference.codebook()[codes] * scales[:, None]).to(dtype)
    assert torch.equal(weight.dequantize(), wanted)


def test_the_error_of_a_round_trip_is_at_most_half_the_widest_gap(backend):
    w = torch.randn(64, 640)
    plain = lk.nf4_quantize(w, double_quant=False)
    error = (plain.dequantize(torch.float64 if backend == "reference" else torch.float32) - w).abs()
    widest = reference.codebook().diff().max() / 2
    assert bool((error.reshape(-1, 64) <= plain.absmax[:, None] * (widest + 1e-6)).all())


def test_large_outputs_are_exact_wherever_they_start(kernels):
    """Over 16 MiB stores may go past the caches, which takes 64-byte borders: rows that have them and not."""
    n, k = 1100, 4096
    weight = random_weight(n, k, 64, True)
    wanted = reference.nf4_dequantize(*weight.base_weight()[:4], (n, k), 64, torch.float32)
    for offset in (0, 1, 16):
        out = torch.full((n * k + offset,), float("nan"))[offset:].view(n, k)
        module().nf4_dequantize(weight.base_weight(), 0, 0, out)
        assert torch.equal(out, wanted)


def test_every_element_is_written(backend):
    weight = random_weight(37, 91, 64, True)
    out = torch.full((37, 91), float("nan"))
    module().nf4_dequantize(weight.base_weight(), 0, 0, out)
    assert not out.isnan().any()


def test_indices_beyond_2_to_the_31_are_read():
    """A flat index needs 64 bits: the last row of a weight with more than 2^31 elements (1 GiB of codes)."""
    n, k = 2**16 + 2, 2**15
    packed = torch.zeros(n * k // 2, 1, dtype=torch.uint8)
    packed[-k // 2 :] = 0x3C
    absmax = torch.ones(n * k // 4096)
    absmax[-k // 4096 :] = torch.arange(1, k // 4096 + 1)
    base = BaseWeight(packed, absmax, None, None, 4096, n, k)
    out = torch.empty(1, k)
    module().nf4_dequantize(base, n - 1, 0, out)
    codes = reference.codebook()[torch.tensor([3, 12])].repeat(k // 2)
    assert torch.equal(out[0], codes * torch.arange(1, k // 4096 + 1).repeat_interleave(4096))


def test_tensors_that_do_not_fit_are_named(backend):
    good = random_weight(8, 64, 64, True)

    def dequantize(**changed):
        fields = {**dict(zip(lk.NF4Weight.__slots__, good.__getstate__().values(), strict=True)), **changed}
        return lk.NF4Weight(**fields).dequantize(fields.pop("to", torch.float32))

    for changed, message in [
        ({"packed": good.packed[:-1]}, "weight holds 255 bytes"),
        ({"packed": good.packed.int()}, "weight has dtype torch.int32"),
        ({"absmax": good.absmax[:-1]}, "absmax has shape"),
        ({"absmax": good.absmax.float()}, "absmax .double-quantised. has dtype torch.float32"),
        ({"nested_absmax": good.nested_absmax.half()}, "nested_absmax has dtype torch.float16"),
        ({"nested_absmax": None}, "nested_absmax and offset go together"),
        ({"offset": torch.zeros(1)}, "offset has shape"),
        ({"blocksize": 100}, "blocksize is 100"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            dequantize(**changed)
    with pytest.raises(TypeError, match=r"dtype has dtype torch\.int8"):
        good.dequantize(torch.int8)

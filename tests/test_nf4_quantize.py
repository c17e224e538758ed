"""nf4_quantize on every backend: the same bytes as the specification, and as bitsandbytes."""

import math

import numpy as np
import pytest
import simt_backend
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import VARIANTS, module, variant

import lora_kernels as lk
from lora_kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def adversarial(name: str, n: int, k: int) -> torch.Tensor:
    """fp32 weights that sit where implementations differ."""
    w = torch.randn(n, k)
    flat = w.view(-1)
    if name == "ties":  # exactly on the midpoints between codes, at scales that keep them exact
        codes = reference.codebook()
        mid = ((codes[1:].double() + codes[:-1].double()) / 2).float()
        flat[:] = mid[torch.randint(15, flat.shape)] * 2.0 ** torch.randint(-8, 8, (1,)).item()
        flat[::64] = 2.0 ** torch.randint(-8, 8, (1,)).item()
    elif (
        name == "near ties"
    ):  # a few ulp from midpoint · absmax, where x / m and x · (1/m) get different codes
        codes = reference.codebook()
        mid = ((codes[1:].double() + codes[:-1].double()) / 2).float()
        largest = torch.rand(()) + 0.5
        flat[:] = mid[torch.randint(15, flat.shape)] * largest
        flat[:] = (flat.view(torch.int32) + torch.randint(-2, 3, flat.shape, dtype=torch.int32)).view(
            torch.float32
        )
        flat[::32] = largest
    elif name == "zeros":
        flat[:] = 0
        flat[1::5] = -0.0
    elif name == "zero blocks":
        flat[: flat.numel() // 2] = 0
    elif name == "subnormal":
        flat *= 1e-40
    elif name == "tiny":
        flat *= 3e-38
    elif name == "huge":
        flat *= 1e37
    elif name == "outlier":
        flat[torch.randint(flat.numel(), ()).item()] = 3e4
    elif name == "equal":
        flat[:] = -0.37
    elif name == "codes":
        flat[:] = reference.codebook()[torch.randint(16, flat.shape)]
    return w


KINDS = (
    *("normal", "ties", "near ties", "zeros", "zero blocks", "subnormal"),
    *("tiny", "huge", "outlier", "equal", "codes"),
)
SHAPES = ((16, 64), (5, 77), (1, 1), (3, 21), (2, 4096), (33, 65))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_equal_the_specification(kind, dtype, kernels):
    for shape in SHAPES:
        for blocksize in (32, 64, 4096):
            w = adversarial(kind, *shape).to(dtype)
            if not torch.isfinite(w).all():
                w = w.clamp(-6e4, 6e4)
            got = lk.nf4_quantize(w, blocksize)
            wanted = reference.nf4_quantize(w, blocksize)
            for ours, spec in zip(got.tensors().values(), wanted, strict=True):
                assert torch.equal(ours, spec), (shape, blocksize)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_equal_bitsandbytes(blocksize, dtype, kernels):
    """bitsandbytes' CPU path, byte for byte, on every kind of input."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for kind in KINDS:
        for shape in SHAPES:
            w = adversarial(kind, *shape).to(dtype).clamp(-6e4, 6e4)
            packed, state = functional.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
            ours = lk.nf4_quantize(w, blocksize, double_quant=False)
            assert torch.equal(ours.packed, packed), (kind, shape)
            assert torch.equal(ours.absmax, state.absmax), (kind, shape)


@pytest.mark.parametrize("blocksize", reference.NF4_BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks_and_a_short_one(blocksize, dtype, kernels):
    """More weights than a small GPU takes at once, whole blocks that fill no tile, and a short one."""
    if kernels.startswith("simt"):
        simt_backend.pretend(1, 80)
    n = 9 * 8192 + 3 * blocksize + 31
    w = (torch.randn(1, n) * 10.0 ** torch.randint(-3, 3, (1, n))).to(dtype)
    got, wanted = lk.nf4_quantize(w, blocksize), reference.nf4_quantize(w, blocksize)
    for ours, spec in zip(got.tensors().values(), wanted, strict=True):
        assert torch.equal(ours, spec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_bytes_may_start_anywhere(dtype, kernels):
    for n, blocksize in ((64 * 40, 64), (3 * 4096 + 17, 4096), (333, 32)):
        storage = torch.randn(n + 16).to(dtype)
        for weight_shift, packed_shift in ((0, 0), (0, 1), (0, 2), (1, 0), (3, 3), (8, 4)):
            w = storage[weight_shift : weight_shift + n].view(1, n)
            around = torch.full(((n + 1) // 2 + 8,), 0xA5, dtype=torch.uint8)
            packed = around[packed_shift : packed_shift + (n + 1) // 2].view(-1, 1)
            absmax = torch.empty(math.ceil(n / blocksize))
            module().nf4_quantize(w, blocksize, packed, absmax, None, None, None)
            wanted = reference.nf4_quantize(w, blocksize, double_quant=False)
            assert torch.equal(packed, wanted[0]), (n, weight_shift, packed_shift)
            assert torch.equal(absmax, wanted[1]), (n, weight_shift, packed_shift)
            assert bool((around[:packed_shift] == 0xA5).all())
            assert bool((around[packed_shift + len(packed) :] == 0xA5).all())


def in_index_order(scales: list[float]) -> float:
    total = 0.0
    for scale in scales:
        total += scale
    return float(np.float32(total / len(scales)))


def test_the_mean_of_the_scales_is_summed_in_index_order(kernels):
    """In fp32 the order hardly ever shows. Here it does: 4094 addends vanish one by one, or grow."""
    vanishing = [1.0, 2.0**-24, *[2.0**-54] * 4094]
    growing = [1.0, float(np.float32(2.0**-24 - 4094 * 1.75 * 2.0**-53)), *[1.5 * 2.0**-53] * 4094]
    assert in_index_order(vanishing) < np.float32(math.fsum(vanishing) / len(vanishing))
    assert in_index_order(growing) > np.float32(math.fsum(growing) / len(growing))
    tie = [1.0, 1 + 2.0**-23] * 300
    spread = (torch.rand(5000) * 2.0 ** torch.randint(-100, 100, (5000,))).tolist()
    extremes = ([0.0] * 300, [1e-45] * 7, [3e38] * 2049)
    for scales in (vanishing, growing, vanishing[::-1], growing[::-1], tie, spread, spread[:1], *extremes):
        w = torch.zeros(len(scales), 32)
        w[:, 7] = torch.tensor(scales)
        assert lk.nf4_quantize(w, 32).offset.item() == in_index_order(scales)


def test_double_quantised_scales_are_no_worse_than_bitsandbytes(backend):
    """Ours are the true nearest entries; bitsandbytes' CPU path takes a coarse table. Few codes differ."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(1024, 1024) * torch.rand(1024, 1)
    _, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    exact = functional.quantize_4bit(w, quant_type="nf4")[1].absmax
    ours = lk.nf4_quantize(w)
    differing = (ours.absmax != state.absmax).double().mean().item()
    assert differing < 0.005
    torch.testing.assert_close(ours.nested_absmax, state.state2.absmax, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.offset, state.offset, rtol=1e-6, atol=0)
    decoded = reference.dequantize_absmax(ours.absmax, ours.nested_absmax, ours.offset)
    theirs = reference.dequantize_absmax(state.absmax, state.state2.absmax, state.offset)
    assert (decoded - exact).norm() <= (theirs - exact).norm() * (1 + 1e-6)


def test_each_scale_code_is_the_nearest_entry(backend):
    w = torch.randn(300, 640) * torch.rand(300, 1)
    plain, nested = lk.nf4_quantize(w, double_quant=False), lk.nf4_quantize(w)
    centred = (plain.absmax - nested.offset).double()
    scale = nested.nested_absmax.double().repeat_interleave(256)[: centred.numel()]
    entries = reference.dynamic_map().double()
    distance = (centred[:, None] - entries * scale[:, None]).abs()
    chosen = distance.gather(1, nested.absmax.long()[:, None]).squeeze(1)
    assert torch.equal(chosen, distance.min(dim=1).values)


def test_scale_codes_are_exact_beside_a_tie(backend):
    """Scales 1 ± d with d a few 2^-23 from every midpoint: their mean is exactly 1, so d gets the code."""
    entries = reference.dynamic_map().double()
    ties = (entries[1:] + entries[:-1]).abs() / 2 * 0.5
    grid = 2.0**-23
    near = ((ties / grid).round()[:, None] + torch.arange(-2, 3)).reshape(-1) * grid
    near = near.clamp(0, 0.5)
    near = torch.nn.functional.pad(near, (0, -near.numel() % 127)).reshape(-1, 127)
    near = torch.cat([near, torch.full((len(near), 1), 0.5)], dim=1)  # every 256 scales reach exactly 0.5
    scales = torch.cat([1 + near, 1 - near], dim=1).reshape(-1).float()
    w = torch.zeros(scales.numel(), 32)
    w[:, 5] = scales
    got = lk.nf4_quantize(w, 32)
    assert got.offset == 1 and bool((got.nested_absmax == 0.5).all())
    centred = scales.double() - 1
    midpoints = (entries[1:] + entries[:-1]) / 2 * 0.5
    wanted = (centred[:, None] > midpoints).sum(dim=1)
    assert torch.equal(got.absmax.long(), wanted)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    blocksize=st.sampled_from(reference.NF4_BLOCKSIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_shape_gives_the_same_bytes_on_every_backend(n, k, blocksize, double_quant, dtype, seed):
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)
    results = []
    for name in VARIANTS:
        with variant(name):
            results.append(lk.nf4_quantize(w, blocksize, double_quant))
    for other in results[1:]:
        for a, b in zip(results[0].tensors().values(), other.tensors().values(), strict=True):
            assert torch.equal(a, b)
    weight = results[0]
    assert weight.packed.shape == (-(-n * k // 2), 1)
    assert weight.nbytes == lk.nf4.nf4_bytes(n * k, blocksize, double_quant)


def test_strided_weights_are_read_in_row_major_order(backend):
    w = torch.randn(48, 130)
    for view in (w.T, w[::3, 1::2], w[:, 5:70]):
        assert torch.equal(lk.nf4_quantize(view).packed, lk.nf4_quantize(view.contiguous()).packed)


def test_bytes_do_not_depend_on_the_number_of_threads():
    w = torch.randn(512, 1100)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(lk.nf4_quantize(w))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0].tensors().values(), other.tensors().values(), strict=True):
            assert torch.equal(a, b)


def test_an_empty_weight_has_no_bytes(backend):
    weight = lk.nf4_quantize(torch.empty(0, 16))
    assert weight.packed.numel() == 0 and weight.dequantize().shape == (0, 16)
    assert weight.offset == 0


def test_the_weight_is_not_changed(backend):
    w = torch.randn(8, 64)
    before = w.clone()
    lk.nf4_quantize(w)
    assert torch.equal(w, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_weights_are_refused(bad, dtype, backend):
    w = torch.randn(70, 67).to(dtype)
    w[torch.randint(70, ()).item(), torch.randint(67, ()).item()] = bad
    with pytest.raises(ValueError, match="weight holds a NaN or an infinity"):
        lk.nf4_quantize(w)


@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_non_finite_weight_is_enough(blocksize, dtype, kernels):
    """Wherever it is: in the first block, in the last whole one, in the short one."""
    n = 3 * 4096 + 21
    for at in (0, 2, 31, 3 * 4096 - 1, 3 * 4096 - 2, n - 1):
        for bad in (math.nan, math.inf):
            w = torch.randn(1, n).to(dtype)
            w[0, at] = bad
            for double_quant in (False, True):
                with pytest.raises(ValueError, match="weight holds a NaN or an infinity"):
                    lk.nf4_quantize(w, blocksize, double_quant)
            w[0, at] = torch.finfo(dtype).max
            lk.nf4_quantize(w, blocksize)  # what was found there is forgotten


def test_a_non_finite_weight_is_remembered(kernels):
    """By threads that go on to other weights after it."""
    if kernels.startswith("simt"):
        simt_backend.pretend(1, 80)
    w = torch.randn(1, 9 * 8192)
    w[0, 5] = math.nan
    with pytest.raises(ValueError, match="weight holds a NaN or an infinity"):
        lk.nf4_quantize(w)


@pytest.mark.parametrize(
    ("weight", "blocksize", "error", "message"),
    [
        (torch.randn(4, 64), 48, ValueError, "blocksize is 48"),
        (torch.randn(4, 64), 16, ValueError, "blocksize is 16"),
        (torch.randn(64), 64, ValueError, "expected 2 dimensions"),
        (torch.randn(4, 64).double(), 64, TypeError, "weight has dtype torch.float64"),
        (torch.ones(4, 64, dtype=torch.int32), 64, TypeError, "weight has dtype torch.int32"),
        ([[1.0, 2.0]], 64, TypeError, "nf4_quantize: weight is a list, expected a Tensor"),
    ],
)
def test_bad_arguments_are_named(weight, blocksize, error, message, backend):
    with pytest.raises(error, match=message):
        lk.nf4_quantize(weight, blocksize)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_made_of_scales_that_are_not_finite_is_refused(double_quant):
    good = lk.nf4_quantize(torch.randn(8, 64), double_quant=double_quant)
    for part in ("nested_absmax", "offset") if double_quant else ("absmax",):
        parts = {"nested_absmax": None, "offset": None} | {k: t.clone() for k, t in good.tensors().items()}
        parts[part].view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=rf"weight\.{part} holds a NaN or an infinity"):
            lk.NF4Weight(**parts, shape=good.shape, blocksize=64, dtype=torch.float32)

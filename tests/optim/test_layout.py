"""The layout of pages and the 8-bit code: Python and C++ agree, and both agree with bitsandbytes."""

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from optim_cases import DTYPES, Problem, aligned_page, run

from lora_kernels.backends.native import _C
from lora_kernels.optim_state import (
    OPS,
    ROUNDINGS,
    dequantize_blockwise,
    dynamic_map,
    optim_state_bytes,
    optim_state_parts,
    quantize_blockwise,
)

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of csrc/api.h
_OFFSETS = ("exp_avg", "absmax1", "exp_avg_sq", "absmax2", "compensation")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_python_and_cpp_agree_on_the_layout(op, dtype, rounding):
    for count in (0, 1, 15, 16, 17, 255, 256, 257, 4096, 65_537, int(torch.randint(10**6, ()))):
        names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
        parts = optim_state_parts(op, count, dtype, rounding)
        mine = {names.get(part.name, part.name): part.offset for part in parts}
        size = optim_state_bytes(op, count, dtype, rounding)
        *offsets, their_size = _C.optim_state_layout(
            OPS.index(op), count, _DTYPE_CODES[dtype], ROUNDINGS.index(rounding)
        )
        assert [mine.get(name, -1) for name in _OFFSETS] == offsets
        assert size == their_size
        assert size % 64 == 0 and all(part.offset % 16 == 0 for part in parts)
        ends = [part.offset + part.bytes for part in parts]
        begins = [part.offset for part in parts[1:]] + [size]
        assert all(end <= begin < end + 64 for end, begin in zip(ends, begins, strict=True))


def test_sizes_of_many_counts_at_once_are_those_of_each():
    counts = torch.randint(10**5, (50,))
    for op in OPS:
        many = optim_state_bytes(op, counts, torch.bfloat16, "kahan")
        assert many.tolist() == [optim_state_bytes(op, c, torch.bfloat16, "kahan") for c in counts.tolist()]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("adam_step", 1, torch.float32, "nearest"), "op is 'adam_step'"),
        (("adamw_step", 1, torch.float64, "nearest"), "dtype is torch.float64"),
        (("adamw_step", 1, torch.float32, "down"), "rounding is 'down'"),
    ],
)
def test_layout_errors_name_the_argument(arguments, names):
    with pytest.raises(ValueError, match=names):
        optim_state_bytes(*arguments)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed=signed), create_dynamic_map(signed=signed))


def near_midpoints(signed: bool):
    """Blocks whose absmax is a power of two, with values at and a bit beside every midpoint of the map."""
    entries = dynamic_map(signed=signed).double()
    middle = ((entries[1:] + entries[:-1]) / 2).float()
    values = torch.cat([torch.nextafter(middle, torch.tensor(side)) for side in (-9.0, 9.0)] + [middle])
    values = values.reshape(-1, 255)
    ones = torch.full((values.shape[0], 1), 1.0)
    return (torch.cat([values, ones], dim=1) * 2.0 ** torch.randint(-40, 40, (3, 1))).reshape(-1)


def inputs(signed: bool):
    spread = torch.randn(5000) * 10.0 ** torch.randint(-12, 3, (5000,)).float()
    zeros = torch.zeros(300)
    tiny = torch.randn(600) * 1e-39  # subnormal
    for x in (torch.randn(1000), spread, torch.cat([zeros, spread]), zeros, tiny, near_midpoints(signed)):
        yield x if signed else x.abs()
    yield torch.empty(0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_entries(signed):
    entries = dynamic_map(signed=signed).double()
    for x in inputs(signed):
        codes, absmax = quantize_blockwise(x, signed)
        scale = absmax.repeat_interleave(256)[: x.numel()]
        inverse = torch.where(scale < 2.0**-126, torch.zeros(()), 1 / scale)
        distance = ((x * inverse).double().unsqueeze(1) - entries).abs()
        mine = distance.gather(1, codes.long().unsqueeze(1)).squeeze(1)
        assert torch.equal(mine, distance.min(dim=1).values if x.numel() else mine)
        assert codes.dtype == torch.uint8 and absmax.shape == (-(-x.numel() // 256),)
        back = dequantize_blockwise(codes, absmax, signed)
        widest = 0.9 / 64 / 2  # half of the widest gap between entries, and of -1 to the nearest
        assert bool(((back - x).abs() <= 1.001 * widest * scale + 2.0**-126).all())


@pytest.mark.parametrize("signed", [True, False])
def test_the_kernels_code_as_quantize_blockwise(backend, signed):
    """With β2 = 0 the new momentum of Lion is the gradient; AdamW's second one is its square."""
    for x in inputs(signed):
        if not x.numel():
            continue
        op = "lion8bit_step" if signed else "adamw8bit_step"
        g = x if signed else x.sqrt()
        problem = Problem(op, [torch.zeros_like(x)], piece=2048)
        problem.step([g], 1, beta2=0.0)
        state = problem.state()
        names = ("state1", "absmax1") if signed else ("state2", "absmax2")
        codes, absmax = quantize_blockwise(g if signed else g * g, signed)
        assert torch.equal(state[0, names[0]], codes)
        assert torch.equal(state[0, names[1]], absmax)


def test_the_kernels_decode_every_code(backend):
    """Without gradients a step multiplies the old state by β2, and the code of an entry is the entry's."""
    for signed, op in ((True, "lion8bit_step"), (False, "adamw8bit_step")):
        codes = torch.arange(256, dtype=torch.uint8)
        page = aligned_page(64 + optim_state_bytes(op, 256, torch.float32, "nearest"))
        part, absmax = optim_state_parts(op, 256, torch.float32, "nearest")[0 if signed else 2 :][:2]
        page[64 + part.offset :][:256] = codes
        page[64 + absmax.offset :][:4].view(torch.float32).fill_(4.0)
        p = [torch.zeros(256)]
        run(op, p, [torch.zeros(256)], [page], torch.tensor([[0, 64, 0, 0, 256, 1, 0]]), 1, beta2=0.5)
        expected = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(page[64 + part.offset :][:256], expected)
        assert page[64 + absmax.offset :][:4].view(torch.float32).item() == 2.0

"""NF4 weights whose rows are no whole number of blocks, of cache lines of codes, or of bytes."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import LIMIT, relative_error, worst_tile
from test_lora_linear import Case, assert_threads_do_not_matter
from variants import FUSED_ON_A_CPU, variant

import lora_kernels as lk
from lora_kernels.backends.native import CPU_ISAS

# K a multiple of 8, of 2, and odd: what the decoders tell apart. Longer and shorter than a line (128 weights)
# and than a chunk (128) and a depth (512) of the inner dimension.
SHAPES = ((70, 1000), (37, 1002), (35, 1001), (131, 200), (9, 72), (5, 8), (66, 602), (3, 2), (40, 576))
TOKENS = (1, 3, 4, 9, 40)
# And rows of one block or two, whose scales are gathered: a gather reads more than the code it is after.
FEW_BLOCKS = ((17, 64), (18, 64), (33, 64), (17, 128), (34, 128), (19, 192))
PROT_NONE = 0  # of mprotect(2); mmap has no name for it


def uneven_case(tokens: int, n: int, k: int, blocksize: int, dtype: torch.dtype, double_quant: bool) -> Case:
    """Magnitudes differ from block to block: another block's scale is then another number altogether."""
    case = Case(tokens, n, k, 5, dtype, "gelu")
    flat = case.dense(torch.float32).flatten()
    levels = torch.exp(torch.randn(-(-flat.numel() // 32))).repeat_interleave(32)[: flat.numel()]
    case.weight = lk.nf4_quantize((flat * levels).view(n, k).to(dtype), blocksize, double_quant)
    return case


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 1024])
def test_every_weight_has_its_blocks_scale(shape, dtype, blocksize, kernels):
    for tokens in TOKENS:
        case = uneven_case(tokens, *shape, blocksize, dtype, double_quant=tokens % 2 == 0)
        for name, (out, eager, truth) in zip(("y", "dx", "dA", "dB"), case.results()[:4], strict=True):
            # Of few numbers one that is small by chance is not held against a kernel.
            limit = max(LIMIT[dtype], 1.5 * relative_error(eager, truth)) * (1 if truth.numel() > 200 else 2)
            where = f"{name} of {tokens} tokens"
            assert relative_error(out, truth) <= limit, where
            if name in ("y", "dx"):
                assert worst_tile(out, truth, concentrated=True) <= 4 * limit, where


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("k", [1000, 1002])
def test_results_do_not_depend_on_the_number_of_threads(k, tokens, kernels):
    if kernels in FUSED_ON_A_CPU:
        assert_threads_do_not_matter(uneven_case(tokens, 300, k, 64, torch.bfloat16, True))


def before_a_guard_page(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where memory ends: reading a byte behind it kills the process."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(start + pages * mmap.PAGESIZE)
    assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=pages * mmap.PAGESIZE)
    end = whole[pages * mmap.PAGESIZE - tensor.nbytes :]
    return end.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def read_to_the_last_byte(isa: str) -> None:
    torch.manual_seed(0)
    with variant(f"cpu-{isa}"):
        for shape in (*SHAPES, *FEW_BLOCKS):
            for tokens in TOKENS:
                for double_quant in (False, True):
                    case = uneven_case(tokens, *shape, 64, torch.bfloat16, double_quant)
                    w, wanted = case.weight, case.computed()
                    packed, absmax = before_a_guard_page(w.packed), before_a_guard_page(w.absmax)
                    case.weight = lk.NF4Weight(
                        packed, absmax, w.nested_absmax, w.offset, w.shape, w.blocksize, w.dtype
                    )
                    case.dy = before_a_guard_page(case.dy)
                    leaves = [before_a_guard_page(v) for v in (case.x, case.A, case.B, case.bias)]
                    for out, other in zip(case.computed_from(*leaves), wanted, strict=True):
                        assert torch.equal(out, other)


@pytest.mark.parametrize("isa", CPU_ISAS)
def test_nothing_behind_a_tensor_is_read(isa):
    """In a process of its own, which it would kill."""
    here = Path(__file__).parent
    program = f"import test_uneven_rows as t; t.read_to_the_last_byte({isa!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"

"""nf4_dequantize on this machine's CPU: GB/s of codes and scales read and weights written."""

import pytest
import torch

from bench import dense
from bench.problem import LIMIT, assert_error, copy_nf4, relative_error
from bench.shapes import Case, weight_bytes

CASES = (
    Case(4096, 4096, 0),
    Case(4096, 4096, 0, torch.float16),
    Case(4096, 4096, 0, torch.float32),
    Case(14336, 4096, 0),
    Case(576, 576, 0, quick=True),
    Case(3420, 1000, 0, quick=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nf4_dequantize(case, base, sets, timed):
    moved = weight_bytes(case.n, case.k) + case.n * case.k * case.dtype.itemsize
    copies = [copy_nf4(base.nf4) for _ in range(sets(moved))]
    calls = [lambda w=w: w.dequantize(case.dtype) for w in copies]
    assert_error(relative_error(calls[0](), base.truth()), LIMIT[case.dtype], "nf4_dequantize")
    timed(calls, op="nf4_dequantize", variant="lora_kernels", bytes=moved)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_linear_of_one_token(case, base, sets, timed):
    dense.time_forward("nf4_dequantize", base, case, sets, timed)

"""nf4_quantize on this machine's CPU: GB/s of the weight read and the codes written."""

import pytest
import torch

import lora_kernels as lk
from bench import dense
from bench.shapes import BLOCKSIZE, Case, weight_bytes
from lora_kernels import reference

CASES = (
    Case(4096, 4096, 0),
    Case(4096, 4096, 0, torch.float32),
    Case(576, 576, 0, quick=True),
    Case(3420, 1000, 0, quick=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nf4_quantize(case, sets, timed):
    weight = torch.randn(case.n, case.k).to(case.dtype)
    weights = [weight, *(weight.clone() for _ in range(sets(weight.nbytes) - 1))]
    calls = [lambda w=w: lk.nf4_quantize(w, BLOCKSIZE) for w in weights]
    made, wanted = calls[0]().tensors().values(), reference.nf4_quantize(weight, BLOCKSIZE)
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True)), "bytes differ; not timed"
    moved = weight.nbytes + weight_bytes(case.n, case.k)
    timed(calls, op="nf4_quantize", variant="lora_kernels", bytes=moved)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_linear_of_one_token(case, base, sets, timed):
    dense.time_forward("nf4_quantize", base, case, sets, timed)

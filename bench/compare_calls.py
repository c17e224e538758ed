"""The calls that the regression checks time, and the dense product they are held against."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import lora_kernels as lk
from bench.problem import Base, copy_nf4
from bench.shapes import SCALING
from lora_kernels.backends import backend_for

COPIES = 16  # of every weight: where memory happens to lie is worth a tenth of a call that only reads it
# Lengthens each of our calls by this share of its own time: how bench/prove_compare.py plants a regression.
PLANT = "LORA_KERNELS_BENCH_PLANT"


def _slowed(call: Callable[[int], object], share: float) -> Callable[[int], object]:
    def run(i: int) -> object:
        start = time.perf_counter()
        result = call(i)
        end = time.perf_counter()
        while time.perf_counter() - end < share * (end - start):
            pass
        return result

    return run


class Case(NamedTuple):
    n: int
    k: int
    t: int
    what: str  # forward, step (forward and backward), dequantise, quantise

    def __str__(self) -> str:
        return f"{self.what} {self.n}x{self.k} T={self.t}"


CASES = (
    Case(4096, 4096, 1, "forward"),
    Case(4096, 4096, 16, "forward"),
    Case(4096, 4096, 128, "forward"),
    Case(4096, 4096, 8, "step"),
    Case(4096, 4096, 128, "step"),
    Case(1536, 576, 64, "forward"),
    # From a cache: a large one is as fast as its neighbours let memory be.
    Case(1536, 576, 16, "dequantise"),
    Case(1536, 576, 16, "quantise"),
)


def make_ours(case: Case) -> Callable[[int], object]:
    """The call on the i-th copy of its weight."""
    base = Base(case.n, case.k, torch.bfloat16, torch.device("cpu"))
    if case.what == "quantise":
        call = _quantise(base)
    else:
        nf4 = [copy_nf4(base.nf4) for _ in range(COPIES)]
        step = case.what == "step"
        A, B = (m.clone().requires_grad_(step) for m in (base.lora_A, base.lora_B))
        x = torch.randn(case.t, case.k).bfloat16().requires_grad_(step)
        dy = torch.randn(case.t, case.n).bfloat16()
        out = torch.empty(case.n, case.k, dtype=torch.bfloat16)
        backend = backend_for(out.device)

        def forward(i: int) -> torch.Tensor:
            return lk.lora_linear(x, nf4[i % COPIES], A, B, scaling=SCALING)

        call = {
            "forward": forward,
            "step": lambda i: torch.autograd.grad(forward(i), (x, A, B), dy),
            "dequantise": lambda i: backend.nf4_dequantize(nf4[i % COPIES].base_weight(), 0, 0, out),
        }[case.what]
    planted = float(os.environ.get(PLANT, "0"))
    return _slowed(call, planted) if planted else call


def _quantise(base: Base) -> Callable[[int], object]:
    """Into memory that is there: what a fresh output's pages cost is not the kernel's doing, and varies."""
    dense = [base.dense().clone() for _ in range(COPIES)]
    backend = backend_for(dense[0].device)
    parts = base.nf4.base_weight()
    outputs = (parts.data, torch.empty(parts.absmax.shape), parts.absmax, parts.nested_absmax, parts.offset)
    return lambda i: backend.nf4_quantize(dense[i % COPIES], base.nf4.blocksize, *outputs)


def make_dense(case: Case) -> Callable[[int], object]:
    """The float32 product of the same shape, on the i-th copy of its weight."""
    x, weight = torch.randn(case.t, case.k), torch.randn(case.n, case.k) * case.k**-0.5
    weights = [weight.clone() for _ in range(COPIES)]
    return lambda i: torch.nn.functional.linear(x, weights[i % COPIES])

"""Launches every kernel on small problems, for compute-sanitizer; needs no pytest.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python3 tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python3 tests/gpu/sanitize.py

and likewise --tool synccheck and initcheck. Without torch's caching allocator every tensor is an allocation
of its own, so that memcheck sees an access beyond it and initcheck a byte that nobody wrote. Truths are
computed on the CPU: the tools slow torch's kernels down as well. Exit status 0, or 1 where a result is wrong;
compute-sanitizer makes it 9 where it found something.
"""

import sys
import time
from typing import NamedTuple

import torch
from place import STAND_IN, take  # first: it puts tests/ on the path

# isort: split
from dora_case import Case as DoraCase
from optim_cases import OPS, ROUNDINGS, Problem
from problems import NAMES, BatchedCase, Case, moved

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import backend_for, cuda, native
from lora_kernels.backends.cuda_launchers import CudaLaunchers
from lora_kernels.base_weight import BaseWeight

DTYPES = (torch.bfloat16, torch.float16)
# T, N, K, r: tails of K and of N, several passes, slices that meet, no adapter.
DECODE = ((1, 70, 1088, 16), (8, 200, 576, 17), (3, 33, 64, 0), (5, 130, 2048, 40))
ANY_SHAPE = ((33, 144), (7, 1000), (37, 91), (64, 512))


class Step(NamedTuple):
    """A forward and backward, and which kernels its size takes beside the sweeps."""

    t: int
    n: int
    k: int
    r: int
    p: float
    nf4: bool = True
    adapter_dtype: torch.dtype | None = None


STEPS = (
    Step(9, 70, 192, 5, 0.1),  # lora_shrink, lora_linear_mixed with h given, lora_linear_backward_dx
    Step(33, 130, 1088, 16, 0.0),  # lora_linear_mixed with h of its own; slices that meet
    Step(40, 129, 320, 40, 0.1, nf4=False, adapter_dtype=torch.float32),
    Step(2, 33, 64, 256, 0.0),  # lora_linear_decode
    Step(300, 70, 64, 8, 0.1),  # backward: lora_expand, nf4_dequantize of slabs
    Step(600, 33, 64, 8, 0.1),  # forward: lora_shrink beside nf4_dequantize
    Step(600, 129, 64, 8, 0.1),  # and the LoRA term in the same GEMM
    Step(17, 37, 91, 5, 0.1),  # odd K
)
# T, N, K, ranks: ranks that differ; more adapters than a launch takes, most without a row.
BATCHED = ((70, 72, 128, (1, 16, 5, 64)), (90, 33, 64, (3,) * 70))


def wrong(name: str, out: torch.Tensor, truth: torch.Tensor, limit: float) -> int:
    error = float((out.cpu().double() - truth).norm() / truth.norm())
    if not error <= limit:
        print(f"sanitize: {name}: relative error {error:.1e}")
    return int(not error <= limit)


def nf4(device: torch.device, n: int, k: int) -> int:
    """Quantise and dequantise, the aligned kernels and the general ones."""
    failures = 0
    for double_quant in (False, True):
        dense = torch.randn(n, k)
        weight = lk.nf4_quantize(dense.to(device), 64, double_quant)
        with lk.use_backend("cpu"):
            here = lk.nf4_quantize(dense, 64, double_quant)
        failures += not torch.equal(weight.packed.cpu(), here.packed)
        for dtype in (torch.float32, *DTYPES):
            truth = reference.nf4_dequantize(*here.base_weight()[:4], (n, k), 64, dtype)
            failures += not torch.equal(weight.dequantize(dtype).cpu(), truth)
    if failures:
        print(f"sanitize: NF4 [{n}, {k}]: {failures} results differ from the CPU's")
    return failures


def decode(
    by: CudaLaunchers,
    device: torch.device,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    quantized: bool,
    route: str,
) -> int:
    t, n, k, r = shape
    x, dense = torch.randn(t, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
    A, B = (torch.randn(r, k) * k**-0.5).to(dtype), torch.randn(n, r).to(dtype)
    bias = torch.randn(n).to(dtype)
    base, weight = BaseWeight(dense.to(device), None, None, None, 0, n, k), dense.double()
    if quantized:
        packed = lk.nf4_quantize(dense)
        base = packed.to(device).base_weight()
        weight = reference.nf4_dequantize(*packed.base_weight()[:4], (n, k), 64, torch.float64)
    y, h = (torch.full((t, cols), float("nan"), dtype=dtype, device=device) for cols in (n, r))
    there_A, there_B, there_bias = (v.to(device) for v in (A, B, bias))
    by.lora_linear_decode(x.to(device), base, there_A, there_B, 0.7, there_bias, y, h)
    true_y, true_h = reference.lora_linear(x.double(), weight, A.double(), B.double(), 0.7, bias.double())
    name = f"decode {list(shape)} {dtype} {'NF4' if quantized else 'dense'} {route}"
    return wrong(name + " y", y, true_y, 4e-3) + (wrong(name + " h", h, true_h, 4e-3) if r else 0)


def step(device: torch.device, problem: Step, dtype: torch.dtype) -> int:
    t, n, k, r, p, quantized, adapter_dtype = problem
    case = Case("cpu", t, n, k, r, dtype, p=p, nf4=quantized, adapter_dtype=adapter_dtype)
    outs, truths = case.moved(device).computed(), case.expected(torch.float64)
    return sum(
        wrong(f"{problem} {dtype} {name}", out, truth, 1e-2)
        for name, out, truth in zip(NAMES, outs, truths, strict=True)
    )


def batched(device: torch.device, shape: tuple, dtype: torch.dtype) -> int:
    case = BatchedCase("cpu", *shape, dtype, p=0.1)
    failures = 0
    for name, out, truth in zip(
        case.NAMES, case.moved(device).computed(), case.expected(torch.float64), strict=True
    ):
        if isinstance(out, list):
            out, truth = (torch.cat([part.reshape(-1) for part in parts]) for parts in (out, truth))
        failures += wrong(f"batched {list(shape[:3])} {dtype} {name}", out, truth, 1e-2)
    return failures


def dora(device: torch.device, dtype: torch.dtype) -> int:
    case = DoraCase(33, 70, 192, 5, dtype, p=0.1)
    names = ("y", "dx", "dA", "dB", "dmagnitude", "dbias")
    outs, truths = moved(case, device).computed(), case.expected(torch.float64)
    return sum(wrong(f"dora {dtype} {n}", o, t, 2e-2) for n, o, t in zip(names, outs, truths, strict=True))


def dropout(device: torch.device, dtype: torch.dtype) -> int:
    """Pieces of 16 bytes, and elements one by one."""
    failures, rng = 0, torch.tensor([5, 1 << 33])
    for shape, first in (((8, 256), 0), ((5, 37), 3)):
        x = torch.randn(shape).to(dtype)
        out = torch.full(shape, float("nan"), dtype=dtype, device=device)
        backend_for(device).lora_dropout(x.to(device), 0.3, rng.to(device), first, out)
        padded = torch.cat([torch.zeros(first, dtype=dtype), x.reshape(-1)]).reshape(1, -1)
        truth = reference.lora_dropout(padded, 0.3, rng).reshape(-1)[first:].reshape(shape)
        failures += not torch.equal(out.cpu(), truth)
    if failures:
        print(f"sanitize: lora_dropout {dtype}: {failures} results differ from the specification's")
    return failures


def optimizer(device: torch.device, op: str, dtype: torch.dtype, rounding: str) -> int:
    """Two steps of parameters that lie in several pages give the CPU's bits."""
    sizes = (1, 257, 3001)
    cpu = Problem(op, [torch.randn(n).to(dtype) for n in sizes], rounding, piece=512)
    there = Problem(op, [p.to(device) for p in cpu.params], rounding, piece=512)
    for step in (1, 2):
        grads = [torch.randn(n).to(dtype) for n in sizes]
        with lk.use_backend("cpu"):
            cpu.step(grads, step)
        there.step([g.to(device) for g in grads], step)
    pairs = list(zip(there.params, cpu.params, strict=True))
    pairs += [(there.state()[key], value) for key, value in cpu.state().items()]
    failures = sum(not torch.equal(mine.cpu(), wanted) for mine, wanted in pairs)
    if failures:
        print(f"sanitize: {op} {dtype} {rounding}: {failures} tensors differ from the CPU's")
    return failures


def main() -> int:
    device, backend, own = take()
    torch.manual_seed(0)
    began, failures = time.perf_counter(), 0
    routes = {"counters": 80}
    if not STAND_IN and cuda._capability(device) >= 90:
        routes["clustered"] = 90
    with lk.use_backend(backend):
        failures += sum(nf4(device, n, k) for n, k in ANY_SHAPE)
        for route, least in routes.items():
            by = own
            if not STAND_IN:
                by = CudaLaunchers(torch.ops.lora_kernels, lambda _, c=least: c, native.cuda_failure)
            for shape in DECODE:
                for dtype in DTYPES:
                    for quantized in (True, False):
                        failures += decode(by, device, shape, dtype, quantized, route)
        for dtype in DTYPES:
            failures += sum(step(device, problem, dtype) for problem in STEPS)
            failures += sum(batched(device, shape, dtype) for shape in BATCHED)
            failures += dora(device, dtype)
            failures += dropout(device, dtype)
        for op in OPS:
            failures += optimizer(device, op, torch.float32, "nearest")
            failures += sum(optimizer(device, op, torch.bfloat16, rounding) for rounding in ROUNDINGS)
        if device.type == "cuda":
            torch.cuda.synchronize()
    print(
        f"sanitize: {failures} wrong results in {time.perf_counter() - began:.0f} s; lora_linear_decode by "
        f"{' and '.join(routes)}, {len(STEPS)} training steps and {len(BATCHED)} batched ones of each dtype, "
        f"dora_linear, lora_dropout, {', '.join(OPS)}"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Launches every kernel on small problems, for compute-sanitizer; needs no pytest.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python3 tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python3 tests/gpu/sanitize.py

Without torch's caching allocator every tensor is an allocation of its own, so that memcheck sees an access
beyond it. Exit status 0, or 1 where a result is wrong; compute-sanitizer makes it 9 where it found something.
"""

import sys

import torch

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import cuda, native
from lora_kernels.backends.cuda_launchers import CudaLaunchers
from lora_kernels.base_weight import BaseWeight

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
# T, N, K, r: tails of K and of N, several passes, slices that meet, no adapter.
DECODE = ((1, 70, 1088, 16), (8, 200, 576, 17), (3, 33, 64, 0), (5, 130, 2048, 40))
ANY_SHAPE = ((33, 144), (7, 1000), (37, 91), (64, 512))


def wrong(name: str, out: torch.Tensor, truth: torch.Tensor, limit: float) -> int:
    error = float((out.cpu().double() - truth).norm() / truth.norm())
    if not error <= limit:
        print(f"sanitize: {name}: relative error {error:.1e}")
    return int(not error <= limit)


def nf4(n: int, k: int) -> int:
    """Quantise and dequantise, the aligned kernels and the general ones."""
    failures = 0
    for double_quant in (False, True):
        dense = torch.randn(n, k)
        weight = lk.nf4_quantize(dense.to(DEVICE), 64, double_quant)
        here = lk.nf4_quantize(dense, 64, double_quant)
        failures += not torch.equal(weight.packed.cpu(), here.packed)
        for dtype in (torch.float32, *DTYPES):
            truth = reference.nf4_dequantize(*here.base_weight()[:4], (n, k), 64, dtype)
            failures += not torch.equal(weight.dequantize(dtype).cpu(), truth)
    if failures:
        print(f"sanitize: NF4 [{n}, {k}]: {failures} results differ from the CPU's")
    return failures


def decode(t: int, n: int, k: int, r: int, dtype: torch.dtype, quantized: bool, clustered: bool) -> int:
    x, dense = torch.randn(t, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
    A, B = (torch.randn(r, k) * k**-0.5).to(dtype), torch.randn(n, r).to(dtype)
    bias = torch.randn(n).to(dtype)
    base, weight = BaseWeight(dense.to(DEVICE), None, None, None, 0, n, k), dense.double()
    if quantized:
        packed = lk.nf4_quantize(dense)
        base = packed.to(DEVICE).base_weight()
        weight = reference.nf4_dequantize(*packed.base_weight()[:4], (n, k), 64, torch.float64)
    y, h = (torch.full((t, cols), float("nan"), dtype=dtype, device=DEVICE) for cols in (n, r))
    by = CudaLaunchers(torch.ops.lora_kernels, lambda _: 90 if clustered else 80, native.cuda_failure)
    there_A, there_B, there_bias = (v.to(DEVICE) for v in (A, B, bias))
    by.lora_linear_decode(x.to(DEVICE), base, there_A, there_B, 0.7, there_bias, y, h)
    true_y, true_h = reference.lora_linear(x.double(), weight, A.double(), B.double(), 0.7, bias.double())
    kind, route = "NF4" if quantized else "dense", "clustered" if clustered else "counters"
    name = f"decode [{t}, {n}, {k}, {r}] {dtype} {kind} {route}"
    return wrong(name + " y", y, true_y, 4e-3) + (wrong(name + " h", h, true_h, 4e-3) if r else 0)


def main() -> int:
    routes = (False, True) if cuda._capability(torch.device(DEVICE)) >= 90 else (False,)
    failures = sum(nf4(n, k) for n, k in ANY_SHAPE)
    for clustered in routes:
        for shape in DECODE:
            for dtype in DTYPES:
                failures += sum(decode(*shape, dtype, quantized, clustered) for quantized in (True, False))
    torch.cuda.synchronize()
    clusters = "and in clusters" if True in routes else "only: no clusters here"
    print(f"sanitize: {failures} wrong results; decode with counters {clusters}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

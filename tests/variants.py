"""What the one suite runs over: every backend that takes CPU tensors, and the kernels of cpu."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import simt_backend
import torch

import lora_kernels
from lora_kernels.backends import backend_for, cpu
from lora_kernels.backends.native import CPU_ISAS, cpu_isa, select_cpu_isa

# A later backend adds its name here and runs the whole suite.
# simt: the CUDA kernels on the host stand-in, as on a device of sm_80 and, with clusters, of sm_90.
KERNELS = (*(f"cpu-{isa}" for isa in CPU_ISAS), "cpu-panels", "simt-80", "simt-90")
VARIANTS = ("reference", *KERNELS)
FUSED_ON_A_CPU = tuple(f"cpu-{isa}" for isa in CPU_ISAS)
# Those that multiply bf16 weights, as eager does: decoded values rounded to bf16.
ROUNDS_WEIGHTS = ("cpu-panels", "cpu-avx512bf16", "cpu-amx")


@contextlib.contextmanager
def variant(name: str) -> Iterator[str]:
    """Forces one of VARIANTS."""
    backend, _, isa = name.partition("-")
    before = cpu_isa()
    if backend == "simt":
        simt_backend.pretend(4, int(isa))
        isa = ""
    with lora_kernels.use_backend(backend):
        if isa == "panels":  # torch's GEMM, which machines with fast bf16 take
            cpu.forced_kernel = "panels"
        elif isa:
            cpu.forced_kernel = "fused"
            select_cpu_isa(isa)
        try:
            yield name
        finally:
            cpu.forced_kernel = None
            select_cpu_isa(before)


def module() -> ModuleType:
    """The backend in force, whose functions compute into outputs that the caller gives."""
    return backend_for(torch.device("cpu"))

"""What the one suite runs over: every backend that takes CPU tensors, and the kernels of cpu."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch

import lora_kernels
from lora_kernels.backends import backend_for, cpu
from lora_kernels.backends.native import CPU_ISAS, cpu_isa, select_cpu_isa

# A later backend adds its name here and runs the whole suite.
KERNELS = (*(f"cpu-{isa}" for isa in CPU_ISAS), "cpu-panels")
VARIANTS = ("reference", *KERNELS)


@contextlib.contextmanager
def variant(name: str) -> Iterator[str]:
    """Forces one of VARIANTS."""
    backend, _, isa = name.partition("-")
    before = cpu_isa()
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

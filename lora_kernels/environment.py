"""`python -m lora_kernels env`: what was built, and what this machine can run."""

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

import lora_kernels
from lora_kernels.backends import BACKENDS, backend_name
from lora_kernels.backends.native import _C, CPU_ISAS, cpu_isa

# Statically linked CUDA 13 runtimes ask for this driver branch (CUDA 13.0 release notes, table 3).
_DRIVER_FOR_CUDA = {"13": 580, "12": 525}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_lines() -> list[str]:
    if not _C.cuda_archs:
        return ["CUDA kernels       not built: no nvcc was found (set NVCC or CUDA_HOME and build again)"]
    targets = ", ".join(
        "PTX " + a[3:] if a.startswith("ptx") else "sm_" + a for a in _C.cuda_archs.split(";")
    )
    driver = _DRIVER_FOR_CUDA.get(_C.cuda_version.split(".")[0])
    lines = [
        f"CUDA kernels       built with CUDA {_C.cuda_version} for {targets}; they need a driver >= {driver}"
    ]
    if torch.version.cuda is None:
        lines.append("                   this torch has no CUDA, so they cannot run here")
    elif not torch.cuda.is_available():
        lines.append("                   no CUDA device is visible, so they cannot run here")
    else:
        bound = "bound" if _C.cuda_stream_bound else "NOT bound: torch's stream symbol was not found"
        lines.append(f"                   torch's current stream: {bound}")
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"device {i}           {torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    return lines


def report() -> str:
    """The text that the command prints."""
    lines = [
        f"lora_kernels       {lora_kernels.__version__} ({Path(lora_kernels.__file__).parent})",
        f"python             {sys.version.split()[0]}",
        f"torch              {torch.__version__} (the library was built against {_C.torch_headers})",
        f"compiler           {_C.compiler}",
        f"CPU                {_cpu_name()}, {torch.get_num_threads()} threads",
        f"CPU kernels        {cpu_isa()} (of {', '.join(CPU_ISAS)}: LORA_KERNELS_CPU_ISA forces one)",
        *_cuda_lines(),
        f"backends           {', '.join(BACKENDS)}; CPU tensors use {backend_name(torch.device('cpu'))!r}",
    ]
    lines += [
        f"{name:<18} {_version(name)}"
        for name in ("transformers", "peft", "bitsandbytes", "safetensors", "numpy")
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv:
        print(f"lora_kernels env: error: takes no arguments, got {' '.join(argv)}", file=sys.stderr)
        return 2
    print(report())
    return 0

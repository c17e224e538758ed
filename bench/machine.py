"""What a measurement ran on: the processor, its caches, the threads, the versions."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found.group(1).strip() if found else platform.machine()


def core_count() -> int:
    """Cores this process may use. A bound OpenMP runtime leaves the main thread one of them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(allowed, torch.get_num_threads())


def slug() -> str:
    """The processor, AMX where it has it, and the cores that this process may use, as a folder name.

    On a virtual machine the processor's own name may not tell whether there is AMX. An instruction set that
    LORA_KERNELS_CPU_ISA forces is another machine: "...-2c-as-avx512".
    """
    from lora_kernels.backends.native import CPU_ISAS, cpu_isa

    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*$", " ", cpu_name().lower())
    name += " amx" if "amx" in CPU_ISAS else ""
    forced = f" as {cpu_isa()}" if os.environ.get("LORA_KERNELS_CPU_ISA") else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {core_count()}c{forced}").strip("-")


def last_level_cache_bytes() -> int:
    """The largest cache of CPU 0; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found.group(1)) << (10 if found.group(2) == "K" else 20))
    return max(sizes, default=32 << 20)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None without git."""
    try:
        run = ["git", "-C", str(ROOT)]
        head = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


# glibc maps every block of over 32 MiB afresh, and the first touch of its pages takes longer than many a
# kernel: the benchmarks keep freed memory, for all contenders alike.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def allocator() -> str:
    kept = all(os.environ.get(name) == value for name, value in KEEP_FREED_MEMORY.items())
    return "keeps freed memory" if kept else "as the system has it"


def describe_cpu() -> dict[str, object]:
    from lora_kernels.backends.native import cpu_isa

    return {
        "cpu": cpu_name(),
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "pinning": os.environ.get("OMP_PROC_BIND", "not pinned"),
        "allocator": allocator(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "cpu_isa": cpu_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }

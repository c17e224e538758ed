"""The CUDA kernels on the host stand-in (csrc/simt) as a backend for CPU tensors: "simt", for tests only."""

import ctypes
import os
import runpy
from pathlib import Path

import torch

from lora_kernels import backends
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import CudaBackend
from lora_kernels.backends.cuda_launchers import CudaLaunchers, rank_rows

ROOT = Path(__file__).resolve().parents[1]


def _load() -> ctypes.CDLL:
    """Builds the library where it is not up to date. LORA_KERNELS_SIMT names one that is built already."""
    path = os.environ.get("LORA_KERNELS_SIMT")
    if not path:
        path = str(runpy.run_path(str(ROOT / "csrc" / "simt" / "build.py"))["build"]())
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.lk_simt_last_error.restype = ctypes.c_char_p
    library.lk_simt_set_seed.argtypes = [ctypes.c_uint64]
    return library


_library = _load()
_device = {"multiprocessors": 4, "capability": 80}


def set_seed(seed: int) -> None:
    """Of the order of threads and blocks, and of when asynchronous operations complete, from now on."""
    _library.lk_simt_set_seed(seed)


def pretend(multiprocessors: int, capability: int) -> None:
    """The device that launchers see: how they cut up a problem, and which kernel they take."""
    _library.lk_simt_pretend(multiprocessors, capability)
    _device.update(multiprocessors=multiprocessors, capability=capability)


def _rank_rows(like: torch.Tensor, rank: int) -> torch.Tensor:
    """On a CPU zeros: with AMX, torch 2.13's bf16 GEMM multiplies what lies behind the end of an odd row by
    zero. A GPU's tensors get what they get outside of tests."""
    rows = rank_rows(like, rank)
    if rows.device.type == "cpu":
        rows._base.zero_()
    return rows


cuda.rank_rows = _rank_rows

backend = CudaBackend(
    CudaLaunchers(
        torch.ops.lora_kernels_simt,
        lambda device: _device["capability"],
        lambda code: _library.lk_simt_last_error().decode(),
    ),
    archs="the host stand-in",
)
backends.BACKENDS["simt"] = backend

"""Where tests/gpu runs: a CUDA device, or with LORA_KERNELS_GPU_TESTS=stand-in the host stand-in."""

import os
import sys
from pathlib import Path

import torch

from lora_kernels.backends import BACKENDS, cuda
from lora_kernels.backends.cuda_launchers import CudaLaunchers

STAND_IN = os.environ.get("LORA_KERNELS_GPU_TESTS") == "stand-in"
TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:  # of a script: numerics and simt_backend are there
    sys.path.insert(0, str(TESTS))


def take(capability: int = 80) -> tuple[torch.device, str | None, CudaLaunchers]:
    """The device, the backend to force for its tensors (None: by device, as for users), and its launchers."""
    if not STAND_IN:
        return torch.device("cuda", torch.cuda.current_device()), None, cuda._backend._launchers
    import simt_backend

    simt_backend.pretend(4, capability)
    return torch.device("cpu"), "simt", BACKENDS["simt"]._launchers

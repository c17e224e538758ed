"""Which kernels serve a call.

A backend is a module with the same functions, which compute into outputs that `lora_kernels.ops` has checked
and allocated: `nf4_quantize, nf4_dequantize, lora_dropout`, `lora_linear, lora_linear_batched, dora_linear`
each with its `_backward`, `adamw_step, adamw8bit_step, lion_step, lion8bit_step`, and `explain`. The choice
is made per call from the device; `use_backend` or the environment variable LORA_KERNELS_BACKEND force one.
"""

import os
from types import ModuleType

import torch

from lora_kernels.backends import cpu, cuda, reference

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "reference": reference}


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(sorted(BACKENDS))}")
    return name


_forced: str | None = _checked(os.environ.get("LORA_KERNELS_BACKEND") or None, "LORA_KERNELS_BACKEND")


class use_backend:
    """Forces one backend for the whole process, e.g. `use_backend("reference")`; None: the automatic choice.

    Works at once, and as a context manager also ends:

        with lora_kernels.use_backend("reference"):
            ...
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._before = _forced
        _forced = _checked(name, "use_backend")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._before


def backend_name(device: torch.device) -> str:
    """The name of the backend that serves tensors on `device`."""
    if _forced is not None:
        return _forced
    if device.type in ("cpu", "meta"):
        return "cpu"
    if device.type == "cuda":
        return "cuda"
    raise ValueError(
        f"no kernels for device {str(device)!r}: move the tensors to 'cpu' or 'cuda', or choose the slow "
        'pure-PyTorch backend with lora_kernels.use_backend("reference")'
    )


def backend_for(device: torch.device) -> ModuleType:
    return BACKENDS[backend_name(device)]

"""Tests that need a CUDA device: marked `gpu`, and skipped with the reason where there is none.

LORA_KERNELS_GPU_TESTS=stand-in runs those marked `stand_in` on a CPU, by the host stand-in: the same bodies
and the same launchers, so that they are known to pass before a device sees them.
"""

import os
from pathlib import Path

import pytest
import torch
from place import STAND_IN, take

from lora_kernels.backends import use_backend
from lora_kernels.backends.cuda_launchers import CudaLaunchers

# A device is lent for minutes: whole steps come before single kernels, in case that time runs out.
FIRST = ("test_training_op", "test_training_streams", "test_lora_linear_batched", "test_training_kernels")
SLOW_ON_THE_STAND_IN = 1 << 28  # products of elements: a few seconds


def why_not() -> str | None:
    """Why these tests are skipped; None where they run. LORA_KERNELS_REQUIRE_GPU=1 lets them fail instead."""
    if os.environ.get("LORA_KERNELS_REQUIRE_GPU"):
        return None
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is false"
    return None


def pytest_collection_modifyitems(items):
    here, reason = Path(__file__).parent, why_not()
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if STAND_IN and item.get_closest_marker("stand_in") is None:
            item.add_marker(pytest.mark.skip(reason="shows something only on a device"))
        elif not STAND_IN and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))

    def turn(item) -> int:  # of other folders' tests: before all of these
        if here not in item.path.parents:
            return -1
        return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)

    items.sort(key=turn)


@pytest.fixture
def device():
    """The current CUDA device; in a stand-in run the CPU, with the backend simt in force."""
    place, backend, _ = take()
    with use_backend(backend):
        yield place


@pytest.fixture
def launchers(device) -> CudaLaunchers:
    """Those of the library, or of the stand-in."""
    return take()[2]


@pytest.fixture
def affordable():
    """affordable(T, N, K): skips what is too much work for the stand-in."""

    def check(*sizes: int) -> None:
        work = 1
        for size in sizes:
            work *= size
        if STAND_IN and work > SLOW_ON_THE_STAND_IN:
            pytest.skip("too large for the stand-in")

    return check

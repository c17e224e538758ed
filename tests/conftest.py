"""Fixtures of the whole suite: the backends under test and a fresh, printed seed for every test."""

import os
import random

import pytest
import simt_backend
import torch
from variants import KERNELS, VARIANTS, variant

# Of the CUDA kernels those of sm_90 differ in lora_linear_decode alone: simt-90 runs where that is called.
CLUSTERED = ("test_lora_linear", "test_training_step", "test_layouts")


def pytest_collection_modifyitems(config, items):
    def repeats(item) -> bool:
        values = getattr(item, "callspec", None) and item.callspec.params.values()
        return bool(values) and "simt-90" in values and item.path.stem not in CLUSTERED

    dropped = [item for item in items if repeats(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not repeats(item)]


@pytest.fixture(params=VARIANTS)
def backend(request):
    """Forces one backend, and one instruction set of the cpu backend, for the duration of a test."""
    with variant(request.param) as name:
        yield name


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Likewise, without the reference, which is what the others are measured by."""
    with variant(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def seed():
    """A fresh seed every run, shown when a test fails; LORA_KERNELS_TEST_SEED repeats one."""
    value = int(os.environ.get("LORA_KERNELS_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"LORA_KERNELS_TEST_SEED={value}")
    torch.manual_seed(value)
    simt_backend.set_seed(value)
    return value

"""Fixtures of the whole suite: the backends under test and a fresh, printed seed for every test."""

import os
import random

import pytest
import torch

import lora_kernels

# Backends whose tensors live on the CPU. A later backend adds its name here and runs the whole suite.
BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Forces one backend for the duration of a test."""
    with lora_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def kernels(request):
    """Forces one backend that has kernels of its own: the reference is what those are measured by."""
    with lora_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed():
    """A fresh seed every run, shown when a test fails; LORA_KERNELS_TEST_SEED repeats one."""
    value = int(os.environ.get("LORA_KERNELS_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"LORA_KERNELS_TEST_SEED={value}")
    torch.manual_seed(value)
    return value

"""Tests that need a CUDA device: marked `gpu`, and skipped with the reason where there is none."""

import os
from pathlib import Path

import pytest
import torch


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
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())

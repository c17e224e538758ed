"""Choosing a backend: automatically, by use_backend, by the environment; never silently another one."""

import os
import subprocess
import sys

import pytest
import torch

import lora_kernels as lk
from lora_kernels import backends
from lora_kernels.backends import cuda


def test_the_device_decides():
    assert backends.backend_name(torch.device("cpu")) == "cpu"
    assert backends.backend_name(torch.device("cuda", 1)) == "cuda"
    with pytest.raises(ValueError, match="no kernels for device 'xpu:0'"):
        backends.backend_name(torch.device("xpu", 0))


def test_every_backend_has_every_op():
    ops = ("nf4_quantize", "nf4_dequantize", "lora_dropout", "lora_linear", "lora_linear_backward", "explain")
    for module in backends.BACKENDS.values():
        assert all(callable(getattr(module, op)) for op in ops)


def test_use_backend_nests_and_ends():
    name = lambda: backends.backend_name(torch.device("cpu"))  # noqa: E731
    with lk.use_backend("reference"):
        with lk.use_backend("cpu"):
            assert name() == "cpu"
        assert name() == "reference"
        with lk.use_backend(None):
            assert name() == "cpu"
    assert name() == "cpu"
    lk.use_backend("reference")
    assert name() == "reference"
    lk.use_backend(None)
    assert name() == "cpu"


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="use_backend: got 'tpu', expected one of cpu, cuda, reference"):
        lk.use_backend("tpu")
    assert backends.backend_name(torch.device("cpu")) == "cpu"


def test_a_library_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(cuda._backend, "_archs", "")
    weight = lk.nf4_quantize(torch.randn(4, 64))
    with pytest.raises(RuntimeError, match="built without CUDA"):
        cuda.nf4_dequantize(weight.base_weight(), 0, 0, torch.empty(4, 64))
    assert "not built" in cuda.explain(weight.base_weight(), 1, torch.bfloat16)[0]


def run(code, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_forces_a_backend():
    code = "import torch, lora_kernels.backends as b; print(b.backend_name(torch.device('cpu')))"
    assert run(code, LORA_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    bad = run(code, LORA_KERNELS_BACKEND="nope")
    assert bad.returncode != 0 and "LORA_KERNELS_BACKEND: got 'nope'" in bad.stderr


def test_the_environment_forces_an_instruction_set():
    code = "import lora_kernels; from lora_kernels.backends.native import cpu_isa; print(cpu_isa())"
    assert run(code, LORA_KERNELS_CPU_ISA="portable").stdout.strip() == "portable"
    bad = run(code, LORA_KERNELS_CPU_ISA="sse9")
    assert bad.returncode != 0 and "got 'sse9'; expected one of portable" in bad.stderr


def test_a_missing_library_says_how_to_build_it(tmp_path):
    import shutil
    from pathlib import Path

    package = Path(lk.__file__).parent
    shutil.copytree(package, tmp_path / "lora_kernels", ignore=shutil.ignore_patterns("*.so", "finetune"))
    failed = run("import lora_kernels", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert failed.returncode != 0 and "python setup.py build_ext --inplace" in failed.stderr

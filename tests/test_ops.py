"""The registered ops as torch sees them, and the native library as the linker left it."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.backends.native import _C

OPS = torch.ops.lora_kernels
N, K, R = 40, 72, 4


def nf4_parts(double_quant=True):
    return lk.nf4_quantize(torch.randn(N, K), double_quant=double_quant).base_weight()[:5]


def dense_parts():
    return torch.randn(N, K), None, None, None, 0


PARTS = {"nf4": nf4_parts, "nf4 plain": lambda: nf4_parts(False), "dense": dense_parts}


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck_nf4_quantize(double_quant):
    opcheck(OPS.nf4_quantize.default, (torch.randn(9, 70), 64, double_quant))


@pytest.mark.parametrize("kind", ["nf4", "nf4 plain"])
def test_opcheck_nf4_dequantize(kind):
    opcheck(OPS.nf4_dequantize.default, (*PARTS[kind](), [N, K], torch.bfloat16))


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck_lora_linear(kind, p):
    x, A, B, bias = (torch.randn(*s, requires_grad=True) for s in ((2, 3, K), (R, K), (N, R), (N,)))
    rng = torch.tensor([1, 2]) if p else None
    opcheck(OPS.lora_linear.default, (x, *PARTS[kind](), N, A, B, 0.5, bias, p, rng))


def test_opcheck_lora_linear_without_an_adapter():
    x = torch.randn(3, K, requires_grad=True)
    opcheck(OPS.lora_linear.default, (x, *nf4_parts(), N, None, None, 1.0, None, 0.0, None))


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, False], [True, False, False, True]])
def test_opcheck_lora_linear_backward(needs):
    dy, x, h = torch.randn(2, 3, N), torch.randn(2, 3, K), torch.randn(6, R)
    A, B = torch.randn(R, K), torch.randn(N, R)
    rng = torch.tensor([1, 2])
    arguments = (dy, x, h, *nf4_parts(), K, A, B, 0.5, 0.2, rng, needs)
    opcheck(OPS.lora_linear_backward.default, arguments)


def test_meta_tensors_give_shapes_without_computing():
    weight = lk.nf4_quantize(torch.empty(N, K, device="meta"))
    assert weight.packed.is_meta and weight.packed.shape == (N * K // 2, 1)
    y = lk.lora_linear(torch.empty(5, K, device="meta"), weight, bias=torch.empty(N, device="meta"))
    assert y.is_meta and y.shape == (5, N)


def test_poisoned_allocations_never_reach_an_output(monkeypatch):
    """Every output and workspace starts as NaN: what a kernel does not write shows."""
    real = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(255)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = lk.nf4_quantize(torch.randn(N, K))
        assert bool(weight.dequantize(dtype).isfinite().all())
        x, A, B, bias = (torch.randn(*s).to(dtype).requires_grad_() for s in ((7, K), (R, K), (N, R), (N,)))
        y = lk.lora_linear(x, weight, A, B, bias=bias, dropout_p=0.4)
        y.sum().backward()
        for tensor in (y, x.grad, A.grad, B.grad, bias.grad):
            assert bool(tensor.isfinite().all())


def test_the_library_depends_on_libtorch_so_that_the_stream_symbol_can_bind():
    """On a CUDA build of torch the weak symbol lives behind libtorch; as-needed linking would lose it."""
    import re
    import shutil

    readelf = shutil.which("readelf")
    assert readelf, "binutils are part of the compiler that built the library"
    dynamic = subprocess.run([readelf, "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cudart" in name or "libcuda" in name or "python" in name]


def test_the_library_is_abi3():
    assert _C.__file__.endswith(".abi3.so")


def test_the_library_holds_the_cuda_kernels_that_it_names():
    """Both kernels are in the fat binary; without nvcc the library says that it left CUDA out."""
    image = Path(_C.__file__).read_bytes()
    if not _C.cuda_archs:
        assert b"dequantize_aligned" not in image
        return
    assert b".nv_fatbin" in image or b"__nv_relfatbin" in image
    assert b"dequantize_aligned" in image and b"dequantize_general" in image
    assert _C.cuda_version

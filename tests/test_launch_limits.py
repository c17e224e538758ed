"""Launches that a GPU would refuse, on the stand-in: shared memory by compute capability, a grid's size."""

import pytest
import simt_backend
import torch

import lora_kernels as lk

LEAST_SHARED = 89  # 99 KiB a block, as on 8.6 and 12.0; 163 on 8.0, 227 on 9.0


@pytest.fixture
def small_blocks():
    simt_backend.pretend(4, LEAST_SHARED)
    with lk.use_backend("simt"):
        yield
    simt_backend.pretend(4, 80)


@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("r", [16, 64, 256])
@pytest.mark.parametrize("tokens", [8, 16, 32, 40])
def test_every_kernel_of_a_step_fits_the_smallest_shared_memory(small_blocks, tokens, r, quantized):
    torch.manual_seed(0)
    k, n = 128, 72
    dense = (torch.randn(n, k) * k**-0.5).bfloat16()
    weight = lk.nf4_quantize(dense) if quantized else dense
    A, B = torch.randn(r, k).bfloat16().requires_grad_(), torch.randn(n, r).bfloat16().requires_grad_()
    x, dy = torch.randn(tokens, k).bfloat16().requires_grad_(), torch.randn(tokens, n).bfloat16()
    results = []
    for backend in ("reference", "simt"):
        with lk.use_backend(backend):
            y = lk.lora_linear(x, weight, A, B, scaling=r**-0.5)
            results.append([y, *torch.autograd.grad(y, [x, A, B], dy)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.03 * float(want.detach().abs().max()))

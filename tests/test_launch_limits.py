"""Launches that a GPU would refuse, on the stand-in: shared memory by compute capability, a grid's size."""

import pytest
import simt_backend
import torch

import lora_kernels as lk
from lora_kernels.backends.cuda_launchers import SortedRows

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


def test_lora_expand_takes_more_than_65535_tiles_of_rows(small_blocks):
    """Sorted rows, since a tile of no adapter costs little: `begins` leaves two of them to the only one."""
    count = 65536 * 64
    order = torch.tensor([1, 0]).repeat(count // 2)
    h, B = torch.tensor([[1.0], [2.0]]).bfloat16(), torch.tensor([[4.0], [8.0]]).bfloat16()
    y = torch.zeros(2, 2).bfloat16()
    rows = SortedRows(order, torch.tensor([0, 2]))
    simt_backend.backend._launchers.lora_expand_forward(h, [B], [0.5], y, add=True, rows=rows)
    assert y.tolist() == [[2.0, 4.0], [4.0, 8.0]]

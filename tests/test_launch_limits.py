"""Launches that a GPU would refuse, on the stand-in: shared memory by compute capability, a grid's size.
And how much workspace they take."""

import pytest
import simt_backend
import torch

import lora_kernels as lk
from lora_kernels.backends.cuda import GRADIENT_OF_H
from lora_kernels.backends.cuda_launchers import CLUSTER, GLOBAL_MEMORY, SortedRows

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


@pytest.mark.parametrize("tokens", [3, 16])
def test_an_inner_dimension_that_no_cluster_of_a_small_gpu_holds(tokens):
    """On 12.0 eight blocks of 99 KiB hold 8192 columns of eight tokens and little more: decode goes through
    global memory, and lora_linear_mixed and dx, which hold no slice whole, take any K."""
    launchers, ours = simt_backend.backend._launchers, simt_backend.backend
    weights = {k: lk.nf4_quantize((torch.randn(24, k) * k**-0.5).bfloat16()) for k in (4096, 14336)}
    simt_backend.pretend(4, 120)
    try:
        exchanges = [launchers.decode_exchange(w.base_weight(), 16) for w in weights.values()]
        assert exchanges == [CLUSTER, GLOBAL_MEMORY]
        weight, k = weights[14336], 14336
        assert ours._kernel("lora_linear", weight.base_weight(), tokens, torch.bfloat16, 16)[0] != "panels"
        A, B = ((torch.randn(s) / s[1] ** 0.5).bfloat16().requires_grad_() for s in ((16, k), (24, 16)))
        x, dy = torch.randn(tokens, k).bfloat16().requires_grad_(), torch.randn(tokens, 24).bfloat16()
        results = []
        for backend in ("reference", "simt"):
            with lk.use_backend(backend):
                y = lk.lora_linear(x, weight, A, B, scaling=0.5)
                results.append([y, *torch.autograd.grad(y, [x, A, B], dy)])
    finally:
        simt_backend.pretend(4, 80)
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.03 * float(want.detach().abs().max()))


def test_an_inner_dimension_that_no_slices_hold_is_mixeds_work():
    """Decode has up to 64 slices of up to 8192."""
    base = lk.nf4_quantize(torch.zeros(1, 1 << 20).bfloat16()).base_weight()
    ours = simt_backend.backend
    assert ours._launchers.decode_exchange(base, 16) is None
    assert ours._kernel("lora_linear", base, 1, torch.bfloat16, 16)[0] == "lora_linear_mixed"


def test_columns_of_w0_that_do_not_lie_together_are_not_copied():
    """torch's GEMM takes a transposed weight as it is."""
    weight = torch.randn(128, 72).bfloat16().T
    x = torch.randn(16, 128).bfloat16()
    with lk.use_backend("simt"):
        lines = lk.explain(weight, 16)
        out = lk.lora_linear(x, weight)
    assert "do not lie beside each other" in str(lines)
    torch.testing.assert_close(out, x @ weight.T, rtol=0.02, atol=0.02)


def test_lora_expand_takes_more_than_65535_tiles_of_rows(small_blocks):
    """Sorted rows, since a tile of no adapter costs little: `begins` leaves two of them to the only one."""
    count = 65536 * 64
    order = torch.tensor([1, 0]).repeat(count // 2)
    h, B = torch.tensor([[1.0], [2.0]]).bfloat16(), torch.tensor([[4.0], [8.0]]).bfloat16()
    y = torch.zeros(2, 2).bfloat16()
    rows = SortedRows(order, torch.tensor([0, 2]))
    simt_backend.backend._launchers.lora_expand_forward(h, [B], [0.5], y, add=True, rows=rows)
    assert y.tolist() == [[2.0, 4.0], [4.0, 8.0]]


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("columns", [4096, 28672])
@pytest.mark.parametrize("adapters", [1, 64])
def test_the_sweeps_workspace_stays_below_a_quarter_of_dy_and_18_mib(columns, adapters, multiprocessors):
    """A quarter: g as far as the sweep makes it. 18 MiB: dB or dA, of up to 2 x 264 blocks (two for each
    multiprocessor; twice as many where adapters share them) of 512 x 17, 256 x 33 or 128 x 65 fp32 sums."""
    simt_backend.pretend(multiprocessors, 90)
    for tokens in (1, 100, 4096, 16384):
        z = torch.empty(1, dtype=torch.bfloat16).expand(tokens, columns)
        for rank in (1, 8, 16, 17, 32, 33, 64, 100, 256):
            stride = -(-rank // 8) * 8 if rank <= GRADIENT_OF_H.rank else 0
            taken = torch.ops.lora_kernels_simt.lora_linear_backward_sweep_workspace(
                z, adapters, rank, stride
            )
            share = taken / (2 * tokens * columns)
            assert taken <= tokens * columns // 2 + (18 << 20), f"T = {tokens}, r = {rank}: {share:.2f} of dy"
    simt_backend.pretend(4, 80)


def test_lora_shrink_is_cut_into_the_slices_that_take_the_least_time():
    """Waves of two blocks a multiprocessor times a block's stages: 256 blocks are one of 264, 512 are two."""
    simt_backend.pretend(132, 90)
    stages = 4096 // 128
    for tokens, wanted in ((4096, 4), (8192, 2), (16384, 1), (64, 16)):
        x = torch.empty(1, dtype=torch.bfloat16).expand(tokens, 4096)
        workspace, _ = torch.ops.lora_kernels_simt.lora_shrink_scratch(x, 1, False, 16)
        tiles = tokens // 64
        slices = max(1, workspace // (tiles * 64 * 16 * 4))
        assert slices == wanted, f"T = {tokens}: {slices} slices"
        time = -(-tiles * slices // 264) * (stages // slices + 2)
        assert all(time <= -(-tiles * s // 264) * (stages // s + 2) for s in (1, 2, 4, 8, 16))
    simt_backend.pretend(4, 80)


def test_no_gradient_of_a_large_rank_takes_partial_sums_of_g(monkeypatch):
    """One adapter and several; T·N·r/32 bytes of them would be more than dy."""
    torch.manual_seed(0)
    asked = []
    launchers = simt_backend.backend._launchers
    whole = launchers._sweep_workspace
    monkeypatch.setattr(launchers, "_sweep_workspace", lambda *args: asked.append(args) or whole(*args))
    x, dy = torch.randn(70, 64).bfloat16(), torch.randn(70, 40).bfloat16()
    weight = torch.randn(40, 64).bfloat16()
    for r in (GRADIENT_OF_H.rank, GRADIENT_OF_H.rank + 1):
        A = [(torch.randn(q, 64) / 8).bfloat16().requires_grad_() for q in (r, 3)]
        B = [(torch.randn(40, q) / 8).bfloat16().requires_grad_() for q in (r, 3)]
        index, leaf = torch.arange(70) % 3 - 1, x.clone().requires_grad_()
        results = []
        for backend in ("reference", "simt"):
            asked.clear()
            with lk.use_backend(backend):
                one = lk.lora_linear(leaf, weight, A[0], B[0], scaling=0.5)
                several = lk.lora_linear_batched(leaf, weight, A, B, [0.5, -2.0], index)
                first = torch.autograd.grad(one, [leaf, A[0], B[0]], dy)
                results.append([*first, *torch.autograd.grad(several, [leaf, *A, *B], dy)])
        assert any(stride > 0 for _, _, _, stride in asked) == (r <= GRADIENT_OF_H.rank)
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=0.03, atol=0.03 * float(want.abs().max()))

"""lora_linear and its backward on the device: accuracy against float64 truth, and the CPU's dropout masks."""

import pytest
import torch
from numerics import INPUT_KINDS
from problems import DTYPES, NAMES, Case, check, draws_for

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import BACKENDS


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_forward_and_gradients_are_as_accurate_as_eager(kind, dtype, p, device):
    check(device, 96, 512, 1024, 16, dtype=dtype, kind=kind, p=p, draws=draws_for(kind))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", ["normal", "magnitudes", "gelu"])
def test_long_inner_dimensions(dtype, kind, device):
    """K = 14336, and N = 14336 for dx: several panels, and sums long enough to show a bias.

    Not in fp32: a library product that sums 14336 terms in one chain errs by about 2^-24·sqrt(14336/6) =
    2.9e-6.
    """
    check(device, 96, 256, 14336, 16, dtype=dtype, kind=kind)
    check(device, 96, 14336, 256, 16, dtype=dtype, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [1, 7, 8, 16, 257, 2048])
def test_every_number_of_tokens(t, dtype, device):
    """Small T are drawn several times over: the norm of few outputs says little."""
    check(device, t, 576, 512, 16, dtype=dtype, kind="gelu", draws=max(1, 16 // t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_shapes(dtype, device):
    """K, N, T and r that divide by nothing, odd ones among them; blocks straddle rows."""
    check(device, 77, 342, 1000, 13, dtype=dtype, kind="gelu", p=0.1)
    check(device, 65, 191, 333, 5, dtype=dtype, kind="gelu", p=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_base(dtype, device):
    check(device, 96, 320, 512, 16, dtype=dtype, kind="gelu", nf4=False, p=0.1)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_float32_adapters_on_a_16_bit_base(dtype, device):
    case = Case(device, 64, 256, 512, 16, dtype, adapter_dtype=torch.float32)
    assert [out.dtype for out in case.computed()] == [dtype, dtype, torch.float32, torch.float32, dtype]
    check(device, 96, 512, 1024, 16, dtype=dtype, kind="gelu", p=0.1, adapter_dtype=torch.float32)


def test_no_tokens_at_all(device):
    weight = lk.nf4_quantize(torch.randn(64, 128, device=device))
    x, A, B = (torch.randn(*s, device=device, requires_grad=True) for s in ((0, 3, 128), (4, 128), (64, 4)))
    y = lk.lora_linear(x, weight, A, B)
    y.sum().backward()
    assert y.shape == (0, 3, 64) and not A.grad.any() and not B.grad.any()


def test_strides_do_not_matter(device):
    case = Case(device, 24, 40, 64, 4, torch.float32)
    wanted = case.computed()
    wide = torch.randn(24, 130, device=device)
    wide[:, 1:129:2] = case.x
    for x in (wide[:, 1:129:2], case.x.T.contiguous().T):
        case.x = x
        for out, want in zip(case.computed(), wanted, strict=True):
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_poisoned_allocations_never_reach_an_output(device, monkeypatch):
    """Every output and workspace starts as NaN: what a kernel does not write shows."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(255)

    case = {dtype: Case(device, 33, 300, 200, 5, dtype, p=0.3) for dtype in DTYPES}
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    for dtype in DTYPES:
        for name, out in zip(NAMES, case[dtype].computed(), strict=True):
            assert bool(out.isfinite().all()), (name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_mask_is_the_cpus_bit_for_bit(dtype, device):
    """The same (seed, offset) and first element give the same zeros, far into a large x too."""
    for n, first, p in ((4097, 0, 0.1), (50_000, 3, 0.5), (1001, 1_000_002, 0.9)):
        rng = lk.dropout_rng("cpu")
        x = torch.rand(n).to(dtype) + 1
        here, there = torch.full_like(x, float("nan")), torch.full_like(x, float("nan")).to(device)
        BACKENDS["cpu"].lora_dropout(x, p, rng, first, here)
        BACKENDS["cuda"].lora_dropout(x.to(device), p, rng.to(device), first, there)
        assert torch.equal(there.cpu(), here)


def test_dropped_inputs_are_the_same_in_forward_backward_and_on_the_cpu(device):
    """Through the op: identity matrices for A and B make h and dx show the mask itself."""
    t, k, p = 70, 48, 0.4
    eye = torch.eye(k)
    rng = lk.dropout_rng("cpu")
    weight, masks = lk.nf4_quantize(torch.zeros(k, k)), []
    for place in (torch.device("cpu"), device):
        x = torch.ones(t, k, device=place, requires_grad=True)
        A, B = eye.to(place), eye.to(place)
        y = lk.lora_linear(x, weight.to(place), A, B, scaling=1 - p, dropout_p=p, rng=rng.to(place))
        y.backward(torch.ones_like(y))
        masks += [y.detach().cpu(), x.grad.cpu()]
    wanted = reference.dropout_mask((t, k), p, rng).float()
    for mask in masks:
        torch.testing.assert_close(mask, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_deterministic(dtype, device):
    case = Case(device, 257, 1100, 1200, 16, dtype, p=0.1)
    first, second = case.computed(), case.computed()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

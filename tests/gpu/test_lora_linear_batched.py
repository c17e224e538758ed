"""lora_linear_batched on the device: each row its own adapter, of any rank, of 64 and more in one call."""

import pytest
import torch
from numerics import LIMIT, relative_error
from problems import SCALING, BatchedCase, base_of, check_batched, matrix

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends.cuda_launchers import MOST_ADAPTERS, SortedRows

pytestmark = pytest.mark.stand_in
TOKENS = (1, 9, 33, 256, 2048)
HALVES = (torch.bfloat16, torch.float16)
MIXED = (1, 16, 5, 64, 8)
MANY = tuple(1 + i % 20 for i in range(64))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize("t", TOKENS)
def test_different_ranks_scalings_and_rows_without_an_adapter(t, dtype, p, device, affordable):
    affordable(t, 200, 320)
    check_batched(BatchedCase(device, t, 200, 320, MIXED, dtype, p=p))


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t", [33, 256, 2048])
def test_float32_adapters_on_a_16_bit_base(t, dtype, nf4, device, affordable):
    affordable(t, 200, 320)
    options = {"p": 0.1, "nf4": nf4, "adapter_dtype": torch.float32}
    check_batched(BatchedCase(device, t, 200, 320, MIXED, dtype, **options))


@pytest.mark.parametrize("t, n, k", [(70, 96, 128), (513, 130, 192), (300, 77, 91)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_64_adapters_in_one_call(t, n, k, p, device, affordable):
    affordable(t, n, k)
    check_batched(BatchedCase(device, t, n, k, MANY, torch.bfloat16, p=p))


def test_more_adapters_than_a_launch_takes(device):
    """Adapters 0 to 69 one row each, and one of -1 in between."""
    index = torch.cat([torch.arange(40), torch.tensor([-1]), torch.arange(40, 70)])
    assert index.max() >= MOST_ADAPTERS
    check_batched(BatchedCase(device, len(index), 96, 128, (3,) * 70, torch.bfloat16, index=index))


@pytest.mark.parametrize("only", [-1, 0, 4])
def test_all_rows_of_one_adapter_or_of_none(only, device):
    """As lora_linear with that adapter, and exactly zero gradients for the others."""
    case = BatchedCase(device, 90, 130, 192, MIXED, torch.bfloat16, index=torch.full((90,), only))
    y, dx, _, dA, dB = case.computed()
    x = case.x.clone().requires_grad_()
    alone = {} if only < 0 else {"lora_A": case.A[only], "lora_B": case.B[only]}
    scaling = 1.0 if only < 0 else case.scaling[only]
    y1 = lk.lora_linear(x, case.weight, **alone, scaling=scaling, bias=case.bias)
    (dx1,) = torch.autograd.grad(y1, x, case.dy)
    for out, want in ((y, y1.detach()), (dx, dx1)):  # the adapter's term is added to a rounded base product
        assert relative_error(out, want.double()) <= 2 * LIMIT[torch.bfloat16]
    for i, (a, b) in enumerate(zip(dA, dB, strict=True)):
        assert (i == only) == bool(a.any()) == bool(b.any())


def test_two_runs_give_the_same_bits(device):
    case = BatchedCase(device, 300, 200, 320, MANY, torch.bfloat16, p=0.1)
    runs = [case.computed() for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        pairs = zip(first, second, strict=True) if isinstance(first, list) else [(first, second)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_no_tokens_at_all(device):
    case = BatchedCase(device, 0, 64, 128, MIXED, torch.bfloat16, p=0.1)
    y, dx, dbias, dA, dB = case.computed()
    assert y.shape == (0, 64) and dx.shape == (0, 128)
    assert not any(bool(g.any()) for g in (dbias, *dA, *dB))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rows_of_no_adapter_are_left_alone(p, device, launchers):
    """By the launchers: h, y and dx keep their NaN where no adapter has the row, or not that rank."""
    t, n, k, ranks = 150, 72, 128, (3, 8)
    index = torch.randint(-1, 2, (t,), device=device)
    ordered, order = torch.sort(index, stable=True)
    rows = SortedRows(order, torch.searchsorted(ordered, torch.arange(3, device=device)))
    x = matrix(device, t, k, 1.0, torch.bfloat16)
    A = [matrix(device, r, k, k**-0.5, torch.bfloat16) for r in ranks]
    B = [matrix(device, n, r, 1.0, torch.bfloat16) for r in ranks]
    rng = lk.dropout_rng(device) if p else None
    h, y, dx = (x.new_full((t, columns), float("nan")) for columns in (max(ranks), n, k))
    launchers.lora_shrink(x, A, p, rng, h, rows)
    dropped = reference.lora_dropout(x, p, rng)
    for i, r in enumerate(ranks):
        mine = index == i
        assert bool(h[mine][:, r:].isnan().all())
        assert relative_error(h[mine][:, :r], dropped[mine].double() @ A[i].double().T) <= 4e-3
    assert bool(h[index < 0].isnan().all())
    h.nan_to_num_(0.0)
    launchers.lora_expand_forward(h, B, [SCALING, 2.0], y, False, rows)
    launchers.lora_expand_backward(h, A, p, rng, dx, False, rows)
    for out in (y, dx):
        assert bool(out[index < 0].isnan().all()) and bool(out[index >= 0].isfinite().all())


def test_an_adapter_that_learns_alone_gets_its_gradient(device):
    """`needs` of one dA and one dB out of four."""
    case = BatchedCase(device, 120, 96, 128, (4, 16, 7, 16), torch.bfloat16, p=0.1)
    whole = case.computed()
    A = [a.clone().requires_grad_(i == 1) for i, a in enumerate(case.A)]
    B = [b.clone().requires_grad_(i == 2) for i, b in enumerate(case.B)]
    y = lk.lora_linear_batched(
        case.x, case.weight, A, B, case.scaling, case.index, bias=case.bias, dropout_p=0.1, rng=case.rng
    )
    dA, dB = torch.autograd.grad(y, [A[1], B[2]], case.dy)
    assert base_of(case.weight).quantized
    for out, want in ((dA, whole[3][1]), (dB, whole[4][2])):
        assert relative_error(out, want.double()) <= LIMIT[torch.bfloat16]

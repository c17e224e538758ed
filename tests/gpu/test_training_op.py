"""A training step through the op, by whichever kernels its size takes: float64 truth, the CPU's gradients.

T from 1 to 2048 goes through lora_linear_decode, lora_linear_mixed and panels, and backward through both
sweeps, lora_linear_backward_dx and lora_expand.
"""

import pytest
import torch
from numerics import LIMIT, relative_error
from problems import DTYPES, NAMES, Case, check, draws_of

import lora_kernels as lk
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import CROSSOVERS
from lora_kernels.panels import JOINED

pytestmark = pytest.mark.stand_in
TOKENS = (1, 9, 16, 33, 256, 2048)
RANKS = (1, 5, 8, 16, 64, 256)
HALVES = (torch.bfloat16, torch.float16)
N, K = 333, 576  # odd N; K as the fused kernels want it
ALL_FUSED = min(row.tokens for row in CROSSOVERS[1:])  # no product by torch's GEMM up to here


def close(out: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Of bfloat16, up to the order of sums."""
    return relative_error(out, wanted.double()) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("t", TOKENS)
def test_every_number_of_tokens_and_rank(t, r, device, affordable):
    affordable(t, N, K)
    check(device, t, N, K, r, dtype=torch.bfloat16, kind="gelu", p=0.1, draws=draws_of(t * N))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", TOKENS)
def test_every_dtype_with_and_without_dropout(t, dtype, p, device, affordable):
    affordable(t, N, K)
    check(device, t, N, K, 16, dtype=dtype, kind="gelu", p=p, draws=draws_of(t * N))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("r", [8, 100])
def test_many_tokens_and_more_outputs_than_inputs(r, dtype, p, device):
    """The LoRA term comes out of the product with W0: its GEMM waits for h, which another stream writes."""
    base = lk.nf4_quantize(torch.randn(400, 192, dtype=dtype)).base_weight()
    assert cuda._backend._way(base, 600, dtype, r) == JOINED
    check(device, 600, 400, 192, r, dtype=dtype, kind="gelu", p=p)


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("t", TOKENS)
def test_float32_adapters_on_a_16_bit_base(t, dtype, nf4, device, affordable):
    affordable(t, N, K)
    options = {"dtype": dtype, "nf4": nf4, "adapter_dtype": torch.float32, "p": 0.1}
    check(device, t, N, K, 16, kind="gelu", draws=draws_of(t * N), **options)
    gradients = Case(device, t, N, K, 16, **options).computed()[1:]
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32, dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [9, 33, 256, 2048])
def test_a_dense_base(t, dtype, device, affordable):
    affordable(t, N, K)
    check(device, t, N, K, 16, dtype=dtype, kind="gelu", nf4=False, p=0.1, draws=draws_of(t * N))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n, k", [(191, 333), (1, 64), (17, 1000), (640, 1)], ids=str)
def test_odd_sizes(n, k, dtype, device):
    """Odd K, which goes through panels, one output, one input; rows of x that start anywhere."""
    check(device, 37, n, k, 5, dtype=dtype, kind="gelu", p=0.1, draws=draws_of(37 * min(n, k)))


@pytest.mark.parametrize("t", [9, 40, 600])
def test_non_contiguous_inputs_give_the_same_result(t, device, affordable):
    """The same bits, but where torch's GEMM may choose another kernel for other strides."""
    affordable(t, 192, 320)
    case = Case(device, t, 192, 320, 16, torch.bfloat16, p=0.1)
    wanted = case.computed()
    x, dy, A, B = case.x, case.dy, case.A, case.B

    def sliced(v):
        room = torch.zeros(v.shape[0], v.shape[1] + 7, dtype=v.dtype, device=device)
        room[:, 3:-4] = v
        return room[:, 3:-4]

    for change in (sliced, lambda v: v.T.contiguous().T):
        case.x, case.dy, case.A, case.B = map(change, (x, dy, A, B))
        for name, out, want in zip(NAMES, case.computed(), wanted, strict=True):
            assert torch.equal(out, want) if t <= ALL_FUSED else close(out, want), name


@pytest.mark.parametrize("t", [9, 600])
def test_every_subset_of_gradients(t, device, affordable):
    """What is asked for is right, whatever else is; None elsewhere."""
    affordable(t, 15 * 96, 192)
    case = Case(device, t, 96, 192, 8, torch.bfloat16, p=0.1)
    whole = case.computed()
    for wanted in range(1, 16):
        needs = [bool(wanted >> i & 1) for i in range(4)]
        y, *grads = case.computed(needs)
        assert torch.equal(y, whole[0])
        for need, grad, full in zip(needs, grads, whole[1:], strict=True):
            assert (grad is not None) == need
            if need:  # sums may be cut up otherwise where g or dB is not wanted
                assert close(grad, full)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("t", [4, 40, 300, 600])
def test_gradients_are_the_cpus(t, p, dtype, device, affordable):
    """Up to two roundings to the dtype: of results, and of h and g between them."""
    affordable(t, 192, 320)
    case = Case(device, t, 192, 320, 24, dtype, p=p, adapter_dtype=torch.float32)
    there = case.computed()
    with lk.use_backend("cpu"):
        here = case.moved("cpu").computed()
    for name, out, want in zip(NAMES, there, here, strict=True):
        assert out.dtype == want.dtype
        error = relative_error(out.cpu(), want.double())
        assert error <= 3 * torch.finfo(dtype).eps, f"{name}: {error:.2e}"


@pytest.mark.parametrize("shape", [(0, 320), (3, 0, 320)], ids=str)
def test_no_tokens_at_all(shape, device):
    weight = lk.nf4_quantize(torch.randn(64, 320, device=device, dtype=torch.bfloat16))
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    A = torch.randn(8, 320, device=device, requires_grad=True)
    B = torch.randn(64, 8, device=device, requires_grad=True)
    bias = torch.randn(64, device=device, requires_grad=True)
    y = lk.lora_linear(x, weight, A, B, bias=bias, dropout_p=0.1)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 64) and x.grad.shape == shape
    assert not A.grad.any() and not B.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [4, 40, 300, 600])
def test_two_runs_give_the_same_bits(t, dtype, device, affordable):
    affordable(t, 320, 576)
    case = Case(device, t, 320, 576, 24, dtype, p=0.1)
    first, second = case.computed(), case.computed()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

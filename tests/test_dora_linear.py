"""dora_linear: forward, norm and gradients on every backend, against the formula, float64 and PEFT."""

import copy

import pytest
import torch
from dora_case import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import INPUT_KINDS, LIMIT, assert_accurate, relative_error
from variants import VARIANTS, variant

import lora_kernels as lk
from lora_kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_forward_and_gradients_are_as_accurate_as_eager(kind, dtype, p, kernels):
    # dmagnitude has N values and dA, under an outlier channel, r that matter: one draw says little of either.
    cases = [Case(80, 160, 256, 16, dtype, kind, p) for _ in range(1 if dtype == torch.float32 else 8)]
    versions = [(c.computed(), c.expected(dtype), c.expected(torch.float64)) for c in cases]
    for i in range(6):
        out, eager, truth = (torch.cat([version[j][i] for version in versions]) for j in range(3))
        # dA and dmagnitude (of u rounded to the dtype) by torch's GEMM: 0.80 +- 0.05 and 0.84 +- 0.03 of the
        # limit in bf16, where eager is at 1.02 and 1.24.
        as_eager = kernels == "cpu-panels" and i in (2, 4)
        judged = {"as_eager": as_eager, "few": i >= 2, "concentrated": kind == "outlier channel"}
        assert_accurate(f"output {i}", out, eager, truth, dtype, **judged)


@pytest.mark.parametrize("nf4", [False, True])
def test_float32_adapters_on_a_16_bit_base(nf4, kernels):
    case = Case(40, 96, 128, 8, torch.bfloat16, nf4=nf4, adapter_dtype=torch.float32)
    for out, truth in zip(case.computed(), case.expected(torch.float64), strict=True):
        assert relative_error(out, truth) <= 2 * LIMIT[torch.bfloat16]
    assert case.computed()[2].dtype == torch.float32 and case.computed()[4].dtype == torch.float32


@pytest.mark.parametrize("delta", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("n", [64, 3000])
def test_norm_is_that_of_the_sum_which_is_never_made(delta, n, backend):
    """From a delta as small as at the start of a training to one that outweighs W0; several panels."""
    case = Case(1, n, 192, 4, torch.float32, delta=delta)
    w = case.weight
    parts = (w.packed, w.absmax, w.nested_absmax, w.offset, w.blocksize)
    _, _, norm = torch.ops.lora_kernels.dora_linear(
        case.x, *parts, n, case.A, case.B, case.m, case.s, None, 0.0, None
    )
    truth = (case.dense(torch.float64) + case.s * (case.B.double() @ case.A.double())).norm(dim=1)
    assert norm.dtype == torch.float32 and float(((norm - truth) / truth).abs().max()) < 2e-6


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_magnitude_at_the_norm_is_plain_lora(p, backend):
    case = Case(20, 48, 64, 4, torch.float32, p=p)
    case.m = reference.dora_norm(case.dense(torch.float32), case.A, case.B, case.s)
    options = {"scaling": case.s, "bias": case.bias, "dropout_p": p, "rng": case.rng}
    plain = lk.lora_linear(case.x, case.weight, case.A, case.B, **options)
    assert (
        relative_error(lk.dora_linear(case.x, case.weight, case.A, case.B, case.m, **options), plain.double())
        < 2e-6
    )


def test_equals_peft(kernels):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(48, 32))
    base = copy.deepcopy(model[0])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    m = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        m.mul_(torch.rand(32) + 0.5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(10, 48, requires_grad=True)
    weight, bias = base.weight.detach(), base.bias.detach()
    ours, theirs = lk.dora_linear(x, weight, A, B, m, scaling=1.5, bias=bias), layer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    dy, leaves = torch.randn_like(ours), (x, A, B, m)
    grads = zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    n=st.integers(0, 40),
    k=st.integers(1, 130),
    r=st.integers(1, 9),
    p=st.sampled_from((0.0, 0.3)),
    name=st.sampled_from(VARIANTS),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape(leading, n, k, r, p, name, seed):
    torch.manual_seed(seed)
    t = torch.Size(leading).numel()
    case = Case(t, n, k, r, torch.float32, p=p)
    case.x, case.dy = case.x.reshape(*leading, k), case.dy.reshape(*leading, n)
    with variant(name):
        outs = case.computed()
    assert outs[0].shape == (*leading, n) and outs[1].shape == case.x.shape
    case.x, case.dy = case.x.reshape(t, k), case.dy.reshape(t, n)
    for out, truth in zip(outs, case.expected(torch.float64), strict=True):
        torch.testing.assert_close(out.reshape(truth.shape).double(), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3, 20])
def test_no_inputs_and_no_outputs(nf4, tokens, backend):
    """K = 0: the norms are 0, but y is the bias, and magnitude / norm is in no output."""
    case = Case(tokens, 9, 0, 2, torch.float32, p=0.2, nf4=nf4)
    y, dx, dA, dB, dmagnitude, dbias = case.computed()
    assert torch.equal(y, case.bias.expand(tokens, 9)) and dx.shape == (tokens, 0) and dA.shape == (2, 0)
    assert not dB.any() and not dmagnitude.any() and torch.allclose(dbias, case.dy.sum(dim=0))
    y, dx, dA, dB, dmagnitude, _ = Case(tokens, 0, 128, 2, torch.float32, nf4=nf4).computed()
    assert y.shape == (tokens, 0) and dB.shape == (0, 2) and not dx.any() and not dA.any()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_tokens(p, backend):
    """The norms are computed all the same, and K is one that the kernel of few tokens would take."""
    case = Case(0, 160, 256, 4, torch.float32, p=p)
    y, dx, *rest = case.computed()
    assert y.shape == (0, 160) and dx.shape == (0, 256) and not any(grad.any() for grad in rest)
    w = case.weight
    parts = (w.packed, w.absmax, w.nested_absmax, w.offset, w.blocksize)
    others = (160, case.A, case.B, case.m, case.s, case.bias, case.p, case.rng)
    norm = torch.ops.lora_kernels.dora_linear(case.x, *parts, *others)[2]
    truth = reference.dora_norm(case.dense(torch.float64), case.A.double(), case.B.double(), case.s)
    torch.testing.assert_close(norm.double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_the_specification(p):
    """The norm is a constant: autograd through the forward, which detaches it, must agree."""
    case = Case(4, 5, 6, 2, torch.float32, p=p, nf4=False)
    leaves = [v.double().requires_grad_() for v in (case.x, case.A, case.B, case.m, case.bias)]
    x, A, B, m, bias = leaves
    weight, dy = case.dense(torch.float64), case.dy.double()
    y, h, norm = reference.dora_linear(x, weight, A, B, m, case.s, bias, p, case.rng)
    wanted = torch.autograd.grad(y, leaves, dy)
    arguments = (dy, x, h, norm, weight, A, B, m, case.s, p, case.rng)
    for got, want in zip(reference.dora_linear_backward(*arguments), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_op_is_registered_properly():
    case = Case(5, 12, 64, 3, torch.float32)
    w = case.weight
    parts = (w.packed, w.absmax, w.nested_absmax, w.offset, w.blocksize)
    A, m = case.A.clone().requires_grad_(), case.m.clone().requires_grad_()
    arguments = (case.x, *parts, 12, A, case.B, m, 0.5, case.bias, 0.0, None)
    torch.library.opcheck(torch.ops.lora_kernels.dora_linear.default, arguments)


def test_compiles_without_a_graph_break():
    case = Case(6, 16, 64, 3, torch.float32)
    m = case.m.clone().requires_grad_()

    def run(x):
        return lk.dora_linear(x, case.weight, case.A, case.B, m, scaling=0.5).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.x), run(case.x))
    (a,), (b,) = (torch.autograd.grad(f(case.x).sum(), m) for f in (compiled, run))
    torch.testing.assert_close(a, b)


def test_bad_arguments_are_named(backend):
    case = Case(4, 8, 64, 2, torch.float32)
    for m, error, message in (
        (case.m[:5], ValueError, r"magnitude has shape \(5,\)"),
        (case.m.int(), TypeError, "magnitude has dtype torch.int32"),
    ):
        with pytest.raises(error, match=message):
            lk.dora_linear(case.x, case.weight, case.A, case.B, m)
    with pytest.raises(ValueError, match="lora_B has shape"):
        lk.dora_linear(case.x, case.weight, case.A, case.B.T, case.m)

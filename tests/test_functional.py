"""What autograd sees of lora_linear: which gradients, what is saved, autocast, compile, and errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

T, N, K, R = 12, 40, 64, 4


def problem(dtype=torch.float32, adapter_dtype=None):
    adapter_dtype = adapter_dtype or dtype
    weight = lk.nf4_quantize(torch.randn(N, K).to(dtype))
    A, B = torch.randn(R, K).to(adapter_dtype), torch.randn(N, R).to(adapter_dtype)
    return torch.randn(T, K).to(dtype), weight, A, B, torch.randn(N).to(dtype)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_the_gradients_that_are_needed_are_computed(wanted, monkeypatch):
    """Each subset of {x, A, B, bias}: the right gradients, and the backward op is asked for no others."""
    from lora_kernels.backends import cpu

    asked, real = [], cpu.lora_linear_backward

    def recording(*args):
        asked.append(tuple(out is not None for out in args[9:]))
        assert (args[1] is not None) == (args[10] is not None)  # x exactly for dA
        assert (args[2] is not None) == (args[11] is not None)  # h exactly for dB
        return real(*args)

    monkeypatch.setattr(cpu, "lora_linear_backward", recording)
    x, weight, A, B, bias = problem()
    leaves = [x, A, B, bias]
    flags = tuple(bool(wanted >> i & 1) for i in range(4))
    for leaf, flag in zip(leaves, flags, strict=True):
        leaf.requires_grad_(flag)
    y = lk.lora_linear(x, weight, A, B, scaling=0.5, bias=bias)
    y.square().sum().backward()
    assert asked == [flags]
    full = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    lk.lora_linear(full[0], weight, full[1], full[2], scaling=0.5, bias=full[3]).square().sum().backward()
    for leaf, flag, whole in zip(leaves, flags, full, strict=True):
        if flag:
            torch.testing.assert_close(leaf.grad, whole.grad)
        else:
            assert leaf.grad is None


def saved_tensors(needs):
    x, weight, A, B, bias = problem()
    for leaf, flag in zip((x, A, B, bias), needs, strict=True):
        leaf.requires_grad_(flag)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lk.lora_linear(x, weight, A, B, bias=bias, dropout_p=0.3)
    y.sum().backward()
    own = {t.data_ptr() for t in (A, B, *weight.tensors().values())}
    return [tuple(t.shape) for t in saved if t.data_ptr() not in own], x


def test_saved_for_backward_is_x_h_and_the_rng_and_nothing_of_size_t_n():
    assert sorted(saved_tensors((True, True, True, True))[0]) == [(2,), (T, R), (T, K)]


def test_x_is_saved_only_for_dA_and_h_only_for_dB():
    assert sorted(saved_tensors((True, False, True, False))[0]) == [(2,), (T, R)]
    assert sorted(saved_tensors((True, True, False, False))[0]) == [(2,), (T, K)]
    assert sorted(saved_tensors((True, False, False, False))[0]) == [(2,)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_same_mask(use_reentrant):
    x, weight, A, B, bias = problem()

    def run(recompute):
        torch.manual_seed(3)
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]

        def f(x):
            return lk.lora_linear(x, weight, leaves[1], leaves[2], bias=bias, dropout_p=0.5)

        y = checkpoint(f, leaves[0], use_reentrant=use_reentrant) if recompute else f(leaves[0])
        y.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_retain_graph_and_two_uses_of_the_same_weights():
    x, weight, A, B, _ = problem()
    A.requires_grad_()
    B.requires_grad_()
    y = lk.lora_linear(x, weight, A, B)
    y.sum().backward(retain_graph=True)
    once = A.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(A.grad, 2 * once)
    A.grad = None
    both = lk.lora_linear(x, weight, A, B).sum() + lk.lora_linear(2 * x, weight, A, B).sum()
    both.backward()
    torch.testing.assert_close(A.grad, 3 * once)


def test_saved_tensors_may_move_to_another_place():
    x, weight, A, B, _ = problem()
    grads = []
    for moved in (False, True):
        a = A.clone().requires_grad_()
        if moved:
            with torch.autograd.graph.save_on_cpu():
                y = lk.lora_linear(x, weight, a, B)
        else:
            y = lk.lora_linear(x, weight, a, B)
        y.sum().backward()
        grads.append(a.grad)
    assert torch.equal(*grads)


def test_changing_a_saved_tensor_before_backward_is_noticed():
    x, weight, A, B, _ = problem()
    A.requires_grad_()
    y = lk.lora_linear(x, weight, A, B)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_result_may_be_changed_in_place():
    """It is no view of anything: AdaLoRA and mixed batches write into it."""
    x, weight, A, B, _ = problem()
    A.requires_grad_()
    y = lk.lora_linear(x, weight, A, B)
    y[::2] += 1
    y.mul_(2)
    y.sum().backward()
    assert A.grad is not None and y._base is None


def test_double_backward_is_refused_with_a_reason():
    x, weight, A, B, _ = problem()
    x.requires_grad_()
    y = lk.lora_linear(x, weight, A, B)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(adapter_dtype):
    x, weight, A, B, bias = problem(torch.float32, adapter_dtype)
    leaves = [t.requires_grad_() for t in (x, A, B, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lk.lora_linear(x, weight, A, B, bias=bias)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    direct = lk.lora_linear(x.detach().bfloat16(), weight, A, B, bias=bias)
    assert torch.equal(y, direct)


def test_autocast_casts_a_dense_weight_too():
    x, _, A, B, _ = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lk.lora_linear(x, torch.randn(N, K), A, B).dtype == torch.bfloat16


def test_reference_backend_is_not_touched_by_autocast():
    x, weight, A, B, _ = problem()
    parts = (*weight.base_weight()[:5], N, A, B, 1.0, None, 0.0, None)
    with lk.use_backend("reference"):
        plain = torch.ops.lora_kernels.lora_linear(x, *parts)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = torch.ops.lora_kernels.lora_linear(x, *parts)[0]
    assert under.dtype == torch.float32 and torch.equal(plain, under)


def test_no_grad_and_inference_mode():
    x, weight, A, B, _ = problem()
    A.requires_grad_()
    with torch.no_grad():
        plain = lk.lora_linear(x, weight, A, B)
    with torch.inference_mode():
        fast = lk.lora_linear(x, weight, A, B)
    assert not plain.requires_grad and torch.equal(plain, fast)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    torch._dynamo.reset()
    x, weight, A, B, bias = problem()

    def f(x, A, B):
        y = lk.lora_linear(x, weight, A, B, scaling=0.5, bias=bias, dropout_p=0.2, rng=torch.tensor([1, 2]))
        return torch.nn.functional.gelu(y)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (T, T - 5):
        results = []
        for function in (f, compiled):
            leaves = [t.clone().requires_grad_() for t in (x[:tokens], A, B)]
            y = function(*leaves)
            y.square().sum().backward()
            results.append([y, *(leaf.grad for leaf in leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_float64_needs_the_reference_backend():
    x, weight, A, B, _ = (t.double() if isinstance(t, torch.Tensor) else t for t in problem())
    with pytest.raises(TypeError, match="float64"):
        lk.lora_linear(x, weight, A, B)
    with lk.use_backend("reference"):
        assert lk.lora_linear(x, weight, A, B).dtype == torch.float64


def test_gradcheck_of_the_public_function_in_float64():
    weight = lk.nf4_quantize(torch.randn(5, 7))
    rng = torch.tensor([1, 2])
    leaves = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (2, 7), (5, 2), (5,))
    ]
    with lk.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, A, B, b: lk.lora_linear(x, weight, A, B, scaling=0.7, bias=b, dropout_p=0.3, rng=rng),
            leaves,
        )


BAD = [
    ({"x": torch.randn(3, K + 1)}, ValueError, "x has last dimension 65"),
    ({"x": torch.randn(3, K).double()}, TypeError, "float64"),
    ({"x": torch.ones(3, K, dtype=torch.long)}, TypeError, "x has dtype torch.int64"),
    ({"x": torch.tensor(1.0)}, ValueError, "x has no dimensions"),
    ({"x": torch.randn(3, K, device="meta")}, ValueError, "weight is on cpu"),
    ({"A": torch.randn(R, K + 1)}, ValueError, "lora_A has shape"),
    ({"A": torch.randn(0, K), "B": torch.randn(N, 0)}, ValueError, "rank 0"),
    ({"A": torch.randn(K)}, ValueError, "lora_A has 1 dimensions"),
    ({"B": torch.randn(N, R + 1)}, ValueError, "lora_B has shape"),
    ({"B": torch.ones(N, R, dtype=torch.int8)}, TypeError, "lora_B has dtype torch.int8"),
    ({"B": None}, ValueError, "lora_A and lora_B go together"),
    ({"bias": torch.randn(N + 1)}, ValueError, "bias has shape"),
    ({"scaling": float("nan")}, ValueError, "scaling is nan"),
    ({"scaling": float("inf")}, ValueError, "scaling is inf"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    ({"dropout_p": 0.1, "rng": torch.tensor([1.0, 2.0])}, TypeError, "rng has dtype torch.float32"),
    ({"dropout_p": 0.1, "rng": torch.tensor([1])}, ValueError, "rng has shape"),
    ({"weight": torch.randn(N, K, dtype=torch.bfloat16)}, TypeError, "weight .x is torch.float32."),
    ({"weight": torch.randn(N, K, requires_grad=True)}, ValueError, "weight requires a gradient"),
    ({"weight": torch.randn(N)}, ValueError, "N = -1|weight has shape"),
    ({"weight": [1, 2]}, TypeError, "weight is a list"),
    ({"x": [1.0, 2.0]}, TypeError, "x is a list, expected a Tensor"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments_are_named(changed, error, message):
    x, weight, A, B, bias = problem()
    arguments = {"x": x, "weight": weight, "A": A, "B": B, "bias": bias, "scaling": 1.0, **changed}
    positional = [arguments.pop(name) for name in ("x", "weight", "A", "B")]
    with pytest.raises(error, match=message):
        lk.lora_linear(*positional, **arguments)


def test_function_transforms_are_refused_and_not_wrong():
    """jvp would give a tangent of zero: a registered op has no forward derivative."""
    x, weight, A, B, _ = problem()
    index = torch.zeros(x.shape[:-1], dtype=torch.int64)
    calls = {
        "lora_linear": lambda a: lk.lora_linear(x, weight, a, B).sum(),
        "lora_linear_batched": lambda a: lk.lora_linear_batched(x, weight, [a], [B], [1.0], index).sum(),
        "dora_linear": lambda a: lk.dora_linear(x, weight, a, B, torch.ones(weight.shape[0])).sum(),
    }
    for op, call in calls.items():
        for transform in (
            lambda f: torch.func.grad(f)(A),
            lambda f: torch.func.vjp(f, A),
            lambda f: torch.func.jvp(f, (A,), (A,)),
            lambda f: torch.func.grad(lambda a: torch.func.vmap(lambda _: f(a))(torch.ones(2)).sum())(A),
        ):
            with pytest.raises(RuntimeError, match=f"^{op}: the transforms of torch.func .*reference.{op}"):
                transform(call)

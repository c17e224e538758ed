"""FusedLoRALinear: how it starts, what it computes and saves, its adapters, and its errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import BASES, DTYPES, K, N, R, T, assert_same_tensors, gradients, make, parts, truth
from numerics import LIMIT, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import FusedLoRALinear


@pytest.fixture(params=BASES)
def base(request):
    return request.param


# ---- how it starts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_starts_exactly_equal_to_its_base(base, dtype, tokens):
    """B = 0, so not one bit of any output may differ, with dropout as well."""
    linear = nn.Linear(K, N, dtype=dtype)
    layer = FusedLoRALinear.from_linear(linear, r=R, lora_dropout=0.3, **BASES[base])
    alone = FusedLoRALinear.from_linear(linear, r=None, **BASES[base])
    x = torch.randn(tokens, K).to(dtype)
    assert torch.equal(layer(x), alone(x))
    weight = layer.dequantized_weight(torch.float32).double()
    assert (
        relative_error(layer(x), nn.functional.linear(x.double(), weight, layer.bias.double()))
        <= LIMIT[dtype]
    )
    if base == "dense":
        assert torch.equal(layer.weight, linear.weight)


def test_A_starts_kaiming_uniform_as_in_peft():
    """Uniform on ±1/√K, which is Kaiming-uniform with a = √5: the moments of PEFT's own initialisation."""
    peft = pytest.importorskip("peft")
    k, r = 1000, 50
    ours = FusedLoRALinear(k, 8, r=r).lora_A["default"].weight
    host = nn.Sequential(nn.Linear(k, 8))
    theirs = peft.get_peft_model(host, peft.LoraConfig(r=r, target_modules=["0"])).base_model.model[0]
    bound = k**-0.5
    for A in (ours, theirs.lora_A["default"].weight):
        assert A.abs().max() <= bound and A.abs().max() > 0.999 * bound
        # mean and mean square of n uniform values: standard errors bound/√(3n) and bound²·√(4/45n)
        n = A.numel()
        assert abs(A.mean()) < 6 * bound / (3 * n) ** 0.5
        assert abs(A.square().mean() - bound**2 / 3) < 6 * bound**2 * (4 / 45 / n) ** 0.5
    assert not FusedLoRALinear(k, 8, r=r).lora_B["default"].weight.any()


def test_gaussian_init_has_standard_deviation_1_over_r():
    k, r = 1000, 50
    layer = FusedLoRALinear(k, 8, r=r, init_lora_weights="gaussian")
    A = layer.lora_A["default"].weight
    assert abs(A.std() * r - 1) < 6 * (2 * k * r) ** -0.5
    assert A.abs().max() * r > 3  # a normal has tails; the uniform of this variance ends at 1.73
    assert not layer.lora_B["default"].weight.any()


def test_init_false_starts_with_a_B_that_is_not_zero():
    assert FusedLoRALinear(K, N, r=R, init_lora_weights=False).lora_B["default"].weight.all()


def test_scaling_is_alpha_over_r_or_over_its_root_with_rslora(base):
    x = torch.randn(T, K)
    for options, s in (
        ({"lora_alpha": 6}, 6 / 4),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2),
        ({}, 2.0),  # lora_alpha is 2·r unless given
    ):
        layer = make(base, r=4, **options)
        assert layer.scaling == {"default": s}
        assert relative_error(layer(x), truth(layer, x)) <= LIMIT[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_float32_over_a_16_bit_base_unless_asked(base, dtype):
    assert make(base, dtype=dtype).lora_A["default"].weight.dtype == torch.float32
    half = make(base, dtype=dtype, adapter_dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.bfloat16}


def test_only_the_adapter_is_trainable(base):
    layer = make(base)
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trainable == ["lora_A.default.weight", "lora_B.default.weight"]


# ---- forward and gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_computes_the_formula_and_its_gradients(base, dtype, bias):
    layer = make(base, dtype=dtype, bias=bias, lora_alpha=3)
    assert (layer.bias is not None) == bias
    if bias:
        nn.init.normal_(layer.bias)
    x, dy = torch.randn(T, K).to(dtype), torch.randn(T, N).to(dtype)
    got = gradients(layer, x, dy)
    exact = copy.deepcopy(layer).double()
    weight = layer.dequantized_weight(torch.float32)
    expected = gradients(exact, x.double(), dy.double(), run=lambda x: truth(exact, x, weight))
    assert got.keys() == expected.keys() == {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}
    for name in got:
        assert relative_error(got[name], expected[name]) <= LIMIT[dtype], name
        assert got[name].dtype == (torch.float32 if "lora" in name else dtype)


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    r=st.integers(1, 9),
    quantize=st.sampled_from([None, "nf4"]),
    layout=st.sampled_from(["contiguous", "strided", "transposed", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_any_rank_shape_and_layout_of_x(leading, k, n, r, quantize, layout, seed):
    """1 to 4 dimensions, no tokens, stride 0; the gradient of y.sum() is itself expanded."""
    torch.manual_seed(seed)
    layer = FusedLoRALinear(k, n, r=r, quantize=quantize, init_lora_weights=False)
    if layout == "strided":
        x = torch.randn(*leading, 2 * k)[..., ::2]
    elif layout == "transposed":
        x = torch.randn(k, *leading).movedim(0, -1)
    elif layout == "expanded":
        x = torch.randn(*(1 for _ in leading), k).expand(*leading, k)
    else:
        x = torch.randn(*leading, k)
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.sum().backward()
    assert y.shape == (*leading, n) and leaf.grad.shape == x.shape
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact, a, b = (t.detach().double().requires_grad_() for t in (x, A, B))
    weight = layer.dequantized_weight(torch.float32).double()
    expected = exact @ weight.T + layer.bias.double() + 2.0 * (exact @ a.T) @ b.T
    expected.sum().backward()
    # A single element may cancel to nearly zero, so errors are relative to the largest terms of a sum: at
    # most K + r + 2 of them for y (N, T for gradients), each rounded to 2**-24.
    for got, want in ((y, expected), (leaf.grad, exact.grad), (A.grad, a.grad), (B.grad, b.grad)):
        terms = k + n + r + x.numel() // k + 2
        largest = 16 * float(want.abs().max() if want.numel() else 0) + 16
        assert torch.allclose(got.double(), want, rtol=0, atol=terms * 2**-24 * largest)


def test_no_grad_and_inference_mode_give_the_same_outputs(base):
    layer, x = make(base), torch.randn(T, K)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected) and not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_graph_can_be_used_twice_and_the_layer_twice_in_a_graph():
    layer = FusedLoRALinear(K, K, r=R, quantize="nf4", init_lora_weights=False)
    exact = copy.deepcopy(layer).double()
    weight = layer.dequantized_weight(torch.float32)
    x = torch.randn(T, K)
    got = gradients(layer, x, run=lambda x: layer(layer(x)))
    expected = gradients(exact, x.double(), run=lambda x: truth(exact, truth(exact, x, weight), weight))
    for name in expected:  # two layers, one after the other, add their errors
        assert relative_error(got[name], expected[name]) <= 2 * LIMIT[torch.float32], name
    y = layer(x)
    layer.zero_grad()
    y.sum().backward(retain_graph=True)
    once = layer.lora_A["default"].weight.grad.clone()
    y.sum().backward()
    assert torch.equal(layer.lora_A["default"].weight.grad, 2 * once)


def saved_by(layer, x):
    """What autograd keeps of one forward, without the layer's own tensors."""
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    y.sum().backward()
    return [t for t in saved if t.data_ptr() not in own]


def test_saves_x_only_for_A_and_nothing_as_large_as_y(base):
    layer = make(base, lora_dropout=0.3)
    assert N not in (R, K, T)
    x = torch.randn(3, T, K, requires_grad=True)
    saved = saved_by(layer, x)
    assert sorted(t.numel() for t in saved) == sorted([2, 3 * T * R, 3 * T * K])  # rng, h, x
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    layer.lora_A["default"].requires_grad_(False)
    assert sorted(t.numel() for t in saved_by(layer, x)) == [2, 3 * T * R]


def test_gradients_are_the_same_when_saved_tensors_are_moved(base):
    layer, x = make(base), torch.randn(T, K)
    expected = gradients(layer, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same_tensors(gradients(layer, x), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.clone(),), lambda packed: packed[0]):
        assert_same_tensors(gradients(layer, x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients_with_dropout(use_reentrant, base, seed):
    layer, x = make(base, lora_dropout=0.4), torch.randn(T, K)
    block = nn.Sequential(layer, nn.GELU(), nn.Linear(N, 8))
    results = []
    for recompute in (False, True):
        torch.manual_seed(seed)
        run = (lambda x: checkpoint(block, x, use_reentrant=use_reentrant)) if recompute else block
        results.append(gradients(block, x, run=run))
    assert_same_tensors(results[1], results[0])
    torch.manual_seed(seed + 1)
    assert not torch.equal(gradients(block, x)["x"], results[0]["x"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_bfloat16_and_leaves_gradients_in_float32(base, dtype):
    """float32 adapters over a base of either dtype; the backward may run inside or outside of the context."""
    layer, x, dy = make(base, dtype=dtype), torch.randn(T, K), torch.randn(T, N).bfloat16()
    results = []
    for inside in (True, False):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(leaf)
            if inside:
                y.backward(dy)
        if not inside:
            y.backward(dy)
        assert y.dtype == torch.bfloat16
        results.append(
            {"x": leaf.grad} | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        )
        assert {t.dtype for t in results[-1].values()} == {torch.float32}
    assert_same_tensors(*results)
    assert (
        relative_error(y, truth(layer, x)) <= 2 * LIMIT[torch.bfloat16]
    )  # weights and x are rounded as well
    weight = layer.base_weight() if layer.quantize else layer.weight.bfloat16()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    direct = lk.lora_linear(x.bfloat16(), weight, A, B, scaling=2.0, bias=layer.bias)
    assert torch.equal(y, direct)


def test_training_loop_reduces_the_loss(base):
    """A rank-4 change of the base is learnt by a rank-4 adapter, to a hundredth of the first loss."""
    layer = FusedLoRALinear(K, N, r=4, **BASES[base])
    x = torch.randn(256, K)
    with torch.no_grad():
        change = (torch.randn(N, 4) @ torch.randn(4, K)) / K**0.5
        target = layer(x) + x @ change.T
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=3e-2, weight_decay=0)
    before = parts(layer)
    losses = []
    for _ in range(120):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert_same_tensors(parts(layer), before)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compiles_without_a_graph_break(p, seed):
    torch._dynamo.reset()
    layer = make("nested", lora_dropout=p)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (T, T + 3):
        x = torch.randn(tokens, K)
        results = []
        for run in (layer, compiled):
            torch.manual_seed(seed)
            results.append(gradients(layer, x, run=run))
        for name, expected in results[0].items():
            assert relative_error(results[1][name], expected.double()) <= LIMIT[torch.float32], name


# ---- dropout -----------------------------------------------------------------------------------------------


def mask_layer(p):
    """y = s·dropout(x)/(1-p): W0 = 0, A = B = identity."""
    layer = FusedLoRALinear(64, 64, r=64, lora_alpha=48, lora_dropout=p, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(64))
        layer.lora_B["default"].weight.copy_(torch.eye(64))
    return layer


def test_dropout_zeroes_a_share_p_and_scales_the_rest():
    p, s, n = 0.3, 48 / 64, 512 * 64
    y = mask_layer(p)(torch.ones(512, 64))
    kept = y != 0
    assert torch.allclose(y[kept], torch.tensor(s / (1 - p)), rtol=2**-22, atol=0)
    assert abs(kept.float().mean() - (1 - p)) < 6 * (p * (1 - p) / n) ** 0.5


def test_dropout_is_drawn_afresh_by_every_call_and_every_layer():
    """Were q and k to share a mask, the share of equal elements would be 1 and not (1-p)² + p²."""
    p, n = 0.5, 512 * 64
    first, x = mask_layer(p), torch.ones(512, 64)
    second = copy.deepcopy(first)
    masks = [first(x) != 0, first(x) != 0, second(x) != 0]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[i] == masks[j]).float().mean() - 0.5) < 6 * 0.5 / n**0.5


def test_dropout_follows_torchs_seed(base, seed):
    layer, x = make(base, lora_dropout=0.5), torch.randn(T, K)
    results = []
    for value in (seed, seed, seed + 1):
        torch.manual_seed(value)
        results.append(gradients(layer, x))
    assert_same_tensors(results[1], results[0])
    assert not torch.equal(results[2]["y"], results[0]["y"])


def test_dropout_is_off_in_eval_mode_and_leaves_the_generator_alone(base):
    layer, x = make(base, lora_dropout=0.5).eval(), torch.randn(T, K)
    before = torch.get_rng_state()
    y = layer(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert relative_error(y, truth(layer, x)) <= LIMIT[torch.float32]
    assert not torch.equal(layer.train()(x), y)


def test_gradients_use_the_mask_of_the_forward():
    p = 0.5
    layer, x = mask_layer(p), torch.randn(32, 64)
    got = gradients(layer, x)
    mask = (got["y"] != 0).double() * (48 / 64) / (1 - p)
    assert relative_error(got["x"], mask) <= LIMIT[torch.float32]
    dA = mask.new_ones(64, 32) @ (mask * x.double())
    assert relative_error(got["lora_A.default.weight"], dA) <= LIMIT[torch.float32]


# ---- from_linear -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_leaves_the_given_layer_as_it_was(base, training):
    linear = nn.Linear(K, N).train(training)
    before = copy.deepcopy(linear.state_dict())
    layer = FusedLoRALinear.from_linear(linear, r=R, **BASES[base])
    assert_same_tensors(linear.state_dict(), before)
    assert all(p.requires_grad for p in linear.parameters()) and type(linear) is nn.Linear
    assert layer.training == training and layer.lora_A.training == training
    assert not layer.weight.requires_grad and not layer.bias.requires_grad


def test_a_weight_may_be_quantised_on_another_device():
    """On "meta", which computes nothing, so that nothing can come back."""
    linear = nn.Linear(K, N)
    for quantize_on_meta in (
        lambda: FusedLoRALinear.from_linear(linear, r=R, quantize="nf4", quantize_device="meta"),
        lambda: lk.inject(nn.Sequential(linear), r=R, quantize="nf4", quantize_device="meta"),
    ):
        with pytest.raises(NotImplementedError, match="meta"):
            quantize_on_meta()
    assert FusedLoRALinear.from_linear(linear, r=R, quantize_device="meta").weight.device.type == "cpu"


def test_from_linear_shares_a_dense_weight_and_not_a_quantised_one():
    linear = nn.Linear(K, N)
    shared = FusedLoRALinear.from_linear(linear, r=R)
    assert shared.weight.data_ptr() == linear.weight.data_ptr()
    assert shared.bias.data_ptr() == linear.bias.data_ptr()
    packed = FusedLoRALinear.from_linear(linear, r=R, quantize="nf4")
    assert_same_tensors({"weight": packed.weight}, {"weight": lk.nf4_quantize(linear.weight).packed})


@pytest.mark.parametrize(
    "other", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.Bilinear(4, 4, 4), nn.Identity()]
)
def test_from_linear_names_a_layer_it_cannot_take(other):
    with pytest.raises(TypeError, match=f"{type(other).__name__}, expected nn.Linear"):
        FusedLoRALinear.from_linear(other)


def test_from_linear_refuses_a_weight_that_holds_codes():
    """A subclass of nn.Linear may keep packed integers in `weight` (quantisers do); they are no matrix."""
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(torch.zeros(N * K // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises((TypeError, ValueError), match="uint8"):
        FusedLoRALinear.from_linear(linear, r=None)


# ---- several adapters --------------------------------------------------------------------------------------


def test_one_of_several_adapters_is_active(base):
    layer, x = make(base), torch.randn(T, K)
    plain = FusedLoRALinear(K, N, r=None, **BASES[base])
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora_" not in k})
    assert plain.active_adapter is None
    layer.add_adapter("math", 7, 3, init_lora_weights=False)
    assert layer.active_adapter == "default"
    outputs = {}
    for name in ("default", "math", None):
        layer.set_adapter(name)
        outputs[name] = layer(x)
        assert relative_error(outputs[name], truth(layer, x)) <= LIMIT[torch.float32]
    assert torch.equal(outputs[None], plain(x))
    assert not torch.equal(outputs["math"], outputs["default"])
    layer.set_adapter("math")
    got = gradients(layer, x)
    assert set(got) == {"y", "x", "lora_A.math.weight", "lora_B.math.weight"}
    layer.delete_adapter("math")
    assert layer.active_adapter is None and list(layer.lora_A) == list(layer.lora_B) == ["default"]
    assert torch.equal(layer(x), outputs[None])
    layer.set_adapter("default")
    assert torch.equal(layer(x), outputs["default"])


def test_adapter_names_that_do_not_exist_or_are_taken_are_named():
    layer = make()
    for call in (layer.set_adapter, layer.delete_adapter, layer.delta_weight):
        with pytest.raises(ValueError, match="no adapter 'math'; there are: 'default'"):
            call("math")
    with pytest.raises(ValueError, match="'default' exists already"):
        layer.add_adapter("default", 2)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "train", "half"])
def test_adapter_names_that_a_module_cannot_have_are_refused(name):
    layer = make()
    with pytest.raises(ValueError, match="adapter name"):
        layer.add_adapter(name, 2)
    assert list(layer.adapter_specs) == list(layer.lora_A) == list(layer.lora_B) == ["default"]


# ---- errors ------------------------------------------------------------------------------------------------

BAD = [
    ({"r": 0}, ValueError, "r is 0"),
    ({"r": -1}, ValueError, "r is -1"),
    ({"r": 2.0}, ValueError, "r is 2.0"),
    ({"r": True}, ValueError, "r is True"),
    ({"r": "4"}, ValueError, "r is '4'"),
    ({"lora_alpha": float("nan")}, ValueError, "lora_alpha is nan"),
    ({"lora_alpha": float("inf")}, ValueError, "lora_alpha is inf"),
    ({"lora_alpha": "16"}, (TypeError, ValueError), "lora_alpha"),
    ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0"),
    ({"lora_dropout": -0.1}, ValueError, "lora_dropout is -0.1"),
    ({"lora_dropout": float("nan")}, ValueError, "lora_dropout is nan"),
    ({"lora_dropout": None}, (TypeError, ValueError), "lora_dropout"),
    ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": None}, ValueError, "init_lora_weights is None"),
    ({"quantize": "fp4"}, ValueError, "quantize is 'fp4'"),
    ({"quantize": "nf4", "blocksize": 48}, ValueError, "blocksize is 48"),
    ({"quantize": "nf4", "blocksize": 16}, ValueError, "blocksize is 16"),
    ({"quantize": "nf4", "dtype": torch.float64}, TypeError, "float64"),
    ({"adapter_dtype": torch.int8}, (TypeError, ValueError), "dtype"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        FusedLoRALinear(K, N, **{"r": R} | options)


def test_bad_inputs_are_named(base):
    layer = make(base)
    with pytest.raises(ValueError, match=f"x has last dimension {K + 1}"):
        layer(torch.randn(T, K + 1))
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        layer(torch.ones(T, K, dtype=torch.long))
    if base == "dense":
        with pytest.raises(TypeError, match="weight .x is torch.bfloat16. has dtype torch.float32"):
            layer(torch.randn(T, K).bfloat16())


def test_integers_are_refused_under_autocast_as_without():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="x has dtype torch.int64"),
    ):
        make()(torch.ones(T, K, dtype=torch.long))


def test_a_weight_that_is_not_finite_is_refused_by_quantisation():
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="weight holds a NaN"):
        FusedLoRALinear.from_linear(linear, r=R, quantize="nf4")


def test_the_layers_result_on_the_reference_backend_agrees(base):
    layer, x = make(base, lora_dropout=0.3), torch.randn(T, K)
    rng_state = torch.get_rng_state()
    ours = gradients(layer, x)
    torch.set_rng_state(rng_state)
    with lk.use_backend("reference"):
        theirs = gradients(layer, x)
    for name in ours:
        assert relative_error(ours[name], theirs[name].double()) <= LIMIT[torch.float32], name

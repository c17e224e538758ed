"""FusedLoRALinear as state: copies, files, state dicts, casts, and what it refuses to load."""

import copy
import io
import json
import pickle

import pytest
import torch
from linear_cases import BASES, STATE, K, N, T, assert_same_tensors, gradients, make, parts, truth
from numerics import LIMIT, relative_error
from torch import nn

import lora_kernels as lk


@pytest.fixture(params=BASES)
def base(request):
    return request.param


# ---- copies, files, state dicts ----------------------------------------------------------------------------


def through_torch_save(thing, weights_only):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: through_torch_save(layer, weights_only=False),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_equal_and_share_nothing(base, how, merged):
    layer = make(base, r=3, lora_alpha=5, lora_dropout=0.25, use_rslora=True)
    layer.add_adapter("math", 2, 7)
    layer.set_adapter("math")
    nn.init.normal_(layer.lora_B["math"].weight)
    layer.eval()
    if merged:
        layer.merge()
    twin, x = COPIES[how](layer), torch.randn(T, K)
    assert_same_tensors(twin.state_dict(), layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert twin.adapter_specs == layer.adapter_specs and repr(twin) == repr(layer)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    assert own.isdisjoint(t.data_ptr() for t in (*twin.parameters(), *twin.buffers()))


@pytest.mark.parametrize(("assign", "device"), [(False, "cpu"), (True, "cpu"), (True, "meta")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_exact_and_strict(base, assign, device, dtype):
    layer, fresh = make(base, dtype=dtype), make(base, dtype=dtype, device=device)
    state = through_torch_save(layer.state_dict(), weights_only=True)
    assert fresh.load_state_dict(state, assign=assign) == ([], [])
    assert_same_tensors(fresh.state_dict(), layer.state_dict())
    assert_same_tensors(parts(fresh), parts(layer))
    x = torch.randn(T, K).to(dtype)
    assert torch.equal(fresh(x), layer(x))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in layer.parameters()]


def test_state_dict_keys_are_bitsandbytes_and_pefts():
    model = nn.ModuleDict({"block": nn.Sequential(nn.ReLU(), make("nested"))})
    extra = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    names = [
        "weight",
        *(f"weight.{e}" for e in extra),
        "bias",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]
    assert set(model.state_dict()) == {f"block.1.{name}" for name in names}
    dense = {"weight", "bias", "lora_A.default.weight", "lora_B.default.weight"}
    assert set(make("dense").state_dict()) == dense
    other = nn.ModuleDict({"block": nn.Sequential(nn.ReLU(), make("nested"))})
    other.load_state_dict(model.state_dict())
    assert_same_tensors(other.state_dict(), model.state_dict())


def test_assign_takes_over_the_dtype_of_a_dense_weight():
    layer = make("dense")
    layer.load_state_dict({k: v.bfloat16() for k, v in layer.state_dict().items()}, assign=True)
    x = torch.randn(T, K).bfloat16()
    y = layer(x)
    assert layer.base_dtype == layer.weight.dtype == torch.bfloat16
    layer.merge()
    assert layer(x).dtype == y.dtype


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", ["nested", "plain"])
def test_merging_after_a_cast_gives_a_weight_of_the_new_dtype(base, bias):
    for before, after in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x = torch.randn(T, K).to(after)
        layer = make(base, dtype=before, bias=bias).to(after)
        y = layer(x)
        layer.merge()
        assert layer.base_dtype == layer.merged_weight.dtype == after
        merged = layer(x)
        assert merged.dtype == after
        assert relative_error(merged.detach(), y.detach().double()) <= 2 * LIMIT[torch.bfloat16]
        layer.unmerge()
        model = nn.Sequential(through_torch_save(layer, weights_only=False))
        lk.merge_and_unload(model)
        assert model[0].weight.dtype == after and model(x).dtype == after
        double = make(base, dtype=before, bias=bias).double()
        assert double.dequantized_weight().dtype == torch.float64
        state = double.state_dict()
        assert make(base, bias=bias).load_state_dict(state) == ([], [])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_loading_another_dtype_leaves_one_dtype(assign, bias):
    """A copy keeps the layer's dtype, as nn.Linear does; with assign the dtype of what is loaded."""
    layer = make("nested", dtype=torch.bfloat16, bias=bias)
    state = make("nested", dtype=torch.float32, bias=bias).state_dict()
    layer.load_state_dict(state, assign=assign)
    dtype = torch.float32 if assign else torch.bfloat16
    assert layer.base_dtype == dtype and (not bias or layer.bias.dtype == dtype)
    layer.merge()
    assert layer(torch.randn(T, K).to(dtype)).dtype == dtype
    if bias:  # a state dict that was cast since it was saved: its quant_state tells the old dtype
        state["bias"] = state["bias"].half()
        other = make("nested")
        other.load_state_dict(state, assign=True)
        assert other.base_dtype == torch.float16


def test_loading_into_a_merged_layer_is_not_lost():
    """Either it is refused, or the outputs are those of what was loaded; never those of the old weight."""
    layer, other, x = make("dense"), make("dense"), torch.randn(T, K)
    layer.merge()
    try:
        layer.load_state_dict(other.state_dict())
    except RuntimeError as error:
        assert "merge" in str(error)
    else:
        assert relative_error(layer(x), truth(other, x)) <= LIMIT[torch.float32]


def load_error(layer, state, strict=True):
    """The message of the failing load; the frozen NF4 base is loaded as a whole or not at all."""
    before = parts(layer)
    with pytest.raises(RuntimeError, match="Error.s. in loading state_dict") as caught:
        layer.load_state_dict(state, strict=strict)
    if layer.quantize:
        loaded = {torch.equal(getattr(layer, n), before[n]) for n in STATE[:4] if n in before}
        assert len(loaded) == 1, "a part of the base was loaded"
    return str(caught.value)


def test_strict_load_names_every_missing_key(base):
    state = make(base).state_dict()
    for key in state:
        layer = make(base)
        message = load_error(layer, {k: v for k, v in state.items() if k != key})
        assert f'"{key}"' in message and "Missing key" in message


def test_strict_load_names_every_tensor_of_a_wrong_shape(base):
    state = make(base).state_dict()
    for key, tensor in state.items():
        wrong = torch.cat([tensor, tensor[:1]])
        assert key.split(".quant_state")[0] in load_error(make(base), state | {key: wrong}, strict=False), key


def test_strict_load_names_unexpected_keys(base):
    layer = make(base)
    for key in ("weight.extra", "other", "lora_A.math.weight"):
        assert f'"{key}"' in load_error(layer, layer.state_dict() | {key: torch.zeros(1)})


@pytest.mark.parametrize("strict", [True, False])
def test_bases_of_different_kinds_do_not_load_into_one_another(strict):
    layers = {name: make(name) for name in BASES} | {"nested 128": make("nested", blocksize=128)}
    for source, source_layer in layers.items():
        for target, layer in layers.items():
            if (
                source == "plain" and target.startswith("nested") and not strict
            ):  # lacks a key, which non-strict loading allows
                before = parts(layer)
                missing = layer.load_state_dict(source_layer.state_dict(), strict=False).missing_keys
                assert missing == ["weight.nested_absmax", "weight.nested_quant_map"]
                before["bias"] = source_layer.bias
                assert_same_tensors(parts(layer), before)
            elif source != target:
                message = load_error(layer, source_layer.state_dict(), strict)
                assert "weight" in message, (source, target)
    message = load_error(layers["nested"], layers["dense"].state_dict(), strict)
    assert "dense" in message and "NF4" in message and "from_linear" in message
    message = load_error(layers["dense"], layers["nested"].state_dict(), strict)
    assert "NF4" in message and "dense" in message


QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
BAD_JSON = {
    "not UTF-8": b"\xff\xfe{}",
    "cut short": None,
    "a list": b"[1, 2]",
    "a number": b"7",
    "empty": b"",
    "another codebook": {"quant_type": "fp4"},
    "a blocksize that is none": {"blocksize": 48},
    "a blocksize that is text": {"blocksize": "many"},
    "another blocksize": {"blocksize": 128},
    "one size": {"shape": [N]},
    "a swapped shape": {"shape": [K, N]},
    "negative sizes": {"shape": [-N, -K]},
    "a shape of text": {"shape": ["a", "b"]},
    "an unknown dtype": {"dtype": "int8"},
    "a dtype that is a list": {"dtype": ["float32"]},
    "another nested blocksize": {"nested_blocksize": 128},
    "a NaN offset": {"nested_offset": float("nan")},
    "an offset of text": {"nested_offset": "a"},
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_a_corrupt_quant_state_is_refused_and_named(what):
    layer = make("nested")
    state, bad = layer.state_dict(), BAD_JSON[what]
    good = bytes(state[QUANT_STATE].tolist())
    if bad is None:
        bad = good[:-9]
    elif isinstance(bad, dict):
        bad = json.dumps(json.loads(good) | bad).encode()
    message = load_error(
        layer, state | {QUANT_STATE: torch.tensor(list(bad), dtype=torch.uint8)}, strict=False
    )
    assert "weight" in message
    if what not in (
        "another blocksize",
        "a swapped shape",
        "negative sizes",
        "a NaN offset",
    ):  # those say what they got
        assert "quant_state" in message or "blocksize is 48" in message, message


@pytest.mark.parametrize(
    "entry", ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"]
)
def test_a_quant_state_without_an_entry_is_refused(entry):
    layer = make("nested")
    state = layer.state_dict()
    content = json.loads(bytes(state[QUANT_STATE].tolist()))
    del content[entry]
    text = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    load_error(layer, state | {QUANT_STATE: text}, strict=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["weight.absmax", "weight.nested_absmax", "weight.quant_map"])
def test_scales_and_maps_that_are_not_finite_are_refused(key, value):
    layer = make("plain" if key == "weight.absmax" else "nested")
    state = layer.state_dict()
    state[key] = state[key].clone()
    state[key][3 % len(state[key])] = value
    assert key.split(".")[1] in load_error(layer, state, strict=False)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "to dtype": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "to like": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda m: m.type(torch.bfloat16),
    "twice": lambda m: m.half().float(),
}


@pytest.mark.parametrize("how", CASTS)
def test_casting_a_module_never_rounds_codes_and_scales(how):
    for base in ("nested", "plain"):
        model = nn.Sequential(make(base))
        # Scales that float16 cannot hold: cast and cast back would show.
        layer = model[0]
        if base == "plain":
            layer.absmax.mul_(1e-6)
        else:
            layer.nested_absmax.mul_(1e-6)
            layer.offset.mul_(1e-6)
        before = {name: t for name, t in parts(layer).items() if name != "bias"}
        CASTS[how](model)
        after = {name: t for name, t in parts(layer).items() if name != "bias"}
        assert_same_tensors(after, before)
        assert layer.bias.dtype == layer.lora_A["default"].weight.dtype
        assert not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_layer_computes_in_the_new_dtype(base, dtype):
    layer = make(base).to(dtype)
    x = torch.randn(T, K).to(dtype)
    assert layer(x).dtype == dtype
    assert relative_error(layer(x), truth(layer, x)) <= LIMIT[dtype]


def test_a_dense_layer_computes_in_float64():
    layer, x = make("dense").double(), torch.randn(T, K).double()
    got = gradients(layer, x)
    expected = gradients(layer, x, run=lambda x: truth(layer, x, layer.weight))
    for name in expected:
        assert relative_error(got[name], expected[name]) < 1e-14, name

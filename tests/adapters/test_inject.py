"""inject: which layers it takes, what it freezes, and that an error changes nothing."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters import lora_layers
from lora_kernels.linear import FusedLoRALinear

transformers = pytest.importorskip("transformers")


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def fused(model):
    return [name for name, _ in lora_layers(model)]


FORMS = {
    "ends of paths": (["q_proj", "v_proj"], 4),
    "a longer end": (["self_attn.q_proj"], 2),
    "one whole path": (["model.layers.1.mlp.up_proj"], 1),
    "a regular expression": (r"model\.layers\.0\..*_proj", 7),
    "all-linear": ("all-linear", 14),
}


@pytest.mark.parametrize("form", FORMS)
def test_target_modules(form):
    targets, count = FORMS[form]
    model = llama()
    names = lk.inject(model, targets, r=2)
    assert len(names) == count and names == fused(model)
    assert type(model.lm_head) is nn.Linear
    if not isinstance(targets, str):
        assert all(any(name.endswith(target) for target in targets) for name in names)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_model_starts_as_it_was(quantize):
    model = llama()
    ids = torch.randint(50, (2, 9))
    if quantize:  # weights that NF4 holds exactly: without double quantisation, quantising is idempotent
        with torch.no_grad():
            for module in model.model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.copy_(lk.nf4_quantize(module.weight, double_quant=False).dequantize())
    before = model(ids).logits
    lk.inject(model, r=4, quantize=quantize, double_quant=False)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_only_the_adapters_can_be_trained():
    model = llama()
    lk.inject(model, ["q_proj"], r=2)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all(".lora_A." in name or ".lora_B." in name for name in trainable)
    ids = torch.randint(50, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable)


def test_a_module_in_two_places_stays_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

    model = Tied()
    assert lk.inject(model, ["first"], r=2) == ["first"]
    assert isinstance(model.second, FusedLoRALinear) and model.second is model.first


def test_a_second_adapter_joins_the_first():
    model = llama()
    lk.inject(model, ["q_proj"], r=2)
    lk.inject(model, ["q_proj", "k_proj"], r=3, adapter_name="second")
    layer = model.model.layers[0].self_attn.q_proj
    assert set(layer.adapter_specs) == {"default", "second"} and layer.active_adapter == "second"
    assert layer.lora_A["second"].weight.requires_grad and not layer.lora_A["default"].weight.requires_grad
    assert set(model.model.layers[0].self_attn.k_proj.adapter_specs) == {"second"}


def test_the_adapters_own_matrices_are_no_targets():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.inject(model, r=2)
    assert lk.inject(model, "all-linear", r=2, adapter_name="b") == ["0", "1"]


def test_a_classifier_head_is_left_alone_by_all_linear():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config)
    lk.inject(model, r=2)
    assert type(model.score) is nn.Linear


def encoder():
    """Attention's out_proj is an nn.Linear that is never called; linear1 and linear2 are not in eval mode."""
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def test_layers_that_are_never_called_are_left_alone_or_refused():
    model = nn.Sequential(encoder(), nn.Linear(16, 16))
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    for targets in (["out_proj"], ["linear1", "self_attn.out_proj"], r".*\.out_proj", r".*"):
        with pytest.raises(ValueError, match=r"0\.self_attn\.out_proj is the out_proj of an nn\.Multi"):
            lk.inject(model, targets, r=2)
    assert [type(m) for m in model.modules()] == kinds and model.state_dict().keys() == before.keys()
    assert lk.inject(model, r=2) == ["0.linear1", "0.linear2", "1"]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_in_a_transformer_encoder_count_in_eval_mode_too(quantize):
    model, x = encoder(), torch.randn(2, 3, 16)
    lk.inject(model, r=2, quantize=quantize)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x))
    lk.merge_and_unload(model.eval())
    model(x)


BAD = {
    "rank zero": ({"r": 0}, "r is 0"),
    "rank a float": ({"r": 2.0}, "r is 2.0"),
    "no match": ({"target_modules": ["nope"]}, "'nope' matches no linear layer; .*q_proj"),
    "one of two": ({"target_modules": ["q_proj", "nope"]}, "'nope' matches no linear layer"),
    "an expression without match": ({"target_modules": "nope.*"}, "'nope.*' matches no linear layer"),
    "no expression": ({"target_modules": "(["}, "is not a regular expression"),
    "none": ({"target_modules": []}, "target_modules is empty"),
    "an unknown format": ({"quantize": "int3"}, "quantize is 'int3'"),
    "a bad block": ({"quantize": "nf4", "blocksize": 60}, "blocksize is 60"),
    "a bad name": ({"adapter_name": "a.b"}, "adapter name is 'a.b'"),
    "a bad dropout": ({"lora_dropout": -1.0}, "lora_dropout is -1.0"),
    "a bad start": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("already", [False, True])
def test_a_bad_argument_is_named_and_the_model_unchanged(what, already):
    arguments, message = BAD[what]
    model = llama()
    if already:
        lk.inject(model, ["q_proj"], r=2, adapter_name="first")
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        lk.inject(model, **{"target_modules": ["q_proj", "up_proj"], "r": 2, **arguments})
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == flags
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


def test_a_weight_that_cannot_be_quantised_is_named_and_the_model_unchanged():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: .*NaN or an infinity"):
        lk.inject(model, r=2, quantize="nf4")
    assert [type(m) for m in model.modules()] == kinds


def test_the_same_adapter_twice_is_refused():
    model = llama()
    lk.inject(model, ["q_proj"], r=2)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        lk.inject(model, r=2)
    assert fused(model) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


def test_a_model_that_is_a_linear_layer_says_what_to_do():
    with pytest.raises(ValueError, match="use FusedLoRALinear.from_linear"):
        lk.inject(nn.Linear(4, 4), r=2)


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        lk.inject(nn.Sequential(nn.GELU()), r=2)

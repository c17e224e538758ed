"""Adapters on disk: what PEFT writes we read, what we write PEFT reads, and nothing is half done."""

import copy
import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters import files
from lora_kernels.linear import FusedLoRALinear

peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, 16, bias=False)
        self.down = nn.Linear(16, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.v_proj(self.q_proj(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def randomized(model, names=("lora_A", "lora_B")):
    """The model with every adapter matrix random, so that B = 0 hides nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.normal_(std=0.3)
    return model


def snapshot(model):
    kinds = {name: type(module) for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return kinds, flags, {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model, before):
    kinds, flags, state = snapshot(model)
    assert (kinds, flags) == before[:2]
    assert state.keys() == before[2].keys() and all(torch.equal(v, before[2][k]) for k, v in state.items())


def assert_same_function(ours, theirs):
    """Six float32 products in another order: a few roundings of the norm, far below any wrong scaling."""
    assert float((ours - theirs).norm() / theirs.norm()) < 3e-6


@pytest.fixture
def base():
    return Model().eval()


@pytest.fixture
def saved(base, tmp_path):
    """A folder that our save wrote, and the model it came from."""
    model = copy.deepcopy(base)
    lk.inject(model, ["q_proj", "down"], r=4, lora_alpha=6, lora_dropout=0.1)
    lk.save_adapter(randomized(model), tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()


VARIANTS = {
    "plain": {},
    "one target": {"target_modules": ["v_proj"]},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"layers.0.q_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"down": 3}},
    "both patterns": {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {r".*v_proj": 9}},
    "a regular expression": {"target_modules": r".*\.(q_proj|down)"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_wrote_computes_the_same_here(variant, base, tmp_path):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down"], **VARIANTS[variant]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    randomized(theirs).save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    names = lk.load_adapter(ours, tmp_path)
    adapted = [
        n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    ]
    assert sorted(names) == sorted(adapted)
    x = torch.randn(5, 24)
    assert_same_function(ours(x), theirs.eval()(x))
    for name in names:
        layer = theirs.base_model.model.get_submodule(name)
        assert ours.get_submodule(name).scaling["default"] == pytest.approx(layer.scaling["default"])


def test_every_entry_of_peft_is_understood_or_refused_but_for_its_default(base, saved):
    """What PEFT writes by default is read; a list of entries that do not change what the matrices compute."""
    config = peft.LoraConfig().to_dict()
    edited(saved[0], **{k: v for k, v in config.items() if k not in ("r", "lora_alpha", "peft_type")})
    harmless = {"revision": "main", "layers_to_transform": [0], "eva_config": {"rho": 2.0}}
    edited(saved[0], lora_alpha=6, auto_mapping={"base_model_class": "Model"}, **harmless, a_new_one=None)
    assert lk.load_adapter(base, saved[0])


def test_an_adapter_of_a_layer_that_is_never_called_is_refused(tmp_path):
    def model():
        return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})

    theirs = model()
    theirs["attention"] = nn.ModuleDict({"out_proj": nn.Linear(8, 8)})
    lk.inject(theirs, r=2)
    lk.save_adapter(theirs, tmp_path)
    ours = model()
    before = snapshot(ours)
    with pytest.raises(ValueError, match=r"attention\.out_proj is the out_proj of an nn\.MultiheadAttention"):
        lk.load_adapter(ours, tmp_path)
    assert_unchanged(ours, before)


WRAPPED = {
    "whole": torch.compile,
    "a block": lambda model: wrapped(model, "layers.0"),
    "a layer": lambda model: wrapped(model, "layers.1.down"),
    "twice": lambda model: torch.compile(wrapped(model, "layers.1")),
}


def wrapped(model, name):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, torch.compile(model.get_submodule(name)))
    return model


@pytest.mark.parametrize("how", WRAPPED)
def test_a_compiled_model_is_saved_and_loaded_under_its_own_names(how, base, saved, tmp_path):
    folder, model = saved
    lk.save_adapter(WRAPPED[how](model), tmp_path / "compiled")
    for name in (files.CONFIG_FILE, files.WEIGHTS_FILE):
        assert (tmp_path / "compiled" / name).read_bytes() == (folder / name).read_bytes()
    assert lk.load_adapter(WRAPPED[how](base), folder) == [
        f"layers.{i}.{name}" for i in range(2) for name in ("down", "q_proj")
    ]


@pytest.mark.parametrize("pattern", [False, True])
def test_what_we_wrote_computes_the_same_in_peft(pattern, base, tmp_path):
    ours = copy.deepcopy(base)
    lk.inject(ours, ["q_proj", "down"], r=4, lora_alpha=6, use_rslora=True)
    if pattern:
        layer = ours.layers[1].down
        layer.delete_adapter("default")
        layer.add_adapter("default", r=7, lora_alpha=5, use_rslora=True)
    lk.save_adapter(randomized(ours), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(5, 24)
    assert_same_function(theirs.eval()(x), ours.eval()(x))
    assert theirs.peft_config["default"].lora_dropout == 0.0


def test_a_named_adapter_of_peft_is_read_from_its_folder(base, tmp_path):
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["down"]), "math")
    randomized(theirs).save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    lk.load_adapter(ours, tmp_path / "math", adapter_name="sums")
    x = torch.randn(3, 24)
    assert_same_function(ours(x), theirs.eval()(x))


def test_files_hold_the_keys_of_peft_and_the_exact_matrices(saved):
    folder, model = saved
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / files.WEIGHTS_FILE)
    for name in ("layers.0.q_proj", "layers.1.down"):
        layer = model.get_submodule(name)
        for matrix in ("lora_A", "lora_B"):
            key = f"base_model.model.{name}.{matrix}.weight"
            assert torch.equal(tensors[key], getattr(layer, matrix)["default"].weight)
    assert len(tensors) == 8
    config = json.loads((folder / files.CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.1)
    assert config["target_modules"] == ["down", "q_proj"] and config["peft_type"] == "LORA"
    assert list(config) == sorted(config)


def test_target_modules_are_whole_paths_where_the_ends_would_match_more(base, tmp_path):
    lk.inject(base, ["layers.0.q_proj"], r=2)
    lk.save_adapter(base, tmp_path)
    config = json.loads((tmp_path / files.CONFIG_FILE).read_text())
    assert config["target_modules"] == ["layers.0.q_proj"]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_round_trip_is_bit_exact(quantize, base, tmp_path):
    model = copy.deepcopy(base)
    lk.inject(model, "all-linear", r=3, quantize=quantize)
    lk.save_adapter(randomized(model), tmp_path)
    fresh = copy.deepcopy(base)
    lk.load_adapter(fresh, tmp_path, quantize=quantize)
    x = torch.randn(7, 24)
    assert torch.equal(fresh(x), model.eval()(x))
    assert all(not p.requires_grad for p in fresh.parameters())


def test_a_loaded_adapter_can_be_trained_further(base, saved):
    lk.load_adapter(base, saved[0], is_trainable=True)
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    assert len(trainable) == 8 and all("lora_" in name for name in trainable)


def test_half_precision_files_become_float32_as_in_peft(base, tmp_path):
    model = copy.deepcopy(base).bfloat16()
    lk.inject(model, ["down"], r=2, adapter_dtype=torch.bfloat16)
    lk.save_adapter(randomized(model), tmp_path)
    assert load_file(tmp_path / files.WEIGHTS_FILE).popitem()[1].dtype == torch.bfloat16
    loaded = copy.deepcopy(base).bfloat16()
    lk.load_adapter(loaded, tmp_path)
    assert loaded.layers[0].down.lora_A["default"].weight.dtype == torch.float32
    kept = copy.deepcopy(base).bfloat16()
    lk.load_adapter(kept, tmp_path, adapter_dtype=torch.bfloat16)
    assert kept.layers[0].down.lora_A["default"].weight.dtype == torch.bfloat16


def test_two_adapters_in_one_model_are_saved_apart(base, saved, tmp_path):
    folder, first = saved
    model = copy.deepcopy(base)
    lk.load_adapter(model, folder, "one")
    lk.inject(model, ["v_proj", "down"], r=2, adapter_name="two")
    randomized(model.layers[0].v_proj), randomized(model.layers[1].v_proj)
    lk.save_adapter(model, tmp_path / "two", "two")
    lk.save_adapter(model, tmp_path / "one", "one")
    assert (tmp_path / "one" / files.WEIGHTS_FILE).read_bytes() == (folder / files.WEIGHTS_FILE).read_bytes()
    keys = load_file(tmp_path / "two" / files.WEIGHTS_FILE)
    assert {key.split(".")[4] for key in keys} == {"v_proj", "down"}
    for name in ("layers.0.q_proj", "layers.0.down"):
        model.get_submodule(name).set_adapter("one")
    assert torch.equal(model.layers[0].q_proj(torch.ones(24)), first.layers[0].q_proj(torch.ones(24)))


def edited(folder, **changes):
    path = folder / files.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_tensors(folder, change):
    tensors = load_file(folder / files.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / files.WEIGHTS_FILE)


Q0 = "base_model.model.layers.0.q_proj"
BAD = {
    "no folder": (lambda f: os.rename(f, f.parent / "elsewhere"), "no adapter_config.json"),
    "no config": (lambda f: (f / files.CONFIG_FILE).unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / files.WEIGHTS_FILE).unlink(), "no adapter_model.safetensors"),
    "config cut short": (lambda f: (f / files.CONFIG_FILE).write_text('{"r": 4,'), "not JSON"),
    "config a list": (lambda f: (f / files.CONFIG_FILE).write_text("[1]"), "peft_type is 'list'"),
    "weights cut short": (
        lambda f: (f / files.WEIGHTS_FILE).write_bytes((f / files.WEIGHTS_FILE).read_bytes()[:-50]),
        "not a safetensors file, or cut short",
    ),
    "another method": (lambda f: edited(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "dora": (lambda f: edited(f, use_dora=True), "use_dora is True"),
    "pissa": (lambda f: edited(f, init_lora_weights="pissa_niter_4"), "changed the base weights"),
    "trained biases": (lambda f: edited(f, bias="all"), "bias is 'all'"),
    "lora_bias": (lambda f: edited(f, lora_bias=True), "lora_bias is True"),
    "modules_to_save": (lambda f: edited(f, modules_to_save=["head"]), "modules_to_save is"),
    "fan_in_fan_out": (lambda f: edited(f, fan_in_fan_out=True), "fan_in_fan_out is True"),
    "alora": (lambda f: edited(f, alora_invocation_tokens=[5]), r"alora_invocation_tokens is \[5\]"),
    "replicated layers": (lambda f: edited(f, layer_replication=[[0, 2]]), r"layer_replication is \[\[0, 2"),
    "bdlora": (lambda f: edited(f, use_bdlora={"nblocks": 2}), "use_bdlora is {'nblocks': 2}"),
    "a later PEFT": (lambda f: edited(f, use_twisted_lora="yes"), "use_twisted_lora is 'yes'"),
    "no rank": (lambda f: edited(f, r=None), "r is None"),
    "no alpha": (lambda f: edited(f, lora_alpha="8"), "lora_alpha is '8'"),
    "a bad dropout": (lambda f: edited(f, lora_dropout=1.5), "lora_dropout is 1.5"),
    "an unknown tensor": (
        lambda f: with_tensors(f, lambda t: t.update({"base_model.model.head.weight": torch.ones(2)})),
        "'base_model.model.head.weight' is not the A or B matrix",
    ),
    "B missing": (
        lambda f: with_tensors(f, lambda t: t.pop(f"{Q0}.lora_B.weight")),
        "layers.0.q_proj has lora_A alone",
    ),
    "ranks differ": (
        lambda f: with_tensors(f, lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(24, 5)})),
        "has rank 4 in lora_A, 5 in lora_B",
    ),
    "another size": (
        lambda f: with_tensors(f, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 25)})),
        "the adapter of layers.0.q_proj is for",
    ),
    "integers": (
        lambda f: with_tensors(f, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 24).char()})),
        "expected a float matrix",
    ),
    "another model": (
        lambda f: with_tensors(f, lambda t: t.update({f"{Q0}x.lora_{m}.weight": torch.eye(1) for m in "AB"})),
        "the model has no such linear layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("injected", [False, True])
def test_a_bad_adapter_is_refused_and_the_model_unchanged(what, injected, base, saved):
    spoil, message = BAD[what]
    spoil(saved[0])
    if injected:
        lk.inject(base, ["q_proj", "down"], r=2, adapter_name="other")
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(base, saved[0])
    assert_unchanged(base, before)


def test_a_name_that_is_taken_and_a_merged_layer_are_refused(base, saved):
    lk.load_adapter(base, saved[0])
    before = snapshot(base)
    with pytest.raises(ValueError, match="carrying an adapter 'default' already"):
        lk.load_adapter(base, saved[0])
    assert_unchanged(base, before)
    lk.merge(base)
    with pytest.raises(ValueError, match="merged already"):
        lk.load_adapter(base, saved[0], "second")


def test_an_error_while_converting_leaves_the_model_unchanged(base, saved):
    """Half of the layers may be quantised already when one turns out to hold a NaN."""
    with torch.no_grad():
        base.layers[1].q_proj.weight[0, 0] = float("nan")
    before = [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj.*NaN"):
        lk.load_adapter(base, saved[0], quantize="nf4")
    assert [type(m) for m in base.modules()] == before


def test_saving_a_model_without_that_adapter_is_refused(base, saved, tmp_path):
    for model, name in ((base, "default"), (saved[1], "other")):
        with pytest.raises(ValueError, match=f"no layer of the model has an adapter '{name}'"):
            lk.save_adapter(model, tmp_path / "never", name)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(step, tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            write = fail

        real = open
        monkeypatch.setattr("builtins.open", lambda p, mode="r": real(p, mode).close() or Full())
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_loading_puts_adapters_on_layers_that_are_fused_already(base, saved):
    folder, model = saved
    lk.inject(base, "all-linear", r=2, adapter_name="other")
    lk.load_adapter(base, folder)
    assert isinstance(base.layers[0].q_proj, FusedLoRALinear)
    assert set(base.layers[0].q_proj.adapter_specs) == {"other", "default"}
    assert base.layers[0].q_proj.active_adapter == "default"
    x = torch.randn(2, 24)
    assert torch.equal(base.layers[0].q_proj(x), model.layers[0].q_proj(x))


def test_a_module_in_two_places_stays_one(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

    model, fresh = Tied(), Tied()
    lk.inject(model, ["first"], r=2)
    lk.save_adapter(model, tmp_path)
    lk.load_adapter(fresh, tmp_path)
    assert isinstance(fresh.first, FusedLoRALinear) and fresh.second is fresh.first

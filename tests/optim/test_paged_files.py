"""State that other optimizers have written, and what they make of ours."""

import copy
import errno
import io
import math

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.optim import paged_state
from lora_kernels.optim_state import dynamic_map

from .paged_cases import PAGE, gradients, parameters, same_bits, train


def saved(state: dict) -> dict:
    """Through a file, as a trainer's checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(ps: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in ps]


@pytest.mark.parametrize(
    "kind", [lk.optim.PagedAdamW, lk.optim.PagedAdamW8bit, lk.optim.PagedLion, lk.optim.PagedLion8bit]
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_resumed_training_goes_on_to_the_same_bits_and_stays_paged(kind, rounding, tmp_path):
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    options = {"lr": 1e-3, "rounding": rounding, "page_bytes": PAGE, "directory": tmp_path}
    steps = list(gradients(6, dtype))
    first = kind(parameters(dtype), **options)
    ps = train(first, iter(steps[:3]))
    resumed = kind(copies(ps), resident_bytes=3 * PAGE, **options)
    resumed.load_state_dict(saved(first.state_dict()))
    assert same_bits(train(resumed, iter(steps[3:])), train(first, iter(steps[3:])))
    assert resumed.stats()["peak_resident_bytes"] <= 3 * PAGE


def test_torchs_adamw_and_ours_load_each_others_files():
    theirs = torch.optim.AdamW(parameters(), lr=1e-2, amsgrad=False)
    ps = train(theirs, gradients(5))
    ours = lk.optim.PagedAdamW(copies(ps), lr=1.0)
    ours.load_state_dict(saved(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 1e-2
    state = ours.state_dict()
    for index, entry in theirs.state_dict()["state"].items():
        assert entry.keys() == state["state"][index].keys()
        assert all(torch.equal(state["state"][index][name], value) for name, value in entry.items())
    back = torch.optim.AdamW(copies(ps), lr=1.0)
    back.load_state_dict(saved(state))
    for a, b in zip(train(back, gradients(3, seed=9)), train(ours, gradients(3, seed=9)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("theirs", "ours"), [("AdamW8bit", "PagedAdamW8bit"), ("Lion8bit", "PagedLion8bit")])
def test_bitsandbytes_8_bit_optimizers_and_ours_load_each_others_files(theirs, ours):
    """Byte for byte: codes, scales and map; and training goes on alike."""
    first = getattr(bnb.optim, theirs)(parameters(), lr=1e-3)
    ps = train(first, gradients(5))
    resumed = getattr(lk.optim, ours)(copies(ps), lr=1.0)
    resumed.load_state_dict(saved(first.state_dict()))
    state = resumed.state_dict()["state"]
    for index, entry in first.state_dict()["state"].items():
        for name, value in entry["__bnb_optimizer_quant_state__"].items():
            assert torch.equal(state[index][name], value), name
        assert state[index]["step"] == entry["step"] == 5
    back = getattr(bnb.optim, theirs)(copies(ps), lr=1.0)
    back.load_state_dict(saved(resumed.state_dict()))
    train(back, gradients(2, seed=3))
    train(resumed, gradients(2, seed=3))
    for a, b in zip(back.param_groups[0]["params"], resumed.param_groups[0]["params"], strict=True):
        assert (a - b).norm() <= 2e-4 * a.norm()


def test_bitsandbytes_32_bit_state_loads():
    first = bnb.optim.AdamW32bit(parameters(), lr=1e-3)
    ps = train(first, gradients(5))
    resumed = lk.optim.PagedAdamW(copies(ps))
    resumed.load_state_dict(saved(first.state_dict()))
    for p, entry in zip(ps, resumed.state_dict()["state"].values(), strict=True):
        assert torch.equal(entry["exp_avg"], first.state[p]["state1"])
        assert torch.equal(entry["exp_avg_sq"], first.state[p]["state2"])


@pytest.mark.parametrize("to_bits", [8, 32])
def test_state_of_one_width_becomes_the_other(to_bits):
    first = lk.optim.PagedAdamW(parameters(), lr=1e-3, state_bits=40 - to_bits)
    ps = train(first, gradients(4))
    second = lk.optim.PagedAdamW(copies(ps), state_bits=to_bits)
    second.load_state_dict(saved(first.state_dict()))
    a = first if to_bits == 8 else second  # 32 bits
    b = second if to_bits == 8 else first
    for exact, coded in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
        for i, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
            if f"absmax{i}" in coded:
                scale = coded[f"absmax{i}"].repeat_interleave(256)[: exact[name].numel()]
                decoded = dynamic_map(signed=i == 1)[coded[f"state{i}"].reshape(-1).long()] * scale
                error = (exact[name].reshape(-1) - decoded).abs() / scale.clamp_min(1e-30)
                assert error.max() < 0.03  # half of the map's widest step
            else:
                assert torch.equal(exact[name], coded[f"state{i}"])


def broken(state: dict, **changes) -> dict:
    entry = {**state["state"][0], **changes}
    entry = {name: value for name, value in entry.items() if value is not None}
    return {**state, "state": {**state["state"], 0: entry}}


@pytest.mark.parametrize(
    ("bits", "changes", "message"),
    [
        (32, {"exp_avg": None}, "has neither exp_avg nor state1"),
        (32, {"exp_avg_sq": torch.zeros(3)}, r"exp_avg_sq has shape \(3,\), expected \(16, 1024\)"),
        (32, {"max_exp_avg_sq": torch.zeros(16, 1024)}, "amsgrad=True"),
        (32, {"exp_avg": torch.zeros(1024, 16)}, r"exp_avg has shape \(1024, 16\), expected \(16, 1024\)"),
        (32, {"step": torch.tensor(-5.0)}, r"step is -5, expected 0 to 2\^31 - 2"),
        (32, {"step": math.nan}, "step is nan"),
        (32, {"step": 2**31}, "step is 2.14748e"),
        (32, {"compensation": torch.zeros(3)}, r"compensation has shape \(3,\), expected \(16, 1024\)"),
        (8, {"absmax1": None}, "state1 has 8 bits, but there is no absmax1"),
        (8, {"absmax2": torch.zeros(8)}, "absmax2 has 8 elements, expected 64, one for each block of 256"),
        (8, {"qmap1": torch.linspace(-1, 1, 256)}, "qmap1 is not bitsandbytes' dynamic map"),
        (8, {"state2": torch.zeros(5, dtype=torch.uint8)}, r"has shape \(5,\), expected \(16, 1024\)"),
    ],
)
def test_a_bad_file_is_refused_and_changes_nothing(bits, changes, message):
    optimizer = lk.optim.PagedAdamW(parameters(), lr=1e-2, state_bits=bits)
    train(optimizer, gradients(2))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(before, **changes))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        assert all(
            torch.equal(torch.as_tensor(after["state"][index][k]), torch.as_tensor(v))
            for k, v in entry.items()
        )


def test_other_groups_and_options_are_refused():
    optimizer = lk.optim.PagedAdamW(parameters())
    train(optimizer, gradients(1))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        lk.optim.PagedAdamW(parameters()[:2]).load_state_dict(state)
    state["param_groups"][0]["maximize"] = True
    with pytest.raises(ValueError, match="asks for maximize"):
        optimizer.load_state_dict(state)


def test_hooks_see_and_change_whole_files():
    optimizer = lk.optim.PagedAdamW(parameters())
    train(optimizer, gradients(2))
    seen = []

    def doubled(_, state):
        seen.append(set(state["state"][0]))
        return {**state, "state": {k: {**v, "step": v["step"] * 2} for k, v in state["state"].items()}}

    optimizer.register_state_dict_post_hook(doubled)
    state = optimizer.state_dict()
    assert seen == [{"step", "exp_avg", "exp_avg_sq"}] and state["state"][0]["step"] == 4

    other = lk.optim.PagedAdamW(parameters())
    other.register_load_state_dict_pre_hook(lambda _, given: doubled(_, given))
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state_dict()["state"][0]["step"]))
    other.load_state_dict(state)
    assert seen[-1] == 8 and other.state_dict()["state"][0]["step"] == 8
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


def test_copies_are_made_without_the_hooks_of_files():
    optimizer = lk.optim.PagedAdamW(parameters())
    steps = list(gradients(3))
    train(optimizer, iter(steps[:2]))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "state": {}})
    other = copy.deepcopy(optimizer)
    assert same_bits(train(other, iter(steps[2:])), train(optimizer, iter(steps[2:])))


def test_adam_with_decay_in_the_gradient_is_refused():
    theirs = torch.optim.Adam(parameters(), weight_decay=0.1)
    train(theirs, gradients(1))
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        lk.optim.PagedAdamW(parameters()).load_state_dict(theirs.state_dict())
    theirs.param_groups[0]["weight_decay"] = 0.0
    lk.optim.PagedAdamW(parameters()).load_state_dict(theirs.state_dict())


def test_a_load_that_fails_half_way_leaves_the_optimizer_whole(monkeypatch, tmp_path):
    optimizer = lk.optim.PagedAdamW(
        parameters(), resident_bytes=2 * PAGE, page_bytes=PAGE, directory=tmp_path
    )
    steps = list(gradients(3))
    train(optimizer, iter(steps[:2]))
    write, calls = paged_state.PagedState.write, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "no space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(paged_state.PagedState, "write", full)
        with pytest.raises(OSError, match="no space left"):
            optimizer.load_state_dict(optimizer.state_dict())
    expected = train(lk.optim.PagedAdamW(parameters()), iter(steps))
    assert same_bits(train(optimizer, iter(steps[2:])), expected)

"""state[p]: what it shows, and that what is put there is the state of the next step, as in torch."""

import copy
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lora_kernels as lk
from lora_kernels.optim.state_entry import StateEntry

from .paged_cases import PAGE, gradients, parameters, same_bits, train

KINDS = (lk.optim.PagedAdamW, lk.optim.PagedAdamW8bit, lk.optim.PagedLion, lk.optim.PagedLion8bit)


def trained(kind=lk.optim.PagedAdamW, steps=2, **options):
    optimizer = kind(parameters(), lr=1e-2, page_bytes=PAGE, **options)
    return optimizer, train(optimizer, gradients(steps))


def equal(a, b):
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
def test_an_entry_is_what_the_file_says(kind, rounding):
    dtype = torch.bfloat16 if rounding == "kahan" else torch.float32
    optimizer = kind(parameters(dtype), rounding=rounding)
    train(optimizer, gradients(3, dtype))
    for p, entry in zip(
        optimizer.param_groups[0]["params"], optimizer.state_dict()["state"].values(), strict=True
    ):
        shown = optimizer.state[p]
        assert list(shown) == list(shown.keys()) == list(entry) and len(shown) == len(entry)
        for copied in (
            dict(shown),
            {**shown},
            shown.copy(),
            dict(shown.items()),
            dict(zip(shown, shown.values(), strict=True)),
        ):
            assert type(copied) is dict and copied.keys() == entry.keys()
            assert all(equal(copied[name], value) for name, value in entry.items())
        for whole in (copy.deepcopy(shown), pickle.loads(pickle.dumps(shown))):
            assert type(whole) is dict and all(equal(whole[name], value) for name, value in entry.items())
        assert shown.get("nothing") is None and shown.get("nothing", 3) == 3 and "nothing" not in shown
        with pytest.raises(KeyError):
            shown["nothing"]


def test_looking_changes_nothing():
    (looked, ps), (other, _) = trained(), trained()
    for p in ps:
        assert not any(value is None for value in looked.state[p].values())
    steps = list(gradients(2, seed=5))
    assert same_bits(train(looked, iter(steps)), train(other, iter(steps)))


def halve_in_place(state):
    for entry in state.values():
        for name, value in entry.items():
            if name != "step":
                value.mul_(0.5)


def replace(state):
    for entry in state.values():
        entry["exp_avg"] = entry["exp_avg"] * 0.5


def update(state):
    for entry in state.values():
        entry.update(exp_avg=torch.ones_like(entry["exp_avg"]), step=torch.tensor(7.0))


def count_anew(state):
    for entry in state.values():
        entry["step"].zero_()


def clear(state):
    state.clear()


def clear_one(state):
    del state[next(iter(state))]


@pytest.mark.parametrize("change", [halve_in_place, replace, update, count_anew, clear, clear_one])
@pytest.mark.parametrize("resident", [None, 2 * PAGE])
def test_changes_are_those_of_torchs_adamw(change, resident, tmp_path):
    ours, mine = trained(resident_bytes=resident, directory=tmp_path)
    theirs = torch.optim.AdamW(parameters(), lr=1e-2)
    yours = train(theirs, gradients(2))
    for optimizer in (ours, theirs):
        change(optimizer.state)
        train(optimizer, gradients(3, seed=5))
    for a, b in zip(mine, yours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for p, q in zip(mine, yours, strict=True):
        assert ours.state[p]["step"] == theirs.state[q]["step"]
        torch.testing.assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], rtol=1e-4, atol=1e-6)
        assert type(ours.state[p]) is StateEntry


@pytest.mark.parametrize("kind", KINDS)
def test_whole_entries_may_be_put_where_there_were_none(kind):
    """As ZeroRedundancyOptimizer does where it loads."""
    first, ps = trained(kind)
    second = kind([torch.nn.Parameter(p.detach().clone()) for p in ps], lr=1e-2, page_bytes=PAGE)
    for p, entry in zip(second.param_groups[0]["params"], first.state_dict()["state"].values(), strict=True):
        second.state[p] = dict(entry)
    steps = list(gradients(2, seed=5))
    assert same_bits(train(first, iter(steps)), train(second, iter(steps)))


def test_an_entry_that_cannot_be_is_refused():
    optimizer, ps = trained()
    optimizer.state[ps[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg has shape \(3,\), expected \(16, 1024\)"):
        train(optimizer, gradients(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [True, False])
def test_torchs_portable_state_dicts_are_gone_on_from(kind, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    steps = list(gradients(4))

    def made():
        net = torch.nn.ParameterList(parameters())
        return net, kind(net.parameters(), lr=1e-2, page_bytes=PAGE)

    net, first = made()
    train(first, iter(steps[:2]))
    first.zero_grad()
    file = copy.deepcopy(get_optimizer_state_dict(net, first, options=options))
    again, second = made()
    again.load_state_dict(net.state_dict())
    set_optimizer_state_dict(again, second, file, options=options)
    assert same_bits(train(first, iter(steps[2:])), train(second, iter(steps[2:])))

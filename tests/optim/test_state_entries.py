"""state[p]: what it shows, and that what is put there is the state of the next step, as in torch."""

import collections
import copy
import io
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
        file = io.BytesIO()
        torch.save({0: shown}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)[0]
        for whole in (copy.deepcopy(shown), pickle.loads(pickle.dumps(shown)), loaded):
            assert type(whole) is collections.OrderedDict and whole.keys() == entry.keys()
            assert all(equal(whole[name], value) for name, value in entry.items())
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


def assign_unread(state):
    for p, entry in state.items():
        entry["exp_avg"] = torch.ones_like(p)
        entry["exp_avg_sq"] = torch.full_like(p, 2.0)


def through_numpy(state):
    for entry in state.values():
        entry["exp_avg"].numpy()[...] *= 0.25
        entry["exp_avg_sq"].data.mul_(3.0)


def empty_entries(state):
    for entry in state.values():
        entry.clear()


def pop_and_put(state):
    for entry in state.values():
        first = entry.pop("exp_avg")
        entry.setdefault("exp_avg", first * 2)
        second = entry["exp_avg_sq"]
        del entry["exp_avg_sq"]
        entry |= {"exp_avg_sq": second * 2}


def rebuild(state):
    for p, entry in list(state.items()):
        state[p] = type(entry)(
            collections.OrderedDict((k, v * 0.5 if v.dim() else v) for k, v in entry.items())
        )


CHANGES = (halve_in_place, replace, update, count_anew, clear, clear_one)
CHANGES += (assign_unread, through_numpy, empty_entries, pop_and_put, rebuild)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("resident", [None, 2 * PAGE])
def test_changes_are_those_of_torchs_adamw(change, resident, tmp_path):
    ours, mine = trained(resident_bytes=resident, directory=tmp_path)
    theirs = torch.optim.AdamW(parameters(), lr=1e-2)
    yours = train(theirs, gradients(2))
    for optimizer in (ours, theirs):
        change(optimizer.state)
        train(optimizer, gradients(3, seed=5))
    for entry in ours.state.values():
        assert not entry.open
    for a, b in zip(mine, yours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for p, q in zip(mine, yours, strict=True):
        assert ours.state[p]["step"] == theirs.state[q]["step"]
        torch.testing.assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], rtol=1e-4, atol=1e-6)
        assert type(ours.state[p]) is StateEntry


@pytest.mark.parametrize("change", CHANGES)
def test_changes_count_where_there_is_no_gradient_and_in_files(change):
    """Of parameters that have no step until another one has had its first."""
    ours, mine = trained()
    theirs = torch.optim.AdamW(parameters(), lr=1e-2)
    yours = train(theirs, gradients(2))
    results = []
    for optimizer, ps in ((ours, mine), (theirs, yours)):
        late = torch.nn.Parameter(torch.ones(5000))
        optimizer.add_param_group({"params": [late]})
        change(optimizer.state)
        file = copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.zero_grad()
        late.grad = torch.ones(5000)
        optimizer.step()
        late.grad = None
        for p, gradient in zip(ps, next(gradients(1, seed=6)), strict=True):
            p.grad = gradient
        optimizer.step()
        results.append((file, ps, late))
    (file, ps, late), (wanted_file, wanted, wanted_late) = results
    assert file.keys() == {k for k, entry in wanted_file.items() if entry}
    for number, entry in file.items():
        for name, value in entry.items():
            torch.testing.assert_close(value, wanted_file[number][name], rtol=1e-4, atol=1e-6)
    for a, b in zip([*ps, late], [*wanted, wanted_late], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_may_be_replaced_and_its_entry_moved(kind):
    """As code does that grows or prunes parameters while it trains."""
    optimizer, ps = trained(kind)
    other, qs = trained(kind)
    pages = optimizer.stats()["pages"]
    for step, given in enumerate(gradients(4, seed=3)):
        group = optimizer.param_groups[0]
        for i, old in enumerate(list(group["params"])):
            entry = optimizer.state[old]
            if step % 2:  # moved as it is, or with values that were put into it
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in entry:
                        entry[name] = entry[name].clone()
            del optimizer.state[old]
            group["params"][i] = torch.nn.Parameter(old.detach().clone())
            optimizer.state[group["params"][i]] = entry
        ps = train(optimizer, [given])
        qs = train(other, [given])
        assert same_bits(ps, qs)
        assert len(optimizer.state_dict()["state"]) == len(optimizer.state) == len(ps)
    assert optimizer.stats()["pages"] == pages


@pytest.mark.parametrize("kind", ["swap", "to later", "to earlier", "alias", "alias of later"])
def test_entries_may_change_places(kind):
    ours, mine = trained()
    theirs = torch.optim.AdamW(parameters(), lr=1e-2)
    yours = train(theirs, gradients(2))
    for optimizer, ps in ((ours, mine), (theirs, yours)):
        pair = [
            torch.nn.Parameter(torch.linspace(-1, 1, 5000)),
            torch.nn.Parameter(torch.linspace(2, 3, 5000)),
        ]
        optimizer.add_param_group({"params": pair})
        for p, g in zip(pair, (0.1, 0.7), strict=True):
            p.grad = torch.full((5000,), g)
        optimizer.step()
        state, (p, q) = optimizer.state, pair
        if kind == "swap":
            state[p], state[q] = state[q], state[p]
        elif kind.startswith("to"):
            a, b = (p, q) if kind == "to later" else (q, p)
            state[b] = state.pop(a)
        else:  # a copy for torch, in which both would go on with the same tensors
            a, b = (p, q) if kind == "alias of later" else (q, p)
            entry = state[b]
            state[a] = entry if optimizer is ours else {k: v.clone() for k, v in entry.items()}
        for _ in range(3):
            optimizer.step()
        ps += pair
    for a, b in zip(mine, yours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.state[a]["exp_avg"], theirs.state[b]["exp_avg"], rtol=1e-4, atol=1e-6)
        assert ours.state[a]["step"] == theirs.state[b]["step"]


def test_an_entry_whose_state_is_gone_says_so():
    optimizer, ps = trained()
    entry = optimizer.state.pop(ps[0])
    train(optimizer, gradients(1, seed=5))
    for put_back in (False, True):
        with pytest.raises(RuntimeError, match="taken out of it, and the state is gone"):
            if put_back:
                optimizer.state[ps[0]] = entry
                train(optimizer, gradients(1, seed=6))
            else:
                entry["exp_avg"]


def test_names_of_another_format_count_once():
    optimizer, ps = trained(lk.optim.PagedAdamW8bit)
    p = ps[0]
    optimizer.state[p]["exp_avg"] = torch.ones_like(p)
    state = optimizer.state_dict()["state"][0]
    assert torch.equal(state["state1"], torch.full_like(state["state1"], 255))
    assert "exp_avg" not in optimizer.state[p]
    train(optimizer, gradients(1, seed=5))
    assert not torch.equal(optimizer.state[p]["state1"], state["state1"])


def test_state_is_read_in_inference_mode_and_changed_outside():
    optimizer, ps = trained()
    with torch.inference_mode():
        first = optimizer.state[ps[0]]["exp_avg"].norm()
    optimizer.state[ps[0]]["exp_avg"].mul_(0.0)
    assert first > 0 and not optimizer.state_dict()["state"][0]["exp_avg"].any()


def test_a_step_that_fails_before_it_begins_leaves_numbers_and_entries_in_order():
    optimizer, ps = trained()
    optimizer.state[ps[0]] = dict(optimizer.state[ps[0]])
    optimizer.state[ps[1]]["step"] = torch.tensor(7.0)
    late = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.zeros_like(late)
    with pytest.raises(TypeError, match="float64"):
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in ps] == [2, 7, *[2] * (len(ps) - 2)]
    optimizer.state[ps[0]]["exp_avg"].zero_()
    late.grad = None
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in ps] == [3, 8, *[3] * (len(ps) - 2)]


def test_a_file_whose_entry_is_empty_starts_that_parameter_anew():
    optimizer, _ = trained()
    file = optimizer.state_dict()
    file["state"][1] = {}
    optimizer.load_state_dict(file)
    assert list(optimizer.state_dict()["state"]) == [0, *range(2, len(file["state"]))]


def test_a_step_that_was_cut_short_shows_no_state_and_takes_none(monkeypatch):
    expected, _ = trained(steps=3)
    optimizer, ps = trained()
    last = list(gradients(3))[2]
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_update", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            train(optimizer, [last])
    entry = optimizer.state[ps[0]]
    assert entry["step"] == 2
    for read in (lambda: entry["exp_avg"], lambda: entry.update(step=torch.tensor(1.0)), entry.copy):
        with pytest.raises(RuntimeError, match="cut short"):
            read()
    optimizer.state[ps[0]] = {}
    with pytest.raises(
        RuntimeError, match=r"state\[p\] of a parameter of it, of shape \(16, 1024\), was changed"
    ):
        optimizer.step()
    optimizer.state[ps[0]] = entry
    optimizer.step()
    assert same_bits(ps, expected.param_groups[0]["params"])


def test_other_names_are_left_alone():
    optimizer, ps = trained()
    optimizer.state[ps[0]]["slow"] = slow = torch.zeros(3)
    optimizer.state[ps[1]]["exp_avg"].mul_(1.0)
    late = torch.nn.Parameter(torch.ones(5000))
    optimizer.add_param_group({"params": [late]})
    optimizer.state[late]["slow"] = slow
    late.grad = torch.ones(5000)
    optimizer.step()
    ps[0].grad, ps[0].data = None, ps[0].data.bfloat16()
    optimizer.step()
    for p in (ps[0], late):
        assert optimizer.state[p]["slow"] is slow and optimizer.state[p]["step"] >= 1


def test_no_room_for_a_new_parameters_state_is_tried_again(monkeypatch):
    optimizer, ps = trained(resident_bytes=2 * PAGE)
    late = torch.nn.Parameter(torch.ones(5000))
    optimizer.add_param_group({"params": [late]})
    late.grad, place, tried = torch.ones(5000), type(optimizer._all.pages).place, []

    def full(*arguments):
        tried.append(1)
        if len(tried) == 1:
            raise MemoryError("no page")
        return place(*arguments)

    monkeypatch.setattr(type(optimizer._all.pages), "place", full)
    optimizer.step()
    assert len(tried) == 2 and optimizer.state[late]["step"] == 1 and optimizer.state[ps[0]]["step"] == 3


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

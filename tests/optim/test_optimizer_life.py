"""What happens to an optimizer around its steps: it goes, its parameters change size, leave, come back, its
state holds what is not its own, hooks change that."""

import copy
import gc
import io
import pickle
import sys

import pytest
import torch

import lora_kernels as lk
from lora_kernels.optim.step_counts import _BLOCK, _MOST_UNUSED, StepCounts

from .paged_cases import PAGE, gradients, parameters, same_bits, train


def pair(steps=2, **options):
    """Ours and torch's on the same problem, each with its parameters."""
    ours = lk.optim.PagedAdamW(parameters(), lr=1e-2, page_bytes=PAGE, **options)
    theirs = torch.optim.AdamW(parameters(), lr=1e-2)
    return [(o, train(o, gradients(steps))) for o in (ours, theirs)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def same_parameters(mine, yours):
    for a, b in zip(mine, yours, strict=True):
        close(a, b)


# ---- its end ----


def test_a_dropped_optimizer_gives_back_pages_and_parameters_at_once(tmp_path):
    """Without the garbage collector, whose counts know nothing of the size of pages."""
    seen = []

    class Seen(torch.nn.Parameter):
        def __del__(self):
            seen.append(1)

    train(torch.optim.AdamW(parameters()), gradients(1))  # torch's first import leaves cycles
    gc.collect()
    gc.disable()
    try:
        p = Seen(torch.ones(70_000))
        optimizer = lk.optim.PagedAdamW([p], page_bytes=PAGE, resident_bytes=2 * PAGE, directory=tmp_path)
        p.grad = torch.ones(70_000)
        optimizer.step()
        entry = optimizer.state[p]
        optimizer.step()
        moment = optimizer.state[p]["exp_avg"].clone()
        del optimizer
        assert torch.equal(entry["exp_avg"], moment)  # as a dictionary would be, it is still there
        del p, entry
        assert seen == [1]
    finally:
        gc.enable()


def test_a_closed_optimizers_entries_say_that_the_state_is_gone():
    (optimizer, ps), _ = pair()
    entry = optimizer.state[ps[0]]
    optimizer.close()
    with pytest.raises(RuntimeError, match="the state is gone"):
        entry["exp_avg"]
    train(optimizer, gradients(1))
    assert optimizer.state[ps[0]]["step"] == 1


# ---- what is not its own ----


def put_others(optimizer, ps):
    optimizer.state[ps[0]]["slow"] = torch.full((16, 1024), 3.0)
    optimizer.state["glob"] = {"count": 5, "empty": {}}
    late = torch.nn.Parameter(torch.ones(9))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(9)
    optimizer.step()
    optimizer.state[late]["only"] = torch.ones(2)


def others(file):
    return file[0]["slow"], file["glob"], file[len(parameters())]  # of the late one


def test_what_else_stands_in_state_is_in_files_and_copies_as_in_torch():
    found = []
    for optimizer, ps in pair():
        put_others(optimizer, ps)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        loaded = type(optimizer)([*parameters()], lr=1e-2)
        loaded.add_param_group({"params": [torch.nn.Parameter(torch.ones(9))]})
        loaded.load_state_dict(copy.deepcopy(saved))  # torch goes on with the tensors that it is given
        train(loaded, [*[[*g, torch.ones(9)] for g in gradients(1)]])
        found.append([saved["state"], *(o.state_dict()["state"] for o in (*again, loaded))])
    for mine, yours in zip(*found, strict=True):
        (slow, glob, only), (slow2, glob2, only2) = others(mine), others(yours)
        assert torch.equal(slow, slow2) and glob == glob2 == {"count": 5, "empty": {}}
        assert torch.equal(only["only"], only2["only"]) and only.keys() == only2.keys()
        close(mine[0]["exp_avg"], yours[0]["exp_avg"])


def test_a_file_with_a_number_beside_the_parameters_is_loaded():
    (ours, ps), (theirs, _) = pair()
    theirs.state["glob"] = 3
    ours.load_state_dict(theirs.state_dict())
    train(ours, gradients(1))
    assert ours.state["glob"] == 3 and ours.state[ps[0]]["step"] == 3


def test_hooks_before_saving_change_what_is_saved():
    def zero(optimizer):
        for entry in optimizer.state.values():
            entry["exp_avg"].zero_()

    def pop(optimizer):
        optimizer.state.pop(optimizer.param_groups[0]["params"][1])

    for hook in (zero, pop):
        files = []
        for optimizer, _ in pair():
            optimizer.register_state_dict_pre_hook(hook)
            files.append(optimizer.state_dict()["state"])
        mine, yours = files
        assert mine.keys() == yours.keys()
        for number, entry in mine.items():
            close(entry["exp_avg"], yours[number]["exp_avg"])


# ---- parameters that change size ----


def grow(optimizer, ps):
    ps[0].data = torch.cat([ps[0].data, torch.ones(4, 1024)])


def test_a_parameter_of_another_size_starts_anew_where_its_state_is_deleted():
    def delete(optimizer, p):
        del optimizer.state[p]

    def empty(optimizer, p):
        optimizer.state[p] = {}

    for clear in (delete, empty):
        found = []
        for optimizer, ps in pair():
            grow(optimizer, ps)
            clear(optimizer, ps[0])
            for seed in (5, 6):
                given = next(gradients(1, seed=seed))
                train(optimizer, [[torch.cat([given[0], torch.ones(4, 1024)]), *given[1:]]])
            found.append((ps, optimizer.state[ps[0]]["step"], optimizer.state[ps[1]]["step"]))
        (mine, *steps), (yours, *expected) = found
        same_parameters(mine, yours)
        assert [int(s) for s in steps] == [int(s) for s in expected] == [2, 4]


def test_a_parameter_and_its_moments_may_be_cut_down():
    """As pruning does it; its own entry and a new one."""
    for assign in (True, False):
        found = []
        for optimizer, ps in pair():
            mask = torch.arange(16) % 3 > 0
            ps[0].data = ps[0].data[mask]
            entry = optimizer.state[ps[0]]
            cut = {name: entry[name][mask] for name in ("exp_avg", "exp_avg_sq")}
            if assign:
                entry.update(cut)
            else:
                optimizer.state[ps[0]] = {"step": entry["step"], **cut}
            given = next(gradients(1, seed=5))
            train(optimizer, [[given[0][mask], *given[1:]]])
            found.append((ps, optimizer.state[ps[0]]))
        (mine, entry), (yours, expected) = found
        same_parameters(mine, yours)
        close(entry["exp_avg"], expected["exp_avg"])
        assert entry["step"] == expected["step"] == 3


def test_another_size_beside_the_old_state_is_refused_where_it_would_be_used_and_nowhere_else():
    (optimizer, ps), _ = pair()
    kept, whole = optimizer.state[ps[0]]["exp_avg"], ps[0].data
    ps[0].grad, ps[0].data = None, torch.empty(0)  # as offloading does
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], kept)
    optimizer.step()
    ps[0].grad = torch.empty(0)
    with pytest.raises(ValueError, match=r"shape \(0,\), expected 16384 elements.*delete state\[p\]"):
        optimizer.step()
    ps[0].grad, ps[0].data = None, whole
    ps[0].grad = torch.ones(16, 1024)
    optimizer.step()
    assert optimizer.state[ps[0]]["step"] == 3 and optimizer.state[ps[1]]["step"] == 4


def test_lazy_parameters_have_their_size_later():
    net = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2))
    optimizer = lk.optim.PagedAdamW(net.parameters(), lr=1e-2)
    net(torch.ones(5, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[net[0].weight]["exp_avg"].shape == (3, 4)


def test_changes_of_one_count_where_another_one_of_another_dtype_changes_size():
    ours = lk.optim.PagedAdamW(parameters(torch.bfloat16), lr=1e-2, rounding="kahan")
    ps = train(ours, gradients(2, torch.bfloat16))
    ps[1].data, ps[1].grad = ps[1].data.float(), None  # state moves, and its entry has other names
    ours.state[ps[1]]["exp_avg"].fill_(5.0)
    ps[0].data, ps[0].grad = ps[0].data[:5], None
    del ours.state[ps[0]]
    ours.step()
    assert ours.state[ps[1]]["exp_avg"].eq(5.0).all() and "compensation" not in ours.state[ps[1]]


def test_a_name_that_was_deleted_and_is_not_needed_any_more_is_not_missed():
    optimizer = lk.optim.PagedAdamW(parameters(torch.bfloat16), lr=1e-2, rounding="kahan")
    p = train(optimizer, gradients(2, torch.bfloat16))[0]
    del optimizer.state[p]["compensation"]
    p.data, p.grad = p.data.float(), None
    optimizer.step()
    assert "compensation" not in optimizer.state[p] and optimizer.state[p]["exp_avg"].any()


def test_moments_that_are_cut_behind_their_tensors_count():
    for optimizer, ps in pair():
        mask = torch.arange(16) % 3 > 0
        ps[0].data, ps[0].grad = ps[0].data[mask], None
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[ps[0]][name].data = optimizer.state[ps[0]][name].data[mask]
        optimizer.step()
        assert optimizer.state[ps[0]]["exp_avg"].shape == ps[0].shape and optimizer.state[ps[0]]["step"] == 2


# ---- groups ----


def test_a_group_that_leaves_and_comes_back_goes_on_where_it_was():
    found = []
    for optimizer, ps in pair():
        late = torch.nn.Parameter(torch.ones(5000))
        optimizer.add_param_group({"params": [late]})
        for p, g in zip([*ps, late], [*next(gradients(1, seed=4)), torch.ones(5000)], strict=True):
            p.grad = g
        optimizer.step()
        group = optimizer.param_groups.pop()
        optimizer.step()
        assert float(optimizer.state[late]["exp_avg"][0]) == pytest.approx(0.1)
        optimizer.add_param_group({"params": group["params"]})
        optimizer.step()
        found.append(([*ps, late], optimizer.state[late]))
    (mine, entry), (yours, expected) = found
    same_parameters(mine, yours)
    assert entry["step"] == expected["step"] == 2
    close(entry["exp_avg"], expected["exp_avg"])


def test_entries_with_other_numbers_of_steps_may_change_places():
    found = []
    for optimizer, ps in pair():
        state = optimizer.state
        same = [torch.nn.Parameter(torch.ones(50)) for _ in range(3)]
        optimizer.add_param_group({"params": same})
        for p in ps:
            p.grad = None
        for steps, p in zip((4, 1, 7), same, strict=True):
            p.grad = torch.linspace(-1, steps, 50)
            for _ in range(steps):
                optimizer.step()
            p.grad = None
        a, b, c = same
        state[a], state[b], state[c] = state[b], state[c], state[a]
        numbers = [float(optimizer.state_dict()["state"][len(ps) + i]["step"]) for i in range(3)]
        for p in same:
            p.grad = torch.ones(50)
        optimizer.step()
        found.append(
            [numbers, same, [state[p]["exp_avg"] for p in same], [float(state[p]["step"]) for p in same]]
        )
    (numbers, mine, moments, steps), (expected, yours, wanted, counted) = found
    assert numbers == expected == [1, 7, 4] and steps == counted == [2, 8, 5]
    same_parameters(mine, yours)
    same_parameters(moments, wanted)


def test_the_step_of_a_parameter_that_has_left_is_its_users():
    for optimizer, ps in pair():
        late = torch.nn.Parameter(torch.ones(9))
        late.grad = torch.ones(9)
        optimizer.add_param_group({"params": [late]})
        optimizer.step()
        group = optimizer.param_groups.pop()
        optimizer.step()
        optimizer.state[late]["step"].fill_(100)
        optimizer.step()
        assert optimizer.state[late]["step"] == 100
        optimizer.add_param_group({"params": group["params"]})
        optimizer.step()
        assert optimizer.state[late]["step"] == 101
        taken = optimizer.state.pop(ps[0])["step"]
        optimizer.step()
        taken.fill_(50)
        optimizer.step()
        assert taken == 50 and optimizer.state[ps[0]]["step"] == 2


def test_saving_without_a_group_that_has_left_keeps_its_state_for_later():
    (optimizer, ps), _ = pair()
    gone = optimizer.param_groups[0]["params"].pop()
    ps[0].grad = torch.ones(16, 1024)
    file = optimizer.state_dict()
    assert len(file["state"]) == len(ps) - 1 and optimizer.state[gone]["exp_avg"].any()
    optimizer.param_groups[0]["params"].append(gone)
    assert optimizer.state_dict()["state"][len(ps) - 1]["step"] == 2


def test_entries_and_step_numbers_that_are_held_stay_those_of_their_parameters():
    (optimizer, ps), _ = pair()
    entry, step = optimizer.state[ps[0]], optimizer.state[ps[0]]["step"]
    optimizer.param_groups[0]["params"].pop()  # state moves
    ps[1].data, ps[1].grad = ps[1].data.bfloat16(), ps[1].grad.bfloat16()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    optimizer.step()
    assert entry is optimizer.state[ps[0]] and entry["exp_avg"].any() and entry["step"] is step
    assert step == 3
    gone = optimizer.state[ps[2]]["step"]
    del optimizer.state[ps[2]]
    optimizer.step()
    assert step == 4 and gone == 3 and optimizer.state[ps[2]]["step"] == 1


def test_a_parameter_twice_in_a_group_does_not_move_all_state_every_step(monkeypatch):
    p = torch.nn.Parameter(torch.ones(5000))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = lk.optim.PagedAdamW([p, p], lr=1e-2)
    monkeypatch.setattr(optimizer, "_move", lambda *_: pytest.fail("moved"))
    p.grad = torch.ones(5000)
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[p]["step"] == 3


def test_what_stands_beside_no_state_does_not_move_all_state_every_step(monkeypatch):
    (optimizer, ps), _ = pair()
    late = torch.nn.Parameter(torch.ones(9))
    optimizer.add_param_group({"params": [late]})
    optimizer.state[late]["only"] = torch.ones(2)
    monkeypatch.setattr(optimizer, "_move", lambda *_: pytest.fail("moved"))
    optimizer.step()
    optimizer.state[late] = {
        "step": torch.tensor(3.0),
        **dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.ones(9)),
    }
    for _ in range(2):
        optimizer.step()
    late.grad = torch.ones(9)
    optimizer.step()
    assert optimizer.state[late]["step"] == 4 and optimizer.state[ps[0]]["step"] == 6


# ---- what cannot be ----


def test_an_entry_that_cannot_be_is_refused_every_time_and_the_others_stay():
    (optimizer, ps), _ = pair()
    state = optimizer.state
    state[ps[0]] = {**state[ps[0]], "step": torch.tensor(40.0)}
    state[ps[1]] = {"step": torch.tensor(5.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(1000, 16)}
    state[ps[2]]["step"] = torch.tensor(70.0)
    for _ in range(3):
        for call in (optimizer.step, optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
            with pytest.raises(ValueError, match=r"exp_avg has shape \(3,\), expected \(1000, 16\)"):
                call()
    state[ps[1]]["exp_avg"] = torch.ones(1000, 16)
    optimizer.step()
    assert [int(state[p]["step"]) for p in ps[:4]] == [41, 6, 71, 3]


def test_a_gradient_of_another_dtype_is_refused_before_the_step_begins():
    (optimizer, ps), _ = pair()
    ps[0].grad_dtype = None
    ps[0].grad = torch.ones(16, 1024, dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"float32 and of shape \(16, 1024\) has a gradient of torch.bfloat16"
    ):
        optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2
    ps[0].grad = None
    optimizer.step()
    assert optimizer.state[ps[1]]["step"] == 3


def test_a_sparse_gradient_for_a_step_that_was_cut_short_is_named(monkeypatch):
    (optimizer, ps), _ = pair()
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_update", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step()
    whole, ps[0].grad = ps[0].grad, torch.ones(16, 1024).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    ps[0].grad = whole
    for written in ("step", "entry"):
        before = optimizer.state[ps[0]]["step"].clone()
        if written == "step":
            optimizer.state[ps[0]]["step"].fill_(50)
        else:
            late = torch.nn.Parameter(torch.ones(3))
            late.grad = torch.ones(3)
        if written == "step":
            with pytest.raises(RuntimeError, match="was changed since"):
                optimizer.step()
            optimizer.state[ps[0]]["step"].copy_(before)
    optimizer.step()
    assert optimizer.state[ps[0]]["step"] == 3


def test_state_that_is_put_while_a_first_step_is_cut_short_is_not_lost_silently(monkeypatch):
    optimizer = lk.optim.PagedAdamW(parameters(), lr=1e-2, page_bytes=PAGE)
    p = optimizer.param_groups[0]["params"][0]
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_update", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            train(optimizer, gradients(1))
    optimizer.state[p] = {
        "step": torch.tensor(9.0),
        "exp_avg": torch.ones_like(p),
        "exp_avg_sq": p.detach() ** 2,
    }
    with pytest.raises(RuntimeError, match="was changed since"):
        optimizer.step()
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_a_compensation_that_is_not_given_is_zero():
    ours, ps = [], []
    for _ in range(2):
        optimizer = lk.optim.PagedAdamW(parameters(torch.bfloat16), lr=1e-2, rounding="kahan")
        ps.append(train(optimizer, gradients(3, torch.bfloat16)))
        ours.append(optimizer)
    file = ours[0].state_dict()
    assert all(entry.pop("compensation") is not None for entry in file["state"].values())
    ours[0].load_state_dict(file)
    for p in ps[1]:
        entry = ours[1].state[p]
        ours[1].state[p] = {name: entry[name] for name in ("step", "exp_avg", "exp_avg_sq")}
    steps = list(gradients(2, torch.bfloat16, seed=5))
    assert same_bits(train(ours[0], iter(steps)), train(ours[1], iter(steps)))


# ---- signals ----


class Interrupted(BaseException):
    pass


def interrupted_at(event, call):
    """Calls, and raises at the line `event` of the package's optimizers; whether it came so far."""
    left = event

    def trace(frame, kind, _):
        nonlocal left
        if "lora_kernels/optim" not in frame.f_code.co_filename:
            return None
        if kind == "line":
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(None)
    return False


def few():
    return [torch.nn.Parameter(torch.linspace(-1, i + 1.0, 40 * i + 3)) for i in range(3)]


def one_step(ps, seed):
    for i, p in enumerate(ps):
        p.grad = torch.linspace(seed, i - 1.0, p.numel())


def prepared(case):
    """An optimizer with a step to make."""
    ps = few()
    optimizer = lk.optim.PagedAdamW(ps, lr=1e-2, page_bytes=PAGE)
    if case != "first":
        one_step(ps, 1.0)
        optimizer.step()
    if case == "written":
        optimizer.state[ps[0]]["step"].fill_(50)
        optimizer.state[ps[1]]["exp_avg"].mul_(2.0)
    if case == "new":
        late = torch.nn.Parameter(torch.ones(7))
        optimizer.add_param_group({"params": [late]})
        ps.append(late)
    if case == "left":
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()]})
    one_step(ps, 2.0)
    return optimizer, ps


def outcome(optimizer, ps):
    state = optimizer.state_dict()["state"]
    return [p.detach().clone() for p in ps], [
        torch.as_tensor(value).clone() for entry in state.values() for value in entry.values()
    ]


@pytest.mark.parametrize("case", ["first", "second", "written", "new", "left"])
def test_a_step_that_is_interrupted_at_any_line_is_made_once(case):
    optimizer, ps = prepared(case)
    optimizer.step()
    # Every line of the plain cases, a third of the others'.
    by = 1 if case in ("first", "second") else 3
    expected, event, finished = outcome(optimizer, ps), 0 - int(torch.randint(by, ())), False
    while not finished:
        event += by
        optimizer, ps = prepared(case)
        tick = optimizer._tick
        came = interrupted_at(event, optimizer.step)
        finished = not came
        if came and not (optimizer._tick > tick and optimizer._all.pending is None):
            optimizer.step()
        for a, b in zip(outcome(optimizer, ps), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), f"at line event {event}"
    assert event > 100


# ---- the counts ----


def test_counts_of_many_parameters_keep_their_tensors_until_most_are_gone():
    ps = [torch.zeros(()) for _ in range(_BLOCK + 10)]
    counts = StepCounts({p: i for i, p in enumerate(ps)})
    held = counts.tensor(ps[-1])
    counts.update({p: i + 1 for i, p in enumerate(ps)})
    assert held == _BLOCK + 10 and counts.tensor(ps[3]) == 4 and not counts.changed()
    held.fill_(7)
    assert counts.changed() == {ps[-1]: 7.0}
    counts.take_in()
    assert counts[ps[-1]] == 7 and not counts.changed()
    counts.tensor(ps[0]).fill_(-1)
    with pytest.raises(ValueError, match="step is -1"):
        counts.take_in()
    counts.tensor(ps[0]).fill_(1)
    again = torch.zeros(())
    for _ in range(_MOST_UNUSED):
        counts.update({again: 1})
        counts.remove([again])
    assert not counts.compact()  # fewer than are in use
    counts.remove(ps[:-1])
    assert counts.compact() and len(counts) == 1 and counts.tensor(ps[-1]) == 7
    held.fill_(9)  # of before
    assert not counts.changed()

"""What may happen to a paged optimizer between and inside of its steps: signals, other parameters and groups,
a compiler."""

import signal

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels import ops_optim

from .paged_cases import PAGE, gradients, parameters, same_bits, train


def signalled(optimizer, after_s: float) -> bool:
    """A step with a signal that comes `after_s` seconds after its beginning. Whether it cut it short."""
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        optimizer.step()
    except InterruptedError:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return False


def test_signals_at_any_moment_leave_no_page_pinned_and_no_update_out(tmp_path):
    """Python raises a signal's exception behind the call that was under way: behind a pin that has waited for
    the disk, or a kernel. One parameter is transposed: its update is in a copy for a moment."""

    def new():
        generator = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(500, 301, generator=generator)) for _ in range(2)]
        ps[1].data = ps[1].data.t()
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator)
        return ps, lk.optim.PagedAdamW(
            ps, lr=1e-2, resident_bytes=4 * PAGE, page_bytes=PAGE, directory=tmp_path
        )

    def raise_error(*_):
        raise InterruptedError

    whole, undisturbed = new()
    disturbed, optimizer = new()
    before = signal.signal(signal.SIGALRM, raise_error)
    cut = 0
    try:
        for step in range(60):
            undisturbed.step()
            if signalled(optimizer, 1e-4 * (1 + step)):
                cut += 1
                if optimizer._tick == step:  # else it came behind the last update
                    optimizer.step()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert cut > 10
    assert optimizer.stats()["pinned"] == 0
    assert same_bits(disturbed, whole)


def test_a_signal_behind_a_kernel_loses_no_update_of_a_copy(monkeypatch):
    """A parameter that is not contiguous is updated in a copy, and the page says already that it was."""
    whole, cut = (nn.Parameter(torch.ones(4, 3).t()) for _ in range(2))
    undisturbed, optimizer = lk.optim.PagedAdamW([whole]), lk.optim.PagedAdamW([cut])
    whole.grad, cut.grad = torch.ones(3, 4), torch.ones(3, 4)
    undisturbed.step()
    op = ops_optim.adamw_step

    def late(*arguments):
        op(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops_optim, "adamw_step", late)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    assert same_bits([cut], [whole])


def test_a_signal_behind_a_pin_leaves_no_page_pinned(monkeypatch, tmp_path):
    optimizer = lk.optim.PagedAdamW(parameters(), resident_bytes=1, page_bytes=PAGE, directory=tmp_path)
    train(optimizer, gradients(1))
    (pager,) = optimizer._all.pages._pagers.values()

    class Interrupted:
        """The pager, behind whose first pin a signal comes."""

        def __getattr__(self, name):
            return getattr(pager, name)

        def pin(self, *arguments):
            pager.pin(*arguments)
            raise KeyboardInterrupt

    (device,) = optimizer._all.pages._pagers
    for call in (optimizer.step, optimizer.state_dict):
        with monkeypatch.context() as patch:
            patch.setitem(optimizer._all.pages._pagers, device, Interrupted())
            with pytest.raises(KeyboardInterrupt):
                call()
        optimizer.step()
        assert optimizer.stats()["pinned"] == 0


def test_parameters_that_change_dtype_or_group_take_their_state_with_them(tmp_path):
    """A page is updated as of one dtype and with the hyperparameters of one group: with the old ones a
    compensation would lie over a neighbour's state, or another group's lr move the parameter."""
    a, b, c, d = (nn.Parameter(torch.randn(1000)) for _ in range(4))
    optimizer = lk.optim.PagedAdamW(
        [{"params": [a, b], "lr": 0.0}, {"params": [c, d], "lr": 1.0}],
        rounding="kahan",
        resident_bytes=4 * PAGE,
        directory=tmp_path,
    )
    train(optimizer, [[torch.randn(1000) for _ in range(4)]])
    before = optimizer.state_dict()["state"]
    for p in (a, b):
        p.grad, p.data = None, p.data.bfloat16()
    a.grad, c.grad, d.grad = torch.randn(1000).bfloat16(), None, None
    optimizer.step()
    after = optimizer.state_dict()["state"]
    assert set(after[0]) - set(before[0]) == {"compensation"} and after[0]["step"] == 2
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[1][name], before[1][name])  # of the neighbour, which had no step

    optimizer.param_groups.pop(0)
    c.grad, old = torch.zeros(1000), c.detach().clone()
    optimizer.step()
    m, v = 0.9 * before[2]["exp_avg"] / (1 - 0.9**2), 0.999 * before[2]["exp_avg_sq"] / (1 - 0.999**2)
    torch.testing.assert_close(c.detach(), old * 0.99 - m / (v.sqrt() + 1e-8))
    assert list(optimizer.state_dict()["state"]) == [0, 1]
    assert optimizer.state[c]["step"] == 2 and optimizer.state[d]["step"] == 1


def test_a_parameter_that_has_grown_is_refused_and_nothing_changes():
    p = nn.Parameter(torch.ones(1000))
    optimizer = lk.optim.PagedAdamW([p])
    train(optimizer, [[torch.ones(1000)]])
    p.grad, p.data = None, torch.ones(2000)
    p.grad = torch.ones(2000)
    with pytest.raises(ValueError, match=r"shape \(2000,\), expected 1000 elements"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2000))
    optimizer.close()
    optimizer.step()
    assert (p != 1).all()


def test_a_hyperparameter_that_cannot_be_begins_no_step():
    p = nn.Parameter(torch.ones(4))
    optimizer = lk.optim.PagedAdamW([p])
    train(optimizer, [[torch.ones(4)]])
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr is -1.0"):
        optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_a_compiled_step_is_the_step():
    """Dynamo cannot follow the pages, and is not asked to: what it took for constant would never change."""
    for wrap in (lambda o: o.step, lambda o: lambda: o.step()):
        plain = lk.optim.PagedAdamW(parameters())
        expected = train(plain, gradients(3))
        optimizer = lk.optim.PagedAdamW(parameters())
        compiled = torch.compile(wrap(optimizer), backend="eager")
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for given in gradients(3):
            for p, gradient in zip(trained, given, strict=True):
                p.grad = gradient.clone()
            compiled()
        assert same_bits(trained, expected)
        assert all(entry["step"] == 3 for entry in optimizer.state_dict()["state"].values())

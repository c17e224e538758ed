"""Paged optimizers on the device: the CPU's bits whatever is resident, and memory is given back."""

import pytest
import torch
from optim.paged_cases import PAGE, flat, gradients, parameters, same_bits, train
from torch import nn

import lora_kernels as lk

OPTIMIZERS = (lk.optim.PagedAdamW, lk.optim.PagedAdamW8bit, lk.optim.PagedLion, lk.optim.PagedLion8bit)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def on(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(device)) for p in parameters(dtype)]


def trained_on(device, kind, dtype=torch.float32, steps: int = 4, **options):
    optimizer = kind(on(device, dtype), lr=1e-3, page_bytes=PAGE, **options)
    train(optimizer, ([g.to(device) for g in given] for given in gradients(steps, dtype)))
    return optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_the_bits_are_those_of_the_cpu_whatever_is_resident(kind, rounding, cuda):
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    expected = trained_on(torch.device("cpu"), kind, dtype, rounding=rounding)
    weights = train(expected, iter(()))
    for budget in (None, 1, 64 * PAGE):  # 8 pages, 2 pages, all
        optimizer = trained_on(cuda, kind, dtype, rounding=rounding, resident_bytes=budget)
        assert same_bits([p.cpu() for p in train(optimizer, iter(()))], weights)
        assert optimizer.stats()["peak_resident_bytes"] <= (budget or 8 * PAGE) + 2 * PAGE
        for mine, theirs in zip(
            optimizer.state_dict()["state"].values(), expected.state_dict()["state"].values(), strict=True
        ):
            for name, value in theirs.items():
                assert torch.equal(torch.as_tensor(mine[name]).cpu(), torch.as_tensor(value)), name
        optimizer.close()


def test_steps_on_another_stream_and_eviction_between_steps(cuda):
    weights = train(trained_on(torch.device("cpu"), lk.optim.PagedAdamW), iter(()))
    optimizer = lk.optim.PagedAdamW(on(cuda), lr=1e-3, page_bytes=PAGE, resident_bytes=2 * PAGE)
    stream = torch.cuda.Stream()
    for i, given in enumerate(gradients(4)):
        moved = [g.to(cuda) for g in given]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream if i % 2 else torch.cuda.current_stream()):
            train(optimizer, [moved])
        torch.cuda.synchronize()
        assert optimizer.evict() > 0 and optimizer.stats()["resident_bytes"] == 0
    assert same_bits([p.cpu() for p in train(optimizer, iter(()))], weights)


def test_device_memory_stays_within_the_budget_and_is_given_back(cuda):
    """64 MiB of parameters have 128 MiB of state; 8 pages of 2 MiB of it are on the device."""
    p = nn.Parameter(torch.zeros(16 << 20, device=cuda))
    p.grad = torch.ones_like(p)
    optimizer = lk.optim.PagedAdamW([p])
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    during = torch.cuda.mem_get_info()[0]
    stats = optimizer.stats()
    assert stats["pages"] * (2 << 20) >= 128 << 20 and stats["bytes_read"] > 0
    assert before - during <= (16 << 20) + (40 << 20)  # and the driver's own for two streams and a module
    optimizer.close()
    assert torch.cuda.mem_get_info()[0] >= during + (14 << 20)
    assert bool((p != 0).all())


def test_torchs_adamw_on_the_device_agrees(cuda):
    theirs = torch.optim.AdamW(on(cuda), lr=1e-3)
    given = [[g.to(cuda) for g in step] for step in gradients(20)]
    ours = lk.optim.PagedAdamW(on(cuda), lr=1e-3, page_bytes=PAGE)
    for a, b in zip(flat(train(theirs, iter(given))), flat(train(ours, iter(given))), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(flat(train(theirs, iter(given[:3]))), flat(train(ours, iter(given[:3]))), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)

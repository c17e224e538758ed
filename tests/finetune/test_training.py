"""The learning rate's course, and what one step computes."""

from itertools import pairwise

import pytest
import simt_backend
import torch
from variants import variant

import lora_kernels as lk
from lora_kernels.finetune.data import Rows
from lora_kernels.finetune.settings import Settings
from lora_kernels.finetune.training import Trainer, evaluate, lr_factor


def trainer(model, rows, **options) -> Trainer:
    torch.manual_seed(0)
    lk.inject(model, "all-linear", r=4, lora_alpha=8, quantize="nf4")
    settings = Settings(lr=1e-2, seed=0, **options)
    return Trainer(model, rows, settings, 8, 0, torch.device("cpu"), torch.float32)


@pytest.fixture
def load(tiny_model):
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def rows() -> Rows:
    """Records whose numbers of targets differ much: 2, 27, 5, ..."""
    lengths = [3, 28, 6, 20, 9, 31, 4, 17]
    return Rows.from_lists([torch.randint(0, 256, (n,)) for n in lengths], [1, 1, 1, 8, 1, 1, 1, 1])


def test_accumulating_is_one_large_batch(load, rows):
    """Every target counts the same, in whichever batch it stands."""
    runs = [trainer(load(), rows, batch_size=4), trainer(load(), rows, batch_size=2, grad_accum=2)]
    for run in runs:
        for _ in range(3):
            run.train_step(lambda: None)
    a, b = (run.history for run in runs)
    assert a.tokens == b.tokens
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(a.grad_norms, b.grad_norms, rtol=1e-4, atol=0)


def test_an_epoch_of_steps_reads_every_row_once(load, rows):
    run = trainer(load(), rows, batch_size=2)
    for _ in range(8):
        run.train_step(lambda: None)
    first, second = run.history.tokens[:4], run.history.tokens[4:]
    assert sum(first) == sum(second) == len(rows.tokens)
    assert first != second and len(set(first)) > 1


def test_evaluation_does_not_depend_on_the_batch_size_and_changes_nothing(load, rows):
    model = load().train()
    state = torch.get_rng_state()
    losses = [
        evaluate(model, rows, 99, size, 0, torch.device("cpu"), lambda: None) for size in (1, 3, len(rows))
    ]
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=1e-5, atol=0)
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_then_falls_to_zero(scheduler):
    settings = Settings(lr_scheduler=scheduler, warmup_ratio=0.1)
    course = [lr_factor(step, 100, settings) for step in range(100)]
    assert course[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert course[10] == 1.0 and max(course) == 1.0
    assert all(a >= b > 0 for a, b in pairwise(course[10:]))
    assert scheduler == "constant" or course[-1] < 0.02


def test_lora_plus_raises_the_rate_of_b_alone(load, rows):
    run = trainer(load(), rows, batch_size=2, lora_plus_ratio=8.0, warmup_ratio=0.0)
    run.train_step(lambda: None)
    by_name = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    assert by_name["B"] == pytest.approx(8 * by_name["A"]) and by_name["A"] == pytest.approx(1e-2)


def loss_on_all(run: Trainer) -> float:
    return evaluate(run.model, run.rows, len(run.rows), 4, 0, torch.device("cpu"), lambda: None)


def test_training_by_the_cuda_kernels_follows_the_cpus_losses(load, rows, monkeypatch):
    """On the host stand-in: every linear layer's forward and backward is a launch, and it learns the same."""
    calls = {"forward": 0, "backward": 0}
    launchers = simt_backend.backend._launchers
    for kind, name in (("forward", "lora_linear_mixed"), ("backward", "lora_linear_backward_dx")):
        whole = getattr(launchers, name)

        def counted(*args, kind=kind, whole=whole):
            calls[kind] += 1
            whole(*args)

        monkeypatch.setattr(launchers, name, counted, raising=False)
    histories, on_all_rows = [], []
    for name in ("cpu", "simt-80"):
        with variant(name):
            run = trainer(load().bfloat16(), rows, batch_size=2, lora_dropout=0.1)
            if name == "cpu":
                on_all_rows.append(loss_on_all(run))
            for _ in range(4):
                run.train_step(lambda: None)
            histories.append(run.history)
            if name == "cpu":
                on_all_rows.append(loss_on_all(run))
    a, b = histories
    assert calls == {
        "forward": 4 * 14,
        "backward": 4 * 11,
    }  # what q, k and v of the first layer read needs none
    torch.testing.assert_close(a.losses, b.losses, rtol=2e-2, atol=0)
    torch.testing.assert_close(a.grad_norms, b.grad_norms, rtol=0.1, atol=0)
    assert on_all_rows[1] < on_all_rows[0]  # two steps' losses are of different rows

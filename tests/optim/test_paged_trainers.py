"""DDP, FSDP2, DCP, Accelerate and the Hugging Face Trainer with paged optimizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels as lk

from . import distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")


def run(kind: str, folder: Path, bits: int, processes: int = 2) -> dict[str, torch.Tensor]:
    store = folder / f"store_{kind}"
    command = [sys.executable, distributed.__file__, kind]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(processes), str(store), str(folder), str(bits)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for rank in range(processes)
    ]
    for process in started:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    return torch.load(folder / "trained.pt", weights_only=True)


def alone(bits: int) -> dict[str, torch.Tensor]:
    net = distributed.model()
    distributed.train(net, distributed.optimizer_of(net, bits), distributed.batches())
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_same_trajectory(trained: dict, expected: dict, bits: int) -> None:
    """Gradients are summed in another order, and 8-bit blocks of a shard are not the whole tensor's."""
    start = distributed.model().state_dict()
    for name, p in expected.items():
        moved = (p - start[name]).norm()
        assert moved > 0.1 * distributed.STEPS * 1e-2 * p.numel() ** 0.5
        assert (trained[name] - p).norm() <= (1e-4 if bits == 32 else 3e-2) * moved, name


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["ddp", "partial", "fsdp"])
def test_two_processes_train_as_one_does(kind, bits, tmp_path):
    assert_same_trajectory(run(kind, tmp_path, bits), alone(bits), bits)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_distributed_checkpoint_is_gone_on_from(bits, tmp_path):
    run("save", tmp_path, bits)
    assert_same_trajectory(run("load", tmp_path, bits), alone(bits), bits)


def test_a_distributed_checkpoint_loads_into_another_number_of_processes(tmp_path):
    run("save", tmp_path, 32)
    assert_same_trajectory(run("load", tmp_path, 32, processes=1), alone(32), 32)


def test_accelerate_prepares_it(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = distributed.model()
    optimizer = distributed.optimizer_of(net, 32)
    net, optimizer = accelerator.prepare(net, optimizer)
    given = distributed.batches()
    for x, target in given[:3]:
        optimizer.zero_grad()
        accelerator.backward((net(x) - target).square().mean())
        optimizer.step()
    accelerator.save_state(str(tmp_path / "state"), safe_serialization=False)
    for x, target in given[3:]:  # lost
        optimizer.zero_grad()
        accelerator.backward((net(x) + target).square().mean())
        optimizer.step()
    accelerator.load_state(str(tmp_path / "state"))
    distributed.train(net, optimizer, given[3:])
    for name, p in alone(32).items():
        assert torch.equal(net.state_dict()[name], p), name


def test_the_hugging_face_trainer_takes_it_and_resumes_paged(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = distributed.model()

        def forward(self, x, labels):
            predicted = self.net(x)
            return {"loss": (predicted - labels).square().mean(), "logits": predicted}

    rows = [{"x": x, "labels": t} for x, t in zip(*distributed.batches()[0], strict=True)]

    def train(folder: str, steps: int, resume: bool, **options) -> tuple[dict, lk.optim.PagedAdamW]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=8,
            save_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            seed=0,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=Net(),
            args=arguments,
            train_dataset=rows,
            optimizer_cls_and_kwargs=(lk.optim.PagedAdamW, {"lr": 1e-2, **options}),
        )
        trainer.train(resume_from_checkpoint=resume)
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return weights, trainer.optimizer.optimizer

    expected, _ = train("whole", 4, False)
    train("parts", 2, False)
    resumed, optimizer = train("parts", 4, True, resident_bytes=1 << 17, page_bytes=1 << 16)
    for name, p in expected.items():
        assert torch.equal(resumed[name], p), name
    assert isinstance(optimizer, lk.optim.PagedAdamW)
    assert 0 < optimizer.stats()["peak_resident_bytes"] <= 1 << 17

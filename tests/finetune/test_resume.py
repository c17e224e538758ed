"""An interrupted run goes on to the same bits, and a full disk costs nothing that was there."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.adapters import files
from lora_kernels.finetune import checkpoint, cli
from lora_kernels.finetune.output import locked

from .conftest import run_process

# Ends the process in the middle of step 6: after its forward and backward pass, before its update.
STOP_IN_STEP_6 = """
import os, signal
from lora_kernels.finetune import training
loss_of = training.target_loss
calls = 0
def target_loss(model, *rest):
    global calls
    calls += model.training
    result = loss_of(model, *rest)
    if calls == 6 + 2:  # two passes measure the memory
        os.kill(os.getpid(), signal.{signal})
    return result
training.target_loss = target_loss
import lora_kernels.finetune.measure
"""


def results(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "metrics.json").read_text()), load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def uninterrupted(arguments, tmp_path) -> tuple[dict, dict[str, torch.Tensor]]:
    out = tmp_path / "whole"
    assert cli.main([*arguments, "--output", str(out)]) == 0
    return results(out)


def assert_same(got: tuple, expected: tuple) -> None:
    metrics, adapter = got
    whole, whole_adapter = expected
    assert metrics["losses"] == whole["losses"] and len(metrics["losses"]) == 8
    assert metrics["grad_norms"] == whole["grad_norms"]
    assert metrics["evaluation"] == whole["evaluation"]
    assert metrics["sample"] == whole["sample"]
    assert adapter.keys() == whole_adapter.keys()
    assert all(torch.equal(adapter[name], whole_adapter[name]) for name in adapter)


@pytest.mark.parametrize(
    ("name", "status", "kept"),
    [("SIGKILL", -signal.SIGKILL, 4), ("SIGINT", 130, 5), ("SIGTERM", 143, 5)],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    arguments, tmp_path, uninterrupted, capsys, name, status, kept
):
    out = tmp_path / "out"
    done = run_process(arguments, before=STOP_IN_STEP_6.replace("{signal}", name))
    assert done.returncode == status, done.stderr
    if name != "SIGKILL":
        last = done.stderr.splitlines()[-1]
        assert f"saved after step 5 of 8; go on with --resume --output {out}" in last
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]
    assert checkpoint.load(out)["step"] == kept
    assert cli.main(["--resume", "--output", str(out)]) == 0
    assert_same(results(out), uninterrupted)
    assert not (out / "checkpoint.pt").exists()
    assert cli.main(["--resume", "--output", str(out)]) == 2
    assert "the run there is finished" in capsys.readouterr().err


# Ends the process while it writes its {n}-th checkpoint: the new one is on the disk, the old one in force.
KILLED_WRITING = """
import os, signal
fsync, writes = os.fsync, 0
def killed(descriptor):
    global writes
    writes += 1
    fsync(descriptor)
    if writes == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
"""


@pytest.mark.parametrize("n", [1, 3])
def test_a_kill_while_a_checkpoint_is_written_leaves_no_obstacle(arguments, tmp_path, capsys, n):
    out, twin = tmp_path / "out", tmp_path / "twin"
    done = run_process(arguments, before=KILLED_WRITING.replace("{n}", str(n)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    (part,) = (path.name for path in out.iterdir() if path.name != "checkpoint.pt")
    assert re.fullmatch(r"\.checkpoint\.pt\.\d+\.part", part)

    def refused(how: list[str], message: str) -> None:
        assert cli.main([*arguments, *how]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    def finishes(how: list[str], folder: Path) -> None:
        assert cli.main([*arguments, *how, "--output", str(folder)]) == 0
        whole = {"adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.json"}
        assert {path.name for path in folder.iterdir()} == whole

    if n == 1:
        refused(["--resume"], "nothing to resume")
        finishes([], out)
    else:
        refused([], "holds an unfinished run: --resume continues it")
        shutil.copytree(out, twin)
        finishes(["--overwrite"], twin)
        finishes(["--resume"], out)


def test_accumulated_batches_resume_to_the_same_bits_as_well(arguments, tmp_path, monkeypatch):
    """Also with a signal between two batches of one step, LoRA+ and NF4 off."""
    arguments = [*arguments, "--grad-accum", "2", "--lora-plus-ratio", "4", "--quantize", "none"]
    assert cli.main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    from lora_kernels.finetune import training

    loss_of, calls = training.target_loss, 0

    def target_loss(model, *rest):
        nonlocal calls
        calls += model.training
        if calls == 7:  # the first of two batches of step 4
            os.kill(os.getpid(), signal.SIGINT)
        return loss_of(model, *rest)

    monkeypatch.setattr(training, "target_loss", target_loss)
    assert cli.main(arguments) == 130
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "out")["step"] == 3
    assert cli.main(["--resume", "--output", str(tmp_path / "out")]) == 0
    assert_same(results(tmp_path / "out"), results(tmp_path / "whole"))


@pytest.fixture
def interrupted(arguments, tmp_path, monkeypatch) -> Path:
    """The folder of a run that Ctrl-C ended after step 3."""
    from lora_kernels.finetune.training import Trainer

    step = Trainer.train_step

    def train_step(self, check_stop):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, check_stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        assert cli.main(arguments) == 130
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("settings"), "'settings' is missing or of another type"),
        (lambda state: state.update(settings=[]), "'settings' is missing or of another type"),
        (lambda state: state.update(sources=None), "'sources' is missing or of another type"),
        (lambda state: state["settings"].update(r="four"), "holds settings that cannot be"),
        (lambda state: state["adapter"].popitem(), "does not fit this run"),
        (lambda state: state["history"].update(more=1), "does not fit this run"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(interrupted, capsys, spoil, message):
    path = interrupted / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    spoil(state)
    torch.save(state, path)
    before = path.read_bytes()
    assert cli.main(["--resume", "--output", str(interrupted)]) == 2
    assert "argument --resume: " in (last := capsys.readouterr().err.splitlines()[-1]) and message in last
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lr", "0.5"], "--lr: got 0.5, but the run to resume has 0.01"),
        (["--steps", "9"], "--steps: got 9, but the run to resume has 8"),
        (["--seed", "1"], "--seed: got 1"),
        (["--quantize", "none"], "--quantize: got none"),
        (["--use-rslora"], "--use-rslora: got True"),
        (["--data", "/other"], "--data: got /other"),
    ],
)
def test_resuming_with_another_setting_is_refused(interrupted, capsys, given, message):
    before = (interrupted / "checkpoint.pt").read_bytes()
    assert cli.main(["--resume", "--output", str(interrupted), *given]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert (interrupted / "checkpoint.pt").read_bytes() == before


def test_resuming_with_other_data_is_refused(interrupted, text_file, capsys):
    text_file.write_text(text_file.read_text().replace("cube", "CUBE"))
    assert cli.main(["--resume", "--output", str(interrupted)]) == 2
    assert "is not what the run was started with" in capsys.readouterr().err.splitlines()[-1]


def test_repeating_the_options_and_changing_harmless_ones_is_fine(interrupted, arguments):
    assert cli.main([*arguments, "--resume", "--save-every", "5"]) == 0


def test_an_unfinished_run_is_not_overwritten_by_accident(interrupted, arguments, capsys):
    assert cli.main(arguments) == 2
    assert "holds an unfinished run: --resume continues it" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert cli.main(arguments) == 2
    assert "holds the results of another run" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--resume"], ["--overwrite"]])
def test_two_runs_do_not_write_in_one_folder(interrupted, arguments, capsys, options):
    before = (interrupted / "checkpoint.pt").read_bytes()
    with locked(interrupted):
        assert cli.main([*arguments, *options]) == 2
    assert "another run is writing in" in capsys.readouterr().err.splitlines()[-1]
    assert (interrupted / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("file", ["checkpoint.pt", "adapter_model.safetensors", "loss.png", "metrics.json"])
def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(
    arguments, tmp_path, capsys, monkeypatch, uninterrupted, file
):
    """The disk is full at the third write of the checkpoint, or when the results are written."""
    fsync, left, out = os.fsync, 2 if file == "checkpoint.pt" else 0, tmp_path / "out"

    def full(descriptor: int) -> None:
        nonlocal left
        if f".{file}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert cli.main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last.startswith("lora_kernels finetune: error: cannot write ") and "No space left on device" in last
    )
    assert "--resume" in last
    whole = {"checkpoint.pt", "adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.json"}
    assert {path.name for path in out.iterdir()} <= whole - ({file} - {"checkpoint.pt"})
    assert checkpoint.load(out)["step"] == (2 if file == "checkpoint.pt" else 8)
    assert cli.main(["--resume", "--output", str(out)]) == 0
    assert_same(results(out), uninterrupted)


def test_a_disk_that_is_full_from_the_start_leaves_nothing(arguments, tmp_path):
    """A real refusal by the operating system: files may not grow beyond 4 KiB."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    done = run_process([*arguments, "--r", "16"], before=limit)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "cannot write " in last and "File too large" in last and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()

"""--optim and --optim-resident-mb: the same losses from memory and from a file; kills and a full disk."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_kernels.finetune import cli

from .conftest import run_process
from .test_resume import STOP_IN_STEP_6, assert_same, results


@pytest.fixture
def many(arguments) -> list[str]:
    """A run whose state fills some twenty pages of 64 KiB."""
    return [*arguments, "--r", "64", "--lora-plus-ratio", "4"]


def run(arguments: list[str], out: Path, *options: str) -> tuple[dict, dict]:
    assert cli.main([*arguments, "--output", str(out), *options]) == 0
    return results(out)


def test_losses_are_the_same_whatever_is_resident(many, tmp_path):
    expected = run(many, tmp_path / "adamw")
    paged = run(many, tmp_path / "paged", "--optim", "paged_adamw")
    little = run(many, tmp_path / "little", "--optim", "paged_adamw", "--optim-resident-mb", "0.2")
    for got in (paged, little):
        assert_same(got, expected)
    state = [r[0]["memory"]["measured"]["optimizer_state"] for r in (expected, paged, little)]
    assert state[0] == state[1] > 1 << 20
    assert state[2] == 4 << 16  # 0.2 MiB in pages of 64 KiB


@pytest.mark.parametrize("optim", ["paged_adamw8bit", "paged_lion"])
def test_the_other_optimizers_train_and_resume_to_the_same_bits(many, tmp_path, optim):
    lr = ("--lr", "1e-3") if optim == "paged_lion" else ()
    options = (*lr, "--optim", optim)
    expected = run(many, tmp_path / "whole", *options)
    losses = expected[0]["losses"]
    assert losses[-1] < losses[0]
    out = tmp_path / "out"
    given = [*many, *options, "--optim-resident-mb", "0.2"]
    assert run_process(given, before=STOP_IN_STEP_6.replace("{signal}", "SIGKILL")).returncode == -9
    assert cli.main(["--resume", "--output", str(out), "--optim-resident-mb", "0.1"]) == 0
    assert_same(results(out), expected)


KILLED_IN_THE_MIDDLE_OF_AN_UPDATE = """
import os, signal
from lora_kernels import ops_optim
step, calls = ops_optim.adamw_step, 0
def adamw_step(*arguments):
    global calls
    calls += 1
    if calls == 100:  # of some twenty in each of eight steps
        os.kill(os.getpid(), signal.SIGKILL)
    step(*arguments)
ops_optim.adamw_step = adamw_step
"""


def test_a_kill_in_the_middle_of_an_update_leaves_no_file_and_resumes_to_the_same_bits(many, tmp_path):
    expected = run(many, tmp_path / "whole")
    out, pages = tmp_path / "out", tmp_path / "pages"
    pages.mkdir()
    options = ["--optim", "paged_adamw", "--optim-resident-mb", "0.2"]
    done = run_process([*many, *options], before=KILLED_IN_THE_MIDDLE_OF_AN_UPDATE, TMPDIR=str(pages))
    assert done.returncode == -9, done.stderr
    assert not list(pages.iterdir())
    assert cli.main(["--resume", "--output", str(out)]) == 0
    assert_same(results(out), expected)


def test_a_full_disk_is_one_clear_error_and_the_run_can_go_on(many, tmp_path):
    """The limit on a file's size stands in for a full disk; the checkpoint before it stays."""
    out = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))"
    options = ["--optim", "paged_adamw", "--optim-resident-mb", "0.2"]
    done = run_process([*many, *options], before=limit)
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "Traceback" not in done.stderr
    assert "--optim paged_adamw: " in error and "File too large; make room, or name another folder" in error
    assert not (out / "metrics.json").exists()
    assert cli.main([*many, *options, "--overwrite", "--output", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text())["checks"]["passed"]
    assert load_file(out / "adapter_model.safetensors")

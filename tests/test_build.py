"""The ways to build and to set up: CI builds for every GPU, and each list of packages says the same."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_baseline import TOKEN_ORDER
from bench.shapes import TOKENS_GPU

ROOT = Path(__file__).parents[1]


def test_ci_builds_for_every_architecture_wherever_it_runs(tmp_path):
    """setup.py looks at the variable CI, which not everything that runs .ci/run sets."""
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "make $* with CI=$CI"\n')
    make.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "make test with CI=1"


def test_the_extra_test_is_what_make_test_installs():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    needs = re.search(r"^TEST_NEEDS := ((?:.*\\\n)*.*)$", makefile, re.M)[1].replace("\\\n", " ")
    assert set(extras["test"]) - {"lora-kernels[finetune]"} == set(shlex.split(needs))


def test_the_gpu_baseline_measures_every_number_of_tokens():
    assert sorted(TOKEN_ORDER) == sorted(TOKENS_GPU) and max(TOKENS_GPU) == 16384


def test_the_gpu_script_says_why_the_tests_are_missing():
    """Without pytest the smoke test is all that runs: a stage that was skipped, not one that failed."""
    script = (ROOT / "bench" / "gpu.sh").read_text()
    assert re.search(r"^ *record tests skipped 0 .pytest is not importable", script, re.M)
    assert subprocess.run(["bash", "-n", ROOT / "bench" / "gpu.sh"], check=False).returncode == 0


def test_the_smoke_test_ends_in_one_line_without_a_device():
    done = subprocess.run(
        [sys.executable, "tests/gpu/smoke.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "smoke: no CUDA device" in done.stdout and not done.stderr

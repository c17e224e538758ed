"""tests/gpu without a GPU: bodies and scripts pass on the stand-in, so a device finds its own faults only."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Some of everything; LORA_KERNELS_GPU_TESTS=stand-in pytest tests/gpu runs all, in minutes.
SOME = "mask or subset or contiguous or touched or alone or no_tokens or 64_adapters or (9-333 and bf)"


def on_the_stand_in(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LORA_KERNELS_REQUIRE_GPU"}
    environment |= {"LORA_KERNELS_GPU_TESTS": "stand-in", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_bodies_of_the_gpu_tests_pass_on_the_stand_in():
    done = on_the_stand_in("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", SOME)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 30


def test_every_launch_for_the_sanitizers_gives_a_right_result():
    done = on_the_stand_in("tests/gpu/sanitize.py")
    assert done.returncode == 0 and "sanitize: 0 wrong results" in done.stdout, done.stdout + done.stderr


def test_the_smoke_tests_training_steps_are_right():
    code = """
import sys
sys.path.insert(0, "tests/gpu")
import place
import smoke
import lora_kernels as lk
device, backend, _ = place.take()
with lk.use_backend(backend):
    print("wrong:", smoke.wrong_training_step(device))
"""
    done = on_the_stand_in("-c", code)
    assert "wrong: None" in done.stdout, done.stdout + done.stderr


def test_the_gpu_script_refuses_an_unknown_stage(tmp_path):
    done = subprocess.run(
        ["bash", "bench/gpu.sh", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "STAGES": "bench tset"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and re.search(
        "STAGES has tset, expected all, correct, bench, tune", done.stderr
    )

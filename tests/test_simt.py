"""The stand-in itself: planted bugs are caught, right kernels pass, a seed repeats a failure."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-DLK_SIMT"]


def compile_program(folder: Path, name: str, *sources: Path, flags: list[str] = FLAGS) -> Path:
    """The program, its objects compiled two at a time."""
    sources = (*sources, ROOT / "csrc" / "simt" / "engine.cpp")
    objects = [folder / f"{source.name}.o" for source in sources]
    waiting = [
        ["g++", *flags, "-x", "c++", "-c", str(s), "-o", str(o)]
        for s, o in zip(sources, objects, strict=True)
    ]
    while waiting:
        running = [subprocess.Popen(command) for command in waiting[:2]]
        assert all(process.wait() == 0 for process in running)
        waiting = waiting[2:]
    program = folder / name
    subprocess.run(["g++", *flags, *map(str, objects), "-o", str(program)], check=True)
    return program


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def drive_all(program: Path, seeds: int) -> None:
    """Every kernel under seeds 1, 2, ...: half of them by each of two processes."""
    half = seeds // 2
    parts = [(half, 1), (seeds - half, 1 + half)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen([program, "all", str(n), str(first)], **pipes) for n, first in parts]
    for process, (n, _) in zip(running, parts, strict=True):
        output, _ = process.communicate()
        assert process.returncode == 0 and output.count(f"{n} seeds passed") >= 3, output[-3000:]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return compile_program(
        tmp_path_factory.mktemp("broken"), "broken", ROOT / "tests" / "simt" / "broken_kernels.cu"
    )


@pytest.fixture(scope="module")
def kernels():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def test_every_planted_bug_is_caught_within_100_seeds_and_right_kernels_pass(broken):
    done = run(broken, 100)
    assert done.returncode == 0, done.stdout
    count, missed, right, failed = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert count >= 15 and missed == 0 and right >= 5 and failed == 0


def test_a_failure_is_the_same_every_time(broken):
    first, second = run(broken, 20), run(broken, 20)
    assert first.stdout == second.stdout and "(seed " in first.stdout


def test_the_kernels_pass_100_seeds(tmp_path, kernels):
    program = compile_program(tmp_path, "drive", *kernels, ROOT / "tests" / "simt" / "drive.cpp")
    drive_all(program, 100)
    assert run(program, "no_such_kernel").returncode == 2


def test_the_kernels_and_the_stand_in_are_clean_under_sanitizers(tmp_path, kernels):
    flags = [*FLAGS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
    program = compile_program(tmp_path, "drive", *kernels, ROOT / "tests" / "simt" / "drive.cpp", flags=flags)
    drive_all(program, 15)


def test_a_deleted_wait_is_caught(capsys):
    """The proof script on one of its deletions; `python tests/simt/deletions.py` runs them all."""
    deletions = runpy.run_path(str(ROOT / "tests" / "simt" / "deletions.py"))
    only = "lora_linear_mixed.cuh #0: 'ptx::cp_async_wait"
    assert deletions["main"](["--only", only, "--seeds", "20"]) == 0
    assert "1 deletions, 0 neither" in capsys.readouterr().out
    names = {d.file for d in deletions["synchronisation"]()}
    assert {"lora_linear_decode.cuh", "lora_linear_decode_sm90.cu", "nf4_dequantize.cu"} <= names

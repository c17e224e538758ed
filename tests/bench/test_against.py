"""The regression check against another build: its rule on made-up noise, and the processes that it times."""

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench import against
from bench.against import BLOCK, LEAST_PAIRS, MOST_PAIRS, SLOWER, block_excess, verdict
from bench.compare_calls import CASES

ROOT = Path(__file__).resolve().parents[2]
CASE = CASES[-1]  # the quickest


@pytest.mark.parametrize("deviation, wrong", [(0.01, 0.002), (0.03, 0.002), (0.06, 0.01)])
@pytest.mark.parametrize("tails", [False, True])
def test_ten_percent_are_caught_and_noise_is_not(deviation, wrong, tails, seed):
    rng = random.Random(seed)

    def noise() -> float:
        heavy = math.sqrt(rng.gammavariate(2.5, 0.4)) if tails else 1.0  # Student's t of five degrees
        return deviation * rng.gauss(0, 1) / heavy

    runs = 1500
    false = sum(verdict(lambda _: noise())[0] for _ in range(runs))
    missed = sum(not verdict(lambda _: noise() + SLOWER)[0] for _ in range(runs))
    assert false <= wrong * runs and missed <= wrong * runs


def test_more_pairs_where_they_lie_apart():
    for excess, slower in ((0.0, False), (SLOWER, True)):
        worse, mean, error, pairs = verdict(lambda _, excess=excess: excess)
        assert (worse, pairs) == (slower, LEAST_PAIRS) and mean == pytest.approx(excess) and error > 0
    near = SLOWER / 2
    for offset in (-0.001, 0.001):
        worse, mean, error, pairs = verdict(lambda i, offset=offset: near + offset + (0.1 if i % 2 else -0.1))
        assert pairs == MOST_PAIRS and worse == (offset > 0)
        assert mean == pytest.approx(near + offset) and error == pytest.approx(0.1 / math.sqrt(23))


def test_a_neighbour_that_slows_either_side_for_a_while_does_not_count(seed):
    rng = random.Random(seed)
    old = [1.0 + (rng.random() < 0.3) * rng.random() for _ in range(20 * BLOCK)]
    new = [1.1 + (rng.random() < 0.3) * rng.random() for _ in range(20 * BLOCK)]
    old[: 8 * BLOCK] = [2.0 * t for t in old[: 8 * BLOCK]]  # both, for many blocks
    new[: 8 * BLOCK] = [2.0 * t for t in new[: 8 * BLOCK]]
    assert block_excess(old, new) == pytest.approx(SLOWER, abs=1e-6)


def test_the_kernels_of_a_folder_are_timed():
    with against._Build(ROOT, "0") as plain, against._Build(ROOT, "3.0") as slowed:
        for _ in range(2):  # one process after the other
            for build in (plain, slowed):
                build.begin(CASE)
            least = [min(build.sample() for _ in range(9)) for build in (plain, slowed)]
            for build in (plain, slowed):
                build.end()
            assert 1e-6 < least[0] < 1.0 and 2.0 < least[1] / least[0] < 8.0


def test_a_build_is_left_in_the_middle_of_a_call():
    with pytest.raises(KeyboardInterrupt), against._Build(ROOT, "0") as build:
        build.begin(CASE)
        build.sample()
        raise KeyboardInterrupt
    assert build._process.returncode is not None


def test_what_a_call_raises_is_said():
    with against._Build(ROOT, "0") as build:
        build._say("99")  # no such call
        with pytest.raises(against.OtherBuildError, match=f"{ROOT}: IndexError"):
            build.sample()


def fake_build(folder: Path, text: str) -> Path:
    package = folder / "lora_kernels"
    package.mkdir()
    (package / "__init__.py").write_text(text)
    (package / "_C.abi3.so").touch()
    return folder


def test_a_build_that_cannot_be_measured_is_named(tmp_path, capsys):
    assert against.compare(fake_build(tmp_path, "raise ImportError('built for another torch')"), CASES) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}: ImportError: built for another torch" in error and error.count("\n") == 1


def test_a_folder_without_a_build(tmp_path, capsys):
    assert against.compare(tmp_path, CASES) == 2
    assert f"no lora_kernels with its libraries in {tmp_path}" in capsys.readouterr().err


def run(*options: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_folder_is_relative_to_where_the_command_is_given(tmp_path):
    (tmp_path / "base").mkdir()
    done = run("--compare", "--against", "base", cwd=tmp_path)
    assert done.returncode == 2 and f"libraries in {tmp_path / 'base'}" in done.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (("--compare", "--update", "--against", "."), "not allowed with"),
        (("--against", "."), "--against is for --compare"),
        (("--compare", "--only", "sideways"), "no call's name holds 'sideways'"),
        (("--compare", "--against", ".", "--only", "sideways"), "no call's name holds 'sideways'"),
    ],
)
def test_options_that_are_refused(options, message):
    done = run(*options)
    assert done.returncode == 2 and message in done.stderr

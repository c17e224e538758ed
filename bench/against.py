"""This build against another one, in the same run: the regression check for a machine that is shared.

    python bench/run.py --compare --against FOLDER [--only TEXT]

FOLDER is another checkout with its libraries built, such as the branch that a change goes to. Each call is
made by two processes, one with lora_kernels of FOLDER and one with that of this checkout, in turn. What slows
the machine slows both, whereas the ratio to another kernel moves by a tenth from one minute to the next: a
neighbour on the same core or memory does not slow every kernel alike.

Noise within a run is short and of one sign. So samples are taken in blocks, of which the shortest of either
side count, and the excess of a pair of processes is the median over its blocks. Where a process's memory
happens to lie lasts as long as the process, and is of both signs. So what counts is the mean over pairs, as
many as it takes to tell: until it is SURE standard errors away from half of SLOWER, or MOST_PAIRS. A call has
become slower where the mean exceeds half of SLOWER.

It is this checkout's bench/compare_calls.py that makes the calls, which FOLDER's package must still take.
"""

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from bench.compare_calls import CASES, PLANT, Case, make_ours
from bench.machine import ROOT
from bench.timing import WAKE_S

SLOWER = math.log(1.1)  # what must be told from nothing
LEAST_PAIRS, MOST_PAIRS = 5, 24
SURE = 3.0
LEAST_DEVIATION = 0.015  # of a pair: a few that happen to agree do not make a mean certain
BLOCK = 5  # samples of either side
BLOCKS = (6, 16)  # of a pair
BUDGET_S = 1.5  # of a pair
SAMPLE_S = 2 * WAKE_S

_SERVE = """
import sys
folder, bench = sys.argv[1:]
sys.path.insert(0, folder)
import lora_kernels
sys.path[0] = bench
from bench import against
against.serve()
"""
_END = "end"


class OtherBuildError(RuntimeError):
    """A build that cannot be measured, and why."""


def serve() -> None:
    """For each line of standard input, the index of a call, a process that times it: memory of its own, but
    nothing to import. Such a process writes the seconds of one call for each line, until _END."""
    lines = open(0, "rb", buffering=0)  # noqa: SIM115  (unbuffered: what follows is for the child)
    while line := lines.readline():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _time(CASES[int(line)], lines)
                status = 0
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(1)
        print(_END, flush=True)


def _time(case: Case, lines: BinaryIO) -> None:
    torch.manual_seed(0)
    call = make_ours(case)
    call(0)
    start = time.perf_counter()
    call(1)
    once = time.perf_counter() - start
    turn, timed, untimed = 0, max(1, math.ceil(SAMPLE_S / once)), math.ceil(WAKE_S / once)
    while lines.readline().strip() not in (_END.encode(), b""):
        for _ in range(untimed):  # threads that slept while the other side ran
            turn += 1
            call(turn)
        start = time.perf_counter()
        for _ in range(timed):
            turn += 1
            call(turn)
        print((time.perf_counter() - start) / timed, flush=True)


class _Build:
    """A build that is being measured: the lora_kernels of a folder, loaded in a process of its own."""

    def __init__(self, folder: Path, planted: str) -> None:
        self._folder = folder
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(folder), str(ROOT)],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env={**os.environ, PLANT: planted},
        )

    def __enter__(self) -> "_Build":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()

    def begin(self, case: Case) -> None:
        self._say(str(CASES.index(case)))

    def sample(self) -> float:
        """Seconds of one call."""
        self._say("time")
        return float(self._answer())

    def end(self) -> None:
        self._say(_END)
        self._answer()

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().strip().splitlines()
            raise OtherBuildError(f"{self._folder}: {said[-1] if said else 'the process ended'}")
        return line


def block_excess(old: list[float], new: list[float]) -> float:
    """log(new / old) of the shortest of each block of BLOCK samples, the median over blocks."""
    blocks = range(0, len(old) - BLOCK + 1, BLOCK)
    return statistics.median(math.log(min(new[i : i + BLOCK]) / min(old[i : i + BLOCK])) for i in blocks)


def pair_excess(old: _Build, new: _Build, case: Case, swapped: bool) -> float:
    """How much slower `new` is than `old`, as a logarithm, in one process of each."""
    times: dict[_Build, list[float]] = {old: [], new: []}
    order = (new, old) if swapped else (old, new)
    for build in order:  # both prepare at the same time
        build.begin(case)
    for build in order:
        build.sample()
    began = time.perf_counter()
    for block in range(BLOCKS[1]):
        for i in range(BLOCK):
            for build in order if (block + i) % 2 else reversed(order):
                times[build].append(build.sample())
        if block + 1 >= BLOCKS[0] and time.perf_counter() - began > BUDGET_S:
            break
    for build in order:
        build.end()
    return block_excess(times[old], times[new])


def verdict(pair: Callable[[int], float]) -> tuple[bool, float, float, int]:
    """Whether a call has become slower; the mean excess, its standard error (logarithms) and the pairs."""
    seen: list[float] = []
    while True:
        seen.append(pair(len(seen)))
        if len(seen) < LEAST_PAIRS:
            continue
        mean = statistics.fmean(seen)
        error = max(statistics.stdev(seen), LEAST_DEVIATION) / math.sqrt(len(seen))
        if abs(mean - SLOWER / 2) > SURE * error or len(seen) == MOST_PAIRS:
            return mean > SLOWER / 2, mean, error, len(seen)


def compare(folder: Path, chosen: Sequence[Case]) -> int:
    """Prints a line for each call. Exit status 0: none has become slower; 1: one has; 2: no comparison."""
    folder = folder.resolve()
    if not list((folder / "lora_kernels").glob("_C.*")):
        print(f"bench.compare: error: no lora_kernels with its libraries in {folder}", file=sys.stderr)
        return 2
    slower = []
    try:
        with _Build(folder, "0") as old, _Build(ROOT, os.environ.get(PLANT, "0")) as new:
            for case in chosen:
                worse, mean, error, pairs = verdict(
                    lambda i, case=case: pair_excess(old, new, case, swapped=i % 2 == 1)
                )
                told = f"{math.expm1(mean):+6.1%} ± {error:.1%}  ({pairs} pairs)"
                print(f"{case!s:<32} {told}{'  SLOWER' * worse}", flush=True)
                slower += [str(case)] * worse
    except OtherBuildError as failed:
        print(f"bench.compare: error: {failed}", file=sys.stderr)
        return 2
    print(f"slower than {folder.name}: {', '.join(slower)}" if slower else "no regression")
    return 1 if slower else 0

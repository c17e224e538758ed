"""A regression check: this build against the stored baseline of this kind of machine.

    python -m bench.compare [--update | --against FOLDER] [--repeats N] [--only TEXT]

What is compared is, for each of a few calls, the median over interleaved rounds of its time divided by that
of a dense float32 F.linear timed in the same round, which uses the same units of the machine: machines differ
from day to day, the ratio hardly does. (Against a bfloat16 one it does: beside a busy neighbour 16 tokens
took 0.52 to 0.68 of it, and 0.53 to 0.57 of the float32 one.)

On a machine that is shared, noise has one sign: a neighbour on the same core or memory slows our kernels,
which use all of either, for seconds or for minutes; and where a process's memory happens to lie is worth some
percent of it. So a measurement is the best of PROCESSES, and what counts is the best of several measurements.
The baseline, written by --update, is baseline.json in the folder of the machine under bench/results: for each
call the ratios of several repeats. What counts of them is the mean of the second and third lowest (the lowest
may be one whose yardstick was disturbed), and how far above the second lowest the median is: where half of
the repeats lie apart, the speed of the machine itself changes. A call has become slower where its ratio
exceeds the baseline's by more than THRESHOLD_SPREADS spreads and by more than LEAST_THRESHOLD in all of
ATTEMPTS measurements but one, since now and then it is the yardstick that is slowed. One of which 10 % could
not be told so is not judged; where that is most of them, compare with another build (bench/against.py).

Exit status: 0 no regression, 1 a regression, 2 no baseline of this kind of machine, or none that can be
judged.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench import against, machine
from bench.compare_calls import CASES, Case, make_dense, make_ours
from bench.timing import interleaved_times

PROCESSES = 3  # of one measurement
ATTEMPTS = 8
GOOD = 2  # of them clear a call: a disturbance of the machine hardly lasts through seven
PAUSE_S = 4.0  # before the second attempt, twice that before the third, ...: disturbances pass
THRESHOLD_SPREADS = 3.0
LEAST_THRESHOLD = 0.065
MOST_THRESHOLD = 0.085  # a call whose spread asks for more is not judged: 10 % could not be told
BUDGET_S = 1.5  # of one process's measurement of one call


class Statistic(NamedTuple):
    """Of the ratios of several repeats, of which noise has raised most."""

    ratio: float  # mean of the second and third lowest
    spread: float  # how far the median is above the second lowest, relative

    @property
    def threshold(self) -> float:
        """The relative excess that is a regression."""
        return max(LEAST_THRESHOLD, THRESHOLD_SPREADS * self.spread)


def statistic(ratios: list[float]) -> Statistic:
    second, third = sorted(ratios)[1:3]
    middle = (second + third) / 2
    return Statistic(middle, (statistics.median(ratios) - second) / middle)


def excess(baseline: Statistic, ratio: float) -> float:
    """How much slower than the baseline, relative to it."""
    return ratio / baseline.ratio - 1


def verdict(
    baseline: Statistic, measure: Callable[[], float], pause_s: float = PAUSE_S
) -> tuple[bool, list[float]]:
    """Whether a call has become slower, and the excess of each attempt; GOOD good ones end it."""
    seen: list[float] = []
    good = 0
    for attempt in range(ATTEMPTS):
        time.sleep(attempt * pause_s)
        seen.append(excess(baseline, measure()))
        good += seen[-1] <= baseline.threshold
        if good == GOOD:
            return False, seen
    return True, seen


def ratio(case: Case) -> float:
    calls = {"dense": make_dense(case), "ours": make_ours(case)}
    times = interleaved_times(calls, BUDGET_S, rounds=(9, 400), pause_s=0)
    return statistics.median(a / b for a, b in zip(times["ours"], times["dense"], strict=True))


def fresh_ratio(case: Case) -> float:
    """The least of the ratios measured in PROCESSES processes.

    Where a process's memory lies, and what it has freed before, is worth several percent of a small case.
    """
    command = [sys.executable, "-m", "bench.compare", "--measure", str(CASES.index(case))]
    ran = [subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for _ in range(PROCESSES)]
    return min(float(done.stdout.split()[-1]) for done in ran)


def update(path: Path, repeats: int, chosen: list[Case]) -> int:
    ratios: dict[str, list[float]] = {str(case): [] for case in chosen}
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        for case in chosen:
            ratios[str(case)].append(fresh_ratio(case))
    before = json.loads(path.read_text())["cases"] if path.exists() else {}
    cases = {str(case): before[str(case)] for case in CASES if str(case) in before}
    cases |= {name: {"repeats": values} for name, values in ratios.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine.describe_cpu(), "cases": cases}, indent=1) + "\n")
    for name, entry in cases.items():
        found = statistic(entry["repeats"])
        noisy = "  TOO NOISY to tell 10 %" if found.threshold > MOST_THRESHOLD else ""
        print(f"{name:<32} {found.ratio:.3f} of dense, threshold {found.threshold:.1%}{noisy}")
    print(f"written: {path}")
    return 0


def compare(path: Path, chosen: list[Case]) -> int:
    if not path.exists():
        print(
            f"bench.compare: error: no baseline of this kind of machine ({path}); --update makes one, "
            "--against compares with another checkout",
            file=sys.stderr,
        )
        return 2
    stored = json.loads(path.read_text())["cases"]
    slower, judged = [], 0
    for case in chosen:
        if str(case) not in stored:
            print(f"{case!s:<32} not in the baseline")
            continue
        baseline = statistic(stored[str(case)]["repeats"])
        if baseline.threshold > MOST_THRESHOLD:
            print(
                f"{case!s:<32} not judged: its baseline varies too much to tell 10 % ({baseline.spread:.1%})"
            )
            continue
        judged += 1
        worse, seen = verdict(baseline, lambda case=case: fresh_ratio(case))
        attempts = ", ".join(f"{value:+.1%}" for value in seen)
        print(
            f"{case!s:<32} {attempts}  (threshold +{baseline.threshold:.1%}){'  SLOWER' * worse}", flush=True
        )
        if worse:
            slower.append(str(case))
    if not judged:
        print(
            "bench.compare: error: no call can be judged on so noisy a machine; --against can, by a checkout",
            file=sys.stderr,
        )
        return 2
    print(f"slower than the baseline: {', '.join(slower)}" if slower else "no regression")
    return 1 if slower else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compares this build with a baseline or another build.")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results", metavar="FOLDER")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--update", action="store_true", help="measure and store the baseline instead")
    instead.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="another checkout, built: compare with it instead of a baseline",
    )
    parser.add_argument("--measure", type=int, metavar="I", help="print the ratio of case I, measured here")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the calls whose name holds it")
    parser.add_argument("--repeats", type=int, default=9, help="of --update; default: %(default)s")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    if arguments.measure is not None:
        print(ratio(CASES[arguments.measure]))
        return 0
    chosen = [case for case in CASES if arguments.only in str(case)]
    if not chosen:
        parser.error(f"no call's name holds {arguments.only!r}: {', '.join(map(str, CASES))}")
    if arguments.against is not None:
        return against.compare(arguments.against, chosen)
    path = arguments.results.resolve() / machine.slug() / "baseline.json"
    if arguments.update:
        return update(path, arguments.repeats, chosen)
    return compare(path, chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Shows that `make bench-compare` does its work here:

    python bench/prove_compare.py [--against FOLDER] [--clean N] [--only TEXT] [--results FOLDER]

N clean runs must raise no alarm, and a run in which each of our calls is made 10 % slower must raise one for
every call that is judged. They are held against the stored baseline, or against another checkout of the same
kernels (this one itself may be given). Exit status 0 where both hold.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(options: list[str], planted: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LORA_KERNELS_BENCH_PLANT": str(planted)}
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--compare", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Proves the regression check.")
    parser.add_argument("--clean", type=int, default=10, help="clean runs; default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the calls whose name holds it")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a checkout with the same kernels")
    arguments = parser.parse_args(argv)
    options = ["--results", str(arguments.results), "--only", arguments.only]
    options += ["--against", str(arguments.against)] if arguments.against else []
    alarms = 0
    for i in range(arguments.clean):
        done = run(options, 0.0)
        alarms += done.returncode != 0
        print(f"clean run {i + 1}: exit {done.returncode}\n{done.stdout}{done.stderr}", flush=True)
    planted = run(options, 0.1)
    print(f"planted 10 %: exit {planted.returncode}\n{planted.stdout}{planted.stderr}", flush=True)
    caught = planted.stdout.count("  SLOWER")
    cases = planted.stdout.count("(threshold") + planted.stdout.count(" pairs)")
    print(
        f"false alarms: {alarms} of {arguments.clean} clean runs; planted: {caught} of {cases} cases caught"
    )
    return 0 if alarms == 0 and planted.returncode == 1 and caught == cases > 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

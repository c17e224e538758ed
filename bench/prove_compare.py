"""Shows that `make bench-compare` does its work: python bench/prove_compare.py [--clean N] [--only TEXT]
                                                       [--results FOLDER]

N clean runs must raise no alarm, and a run in which each of our calls is made 10 % slower must raise one for
every call that is judged. Exit status 0 where both hold.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(results: Path, only: str, planted: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LORA_KERNELS_BENCH_PLANT": str(planted)}
    options = ["--compare", "--results", str(results), "--only", only]
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Proves the regression check.")
    parser.add_argument("--clean", type=int, default=10, help="clean runs; default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the calls whose name holds it")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    alarms = 0
    for i in range(arguments.clean):
        done = run(arguments.results, arguments.only, 0.0)
        alarms += done.returncode != 0
        print(f"clean run {i + 1}: exit {done.returncode}\n{done.stdout}{done.stderr}", flush=True)
    planted = run(arguments.results, arguments.only, 0.1)
    print(f"planted 10 %: exit {planted.returncode}\n{planted.stdout}{planted.stderr}", flush=True)
    caught = planted.stdout.count("  SLOWER")
    cases = planted.stdout.count("(threshold")
    print(
        f"false alarms: {alarms} of {arguments.clean} clean runs; planted: {caught} of {cases} cases caught"
    )
    return 0 if alarms == 0 and planted.returncode == 1 and caught == cases > 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

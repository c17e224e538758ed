"""Runs the CPU suite and prints its table: `python bench/run.py [--quick | --goals] [--results FOLDER]`.

Instead: --goals measures the goals table against every peer (bench/goals.py), --all-shapes every shape and
number of tokens (bench/all_shapes.py), --step a whole fine-tune step (bench/finetune_step.py), --optim the
optimizers (bench/optim_step.py), --crossovers the fused kernels against panels (bench/crossovers.py);
--compare holds this build against the stored baseline (bench/compare.py) or another build (bench/against.py).

Raw numbers and table go to bench/results/<processor and cores>/<date>.json and .md. One thread for each
core this process may use, bound to its core.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Times the ops on this machine's CPU.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small shapes only, under 40 s")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument(
        "--step", action="store_true", help="one fine-tune step of a 100 M-parameter model, against a peer"
    )
    parser.add_argument("--goals", action="store_true", help="the goals, against every peer, in 5 minutes")
    parser.add_argument(
        "--all-shapes", action="store_true", help="every shape and number of tokens, against every peer"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="this build against the stored baseline (bench/compare.py), or another (--against)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="of --compare: another checkout, built (bench/against.py)",
    )
    parser.add_argument(
        "--optim",
        action="store_true",
        help="optimizer steps, resident and paged, against torch's fused AdamW",
    )
    parser.add_argument(
        "--crossovers", action="store_true", help="the fused kernels against panels around torch's GEMM"
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.against and not arguments.compare:
        parser.error("--against is for --compare")

    sys.path.insert(0, str(ROOT))
    from bench import machine

    environment = {
        **os.environ,
        **machine.KEEP_FREED_MEMORY,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(machine.core_count())),
        "OMP_PROC_BIND": os.environ.get("OMP_PROC_BIND", "close"),
        "OMP_PLACES": os.environ.get("OMP_PLACES", "cores"),
    }
    modules = {"goals": "bench.goals", "compare": "bench.compare", "step": "bench.finetune_step"}
    modules |= {"all_shapes": "bench.all_shapes", "optim": "bench.optim_step"}
    modules["crossovers"] = "bench.crossovers"
    module = next((name for flag, name in modules.items() if getattr(arguments, flag)), None)
    if module is not None:
        where = ["--results", str(arguments.results.resolve())]
        where += ["--against", str(arguments.against.resolve())] if arguments.against else []
        return subprocess.run(
            [sys.executable, "-m", module, *where, *rest], cwd=ROOT, env=environment, check=False
        ).returncode
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    folder = arguments.results.resolve() / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / time.strftime("%Y-%m-%d_%H%M%S.json")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={raw}", "--benchmark-quiet"]
    command += ["--quick"] if arguments.quick else []
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if not raw.exists() or raw.stat().st_size == 0:
        raw.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
        print("bench/run.py: error: no benchmark was completed", file=sys.stderr)
        return status or 1
    report = subprocess.run(
        [sys.executable, "-m", "bench.report", str(raw)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(report.stdout, end="")
    if report.returncode == 0:
        raw.with_suffix(".md").write_text(report.stdout)
        print(f"written: {raw} and {raw.with_suffix('.md').name}")
    else:
        print(report.stderr, end="", file=sys.stderr)
    return status or report.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

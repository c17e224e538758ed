"""The same fine-tune by the command, on the CPU and on a device: two loss curves that must be one.

    python3 tests/gpu/finetune_pair.py --out FOLDER [--device cuda]

A byte-level Llama (hidden size 256, 4 layers, random weights) in NF4 learns a text for 20 steps without
dropout (a device's generator draws other masks), in float32 and in bfloat16: 512 tokens a step, whose dx goes
through panels, and in bfloat16 also 96, for lora_linear_mixed and lora_linear_backward_dx. Writes
finetune.json: both curves, their largest difference, tokens per second. Exit status 1 where the curves differ
by more than TOLERANCE or a loss does not fall; needs transformers, tqdm and matplotlib, no pytest.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import tiny_llama  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.finetune import cli  # noqa: E402

# Of the loss of any step, relative. Between the CPU's backend and the reference, 20 steps: 5.5e-7 and 2.4e-3;
# a device brings its own attention, norms and loss besides.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
# dtype, rows of a batch, tokens of a row.
RUNS = (("float32", 4, 128), ("bfloat16", 4, 128), ("bfloat16", 3, 32))


def losses_of(
    folder: Path, model: Path, device: str, run: tuple[str, int, int], steps: int, backend: str | None
) -> dict:
    """metrics.json of one of RUNS into `folder`, by a forced backend if one is named.

    Raises:
        RuntimeError: the command failed; it has said why.
    """
    dtype, rows, length = run
    folder.mkdir(parents=True)
    data = folder / "data.txt"
    data.write_text(tiny_llama.squares(900))
    arguments = (
        f"--model {model} --data {data} --output {folder / 'out'} --steps {steps} --seq-len {length} "
        f"--batch-size {rows} --r 8 --lr 3e-3 --lora-dropout 0 --eval-rows 4 --eval-every 0 "
        f"--sample-tokens 0 --dtype {dtype} --device {device}"
    )
    with lk.use_backend(backend):
        status = cli.main(arguments.split())
    if status != 0:
        raise RuntimeError(f"finetune --device {device} --dtype {dtype} ended with status {status}")
    return json.loads((folder / "out" / "metrics.json").read_text())


def pair(
    folder: Path, model: Path, run: tuple[str, int, int], steps: int, device: str, backend: str | None = None
) -> dict[str, object]:
    """One of RUNS on both, and what there is to say of their losses."""
    name, (dtype, rows, length) = "-".join(map(str, run)), run
    runs = (
        losses_of(folder / f"here-{name}", model, "cpu", run, steps, "cpu"),
        losses_of(folder / f"there-{name}", model, device, run, steps, backend),
    )
    here, there = (run["losses"] for run in runs)
    largest = max(abs(a - b) / a for a, b in zip(here, there, strict=True))
    return {
        "dtype": dtype,
        "tokens": rows * length,
        "device": device,
        "cpu_losses": here,
        "device_losses": there,
        "largest_relative_difference": largest,
        "tolerance": TOLERANCE[dtype],
        "agrees": largest <= TOLERANCE[dtype],
        "falls": all(losses[-1] < losses[0] - 0.2 for losses in (here, there)),
        "tokens_per_second": [run["tokens_per_second"] for run in runs],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of finetune.json")
    parser.add_argument("--device", default="cuda", help="what is held against the CPU")
    parser.add_argument("--steps", type=int, default=20, metavar="N")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as name:
        model = tiny_llama.save(Path(name) / "model", hidden=256, layers=4, positions=256)
        for run in RUNS:
            results.append(pair(Path(name), model, run, arguments.steps, arguments.device))
            (arguments.out / "finetune.json").write_text(json.dumps(results, indent=1) + "\n")
    for r in results:
        print(
            f"finetune {r['dtype']}, {r['tokens']} tokens a step: loss from {r['cpu_losses'][0]:.3f} to "
            f"{r['cpu_losses'][-1]:.3f} on the CPU, to {r['device_losses'][-1]:.3f} on {r['device']}; "
            f"largest difference {r['largest_relative_difference']:.1e} of {r['tolerance']:.0e} allowed: "
            f"{'one curve' if r['agrees'] and r['falls'] else 'NOT one falling curve'}"
        )
    return int(not all(r["agrees"] and r["falls"] for r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

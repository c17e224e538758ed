"""From how many tokens on torch's GEMM on decoded panels beats the fused kernels of this CPU, if ever.

    python -m bench.crossovers [--results FOLDER] [--tokens 8,64,...] [--seconds S]

NF4 4096x4096, r = 16, bf16. Both kernels and the dense product alone (F.linear; and dx = dy·W0) are timed in
turn on the same tensors; outputs are checked against float64 before. What is compared is the median over the
rounds of the ratio to the dense product. Prints a Markdown table, and writes it with the raw times to
bench/results/<machine>/: what CROSSOVERS of lora_kernels/backends/cpu.py cites.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lora_kernels as lk
from bench import machine
from bench.problem import LIMIT, Base, assert_error, backward_error, copy_nf4, forward_error
from bench.shapes import SCALING
from bench.timing import interleaved_times
from lora_kernels.backends import cpu

N = K = 4096
COPIES = 4
TOKENS = (8, 12, 16, 32, 64, 128, 256, 512, 1024, 2048)
KERNELS = ("fused", "panels")
Calls = dict[str, Callable[[int], object]]


def contenders(base: Base, t: int) -> tuple[Calls, Calls]:
    """Of the forward and of the backward, checked."""
    nf4, dense = [copy_nf4(base.nf4) for _ in range(COPIES)], [base.dense() for _ in range(COPIES)]
    x = torch.randn(t, K).bfloat16().requires_grad_()
    dy = torch.randn(t, N).bfloat16()
    leaves = (x, base.lora_A.clone().requires_grad_(), base.lora_B.clone().requires_grad_())

    def ours(kernel: str, i: int) -> Tensor:
        cpu.forced_kernel = kernel
        return lk.lora_linear(x, nf4[i % COPIES], *leaves[1:], scaling=SCALING)

    graphs = [ours("fused", i) for i in range(COPIES)]
    eager = [torch.nn.functional.linear(x, w) for w in dense]

    def gradients(kernel: str, i: int) -> tuple[Tensor, ...]:
        cpu.forced_kernel = kernel
        return torch.autograd.grad(graphs[i % COPIES], leaves, dy, retain_graph=True)

    forward: Calls = {"dense": lambda i: torch.nn.functional.linear(x.detach(), dense[i % COPIES])}
    backward: Calls = {"dense": lambda i: torch.autograd.grad(eager[i % COPIES], x, dy, retain_graph=True)}
    for kernel in KERNELS:
        forward[kernel] = lambda i, kernel=kernel: ours(kernel, i)
        backward[kernel] = lambda i, kernel=kernel: gradients(kernel, i)
        limit = LIMIT[torch.bfloat16]
        with torch.no_grad():
            assert_error(forward_error(ours(kernel, 0), x.detach(), base), limit, f"{kernel}, T={t}")
            assert_error(backward_error(gradients(kernel, 0), dy, x.detach(), base), 2 * limit, kernel)
    return forward, backward


def row(what: str, t: int, times: dict[str, list[float]]) -> str:
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["dense"], strict=True))
        for name in KERNELS
    }
    cells = [f"{1e3 * statistics.median(times[name]):.2f}" for name in ("dense", *KERNELS)]
    cells += [f"{ratios[name]:.2f}" for name in KERNELS]
    return f"| {what} | {t} | " + " | ".join(cells) + f" | {min(ratios, key=ratios.get)} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measures the crossovers of the CPU backend.")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="for one op and count of tokens; default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    about = machine.describe_cpu()
    lines = [
        f"# Crossovers: {about['cpu']}, {about['threads']} thread(s)",
        "",
        f"{time.strftime('%Y-%m-%d %H:%M')}, commit {about['commit']}, torch {about['torch']}, kernels "
        f"{about['cpu_isa']}, allocator {about['allocator']}. NF4 4096x4096, double quantisation, r = 16, "
        "bf16, dropout 0; median milliseconds over interleaved rounds, ratios within a round. Dense: "
        "F.linear, or dx = dy·W0, alone.",
        "",
        "| op | T | dense ms | fused ms | panels ms | fused / dense | panels / dense | better |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    print("\n".join(lines))
    record: dict[str, dict[str, list[float]]] = {}
    base = Base(N, K, torch.bfloat16, torch.device("cpu"))
    for t in (int(t) for t in arguments.tokens.split(",")):
        for what, calls in zip(("forward", "backward"), contenders(base, t), strict=True):
            times = record[f"{what} T={t}"] = interleaved_times(calls, arguments.seconds)
            lines.append(row(what, t, times))
            print(lines[-1], flush=True)
    folder = arguments.results.resolve() / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y-%m-%d_%H%M%S_crossovers")
    (folder / f"{name}.json").write_text(json.dumps({"machine": about, "seconds": record}, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(f"written: {folder / name}.json and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

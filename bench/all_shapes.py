"""Every shape and number of tokens that fits a CPU, against every peer, losses included.

    python -m bench.all_shapes [--results FOLDER] [--shapes 4096x4096,...] [--tokens 1,8,...] [--minutes M]

NF4 with double quantisation, forward alone and forward + backward, bf16, r = 16, dropout 0; for 4096x4096
also fp16, fp32, r = 8 and 64, and dropout 0.1. All contenders of a row work on the same matrix, adapter and
inputs, over rotating copies, in rounds A B C A B C; each output is checked before it is timed, and a peer
whose is wrong, or that fails, is left out. A row whose dense call would take over MOST_CALL_S is left out and
says so, as does one for which no time was left. Every weight is measured in a process of its own: the largest
need most of a machine's memory, and one that is out of it costs no other its rows. Prints a Markdown table of
times relative to ours and writes it with the raw times to bench/results/<machine>/.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import lora_kernels as lk
from bench import machine, peers
from bench.problem import LIMIT, Base, assert_error, checked_rows, copy_nf4, relative_error
from bench.shapes import RANK, SCALING, SHAPES
from bench.timing import interleaved_times

TOKENS = (1, 8, 16, 64, 256, 1024, 2048)
MOST_CALL_S = 2.0  # of a dense product forward; its backward takes as long again
BUDGET_S = {"forward": 2.5, "step": 3.5}
ROUNDS = (3, 40)
COPY_BYTES = 512 << 20  # of each form of a weight, in two to four copies
OURS, DENSE = "lora_kernels", "dense F.linear"
PEERS = ("dense + PEFT LoRA", "bitsandbytes + PEFT", "bitsandbytes eval + PEFT", "torchao NF4 + LoRA")
Call = Callable[[int], object]


class Setting(NamedTuple):
    """What is the same for all rows of one weight."""

    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    rank: int = RANK
    p: float = 0.0

    def __str__(self) -> str:
        changed = [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.bfloat16 else []
        changed += [f"r={self.rank}"] if self.rank != RANK else []
        changed += [f"p={self.p}"] if self.p else []
        return " ".join([f"{self.n}x{self.k}", *changed])


def settings() -> Iterator[tuple[Setting, tuple[int, ...]]]:
    """Every setting and its numbers of tokens, the most important first."""
    n, k = SHAPES[0][:2]
    yield Setting(n, k), TOKENS
    for dtype in (torch.float16, torch.float32):
        yield Setting(n, k, dtype), (1, 64, 256)
    for rank in (8, 64):
        yield Setting(n, k, rank=rank), (1, 64, 1024)
    yield Setting(n, k, p=0.1), (1, 64, 1024)
    for shape in SHAPES[1:]:
        yield Setting(shape.n, shape.k), TOKENS


class Weight:
    """One weight in every form, and the layers of all contenders."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.base = base = Base(*setting[:3], torch.device("cpu"), setting.rank)
        copies = max(2, min(4, COPY_BYTES // (setting.n * setting.k * setting.dtype.itemsize)))
        self.dense = [base.dense().clone() for _ in range(copies)]
        self.nf4 = [copy_nf4(base.nf4) for _ in range(copies)]
        A, B = base.lora_A, base.lora_B
        self.adapter = A.clone().requires_grad_(), B.clone().requires_grad_()
        self.missing: dict[str, str] = {}
        self.layers: dict[str, list[torch.nn.Module]] = {}
        self.own_weight: dict[str, Tensor] = {}  # of a peer that quantises by itself
        p = setting.p
        makers: dict[str, Callable[[int], torch.nn.Module]] = {
            PEERS[0]: lambda i: peers.dense_peft(self.dense[i], A, B, p),
            PEERS[1]: lambda i: peers.bitsandbytes_peft(copy_nf4(self.nf4[i]), A, B, p),
            PEERS[2]: lambda i: peers.bitsandbytes_peft(copy_nf4(self.nf4[i]), A, B, p).eval(),
        }
        for name, make in makers.items():
            try:
                self.layers[name] = [make(i).train("eval" not in name) for i in range(copies)]
            except Exception as error:  # whatever keeps a peer from running is its entry
                self.missing[name] = _one_line(error)
        try:
            made = peers.torchao_lora(self.dense[0], A, B)
            self.layers[PEERS[3]], self.own_weight[PEERS[3]] = [made[0]], made[1]
        except Exception as error:
            self.missing[PEERS[3]] = _one_line(error)

    def forward(self, xs: list[Tensor]) -> dict[str, Call]:
        p = self.setting.p

        def layer_call(name: str) -> Call:
            layers = self.layers[name]
            if "eval" not in name:
                return lambda i: layers[i % len(layers)](xs[i % len(xs)])

            def evaluated(i: int) -> Tensor:
                with torch.no_grad():
                    return layers[i % len(layers)](xs[i % len(xs)])

            return evaluated

        def ours(i: int) -> Tensor:
            i %= len(xs)
            return lk.lora_linear(xs[i], self.nf4[i], *self.adapter, scaling=SCALING, dropout_p=p)

        def dense(i: int) -> Tensor:
            i %= len(xs)
            return torch.nn.functional.linear(xs[i], self.dense[i])

        return {DENSE: dense, OURS: ours} | {name: layer_call(name) for name in self.layers}

    def step(self, xs: list[Tensor], dys: list[Tensor]) -> dict[str, Call]:
        """Forward, and backward to x, A and B; of the dense layer alone forward and dx."""

        def run(call: Call, parameters: Callable[[int], tuple[Tensor, ...]]) -> Call:
            return lambda i: torch.autograd.grad(call(i), (xs[i % len(xs)], *parameters(i)), dys[i % len(xs)])

        def adapter_of(name: str) -> Callable[[int], tuple[Tensor, ...]]:
            layers = self.layers[name]

            def parameters(i: int) -> tuple[Tensor, ...]:
                layer = layers[i % len(layers)]
                plain = isinstance(layer.lora_A, torch.nn.Parameter)
                return (layer.lora_A, layer.lora_B) if plain else peers.adapter_parameters(layer)

            return parameters

        found = {DENSE: lambda i: (), OURS: lambda i: self.adapter}
        found |= {name: adapter_of(name) for name in self.layers if "eval" not in name}
        return {name: run(call, found[name]) for name, call in self.forward(xs).items() if name in found}

    def check(self, calls: dict[str, Call], x: Tensor) -> None:
        """Each output against float64; not with dropout, where each draws a mask of its own."""
        if self.setting.p:
            return
        rows = checked_rows(x.shape[0])
        few = x[rows].detach().double()
        low = SCALING * (few @ self.base.lora_A.double().T) @ self.base.lora_B.double().T
        product = few @ self.base.truth().T
        for name, call in list(calls.items()):
            truth = few @ self.own_weight[name].double().T if name in self.own_weight else product
            truth = truth if name == DENSE else truth + low
            # Twice our limit for the peers, which round more often.
            limit = LIMIT[self.setting.dtype] * (1 if name == OURS else 2)
            try:
                assert_error(relative_error(call(0)[rows].detach(), truth), limit, name)
            except Exception as error:
                if name in (OURS, DENSE):
                    raise
                self.missing[f"{name}, {self.setting}"] = _one_line(error)
                del calls[name], self.layers[name]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def measure_apart(index: int, tokens: tuple[int, ...], deadline: float) -> list[dict]:
    """The rows of a setting, measured in a process of its own."""
    setting = list(settings())[index][0]

    def nothing(why: str) -> list[dict]:
        return [
            {"setting": str(setting), "t": t, "mode": mode, "left_out": why}
            for t in tokens
            for mode in BUDGET_S
        ]

    left = deadline - time.monotonic()
    if left <= 0:
        return nothing("no time left")
    print(setting, file=sys.stderr, flush=True)
    options = ["--measure", str(index), "--tokens", ",".join(map(str, tokens)), "--minutes", str(left / 60)]
    command = [sys.executable, "-m", "bench.all_shapes", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        killed = " (killed; out of memory?)" if done.returncode < 0 else ""
        return nothing(f"its process ended with {done.returncode}{killed}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(setting: Setting, tokens: tuple[int, ...], deadline: float) -> list[dict]:
    """A dict for every row: its times, or why there are none."""
    rows: list[dict] = []

    def add(t: int, mode: str, **found: object) -> None:
        row = {"setting": str(setting), "t": t, "mode": mode, **found}
        rows.append(row)

    weight = Weight(setting)
    for t in tokens:
        x = torch.randn(t, setting.k).to(setting.dtype)
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight.dense[0])
        once = time.perf_counter() - began
        for mode, budget in BUDGET_S.items():
            if once > MOST_CALL_S or time.monotonic() > deadline:
                late = once <= MOST_CALL_S
                add(t, mode, left_out="no time left" if late else f"a dense product takes {once:.1f} s")
                continue
            needs = mode == "step"
            xs = [torch.randn(t, setting.k).to(setting.dtype).requires_grad_(needs) for _ in weight.dense]
            try:
                if mode == "forward":
                    calls = weight.forward(xs)
                    weight.check(calls, xs[0])
                else:
                    calls = weight.step(xs, [torch.randn(t, setting.n).to(setting.dtype) for _ in xs])
                add(t, mode, seconds=interleaved_times(calls, budget, ROUNDS), missing=weight.missing)
            except Exception as error:
                add(t, mode, left_out=_one_line(error))
    return rows


def table(rows: list[dict]) -> str:
    head = ["W0", "T", "", "ours ms", *(f"{name} / ours" for name in (DENSE, *PEERS))]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---|" + "---:|" * (len(head) - 3)]
    for row in rows:
        cells = [
            row["setting"],
            str(row["t"]),
            "forward" if row["mode"] == "forward" else "forward + backward",
        ]
        if "left_out" in row:
            lines.append("| " + " | ".join([*cells, row["left_out"], *[""] * (len(PEERS) + 1)]) + " |")
            continue
        seconds = row["seconds"]
        ours = seconds[OURS]
        cells.append(f"{1e3 * statistics.median(ours):.3f}")
        for name in (DENSE, *PEERS):
            if name in seconds:
                ratio = statistics.median(a / b for a, b in zip(seconds[name], ours, strict=True))
                cells.append(f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}")
            else:
                cells.append("n/a" if "eval" in name and row["mode"] == "step" else "not measured")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Times every shape and number of tokens against the peers.")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--shapes", default="", help="only these, as 4096x4096; default: all")
    parser.add_argument("--tokens", default="", help="only these; default: all")
    parser.add_argument("--minutes", type=float, default=40, help="default: %(default)s")
    parser.add_argument("--measure", type=int, metavar="I", help="print the rows of setting I, measured here")
    arguments = parser.parse_args(argv)
    only = set(filter(None, arguments.shapes.split(",")))
    few = set(map(int, filter(None, arguments.tokens.split(","))))
    torch.manual_seed(0)
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.measure is not None:
        setting, tokens = list(settings())[arguments.measure]
        rows = measure(setting, tuple(t for t in tokens if t in few), deadline)
        print(json.dumps(rows))
        return 0
    rows: list[dict] = []
    for index, (setting, tokens) in enumerate(settings()):
        wanted = tuple(t for t in tokens if not few or t in few)
        if wanted and (not only or f"{setting.n}x{setting.k}" in only):
            rows += measure_apart(index, wanted, deadline)
    if not rows:
        parser.error("no such shape, or no such number of tokens")
    about = machine.describe_cpu() | {"peers": peers.versions()}
    missing = {name: why for row in rows for name, why in row.get("missing", {}).items()}
    text = "\n".join(
        [
            f"# Every shape on a CPU: {about['cpu']}, {about['threads']} thread(s)",
            "",
            f"{time.strftime('%Y-%m-%d %H:%M')}, commit {about['commit']}, torch {about['torch']}, kernels "
            f"{about['cpu_isa']}, peers {about['peers']}. NF4, double quantisation, bf16, r = 16, dropout 0 "
            "where nothing else is said. Medians over interleaved rounds; a ratio below 1, in bold, is a "
            "loss. Dense F.linear alone has no adapter: its backward is dx.",
            "",
            table(rows),
            *(f"\nNot measured: {name}: {why}" for name, why in missing.items()),
        ]
    )
    folder = arguments.results.resolve() / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y-%m-%d_%H%M%S_all_shapes")
    (folder / f"{name}.json").write_text(json.dumps({"machine": about, "rows": rows}) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The goals on a CPU, in one run: NF4 4096x4096, r = 16, bf16, against every peer, interleaved.

    python -m bench.goals [--results FOLDER] [--tokens 1,8,...]

Every contender works on the same matrix, adapter and inputs, over rotating copies; outputs are checked
against float64 before anything is timed. Prints a Markdown table of times and one of goals, reached or not,
and writes both with the raw times to bench/results/<machine>/.
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
from bench import machine, peers
from bench.problem import LIMIT, Base, assert_error, copy_nf4, forward_error, relative_error
from bench.shapes import SCALING
from bench.timing import interleaved_times

N = K = 4096
COPIES = 4  # of every weight: 134 MB of dense ones, which no cache of one process holds for long
TOKENS = (1, 8, 64, 512, 2048)
BUDGET_S = {1: 8, 8: 8, 64: 8, 512: 15, 2048: 25}
Call = Callable[[int], object]


class Problem:
    """The weight in every form, and the layers of all contenders that can be made here."""

    def __init__(self) -> None:
        self.base = base = Base(N, K, torch.bfloat16, torch.device("cpu"))
        self.weights = [base.dense().clone() for _ in range(COPIES)]
        self.nf4 = [copy_nf4(base.nf4) for _ in range(COPIES)]
        A, B = base.lora_A, base.lora_B
        self.adapter = A.clone().requires_grad_(), B.clone().requires_grad_()
        self.missing: dict[str, str] = {}
        self.layers: dict[str, list[torch.nn.Module]] = {}
        self.truths: dict[str, Tensor] = {}
        self._make("dense + PEFT LoRA", ("peft",), lambda i: peers.dense_peft(self.weights[i], A, B, 0.0))
        bnb = ("bitsandbytes", "peft")
        for name in ("bitsandbytes + PEFT", "bitsandbytes eval + PEFT"):
            self._make(name, bnb, lambda i: peers.bitsandbytes_peft(copy_nf4(self.nf4[i]), A, B, 0.0))
        for layer in self.layers.get("bitsandbytes eval + PEFT", ()):
            layer.eval()
        try:
            made = peers.torchao_lora(self.weights[0], A, B)
            self.layers["torchao NF4 + LoRA"], self.truths["torchao NF4 + LoRA"] = [made[0]], made[1].double()
        except Exception as error:  # whatever keeps it from running here is its entry in the table
            self.missing["torchao NF4 + LoRA"] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _make(self, name: str, packages: tuple[str, ...], make: Callable[[int], torch.nn.Module]) -> None:
        reason = peers.missing(*packages)
        if reason is None:
            self.layers[name] = [make(i) for i in range(COPIES)]
        else:
            self.missing[name] = reason

    def ours(self, x: Tensor, i: int) -> Tensor:
        return lk.lora_linear(x, self.nf4[i % COPIES], *self.adapter, scaling=SCALING)

    def check(self, name: str, y: Tensor, x: Tensor, lora: bool = True) -> None:
        if name in self.truths:  # its own NF4 of the same matrix
            A, B = (p.detach().double() for p in self.adapter)
            wanted = x.double() @ self.truths[name].T + SCALING * (x.double() @ A.T) @ B.T
            error = relative_error(y.detach(), wanted)
        else:
            error = forward_error(y.detach(), x, self.base, lora=lora)
        # Twice our limit for the peers: they round the weight, the sum and the adapter's part one after the
        # other; the eval path rounds its scales to bf16 besides.
        limit = LIMIT[torch.bfloat16] * (1 if name == "lora_kernels" else 2)
        assert_error(error, limit, name)


def forward_contenders(problem: Problem, t: int) -> dict[str, Call]:
    xs = [torch.randn(t, K).bfloat16() for _ in range(COPIES)]

    def training(name: str) -> Call:
        layers = problem.layers[name]
        return lambda i: layers[i % len(layers)](xs[i % COPIES])

    def evaluation(i: int) -> Tensor:
        with torch.no_grad():
            return problem.layers["bitsandbytes eval + PEFT"][i % COPIES](xs[i % COPIES])

    calls: dict[str, Call] = {
        "dense F.linear": lambda i: torch.nn.functional.linear(xs[i % COPIES], problem.weights[i % COPIES]),
        "lora_kernels": lambda i: problem.ours(xs[i % COPIES], i),
    }
    for name in problem.layers:
        calls[name] = evaluation if "eval" in name else training(name)
    for name, call in calls.items():
        problem.check(name, call(0), xs[0], lora=name != "dense F.linear")
    return calls


def backward_contenders(problem: Problem, t: int) -> dict[str, Call]:
    """Forward, and backward to x, A and B. Of the dense layer alone: forward and dx."""
    xs = [torch.randn(t, K).bfloat16().requires_grad_() for _ in range(COPIES)]
    dys = [torch.randn(t, N).bfloat16() for _ in range(COPIES)]

    def step(call: Call, parameters: Callable[[int], tuple[Tensor, ...]]) -> Call:
        def run(i: int) -> tuple[Tensor, ...]:
            x = xs[i % COPIES]
            return torch.autograd.grad(call(i), (x, *parameters(i)), dys[i % COPIES])

        return run

    calls: dict[str, Call] = {
        "dense F.linear": step(
            lambda i: torch.nn.functional.linear(xs[i % COPIES], problem.weights[i % COPIES]), lambda i: ()
        ),
        "lora_kernels": step(lambda i: problem.ours(xs[i % COPIES], i), lambda i: problem.adapter),
    }
    for name, layers in problem.layers.items():
        if "eval" in name:
            continue

        def parameters(i: int, layers=layers) -> tuple[Tensor, ...]:
            layer = layers[i % len(layers)]
            if isinstance(layer.lora_A, torch.nn.Parameter):
                return layer.lora_A, layer.lora_B
            return peers.adapter_parameters(layer)

        calls[name] = step(lambda i, layers=layers: layers[i % len(layers)](xs[i % COPIES]), parameters)
    wanted = [g.double() for g in calls["lora_kernels"](0)]
    for (
        name,
        call,
    ) in calls.items():  # the gradients themselves are checked in tests/; peers must agree with them
        if name not in ("dense F.linear", "lora_kernels") and name not in problem.truths:
            for got, want in zip(call(0), wanted, strict=True):
                assert_error(relative_error(got, want), 2e-2, f"{name}, gradient")
    return calls


def quantisation_contenders(problem: Problem) -> tuple[dict[str, Call], dict[str, Call]]:
    outs = [torch.empty_like(problem.weights[0]) for _ in range(2)]
    dequantise: dict[str, Call] = {
        "copy_": lambda i: outs[i % 2].copy_(problem.weights[i % COPIES]),
        "lora_kernels": lambda i: problem.nf4[i % COPIES].dequantize(),
    }
    quantise: dict[str, Call] = {"lora_kernels": lambda i: lk.nf4_quantize(problem.weights[i % COPIES])}
    if peers.missing("bitsandbytes") is None:
        import bitsandbytes.functional as bnb

        made = [bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in problem.weights[:2]]
        dequantise["bitsandbytes"] = lambda i: bnb.dequantize_4bit(*made[i % 2])
        quantise["bitsandbytes"] = lambda i: bnb.quantize_4bit(
            problem.weights[i % COPIES], quant_type="nf4", compress_statistics=True
        )
    return dequantise, quantise


Times = dict[str, dict[str, list[float]]]


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float | None:
    """Median over the rounds of slow / fast; None where one of them was not measured."""
    if slow not in times or fast not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


class Goal:
    """`least` ≤ time of `slow` / time of `fast` in measurement `what`."""

    def __init__(self, what: str, text: str, slow: str, fast: str, least: float, inverse: bool = False):
        self.what, self.text, self.slow, self.fast, self.least = what, text, slow, fast, least
        self.inverse = inverse  # the goal is stated as an upper bound of fast / slow

    def row(self, times: Times) -> str:
        value = ratio(times.get(self.what, {}), self.slow, self.fast)
        if value is None:
            return f"| {self.what} | {self.text} | not measured | |"
        shown = f"{1 / value:.2f}x" if self.inverse else f"{value:.2f}x"
        return f"| {self.what} | {self.text} | {shown} | {'yes' if value >= self.least else '**no**'} |"


_OURS, _DENSE, _BNB = "lora_kernels", "dense F.linear", "bitsandbytes + PEFT"
_PEFT, _EVAL = "dense + PEFT LoRA", "bitsandbytes eval + PEFT"
GOALS = (
    Goal("forward T=1", "≥ 3.5x dense F.linear alone", _DENSE, _OURS, 3.5),
    Goal("forward T=1", "≥ 30x bitsandbytes + PEFT", _BNB, _OURS, 30),
    Goal("forward T=1", "≥ 1.5x bitsandbytes' eval path + PEFT", _EVAL, _OURS, 1.5),
    Goal("forward T=8", "≥ 4x bitsandbytes + PEFT", _BNB, _OURS, 4),
    Goal("forward T=8", "never slower than dense + PEFT LoRA", _PEFT, _OURS, 1),
    Goal("forward T=64", "≥ 4x bitsandbytes + PEFT", _BNB, _OURS, 4),
    Goal("forward T=64", "never slower than dense + PEFT LoRA", _PEFT, _OURS, 1),
    Goal("forward T=512", "≤ 1.08x the time of dense F.linear alone", _DENSE, _OURS, 1 / 1.08, True),
    Goal("forward T=2048", "≤ 1.08x the time of dense F.linear alone", _DENSE, _OURS, 1 / 1.08, True),
    Goal("forward+backward T=1", "≥ 25x bitsandbytes + PEFT", _BNB, _OURS, 25),
    Goal("forward+backward T=64", "≥ 4x bitsandbytes + PEFT", _BNB, _OURS, 4),
    Goal("forward+backward T=2048", "≥ 1.3x bitsandbytes + PEFT", _BNB, _OURS, 1.3),
    Goal("forward+backward T=2048", "≤ 1.1x the time of dense forward + dx", _DENSE, _OURS, 1 / 1.1, True),
    Goal("dequantise", "≥ 8x bitsandbytes", "bitsandbytes", _OURS, 8),
    Goal("quantise", "≥ 20x bitsandbytes", "bitsandbytes", _OURS, 20),
)


def copy_bandwidth_row(problem: Problem, times: Times) -> str:
    measured = times["dequantise"]
    copied, stored = 2 * problem.weights[0].nbytes, problem.weights[0].nbytes + problem.nf4[0].nbytes
    share = ratio(measured, "copy_", "lora_kernels") * stored / copied
    met = "yes" if share >= 0.8 else "**no**"
    return f"| dequantise | ≥ 80 % of copy bandwidth (bytes read + written) | {share:.0%} | {met} |"


def tables(problem: Problem, times: Times) -> str:
    lines = ["| measurement | contender | median ms | p10-p90 | time / ours |", "|---|---|---:|---:|---:|"]
    for what, contenders in times.items():
        for name, samples in contenders.items():
            deciles = statistics.quantiles([1e3 * s for s in samples], n=10, method="inclusive")
            against = ratio(contenders, name, "lora_kernels")
            lines.append(
                f"| {what} | {name} | {1e3 * statistics.median(samples):.3f} | "
                f"{deciles[0]:.3f}-{deciles[8]:.3f} | {against:.2f} |"
            )
    lines += [f"| | {name} | not measured: {reason} | | |" for name, reason in problem.missing.items()]
    lines += ["", "| measurement | goal | reached | met |", "|---|---|---:|---|"]
    lines += [goal.row(times) for goal in GOALS]
    if "dequantise" in times:
        lines.append(copy_bandwidth_row(problem, times))
    return "\n".join(lines)


def measure(problem: Problem, tokens: tuple[int, ...], say: Callable[[str], None]) -> Times:
    times: Times = {}
    for t in tokens:
        say(f"forward T={t}")
        times[f"forward T={t}"] = interleaved_times(forward_contenders(problem, t), BUDGET_S.get(t, 10))
        say(f"forward+backward T={t}")
        contenders = backward_contenders(problem, t)
        times[f"forward+backward T={t}"] = interleaved_times(contenders, 1.5 * BUDGET_S.get(t, 10))
    dequantise, quantise = quantisation_contenders(problem)
    say("dequantise")
    times["dequantise"] = interleaved_times(dequantise, 3)
    say("quantise")
    times["quantise"] = interleaved_times(quantise, 8)
    return times


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measures the CPU goals against every peer.")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    tokens = tuple(int(t) for t in arguments.tokens.split(","))
    torch.manual_seed(0)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    problem = Problem()
    times = measure(problem, tokens, say)
    about = machine.describe_cpu() | {"peers": peers.versions()}
    head = (
        f"# CPU goals: {about['cpu']}, {about['threads']} thread(s)\n\n"
        f"{time.strftime('%Y-%m-%d %H:%M')}, commit {about['commit']}, torch {about['torch']}, kernels "
        f"{about['cpu_isa']}, peers {about['peers']}, allocator {about['allocator']}. NF4 4096x4096, double "
        "quantisation, r = 16, bf16, dropout 0; medians over interleaved rounds, ratios within a round.\n"
    )
    text = head + "\n" + tables(problem, times) + "\n"
    folder = arguments.results.resolve() / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y-%m-%d_%H%M%S_goals")
    record = {"machine": about, "missing": problem.missing, "seconds": times}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

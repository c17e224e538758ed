"""Measures what the tables of the CUDA backend only model, and prints the rows to put there.

    python3 bench/gpu_tune.py --out DIR [--budget-s 120]

For T = 1 to 4096 the same call by each kernel that can serve it, interleaved: the forward by
lora_linear_decode (up to 8 tokens), lora_linear_mixed and panels, dx by lora_linear_backward_dx and panels.
From these the crossovers that lose the least time over all measured T and shapes, ready for CROSSOVERS of
lora_kernels/backends/cuda.py. For the panels themselves, sizes of the workspace (PANEL_BYTES of the same
file), the ways in which the LoRA term comes to y (LOW_RANK_WAY), and up to which rank g comes out of the
sweep over dy (GRADIENT_OF_H). Writes tune.json and tune.md after every shape; changes nothing else.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import lora_kernels as lk  # noqa: E402
from bench import problem  # noqa: E402
from bench.baseline_report import NOTHING, spread, table  # noqa: E402
from bench.gpu_baseline import DTYPE, Job, parse, record  # noqa: E402
from bench.gpu_groups import Interleaved, failures, normal, ratio, rows_of  # noqa: E402
from bench.gpu_training_report import NOT_MEASURED, heading  # noqa: E402
from bench.shapes import RANK, SCALING, weight_bytes  # noqa: E402
from lora_kernels.backends import cuda  # noqa: E402
from lora_kernels.backends.cuda_launchers import (  # noqa: E402
    MOST_DECODE_TOKENS,
    CudaLaunchers,
    rank_rows,
)
from lora_kernels.panels import FIRST, JOINED, LAST, gradient_of_h  # noqa: E402

PANELS, DECODE, MIXED, DX = "panels", "lora_linear_decode", "lora_linear_mixed", "lora_linear_backward_dx"
OPS = {"lora_linear": MIXED, "lora_linear_backward": DX}
ALL_TOKENS, NO_TOKENS = 1 << 40, 0
# The crossovers are expected between 128 and 1024: measured there first.
TOKENS = (256, 512, 128, 1024, 384, 768, 64, 2048, 192, 32, 16, 96, 1536, 4096, 8, 4, 1)
SHAPES_TUNED = 3
PANEL_TOKENS, PANEL_MIB = (1024, 4096), (8, 16, 32, 64, 128)
WAY = "LoRA term"
WAYS = (FIRST, LAST, JOINED)
G, SWEPT, APART = "g and dB", "one sweep", "GEMM and sweep"
G_RANKS = (16, 32, 64, 128, 256)


def backend_with(
    launchers: CudaLaunchers,
    limits: Mapping[str, int],
    panel_bytes: int = cuda.PANEL_BYTES,
    low_rank_way: str | None = None,
) -> cuda.CudaBackend:
    """The CUDA backend, its kernels taking as many tokens as `limits` says: kernel -> tokens."""
    table = tuple(
        row._replace(tokens=limits.get(row.kernel, row.tokens), why="forced") for row in cuda.CROSSOVERS
    )
    return cuda.CudaBackend(launchers, "forced", table, panel_bytes, low_rank_way)


def best_crossover(ratios: Mapping[int, float]) -> int:
    """Up to how many tokens the fused kernel should serve: T -> its time over that of panels.

    The one of the measured T, or 0, that loses the least time, as a sum of logarithms: noise that makes one T
    of many lose does not move it far.
    """

    def lost(limit: int) -> float:
        return sum(max(0.0, math.log(r) if t <= limit else -math.log(r)) for t, r in sorted(ratios.items()))

    return min([NO_TOKENS, *sorted(ratios)], key=lambda limit: (lost(limit), limit))


def mean_ratios(record: dict, op: str, shape: tuple[int, int] | None = None) -> dict[int, float]:
    """T -> time of the fused kernel over panels', the geometric mean over shapes (or of one)."""
    logs: dict[int, list[float]] = {}
    for (n, k, t, _), rows in rows_of(record, op).items():
        found = ratio(rows.get(OPS[op]), rows.get(PANELS))
        if found is not None and shape in (None, (n, k)):
            logs.setdefault(t, []).append(math.log(found[0]))
    return {t: math.exp(sum(some) / len(some)) for t, some in sorted(logs.items())}


class Tune(Interleaved):
    name = "tune"

    def __init__(self, arguments: argparse.Namespace, launchers: CudaLaunchers | None = None) -> None:
        super().__init__(arguments, launchers)
        self.tokens = (8, 40) if arguments.smoke else TOKENS
        self.panel_tokens = (40,) if arguments.smoke else PANEL_TOKENS

    def forward(self, base: problem.Base, t: int, backend: cuda.CudaBackend) -> Job:
        n, k = base.n, base.k
        moved = weight_bytes(n, k) + DTYPE.itemsize * t * (n + k)
        count = self.sets(moved)
        xs = [normal(self.device, t, k) for _ in range(count)]
        weights = [problem.copy_nf4(base.nf4) for _ in range(count)]

        def call(x: torch.Tensor, w: lk.NF4Weight) -> torch.Tensor:
            y, h = x.new_empty(t, n), x.new_empty(t, RANK)
            adapter = (base.lora_A, base.lora_B, SCALING, None, 0.0, None)
            backend.lora_linear(x, w.base_weight(), *adapter, y, h)
            return y

        calls = [partial(call, *each) for each in zip(xs, weights, strict=True)]
        return Job(
            calls,
            lambda: problem.forward_error(calls[-1](), xs[-1], base),
            problem.LIMIT[DTYPE],
            moved,
            bytes=moved,
        )

    def dx(self, base: problem.Base, t: int, backend: cuda.CudaBackend) -> Job:
        """dx with everything that it needs, g too, at p = 0."""
        n, k = base.n, base.k
        moved = weight_bytes(n, k) + DTYPE.itemsize * t * (n + k)
        count = self.sets(moved)
        dys = [normal(self.device, t, n) for _ in range(count)]
        weights = [problem.copy_nf4(base.nf4) for _ in range(count)]

        def call(dy: torch.Tensor, w: lk.NF4Weight) -> torch.Tensor:
            dx = dy.new_empty(t, k)
            adapter = (base.lora_A, base.lora_B, SCALING, 0.0, None)
            backend.lora_linear_backward(dy, None, None, w.base_weight(), *adapter, dx, None, None, None)
            return dx

        calls = [partial(call, *each) for each in zip(dys, weights, strict=True)]

        def check() -> float:
            rows = problem.checked_rows(t)
            dy = dys[-1][rows].double()
            truth = dy @ base.truth() + SCALING * (dy @ base.lora_B.double()) @ base.lora_A.double()
            return problem.relative_error(calls[-1]()[rows], truth)

        return Job(calls, check, problem.LIMIT[DTYPE], moved, bytes=moved)

    def gradients(self, base: problem.Base, t: int, rank: int, swept: bool) -> Job:
        """g and dB of this rank, in one sweep over dy or g by torch's GEMM."""
        n = base.n
        moved = DTYPE.itemsize * t * n
        count = self.sets(moved)
        dys, h = [normal(self.device, t, n) for _ in range(count)], normal(self.device, t, rank)
        B = normal(self.device, n, rank)

        def call(dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            g, dB = rank_rows(dy, rank), dy.new_empty(n, rank)
            if not swept:
                gradient_of_h(g, dy, B, SCALING)
            self.launchers.lora_linear_backward_dy(dy, h, [B], [SCALING], g if swept else None, [dB], None)
            return g, dB

        calls = [partial(call, dy) for dy in dys]

        def check() -> float:
            g, dB = calls[-1]()
            dy = dys[-1].double()
            truths = SCALING * (dy @ B.double()), SCALING * (dy.T @ h.double())
            return max(problem.relative_error(*pair) for pair in zip((g, dB), truths, strict=True))

        return Job(calls, check, problem.LIMIT[DTYPE], moved, bytes=moved)

    def kernels(self, op: str, t: int, base: problem.Base) -> dict[str, Callable[[], Job]]:
        """Each kernel that can serve T tokens: the fused ones where they take the weight, and panels."""
        make = self.forward if op == "lora_linear" else self.dx
        limits = {PANELS: {DECODE: NO_TOKENS, MIXED: NO_TOKENS, DX: NO_TOKENS}}
        weight = base.nf4.base_weight()
        if self.launchers.why_not_fused(weight, DTYPE, RANK) is None:
            limits[OPS[op]] = {DECODE: NO_TOKENS, MIXED: ALL_TOKENS, DX: ALL_TOKENS}
            decodes = self.launchers.decode_exchange(weight, RANK) is not None
            if op == "lora_linear" and t <= MOST_DECODE_TOKENS and decodes:
                limits[DECODE] = {DECODE: MOST_DECODE_TOKENS}
        return {
            what: partial(make, base, t, backend_with(self.launchers, some)) for what, some in limits.items()
        }

    def run(self) -> bool:
        torch.manual_seed(0)
        none = {DECODE: NO_TOKENS, MIXED: NO_TOKENS, DX: NO_TOKENS}
        for shape, base in self.bases(self.shapes[:SHAPES_TUNED]):
            for t in self.tokens:
                for op in OPS:
                    if self.time_left():
                        self.group(op, shape, t, self.kernels(op, t, base))
            for t in self.panel_tokens:
                for kind, make in (("panels forward", self.forward), ("panels dx", self.dx)):
                    jobs = {
                        f"{m} MiB": partial(make, base, t, backend_with(self.launchers, none, m << 20))
                        for m in PANEL_MIB
                    }
                    if self.time_left():
                        self.group(kind, shape, t, jobs)
                for rank in G_RANKS:
                    jobs = {
                        what: partial(self.gradients, base, t, rank, what == SWEPT) for what in (SWEPT, APART)
                    }
                    if self.time_left():
                        self.group(f"{G}, r = {rank}", shape, t, jobs)
                ways = {w: backend_with(self.launchers, none, low_rank_way=w) for w in WAYS}
                if self.time_left():
                    self.group(WAY, shape, t, {w: partial(self.forward, base, t, b) for w, b in ways.items()})
        return self.finish()

    # ---- the report ----------------------------------------------------------------------------------------

    def proposals(self) -> list[str]:
        """Rows for CROSSOVERS, with the measurement that they come from."""
        about, day = self.record["machine"]["device"], self.record["started"][:10]
        lines = []
        for op, kernel in OPS.items():
            ratios = mean_ratios(self.record, op)
            if not ratios:
                lines.append(f"{op}: {NOT_MEASURED}")
                continue
            limit = best_crossover(ratios)
            after = min((t for t in ratios if t > limit), default=None)
            why = f"measured, {about}, {day}, r = {RANK}: "
            parts = [f"{ratios[t]:.2f} of panels' time at {t} tokens" for t in (limit, after) if t in ratios]
            lines.append(f'Crossover("{op}", "{kernel}", {limit}, "{why}{", ".join(parts)}")')
            for shape in dict.fromkeys(key[:2] for key in rows_of(self.record, op)):
                own = mean_ratios(self.record, op, shape)
                if own:
                    lines.append(f"    {shape[0]}x{shape[1]} alone: {best_crossover(own)}")
        best = self.best_panel_mib()
        lines.append(
            f"PANEL_BYTES: {NOT_MEASURED}"
            if best is None
            else f"PANEL_BYTES = {best[0]} << 20: {best[1]:.3f} of the time of {cuda.PANEL_BYTES >> 20} MiB"
        )
        return [*lines, *self.few_tokens(), *self.ranks_of_g(), *self.ways()]

    def few_tokens(self) -> list[str]:
        """For the first row of CROSSOVERS: lora_linear_decode's time over lora_linear_mixed's, by T."""
        logs: dict[int, list[float]] = {}
        for (_, _, t, _), rows in rows_of(self.record, "lora_linear").items():
            found = ratio(rows.get(DECODE), rows.get(MIXED))
            if found is not None:
                logs.setdefault(t, []).append(math.log(found[0]))
        parts = [f"{math.exp(sum(some) / len(some)):.2f} at T = {t}" for t, some in sorted(logs.items())]
        return [f"{DECODE}, of {MIXED}'s time: {', '.join(parts) or NOT_MEASURED}"]

    def ranks_of_g(self) -> list[str]:
        """For GRADIENT_OF_H: the time of one sweep over that of a GEMM and a sweep, by rank."""
        parts = []
        for rank in G_RANKS:
            found = [
                ratio(rows.get(SWEPT), rows.get(APART))
                for rows in rows_of(self.record, f"{G}, r = {rank}").values()
            ]
            logs = [math.log(r[0]) for r in found if r is not None]
            if logs:
                parts.append(f"{math.exp(sum(logs) / len(logs)):.2f} at r = {rank}")
        return [f"GRADIENT_OF_H, {SWEPT} over {APART}: {', '.join(parts) or NOT_MEASURED}"]

    def ways(self) -> list[str]:
        """For LOW_RANK_WAY: the time of each way over FIRST's, by N/K and T."""
        lines = []
        for (n, k, t, _), rows in sorted(rows_of(self.record, WAY).items(), key=lambda item: item[0][:3]):
            found = {way: ratio(rows.get(way), rows.get(FIRST)) for way in (LAST, JOINED)}
            parts = [f"{way} {r[0]:.3f}" for way, r in found.items() if r is not None]
            if parts:
                lines.append(f"{WAY}, N/K = {n / k:.2f}, {n}x{k}, T = {t}: {', '.join(parts)} of first's")
        return lines or [f"{WAY}: {NOT_MEASURED}"]

    def best_panel_mib(self) -> tuple[int, float] | None:
        """The size with the least time (geometric mean over shapes and T), and that over today's size's."""
        today, logs = f"{cuda.PANEL_BYTES >> 20} MiB", {}
        for kind in ("panels forward", "panels dx"):
            for rows in rows_of(self.record, kind).values():
                for what, row in rows.items():
                    found = ratio(row, rows.get(today))
                    if found is not None:
                        logs.setdefault(int(what.split()[0]), []).append(math.log(found[0]))
        if not logs:
            return None
        means = {m: math.exp(sum(some) / len(some)) for m, some in logs.items()}
        best = min(means, key=lambda m: means[m])
        return best, means[best]

    def markdown(self) -> str:
        lines = [*heading(self.record, "Tuning of the CUDA backend"), "", "## Proposed", ""]
        lines += ["```", *self.proposals(), "```"]
        for kind in (*OPS, "panels forward", "panels dx", WAY, *(f"{G}, r = {rank}" for rank in G_RANKS)):
            groups = rows_of(self.record, kind)
            whats = list(dict.fromkeys(what for rows in groups.values() for what in rows))
            body = []
            for (n, k, t, _), rows in sorted(groups.items(), key=lambda item: item[0][:3]):
                cells = []
                for what in whats:
                    row = rows.get(what)
                    times = None if row is None else row.get("graph", row.get("eager"))
                    cells.append("failed" if row and "failed" in row else spread(times) if row else NOTHING)
                body.append([f"{n}x{k}", str(t), *cells])
            if body:
                lines += ["", f"## {kind}, device µs", "", *table(["W0", "T", *whats], body)]
        failed = failures(self.record)
        return "\n".join([*lines, *(["", "## What failed", "", *failed] if failed else [])]) + "\n"

    def short_table(self) -> str:
        results = self.record["results"]
        head = f"tune: {len(results)} measurements, {len(failures(self.record))} failed"
        return "\n".join([head, *self.proposals(), *failures(self.record)[:5]])


def main(argv: list[str]) -> int:
    arguments = parse(argv, "Measures the crossovers of the CUDA backend.", 120)
    if arguments.device == "cpu" or not torch.cuda.is_available():
        arguments.device = "cpu"
        Tune(arguments).save()
        print("gpu_tune: not measured: it needs a CUDA device", file=sys.stderr)
        return 3
    return record(Tune(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

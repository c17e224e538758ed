"""The CUDA kernels that exist, held against what the device can do and against bitsandbytes.

    python3 bench/gpu_ops.py --out DIR [--budget-s 120]
    python3 bench/gpu_ops.py --out DIR --device cpu --smoke     (the same logic on tiny shapes)

nf4_dequantize and nf4_quantize against the copy bandwidth; lora_linear for T = 1 and 8 (forward, NF4, r = 16)
against the time in which the device reads its bytes, by the op as a user calls it and by lora_linear_decode
itself on each of its routes, beside bitsandbytes + PEFT where these import. Replays of a CUDA graph over
rotating tensor sets, and calls from Python. Each result is checked before it is timed; a case that fails is
recorded with its message and the rest goes on. Writes ops.json and ops.md after every shape; without a device
they say "not measured", and the exit status is 3.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import lora_kernels as lk  # noqa: E402
from bench import problem  # noqa: E402
from bench.baseline_report import NOTHING, microseconds, spread, table  # noqa: E402
from bench.gpu_baseline import DTYPE, FORWARD, Baseline, Job, one_line, parse, record  # noqa: E402
from bench.shapes import BLOCKSIZE, RANK, SCALING, Shape, weight_bytes  # noqa: E402
from lora_kernels.backends import cuda, native  # noqa: E402
from lora_kernels.backends.cuda_launchers import CLUSTER, GLOBAL_MEMORY, CudaLaunchers  # noqa: E402
from lora_kernels.base_weight import BaseWeight  # noqa: E402

TOKENS = (1, 8)
NOT_MEASURED = "not measured"
PEER = "bitsandbytes+peft"
CLUSTERED, COUNTERS = "lora_linear_decode, clustered", "lora_linear_decode, counters"
EXCHANGES = {CLUSTERED: CLUSTER, COUNTERS: GLOBAL_MEMORY}
FLOOR_GOAL, PEER_GOAL, COPY_GOAL = 0.75, 3.0, 0.80  # BENCHMARKS.md, on an H200


def why_not(by: CudaLaunchers, route: str, base: BaseWeight) -> str | None:
    """Why lora_linear_decode does not take a weight by a route; None where it does."""
    reason = by.why_not_fused(base, DTYPE, RANK)
    if reason is None and by.decode_exchange(base, RANK) != EXCHANGES[route]:
        reason = f"K is too long for this device's blocks to meet in {EXCHANGES[route]}"
    return reason


class Ops(Baseline):
    name = "ops"

    def routes(self) -> dict[str, CudaLaunchers]:
        """The launchers of each route that this device and this library have."""
        if not self.on_gpu:
            return {}
        capability = cuda._capability(self.device)
        found = {COUNTERS: 80, CLUSTERED: 90}
        return {
            name: CudaLaunchers(torch.ops.lora_kernels, lambda _, least=least: least, native.cuda_failure)
            for name, least in found.items()
            if least <= capability
        }

    def quantize(self, base: problem.Base) -> Job:
        """From bf16, double quantisation: the dense weight is read, the NF4 weight written."""
        moved = weight_bytes(base.n, base.k) + base.n * base.k * DTYPE.itemsize
        dense = base.dense()
        weights = [dense.clone() for _ in range(self.sets(moved))]

        def check() -> float:
            here = lk.nf4_quantize(weights[-1][:64].cpu(), BLOCKSIZE, False)
            there = lk.nf4_quantize(weights[-1][:64], BLOCKSIZE, False)
            same = torch.equal(there.packed.cpu(), here.packed) and torch.equal(
                there.absmax.cpu(), here.absmax
            )
            return 0.0 if same else float("inf")

        return Job([lambda w=w: lk.nf4_quantize(w) for w in weights], check, 0.0, moved, bytes=moved)

    def decode(self, base: problem.Base, t: int, launchers: CudaLaunchers | None) -> Job:
        """lora_linear's forward: the kernel on one route, or for None the op."""

        def layers(count: int) -> list:
            made = []
            for _ in range(count):
                weight = problem.copy_nf4(base.nf4)
                A, B = base.lora_A.clone(), base.lora_B.clone()

                def op(x: Tensor, w: lk.NF4Weight = weight, A: Tensor = A, B: Tensor = B) -> Tensor:
                    return lk.lora_linear(x, w, A, B, scaling=SCALING)

                def kernel(x: Tensor, w: lk.NF4Weight = weight, A: Tensor = A, B: Tensor = B) -> Tensor:
                    y, h = x.new_empty(t, base.n), x.new_empty(t, RANK)
                    launchers.lora_linear_decode(x, w.base_weight(), A, B, SCALING, None, y, h)
                    return y

                made.append((op if launchers is None else kernel, A, B))
            return made

        size = weight_bytes(base.n, base.k) + RANK * (base.n + base.k) * DTYPE.itemsize
        job = self.adapted(base, t, FORWARD, 0.0, layers, size, problem.LIMIT[DTYPE])
        job.work["bytes"] = floor_bytes(base, t)
        return job

    def run(self) -> bool:
        torch.manual_seed(0)
        routes, with_peer = self.routes(), self.missing[PEER] is None
        self.copy()
        for shape in self.shapes:
            if not self.time_left():
                break
            try:
                base = problem.Base(shape.n, shape.k, DTYPE, self.device)
            except Exception as error:
                failed = {"what": "weight", "mode": FORWARD, "t": 0, "p": 0.0, "failed": one_line(error)}
                self.record["results"].append({**failed, "n": shape.n, "k": shape.k})
                continue
            jobs: list[tuple[str, int, Callable[[], Job]]] = []
            for t in TOKENS:
                jobs.append(("lora_kernels", t, partial(self.decode, base, t, None)))
                for name, route in routes.items():
                    reason = why_not(route, name, base.nf4.base_weight())
                    if reason is None:
                        jobs.append((name, t, partial(self.decode, base, t, route)))
                    else:
                        row = {"what": name, "mode": FORWARD, "t": t, "p": 0.0, "n": shape.n, "k": shape.k}
                        self.record["results"].append({**row, "not_taken": reason})
                if with_peer:
                    jobs.append((PEER, t, partial(self.peer, PEER, base, t, FORWARD, 0.0)))
            jobs.append(("nf4_dequantize", 0, partial(self.dequantize, base)))
            jobs.append(("nf4_quantize", 0, partial(self.quantize, base)))
            for what, t, make in jobs:
                if self.time_left():
                    self.measure(what, FORWARD, shape, t, 0.0, make)
            self.save()
            del base, jobs
        return self.finish()

    # ---- the report ----------------------------------------------------------------------------------------

    def row(self, what: str, shape: Shape, t: int = 0) -> dict | None:
        for row in self.record["results"]:
            if (row["what"], row.get("n"), row.get("k"), row["t"]) == (what, shape.n, shape.k, t):
                return row
        return None

    def time(self, row: dict | None, clock: str) -> str:
        if row is None:
            return NOT_MEASURED
        if "not_taken" in row:
            return "not taken"
        return "failed" if "failed" in row else spread(row.get(clock))

    def bandwidth(self, what: str) -> list[str]:
        """A table of an op that moves bytes, against the copy bandwidth."""
        body = []
        for shape in self.shapes:
            row = self.row(what, shape)
            rate, share = (row or {}).get("gb_per_s"), self.share(row)
            cells = [
                NOTHING if rate is None else f"{rate:.0f}",
                NOTHING if share is None else f"{100 * share:.0f} %",
            ]
            body.append([str(shape), self.time(row, "graph"), self.time(row, "eager"), *cells])
        return table(["W0", "device µs", "eager µs", "GB/s", "of copy"], body)

    def share(self, row: dict | None) -> float | None:
        """What part of the copy bandwidth a row reaches: its floor over its time."""
        copy, rate = self.record["ceilings"].get("copy_gb_per_s"), (row or {}).get("gb_per_s")
        return rate / copy if rate and copy else None

    def forward(self, clock: str) -> list[str]:
        """The forward against its floor (device) and against the peer."""
        copy = self.record["ceilings"].get("copy_gb_per_s")
        whats = ["lora_kernels", CLUSTERED, COUNTERS, PEER]
        head = ["W0", "T", "floor µs", *whats, "best of floor", "times faster than the peer"]
        body = []
        for shape in self.shapes:
            for t in TOKENS:
                rows = {what: self.row(what, shape, t) for what in whats}
                own = rows["lora_kernels"] or {}
                floor = NOTHING if copy is None else microseconds(floor_bytes(shape, t) / copy / 1e3)
                shares = [s for what in whats[:-1] if (s := self.share(rows[what])) is not None]
                share = f"{100 * max(shares):.0f} %" if shares and clock == "graph" else NOTHING
                both = [(row or {}).get(clock) for row in (rows[PEER], own)]
                ratio = f"{both[0]['median_us'] / both[1]['median_us']:.2f}" if all(both) else NOTHING
                times = [self.time(rows[what], clock) for what in whats]
                body.append([str(shape), str(t), floor, *times, share, ratio])
        return table(head, body)

    def markdown(self) -> str:
        about, copy = self.record["machine"], self.record["ceilings"].get("copy_gb_per_s")
        measured, whole = bool(self.record["results"]), self.record["finished"]
        state = "Complete." if whole else "Stopped by its time budget, or still running."
        driver = about.get("driver_version", about.get("driver", "none"))
        lines = [
            f"# GPU kernels: {about['device'] if measured else NOT_MEASURED}",
            "",
            f"{self.record['started']}, commit {about['commit'] or 'unknown'}, torch {about['torch']}, "
            f"driver {driver}, library for {native._C.cuda_archs or 'no GPU'}. "
            f"Command: `{' '.join(self.record['command'])}`. "
            + (state if measured else "There was no device."),
            "",
            "Microseconds for one call, median (p10-p90); bf16, r = 16, NF4 with double quantisation, random "
            "normal data. Device: CUDA-graph replay over rotating tensor sets. Eager: wall clock of calls "
            "from Python. Floor: the bytes that must move, at the bandwidth of a device-to-device copy.",
            "",
            *(f"- {name}: {version}" for name, version in self.record["peers"].items()),
            f"- copy, both directions: {NOT_MEASURED if copy is None else f'{copy:.0f} GB/s'}",
            f"- goals on an H200: T 1-8 at {100 * FLOOR_GOAL:.0f} % of the floor and {PEER_GOAL:.0f} times "
            f"as fast as bitsandbytes + PEFT; nf4_dequantize at {100 * COPY_GOAL:.0f} % of copy",
        ]
        for title, part in (
            ("lora_linear, forward, device", self.forward("graph")),
            ("lora_linear, forward, eager", self.forward("eager")),
            ("nf4_dequantize to bf16", self.bandwidth("nf4_dequantize")),
            ("nf4_quantize from bf16", self.bandwidth("nf4_quantize")),
        ):
            lines += ["", f"## {title}", "", *part]
        failures = [r for r in self.record["results"] if "failed" in r or "graph_failed" in r]
        if failures:
            lines += ["", "## What failed", ""]
        for r in failures:
            reason = r.get("failed") or "graph: " + r["graph_failed"]
            lines.append(f"- {r['what']} {r.get('n', '')}x{r.get('k', '')} T={r['t']}: {reason}")
        return "\n".join(lines) + "\n"

    def short_table(self) -> str:
        """At most 40 lines: the forward on the device, or where nothing was captured from Python."""
        copy, results = self.record["ceilings"].get("copy_gb_per_s"), self.record["results"]
        lines = [
            f"copy {f'{copy:.0f} GB/s' if copy else NOT_MEASURED}, {len(results)} measurements, "
            f"{sum('failed' in r for r in results)} failed, complete: {self.record['finished']}"
        ]
        own = ("lora_kernels", CLUSTERED, COUNTERS, "nf4_dequantize", "nf4_quantize")
        for row in [r for r in results if r["what"] in own and "gb_per_s" in r][:36]:
            times, share = row.get("graph", row["eager"]), self.share(row)
            where = f"{row['n']}x{row['k']}" + (f" T={row['t']}" if row["t"] else "")
            line = f"{row['what']} {where}: {microseconds(times['median_us'])} µs"
            lines.append(line + (f", {100 * share:.0f} % of the floor" if share else ""))
        return "\n".join(lines)


def floor_bytes(weight: problem.Base | Shape, t: int) -> int:
    """What the forward cannot avoid to move: W0 and the adapter, x, y and h."""
    n, k = weight.n, weight.k
    return weight_bytes(n, k) + DTYPE.itemsize * (RANK * (n + k) + t * (n + k + RANK))


def main(argv: list[str]) -> int:
    arguments = parse(argv, "Times the CUDA kernels against the device's bandwidth and the peers.", 120)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        arguments.device = "cpu"
        Ops(arguments).save()
        print("gpu_ops: not measured: torch.cuda.is_available() is false", file=sys.stderr)
        return 3
    return record(Ops(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

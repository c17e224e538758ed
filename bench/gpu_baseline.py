"""The ceilings of a CUDA device and the times that later work is held against.

    python3 bench/gpu_baseline.py --out DIR [--budget-s 240]
    python3 bench/gpu_baseline.py --out DIR --device cpu --smoke     (the same logic on tiny shapes)

Measured, the most important shapes first: device-to-device copy; cuBLAS bf16 F.linear; nf4_dequantize;
lora_linear with an NF4 weight, forward and forward+backward; and the peers that import (bitsandbytes
Linear4bit under PEFT, PEFT on a dense layer), on the same weights. Each result is compared with float64
truth before it is timed. A case that fails is recorded with its message and the rest goes on; after
--budget-s the script stops with what it has. Writes baseline.json after every shape's row and baseline.md.
"""

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import lora_kernels as lk  # noqa: E402
from bench import machine, peers, problem, timing  # noqa: E402
from bench.baseline_report import markdown, short_table  # noqa: E402
from bench.shapes import (  # noqa: E402
    SCALING,
    SHAPES,
    TOKENS_GPU,
    Shape,
    linear_flops,
    lora_backward_flops,
    lora_flops,
    weight_bytes,
)

FORWARD, BOTH = "forward", "forward+backward"
SMOKE_SHAPES = (Shape(96, 64, "smoke"), Shape(70, 91, "smoke"))
SMOKE_TOKENS = (1, 8)
# The order in which T is measured: the ends and the middle of the range before what lies between.
TOKEN_ORDER = (1, 2048, 16, 256, 4096, 8192, 8, 64, 1024, 16384)
DROPOUT_SHAPES, DROPOUT_P, DROPOUT_MIN_TOKENS = 3, 0.1, 2048
PEER_LIMIT = (
    2e-2  # a peer rounds more often than we allow ourselves; this only says that it computes the same map
)
DTYPE = torch.bfloat16


class Job:
    """One thing to time: `calls` does it once for each tensor set, `check` gives the error of its result."""

    def __init__(
        self, calls: list[timing.Call], check: Callable[[], float], limit: float, set_bytes: int, **work
    ):
        self.calls, self.check, self.limit, self.set_bytes, self.work = calls, check, limit, set_bytes, work

    def checked(self, what: str, device: torch.device) -> dict[str, object]:
        """Its error, its size and the memory of a call, for a row. Raises where the result is wrong."""
        return {
            "error": problem.assert_error(self.check(), self.limit, what),
            "sets": len(self.calls),
            "rotated_bytes": self.set_bytes * len(self.calls),
            "peak_bytes": timing.peak_bytes(self.calls[0], device),
        }


class Baseline:
    name = "baseline"  # of its files

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.on_gpu = self.device.type == "cuda"
        self.shapes = SMOKE_SHAPES if arguments.smoke else SHAPES
        self.tokens = SMOKE_TOKENS if arguments.smoke else [t for t in TOKEN_ORDER if t in TOKENS_GPU]
        self.deadline = time.monotonic() + arguments.budget_s
        self.warmup_s = 0.01 if arguments.smoke else arguments.warmup_ms / 1e3
        self.sample_budget_s = 0.02 if arguments.smoke else 0.06
        self.out = Path(arguments.out)
        self.tables = self.out if arguments.tables is None else Path(arguments.tables)
        for folder in (self.out, self.tables):
            folder.mkdir(parents=True, exist_ok=True)
        self.cache_bytes = 1 << 16
        if self.on_gpu:
            self.cache_bytes = getattr(
                torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20
            )
        self.missing = {
            "bitsandbytes+peft": peers.missing("bitsandbytes", "peft"),
            "dense+peft": peers.missing("peft"),
        }
        self.record: dict[str, object] = {
            "command": [Path(sys.executable).name, *sys.argv],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": self.describe(),
            "peers": peers.versions(),
            "finished": False,
            "ceilings": {},
            "results": [],
        }

    def describe(self) -> dict[str, object]:
        about = {**machine.describe_cpu(), "platform": platform.platform(), "dtype": str(DTYPE)}
        if not self.on_gpu:
            return {**about, "device": "cpu"}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            **about,
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": self.cache_bytes,
            "cuda": torch.version.cuda,
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
            **driver_and_clocks(),
        }

    # ---- the record ----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Both files, each replaced as a whole, so that a kill leaves the last complete state."""
        rows = self.record["results"]
        products = [row["tflop_per_s"] for row in rows if row["what"] == "F.linear" and "tflop_per_s" in row]
        self.record["ceilings"]["linear_tflop_per_s"] = max(products, default=None)
        for folder, name, text in (
            (self.out, f"{self.name}.json", json.dumps(self.record, indent=1) + "\n"),
            (self.tables, f"{self.name}.md", self.markdown()),
        ):
            part = folder / f".{name}.part"
            part.write_text(text)
            part.replace(folder / name)

    def markdown(self) -> str:
        return markdown(self.record)

    def short_table(self) -> str:
        return short_table(self.record)

    def time_left(self) -> bool:
        return time.monotonic() < self.deadline

    def measure(
        self, what: str, mode: str, shape: Shape | None, t: int, p: float, make: Callable[[], Job]
    ) -> None:
        """Checks and times one job; whatever goes wrong is recorded in its place."""
        row: dict[str, object] = {"what": what, "mode": mode, "t": t, "p": p}
        if shape is not None:
            row.update(n=shape.n, k=shape.k)
        self.record["results"].append(row)
        try:
            job = make()
            row.update(job.checked(what, self.device))
            row["eager"] = timing.wall_times(job.calls, self.device, 0.0, self.sample_budget_s)
            if self.on_gpu:
                try:
                    row["graph"] = timing.graph_times(job.calls, self.warmup_s, self.sample_budget_s)
                except Exception as error:  # what cannot be captured keeps its eager time
                    row["graph_failed"] = one_line(error)
            rate(row, job.work)
        except Exception as error:  # the other measurements are worth having
            row["failed"] = one_line(error)
        finally:
            job = None
            if self.on_gpu:
                gc.collect()
                torch.cuda.empty_cache()

    # ---- what is measured ----------------------------------------------------------------------------------

    def copy(self) -> None:
        size = (1 << 22) if not self.on_gpu else 1 << 32
        if self.on_gpu:
            free, _ = torch.cuda.mem_get_info(self.device)
            size = min(size, free // 4)

        def make() -> Job:
            source = torch.randn(size // 4, device=self.device)
            target = torch.full_like(source, float("nan"))

            def check() -> float:
                target.copy_(source)
                return 0.0 if torch.equal(target, source) else float("inf")

            return Job([lambda: target.copy_(source)], check, 0.0, 2 * size, bytes=2 * size)

        self.measure("copy", FORWARD, None, 0, 0.0, make)
        self.record["ceilings"]["copy_gb_per_s"] = self.record["results"][-1].get("gb_per_s")

    def sets(self, set_bytes: int) -> int:
        count = problem.set_count(set_bytes, self.cache_bytes, 64)
        if self.on_gpu:  # forward and backward hold about three times what a set counts
            free, _ = torch.cuda.mem_get_info(self.device)
            count = max(1, min(count, free // (4 * max(1, set_bytes))))
        return count

    def dequantize(self, base: problem.Base) -> Job:
        moved = weight_bytes(base.n, base.k) + base.n * base.k * DTYPE.itemsize
        copies = [problem.copy_nf4(base.nf4) for _ in range(self.sets(moved))]

        def check() -> float:
            return problem.relative_error(copies[-1].dequantize(DTYPE), base.truth())

        calls = [lambda w=w: w.dequantize(DTYPE) for w in copies]
        return Job(calls, check, problem.LIMIT[DTYPE], moved, bytes=moved)

    def inputs(self, count: int, t: int, k: int) -> list[Tensor]:
        return [torch.randn(t, k, device=self.device).to(DTYPE) for _ in range(count)]  # [T, K] each

    def dense_linear(self, base: problem.Base, t: int) -> Job:
        n, k = base.n, base.k
        moved = (n * k + t * k + t * n) * DTYPE.itemsize
        count = self.sets(moved)
        xs, dense = self.inputs(count, t, k), base.dense()
        weights = [dense, *(dense.clone() for _ in range(count - 1))]
        calls = [lambda x=x, w=w: nn.functional.linear(x, w) for x, w in zip(xs, weights, strict=True)]

        def check() -> float:
            return problem.forward_error(calls[0](), xs[0], base, lora=False)

        return Job(calls, check, problem.LIMIT[DTYPE], moved, flops=linear_flops(n, k, t), bytes=moved)

    def adapted(
        self,
        base: problem.Base,
        t: int,
        mode: str,
        p: float,
        layers: Callable[[int], list],
        weight_size: int,
        limit: float,
        known_mask: bool = False,
    ) -> Job:
        """`layers(count)` gives (function of x, A, B) for each tensor set; A and B are its parameters."""
        n, k = base.n, base.k
        moved = weight_size + (t * k + t * n) * (1 if mode == FORWARD else 2) * DTYPE.itemsize
        count = self.sets(moved)
        xs, made = self.inputs(count, t, k), layers(count)
        flops = linear_flops(n, k, t) + lora_flops(n, k, t)
        if mode == FORWARD:

            def forward(x: Tensor, layer: Callable) -> Tensor:
                with torch.no_grad():
                    return layer(x)

            calls = [lambda x=x, f=f: forward(x, f) for x, (f, _, _) in zip(xs, made, strict=True)]

            def check() -> float:
                return problem.forward_error(calls[-1](), xs[-1], base)

            return Job(calls, check, limit, moved, flops=flops, bytes=moved)

        dys = self.inputs(count, t, n)
        for x in xs:
            x.requires_grad_()

        def train(x: Tensor, dy: Tensor, layer: Callable, *adapter: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), (x, *adapter), dy)

        calls = [lambda x=x, dy=dy, m=m: train(x, dy, *m) for x, dy, m in zip(xs, dys, made, strict=True)]

        def check_gradients() -> float:
            torch.manual_seed(1)
            grads = tuple(grad.detach() for grad in calls[-1]())
            if p == 0 or known_mask:
                torch.manual_seed(1)  # the call draws nothing but its rng
                rng = lk.dropout_rng(self.device) if p else None
                return problem.backward_error(grads, dys[-1], xs[-1].detach(), base, p=p, rng=rng)
            # The mask of a peer cannot be known: finite gradients that are not all zero must do.
            right = all(bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads)
            return 0.0 if right else float("inf")

        total = flops + lora_backward_flops(n, k, t)
        return Job(calls, check_gradients, limit, moved, flops=total, bytes=moved)

    def ours(self, base: problem.Base, t: int, mode: str, p: float) -> Job:
        def layers(count: int) -> list:
            made = []
            for _ in range(count):
                weight = problem.copy_nf4(base.nf4)
                A, B = (m.clone().requires_grad_(mode == BOTH) for m in (base.lora_A, base.lora_B))

                def apply(x: Tensor, w: lk.NF4Weight = weight, A: Tensor = A, B: Tensor = B) -> Tensor:
                    return lk.lora_linear(x, w, A, B, scaling=SCALING, dropout_p=p)

                made.append((apply, A, B))
            return made

        size = weight_bytes(base.n, base.k)
        return self.adapted(base, t, mode, p, layers, size, problem.LIMIT[DTYPE], known_mask=True)

    def peer(self, what: str, base: problem.Base, t: int, mode: str, p: float) -> Job:
        four_bits = what == "bitsandbytes+peft"

        def layers(count: int) -> list:
            made, dense = [], None if four_bits else base.dense()
            for _ in range(count):
                if four_bits:
                    weight = problem.copy_nf4(base.nf4)
                    layer = peers.bitsandbytes_peft(weight, base.lora_A, base.lora_B, p)
                else:
                    layer = peers.dense_peft(dense.clone(), base.lora_A, base.lora_B, p)
                layer.train(mode == BOTH)
                made.append((layer, *peers.adapter_parameters(layer)))
            return made

        size = weight_bytes(base.n, base.k) if four_bits else base.n * base.k * DTYPE.itemsize
        return self.adapted(base, t, mode, p, layers, size, PEER_LIMIT)

    def plan(self) -> Iterator[tuple[Shape, tuple[int, ...], float]]:
        """(shape, token counts, dropout): the first shapes, the same with dropout, then the others."""
        first, rest = self.shapes[:DROPOUT_SHAPES], self.shapes[DROPOUT_SHAPES:]
        least = min(DROPOUT_MIN_TOKENS, max(self.tokens))
        for shape in first:
            yield shape, tuple(self.tokens), 0.0
        for shape in first:
            yield shape, tuple(t for t in self.tokens if t >= least), DROPOUT_P
        for shape in rest:
            yield shape, tuple(self.tokens), 0.0

    def run(self) -> bool:
        """Everything, or what fits the budget. True: something other than a peer failed."""
        torch.manual_seed(0)
        peers_here = [name for name, reason in self.missing.items() if reason is None]
        self.copy()
        self.save()
        for shape, token_counts, p in self.plan():
            if not self.time_left():
                break
            try:
                base = problem.Base(shape.n, shape.k, DTYPE, self.device)
                base.truth()
            except Exception as error:
                self.record["results"].append(
                    {
                        "what": "weight",
                        "mode": FORWARD,
                        "t": 0,
                        "p": p,
                        "n": shape.n,
                        "k": shape.k,
                        "failed": one_line(error),
                    }
                )
                continue
            if p == 0:
                self.measure("nf4_dequantize", FORWARD, shape, 0, p, partial(self.dequantize, base))
            for t in token_counts:
                if p == 0 and self.time_left():
                    self.measure("F.linear", FORWARD, shape, t, p, partial(self.dense_linear, base, t))
                for mode in (FORWARD, BOTH) if p == 0 else (BOTH,):
                    if self.time_left():
                        self.measure("lora_kernels", mode, shape, t, p, partial(self.ours, base, t, mode, p))
                    for name in peers_here:
                        if self.time_left():
                            self.measure(name, mode, shape, t, p, partial(self.peer, name, base, t, mode, p))
                self.save()
            del base
        return self.finish()

    def finish(self) -> bool:
        """Saves the record as it ends. True: something other than a peer failed."""
        self.record["finished"] = self.time_left()
        self.record["seconds"] = round(self.arguments.budget_s - (self.deadline - time.monotonic()), 1)
        self.save()
        own = (row for row in self.record["results"] if row["what"] not in self.missing)
        return any("failed" in row or "graph_failed" in row for row in own)


def rate(row: dict, work: dict[str, int]) -> None:
    """TFLOP/s and GB/s of a row, from the graph's time where there is one."""
    seconds = row.get("graph", row["eager"])["median_us"] / 1e6
    if "flops" in work:
        row["tflop_per_s"] = work["flops"] / seconds / 1e12
    if "bytes" in work:
        row["gb_per_s"] = work["bytes"] / seconds / 1e9


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def driver_and_clocks() -> dict[str, str]:
    """What nvidia-smi says of the driver and the clocks, as found; nothing is set."""
    import shutil
    import subprocess

    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {"driver": "nvidia-smi not found"}
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    query = [smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver": one_line(error)}
    return dict(zip(fields, (part.strip() for part in answer.splitlines()[0].split(",")), strict=False))


def parse(argv: list[str], description: str, budget_s: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the JSON and the Markdown file"
    )
    parser.add_argument(
        "--tables", metavar="DIR", help="folder of the Markdown file, where not that of --out"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and short times: tests the script")
    parser.add_argument(
        "--budget-s", type=float, default=budget_s, metavar="S", help="stop after so many seconds"
    )
    parser.add_argument("--warmup-ms", type=float, default=200, metavar="MS", help="before each timing")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.smoke:
        parser.error("--device cpu goes with --smoke")
    return arguments


def record(run: Baseline) -> int:
    """Runs it, prints its short table, and gives the exit status."""
    try:
        failed = run.run()
    except KeyboardInterrupt:  # how gpu.sh ends what outstays its limit
        print(f"{run.name}: interrupted; this is what it has")
        run.save()
        failed = True
    print(run.short_table())
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    arguments = parse(argv, "Records a device's ceilings and the peers' times.", 240)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_baseline: error: torch.cuda.is_available() is false", file=sys.stderr)
        return 3
    return record(Baseline(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

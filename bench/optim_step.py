"""Optimizer steps: ours beside torch's fused AdamW and bitsandbytes' 8-bit one, resident and paged.

    python -m bench.optim_step [--device cuda] [--small] [--case TEXT] [--rounds N] [--results FOLDER]

Every case has one set of fp32 parameters and gradients, which all contenders update in turn, A B C A B C; a
ratio is of one round. The cases: 1 M, 100 M and 500 M elements of state (two for each parameter's element) in
matrices of 1024 x 1024 or less, and 1,000 adapters of rank 16 on 4096 x 4096 layers, which are 2,000 tensors.

"paged" has a quarter of its state resident, the rest in a file, or for a GPU in pinned host memory; pages of
2 MiB, or smaller ones where that would be few. Beside it stands what the bytes that it moved cost by plain
reads and writes of whole pages, one after the other, in the same round: past the page cache, in a file in the
same folder; over the bus, from and to pinned memory. And the time that the step has waited for pages.
"""

import argparse
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lora_kernels as lk
from bench import machine
from bench.timing import synchronize

LR = 1e-4
RESIDENT = 0.25
PAGE_BYTES = 2 << 20
LEAST_PAGES = 32  # of a case's state: smaller pages where it has fewer
PROBE_BYTES = 256 << 20
STATE_BYTES = 8  # of a parameter's element, in 32 bits
LEAST_RATIO, LEAST_RATIO_OF_ADAPTERS = 1.0, 2.0  # torch fused / ours, all resident
MOST_OF_THE_DISK = 1.5  # time of a paged step over what its bytes cost


def case_shapes(small: bool) -> dict[str, list[tuple[int, ...]]]:
    adapters = 50 if small else 1000
    cases = {
        "1 M elements": [(500, 1000)],
        "100 M elements": [(1024, 1024)] * 47 + [(717, 1024)],
        f"{adapters:,} adapters": [(16, 4096), (4096, 16)] * adapters,
        "500 M elements": [(1024, 1024)] * 238 + [(429, 1024)],
    }
    return dict(list(cases.items())[:3]) if small else cases


class Disk:
    """What a byte costs, read and written in whole pages past the page cache."""

    def __init__(self, folder: str, page_bytes: int) -> None:
        self.file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
        self.page = mmap.mmap(-1, page_bytes)  # O_DIRECT wants aligned memory
        self.page.write(os.urandom(page_bytes))
        os.posix_fallocate(self.file, 0, PROBE_BYTES)
        self.measure()

    def measure(self) -> tuple[float, float]:
        """Seconds for a byte that is read, and for one that is written."""
        costs = []
        for transfer in (os.preadv, os.pwritev):
            start = time.perf_counter()
            for begin in range(0, PROBE_BYTES, len(self.page)):
                if transfer(self.file, [self.page], begin) != len(self.page):
                    raise OSError("a transfer was cut short")
            costs.append((time.perf_counter() - start) / PROBE_BYTES)
        return costs[0], costs[1]


class Bus:
    """What a byte costs between pinned host memory and a GPU, in whole pages."""

    def __init__(self, device: torch.device, page_bytes: int) -> None:
        self.device = device
        self.host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True).split(page_bytes)
        self.page = torch.empty(page_bytes, dtype=torch.uint8, device=device)
        self.measure()

    def measure(self) -> tuple[float, float]:
        """Seconds for a byte to the device, and for one from it."""

        def copies(to_device: bool) -> None:
            for host in self.host:
                target, source = (self.page, host) if to_device else (host, self.page)
                target.copy_(source, non_blocking=True)

        return tuple(timed(lambda way=way: copies(way), self.device) / PROBE_BYTES for way in (True, False))


def page_bytes_of(elements: int) -> int:
    """2 MiB, or less where that many elements' 32-bit state would be fewer than LEAST_PAGES."""
    most = elements * STATE_BYTES // LEAST_PAGES
    return max(64 << 10, min(PAGE_BYTES, 1 << max(most.bit_length() - 1, 0)))


def contenders(ps: list[nn.Parameter], folder: str) -> dict[str, torch.optim.Optimizer]:
    elements = sum(p.numel() for p in ps)
    options = {"page_bytes": page_bytes_of(elements), "directory": folder}
    budget = int(RESIDENT * elements * STATE_BYTES)
    whole = {}  # without a budget a CPU keeps all pages, and a GPU a few
    if ps[0].device.type == "cuda":
        whole["resident_bytes"] = 2 * elements * STATE_BYTES + (64 << 20)
    found: dict[str, torch.optim.Optimizer] = {
        "torch fused": torch.optim.AdamW(ps, lr=LR, fused=True),
        "torch foreach": torch.optim.AdamW(ps, lr=LR, foreach=True),
        "ours": lk.optim.PagedAdamW(ps, lr=LR, **whole),
        "ours 8-bit": lk.optim.PagedAdamW8bit(ps, lr=LR, **whole),
        "ours paged": lk.optim.PagedAdamW(ps, lr=LR, resident_bytes=budget, **options),
        "ours 8-bit paged": lk.optim.PagedAdamW8bit(ps, lr=LR, resident_bytes=budget // 4, **options),
    }
    if machine.version("bitsandbytes"):
        import bitsandbytes as bnb

        found["bitsandbytes 8-bit"] = bnb.optim.AdamW8bit(ps, lr=LR)
    return found


def timed(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def measure(name: str, shapes: list[tuple[int, ...]], rounds: int, folder: str, device: torch.device) -> dict:
    """Median times, ratios within a round, and for the paged ones what their bytes cost."""
    generator = torch.Generator(device).manual_seed(0)
    ps = [nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in shapes]
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, device=device).mul_(1e-3)
    optimizers = contenders(ps, folder)
    page_bytes = page_bytes_of(sum(p.numel() for p in ps))
    disk = Disk(folder, page_bytes) if device.type == "cpu" else Bus(device, page_bytes)
    for optimizer in optimizers.values():
        optimizer.step()  # makes the state
        optimizer.step()
    samples: dict[str, list[float]] = {label: [] for label in optimizers}
    of_disk: dict[str, list[float]] = {label: [] for label in optimizers if label.endswith("paged")}
    moved: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        cost = disk.measure()
        for label, optimizer in optimizers.items():
            before = optimizer.stats() if label in of_disk else {}
            samples[label].append(timed(optimizer.step, device))
            if label in of_disk:
                after = optimizer.stats()
                moved[label] = {
                    key: after[key] - before[key] for key in ("bytes_read", "bytes_written", "stalled_s")
                }
                bytes_cost = cost[0] * moved[label]["bytes_read"] + cost[1] * moved[label]["bytes_written"]
                of_disk[label].append(samples[label][-1] / bytes_cost)
                moved[label]["bytes_cost_s"] = bytes_cost
    rows = []
    for label, times in samples.items():
        ratios = [b / a for a, b in zip(times, samples["torch fused"], strict=True)]
        row = {
            "contender": label,
            "median_ms": statistics.median(times) * 1e3,
            "least_ms": min(times) * 1e3,
            "times_ms": [t * 1e3 for t in times],
            "torch_fused_over_it": statistics.median(ratios),
        }
        if label in of_disk:
            row |= {"over_the_bytes_cost": statistics.median(of_disk[label]), **moved[label]}
        if isinstance(optimizers[label], lk.optim.PagedOptimizer):
            stats = optimizers[label].stats()
            row |= {"peak_resident_bytes": stats["peak_resident_bytes"], "pages": stats["pages"]}
        rows.append(row)
    for optimizer in optimizers.values():
        if isinstance(optimizer, lk.optim.PagedOptimizer):
            optimizer.close()
    elements = sum(p.numel() for p in ps)
    return {"case": name, "tensors": len(ps), "parameters": elements, "rows": rows}


def goals(cases: list[dict]) -> list[tuple[str, str, str, bool]]:
    """case, goal, reached, whether it is met."""
    found = []
    for case in cases:
        rows = {row["contender"]: row for row in case["rows"]}
        least = LEAST_RATIO_OF_ADAPTERS if case["case"].endswith("adapters") else LEAST_RATIO
        got = rows["ours"]["torch_fused_over_it"]
        found.append((case["case"], f"resident: torch fused / ours ≥ {least:g}", f"{got:.2f}", got >= least))
        for label in ("ours paged", "ours 8-bit paged"):
            if label not in rows:
                continue
            got = rows[label]["over_the_bytes_cost"]
            goal = f"{label}, a quarter resident: ≤ {MOST_OF_THE_DISK} of what the bytes cost"
            found.append((case["case"], goal, f"{got:.2f}", got <= MOST_OF_THE_DISK))
    return found


def markdown(result: dict) -> str:
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = ["# Optimizer steps", "", f"{about}. AdamW, fp32; medians over interleaved rounds.", ""]
    lines += [
        "| case | contender | median ms | torch fused / it | peak resident MiB | moved MiB | "
        "time / bytes' cost | waited ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in result["cases"]:
        for row in case["rows"]:
            paged = "over_the_bytes_cost" in row
            resident = f"{row['peak_resident_bytes'] / 2**20:,.0f}" if "peak_resident_bytes" in row else ""
            moved = f"{(row['bytes_read'] + row['bytes_written']) / 2**20:,.0f}" if paged else ""
            cost = f"{row['over_the_bytes_cost']:.2f}" if paged else ""
            stalled = f"{row['stalled_s'] * 1e3:,.0f}" if paged else ""
            lines.append(
                f"| {case['case']} | {row['contender']} | {row['median_ms']:,.2f} | "
                f"{row['torch_fused_over_it']:.2f} | {resident} | {moved} | {cost} | {stalled} |"
            )
    lines += ["", "| case | goal | reached | met |", "|---|---|---:|---|"]
    lines += [
        f"| {c} | {g} | {r} | {'yes' if met else '**no**'} |" for c, g, r, met in goals(result["cases"])
    ]
    return "\n".join(lines) + "\n"


def _without_folders(argv: list[str]) -> list[str]:
    """What of the arguments matters elsewhere."""
    folders = ("--results", "--directory", "--tables")
    return [word for i, word in enumerate(argv) if word not in folders and argv[max(i - 1, 0)] not in folders]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Times optimizer steps.", allow_abbrev=False)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--small", action="store_true", help="small cases only")
    parser.add_argument("--case", metavar="TEXT", help="only the cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="of the backing files")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="write optim.md there, and no raw file")
    arguments = parser.parse_args(argv)
    device, cases = torch.device(arguments.device), []
    if device.type == "cuda" and not torch.cuda.is_available():
        print("optim_step: not measured: torch sees no CUDA device", file=sys.stderr)
        return 3
    for name, shapes in case_shapes(arguments.small).items():
        if arguments.case and arguments.case not in name:
            continue
        print(name, file=sys.stderr, flush=True)
        rounds = max(3, arguments.rounds // (3 if name.startswith("500 M") else 1))
        cases.append(measure(name, shapes, rounds, arguments.directory, device))
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    result = {
        "machine": {**machine.describe_cpu(), **gpu},
        "command": "python bench/run.py --optim " + " ".join(_without_folders(argv)),
        "cases": cases,
    }
    text = markdown(result)
    print(text)
    if arguments.tables is not None:  # beside other tables; the raw numbers into the log
        (arguments.tables / "optim.md").write_text(text)
        print(json.dumps(result))
        return 0
    folder = arguments.results / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / time.strftime("%Y-%m-%d_%H%M%S_optim_step.json")
    raw.write_text(json.dumps(result, indent=1) + "\n")
    raw.with_suffix(".md").write_text(text)
    print(f"written: {raw}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Contenders on the same problem, timed in turn: what gpu_training.py and gpu_tune.py have in common."""

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bench import problem, timing
from bench.gpu_baseline import Baseline, Job, one_line, rate
from bench.shapes import Shape
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda_launchers import CudaLaunchers


class Interleaved(Baseline):
    """A Baseline whose rows come in groups: A B C A B C ..., so that ratios within a group are steady."""

    def __init__(self, arguments: argparse.Namespace, launchers: CudaLaunchers | None = None) -> None:
        """`launchers`: other than the library's; a test without a device brings those of the stand-in."""
        super().__init__(arguments)
        self.launchers = launchers or (cuda._backend._launchers if self.on_gpu else None)

    def group(
        self, kind: str, shape: Shape, t: int, jobs: Mapping[str, Callable[[], Job]], p: float = 0.0
    ) -> None:
        """Checks and times all jobs; a contender that fails is recorded and the others go on."""
        rows: dict[str, dict] = {}
        ready: dict[str, Job] = {}
        try:
            for what, make in jobs.items():
                row = rows[what] = {"kind": kind, "what": what, "n": shape.n, "k": shape.k, "t": t, "p": p}
                self.record["results"].append(row)
                try:
                    job = make()
                    row.update(job.checked(what, self.device))
                    ready[what] = job
                except Exception as error:
                    row["failed"] = one_line(error)
            calls = {what: job.calls for what, job in ready.items()}
            budget = self.sample_budget_s * len(calls)
            for what, times in timing.interleaved_wall_times(calls, self.device, budget).items():
                rows[what]["eager"] = times
            if self.on_gpu:
                times, failed = timing.interleaved_graph_times(calls, self.warmup_s, budget)
                for what, summary in times.items():
                    rows[what]["graph"] = summary
                for what, error in failed.items():
                    rows[what]["graph_failed"] = one_line(error)
            for what, job in ready.items():
                rate(rows[what], job.work)
        except Exception as error:  # the other groups are worth having
            for row in rows.values():
                row.setdefault("failed", one_line(error))
        finally:
            ready.clear()
            if self.on_gpu:
                gc.collect()
                torch.cuda.empty_cache()

    def bases(self, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, problem.Base]]:
        """The weights of these shapes, one at a time; a shape that does not fit is recorded."""
        for shape in shapes:
            if not self.time_left():
                return
            try:
                base = problem.Base(shape.n, shape.k, torch.bfloat16, self.device)
                base.truth()
            except Exception as error:
                row = {"kind": "weight", "what": "weight", "n": shape.n, "k": shape.k, "t": 0, "p": 0.0}
                self.record["results"].append({**row, "failed": one_line(error)})
                continue
            yield shape, base
            self.save()


def seconds(row: dict | None, clock: str) -> float | None:
    """The median of a row, if there is one."""
    times = (row or {}).get(clock)
    return None if times is None else times["median_us"] / 1e6


def ratio(slower: dict | None, faster: dict | None) -> tuple[float, str] | None:
    """How many times as fast the second is, and by which clock: the device's where both were captured."""
    for clock in ("graph", "eager"):
        a, b = seconds(slower, clock), seconds(faster, clock)
        if a is not None and b is not None:
            return a / b, clock
    return None


def rows_of(record: dict, kind: str) -> dict[tuple[int, int, int, float], dict[str, dict]]:
    """(N, K, T, p) -> contender -> row, of one kind of group, in the order of measurement."""
    found: dict[tuple[int, int, int, float], dict[str, dict]] = {}
    for row in record["results"]:
        if row["kind"] == kind:
            found.setdefault((row["n"], row["k"], row["t"], row["p"]), {})[row["what"]] = row
    return found


def failures(record: dict) -> list[str]:
    """A line for each contender that failed or could not be captured."""
    lines = []
    for row in record["results"]:
        reason = row.get("failed") or (row.get("graph_failed") and "graph: " + row["graph_failed"])
        if reason:
            lines.append(f"- {row['what']} {row['n']}x{row['k']} T={row['t']} p={row['p']}: {reason}")
    return lines


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()

"""Training on a CUDA device against its peers: lora_linear forward and backward, its sweeps, many adapters.

    python3 bench/gpu_training.py --out DIR [--budget-s 180]
    python3 bench/gpu_training.py --out DIR --device cpu --smoke     (the same logic on tiny shapes)

On the same tensors, interleaved, each result checked against float64 first: the forward for T = 16 to 4096,
and forward and backward at p = 0 and 0.1, beside bitsandbytes + PEFT, PEFT on the dense weight, and cuBLAS on
the dense weight alone; peak memory of each. The low-rank sweeps by their launchers beside a copy of as many
bytes. lora_linear_batched with 64 adapters beside lora_linear with one. Writes training.json and training.md,
with the goals as reached, missed or not measured, after every shape.
"""

import argparse
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
from bench.gpu_baseline import BOTH, DTYPE, FORWARD, Job, parse, record  # noqa: E402
from bench.gpu_groups import Interleaved, normal  # noqa: E402
from bench.gpu_training_report import markdown, short_table  # noqa: E402
from bench.shapes import RANK, SCALING, Shape, weight_bytes  # noqa: E402
from lora_kernels import reference  # noqa: E402
from lora_kernels.backends.cuda_launchers import CudaLaunchers  # noqa: E402

OURS, BNB, DENSE_PEFT, CUBLAS = "lora_kernels", "bitsandbytes+peft", "dense+peft", "F.linear"
# In the order of measurement: what the goals speak of before what lies between.
TOKENS = (16, 256, 2048, 64, 4096, 1024, 512)
DROPOUT_P, DROPOUT_TOKENS = 0.1, (2048, 4096, 256)
SWEEP_TOKENS = (4096, 1024)
ADAPTERS, BATCHED_TOKENS = 64, (64, 512, 2048)
FIRST_SHAPES = 3  # measured whole before the others
ONE, MANY = "lora_linear, 1 adapter", f"lora_linear_batched, {ADAPTERS} adapters"


def sweep_width(what: str, base: problem.Base) -> int:
    """Columns of the tensor that a low-rank kernel reads or writes once: x or dx [T, K], y or dy [T, N]."""
    return base.n if what in ("sweep over dy", "lora_expand forward") else base.k


def sweep_bytes(what: str, base: problem.Base, t: int) -> int:
    """What it cannot avoid to move: the wide tensor, h or g, the adapter, and the gradients it writes."""
    wide = sweep_width(what, base)
    more = {"sweep over dy": t * RANK + base.n * RANK}.get(what, 0)  # g beside h; dB beside B
    return DTYPE.itemsize * (t * wide + t * RANK + RANK * wide + more)


class Adapters:
    """Random adapters over one base, x and dy, and which row takes which."""

    def __init__(self, base: problem.Base, t: int, mode: str, many: bool) -> None:
        device, count = base.device, ADAPTERS if many else 1
        self.base, self.mode, self.weight = base, mode, problem.copy_nf4(base.nf4)
        self.A = [normal(device, RANK, base.k).mul_(base.k**-0.5) for _ in range(count)]
        self.B = [normal(device, base.n, RANK).mul_(RANK**-0.5) for _ in range(count)]
        self.x, self.dy = normal(device, t, base.k), normal(device, t, base.n)
        self.index = torch.randint(-1, count, (t,), device=device) if many else None
        self.leaves = [self.x, *self.A, *self.B]
        for leaf in self.leaves:
            leaf.requires_grad_(mode == BOTH)

    def run(self) -> tuple[Tensor, ...]:
        """y, or dx and the adapters' gradients."""
        if self.index is None:
            y = lk.lora_linear(self.x, self.weight, self.A[0], self.B[0], scaling=SCALING)
        else:
            scaling = [SCALING] * len(self.A)
            y = lk.lora_linear_batched(self.x, self.weight, self.A, self.B, scaling, self.index)
        return (y,) if self.mode == FORWARD else torch.autograd.grad(y, self.leaves, self.dy)

    def error(self) -> float:
        """Of y, or of dx, which stands for the gradients: tests judge each of them."""
        got = self.run()[0]
        with torch.no_grad():
            rows = problem.checked_rows(len(self.x))
            forward = self.mode == FORWARD
            left = (self.x if forward else self.dy)[rows].double()
            truth = left @ (self.base.truth().T if forward else self.base.truth())
            taken = left.new_zeros(len(left), dtype=torch.int64)  # the only adapter
            if self.index is not None:
                taken = self.index[rows]
            for i, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
                a, b, mine = a.double(), b.double(), taken == i
                truth[mine] += SCALING * (left[mine] @ (a.T if forward else b)) @ (b.T if forward else a)
            return problem.relative_error(got[rows], truth)


class Training(Interleaved):
    name = "training"

    def __init__(self, arguments: argparse.Namespace, launchers: CudaLaunchers | None = None) -> None:
        super().__init__(arguments, launchers)
        smoke = arguments.smoke
        self.tokens = (8, 40) if smoke else TOKENS
        self.dropout_tokens = (40,) if smoke else DROPOUT_TOKENS
        self.sweep_tokens = (40,) if smoke else SWEEP_TOKENS
        self.batched_tokens = (40,) if smoke else BATCHED_TOKENS
        self.peers = [name for name in (BNB, DENSE_PEFT) if self.missing[name] is None]

    def markdown(self) -> str:
        return markdown(self.record)

    def short_table(self) -> str:
        return short_table(self.record)

    # ---- the op and its peers ------------------------------------------------------------------------------

    def layers(self, base: problem.Base, t: int, mode: str, p: float) -> dict[str, Callable[[], Job]]:
        jobs = {OURS: partial(self.ours, base, t, mode, p)}
        for name in self.peers:
            jobs[name] = partial(self.peer, name, base, t, mode, p)
        if mode == FORWARD:
            jobs[CUBLAS] = partial(self.dense_linear, base, t)
        return jobs

    # ---- the low-rank kernels, by their launchers ---------------------------------------------------------

    def copy_of(self, moved: int) -> Job:
        """Half of the bytes read, half written."""
        count = moved // 2 // DTYPE.itemsize
        pairs = [
            (normal(self.device, count), torch.empty(count, dtype=DTYPE, device=self.device))
            for _ in range(self.sets(moved))
        ]
        calls = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]

        def check() -> float:
            calls[-1]()
            return 0.0 if torch.equal(*pairs[-1]) else float("inf")

        return Job(calls, check, 0.0, moved, bytes=moved)

    def sweep(self, what: str, base: problem.Base, t: int, p: float) -> Job:
        """One of SWEEPS: the bytes are those of the wide tensor and of what is written."""
        r, by = RANK, self.launchers
        A, B, s = base.lora_A, base.lora_B, SCALING / (1 - p)
        rng = lk.dropout_rng(self.device) if p else None
        wide, moved = sweep_width(what, base), sweep_bytes(what, base, t)
        count = self.sets(moved)
        bigs, smalls = ([normal(self.device, t, c) for _ in range(count)] for c in (wide, r))

        def call(big: Tensor, small: Tensor) -> Tensor:
            if what == "lora_shrink":
                out = big.new_empty(t, r)
                by.lora_shrink(big, [A], p, rng, out)
            elif what == "sweep over dy":
                out, g = torch.empty_like(B), big.new_empty(t, r)
                by.lora_linear_backward_dy(big, small, [B], [s], g, [out], None)
            elif what == "sweep over x":
                out = torch.empty_like(A)
                by.lora_linear_backward_x(big, small, p, rng, [out])
            elif what == "lora_expand forward":
                out = big
                by.lora_expand_forward(small, [B], [s], out, add=False)
            else:
                out = big
                by.lora_expand_backward(small, [A], p, rng, out, add=False)
            return out

        def check() -> float:
            big, small = bigs[-1].double(), smalls[-1].double()
            out = call(bigs[-1], smalls[-1]).double()
            mask = 1.0 if p == 0 else reference.dropout_mask((t, wide), p, rng).double()
            truth = {
                "lora_shrink": lambda: (mask * big) @ A.double().T,
                "sweep over dy": lambda: s * big.T @ small,
                "sweep over x": lambda: small.T @ (mask * big),
                "lora_expand forward": lambda: s * small @ B.double().T,
                "lora_expand backward": lambda: mask * (small @ A.double()),
            }[what]()
            return problem.relative_error(out, truth)

        calls = [partial(call, big, small) for big, small in zip(bigs, smalls, strict=True)]
        return Job(calls, check, problem.LIMIT[DTYPE], moved, bytes=moved)

    def sweeps(self, base: problem.Base, t: int, p: float) -> dict[str, dict[str, Callable[[], Job]]]:
        """A group for each kernel that dropout concerns, or at p = 0 for all: it, and a copy of its bytes."""
        with_mask = ("lora_shrink", "sweep over x", "lora_expand backward")
        names = with_mask if p else (*with_mask, "sweep over dy", "lora_expand forward")
        return {
            name: {
                name: partial(self.sweep, name, base, t, p),
                f"copy beside {name}": partial(self.copy_of, sweep_bytes(name, base, t)),
            }
            for name in names
        }

    # ---- many adapters -------------------------------------------------------------------------------------

    def batched(self, base: problem.Base, t: int, mode: str, many: bool) -> Job:
        """Rows of 64 adapters and of none at random; or all rows of one adapter, by lora_linear."""
        moved = weight_bytes(base.n, base.k)
        moved += DTYPE.itemsize * (t + (ADAPTERS if many else 1) * RANK) * (base.n + base.k)
        problems = [Adapters(base, t, mode, many) for _ in range(self.sets(moved))]
        # The term of an adapter is added to a base product that is rounded already: two roundings.
        return Job([each.run for each in problems], problems[-1].error, 2 * problem.LIMIT[DTYPE], moved)

    # ---- everything ----------------------------------------------------------------------------------------

    def whole(self, shape: Shape, base: problem.Base, more: bool) -> None:
        for t in self.tokens:
            if self.time_left():
                self.group(FORWARD, shape, t, self.layers(base, t, FORWARD, 0.0))
            if self.time_left():
                self.group(BOTH, shape, t, self.layers(base, t, BOTH, 0.0))
            if t in self.dropout_tokens and self.time_left():
                self.group(BOTH, shape, t, self.layers(base, t, BOTH, DROPOUT_P), DROPOUT_P)
        if not more:
            return
        for t in self.sweep_tokens if self.launchers is not None else ():
            for p in (0.0, DROPOUT_P):
                for jobs in self.sweeps(base, t, p).values():
                    if self.time_left():
                        self.group("sweep", shape, t, jobs, p)
        for t in self.batched_tokens:
            for mode in (FORWARD, BOTH):
                jobs = {what: partial(self.batched, base, t, mode, what == MANY) for what in (MANY, ONE)}
                if self.time_left():
                    self.group(f"batched {mode}", shape, t, jobs)

    def run(self) -> bool:
        torch.manual_seed(0)
        for i, (shape, base) in enumerate(self.bases(self.shapes)):
            self.whole(shape, base, more=i < FIRST_SHAPES)
        return self.finish()


def main(argv: list[str]) -> int:
    arguments = parse(argv, "Times training by the CUDA kernels beside its peers.", 180)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        arguments.device = "cpu"
        Training(arguments).save()
        print("gpu_training: not measured: torch.cuda.is_available() is false", file=sys.stderr)
        return 3
    return record(Training(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

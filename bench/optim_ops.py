"""The optimizers' steps, all resident, against torch's fused AdamW and bitsandbytes, interleaved.

    python -m bench.optim_ops [big] [adapters] [tiny] [--repeat N] [--threads N] [--device cpu]

big: one parameter of 4096 x 4096. adapters: 2,000 of 16 x 4096 and 4096 x 16, those of 1,000 adapters. tiny:
2,000 of 16 x 64, where a call costs more than its elements. Prints the least and the median time of each, and
the bytes that it must move per second, which no step can raise above what a copy reaches.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.optim_state import HEADER_BYTES, optim_state_bytes

PAGE_BYTES = 2 << 20
SHAPES = {
    "big": [(4096, 4096)],
    "adapters": [(16, 4096), (4096, 16)] * 1000,
    "tiny": [(16, 64), (64, 16)] * 1000,
}
OURS = (
    ("adamw_step", torch.float32, "nearest"),
    ("adamw_step", torch.bfloat16, "nearest"),
    ("adamw_step", torch.bfloat16, "stochastic"),
    ("adamw_step", torch.bfloat16, "kahan"),
    ("adamw8bit_step", torch.float32, "nearest"),
    ("adamw8bit_step", torch.bfloat16, "nearest"),
    ("lion_step", torch.float32, "nearest"),
    ("lion8bit_step", torch.float32, "nearest"),
)
Entry = tuple[Callable[[], object], float]  # a step, and the bytes that it reads and writes


def table(op: str, sizes: list[int], dtype: torch.dtype, rounding: str) -> tuple[int, Tensor]:
    """Pages of PAGE_BYTES filled one after another: their number, and the segments."""
    rows, pages, at = [], 1, HEADER_BYTES
    for parameter, size in enumerate(sizes):
        first = 0
        while first < size:
            count = size - first
            while count > 0 and at + optim_state_bytes(op, count, dtype, rounding) > PAGE_BYTES:
                count = count * 15 // 16 // 256 * 256
            if count == 0:
                pages, at = pages + 1, HEADER_BYTES
                continue
            rows.append([pages - 1, at, parameter, first, count, 0, parameter])
            at += optim_state_bytes(op, count, dtype, rounding)
            first += count
    return pages, torch.tensor(rows)


def ours(
    op: str,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    rounding: str,
    device: str,
    most_pages: int = 0,
) -> Entry:
    """One call for all pages, or calls of `most_pages` each."""
    sizes = [n * k for n, k in shapes]
    params, grads = ([torch.randn(n, device=device).to(dtype) for n in sizes] for _ in range(2))
    count, segments = table(op, sizes, dtype, rounding)
    memory = torch.zeros(count * PAGE_BYTES + 64, dtype=torch.uint8, device=device)
    begin = -memory.data_ptr() % 64
    pages = list(memory[begin : begin + count * PAGE_BYTES].split(PAGE_BYTES))
    calls = []
    for start in range(0, count, most_pages or count):
        some = pages[start : start + (most_pages or count)]
        rows = segments[(segments[:, 0] >= start) & (segments[:, 0] < start + len(some))].clone()
        rows[:, 0] -= start
        used, rows[:, 2] = rows[:, 2].unique(return_inverse=True)
        calls.append(([params[i] for i in used], [grads[i] for i in used], some, rows))
    step, numbers = getattr(torch.ops.lora_kernels, op), [1e-3, 0.9, 0.999, 1e-8, 0.01]
    if op.startswith("lion"):
        del numbers[3]
    tick = 0

    def run() -> None:
        nonlocal tick
        tick += 1
        for some_params, some_grads, some_pages, rows in calls:
            rows[:, 5] = tick
            step(some_params, some_grads, some_pages, rows, tick, *numbers, rounding, 0)

    state = optim_state_bytes(op, 1 << 20, dtype, rounding) / (1 << 20)
    return run, sum(sizes) * (3 * dtype.itemsize + 2 * state)


def peer(
    optimizer: Callable, shapes: list[tuple[int, int]], dtype: torch.dtype, device: str, state: float
) -> Entry:
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    moved = sum(p.numel() for p in params) * (3 * dtype.itemsize + 2 * state)
    return optimizer(params, lr=1e-3, weight_decay=0.01).step, moved


def entries(shapes: list[tuple[int, int]], device: str) -> dict[str, Entry]:
    def fused(params, **options):
        return torch.optim.AdamW(params, fused=True, **options)

    found = {"torch fused AdamW float32": peer(fused, shapes, torch.float32, device, 8)}
    if len(shapes) == 1:
        import bitsandbytes

        found["torch fused AdamW bfloat16"] = peer(fused, shapes, torch.bfloat16, device, 4)
        for dtype in (torch.float32, torch.bfloat16):
            made = peer(bitsandbytes.optim.AdamW8bit, shapes, dtype, device, 2 + 2 / 64)
            found[f"bitsandbytes AdamW8bit {str(dtype)[6:]}"] = made
        size = shapes[0][0] * shapes[0][1] * 4
        source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        found["a copy"] = (lambda: target.copy_(source)), 2 * size
    for op, dtype, rounding in OURS if len(shapes) == 1 else (OURS[0], OURS[5]):
        found[f"{op} {str(dtype)[6:]} {rounding}"] = ours(op, shapes, dtype, rounding, device)
    if len(shapes) > 1:
        found["adamw_step float32, 64 pages a call"] = ours(
            "adamw_step", shapes, torch.float32, "nearest", device, 64
        )
    return found


def measure(found: dict[str, Entry], repeat: int, device: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for i in range(repeat + 1):  # the first round is not counted
        for name, (run, _) in found.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of the optimizers' steps.")
    parser.add_argument("what", nargs="*", default=["big", "adapters", "tiny"])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for what in arguments.what:
        found = entries(SHAPES[what], arguments.device)
        times = measure(found, arguments.repeat, arguments.device)
        base = times["torch fused AdamW float32"]
        print(f"{what}: {len(SHAPES[what])} parameters, {arguments.threads} threads")
        for name, samples in times.items():
            ratios = [b / t for b, t in zip(base, samples, strict=True)]
            least, median = min(samples), statistics.median(samples)
            print(
                f"  {name:38} least {least * 1e3:8.2f} ms, median {median * 1e3:8.2f} ms, "
                f"{found[name][1] / least / 1e9:5.1f} GB/s, torch/this {statistics.median(ratios):5.2f}"
            )


if __name__ == "__main__":
    main()

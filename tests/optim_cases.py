"""Parameters, gradients and pages for the optimizers' steps, cut into pieces as a test asks."""

import torch
from torch import Tensor

from lora_kernels.optim_state import (
    BLOCK,
    HEADER_BYTES,
    OPS,
    ROUNDINGS,
    optim_state_bytes,
    optim_state_parts,
)

__all__ = ["BLOCK", "DTYPES", "HYPER", "OPS", "ROUNDINGS", "Problem", "run", "step_op"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def aligned_page(size: int, device="cpu") -> Tensor:
    """Zeroed uint8 [size] that starts at a multiple of 64 bytes."""
    raw = torch.zeros(size + 64, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % 64
    return raw[start : start + size]


class Problem:
    """Parameters whose pieces of at most `piece` (a multiple of 256) elements fill page after page."""

    def __init__(
        self,
        op: str,
        params: list[Tensor],  # [n_i]
        rounding: str = "nearest",
        piece: int = 1024,
        page_pieces: int = 3,
        reverse: bool = False,
    ) -> None:
        self.op, self.params, self.rounding = op, [p.clone() for p in params], rounding
        self.piece, self.page_pieces = piece, page_pieces
        device = params[0].device
        rows, sizes = [], []
        cuts = [(i, first) for i, p in enumerate(params) for first in range(0, p.numel(), piece)]
        for number, (i, first) in enumerate(reversed(cuts) if reverse else cuts):
            if number % page_pieces == 0:
                sizes.append(HEADER_BYTES)
            count = min(piece, params[i].numel() - first)
            rows.append([len(sizes) - 1, sizes[-1], i, first, count, 0, i + 7])
            sizes[-1] += optim_state_bytes(op, count, params[i].dtype, rounding)
        self.pages = [aligned_page(size, device) for size in sizes]
        self.rows = torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)

    def segments(self, step: int) -> Tensor:
        rows = self.rows.clone()
        rows[:, 5] = step
        return rows

    def step(self, grads: list[Tensor], step: int, tick: int | None = None, seed: int = 3, **hyper) -> None:
        tick = step if tick is None else tick
        run(self.op, self.params, grads, self.pages, self.segments(step), tick, self.rounding, seed, **hyper)

    def state(self) -> dict[tuple[int, str], Tensor]:
        """The parts of each parameter's state, its pieces put together: independent of the cutting."""
        found: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
        for page, offset, i, first, count, _, _ in self.rows.tolist():
            for part in optim_state_parts(self.op, count, self.params[i].dtype, self.rounding):
                begin = offset + part.offset
                value = self.pages[page][begin : begin + part.bytes].view(part.dtype)
                found.setdefault((i, part.name), []).append((first, value))
        return {
            key: torch.cat([value for _, value in sorted(pieces, key=lambda piece: piece[0])])
            for key, pieces in found.items()
        }

    def assert_same(self, other: "Problem") -> None:
        """The same bits in parameters and state."""
        for mine, theirs in zip(self.params, other.params, strict=True):
            assert_same_bits(mine, theirs)
        mine, theirs = self.state(), other.state()
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert_same_bits(value, theirs[key], key)


def assert_same_bits(a: Tensor, b: Tensor, what: object = "params") -> None:
    if a.is_floating_point():
        bits = torch.int32 if a.dtype == torch.float32 else torch.int16
        same = (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())
    else:
        same = a == b
    wrong = (~same).nonzero().reshape(-1)
    assert not wrong.numel(), f"{what}: {wrong.numel()} differ, first at {wrong[:5].tolist()}: " + (
        f"{a[wrong[:5]].tolist()} and {b[wrong[:5]].tolist()}"
    )


def step_op(op: str):
    return getattr(torch.ops.lora_kernels, op)


def run(op, params, grads, pages, segments, tick, rounding="nearest", seed=3, **hyper) -> None:
    h = {**HYPER, **hyper}
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    numbers = [h[name] for name in names if name != "eps" or op.startswith("adamw")]
    step_op(op)(params, grads, pages, segments, tick, *numbers, rounding, seed)

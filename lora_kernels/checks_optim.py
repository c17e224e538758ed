"""What the optimizers' steps ask of their arguments. Errors name the argument, what it got and what it may
be."""

import math

import torch
from torch import Tensor

from lora_kernels.checks import check_device, check_dtype
from lora_kernels.optim_state import (
    BLOCK,
    HEADER_BYTES,
    PARAM_DTYPES,
    PIECE_ALIGNMENT,
    ROUNDINGS,
    optim_state_bytes,
)
from lora_kernels.reference_optim import Hyper

COLUMNS = ("page", "offset", "parameter", "first", "count", "step", "id")


def check_hyper(op: str, tick: int, h: Hyper) -> None:
    if not 1 <= tick < 2**63:
        raise ValueError(f"{op}: tick is {tick}, expected 1 to 2**63 - 1 (a fresh page holds 0)")
    for name in ("lr", "eps", "weight_decay"):
        value = getattr(h, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{op}: {name} is {value}, expected a finite number >= 0")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(h, name) < 1:
            raise ValueError(f"{op}: {name} is {getattr(h, name)}, expected 0 <= {name} < 1")
    if h.rounding not in ROUNDINGS:
        raise ValueError(f"{op}: rounding is {h.rounding!r}, expected one of {', '.join(ROUNDINGS)}")


def _check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected a "
            "contiguous tensor"
        )


def check_step(
    op: str,
    params: list[Tensor],
    grads: list[Tensor],
    pages: list[Tensor],
    segments: Tensor,
    rounding: str,
) -> None:
    """Everything but the numbers. Slow: a call runs it where the compiled check has found a fault."""
    if len(params) != len(grads):
        raise ValueError(f"{op}: got {len(params)} params and {len(grads)} grads, expected as many of each")
    on = (*pages, *params, segments)[0].device
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        check_dtype(op, f"params[{i}]", p, PARAM_DTYPES if i == 0 else (params[0].dtype,))
        check_dtype(op, f"grads[{i}]", g, (p.dtype, torch.float32))
        _check_contiguous(op, f"params[{i}]", p)
        _check_contiguous(op, f"grads[{i}]", g)
        if g.numel() != p.numel():
            raise ValueError(
                f"{op}: grads[{i}] has {g.numel()} elements, expected the {p.numel()} of params[{i}]"
            )
        check_device(op, on, **{f"params[{i}]": p, f"grads[{i}]": g})
    for i, page in enumerate(pages):
        check_dtype(op, f"pages[{i}]", page, (torch.uint8,))
        if page.dim() != 1:
            raise ValueError(f"{op}: pages[{i}] has shape {tuple(page.shape)}, expected one dimension")
        _check_contiguous(op, f"pages[{i}]", page)
        check_device(op, on, **{f"pages[{i}]": page})
        if page.numel() < HEADER_BYTES:
            raise ValueError(f"{op}: pages[{i}] has {page.numel()} bytes, expected at least {HEADER_BYTES}")
        if page.device.type in ("cpu", "cuda") and type(page) is Tensor and page.data_ptr() % PIECE_ALIGNMENT:
            raise ValueError(f"{op}: pages[{i}] does not start at a multiple of {PIECE_ALIGNMENT} bytes")
    check_dtype(op, "segments", segments, (torch.int64,))
    if segments.device.type != "cpu" or segments.dim() != 2 or segments.shape[1] != len(COLUMNS):
        raise ValueError(
            f"{op}: segments has shape {tuple(segments.shape)} on {segments.device}, expected [S, 7] on cpu: "
            f"{', '.join(COLUMNS)}"
        )
    if not segments.is_contiguous():
        raise ValueError(f"{op}: segments has strides {segments.stride()}, expected a contiguous tensor")
    if type(segments) is Tensor and segments.shape[0]:  # a fake tensor has no values
        _check_table(op, params, pages, segments, rounding)


def _check_table(op: str, params: list[Tensor], pages: list[Tensor], segments: Tensor, rounding: str) -> None:
    page, offset, parameter, first, count, step, id = segments.unbind(1)

    def refuse(bad: Tensor, column: str, expected: str) -> None:
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            got = dict(zip(COLUMNS, segments[row].tolist(), strict=True))
            raise ValueError(
                f"{op}: segments[{row}] has {column} {got[column]}, expected {expected} (the row: {got})"
            )

    refuse((page < 0) | (page >= len(pages)), "page", f"0 to {len(pages) - 1}, an index into pages")
    refuse(
        (parameter < 0) | (parameter >= len(params)),
        "parameter",
        f"0 to {len(params) - 1}, an index into params",
    )
    numel = torch.tensor([p.numel() for p in params], device="cpu")[parameter]
    refuse((first < 0) | (first % BLOCK != 0), "first", f"a multiple of {BLOCK}")
    refuse(
        (count < 0) | (count >= 2**31) | (count > numel) | (first > numel - count),
        "count",
        "elements that the parameter has, fewer than 2**31",
    )
    room = torch.tensor([p.numel() for p in pages], device="cpu")[page]
    size = optim_state_bytes(op, count, params[0].dtype, rounding)
    refuse(
        (offset < HEADER_BYTES) | (offset % PIECE_ALIGNMENT != 0) | (offset > room - size),
        "offset",
        f"a multiple of {PIECE_ALIGNMENT}, behind the header, such that the piece ends inside its page",
    )
    refuse((step < 1) | (step >= 2**31), "step", "1 to 2**31 - 1")
    refuse((id < 0) | (id >= 2**32), "id", "0 to 2**32 - 1")

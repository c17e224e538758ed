"""How optimizer state lies in a page, and its 8-bit block-wise code: the Python twin of csrc/optim_state.h.

A page is uint8 [page_bytes]: a header of HEADER_BYTES (int64 tick at byte 0, the rest zero: a CUDA step
counts at byte 8 while it runs), then pieces of state, each of `count` consecutive elements of one parameter
and at a multiple of 64 bytes. A piece holds its parts in a fixed order, each from a multiple of 16 bytes on:

    adamw_step       exp_avg f32 [count], exp_avg_sq f32 [count]
    adamw8bit_step   state1 u8 [count], absmax1 f32 [ceil(count/256)], state2 u8 [count], absmax2 likewise
    lion_step        exp_avg f32 [count]
    lion8bit_step    state1 u8 [count], absmax1 f32 [ceil(count/256)]
    then, with rounding "kahan" and a 16-bit parameter: compensation [count] of the parameter's dtype

Memory of zeros means a state of zeros for every one of them: an absmax of 0 makes any code 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.reference import dynamic_map

OPS = ("adamw_step", "adamw8bit_step", "lion_step", "lion8bit_step")
ROUNDINGS = ("nearest", "stochastic", "kahan")
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 256  # elements that share an absmax
HEADER_BYTES = 64
PIECE_ALIGNMENT = 64
PART_ALIGNMENT = 16
MIN_ABSMAX = 2.0**-126  # blocks below it, which have no finite reciprocal, are coded as zeros

_F32, _U8 = torch.float32, torch.uint8
_PARTS = {
    "adamw_step": (("exp_avg", _F32), ("exp_avg_sq", _F32)),
    "adamw8bit_step": (("state1", _U8), ("absmax1", _F32), ("state2", _U8), ("absmax2", _F32)),
    "lion_step": (("exp_avg", _F32),),
    "lion8bit_step": (("state1", _U8), ("absmax1", _F32)),
}


class Part(NamedTuple):
    """A part of a piece of state: `bytes` bytes of `dtype`, `offset` bytes behind the piece's start."""

    name: str
    dtype: torch.dtype
    offset: int
    bytes: int


def _aligned(size, to: int):
    return (size + to - 1) // to * to


def optim_state_parts(op: str, count: int, dtype: torch.dtype, rounding: str) -> list[Part]:
    """The parts of a piece of `count` elements of a parameter of `dtype`, for one of OPS and ROUNDINGS.

    `count` may be an int64 tensor: offsets and bytes are then tensors too.

    Raises:
        ValueError: op, dtype or rounding is none of those.
    """
    for name, got, allowed in (
        ("op", op, OPS),
        ("dtype", dtype, PARAM_DTYPES),
        ("rounding", rounding, ROUNDINGS),
    ):
        if got not in allowed:
            raise ValueError(f"optim_state_parts: {name} is {got!r}, expected one of {allowed}")
    kinds = _PARTS[op]
    if rounding == "kahan" and dtype != _F32:
        kinds = (*kinds, ("compensation", dtype))
    parts, offset = [], 0
    for name, kind in kinds:
        items = (count + BLOCK - 1) // BLOCK if name.startswith("absmax") else count
        size = items * kind.itemsize
        parts.append(Part(name, kind, offset, size))
        offset = _aligned(offset + size, PART_ALIGNMENT)
    return parts


def optim_state_bytes(op: str, count: int, dtype: torch.dtype, rounding: str) -> int:
    """The bytes of such a piece, a multiple of 64; 0 where count is 0."""
    last = optim_state_parts(op, count, dtype, rounding)[-1]
    return _aligned(last.offset + last.bytes, PIECE_ALIGNMENT)


# ---- the 8-bit code (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization") -----------------


def _magnitude_thresholds(signed: bool) -> Tensor:
    """Midpoints between neighbours of the map's entries >= 0, rounded down to fp32, ascending.

    r > midpoint holds for an fp32 r exactly where r > (midpoint rounded down) does.
    """
    entries = dynamic_map(signed=signed).double()
    entries = entries[entries >= 0]
    middle = (entries[1:] + entries[:-1]) / 2  # exact
    rounded = middle.float()
    return torch.where(
        rounded.double() > middle, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded
    )


def quantize_blockwise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """x fp32 [n] -> codes uint8 [n], absmax fp32 [ceil(n/256)] of blocks of 256.

    absmax = max|x| of the block; the code is the entry of dynamic_map(signed) nearest to r = x·(1/absmax),
    both roundings to fp32; a tie goes to the entry nearer zero. A block with absmax < 2^-126 gets the code of
    0 throughout. Unsigned: x >= 0. Finite x only.
    """
    n, zero = x.numel(), 127 if signed else 0
    rows = torch.nn.functional.pad(x, (0, -n % BLOCK)).reshape(-1, BLOCK)
    absmax = rows.abs().amax(dim=1) if n else x.new_empty(0)
    inverse = torch.where(absmax < MIN_ABSMAX, torch.zeros_like(absmax), 1 / absmax)
    r = rows * inverse.unsqueeze(1)
    rank = torch.searchsorted(
        _magnitude_thresholds(signed).to(x.device), r.abs()
    )  # thresholds strictly below
    codes = torch.where(r < 0, zero - rank.clamp(max=127), zero + rank)  # -1 is no entry of the signed map
    return codes.reshape(-1)[:n].to(torch.uint8), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """dynamic_map(signed)[codes] · absmax of the block: fp32 [n], one rounding."""
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return dynamic_map(codes.device, signed)[codes.long()] * scale

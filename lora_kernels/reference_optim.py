"""The specification of the optimizers' steps, in plain PyTorch: of elements, then of runs of pages.

Arithmetic is fp32, each operation rounded by itself in the order written here, so that every backend can give
the same bits; the factors lr/(1-β1^t), 1/√(1-β2^t), 1-β and 1-lr·wd are computed in double and rounded once.
Called with float64 tensors the element functions are the truth that errors are measured from.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.optim_state import (
    dequantize_blockwise,
    optim_state_parts,
    quantize_blockwise,
)
from lora_kernels.reference import philox4x32_10


class Hyper(NamedTuple):
    """The numbers of one call. Lion has no eps."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    rounding: str = "nearest"
    seed: int = 0


# ---- elements ----------------------------------------------------------------------------------------------


def _root(x: Tensor) -> Tensor:
    """√x rounded correctly, which torch's fp32 square root (MKL's) is not: every fifth is off by a bit."""
    return x.double().sqrt().to(x.dtype)


def adamw_update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, h: Hyper):
    """New p, m, v (Loshchilov & Hutter 2019, algorithm 2; weight decay and bias correction as in torch).

    p ← p·(1-lr·wd);  m ← β1·m + (1-β1)·g;  v ← β2·v + (1-β2)·g²;
    p ← p - lr/(1-β1^t)·m / (√v/√(1-β2^t) + eps)
    """
    m = h.beta1 * m + (1 - h.beta1) * g
    v = h.beta2 * v + (1 - h.beta2) * g * g
    denominator = _root(v) * (1 / math.sqrt(1 - h.beta2**step)) + h.eps
    p = p * (1 - h.lr * h.weight_decay) - h.lr / (1 - h.beta1**step) * m / denominator
    return p, m, v


def lion_update(p: Tensor, g: Tensor, m: Tensor, h: Hyper):
    """New p, m (Chen et al. 2023, algorithm 2).

    p ← p·(1-lr·wd) - lr·sign(β1·m + (1-β1)·g);  m ← β2·m + (1-β2)·g.  The sign of 0 and of NaN is 0.
    """
    c = h.beta1 * m + (1 - h.beta1) * g
    sign = (c > 0).to(c.dtype) - (c < 0).to(c.dtype)
    p = p * (1 - h.lr * h.weight_decay) - h.lr * sign
    return p, h.beta2 * m + (1 - h.beta2) * g


# ---- the one rounding of a 16-bit parameter ----------------------------------------------------------------


def random_words(first: int, count: int, step: int, id: int, seed: int, device: torch.device) -> Tensor:
    """A 32-bit word for each of the elements first ... first + count - 1 of parameter `id`: int64 [count].

    Element i reads word i mod 4 of philox4x32_10(counter = (i div 4, step + 2^32·id), key = seed).
    """
    word = 0xFFFFFFFF
    index = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    rest = [torch.full_like(index, value & word) for value in (step, id)]
    counter = torch.stack([index & word, index >> 32, *rest], dim=1)
    key = torch.tensor([seed & word, seed >> 32 & word], device=device)
    return philox4x32_10(counter, key).reshape(-1)[first % 4 :][:count]


def stochastic_round(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 x to bf16 or fp16, up or down at random so that the mean is x; `words` as random_words.

    The top s bits of the word are added to the s bits of x that the result does not have, and these cut off:
    16 in bf16, 13 in fp16, more where the result is subnormal. What is finite and below 2^(largest exponent
    + 1) becomes at most the largest finite value; other values (infinities, NaN) are rounded to nearest.
    """
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded, largest, infinity = (magnitude + (words >> 16)) >> 16, 0x7F7F, 0x7F800000
    else:
        exponent = magnitude >> 23
        shift = (126 - exponent).clamp(14, 31)  # of a subnormal result: its unit is 2^-24
        beyond = (126 - exponent - shift).clamp(0, 63)
        significand = (magnitude & 0x7FFFFF | 0x800000) >> beyond
        subnormal = (significand + (words >> (32 - shift))) >> shift
        normal = (magnitude - (112 << 23) + (words >> 19)) >> 13
        rounded = torch.where(exponent < 113, subnormal, normal)
        largest, infinity = 0x7BFF, 0x47800000
    rounded = rounded.clamp(max=largest) | (bits >> 31 << 15)
    rounded = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(dtype)
    return torch.where(magnitude < infinity, rounded, x.to(dtype))


def _read(param: Tensor, compensation: Tensor | None) -> Tensor:  # fp32
    """The parameter's value: with Kahan compensation it is the sum of both."""
    value = param.float()
    return value if compensation is None else value + compensation.float()


def _write(param: Tensor, value: Tensor, compensation: Tensor | None, words: Tensor | None) -> None:
    if words is not None:
        param.copy_(stochastic_round(value, words, param.dtype))
        return
    param.copy_(value)
    if compensation is not None:  # what the rounding lost; nothing where the parameter overflowed
        lost = value - param.float()
        compensation.copy_(torch.where(lost.abs() < math.inf, lost, torch.zeros_like(lost)))


# ---- pages -------------------------------------------------------------------------------------------------


def _update_piece(op: str, p: Tensor, g: Tensor, state: dict[str, Tensor], step: int, h: Hyper) -> Tensor:
    """New values of fp32 p; `state` (views of the page) is updated in place."""
    adamw = op.startswith("adamw")
    if "8bit" not in op:
        m = state["exp_avg"]
        if adamw:
            v = state["exp_avg_sq"]
            new_p, new_m, new_v = adamw_update(p, g, m, v, step, h)
            v.copy_(new_v)
        else:
            new_p, new_m = lion_update(p, g, m, h)
        m.copy_(new_m)
        return new_p
    m = dequantize_blockwise(state["state1"], state["absmax1"], signed=True)
    if adamw:
        v = dequantize_blockwise(state["state2"], state["absmax2"], signed=False)
        new_p, new_m, new_v = adamw_update(p, g, m, v, step, h)
        good = new_v < math.inf
        moments = [(new_v, v, "state2", "absmax2", False)]
    else:
        new_p, new_m = lion_update(p, g, m, h)
        good = new_m.abs() < math.inf
        moments = []
    # One element that is not finite would take the 255 others of its block with it.
    for new, old, codes, absmax, signed in (*moments, (new_m, m, "state1", "absmax1", True)):
        new_codes, new_absmax = quantize_blockwise(torch.where(good, new, old), signed)
        state[codes].copy_(new_codes)
        state[absmax].copy_(new_absmax)
    return torch.where(good, new_p, p)


def step_pages(
    op: str,  # of optim_state.OPS
    params: list[Tensor],  # [n_i] of one dtype
    grads: list[Tensor],  # [n_i] of that dtype or fp32
    pages: list[Tensor],  # uint8 [page_bytes]
    segments: Tensor,  # int64 [S, 7]: page, offset, parameter, first, count, step, id
    tick: int,
    h: Hyper,
) -> None:
    """One step of all segments whose page's header does not hold `tick` yet; then it does.

    In an 8-bit step an element whose new state is not finite (a gradient that is NaN or infinite, or a square
    that overflows) is left alone: its parameter and its state keep their values.
    """
    for number, page in enumerate(pages):
        header = page[:8].view(torch.int64)
        if int(header) == tick:
            continue
        for _, offset, parameter, first, count, step, id in segments[segments[:, 0] == number].tolist():
            param, grad = (tensors[parameter].view(-1)[first : first + count] for tensors in (params, grads))
            state = {}
            for part in optim_state_parts(op, count, param.dtype, h.rounding):
                begin = offset + part.offset
                state[part.name] = page[begin : begin + part.bytes].view(part.dtype)
            compensation, words = state.get("compensation"), None
            if h.rounding == "stochastic" and param.dtype != torch.float32:
                words = random_words(first, count, step, id, h.seed, param.device)
            old = _read(param, compensation)
            new = _update_piece(op, old, grad.float(), state, step, h)
            _write(param, new, compensation, words)
        header.fill_(tick)

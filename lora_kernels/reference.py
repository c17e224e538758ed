"""The specification: every op in plain PyTorch, short, slow and obviously right.

All other backends are tested against these functions. Run on float64 inputs they are the truth that errors
are measured from; run on fp16/bf16 inputs they are the unfused eager computation whose error a fused kernel
may not exceed by more than a quarter. Shapes: x [T, K], weight W0 [N, K], A [r, K], B [N, r], h [T, r], y [T,
N].
"""

import functools
import itertools
import math

import torch
from torch import Tensor

# ---- NF4 (QLoRA, Dettmers et al. 2023, appendix E; byte layout of bitsandbytes) ----------------------------

NF4_CODEBOOK = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
_MIN_ABSMAX = 1e-38
_PAD_CODE = 7


def codebook(device: torch.device | str = "cpu") -> Tensor:  # [16] fp32
    return torch.tensor(NF4_CODEBOOK, dtype=torch.float32, device=device)


def _f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


@functools.cache
def _dynamic_values(signed: bool) -> tuple[float, ...]:
    """The 8-bit dynamic map (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

    For each decade 10**(i-6), i = 0..6, the midpoints of a linear grid on [0.1, 1] of 2**i cells with both
    signs (signed), or of 2**(i+1) cells (unsigned); then 0 and 1. Grid points are rounded to fp32 after one
    fused multiply-add from the nearer end, which is how the published values came about.
    """
    lo, hi, values = _f32(0.1), 1.0, [0.0, 1.0]
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        step = _f32(_f32(hi - lo) / cells)
        grid = [
            _f32(step * j + lo) if j < (cells + 1) // 2 else _f32(-step * (cells - j) + hi)
            for j in range(cells + 1)
        ]
        for a, b in itertools.pairwise(grid):
            value = _f32(_f32(10.0 ** (i - 6)) * (_f32(a + b) / 2))
            values += [value, -value] if signed else [value]
    return tuple(sorted(values))


def dynamic_map(device: torch.device | str = "cpu", signed: bool = True) -> Tensor:
    """What the 8-bit codes of scales (signed) and optimizer states mean: fp32 [256], ascending."""
    return torch.tensor(_dynamic_values(signed), dtype=torch.float32, device=device)


def nf4_quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = True):
    """weight [N, K] -> packed uint8 [ceil(n/2), 1], absmax, nested_absmax, offset  (n = N*K).

    absmax is fp32 [ceil(n/blocksize)], and nested_absmax and offset are empty, without `double_quant`; with
    it absmax is uint8, nested_absmax fp32 [ceil(blocks/256)] and offset fp32 [].
    """
    flat = weight.detach().reshape(-1).float()
    n, device = flat.numel(), flat.device
    whole = n // blocksize * blocksize
    blocks = flat[:whole].reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if whole else flat.new_empty(0)
    scaled = (blocks * (1 / absmax.clamp(min=_MIN_ABSMAX)).unsqueeze(1)).reshape(-1)
    if whole < n:  # a short last block divides, and keeps the clamped absmax
        last = flat[whole:].abs().max().clamp(min=_MIN_ABSMAX)
        scaled = torch.cat([scaled, flat[whole:] / last])
        absmax = torch.cat([absmax, last.reshape(1)])
    codes64 = codebook(device).double()
    midpoints = ((codes64[1:] + codes64[:-1]) / 2).float()
    codes = torch.bucketize(scaled.clamp(-1, 1), midpoints).to(torch.uint8)  # midpoints strictly below
    if n % 2:
        codes = torch.cat([codes, codes.new_full((1,), _PAD_CODE)])
    packed = (codes[0::2] << 4 | codes[1::2]).unsqueeze(1)
    if not double_quant:
        return packed, absmax, flat.new_empty(0), flat.new_empty(())
    return packed, *_quantize_absmax(absmax)


def _quantize_absmax(absmax: Tensor):
    """fp32 [blocks] -> uint8 codes [blocks], nested_absmax [ceil(blocks/256)], offset []."""
    offset = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    return *quantize_blockwise(absmax - offset, dynamic_map(absmax.device)), offset


def quantize_blockwise(x: Tensor, code_map: Tensor, blocksize: int = NESTED_BLOCKSIZE):
    """fp32 [n] -> uint8 codes [n] of the nearest entries (ties go down), absmax fp32 [ceil(n/blocksize)]."""
    n = x.numel()
    rows = torch.nn.functional.pad(x, (0, -n % blocksize)).reshape(-1, blocksize)
    absmax = rows.abs().amax(dim=1)
    entries = code_map.double()
    # Products of fp32 values are exact in double, so "nearest" is exact and a tie is a tie.
    midpoints = (entries[1:] + entries[:-1]) / 2 * absmax.double().unsqueeze(1)  # [blocks, 255]
    codes = torch.searchsorted(midpoints, rows.double())  # midpoints strictly below
    return codes.reshape(-1)[:n].to(torch.uint8), absmax


def dequantize_absmax(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """The fp32 scale of every block: absmax itself, or dynamic_map[absmax] * nested_absmax + offset."""
    if nested_absmax is None:
        return absmax
    nested = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return dynamic_map(absmax.device)[absmax.long()] * nested + offset


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:  # [N, K] dtype
    """T(codebook[nibble] * absmax[block]): an fp32 product (exact in float64), rounded once."""
    n = shape[0] * shape[1]
    bytes_ = packed.reshape(-1).view(torch.uint8).long()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).reshape(-1)[:n]
    scale = dequantize_absmax(absmax, nested_absmax, offset).repeat_interleave(blocksize)[:n]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return (codebook(packed.device)[codes].to(exact) * scale.to(exact)).to(dtype).reshape(shape)


# ---- Dropout: Philox4x32-10 (Salmon et al., SC 2011) -------------------------------------------------------


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """counter int64 [n, 4], key int64 [2], all of them 32-bit words -> int64 [n, 4] of 32-bit words."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key.unbind(0)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, its 64 bits are the unsigned product's
        c0, c1, c2, c3 = (p1 >> 32 & word) ^ c1 ^ k0, p1 & word, (p0 >> 32 & word) ^ c3 ^ k1, p0 & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return torch.stack([c0, c1, c2, c3], dim=1)


def dropout_mask(
    shape: tuple[int, int], p: float, rng: Tensor, first: int = 0
) -> Tensor:  # bool, True = kept
    """Element i (flat) uses word i mod 4 of counter (i div 4, offset), key seed; rng = int64 (seed, offset).

    It is kept where the word >= floor(p * 2**32). `first` is the flat index of the result's first element,
    for a part of a larger x.
    """
    n, word = math.prod(shape), 0xFFFFFFFF
    index = torch.arange(first // 4, (first + n + 3) // 4, device=rng.device)
    seed, offset = rng.unbind(0)
    low_high = [index & word, index >> 32 & word, (offset & word).expand_as(index)]
    counter = torch.stack([*low_high, (offset >> 32 & word).expand_as(index)], dim=1)
    words = philox4x32_10(counter, torch.stack([seed & word, seed >> 32 & word]))
    return (words.reshape(-1)[first % 4 :][:n] >= int(p * 2**32)).reshape(shape)


def lora_dropout(x: Tensor, p: float, rng: Tensor | None) -> Tensor:  # [T, K]
    """x with the dropped elements zeroed; the factor 1/(1-p) belongs to the scaling, x is not rescaled."""
    return x if p == 0 else torch.where(dropout_mask(x.shape, p, rng), x, torch.zeros_like(x))


# ---- The LoRA linear map -----------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K] in x's dtype
    lora_A: Tensor | None = None,  # [r, K]
    lora_B: Tensor | None = None,  # [N, r]
    scaling: float = 1.0,
    bias: Tensor | None = None,  # [N]
    dropout_p: float = 0.0,
    rng: Tensor | None = None,  # int64 [2]
) -> tuple[Tensor, Tensor]:
    """y = x·W0ᵀ + s/(1-p)·(m⊙x)·Aᵀ·Bᵀ + bias and h = (m⊙x)·Aᵀ  (Hu et al. 2021, LoRA, section 4.1)."""
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if lora_A is None:
        return y, x.new_empty(x.shape[0], 0)
    h = lora_dropout(x, dropout_p, rng) @ lora_A.to(x.dtype).T
    return y + scaling / (1 - dropout_p) * (h @ lora_B.to(x.dtype).T), h


def lora_linear_backward(
    dy: Tensor,  # [T, N]
    x: Tensor,  # [T, K]
    h: Tensor,  # [T, r]
    weight: Tensor,  # [N, K]
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """dx, dA, dB, dbias.

    g = s'·dy·B, dx = dy·W0 + m⊙(g·A), dA = gᵀ·(m⊙x), dB = s'·dyᵀ·h, dbias = Σ_t dy,  s' = s/(1-p).
    """
    dx, dbias = dy @ weight, dy.sum(dim=0)
    if lora_A is None:
        return dx, None, None, dbias
    s = scaling / (1 - dropout_p)
    g = s * (dy @ lora_B.to(dy.dtype))
    dx = dx + lora_dropout(g @ lora_A.to(dy.dtype), dropout_p, rng)
    dA = (g.T @ lora_dropout(x, dropout_p, rng)).to(lora_A.dtype)
    dB = (s * (dy.T @ h)).to(lora_B.dtype)
    return dx, dA, dB, dbias


def lora_linear_batched(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    lora_A: list[Tensor],  # adapter i: [r_i, K]
    lora_B: list[Tensor],  # adapter i: [N, r_i]
    scaling: list[float],
    adapter_index: Tensor,  # int64 [T], -1 = base alone
    bias: Tensor | None = None,  # [N]
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row t goes through adapter adapter_index[t]; the columns of h [T, max r] beyond r_i are 0."""
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    h = x.new_zeros(x.shape[0], max((a.shape[0] for a in lora_A), default=0))
    dropped = lora_dropout(x, dropout_p, rng)
    for i, (a, b, s) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        rows = (adapter_index == i).nonzero().squeeze(1)
        part = dropped[rows] @ a.to(x.dtype).T
        h[rows, : a.shape[0]] = part
        y = y.index_add(0, rows, s / (1 - dropout_p) * (part @ b.to(x.dtype).T))
    return y, h


def lora_linear_batched_backward(
    dy: Tensor,  # [T, N]
    x: Tensor,  # [T, K]
    h: Tensor,  # [T, max r]
    weight: Tensor,  # [N, K]
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    adapter_index: Tensor,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """dx, dA of every adapter, dB of every adapter, dbias: those of lora_linear on the adapter's rows."""
    dx, dA, dB = dy @ weight, [], []
    low, dropped = torch.zeros_like(dx), lora_dropout(x, dropout_p, rng)
    for i, (a, b, s) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        rows, keep = (adapter_index == i).nonzero().squeeze(1), 1 / (1 - dropout_p)
        g = s * keep * (dy[rows] @ b.to(dy.dtype))
        low[rows] = g @ a.to(dy.dtype)
        dA.append((g.T @ dropped[rows]).to(a.dtype))
        dB.append((s * keep * (dy[rows].T @ h[rows, : a.shape[0]])).to(b.dtype))
    return dx + lora_dropout(low, dropout_p, rng), dA, dB, dy.sum(dim=0)


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:  # [N]
    """‖W0 + s·B·A‖₂ of every row, in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = scaling * (lora_B.to(wide) @ lora_A.to(wide))
    return (weight.to(wide) + delta).norm(dim=1)


def dora_linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    lora_A: Tensor,  # [r, K]
    lora_B: Tensor,  # [N, r]
    magnitude: Tensor,  # [N]
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DoRA (Liu et al. 2024, equation 5): y = c·(W0 + s·B·A)·x + bias, c = magnitude/norm -> y, h, norm [N].

    norm = ‖W0 + s·B·A‖₂ of each row, a constant for the gradient (section 4.3). With dropout, as in PEFT,
    what is dropped is the input of the change to the base output: y = W0·x + (c-1)·W0·x' + c·s·B·A·x' + bias,
    where x' = m⊙x/(1-p).
    """
    norm = dora_norm(weight, lora_A, lora_B, scaling).detach()
    c = (magnitude.to(norm.dtype) / norm).to(x.dtype)
    dropped = lora_dropout(x, dropout_p, rng)
    h = dropped @ lora_A.to(x.dtype).T
    keep = 1 / (1 - dropout_p)
    y = x @ weight.T + keep * ((c - 1) * (dropped @ weight.T) + c * (scaling * (h @ lora_B.to(x.dtype).T)))
    return (y if bias is None else y + bias.to(y.dtype)), h, norm


def dora_linear_backward(
    dy: Tensor,  # [T, N]
    x: Tensor,  # [T, K]
    h: Tensor,  # [T, r]
    norm: Tensor,  # [N]
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dmagnitude, dbias; with u = W0·x' + s·B·A·x', dmagnitude = Σ_t dy·u / norm."""
    keep, T = 1 / (1 - dropout_p), dy.dtype
    c = (magnitude.to(norm.dtype) / norm).to(T)
    dropped = lora_dropout(x, dropout_p, rng)
    g = keep * scaling * ((c * dy) @ lora_B.to(T))
    dx = dy @ weight + lora_dropout(keep * (((c - 1) * dy) @ weight) + g @ lora_A.to(T), dropout_p, rng)
    u = dropped @ weight.T + scaling * (h @ lora_B.to(T).T)
    dmagnitude = (keep * (dy * u).sum(dim=0) / norm.to(T)).to(magnitude.dtype)
    dA, dB = (g.T @ dropped).to(lora_A.dtype), (keep * scaling * ((c * dy).T @ h)).to(lora_B.dtype)
    return dx, dA, dB, dmagnitude, dy.sum(dim=0)

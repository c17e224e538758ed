"""How results are judged: against float64 truth, beside the unfused eager computation in the same dtype.

Three bounds for every output: the norm of the error at most 1.25 times eager's; the same relative to the
truth at most LIMIT; and the rms error of every 8 x 8 tile at most 4 · LIMIT · rms(truth), so that one wrong
tile cannot hide in a large norm.
"""

import torch
from torch import Tensor

LIMIT = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
INPUT_KINDS = ("normal", "magnitudes", "gelu", "outlier channel")


def make_input(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random x of one of INPUT_KINDS: activations have a mean and outliers, and normal inputs hide both."""
    x = torch.randn(*shape)
    if kind == "magnitudes":
        x = x.abs()
    elif kind == "gelu":
        x = torch.nn.functional.gelu(x)
    elif kind == "outlier channel":
        x[..., torch.randint(shape[-1], ()).item()] *= 100
    return x.to(dtype)


def relative_error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


def worst_tile(out: Tensor, truth: Tensor) -> float:
    """The largest rms error of an 8 x 8 tile (ragged at the edges), relative to the rms of the truth.

    Where the truth itself is larger in a tile than on average (an outlier channel puts nearly all of dA into
    one column) rounding errors are in proportion, eager's too: there it is relative to the tile's own rms.
    """
    error = (out.double() - truth).square()
    if error.dim() == 1:
        error = error.unsqueeze(0)
    rows, cols = error.shape
    padded = torch.nn.functional.pad(error, (0, -cols % 8, 0, -rows % 8))
    ones = torch.nn.functional.pad(torch.ones_like(error), (0, -cols % 8, 0, -rows % 8))

    def tile_sums(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0] // 8, 8, t.shape[1] // 8, 8).sum(dim=(1, 3))

    truth2 = truth.square() if truth.dim() == 2 else truth.square().unsqueeze(0)
    count = tile_sums(ones)
    own = tile_sums(torch.nn.functional.pad(truth2, (0, -cols % 8, 0, -rows % 8))) / count
    return float((tile_sums(padded) / count / own.clamp(min=float(truth2.mean()))).max().sqrt())


def assert_accurate(
    name: str,
    out: Tensor,
    eager: Tensor | None,
    truth: Tensor,
    limit_dtype: torch.dtype,
    as_eager: bool = False,
) -> None:
    """Asserts the three bounds; `limit_dtype` is the dtype that the inputs were rounded to.

    `eager` None: there are too few independent values to tell two error levels apart. `as_eager`: torch's
    GEMM on weights rounded to the dtype is what eager computes, so where eager itself misses the limit (bf16,
    inputs with a mean, K = 14336: 3.4e-3 to 4.0e-3) its error is the limit.
    """
    assert out.shape == truth.shape
    assert bool(torch.isfinite(out).all()), f"{name}: not finite"
    limit = LIMIT[limit_dtype]
    if as_eager:
        limit = max(limit, relative_error(eager, truth))
    error, tile = relative_error(out, truth), worst_tile(out, truth)
    assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}"
    assert tile <= 4 * limit, f"{name}: an 8x8 tile is off by {tile:.2e} of the rms"
    if eager is not None and truth.numel() >= 4096:  # fewer outputs do not tell two error levels apart
        eager_error = relative_error(eager, truth)
        # fp32 sums in another order differ by more than a quarter without either being worse.
        floor = 2e-7 if limit_dtype == torch.float32 else 0.0
        assert error <= max(1.25 * eager_error, floor), f"{name}: error {error:.3e}, eager {eager_error:.3e}"

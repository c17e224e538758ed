"""How results are judged: against float64 truth, beside the unfused eager computation in the same dtype.

Four bounds for every output: the norm of the error at most 1.25 times eager's; the same relative to the truth
at most LIMIT; the rms error of every 8 x 8 tile at most 4 · LIMIT · rms(truth), so that one wrong tile cannot
hide in a large norm; and the largest error of an element at most MOST_OF_EAGERS times eager's.
"""

import torch
from torch import Tensor

LIMIT = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
# A maximum over few values is a matter of luck, the same luck for eager only in part. Measured in 2000 pools
# of each of 800 outputs: below 1.75 where the norms are compared, below 2.1 (fp32: 2.6) where values are few.
MOST_OF_EAGERS, MOST_OF_EAGERS_WHERE_FEW = 2.0, 3.0
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


def worst_tile(out: Tensor, truth: Tensor, concentrated: bool = False) -> float:
    """The largest rms error of an 8 x 8 tile (ragged at the edges), relative to the rms of the truth.

    `concentrated`: where the truth itself is larger in a tile than on average, relative to the tile's own
    rms. An outlier channel puts nearly all of dA into one column, and dA and dB of few tokens are products of
    few columns: rounding errors are in proportion, and eager's reach 16 times LIMIT (7.5 of few tokens).
    """
    error = (out.double() - truth).square()
    truth2 = truth.square()
    if error.dim() == 1:
        error, truth2 = error.unsqueeze(0), truth2.unsqueeze(0)
    rows, cols = error.shape

    def tile_sums(t: Tensor) -> Tensor:
        t = torch.nn.functional.pad(t, (0, -cols % 8, 0, -rows % 8))
        return t.reshape(t.shape[0] // 8, 8, t.shape[1] // 8, 8).sum(dim=(1, 3))

    count = tile_sums(torch.ones_like(error))
    scale = truth2.mean().expand_as(count)
    if concentrated:
        scale = scale.maximum(tile_sums(truth2) / count)
    return float((tile_sums(error) / count / scale).max().sqrt())


def largest_error(out: Tensor, truth: Tensor) -> float:
    """The largest error of an element, relative to the rms of the truth."""
    return float((out.double() - truth).abs().max() / truth.square().mean().sqrt())


def assert_accurate(
    name: str,
    out: Tensor,
    eager: Tensor,
    truth: Tensor,
    limit_dtype: torch.dtype,
    *,
    as_eager: bool = False,
    few: bool = False,
    concentrated: bool = False,
) -> None:
    """Asserts the four bounds; `limit_dtype` is the dtype that the inputs were rounded to.

    Several draws are judged together, concatenated: one whose truth happens to be small then counts little.

    `few`: the output is made of too few independent values to tell two error levels apart, so their norms are
    not compared. `as_eager`: torch's GEMM on weights rounded to the dtype is what eager computes, so where
    eager itself misses the limit (bf16, inputs with a mean, K = 14336: 3.4e-3 to 4.0e-3) its error is the
    limit. `concentrated`: see `worst_tile`.
    """
    assert out.shape == truth.shape
    assert bool(torch.isfinite(out).all()), f"{name}: not finite"
    limit = LIMIT[limit_dtype]
    error, eager_error = relative_error(out, truth), relative_error(eager, truth)
    if as_eager:
        limit = max(limit, eager_error)
    tile = worst_tile(out, truth, concentrated)
    assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.1e}"
    assert tile <= 4 * limit, f"{name}: an 8x8 tile is off by {tile:.2e} of the rms"
    # fp32 sums in another order differ by more than a quarter without either being worse.
    floor = 2e-7 if limit_dtype == torch.float32 else 0.0
    few = few or truth.numel() < 4096
    if not few:
        assert error <= max(1.25 * eager_error, floor), f"{name}: error {error:.3e}, eager {eager_error:.3e}"
    most = MOST_OF_EAGERS_WHERE_FEW if few or limit_dtype == torch.float32 else MOST_OF_EAGERS
    largest, eagers = largest_error(out, truth), largest_error(eager, truth)
    assert largest <= max(most * eagers, 8 * floor), f"{name}: an element is off by {largest:.2e} of the rms"

"""Tensors of more than 2^31 elements on the device: every index in 64 bits. Deselect with `-m "not large"`.

All is zero but the last rows, so that what they give is known from a small problem; the mask of elements
beyond 2^31 comes from the CPU's lora_dropout, which starts anywhere.
"""

import pytest
import torch
from numerics import LIMIT, relative_error
from problems import matrix

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import cpu

pytestmark = pytest.mark.large
DTYPE, P, R = torch.bfloat16, 0.25, 16
WIDE, NARROW = 4096, 64
LONG = (1 << 31) // WIDE + 40  # tokens: 2^31 lies 40 rows before the end
LAST = 48  # rows on both sides of it
GIB = 1 << 30
RNG = torch.tensor([2026, 11])


@pytest.fixture(autouse=True)
def room():
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * GIB:
        pytest.skip(f"needs 24 GiB of free device memory, there are {free / GIB:.0f}")
    yield
    torch.cuda.empty_cache()


def with_last_rows(rows: torch.Tensor, total: int) -> torch.Tensor:
    whole = torch.zeros(total, rows.shape[1], dtype=rows.dtype, device=rows.device)
    whole[-len(rows) :] = rows
    return whole


def dropped_last(rows: torch.Tensor, first_row: int) -> torch.Tensor:
    """m⊙x of the last rows of x [LONG, K], by the CPU."""
    out = torch.empty(rows.shape, dtype=rows.dtype)
    cpu.lora_dropout(rows.cpu().contiguous(), P, RNG, first_row * rows.shape[1], out)
    return out.to(rows.device)


def test_x_of_more_than_2_31_elements(device):
    """The forward, dA, dx and its mask at K = 4096, N = 64."""
    rows = matrix(device, LAST, WIDE, 1.0, DTYPE)
    x = with_last_rows(rows, LONG).requires_grad_()
    weight = lk.nf4_quantize(matrix(device, NARROW, WIDE, WIDE**-0.5, DTYPE))
    A = matrix(device, R, WIDE, WIDE**-0.5, DTYPE).requires_grad_()
    B = matrix(device, NARROW, R, R**-0.5, DTYPE).requires_grad_()
    dy_rows = matrix(device, LAST, NARROW, 1.0, DTYPE)
    dy = with_last_rows(dy_rows, LONG)
    y = lk.lora_linear(x, weight, A, B, scaling=0.5, dropout_p=P, rng=RNG.to(device))
    dx, dA, dB = torch.autograd.grad(y, [x, A, B], dy)

    kept = dropped_last(rows, LONG - LAST).double()
    mask = dropped_last(torch.ones_like(rows), LONG - LAST).double()
    W, A64, B64, s = weight.dequantize(torch.float32).double(), A.double(), B.double(), 0.5 / (1 - P)
    h = kept @ A64.T
    g = s * (dy_rows.double() @ B64)
    truths = {
        "y": (y[-LAST:], rows.double() @ W.T + s * h @ B64.T),
        "dx": (dx[-LAST:], dy_rows.double() @ W + mask * (g @ A64)),
        "dA": (dA, g.T @ kept),
        "dB": (dB, s * dy_rows.double().T @ h),
    }
    for name, (out, truth) in truths.items():
        assert relative_error(out.detach(), truth) <= LIMIT[DTYPE], name
    assert not y[:-LAST].any() and not dx[:-LAST].any()


def test_dy_of_more_than_2_31_elements(device):
    """y, g, dB and dbias at N = 4096, K = 64."""
    rows = matrix(device, LAST, NARROW, 1.0, DTYPE)
    x = with_last_rows(rows, LONG).requires_grad_()
    weight = lk.nf4_quantize(matrix(device, WIDE, NARROW, NARROW**-0.5, DTYPE))
    A = matrix(device, R, NARROW, NARROW**-0.5, DTYPE).requires_grad_()
    B = matrix(device, WIDE, R, R**-0.5, DTYPE).requires_grad_()
    bias = torch.zeros(WIDE, device=device, requires_grad=True)
    dy_rows = matrix(device, LAST, WIDE, 1.0, DTYPE)
    y = lk.lora_linear(x, weight, A, B, scaling=0.5, bias=bias)
    dx, dA, dB, dbias = torch.autograd.grad(y, [x, A, B, bias], with_last_rows(dy_rows, LONG))
    W, A64, B64 = weight.dequantize(torch.float32).double(), A.double(), B.double()
    h, g = rows.double() @ A64.T, 0.5 * (dy_rows.double() @ B64)
    truths = {
        "y": (y[-LAST:], rows.double() @ W.T + 0.5 * h @ B64.T),
        "dx": (dx[-LAST:], dy_rows.double() @ W + g @ A64),
        "dA": (dA, g.T @ rows.double()),
        "dB": (dB, 0.5 * dy_rows.double().T @ h),
        "dbias": (dbias, dy_rows.double().sum(dim=0)),
    }
    for name, (out, truth) in truths.items():
        assert relative_error(out.detach(), truth) <= LIMIT[DTYPE], name
    assert not y[:-LAST].any() and not dx[:-LAST].any()


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("tokens", [1, 9, 300, 600])
def test_a_weight_of_more_than_2_31_elements(tokens, nf4, device):
    """Each route forward and backward; the rows of W0 beyond 2^31 are the last twelve, the others zero."""
    k = 1 << 15
    n, last = (1 << 31) // k + 8, 12
    rows = matrix(device, last, k, k**-0.5, DTYPE)
    dense = with_last_rows(rows, n)
    weight = lk.nf4_quantize(dense) if nf4 else dense
    if nf4:
        parts = (weight.packed[-last * k // 2 :], weight.absmax[-last * k // 64 :])
        scales = reference.dequantize_absmax(weight.absmax, weight.nested_absmax, weight.offset)
        scales = scales[-last * k // 64 :]
        small = reference.nf4_dequantize(parts[0], scales, None, None, (last, k), 64, torch.float64)
    else:
        small = rows.double()
    x = matrix(device, tokens, k, 1.0, DTYPE).requires_grad_()
    dy_rows = matrix(device, tokens, last, 1.0, DTYPE)
    dy = torch.zeros(tokens, n, dtype=DTYPE, device=device)
    dy[:, -last:] = dy_rows
    y = lk.lora_linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert relative_error(y[:, -last:].detach(), x.detach().double() @ small.T) <= LIMIT[DTYPE]
    assert relative_error(dx, dy_rows.double() @ small) <= LIMIT[DTYPE]

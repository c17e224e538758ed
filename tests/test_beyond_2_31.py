"""Weights of more than 2^31 elements: every index in 64 bits. Deselect with `-m "not large"`."""

import pytest
import simt_backend
import torch

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import cpu
from lora_kernels.base_weight import BaseWeight

pytestmark = pytest.mark.large
K = 1 << 16
N = (1 << 31) // K + 8  # 2^31 lies eight rows before the end
LAST = slice(N - 12, N)  # the rows on both sides of it


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024


@pytest.fixture(scope="module")
def weights():
    """The rows LAST of a bf16 [N, K] that is zero elsewhere, and all of it in NF4."""
    if available_bytes() < 9 << 30:
        pytest.skip("needs 8 GiB of memory")
    dense = torch.zeros(N, K, dtype=torch.bfloat16)  # 4.3 GB, of which only what is written is in memory
    dense[LAST] = torch.randn(12, K).bfloat16()
    return dense[LAST].clone(), lk.nf4_quantize(dense)


def test_quantised_rows_beyond_2_31_are_those_of_a_small_weight(weights):
    rows, nested = weights
    assert nested.packed.numel() * 2 > 2**31
    small = lk.nf4_quantize(rows, double_quant=False)
    assert torch.equal(nested.packed[-12 * K // 2 :], small.packed)
    absmax = reference.dequantize_absmax(nested.absmax, nested.nested_absmax, nested.offset)
    torch.testing.assert_close(absmax[-12 * K // 64 :], small.absmax, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("tokens", [1, 5])
def test_lora_linear_uses_rows_beyond_2_31(weights, tokens):
    """Both kernels, forward and dx: what the last twelve rows give, as a weight of their own."""
    _, nested = weights
    x, dy = torch.randn(tokens, K, requires_grad=True), torch.zeros(tokens, N)
    dy[:, LAST] = torch.randn(tokens, 12)
    y = lk.lora_linear(x, nested)
    y.backward(dy)
    absmax = reference.dequantize_absmax(nested.absmax, nested.nested_absmax, nested.offset)
    packed, scales = nested.packed[-12 * K // 2 :], absmax[-12 * K // 64 :]
    dense = reference.nf4_dequantize(packed, scales, None, None, (12, K), 64, torch.float64)
    wanted = x.detach().double() @ dense.T
    assert float((y[:, LAST].detach().double() - wanted).norm() / wanted.norm()) < 2e-6
    assert torch.equal(nested.packed[: K // 2], nested.packed[K // 2 : K])  # the rows before are all alike
    wanted = dy[:, LAST].double() @ dense
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < 2e-6


# ---- the CUDA kernels, on the stand-in: rows so far apart that offsets pass 2^31 ---------------------------

APART = 1 << 26  # elements from row to row; of 40 rows the last eight lie beyond 2^31
HALF = torch.bfloat16


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, APART elements from one to the next, in memory of which only they are touched."""
    room = torch.empty(len(rows) * APART, dtype=rows.dtype)
    spread = room.as_strided(rows.shape, (APART, 1))
    spread.copy_(rows)
    assert (len(rows) - 1) * APART >= 2**31
    return spread


def by_launchers(x, dy, weight, A, B):
    """What every kernel that reads a large operand makes of these."""
    launchers = simt_backend.backend._launchers
    base = BaseWeight(weight, None, None, None, 0, *weight.shape)
    t, n, k, r = len(x), len(weight), weight.shape[1], len(A)
    rng = torch.tensor([7, 1 << 40])

    def out(*shape, dtype=HALF):
        return torch.full(shape, float("nan"), dtype=dtype)

    h, y, decoded, low = out(t, r), out(t, n), out(8, n), out(8, r)
    launchers.lora_shrink(x, [A], 0.25, rng, h)
    launchers.lora_linear_mixed(x, base, A, B, 0.5, None, y, h.clone(), True)
    launchers.lora_linear_decode(x[-8:], base, A, B, 0.5, None, decoded, low)
    g, dB, dbias, dA, dx = out(t, r), out(n, r), out(n, dtype=torch.float32), out(r, k), out(t, k)
    launchers.lora_linear_backward_dy(dy, h, [B], [0.5], g, [dB], dbias)
    launchers.lora_linear_backward_x(x, g, 0.25, rng, [dA])
    launchers.lora_linear_backward_dx(dy, base, A, g, 0.25, rng, dx)
    return {"h": h, "y": y, "decode y": decoded, "decode h": low, "g": g} | {
        "dB": dB,
        "dbias": dbias,
        "dA": dA,
        "dx": dx,
    }


@pytest.mark.parametrize("capability", [80, 90])
def test_cuda_kernels_read_rows_beyond_2_31(capability):
    simt_backend.pretend(4, capability)
    x, dy, weight = torch.randn(40, 128), torch.randn(40, 40), torch.randn(40, 128) * 0.1
    x, dy, weight = x.to(HALF), dy.to(HALF), weight.to(HALF)
    A, B = torch.randn(8, 128).to(HALF), torch.randn(40, 8).to(HALF)
    wanted = by_launchers(x, dy, weight, A, B)
    for name, spread in {
        "x": (far_apart(x), dy, weight),
        "dy": (x, far_apart(dy), weight),
        "W0": (x, dy, far_apart(weight)),
    }.items():
        for output, got in by_launchers(*spread, A, B).items():
            assert torch.equal(got, wanted[output]), f"{output} where rows of {name} lie apart"


@pytest.mark.parametrize("k", [64, 91])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_cuda_nf4_dequantize_decodes_rows_beyond_2_31(k, dtype):
    """Whole blocks by the aligned kernel, and rows of no round length by the general one."""
    rows = 64 * (2**31 // (64 * k) + 1)  # the tail that is not zero begins with a whole block beyond 2^31
    small = lk.nf4_quantize(torch.randn(64, k), double_quant=False)
    packed = torch.zeros((rows + 64) * k // 2, dtype=torch.uint8)
    absmax = torch.zeros((rows + 64) * k // 64)
    packed[rows * k // 2 :] = small.packed.flatten()
    absmax[rows * k // 64 :] = small.absmax.flatten()
    base = BaseWeight(packed, absmax, None, None, 64, rows + 64, k)
    out = torch.full((64, k), float("nan"), dtype=dtype)
    simt_backend.backend._launchers.nf4_dequantize(base, rows, 0, out)
    assert rows * k >= 2**31 and torch.equal(out, small.dequantize(dtype))


@pytest.mark.parametrize("first", [2**31, 2**31 + 3, 2**40 + 8])
def test_cuda_lora_dropout_draws_for_elements_beyond_2_31(first):
    x, rng = torch.randn(1, 1000).to(HALF), torch.tensor([5, 6])
    got, wanted = torch.empty_like(x), torch.empty_like(x)
    simt_backend.backend._launchers.lora_dropout(x, 0.3, rng, first, got)
    cpu.lora_dropout(x, 0.3, rng, first, wanted)
    assert torch.equal(got, wanted) and 0 < int((got == 0).sum()) < 1000

"""Weights of more than 2^31 elements: every index in 64 bits. Deselect with `-m "not large"`."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels import reference

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

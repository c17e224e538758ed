"""The specification itself: against published vectors, independent implementations and finite differences."""

import copy

import pytest
import torch
from torch.autograd import gradcheck

from lora_kernels import reference


def words(counter, key):
    return [
        f"{w:08x}" for w in reference.philox4x32_10(torch.tensor([counter]), torch.tensor(key))[0].tolist()
    ]


def test_philox_matches_the_published_known_answers():
    """Random123's kat_vectors, philox 4x32 10 rounds."""
    assert words([0, 0, 0, 0], [0, 0]) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 0xFFFFFFFF
    assert words([ones] * 4, [ones] * 2) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, [0xA4093822, 0x299F31D0]) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_dropout_mask_reads_word_i_mod_4_of_counter_i_div_4():
    seed, offset = -3, 2**40 + 17  # a seed's 64 bits may be a negative int64
    mask = reference.dropout_mask((3, 7), 0.4, torch.tensor([seed, offset]))
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for i in range(21):
        counter = [i // 4, 0, offset & 0xFFFFFFFF, offset >> 32]
        word = int(words(counter, key)[i % 4], 16)
        assert mask.reshape(-1)[i].item() == (word >= int(0.4 * 2**32))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_right_share(p):
    n = 400_000
    kept = reference.dropout_mask((400, 1000), p, torch.randint(0, 2**63 - 1, (2,))).sum().item()
    assert abs(kept - n * (1 - p)) < 6 * (n * p * (1 - p)) ** 0.5


def test_masks_of_different_rng_are_independent():
    rngs = [torch.tensor([1, 1]), torch.tensor([2, 1]), torch.tensor([1, 2])]
    a, b, c = (reference.dropout_mask((200, 500), 0.5, rng).double() - 0.5 for rng in rngs)
    for left, right in ((a, b), (a, c), (b, c)):
        assert abs((left * right).mean().item()) < 6 * 0.25 / 100_000**0.5


def test_dynamic_map_is_the_published_one():
    import hashlib

    signed = reference.dynamic_map()
    assert hashlib.sha256(signed.numpy().tobytes()).hexdigest().startswith("e732639a65f497b4")
    assert signed[127] == 0 and signed[255] == 1 and signed.numel() == 256


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_equals_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(
        reference.dynamic_map(signed=signed), functional.create_dynamic_map(signed=signed).float()
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lora_linear_backward_is_the_gradient(p, with_bias):
    """The hand-written formulas against autograd through the forward formula, in float64."""
    t, n, k, r, s = 5, 7, 6, 3, 1.7
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((t, k), (r, k), (n, r), (n,))]
    x, A, B, bias = (leaf.requires_grad_() for leaf in leaves)
    weight, rng = torch.randn(n, k, dtype=torch.float64), torch.randint(0, 2**63 - 1, (2,))
    y, h = reference.lora_linear(x, weight, A, B, s, bias if with_bias else None, p, rng)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, A, B), dy)
    got = reference.lora_linear_backward(dy, x, h, weight, A, B, s, p, rng)
    for ours, autograds in zip(got, wanted, strict=False):
        torch.testing.assert_close(ours, autograds, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[3], dy.sum(0))


def test_lora_linear_passes_gradcheck_in_float64():
    weight, rng = torch.randn(4, 5, dtype=torch.float64), torch.tensor([7, 8])

    def f(x, A, B, bias):
        return reference.lora_linear(x, weight, A, B, 0.5, bias, 0.25, rng)[0]

    inputs = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (2, 5), (4, 2), (4,))
    ]
    assert gradcheck(f, inputs)


def test_batched_rows_equal_single_adapters():
    t, n, k, ranks = 9, 6, 8, (1, 3, 4)
    x, weight, bias = torch.randn(t, k), torch.randn(n, k), torch.randn(n)
    A, B = [torch.randn(r, k) for r in ranks], [torch.randn(n, r) for r in ranks]
    scaling, index = [0.5, 2.0, -1.0], torch.tensor([2, -1, 0, 1, 1, -1, 2, 0, 0])
    y, h = reference.lora_linear_batched(x, weight, A, B, scaling, index, bias)
    assert h.shape == (t, max(ranks))
    for row, i in enumerate(index.tolist()):
        pair = (None, None, 1.0) if i < 0 else (A[i], B[i], scaling[i])
        alone, h_alone = reference.lora_linear(x[row : row + 1], weight, *pair, bias)
        torch.testing.assert_close(y[row : row + 1], alone)
        torch.testing.assert_close(h[row : row + 1, : h_alone.shape[1]], h_alone)
        assert not h[row, h_alone.shape[1] :].any()


def test_dora_linear_equals_peft():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(24, 16))
    base = copy.deepcopy(model[0])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(torch.rand(16) + 0.5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(10, 24, requires_grad=True)
    wanted = wrapped(x)
    y, _, norm = reference.dora_linear(x, base.weight.detach(), A, B, magnitude, 6 / 4, base.bias.detach())
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(norm, (base.weight + 1.5 * B @ A).norm(dim=1))
    dy = torch.randn_like(y)
    leaves = (x, A, B, magnitude)
    pairs = zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True)
    for ours, pefts in pairs:
        torch.testing.assert_close(ours, pefts, rtol=1e-4, atol=1e-5)


def test_dora_linear_with_dropout_is_the_formula_of_its_docstring():
    t, n, k, r, p = 6, 5, 8, 2, 0.4
    x, weight = torch.randn(t, k, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    A, B = torch.randn(r, k, dtype=torch.float64), torch.randn(n, r, dtype=torch.float64)
    m, rng = torch.rand(n, dtype=torch.float64) + 0.5, torch.tensor([5, 6])
    y, _, norm = reference.dora_linear(x, weight, A, B, m, 2.0, None, p, rng)
    dropped = x * reference.dropout_mask((t, k), p, rng) / (1 - p)
    c = m / norm
    wanted = x @ weight.T + (c - 1) * (dropped @ weight.T) + c * 2.0 * (dropped @ A.T @ B.T)
    torch.testing.assert_close(y, wanted)

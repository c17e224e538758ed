"""Merging: one rounding of a float32 sum, exact undoing, and an honest account of requantisation."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.linear import FusedLoRALinear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def adapted(dtype=torch.float32, quantize=None, bias=True):
    layer = FusedLoRALinear(96, 64, r=4, lora_alpha=6, quantize=quantize, dtype=dtype, bias=bias)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.1)
    return layer.eval()


def expected(layer, dtype):
    """T(W0 + s·B·A) in float64, rounded once; a float32 sum may differ from it by one ulp of T."""
    A, B = (m["default"].weight.double() for m in (layer.lora_A, layer.lora_B))
    return (layer.dequantized_weight(torch.float32).double() + 1.5 * (B @ A)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_merged_weight_is_one_rounding_of_the_exact_sum(dtype, quantize):
    layer = adapted(dtype, quantize)
    layer.merge()
    exact = expected(layer, torch.float64)
    assert layer.merged_weight.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    slack = 1.01 if dtype != torch.float32 else 4.0  # the float32 sum itself rounds: r + 1 terms
    assert bool(((layer.merged_weight.double() - exact).abs() <= slack * half_ulp * exact.abs() + 2e-7).all())
    if dtype != torch.float32:  # adding into the 16-bit weight, the sloppy way, loses bits that this keeps
        sloppy = layer.dequantized_weight(dtype) + layer.delta_weight().to(dtype)
        error = (layer.merged_weight.double() - exact).norm()
        assert error < 0.97 * (sloppy.double() - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merging_keeps_the_outputs_and_unmerging_the_bytes(dtype, quantize):
    layer, x = adapted(dtype, quantize), torch.randn(33, 96).to(dtype)
    y, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.merge()
    limit = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert float((layer(x).double() - y.double()).norm() / y.double().norm()) < limit
    merged_state = layer.state_dict()
    assert merged_state.keys() == state.keys()
    assert all(torch.equal(merged_state[k], state[k]) for k in state)
    layer.unmerge()
    assert layer.merged_weight is None and torch.equal(layer(x), y)
    assert all(torch.equal(layer.state_dict()[k], state[k]) for k in state)


def test_merging_follows_the_active_adapter():
    layer = adapted()
    layer.add_adapter("other", r=2, init_lora_weights=False)
    layer.set_adapter("other")
    y = layer(torch.ones(96))
    layer.merge()
    assert layer.merged_adapter == "other"
    torch.testing.assert_close(layer(torch.ones(96)), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="unmerge.. first"):
        layer.set_adapter("default")
    with pytest.raises(RuntimeError, match="unmerge.. first"):
        layer.delete_adapter("other")


def test_merging_twice_or_nothing_is_refused():
    layer = adapted()
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    layer.set_adapter(None)
    with pytest.raises(RuntimeError, match="nothing to merge"):
        layer.merge()
    for function in (lk.merge, lk.unmerge, lk.merge_and_unload):
        with pytest.raises(ValueError, match="no FusedLoRALinear"):
            function(nn.Sequential(nn.Linear(4, 4)))


def model(quantize):
    m = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 96))
    lk.inject(m, r=4, lora_alpha=6, quantize=quantize)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return m.eval()


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_leaves_plain_layers(quantize, merged_before):
    m, x = model(quantize), torch.randn(5, 96)
    y, bias = m(x), m[0].bias.clone()
    if merged_before:
        lk.merge(m)
    assert lk.merge_and_unload(m) == []
    assert [type(layer) for layer in m] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.equal(m[0].bias, bias)
    torch.testing.assert_close(m(x), y, rtol=1e-4, atol=1e-5)


def test_requantising_reports_the_error_that_it_made():
    m, x = model("nf4"), torch.randn(5, 96)
    exact = [layer.dequantized_weight() + layer.delta_weight() for layer in (m[0], m[2])]
    deltas = [layer.delta_weight() for layer in (m[0], m[2])]
    y = m(x)
    errors = lk.merge_and_unload(m, requantize=True)
    assert [e.layer for e in errors] == ["0", "2"]
    for layer, error, weight, delta in zip((m[0], m[2]), errors, exact, deltas, strict=True):
        assert layer.quantize == "nf4" and not layer.adapter_specs
        lost = (layer.dequantized_weight() - weight).norm()
        assert error.relative_error == pytest.approx(float(lost / weight.norm()), rel=1e-4)
        assert error.error_over_delta == pytest.approx(float(lost / delta.norm()), rel=1e-4)
        assert 0.02 < error.relative_error < 0.2
    assert 1e-3 < float((m(x) - y).norm() / y.norm()) < 0.5


def test_tied_layers_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

    m = Tied()
    lk.inject(m, ["first"], r=2)
    lk.merge_and_unload(m)
    assert type(m.first) is nn.Linear and m.second is m.first

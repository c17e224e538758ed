"""bitsandbytes: the same bytes in both directions, in memory and in state dicts."""

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.bitsandbytes import (
    from_linear4bit,
    to_linear4bit,
    to_params4bit,
)
from lora_kernels.linear import FusedLoRALinear

bnb = pytest.importorskip("bitsandbytes")
# K a multiple of every blocksize used here: where it is not, bitsandbytes 0.50.2's own CPU dequantisation can
# be wrong (48 x 96 at blocksize 64: a relative error of 0.25, where the format allows 0.09).
N, K = 48, 256


def linear4bit(bias=True, nested=True, blocksize=64, storage=torch.uint8, dtype=torch.bfloat16, quant="nf4"):
    layer = bnb.nn.Linear4bit(
        K,
        N,
        bias=bias,
        compute_dtype=dtype,
        quant_type=quant,
        compress_statistics=nested,
        quant_storage=storage,
    )
    dense = torch.randn(N, K, dtype=dtype)
    layer.weight = bnb.nn.Params4bit(
        dense, requires_grad=False, quant_type=quant, blocksize=blocksize, compress_statistics=nested,
        quant_storage=storage,
    )  # fmt: skip
    return layer.to("cpu", dtype if bias else None)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_params4bit_keeps_its_bytes_both_ways(nested, blocksize, storage):
    params = linear4bit(nested=nested, blocksize=blocksize, storage=storage).weight
    weight = lk.NF4Weight.from_params4bit(params)
    assert weight.shape == (N, K) and weight.blocksize == blocksize and weight.double_quant == nested
    assert torch.equal(weight.packed.reshape(-1), params.data.view(torch.uint8).reshape(-1))
    wanted = bnb.functional.dequantize_4bit(params.data, params.quant_state)
    assert torch.equal(weight.dequantize(), wanted)
    back = to_params4bit(weight)
    assert torch.equal(bnb.functional.dequantize_4bit(back.data, back.quant_state), wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_our_layer_over_a_linear4bit_is_dequantise_and_multiply(bias, nested):
    theirs = linear4bit(bias, nested)
    ours = FusedLoRALinear.from_linear(theirs, r=4)
    assert ours.weight.data_ptr() == theirs.weight.data_ptr()  # no copy, no requantisation
    x = torch.randn(7, K).bfloat16()
    dense = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    bias = None if theirs.bias is None else theirs.bias.double()
    wanted = nn.functional.linear(x.double(), dense.double(), bias)
    # Rounding the weights to bf16, as theirs are here, is an error of 1.7e-3; rounding y, of as much.
    assert float((ours(x).detach().double() - wanted).norm() / wanted.norm()) < 4e-3
    ours.lora_B["default"].weight.data.normal_()
    ours(x).sum().backward()
    assert ours.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts_load_into_one_another_strictly(nested):
    theirs = linear4bit(nested=nested, dtype=torch.float32)
    ours = FusedLoRALinear(K, N, r=None, quantize="nf4", double_quant=nested)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    again = FusedLoRALinear.from_linear(theirs, r=None)
    assert torch.equal(ours.dequantized_weight(), again.dequantized_weight())
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == yours.keys()
    for key in mine:
        if not key.endswith("bitsandbytes__nf4"):
            assert torch.equal(mine[key], yours[key]), key
    params = bnb.nn.Params4bit.from_prequantized(
        mine["weight"],
        {k.removeprefix("weight."): v for k, v in mine.items() if k.startswith("weight.")},
        device="cpu",
    )
    assert torch.equal(
        bnb.functional.dequantize_4bit(params.data, params.quant_state),
        ours.dequantized_weight(torch.float32),
    )


def test_a_linear4bit_made_of_our_weight_computes_with_it():
    weight = lk.nf4_quantize(torch.randn(N, K))
    layer = to_linear4bit(weight, bias=torch.randn(N))
    x = torch.randn(5, K)
    wanted = nn.functional.linear(x, weight.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(from_linear4bit(layer).packed, weight.packed)


def test_what_is_not_nf4_or_not_quantised_is_refused():
    with pytest.raises(ValueError, match="quant_type 'fp4'"):
        FusedLoRALinear.from_linear(linear4bit(quant="fp4"), r=2)
    raw = bnb.nn.Linear4bit(K, N, quant_type="nf4")
    with pytest.raises(ValueError, match="not quantised yet"):
        FusedLoRALinear.from_linear(raw, r=2)
    with pytest.raises(TypeError, match="Linear8bitLt with a weight of type Int8Params, expected nn.Linear"):
        FusedLoRALinear.from_linear(bnb.nn.Linear8bitLt(K, N), r=2)


@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_that_bitsandbytes_repacked_is_refused_with_the_remedy(nested):
    """Its eval forward does this, on a CPU with AVX512-BF16; the scales are bfloat16 from then on."""
    weight = lk.nf4_quantize(torch.randn(64, 128), double_quant=nested)
    layer = to_linear4bit(weight)
    params = layer.weight
    params.data, params.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        params.data, params.quant_state
    )
    with pytest.raises(ValueError, match=r"repacked by a forward in eval mode .* or load its weights again"):
        FusedLoRALinear.from_linear(layer, r=2)


def test_injecting_into_a_model_of_linear4bit_layers():
    model = nn.Sequential(linear4bit(), nn.GELU())
    lk.inject(model, ["0"], r=2)
    assert isinstance(model[0], FusedLoRALinear) and model[0].quantize == "nf4"

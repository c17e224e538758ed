"""PEFT's LoRA layer, call by call: the same outputs and all the same gradients for the same matrices."""

import pytest
import torch
from torch import nn

from lora_kernels.linear import FusedLoRALinear

peft = pytest.importorskip("peft")


def pair(dtype, rslora=False, bias=True):
    """PEFT's lora.Linear and ours around the same weight, with the same A and B."""
    base = nn.Linear(40, 56, bias=bias).to(dtype)
    model = nn.Sequential(base)
    config = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules=["0"], use_rslora=rslora, init_lora_weights=False
    )
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    ours = FusedLoRALinear.from_linear(theirs.base_layer, r=6, lora_alpha=9, use_rslora=rslora)
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(ours, name)["default"].weight.copy_(getattr(theirs, name)["default"].weight)
    return theirs, ours


def run(layer, x, dy, autocast):
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(leaf)
    y.backward(dy.to(y.dtype))
    return [y, leaf.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_in_float32(rslora, bias):
    theirs, ours = pair(torch.float32, rslora, bias)
    x, dy = torch.randn(3, 11, 40), torch.randn(3, 11, 56)
    for mine, yours in zip(run(ours, x, dy, False), run(theirs, x, dy, False), strict=True):
        assert mine.dtype == yours.dtype
        assert float((mine - yours).norm() / yours.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_in_bfloat16(dtype, autocast):
    """fp32 adapters over a bf16 base (PEFT's default), and an fp32 base under autocast: to bf16 rounding."""
    if dtype == torch.float32 and not autocast:
        dtype = torch.bfloat16
    theirs, ours = pair(dtype)
    x, dy = torch.randn(40, 40).to(dtype), torch.randn(40, 56).to(dtype)
    for mine, yours in zip(run(ours, x, dy, autocast), run(theirs, x, dy, autocast), strict=True):
        assert mine.dtype == yours.dtype
        assert float((mine.float() - yours.float()).norm() / yours.float().norm()) < 8e-3


def test_initialisation_is_drawn_from_the_same_distribution():
    """Kaiming-uniform with a = √5: uniform on ±1/√K; Gaussian: normal with standard deviation 1/r; B = 0."""
    uniform = FusedLoRALinear(400, 30, r=64).lora_A["default"].weight
    theirs = nn.Linear(400, 64)
    model = peft.get_peft_model(nn.Sequential(theirs), peft.LoraConfig(r=64, target_modules=["0"]))
    reference = model.base_model.model[0].lora_A["default"].weight
    bound = 400**-0.5
    for A in (uniform, reference):
        assert float(A.abs().max()) <= bound and float(A.abs().max()) > 0.99 * bound
        assert float(A.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    gaussian = FusedLoRALinear(400, 30, r=64, init_lora_weights="gaussian")
    assert float(gaussian.lora_A["default"].weight.std()) == pytest.approx(1 / 64, rel=0.02)
    assert not gaussian.lora_B["default"].weight.any()


def test_dropout_has_the_statistics_of_pefts():
    theirs, ours = pair(torch.float32, bias=False)
    theirs.lora_dropout["default"] = nn.Dropout(0.4)
    ours.adapter_specs["default"] = type(ours.adapter_specs["default"])(6, 9, 0.4)
    x = torch.randn(1, 40)
    for layer in (theirs, ours):
        layer.train()
    with torch.no_grad():
        many = x.expand(20_000, 40)
        mine, yours = ours(many), theirs(many)
    exact = ours.eval()(x)
    spread = yours.std(dim=0)
    assert bool(((mine.mean(0) - exact).abs() < 6 * spread / 20_000**0.5 + 1e-5).all())
    torch.testing.assert_close(mine.std(dim=0), spread, rtol=0.05, atol=0)

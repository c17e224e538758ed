"""Layers, and what to compare of them, for the tests of FusedLoRALinear."""

import torch
from torch import nn

from lora_kernels import FusedLoRALinear

T, K, N, R = 12, 96, 40, 4  # NF4 blocks of 64 straddle the rows of 96
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BASES = {
    "dense": {},
    "nested": {"quantize": "nf4"},
    "plain": {"quantize": "nf4", "double_quant": False, "blocksize": 32},
}
STATE = ("weight", "absmax", "nested_absmax", "offset", "bias")


def make(base="dense", **options):
    """A layer as it is after some training: B is not zero, and contributes about a third of the output."""
    layer = FusedLoRALinear(K, N, **{"r": R} | BASES[base] | options)
    for lora_B in layer.lora_B.values():
        nn.init.normal_(lora_B.weight, std=0.1)
    return layer


def parts(layer):
    """Bytes of the frozen base: name -> tensor."""
    return {name: t.detach().clone() for name in STATE if (t := getattr(layer, name)) is not None}


def assert_same_tensors(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def truth(layer, x, weight=None):
    """y in float64, from the layer's tensors by the formula."""
    weight = layer.dequantized_weight(torch.float32) if weight is None else weight
    y = x.double() @ weight.double().T
    if layer.bias is not None:
        y = y + layer.bias.double()
    name = layer.active_adapter
    if name is not None:
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        y = y + layer.scaling[name] * ((x.double() @ A.T) @ B.T)
    return y


def gradients(layer, x, dy=None, run=None):
    """y and the gradients of x and of every trainable parameter, of one fresh forward and backward."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = (layer if run is None else run)(x)
    y.backward(torch.ones_like(y) if dy is None else dy)
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads

"""The ops on the device as torch sees them: opcheck, and torch.compile without a graph break."""

import pytest
import torch
from torch.library import opcheck

import lora_kernels as lk

OPS = torch.ops.lora_kernels
N, K, R = 40, 72, 4


def nf4_parts(device, double_quant=True):
    return lk.nf4_quantize(torch.randn(N, K, device=device), double_quant=double_quant).base_weight()[:5]


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck_nf4_quantize(double_quant, device):
    opcheck(OPS.nf4_quantize.default, (torch.randn(9, 70, device=device), 64, double_quant))


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck_nf4_dequantize(double_quant, device):
    opcheck(OPS.nf4_dequantize.default, (*nf4_parts(device, double_quant), [N, K], torch.bfloat16))


@pytest.mark.parametrize("kind", ["nf4", "dense", "no adapter"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck_lora_linear(kind, p, device):
    x, A, B, bias = (
        torch.randn(*s, device=device, requires_grad=True) for s in ((2, 3, K), (R, K), (N, R), (N,))
    )
    dense = (torch.randn(N, K, device=device), None, None, None, 0)
    parts = dense if kind == "dense" else nf4_parts(device)
    adapter = (None, None, 1.0) if kind == "no adapter" else (A, B, 0.5)
    rng = torch.tensor([1, 2], device=device) if p else None
    opcheck(OPS.lora_linear.default, (x, *parts, N, *adapter, bias, p, rng))


@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, False], [True, False, False, True]])
def test_opcheck_lora_linear_backward(needs, device):
    dy, x, h, A, B = (torch.randn(*s, device=device) for s in ((2, 3, N), (2, 3, K), (6, R), (R, K), (N, R)))
    rng = torch.tensor([1, 2], device=device)
    opcheck(OPS.lora_linear_backward.default, (dy, x, h, *nf4_parts(device), K, A, B, 0.5, 0.2, rng, needs))


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(device):
    weight = lk.nf4_quantize(torch.randn(N, K, device=device))
    x, A, B, bias = (
        torch.randn(*s, device=device, requires_grad=True) for s in ((12, K), (R, K), (N, R), (N,))
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = lk.lora_linear(x, weight, A, B, bias=bias)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(leaf.grad.dtype == torch.float32 for leaf in (x, A, B, bias))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend, device):
    torch._dynamo.reset()
    weight = lk.nf4_quantize(torch.randn(N, K, device=device) * K**-0.5)
    rng = torch.tensor([1, 2], device=device)
    leaves = [torch.randn(*s, device=device) for s in ((12, K), (R, K), (N, R))]

    def f(x, A, B):
        return torch.nn.functional.gelu(lk.lora_linear(x, weight, A, B, scaling=0.1, dropout_p=0.2, rng=rng))

    results = []
    for function in (f, torch.compile(f, fullgraph=True, backend=backend)):
        own = [t.clone().requires_grad_() for t in leaves]
        y = function(*own)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in own)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)

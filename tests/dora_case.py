"""A random problem of dora_linear, its truth, and what the public function makes of it."""

import torch
from numerics import make_input
from problems import dense_of

import lora_kernels as lk
from lora_kernels import reference


class Case:
    def __init__(self, t, n, k, r, dtype, kind="normal", p=0.0, nf4=True, adapter_dtype=None, delta=0.25):
        self.x, self.dy = make_input(kind, t, k, dtype=dtype), torch.randn(t, n).to(dtype)
        std = max(k, 1) ** -0.5
        dense = (torch.randn(n, k) * std).to(dtype)
        self.weight = lk.nf4_quantize(dense) if nf4 else dense
        adapter_dtype = adapter_dtype or dtype
        self.A = (torch.randn(r, k) * std).to(adapter_dtype)
        self.B = (torch.randn(n, r) * delta * r**-0.5).to(adapter_dtype)
        self.m = (torch.rand(n) + 0.5).to(adapter_dtype)
        self.bias = torch.randn(n).to(dtype)
        self.s, self.p, self.rng = 0.7, p, torch.randint(0, 2**63 - 1, (2,)) if p else None

    def dense(self, dtype):
        return dense_of(self.weight, dtype)

    def computed(self):
        """y, dx, dA, dB, dmagnitude, dbias."""
        x, A, B, m, bias = leaves = [
            v.clone().requires_grad_() for v in (self.x, self.A, self.B, self.m, self.bias)
        ]
        options = {"scaling": self.s, "bias": bias, "dropout_p": self.p, "rng": self.rng}
        y = lk.dora_linear(x, self.weight, A, B, m, **options)
        y.backward(self.dy)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def expected(self, dtype):
        cast = (lambda v: v.double()) if dtype == torch.float64 else (lambda v: v)
        x, dy, A, B, m, bias = (cast(v) for v in (self.x, self.dy, self.A, self.B, self.m, self.bias))
        weight = self.dense(dtype)
        y, h, norm = reference.dora_linear(x, weight, A, B, m, self.s, bias, self.p, self.rng)
        arguments = (dy, x, h, norm, weight, A, B, m, self.s, self.p, self.rng)
        return [y, *reference.dora_linear_backward(*arguments)]

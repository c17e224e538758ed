"""Random problems on a device, their truth in float64, and how results are judged: for tests/gpu."""

import math
from collections.abc import Sequence

import torch
from numerics import LIMIT, assert_accurate, make_input
from torch import Tensor

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.base_weight import BaseWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("y", "dx", "dA", "dB", "dbias")
SCALING = 0.7


def matrix(
    device: torch.device, rows: int, cols: int, size: float, dtype: torch.dtype, shift: int = 0
) -> Tensor:
    """Normal [rows, cols] of this size; with `shift` a wider tensor's columns from there on."""
    width = shift + cols + (5 if shift else 0)
    return (torch.randn(rows, width, device=device) * size).to(dtype)[:, shift : shift + cols]


def dense_of(weight: lk.NF4Weight | Tensor, dtype: torch.dtype) -> Tensor:
    """W0 [N, K] by the specification."""
    if not isinstance(weight, lk.NF4Weight):
        return weight.to(dtype)
    parts = weight.base_weight()[:4]
    return reference.nf4_dequantize(*parts, tuple(weight.shape), weight.blocksize, dtype)


def base_of(weight: lk.NF4Weight | Tensor) -> BaseWeight:
    if isinstance(weight, lk.NF4Weight):
        return weight.base_weight()
    return BaseWeight(weight, None, None, None, 0, *weight.shape)


def moved(case, device):
    """The same problem on another device."""

    def there(value):
        if isinstance(value, list):
            return [there(item) for item in value]
        return value.to(device) if isinstance(value, (Tensor, lk.NF4Weight)) else value

    other = object.__new__(type(case))
    vars(other).update({name: there(value) for name, value in vars(case).items()})
    return other


class Case:
    """One adapter: y, dx, dA, dB, dbias of a random problem."""

    def __init__(self, device, t, n, k, r, dtype, kind="normal", p=0.0, nf4=True, adapter_dtype=None):
        adapter_dtype = adapter_dtype or dtype
        self.x = make_input(kind, t, k, dtype=dtype).to(device)
        dense = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
        self.weight = lk.nf4_quantize(dense) if nf4 else dense
        self.A = (torch.randn(r, k, device=device) * k**-0.5).to(adapter_dtype)
        self.B = (torch.randn(n, r, device=device) * r**-0.5).to(adapter_dtype)
        self.bias = torch.randn(n, device=device).to(dtype)
        self.dy = torch.randn(t, n, device=device).to(dtype)
        self.scaling, self.p, self.dtype = SCALING, p, dtype
        self.rng = lk.dropout_rng(device) if p else None

    def expected(self, dtype):
        """By the specification: truth in float64, eager in the working dtype."""
        cast = dtype if dtype == torch.float64 else None
        x, dy, A, B, bias = (v.to(cast or v.dtype) for v in (self.x, self.dy, self.A, self.B, self.bias))
        weight = dense_of(self.weight, dtype)
        y, h = reference.lora_linear(x, weight, A, B, self.scaling, bias, self.p, self.rng)
        grads = reference.lora_linear_backward(dy, x, h, weight, A, B, self.scaling, self.p, self.rng)
        return (y, *grads)

    def computed(self, needs=(True, True, True, True)):
        """By the public function and autograd; `needs` of x, A, B, bias, None where not needed."""
        leaves = [
            v.detach().clone(memory_format=torch.preserve_format).requires_grad_(need)
            for v, need in zip((self.x, self.A, self.B, self.bias), needs, strict=True)
        ]
        options = {"scaling": self.scaling, "dropout_p": self.p, "rng": self.rng}
        y = lk.lora_linear(leaves[0], self.weight, *leaves[1:3], bias=leaves[3], **options)
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], self.dy))
        return (y.detach(), *(next(found) if need else None for need in needs))

    def moved(self, device) -> "Case":
        return moved(self, device)


def check(device, *shape, draws=1, **options):
    """Asserts DESIGN's bounds on every output of `draws` fresh problems, taken together."""
    cases = [Case(device, *shape, **options) for _ in range(draws)]
    truths = [case.expected(torch.float64) for case in cases]
    eager = [case.expected(case.dtype) for case in cases]
    for name, *versions in zip(
        NAMES,
        zip(*(case.computed() for case in cases), strict=True),
        zip(*eager, strict=True),
        zip(*truths, strict=True),
        strict=True,
    ):
        versions = (torch.cat(parts) for parts in versions)
        # dA and dB of few tokens are products of few columns, dA under an outlier channel is one.
        few = name in ("dA", "dB") and cases[0].x.shape[0] * cases[0].A.shape[0] * draws < 1024
        concentrated = few or options.get("kind") == "outlier channel"
        assert_accurate(name, *versions, cases[0].dtype, few=few, concentrated=concentrated)


def draws_for(kind):
    """An outlier channel leaves dA with r values that matter: one draw cannot tell two error levels apart."""
    return 12 if kind == "outlier channel" else 1


def draws_of(outputs: int, least: int = 2048, most: int = 16) -> int:
    """How often a problem of few outputs is drawn: their norm says little."""
    return max(1, min(most, math.ceil(least / outputs)))


class BatchedCase:
    """Adapters of any ranks, each row with one of its own or with none."""

    NAMES = ("y", "dx", "dbias", "dA", "dB")

    def __init__(
        self, device, t, n, k, ranks: Sequence[int], dtype, p=0.0, nf4=True, adapter_dtype=None, index=None
    ):
        adapter_dtype = adapter_dtype or dtype
        self.x = make_input("gelu", t, k, dtype=dtype).to(device)
        self.dy = torch.randn(t, n, device=device).to(dtype)
        dense = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
        self.weight = lk.nf4_quantize(dense) if nf4 else dense
        self.A = [(torch.randn(r, k, device=device) * k**-0.5).to(adapter_dtype) for r in ranks]
        self.B = [(torch.randn(n, r, device=device) * 0.25 * r**-0.5).to(adapter_dtype) for r in ranks]
        self.scaling = [0.5 + 0.1 * (i % 7) for i in range(len(ranks))]
        drawn = torch.randint(-1, len(ranks), (t,), device=device)
        self.index = drawn if index is None else index.to(device)
        self.bias = torch.randn(n, device=device).to(dtype)
        self.p, self.rng, self.dtype = p, lk.dropout_rng(device) if p else None, dtype

    def computed(self):
        """y, dx, dbias, every dA, every dB."""
        x, bias, *adapters = (
            v.detach().clone().requires_grad_() for v in (self.x, self.bias, *self.A, *self.B)
        )
        A, B = adapters[: len(self.A)], adapters[len(self.A) :]
        options = {"bias": bias, "dropout_p": self.p, "rng": self.rng}
        y = lk.lora_linear_batched(x, self.weight, A, B, self.scaling, self.index, **options)
        dx, dbias, *grads = torch.autograd.grad(y, [x, bias, *A, *B], self.dy)
        return y.detach(), dx, dbias, grads[: len(A)], grads[len(A) :]

    def moved(self, device) -> "BatchedCase":
        return moved(self, device)

    def expected(self, dtype):
        cast = dtype if dtype == torch.float64 else None
        x, dy, bias = (v.to(cast or v.dtype) for v in (self.x, self.dy, self.bias))
        A, B = ([v.to(cast or v.dtype) for v in some] for some in (self.A, self.B))
        weight, rest = dense_of(self.weight, dtype), (self.p, self.rng)
        y, h = reference.lora_linear_batched(x, weight, A, B, self.scaling, self.index, bias, *rest)
        arguments = (dy, x, h, weight, A, B, self.scaling, self.index, *rest)
        dx, dA, dB, dbias = reference.lora_linear_batched_backward(*arguments)
        return y, dx, dbias, dA, dB


def check_batched(case: BatchedCase) -> None:
    """DESIGN's bounds on y, dx, dbias, and on all dA and all dB taken together.

    Where most adapters have few rows or none, the rms of all dA says nothing of an element: their norm alone.
    """
    crowded = len(case.x) >= 16 * len(case.A)
    versions = case.computed(), case.expected(case.dtype), case.expected(torch.float64)
    for i, name in enumerate(case.NAMES):
        outs = [version[i] for version in versions]
        if name == "dA":
            outs = [torch.cat(parts) for parts in outs]
        elif name == "dB":
            outs = [torch.cat([part.T for part in parts]) for parts in outs]
        of_an_adapter = name in ("dA", "dB")
        if of_an_adapter and not crowded:
            out, _, truth = outs
            assert float((out.double() - truth).norm()) <= LIMIT[case.dtype] * float(truth.norm()), name
            assert not out[truth == 0].any(), f"{name}: of adapters without rows"
        else:
            judged = {"few": of_an_adapter, "concentrated": of_an_adapter}
            assert_accurate(name, *outs, case.dtype, **judged)

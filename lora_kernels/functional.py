"""The differentiable LoRA linear map: what autograd saves, what it recomputes, and how autocast is honoured.

The gradient formulas are attached to the ops (torch.library.register_autograd), so that `lora_linear` and
`torch.ops.lora_kernels.lora_linear` differentiate alike, in eager mode and under torch.compile. The way
through the dispatcher and its Python kernels costs as much as the product itself where there is one token:
plain eager calls go around it, through an autograd Function of the same formulas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import ops
from lora_kernels.checks import check_tensor
from lora_kernels.nf4 import NF4Weight

# Where the arguments of the op lora_linear stand.
_X, _A, _B, _BIAS = 0, 7, 8, 10


def _save(ctx, inputs, h) -> None:
    x, weight, absmax, nested_absmax, offset, blocksize, _, lora_A, lora_B, scaling, bias, dropout_p, rng = (
        inputs
    )
    needs = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    ctx.in_features = x.shape[-1]
    ctx.blocksize, ctx.scaling, ctx.dropout_p = blocksize, scaling, dropout_p
    ctx.bias_dtype = None if bias is None else bias.dtype
    # x only for dA, h only for dB; the mask is replayed from rng. Nothing of size T*N is kept.
    ctx.save_for_backward(
        x if needs[_A] else None,
        h if needs[_B] else None,
        *(weight, absmax, nested_absmax, offset, lora_A, lora_B, rng),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output[1])


def _gradients(ctx, dy, backward) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    x, h, weight, absmax, nested_absmax, offset, lora_A, lora_B, rng = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (_X, _A, _B, _BIAS)]
    grads = backward(
        *(dy, x, h, weight, absmax, nested_absmax, offset, ctx.blocksize, ctx.in_features),
        *(lora_A, lora_B, ctx.scaling, ctx.dropout_p, rng, needs),
    )
    dx, dA, dB, dbias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    if dbias is not None:
        dbias = dbias.to(ctx.bias_dtype)
    result = [None] * 13
    result[_X], result[_A], result[_B], result[_BIAS] = dx, dA, dB, dbias
    return tuple(result)


def _backward(ctx, dy, dh):
    return _gradients(ctx, dy, torch.ops.lora_kernels.lora_linear_backward.default)


torch.library.register_autograd("lora_kernels::lora_linear", _backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """lora_linear without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        y, h = ops.lora_linear(*inputs)
        _save(ctx, inputs, h)
        return y

    @staticmethod
    def backward(ctx, dy):
        # With create_graph the op itself is called, which says that it has no second derivative.
        create_graph = torch.is_grad_enabled()
        op = torch.ops.lora_kernels.lora_linear_backward.default
        return _gradients(ctx, dy, op if create_graph else ops.lora_linear_backward)


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether nobody watches or rewrites ops (compilers, modes, functorch): no dispatcher is needed."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(t is None or type(t) in _PLAIN for t in tensors)
    )


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "lora_linear has no second derivative: its backward was differentiated (create_graph=True). Use the "
        "pure-PyTorch lora_kernels.reference.lora_linear where one is needed"
    )


torch.library.register_autograd("lora_kernels::lora_linear_backward", _no_double_backward)


def dropout_rng(device: torch.device | str) -> Tensor:
    """A fresh (seed, offset), int64 [2] on `device`, drawn from torch's generator of that device."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def _refuse_function_transforms(op: str) -> None:
    """torch.func.grad, vjp, jacrev and jvp; vmap alone is served, by a loop of torch's.

    A registered op has no forward derivative: of jvp there would be a tangent of zero.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    kinds = {str(level.key()).rsplit(".", 1)[-1] for level in torch._C._functorch.get_interpreter_stack()}
    if kinds & {"Grad", "Jvp"}:
        raise RuntimeError(
            f"{op}: the transforms of torch.func (grad, vjp, jacrev, jvp, ...) are not supported; use "
            f"torch.autograd.grad, or the pure-PyTorch lora_kernels.reference.{op} inside the transform"
        )


def _base_arguments(op: str, x: Tensor, weight: Tensor | NF4Weight) -> tuple[Tensor, tuple, int]:
    """x and the base as the ops take them (weight, absmax, nested_absmax, offset, blocksize), and N.

    Under autocast x and a dense weight come in its dtype.
    """
    check_tensor(op, "x", x)
    _refuse_function_transforms(op)
    if isinstance(weight, NF4Weight):
        out_features, in_features = weight.shape
        if x.dim() > 0 and x.shape[-1] != in_features:
            raise ValueError(
                f"{op}: x has last dimension {x.shape[-1]}, but weight [N, K] = {tuple(weight.shape)} "
                f"takes K = {in_features}"
            )
        parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.blocksize)
    elif isinstance(weight, Tensor):
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: weight requires a gradient, but the base weight is frozen; call "
                "requires_grad_(False) on it, or use torch.nn.functional.linear to train it"
            )
        out_features = weight.shape[0] if weight.dim() == 2 else -1
        parts = (weight, None, None, None, 0)
    else:
        raise TypeError(f"{op}: weight is a {type(weight).__name__}, expected a Tensor or an NF4Weight")
    floating = x.is_floating_point() and x.device.type != "meta"
    if floating and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        if parts[1] is None:
            parts = (parts[0].to(dtype), *parts[1:])
    return x, parts, out_features


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """y = x·W0ᵀ + s·(dropout(x)·Aᵀ)·Bᵀ + bias, differentiable in x, lora_A, lora_B and bias.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides; no tokens at all are fine.
        weight: W0, frozen: an `NF4Weight` of shape [N, K], or a dense tensor [N, K] in x's dtype.
        lora_A: [r, K], any float dtype (float32 adapters on a bfloat16 base are the usual case). None: base
            alone.
        lora_B: [N, r], likewise.
        scaling: s = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.
        bias: [N], any float dtype.
        dropout_p: probability of zeroing an element of x on the adapter path only; the kept ones count
            1/(1-p).
        rng: int64 [2] on x's device, (seed, offset) of the dropout mask; None draws a fresh one from torch's
            generator. The same rng gives the same mask on every backend.

    Returns:
        y [..., N] in x's dtype. Products are summed in float32.

    Under autocast x, bias and a dense weight are cast to the autocast dtype. The gradient of the frozen
    weight is not computed; gradients come back in each parameter's dtype, summed in float32. Double backward
    raises RuntimeError.

    Raises:
        ValueError: a shape, device, scaling, dropout_p or blocksize that does not fit, naming the argument.
        TypeError: a dtype that does not fit.

    Source: Hu et al. 2021 (LoRA), section 4.1; Dettmers et al. 2023 (QLoRA), equation 5.
    """
    x, parts, out_features = _base_arguments("lora_linear", x, weight)
    if dropout_p > 0 and rng is None:
        rng = dropout_rng(x.device)
    arguments = (out_features, lora_A, lora_B, float(scaling), bias, float(dropout_p), rng)
    if not _is_plain_eager(x, *parts[:4], lora_A, lora_B, bias, rng):
        return torch.ops.lora_kernels.lora_linear.default(x, *parts, *arguments)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, lora_A, lora_B, bias)):
        return _Eager.apply(x, *parts, *arguments)
    return ops.lora_linear(x, *parts, *arguments)[0]


# ---- lora_linear_batched -----------------------------------------------------------------------------------


def _setup_batched(ctx, inputs, output) -> None:
    x, *base, blocksize, _, lora_A, lora_B, scaling, index, bias, dropout_p, rng = inputs
    # Here ctx.needs_input_grad does not have the structure of the inputs; in the backward it has.
    needs_A, needs_B = [a.requires_grad for a in lora_A], [b.requires_grad for b in lora_B]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.in_features, ctx.blocksize, ctx.scaling, ctx.dropout_p = x.shape[-1], blocksize, scaling, dropout_p
    ctx.bias_dtype, ctx.count = None if bias is None else bias.dtype, len(lora_A)
    saved = (x if any(needs_A) else None, output[1] if any(needs_B) else None)
    ctx.save_for_backward(*saved, *base, index, rng, *lora_A, *lora_B)


def _backward_batched(ctx, dy, dh):
    count = ctx.count
    needs = ctx.needs_input_grad
    needs_A, needs_B = needs[7], needs[8]
    if dy is None:
        return (*(None,) * 7, [None] * count, [None] * count, *(None,) * 5)
    x, h, *base, index, rng = ctx.saved_tensors[:8]
    adapters = ctx.saved_tensors[8:]
    lora_A, lora_B = list(adapters[:count]), list(adapters[count:])
    dx, dA, dB, dbias = torch.ops.lora_kernels.lora_linear_batched_backward.default(
        *(dy, x, h, *base, ctx.blocksize, ctx.in_features, lora_A, lora_B, ctx.scaling, index),
        *(ctx.dropout_p, rng, [needs[0], needs[11], *needs_A, *needs_B]),
    )
    result: list = [None] * 14
    result[0] = dx if needs[0] else None
    result[7] = [g if need else None for g, need in zip(dA, needs_A, strict=True)]
    result[8] = [g if need else None for g, need in zip(dB, needs_B, strict=True)]
    result[11] = dbias.to(ctx.bias_dtype) if needs[11] else None
    return tuple(result)


torch.library.register_autograd(
    "lora_kernels::lora_linear_batched", _backward_batched, setup_context=_setup_batched
)
torch.library.register_autograd("lora_kernels::lora_linear_batched_backward", _no_double_backward)


def lora_linear_batched(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    adapter_index: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """lora_linear with an adapter of its own for every row t of x, the one of index i = adapter_index[t].

    y_t = x_t·W0ᵀ + s_i·(dropout(x_t)·A_iᵀ)·B_iᵀ + bias. One product with W0 serves all rows; then each
    adapter's rows are taken together. Differentiable in x, every lora_A and lora_B, and bias: an adapter that
    no row takes gets a gradient of zero.

    Args:
        x: [..., K], as in `lora_linear`.
        weight: W0, frozen, as in `lora_linear`.
        lora_A, lora_B: adapter i: [r_i, K] and [N, r_i]; ranks may differ. None at all: base alone.
        scaling: s_i.
        adapter_index: int64, of x's leading shape; -1 = base alone. On a CPU other values outside the list
            are refused; on a GPU, where looking would make every call wait for the device, they are as -1.
        dropout_p, rng: one mask for all rows, that of `lora_linear` on the same x.

    Raises:
        ValueError, TypeError: as `lora_linear`; lists of different lengths; an index out of range.

    Source: Chen et al. 2023 (Punica), section 3, for the setting.
    """
    x, parts, out_features = _base_arguments("lora_linear_batched", x, weight)
    if dropout_p > 0 and rng is None:
        rng = dropout_rng(x.device)
    scales = [float(s) for s in scaling]
    arguments = (out_features, list(lora_A), list(lora_B), scales, adapter_index, bias, float(dropout_p), rng)
    return torch.ops.lora_kernels.lora_linear_batched.default(x, *parts, *arguments)[0]


# ---- dora_linear -------------------------------------------------------------------------------------------


def _setup_dora(ctx, inputs, output) -> None:
    x, *base, blocksize, _, lora_A, lora_B, magnitude, scaling, bias, dropout_p, rng = inputs
    _, h, norm = output
    ctx.mark_non_differentiable(h, norm)
    ctx.set_materialize_grads(False)
    ctx.in_features, ctx.blocksize, ctx.scaling, ctx.dropout_p = x.shape[-1], blocksize, scaling, dropout_p
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, h, norm, *base, lora_A, lora_B, magnitude, rng)


def _backward_dora(ctx, dy, dh, dnorm):
    if dy is None:
        return (None,) * 14
    *tensors, lora_A, lora_B, magnitude, rng = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 7, 8, 9, 11)]
    grads = torch.ops.lora_kernels.dora_linear_backward.default(
        *(dy, *tensors, ctx.blocksize, ctx.in_features, lora_A, lora_B, magnitude),
        *(ctx.scaling, ctx.dropout_p, rng, needs),
    )
    dx, dA, dB, dm, dbias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
    return (dx, *(None,) * 6, dA, dB, dm, None, dbias, None, None)


torch.library.register_autograd("lora_kernels::dora_linear", _backward_dora, setup_context=_setup_dora)
torch.library.register_autograd("lora_kernels::dora_linear_backward", _no_double_backward)


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """DoRA: y = c·(W0 + s·B·A)·x + bias with c = magnitude / ‖W0 + s·B·A‖₂ of every row.

    The norm comes from ‖w‖² + 2s·(A·w)·b + s²·bᵀ(A·Aᵀ)b by panels of rows, so that neither W0 nor W0 + s·B·A
    is ever whole; it is a constant for the gradient (section 4.3 of the paper, and PEFT). With dropout, as in
    PEFT, the change to the base output is what sees the dropped x, which takes a second product with W0:
    y = W0·x + (c-1)·W0·x' + c·s·B·A·x' + bias, x' = m⊙x/(1-p).

    Args:
        x: [..., K], as in `lora_linear`.
        weight: W0 [N, K], frozen, as in `lora_linear`.
        lora_A, lora_B: [r, K] and [N, r], any float dtype.
        magnitude: m [N], any float dtype; DoRA starts it at the row norms of W0.
        scaling, bias, dropout_p, rng: as in `lora_linear`.

    Returns:
        y [..., N] in x's dtype; differentiable in x, lora_A, lora_B, magnitude and bias. The gradient of the
        magnitude takes one more product with W0 in place of a kept tensor of y's size.

    Raises:
        ValueError, TypeError: as `lora_linear`.

    Source: Liu et al. 2024 (DoRA), equations 5 and 6.
    """
    x, parts, out_features = _base_arguments("dora_linear", x, weight)
    if dropout_p > 0 and rng is None:
        rng = dropout_rng(x.device)
    arguments = (out_features, lora_A, lora_B, magnitude, float(scaling), bias, float(dropout_p), rng)
    return torch.ops.lora_kernels.dora_linear.default(x, *parts, *arguments)[0]

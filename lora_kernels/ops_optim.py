"""The optimizers' steps as ops of namespace `lora_kernels`: schema, checks, fake kernels, and the call into a
backend. `lora_kernels.optim_state` has the layout of pages, `lora_kernels.reference_optim` the arithmetic.

    adamw_step, adamw8bit_step, lion_step, lion8bit_step
        params    fp32, bf16 or fp16, all of one dtype, contiguous, of any shape
        grads     as many elements, of that dtype or fp32, contiguous
        pages     uint8 [page_bytes], at a multiple of 64 bytes, on the device of the params
        segments  int64 [S, 7] on the CPU, a row for each piece of state:
                    page       index into pages
                    offset     bytes from the page's start to the piece, a multiple of 64
                    parameter  index into params
                    first, count  elements [first, first + count) of it, first a multiple of 256
                    step       the parameter's own number of this update, from 1 (bias correction)
                    id         a number of the parameter, for the random stream
        tick      a number of the call, not 0: a page whose header holds it is left alone, with the params of
                  its segments; another one is updated and then holds it. All pieces of a page belong into one
                  call; a step that was cut short is completed by the same calls again.
        rounding  of 16-bit params, whose arithmetic is fp32 with one rounding at the end: "nearest";
                  "stochastic", up or down by random words of (seed, id, step, element); or "kahan", where the
                  value is the parameter plus a compensation of its dtype, which keeps what the rounding lost

A NaN or an infinity in a gradient goes into its element's 32-bit state, and with AdamW into the parameter, as
in torch (Lion: the sign of NaN is 0). An 8-bit step leaves such an element alone, for it would spoil the 255
others that share its absmax.

Not differentiable: call them under torch.no_grad, with detached tensors.
"""

from collections.abc import Callable

import torch

from lora_kernels.backends import backend_for
from lora_kernels.checks_optim import check_hyper, check_step
from lora_kernels.ops import define_op
from lora_kernels.reference_optim import Hyper


def _step(op: str, params, grads, pages, segments, tick: int, h: Hyper) -> None:
    check_hyper(op, tick, h)
    device = (*pages, *params, segments)[0].device
    if device.type == "meta":
        check_step(op, params, grads, pages, segments, h.rounding)
        return
    if not getattr(backend_for(device), op)(params, grads, pages, segments, tick, h):
        check_step(op, params, grads, pages, segments, h.rounding)
        raise RuntimeError(f"{op}: the kernel refused arguments in which the checks find no fault")
    torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])


def _fake(op: str, params, grads, pages, segments, tick: int, h: Hyper) -> None:
    check_hyper(op, tick, h)
    check_step(op, params, grads, pages, segments, h.rounding)


_TENSORS = "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] pages, Tensor segments, int tick"


def _define_adamw(op: str) -> Callable[..., None]:
    def function(params, grads, pages, segments, tick, lr, beta1, beta2, eps, weight_decay, rounding, seed):
        h = Hyper(lr, beta1, beta2, eps, weight_decay, rounding, seed)
        _step(op, params, grads, pages, segments, tick, h)

    def fake(params, grads, pages, segments, tick, lr, beta1, beta2, eps, weight_decay, rounding, seed):
        h = Hyper(lr, beta1, beta2, eps, weight_decay, rounding, seed)
        _fake(op, params, grads, pages, segments, tick, h)

    schema = (
        f"{op}({_TENSORS}, float lr, float beta1, float beta2, float eps, float weight_decay, str rounding, "
        "int seed) -> ()"
    )
    return define_op(schema, function, fake)


def _define_lion(op: str) -> Callable[..., None]:
    def function(params, grads, pages, segments, tick, lr, beta1, beta2, weight_decay, rounding, seed):
        h = Hyper(lr, beta1, beta2, 0.0, weight_decay, rounding, seed)
        _step(op, params, grads, pages, segments, tick, h)

    def fake(params, grads, pages, segments, tick, lr, beta1, beta2, weight_decay, rounding, seed):
        h = Hyper(lr, beta1, beta2, 0.0, weight_decay, rounding, seed)
        _fake(op, params, grads, pages, segments, tick, h)

    schema = (
        f"{op}({_TENSORS}, float lr, float beta1, float beta2, float weight_decay, str rounding, int seed) "
        "-> ()"
    )
    return define_op(schema, function, fake)


adamw_step = _define_adamw("adamw_step")
adamw8bit_step = _define_adamw("adamw8bit_step")
lion_step = _define_lion("lion_step")
lion8bit_step = _define_lion("lion8bit_step")

"""What the optimizers' steps refuse, and what torch makes of them as ops."""

import pytest
import torch
from optim_cases import HYPER, OPS, Problem, aligned_page, run, step_op
from torch.library import opcheck

import lora_kernels as lk
from lora_kernels.optim_state import optim_state_bytes


def arguments(op="adamw_step", n=600, dtype=torch.float32):
    page = aligned_page(64 + optim_state_bytes(op, n, dtype, "nearest"))
    segments = torch.tensor([[0, 64, 0, 0, n, 1, 0]])
    return {
        "op": op,
        "params": [torch.randn(n).to(dtype)],
        "grads": [torch.randn(n).to(dtype)],
        "pages": [page],
        "segments": segments,
        "tick": 1,
    }


def segment(made, **columns):
    names = ("page", "offset", "parameter", "first", "count", "step", "id")
    row = made["segments"][0].tolist()
    for name, value in columns.items():
        row[names.index(name)] = value
    return {**made, "segments": torch.tensor([[0, 64, 0, 0, 0, 1, 0], row])}


REFUSED = {
    "params and grads": (lambda a: {**a, "grads": []}, ValueError, "1 params and 0 grads"),
    "params dtype": (
        lambda a: {**a, "params": [a["params"][0].double()]},
        TypeError,
        r"params\[0\] has dtype torch.float64",
    ),
    "mixed params": (
        lambda a: {
            **a,
            "params": [a["params"][0], a["params"][0].half()],
            "grads": [a["grads"][0], a["grads"][0].half()],
        },
        TypeError,
        r"params\[1\] has dtype torch.float16, expected float32",
    ),
    "grads dtype": (
        lambda a: {**a, "grads": [a["grads"][0].bfloat16()]},
        TypeError,
        r"grads\[0\] has dtype torch.bfloat16, expected float32",
    ),
    "grads size": (
        lambda a: {**a, "grads": [a["grads"][0][1:]]},
        ValueError,
        r"grads\[0\] has 599 elements, expected the 600",
    ),
    "params transposed": (
        lambda a: {**a, "params": [a["params"][0].view(20, 30).t()]},
        ValueError,
        r"params\[0\] has shape \(30, 20\) and strides \(1, 30\), expected a contiguous tensor",
    ),
    "pages shape": (
        lambda a: {**a, "pages": [a["pages"][0].view(2, -1)]},
        ValueError,
        r"pages\[0\] has shape \(2, \d+\), expected one dimension",
    ),
    "params strides": (
        lambda a: {**a, "params": [torch.randn(1200)[::2]]},
        ValueError,
        r"params\[0\] has shape \(600,\) and strides \(2,\)",
    ),
    "grads strides": (
        lambda a: {**a, "grads": [torch.randn(1200)[::2]]},
        ValueError,
        r"grads\[0\] has shape \(600,\) and strides \(2,\)",
    ),
    "pages dtype": (
        lambda a: {**a, "pages": [a["pages"][0].view(torch.int32)]},
        TypeError,
        r"pages\[0\] has dtype torch.int32",
    ),
    "pages size": (
        lambda a: {**a, "pages": [a["pages"][0][:63]]},
        ValueError,
        r"pages\[0\] has 63 bytes",
    ),
    "pages address": (
        lambda a: {**a, "pages": [aligned_page(9000)[16:]]},
        ValueError,
        r"pages\[0\] does not start at a multiple of 64",
    ),
    "segments dtype": (
        lambda a: {**a, "segments": a["segments"].int()},
        TypeError,
        "segments has dtype torch.int32",
    ),
    "segments shape": (
        lambda a: {**a, "segments": a["segments"][:, :6]},
        ValueError,
        r"segments has shape \(1, 6\) on cpu, expected \[S, 7\]",
    ),
    "segments strides": (
        lambda a: {**a, "segments": a["segments"].repeat(2, 1)[::2].expand(3, 7)},
        ValueError,
        r"segments has strides \(0, 1\)",
    ),
    "device": (
        lambda a: {**a, "grads": [a["grads"][0].to("meta")]},
        ValueError,
        r"grads\[0\] is on meta",
    ),
    "page below": (lambda a: segment(a, page=-1), ValueError, "page -1, expected 0 to 0"),
    "page above": (lambda a: segment(a, page=1), ValueError, "page 1, expected 0 to 0"),
    "parameter below": (lambda a: segment(a, parameter=-1), ValueError, "parameter -1, expected 0 to 0"),
    "parameter above": (lambda a: segment(a, parameter=1), ValueError, "parameter 1, expected 0 to 0"),
    "over the header": (lambda a: segment(a, offset=0), ValueError, "offset 0, expected a multiple of 64"),
    "offset": (lambda a: segment(a, offset=96, count=1), ValueError, "offset 96, expected"),
    "outside the page": (lambda a: segment(a, offset=128), ValueError, "offset 128, expected"),
    "far outside": (lambda a: segment(a, offset=2**62), ValueError, "offset 4611686018427387904"),
    "first": (lambda a: segment(a, first=128, count=1), ValueError, "first 128, expected a multiple of 256"),
    "first below": (lambda a: segment(a, first=-256, count=1), ValueError, "first -256, expected"),
    "count": (lambda a: segment(a, first=256, count=345), ValueError, "count 345, expected"),
    "count below": (lambda a: segment(a, count=-1), ValueError, "count -1, expected"),
    "count that overflows": (lambda a: segment(a, count=2**62), ValueError, "count 4611686018427387904"),
    "step": (lambda a: segment(a, step=0), ValueError, "step 0, expected 1"),
    "id": (lambda a: segment(a, id=-1), ValueError, "id -1, expected 0"),
    "id above": (lambda a: segment(a, id=2**32), ValueError, "id 4294967296, expected 0"),
    "tick": (lambda a: {**a, "tick": 0}, ValueError, "tick is 0, expected 1"),
    "lr": (lambda a: {**a, "lr": -1.0}, ValueError, "lr is -1.0"),
    "lr that is NaN": (lambda a: {**a, "lr": float("nan")}, ValueError, "lr is nan"),
    "beta1": (lambda a: {**a, "beta1": 1.0}, ValueError, "beta1 is 1.0, expected 0 <= beta1 < 1"),
    "beta2": (lambda a: {**a, "beta2": -0.1}, ValueError, "beta2 is -0.1"),
    "eps": (lambda a: {**a, "eps": -1e-8}, ValueError, "eps is -1e-08"),
    "weight_decay": (lambda a: {**a, "weight_decay": float("inf")}, ValueError, "weight_decay is inf"),
    "rounding": (lambda a: {**a, "rounding": "up"}, ValueError, "rounding is 'up', expected one of nearest"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_errors_name_the_argument_and_nothing_is_done(backend, what):
    change, kind, message = REFUSED[what]
    made = arguments()
    before = [t.clone() for t in (*made["params"], *made["pages"])]
    with pytest.raises(kind, match=f"^adamw_step: .*{message}"):
        run(**change(made))
    for tensor, old in zip((*made["params"], *made["pages"]), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, rounding):
    made = arguments(op, dtype=torch.bfloat16)
    made["pages"] = [aligned_page(64 + optim_state_bytes(op, 600, torch.bfloat16, rounding))]
    numbers = [v for k, v in HYPER.items() if k != "eps" or op.startswith("adamw")]
    tensors = (made["params"], made["grads"], made["pages"], made["segments"])
    # The schema test copies its arguments, which then start at no multiple of 64.
    opcheck(
        step_op(op).default,
        (*tensors, 1, *numbers, rounding, 3),
        test_utils=("test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("op", OPS)
def test_a_step_compiles(op):
    params, grads = [torch.randn(300), torch.randn(70)], [torch.randn(300), torch.randn(70)]
    eager, compiled = Problem(op, params), Problem(op, params)

    def step(problem, step):
        problem.step(grads, step)

    eager.step(grads, 1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run_compiled(params, grads, pages, segments):
        run(op, params, grads, pages, segments, 1)

    run_compiled(compiled.params, grads, compiled.pages, compiled.segments(1))
    compiled.assert_same(eager)


def test_a_step_is_an_in_place_change_to_autograd():
    """A parameter that backward has saved, and that a step then changes, is an error as with torch.optim."""
    weight = torch.randn(300, requires_grad=True)
    loss = (weight.sin() * weight).sum()
    made = arguments(n=300)
    with torch.no_grad():
        run(**{**made, "params": [weight.detach()]})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_compiled_check_and_the_one_in_python_agree():
    """What the kernels refuse is what `check_step` names: random tables, most of them faulty."""
    refused = 0
    for _ in range(300):
        made = arguments(n=600)
        column, value = int(torch.randint(7, ())), int(torch.randint(-2, 2000, ()))
        table = torch.tensor([[0, 64, 0, 0, 64, 1, 0]] * 3)
        table[int(torch.randint(3, ())), column] = value * (64 if column == 1 else 1)
        outcomes = []
        for backend in ("cpu", "reference"):
            try:
                with lk.use_backend(backend):
                    run(**{**made, "segments": table, "tick": 1 if backend == "cpu" else 2})
                outcomes.append(None)
            except ValueError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        refused += outcomes[0] is not None
    assert 30 < refused < 290

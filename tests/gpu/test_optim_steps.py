"""The optimizers' steps on the device give the CPU's bits: a run may change its device between two steps."""

import pytest
import torch
from optim_cases import DTYPES, OPS, ROUNDINGS, Problem, run

CASES = [
    (op, dtype, rounding)
    for op in OPS
    for dtype in DTYPES
    for rounding in (("nearest",) if dtype == torch.float32 else ROUNDINGS)
]


def on(device, problem: Problem) -> Problem:
    """The same parameters, cut alike, with fresh pages on the device."""
    params = [p.to(device) for p in problem.params]
    return Problem(problem.op, params, problem.rounding, problem.piece, problem.page_pieces)


def assert_same(device_problem: Problem, cpu_problem: Problem) -> None:
    for mine, theirs in zip(device_problem.params, cpu_problem.params, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    state = device_problem.state()
    for key, value in cpu_problem.state().items():
        assert torch.equal(state[key].cpu(), value), key
    for page in device_problem.pages:
        assert not page[8:64].any()  # the counter of arrivals is 0 again


@pytest.mark.parametrize(("op", "dtype", "rounding"), CASES, ids=str)
def test_the_bits_are_those_of_the_cpu(op, dtype, rounding, device):
    sizes = (1, 255, 256, 257, 5003, 0, 300_001)
    cpu = Problem(op, [torch.randn(n).to(dtype) for n in sizes], rounding, piece=16_384)
    cuda = on(device, cpu)
    for step in range(1, 6):
        grads = [
            (torch.randn(n) * 10.0 ** (step - 3)).to(dtype if step % 2 else torch.float32) for n in sizes
        ]
        cpu.step(grads, step)
        cuda.step([g.to(device) for g in grads], step)
    assert_same(cuda, cpu)


@pytest.mark.parametrize("op", OPS)
def test_a_thousand_adapters_take_several_launches_and_pages_count_through_them(op, device):
    """2,000 parameters, whose table no launch holds; the pages' pieces are spread over all launches."""
    sizes = [16 * 64] * 2000
    cpu = Problem(op, [torch.randn(n).bfloat16() for n in sizes], "stochastic", piece=512, page_pieces=300)
    order = torch.randperm(cpu.rows.shape[0])
    cpu.rows = cpu.rows[order]
    cuda = on(device, cpu)
    cuda.rows = cuda.rows[order]
    for step in (1, 2):
        grads = [torch.randn(n).bfloat16() for n in sizes]
        cpu.step(grads, step)
        cuda.step([g.to(device) for g in grads], step)
    assert_same(cuda, cpu)


def test_views_at_any_address(device):
    flat, grad = torch.randn(70_000).bfloat16(), torch.randn(70_000).bfloat16()
    cpu = Problem("adamw8bit_step", [flat[3:40_003], flat[40_004:69_999]], "kahan", piece=8192)
    cuda = on(device, cpu)
    whole = flat.to(device)
    cuda.params = [whole[3:40_003], whole[40_004:69_999]]
    for step in (1, 2, 3):
        cpu.step([grad[3:40_003], grad[40_004:69_999]], step)
        on_device = grad.to(device)
        cuda.step([on_device[3:40_003], on_device[40_004:69_999]], step)
    assert_same(cuda, cpu)


def test_a_repeated_call_changes_nothing(device):
    problem = Problem("adamw_step", [torch.randn(100_000, device=device)], piece=4096, page_pieces=2)
    grads = [torch.randn(100_000, device=device)]
    problem.step(grads, 1, tick=9)
    before = problem.params[0].clone()
    problem.step(grads, 1, tick=9)
    assert torch.equal(problem.params[0], before)
    assert all(int(page[:8].view(torch.int64)) == 9 for page in problem.pages)


def test_a_step_is_ordered_by_its_stream(device):
    """Gradients that a side stream still computes when the step is called on it."""
    cpu = Problem("adamw_step", [torch.randn(1 << 20)], piece=1 << 16)
    cuda = on(device, cpu)
    grad = torch.randn(1 << 20)
    stream = torch.cuda.Stream()
    there = grad.to(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow = torch.randn(4096, 4096, device=device)
        for _ in range(10):
            slow = slow @ slow * 1e-3
        late = there + 0 * slow[0, 0].nan_to_num(0, 0, 0)
        cuda.step([late], 1)
    stream.synchronize()
    cpu.step([grad], 1)
    assert_same(cuda, cpu)


def test_errors_are_those_of_the_cpu(device):
    problem = Problem("adamw_step", [torch.randn(1000, device=device)])
    with pytest.raises(ValueError, match=r"grads\[0\] is on cpu"):
        problem.step([torch.randn(1000)], 1)
    rows = problem.segments(1)
    rows[0, 1] = 0
    with pytest.raises(ValueError, match="offset 0, expected a multiple of 64"):
        run("adamw_step", problem.params, [torch.randn(1000, device=device)], problem.pages, rows, 1)

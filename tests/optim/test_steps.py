"""adamw_step, adamw8bit_step, lion_step, lion8bit_step: every backend against the reference, and what holds
for all of them."""

import math

import pytest
import torch
from optim_cases import (
    DTYPES,
    HYPER,
    OPS,
    ROUNDINGS,
    Problem,
    aligned_page,
    assert_same_bits,
    run,
)

import lora_kernels as lk
from lora_kernels.backends.native import select_cpu_isa
from lora_kernels.optim_state import dequantize_blockwise, optim_state_bytes
from lora_kernels.reference_optim import Hyper, lion_update, random_words, stochastic_round

SIZES = (1, 255, 256, 257, 700, 2048, 5003, 0)  # tails of every kind, and an empty parameter
SIXTEEN = (torch.bfloat16, torch.float16)


def tensors(dtype=torch.float32, sizes=SIZES, scale=1.0):
    return [(scale * torch.randn(n)).to(dtype) for n in sizes]


def modes(dtype):
    return ("nearest",) if dtype == torch.float32 else ROUNDINGS


CASES = [(op, dtype, rounding) for op in OPS for dtype in DTYPES for rounding in modes(dtype)]


@pytest.mark.parametrize(("op", "dtype", "rounding"), CASES)
def test_every_backend_gives_the_bits_of_the_reference(kernels, op, dtype, rounding):
    params = tensors(dtype)
    mine, reference = (Problem(op, params, rounding) for _ in range(2))
    for step in range(1, 5):
        grad_dtype = dtype if step % 2 else torch.float32
        grads = [g.to(grad_dtype) for g in tensors(scale=10.0 ** (step - 3))]
        mine.step(grads, step)
        with lk.use_backend("reference"):
            reference.step(grads, step)
        mine.assert_same(reference)
    for page in mine.pages:
        assert page[:8].view(torch.int64).item() == 4 and not page[8:64].any()


@pytest.mark.parametrize("op", OPS)
def test_parameters_and_gradients_may_start_anywhere(kernels, op):
    """Views of a flat buffer, as of a fused parameter: at no multiple of 16 bytes."""
    for dtype in DTYPES:
        flat, flat_grads = tensors(dtype, (1700,))[0], tensors(dtype, (1700,))[0]
        problem = Problem(op, [flat[3:803], flat[804:1604]], "nearest")
        whole = torch.zeros(1700, dtype=dtype)
        whole.copy_(flat)
        problem.params = [whole[3:803], whole[804:1604]]
        aligned = Problem(op, [p.clone() for p in problem.params], "nearest")
        grads = [flat_grads[3:803], flat_grads[804:1604]]
        problem.step(grads, 1)
        aligned.step([g.clone() for g in grads], 1)
        problem.assert_same(aligned)
        outside = torch.ones(1700, dtype=torch.bool)
        outside[3:803] = outside[804:1604] = False
        assert torch.equal(whole[outside], flat[outside])


# ---- what is computed --------------------------------------------------------------------------------------


def test_adamw_follows_torch_over_200_steps(backend):
    sizes = (1000, 333)
    start, target = tensors(sizes=sizes), tensors(sizes=sizes)
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    h = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine = Problem("adamw_step", start)
    for step in range(1, 201):
        for p, t in zip(theirs, target, strict=True):
            p.grad = t + torch.randn_like(t)
        optimizer.step()
        mine.step([p.grad for p in theirs], step, **h)
    for p, q, s in zip(mine.params, theirs, start, strict=True):
        assert (p - q.data).norm() <= 1e-6 * q.data.norm()
        assert (p - q.data).abs().max() <= 1e-6 * q.data.abs().max()
        assert (q.data - s).norm() > 0.3 * s.norm()  # it moved
    state = mine.state()
    for i, q in enumerate(theirs):
        for name in ("exp_avg", "exp_avg_sq"):
            wanted = optimizer.state[q][name]
            assert (state[i, name] - wanted).norm() <= 1e-6 * wanted.norm()


def test_each_parameter_has_its_own_step_number(backend):
    """Two parameters in one call, one of which joined later, are corrected each for its own age."""
    start, grads = tensors(sizes=(300, 300)), [tensors(sizes=(300, 300)) for _ in range(3)]
    together = Problem("adamw_step", start)
    rows = together.segments(0)
    for step in (1, 2, 3):
        present = [1] if step == 1 else [0, 1]
        rows[:, 5] = torch.tensor([step - 1, step])[rows[:, 2]]
        chosen = rows[torch.isin(rows[:, 2], torch.tensor(present))]
        run("adamw_step", together.params, grads[step - 1], together.pages, chosen, step)
    for i, first in ((0, 1), (1, 0)):
        alone = Problem("adamw_step", [start[i]])
        for step, g in enumerate(grads[first:], 1):
            alone.step([g[i]], step)
        assert_same_bits(together.params[i], alone.params[0])


def test_lion_takes_the_sign_and_then_updates_its_momentum(backend):
    p, g = tensors(sizes=(500,)), tensors(sizes=(500,))
    g[0][:50] = 0  # the sign of 0 is 0
    mine = Problem("lion_step", p)
    mine.step(g, 1)
    h = Hyper(**HYPER)
    wanted = p[0].double() * (1 - h.lr * h.weight_decay) - h.lr * g[0].double().sign()
    torch.testing.assert_close(mine.params[0].double(), wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mine.state()[0, "exp_avg"], (1 - h.beta2) * g[0])
    before = mine.params[0].clone()
    mine.step([-0.1 * g[0]], 2)  # β1·m + (1-β1)·g: the new gradient outweighs the old momentum's 0.9 % of it
    c = h.beta1 * (1 - h.beta2) * g[0] - (1 - h.beta1) * 0.1 * g[0]
    wanted = before.double() * (1 - h.lr * h.weight_decay) - h.lr * c.double().sign()
    torch.testing.assert_close(mine.params[0].double(), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["adamw8bit_step", "lion8bit_step"])
def test_8_bit_state_stays_within_the_tolerances_of_bitsandbytes_tests(backend, op, dtype):
    """The method and the bounds of bitsandbytes' own tests/test_optim.py, test_optimizer8bit: against fp32,
    over 50 steps, after each of which parameters and state are made the same again."""
    n, adamw = 32 * 1024, op.startswith("adamw")
    p2 = (torch.randn(n) * 0.1).to(dtype)
    p1 = torch.nn.Parameter(p2.float())
    lr, betas = (1e-3, (0.9, 0.999)) if adamw else (1e-4, (0.9, 0.99))
    wide = torch.optim.AdamW([p1], lr=lr, betas=betas, eps=1e-8, weight_decay=0.0) if adamw else None
    momentum = torch.zeros(n)
    mine = Problem(op, [p2], piece=8192)
    numbers = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": 1e-8, "weight_decay": 0.0}
    for step in range(1, 51):
        g = (torch.randn(n) * 0.01).to(dtype)
        if adamw:
            p1.grad = g.float()
            wide.step()
            exact = {"state1": wide.state[p1]["exp_avg"], "state2": wide.state[p1]["exp_avg_sq"]}
        else:
            new, momentum = lion_update(p1.data, g.float(), momentum, Hyper(**numbers))
            p1.data.copy_(new)
            exact = {"state1": momentum}
        mine.step([g], step, **numbers)
        state = mine.state()
        for name, wanted in exact.items():
            absmax = state[0, "absmax" + name[-1]]
            got = dequantize_blockwise(state[0, name], absmax, signed=name == "state1")
            assert (~torch.isclose(wanted, got, atol=3e-3, rtol=1e-3)).sum() < 20
            wanted.copy_(got)
        error = (p1.data - mine.params[0].float()).abs()
        relative = error / (p1.data.abs() + 1e-9)
        assert error.mean() < (0.00017 if dtype == torch.bfloat16 else 0.00006)
        bound = 0.0016 if dtype == torch.bfloat16 else 0.00062 if not adamw else 0.0006
        assert relative.mean() < bound
        p1.data.copy_(p1.data.to(dtype))
        mine.params[0].copy_(p1.data)


def test_8_bit_training_reaches_what_32_bit_training_does(backend):
    """A trajectory without any making equal: the distance to a target falls alike."""
    target = torch.randn(2000)
    problems = {op: Problem(op, [torch.zeros(2000)]) for op in ("adamw_step", "adamw8bit_step")}
    for step in range(1, 101):
        noise = 0.1 * torch.randn(2000)
        for problem in problems.values():
            problem.step([problem.params[0] - target + noise], step, weight_decay=0.0)
    wide, narrow = (problems[op].params[0] for op in ("adamw_step", "adamw8bit_step"))
    assert (narrow - wide).norm() < 0.05 * wide.norm()
    assert (wide - target).norm() < 0.7 * target.norm()


# ---- ticks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_a_page_is_updated_once_a_tick(backend, op):
    """A call that is repeated changes nothing; where one page had not been done, that one is completed."""
    params, grads = tensors(torch.bfloat16), tensors(torch.bfloat16)
    problem, whole = (Problem(op, params, "kahan", piece=512, page_pieces=2) for _ in range(2))
    assert len(problem.pages) > 5  # more than a launch of the stand-in holds
    whole.step(grads, 1, tick=17)
    rows, some = problem.segments(1), list(range(0, len(problem.pages), 2))
    part = rows[torch.isin(rows[:, 0], torch.tensor(some))]
    part[:, 0] = torch.tensor([some.index(int(page)) for page in part[:, 0]])
    run(op, problem.params, grads, [problem.pages[i] for i in some], part, 17, "kahan")
    ticks = [int(page[:8].view(torch.int64)) for page in problem.pages]
    assert ticks == [17 if i in some else 0 for i in range(len(ticks))]
    for _ in range(2):
        problem.step(grads, 1, tick=17)
        problem.assert_same(whole)
        assert all(int(page[:8].view(torch.int64)) == 17 for page in problem.pages)
    problem.step(grads, 2, tick=18)
    assert not torch.equal(problem.params[6], whole.params[6])


def test_pages_without_segments_get_the_tick_too(backend):
    pages = [aligned_page(128) for _ in range(8)]
    run("adamw_step", [], [], pages, torch.empty(0, 7, dtype=torch.int64), 5)
    empty = torch.tensor([[0, 64, 0, 0, 0, 1, 0]])  # a segment of no elements
    run("adamw_step", [torch.empty(0)], [torch.empty(0)], pages[:1], empty, 6)
    assert [int(page[:8].view(torch.int64)) for page in pages] == [6] + [5] * 7
    assert not any(page[8:].any() for page in pages)
    run("adamw_step", [], [], [], torch.empty(0, 7, dtype=torch.int64), 7)


# ---- what results do not depend on -------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "rounding"), [(op, r) for op in OPS for r in ("stochastic", "kahan")])
def test_the_cutting_into_pieces_and_pages_changes_no_bit(backend, op, rounding):
    for dtype in SIXTEEN:
        params = tensors(dtype)
        cuts = [(1024, 3, False), (256, 50, True), (8192, 1, False)]
        problems = [Problem(op, params, rounding, *cut) for cut in cuts]
        for step in range(1, 4):
            grads = tensors(dtype)
            for problem in problems:
                problem.step(grads, step)
        for other in problems[1:]:
            problems[0].assert_same(other)


@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(op):
    sizes = (100_003, 5, 70_000)
    params, grads = tensors(torch.bfloat16, sizes), tensors(torch.bfloat16, sizes)
    before, problems = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            problem = Problem(op, params, "stochastic", piece=16_384)
            for step in (1, 2):
                problem.step(grads, step)
        finally:
            torch.set_num_threads(before)
        problems.append(problem)
    for other in problems[1:]:
        problems[0].assert_same(other)


# ---- rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_stochastic_rounding_has_the_right_mean(backend, dtype):
    """A change of a tenth of the distance to the next value: nearest never takes it, stochastic a tenth of
    the time; and the draws differ between elements, steps, ids and seeds."""
    n = 40_000
    p, unit = torch.ones(n, dtype=dtype), torch.finfo(dtype).eps
    numbers = {"lr": 0.1 * unit, "weight_decay": 0.0}  # Lion moves by lr, up
    nearest, random = (Problem("lion_step", [p], rounding) for rounding in ("nearest", "stochastic"))
    for problem in (nearest, random):
        problem.step([-torch.ones(n, dtype=dtype)], 1, **numbers)
    assert torch.equal(nearest.params[0], p)
    moved = random.params[0] != p
    assert abs(moved.float().mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / n)
    assert bool((random.params[0][moved].float() == 1 + unit).all())
    others = []
    for seed, step, id in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        other = Problem("lion_step", [p], "stochastic")
        other.rows[:, 6] = id
        other.step([-torch.ones(n, dtype=dtype)], step, seed=seed, **numbers)
        others.append(other.params[0] != p)
    for other in others:  # independent: a tenth of a tenth in common
        both = (moved & other).float().mean()
        assert abs(both - 0.01) < 5 * math.sqrt(0.01 * 0.99 / n)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_stochastic_rounding_is_exact_in_its_limits(dtype):
    """The reference's rounding, which all backends copy: the two neighbours and no other value, the mean of
    the draws over all words, subnormal results, exact values, the largest finite one, infinities and NaN."""
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).tiny  # the least normal one
    values = torch.cat([torch.randn(200), torch.randn(200) * tiny, torch.rand(200) * tiny * 1e-2])
    for x in values.tolist():
        words = torch.linspace(0, 2**32 - 1, 4097).long()
        rounded = stochastic_round(torch.full((4097,), x), words, dtype).double()
        exact = torch.tensor(x, dtype=torch.float32).double()
        low, high = rounded.min(), rounded.max()
        assert low <= exact <= high or low == high
        assert rounded.unique().numel() <= 2
        assert (rounded.mean() - exact).abs() <= (high - low) * 2 / 4096 + 2.0**-160
    words = torch.randint(2**32, (6,))
    inf = math.inf
    special = torch.tensor([inf, -inf, math.nan, largest, -largest, 0.0])
    rounded = stochastic_round(special, words, dtype).float()
    assert torch.equal(rounded.isnan(), special.isnan())
    assert torch.equal(rounded[[0, 1, 3, 4, 5]], special[[0, 1, 3, 4, 5]])
    above = torch.full((6,), largest * (1 + 1e-4))  # finite: no infinity comes of it
    assert bool((stochastic_round(above, words, dtype).float() == largest).all())
    if dtype == torch.float16:
        assert bool(stochastic_round(torch.full((6,), 65536.0), words, dtype).isinf().all())


def test_random_words_are_those_of_each_element_alone():
    words = random_words(512, 300, step=9, id=2**32 - 1, seed=-5, device="cpu")
    for i in (0, 1, 7, 299):
        assert random_words(512 + i, 1, 9, 2**32 - 1, -5, "cpu").item() == words[i]
    assert words.min() >= 0 and words.max() < 2**32 and words.unique().numel() == 300


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("op", OPS)
def test_kahan_adds_up_updates_that_nearest_loses(backend, op, dtype):
    """300 updates of a hundredth of the distance to the next value."""
    n, unit, steps = 512, torch.finfo(dtype).eps, 300
    numbers = {"lr": 0.01 * unit, "weight_decay": 0.0}
    start = -torch.ones(n, dtype=dtype)
    errors = {}
    for rounding in ("nearest", "kahan"):
        problem = Problem(op, [start], rounding)
        for step in range(1, steps + 1):
            # Positive: the signed map has a 1, but no -1.
            problem.step([torch.ones(n, dtype=dtype)], step, **numbers)
        value = problem.params[0].double()
        if rounding == "kahan":
            value = value + problem.state()[0, "compensation"].double()
        errors[rounding] = (value + 1 + steps * 0.01 * unit).abs().max() / unit
    assert errors["nearest"] > 2.9  # it never moved
    # What is left: the compensation is itself rounded, 300 times, to 2^-9 (fp16: 2^-12) of that distance.
    assert errors["kahan"] < (0.07 if dtype == torch.bfloat16 else 0.004)


def test_kahan_forgets_its_compensation_where_a_parameter_overflows(backend):
    p = torch.full((300,), 65504.0, dtype=torch.float16)
    problem = Problem("lion_step", [p], "kahan")
    problem.step([-torch.ones(300)], 1, lr=100.0, weight_decay=0.0)
    assert bool(problem.params[0].isinf().all())
    assert not problem.state()[0, "compensation"].any()


# ---- NaN and infinities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("op", ["adamw8bit_step", "lion8bit_step"])
def test_an_element_that_is_not_finite_is_left_alone_by_8_bit_steps(backend, op, bad):
    """Its 255 neighbours, with which it shares an absmax, get what they would get beside a zero gradient."""
    p, first, second = (torch.randn(1000) for _ in range(3))
    if bad == 1e25 and op == "lion8bit_step":
        pytest.skip("no square that overflows")
    problem = Problem(op, [p])
    problem.step([first], 1)
    kept = {key: value.clone() for key, value in problem.state().items()}
    param = problem.params[0].clone()
    at = torch.tensor([3, 500, 999])
    second[at] = bad
    problem.step([second], 2)
    assert torch.equal(problem.params[0][at], param[at])
    others = torch.ones(1000, dtype=torch.bool)
    others[at] = False
    assert bool(problem.params[0].isfinite().all())
    assert bool((problem.params[0] != param)[others].float().mean() > 0.99)
    state = problem.state()
    for key in (k for k in ("1", "2") if (0, "state" + k) in state):
        old, new = (
            dequantize_blockwise(s[0, "state" + key], s[0, "absmax" + key], key == "1") for s in (kept, state)
        )
        scale = state[0, "absmax" + key].repeat_interleave(256)[:1000]
        assert bool(new.isfinite().all())
        assert bool(((new - old).abs()[at] <= 0.02 * scale[at]).all())  # coded anew


def test_a_nan_stays_with_its_element_in_32_bit_steps(backend):
    """As in torch: it is seen in the parameter and in the state, and nowhere else."""
    for op in ("adamw_step", "lion_step"):
        p, g = torch.randn(600), torch.randn(600)
        g[300] = math.nan
        problem = Problem(op, [p])
        problem.step([g], 1)
        for (_, name), value in problem.state().items():
            assert value.isnan().nonzero().tolist() == [[300]], name
        if op == "adamw_step":
            assert problem.params[0].isnan().nonzero().tolist() == [[300]]
        else:  # the sign of NaN is 0
            assert problem.params[0][300] == p[300] * torch.tensor(1 - HYPER["lr"] * HYPER["weight_decay"])


# ---- the instruction sets ----------------------------------------------------------------------------------


def test_a_switch_of_instruction_set_between_steps_changes_no_bit():
    from lora_kernels.backends.native import CPU_ISAS, cpu_isa

    before = cpu_isa()
    problems = [Problem("adamw8bit_step", tensors(torch.bfloat16), "kahan")]
    problems.append(Problem("adamw8bit_step", problems[0].params, "kahan"))
    try:
        for step in range(1, 7):
            grads = tensors(torch.bfloat16)
            problems[0].step(grads, step)
            select_cpu_isa(CPU_ISAS[step % len(CPU_ISAS)])
            problems[1].step(grads, step)
    finally:
        select_cpu_isa(before)
    problems[0].assert_same(problems[1])


def test_state_of_zeros_is_a_page_of_zeros(backend):
    """A fresh page needs no initialisation: a step from it is a step from a state of zeros, in every op."""
    p, g = torch.randn(900), torch.randn(900)
    steps = {}
    for op in OPS:
        problem = Problem(op, [p])
        problem.step([g], 1)
        steps[op] = problem.params[0]
    assert torch.equal(steps["adamw_step"], steps["adamw8bit_step"])  # the update uses the exact new state
    assert torch.equal(steps["lion_step"], steps["lion8bit_step"])
    assert optim_state_bytes("adamw8bit_step", 256, torch.float32, "nearest") == 576

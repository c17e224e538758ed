"""lora_linear_decode on the device, clustered and not: float64 truth for every class of problem it takes.

Also what only a device shows: launches on many streams at once, CUDA graphs, and the same bits every time.
"""

from typing import NamedTuple

import pytest
import torch
from numerics import assert_accurate

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.backends import cuda, native
from lora_kernels.backends.cuda_launchers import (
    CLUSTER,
    GLOBAL_MEMORY,
    MOST_DECODE_TOKENS,
    CudaLaunchers,
)
from lora_kernels.base_weight import BaseWeight

DTYPES = (torch.bfloat16, torch.float16)
SCALING = 0.7


class Problem(NamedTuple):
    """A problem class; the defaults are the plainest one. `adapter` None: of x's dtype."""

    tokens: int = 3
    n: int = 200
    k: int = 1024
    rank: int = 16
    blocksize: int = 64  # 0: a dense W0
    double_quant: bool = True
    adapter: torch.dtype | None = None
    bias: bool = True
    shift: int = 0  # x, A and B are wider tensors' columns from here on. 8: their rows still lie on 16 bytes

    def __str__(self) -> str:
        plain = self._field_defaults
        changed = [f"{name}={value}" for name, value in self._asdict().items() if value != plain[name]]
        return " ".join(changed) or "plain"


PROBLEMS = (
    *(Problem(tokens=t) for t in range(1, MOST_DECODE_TOKENS + 1)),
    *(Problem(n=n) for n in (1, 15, 17, 63, 64, 65, 129, 3420)),
    # One unit; tails of one and of three units behind whole chunks; one slice, several, more than 8.
    *(Problem(n=n, k=k) for n in (40, 576) for k in (64, 192, 256, 576, 1088, 4160, 14336)),
    *(Problem(rank=r) for r in (0, 1, 8, 15, 17, 40, 256)),
    Problem(rank=256, k=4160),
    Problem(rank=0, bias=False, tokens=1),
    *(
        Problem(blocksize=b, k=8192, n=100, double_quant=d)
        for b in (64, 128, 1024, 4096)
        for d in (True, False)
    ),
    *(Problem(blocksize=0, k=k, tokens=8) for k in (64, 576, 1088, 4096, 14336)),
    *(Problem(adapter=a, rank=r) for a in (torch.float32, torch.bfloat16, torch.float16) for r in (16, 18)),
    *(Problem(shift=s, adapter=a, rank=18) for s in (3, 8) for a in (None, torch.float32)),
    Problem(tokens=8, n=4096, k=4096),
    Problem(tokens=1, n=14336, k=4096),
)
ROUTES = ("counters", "clustered")
EXCHANGES = {"counters": GLOBAL_MEMORY, "clustered": CLUSTER}


def launchers(route: str, device: torch.device) -> CudaLaunchers:
    """Those of the library, made to take one route."""
    clustered = route == "clustered"
    if clustered and cuda._capability(device) < 90:
        pytest.skip("no clusters: they need a GPU of sm_90 or later, and a library with code for it")
    return CudaLaunchers(torch.ops.lora_kernels, lambda _: 90 if clustered else 80, native.cuda_failure)


class Case:
    """A random problem on the device."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        t, n, k, r = problem[:4]
        self.dtype, self.rank, shift = dtype, r, problem.shift

        def matrix(rows: int, cols: int, size: float, kind: torch.dtype) -> torch.Tensor:
            width = shift + cols + (-cols % 8 if shift == 8 else 0)
            return (torch.randn(rows, width, device=device) * size).to(kind)[:, shift : shift + cols]

        self.x = matrix(t, k, 1.0, dtype)  # [T, K]
        dense = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
        self.base = BaseWeight(dense, None, None, None, 0, n, k)
        if problem.blocksize:
            self.base = lk.nf4_quantize(dense, problem.blocksize, problem.double_quant).base_weight()
        kind = problem.adapter or dtype
        self.A = matrix(r, k, k**-0.5, kind) if r else None  # [r, K]
        self.B = matrix(n, r, 0.25 * r**-0.5, kind) if r else None  # [N, r]
        self.bias = torch.randn(n, device=device).to(dtype) if problem.bias else None

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """y [T, N] and h [T, r] by the specification: truth in float64, eager in the working dtype."""
        base, shape = self.base, (self.base.out_features, self.base.in_features)
        if base.quantized:
            weight = reference.nf4_dequantize(*base[:4], shape, base.blocksize, dtype)
        else:
            weight = base.data.to(dtype)
        cast = dtype if dtype == torch.float64 else None
        parts = (self.x, self.A, self.B, self.bias)
        x, A, B, bias = (None if part is None else part.to(cast or part.dtype) for part in parts)
        return reference.lora_linear(x, weight, A, B, SCALING, bias)

    def decode(self, by: CudaLaunchers) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.x.new_full((self.x.shape[0], self.base.out_features), float("nan"))
        h = self.x.new_full((self.x.shape[0], self.rank), float("nan"))
        by.lora_linear_decode(self.x, self.base, self.A, self.B, SCALING, self.bias, y, h)
        return y, h


def skip_where_not_taken(case: Case, by: CudaLaunchers, problem: Problem, route: str) -> None:
    """Only a GPU whose blocks have little shared memory may refuse one of PROBLEMS, and only for a long K."""
    assert by.why_not_fused(case.base, case.dtype, problem.rank, case.A, case.B, case.bias) is None
    if by.decode_exchange(case.base, problem.rank) != EXCHANGES[route]:
        assert problem.k >= 1024 and cuda._capability(case.x.device) >= 100
        pytest.skip(f"this GPU does not take it by {route}: K is too long for its blocks")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_class_of_problem_is_as_accurate_as_its_dtype(problem, dtype, route, device):
    """Small outputs are drawn several times over: the norm of few values says little."""
    by, draws = launchers(route, device), max(1, min(16, 2048 // (problem.tokens * problem.n)))
    cases = [Case(problem, dtype, device) for _ in range(draws)]
    skip_where_not_taken(cases[0], by, problem, route)
    versions = [(c.decode(by), c.expected(dtype), c.expected(torch.float64)) for c in cases]
    for i, name in enumerate(("y", "h")):
        out, eager, truth = (torch.cat([draw[v][i] for draw in versions]) for v in range(3))
        if truth.numel():
            assert_accurate(name, out, eager, truth, dtype)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "problem", [Problem(8), Problem(8, k=1088, blocksize=0), Problem(8, 65, 576)], ids=str
)
def test_a_token_does_not_depend_on_the_others(problem, route, device):
    """Each count of tokens gives the first rows of eight, bit for bit."""
    case, by = Case(problem, torch.bfloat16, device), launchers(route, device)
    y, h = case.decode(by)
    x = case.x
    for tokens in range(1, 8):
        case.x = x[:tokens]
        ours = case.decode(by)
        assert torch.equal(ours[0], y[:tokens]) and torch.equal(ours[1], h[:tokens]), tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem", [Problem(1, 1000, 4096), Problem(8, 4096, 4096), Problem(4, 300, 1088, blocksize=0)], ids=str
)
def test_both_routes_agree_up_to_the_order_of_fp32_sums(problem, dtype, device):
    """Few elements round the other way, and none by more than a step of the dtype."""
    case = Case(problem, dtype, device)
    (y1, h1), (y2, h2) = (case.decode(launchers(route, device)) for route in ROUTES)
    step = torch.finfo(dtype).eps
    for a, b in ((y1, y2), (h1, h2)):
        torch.testing.assert_close(a, b, rtol=step, atol=1e-5)
        assert float((a != b).double().mean()) < 0.02


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "problem", [Problem(5, 500, 4096), Problem(8, 4096, 4096), Problem(1, 64, 14336)], ids=str
)
def test_repeated_launches_give_the_same_bits(problem, route, device):
    """Whatever block comes last: 200 launches in a row, none waited for."""
    case, by = Case(problem, torch.bfloat16, device), launchers(route, device)
    skip_where_not_taken(case, by, problem, route)
    y, h = case.decode(by)
    for other_y, other_h in [case.decode(by) for _ in range(200)]:
        assert torch.equal(other_y, y) and torch.equal(other_h, h)


def test_the_counters_are_zero_between_launches(device):
    by = launchers("counters", device)
    for problem in (Problem(2, 300, 4096), Problem(8, 4096, 4096), Problem(1, 65, 1088)):
        Case(problem, torch.bfloat16, device).decode(by)
        torch.cuda.synchronize()
        assert len(by._counters) == 1 and not any(bool(c.any()) for c in by._counters.values())


@pytest.mark.parametrize("route", ROUTES)
def test_streams_do_not_disturb_one_another(route, device):
    """Four streams, each with a problem and counters of its own, 100 launches on each before any wait."""
    by = launchers(route, device)
    cases = [
        Case(Problem(t, n, 4096), torch.bfloat16, device) for t, n in ((1, 512), (3, 700), (8, 512), (2, 65))
    ]
    wanted = [case.decode(by) for case in cases]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in cases], [[] for _ in cases]
    for _ in range(100):
        for case, stream, got in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                got.append(case.decode(by))
    torch.cuda.synchronize()
    if route == "counters":
        assert len(by._counters) == 5, "the current stream and four others"
        assert len({c.data_ptr() for c in by._counters.values()}) == 5
    for (y, h), got in zip(wanted, results, strict=True):
        assert all(torch.equal(a, y) and torch.equal(b, h) for a, b in got)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("problem", [Problem(1, 700, 4096), Problem(8, 130, 1088, blocksize=0)], ids=str)
def test_a_captured_launch_computes_with_the_inputs_of_each_replay(problem, route, device):
    case, by = Case(problem, torch.bfloat16, device), launchers(route, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.decode(by)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = case.decode(by)
        second = case.decode(by)  # one graph, two launches, each with counters of its own
    for _ in range(20):
        case.x.normal_()
        for out in (*first, *second):
            out.fill_(float("nan"))
        graph.replay()
        y, h = case.decode(by)
        for out_y, out_h in (first, second):
            assert torch.equal(out_y, y) and torch.equal(out_h, h)


def test_graphs_and_launches_run_side_by_side(device):
    """A graph's counters belong to it: two are replayed on streams of their own while a third launches."""
    by = launchers("counters", device)
    cases = [Case(Problem(t, 600, 4096), torch.bfloat16, device) for t in (1, 4, 8)]
    wanted = [case.decode(by) for case in cases]
    torch.cuda.synchronize()
    graphs, captured = [], []
    for case in cases[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append(case.decode(by))
    streams, launched = [torch.cuda.Stream() for _ in cases], []
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            launched.append(cases[2].decode(by))
    torch.cuda.synchronize()
    for (y, h), got in zip(wanted, (captured[:1], captured[1:], launched), strict=True):
        assert all(torch.equal(a, y) and torch.equal(b, h) for a, b in got)


def test_the_op_takes_the_kernel_and_explain_says_so(device):
    case = Case(Problem(1, 300, 4096, bias=False), torch.bfloat16, device)
    route = "clustered" if cuda._capability(device) >= 90 else "counters"
    w = case.base
    weight = lk.NF4Weight(w.data, w.absmax, w.nested_absmax, w.offset, (300, 4096), 64, torch.bfloat16)
    y = lk.lora_linear(case.x, weight, case.A, case.B, scaling=SCALING)
    assert torch.equal(y, case.decode(launchers(route, device))[0])
    assert "CUDA lora_linear_decode" in cuda.explain(case.base, MOST_DECODE_TOKENS, torch.bfloat16)[0]
    assert "CUDA lora_linear_decode" not in cuda.explain(case.base, MOST_DECODE_TOKENS + 1, torch.bfloat16)[0]

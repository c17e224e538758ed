"""What the CPU suite shares: the short run, the machine's record, and timing over rotating copies."""

import itertools
import time
from functools import lru_cache

import pytest
import torch

from bench import machine
from bench.problem import Base, set_count

CPU = torch.device("cpu")
TIME_S = {False: 0.8, True: 0.25}  # spent on one benchmark: default run, quick run
ROUNDS = (5, 300)
MOST_SETS = 64


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only the cases of the short run")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    slow = [i for i in items if hasattr(i, "callspec") and not i.callspec.params["case"].quick]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["node"] = ""  # whose machine it was is nobody's business
    machine_info["lora_kernels"] = machine.describe_cpu()


def pytest_report_header():
    about = machine.describe_cpu()
    return (
        f"{about['cpu']}: {about['cores']} core(s), {about['threads']} thread(s), "
        f"pinning {about['pinning']}; kernels {about['cpu_isa']}, torch {about['torch']}"
    )


@pytest.fixture(autouse=True)
def random_data():
    torch.manual_seed(0)


@lru_cache(maxsize=6)  # the shapes of a file; its dense products come after its ops
def base_of(n: int, k: int, dtype: torch.dtype) -> Base:
    base = Base(n, k, dtype, CPU)
    base.truth()
    return base


@pytest.fixture
def base(case):
    """The weight of a case; its float64 truth is kept for the other cases of the same shape."""
    return base_of(case.n, case.k, case.dtype)


@pytest.fixture
def sets():
    """sets(bytes): how many copies of so many bytes to rotate, so that the cache does not hold them all."""
    cache = machine.last_level_cache_bytes()
    return lambda set_bytes: set_count(set_bytes, cache, MOST_SETS)


@pytest.fixture
def timed(benchmark, request, case):
    """timed(calls, op=, variant=, flops=, bytes=): times the calls in turn, one call to a round.

    `op` names the row and `variant` what was timed ("lora_kernels", or "dense": what the ratio is taken
    to); flops and bytes are what one call cannot avoid.
    """

    def run(calls, *, op, variant, flops=0, bytes=0):
        for call in calls[:2]:
            call()
        trial = []
        for call in calls[:2]:
            start = time.perf_counter()
            call()
            trial.append(time.perf_counter() - start)
        budget = TIME_S[request.config.getoption("--quick")]
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(budget / min(trial))))
        benchmark.group = f"{op} {case}"
        benchmark.extra_info.update(
            op=op,
            variant=variant,
            n=case.n,
            k=case.k,
            t=case.t,
            dtype=case.dtype_name,
            p=case.p,
            flops=flops,
            bytes=bytes,
            sets=len(calls),
        )
        turn = itertools.cycle(calls)
        benchmark.pedantic(
            lambda call: call(),
            setup=lambda: ((next(turn),), {}),
            rounds=rounds,
            warmup_rounds=min(len(calls), 3),
        )

    return run

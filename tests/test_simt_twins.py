"""The host twins of ptx.cuh and ptx_sm90.cuh: each computes what NumPy does from the PTX ISA's description,
whatever the order of threads and of asynchronous completions, and stops programs that use it wrongly."""

from dataclasses import replace

import numpy as np
import pytest
import twins

SEEDS = 6  # per run of a case; the first is drawn from the test's own
FAULT_SEEDS = 100


@pytest.fixture(scope="module")
def simt(tmp_path_factory):
    return twins.build_simt(tmp_path_factory.mktemp("twins"))


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("case", twins.CASES, ids=lambda case: case.name)
def test_a_twin_computes_what_numpy_does(simt, case, rng, seed):
    arrays = case.arrays(rng)
    expected = case.expected(arrays)
    for i in range(SEEDS):
        twins.check(twins.run(simt, case, arrays, seed=seed + i), expected)


# What a message says, where the stand-in must stop the program in one run at least; None: a wrong answer will
# do.
FAULTS = {
    "ring": {
        1: "second phase|over-arrival",
        2: "deadlock|still|second phase|nobody has written",
        3: "no initialised mbarrier",
        4: None,
        5: None,
        6: "write over an mbarrier|write to shared memory",
    },
    "tma_load-16bit-box16x64-swizzle128-at8,16": {
        1: "still writing",
        2: "more than were expected",
        3: "16 bytes to come",
        4: "fence_mbarrier_init",
        5: "in flight",
        6: "without a fence.proxy.async",
        7: "over an mbarrier",
    },
    "tma_store-16bit-box16x64-swizzle128-at2,8": {
        1: "without a fence.proxy.async",
        2: None,
        3: "bulk_wait",
        4: "bulk_commit",
    },
    "cluster": {
        1: "no initialised mbarrier|has ended",
        2: "has ended",
        3: "more than were expected|still writing",
    },
    "wgmma_rs-n64-K-bf16": {
        1: "names",
        2: "a's registers",
        3: "without a wgmma_wait",
        4: "leaves in flight",
        5: "leaves in flight",
        6: "accumulator 1",
        7: None,
        8: None,
        9: "names a's registers",
    },
    "pipeline-128x128x320": {
        1: "still writing",
        2: "still writing|over-arrival|second phase",
        3: "deadlock",
        4: "without a fence.proxy.async",
        5: "nobody has written|without a fence.proxy.async",
        6: "bulk_wait",
        7: "deadlock|still writing|second phase|nobody has written|over-arrival|more than",
        8: "same bytes|over-arrival|still writing|second phase",
        9: "still writing|nobody has written",
        10: None,
    },
}


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults]
)
def test_a_broken_program_is_caught(simt, name, fault, rng, seed):
    case = twins.BY_NAME[name]
    arrays = case.arrays(rng)
    expected = case.expected(arrays)
    wanted = FAULTS[name][fault]
    seen = set()
    for i in range(FAULT_SEEDS):
        try:
            twins.check(twins.run(simt, case, arrays, seed=seed + i, fault=fault), expected)
        except twins.TwinError as error:
            message = str(error)
        except AssertionError:
            message = "a wrong answer"
        else:
            continue
        if wanted is None or any(part in message for part in wanted.split("|")):
            return
        seen.add(message)
    pytest.fail(f"fault {fault} of {name} was not caught as {wanted!r} in {FAULT_SEEDS} runs; seen: {seen}")


def test_a_failure_can_be_replayed(simt, rng, seed):
    """The same seed gives the same message, whatever ran in between."""
    case = twins.BY_NAME["pipeline-128x128x320"]
    arrays = case.arrays(rng)

    def message(seed):
        try:
            return str(twins.run(simt, case, arrays, seed=seed, fault=9))
        except twins.TwinError as error:
            return str(error)

    first = message(seed)
    twins.run(simt, case, arrays, seed=seed + 1)
    assert message(seed) == first


def test_an_impossible_tensor_map_is_refused(simt, rng):
    """A row stride of 202 bytes, which TMA cannot address."""
    case = twins.BY_NAME["tma_load-16bit-box16x64-swizzle128-at8,16"]
    arrays = case.arrays(rng)
    wrong = replace(case, numbers=(2, 40, 100, 101, *case.numbers[4:]))
    with pytest.raises(twins.TwinError, match="no such tensor map"):
        twins.run(simt, wrong, arrays)

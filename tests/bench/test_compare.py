"""The rule of the regression check, on made-up ratios."""

import itertools
import random
import statistics
import time

import pytest

from bench.compare import (
    ATTEMPTS,
    LEAST_THRESHOLD,
    MOST_THRESHOLD,
    THRESHOLD_SPREADS,
    Statistic,
    excess,
    statistic,
    verdict,
)
from bench.timing import interleaved_times


def noisy(rng: random.Random, ratio: float, spread: float):
    """Small noise of both signs; a third of the time a neighbour costs up to 40 %."""
    return lambda: ratio * rng.gauss(1, spread) * (1 + (rng.random() < 1 / 3) * rng.uniform(0, 0.4))


@pytest.mark.parametrize("spread", [0.002, 0.005, 0.01])
def test_ten_percent_are_caught_and_noise_is_not(spread, seed):
    rng = random.Random(seed)
    false, caught, judged, runs = 0, 0, 0, 1500
    for _ in range(runs):
        clean, slower = noisy(rng, 0.5, spread), noisy(rng, 0.55, spread)
        baseline = statistic([clean() for _ in range(9)])
        if baseline.threshold > MOST_THRESHOLD:
            continue
        judged += 1
        false += verdict(baseline, clean, pause_s=0)[0]
        caught += verdict(baseline, slower, pause_s=0)[0]
    assert judged >= 0.75 * runs
    assert false <= 0.01 * judged
    assert caught >= 0.98 * judged


def test_a_regression_must_show_in_every_attempt_but_one():
    baseline = Statistic(1.0, 0.0)
    readings = [1.2, 1.0, 1.2, 1.0]
    rest = iter(readings)
    expected = [excess(baseline, r) for r in readings]
    assert verdict(baseline, lambda: next(rest), pause_s=0) == (False, expected)
    for lowered in (None, 0, ATTEMPTS - 1):
        rest = iter([1.0 if i == lowered else 1.2 for i in range(ATTEMPTS)])
        slower, seen = verdict(baseline, lambda rest=rest: next(rest), pause_s=0)
        assert slower and len(seen) == ATTEMPTS


def test_a_machine_whose_own_speed_changes_is_not_judged(seed):
    """Half of the time slower by a tenth or more, for as long as a measurement takes."""
    rng = random.Random(seed)
    judged = 0
    for _ in range(500):
        ratios = [rng.gauss(1, 0.005) * (1.0 if i < 4 else rng.uniform(1.1, 1.4)) for i in range(9)]
        judged += statistic(ratios).threshold <= MOST_THRESHOLD
    assert judged == 0


def test_the_threshold_follows_the_spread():
    """The lowest does not count: its yardstick may have been disturbed."""
    quiet, wild = statistic([1.3, 0.7, 1.0, 1.0]), statistic([1.1, 0.9, 1.3, 0.1])
    assert quiet == (1.0, 0.0) and quiet.threshold == LEAST_THRESHOLD
    assert wild.ratio == pytest.approx(1.0) and wild.threshold == pytest.approx(THRESHOLD_SPREADS * 0.1)


def test_rounds_are_interleaved_and_calls_that_warm_up_are_not_timed():
    order: list[str] = []
    contenders = {name: (lambda i, name=name: order.append(name)) for name in "abc"}
    times = interleaved_times(contenders, 0.0, rounds=(3, 3))
    assert "".join(name for name, _ in itertools.groupby(order)) == "abc" * 4
    assert all(len(samples) == 3 and statistics.median(samples) >= 0 for samples in times.values())


def test_a_sample_is_the_time_of_one_call():
    times = interleaved_times({"a": lambda i: time.sleep(1e-3)}, 0.0, rounds=(3, 3))
    assert all(0.9e-3 < sample < 2e-2 for sample in times["a"])

"""Times of calls: CUDA-graph replays over rotating tensor sets, and plain calls by the wall clock.

A "call" is a function without arguments that does the work once, on tensors of its own; a list of calls is
one rotation. Every time is in seconds for one call.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]

MIN_SAMPLE_S = 2e-3  # what one sample should last at least: well over the resolution of events and of a clock
MAX_CALLS = 1024  # in one graph
PAUSE_S = 5e-3  # longer than an OpenMP runtime's threads spin
WARM_S = 50e-3  # a longer call hardly notices that threads had to be woken
WAKE_S = 5e-3  # of calls that are not timed, after a pause, and then of calls that are
SAMPLES = (5, 25)  # at least, at most


def summary(samples: Sequence[float]) -> dict[str, float]:
    """median, p10 and p90 in microseconds, and how many samples they come from."""
    deciles = (
        statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [samples[0]] * 9
    )
    return {
        "median_us": statistics.median(samples) * 1e6,
        "p10_us": deciles[0] * 1e6,
        "p90_us": deciles[8] * 1e6,
        "samples": len(samples),
    }


def sample_count(one_s: float, budget_s: float) -> int:
    """How many samples of one_s fit the budget, within SAMPLES."""
    return max(SAMPLES[0], min(SAMPLES[1], int(budget_s / max(one_s, 1e-9))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_times(
    calls: Sequence[Call], device: torch.device, warmup_s: float, budget_s: float
) -> dict[str, float]:
    """Time of a call made from Python, launch overhead and all: in turn, synchronised once per sample."""

    def run(count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        synchronize(device)
        return time.perf_counter() - start

    run(len(calls))
    one, warmed = run(len(calls)) / len(calls), 0.0
    while warmed < warmup_s:
        warmed += run(len(calls))
    count = max(1, min(MAX_CALLS, math.ceil(MIN_SAMPLE_S / one)))
    return summary([run(count) / count for _ in range(sample_count(one * count, budget_s))])


class _Graph:
    """A CUDA graph of whole rotations of `calls`, long enough to be timed.

    The results of all calls of a rotation are kept alive in the graph, so that outputs rotate as inputs do.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # what initialises itself at its first call must do so before the capture
            for call in calls:
                call()
            stream.synchronize()
            start = time.perf_counter()
            for call in calls:
                call()
            stream.synchronize()
            rotation = time.perf_counter() - start
        torch.cuda.current_stream().wait_stream(stream)
        cycles = max(1, min(MAX_CALLS // len(calls), math.ceil(MIN_SAMPLE_S / rotation)))
        self.calls, self._graph, self._kept = cycles * len(calls), torch.cuda.CUDAGraph(), {}
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                for _ in range(cycles):
                    for i, call in enumerate(calls):
                        self._kept[i] = call()
        except BaseException:
            self.reset()
            raise

    def replay(self) -> float:
        """Seconds of one replay, by the wall clock."""
        before = time.perf_counter()
        self._graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - before

    def timed_replay(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        self._graph.replay()
        pair[1].record()
        return pair

    def reset(self) -> None:
        self._kept.clear()
        self._graph.reset()


def graph_times(calls: Sequence[Call], warmup_s: float, budget_s: float) -> dict[str, float]:
    """Time of a call on the device without launch overhead: replays of a CUDA graph of `calls`, by events."""
    times, failed = interleaved_graph_times({"it": calls}, warmup_s, budget_s)
    if failed:
        raise failed["it"]
    return times["it"]


def interleaved_graph_times(
    contenders: Mapping[str, Sequence[Call]], warmup_s: float, budget_s: float
) -> tuple[dict[str, dict[str, float]], dict[str, Exception]]:
    """graph_times of every contender, replayed in turn: A B C A B C ...; and why some could not be captured.

    Clocks and temperature change for all alike, so ratios are steadier than times. Each contender's rotation
    is larger than the cache, so none finds its tensors there, whoever ran before it.
    """
    graphs: dict[str, _Graph] = {}
    failed: dict[str, Exception] = {}
    try:
        for name, calls in contenders.items():
            try:
                graphs[name] = _Graph(calls)
            except Exception as error:
                failed[name] = error
        begin, turn = time.perf_counter(), 0.0
        while graphs and (turn == 0.0 or time.perf_counter() - begin < warmup_s):
            turn = sum(graph.replay() for graph in graphs.values())
        events: dict[str, list] = {name: [] for name in graphs}
        for _ in range(sample_count(turn, budget_s)):
            for name, graph in graphs.items():
                events[name].append(graph.timed_replay())
        torch.cuda.synchronize()
        return {
            name: summary([a.elapsed_time(b) / 1e3 / graphs[name].calls for a, b in pairs])
            for name, pairs in events.items()
        }, failed
    finally:
        for graph in graphs.values():
            graph.reset()


def interleaved_wall_times(
    contenders: Mapping[str, Sequence[Call]], device: torch.device, budget_s: float
) -> dict[str, dict[str, float]]:
    """wall_times of every contender, their samples taken in turn."""

    def run(calls: Sequence[Call], count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        synchronize(device)
        return time.perf_counter() - start

    counts, turn = {}, 0.0
    for name, calls in contenders.items():
        run(calls, len(calls))
        one = run(calls, len(calls)) / len(calls)
        counts[name] = max(1, min(MAX_CALLS, math.ceil(MIN_SAMPLE_S / one)))
        turn += one * counts[name]
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(sample_count(turn, budget_s)):
        for name, calls in contenders.items():
            samples[name].append(run(calls, counts[name]) / counts[name])
    return {name: summary(times) for name, times in samples.items()}


def interleaved_times(
    contenders: Mapping[str, Callable[[int], object]],
    budget_s: float,
    rounds: tuple[int, int] = (5, 60),
    pause_s: float = PAUSE_S,
) -> dict[str, list[float]]:
    """Seconds of a call of every contender, in rounds A B C A B C ...

    A contender is called with the number of the round, by which it chooses among copies of its tensors.
    Noise of the machine that lasts longer than a round meets all of them alike, so ratios within a round are
    steadier than times. At least rounds[0] and at most rounds[1] rounds, about `budget_s` in all. A pause
    before each contender lets the threads of the one before go to sleep: a peer may bring an OpenMP runtime
    of its own, whose threads would otherwise wait, spinning, on the cores of the next. What is timed is the
    steady state, as in a model whose layers follow one another: calls of under WARM_S are repeated for WAKE_S
    untimed, which wakes the contender's own threads, and then for as long timed.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    repeats: dict[str, int] = {}
    for name, call in contenders.items():
        call(0)
        start = time.perf_counter()
        call(1)
        once = time.perf_counter() - start
        repeats[name] = 0 if once > WARM_S else min(MAX_CALLS, max(1, math.ceil(WAKE_S / once)))
    cost = time.perf_counter() - began + 2 * WAKE_S * len(contenders)
    count = max(rounds[0], min(rounds[1], int(budget_s / max(cost, 1e-9))))
    for turn in range(count):
        for name, call in contenders.items():
            if pause_s > 0:
                time.sleep(pause_s)
            for j in range(repeats[name] if pause_s > 0 else 0):
                call(turn + j)
            timed = max(1, repeats[name])
            start = time.perf_counter()
            for j in range(timed):
                call(turn + 1 + j)
            times[name].append((time.perf_counter() - start) / timed)
    return times


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory that one call needs beyond what was allocated before it, its result included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before

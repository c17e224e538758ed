"""The GPU benchmarks without a GPU: whole runs on the stand-in, and the rules that judge their numbers."""

import json
import re

import pytest
import simt_backend
import torch

import lora_kernels as lk
from bench import gpu_training_report as report
from bench.gpu_baseline import parse
from bench.gpu_training import Training
from bench.gpu_tune import Tune, best_crossover


@pytest.fixture
def arguments(tmp_path):
    options = f"--out {tmp_path} --tables {tmp_path / 'tables'} --device cpu --smoke --budget-s 200"
    return parse(options.split(), "", 1)


def run(benchmark, arguments, tmp_path):
    """Its record as it is on disk, and its tables."""
    simt_backend.pretend(4, 80)
    with lk.use_backend("simt"):
        assert not benchmark.run(), "something of our own failed"
    record = json.loads((tmp_path / f"{benchmark.name}.json").read_text())
    assert record["finished"]
    return record, (tmp_path / "tables" / f"{benchmark.name}.md").read_text()


def test_the_training_benchmark_checks_and_times_every_kernel(arguments, tmp_path):
    benchmark = Training(arguments, simt_backend.backend._launchers)
    benchmark.shapes = benchmark.shapes[:1]
    record, text = run(benchmark, arguments, tmp_path)
    rows = record["results"]
    assert {row["kind"] for row in rows} == {
        "forward",
        "forward+backward",
        "sweep",
        "batched forward",
        "batched forward+backward",
    }
    sweeps = {row["what"] for row in rows if row["kind"] == "sweep"}
    for name in (
        "lora_shrink",
        "sweep over dy",
        "sweep over x",
        "lora_expand forward",
        "lora_expand backward",
    ):
        assert {name, f"copy beside {name}"} <= sweeps and name in text
    own = [row for row in rows if row["what"] not in benchmark.missing]
    assert all("failed" not in row and row["eager"]["median_us"] > 0 for row in own)
    assert "## Goals on an H200" in text and report.short_table(record).count("\n") < 40


def test_the_tuning_times_each_kernel_that_can_serve_a_call(arguments, tmp_path):
    benchmark = Tune(arguments, simt_backend.backend._launchers)
    record, text = run(benchmark, arguments, tmp_path)
    whats = {(row["kind"], row["n"], row["t"], row["what"]) for row in record["results"]}
    assert {what for kind, n, t, what in whats if (kind, n, t) == ("lora_linear", 96, 8)} == {
        "panels",
        "lora_linear_mixed",
        "lora_linear_decode",
    }
    assert ("lora_linear_backward", 96, 40, "lora_linear_backward_dx") in whats
    assert {what for kind, n, _, what in whats if (kind, n) == ("lora_linear", 70)} == {"panels"}  # K = 91
    assert 'Crossover("lora_linear", "lora_linear_mixed", ' in text and "PANEL_BYTES = " in text
    assert {w for kind, n, _, w in whats if (kind, n) == ("LoRA term", 96)} == {"first", "last", "joined"}
    assert re.search(r"lora_linear_decode, of lora_linear_mixed's time: \d+\.\d+ at T = 8", text)
    assert re.search(r"GRADIENT_OF_H, one sweep over GEMM and sweep: \d+\.\d+ at r = 16, .* at r = 256", text)
    assert re.search(r"LoRA term, N/K = .*: last \d\.\d+, joined \d\.\d+ of first's", text)


def test_a_forced_table_changes_which_kernel_runs():
    """Otherwise the tuning would time one kernel under two names."""
    from bench.gpu_tune import ALL_TOKENS, DECODE, DX, MIXED, NO_TOKENS, backend_with

    weight = lk.nf4_quantize(torch.randn(96, 64).bfloat16()).base_weight()
    launchers = simt_backend.backend._launchers
    for limit, kernel in ((ALL_TOKENS, MIXED), (NO_TOKENS, "panels")):
        backend = backend_with(launchers, {DECODE: NO_TOKENS, MIXED: limit, DX: limit})
        for t in (1, 100_000):
            assert backend._kernel("lora_linear", weight, t, torch.bfloat16, 16)[0] == kernel


@pytest.mark.parametrize(
    ("ratios", "limit"),
    [
        ({}, 0),
        ({16: 1.2, 64: 1.5}, 0),
        ({16: 0.5, 64: 0.8, 256: 1.1, 1024: 2.0}, 64),
        ({16: 0.5, 64: 1.02, 256: 0.8, 1024: 2.0}, 256),  # one T that lost by a hair does not end it
        ({16: 0.5, 64: 0.9}, 64),
    ],
)
def test_the_crossover_loses_the_least_time(ratios, limit):
    assert best_crossover(ratios) == limit


def row(kind, what, t, us, p=0.0, **more):
    return {"kind": kind, "what": what, "n": 64, "k": 64, "t": t, "p": p, "graph": {"median_us": us}, **more}


def state(record, word):
    return [goal.state for goal in report.goals(record) if word in goal.name]


def test_a_goal_is_reached_only_where_every_case_reaches_it():
    ours, peer = report.OURS, report.BNB
    record = {"results": [row("forward", ours, 16, 10), row("forward", peer, 16, 21)]}
    assert state(record, "T 16-256") == ["reached"]
    record["results"] += [row("forward", ours, 256, 10), row("forward", peer, 256, 19)]
    assert state(record, "T 16-256") == ["MISSED"]
    assert {state(record, word)[0] for word in ("p = 0 ", "p = 0.1", "dy", "over x", "memory")} == {
        "not measured"
    }
    record["results"] += [row("forward", ours, 2048, 10), row("forward", peer, 2048, 11)]  # not of this goal
    assert "1 of 2 cases" in next(str(goal) for goal in report.goals(record))


def test_sweeps_are_held_against_the_copy_and_memory_against_the_peer():
    sweep, copy = row("sweep", "sweep over x", 64, 100), row("sweep", "copy beside sweep over x", 64, 76)
    both = [
        row("forward+backward", what, 2048, 10, peak_bytes=b)
        for what, b in ((report.OURS, 5), (report.BNB, 6))
    ]
    record = {"results": [sweep, copy, *both]}
    assert state(record, "sweep over x") == state(record, "memory") == ["reached"]
    copy["graph"]["median_us"], both[0]["peak_bytes"] = 74, 6
    assert state(record, "sweep over x") == state(record, "memory") == ["MISSED"]

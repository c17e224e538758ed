"""Turns the record of gpu_training.py into Markdown, and holds it against the goals."""

from collections.abc import Callable
from typing import NamedTuple

from bench.baseline_report import NOTHING, spread, table
from bench.gpu_groups import failures, ratio, rows_of

NOT_MEASURED, REACHED, MISSED = "not measured", "reached", "MISSED"
FORWARD, BOTH = "forward", "forward+backward"
OURS, BNB = "lora_kernels", "bitsandbytes+peft"
MIB = 1 << 20


class Goal(NamedTuple):
    """What is aimed at on an H200, and what came of it: the worst case decides."""

    name: str
    state: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state}: {self.name}" + (f" ({self.detail})" if self.detail else "")


Key = tuple[int, int, int, float]  # N, K, T, p


def where(key: Key) -> str:
    n, k, t, _ = key
    return f"{n}x{k}, T = {t}"


def at_least(name: str, goal: float, found: dict[Key, tuple[float, str]], unit: str = "times") -> Goal:
    """Every ratio of `found` must reach the goal."""
    if not found:
        return Goal(name, NOT_MEASURED, "")
    worst, best = min(found, key=lambda key: found[key][0]), max(found, key=lambda key: found[key][0])
    right = sum(value >= goal for value, _ in found.values())
    clocks = "/".join(sorted({clock for _, clock in found.values()}))
    scale, sign = (100, " %") if unit == "percent" else (1, "")
    detail = (
        f"{right} of {len(found)} cases; worst {scale * found[worst][0]:.3g}{sign} at {where(worst)}, best "
        f"{scale * found[best][0]:.3g}{sign} at {where(best)}; {clocks}"
    )
    return Goal(name, REACHED if right == len(found) else MISSED, detail)


def against_peer(
    record: dict, kind: str, wanted: Callable[[int, float], bool]
) -> dict[Key, tuple[float, str]]:
    """How many times as fast as bitsandbytes + PEFT, wherever both were measured."""
    return {
        key: found
        for key, rows in rows_of(record, kind).items()
        if wanted(key[2], key[3]) and (found := ratio(rows.get(BNB), rows.get(OURS))) is not None
    }


def of_copy(record: dict, names: tuple[str, ...]) -> dict[str, dict[Key, tuple[float, str]]]:
    """Of each sweep: the time of a copy of as many bytes over its own."""
    found: dict[str, dict[Key, tuple[float, str]]] = {name: {} for name in names}
    for key, rows in rows_of(record, "sweep").items():
        for name in names:
            share = ratio(rows.get(name), rows.get(f"copy beside {name}"))
            if share is not None:
                found[name][key] = (1 / share[0], share[1])
    return found


def goals(record: dict) -> list[Goal]:
    made = [
        at_least(
            "T 16-256 forward at least 2 times as fast as bitsandbytes + PEFT",
            2.0,
            against_peer(record, FORWARD, lambda t, p: 16 <= t <= 256),
        )
    ]
    for p, goal in ((0.0, 1.15), (0.1, 1.3)):
        made.append(
            at_least(
                f"T >= 2048 forward + backward at p = {p:g} at least {goal} times as fast",
                goal,
                against_peer(record, BOTH, lambda t, q, p=p: t >= 2048 and q == p),
            )
        )
    for name, found in of_copy(record, ("sweep over dy", "sweep over x")).items():
        made.append(at_least(f"{name} at least 75 % of copy bandwidth", 0.75, found, "percent"))
    return [*made, memory_goal(record)]


def memory_goal(record: dict) -> Goal:
    name = "peak memory of forward + backward below bitsandbytes + PEFT's at every size"
    pairs = {}
    for key, rows in rows_of(record, BOTH).items():
        both = [(rows.get(what) or {}).get("peak_bytes") for what in (OURS, BNB)]
        if all(value is not None for value in both):
            pairs[key] = both
    if not pairs:
        return Goal(name, NOT_MEASURED, "")
    worst = max(pairs, key=lambda key: pairs[key][0] / max(pairs[key][1], 1))
    ours, theirs = pairs[worst]
    below = sum(a < b for a, b in pairs.values())
    detail = (
        f"{below} of {len(pairs)} cases; closest {ours / MIB:.0f} against {theirs / MIB:.0f} MiB at "
        f"{where(worst)}, p = {worst[3]:g}"
    )
    return Goal(name, REACHED if below == len(pairs) else MISSED, detail)


def _cell(row: dict | None, clock: str) -> str:
    if row is None:
        return NOTHING
    return "failed" if "failed" in row else spread(row.get(clock))


def _times(record: dict, kind: str, clock: str) -> list[str]:
    groups = rows_of(record, kind)
    whats = list(dict.fromkeys(what for rows in groups.values() for what in rows))
    first = whats[0] if whats else OURS
    body = []
    for (n, k, t, p), rows in sorted(groups.items(), key=lambda item: (item[0][:2], item[0][3], item[0][2])):
        ratios = []
        for what in whats[1:]:
            found = ratio(rows.get(what), rows.get(first))
            ratios.append(NOTHING if found is None else f"{found[0]:.2f}")
        cells = [_cell(rows.get(what), clock) for what in whats]
        body.append([f"{n}x{k}", str(t), f"{p:g}", *cells, *ratios])
    return table(["W0", "T", "p", *whats, *(f"{what} / ours" for what in whats[1:])], body)


def _memory(record: dict) -> list[str]:
    groups = rows_of(record, BOTH)
    whats = list(dict.fromkeys(what for rows in groups.values() for what in rows))
    body = []
    for (n, k, t, p), rows in groups.items():
        peaks = [(rows.get(what) or {}).get("peak_bytes") for what in whats]
        body.append(
            [f"{n}x{k}", str(t), f"{p:g}", *(NOTHING if b is None else f"{b / MIB:.1f}" for b in peaks)]
        )
    return table(["W0", "T", "p", *(f"{what}, MiB" for what in whats)], body)


def _sweeps(record: dict) -> list[str]:
    body = []
    for (n, k, t, p), rows in rows_of(record, "sweep").items():
        for name in [what for what in rows if not what.startswith("copy beside ")]:
            copy = rows.get(f"copy beside {name}")
            share, rate = ratio(rows[name], copy), rows[name].get("gb_per_s")
            body.append(
                [
                    name,
                    f"{n}x{k}",
                    str(t),
                    f"{p:g}",
                    _cell(rows[name], "graph"),
                    _cell(copy, "graph"),
                    NOTHING if rate is None else f"{rate:.0f}",
                    NOTHING if share is None else f"{100 / share[0]:.0f} %",
                ]
            )
    return table(["kernel", "W0", "T", "p", "µs", "copy of as many bytes, µs", "GB/s", "of copy"], body)


def heading(record: dict, title: str) -> list[str]:
    """Device, versions, how the run ended, and who was not there."""
    about = record["machine"]
    measured = bool(record["results"])
    state = "Complete." if record["finished"] else "Stopped by its time budget, or still running."
    driver = about.get("driver_version", about.get("driver", "none"))
    return [
        f"# {title}: {about['device'] if measured else NOT_MEASURED}",
        "",
        f"{record['started']}, commit {about['commit'] or 'unknown'}, torch {about['torch']}, driver "
        f"{driver}. Command: `{' '.join(record['command'])}`. "
        + (state if measured else "There was no device."),
        "",
        "Microseconds for one call, median (p10-p90); bf16, r = 16, NF4 with double quantisation, random "
        "normal data. Device: CUDA-graph replays over rotating tensor sets of three times the L2 cache, "
        "contenders in turn. Eager: wall clock of calls from Python.",
        "",
        *(f"- {name}: {version}" for name, version in record["peers"].items()),
    ]


def markdown(record: dict) -> str:
    lines = [*heading(record, "Training on a GPU"), "", "## Goals on an H200", ""]
    lines += [f"- {goal}" for goal in goals(record)]
    for clock, name in (("graph", "device"), ("eager", "eager")):
        for kind in (FORWARD, BOTH, f"batched {FORWARD}", f"batched {BOTH}"):
            if any(clock in row for rows in rows_of(record, kind).values() for row in rows.values()):
                lines += ["", f"## {kind}, {name}", "", *_times(record, kind, clock)]
    if rows_of(record, BOTH):
        text = "Bytes beyond weights, x and dy that one call needs, its results included."
        lines += ["", "## Peak memory, forward+backward", "", text, "", *_memory(record)]
    if rows_of(record, "sweep"):
        lines += ["", "## Low-rank kernels against a copy, device", "", *_sweeps(record)]
    failed = failures(record)
    return "\n".join([*lines, *(["", "## What failed", "", *failed] if failed else [])]) + "\n"


def short_table(record: dict) -> str:
    """At most 40 lines: the goals, then the first shape's ratios."""
    lines = [
        f"training: {len(record['results'])} measurements, {len(failures(record))} failed, complete: "
        f"{record['finished']}",
        *map(str, goals(record)),
    ]
    for kind in (FORWARD, BOTH):
        for (n, k, t, p), rows in list(rows_of(record, kind).items())[:12]:
            found = ratio(rows.get(BNB), rows.get(OURS))
            if found is not None:
                lines.append(f"{kind} {n}x{k} T={t} p={p:g}: {found[0]:.2f} times {BNB} ({found[1]})")
    return "\n".join([*lines, *failures(record)[:5]])

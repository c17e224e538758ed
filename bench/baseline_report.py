"""Turns the record of gpu_baseline.py into Markdown, and into the short table that ends a run."""

from collections.abc import Iterable

COLUMNS = (
    ("cuBLAS bf16", "F.linear", "forward"),
    ("lora_kernels fwd", "lora_kernels", "forward"),
    ("lora_kernels fwd+bwd", "lora_kernels", "forward+backward"),
    ("bnb+PEFT fwd", "bitsandbytes+peft", "forward"),
    ("bnb+PEFT fwd+bwd", "bitsandbytes+peft", "forward+backward"),
    ("dense+PEFT fwd", "dense+peft", "forward"),
    ("dense+PEFT fwd+bwd", "dense+peft", "forward+backward"),
)
NOTHING = "-"


def microseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def spread(times: dict | None) -> str:
    if times is None:
        return NOTHING
    low, middle, high = (microseconds(times[key]) for key in ("p10_us", "median_us", "p90_us"))
    return f"{middle} ({low}-{high})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _find(record: dict, **wanted: object) -> dict | None:
    for row in record["results"]:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    return None


def _shapes(record: dict, p: float) -> list[tuple[int, int]]:
    return list(dict.fromkeys((r["n"], r["k"]) for r in record["results"] if "n" in r and r["p"] == p))


def _cell(row: dict | None, clock: str) -> str:
    if row is None:
        return NOTHING
    if "failed" in row:
        return "failed"
    return spread(row.get(clock))


def _times(record: dict, shape: tuple[int, int], p: float, clock: str) -> list[str]:
    rows = [r for r in record["results"] if (r.get("n"), r.get("k")) == shape and r["p"] == p and r["t"]]
    columns = [c for c in COLUMNS if any((r["what"], r["mode"]) == c[1:] for r in rows)]
    body = []
    for t in sorted({r["t"] for r in rows}):
        cells = [
            _cell(_find(record, n=shape[0], k=shape[1], t=t, p=p, what=what, mode=mode), clock)
            for _, what, mode in columns
        ]
        dense = _find(record, n=shape[0], k=shape[1], t=t, p=p, what="F.linear")
        if p == 0:
            rate = (dense or {}).get("tflop_per_s")
            cells.append(NOTHING if rate is None else f"{rate:.1f}")
        body.append([str(t), *cells])
    return table(["T", *(name for name, _, _ in columns), *(["cuBLAS TFLOP/s"] if p == 0 else [])], body)


def markdown(record: dict) -> str:
    machine, ceilings = record["machine"], record["ceilings"]
    lines = [
        f"# Baseline: {machine['device']}",
        "",
        f"{record['started']}, commit {machine['commit'] or 'unknown'}, torch {machine['torch']}, "
        f"driver {machine.get('driver_version', machine.get('driver', 'none'))}. "
        f"Command: `{' '.join(record['command'])}`. "
        + (
            "Complete." if record["finished"] else "Incomplete: stopped by its time budget, or still running."
        ),
        "",
        "Microseconds for one call, median (p10-p90); bf16, r = 16, NF4 with double quantisation, random "
        "normal data. Device: CUDA-graph replay over rotating tensor sets. Eager: wall clock of calls from "
        "Python.",
        "",
        *(f"- {name}: {version}" for name, version in record["peers"].items()),
        "",
        "## Ceilings",
        "",
    ]
    copy, gemm = ceilings.get("copy_gb_per_s"), ceilings.get("linear_tflop_per_s")
    lines += [
        f"- device-to-device copy, bytes read + written: {NOTHING if copy is None else f'{copy:.0f} GB/s'}",
        f"- best F.linear bf16: {NOTHING if gemm is None else f'{gemm:.0f} TFLOP/s'}",
        "",
        "## nf4_dequantize to bf16",
        "",
    ]
    clock = "graph" if any("graph" in r for r in record["results"]) else "eager"
    body = []
    for row in (r for r in record["results"] if r["what"] == "nf4_dequantize"):
        rate = row.get("gb_per_s")
        share = NOTHING if not (rate and copy) else f"{100 * rate / copy:.0f} %"
        speed = NOTHING if rate is None else f"{rate:.0f}"
        body.append([f"{row['n']}x{row['k']}", _cell(row, clock), speed, share])
    lines += table(["W0", "µs", "GB/s", "of copy"], body)
    for p in sorted({r["p"] for r in record["results"]}):
        for shape in _shapes(record, p):
            title = f"## {shape[0]}x{shape[1]}" + (f", dropout {p}" if p else "")
            for name, key in (("device", "graph"), ("eager", "eager")):
                if any(key in r for r in record["results"]):
                    lines += ["", f"{title}, {name}", "", *_times(record, shape, p, key)]
    failures = [r for r in record["results"] if "failed" in r or "graph_failed" in r]
    if failures:
        lines += ["", "## What failed", ""]
        for r in failures:
            where = f"{r.get('n', '')}x{r.get('k', '')} T={r['t']} p={r['p']}"
            lines.append(
                f"- {r['what']} {r['mode']} {where}: {r.get('failed') or 'graph: ' + r['graph_failed']}"
            )
    return "\n".join(lines) + "\n"


def short_table(record: dict, shapes: int = 3, tokens: tuple[int, ...] = (1, 16, 256, 2048, 8192)) -> str:
    """At most 40 lines: ceilings, dequantise, and the first shapes at a few T."""
    copy, gemm = (record["ceilings"].get(k) for k in ("copy_gb_per_s", "linear_tflop_per_s"))
    lines = [
        f"copy {copy or 0:.0f} GB/s, best F.linear bf16 {gemm or 0:.0f} TFLOP/s, "
        f"{len(record['results'])} measurements, {sum('failed' in r for r in record['results'])} failed, "
        f"complete: {record['finished']}",
        *(f"{name}: {version}" for name, version in record["peers"].items()),
    ]
    for row in (r for r in record["results"] if r["what"] == "nf4_dequantize"):
        if "gb_per_s" in row:
            lines.append(
                f"nf4_dequantize {row['n']}x{row['k']}: {row['gb_per_s']:.0f} GB/s"
                + (f", {100 * row['gb_per_s'] / copy:.0f} % of copy" if copy else "")
            )
    names = [name for name, _, _ in COLUMNS]
    lines.append("device µs (eager where no graph)  " + "  ".join(names))
    for n, k in _shapes(record, 0.0)[:shapes]:
        present = sorted({r["t"] for r in record["results"] if (r.get("n"), r.get("k")) == (n, k) and r["t"]})
        for t in [t for t in present if t in tokens] or present:
            cells = []
            for name, what, mode in COLUMNS:
                row = _find(record, n=n, k=k, t=t, p=0.0, what=what, mode=mode) or {}
                times = row.get("graph") or row.get("eager")
                text = "failed" if "failed" in row else microseconds(times["median_us"]) if times else NOTHING
                cells.append(text.rjust(len(name)))
            lines.append(f"{f'{n}x{k} T={t}':<32}  " + "  ".join(cells))
    failures = [r for r in record["results"] if "failed" in r]
    for r in failures[:5]:
        lines.append(
            f"failed: {r['what']} {r['mode']} {r.get('n')}x{r.get('k')} T={r['t']}: {r['failed'][:120]}"
        )
    return "\n".join(lines)

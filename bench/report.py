"""Turns pytest-benchmark's JSON of this suite into a Markdown table.

    python -m bench.report FILE.json

A row is one op on one shape: its median and p10-p90 over the rounds, its rate, and its time divided by the
dense product's of the same shape, timed in the same run (F.linear; for the backward, dy·W; for one token
where an op has no tokens). Below 1: faster than the dense layer.
"""

import json
import statistics
import sys
from pathlib import Path

Key = tuple[str, int, int, int, str]


def times_us(benchmark: dict) -> tuple[float, float, float]:
    """median, p10, p90 in microseconds."""
    data = benchmark["stats"]["data"]
    deciles = statistics.quantiles(data, n=10, method="inclusive") if len(data) > 1 else data * 9
    return tuple(1e6 * value for value in (statistics.median(data), deciles[0], deciles[8]))


def shape_of(info: dict) -> Key:
    return (info["op"], info["n"], info["k"], info["t"], info["dtype"])


def dense_medians(benchmarks: list[dict]) -> dict[Key, float]:
    rows = [b for b in benchmarks if b["extra_info"].get("variant") == "dense"]
    return {shape_of(b["extra_info"]): times_us(b)[0] for b in rows}


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def row(benchmark: dict, dense: dict[Key, float]) -> str:
    info = benchmark["extra_info"]
    median, low, high = times_us(benchmark)
    flops = number(info["flops"] / median / 1e3) if info["flops"] else ""
    yardstick = dense.get(shape_of(info))
    cells = (
        info["op"] if info["variant"] != "dense" else "dense product",
        f"{info['n']}x{info['k']}",
        str(info["t"] or ""),
        info["dtype"],
        str(info["p"] or ""),
        number(median),
        f"{number(low)}-{number(high)}",
        number(info["bytes"] / median / 1e3),
        flops,
        "" if yardstick is None else f"{median / yardstick:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def markdown(result: dict) -> str:
    benchmarks = [b for b in result["benchmarks"] if "op" in b.get("extra_info", {})]
    dense = dense_medians(benchmarks)
    about = result["machine_info"].get("lora_kernels", {})
    lines = [
        f"# CPU benchmarks: {about.get('cpu', 'unknown machine')}, {about.get('threads', '?')} thread(s)",
        "",
        f"{result['datetime'][:19]}, commit {about.get('commit') or 'unknown'}, torch {about.get('torch')}, "
        f"kernels {about.get('cpu_isa')}, pinning {about.get('pinning')}. "
        "NF4 with double quantisation, r = 16, random normal data.",
        "",
    ]
    head = "| op | W0 | T | dtype | dropout | median µs | p10-p90 | GB/s | GFLOP/s | time / dense |"
    for op in dict.fromkeys(b["extra_info"]["op"] for b in benchmarks):
        of_op = [b for b in benchmarks if b["extra_info"]["op"] == op]
        order = {"lora_kernels": 0, "dense": 1}
        keys = list(dict.fromkeys(shape_of(b["extra_info"]) for b in of_op))
        of_op.sort(key=lambda b: (keys.index(shape_of(b["extra_info"])), order[b["extra_info"]["variant"]]))
        lines += [f"## {op}", "", head, "|---|---|---:|---|---:|---:|---:|---:|---:|---:|"]
        lines += [*(row(b, dense) for b in of_op), ""]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m bench.report FILE.json", file=sys.stderr)
        return 2
    try:
        result = json.loads(Path(argv[0]).read_text())
        text = markdown(result)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.report: error: {argv[0]} is not a result of this suite ({error!r})", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the user sees: progress while it runs, tables at the end, and loss.png."""

import io
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
_LINES = 20  # progress lines of a run whose output is no terminal


class Progress:
    """Loss, tokens/s and time left: a bar on a terminal, about twenty plain lines elsewhere."""

    def __init__(self, description: str, total: int, done: int = 0, stream: TextIO | None = None):
        from tqdm import tqdm

        self.stream = sys.stderr if stream is None else stream
        self.description, self.total, self.first = description, total, done
        self.began = time.perf_counter()
        self.bar = None
        if self.stream.isatty() and min(os.get_terminal_size(self.stream.fileno())) > 0:  # some say 0 x 0
            self.bar = tqdm(
                desc=description,
                total=total,
                initial=done,
                file=self.stream,
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
            )

    def update(self, done: int, loss: float, tokens_per_second: float) -> None:
        """Show the state after step `done`."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self.bar.update(done - self.bar.n)
            return
        if done % max(1, self.total // _LINES) == 0 or done == self.total:
            left = (time.perf_counter() - self.began) / (done - self.first) * (self.total - done)
            print(
                f"{self.description}: step {done}/{self.total}, loss {loss:.3f}, "
                f"{tokens_per_second:,.0f} tokens/s, {clock(left)} left",
                file=self.stream,
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(text, file=self.stream, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """1:05, 2:00:07"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size(number: int) -> str:
    """Bytes for people: 412 B, 3.2 KiB, 18.6 MiB."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def table(rows: Sequence[Sequence[str]], indent: int = 2) -> str:
    """Rows of cells as text: the first row a heading, the first column to the left, others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append(" " * indent + "   ".join(cells).rstrip())
        if number == 0:
            lines.append(" " * indent + "   ".join("─" * w for w in widths))
    return "\n".join(lines)


def summary(metrics: dict) -> str:
    """The tables at the end of a run, from the content of metrics.json."""
    evals = metrics["evaluation"]
    heldout, base = evals["heldout"], evals["base_text"]
    losses = [
        ["loss in nats per token (perplexity)", "before", "after", "change"],
        _loss_row(f"held-out data, {heldout['rows']} rows", heldout),
    ]
    if base is not None:
        losses.append(_loss_row(f"the base's own text, {base['rows']} rows", base))
    parts = [table(losses)]
    if base is None:
        parts.append("  the base's own text: not measured (--base-text FILE names such text)")
    memory = metrics["memory"]
    rows = [["memory", "this run, measured", "full fine-tuning, computed"]]
    for part, label in memory["labels"].items():
        full = memory["full_finetuning"][part]
        bound = "≥ " if part == "activations_peak" else ""
        rows.append([label, size(memory["measured"][part]), bound + size(full) if full else "-"])
    sums = [sum(memory[kind].values()) for kind in ("measured", "full_finetuning")]
    rows.append(["together", size(sums[0]), "≥ " + size(sums[1])])
    parts.append(table(rows))
    parameters, times = metrics["parameters"], metrics["times"]
    share = parameters["trainable"] / parameters["total"]
    facts = [
        f"  trainable     {parameters['trainable']:,} of {parameters['total']:,} parameters ({share:.2%}), "
        f"{parameters['layers']} layers",
        f"  adapter       {size(metrics['adapter_bytes'])} on disk",
        f"  training      {metrics['steps']} steps in {clock(times['training'])}, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
    ]
    parts.append("\n".join(facts))
    return "\n\n".join(parts)


def _loss_row(label: str, result: dict) -> list[str]:
    before, after = result["before"], result["after"]
    shown = [f"{loss:.4f} ({perplexity(loss):.3g})" for loss in (before, after)]
    return [label, *shown, f"{after - before:+.4f}"]


def samples(prompt: str, before: str, after: str) -> str:
    """The same beginning, continued by the model before and after."""

    def block(text: str) -> str:
        shown = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)  # no terminal commands
        return "\n".join("    │ " + line for line in shown.split("\n"))

    return (
        f"  a sample; the prompt:\n{block(prompt)}\n  continued before:\n{block(before)}\n"
        f"  continued after:\n{block(after)}"
    )


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(average / total)
    return result


def loss_plot(metrics: dict) -> bytes:
    """loss.png as bytes: the training loss of every step, its moving average, and the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = metrics["losses"]
    steps = range(1, len(losses) + 1)
    ink, blue, orange, green = "#333333", "#2a6fb0", "#d9730d", "#3a8f5c"
    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=144, layout="constrained")
    axes.plot(steps, losses, color=blue, alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color=blue, linewidth=2, label="training, moving average")
    marks = [("heldout", "held-out data", orange, "o"), ("base_text", "the base's own text", green, "s")]
    for key, label, color, marker in marks:
        result = metrics["evaluation"][key]
        if result is not None:
            at = [int(step) for step in result["by_step"]]
            values = list(result["by_step"].values())
            style = {"linestyle": "--", "linewidth": 1.2, "markersize": 6, "markeredgecolor": "white"}
            axes.plot(at, values, marker=marker, color=color, label=label, **style)
    axes.set_xlabel("optimizer step", color=ink)
    axes.set_ylabel("loss [nats per token]", color=ink)
    config = metrics["config"]
    base = "dense" if config["quantize"] == "none" else config["quantize"].upper()
    heldout = metrics["evaluation"]["heldout"]
    axes.set_title(
        f"LoRA r = {config['r']} over {base}, learning rate {config['lr']:g}: "
        f"held-out loss {heldout['before']:.3f} → {heldout['after']:.3f}",
        fontsize=11, color=ink, loc="left",
    )  # fmt: skip
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(left=-0.01 * len(losses))  # room for the mark at 0
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return buffer.getvalue()

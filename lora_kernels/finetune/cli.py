"""The command line of `python -m lora_kernels finetune`: options in, exit status out."""

import argparse
import importlib.util
import sys
import time
from dataclasses import fields
from typing import NoReturn

from lora_kernels.finetune.errors import FinetuneError, Interrupted, RunError, UsageError
from lora_kernels.finetune.settings import (
    LR_BUILT_IN_BASE,
    LR_GIVEN_MODEL,
    OPTIMIZERS,
    STEPS_BUILT_IN_DATA,
    Settings,
    check,
    resolve,
)

PROGRAM = "lora_kernels finetune"
_NEEDED = ("transformers", "safetensors", "tqdm", "matplotlib")

_DESCRIPTION = """\
Fine-tune a causal language model with LoRA over a frozen base in NF4 (QLoRA) or dense, report what it
gained, what it forgot and what it cost, and check that the saved adapter reproduces it exactly.

Without --model and --data a small byte-level base is trained once on the documentation of Python's standard
library (and cached), then adapted to the library's source code: real text, no download, a few minutes.
"""
_EPILOG = """\
example:
  python -m lora_kernels finetune --model ./Llama-3.2-1B --data train.jsonl --epochs 2 --output runs/math
  python -m lora_kernels finetune --resume --output runs/math    # goes on where it was interrupted

files in --output:
  adapter_config.json, adapter_model.safetensors (PEFT's format), metrics.json, loss.png;
  checkpoint.pt while the run is unfinished
exit status:
  0 done; 1 the run failed; 2 bad arguments or data; 130 Ctrl-C, 143 SIGTERM: a checkpoint was saved
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the usage first: more than one line
        raise UsageError(f"{message} (--help explains the options)")


def build_parser() -> argparse.ArgumentParser:
    """The parser. An option that was not given is absent from the result, so that --resume can tell."""
    parser = _Parser(
        prog=f"python -m {PROGRAM}",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28, width=110
        ),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    defaults = Settings()

    def add(group, name: str, text: str, **kwargs) -> None:
        default = getattr(defaults, name[2:].replace("-", "_"))
        if "action" not in kwargs and default is not None:
            text += f" (default: {default})"
        group.add_argument(name, help=text, **kwargs)

    group = parser.add_argument_group("model and data")
    add(
        group,
        "--model",
        "folder of a Hugging Face causal language model (default: the built-in base)",
        metavar="DIR",
    )
    data_help = (
        "text file, or JSON lines (.jsonl, .ndjson, .json) with 'text' or 'prompt' and 'completion', where "
        "only the completion is learnt (default: the source code of Python's standard library)"
    )
    add(group, "--data", data_help, metavar="FILE")
    add(group, "--eval-data", "held-out data, as --data (default: a part of --data)", metavar="FILE")
    add(
        group,
        "--eval-fraction",
        "part of --data held out: whole records, or the end of a text",
        type=float,
        metavar="X",
    )
    add(group, "--eval-rows", "evaluate on at most this many held-out rows", type=int, metavar="N")
    base_help = (
        "text of the kind the base was trained on, to measure what it forgets (default: held-out "
        "documentation for the built-in base; not measured for another model)"
    )
    add(group, "--base-text", base_help, metavar="FILE")

    group = parser.add_argument_group("adapter")
    add(group, "--r", "rank", type=int, metavar="N")
    add(group, "--lora-alpha", "the update counts alpha/r", type=float, metavar="ALPHA")
    add(group, "--lora-dropout", "dropout on the adapter's input", type=float, metavar="P")
    add(group, "--use-rslora", "count the update alpha/sqrt(r) instead", action="store_true")
    target_help = (
        "all-linear (every linear layer but the output head), names separated by commas (q_proj,v_proj), or "
        "a regular expression for whole module paths"
    )
    add(group, "--target-modules", target_help, metavar="NAMES")
    add(group, "--quantize", "the frozen weights: 4-bit NF4, or as they are", choices=["nf4", "none"])
    dtype_help = "of the model; auto takes the one its files have"
    add(group, "--dtype", dtype_help, choices=["auto", "float32", "bfloat16", "float16"])

    device_help = "cpu, cuda or cuda:N; auto takes a GPU where there is one that this build has kernels for"
    add(group, "--device", device_help, metavar="NAME")

    group = parser.add_argument_group("training")
    lr_help = f"peak learning rate (default: {LR_GIVEN_MODEL} with --model, else {LR_BUILT_IN_BASE})"
    add(group, "--lr", lr_help, type=float, metavar="X")
    add(group, "--lora-plus-ratio", "B learns this many times as fast as A (LoRA+)", type=float, metavar="X")
    add(group, "--lr-scheduler", "after the warm-up", choices=["cosine", "linear", "constant"])
    add(
        group,
        "--warmup-ratio",
        "part of the steps over which the learning rate rises",
        type=float,
        metavar="X",
    )
    add(group, "--weight-decay", "decoupled weight decay of the adapter", type=float, metavar="X")
    optim_help = "adamw keeps its state in memory, the paged ones in pages that may leave it"
    add(group, "--optim", optim_help, choices=list(OPTIMIZERS))
    resident_help = (
        "MiB of a paged optimizer's state in the device's memory at once; the rest lies in a file, for a GPU "
        "in the host's memory (default: on a CPU all of it, on a GPU what a step needs)"
    )
    add(group, "--optim-resident-mb", resident_help, type=float, metavar="N")
    add(group, "--max-grad-norm", "clip the gradient to this norm; 0: do not clip", type=float, metavar="X")
    steps_help = f"optimizer steps (default: {STEPS_BUILT_IN_DATA} without --data, else see --epochs)"
    add(group, "--steps", steps_help, type=int, metavar="N")
    add(
        group,
        "--epochs",
        "passes over the training data, instead of --steps (default: 1)",
        type=float,
        metavar="X",
    )
    seq_help = "tokens in a row: text is packed into rows of this length, longer records are cut"
    add(group, "--seq-len", seq_help, type=int, metavar="N")
    add(group, "--batch-size", "rows in a forward pass", type=int, metavar="N")
    add(group, "--grad-accum", "forward passes in an optimizer step", type=int, metavar="N")
    checkpointing_help = "recompute activations in the backward pass: slower, less memory"
    add(group, "--gradient-checkpointing", checkpointing_help, action="store_true")
    add(
        group,
        "--seed",
        "of the adapter's start, the data order, the dropout and the split",
        type=int,
        metavar="N",
    )

    group = parser.add_argument_group("output")
    output_help = "new or empty folder for the results (default: runs/finetune-DATE-TIME)"
    add(group, "--output", output_help, metavar="DIR")
    resume_help = (
        "continue the interrupted run in --output, to the same losses; its options are in its checkpoint"
    )
    add(group, "--resume", resume_help, action="store_true")
    add(group, "--overwrite", "replace the results of an earlier run in --output", action="store_true")
    add(group, "--save-every", "steps between checkpoints", type=int, metavar="N")
    eval_help = "steps between evaluations; 0: only before and after (default: a fifth of the steps)"
    add(group, "--eval-every", eval_help, type=int, metavar="N")
    add(
        group, "--sample-prompt", "text to continue before and after (default: held-out text)", metavar="TEXT"
    )
    add(group, "--sample-tokens", "length of the two samples; 0: none", type=int, metavar="N")
    return parser


def parse(argv: list[str]) -> dict:
    """Only the settings that were given. Raises UsageError; --help prints and leaves with SystemExit(0)."""
    given = vars(build_parser().parse_args(argv))
    known = {field.name for field in fields(Settings)}
    assert given.keys() <= known, given.keys() - known
    return given


def _check_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(
            f"the package {missing[0]} is not installed; pip install 'lora-kernels[finetune]' brings it along"
        )


def main(argv: list[str]) -> int:
    """Run the command; its exit status: 0, 1 (failed), 2 (bad input), 128 + n (ended by signal n)."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    try:
        given = parse(argv)
        if given.get("resume"):
            if "output" not in given:
                raise UsageError("argument --resume: needs the --output of the run to continue")
        else:
            given.setdefault("output", time.strftime("runs/finetune-%Y%m%d-%H%M%S"))
            check(Settings(**given))
        _check_packages()
        from lora_kernels.finetune.run import (
            resume,
            start,
        )  # imports torch and transformers: seconds, not for --help

        return resume(given) if given.get("resume") else start(resolve(Settings(**given)))
    except FinetuneError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        print(f"{PROGRAM}: interrupted; {stop.note or 'nothing was saved'}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:  # before the handlers are in place, or a second Ctrl-C
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130

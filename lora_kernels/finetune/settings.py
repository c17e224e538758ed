"""What one run is asked to do: the options, their defaults, and what each may be."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_kernels.finetune.errors import UsageError

# Defaults that differ with the model: adapting a small base far needs a larger step than nudging a large one.
# Built-in base, 120 steps, held-out loss (and the base's own text): 2e-3 1.583 (1.656), 4e-3 1.539 (1.668),
# 8e-3 1.541 (1.708), 1e-3 with LoRA+ ratio 8 1.537 (1.663).
LR_GIVEN_MODEL = 2e-4
LR_BUILT_IN_BASE = 4e-3
OPTIMIZERS = ("adamw", "paged_adamw", "paged_adamw8bit", "paged_lion")
STEPS_BUILT_IN_DATA = 180  # a minute and a half on two cores


@dataclass
class Settings:
    """The options of `finetune`, one attribute each. None means: not given, or decided by `resolve`."""

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    base_text: str | None = None
    output: str | None = None
    resume: bool = False
    overwrite: bool = False

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    use_rslora: bool = False
    target_modules: str = "all-linear"
    quantize: str = "nf4"
    dtype: str = "auto"
    device: str = "auto"

    lr: float | None = None
    lora_plus_ratio: float = 1.0
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    optim: str = "adamw"
    optim_resident_mb: float | None = None
    max_grad_norm: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    seq_len: int = 256
    batch_size: int = 8
    grad_accum: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0

    save_every: int = 20
    eval_every: int | None = None
    eval_fraction: float = 0.05
    eval_rows: int = 64
    sample_prompt: str | None = None
    sample_tokens: int = 200


# Settings that may change between a run and its continuation: none of them changes a loss.
MAY_CHANGE_ON_RESUME = {
    *("output", "resume", "overwrite", "save_every", "sample_prompt", "sample_tokens", "optim_resident_mb"),
}
_PATHS = ("model", "data", "eval_data", "base_text")


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def check(settings: Settings) -> None:
    """Check every number and choice before anything is read or written.

    Raises:
        UsageError: naming the option, what it got and what it may be.
    """
    s = settings
    _require("r", s.r, s.r >= 1, "an integer of at least 1")
    _require("lora_alpha", s.lora_alpha, 0 < s.lora_alpha < math.inf, "a number above 0")
    _require("lora_dropout", s.lora_dropout, 0 <= s.lora_dropout < 1, "a probability: 0 or more, below 1")
    _require("lr", s.lr, s.lr is None or 0 < s.lr < math.inf, "a number above 0")
    _require(
        "lora_plus_ratio", s.lora_plus_ratio, 1 <= s.lora_plus_ratio < math.inf, "a number of at least 1"
    )
    _require("warmup_ratio", s.warmup_ratio, 0 <= s.warmup_ratio < 1, "a fraction: 0 or more, below 1")
    _require("weight_decay", s.weight_decay, 0 <= s.weight_decay < math.inf, "a number of at least 0")
    _require("max_grad_norm", s.max_grad_norm, 0 <= s.max_grad_norm < math.inf, "a number of at least 0")
    _require("steps", s.steps, s.steps is None or s.steps >= 1, "an integer of at least 1")
    _require("epochs", s.epochs, s.epochs is None or 0 < s.epochs < math.inf, "a number above 0")
    _require("seq_len", s.seq_len, s.seq_len >= 8, "an integer of at least 8")
    _require("seed", s.seed, 0 <= s.seed < 2**32, "an integer from 0 to 2^32 - 1")
    _require("eval_fraction", s.eval_fraction, 0 < s.eval_fraction < 1, "a fraction between 0 and 1")
    _require("sample_tokens", s.sample_tokens, s.sample_tokens >= 0, "an integer of at least 0")
    _require("device", s.device, re.fullmatch(r"auto|cpu|cuda(:\d+)?", s.device), "auto, cpu, cuda or cuda:N")
    for name in ("batch_size", "grad_accum", "save_every", "eval_rows"):
        value = getattr(s, name)
        _require(name, value, value >= 1, "an integer of at least 1")
    _require(
        "eval_every", s.eval_every, s.eval_every is None or s.eval_every >= 0, "an integer of at least 0"
    )
    if s.steps is not None and s.epochs is not None:
        raise UsageError("argument --epochs: not together with --steps; give one of them")
    budget = s.optim_resident_mb
    _require("optim_resident_mb", budget, budget is None or 0 < budget < math.inf, "a number above 0")
    if budget is not None and s.optim == "adamw":
        raise UsageError(
            "argument --optim-resident-mb: not together with --optim adamw, which keeps its state in memory; "
            "give a paged one"
        )
    if not s.target_modules.strip(" ,"):
        raise UsageError("argument --target-modules: got nothing, expected all-linear, names or a pattern")
    if s.sample_prompt is not None and not s.sample_prompt.isascii():
        try:
            s.sample_prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError("argument --sample-prompt: got bytes that are not UTF-8 text") from error
    if s.model is not None:
        _check_model_folder(Path(s.model))
    for name in _PATHS[1:]:
        path = getattr(s, name)
        if path is not None and not Path(path).is_file():
            problem = "is a folder" if Path(path).is_dir() else "no such file"
            raise UsageError(f"argument {option(name)}: {problem}: {path}")


def _require(name: str, value: Any, good: Any, expected: str) -> None:
    if not good:
        raise UsageError(f"argument {option(name)}: got {value}, expected {expected}")


def _check_model_folder(folder: Path) -> None:
    expected = "expected the folder of a Hugging Face causal language model (config.json, tokenizer, weights)"
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise UsageError(f"argument --model: {problem}: {folder}; {expected}")
    if not (folder / "config.json").is_file():
        raise UsageError(f"argument --model: {folder} has no config.json; {expected}")


def resolve(settings: Settings) -> Settings:
    """Fill in what depends on other options, and make paths absolute so that a resumed run finds them."""
    filled = Settings(**vars(settings))
    for name in _PATHS:
        value = getattr(filled, name)
        if value is not None:
            setattr(filled, name, str(Path(value).resolve()))
    if filled.lr is None:
        filled.lr = LR_BUILT_IN_BASE if filled.model is None else LR_GIVEN_MODEL
    if filled.steps is None and filled.epochs is None:
        if filled.data is None:
            filled.steps = STEPS_BUILT_IN_DATA
        else:
            filled.epochs = 1.0
    return filled


def continued(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """The settings of a resumed run: the checkpoint's, with those given now checked against them.

    Args:
        saved: settings as the checkpoint holds them (resolved).
        given: only what stood on the command line.

    Raises:
        UsageError: an option differs from the checkpoint's and would change the losses. The number of steps
            is one of them, because the learning rate's course depends on it.
    """
    settings = Settings(**{f.name: saved[f.name] for f in fields(Settings) if f.name in saved})
    for name, value in given.items():
        if name in _PATHS and value is not None:
            value = str(Path(value).resolve())
        if name in MAY_CHANGE_ON_RESUME:
            setattr(settings, name, value)
        elif value != getattr(settings, name):
            raise UsageError(
                f"argument {option(name)}: got {value}, but the run to resume has {getattr(settings, name)}; "
                f"leave it out, or start a new run in another --output"
            )
    return settings

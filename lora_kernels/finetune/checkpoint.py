"""One file, checkpoint.pt, that holds all a run needs to go on bit for bit: replaced whole, or not at all."""

import io
from pathlib import Path
from typing import Any

import torch

from lora_kernels.adapters.files import write_atomically
from lora_kernels.finetune.errors import UsageError, one_line, writing

FILE = "checkpoint.pt"
_VERSION = 1
# What a run needs to go on: Trainer.state(), the settings, and what the data was.
_HOLDS = {
    **dict.fromkeys(("settings", "sources", "adapter", "optimizer", "scaler", "rng", "history"), dict),
    **dict.fromkeys(("step", "threads"), int),
}


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint. The one before stays valid until the new one is complete on the disk.

    Args:
        state: tensors, numbers, strings, lists and dicts only, so that loading runs no code.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    buffer = io.BytesIO()  # so that a write that fails is an OSError of Python's, with its reason
    torch.save({"version": _VERSION, **state}, buffer)
    path = folder / FILE
    with writing(path, "free some space, then go on from the last checkpoint with --resume"):
        write_atomically(path, buffer.getvalue())


def load(folder: Path) -> dict[str, Any]:
    """Read the checkpoint.

    Raises:
        UsageError: there is none, or it is not one of ours.
    """
    path = folder / FILE
    if not path.is_file():
        reason = (
            "the run there is finished"
            if (folder / "metrics.json").is_file()
            else f"there is no {FILE} in it"
        )
        raise UsageError(f"argument --resume: nothing to resume in {folder}: {reason}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the reader
        raise UsageError(f"argument --resume: {path} cannot be read: {one_line(error)}") from error
    if not isinstance(state, dict) or state.get("version") != _VERSION:
        raise UsageError(f"argument --resume: {path} is not a checkpoint of this version of lora_kernels")
    wrong = next((key for key, kind in _HOLDS.items() if not isinstance(state.get(key), kind)), None)
    if wrong is not None:
        raise UsageError(
            f"argument --resume: {path} is damaged: its entry {wrong!r} is missing or of another type"
        )
    return state


def remove(folder: Path) -> None:
    """Remove the checkpoint of a run whose results are all written."""
    (folder / FILE).unlink(missing_ok=True)

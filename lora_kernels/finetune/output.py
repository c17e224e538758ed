"""The output folder: what may be in it at the start, and what a run puts there."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_kernels.adapters.files import CONFIG_FILE, WEIGHTS_FILE, remove_parts
from lora_kernels.finetune import checkpoint
from lora_kernels.finetune.errors import UsageError

METRICS, PLOT = "metrics.json", "loss.png"
ADAPTER = (CONFIG_FILE, WEIGHTS_FILE)
_ALL = (checkpoint.FILE, METRICS, PLOT, *ADAPTER)


@contextmanager
def output_folder(output: Path, overwrite: bool) -> Iterator[None]:
    """Make the folder now, so that one that cannot be written ends the run before the work.

    If the run ends before it has anything to keep, what was made is taken away again.

    Raises:
        UsageError: it holds something else, or an earlier run and not `overwrite`, or cannot be written.
    """
    made: list[Path] = []
    try:
        _check(output, overwrite)
        path = output
        while not path.exists():
            made.append(path)
            path = path.parent
        try:
            output.mkdir(parents=True, exist_ok=True)
            probe = output / ".writable"
            probe.touch()
            probe.unlink()
        except OSError:
            _remove_empty(made)
            raise
    except OSError as error:
        raise UsageError(f"argument --output: cannot write in {output}: {error.strerror}") from error
    try:
        with locked(output):
            yield
    finally:
        _remove_empty(made)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other runs out of the folder; the lock is on the folder itself and ends with the process.

    What a killed run left half-written is removed.

    Raises:
        UsageError: another run holds it.
    """
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"argument --output: another run is writing in {output}") from error
        except OSError:
            pass  # a file system without locks, as some network ones: then there is none
        for name in _ALL:
            remove_parts(output / name)
        yield
    finally:
        os.close(descriptor)


def clear(output: Path) -> None:
    """Remove an earlier run's results (--overwrite), so that nothing of it stands beside the new ones."""
    for name in _ALL:
        (output / name).unlink(missing_ok=True)


def _check(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"argument --output: {output} is a file, expected a folder")
    content = {path.name for path in output.iterdir()} if output.is_dir() else set()
    content = {name for name in content if not _is_part(name)}
    if not content or (overwrite and content & set(_ALL)):
        return
    if checkpoint.FILE in content:
        advice = "holds an unfinished run: --resume continues it, --overwrite starts again"
    elif METRICS in content:
        advice = "holds the results of another run: choose another folder, or --overwrite"
    else:
        advice = f"is not empty ({min(content)}): choose a new or an empty folder"
    raise UsageError(f"argument --output: {output} {advice}")


def _is_part(name: str) -> bool:
    """Whether a run that was killed while it wrote a file has left this: half of nothing that counts."""
    return any(re.fullmatch(rf"\.{re.escape(whole)}\.\d+\.part", name) for whole in _ALL)


def _remove_empty(made: list[Path]) -> None:
    for path in made:
        with suppress(OSError):  # one that has content, or was never made, stays as it is
            path.rmdir()

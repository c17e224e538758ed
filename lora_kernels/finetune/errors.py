"""The two ways a run may end badly without being a bug, and the one line that each prints."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FinetuneError(Exception):
    """Ends the command with one line on stderr and `exit_code`."""

    exit_code = 1


class UsageError(FinetuneError):
    """An argument, or a file that an argument names, is not what it may be."""

    exit_code = 2


class RunError(FinetuneError):
    """The run cannot go on: a full disk, a loss that is not finite, a failed check."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came. A BaseException, like KeyboardInterrupt: no handler swallows it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum
        self.note = ""  # what was saved, and how to go on


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The first paragraph of a message on one line."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError):  # its text is the key alone
        text = f"{type(error).__name__}: {text}"
    text = " ".join(text.split("\n\n")[0].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's error in an exception's chain, if there is one.

    Libraries written in Rust or C++ pass on only its text.
    """
    seen = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        if "os error 28" in str(seen) or "No space left on device" in str(seen):
            return OSError(errno.ENOSPC, "No space left on device")
        if "os error 27" in str(seen):
            return OSError(errno.EFBIG, "File too large")
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Turn an operating-system error inside the block into one line that names `path`; other errors pass."""
    try:
        yield
    except Exception as error:
        found = _os_error(error)
        if found is None:
            raise
        if not advice and found.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space"
        tail = f"; {advice}" if advice else ""
        raise RunError(f"cannot write {path}: {found.strerror or found}{tail}") from error

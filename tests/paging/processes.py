"""Children for the tests: fresh interpreters, so that limits, memory and crashes are theirs alone."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from lora_kernels import _paging

ROOT = Path(__file__).parents[2]
PAGE = 1 << 16

# The module by its file: the package would import torch, which takes seconds and memory.
PREAMBLE = (
    f"""
import errno, importlib.util, mmap, os, resource, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("_paging", {_paging.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Pager = module.Pager
PAGE = 1 << 16
"""
    + """

def fill(pager, page, value, dirty=True):
    pager.pin(page)
    pager.view(page)[64:] = bytes([value]) * (pager.page_bytes - 64)
    pager.unpin(page, dirty)

def holds(pager, page, value):
    pager.pin(page)
    same = pager.view(page)[64:] == bytes([value]) * (pager.page_bytes - 64)
    pager.unpin(page, False)
    return same

def fills(pager, count, dirty=True):
    pages = [pager.allocate(0, pager.page_bytes - 64)[0] for _ in range(count)]
    for page in pages:
        fill(pager, page, page % 251 + 1, dirty)
    return pages

def status(key):
    # A line of /proc/self/status, in bytes.
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def backing_file():
    # The file descriptor of this process that leads to a file without a name: the pager's.
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "(deleted)" in os.readlink(f"/proc/self/fd/{fd}"):
                return int(fd)
        except OSError:
            pass

def error_of(call, kind=OSError):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("no error")
"""
)


def start(source: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(source), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(source: str, *arguments: object, timeout: float = 60, **environment: str) -> str:
    """The output of a program, which must end well; PREAMBLE is what it can use."""
    child = start(source, *arguments, **environment)
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError(f"hangs\n{out}{err}") from None
    assert child.returncode == 0, f"exit status {child.returncode}\n{out}{err}"
    return out

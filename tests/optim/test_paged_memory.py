"""What a paged optimizer takes of a process's memory, and that it runs where its state does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STATE, BUDGET, PAGE = 128 << 20, 8 << 20, 1 << 20

# Three steps on 64 MiB of parameters, in a process that may have `limit` bytes beside them and the gradients.
CHILD = """
import json, resource, sys
import torch
import lora_kernels as lk

budget, limit, folder = (eval(a) for a in sys.argv[1:])

def numbers():
    lines = open("/proc/self/status").read().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith("Vm"))
    return {name: int(value.split()[0]) << 10 for name, value in pairs}

torch.set_num_threads(1)
warm = torch.nn.Parameter(torch.zeros(1 << 18))
warm.grad = torch.ones_like(warm)
optimizer = lk.optim.PagedAdamW([warm], resident_bytes=1, directory=folder)
optimizer.step(), optimizer.step(), optimizer.close()
p = torch.nn.Parameter(torch.zeros(16 << 20))
p.grad = torch.ones_like(p)
optimizer = lk.optim.PagedAdamW([p], lr=0.5, resident_bytes=budget, page_bytes=1 << 20, directory=folder)
before = numbers()
resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + limit, resource.RLIM_INFINITY))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
for _ in range(3):
    optimizer.step()
after = numbers()
print(json.dumps({
    "peak": after["VmHWM"] - before["VmRSS"], "first": p[0].item(), "last": p[-1].item(), **optimizer.stats()
}))
"""


def run(budget: int | None, limit: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, repr(budget), repr(limit), repr(str(folder))]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_step_runs_where_its_state_does_not_fit(tmp_path):
    """The limit is on all memory that it may write to; tests/paging asserts what the page cache has."""
    room = BUDGET + 2 * PAGE + (6 << 20)  # and the tables of 128 pages, and the allocator's own
    done = run(BUDGET, room, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["peak"] <= room
    assert result["peak_resident_bytes"] <= BUDGET and result["pages"] >= STATE // PAGE
    assert result["first"] == result["last"] != 0
    whole = run(None, room, tmp_path)
    assert whole.returncode != 0 and "MemoryError" in whole.stderr

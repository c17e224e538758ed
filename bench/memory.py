"""Peak memory of one forward and backward, each contender in a process of its own: python -m bench.memory [T]

NF4 4096x4096, r = 16, bf16. The peak is that of the process's resident set, less what it held before.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch

import lora_kernels as lk
from bench import peers
from bench.problem import Base
from bench.shapes import SCALING

CONTENDERS = ("lora_kernels", "bitsandbytes + PEFT", "dense + PEFT LoRA")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is resident now


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.M).group(1)) * 1024


def child(name: str, t: int) -> int:
    """Bytes that one forward and backward of T tokens adds to the peak."""
    torch.manual_seed(0)
    base = Base(4096, 4096, torch.bfloat16, torch.device("cpu"))
    A, B = base.lora_A.requires_grad_(), base.lora_B.requires_grad_()
    if name == "lora_kernels":

        def call(x: torch.Tensor) -> torch.Tensor:
            return lk.lora_linear(x, base.nf4, A, B, scaling=SCALING)

    elif name == "bitsandbytes + PEFT":
        call = peers.bitsandbytes_peft(base.nf4, A.detach(), B.detach(), 0.0)
    else:
        parts = base.nf4.dequantize()
        call = peers.dense_peft(parts, A.detach(), B.detach(), 0.0)
    small = torch.randn(8, 4096).bfloat16().requires_grad_()
    call(small).sum().backward()  # what initialises itself does so before
    x = torch.randn(t, 4096).bfloat16().requires_grad_()
    dy = torch.randn(t, 4096).bfloat16()
    x.grad = torch.zeros_like(x)
    _reset_peak()
    before = _peak_bytes()
    call(x).backward(dy)
    return _peak_bytes() - before


def main(argv: list[str]) -> int:
    if len(argv) == 3 and argv[0] == "--child":
        print(child(argv[1], int(argv[2])))
        return 0
    t = int(argv[0]) if argv else 2048
    print(f"| T = {t}, forward + backward | MiB beyond weights, x and dy |\n|---|---:|")
    for name in CONTENDERS:
        command = [sys.executable, "-m", "bench.memory", "--child", name, str(t)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = done.stdout.split()[-1:] if done.returncode == 0 else []
        print(f"| {name} | {int(last[0]) / 2**20:.0f} |" if last else f"| {name} | failed |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

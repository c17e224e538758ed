"""A tiny byte-level Llama and tiny data: the whole command in a second or two."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """Tests compare losses between processes bit for bit, which takes the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """A shell's background processes ignore SIGINT, and the command leaves it at that."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder as from save_pretrained: 2 layers, hidden size 64, untrained."""
    return tiny_llama.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def text_file(tmp_path) -> Path:
    """About 4000 bytes of text whose end differs from its beginning."""
    path = tmp_path / "data.txt"
    path.write_text(tiny_llama.squares())
    return path


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path) -> list[str]:
    """A run of a second: 8 steps, dropout on, into a folder that is not there yet."""
    return (
        f"--model {tiny_model} --data {text_file} --output {tmp_path / 'out'} --steps 8 --seq-len 32 "
        f"--batch-size 2 --r 4 --lr 1e-2 --lora-dropout 0.2 --eval-rows 4 --eval-every 3 --save-every 2 "
        f"--sample-tokens 4"
    ).split()


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_process(
    arguments: list[str], before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `before` is Python that runs first, to set a trap."""
    code = f"import sys\n{before}\nfrom lora_kernels.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "finetune", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )

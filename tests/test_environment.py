"""The command line: env, help, and commands that do not exist."""

import subprocess
import sys

import pytest
import torch

import lora_kernels as lk
from lora_kernels import environment
from lora_kernels.__main__ import main
from lora_kernels.backends import cuda
from lora_kernels.backends.native import _C, cpu_isa


def run(*arguments):
    command = [sys.executable, "-m", "lora_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_env_prints_what_was_built_and_what_runs():
    result = run("env")
    assert result.returncode == 0, result.stderr
    for part in (lk.__version__, torch.__version__, cpu_isa(), "CUDA kernels", "backends"):
        assert part in result.stdout


def test_env_says_what_was_left_out(monkeypatch):
    class Built:
        cuda_archs, cuda_version, cuda_stream_bound = "", "", 0

    monkeypatch.setattr(environment, "_C", Built)
    assert "not built: no nvcc" in environment._cuda_lines()[0]


def test_env_lists_every_target(monkeypatch):
    class Built:
        cuda_archs, cuda_version, cuda_stream_bound = "80;90a;ptx120", "13.0", 0

    monkeypatch.setattr(environment, "_C", Built)
    assert "sm_80, sm_90a, PTX 120; they need a driver >= 580" in environment._cuda_lines()[0]


@pytest.mark.parametrize(
    "archs, there",
    [("80", False), ("80;89", False), ("90a", True), ("80;90a", True), ("80;120", False), ("80;ptx90", True)],
)
def test_clusters_are_chosen_only_where_the_library_has_their_code(archs, there, monkeypatch):
    """On a GPU of sm_90, where a library that was built with LORA_KERNELS_CUDA_ARCHS=80 runs too."""
    monkeypatch.setattr(_C, "cuda_archs", archs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert (cuda._capability.__wrapped__(torch.device("cuda", 0)) >= 90) == there


def test_bad_commands_end_with_one_line_and_status_2(capsys):
    for arguments, message in ((["nope"], "no command 'nope'"), (["env", "x"], "takes no arguments, got x")):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main([]) == 2 and "usage:" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "finetune" in capsys.readouterr().out

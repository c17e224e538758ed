"""stress.cpp under ThreadSanitizer and under AddressSanitizer and UndefinedBehaviorSanitizer: both stores."""

import os
import subprocess

import pytest

from .processes import ROOT

SANITIZERS = {"thread": "thread", "address": "address,undefined"}
CXX = os.environ.get("CXX", "g++").split()
OPTIONS = [
    "-std=c++20",
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fno-sanitize-recover=undefined",
    "-pthread",
]


@pytest.fixture(scope="module", params=SANITIZERS)
def programs(request, tmp_path_factory):
    """The program and the fake driver, both with the sanitizer."""
    folder = tmp_path_factory.mktemp(request.param)
    sanitize = f"-fsanitize={SANITIZERS[request.param]}"
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = [*CXX, sanitize, folder / "probe.cpp", "-o", folder / "probe"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"the compiler has no {sanitize}")
    if subprocess.run([folder / "probe"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"a program built with {sanitize} does not start on this system")
    sources = [s for s in sorted((ROOT / "csrc/paging").glob("*.cpp")) if s.name != "bindings.cpp"]
    here = ROOT / "tests/paging"
    program, driver = folder / "stress", folder / "libfake_cuda.so"
    subprocess.run(
        [*CXX, *OPTIONS, sanitize, here / "stress.cpp", *sources, "-o", program, "-ldl"], check=True
    )
    shared = ["-shared", "-fPIC", here / "fake_cuda.cpp", "-o", driver]
    subprocess.run([*CXX, *OPTIONS, sanitize, *shared], check=True)
    return program, driver


@pytest.mark.parametrize("store", ["cpu", "cuda"])
def test_threads_on_one_pager_are_clean(programs, store, tmp_path):
    program, driver = programs
    done = subprocess.run(
        [program, store, *([tmp_path] if store == "cpu" else [])],
        env={**os.environ, "LORA_KERNELS_CUDA_DRIVER": str(driver)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-8000:]

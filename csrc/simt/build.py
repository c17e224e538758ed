"""Builds csrc/cuda for the host stand-in.

    python csrc/simt/build.py [--sanitize] [--csrc FOLDER] [--out FOLDER]

One library, liblora_kernels_simt.so, with the launchers of csrc/cuda, their glue (the ops of namespace
lora_kernels_simt) and the engine; incremental, by ninja. The tests load it. --sanitize adds
AddressSanitizer and UndefinedBehaviorSanitizer: load it with LD_PRELOAD="$(g++ -print-file-name=libasan.so)".
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH_TARGET = "0x020b000000000000"  # as in setup.py
LIBRARY = "liblora_kernels_simt.so"


def sources(csrc: Path) -> list[Path]:
    return [*sorted(csrc.glob("cuda/*.cu")), csrc / "torch_ops_cuda.cpp", csrc / "simt" / "engine.cpp"]


def build(csrc: Path = ROOT / "csrc", out: Path = ROOT / "build" / "simt", sanitize: bool = False) -> Path:
    """The library, built from `csrc` into `out` where it is not up to date."""
    import torch
    from ninja import ninja_syntax
    from torch.utils.cpp_extension import include_paths

    out.mkdir(parents=True, exist_ok=True)
    flags = (
        "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
    )
    flags += f" -DLK_SIMT -DLK_WITH_SM90 -DTORCH_TARGET_VERSION={TORCH_TARGET}"
    if sanitize:
        flags += " -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    includes = " ".join(f"-isystem {p}" for p in [*include_paths(), sysconfig.get_path("include")])
    cxx = " ".join(shlex.split(os.environ.get("CXX", "g++")))
    torch_lib = Path(torch.__file__).parent / "lib"
    with open(out / "build.ninja", "w") as file:
        n = ninja_syntax.Writer(file, width=110)
        n.rule(
            "cxx",
            f"{cxx} {flags} {includes} -MMD -MF $out.d -x c++ -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="SIMT $in",
        )
        shared = "-shared -fsanitize=address,undefined" if sanitize else "-shared"
        n.rule(
            "link", f"{cxx} {shared} $in -o $out -L{torch_lib} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"
        )
        objects = []
        for source in sources(csrc):
            objects.append(str(out / (source.name + ".o")))
            n.build(objects[-1], "cxx", str(source))
        n.build(str(out / LIBRARY), "link", objects)
    ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    done = subprocess.run([ninja, "-C", str(out)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the stand-in could not be built:\n{done.stdout}{done.stderr}")
    return out / LIBRARY


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Builds csrc/cuda for the host stand-in.")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    out = arguments.out or ROOT / "build" / ("simt-sanitize" if arguments.sanitize else "simt")
    try:
        print(build(arguments.csrc.resolve(), out.resolve(), arguments.sanitize))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Builds `lora_kernels._C`: C++ for the CPU always, CUDA where nvcc is found (no GPU is needed to build);
and `lora_kernels._paging`, which needs neither torch nor a CUDA toolkit.

Environment:
  LORA_KERNELS_CUDA_ARCHS  GPU architectures, e.g. "80;90a". Default: the device of this machine, else 90a;
                           where the variable CI is set, every supported one and PTX.
  LORA_KERNELS_CUDA        0 leaves CUDA out.
  CXX, NVCC                the compilers.

_C is one file for every Python from 3.10 (abi3); _paging is built for one Python (pybind11), and so is the
wheel.
"""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ALL_ARCHS = "80;86;89;90a;100a;120"
PTX_ARCH = "90"  # the oldest that has every instruction used: its PTX runs on every later device
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: the oldest torch that loads the library
PYTHON_TARGET = "0x030a0000"  # Python 3.10


def find_nvcc() -> str | None:
    if os.environ.get("LORA_KERNELS_CUDA", "1") == "0":
        return None
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((c for c in candidates if c and os.path.exists(c)), None)


def device_archs() -> str | None:
    """The architectures of the GPUs of this machine, from nvidia-smi, or None without a GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = subprocess.run(
        [smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    found = sorted({line.replace(".", "") for line in query.stdout.split() if re.fullmatch(r"\d+\.\d", line)})
    # 9.0 and 10.0 have instructions that exist only in the arch-specific target.
    return ";".join(a + "a" if a in ("90", "100") else a for a in found) or None


def cuda_archs() -> tuple[list[str], bool]:
    """The architectures to build for, and whether to add PTX."""
    forced = os.environ.get("LORA_KERNELS_CUDA_ARCHS")
    if forced:
        archs = forced.split(";")
        bad = [a for a in archs if not re.fullmatch(r"\d{2,3}a?", a)]
        if bad:
            raise SystemExit(f"LORA_KERNELS_CUDA_ARCHS: got {forced!r}; write it like {ALL_ARCHS!r}")
        return archs, False
    if os.environ.get("CI"):
        return ALL_ARCHS.split(";"), True
    return (device_archs() or "90a").split(";"), False


def arch_number(arch: str) -> int:
    return int(arch.rstrip("a"))


def gencode(source: Path, archs: list[str], ptx: bool) -> str:
    """nvcc's options for a kernel file; empty where it is for newer GPUs than those of `archs`.

    Files called *_sm90.cu use what compute capability 9.0 brought.
    """
    least = 90 if source.stem.endswith("_sm90") else 0
    options = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs if arch_number(a) >= least]
    if ptx:
        options.append(f"-gencode arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}")
    return " ".join(options)


def cuda_library_dir(nvcc: str) -> str:
    """Where libcudart_static.a lies: nvcc, which may be a wrapper script elsewhere, tells its root."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.M)
    root = Path(top.group(1)) if top else Path(nvcc).resolve().parent.parent
    for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (root / name / "libcudart_static.a").exists():
            return str((root / name).resolve())
    raise SystemExit(
        f"nvcc found ({nvcc}), but no libcudart_static.a under {root}; LORA_KERNELS_CUDA=0 leaves CUDA out"
    )


def needed(package: str) -> ModuleType:
    """A package that the build needs, or one clear line."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise SystemExit(f"building needs the package `{name}` (pip install {name})") from error


def pybind11_include() -> str:
    """Where pybind11's headers are: the package's, else those that come with torch."""
    try:
        return importlib.import_module("pybind11").get_include()
    except ImportError:
        torch = importlib.util.find_spec("torch")
        include = Path(torch.origin).parent / "include" if torch and torch.origin else Path("-")
        if not (include / "pybind11" / "pybind11.h").exists():
            needed("pybind11")
        return str(include)


class NinjaBuild(build_ext):
    """Writes a build.ninja for each extension and runs it: parallel, incremental, with headers tracked."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        build = (ROOT / self.build_temp / {"_C": "lora_kernels"}.get(name, name.lstrip("_"))).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        {"_C": self.write_kernels, "_paging": self.write_paging}[name](build, target)
        # The plain program, not ninja.BIN_DIR: either a wheel's or the system's serves.
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        subprocess.run([ninja, "-C", str(build)] + (["-v"] if self.verbose > 1 else []), check=True)

    def write_paging(self, build: Path, target: Path) -> None:
        ninja_syntax = needed("ninja.ninja_syntax")
        includes = [pybind11_include(), sysconfig.get_path("include")]
        cxx = " ".join(shlex.split(os.environ.get("CXX", "g++")))
        with open(build / "build.ninja", "w") as file:
            n = ninja_syntax.Writer(file, width=110)
            n.rule(
                "cxx",
                f"{cxx} -std=c++20 -O2 -fPIC -fvisibility=hidden -pthread -Wall -Wextra "
                f"{' '.join(f'-isystem {p}' for p in includes)} -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="CXX $in",
            )
            n.rule("link", f"{cxx} -shared -pthread $in -o $out -ldl", description="LINK $out")
            objects = []
            for source in sorted((ROOT / "csrc" / "paging").glob("*.cpp")):
                objects.append(str(build / (source.name + ".o")))
                n.build(objects[-1], "cxx", str(source))
            n.build(str(target), "link", objects)

    def write_kernels(self, build: Path, target: Path) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        ninja_syntax = needed("ninja.ninja_syntax")
        torch_lib = Path(torch.__file__).parent / "lib"

        nvcc = find_nvcc()
        archs, ptx = cuda_archs() if nvcc else ([], False)
        cuda_version = ""
        if nvcc:
            answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            cuda_version = re.search(r"release (\d+\.\d+)", answer).group(1)
            targets = ["sm_" + arch for arch in archs] + ["PTX"] * ptx
            print(f"lora_kernels: CUDA {cuda_version} code for {', '.join(targets)}")
        else:
            print("lora_kernels: nvcc not found: building WITHOUT the CUDA kernels (CPU kernels only)")

        defines = {
            "Py_LIMITED_API": PYTHON_TARGET,
            "TORCH_TARGET_VERSION": TORCH_TARGET,
            "LK_TORCH_HEADERS": f'"{torch.__version__}"',
            "LK_CUDA_VERSION": f'"{cuda_version}"',
            "LK_CUDA_ARCHS": '"' + ";".join(archs + (["ptx" + PTX_ARCH] if ptx else [])) + '"',
        }
        if any(arch_number(arch) >= 90 for arch in archs):
            defines["LK_WITH_SM90"] = "1"
        includes = " ".join(f"-isystem {p}" for p in [*include_paths(), sysconfig.get_path("include")])
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        # No contraction: the NF4 format prescribes separate roundings, and bytes must not depend on the
        # compiler.
        cxxflags = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
        # No errno: with it a square root is a branch and a call, and its loop is not vectorised.
        cxxflags += " -Wall -Wextra"
        # GCC 12 warns inside its own AVX-512 header (`__m512i __Y = __Y`, GCC bug 105593).
        cxxflags += " -Wno-uninitialized -Wno-maybe-uninitialized"

        sources = [*sorted((ROOT / "csrc").glob("cpu/*.cpp")), ROOT / "csrc" / "torch_ops.cpp"]
        if nvcc:
            sources.append(ROOT / "csrc" / "torch_ops_cuda.cpp")
            sources += [s for s in sorted((ROOT / "csrc").glob("cuda/*.cu")) if gencode(s, archs, ptx)]

        with open(build / "build.ninja", "w") as file:
            n = ninja_syntax.Writer(file, width=110)
            n.variable("ninja_required_version", "1.5")
            glue = " ".join(f"-D{k}='{v}'" for k, v in defines.items())
            n.rule(
                "cxx",
                f"{' '.join(cxx)} {cxxflags} $defines {includes} -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="CXX $in",
            )
            if nvcc:
                n.rule(
                    "nvcc",
                    f"{nvcc} -std=c++20 -O3 $gencode --threads 2 -Xcompiler -fPIC,-fvisibility=hidden "
                    "-MMD -MF $out.d -c $in -o $out",
                    depfile="$out.d",
                    deps="gcc",
                    description="NVCC $in",
                )
            # --no-as-needed -ltorch: otherwise the library would not depend on libtorch itself, and on a
            # CUDA build of torch the weak stream symbol, which lives behind libtorch, would stay null.
            cuda_libs = f"-L{cuda_library_dir(nvcc)} -lcudart_static -lrt -lpthread -ldl" if nvcc else ""
            n.rule(
                "link",
                f"{' '.join(cxx)} -shared $in -o $out -Wl,--exclude-libs,ALL -L{torch_lib} "
                f"-Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu -lc10 {cuda_libs}",
                description="LINK $out",
            )
            objects = []
            for source in sources:
                obj = str(build / (str(source.relative_to(ROOT / "csrc")).replace(os.sep, "_") + ".o"))
                if source.suffix == ".cu":
                    variables = {"gencode": gencode(source, archs, ptx)}
                elif source.name.startswith("torch_ops"):
                    variables = {"defines": glue}
                else:
                    variables = {"defines": f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"}
                n.build(obj, "nvcc" if source.suffix == ".cu" else "cxx", str(source), variables=variables)
                objects.append(obj)
            n.build(str(target), "link", objects)
            n.default(str(target))

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("_C"):
            return os.path.join(*name.split(".")) + ".abi3.so"
        return super().get_ext_filename(name)


setup(
    ext_modules=[
        Extension("lora_kernels._C", sources=[], py_limited_api=True),
        Extension("lora_kernels._paging", sources=[]),
    ],
    cmdclass={"build_ext": NinjaBuild},
)

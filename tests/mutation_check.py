"""Breaks the kernels on purpose, one place at a time, and shows that the suite notices.

    python tests/mutation_check.py [name ...]

Works on a copy of the repository in a temporary folder. Prints one line for each mutation; exits 1 if one
survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    name: str
    file: str
    old: str  # occurs exactly once
    new: str
    tests: str  # pytest arguments: the tests that should fail


QUANTIZE, DEQUANTIZE, DROPOUT = (
    f"csrc/cpu/{op}.cpp" for op in ("nf4_quantize", "nf4_dequantize", "lora_dropout")
)
PANELS, FUNCTIONAL, LINEAR = (f"lora_kernels/{name}.py" for name in ("panels", "functional", "linear"))
T_QUANTIZE, T_DEQUANTIZE, T_DROPOUT = (
    f"tests/test_{op}.py" for op in ("nf4_quantize", "nf4_dequantize", "lora_dropout")
)
T_LORA, T_FUNCTIONAL, T_LINEAR = (
    "tests/test_lora_linear.py",
    "tests/test_functional.py",
    "tests/test_linear.py",
)

MUTATIONS = [
    Mutation("a tie goes up", QUANTIZE, "scaled[i] > mid", "scaled[i] >= mid", T_QUANTIZE),
    Mutation(
        "a short block multiplies",
        QUANTIZE,
        "scaled[i] / divisor",
        "scaled[i] * (1.0f / divisor)",
        T_QUANTIZE,
    ),
    Mutation(
        "nibbles swapped",
        QUANTIZE,
        "codes[2 * i] << 4 | codes[2 * i + 1]",
        "codes[2 * i + 1] << 4 | codes[2 * i]",
        T_QUANTIZE,
    ),
    Mutation("infinities pass", QUANTIZE, "most >= 0x7f800000u", "most > 0x7f800000u", T_QUANTIZE),
    Mutation("a scale tie goes up", QUANTIZE, "v > mid * nested", "v >= mid * nested", T_QUANTIZE),
    Mutation("mean in float", QUANTIZE, "double sum = 0;", "float sum = 0;", T_QUANTIZE),
    Mutation("midpoint in float", QUANTIZE, "const double mid =", "const float mid =", T_QUANTIZE),
    Mutation("unclamped short block", QUANTIZE, "full ? largest : divisor", "largest", T_QUANTIZE),
    Mutation(
        "fused scale",
        DEQUANTIZE,
        "return scaled + *w.offset;",
        "return __builtin_fmaf(nf4::kDynamicMap[static_cast<const uint8_t*>(w.absmax)[block]], "
        "w.nested_absmax[block / nf4::kNestedBlock], *w.offset);",
        T_DEQUANTIZE,
    ),
    Mutation(
        "odd head forgotten",
        DEQUANTIZE,
        "const int64_t odd_head = first & 1;",
        "const int64_t odd_head = 0 * (first & 1);",
        T_DEQUANTIZE,
    ),
    Mutation(
        "nested block off by one",
        DEQUANTIZE,
        "block / nf4::kNestedBlock]",
        "(block + 1) / nf4::kNestedBlock]",
        T_DEQUANTIZE,
    ),
    Mutation(
        "32-bit index",
        DEQUANTIZE,
        "const int64_t block = first / w.blocksize;",
        "const int64_t block = static_cast<int32_t>(first) / w.blocksize;",
        T_DEQUANTIZE,
    ),
    Mutation(
        "row stride ignored",
        DEQUANTIZE,
        "lookup_portable<T>);",
        "lookup_portable<T>); (void)stride; out -= stride - r.cols;",
        "tests/test_ops.py -k portable",
    ),
    Mutation(
        "avx512 table halves", DEQUANTIZE, "_mm512_srli_epi32(byte, 4), low)", "byte, low)", T_DEQUANTIZE
    ),
    Mutation("bf16 rounds half up", "csrc/cpu/half.h", "0x7fffu + ((u >> 16) & 1u)", "0x8000u", T_DEQUANTIZE),
    Mutation("nine philox rounds", "csrc/philox.h", "round < 10", "round < 9", T_DROPOUT),
    Mutation("threshold off", DROPOUT, ">= threshold", "> threshold / 2 * 2 + 4096", T_DROPOUT),
    Mutation(
        "offset ignored",
        DROPOUT,
        "static_cast<uint64_t>(counter + c), offset, seed",
        "static_cast<uint64_t>(counter + c), offset * 0, seed",
        T_DROPOUT,
    ),
    Mutation("no alpha", PANELS, "beta=beta, alpha=s, out=out", "beta=beta, alpha=scaling, out=out", T_LORA),
    Mutation("bias dropped", PANELS, "beta = 0 if start is None else 1", "beta = 0", T_LORA),
    Mutation("dx mask missing", PANELS, "kernels.lora_dropout(dx, dropout_p, rng, 0, dx)", "pass", T_LORA),
    Mutation("dx head missing", PANELS, "torch.mm(g, lora_A.to(dy.dtype), out=dx)", "dx.zero_()", T_LORA),
    Mutation(
        "dA of undropped x",
        PANELS,
        "_add_token_product(total, g[t0:t1], dropped, 1.0)",
        "_add_token_product(total, g[t0:t1], x[t0:t1], 1.0)",
        T_LORA,
    ),
    Mutation(
        "chunk mask restarts",
        PANELS,
        "kernels.lora_dropout(chunk, p, rng, t0 * k, out)",
        "kernels.lora_dropout(chunk, p, rng, 0, out)",
        T_LORA,
    ),
    Mutation("dB sign", PANELS, "token_product(dB, dy, h, s)", "token_product(dB, dy, h, -s)", T_LORA),
    Mutation(
        "dA in bf16",
        PANELS,
        "total.addmm_(piece.float().T, other.float(), alpha=scale)",
        "total.add_((piece.T @ other).float(), alpha=scale)",
        T_LORA + " -k 16_bit",
    ),
    Mutation("x saved always", FUNCTIONAL, "x if needs[_A] else None", "x", T_FUNCTIONAL),
    Mutation(
        "bias gradient lost",
        FUNCTIONAL,
        "result[_BIAS] = dx, dA, dB, dbias",
        "result[_BIAS] = dx, dA, dB, None",
        T_FUNCTIONAL,
    ),
    Mutation(
        "dropout in eval",
        LINEAR,
        "spec.lora_dropout if self.training else 0.0",
        "spec.lora_dropout",
        T_LINEAR,
    ),
    Mutation(
        "scales cast", LINEAR, "if tensor is not None and now.dtype != tensor.dtype:", "if False:", T_LINEAR
    ),
]


def run(mutation: Mutation, copy: Path) -> bool:
    """True if the suite noticed."""
    path = copy / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        times = text.count(mutation.old)
        raise SystemExit(f"{mutation.name}: {mutation.old!r} occurs {times} times in {mutation.file}")
    path.write_text(text.replace(mutation.old, mutation.new))
    environment = {**os.environ, "PYTHONPATH": str(copy), "LORA_KERNELS_CUDA": "0"}
    options = {"cwd": copy, "env": environment, "capture_output": True, "text": True, "check": False}
    try:
        if mutation.file.startswith("csrc"):
            build = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], **options)
            if build.returncode:
                raise SystemExit(f"{mutation.name}: does not compile\n{build.stdout[-2000:]}")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *mutation.tests.split(),
        ]
        if "-k" not in command:
            command += ["-k", "not reference"]
        status = subprocess.run(command, **options).returncode
        if status in (2, 3, 4, 5):
            raise SystemExit(f"{mutation.name}: pytest could not run {mutation.tests} (exit {status})")
        return status != 0  # failed tests, or a crash
    finally:
        path.write_text(text)


def main(names: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "lora_kernels"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.so", "build", "results")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for mutation in chosen:
            caught = run(mutation, copy)
            print(f"{'caught  ' if caught else 'SURVIVED'} {mutation.file}: {mutation.name}", flush=True)
            if not caught:
                survivors.append(mutation.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

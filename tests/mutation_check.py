"""Breaks the kernels on purpose, one place at a time, and shows that the suite notices.

    python tests/mutation_check.py [WORD ...]

Each WORD chooses the mutation of that name, or those of files whose path it is in (csrc/cpu, csrc/cuda,
lora_kernels); without one all run, about an hour and a half on two cores. Works on a copy of the repository
in a temporary folder; CUDA kernels are judged on the host stand-in. Prints a line for each mutation; exits 1
if one survives, or none was chosen.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mutations_bf16 import BF16_MUTATIONS  # noqa: E402
from mutations_cuda import CUDA_MUTATIONS  # noqa: E402
from mutations_optim import OPTIM_MUTATIONS  # noqa: E402
from mutations_uneven import UNEVEN_MUTATIONS  # noqa: E402


class Mutation(NamedTuple):
    name: str
    file: str
    old: str  # occurs exactly once
    new: str
    tests: (
        str  # pytest arguments: the tests that should fail; several, the quick ones first, with ";" between
    )


QUANTIZE, ABSMAX, DEQUANTIZE, DECODE, DROPOUT, GEMM, KERNELS, AVX512, FEW, FORWARD, BACKWARD = (
    f"csrc/cpu/{name}"
    for name in (
        "nf4_quantize.cpp",
        "nf4_quantize_absmax.cpp",
        "nf4_dequantize.cpp",
        "nf4_decode.cpp",
        "lora_dropout.cpp",
        "gemm.cpp",
        "gemm_kernels.h",
        "gemm_avx512.cpp",
        "few_tokens.cpp",
        "lora_linear.cpp",
        "lora_linear_backward.cpp",
    )
)
COMPOSED = "lora_kernels/composed.py"
T_BATCHED, T_DORA = "tests/test_lora_linear_batched.py", "tests/test_dora_linear.py"
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
    # nf4_quantize
    Mutation(
        "a tie goes up", QUANTIZE, "(s > kBins.midpoint[bin])", "(s >= kBins.midpoint[bin])", T_QUANTIZE
    ),
    Mutation(
        "a short block multiplies",
        QUANTIZE,
        "to_float(w[i]) / divisor",
        "to_float(w[i]) * inverse",
        T_QUANTIZE,
    ),
    Mutation(
        "nibbles swapped",
        QUANTIZE,
        "code(2 * i) << 4 | code(2 * i + 1)",
        "code(2 * i + 1) << 4 | code(2 * i)",
        T_QUANTIZE,
    ),
    Mutation(
        "infinities pass",
        QUANTIZE,
        "constexpr uint32_t kInfinity = 0x7f800000u",
        "constexpr uint32_t kInfinity = 0x7f800001u",
        T_QUANTIZE,
    ),
    Mutation("unclamped short block", QUANTIZE, "full ? largest : divisor", "largest", T_QUANTIZE),
    Mutation(
        "avx512 codes of a tie",
        QUANTIZE,
        "_mm512_permutex2var_ps(midpoint[0], bin, midpoint[1]), _CMP_GT_OQ",
        "_mm512_permutex2var_ps(midpoint[0], bin, midpoint[1]), _CMP_GE_OQ",
        T_QUANTIZE,
    ),
    Mutation(
        "avx2 second step",
        QUANTIZE,
        "_mm256_set1_ps(mid[3]), _mm256_set1_ps(mid[11])",
        "_mm256_set1_ps(mid[3]), _mm256_set1_ps(mid[10])",
        T_QUANTIZE,
    ),
    Mutation(
        "a scale tie goes up",
        ABSMAX,
        "v > kBins.midpoint[below[b]] * unit",
        "v >= kBins.midpoint[below[b]] * unit",
        T_QUANTIZE,
    ),
    Mutation(
        "mean in float",
        ABSMAX,
        "for (; i < n; ++i) sum += x[i];",
        "for (; i < n; ++i) sum = static_cast<float>(sum) + x[i];",
        T_QUANTIZE,
    ),
    Mutation(
        "scale codes' unit in float",
        ABSMAX,
        "const double unit = nested;",
        "const double unit = nested * 1.0000002f;",
        T_QUANTIZE,
    ),
    # nf4_dequantize
    Mutation(
        "fused scale",
        DECODE,
        "nf4::kDynamicMap[codes[i]] * nested + offset",
        "__builtin_fmaf(nf4::kDynamicMap[codes[i]], nested, offset)",
        T_DEQUANTIZE,
    ),
    Mutation(
        "fused scale of avx512",
        DECODE,
        "_mm512_add_ps(_mm512_mul_ps(entry, factor), shift)",
        "_mm512_fmadd_ps(entry, factor, shift)",
        T_DEQUANTIZE,
    ),
    Mutation("avx2 scales' tail", DECODE, "i + 8 <= count", "i + 8 < count + 8", T_DEQUANTIZE),
    Mutation(
        "nested block off by one",
        DECODE,
        "const int64_t nested = block / nf4::kNestedBlock;",
        "const int64_t nested = (first_block + count - 1) / nf4::kNestedBlock;",
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
        "32-bit index",
        DEQUANTIZE,
        "const int64_t block = first >> shift;",
        "const int64_t block = static_cast<int32_t>(first) >> shift;",
        T_DEQUANTIZE,
    ),
    Mutation(
        "avx512 table halves", DEQUANTIZE, "_mm512_srli_epi32(byte, 4), low)", "byte, low)", T_DEQUANTIZE
    ),
    Mutation(
        "avx512 bf16 rounds half up",
        DEQUANTIZE,
        "_mm512_and_si512(high, _mm512_set1_epi32(1))",
        "_mm512_set1_epi32(1)",
        T_DEQUANTIZE,
    ),
    Mutation(
        "avx2 high half of fp32",
        DEQUANTIZE,
        "_mm256_slli_epi32(index[half], 28)",
        "_mm256_slli_epi32(index[half], 29)",
        T_DEQUANTIZE,
    ),
    Mutation(
        "streams to any place", DEQUANTIZE, "reinterpret_cast<uintptr_t>(out) % 64 == 0", "true", T_DEQUANTIZE
    ),
    Mutation("bf16 rounds half up", "csrc/cpu/half.h", "0x7fffu + ((u >> 16) & 1u)", "0x8000u", T_DEQUANTIZE),
    # lora_dropout
    Mutation("nine philox rounds", "csrc/philox.h", "kPhiloxRounds = 10", "kPhiloxRounds = 9", T_DROPOUT),
    Mutation("threshold off", DROPOUT, "word >= threshold", "word > threshold / 2 * 2 + 4096", T_DROPOUT),
    Mutation(
        "offset ignored",
        DROPOUT,
        "philox4x32_10(counter, mask.offset",
        "philox4x32_10(counter, 0 * mask.offset",
        T_DROPOUT,
    ),
    Mutation(
        "avx512 words in another order",
        DROPOUT,
        "_mm512_kunpackw(keep_b, keep_a)",
        "_mm512_kunpackw(keep_a, keep_b)",
        T_DROPOUT,
    ),
    Mutation("head of a run", DROPOUT, "skip = first % 4, head", "skip = 0, head", T_DROPOUT),
    Mutation(
        "avx512 last round",
        DROPOUT,
        "words23[v] = _mm512_mask_ternarylogic_epi32(p0, kLow, c3[v], k1, kXor3)",
        "words23[v] = _mm512_mask_ternarylogic_epi32(p0, kLow, c3[v], k0, kXor3)",
        T_DROPOUT,
    ),
    Mutation(
        "avx2 lanes", DROPOUT, "_mm256_setr_epi64x(0, 1, 2, 3)", "_mm256_setr_epi64x(0, 2, 1, 3)", T_DROPOUT
    ),
    # lora_linear and its backward
    Mutation(
        "a chunk too few", GEMM, "c < term.inner; c += kChunk", "c < term.inner - kChunk; c += kChunk", T_LORA
    ),
    Mutation(
        "terms overwrite", GEMM, "          first = false;", "          first = i + 1 < term_count;", T_LORA
    ),
    Mutation(
        "tiles of the wrong place",
        GEMM,
        "term.left + (row + t) * term.inner + c * height",
        "term.left + (row + t) * term.inner + c * tile",
        T_LORA,
    ),
    Mutation(
        "long sums are dropped",
        GEMM,
        "{ total = first_total ? sum : total + sum; }",
        "{ total = sum; }",
        T_LORA + " -k long_inner",
    ),
    Mutation("last panel", GEMM, "ceil_div(outputs, span);", "std::max<int64_t>(1, outputs / span);", T_LORA),
    Mutation(
        "dropout of another row",
        GEMM,
        "dropout.first + (row + t) * inner + c",
        "dropout.first + t * inner + c",
        T_LORA,
    ),
    Mutation(
        "short sums are lost",
        KERNELS,
        "const bool fresh = first && c == 0;",
        "const bool fresh = first;",
        T_LORA,
    ),
    Mutation("no bias", KERNELS, "* out.scale + bias[m]", "* out.scale", T_LORA),
    Mutation(
        "does not accumulate",
        KERNELS,
        "value[m] += to_float(to[m])",
        "value[m] += 0 * to_float(to[m])",
        T_LORA,
    ),
    Mutation("avx512 nibbles", AVX512, "j % 2 == 0 ? 4 * j + 4 : 4 * j - 4", "4 * j", T_LORA),
    Mutation(
        "avx512 scales of the wrong block",
        AVX512,
        "scales + ((inner + 8 * d) >> shift)",
        "scales + (inner >> shift)",
        T_LORA,
    ),
    Mutation(
        "avx512 strided scales",
        AVX512,
        "_mm512_srli_epi32(in_nested, 8)",
        "_mm512_srli_epi32(offsets, 8)",
        T_LORA,
    ),
    Mutation(
        "avx512 columns' halves",
        AVX512,
        "_mm512_set1_epi8(8));\n  const __m512i nibble",
        "_mm512_set1_epi8(0));\n  const __m512i nibble",
        T_LORA,
    ),
    Mutation(
        "avx512 transposition",
        "csrc/cpu/transpose_avx512.h",
        "r[j + 8] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(p, s, 0xdd));",
        "r[j + 8] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(q, s, 0xdd));",
        T_LORA,
    ),
    Mutation(
        "few tokens, block of 64",
        FEW,
        "_mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64,",
        "_mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 64, 64,",
        T_LORA,
    ),
    Mutation("few tokens, planes", FEW, "line + 8 * lane + j;", "line + 8 * lane + (j ^ 1);", T_LORA),
    Mutation(
        "few tokens, last rows of W0",
        FEW,
        "i < rows ? dy[t * n + row + i] : 0.0f",
        "dy[t * n + row + std::min(i, rows - 1)]",
        T_LORA,
    ),
    Mutation("few tokens, odd last row", FEW, "i < kPair && n + i < end", "i < kPair && n + 1 < end", T_LORA),
    Mutation(
        "few tokens, mask of dx",
        FEW,
        "dropout.first + t * dx.stride + first",
        "dropout.first + first",
        T_LORA,
    ),
    Mutation(
        "h is scaled twice",
        FORWARD,
        "pack(x_block, rows, k, 1, {adapter",
        "pack(x_block, rows, k, scale, {adapter",
        T_LORA,
    ),
    Mutation(
        "the base sees the dropped x",
        FORWARD,
        "if (r == 0 || adapter->dropout_p > 0) pack",
        "if (r == 0) pack",
        T_LORA,
    ),
    Mutation("mask of a later block", FORWARD, "adapter->rng, t * k}", "adapter->rng, 0}", T_LORA),
    Mutation(
        "dA of the last block only",
        BACKWARD,
        "Output out{dA_sums, LK_F32, k};\n      out.accumulate = t > 0;",
        "Output out{dA_sums, LK_F32, k};\n      out.accumulate = false;",
        T_LORA,
    ),
    Mutation(
        "dB unscaled",
        BACKWARD,
        "pack_transposed(rows_of(dense(*h, tokens, r), t, rows), r, rows, scale, h_transposed)",
        "pack_transposed(rows_of(dense(*h, tokens, r), t, rows), r, rows, 1, h_transposed)",
        T_LORA,
    ),
    Mutation(
        "dx without its mask",
        BACKWARD,
        "drop_rows({block.dx, block.dy.dtype, k, nullptr, block.dy.rows, k}, block.adapter, block.first * k,"
        "\n              block.dx);",
        "",
        T_LORA,
    ),
    # lora_linear_batched, dora_linear
    Mutation(
        "rows of the next adapter",
        COMPOSED,
        "order.split(counts)[1:-1]",
        "order.split(counts)[:-2]",
        T_BATCHED,
    ),
    Mutation(
        "batched scaling",
        COMPOSED,
        "b.to(x.dtype).T, alpha=s / (1 - dropout_p)",
        "b.to(x.dtype).T, alpha=s",
        T_BATCHED,
    ),
    Mutation(
        "batched dA of all rows' x",
        COMPOSED,
        "token_product(dA_i, g, dropped[rows], 1.0)",
        "token_product(dA_i, g, dropped[: len(rows)], 1.0)",
        T_BATCHED,
    ),
    Mutation(
        "batched mask",
        COMPOSED,
        "kernels.panels.lora_dropout(low, dropout_p, rng, 0, low)\n        dx.add_(low)",
        "dx.add_(low)",
        T_BATCHED,
    ),
    Mutation("h is not cleared", COMPOSED, "    h.zero_()\n", "", T_BATCHED),
    Mutation("norm without the cross term", COMPOSED, "+ 2 * s * cross", "+ s * cross", T_DORA),
    Mutation(
        "norm of one panel", COMPOSED, "norm[first:last] = square", "norm[: last - first] = square", T_DORA
    ),
    Mutation(
        "dora bias scaled", COMPOSED, "            y.add_(bias)\n", "            y.add_(bias * c)\n", T_DORA
    ),
    Mutation(
        "dora mask of dx",
        COMPOSED,
        "kernels.panels.lora_dropout(dx, dropout_p, rng, 0, dx)\n",
        "pass\n",
        T_DORA,
    ),
    Mutation(
        "dora magnitude unscaled",
        COMPOSED,
        "dmagnitude.copy_(keep * total / norm)",
        "dmagnitude.copy_(total / norm)",
        T_DORA,
    ),
    # the panel loops
    Mutation("no alpha", PANELS, "beta=beta, alpha=s, out=out", "beta=beta, alpha=scaling, out=out", T_LORA),
    Mutation("bias dropped", PANELS, "beta = 0 if start is None else 1", "beta = 0", T_LORA),
    Mutation("dx mask missing", PANELS, "kernels.lora_dropout(dx, dropout_p, rng, 0, dx)", "pass", T_LORA),
    Mutation(
        "dx head missing",
        PANELS,
        "torch.mm(zero_behind_rows(g), lora_A.to(dy.dtype), out=dx)",
        "dx.zero_()",
        T_LORA,
    ),
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
    *(Mutation(*m) for m in (*BF16_MUTATIONS, *UNEVEN_MUTATIONS, *OPTIM_MUTATIONS, *CUDA_MUTATIONS)),
]


def _options(copy: Path, **environment: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(copy), "LORA_KERNELS_CUDA": "0", **environment}
    return {"cwd": copy, "env": environment, "capture_output": True, "text": True, "check": False}


def _built(name: str, copy: Path, *command: str) -> str:
    build = subprocess.run([sys.executable, *command], **_options(copy))
    if build.returncode:
        raise SystemExit(f"{name}: does not compile\n{build.stdout[-2000:]}{build.stderr[-2000:]}")
    return build.stdout


def _build_extension(name: str, copy: Path) -> None:
    _built(name, copy, "setup.py", "-q", "build_ext", "--inplace")


def _build_stand_in(name: str, copy: Path) -> str:
    """The path of the library that the CUDA kernels are in."""
    return _built(name, copy, "csrc/simt/build.py").split()[-1]


def _fails(mutation: Mutation, arguments: str, options: dict) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(arguments)]
    if "-k" not in command:
        command += ["-k", "not reference and not simt"]
    status = subprocess.run(command, **options).returncode
    if status in (2, 3, 4, 5):
        raise SystemExit(f"{mutation.name}: pytest could not run {arguments} (exit {status})")
    return status != 0  # failed tests, or a crash


def run(mutation: Mutation, copy: Path, stand_in: str) -> bool:
    """True if the suite noticed. stand_in: the library of the CUDA kernels as they are."""
    path = copy / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        times = text.count(mutation.old)
        raise SystemExit(f"{mutation.name}: {mutation.old!r} occurs {times} times in {mutation.file}")
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        if mutation.file.startswith("csrc/cuda/"):
            stand_in = _build_stand_in(mutation.name, copy)
        elif mutation.file.startswith("csrc/"):
            _build_extension(mutation.name, copy)
        options = _options(copy, LORA_KERNELS_SIMT=stand_in, LORA_KERNELS_GPU_TESTS="stand-in")
        return any(_fails(mutation, arguments, options) for arguments in mutation.tests.split(";"))
    finally:
        path.write_text(text)


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(w == m.name or w in m.file for w in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "lora_kernels"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.so", "build", "results")
        shutil.copytree(ROOT, copy, ignore=ignored)
        _build_extension("as it is", copy)
        stand_in = shutil.copy(_build_stand_in("as it is", copy), folder)
        for mutation in chosen:
            start = time.monotonic()
            caught = run(mutation, copy, stand_in)
            verdict = "caught  " if caught else "SURVIVED"
            seconds = time.monotonic() - start
            print(f"{verdict} {mutation.file}: {mutation.name} ({seconds:.0f} s)", flush=True)
            if not caught:
                survivors.append(mutation.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Mutations of what decodes rows that are no whole number of blocks, for mutation_check.py: (name, file, old,
new, pytest arguments)."""

from lora_kernels.backends.native import CPU_ISAS

GEMM, KERNELS, AVX2, AVX512, BF16, FEW = (
    f"csrc/cpu/{name}"
    for name in (
        "gemm.cpp",
        "gemm_kernels.h",
        "gemm_avx2.cpp",
        "gemm_avx512.cpp",
        "gemm_avx512bf16.cpp",
        "few_tokens.cpp",
    )
)
UNEVEN = "tests/test_uneven_rows.py"

_ALL = [
    (
        "all rows' scales from the first's block",
        GEMM,
        "m, output + i, 0) >> shift",
        "m, output, 0) >> shift",
        UNEVEN,
    ),
    (
        "a row's tail of another panel",
        KERNELS,
        "std::copy_n(row + m, kPanel,",
        "std::copy_n(row, kPanel,",
        UNEVEN,
    ),
]
_AVX2 = [
    ("avx2 transposes half", AVX2, "b[i], b[4 + i], 0x31)", "b[i], b[4 + i], 0x30)", UNEVEN),
]
_AVX512 = [
    ("rows start with their blocks", AVX512, "_mm512_add_epi32(start, ", "_mm512_add_epi32(at, ", UNEVEN),
    (
        "the codes of another chunk's end",
        AVX512,
        "(__mmask64{1} << (count + 1) / 2) - 1",
        "~__mmask64{0}",
        UNEVEN + " -k behind",
    ),
    (
        "a gather behind the last scale",
        AVX512,
        "i + 16 <= count && (count - i - 16) * stride >= 3",
        "i + 16 < count",
        UNEVEN + " -k behind",
    ),
    ("columns of one block", AVX512, "next >= kPanel ? 0 : ~0u << next", "0", UNEVEN),
    ("columns behind the last", AVX512, "(1u << bytes) - 1)", "0xffffu)", UNEVEN + " -k behind"),
    ("lines start with their blocks", FEW, "(start + line * kLine) & ", "(line * kLine) & ", UNEVEN),
    ("one start for all lines of long blocks", FEW, "if (1 << shift > kLine) ", "if (false) ", UNEVEN),
    ("codes behind a row", FEW, "if (bytes >= 64) return", "if (true) return", UNEVEN + " -k behind"),
    ("dx of the columns before the last", FEW, "ceil_div(weight.cols, kLine)", "weight.cols / kLine", UNEVEN),
]
_BF16 = [
    ("rows of one block", BF16, "next >= kTileInner ? 0 : ~0u << next", "0", UNEVEN),
    (
        "inner elements behind the last",
        BF16,
        "first32(count - c), index, table)",
        "~0u, index, table)",
        UNEVEN,
    ),
    (
        "the woven row changes with the first",
        BF16,
        "next[0] | next[1] << 16",
        "next[0] | next[0] << 16",
        UNEVEN,
    ),
    (
        "a woven block's table stays",
        BF16,
        "changed |= flat >> shift != block[i];",
        "changed = flat >> shift != block[i];",
        UNEVEN,
    ),
]

UNEVEN_MUTATIONS = [
    *_ALL,
    *(_AVX2 if "avx2" in CPU_ISAS else []),
    *(_AVX512 if "avx512" in CPU_ISAS else []),
    *(_BF16 if "avx512bf16" in CPU_ISAS else []),
]

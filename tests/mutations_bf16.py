"""Mutations of the products on bf16 units for mutation_check.py: (name, file, old, new, pytest arguments).

Those that this machine's processor cannot run are left out.
"""

from lora_kernels.backends.native import CPU_ISAS

BLOCKING, DECODING, AMX = (f"csrc/cpu/gemm_{name}.cpp" for name in ("bf16", "avx512bf16", "amx"))
EDGES = "tests/test_lora_linear.py -k edge"

_DECODED = [
    (
        "tiles of another token",
        BLOCKING,
        "left_offset(tokens, term->inner, row + t, c)",
        "left_offset(tokens, term->inner, t, c)",
        EDGES,
    ),
    ("a depth forgets the sums before it", BLOCKING, "first = false) {", "first = true) {", EDGES),
    (
        "dropout of another row of bf16 tiles",
        BLOCKING,
        "dropout.first + row * inner + c",
        "dropout.first + c",
        "tests/test_lora_linear.py",
    ),
    (
        "scales of the first panel",
        BLOCKING,
        "scales + m / kPanel * scale_floats, space",
        "scales, space",
        EDGES,
    ),
    (
        "a block's table for the whole row",
        DECODING,
        "from < end; ++scale) {",
        "from < end;) {",
        EDGES,
    ),
    ("a term meets the P of the one before", BLOCKING, "tiles + before * kPanel)", "tiles)", EDGES),
    (
        "tokens behind the last are read",
        DECODING,
        "i < rows ? _mm512_loadu_ps",
        "true ? _mm512_loadu_ps",
        "tests/test_uneven_rows.py -k behind",
    ),
    ("the bias of the first columns", DECODING, "_mm512_load_ps(bias + 16)", "_mm512_load_ps(bias)", EDGES),
    (
        "dx forgets the adapter's part",
        DECODING,
        "if (out.accumulate) {",
        "if (false) {",
        "tests/test_lora_linear.py",
    ),
    (
        "two rows share a scale",
        DECODING,
        "bf16_table(block_scale(*m.nf4, block), other)",
        "bf16_table(block_scale(*m.nf4, block), block_scale(*m.nf4, block))",
        EDGES,
    ),
    ("nibbles in the wrong order", DECODING, "_mm512_set1_epi32(4));", "_mm512_set1_epi32(4 << 16));", EDGES),
    (
        "float32 adapters lose their second part",
        DECODING,
        "v = _mm512_sub_ps(v,",
        "v = _mm512_sub_ps(_mm512_setzero_ps(),",
        EDGES,
    ),
]
_AMX = [
    (
        "the second tile of columns is the first",
        AMX,
        "_tile_loadd(7, pairs + pair_tile, 64);",
        "_tile_loadd(7, pairs, 64);",
        EDGES,
    ),
    ("stretches meet the first one's P", AMX, "    panel += steps * 2 * kTileElements;\n", "", EDGES),
    ("sums are not loaded", AMX, "  if (first) {", "  if (true) {", EDGES),
]

BF16_MUTATIONS = (_DECODED if "avx512bf16" in CPU_ISAS else []) + (_AMX if "amx" in CPU_ISAS else [])

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
        "(row + t) / kTileTokens * stride",
        "t / kTileTokens * stride",
        EDGES,
    ),
    ("a depth forgets the sums before it", BLOCKING, "          first = false;\n", "", EDGES),
    (
        "dropout of another row of bf16 tiles",
        BLOCKING,
        "dropout.first + row * inner + c",
        "dropout.first + c",
        "tests/test_lora_linear.py",
    ),
    ("scales of the first panel", BLOCKING, "scale_space + m / kPanel * scale_floats", "scale_space", EDGES),
    (
        "a block's table for the whole row",
        DECODING,
        "scale[(inner + c) >> shift]",
        "scale[inner >> shift]",
        EDGES,
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
        "_tile_loadd(7, right + pairs.next_tile, 64);",
        "_tile_loadd(7, right, 64);",
        EDGES,
    ),
    ("sums are not loaded", AMX, "  if (first) {", "  if (true) {", EDGES),
]

BF16_MUTATIONS = (_DECODED if "avx512bf16" in CPU_ISAS else []) + (_AMX if "amx" in CPU_ISAS else [])

"""Mutations of the CUDA kernels for mutation_check.py: (name, file, old, new, pytest arguments).

Their arithmetic: what is multiplied by what, which scale, which slice, which rows of which adapter. Waits and
edges are simt/deletions.py's. Judged by the suite on the host stand-in.
"""

_CUDA = "csrc/cuda/"
DECODE, CLUSTER, MIXED = (f"{_CUDA}lora_linear_{n}" for n in ("decode.cuh", "decode_sm90.cu", "mixed.cuh"))
SWEEP, DX = (f"{_CUDA}lora_linear_backward_{n}.cuh" for n in ("sweep", "dx"))
SHRINK, EXPAND, LOW_RANK = (f"{_CUDA}{n}" for n in ("lora_shrink.cu", "lora_expand.cu", "low_rank.cuh"))
DROPOUT, MASK = f"{_CUDA}lora_dropout.cu", f"{_CUDA}dropout.cuh"
NF4, DEQUANTIZE, QUANTIZE = (f"{_CUDA}{n}" for n in ("nf4.cuh", "nf4_dequantize.cu", "nf4_quantize.cu"))
STEP, GLUE = f"{_CUDA}optim_step.cu", "lora_kernels/backends/cuda.py"

SOME = "simt and (large_ranks or edge or few_tokens or 16_bit or dense or blocksize or sizes or unaligned)"
LORA = f"tests/test_training_step.py -k test ; tests/test_lora_linear.py -k '{SOME}'"
BATCHED = "tests/test_training_step.py -k adapters ; tests/test_lora_linear_batched.py -k 'simt or a_gpu'"
# Tests of all variants at once have no simt in their names.
OF_DROPOUT, OF_DEQUANTIZE, OF_QUANTIZE = (
    f"tests/test_{n}.py -k 'simt or every_'" for n in ("lora_dropout", "nf4_dequantize", "nf4_quantize")
)
ODD = "tests/test_lora_linear.py -k 'simt and odd_sizes'"
STEPS = "tests/optim/test_steps.py -k simt"

_OF_DECODE = [
    (
        "decode: the last slice for all",
        DECODE,
        "sum += p.partial[sums(p, group, s)",
        "sum = p.partial[sums(p, group, s)",
        LORA,
    ),
    (
        "decode: lower rows by upper rows' scale",
        DECODE,
        "scale_8 = scales[8]",
        "scale_8 = scales[0]",
        LORA,
    ),
    (
        "decode: the adapter unscaled",
        DECODE,
        "__fmaf_rn(p.scaling, low[half][i], acc[2 * half + i])",
        "low[half][i] + acc[2 * half + i]",
        LORA,
    ),
    (
        "decode: a byte twice",
        DECODE,
        "a[2] = decode_pair<3>(shared, top",
        "a[2] = decode_pair<2>(shared, top",
        LORA,
    ),
    (
        "decode: h of one warp",
        DECODE,
        "for (int w = 0; w < kWarps; ++w) sum",
        "for (int w = 0; w < 1; ++w) sum",
        LORA,
    ),
    ("decode: codes' balance stays", DECODE, "scale * (1 / kBalance<kDtype>);", "scale;", LORA),
    ("decode: a dense unit forgets", DECODE, "acc[i] += part[i];", "acc[i] = part[i];", LORA),
    (
        "decode: sums of the own slice",
        CLUSTER,
        "shared + l.partial, static_cast<uint32_t>(s)",
        "shared + l.partial, static_cast<uint32_t>(slice)",
        LORA,
    ),
    (
        "decode: h of the first slice",
        CLUSTER,
        "shared + l.h, static_cast<uint32_t>(s)",
        "shared + l.h, 0u",
        LORA,
    ),
]

_OF_MIXED = [
    (
        "mixed: lower rows by upper rows' scale",
        MIXED,
        "scales[m][1] = __shfl_sync(0xffffffffu, scale, 16 * m + g + 8);",
        "scales[m][1] = __shfl_sync(0xffffffffu, scale, 16 * m + g);",
        LORA,
    ),
    (
        "mixed: a stage's second unit by its first's scale",
        MIXED,
        "u == 0 ? scale[0] : scale[kStageK<kNf4> / kUnit - 1]",
        "scale[0]",
        LORA,
    ),
    (
        "mixed: h unscaled",
        MIXED,
        "__fmaf_rn(p.scaling, low[i], acc[m][c][i])",
        "acc[m][c][i] + low[i]",
        LORA,
    ),
    (
        "mixed: h scaled where it is rounded",
        MIXED,
        "h[token * stride + j] = round_to<kDtype>(low[i][e]);",
        "h[token * stride + j] ="
        " round_to<kDtype>(to_float<kDtype>(round_to<kDtype>(p.scaling * low[i][e])) / p.scaling);",
        "tests/test_lora_linear.py -k 'simt and beyond_float16'",
    ),
    ("mixed: sixteen ranks", MIXED, "first < p.rank; first += 16", "first < 16; first += 16", LORA),
    ("mixed: given h once a slice", MIXED, "slice == 0 && token0 + token", "token0 + token", LORA),
    (
        "mixed: h of the last slice",
        MIXED,
        "sum += p.partial[h_sums(p, token_tile, s) + i];",
        "sum = p.partial[h_sums(p, token_tile, s) + i];",
        LORA,
    ),
    (
        "mixed: a unit forgets",
        MIXED,
        "__fmaf_rn(scales[m][i / 2], part[m][i], acc[m][c][i])",
        "__fmul_rn(scales[m][i / 2], part[m][i])",
        LORA,
    ),
]

_OF_DX = [
    (
        "dx: four rows by one scale",
        DX,
        "{four.x, four.y, four.z, four.w}",
        "{four.x, four.x, four.x, four.x}",
        LORA,
    ),
    ("dx: scales of the first 64 columns", DX, "(strip / 2 * kStageRows + rows)", "(rows)", LORA),
    (
        "dx: the head unmasked",
        DX,
        "if (p.dropout.rng != nullptr) mask(p, token0, column, lane, acc);",
        "",
        LORA,
    ),
    ("dx: rows of one group of warps", DX, "join(shared, acc, group, strip, lane);", "", LORA),
    ("dx: nibbles swapped", DX, "(first, second, first, second)", "(second, first, second, first)", LORA),
    ("dx: the head once a slice", DX, "group == 0 && slice == 0 && p.rank", "group == 0 && p.rank", LORA),
    ("dx: bits of the mask turned around", DX, "kept >> i & 1", "kept >> (3 - i) & 1", LORA),
    ("dx: pairs of rows of one column", DX, "kHigh = 0x7632", "kHigh = 0x5410", LORA),
]

_OF_SWEEP = [
    ("sweep: g unscaled", SWEEP, "round_to<kDtype>(scale[adapter] * sum)", "round_to<kDtype>(sum)", LORA),
    ("sweep: dB unscaled", SWEEP, "to.dtype, at, scale[adapter] * sum", "to.dtype, at, sum", LORA),
    ("sweep: half of the tokens", SWEEP, "s < kTileRows / 16", "s < kTileRows / 32", LORA),
    (
        "sweep: the strip's first columns of B for all",
        SWEEP,
        "(S::kW + sub * kTileCols * S::kRankBytes)",
        "(S::kW)",
        LORA,
    ),
    ("sweep: the mask of the first columns", SWEEP, "count, col0 + sub * kTileCols,", "count, col0,", LORA),
    ("sweep: ones beside fp16", SWEEP, "0x3c003c00u", "0x3f803f80u", LORA),
    ("reduce: a strip short", SWEEP, "strip < p.strips; ++strip", "strip + 1 < p.strips; ++strip", LORA),
    ("reduce: a span short", SWEEP, "part < slots.runs; ++part", "part + 1 < slots.runs; ++part", LORA),
    (
        "reduce: rows of the first adapter",
        SWEEP,
        "while (owner < p.rows.adapters && token >= p.rows.end(owner)) ++owner;",
        "",
        BATCHED,
    ),
    (
        "reduce: ranks of the first chunk",
        SWEEP,
        "const int rank = chunk * ranks + in_chunk;",
        "const int rank = in_chunk;",
        LORA,
    ),
    (
        "reduce: a scaled dbias",
        SWEEP,
        "  if (is_ones) {\n    p.ones_out[column] = sum;",
        "  if (is_ones) {\n    p.ones_out[column] = p.scale[0] * sum;",
        LORA,
    ),
]

_OF_LOW_RANK = [
    ("shrink: heads unscaled", SHRINK, "round_to<kDtype>(scale * value)", "round_to<kDtype>(value)", BATCHED),
    (
        "shrink: the mask of the first columns",
        SHRINK,
        "tile.begin, tile.count, col, col_end, p.k, thread",
        "tile.begin, tile.count, 0, col_end, p.k, thread",
        LORA,
    ),
    (
        "shrink: a slice short",
        SHRINK,
        "sums(1) - sums(0), p.slices)",
        "sums(1) - sums(0), p.slices - 1)",
        LORA,
    ),
    (
        "shrink: ranks of the first chunk",
        SHRINK,
        "first_rank = static_cast<int>(unit % p.chunks) * S::kRanks",
        "first_rank = 0",
        LORA,
    ),
    (
        "shrink: eight ranks twice",
        SHRINK,
        "mma<kDtype>(acc[2 * pair + 1], a, {b[2], b[3]});",
        "mma<kDtype>(acc[2 * pair + 1], a, {b[0], b[1]});",
        LORA,
    ),
    ("shrink: half of the columns", SHRINK, "s < kTileCols / 16", "s < kTileCols / 32", LORA),
    ("expand: what was there is lost", EXPAND, "if (p.add) {", "if (false) {", BATCHED),
    (
        "expand: every other column unscaled",
        EXPAND,
        "kept[half] & 1 ? scale * acc[j][2 * half] : 0",
        "kept[half] & 1 ? acc[j][2 * half] : 0",
        BATCHED,
    ),
    (
        "expand: a neighbour's bits",
        EXPAND,
        "(t % 2 == 0 ? mine : other) >> t % 2 * 2",
        "(t % 2 == 0 ? mine : other) >> 0",
        LORA,
    ),
    ("expand: 64 ranks", EXPAND, "first < rank; first += kRanks", "first < 1; first += kRanks", LORA),
    (
        "expand: eight columns twice",
        EXPAND,
        "mma<kDtype>(acc[2 * pair + 1], a, {b[2], b[3]});",
        "mma<kDtype>(acc[2 * pair + 1], a, {b[0], b[1]});",
        LORA,
    ),
    (
        "expand: the mask of the row's start",
        EXPAND,
        "static_cast<uint64_t>(row_of[half] * p.columns + col)",
        "static_cast<uint64_t>(row_of[half] * p.columns)",
        ODD,
    ),
    (
        "float32 pairs swapped",
        LOW_RANK,
        "round_pair<kDtype>(four.x, four.y),\n",
        "round_pair<kDtype>(four.y, four.x),\n",
        "tests/test_simt.py -k kernels_pass_100",
    ),
    (
        "an adapter's first rows again",
        LOW_RANK,
        "(odd ? edge1 : edge0) + part * length",
        "(odd ? edge1 : edge0)",
        BATCHED,
    ),
    (
        "slots of the adapter before",
        LOW_RANK,
        "slots + (first > 1 ? first : 0)}",
        "slots}",
        BATCHED,
    ),
    ("rows in their own order", LOW_RANK, "order == nullptr ? i : int64_t{order[i]}", "i", BATCHED),
]

_OF_DROPOUT = [
    (
        "dropout: four words for eight elements",
        DROPOUT,
        "mask.kept4(counter + 1) << 4",
        "mask.kept4(counter) << 4",
        OF_DROPOUT,
    ),
    (
        "dropout: every call starts anew",
        DROPOUT,
        "counter = static_cast<uint64_t>(p.first + i) / 4",
        "counter = static_cast<uint64_t>(i) / 4",
        OF_DROPOUT,
    ),
    ("dropout: one word for four", DROPOUT, ">> element % 4 & 1", "& 1", OF_DROPOUT),
    ("dropout: of float32 a word for two", DROPOUT, "low & 2 ? bits.y", "low & 1 ? bits.y", OF_DROPOUT),
    ("dropout: the tail's first element", DROPOUT, "piece << place % 32", "piece", OF_DROPOUT),
    ("dropout: of a pair, the first's word", MASK, "if (second < threshold)", "if (first < threshold)", LORA),
    ("dropout: beyond a third counter", MASK, "kept4(first / 4 + 2) << 8", "kept4(first / 4) << 8", ODD),
]

_OF_NF4 = [
    (
        "a fused nested scale",
        NF4,
        "__fadd_rn(__fmul_rn(dynamic_map[code], w.nested_absmax[block / nf4::kNestedBlock]), w.offset[0])",
        "__fmaf_rn(dynamic_map[code], w.nested_absmax[block / nf4::kNestedBlock], w.offset[0])",
        OF_DEQUANTIZE,
    ),
    (
        "dequantize: a nibble twice",
        DEQUANTIZE,
        "tables.codebook[byte & 15], scale);",
        "tables.codebook[byte >> 4], scale);",
        OF_DEQUANTIZE,
    ),
    (
        "dequantize: the first nibble",
        DEQUANTIZE,
        "flat % 2 == 0 ? byte >> 4 : byte & 15",
        "byte >> 4",
        OF_DEQUANTIZE,
    ),
    (
        "dequantize: rows without a stride",
        DEQUANTIZE,
        "cast<uint4>(out + row * p.out_stride + col)",
        "cast<uint4>(out + row * r.cols + col)",
        OF_DEQUANTIZE,
    ),
    (
        "dequantize: a pair swapped",
        DEQUANTIZE,
        "round_pair<kDtype>(eight[0], eight[1])",
        "round_pair<kDtype>(eight[1], eight[0])",
        OF_DEQUANTIZE,
    ),
    ("dequantize: two bytes of four", DEQUANTIZE, ">> (8 * (b % 4))", ">> (8 * (b % 2))", OF_DEQUANTIZE),
    (
        "quantize: midpoints at bins",
        QUANTIZE,
        " + (__float_as_uint(above) >> 31)",
        " + 0 * above",
        OF_QUANTIZE,
    ),
    (
        "quantize: a short block multiplies",
        QUANTIZE,
        "whole ? __fmul_rn(w, inverse) : __fdiv_rn(w, divisor)",
        "__fmul_rn(w, inverse)",
        OF_QUANTIZE,
    ),
    (
        "quantize: a short block's own scale",
        QUANTIZE,
        "p.absmax[block] = whole ? largest : divisor",
        "p.absmax[block] = largest",
        OF_QUANTIZE,
    ),
    ("quantize: no pad", QUANTIZE, "high << 4 | nf4::kPadCode", "high << 4", OF_QUANTIZE),
    ("quantize: infinities pass", QUANTIZE, "worst = larger(worst, mine);", "", OF_QUANTIZE),
]

_OF_STEP = [
    (
        "step: weight decay after the update",
        STEP,
        "__fadd_rn(__fmul_rn(p.x[i], k.decay), -change)",
        "__fmul_rn(__fadd_rn(p.x[i], -change), k.decay)",
        STEPS,
    ),
    ("step: the sign of 0 is 1", STEP, "(c > 0 ? 1.0f : 0.0f)", "(c >= 0 ? 1.0f : 0.0f)", STEPS),
    ("step: absmax of half a block", STEP, "lanes = 16; lanes > 0", "lanes = 8; lanes > 0", STEPS),
    ("step: four words for eight", STEP, "philox4x32_10(counter + half,", "philox4x32_10(counter,", STEPS),
    ("step: an infinite square spreads", STEP, "if (kGuarded && !(new_v < kInf)) continue;", "", STEPS),
    (
        "step: a done page again",
        STEP,
        "if (cast<const int64_t>(page.data)[0] == p.tick) continue;",
        "",
        STEPS,
    ),
    ("step: an infinite compensation", STEP, "finite ? rest : 0.0f", "rest", STEPS),
]

_OF_GLUE = [
    (
        "cuda: mixed's kept part",
        GLUE,
        "lora_B, scaling / (1 - dropout_p), bias, y, h, h_given)",
        "lora_B, scaling, bias, y, h, h_given)",
        LORA,
    ),
    (
        "cuda: g's kept part of a large rank",
        GLUE,
        "panels.gradient_of_h(g, dy, lora_B, scaling / (1 - dropout_p))",
        "panels.gradient_of_h(g, dy, lora_B, scaling)",
        LORA,
    ),
    (
        "cuda: the sweep's kept part",
        GLUE,
        "([lora_B], [scaling / (1 - dropout_p)])",
        "([lora_B], [scaling])",
        LORA,
    ),
    (
        "cuda: a head unmasked",
        GLUE,
        "lora_expand_backward(g, [lora_A], dropout_p, rng, dx, add=False)",
        "lora_expand_backward(g, [lora_A], 0.0, None, dx, add=False)",
        LORA,
    ),
    ("cuda: dx without its head", GLUE, "dy, base, dx, add=g is not None)", "dy, base, dx, add=False)", LORA),
    ("cuda: h is not cleared", GLUE, "        h.zero_()\n", "", BATCHED),
    (
        "cuda: begins of the first adapters",
        GLUE,
        "begins[some.start : some.stop + 1]",
        "begins[: some.stop - some.start + 1]",
        BATCHED,
    ),
]

BEYOND = "tests/test_beyond_2_31.py -k cuda"
_OF_OFFSETS = [
    (
        "mixed: 32-bit offsets of x",
        MIXED,
        "const int64_t at = there ? (token0 + token) * p.x_stride + col : 0;",
        "const int at = static_cast<int>(there ? (token0 + token) * p.x_stride + col : 0);",
        BEYOND,
    ),
    (
        "32-bit offsets of tiles",
        LOW_RANK,
        "const int64_t from = is_there ? rows[begin + row] * z.stride + first : 0;",
        "const int from = static_cast<int>(is_there ? rows[begin + row] * z.stride + first : 0);",
        BEYOND,
    ),
    (
        "dequantize: 32-bit indices",
        DEQUANTIZE,
        "p.weight.packed[flat / 2]",
        "p.weight.packed[static_cast<int>(flat) / 2]",
        BEYOND,
    ),
]

CUDA_MUTATIONS = [
    *(*_OF_OFFSETS, *_OF_DECODE, *_OF_MIXED, *_OF_DX, *_OF_SWEEP, *_OF_LOW_RANK),
    *(*_OF_DROPOUT, *_OF_NF4, *_OF_STEP, *_OF_GLUE),
]

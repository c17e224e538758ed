"""The device programs of gpu/twins_kernels.cuh from Python: built for the host stand-in or for a GPU, their
inputs, and what NumPy computes for them.

A case names a program, the numbers it gets and its buffers; `expected` computes the outputs from the inputs
without any of the package's code. test_simt_twins.py compares the stand-in with that, gpu/test_twins.py a GPU
with the stand-in.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "gpu" / "twins.cu"
INPUT, OUTPUT, INOUT = 0, 1, 2  # simt::Use


class TwinError(Exception):
    """A program did not end well: the message of the stand-in, or of CUDA."""


# ---- building and running ----------------------------------------------------------------------------------


def build_simt(folder: Path) -> ctypes.CDLL:
    library = folder / "libtwins_simt.so"
    flags = "-std=c++20 -O2 -g1 -fPIC -shared -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas"
    engine = ROOT / "csrc" / "simt" / "engine.cpp"
    defines = ["-DLK_SIMT", "-DLK_TWINS_ARCH=90"]
    _compile(["g++", *flags.split(), *defines, "-x", "c++", str(SOURCE), str(engine), "-o", str(library)])
    return _load(library)


def twins_arch(capability: tuple[int, int]) -> int:
    """LK_TWINS_ARCH: which programs a device of this compute capability can run."""
    return 80 if capability < (9, 0) else 90 if capability == (9, 0) else 100


def build_cuda(folder: Path, capability: tuple[int, int]) -> ctypes.CDLL:
    library = folder / "libtwins_cuda.so"
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability >= (9, 0) else "")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or f"{home}/bin/nvcc"
    # -gencode: with -arch=sm_90a nvcc 13 compiles for compute_90 as well, which has no wgmma.
    flags = ["-std=c++20", "-O3", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xcompiler", "-fPIC"]
    _compile(
        [
            nvcc,
            *flags,
            f"-DLK_TWINS_ARCH={twins_arch(capability)}",
            "-shared",
            str(SOURCE),
            "-o",
            str(library),
        ]
    )
    return _load(library)


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("use", ctypes.c_int32))


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.twin_error.restype = ctypes.c_char_p
    library.twin_run.argtypes = [
        *(ctypes.c_char_p, ctypes.POINTER(_Buffer), ctypes.c_int),
        *(ctypes.POINTER(ctypes.c_int64), ctypes.c_uint64),
    ]
    return library


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts on a multiple of 256 bytes, as device memory does."""
    raw = np.empty(array.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(library: ctypes.CDLL, case: "Case", arrays: list[np.ndarray], seed: int = 1, fault: int = 0) -> list:
    """The program's outputs. Inputs are left alone; an output's array gives its shape and type."""
    copies = [_aligned(np.ascontiguousarray(a)) for a in arrays]
    buffers = (_Buffer * len(copies))(
        *(_Buffer(c.ctypes.data, c.nbytes, use) for c, use in zip(copies, case.uses, strict=True))
    )
    numbers = [*case.numbers, fault]
    status = library.twin_run(
        case.program.encode(), buffers, len(copies), (ctypes.c_int64 * len(numbers))(*numbers), seed
    )
    if status != 0:
        raise TwinError(library.twin_error().decode())
    return [c for c, use in zip(copies, case.uses, strict=True) if use != INPUT]


# ---- number formats ----------------------------------------------------------------------------------------


def _widened(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return x.astype(np.float64)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> bits, nearest even."""
    wide = _widened(x)
    _, exponent = np.frexp(np.where(np.isfinite(wide), wide, 0))
    ulp = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = (np.rint(wide / ulp) * ulp).astype(np.float32)
    rounded = np.where(np.isfinite(wide), rounded, x)
    return np.where(np.isnan(wide), 0x7FFF, rounded.astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )


def to_f16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16)).astype(np.uint16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 -> bits of an fp32 with a mantissa of 10 bits, nearest, ties away from zero."""
    wide = _widened(x)
    _, exponent = np.frexp(np.where(np.isfinite(wide), wide, 0))
    ulp = np.ldexp(1.0, np.maximum(exponent - 11, -136))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.copysign(np.floor(np.abs(wide) / ulp + 0.5) * ulp, wide).astype(np.float32)
    rounded = np.where(np.isfinite(wide), rounded, x)
    return np.where(np.isnan(wide), 0x7FFFFFFF, rounded.astype(np.float32).view(np.uint32)).astype(np.uint32)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_f16(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def normal_bits(rng: np.random.Generator, shape: tuple[int, ...], fp16: bool = False) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    return to_f16(x) if fp16 else to_bf16(x)


def values_of(bits: np.ndarray, fp16: bool = False) -> np.ndarray:
    return (from_f16(bits) if fp16 else from_bf16(bits)).astype(np.float64)


# ---- cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """A result that is right up to the order of its sum: |error| <= ulps * 2^-24 * magnitude."""

    value: np.ndarray
    magnitude: np.ndarray  # the sum of the absolute values of what is added
    ulps: float = 16
    bf16: bool = False  # the output is these values rounded to bf16 bits


@dataclass(frozen=True)
class Case:
    name: str
    program: str
    numbers: tuple[int, ...]
    uses: tuple[int, ...]
    arrays: Callable[[np.random.Generator], list[np.ndarray]]
    expected: Callable[[list[np.ndarray]], list]  # an array, compared bit by bit, or a Sum, per output
    arch: int = 80  # the LK_TWINS_ARCH that has it first

    def runs_on(self, arch: int) -> bool:
        only_hopper = self.program in ("wgmma_ss", "wgmma_rs", "pipeline")
        return arch == 90 if only_hopper else arch >= self.arch


def check(got: list, expected: list) -> None:
    for have, want in zip(got, expected, strict=True):
        if not isinstance(want, Sum):
            same = have.view(np.uint8).ravel() == np.ascontiguousarray(want).view(np.uint8).ravel()
            if have.dtype == np.float32:
                same = (have == want) | (np.isnan(have) & np.isnan(want))
            assert np.all(same), (
                f"{np.count_nonzero(~same)} of {same.size} differ, first at {np.argmin(same)}"
            )
            continue
        values = from_bf16(have) if want.bf16 else have
        bound = want.ulps * 2.0**-24 * want.magnitude
        if want.bf16:
            bound = bound + 2.0**-8 * np.abs(want.value)
        error = np.abs(values.astype(np.float64) - want.value)
        assert np.all(error <= bound), f"off by {np.nanmax(error / bound)} times the bound"  # a NaN is not <=


def _agreement(expected: list, got: list) -> list:
    """What another run must agree with: `got` with the tolerance of `expected`."""
    agreed = []
    for want, have in zip(expected, got, strict=True):
        if isinstance(want, Sum):
            values = from_bf16(have) if want.bf16 else have
            agreed.append(Sum(values.astype(np.float64), want.magnitude, 2 * want.ulps, want.bf16))
        else:
            agreed.append(have)
    return agreed


def check_agrees(case: Case, arrays: list[np.ndarray], got: list, other: list) -> None:
    """`other` is `got` again: byte by byte, sums up to their order."""
    check(other, _agreement(case.expected(arrays), got))


def _words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape, np.uint32)


def _out(dtype: type, *shape: int) -> np.ndarray:
    return np.zeros(shape, dtype)


def _convert_arrays(rng):
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65520, 3.4e38, 1e-40, 6e-8, 1.00390625], np.float32
    )
    ties = ((_words(rng, 200) & 0xFFFF0000) | 0x8000).view(np.float32)  # halfway between two bf16
    tf32_ties = ((_words(rng, 200) & 0xFFFFE000) | 0x1000).view(np.float32)
    random = _words(rng, 600).view(np.float32)
    x = np.concatenate([special, ties, tf32_ties, random, rng.standard_normal(50).astype(np.float32)])
    return [x, _out(np.uint32, 5, x.size), _out(np.float32, 2, x.size)]


def _convert(arrays):
    x = arrays[0]
    bits = x.view(np.uint32)
    bf16, f16 = to_bf16(x).astype(np.uint32), to_f16(x).astype(np.uint32)
    pairs = [low | high << 16 for low, high in ((bf16, np.roll(bf16, -1)), (f16, np.roll(f16, -1)))]
    floats = np.stack([from_bf16(bits >> 16), from_f16(bits >> 8 & 0xFFFF)])
    return [np.stack([bf16, f16, *pairs, to_tf32(x)]), floats]


def _mul_wide(arrays):
    product = arrays[0][0].astype(np.uint64) * arrays[0][1]
    return [np.stack([product & 0xFFFFFFFF, product >> 32]).astype(np.uint32)]


def _prmt(arrays):
    low, high, selector = arrays[0]
    pool = np.stack([word >> 8 * i & 255 for word in (low, high) for i in range(4)])
    out = np.zeros_like(low)
    for i in range(4):
        out |= np.take_along_axis(pool, (selector >> 4 * i & 7)[None].astype(np.int64), 0)[0] << np.uint32(
            8 * i
        )
    return [out]


def _stream(arrays):
    v = arrays[0]
    return [np.stack([v[:, 2] ^ v[:, 0], v[:, 3], v[:, 0], v[:, 1] ^ v[:, 3]], 1)]


def _last_block(arrays):
    parts = 3 * np.arange(arrays[1].size, dtype=np.uint32) + 1
    return [np.array([parts.size], np.uint32), parts, np.array([parts.sum()], np.uint32)]


def _cp_async(arrays):
    source, valid = arrays[:2]
    out = source.copy()
    for quarter in range(1, 4):
        for thread, count in enumerate(valid):
            line = out[quarter, thread]
            if quarter == 1:
                line[count // 2 : 8] = 0
                line[8 + count // 2 :] = 0
            else:
                line[count:] = 0
    return [out]


def _fragments(matrices: np.ndarray, transpose: bool) -> np.ndarray:
    """[m, 8, 8] 16-bit -> registers [m, 32]."""
    if transpose:
        matrices = matrices.transpose(0, 2, 1)
    pairs = np.ascontiguousarray(matrices).reshape(len(matrices), 32, 2).astype(np.uint32)
    return pairs[..., 0] | pairs[..., 1] << 16


def _ldmatrix(arrays):
    matrices = arrays[0].reshape(4, 8, 8)
    forms = [(4, False), (2, False), (4, True), (2, True)]
    return [np.concatenate([_fragments(matrices[:count], transpose) for count, transpose in forms])]


def _mma_arrays(kind: int):
    k = 8 if kind == 2 else 16

    def arrays(rng):
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((16, k), (k, 8)))
        d = rng.standard_normal((16, 8)).astype(np.float32)
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        if kind == 2:
            rows, cols = g[:, None] + 8 * (np.arange(4) % 2), t[:, None] + 4 * (np.arange(4) // 2)
            fragment_a = to_tf32(a)[rows, cols]
            fragment_b = to_tf32(b)[t[:, None] + 4 * np.arange(2), g[:, None]]
        else:
            a, b = ((to_bf16, to_f16)[kind](x).astype(np.uint32) for x in (a, b))
            rows = g[:, None] + 8 * (np.arange(4) % 2)
            cols = 2 * t[:, None] + 8 * (np.arange(4) // 2)
            fragment_a = a[rows, cols] | a[rows, cols + 1] << 16
            rows = 2 * t[:, None] + 8 * np.arange(2)
            fragment_b = b[rows, g[:, None]] | b[rows + 1, g[:, None]] << 16
        sums = d[g[:, None] + 8 * (np.arange(4) // 2), 2 * t[:, None] + np.arange(4) % 2]
        return [fragment_a, fragment_b, sums, _out(np.float32, 32, 4)]

    return arrays


def _mma(kind: int):
    def expected(arrays):
        fragment_a, fragment_b, d = arrays[:3]
        out, magnitude = np.zeros((32, 4)), np.zeros((32, 4))
        k = 8 if kind == 2 else 16
        a, b = np.zeros((16, k)), np.zeros((k, 8))
        for lane in range(32):
            g, t = divmod(lane, 4)
            for i in range(4):
                row = g + i % 2 * 8
                if kind == 2:
                    a[row, t + i // 2 * 4] = fragment_a[lane, i : i + 1].view(np.float32)[0]
                else:
                    col = 2 * t + i // 2 * 8
                    a[row, col : col + 2] = values_of(fragment_a[lane, i : i + 1].view(np.uint16), kind == 1)
            for i in range(2):
                if kind == 2:
                    b[t + 4 * i, g] = fragment_b[lane, i : i + 1].view(np.float32)[0]
                else:
                    row = 2 * t + 8 * i
                    b[row : row + 2, g] = values_of(fragment_b[lane, i : i + 1].view(np.uint16), kind == 1)
        product, size = a @ b, np.abs(a) @ np.abs(b)
        for lane in range(32):
            for i in range(4):
                at = lane // 4 + i // 2 * 8, 2 * (lane % 4) + i % 2
                out[lane, i] = product[at] + d[lane, i]
                magnitude[lane, i] = size[at] + abs(d[lane, i])
        return [Sum(out, magnitude)]

    return expected


def _named_barrier(arrays):
    return [arrays[0][np.arange(64) ^ 5] + np.uint32(1)]


def _stmatrix(arrays):
    # Lane l's word of each matrix: row l / 4, elements 2(l % 4) and the next.
    matrices = arrays[0].view(np.uint16).reshape(4, 8, 8)
    forms = np.stack([matrices, matrices.transpose(0, 2, 1)])
    rows = np.ascontiguousarray(forms).reshape(2, 32, 8)
    return [np.roll(rows, -9, axis=1)]


def _ring(arrays):
    source = arrays[0]
    weights = np.arange(1, len(source) + 1, dtype=np.uint64)[:, None]
    total = ((source.astype(np.uint64) * weights) % 2**32).sum(0) % 2**32
    return [np.stack([total, total]).astype(np.uint32)]


def swizzle(tile: np.ndarray, swizzle_bytes: int) -> np.ndarray:
    """Rows of bytes -> how they lie in shared memory: bits 4.. of an address ^= bits 7.. of it."""
    flat = tile.reshape(-1, 16)
    address = 16 * np.arange(len(flat))
    mask = swizzle_bytes // 16 - 1 if swizzle_bytes else 0
    moved = address ^ ((address >> 7 & mask) << 4)
    out = np.zeros_like(flat)
    out[moved // 16] = flat
    return out.reshape(-1)


def _tma_case(element, rows, cols, stride, box_rows, box_cols, swizzle_bytes, row, col, hint=0):
    dtype = {1: np.uint8, 2: np.uint16, 4: np.uint32}[element]

    def arrays(rng):
        matrix = rng.integers(0, 256, (rows, stride * element), np.uint8).view(dtype)
        return [matrix, _out(np.uint8, box_rows * box_cols * element)]

    def expected(arrays):
        box = np.zeros((box_rows, box_cols), dtype)
        for i in range(box_rows):
            for j in range(box_cols):
                if 0 <= row + i < rows and 0 <= col + j < cols:
                    box[i, j] = arrays[0][row + i, col + j]
        return [swizzle(box.view(np.uint8), swizzle_bytes)]

    numbers = (element, rows, cols, stride, box_rows, box_cols, swizzle_bytes, row, col, hint)
    name = f"tma_load-{8 * element}bit-box{box_rows}x{box_cols}-swizzle{swizzle_bytes}-at{row},{col}"
    return Case(name, "tma_load", numbers, (INPUT, OUTPUT), arrays, expected, 90)


def _tma_store_case(element, rows, cols, stride, box_rows, box_cols, swizzle_bytes, row, col):
    dtype = {1: np.uint8, 2: np.uint16, 4: np.uint32}[element]
    row_bytes = box_cols * element

    def arrays(rng):
        tiles = rng.integers(0, 256, (2, box_rows * row_bytes), np.uint8)
        return [tiles, rng.integers(0, 256, (rows, stride * element), np.uint8).view(dtype)]

    def expected(arrays):
        out = arrays[1].copy()
        for index, lying in enumerate(arrays[0]):
            flat = swizzle(lying, swizzle_bytes)  # its own inverse
            box = flat.reshape(box_rows, row_bytes).view(dtype)
            for i in range(box_rows):
                for j in range(box_cols):
                    r, c = row + index * box_rows + i, col + j
                    if 0 <= r < rows and 0 <= c < cols:
                        out[r, c] = box[i, j]
        return [out]

    numbers = (element, rows, cols, stride, box_rows, box_cols, swizzle_bytes, row, col)
    name = f"tma_store-{8 * element}bit-box{box_rows}x{box_cols}-swizzle{swizzle_bytes}-at{row},{col}"
    return Case(name, "tma_store", numbers, (INPUT, INOUT), arrays, expected, 90)


def _cluster(arrays):
    boxes = np.concatenate([swizzle(box.view(np.uint8), 128) for box in arrays[0].reshape(2, 16, 64)])
    t = np.arange(64, dtype=np.uint32)
    return [np.stack([boxes, boxes]), np.stack([1000 + t, t])]


def _reduce_arrays(fp16: bool):
    def arrays(rng):
        quads = rng.integers(-50, 50, (96, 4)).astype(np.float32)
        quads[:, 3] = 1e-41  # subnormal: lost
        halves = rng.integers(-1, 2, (96, 8)).astype(np.float32)
        start = rng.integers(-9, 9, 8).astype(np.float32)
        start[7] = 0
        half_start = rng.integers(-9, 9, 10).astype(np.float32)
        bits = to_f16 if fp16 else to_bf16
        return [quads, bits(halves), start, bits(half_start)]

    return arrays


def _reduce(fp16: bool):
    def expected(arrays):
        quads, halves, sums, half_sums = arrays
        out = sums.astype(np.float64)
        out[:2] += quads[:, :2].sum(0)
        out[4:7] += quads[:, :3].sum(0)
        half = values_of(half_sums, fp16)
        half[:8] += values_of(halves, fp16).sum(0)
        half[8:] += values_of(halves, fp16)[:, :2].sum(0)
        return [out.astype(np.float32), (to_f16 if fp16 else to_bf16)(half.astype(np.float32))]

    return expected


def _product(a: np.ndarray, b: np.ndarray, times: float = 1) -> Sum:
    return Sum(times * (a @ b), times * (np.abs(a) @ np.abs(b)), 32)


def _wgmma_ss_case(n, transpose_a, transpose_b, swizzle_bytes, fp16):
    def arrays(rng):
        shape_b = (64, n) if transpose_b else (n, 64)
        return [normal_bits(rng, (64, 64), fp16), normal_bits(rng, shape_b, fp16), _out(np.float32, 64, n)]

    def expected(arrays):
        a, b = (values_of(x, fp16) for x in arrays[:2])
        return [_product(a.T if transpose_a else a, b if transpose_b else b.T, 3)]

    numbers = (n, int(transpose_a), int(transpose_b), swizzle_bytes, int(fp16))
    major = "".join("MN" if t else "K" for t in (transpose_a, transpose_b))
    name = f"wgmma_ss-n{n}-{major}-swizzle{swizzle_bytes}-{'fp16' if fp16 else 'bf16'}"
    return Case(name, "wgmma_ss", numbers, (INPUT, INPUT, OUTPUT), arrays, expected, 90)


def _wgmma_rs_case(n, transpose_b, fp16):
    def arrays(rng):
        shape_b = (64, n) if transpose_b else (n, 64)
        return [normal_bits(rng, (64, 64), fp16), normal_bits(rng, shape_b, fp16), _out(np.float32, 64, n)]

    def expected(arrays):
        a, b = (values_of(x, fp16) for x in arrays[:2])
        return [_product(a, b if transpose_b else b.T)]

    name = f"wgmma_rs-n{n}-{'MN' if transpose_b else 'K'}-{'fp16' if fp16 else 'bf16'}"
    numbers = (n, int(transpose_b), int(fp16))
    return Case(name, "wgmma_rs", numbers, (INPUT, INPUT, OUTPUT), arrays, expected, 90)


def _pipeline_case(m, n, k):
    def arrays(rng):
        return [normal_bits(rng, (m, k)), normal_bits(rng, (n, k)), _out(np.uint16, m, n)]

    def expected(arrays):
        product = _product(values_of(arrays[0]), values_of(arrays[1]).T)
        return [Sum(product.value, product.magnitude, 32, bf16=True)]

    return Case(f"pipeline-{m}x{n}x{k}", "pipeline", (m, n, k), (INPUT, INPUT, OUTPUT), arrays, expected, 90)


def _plain(program, uses, arrays, expected, arch=80, numbers=(), name=None):
    return Case(name or program, program, numbers, uses, arrays, expected, arch)


_MMA = (INPUT, INPUT, INPUT, OUTPUT)
_REDUCE = (INPUT, INPUT, INOUT, INOUT)

CASES = [
    _plain("convert", (INPUT, OUTPUT, OUTPUT), _convert_arrays, _convert),
    _plain("prmt", (INPUT, OUTPUT), lambda rng: [_words(rng, 3, 512), _out(np.uint32, 512)], _prmt),
    _plain(
        "mul_wide", (INPUT, OUTPUT), lambda rng: [_words(rng, 2, 512), _out(np.uint32, 2, 512)], _mul_wide
    ),
    _plain("stream", (INPUT, OUTPUT), lambda rng: [_words(rng, 96, 4), _out(np.uint32, 96, 4)], _stream),
    _plain(
        "last_block",
        (INOUT, OUTPUT, OUTPUT),
        lambda rng: [_out(np.uint32, 1), _out(np.uint32, 23), _out(np.uint32, 1)],
        _last_block,
    ),
    _plain(
        "cp_async",
        (INPUT, INPUT, OUTPUT),
        lambda rng: [
            *(rng.integers(0, 256, (4, 128, 16), np.uint8), rng.integers(0, 17, 128, np.int32)),
            _out(np.uint8, 4, 128, 16),
        ],
        _cp_async,
    ),
    _plain(
        "ldmatrix",
        (INPUT, OUTPUT),
        lambda rng: [rng.integers(0, 2**16, (32, 8), np.uint16), _out(np.uint32, 12, 32)],
        _ldmatrix,
    ),
    _plain("mma", _MMA, _mma_arrays(0), _mma(0), numbers=(0,), name="mma-bf16"),
    _plain("mma", _MMA, _mma_arrays(1), _mma(1), numbers=(1,), name="mma-fp16"),
    _plain("mma", _MMA, _mma_arrays(2), _mma(2), numbers=(2,), name="mma-tf32"),
    _plain(
        "named_barrier", (INPUT, OUTPUT), lambda rng: [_words(rng, 64), _out(np.uint32, 64)], _named_barrier
    ),
    _plain(
        "stmatrix",
        (INPUT, OUTPUT),
        lambda rng: [_words(rng, 4, 32), _out(np.uint16, 2, 32, 8)],
        _stmatrix,
        90,
    ),
    _plain(
        "elect",
        (OUTPUT,),
        lambda rng: [_out(np.uint32, 2, 4)],
        lambda arrays: [np.ones((2, 4), np.uint32)],
        90,
    ),
    _plain("ring", (INPUT, OUTPUT), lambda rng: [_words(rng, 11, 32), _out(np.uint32, 2, 32)], _ring, 90),
    _tma_case(2, 40, 100, 104, 16, 64, 128, 8, 16),
    _tma_case(2, 40, 100, 104, 16, 64, 128, 30, 64, hint=1),
    _tma_case(2, 40, 100, 104, 16, 64, 128, -3, -8, hint=2),
    _tma_case(2, 40, 100, 104, 24, 32, 64, 20, 7),
    _tma_case(2, 40, 100, 104, 16, 16, 32, 0, 90),
    _tma_case(2, 40, 100, 104, 5, 24, 0, 37, 83),
    _tma_case(1, 9, 300, 304, 8, 128, 128, 1, 200),
    _tma_case(4, 30, 50, 52, 16, 32, 128, 16, 24),
    _tma_store_case(2, 40, 100, 104, 16, 64, 128, 2, 8),
    _tma_store_case(2, 40, 100, 104, 16, 64, 128, 20, 60),
    _tma_store_case(4, 20, 40, 40, 8, 16, 64, -3, 30),
    _tma_store_case(2, 20, 40, 40, 6, 24, 0, 9, -8),
    _plain(
        "bulk_load",
        (INPUT, OUTPUT),
        lambda rng: [rng.integers(0, 256, 1504, np.uint8), _out(np.uint8, 1504)],
        lambda arrays: [arrays[0]],
        90,
    ),
    _plain(
        "cluster",
        (INPUT, OUTPUT, OUTPUT),
        lambda rng: [
            rng.integers(0, 2**16, (32, 64), np.uint16),
            _out(np.uint8, 2, 4096),
            _out(np.uint32, 2, 64),
        ],
        _cluster,
        90,
    ),
    _plain("reduce", _REDUCE, _reduce_arrays(False), _reduce(False), 90, (0,), "reduce-bf16"),
    _plain("reduce", _REDUCE, _reduce_arrays(True), _reduce(True), 90, (1,), "reduce-fp16"),
    *(_wgmma_ss_case(n, False, False, 128, False) for n in (8, 16, 32, 64, 128, 256)),
    _wgmma_ss_case(64, False, False, 128, True),
    _wgmma_ss_case(64, True, False, 128, False),
    _wgmma_ss_case(128, False, True, 128, False),
    _wgmma_ss_case(256, True, True, 128, False),
    _wgmma_ss_case(64, True, True, 128, True),
    _wgmma_ss_case(32, False, False, 64, False),
    _wgmma_ss_case(64, True, True, 64, False),
    _wgmma_ss_case(16, False, False, 32, False),
    _wgmma_ss_case(8, True, True, 32, False),
    _wgmma_ss_case(32, False, False, 0, False),
    _wgmma_ss_case(16, True, True, 0, False),
    *(_wgmma_rs_case(n, False, False) for n in (8, 16, 32, 64, 128, 256)),
    _wgmma_rs_case(32, False, True),
    _wgmma_rs_case(128, True, False),
    _wgmma_rs_case(64, True, True),
    _pipeline_case(128, 128, 320),
    _pipeline_case(100, 72, 136),
]
BY_NAME = {case.name: case for case in CASES}

"""What the compiler made of csrc/cuda: no spills, the instructions that were meant, and the decode's budget.

Reads the machine code of the built library, so no GPU is needed. Skipped only where the library was built
without nvcc.
"""

import concurrent.futures
import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_kernels.backends.native import _C

pytestmark = pytest.mark.skipif(not _C.cuda_archs, reason="the library was built without nvcc")

ARCHS = [arch for arch in _C.cuda_archs.split(";") if arch and not arch.startswith("ptx")]
# GPU_KERNELS.md: with more than 1.7 instructions a weight, issuing them takes longer than loading the weight.
MOST_PER_WEIGHT = 1.7
WEIGHTS_PER_MMA = 8  # m16n8k16: 256 weights among 32 lanes


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@!P0", or empty
    opcode: str  # LDG.E.128
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    def __str__(self) -> str:
        return f"{self.address:05x} {self.predicate} {self.opcode} {self.operands}"


class Kernel(NamedTuple):
    arch: str
    name: str  # mangled
    code: list[Instruction]

    def __str__(self) -> str:
        return f"{self.name} for sm_{self.arch}"


def cuobjdump(*arguments: str) -> str:
    """The output of cuobjdump: that of a CUDA toolkit, or the one in triton's wheel."""
    program = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if program is None and triton is not None and triton.origin:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        program = str(path) if path.exists() else None
    assert program is not None, "no cuobjdump on PATH, and no triton that brings one (pip install triton)"
    done = subprocess.run([program, *arguments, _C.__file__], capture_output=True, text=True, check=True)
    return done.stdout


@functools.cache
def kernels() -> list[Kernel]:
    """Every kernel of the library, for every architecture."""
    found: list[Kernel] = []
    arch = ""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # most of this test's time is cuobjdump's
        texts = pool.map(lambda arch: cuobjdump("-arch", f"sm_{arch}", "-sass"), ARCHS)
    for line in itertools.chain.from_iterable(text.splitlines() for text in texts):
        if match := re.match(r"\s*code for sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            found.append(Kernel(arch, match[1], []))
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", line):
            found[-1].code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return found


def named(*parts: str) -> list[Kernel]:
    """The kernels whose mangled names hold all of `parts`, for every architecture that was built."""
    return [k for k in kernels() if all(part in k.name for part in parts)]


def successors(code: list[Instruction]) -> list[list[int]]:
    """The instructions that may follow each one, by index. Slow paths of a divergent warp are left out."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    following = []
    for i, (_, predicate, opcode, operands) in enumerate(code):
        after = [i + 1] if i + 1 < len(code) else []
        kind, *modifiers = opcode.split(".")
        assert kind not in ("BRX", "JMX", "JMP"), "a jump that this does not follow"
        if kind == "BRA" and not {"DIV", "CONV"} & set(modifiers):
            target = at[int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)]
            after = [*(after if predicate or "," in operands else []), target]
        elif kind == "CALL":  # of a subroutine, or the way the compiler jumps far
            after = [*after, at[int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)]]
        elif kind in ("EXIT", "RET") and not predicate:
            after = []
        following.append(after)
    return following


def dominators(following: list[list[int]]) -> dict[int, int]:
    """The immediate dominator of every instruction that can be reached (Cooper, Harvey and Kennedy 2001)."""
    order, seen, stack = [], {0}, [(0, iter(following[0]))]
    while stack:
        node, rest = stack[-1]
        step = next((s for s in rest if s not in seen), None)
        if step is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(following[step])))
    number = {node: i for i, node in enumerate(reversed(order))}
    before: dict[int, list[int]] = {node: [] for node in number}
    for node in number:
        for step in following[node]:
            before[step].append(node)
    above, changed = {0: 0}, True
    while changed:
        changed = False
        for node in list(number)[1:]:
            known = [b for b in before[node] if b in above]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    while number[new] > number[other]:
                        new = above[new]
                    while number[other] > number[new]:
                        other = above[other]
            changed |= above.get(node) != new
            above[node] = new
    return above


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops: for each instruction that a later one jumps back to, what lies on the way round."""
    following = successors(code)
    above = dominators(following)
    before: dict[int, list[int]] = {node: [] for node in above}
    for node in above:
        for step in following[node]:
            before[step].append(node)

    def dominated(node: int, by: int) -> bool:
        while node not in (by, 0):
            node = above[node]
        return node == by

    bodies: dict[int, set[int]] = {}
    for node in above:
        for head in following[node]:
            if dominated(node, head):
                body = bodies.setdefault(head, {head})
                waiting = [node]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting += before[inside]
    return [[code[i] for i in sorted(body)] for body in bodies.values()]


@functools.cache
def main_loop(name: str, arch: str) -> list[Instruction]:
    """The innermost loop that multiplies and copies: the decode's trip over a chunk. NOPs are not counted."""
    (kernel,) = (k for k in kernels() if (k.name, k.arch) == (name, arch))
    both = [body for body in loops(kernel.code) if {"HMMA", "LDGSTS"} <= {i.kind for i in body}]
    assert both, f"{kernel}: no loop with HMMA and LDGSTS"
    return [instruction for instruction in min(both, key=len) if instruction.kind != "NOP"]


def decode_kernels(nf4: bool | None = None) -> list[Kernel]:
    """The instances of lora_linear_decode<dtype, NF4, exchange>."""
    found = named("lora_linear_decode", "Lb1E" if nf4 else "")
    return [k for k in found if nf4 is None or ("Lb1E" in k.name) == nf4]


# ---- the library -------------------------------------------------------------------------------------------


def test_the_library_holds_every_architecture_that_it_says():
    listed = set(re.findall(r"\.sm_(\w+)\.cubin", cuobjdump("-lelf")))
    assert listed == set(ARCHS)
    ptx = {arch.removeprefix("ptx") for arch in _C.cuda_archs.split(";") if arch.startswith("ptx")}
    assert set(re.findall(r"\.sm_(\w+)\.ptx", cuobjdump("-lptx", "-all"))) >= ptx


def test_every_kernel_is_there_for_every_architecture():
    """As many instances for each; those of *_sm90.cu from 9.0 on."""
    names = {
        arch: {re.sub(r"_GLOBAL__N__\w{8}_", "", k.name) for k in kernels() if k.arch == arch}
        for arch in ARCHS
    }
    for older, newer in itertools.pairwise(sorted(ARCHS, key=lambda a: int(a.rstrip("a")))):
        assert len(names[older]) <= len(names[newer])
    for arch in ARCHS:
        clustered = [k for k in named("lora_linear_decode", "ClusterExchange") if k.arch == arch]
        assert len(clustered) == (4 if int(arch.rstrip("a")) >= 90 else 0)
        assert len([k for k in named("lora_linear_decode", "GlobalExchange") if k.arch == arch]) == 4
        assert len([k for k in named("dequantize_aligned") if k.arch == arch]) == 3


def test_no_kernel_spills_or_has_local_memory():
    for kernel in kernels():
        local = [str(i) for i in kernel.code if i.kind in ("LDL", "STL")]
        assert not local, f"{kernel}: {local[:4]}"


# ---- lora_linear_decode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, suffix", [("bf16", "BF16"), ("fp16", "")])
def test_the_decode_multiplies_on_tensor_cores(dtype, suffix):
    number = {"fp16": "ILi1E", "bf16": "ILi2E"}[dtype]  # lk_dtype
    instances = named("lora_linear_decode", number)
    assert len(instances) >= 2 * len(ARCHS)
    for kernel in instances:
        products = {i.opcode for i in kernel.code if i.kind == "HMMA"}
        assert products == {".".join(filter(None, ("HMMA", "16816", "F32", suffix)))}, str(kernel)


def test_the_decode_copies_its_weights_16_bytes_at_a_time_around_l1():
    for kernel in decode_kernels():
        copies = [i.opcode for i in main_loop(kernel.name, kernel.arch) if i.kind == "LDGSTS"]
        assert len(copies) >= 4 and set(copies) == {"LDGSTS.E.BYPASS.128"}, f"{kernel}: {copies}"


def test_the_decode_reads_the_adapter_16_bytes_at_a_time():
    """A for h, B for s·B·h; narrower loads are for rows that are not aligned."""
    for kernel in decode_kernels():
        wide = [i for i in kernel.code if i.kind == "LDG" and ".128" in i.opcode]
        assert len(wide) >= 8, f"{kernel}: {len(wide)} loads of 16 bytes"


def test_the_main_loop_neither_divides_nor_diverges():
    for kernel in decode_kernels():
        unwanted = {"I2F", "F2I", "MUFU", "CALL", "LDG", "STG", "BSSY"}
        found = [
            str(i) for i in main_loop(kernel.name, kernel.arch) if i.kind in unwanted or "BRA.DIV" in i.opcode
        ]
        assert not found, f"{kernel}: {found}"


def test_instructions_per_weight_of_the_decode_are_within_the_budget():
    instances = decode_kernels(nf4=True)
    assert len(instances) >= 2 * len(ARCHS)
    counted = []
    for kernel in instances:
        body = main_loop(kernel.name, kernel.arch)
        products = sum(i.kind == "HMMA" for i in body)
        assert products % 16 == 0, f"{kernel}: {products} HMMA are not whole chunks of 256 weights x 16 rows"
        counted.append((len(body) / (WEIGHTS_PER_MMA * products), kernel))
    worst = {arch: max(n for n, kernel in counted if kernel.arch == arch) for arch in ARCHS}
    print("instructions per weight:", ", ".join(f"sm_{arch} {n:.2f}" for arch, n in worst.items()))
    for per_weight, kernel in counted:
        assert per_weight <= MOST_PER_WEIGHT, f"{kernel}: {per_weight:.2f} instructions per weight"


def test_a_weight_pair_costs_one_prmt_and_one_lds():
    """The pair table's promise. Codes, scales and x of 64 weights come by six more LDS."""
    for kernel in decode_kernels(nf4=True):
        body = main_loop(kernel.name, kernel.arch)
        chunks = sum(i.kind == "HMMA" for i in body) // 16
        assert sum(i.kind == "PRMT" for i in body) == 64 * chunks, str(kernel)
        assert sum(i.kind == "LDS" and not i.predicate for i in body) <= (64 + 4 * 6) * chunks, str(kernel)


# ---- the kernels of training -------------------------------------------------------------------------------

TRAINING = {  # kernel -> instances for each architecture: dtypes x shapes
    "lora_linear_mixed": 2 * 2 * 3,  # NF4 or dense, tokens of a tile
    "lora_shrink": 2 * 2,  # ranks of a tile
    "lora_expand": 2 * 2,  # forward, backward
    "lora_linear_backward_sweep": 2 * 3 * 2,  # ranks of a tile, with dbias
    "lora_linear_backward_dx": 2 * 2 * 3,
}


def dx_kernels(nf4: bool, tokens: int) -> list[Kernel]:
    return named("23lora_linear_backward_dx", f"Lb{int(nf4)}ELi{tokens}E")


@pytest.mark.parametrize("name", TRAINING)
def test_the_training_kernels_multiply_on_tensor_cores_and_copy_16_bytes_at_a_time(name):
    """Products with fp32 sums of the instance's dtype, operands by ldmatrix or wide loads, and cp.async."""
    found = named(f"{len(name)}{name}I")
    assert len(found) == TRAINING[name] * len(ARCHS)
    for kernel in found:
        bf16 = f"{name}ILi2E" in kernel.name
        products = {i.opcode for i in kernel.code if i.kind == "HMMA"}
        assert products == {"HMMA.16816.F32.BF16" if bf16 else "HMMA.16816.F32"}, str(kernel)
        copies = {i.opcode for i in kernel.code if i.kind == "LDGSTS"}
        assert copies and all("BYPASS.128" in opcode for opcode in copies), f"{kernel}: {copies}"
        reads = {i.opcode for i in kernel.code if i.kind in ("LDSM", "LDS")}
        assert any(".M88.4" in opcode or opcode == "LDS.128" for opcode in reads), f"{kernel}: {reads}"


def unit_loop(kernel: Kernel, tokens: int) -> list[Instruction]:
    """lora_linear_mixed's loop over 64 of K: the smallest one that multiplies for all tokens."""
    found = [
        [i for i in body if i.kind != "NOP"]
        for body in loops(kernel.code)
        if sum(i.kind == "HMMA" for i in body) >= tokens // 8 * 8
    ]
    assert found, f"{kernel}: no loop with {tokens // 8 * 8} HMMA"
    return min(found, key=len)


# Instructions for each weight of NF4 in lora_linear_mixed's loop over K, of which a warp's lanes have 64 each
# (32 rows x 64): decoding (a pair: a shift, a mask or LOP3, an LDS), the products of 16, 32 or 64 tokens and
# of A, scales. Counted, and a little room: a compiler that spills or unrolls otherwise is seen.
MIXED_PER_WEIGHT = {16: 4.7, 32: 5.4, 64: 6.9}


@pytest.mark.parametrize("tokens", MIXED_PER_WEIGHT)
def test_instructions_per_weight_of_lora_linear_mixed(tokens):
    found = named("17lora_linear_mixedI", f"Lb1ELi{tokens}E")
    assert len(found) == 2 * len(ARCHS)
    for kernel in found:
        body = unit_loop(kernel, tokens)
        counts = {kind: sum(i.kind == kind for i in body) for kind in ("HMMA", "LDS", "LDG", "FFMA")}
        # Two fragments of 16 rows: 4 HMMA each for 8 tokens, and A's for this warp's quarter of the tokens.
        of_A = 4 * max(1, tokens // 32)
        assert counts["HMMA"] == tokens // 8 * 8 + of_A, f"{kernel}: {counts}"
        assert counts["FFMA"] == tokens, f"{kernel}: {counts}"  # a scale for each sum
        # 32 pairs, 4 of codes, two for each 8 tokens of x, as many for A's.
        assert counts["LDS"] <= 32 + 4 + tokens // 4 + of_A // 2, f"{kernel}: {counts}"
        assert counts["LDG"] == 4, f"{kernel}: {counts}"  # A, 16 bytes at a time
        per_weight = len(body) / 64
        assert per_weight <= MIXED_PER_WEIGHT[tokens], f"{kernel}: {per_weight:.2f} instructions per weight"


def test_lora_dropout_moves_16_bytes_at_a_time_and_draws_once():
    """Ten rounds of two 32 x 32-bit products for each four elements, of 16 bits twice; tails one by one."""
    found = named("dropout_aligned")
    assert len(found) == 2 * len(ARCHS)
    for kernel in found:
        wide = {
            kind: sum(i.kind == kind and ".128" in i.opcode for i in kernel.code) for kind in ("LDG", "STG")
        }
        assert wide == {"LDG": 1, "STG": 1}, f"{kernel}: {wide}"
        counters = 1 if "dropout_alignedIj" in kernel.name else 2  # of 32-bit elements, or of 16-bit ones
        products = sum("IMAD.WIDE.U32" in i.opcode for i in kernel.code)
        # And an address or two.
        assert 20 * counters <= products <= 20 * counters + 6, f"{kernel}: {products} wide products"
        assert not any(i.kind == "CALL" for i in kernel.code), str(kernel)


def test_the_reduction_has_eight_loads_under_way():
    """Of P's partial sums and of Q's: an unrolled loop, and what is left one by one."""
    found = named("27lora_linear_backward_reduceI")
    assert len(found) == 2 * len(ARCHS)
    for kernel in found:
        unrolled = [
            body
            for body in loops(kernel.code)
            if sum(i.opcode.startswith("LDG") and ".64" not in i.opcode for i in body) >= 8
        ]
        assert len(unrolled) >= 2, f"{kernel}: {len(unrolled)} loops with eight loads"
        for body in unrolled:
            kinds = [i.kind for i in body]
            assert kinds.count("FADD") >= 8 and not {"CALL", "MUFU", "I2F", "F2I"} & set(kinds), str(kernel)


def test_the_sweeps_read_their_tile_both_ways_round_by_ldmatrix():
    for kernel in named("26lora_linear_backward_sweepI"):
        reads = {i.opcode for i in kernel.code if i.kind == "LDSM"}
        assert reads == {"LDSM.16.M88.4", "LDSM.16.MT88.4"}, f"{kernel}: {reads}"


def loop_of_products(kernel: Kernel) -> list[Instruction]:
    """The innermost loop with HMMA in it."""
    found = [body for body in loops(kernel.code) if any(i.kind == "HMMA" for i in body)]
    assert found, f"{kernel}: no loop with HMMA"
    return min(found, key=len)


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_a_weight_of_dx_costs_one_multiplication_and_half_a_load(tokens):
    """A lane decodes 32 weights for each 32 rows: 16 pairs by LDS.64, 32 FMUL, 16 conversions to a pair."""
    for kernel in dx_kernels(nf4=True, tokens=tokens):
        bodies = [
            body
            for body in loops(kernel.code)
            if sum(i.kind == "HMMA" for i in body) == tokens // 8 * 4
            and any(i.opcode == "LDS.64" for i in body)
        ]
        assert bodies, f"{kernel}: no loop that decodes and multiplies"
        body = min(bodies, key=len)
        assert sum(i.opcode == "LDS.64" for i in body) == 16, str(kernel)
        assert 32 <= sum(i.kind == "FMUL" for i in body) <= 36, str(kernel)  # and a scale's own


def test_a_dense_dx_pairs_rows_by_prmt():
    for tokens in (16, 32, 64):
        for kernel in dx_kernels(nf4=False, tokens=tokens):
            assert sum(i.kind == "PRMT" for i in kernel.code) >= 16, str(kernel)
            assert not any(i.kind == "FMUL" and "@" not in i.predicate for i in loop_of_products(kernel)), (
                str(kernel)
            )


# ---- nf4_dequantize ----------------------------------------------------------------------------------------


def test_dequantize_loads_and_stores_wide():
    """Aligned kernel: 8 bytes of codes or more in one load, and nothing but stores of 16 bytes."""
    for kernel in named("dequantize_aligned"):
        loads = [i.opcode for i in kernel.code if i.kind == "LDG"]
        assert any(re.search(r"\.(64|128)\b", opcode) for opcode in loads), f"{kernel}: {loads}"
        stores = {i.opcode for i in kernel.code if i.kind == "STG"}
        assert stores and all(re.search(r"\.128\b", opcode) for opcode in stores), f"{kernel}: {stores}"


# ---- the optimizers' steps ---------------------------------------------------------------------------------


def test_the_optimizers_move_16_bytes_at_a_time():
    """Eight elements of a lane: fp32 twice, of 16 bits once, codes 8 bytes; and again to write them back."""
    found = named("10optim_stepI")
    assert len(found) == 4 * 3 * len(ARCHS)
    for kernel in found:
        op, dtype = (int(n) for n in re.search(r"optim_stepILi(\d)ELi(\d)E", kernel.name).groups())
        eight_bit, moments = op in (1, 3), 2 if op < 2 else 1
        of_params = 2 if dtype == 0 else 1
        of_states = 0 if eight_bit else 2 * moments
        # A gradient of 16-bit parameters may be fp32.
        loads = (
            of_params + (2 if dtype == 0 else 3) + of_states + (0 if dtype == 0 else 1)
        )  # and compensation
        stores = of_params + of_states + (0 if dtype == 0 else 1)
        count = {
            (kind, width): sum(i.kind == kind and f".{width}" in i.opcode for i in kernel.code)
            for kind in ("LDG", "STG")
            for width in (64, 128)
        }
        assert count["LDG", 128] >= loads, f"{kernel}: {count}"
        assert count["STG", 128] >= stores, f"{kernel}: {count}"
        if eight_bit:
            assert count["LDG", 64] >= moments and count["STG", 64] >= moments, f"{kernel}: {count}"


def test_the_optimizers_table_stays_in_the_constant_bank():
    """A parameter that is indexed by a register costs a load of constants, not a copy to local memory."""
    for kernel in named("10optim_stepI"):
        assert any(i.kind in ("LDC", "ULDC") for i in kernel.code), str(kernel)
        assert not any(i.kind in ("LDL", "STL") for i in kernel.code), str(kernel)


# ---- the reading of control flow ---------------------------------------------------------------------------


def test_loops_are_found_by_control_flow():
    """Two nested loops and a slow path that jumps back into the inner one from behind the end."""
    program = (
        "MOV",  # 0
        "HMMA",  # 1 outer
        "LDS",  # 2 inner
        "BRA.DIV 7",
        "@P0 BRA 2",
        "@P1 BRA 1",
        "EXIT",
        "BSYNC",
        "BRA 4",
    )
    code = []
    for i, text in enumerate(program):
        match = re.fullmatch(r"(@\w+ )?([A-Z.]+) ?(\d+)?", text)
        operands = f"UR0, 0x{16 * int(match[3]):x}" if match[3] and "DIV" in text else ""
        operands = operands or (f"0x{16 * int(match[3]):x}" if match[3] else "")
        code.append(Instruction(16 * i, (match[1] or "").strip(), match[2], operands))
    found = sorted([i.address // 16 for i in body] for body in loops(code))
    assert found == [[1, 2, 3, 4, 5], [2, 3, 4]]

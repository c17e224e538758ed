"""Deletes every barrier, wait, fence and mask of the real kernels: the stand-in must notice each.

    python tests/simt/deletions.py [--seeds 100] [--jobs 2] [--only TEXT]

Synchronisation is found by its spelling, so that a new kernel's is deleted too; masks are listed. A deletion
is caught where the driver (drive.cpp) fails within that many seeds. JUSTIFIED says which need not be, and
why. Prints a line each; exit status 1 where one is neither caught nor justified, or one that is justified is
caught.
"""

import argparse
import concurrent.futures
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
PRIMITIVES = ("device.cuh", "tensor_map.cuh", "ptx.cuh", "ptx_sm90.cuh")
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-DLK_SIMT"]
TIMEOUT_S = 120  # a fault may loop for ever

SYNCHRONISATION = re.compile(
    r"(?:__syncthreads|__syncwarp|__threadfence|ptx::(?:cp_async_wait<[^;]*>|cp_async_commit"
    r"|cluster_arrive|cluster_wait|barrier_sync|barrier_arrive|fence_\w+|mbarrier_\w+|wgmma_\w+|bulk_\w+))\([^;]*\);"
)


class Deletion(NamedTuple):
    file: str
    old: str
    new: str
    occurrence: int = 0  # of `old` in the file

    def __str__(self) -> str:
        what = f"{self.old.strip()[:70]!r}" + (f" -> {self.new.strip()[:50]!r}" if self.new else "")
        return f"{self.file} #{self.occurrence}: {what}"


# What keeps a kernel inside its tensors: each condition that can be false at an edge.
MASKS = (
    Deletion("lora_linear_decode.cuh", "row + 4 * i < rows ? row + 4 * i : rows - 1", "row + 4 * i"),
    Deletion("lora_linear_decode.cuh", "at < there ? 16 : 0", "16"),
    Deletion("lora_linear_decode.cuh", "if (feed.passes > 0 && feed.left() == 0) feed.end_pass();", ""),
    Deletion("lora_linear_decode.cuh", "token < p.tokens && k0 + col < p.k", "token < p.tokens"),
    Deletion("lora_linear_decode.cuh", "token < p.tokens && k0 + col < p.k", "k0 + col < p.k"),
    Deletion("lora_linear_decode.cuh", "if (first + g < p.rank) load_A", "load_A"),
    Deletion("lora_linear_decode.cuh", "if (first + g + 8 < p.rank) load_A", "load_A"),
    Deletion("lora_linear_decode.cuh", "row + r < p.n ? units : 0", "units"),
    Deletion("lora_linear_decode.cuh", "if (unit < here) {", "{"),
    Deletion("lora_linear_decode.cuh", "row < p.n ? row : p.n - 1", "row"),
    Deletion("lora_linear_decode.cuh", "row + 8 < p.n ? row + 8 : p.n - 1", "row + 8"),
    Deletion("lora_linear_decode.cuh", "row + 8 * half >= p.n || token >= p.tokens", "token >= p.tokens"),
    Deletion("lora_linear_decode.cuh", "row + 8 * half >= p.n || token >= p.tokens", "row + 8 * half >= p.n"),
    Deletion("lora_linear.cuh", "return flag[0] != 0;", "return true;"),
    Deletion("lora_linear_decode.cuh", "if (thread == 0) p.counters[group] = 0;", ""),
    Deletion("lora_linear_mixed.cuh", "row0 + row < p.n && col < col_end", "col < col_end"),
    Deletion("lora_linear_mixed.cuh", "row0 + row < p.n && col < col_end", "row0 + row < p.n"),
    Deletion("lora_linear_mixed.cuh", "token0 + token < p.tokens && col < col_end", "col < col_end"),
    Deletion(
        "lora_linear_mixed.cuh", "token0 + token < p.tokens && col < col_end", "token0 + token < p.tokens"
    ),
    Deletion(
        "lora_linear_mixed.cuh", "scale_row < p.n && at + u * kUnit < col_end", "at + u * kUnit < col_end"
    ),
    Deletion("lora_linear_mixed.cuh", "scale_row < p.n && at + u * kUnit < col_end", "scale_row < p.n"),
    Deletion("lora_linear_mixed.cuh", "fused_h && at + u * kUnit < col_end", "fused_h"),
    Deletion("lora_linear_mixed.cuh", "if (g < p.rank) load_A", "load_A"),
    Deletion("lora_linear_mixed.cuh", "if (g + 8 < p.rank) load_A", "load_A"),
    Deletion("lora_linear_mixed.cuh", "if (c >= kColumns) break;", ""),
    Deletion("lora_linear_mixed.cuh", "slice == 0 && token0 + token < p.tokens && j < p.rank", "true"),
    Deletion("lora_linear_mixed.cuh", "row_tile != 0 || j >= p.rank", "row_tile != 0"),
    Deletion("lora_linear_mixed.cuh", "j >= p.rank || token0 + token >= p.tokens", "j >= p.rank"),
    Deletion("lora_linear_mixed.cuh", "row < p.n && token < p.tokens", "row < p.n"),
    Deletion("lora_linear_mixed.cuh", "row < p.n && token < p.tokens", "token < p.tokens"),
    Deletion("lora_linear_mixed.cuh", "token >= p.tokens || row >= p.n", "token >= p.tokens"),
    Deletion("lora_linear_mixed.cuh", "token >= p.tokens || row >= p.n", "row >= p.n"),
    Deletion("lora_linear_mixed.cuh", "if (token >= p.tokens) break;", ""),
    Deletion("lora_linear_mixed.cuh", "if (thread == 0) p.counters[tile] = 0;", ""),
    Deletion("lora_linear.cuh", "row < p.n && j < p.rank", "j < p.rank"),
    Deletion("lora_linear.cuh", "row < p.n && j + 1 < p.rank", "row < p.n"),
    Deletion("lora_dropout.cu", "if (i >= p.n) return;", "", 0),
    Deletion("lora_dropout.cu", "if (i >= p.n) return;", "", 1),
    Deletion("lora_dropout.cu", "i + kElements <= p.n", "true"),
    Deletion(
        "low_rank.cuh",
        "adapter < rows.adapters ? rows.begin(adapter) : rows.end(rows.adapters - 1)",
        "rows.begin(adapter)",
    ),
    Deletion(
        "low_rank.cuh", "if (kEmpty && count[i] == 0 && 2 * lane + i < rows.adapters) count[i] = 1;", ""
    ),
    Deletion(
        "low_rank.cuh", "kEmpty && count[i] == 0 && 2 * lane + i < rows.adapters", "kEmpty && count[i] == 0"
    ),
    Deletion("low_rank.cuh", "several += count[i] > 1 ? count[i] : 0", "several += count[i]"),
    Deletion("low_rank.cuh", "if (behind == 0xffffffffu) return {-1, 0, 0, 0, 0};", ""),
    Deletion("low_rank.cuh", "end < begin + length ? end : begin + length", "begin + length"),
    Deletion("low_rank.cuh", "slots + (odd && first > 1 ? first : 0) + part", "slots + part"),
    Deletion("low_rank.cuh", "slots + (first > 1 ? first : 0)", "slots"),
    Deletion("low_rank.cuh", "if (lane >= by) sum += lower;", "sum += lower;"),
    Deletion("low_rank.cuh", "return left < 0 ? 0 :", "return"),
    Deletion("low_rank.cuh", "left < most ? static_cast<int>(left) : most", "most"),
    Deletion("low_rank.cuh", "m.dtype == kDtype && m.aligned", "m.dtype == kDtype"),
    Deletion("low_rank.cuh", "m.dtype == kDtype && m.aligned", "m.aligned"),
    Deletion("low_rank.cuh", "m.aligned && there == 8", "there == 8"),
    Deletion("low_rank.cuh", "m.aligned && there == 8", "m.aligned"),
    Deletion("low_rank.cuh", "if (2 * v + e < there) two[e]", "two[e]"),
    Deletion("low_rank.cuh", "clamped(col_end - first, 8)", "8"),
    Deletion("low_rank.cuh", "z.dtype != kDtype || !z.aligned", "z.dtype != kDtype"),
    Deletion("low_rank.cuh", "z.dtype != kDtype || !z.aligned", "!z.aligned"),
    Deletion("low_rank.cuh", "row < count ? there : 0", "there"),
    Deletion("low_rank.cuh", "row < count && there > 0", "there > 0"),
    Deletion("low_rank.cuh", "rows.order == nullptr && count == kRows && col", "count == kRows && col"),
    Deletion(
        "low_rank.cuh", "rows.order == nullptr && count == kRows && col", "rows.order == nullptr && col"
    ),
    Deletion("low_rank.cuh", "count == kRows && col + kTileCols <= col_end", "count == kRows"),
    Deletion("low_rank.cuh", "row < count; row += kRound", "row < kTileRows; row += kRound"),
    Deletion("low_rank.cuh", "const bool counters = cols % 4 == 0;", "const bool counters = true;"),
    Deletion(
        "low_rank.cuh",
        "row < count ? clamped(rank_end - rank - 8 * piece, 8) : 0",
        "clamped(rank_end - rank - 8 * piece, 8)",
    ),
    Deletion(
        "low_rank.cuh", "row < count ? clamped(rank_end - rank - 8 * piece, 8) : 0", "row < count ? 8 : 0"
    ),
    Deletion(
        "low_rank.cuh",
        "static_cast<uint64_t>(rows[begin + row] * cols",
        "static_cast<uint64_t>((begin + row) * cols",
    ),
    Deletion("dropout.cuh", "high = words(counter + 1)", "high = words(counter)"),
    Deletion("dropout.cuh", "if (shift != 0) bits =", "bits ="),
    Deletion("dropout.cuh", "kept4(first / 4 + 1) << 4", "kept4(first / 4) << 4"),
    Deletion("lora_shrink.cu", "if (tile.count == 0 || ranks == 0) return;", "if (ranks == 0) return;"),
    Deletion("lora_shrink.cu", "if (tile.count == 0 || ranks == 0) return;", "if (tile.count == 0) return;"),
    Deletion("lora_shrink.cu", "A, successive, first_rank, ranks,", "A, successive, first_rank, S::kRanks,"),
    Deletion("lora_shrink.cu", "row < tile.count && rank < ranks", "rank < ranks"),
    Deletion("lora_shrink.cu", "row < tile.count && rank < ranks", "row < tile.count"),
    Deletion("lora_shrink.cu", "p.k < col0 + p.slice_k ? p.k : col0 + p.slice_k", "col0 + p.slice_k"),
    Deletion("lora_shrink.cu", "if (thread == 0) p.counters[unit] = 0;", ""),
    Deletion("lora_expand.cu", "if (tile.count == 0) return;", ""),
    Deletion("lora_expand.cu", "if (first + 16 * s >= rank) break;", ""),
    Deletion(
        "lora_expand.cu",
        "first + row < rank ? clamped(columns - 8 * piece, 8) : 0",
        "clamped(columns - 8 * piece, 8)",
    ),
    Deletion(
        "lora_expand.cu", "row < tile.count ? p.rows[tile.begin + row] : -1", "p.rows[tile.begin + row]"
    ),
    Deletion("lora_expand.cu", "row_of[half] < 0 || col >= p.columns", "row_of[half] < 0"),
    Deletion("lora_expand.cu", "row_of[half] < 0 || col >= p.columns", "col >= p.columns"),
    Deletion("lora_expand.cu", "if (col + 1 >= p.columns) continue;", ""),
    Deletion("lora_expand.cu", "t % 2 == 0 ? row_of[0] : row_of[1]", "row_of[0]"),
    Deletion("lora_expand.cu", "masked && p.columns % 4 == 0", "masked"),
    Deletion("lora_linear_backward_sweep.cuh", "least(col0 + S::kStrip, p.columns)", "col0 + S::kStrip"),
    Deletion(
        "lora_linear_backward_sweep.cuh",
        "if (row >= count || rank >= ranks) continue;",
        "if (rank >= ranks) continue;",
    ),
    Deletion(
        "lora_linear_backward_sweep.cuh",
        "if (row >= count || rank >= ranks) continue;",
        "if (row >= count) continue;",
    ),
    Deletion("lora_linear_backward_sweep.cuh", "if (col >= col_end) continue;", ""),
    Deletion(
        "lora_linear_backward_sweep.cuh", "if (!wanted || rank >= ranks) continue;", "if (!wanted) continue;"
    ),
    Deletion(
        "lora_linear_backward_sweep.cuh",
        "if (!wanted || rank >= ranks) continue;",
        "if (rank >= ranks) continue;",
    ),
    Deletion(
        "lora_linear_backward_sweep.cuh",
        "token < p.rows.begin(owner) || rank >= p.rank[owner]",
        "rank >= p.rank[owner]",
    ),
    Deletion(
        "lora_linear_backward_sweep.cuh",
        "token < p.rows.begin(owner) || rank >= p.rank[owner]",
        "token < p.rows.begin(owner)",
    ),
    Deletion("lora_linear_backward_sweep.cuh", "sums >= 0 && sums < elements", "sums >= 0"),
    Deletion(
        "lora_linear_backward_sweep.cuh", "if (!is_sum || slots.runs == 1) return;", "if (!is_sum) return;"
    ),
    Deletion(
        "lora_linear_backward_sweep.cuh",
        "p.out[adapter].data == nullptr || rank >= p.rank[adapter]",
        "p.out[adapter].data == nullptr",
    ),
    Deletion("lora_linear_backward_dx.cuh", "row0 + row < row_end && col < p.k", "col < p.k"),
    Deletion("lora_linear_backward_dx.cuh", "row0 + row < row_end && col < p.k", "row0 + row < row_end"),
    Deletion(
        "lora_linear_backward_dx.cuh",
        "token0 + token < p.tokens ? clamped(row_end - row0 - 8 * piece, 8) : 0",
        "clamped(row_end - row0 - 8 * piece, 8)",
    ),
    Deletion(
        "lora_linear_backward_dx.cuh",
        "token0 + token < p.tokens ? clamped(row_end - row0 - 8 * piece, 8) : 0",
        "token0 + token < p.tokens ? 8 : 0",
    ),
    Deletion("lora_linear_backward_dx.cuh", "row >= row_end || col >= p.k", "row >= row_end"),
    Deletion("lora_linear_backward_dx.cuh", "row >= row_end || col >= p.k", "col >= p.k"),
    Deletion(
        "lora_linear_backward_dx.cuh", "group == 0 && slice == 0 && p.rank > 0", "group == 0 && p.rank > 0"
    ),
    Deletion("lora_linear_backward_dx.cuh", "rank < p.rank && column < p.k", "rank < p.rank"),
    Deletion("lora_linear_backward_dx.cuh", "rank < p.rank && column < p.k", "column < p.k"),
    Deletion(
        "lora_linear_backward_dx.cuh",
        "if (token < p.tokens && rank < p.rank) two[e]",
        "if (rank < p.rank) two[e]",
    ),
    Deletion(
        "lora_linear_backward_dx.cuh",
        "if (token < p.tokens && rank < p.rank) two[e]",
        "if (token < p.tokens) two[e]",
    ),
    Deletion("lora_linear_backward_dx.cuh", "if (token < p.tokens && column < p.k) {", "if (column < p.k) {"),
    Deletion(
        "lora_linear_backward_dx.cuh", "if (token < p.tokens && column < p.k) {", "if (token < p.tokens) {"
    ),
    Deletion("lora_linear_backward_dx.cuh", "if (token < p.tokens && col < p.k) {", "if (col < p.k) {"),
    Deletion(
        "lora_linear_backward_dx.cuh", "if (token < p.tokens && col < p.k) {", "if (token < p.tokens) {"
    ),
    Deletion("lora_linear_backward_dx.cuh", "if (thread == 0) p.counters[tile] = 0;", ""),
    *(
        Deletion("optim_step.cu", "there == kLaneElements && aligned", condition, i)
        for i in range(3)  # load, store_f32, store_16
        for condition in ("aligned", "there == kLaneElements")
    ),
    Deletion("optim_step.cu", "if (i >= there) continue;", ""),
    Deletion("optim_step.cu", "if (i < there) cast<float>", "cast<float>"),
    Deletion("optim_step.cu", "if (i < there) cast<uint16_t>", "cast<uint16_t>"),
    Deletion("optim_step.cu", "if (i < there) cast<uint8_t>", "cast<uint8_t>"),
    Deletion("optim_step.cu", "if (i < there) words", "words"),
    Deletion("optim_step.cu", "i < there ? __fmul_rn(entry, absmax) : 0.0f", "__fmul_rn(entry, absmax)"),
    Deletion("optim_step.cu", "if (block * kBlock < s.count) update_block", "update_block"),
    Deletion("optim_step.cu", "if (cast<const int64_t>(page.data)[0] == p.tick) continue;", ""),
    Deletion("optim_step.cu", "if (kGuarded && !(new_v < kInf)) continue;", ""),
    Deletion("optim_step.cu", "+ 1 == page.chunks", "+ 1 >= 1"),
    Deletion("optim_step.cu", "counter[0] = 0;", ""),
    Deletion("nf4_dequantize.cu", "i < total;", "i < total + 1;", 0),
    Deletion("nf4_dequantize.cu", "i < total;", "i < total + 1;", 1),
)

JUSTIFIED = {
    "lora_dropout.cu #0: 'if (i >= p.n) return;'": "the loops over single elements do nothing, "
    "and it saves ten rounds",
    **dict.fromkeys(
        (
            f"lora_shrink.cu #0: 'if (tile.count == 0 || ranks == 0) return;' -> 'if ({left}) return;'"
            for left in ("ranks == 0", "tile.count == 0")
        ),
        "a tile without rows or ranks copies and stores nothing, and what it would cost is saved",
    ),
    "lora_expand.cu #0: 'if (tile.count == 0) return;'": "likewise",
    "lora_expand.cu #0: 'if (first + 16 * s >= rank) break;'": "ranks behind the last are zeros in both",
    "lora_expand.cu #0: 'masked && p.columns % 4 == 0' -> 'masked'": "what is drawn for nothing is replaced",
    "dropout.cuh #0: 'if (shift != 0) bits =' -> 'bits ='": "bits 8 to 11 are cut off; it saves ten rounds",
}


def synchronisation() -> list[Deletion]:
    found = []
    for path in sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]):
        if path.name in PRIMITIVES:
            continue
        seen: dict[str, int] = {}
        code = re.sub(r"//[^\n]*", lambda m: " " * len(m.group()), path.read_text())
        for match in SYNCHRONISATION.finditer(code):
            text = match.group()
            found.append(Deletion(path.name, text, "", seen.get(text, 0)))
            seen[text] = seen.get(text, 0) + 1
    return found


def apply(deletion: Deletion, text: str) -> str:
    code = re.sub(r"//[^\n]*", lambda m: " " * len(m.group()), text)
    at = -1
    for _ in range(deletion.occurrence + 1):
        at = code.find(deletion.old, at + 1)
        if at < 0:
            raise SystemExit(f"{deletion}: not found: the kernels have changed, and so must this list")
    return text[:at] + (deletion.new or ";") + text[at + len(deletion.old) :]


def compile_object(source: Path, out: Path) -> None:
    command = ["g++", *FLAGS, "-x", "c++", "-c", str(source), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Tree:
    """A copy of what the driver is made of, with objects that are compiled again only where they must."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copytree(ROOT / "tests" / "simt", folder / "tests" / "simt")

    def sources(self) -> list[Path]:
        kernels = sorted((self.folder / "csrc" / "cuda").glob("*.cu"))
        return [
            *kernels,
            self.folder / "csrc" / "simt" / "engine.cpp",
            self.folder / "tests" / "simt" / "drive.cpp",
        ]

    def object(self, source: Path) -> Path:
        return self.folder / (source.name + ".o")

    def included(self, source: Path) -> set[str]:
        """Names of the files of this tree that the source is made of."""
        seen, waiting = set(), [source]
        while waiting:
            path = waiting.pop()
            if path.exists() and path.name not in seen:
                seen.add(path.name)
                waiting += [
                    path.parent / name for name in re.findall(r'#include "([^"]+)"', path.read_text())
                ]
        return seen

    def link(self, changed: str | None) -> Path:
        for source in self.sources():
            if not self.object(source).exists() or changed in self.included(source):
                compile_object(source, self.object(source))
        driver = self.folder / "drive"
        objects = [str(self.object(source)) for source in self.sources()]
        subprocess.run(["g++", *objects, "-o", str(driver)], check=True)
        return driver


def run(driver: Path, seeds: int, problems: tuple[str, ...] = ("all",)) -> tuple[bool, str]:
    """Whether every seed of every problem passed, and the first message where not."""
    for problem in problems:
        try:
            done = subprocess.run(
                [driver, problem, str(seeds)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return False, f"no end within {TIMEOUT_S} s"
        if done.returncode != 0:
            failures = [line for line in done.stdout.splitlines() if "seeds passed" not in line]
            return False, (failures or [f"{problem}: exit status {done.returncode}"])[0]
    return True, ""


def problems_of(tree: Tree, file: str) -> tuple[str, ...]:
    """The driver's problems whose kernel is made of this file; all of them where none is named after one."""
    code = (tree.folder / "tests" / "simt" / "problems.h").read_text()
    names = re.findall(r'^      {"(\w+)",', code, re.MULTILINE)
    sources = {source.stem for source in tree.sources() if file in tree.included(source)}
    # lora_linear_backward_dy and _x are problems of lora_linear_backward_sweep.
    kernels = {name: re.sub(r"backward_(dy|x)$", "backward_sweep", name) for name in names}
    kernels = {name: re.sub(r"_(given_h|clustered)$", "", kernel) for name, kernel in kernels.items()}
    found = tuple(n for n, k in kernels.items() if any(source in (k, f"{k}_sm90") for source in sources))
    if found and file in tree.included(tree.folder / "tests" / "simt" / "runs.h"):
        found += ("runs_of_tiles", "runs_of_spans")
    return found or ("all",)


def check(deletion: Deletion, base: Path, seeds: int) -> tuple[Deletion, bool, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        shutil.copytree(base, folder)
        tree = Tree.__new__(Tree)
        tree.folder = folder
        path = folder / "csrc" / "cuda" / deletion.file
        path.write_text(apply(deletion, path.read_text()))
        passed, message = run(tree.link(deletion.file), seeds, problems_of(tree, deletion.file))
        return deletion, not passed, message


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Deletes every barrier, wait, fence and mask, one at a time."
    )
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only deletions whose line contains this text")
    arguments = parser.parse_args(argv)
    deletions = [d for d in (*synchronisation(), *MASKS) if arguments.only in str(d)]
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        base = Tree(Path(name) / "tree")
        passed, message = run(base.link(None), arguments.seeds)
        print(f"the kernels as they are: {'passed' if passed else 'FAILED: ' + message}", flush=True)
        if not passed:
            return 1
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            results = pool.map(lambda d: check(d, base.folder, arguments.seeds), deletions)
            for deletion, caught, message in results:
                reason = JUSTIFIED.get(str(deletion))
                good = caught if reason is None else not caught
                bad += not good
                state = "caught" if caught else f"justified: {reason}" if reason else "NOT CAUGHT"
                if caught and reason:
                    state = "caught, but listed as justified"
                print(f"{deletion}: {state}{': ' + message[:160] if caught else ''}", flush=True)
    print(f"{len(deletions)} deletions, {bad} neither caught nor justified")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

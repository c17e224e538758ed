"""Where a paged optimizer's state lies: parameters cut into pieces, pieces packed into pages, pages taken
in runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import optim_state
from lora_kernels._paging import Pager
from lora_kernels.checks_optim import COLUMNS

__all__ = ["PagedState", "Run"]

PREFETCHED_RUNS = 2  # ahead of the one that is updated
PAGES_OF_A_PASS = 8  # of a GPU's default budget: a run in use, those that come, those that leave
MOST_PAGES_OF_A_RUN = 64  # 128 MiB of state in one launch
MOST_PAGES_OF_A_PAGED_RUN = 16  # the first run of a pass is waited for
STATISTICS = (
    *("resident_bytes", "peak_resident_bytes", "host_bytes", "pages", "pinned", "faults", "evictions"),
    *("bytes_read", "bytes_written", "stalled_s"),
)
PARAMETER, STEP = COLUMNS.index("parameter"), COLUMNS.index("step")


class Arena(NamedTuple):
    """What shares pages: state of one kind, of parameters of one group and dtype, on one device."""

    device: torch.device
    op: str  # the kernel that updates it
    group: int
    dtype: torch.dtype


class Piece(NamedTuple):
    """Elements [first, first + count) of a parameter, in row-major order, and where their state is."""

    page: int
    offset: int  # bytes from the page's start
    first: int
    count: int


class Home(NamedTuple):
    """Where a parameter's state lies."""

    arena: Arena
    pieces: list[Piece]
    shape: torch.Size  # of the parameter, or of this process's part of it, when the state was placed
    elements: int
    number: int  # of the parameter among the optimizer's, for the random stream

    def fits(self, local: Tensor, group: int) -> bool:
        """Whether a parameter of such a kind belongs here."""
        arena = self.arena
        return arena.dtype == local.dtype and arena.group == group and arena.device == local.device


class Run(NamedTuple):
    """Pages that one call of the kernel updates."""

    arena: Arena
    pages: tuple[int, ...]
    parameters: tuple[Tensor, ...]
    segments: Tensor  # int64 [S, 7]; the column of steps is to be filled in

    def of(self, steps: Mapping[Tensor, int]) -> "Run | None":
        """What of it has a step to make, with the numbers of the steps; None where nothing has."""
        run = self
        if not all(p in steps for p in self.parameters):
            kept = [i for i, p in enumerate(self.parameters) if p in steps]
            if not kept:
                return None
            renumbered = torch.full((len(self.parameters),), -1, device="cpu")
            renumbered[kept] = torch.arange(len(kept), device="cpu")
            index = renumbered[self.segments[:, PARAMETER]]
            segments = self.segments[index >= 0].clone()
            segments[:, PARAMETER] = index[index >= 0]
            run = self._replace(parameters=tuple(self.parameters[i] for i in kept), segments=segments)
        numbers = [steps[p] for p in run.parameters]
        column = run.segments.select(1, STEP)
        if numbers.count(numbers[0]) == len(numbers):
            column.fill_(numbers[0])
        else:
            column.copy_(torch.tensor(numbers, device="cpu")[run.segments[:, PARAMETER]])
        return run


class _DeviceBytes:
    """Device memory as torch.as_tensor takes it without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


class PagedState:
    """The state of an optimizer's parameters, by pages.

    Args:
        page_bytes, directory: see lora_kernels.optim.PagedOptimizer.
        resident_bytes: for each device; None: all of it on a CPU, PAGES_OF_A_PASS pages on a GPU.
        paged: False keeps everything resident on every device.
        rounding: of the parameters; "kahan" keeps a compensation beside the state.
    """

    def __init__(
        self,
        page_bytes: int,
        resident_bytes: int | None,
        directory: str | None,
        rounding: str,
        *,
        paged: bool = True,
    ) -> None:
        self.page_bytes, self.resident_bytes, self.directory = page_bytes, resident_bytes, directory
        self.rounding, self.paged = rounding, paged
        self._pagers: dict[torch.device, Pager] = {}
        self._arenas: dict[Arena, list[int]] = {}  # each arena's pages
        self._entries: dict[tuple[torch.device, int], list[tuple[Tensor, Piece]]] = {}
        self._homes: dict[Tensor, Home] = {}
        self._runs: list[Run] | None = None
        self._held: dict[tuple[torch.device, tuple[int, ...]], list[Tensor]] = {}
        self._unsettled = False  # an exception, a signal's for one, came between a pin and the note of it

    def __len__(self) -> int:
        """Parameters."""
        return len(self._homes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._homes)

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._homes

    def home(self, parameter: Tensor) -> Home | None:
        """None where it has no state."""
        return self._homes.get(parameter)

    def place(self, parameter: Tensor, local: Tensor, op: str, group: int, number: int) -> None:
        """Makes room for the state of a parameter, zeros, in as few pages as there are.

        Args:
            local: the parameter, or this process's part of it.
            number: of the parameter among the optimizer's.
        """
        self._release()  # the runs will be others
        self._runs = None
        arena = Arena(local.device, op, group, local.dtype)
        pager = self._pager(local.device)
        arena_number = list(self._arenas).index(arena) if arena in self._arenas else len(self._arenas)
        pages = self._arenas.setdefault(arena, [])
        pieces: list[Piece] = []
        first, left = 0, local.numel()
        try:
            while left > 0:
                count = self._fitting(arena, left, pager.room(arena_number))
                if count == 0:
                    count = self._fitting(arena, left, self.page_bytes - optim_state.HEADER_BYTES)
                pieces.append(Piece(*pager.allocate(arena_number, self._bytes(arena, count)), first, count))
                first, left = first + count, left - count
            for piece in pieces:
                if not pages or pages[-1] != piece.page:
                    pages.append(piece.page)
                self._entries.setdefault((local.device, piece.page), []).append((parameter, piece))
            self._homes[parameter] = Home(arena, pieces, local.shape, local.numel(), number)
        except BaseException:  # no room for all of it, or a signal: no trace of it
            self._homes.pop(parameter, None)
            for piece in pieces:
                here = self._entries.get((local.device, piece.page), [])
                here[:] = [entry for entry in here if entry[0] is not parameter]
                pager.free(piece.page, piece.offset)
            while pages and not self._entries.get((local.device, pages[-1])):
                pages.pop()
            raise

    def runs(self, backwards: bool) -> list[Run]:
        """All pages in the order of a pass. Every other pass goes back the way that the last one came, so
        that it begins with what is resident."""
        if self._runs is None:
            runs = []  # whole or not at all: what an exception left out would never be updated again
            for arena, pages in self._arenas.items():
                length = self._run_length(arena.device)
                for at in range(0, len(pages), length):
                    runs.append(self._run(arena, tuple(pages[at : at + length])))
            self._runs = runs
        return self._runs[::-1] if backwards else self._runs

    @contextmanager
    def pinned(self, run: Run) -> Iterator[list[Tensor]]:
        """The bytes of a run's pages, for a kernel that changes them on the current stream."""
        device = run.arena.device
        if self._pagers[device].resident_limit is not None:
            with self._pinned(device, run.pages, dirty=True) as memory:
                yield memory
            return
        self._settle()
        held = device, run.pages
        if held not in self._held:  # pinned once: they stay where they are until evict()
            self._unsettled = True
            for page in run.pages:
                self._pagers[device].pin(page, _stream(device))
            self._held[held] = [self._bytes_of(device, page) for page in run.pages]
            self._unsettled = False
        yield self._held[held]

    def prefetch(self, following: Sequence[Run]) -> None:
        """Begins to bring in the first of the runs that follow."""
        for run in following[:PREFETCHED_RUNS]:
            pager = self._pagers[run.arena.device]
            if pager.resident_limit is None:
                continue
            room = pager.resident_limit // self.page_bytes - pager.stats()["pinned"]
            for page in run.pages[: max(0, room)]:
                pager.prefetch(page)

    def write_back(self, run: Run, following: Sequence[Run]) -> None:
        """Begins to write what was updated, where it will have to leave before this pass is over."""
        device = run.arena.device
        pager = self._pagers[device]
        if pager.resident_limit is None:
            return
        behind = sum(len(other.pages) for other in following if other.arena.device == device)
        if behind + len(run.pages) > pager.resident_limit // self.page_bytes:
            for page in run.pages:
                pager.write_back(page)

    def read(self, parameter: Tensor) -> dict[str, Tensor]:
        """Copies of the parts of a parameter's state, flat, by the names of optim_state_parts."""
        arena, pieces = self._homes[parameter][:2]
        copies: dict[str, list[Tensor]] = {}
        for piece in pieces:
            with self._piece(arena, piece, dirty=False) as memory:
                for part in self._parts(arena, piece):
                    copy = memory[part.offset : part.offset + part.bytes].clone()
                    copies.setdefault(part.name, []).append(copy.view(part.dtype))
        if not pieces:
            parts = self._parts(arena, None)
            return {part.name: torch.empty(0, dtype=part.dtype, device=arena.device) for part in parts}
        return {name: torch.cat(pieces_of) for name, pieces_of in copies.items()}

    def write(self, parameter: Tensor, values: Mapping[str, Tensor]) -> None:
        """Puts parts, as read() gives them, into the pages. What is not in `values` stays as it is."""
        arena, pieces = self._homes[parameter][:2]
        for piece in pieces:
            with self._piece(arena, piece, dirty=True) as memory:
                for part in self._parts(arena, piece):
                    if part.name not in values:
                        continue
                    first, last = piece.first, piece.first + piece.count
                    if part.name.startswith("absmax"):
                        first, last = first // optim_state.BLOCK, -(-last // optim_state.BLOCK)
                    source = values[part.name][first:last].to(arena.device, part.dtype).contiguous()
                    memory[part.offset : part.offset + part.bytes].copy_(source.view(torch.uint8))

    def clear(self, parameter: Tensor) -> None:
        """Makes a parameter's state zeros."""
        arena, pieces = self._homes[parameter][:2]
        for piece in pieces:
            with self._piece(arena, piece, dirty=True) as memory:
                memory.zero_()

    def op_of(self, parameter: Tensor) -> str:
        """The kernel that updates a parameter."""
        return self._homes[parameter].arena.op

    def names(self, parameter: Tensor) -> list[str]:
        """Those of read()'s parts."""
        return [part.name for part in self._parts(self._homes[parameter].arena, None)]

    def evict(self) -> int:
        """Takes all state out of the devices' memory. Returns the bytes."""
        self._release()
        return sum(pager.evict() for pager in self._pagers.values())

    def stats(self) -> dict[str, float]:
        """The sums of all pagers' statistics."""
        total: dict[str, float] = dict.fromkeys(STATISTICS, 0)
        for pager in self._pagers.values():
            for name, value in pager.stats().items():
                total[name] += value
        return total

    def close(self) -> None:
        """Gives back all memory and the files."""
        self._release()
        for pager in self._pagers.values():
            pager.close()
        self._pagers, self._arenas, self._entries = {}, {}, {}
        self._homes, self._runs = {}, None

    def _release(self) -> None:
        """Unpins the pages of runs that were pinned once."""
        self._settle()
        self._unsettled = True
        for (device, pages), memory in self._held.items():
            memory.clear()
            for page in pages:
                self._pagers[device].unpin(page, True, _stream(device))
        self._held.clear()
        self._unsettled = False

    def _settle(self) -> None:
        """Unpins every page, where it is not known which are pinned."""
        if not self._unsettled:
            return
        self._held.clear()
        for device, pager in self._pagers.items():
            for page, _, pins, _, _ in pager.pages():
                for _ in range(pins):
                    try:
                        pager.unpin(page, True, _stream(device))
                    except RuntimeError:  # the pins that are left are those of views
                        break
        self._unsettled = False

    # ---- pages ---------------------------------------------------------------------------------------------

    def _pager(self, device: torch.device) -> Pager:
        if device not in self._pagers:
            resident = self.resident_bytes if self.paged else None
            if resident is None and self.paged and device.type == "cuda":
                resident = PAGES_OF_A_PASS * self.page_bytes
            self._pagers[device] = Pager(str(device), self.page_bytes, resident, self.directory)
        return self._pagers[device]

    def _run_length(self, device: torch.device) -> int:
        """Pages of a run: one run is updated while others come and leave within the same budget."""
        limit = self._pagers[device].resident_limit
        if limit is None:
            return MOST_PAGES_OF_A_RUN
        return max(1, min(MOST_PAGES_OF_A_PAGED_RUN, limit // self.page_bytes // (2 + PREFETCHED_RUNS)))

    def _run(self, arena: Arena, pages: tuple[int, ...]) -> Run:
        index: dict[Tensor, int] = {}
        rows = [
            (
                i,
                piece.offset,
                index.setdefault(p, len(index)),
                piece.first,
                piece.count,
                0,
                self._homes[p].number,
            )
            for i, page in enumerate(pages)
            for p, piece in self._entries[arena.device, page]
        ]
        segments = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, len(COLUMNS))
        return Run(arena, pages, tuple(index), segments)

    def _bytes(self, arena: Arena, count: int) -> int:
        return optim_state.optim_state_bytes(arena.op, count, arena.dtype, self.rounding)

    def _fitting(self, arena: Arena, left: int, room: int) -> int:
        """How many of `left` elements have state that fits: all, or a multiple of BLOCK."""
        if self._bytes(arena, left) <= room:
            return left
        low, high = 0, left // optim_state.BLOCK  # blocks: low fit, high + 1 do not
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._bytes(arena, middle * optim_state.BLOCK) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * optim_state.BLOCK

    def _bytes_of(self, device: torch.device, page: int) -> Tensor:
        """A pinned page's memory, uint8 [page_bytes]."""
        pager = self._pagers[device]
        if device.type == "cpu":
            return torch.frombuffer(pager.view(page), dtype=torch.uint8)
        return torch.as_tensor(_DeviceBytes(pager.address(page), self.page_bytes), device=device)

    def _parts(self, arena: Arena, piece: Piece | None) -> list[optim_state.Part]:
        count = 0 if piece is None else piece.count
        return optim_state.optim_state_parts(arena.op, count, arena.dtype, self.rounding)

    @contextmanager
    def _piece(self, arena: Arena, piece: Piece, dirty: bool) -> Iterator[Tensor]:
        """The bytes of one piece."""
        with self._pinned(arena.device, (piece.page,), dirty) as memory:
            yield memory[0][piece.offset : piece.offset + self._bytes(arena, piece.count)]

    @contextmanager
    def _pinned(self, device: torch.device, pages: Sequence[int], dirty: bool) -> Iterator[list[Tensor]]:
        """The bytes of pages that are pinned meanwhile."""
        pager, stream = self._pagers[device], _stream(device)
        self._settle()
        self._unsettled = True
        taken: list[int] = []
        memory: list[Tensor] = []
        try:
            for page in pages:
                pager.pin(page, stream)
                taken.append(page)
            self._unsettled = False
            memory = [self._bytes_of(device, page) for page in pages]
            yield memory
        finally:
            unsettled, self._unsettled = self._unsettled, True
            memory.clear()  # a view that is left keeps its page pinned
            for page in taken:
                pager.unpin(page, dirty, stream)
            self._unsettled = unsettled


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

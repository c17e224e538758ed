"""Optimizers whose state lives in pages: packed, resident up to a budget, the rest in a file or in host
memory."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels import ops_optim
from lora_kernels.optim import state_format
from lora_kernels.optim.options import (
    PAGE_BYTES,
    check_hyperparameters,
    check_options,
    check_settings,
    page_bytes_for,
)
from lora_kernels.optim.paged_state import PagedState, Run
from lora_kernels.optim.sharded import local_of, local_part
from lora_kernels.optim.state_entry import StateEntry

__all__ = ["MIN_8BIT_SIZE", "PagedOptimizer"]

MIN_8BIT_SIZE = 4096  # smaller parameters keep 32-bit state, as bitsandbytes has it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PagedOptimizer(torch.optim.Optimizer):
    """What PagedAdamW and PagedLion have in common; not an optimizer by itself.

    A step takes the pages of state run by run: it brings in the next ones while one run is updated, and
    writes back behind it. Which pages were resident changes when bytes move, never what is computed. Every
    page carries the number of the step that it was last updated for, written by the kernel in the same call
    as the update: a step that an exception has cut short is completed by the next call, and no page is
    updated twice for it.

    state[p] is a StateEntry: moments are copied out of the pages where they are asked for, and what was put
    or changed there is taken in by the next step. Without an entry a parameter starts anew, as in torch.

    Args:
        ops: the kernels for 32-bit and for 8-bit state, names in the namespace of lora_kernels' ops.
        states: torch's names of the states.
        state_bits: 32, or 8: block-wise, in blocks of 256, for parameters of at least min_8bit_size elements.
        rounding: of 16-bit parameters: "nearest"; "stochastic", unbiased, by Philox from `seed`; or
            "kahan", with a compensation of the parameter's size and dtype beside its state.
        resident_bytes: how much state may be in each device's memory at once. None: on a GPU what a pass
            needs (8 pages), on a CPU everything. Rounded up to whole pages, 2 at least.
        page_bytes: a power of two, at least 64 KiB. None: 2 MiB, less where the budget has no room for 8 of
            them or the groups have less state. A group's state shares no page with another's.
        directory: of the backing file of a CPU's pages; None: the system's folder for temporary files. The
            file has no name: nothing is left, whatever ends the process.
        seed: of stochastic rounding.
    """

    default_bits = 32  # where state_bits is None
    paged = True  # False keeps everything resident

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        ops: tuple[str, str],
        states: tuple[str, ...],
        state_bits: int | None,
        rounding: str,
        resident_bytes: int | None,
        page_bytes: int | None,
        directory: str | Path | None,
        min_8bit_size: int,
        seed: int,
    ) -> None:
        check_hyperparameters(defaults)
        for name, value in (("resident_bytes", resident_bytes), ("directory", directory)):
            if value is not None and not self.paged:
                raise TypeError(f"{type(self).__name__} keeps its state resident: it does not take {name}")
        state_bits = self.default_bits if state_bits is None else state_bits
        check_settings(state_bits, rounding, resident_bytes, page_bytes, min_8bit_size, seed)
        self._settings = {
            "page_bytes": page_bytes or PAGE_BYTES,
            "resident_bytes": resident_bytes,
            "directory": None if directory is None else str(directory),
            "rounding": rounding,
            "paged": self.paged,
        }
        self._ops, self._states, self._state_bits = ops, states, state_bits
        self._rounding, self._min_8bit_size, self._seed = rounding, min_8bit_size, seed
        self._reset()
        super().__init__(params, defaults)
        if page_bytes is None:
            elements = sum(p.numel() for p in _parameters(self.param_groups)) // len(self.param_groups)
            self._settings["page_bytes"] = page_bytes_for(resident_bytes, 4 * len(states) * elements)
            self._reset()

    def _reset(self) -> None:
        self._paged_state = PagedState(**self._settings)
        self._steps: dict[Tensor, int] = {}  # each parameter's last whole step
        self._counts = _counts([])  # the same numbers, of which state[p]["step"] are views
        self._told: list[int] = []  # what was last written there
        self._recount = False  # whether they are of other parameters than self._steps
        self._own: dict[Tensor, StateEntry] = {}  # that each parameter's state is shown by
        self._sharded = False  # whether a parameter is a DTensor
        self._tick = 0  # of the pages: the last whole step of the optimizer
        self._pending: dict[Tensor, int] | None = None  # of a step that has begun: each parameter's number

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)

    # ---- the step ------------------------------------------------------------------------------------------

    # Not to be traced: Dynamo would take numbers of the pages for constants, and later steps do nothing.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Where an exception has cut the last call short, this one completes its step, with the gradients as
        they are now, and begins no other.

        A parameter that was given another dtype, device or group meanwhile takes its state with it.

        Raises:
            RuntimeError: a sparse gradient; a capture into a CUDA graph (the numbers of steps are arguments
                of the kernels); a parameter of a step that was cut short has moved since.
            TypeError: a parameter that is not float32, bfloat16 or float16.
            ValueError: a hyperparameter out of range, or a parameter of another size than its state.
            OSError: the backing file's disk is full, or the file was damaged.
            MemoryError: no memory for a page.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step() cannot be captured in a CUDA graph: every replay would be the "
                "step that was captured. Capture forward and backward, and call step() behind each replay"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._attempt()
        except (torch.OutOfMemoryError, MemoryError):
            self.evict()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._attempt()
        return loss

    def _attempt(self) -> None:
        if self._pending is None:
            self._pending = self._begin()
        else:
            self._check_pending(self._pending)
        self._pass()
        self._steps.update(self._pending)
        self._show()
        self._tick, self._pending = self._tick + 1, None  # a signal finds both or neither

    def _begin(self) -> dict[Tensor, int]:
        """The parameters that have a step to make, all with room for their state, and the step's number."""
        for group in self.param_groups:
            check_hyperparameters(group)
        self._take_in_all()
        steps: dict[Tensor, int] = {}
        for number, (index, p) in enumerate(_numbered(self.param_groups)):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients, and a parameter of shape "
                    f"{tuple(p.shape)} has one; torch.optim.SparseAdam does"
                )
            if p not in self._paged_state:
                self._place(self._paged_state, p, index, number)
            steps[p] = self._steps.get(p, 0) + 1
        self._recount |= not self._steps.keys() >= steps.keys()
        return steps

    def _check_pending(self, pending: dict[Tensor, int]) -> None:
        """Raises RuntimeError where a step that was cut short cannot be completed."""
        groups = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        for p in pending:
            if p.grad is None:
                raise RuntimeError(
                    "the last step was cut short, and a parameter of it has no gradient any more: compute "
                    "gradients again and call step() to complete it"
                )
            local = local_of(p) if self._sharded else p
            if p not in groups or not self._paged_state.fits(p, local, groups[p]):
                raise RuntimeError(
                    f"the last step was cut short, and a parameter of it, of shape {tuple(p.shape)}, has "
                    "another dtype, device or group since: put it back and call step() to complete it first"
                )
            entry = self.state.get(p)
            intact = entry is self._own.get(p) and bool(entry) and not entry.open
            if p in self._steps and not intact:
                raise RuntimeError(
                    "the last step was cut short, and state[p] of a parameter of it, of shape "
                    f"{tuple(p.shape)}, was changed since: close() forgets all state, or load a state_dict"
                )

    def _take_in_all(self) -> None:
        """Makes what stands in `state` the state, where that is not what the pages have, and brings state to
        where its parameters belong now."""
        placed = 0
        for index, p in _numbered(self.param_groups):
            if p in self._paged_state:
                placed += 1
                if not self._paged_state.fits(p, local_of(p) if self._sharded else p, index):
                    placed = -1
                    break
        # Entries that are another parameter's are read before its pages change.
        given: dict[Tensor, dict[str, Any]] = {}
        for _, p in _numbered(self.param_groups):
            entry = self.state.get(p)
            if entry and entry is not self._own.get(p):
                given[p] = dict(entry)
        counts = self._counts.tolist()
        changed = counts != self._told  # in place
        if changed:
            for p, count in zip(list(self._steps), counts, strict=True):
                self._steps[p] = state_format.step_of({"step": count})
        try:
            for number, (index, p) in enumerate(_numbered(self.param_groups)):
                entry = self.state.get(p)
                if entry and entry is self._own.get(p) and not entry.open:
                    continue
                changed |= bool(entry) or p in self._steps
                if entry:
                    self._take_in(p, given.get(p, entry), index, number)
                elif p in self._steps:  # its state was cleared
                    self._forget(p)
            if placed != len(self._paged_state):
                changed = True
                self._move()
        finally:
            if changed:
                self._show()

    def _take_in(self, p: Tensor, entry: dict[str, Any], group: int, number: int) -> None:
        """Makes state[p] the state of p."""
        own = entry is self._own.get(p)
        if own and self._sharded and self._state_bits == 8 and not entry.changed():
            entry.close()  # its moments are float32: to quantise them again would change them
            return
        given = state_format.flattened(dict(entry))
        known = state_format.KNOWN & given.keys()
        if not known:
            if p in self._steps:
                self._forget(p)
            return
        if p not in self._paged_state:
            self._place(self._paged_state, p, group, number)
        if known != {"step"}:
            eight = self._paged_state.op_of(p) == self._ops[1]
            self._paged_state.write(p, state_format.values_of(p, given, self._states, eight))
        self._recount |= p not in self._steps
        self._steps[p] = state_format.step_of(given)
        if own:
            entry.close()
            return
        self._renew(p)
        self._recount = True

    def _forget(self, p: Tensor) -> None:
        self._paged_state.clear(p)
        self._recount = True
        del self._steps[p]
        self.state.pop(p, None)
        self._detach(p)

    def _detach(self, p: Tensor) -> None:
        if p in self._own:
            self._own.pop(p).detach()

    def _move(self) -> None:
        """Brings the state of parameters to where they belong now.

        The pages of an arena are updated with the hyperparameters of its group and as parameters of its
        dtype. A parameter that is in no group any more loses its state.
        """
        groups = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        moved = PagedState(**self._settings)
        try:
            for number, p in enumerate(_parameters(self.param_groups)):
                if p in self._paged_state and p not in moved:
                    self._place(moved, p, groups[p], number)
                    moved.write(p, self._paged_state.read(p))
        except BaseException:
            moved.close()
            raise
        left, self._paged_state = self._paged_state, moved
        left.close()
        self._recount = True
        for p in [p for p in self._steps if p not in moved]:
            del self._steps[p]
            self.state.pop(p, None)
            self._detach(p)
        for p in self._steps:  # the names may be others
            self._renew(p)

    def _place(self, paged_state: PagedState, parameter: Tensor, group: int, number: int) -> str:
        """Makes room for a parameter's state, zeros. Returns the kernel that will update it."""
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"{type(self).__name__} got a parameter of {parameter.dtype}, expected float32, bfloat16 or "
                "float16"
            )
        self._sharded |= hasattr(parameter, "to_local")
        small = self._state_bits == 32 or parameter.numel() < self._min_8bit_size
        op = self._ops[0 if small else 1]
        paged_state.place(parameter, local_of(parameter), op, group, number)
        return op

    def _pass(self) -> None:
        """Updates the pages that have not been for this step; the kernel knows which."""
        assert self._pending is not None
        runs = [run.of(self._pending) for run in self._paged_state.runs(backwards=self._tick % 2 == 1)]
        waiting = [run for run in runs if run is not None]
        for at, run in enumerate(waiting):
            following = waiting[at + 1 :]
            with self._paged_state.pinned(run) as pages:
                self._paged_state.prefetch(following)
                self._update(run, pages)
            self._paged_state.write_back(run, following)

    def _update(self, run: Run, pages: list[Tensor]) -> None:
        given, gradients = list(run.parameters), [p.grad for p in run.parameters]
        if self._sharded:
            gradients = [local_part(g, p) for g, p in zip(gradients, given, strict=True)]
            given = [local_of(p) for p in given]
        # Copies only of what is not contiguous.
        gradients = [g if g.is_contiguous() else g.contiguous() for g in gradients]
        updated = [p if p.is_contiguous() else p.contiguous() for p in given]
        try:
            getattr(ops_optim, run.arena.op)(
                *(updated, gradients, pages, run.segments, self._tick + 1),
                *self._hyperparameters(self.param_groups[run.arena.group]),
                *(self._rounding, self._seed),
            )
        finally:  # after a signal too: the pages say already that these are updated
            for p, q in zip(given, updated, strict=True):
                if p is not q:
                    p.copy_(q)
        if self._sharded:
            torch.autograd.graph.increment_version(run.parameters)

    def _renew(self, p: Tensor) -> StateEntry:
        """A new entry for p, with what stands in the old one under other names."""
        names = state_format.names_of(p, self._paged_state.names(p), self._states, self._state_bits)
        made, old = StateEntry.of(names, functools.partial(self._entry, p)), self.state.get(p, {})
        for name in old:
            if name not in state_format.NAMES and name not in made:
                made[name] = old[name]
        self._detach(p)
        self.state[p] = self._own[p] = made
        return made

    def _show(self) -> None:
        """Makes state[p] of every parameter that has had a step tell its number."""
        self._told = list(self._steps.values())
        if not self._recount:
            self._counts.copy_(torch.tensor(self._told, device="cpu"))
            return
        self._counts = _counts(self._told)
        for i, p in enumerate(self._steps):
            entry = self.state.get(p)
            if entry is None or entry is not self._own.get(p):
                entry = self._renew(p)
            entry.show_step(self._counts[i])
        self._recount = False

    def _entry(self, p: Tensor) -> dict[str, Any]:
        """What a file says of a parameter."""
        if self._pending is not None:
            raise RuntimeError(
                "the last step was cut short: call step() to complete it before its state is read"
            )
        parts = self._paged_state.read(p)
        return state_format.entry_of(p, parts, self._states, self._state_bits, self._steps[p])

    def _hyperparameters(self, group: dict[str, Any]) -> tuple[float, ...]:
        """What the kernel takes, in its order: lr, beta1, beta2, eps where it has one, weight_decay."""
        raise NotImplementedError

    # ---- memory --------------------------------------------------------------------------------------------

    def evict(self) -> int:
        """Takes all state out of the devices' memory, into the file or host memory. Returns the bytes.

        The next step brings in what it needs. A CPU's state without a budget gets its file by this.
        """
        return self._paged_state.evict()

    def stats(self) -> dict[str, float]:
        """Of all devices together: pages, resident_bytes, peak_resident_bytes, host_bytes, faults, evictions,
        bytes_read, bytes_written, stalled_s (seconds that steps have waited for pages)."""
        return self._paged_state.stats()

    def close(self) -> None:
        """Gives back all memory and the file. The optimizer then has no state, as when it was new."""
        self._paged_state.close()
        self.state.clear()
        self._reset()

    # ---- saving and loading --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW has it, or with state_bits=8 as bitsandbytes' 8-bit optimizers do, so that
        either can load it. The tensors are copies, on the parameters' devices, which need room for all of
        it; DTensors where the parameters are, and then 8-bit state is given as float32.

        Raises:
            RuntimeError: a step was cut short. Call step() first: a state in the middle of a step is
                nobody's.
        """
        if self._pending is not None:
            raise RuntimeError("the last step was cut short: call step() to complete it before saving")
        with torch.no_grad():
            self._take_in_all()

        def fill(_: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
            packed["state"] = {}
            for name, p in zip(_names(packed), _parameters(self.param_groups), strict=True):
                if p in self._steps:
                    packed["state"][name] = self._entry(p)

        hook = self.register_state_dict_post_hook(fill, prepend=True)  # before those that are to see it
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this optimizer, of torch's AdamW, or of bitsandbytes' with 32 or 8 bits.

        It is converted to this optimizer's kind of state; 8-bit state stays as it is, byte for byte. Paging
        goes on as it was set up here. Where an exception is raised, the optimizer is as it was before.

        Raises:
            ValueError: groups or shapes that are not this optimizer's, or state that it does not know.
            OSError, MemoryError: no room for the pages.
        """
        loaded: list[tuple[PagedState, dict[Tensor, int]]] = []

        def convert(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            flat = {k: state_format.flattened(v) for k, v in given["state"].items()}
            entries = {k: entry for k, entry in flat.items() if state_format.KNOWN & entry.keys()}
            for group in given["param_groups"]:
                check_options(group)
            names, parameters = _names(given), _parameters(self.param_groups)
            if len(names) == len(parameters):  # else the base class says what is wrong
                pairs = zip(names, parameters, strict=True)
                loaded.append(self._loaded({p: entries[n] for n, p in pairs if n in entries}))
            light = {n: {"step": state_format.step_of(e)} for n, e in entries.items()}
            return {**given, "state": light}

        def take(_: torch.optim.Optimizer) -> None:
            for group in self.param_groups:
                for key, value in self.defaults.items():
                    group.setdefault(key, value)
            self._paged_state.close()
            self._paged_state, self._steps = loaded.pop()
            self._pending, self._recount = None, True
            self.state.clear()
            for p in list(self._own):
                self._detach(p)
            self._show()

        # Behind the hooks that may change the file, and before those that are to see what was loaded.
        before = self.register_load_state_dict_pre_hook(convert)
        after = self.register_load_state_dict_post_hook(take, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
            for paged_state, _ in loaded:
                paged_state.close()

    def _loaded(self, entries: dict[Tensor, dict[str, Any]]) -> tuple[PagedState, dict[Tensor, int]]:
        """Pages with the state of a file, and the parameters' step numbers."""
        loaded = PagedState(**self._settings)
        try:
            number = -1
            for index, group in enumerate(self.param_groups):
                for p in group["params"]:
                    number += 1
                    if p in entries:
                        op = self._place(loaded, p, index, number)
                        eight = op == self._ops[1]
                        loaded.write(p, state_format.values_of(p, entries[p], self._states, eight))
        except BaseException:
            loaded.close()
            raise
        return loaded, {p: state_format.step_of(entry) for p, entry in entries.items()}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the settings and all state, out of its pages."""
        if self._pending is not None:
            raise RuntimeError("the last step was cut short: call step() to complete it before copying")
        with torch.no_grad():
            self._take_in_all()
        entries = {
            i: self._entry(p) for i, p in enumerate(_parameters(self.param_groups)) if p in self._steps
        }
        own = {name: value for name, value in vars(self).items() if name in _SETTINGS}
        return {**super().__getstate__(), "state": {}, "_own": own, "_entries": entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own, entries = state.pop("_own", None), state.pop("_entries", None)
        super().__setstate__(state)
        if own is None:  # called by load_state_dict
            return
        vars(self).update(own)
        tick = self._tick
        self._reset()
        self._tick = tick
        parameters = _parameters(self.param_groups)
        self._paged_state, self._steps = self._loaded(
            {parameters[number]: state_format.flattened(entry) for number, entry in entries.items()}
        )
        self.state, self._recount = collections.defaultdict(dict), True
        self._show()


_SETTINGS = (
    *("_settings", "_ops", "_states", "_state_bits", "_rounding", "_min_8bit_size", "_seed", "_tick"),
)


def _counts(steps: list[int]) -> Tensor:
    with torch.inference_mode(False):  # they are changed in place for as long as the optimizer lives
        return torch.tensor(steps, dtype=torch.float32, device="cpu")


def _numbered(groups: list[dict[str, Any]]) -> Iterator[tuple[int, Tensor]]:
    """Every parameter with the number of its group."""
    for index, group in enumerate(groups):
        for p in group["params"]:
            yield index, p


def _names(state_dict: dict[str, Any]) -> list[Any]:
    return [name for group in state_dict["param_groups"] for name in group["params"]]


def _parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]

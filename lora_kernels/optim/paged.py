"""Optimizers whose state lives in pages: packed, resident up to a budget, the rest in a file or in host
memory."""

import collections
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from lora_kernels.optim.paged_state import Run
from lora_kernels.optim.parameter_states import Kinds, ParameterStates
from lora_kernels.optim.sharded import local_of, local_part
from lora_kernels.optim.state_entry import StateEntry

__all__ = ["MIN_8BIT_SIZE", "PagedOptimizer"]

MIN_8BIT_SIZE = 4096  # smaller parameters keep 32-bit state, as bitsandbytes has it


class PagedOptimizer(torch.optim.Optimizer):
    """What PagedAdamW and PagedLion have in common; not an optimizer by itself.

    A step takes the pages of state run by run: it brings in the next ones while one run is updated, and
    writes back behind it. Which pages were resident changes when bytes move, never what is computed. Every
    page carries the number of the step that it was last updated for, written by the kernel in the same call
    as the update: a step that an exception has cut short is completed by the next call, and no page is
    updated twice for it.

    state[p] is a StateEntry: moments are copied out of the pages where they are asked for, and what was put
    or changed there until the next step is taken in by it. Without an entry a parameter starts anew, as in
    torch; that of a parameter that leaves the groups stays in `state`, out of the pages.

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
        self._kinds = Kinds(ops, states, state_bits, min_8bit_size)
        self._rounding, self._seed = rounding, seed
        self._reset()
        super().__init__(params, defaults)
        if page_bytes is None:
            known = [p for p in _parameters(self.param_groups) if not torch.nn.parameter.is_lazy(p)]
            elements = sum(p.numel() for p in known) // len(self.param_groups)
            self._settings["page_bytes"] = page_bytes_for(resident_bytes, 4 * len(states) * elements)
            self._reset()

    def _reset(self) -> None:
        self._all = ParameterStates(self._settings, self._kinds)
        self._own: dict[Tensor, StateEntry] = {}  # that each parameter's state is shown by
        self._tick = 0  # of the pages: the last whole step of the optimizer

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
            TypeError: a parameter that is not float32, bfloat16 or float16, or a gradient that is neither of
                its dtype nor float32.
            ValueError: a hyperparameter out of range, a parameter of another size than its state, or a
                state[p] that cannot be its state.
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
        every = self._all
        if every.pending is None:
            every.pending = self._begin()
        else:
            self._check_pending(every.pending)
        self._pass(every.pending)
        every.steps.update(every.pending)
        if len(self._own) != len(every.steps):
            for p in every.pending:
                if p not in self._own:
                    self._renew(p)
        self._tick, every.pending = self._tick + 1, None  # a signal finds both or neither

    def _begin(self) -> dict[Tensor, int]:
        """The parameters that have a step to make, all with room for their state, and the step's number."""
        for group in self.param_groups:
            check_hyperparameters(group)
        self._take_in_all()
        steps: dict[Tensor, int] = {}
        for number, (index, p) in enumerate(_numbered(self.param_groups)):
            if p.grad is None:
                continue
            self._check_gradient(p, p.grad)
            if p not in self._all.pages:
                self._all.place(p, index, number)
            steps[p] = self._all.steps.get(p, 0) + 1
        return steps

    def _check_gradient(self, p: Tensor, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} does not take sparse gradients, and a parameter of shape "
                f"{tuple(p.shape)} has one; torch.optim.SparseAdam does"
            )
        if grad.dtype not in (p.dtype, torch.float32):
            raise TypeError(
                f"a parameter of {p.dtype} and of shape {tuple(p.shape)} has a gradient of {grad.dtype}, "
                "expected its dtype or float32"
            )

    def _check_pending(self, pending: dict[Tensor, int]) -> None:
        """Raises RuntimeError where a step that was cut short cannot be completed."""
        groups = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        written = self._all.steps.changed()
        for p in pending:
            if p.grad is None:
                raise RuntimeError(
                    "the last step was cut short, and a parameter of it has no gradient any more: compute "
                    "gradients again and call step() to complete it"
                )
            self._check_gradient(p, p.grad)
            home, local = self._all.pages.home(p), self._all.local(p)
            if p not in groups or not home.fits(local, groups[p]) or local.numel() != home.elements:
                raise RuntimeError(
                    "the last step was cut short, and a parameter of it, of shape "
                    f"{tuple(p.shape)}, has another size, dtype, device or group since: put it back and call "
                    "step() to complete it first"
                )
            entry = self.state.get(p)
            if p in self._own:
                intact = self._is_closed(p, entry)
            else:
                intact = not entry or not state_format.KNOWN & entry.keys()
            if not intact or written.get(p, pending[p]) != pending[p]:  # its own number was told already
                raise RuntimeError(
                    "the last step was cut short, and state[p] of a parameter of it, of shape "
                    f"{tuple(p.shape)}, was changed since: close() forgets all state, or load a state_dict"
                )

    # ---- what stands in `state` ----------------------------------------------------------------------------

    def _is_closed(self, p: Tensor, entry: Any) -> bool:
        """Whether state[p] says nothing else than the pages."""
        return bool(entry) and entry is self._own.get(p) and not entry.open

    def _take_in_all(self) -> None:
        """Makes what stands in `state` the state, where that is not what the pages have, and brings state to
        where its parameters belong now.

        Where an exception is raised, what was not yet taken in stands as it was.
        """
        every = self._all
        every.steps.take_in()
        # A parameter is looked up as rarely as can be: there may be thousands, and their hash is slow.
        seen: set[Tensor] = set()
        placed, apart, resized = 0, False, set()
        # The parameters of which `state` may say something else.
        differing: list[tuple[int, int, Tensor]] = []
        # Entries that are another parameter's are read before its pages change.
        given: dict[Tensor, Mapping[str, Any]] = {}
        for number, (index, p) in enumerate(_numbered(self.param_groups)):
            if p in seen:
                continue
            seen.add(p)
            entry, home = self.state.get(p), every.pages.home(p)
            if entry and entry is not self._own.get(p):
                given[p] = _values(entry)
            if home is not None:
                local = every.local(p)
                placed += 1
                apart |= not home.fits(local, index)
                if local.numel() != home.elements and self._starts_anew(p, entry, home.elements):
                    resized.add(p)
                    if entry:
                        given[p] = _values(entry)
            if not entry or p in given or entry.open:
                differing.append((number, index, p))
        if resized:
            self._move(resized)
            placed -= len(resized)
        if given:  # reading them may have opened any entry
            differing = [(n, index, p) for n, (index, p) in enumerate(_numbered(self.param_groups))]
        for number, index, p in differing:
            entry = self.state.get(p)
            if self._is_closed(p, entry):
                continue
            if entry:
                is_new = every.pages.home(p) is None
                self._take_in(p, entry, given.get(p, entry), index, number)
                placed += is_new and every.pages.home(p) is not None
            elif p in every.steps:  # its state was cleared
                self._forget(p)
        if apart or placed != len(every.pages):
            self._move()
        if every.steps.compact():
            for p, entry in self._own.items():
                entry.show_step(every.steps.tensor(p))

    def _starts_anew(self, p: Tensor, entry: Any, elements: int) -> bool:
        """Of a parameter of another size than its state: whether that was replaced or taken away."""
        if entry and entry is self._own.get(p) and not entry.changed():
            entry.close()  # it was only read
        if not self._is_closed(p, entry):
            return True
        if p.grad is not None:
            raise ValueError(
                f"a parameter has shape {tuple(p.shape)}, expected {elements} elements, which its state has: "
                "to go on without that state, delete state[p]"
            )
        return False

    def _take_in(self, p: Tensor, entry: Any, values: Mapping[str, Any], group: int, number: int) -> None:
        """Makes state[p], an entry with these values, the state of p."""
        own = entry is self._own.get(p)
        if own and self._all.sharded and self._kinds.bits == 8 and not entry.changed():
            entry.close()  # its moments are float32: to quantise them again would change them
            return
        flat = state_format.flattened(dict(values))
        if not state_format.KNOWN & flat.keys():
            if p in self._all.steps:
                self._forget(p)
            return
        self._all.write(p, flat, group, number)
        if own:
            entry.rename(self._all.names(p))
        else:
            self._renew(p)

    def _forget(self, p: Tensor) -> None:
        self._all.forget(p)
        self.state.pop(p, None)
        self._detach(p)

    def _detach(self, p: Tensor) -> None:
        if p in self._own:
            self._own.pop(p).detach()

    def _move(self, without: Collection[Tensor] = ()) -> None:
        """Brings the state of parameters to where they belong now; of those `without`, it goes.

        That of a parameter that is in no group any more stays in `state`, out of the pages.
        """
        grouped = set(_parameters(self.param_groups))
        for p, entry in self._own.items():
            if p not in grouped:
                entry.make_open()
        self._all.move(self.param_groups, without)
        for p in [p for p in self._own if p not in self._all.steps]:
            self._detach(p)
        for p, entry in self._own.items():
            names = self._all.names(p)
            if names != entry.names and not entry.open:  # else when it is taken in
                entry.rename(names)

    def _renew(self, p: Tensor) -> None:
        """A new entry for p, with what stands in the old one under other names."""
        made = StateEntry.of(self._all.names(p), functools.partial(self._all.read, p))
        left = self.state.get(p, {})
        for name in left:  # without opening it
            if name not in state_format.NAMES:
                made[name] = left[name]
        made.show_step(self._all.steps.tensor(p))
        self._detach(p)
        self.state[p] = self._own[p] = made

    # ---- an update of pages --------------------------------------------------------------------------------

    def _pass(self, steps: dict[Tensor, int]) -> None:
        """Updates the pages that have not been for this step; the kernel knows which."""
        runs = [run.of(steps) for run in self._all.pages.runs(backwards=self._tick % 2 == 1)]
        waiting = [run for run in runs if run is not None]
        for at, run in enumerate(waiting):
            following = waiting[at + 1 :]
            with self._all.pages.pinned(run) as pages:
                self._all.pages.prefetch(following)
                self._update(run, pages)
            self._all.pages.write_back(run, following)

    def _update(self, run: Run, pages: list[Tensor]) -> None:
        given, gradients = list(run.parameters), [p.grad for p in run.parameters]
        if self._all.sharded:
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
        if self._all.sharded:
            torch.autograd.graph.increment_version(run.parameters)

    def _hyperparameters(self, group: dict[str, Any]) -> tuple[float, ...]:
        """What the kernel takes, in its order: lr, beta1, beta2, eps where it has one, weight_decay."""
        raise NotImplementedError

    # ---- memory --------------------------------------------------------------------------------------------

    def evict(self) -> int:
        """Takes all state out of the devices' memory, into the file or host memory. Returns the bytes.

        The next step brings in what it needs. A CPU's state without a budget gets its file by this.
        """
        return self._all.pages.evict()

    def stats(self) -> dict[str, float]:
        """Of all devices together: pages, resident_bytes, peak_resident_bytes, host_bytes, faults, evictions,
        bytes_read, bytes_written, stalled_s (seconds that steps have waited for pages)."""
        return self._all.pages.stats()

    def close(self) -> None:
        """Gives back all memory and the file. The optimizer then has no state, as when it was new."""
        self._all.close()
        self.state.clear()
        for p in list(self._own):
            self._detach(p)
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

        left: dict[Tensor, Any] = {}

        def take_in(_: torch.optim.Optimizer) -> None:
            self._take_in_whole("saving")
            grouped = set(_parameters(self.param_groups))
            for p in [k for k in self.state if isinstance(k, Tensor) and k not in grouped]:
                left[p] = self.state.pop(p)  # the base class has no name for it

        def fill(_: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
            names, parameters = _names(packed), _parameters(self.param_groups)
            known = set(names)
            others = {k: v for k, v in packed["state"].items() if k not in known}
            packed["state"] = {}
            for name, p in zip(names, parameters, strict=True):
                entry = self.state.get(p)
                if p in self._all.steps:
                    packed["state"][name] = {**self._all.read(p), **entry.others()}
                elif entry:
                    packed["state"][name] = dict(entry)
            packed["state"].update(others)

        # Behind the hooks that may change the state, and before those that are to see the file.
        before = self.register_state_dict_pre_hook(take_in)
        after = self.register_state_dict_post_hook(fill, prepend=True)
        try:
            return super().state_dict()
        finally:
            self.state.update(left)
            before.remove()
            after.remove()

    def _take_in_whole(self, before: str) -> None:
        self._all.check_whole(before)
        with torch.no_grad():
            self._take_in_all()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this optimizer, of torch's AdamW, or of bitsandbytes' with 32 or 8 bits.

        It is converted to this optimizer's kind of state; 8-bit state stays as it is, byte for byte. Paging
        goes on as it was set up here. Where an exception is raised, the optimizer is as it was before.

        Raises:
            ValueError: groups or shapes that are not this optimizer's, or state that it does not know.
            OSError, MemoryError: no room for the pages.
        """
        loaded: list[ParameterStates] = []

        def convert(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            entries, light = {}, {}
            for k, v in given["state"].items():
                light[k] = v
                if isinstance(v, Mapping):
                    flat = state_format.flattened(v)
                    light[k] = {n: value for n, value in flat.items() if n not in state_format.NAMES}
                    if state_format.KNOWN & flat.keys():
                        entries[k] = flat
            for group in given["param_groups"]:
                check_options(group)
            names, parameters = _names(given), _parameters(self.param_groups)
            if len(names) == len(parameters):  # else the base class says what is wrong
                pairs = zip(names, parameters, strict=True)
                loaded.append(self._loaded({p: entries[n] for n, p in pairs if n in entries}))
            return {**given, "state": light}

        def take(_: torch.optim.Optimizer) -> None:
            for group in self.param_groups:
                for key, value in self.defaults.items():
                    group.setdefault(key, value)
            self._all.close()
            self._all = loaded.pop()
            for p in list(self._own):
                self._detach(p)
            self._show_all()

        # Behind the hooks that may change the file, and before those that are to see what was loaded.
        before = self.register_load_state_dict_pre_hook(convert)
        after = self.register_load_state_dict_post_hook(take, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
            for left in loaded:
                left.close()

    def _loaded(self, entries: Mapping[Tensor, Mapping[str, Any]]) -> ParameterStates:
        """The state that a file's entries say."""
        loaded = ParameterStates(self._settings, self._kinds)
        try:
            for number, (index, p) in enumerate(_numbered(self.param_groups)):
                if p in entries:
                    loaded.write(p, entries[p], index, number)
        except BaseException:
            loaded.close()
            raise
        return loaded

    def _show_all(self) -> None:
        """Entries for all that has had a step, and none for parameters of which nothing is known."""
        for p in self._all.steps:
            self._renew(p)
        for p in [k for k, entry in self.state.items() if isinstance(k, Tensor) and not entry]:
            del self.state[p]

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the settings and all state, out of its pages."""
        self._take_in_whole("copying")
        entries = {
            i: self._all.read(p) for i, p in enumerate(_parameters(self.param_groups)) if p in self._all.steps
        }
        others = {k: self._own[k].others() if k in self._own else entry for k, entry in self.state.items()}
        own = {name: value for name, value in vars(self).items() if name in _SETTINGS}
        return {**super().__getstate__(), "state": others, "_own": own, "_entries": entries}

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
        self._all = self._loaded(
            {parameters[number]: state_format.flattened(entry) for number, entry in entries.items()}
        )
        self.state = collections.defaultdict(dict, self.state)
        self._show_all()


_SETTINGS = ("_settings", "_kinds", "_rounding", "_seed", "_tick")


def _values(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says now, whatever becomes of the number that its step is a view of."""
    values = dict(entry)
    if isinstance(values.get("step"), Tensor):
        values["step"] = values["step"].clone()
    return values


def _numbered(groups: list[dict[str, Any]]) -> Iterator[tuple[int, Tensor]]:
    """Every parameter with the number of its group."""
    for index, group in enumerate(groups):
        for p in group["params"]:
            yield index, p


def _names(state_dict: dict[str, Any]) -> list[Any]:
    return [name for group in state_dict["param_groups"] for name in group["params"]]


def _parameters(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]

"""The state of an optimizer's parameters: what lies in pages, and how many steps each has had."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.optim import state_format
from lora_kernels.optim.paged_state import PagedState
from lora_kernels.optim.sharded import local_of
from lora_kernels.optim.step_counts import StepCounts

__all__ = ["DTYPES", "Kinds", "ParameterStates"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kinds:
    """Which kind of state a parameter has.

    Args:
        ops: the kernels for 32-bit and for 8-bit state.
        states: torch's names of the states.
        bits: 32 or 8; smaller parameters than min_8bit_size have 32-bit state nevertheless.
    """

    def __init__(self, ops: tuple[str, str], states: tuple[str, ...], bits: int, min_8bit_size: int) -> None:
        self.ops, self.states, self.bits, self.min_8bit_size = ops, states, bits, min_8bit_size

    def has_8_bits(self, p: Tensor) -> bool:
        return self.bits == 8 and p.numel() >= self.min_8bit_size

    def op_of(self, p: Tensor) -> str:
        """The kernel that updates a parameter."""
        return self.ops[1 if self.has_8_bits(p) else 0]


class ParameterStates:
    """Pages and step numbers of parameters, read and written as entries of files are.

    An entry of `state` reads from here, not from the optimizer: it holds no optimizer back, and can be read
    when that has gone.
    """

    def __init__(self, settings: Mapping[str, Any], kinds: Kinds) -> None:
        self._settings, self.kinds = settings, kinds
        self.pages = PagedState(**settings)
        self.steps = StepCounts()  # each parameter's last whole step
        self.sharded = False  # whether a parameter is a DTensor
        self.pending: dict[Tensor, int] | None = None  # of a step that has begun: each parameter's number

    def local(self, p: Tensor) -> Tensor:
        """This process's part of a parameter."""
        return local_of(p) if self.sharded else p

    def is_resized(self, p: Tensor) -> bool:
        """Whether a parameter has another number of elements than its state."""
        home = self.pages.home(p)
        return home is not None and self.local(p).numel() != home.elements

    def place(self, p: Tensor, group: int, number: int) -> None:
        """Makes room for a parameter's state, zeros. number: of the parameter among the optimizer's.

        Raises:
            TypeError: a parameter that is not of DTYPES.
        """
        self._place(self.pages, p, group, number)

    def _place(self, pages: PagedState, p: Tensor, group: int, number: int) -> None:
        if p.dtype not in DTYPES:
            raise TypeError(f"a parameter is of {p.dtype}, expected float32, bfloat16 or float16")
        self.sharded |= hasattr(p, "to_local")
        pages.place(p, local_of(p), self.kinds.op_of(p), group, number)

    def names(self, p: Tensor) -> tuple[str, ...]:
        """Of the values of `read`."""
        parts = self.pages.names(p)
        return tuple(state_format.names_of(p, parts, self.kinds.states, self.kinds.bits))

    def read(self, p: Tensor) -> dict[str, Any]:
        """What a file says of a parameter."""
        self.check_whole("its state is read")
        shape = self.pages.home(p).shape if self.is_resized(p) else self.local(p).shape
        kinds = self.kinds
        return state_format.entry_of(p, self.pages.read(p), shape, kinds.states, kinds.bits, self.steps[p])

    def check_whole(self, before: str) -> None:
        if self.pending is not None:
            raise RuntimeError(f"the last step was cut short: call step() to complete it before {before}")

    def write(self, p: Tensor, entry: Mapping[str, Any], group: int, number: int) -> None:
        """Makes what an entry says the state of a parameter; its step alone leaves the rest as it is."""
        step, values = state_format.step_of(entry), None
        if state_format.KNOWN & entry.keys() != {"step"}:
            eight = self.kinds.has_8_bits(p)
            values = state_format.values_of(p, entry, self.kinds.states, eight)
        if p not in self.pages:
            self.place(p, group, number)
        if values is not None:
            self.pages.clear(p)  # of a compensation that is not given
            self.pages.write(p, values)
        self.steps.update({p: step})

    def forget(self, p: Tensor) -> None:
        """Makes a parameter one that has had no step."""
        if p in self.pages:
            self.pages.clear(p)
        self.steps.remove([p])

    def move(self, groups: Sequence[Mapping[str, Any]], without: Collection[Tensor] = ()) -> None:
        """Brings state to where its parameters belong now; that of those `without`, and of those that are in
        no group, goes.

        The pages of an arena are updated with the hyperparameters of its group and as parameters of its
        dtype.

        Raises:
            ValueError: a parameter has another size than its state.
        """
        left = set(without)
        moved = PagedState(**self._settings)
        try:
            number = -1
            for index, group in enumerate(groups):
                for p in group["params"]:
                    number += 1
                    if p not in self.pages or p in moved or p in left:
                        continue
                    if self.is_resized(p):
                        raise ValueError(
                            f"a parameter of shape {tuple(p.shape)} has another number of elements than its "
                            f"state, {self.pages.home(p).elements}, which has to move: put it back, or "
                            "delete state[p]"
                        )
                    self._place(moved, p, index, number)
                    moved.write(p, self.pages.read(p))
        except BaseException:
            moved.close()
            raise
        # In this order: a signal in between leaves state that nothing counts, and not the other way round.
        self.steps.remove([p for p in self.steps if p not in moved])
        old, self.pages = self.pages, moved
        old.close()

    def close(self) -> None:
        """Gives back all memory and the file."""
        self.pages.close()

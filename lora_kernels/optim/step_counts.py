"""How many steps each parameter has had."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.optim.state_format import step_of

__all__ = ["StepCounts"]

_BLOCK = 1024
_MOST_UNUSED = 1024  # slots, before what is in use moves together


class _Table(NamedTuple):
    """Replaced as a whole, so that a signal finds the old one or the new one."""

    numbers: dict[Tensor, int]
    slots: dict[Tensor, int]
    told: list[float]  # of every slot, what was last written there


class StepCounts:
    """Each parameter's number of whole steps, and the tensor that state[p]["step"] is.

    The tensors are 0-d float32 views of blocks, so that telling all of them a step is a copy or two; a
    parameter's stays the same for as long as it is counted, and once it is not, nothing changes it any more.
    """

    def __init__(self, numbers: Mapping[Tensor, int] | None = None) -> None:
        self._table = _Table({}, {}, [])
        self._blocks: list[Tensor] = []
        self.update(numbers or {})

    def __len__(self) -> int:
        return len(self._table.numbers)

    def __contains__(self, p: Tensor) -> bool:
        return p in self._table.numbers

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._table.numbers)

    def __getitem__(self, p: Tensor) -> int:
        return self._table.numbers[p]

    def get(self, p: Tensor, default: int) -> int:
        return self._table.numbers.get(p, default)

    def tensor(self, p: Tensor) -> Tensor:
        """float32 [], the number of p; what is written there counts when it is taken in."""
        block, at = divmod(self._table.slots[p], _BLOCK)
        return self._blocks[block][at]

    def update(self, numbers: Mapping[Tensor, int]) -> None:
        """First the tensors, then the numbers: what a signal leaves half done, `changed` says."""
        slots, told = self._table.slots, self._current()
        for p, number in numbers.items():
            slot = slots.get(p)
            if slot is None:
                slots = dict(slots) if slots is self._table.slots else slots
                slots[p] = len(told)
                told.append(number)
            else:
                told[slot] = number
        with torch.inference_mode(False), torch.no_grad():  # they are changed in place by later steps
            while len(self._blocks) * _BLOCK < len(told):
                self._blocks.append(torch.zeros(_BLOCK, dtype=torch.float32, device="cpu"))
            for i, block in enumerate(self._blocks):
                some = told[i * _BLOCK : (i + 1) * _BLOCK]
                block[: len(some)] = torch.tensor(some, dtype=block.dtype, device="cpu")
        merged = dict(self._table.numbers)
        merged.update(numbers)
        self._table = _Table(merged, slots, told)

    def _current(self) -> list[float]:
        """What was told, and of slots that are no longer used what stands there."""
        told = list(self._table.told)
        if len(told) == len(self):
            return told
        now, used = self._now(), set(self._table.slots.values())
        return [told[slot] if slot in used else now[slot] for slot in range(len(told))]

    def _now(self) -> list[float]:
        return [number for block in self._blocks for number in block.tolist()]

    def remove(self, parameters: Iterable[Tensor]) -> None:
        numbers, slots = dict(self._table.numbers), dict(self._table.slots)
        for p in parameters:
            del numbers[p], slots[p]
        self._table = _Table(numbers, slots, self._table.told)

    def changed(self) -> dict[Tensor, float]:
        """What was written to tensors since."""
        now, told = self._now(), self._table.told
        if now[: len(told)] == told:
            return {}
        return {p: now[slot] for p, slot in self._table.slots.items() if now[slot] != told[slot]}

    def take_in(self) -> None:
        """Makes what was written to tensors the numbers.

        Raises:
            ValueError: a number of which the next one cannot be counted; nothing is taken in.
        """
        changed = {p: step_of({"step": number}) for p, number in self.changed().items()}
        if changed:
            self.update(changed)

    def compact(self) -> bool:
        """Moves tensors together where most slots are of parameters no longer counted. Whether it did."""
        if len(self._table.told) - len(self) <= max(_MOST_UNUSED, len(self)):
            return False
        self.__init__(self._table.numbers)
        return True

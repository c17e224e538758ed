"""How many steps each parameter has had."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lora_kernels.optim.state_format import step_of

__all__ = ["StepCounts"]

_BLOCK = 1024
_MOST_UNUSED = 1024  # slots, before what is in use moves together


class StepCounts:
    """Each parameter's number of whole steps, and the tensor that state[p]["step"] is.

    The tensors are 0-d float32 views of blocks, so that telling all of them a step is a copy or two; a
    parameter's stays the same for as long as it is counted, and once it is not, nothing changes it any more.
    """

    def __init__(self, numbers: Mapping[Tensor, int] | None = None) -> None:
        self._numbers: dict[Tensor, int] = {}
        self._slots: dict[Tensor, int] = {}
        self._blocks: list[Tensor] = []
        self._told: list[float] = []  # of every slot, what was last written there
        self.update(numbers or {})

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, p: Tensor) -> bool:
        return p in self._numbers

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._numbers)

    def __getitem__(self, p: Tensor) -> int:
        return self._numbers[p]

    def get(self, p: Tensor, default: int) -> int:
        return self._numbers.get(p, default)

    def tensor(self, p: Tensor) -> Tensor:
        """float32 [], the number of p; what is written there counts when it is taken in."""
        block, at = divmod(self._slots[p], _BLOCK)
        return self._blocks[block][at]

    def update(self, numbers: Mapping[Tensor, int]) -> None:
        slots, told = self._slots, self._told
        for p, number in numbers.items():
            slot = slots.get(p)
            if slot is None:
                slots[p] = len(told)
                told.append(number)
            else:
                told[slot] = number
        self._numbers.update(numbers)
        with torch.inference_mode(False), torch.no_grad():  # they are changed in place by later steps
            while len(self._blocks) * _BLOCK < len(told):
                self._blocks.append(torch.zeros(_BLOCK, dtype=torch.float32, device="cpu"))
            for block, some in zip(self._blocks, self._by_block(), strict=True):
                block[: len(some)] = torch.tensor(some, dtype=block.dtype, device="cpu")

    def _by_block(self) -> list[list[float]]:
        return [self._told[at : at + _BLOCK] for at in range(0, len(self._told), _BLOCK)]

    def remove(self, p: Tensor) -> None:
        del self._numbers[p], self._slots[p]

    def changed(self) -> dict[Tensor, float]:
        """What was written to tensors since."""
        now = [number for block in self._blocks for number in block.tolist()]
        if now[: len(self._told)] == self._told:
            return {}
        return {p: now[slot] for p, slot in self._slots.items() if now[slot] != self._told[slot]}

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
        if len(self._told) - len(self) <= max(_MOST_UNUSED, len(self)):
            return False
        self.__init__(self._numbers)
        return True

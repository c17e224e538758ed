"""What state[p] of a paged optimizer is."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_kernels.optim.state_format import NAMES

__all__ = ["StateEntry"]


class StateEntry(dict[str, Any]):
    """A parameter's state as torch's optimizers show it, whose moments lie in pages.

    Closed, it has the step's number alone, and None for the rest. Where anything else is asked for or
    changed, it is opened: all values are copied out of the pages, and it is a dictionary like any other until
    the optimizer takes in what it holds, and closes it. Names that are not the optimizer's are left alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """A dictionary like any other; `of` makes those of an optimizer."""
        super().__init__(*args, **kwargs)
        self.open = False
        self._names: tuple[str, ...] = ()
        self._read: Callable[[], dict[str, Any]] | None = None
        self._step: Tensor | None = None
        self._copies: dict[str, tuple[Any, Any]] = {}  # and what marks them as they were made

    @classmethod
    def of(cls, names: Iterable[str], read: Callable[[], dict[str, Any]]) -> "StateEntry":
        """That of a parameter in pages. names: of its values, "step" among them; read: gives all others."""
        entry = cls(dict.fromkeys(names))
        entry._names, entry._read = tuple(entry), read
        return entry

    @property
    def names(self) -> tuple[str, ...]:
        """Of its values in the pages, and "step"."""
        return self._names

    def show_step(self, step: Tensor) -> None:
        self._step = step
        super().__setitem__("step", step)

    def rename(self, names: Iterable[str]) -> None:
        """Closes it; its values are others now, of the same parameter."""
        names = tuple(names)
        for name in self._names:
            if name not in names:
                super().pop(name, None)
        self._names = names
        self.close()

    def others(self) -> dict[str, Any]:
        """What stands in it under names that are not the optimizer's."""
        return {name: super(StateEntry, self).__getitem__(name) for name in self if name not in NAMES}

    def changed(self) -> bool:
        """Whether it is not as it was when it was opened, as far as identities and versions tell."""
        return self.open and not all(
            super(StateEntry, self).get(name) is value and _mark(value) == mark
            for name, (value, mark) in {**self._copies, "step": (self._step, _mark(self._step))}.items()
        )

    def close(self) -> None:
        """Lets go of the copies: the pages have what they say."""
        self.open = False  # first: what a signal leaves here is then read anew
        for name in NAMES & super().keys() - set(self._names):  # put there under the names of another format
            super().__delitem__(name)
        super().update({**dict.fromkeys(self._names), "step": self._step})
        self._copies = {}

    def detach(self) -> None:
        """From now on the pages have nothing of it: it can be read no more, unless it is open."""

        def gone() -> dict[str, Any]:
            raise RuntimeError(
                "this entry of an optimizer's state was taken out of it, and the state is gone: copy one, "
                "by dict(entry), before it is removed"
            )

        self._read = gone

    def make_open(self) -> None:
        if self.open or self._read is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            values = self._read()
        for name in self._names:
            if name != "step":
                super().__setitem__(name, values[name])
                self._copies[name] = values[name], _mark(values[name])
        self.open = True

    def __getitem__(self, name: str) -> Any:
        if name != "step" and name in self._names:
            self.make_open()
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in NAMES:
            self.make_open()
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if name in self._names:
            self.make_open()
        super().__delitem__(name)

    def __iter__(self) -> Iterator[str]:  # also keeps dict(entry) and {**entry} from copying what is not here
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is get)

    def items(self) -> list[tuple[str, Any]]:
        return [(name, self[name]) for name in self]

    def values(self) -> list[Any]:
        return [self[name] for name in self]

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def pop(self, name: str, *default: Any) -> Any:
        self.make_open()
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        self.make_open()
        return super().popitem()

    def clear(self) -> None:
        self.open = self._read is not None
        super().clear()

    def __or__(self, other: Any) -> dict[str, Any]:
        return self.copy() | other

    def __ror__(self, other: Any) -> dict[str, Any]:
        return other | self.copy()

    def __ior__(self, other: Any) -> "StateEntry":
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # torch.load(weights_only=True) knows an OrderedDict
        return OrderedDict, (), None, None, iter(self.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"


def _mark(value: Any) -> Any:
    """What a change in place, or another storage behind the same tensor, does not leave as it was."""
    if not isinstance(value, Tensor):
        return None
    return value._version, value.shape, value.data_ptr() if type(value) is Tensor else None

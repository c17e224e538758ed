"""What state[p] of a paged optimizer is."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["StateEntry"]


class StateEntry(dict[str, Any]):
    """A parameter's state as torch's optimizers show it, of which only "step" is here.

    The other values are copied out of the pages when one of them is asked for. The copies are kept until the
    optimizer's next step, which takes in what has been changed in them or put in their place.

    Args:
        step: fp32, a view of the optimizer's.
        names: of everything in the entry.
        read: gives all values.
    """

    def __init__(self, step: Tensor, names: Sequence[str], read: Callable[[], dict[str, Any]]) -> None:
        super().__init__(dict.fromkeys(names))
        super().__setitem__("step", step)
        self._step, self._read = step, read
        self._copies: dict[str, tuple[Any, int | None]] = {}  # and their versions when they were made
        self.touched = False  # whether anything was asked for or put here since the last step

    def changed(self) -> dict[str, Any]:
        """What is not as the pages have it."""
        found: dict[str, Any] = {}
        for name, value in super().items():
            copy, version = self._copies.get(name, (None, None))
            own = self._step if name == "step" else copy
            if value is not own or (isinstance(copy, Tensor) and copy._version != version):
                found[name] = value
        return found

    def forget(self) -> None:
        """Lets go of the copies: the pages have what they say."""
        super().update(dict.fromkeys(self._copies))
        super().__setitem__("step", self._step)
        self._copies, self.touched = {}, False

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is not None or name == "step":
            return value
        if not self._copies:
            self.touched = True
            made = {k: v for k, v in self._read().items() if k != "step"}
            self._copies = {k: (v, v._version if isinstance(v, Tensor) else None) for k, v in made.items()}
            for k, v in made.items():
                if super().get(k) is None:
                    super().__setitem__(k, v)
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.touched = True
        super().__setitem__(name, value)

    def __iter__(self) -> Iterator[str]:  # also keeps dict(entry) and {**entry} from copying what is not here
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is get)

    def items(self) -> list[tuple[str, Any]]:
        return [(name, self[name]) for name in self]

    def values(self) -> list[Any]:
        return [self[name] for name in self]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.copy(),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"

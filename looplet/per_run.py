"""`PerRun`: what a hook remembers of each run, when one object serves several runs, one after another or at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerRun(Generic[T]):
    """Values by the run's state object; `begin` in `pre_loop` and `end` in `on_loop_end` keep it from growing.

    Only a run that nobody can end properly (dropped in another thread, interpreter exit) leaves its value behind.
    """

    __slots__ = ("_make", "_values")

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._values: dict[int, T] = {}

    def begin(self, state: Any) -> None:
        """Start afresh; a state with steps is that of a run that goes on, and `make` reads them."""
        self._values[id(state)] = self._make(state)

    def of(self, state: Any) -> T:
        """Return the value of a run."""
        if id(state) not in self._values:
            self.begin(state)
        return self._values[id(state)]

    def end(self, state: Any) -> None:
        """Forget a run."""
        self._values.pop(id(state), None)

    def __len__(self) -> int:
        return len(self._values)

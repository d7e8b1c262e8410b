"""`CallIds`: each tool call of a run has an id that no other one has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class CallIds:
    """The ids of a run's calls."""

    __slots__ = ("_times",)

    def __init__(self, used: Iterable[str] = ()) -> None:
        self._times = dict.fromkeys(used, 1)
        """id → how often it was proposed"""

    def unique(self, proposed: str, number: int) -> str:
        """Return `proposed`, or an id like it that the run has not used; `number` makes one where there is none."""
        name = base = proposed or f"call_{number}"
        again = self._times.get(base, 1)
        while name in self._times:
            again += 1
            name = f"{base}_{again}"
        self._times[base] = again
        self._times.setdefault(name, 1)
        return name

    def __iter__(self) -> Iterator[str]:
        return iter(self._times)

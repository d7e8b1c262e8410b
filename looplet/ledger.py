"""The money ledger of a run: what its model calls used, alone and with the runs that its tools started."""

from __future__ import annotations

import threading

from looplet.types import NO_USAGE, Usage


class Ledger:
    """Adds up usage; what a sub-agent spends is in its parent's `total`, and in that one's parent's."""

    __slots__ = ("_below", "_lock", "_parent", "own", "unreported")

    def __init__(self, parent: Ledger | None = None) -> None:
        self._parent = parent
        self._lock = threading.Lock()
        self.own = NO_USAGE
        """of the run's own model calls"""
        self._below = NO_USAGE
        self.unreported = 0
        """the run's own calls whose provider reported no usage: counted apart, never guessed"""

    @property
    def total(self) -> Usage:
        """Return what those and all runs below used."""
        return self._below + self.own

    def count(self, usage: Usage | None) -> None:
        """Add one model call of the run."""
        if usage is None:
            self.unreported += 1
            return
        self.own = self.own + usage
        if self._parent is not None:
            self._parent.add(usage)

    def add(self, usage: Usage) -> None:
        """Add what a run below spent."""
        with self._lock:  # parallel tools may run sub-agents in threads
            self._below = self._below + usage
        if self._parent is not None:
            self._parent.add(usage)

"""The ledger of a run: what its model calls used and how much it did, alone and with the runs below it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

from looplet.types import NO_USAGE, Usage


@dataclass(slots=True)
class Counts:
    """How often a run did something."""

    model_calls: int = 0
    """begun; one that was repeated is one, another model asked instead is another"""
    tool_calls: int = 0
    """that ran"""
    steps: int = 0
    """steps of `free` tools not counted"""
    unreported: int = 0
    """model calls whose provider reported no usage: counted apart, never guessed"""
    unpriced: int = 0
    """model calls whose cost nobody knows, the unreported among them"""


@dataclass(frozen=True, slots=True)
class Spent:
    """A ledger, written down."""

    own: Usage
    below: Usage
    counts: Counts
    total_counts: Counts


class Ledger:
    """Adds up; what a sub-agent spends is in its parent's `total`, and in that one's parent's.

    Parallel tools may run sub-agents in threads: a ledger and those above it share one lock.
    """

    __slots__ = ("_below", "above", "counts", "lock", "own", "total_counts", "unclaimed")

    def __init__(self, parent: Ledger | None = None) -> None:
        self.above: tuple[Ledger, ...] = () if parent is None else (parent, *parent.above)
        self._below = NO_USAGE
        self.lock: Any = threading.RLock() if parent is None else parent.lock
        self.own = NO_USAGE
        """of the run's own model calls"""
        self.unclaimed = NO_USAGE
        """the part of it that no step has claimed"""
        self.counts = Counts()
        """of the run itself"""
        self.total_counts = Counts()
        """with those of all runs below"""

    @property
    def total(self) -> Usage:
        """Return what the run's model calls and those of all runs below used."""
        return self._below + self.own

    @property
    def unreported(self) -> int:
        """Return how many of the run's own calls came without usage."""
        return self.counts.unreported

    def count(self, usage: Usage | None) -> None:
        """Add what one model call of the run used, None where nobody said."""
        with self.lock:
            for counts in self._counting():
                counts.unreported += usage is None
                counts.unpriced += usage is None or usage.cost_usd is None
            if usage is not None:
                self.own, self.unclaimed = self.own + usage, self.unclaimed + usage
                for ledger in self.above:
                    ledger.add_below(usage)

    def claim(self) -> Usage:
        """Return what model calls used since the last step was made: it is that of the next one."""
        with self.lock:
            usage, self.unclaimed = self.unclaimed, NO_USAGE
        return usage

    def count_model_call(self) -> None:
        """Add a model call that begins; what it uses is known later, to `count`."""
        with self.lock:
            for counts in self._counting():
                counts.model_calls += 1

    def count_tool(self) -> None:
        """Add a tool call that runs."""
        with self.lock:
            for counts in self._counting():
                counts.tool_calls += 1

    def count_step(self) -> None:
        """Add a step that costs budget."""
        with self.lock:
            for counts in self._counting():
                counts.steps += 1

    def add_below(self, usage: Usage) -> None:
        """Add what a run below has used; the caller holds the lock."""
        self._below = self._below + usage

    def written(self) -> Spent:
        """Return everything, for the next segment of the run."""
        with self.lock:
            return Spent(self.own, self._below, replace(self.counts), replace(self.total_counts))

    def restore(self, spent: Spent) -> None:
        """Go on from what `written` said; the ledgers above do not hear of it."""
        with self.lock:
            self.own, self._below = spent.own, spent.below
            self.counts, self.total_counts = replace(spent.counts), replace(spent.total_counts)

    def _counting(self) -> tuple[Counts, ...]:
        """Return the counts that grow with what the run does."""
        if not self.above:
            return self.counts, self.total_counts
        return self.counts, self.total_counts, *[ledger.total_counts for ledger in self.above]

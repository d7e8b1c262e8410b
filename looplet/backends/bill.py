"""The bill of one model call: what it used and cost, with failed attempts that were charged for."""

from __future__ import annotations

from looplet.backends.candidates import Candidate
from looplet.prices import priced
from looplet.types import Usage


class Bill:
    """Adds up what one candidate charges for one call, and tells the candidate's meters."""

    __slots__ = ("_candidate", "_failed", "_model", "_purpose")

    def __init__(self, candidate: Candidate, purpose: str, model: str) -> None:
        self._candidate = candidate
        self._purpose = purpose
        self._model = model
        self._failed: Usage | None = None

    def priced(self, usage: Usage | None, model: str = "") -> Usage | None:
        """Return usage with its cost, by the model that answered, or else the one that was asked."""
        return None if usage is None else priced(usage, model or self._model, self._candidate.llm)

    def add_failed(self, usage: Usage | None) -> Usage | None:
        """Add an attempt that failed; return what it was charged, with its cost."""
        usage = self.priced(usage)
        self._failed = self.total(usage)
        return usage

    def total(self, usage: Usage | None) -> Usage | None:
        """Return what the failed attempts and this one used, None when nobody said anything."""
        if self._failed is None:
            return usage
        return self._failed if usage is None else self._failed + usage

    def meter(self, spent: Usage | None) -> None:
        """Count the call, with what it used in all."""
        for meter in self._candidate.meters:
            meter.count(self._purpose, self._model, spent)

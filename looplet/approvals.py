"""`Approvals`: what a run keeps in order to pause for a human, and to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from looplet.approval import ApprovalRequest, Verdict
from looplet.errors import ConfigError
from looplet.pause import Pause
from looplet.types import ToolCall

GONE_ON: Final = "the run has gone on from this pause already; what it waited for is not done twice"


class Once:
    """Lets one of those who ask go on."""

    __slots__ = ("_lock", "is_taken")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_taken = False

    def take(self, confirm: Callable[[], None]) -> None:
        """Go on if nobody has, and if `confirm` does not raise.  Raises ConfigError for everybody else."""
        with self._lock:
            if self.is_taken:
                raise ConfigError(GONE_ON)
            confirm()
            self.is_taken = True


@dataclass(slots=True)
class Approvals:
    """The questions of a run, their answers, and what the next segment begins with."""

    askers: Sequence[Callable[[Sequence[ApprovalRequest], str], Any]] = ()
    """who is handed the questions and the run's id; without one, a run does not pause"""
    requests: list[ApprovalRequest] = field(default_factory=list)
    """what the run waits for, when it pauses"""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """answers of humans, by call id"""
    held: list[ToolCall] = field(default_factory=list)
    """calls of the last reply that were not begun when the run paused"""
    pause: Pause | None = None
    """the record of a run that has paused"""
    once: Once = field(default_factory=Once)
    """lets one run go on from it"""
    claim: Callable[[], None] | None = None
    """of a run that goes on: makes sure, before its first step, that no other one does"""

    def take_held(self) -> Sequence[ToolCall]:
        """Return the calls with which a resumed run goes on; none, once they have been taken."""
        held, self.held = self.held, []
        return held

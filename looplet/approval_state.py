"""`ApprovalState`: what a run has asked humans, what they answered, and what it needs to pause and go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from looplet.approval import ApprovalRequest, Verdict
from looplet.errors import ConfigError
from looplet.pause import Pause
from looplet.types import ToolCall

ALREADY_RESUMED: Final = "the run has gone on from this pause already; what it waited for is not done twice"


class Once:
    """A pause may be resumed once: the first `take` succeeds, in whichever thread, and every other one fails."""

    __slots__ = ("_lock", "is_taken")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_taken = False

    def take(self, confirm: Callable[[], None]) -> None:
        """Take it, unless `confirm` raises.  Raises ConfigError when it is taken already."""
        with self._lock:
            if self.is_taken:
                raise ConfigError(ALREADY_RESUMED)
            confirm()
            self.is_taken = True


@dataclass(slots=True)
class ApprovalState:
    """The questions of a run, their answers, and what its next segment begins with."""

    askers: Sequence[Callable[[Sequence[ApprovalRequest], str], Any]] = ()
    """functions that are given the questions and the run's id; without one, a run does not pause"""
    requests: list[ApprovalRequest] = field(default_factory=list)
    """what the run waits for, when it pauses"""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """answers of humans, by call id"""
    held: list[ToolCall] = field(default_factory=list)
    """calls of the last reply that were not begun when the run paused"""
    pause: Pause | None = None
    """the record of a run that has paused"""
    once: Once = field(default_factory=Once)
    """of `pause`: one run may go on from it"""
    claim: Callable[[], None] | None = None
    """of a resumed run: called before its first step; raises ConfigError when another run has resumed the same pause"""

    def take_held(self) -> Sequence[ToolCall]:
        """Return the calls with which a resumed run goes on; none, once they have been taken."""
        held, self.held = self.held, []
        return held

"""Everything one run works with: what it was given, and what it has come to so far."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import Link

from looplet.approval import WAITING, ApprovalRequest, Verdict
from looplet.backends.adapter import Model
from looplet.boundary import Boundary
from looplet.budgets import Guard
from looplet.cancel import CancelToken
from looplet.config import LoopConfig
from looplet.hooks import HookSet
from looplet.message_log import MessageLog
from looplet.messages import Conversation, Message
from looplet.models import Models
from looplet.output import parse_output
from looplet.pause import Pause
from looplet.plan import Closing
from looplet.prompt import Shown
from looplet.state import SessionLog
from looplet.streaming import Stream, StreamEvent
from looplet.telemetry import semconv
from looplet.telemetry.spans import RunTrace
from looplet.tools import BaseToolRegistry
from looplet.types import NO_USAGE, Step, ToolCall, Usage


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to; `Run.result` once it has ended."""

    run_id: str
    trace_id: str
    """32 hex digits"""
    stop_reason: str
    final_output: dict[str, Any]
    """the arguments of the accepted `done` call, `{}` without one"""
    steps: Sequence[Step]
    usage: Usage
    task: dict[str, Any]
    output: Any = None
    """an object of `output_type`, once the run has ended with one"""


@dataclass(slots=True)
class RunScope:
    """The working set of a run; the phases share it."""

    models: Models
    tools: BaseToolRegistry
    hooks: HookSet
    config: LoopConfig
    boundary: Boundary
    trace: RunTrace
    state: Any
    session_log: SessionLog
    conversation: Conversation
    task: dict[str, Any]
    guard: Guard
    cancel_token: CancelToken
    parent: tuple[str, str] | None = None
    """run id and tool-call id of the run whose tool started this one"""
    context: Any = None
    """the caller's own object for hooks; without one, `pre_prompt` gets the `Prompt`"""
    head: tuple[Message, ...] = ()
    """the messages that every request begins with: system prompt, memory, text protocol"""
    memory: Message | None = None
    """the one of them that tells what the memory sources said"""
    log: MessageLog = field(default_factory=MessageLog)
    shown: Shown = field(default_factory=Shown)
    """the conversation as text, for hooks that get the `Prompt`"""
    task_message: Message | None = None
    """the message that shows the task"""
    briefing: list[str] = field(default_factory=list)
    """texts for the next request only"""
    briefed: list[str] = field(default_factory=list)
    """those that the last request had"""
    stop: str | None = None
    """the stop reason, once there is one"""
    ending: str | None = None
    """the stop reason of a run that has ended"""
    gate_failures: Counter[tuple[int, str]] = field(default_factory=Counter)
    call_ids: dict[str, int] = field(default_factory=dict)
    """the ids of the run's calls, and how often each was proposed"""
    model_calls: int = 0
    parse_failures: int = 0
    """replies in a row that held no tool call"""
    logged_prefix: int = 0
    """how many leading messages the next request shares with the last one, if the conversation was only appended to"""
    logged_edits: int = 0
    task_position: int | None = None
    """of the task's message in the first request, None while there is none"""
    recorded_task: dict[str, Any] = field(default_factory=dict)
    """the task as the trace tells it; `{}` while a hook that may rewrite it has not seen it"""
    rewrites: bool = False
    """a `pre_prompt` hook rewrites requests: what it has not seen yet must not reach the trace"""
    turn_prompt: str = ""
    links: Sequence[Link] = ()
    """to the segment before"""
    segment: int = 1
    """from 1; a run that paused goes on with the next"""
    spent_limit: str | None = None
    """the budget that ended the run"""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """answers of humans, by call id"""
    requests: list[ApprovalRequest] = field(default_factory=list)
    """what the run waits for, when it pauses"""
    approvers: Sequence[Callable[[Sequence[ApprovalRequest], str], Any]] = ()
    """who is told of them; without one, a run does not pause"""
    pause: Pause | None = None
    """the record of a run that has paused"""
    once: Any = None
    """lets one run go on from it"""
    claim: Callable[[], None] | None = None
    """of a run that goes on: makes sure, before its first step, that no other one does"""
    held: list[ToolCall] = field(default_factory=list)
    """calls of the last reply that were not begun when the run paused"""
    compact_service: Any = None
    """makes the conversation shorter; a hook may put another into `state.compact_service`"""
    output_type: Any = None
    """what the arguments of `done` must fit"""
    leaving_as: str = "cancelled"
    """the stop reason when the token is cancelled"""
    loop: Any = None
    """the event loop of an async run"""
    stream: Stream = field(default_factory=Stream)
    _unclaimed: Usage = NO_USAGE
    """what model calls used since the last step was made"""
    _lock: Any = field(default_factory=threading.RLock)

    @property
    def model(self) -> Model:
        """Return the model that the loop asks."""
        return self.models.primary

    @property
    def run_id(self) -> str:
        """Return the run's id: 32 hex digits."""
        return self.trace.recorder.run_id

    @property
    def limit(self) -> str | None:
        """Return what allows no further turn: `steps`, `tokens`, `usd`, ...; None while there is something left."""
        if self.spent_limit is None:
            self.spent_limit = self.guard.exhausted() if self.state.budget_remaining > 0 else "steps"
        return self.spent_limit

    def budget_left(self) -> dict[str, float]:
        """Return what is left of the budgets, as span attributes."""
        return {f"{semconv.BUDGET_REMAINING}.{name}": left for name, left in self.guard.remaining().items()}

    def exhaust(self, limit: str) -> None:
        """End the run after this turn: a budget allows no more."""
        self.spent_limit = limit
        self.say_stop("budget_exhausted")

    def tell(self, event: type[StreamEvent], **facts: Any) -> None:
        """Tell the caller's stream, if there is one."""
        if self.stream:
            turn = {"turn": self.trace.turn_number} if "turn" in event.__dataclass_fields__ else {}
            self.stream.emit(event(run_id=self.run_id, **turn, **facts))

    def check_cancelled(self) -> None:
        """Leave the run if its token was cancelled."""
        if self.cancel_token.is_cancelled:
            raise Closing(self.leaving_as)

    def count_usage(self, usage: Usage | None) -> None:
        """Count a model call; tools may make them in threads of their own."""
        ledger = self.trace.recorder.ledger
        with self._lock:
            ledger.count(usage)
            if usage is not None:
                self._unclaimed = self._unclaimed + usage
                note_state(self.state, "usage", ledger.own)

    def give_back(self, usage: Usage) -> None:
        """Put back what a segment before this one had not claimed."""
        self._unclaimed = usage

    @property
    def unclaimed(self) -> Usage:
        """Return what `claim_usage` would, without claiming it."""
        return self._unclaimed

    def claim_usage(self) -> Usage:
        """Return what model calls used since the last step was made."""
        with self._lock:
            usage, self._unclaimed = self._unclaimed, NO_USAGE
        return usage

    @property
    def asks_rewriters(self) -> bool:
        """Tell whether a hook may rewrite what is sent, and so what may be recorded."""
        return self.context is None and bool(self.hooks.of("pre_prompt"))

    def take_held(self) -> Sequence[ToolCall]:
        """Return the calls with which a resumed run goes on; none, once they have been taken."""
        held, self.held = self.held, []
        return held

    def say_stop(self, reason: str) -> None:
        """End the run after this turn; the first reason counts, and any counts more than waiting for a human."""
        if self.stop in (None, WAITING):
            self.stop = reason

    def unique_call_id(self, proposed: str, number: int) -> str:
        """Return `proposed`, or an id like it that this run has not used."""
        name = base = proposed or f"call_{number}"
        again = self.call_ids.get(base, 1)
        while name in self.call_ids:
            again += 1
            name = f"{base}_{again}"
        self.call_ids[base] = again
        self.call_ids.setdefault(name, 1)
        return name

    def result(self, ending: str) -> RunResult:
        """Return what the run came to."""
        return RunResult(
            self.trace.recorder.run_id,
            self.trace.trace_id or "",
            ending,
            final_output_of(self.state.steps, ending),
            self.state.steps,
            self.trace.recorder.ledger.own,
            self.recorded_task,
            self._output(ending),
        )

    def _output(self, ending: str) -> Any:
        if self.output_type is None or ending != "done":
            return None
        return parse_output(self.output_type, self.state.steps[-1].tool_call.args)


def note_state(state: Any, name: str, value: Any) -> None:
    """Set a field of the run's state; a class of the caller's own need not have our fields."""
    try:
        setattr(state, name, value)
    except AttributeError:
        return


def final_output_of(steps: Sequence[Step], stop_reason: str | None) -> dict[str, Any]:
    """Return the arguments of the accepted `done` call; `answer` is there under either of its names."""
    if stop_reason != "done" or not steps:
        return {}
    output = dict(steps[-1].tool_call.args)
    if "answer" not in output and "summary" in output:
        output["answer"] = output["summary"]
    return output

"""Everything one run works with: what it was given, and what it has come to so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import Link

from looplet.approval import WAITING
from looplet.approval_state import ApprovalState
from looplet.backends.adapter import Model
from looplet.boundary import Boundary
from looplet.budgets import Guard
from looplet.call_ids import CallIds
from looplet.cancel import CancelToken
from looplet.config import LoopConfig
from looplet.hooks import HookSet
from looplet.ledger import Ledger
from looplet.messages import Conversation
from looplet.models import Models
from looplet.outgoing import Outgoing
from looplet.output import parse_output
from looplet.plan import Closing
from looplet.state import SessionLog
from looplet.streaming import Stream, StreamEvent
from looplet.telemetry import semconv
from looplet.telemetry.spans import RunTrace
from looplet.tools import BaseToolRegistry
from looplet.types import Step, Usage


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
    outgoing: Outgoing
    task: dict[str, Any]
    guard: Guard
    cancel_token: CancelToken
    parent: tuple[str, str] | None = None
    """run id and tool-call id of the run whose tool started this one"""
    context: Any = None
    """the caller's own object for hooks; without one, `pre_prompt` gets the `Prompt`"""
    stop: str | None = None
    """the stop reason, once there is one"""
    ending: str | None = None
    """the stop reason of a run that has ended"""
    gate_failures: Counter[tuple[int, str]] = field(default_factory=Counter)
    call_ids: CallIds = field(default_factory=CallIds)
    parse_failures: int = 0
    """replies in a row that held no tool call"""
    recorded_task: dict[str, Any] = field(default_factory=dict)
    """the task as the trace tells it; `{}` while a hook that may rewrite it has not seen it"""
    ending_tools: frozenset[str] = field(init=False)
    """names of the tools that end the run"""
    asks_rewriters: bool = field(init=False)
    """a hook may rewrite what is sent, and so what may be recorded"""
    rewrites: bool = False
    """a `pre_prompt` hook rewrites requests: what it has not seen yet must not reach the trace"""
    unseen: list[Step] = field(default_factory=list)
    """steps whose results are not in the trace yet: hooks that may rewrite them have not seen them"""
    links: Sequence[Link] = ()
    """to the segment before"""
    segment: int = 1
    """from 1; a run that paused goes on with the next"""
    spent_limit: str | None = None
    """the budget that ended the run"""
    approvals: ApprovalState = field(default_factory=ApprovalState)
    compact_service: Any = None
    """makes the conversation shorter; a hook may put another into `state.compact_service`"""
    output_type: Any = None
    """what the arguments of `done` must fit"""
    leaving_as: str = "cancelled"
    """the stop reason when the token is cancelled"""
    loop: Any = None
    """the event loop of an async run"""
    stream: Stream = field(default_factory=Stream)

    def __post_init__(self) -> None:
        self.ending_tools = self.config.ending_tools
        hooks = self.hooks.of("pre_prompt")
        self.asks_rewriters = self.context is None and any(hook.rewrites is not False for hook in hooks)

    @property
    def model(self) -> Model:
        """Return the model that the loop asks."""
        return self.models.primary

    @property
    def ledger(self) -> Ledger:
        """Return what the run has used, and how much it did."""
        return self.trace.recorder.ledger

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

    def emit(self, event: type[StreamEvent], **facts: Any) -> None:
        """Make an event for the caller's stream, if there is one."""
        if self.stream.emitters:
            turn = {"turn": self.trace.turn_number} if "turn" in event.__dataclass_fields__ else {}
            self.stream.emit(event(run_id=self.run_id, **turn, **facts))

    def check_cancelled(self) -> None:
        """Leave the run if its token was cancelled."""
        if self.cancel_token.is_cancelled:
            raise Closing(self.leaving_as)

    def count_usage(self, usage: Usage | None) -> None:
        """Count a model call; tools may make them in threads of their own."""
        with self.ledger.lock:
            self.ledger.count(usage)
            if usage is not None:
                note_state(self.state, "usage", self.ledger.own)

    @property
    def withholds_results(self) -> bool:
        """Tell whether a result must wait, before it reaches the trace, for the request that shows it."""
        return self.rewrites or self.asks_rewriters

    def say_stop(self, reason: str) -> None:
        """End the run after this turn; the first reason counts, and any counts more than waiting for a human."""
        if self.stop in (None, WAITING):
            self.stop = reason

    def result(self, ending: str) -> RunResult:
        """Return what the run came to."""
        return RunResult(
            self.trace.recorder.run_id,
            self.trace.trace_id or "",
            ending,
            final_output_of(self.state.steps, ending),
            self.state.steps,
            self.ledger.own,
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

"""What the loop says about itself: phases of a run, as spans for the sinks and as values for the observers.

The loop opens a `Phase` for each thing it does and asks for its effects through it: that is how an effect gets its
context.  No phase is ever current in the plan itself, so none can leak into the caller's loop body.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Final, Self

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanKind

from looplet.errors import words_of
from looplet.plan import INLINE, Call, Closing, Effects
from looplet.telemetry import semconv
from looplet.telemetry.recorder import RecordedSpan, Recorder, count_drop, describe, error_name
from looplet.types import Reply, ToolCall, ToolResult, Usage

DROPPED: Final = "closed_by_caller"
NORMAL_ENDINGS: Final = frozenset({DROPPED})
"""reasons for leaving early that are no failure"""


@dataclass(frozen=True, slots=True)
class PhaseEnd:
    """What an observer gets when a phase ends: typed values, the same whether or not anybody records spans."""

    phase: str
    """the span's name without its subject: `chat`, `execute_tool`, `looplet.pre_prompt`, `invoke_agent`, ..."""
    run_id: str
    trace_id: str
    """32 hex digits"""
    span_id: str
    """16 hex digits, empty when no span was made"""
    agent: str
    turn_number: int
    """from 1; 0 outside a turn"""
    duration_s: float
    error_type: str | None = None
    """as on the span: low-cardinality, None after a success"""
    step_number: int | None = None
    provider: str | None = None
    model: str | None = None
    reply: Reply | None = None
    usage: Usage | None = None
    purpose: str | None = None
    """of a model call: agent, compaction, tool, judge"""
    tool_call: ToolCall | None = None
    tool_result: ToolResult | None = None
    answered: tuple[tuple[ToolCall, ToolResult], ...] = ()
    """calls that came to their results before dispatch: denied, cached, invalid"""
    stop_reason: str | None = None
    steps: int | None = None
    """of the whole run, when the phase is `invoke_agent`"""


class RunTrace:
    """The phases of one run."""

    def __init__(self, recorder: Recorder, agent: str, observers: Sequence[Callable[[PhaseEnd], Any]]) -> None:
        self.recorder = recorder
        self.agent = agent
        self.turn_number = 0
        self.root: RecordedSpan | None = None
        self.withhold_results = False
        """a hook rewrites requests: what tools return is recorded only as it is sent"""
        self.recording = recorder.recording
        """whether spans are made; attributes need not be computed otherwise"""
        self.observed = bool(observers)
        """whether there are observers"""
        self.durable = recorder.durable
        """writes everything that has ended so far"""
        self._observers = list(observers)
        self._late: list[tuple[Any, Any, Callable[[Any], Any] | None]] = []
        """observers that answered with something to await, what they answered, and who checks what comes of it"""

    @property
    def trace_id(self) -> str | None:
        """Return the trace's id, None before the run has started."""
        return f"{self.root.context.trace_id:032x}" if self.root else None

    def run(self, attributes: Mapping[str, Any], links: Sequence[Link] = ()) -> Phase:
        """Open `invoke_agent {agent}`, the phase that holds all others."""
        name = f"{semconv.INVOKE_AGENT} {self.agent}"
        self.root = self.recorder.start(name, attributes=attributes, links=links)
        return Phase(self, semconv.INVOKE_AGENT, self.root, self.root)

    def turn(self, above: Phase) -> Phase:
        """Open the next turn."""
        self.turn_number += 1
        self.recorder.common[semconv.TURN_NUMBER] = self.turn_number
        return above.phase(semconv.TURN)

    def leave_turns(self) -> None:
        """Say that what follows belongs to no turn."""
        self.recorder.common.pop(semconv.TURN_NUMBER, None)

    def sweep(self, reason: str) -> None:
        """End the spans that are still open, innermost first."""
        for span in reversed(list(self.recorder.open.values())):
            if span is not self.root:
                _mark_left(span, reason)
                span.end()

    def observe(self, end: PhaseEnd) -> None:
        """Tell the observers; one that raises is logged once and the run goes on."""
        for observer in self._observers:
            self.notify(observer, partial(observer, end))

    def notify(
        self, watcher: Callable[..., Any], thunk: Callable[[], Any], check: Callable[[Any], Any] | None = None
    ) -> None:
        """Call `thunk` for somebody who only watches, in any thread; an awaitable is awaited at the turn's end.

        check: raises when it does not like the answer.  Whatever is raised is counted and logged once.
        """
        try:
            answer = thunk()
            if inspect.isawaitable(answer):
                self._late.append((watcher, answer, check))
            elif check is not None:
                check(answer)
        except Exception as error:  # noqa: BLE001 - an observer only watches
            self._complain(watcher, error)

    def settle(self, phase: Phase) -> Effects[None]:
        """Await what async observers returned."""
        late, self._late = self._late, []
        for observer, answer, check in late:
            try:
                value = yield from phase.call(partial(_same, answer))
                if check is not None:
                    check(value)
            except Exception as error:  # noqa: BLE001 - an observer only watches
                self._complain(observer, error)

    def base(self) -> Context:
        """Return the context in which the run was called, with the run in it."""
        return self.recorder.base

    def _complain(self, observer: Any, error: Exception) -> None:
        count_drop(f"observer {getattr(observer, '__qualname__', observer)} failed", repr(error))


class Phase:
    """One phase of a run: a `with` block, the effects asked for inside it, what is recorded about it."""

    __slots__ = ("_ended_ns", "_error_type", "_facts", "_failed_by", "_span", "_started_ns", "_trace", "name", "parent")

    def __init__(self, trace: RunTrace, name: str, span: RecordedSpan | None, parent: RecordedSpan | None) -> None:
        self.name = name
        self.parent = parent
        self._trace = trace
        self._span = span
        self._started_ns = span.start_time if span is not None else trace.recorder.clock + perf_counter_ns()
        self._ended_ns: int | None = None
        self._facts: dict[str, Any] | None = None
        self._error_type: str | None = None
        self._failed_by = 0
        """the id of the exception by which the phase was marked as failed"""

    def phase(
        self,
        name: str,
        subject: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] | None = None,
    ) -> Phase:
        """Open a phase inside this one; its span is called `name subject`."""
        trace = self._trace
        span = None
        if trace.recording:
            span = trace.recorder.start(f"{name} {subject}" if subject else name, self._span, kind, attributes)
        return Phase(trace, name, span, self._span)

    def call(self, thunk: Callable[[], Any], lane: str = INLINE, timeout_s: float | None = None) -> Effects[Any]:
        """Ask for `thunk()` under this phase's context."""
        return (yield Call(thunk, self.context, lane, timeout_s))

    @property
    def context(self) -> Context:
        """Return the context in which this phase's span is the current one."""
        return self._span.as_context() if self._span is not None else self._trace.base()

    @property
    def recording(self) -> bool:
        """Tell whether anybody gets what is `put` here."""
        return self._span is not None

    @property
    def failed(self) -> bool:
        """Tell whether the phase was marked as failed."""
        return self._error_type is not None

    def put(self, attributes: Mapping[str, Any]) -> None:
        """Record attributes."""
        if self._span is not None:
            self._span.put(attributes)

    def event(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Record an event."""
        if self._span is not None:
            self._span.happened(name, attributes)

    def note(self, **facts: Any) -> None:
        """Remember typed values for the observers (fields of `PhaseEnd`)."""
        if self._trace.observed:
            self._facts = {**(self._facts or {}), **facts}

    def fail(self, error_type: str, message: str = "") -> None:
        """Mark the phase as failed; `error_type` goes to the span and to the observers."""
        self._error_type = error_type
        if self._span is not None:
            self._span.failed(error_type, message)

    def fail_with(self, error: BaseException, error_type: str | None = None) -> None:
        """Mark the phase as failed by an exception."""
        self._failed_by = id(error)
        clean = self._trace.recorder.boundary.text
        message = "" if self._trace.withhold_results else clean(words_of(error))
        self.fail(error_type or error_name(error), message)
        if self._span is not None:
            self._span.happened(semconv.EVENT_EXCEPTION, {**describe(error), semconv.EXCEPTION_MESSAGE: message})

    def elapsed_s(self) -> float:
        """Return the seconds since the phase began."""
        return (self._trace.recorder.now() - self._started_ns) / 1e9

    def stop_clock(self) -> float:
        """Fix the phase's end at now; return the milliseconds since its start."""
        self._ended_ns = self._trace.recorder.now()
        return (self._ended_ns - self._started_ns) / 1e6

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self._left_by(error)
        if self._span is None and not self._trace.observed:
            return
        ended = self._ended_ns or self._trace.recorder.now()
        if self._span is not None:
            self._span.end(ended)
        if self._trace.observed:
            self._trace.observe(self._phase_end(ended))

    def _left_by(self, error: BaseException) -> None:
        if isinstance(error, (Closing, GeneratorExit)):  # the collector closes a generator whose run was dropped
            reason = error.reason if isinstance(error, Closing) else DROPPED
            self._error_type = None if reason in NORMAL_ENDINGS else reason
            if self._span is not None:
                _mark_left(self._span, reason)
        elif isinstance(error, Exception):
            if id(error) != self._failed_by:
                self.fail_with(error)
        else:
            self.fail("cancelled", error_name(error))
            self.put({semconv.STOP_REASON: "cancelled"})

    def _phase_end(self, ended: int) -> PhaseEnd:
        trace = self._trace
        return PhaseEnd(
            phase=self.name,
            run_id=trace.recorder.run_id,
            trace_id=trace.trace_id or "",
            span_id=f"{self._span.context.span_id:016x}" if self._span else "",
            agent=trace.agent,
            turn_number=trace.recorder.common.get(semconv.TURN_NUMBER, 0),
            duration_s=(ended - self._started_ns) / 1e9,
            error_type=self._error_type,
            **(self._facts or {}),
        )


def _same(value: Any) -> Any:
    return value


def _mark_left(span: RecordedSpan, reason: str) -> None:
    span.put({semconv.STOP_REASON: reason})
    if reason not in NORMAL_ENDINGS:
        span.failed(reason)

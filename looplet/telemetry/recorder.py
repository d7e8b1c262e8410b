"""The recorder: looplet's own span, and the outlets that each one feeds.

A `RecordedSpan` implements the OpenTelemetry API's `Span`, so that user code inside a tool finds a proper current
span.  It may feed the run's *sinks* (files: everything) and the *user's tracer* (a real span held inside: ids, flags,
and everything except content unless capture is on).  So the local file depends neither on the user's sampler nor on
his attribute limits, `OTEL_SDK_DISABLED` or shutdown order, and content never reaches a network exporter by accident.

Nothing in here may raise into a run: what the user's tracer raises is counted and logged once.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from time import perf_counter_ns, time_ns
from types import TracebackType
from typing import Any, Final, Protocol, Self

from opentelemetry import trace
from opentelemetry.context import Context, set_value
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, set_span_in_context

from looplet.boundary import Boundary
from looplet.errors import words_of
from looplet.ledger import Ledger
from looplet.telemetry import semconv
from looplet.telemetry.redaction import redact_late

logger = logging.getLogger("looplet")

RUN_KEY: Final = "looplet.run"
"""the OpenTelemetry context key under which code inside a run finds its recorder"""

UNSET: Final = Status()

_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)  # two processes must not draw the same ids

drops: dict[str, int] = {}
"""what telemetry lost in this process, by cause; nothing is lost silently"""


def count_drop(cause: str, detail: object = "") -> None:
    """Count something that telemetry lost; log the first of each cause."""
    drops[cause] = drops.get(cause, 0) + 1
    if drops[cause] == 1:
        logger.warning("looplet telemetry: %s (%s); the run goes on, further ones are only counted", cause, detail)


class Sink(Protocol):
    """What writes the spans of runs."""

    def attach(self, recorder: Recorder) -> None:
        """Begin to write a run."""

    def on_end(self, span: Any) -> None:
        """Take an ended span; lock-free and re-entrant."""

    def durable(self) -> None:
        """Write what was taken so far."""

    def detach(self, recorder: Recorder) -> None:
        """End writing a run."""


class Event:
    """A named moment of a span."""

    __slots__ = ("attributes", "name", "timestamp")

    dropped_attributes = 0

    def __init__(self, name: str, attributes: Mapping[str, Any], timestamp: int) -> None:
        self.name = name
        self.attributes = attributes
        self.timestamp = timestamp


class Scope:
    """The instrumentation scope of looplet's spans."""

    def __init__(self, version: str) -> None:
        self.name = semconv.SCOPE
        self.version = version
        self.schema_url = semconv.SCHEMA_URL
        self.attributes: Mapping[str, Any] = {}


class Resource:
    """What the spans are about, where no provider says: the service."""

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self.attributes = attributes
        self.schema_url = ""


class Recorder:
    """Starts the spans of one run and hands the ended ones to the run's sinks."""

    def __init__(
        self,
        *,
        run_id: str,
        boundary: Boundary,
        sinks: Sequence[Sink],
        tracer: trace.Tracer | None,
        context: Context,
        resource: Any,
        scope: Scope,
        capture_content: bool = False,
        late: Boundary | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.run_id = run_id
        self.boundary = boundary
        self.late = late
        """redacts what is recorded only: the provider's copy stays as it is (`redact_upstream=False`)"""
        self.sinks = tuple(sinks)
        self.tracer = tracer
        self.ledger = ledger or Ledger()
        self.resource = resource
        self.scope = scope
        self.open: dict[int, RecordedSpan] = {}
        self.common: dict[str, Any] = {semconv.RUN_ID: run_id}
        """attributes that every span of the run carries"""
        self.closed = False
        """the run has ended: what a stuck tool of its still does is not recorded"""
        self.recording = bool(self.sinks) or tracer is not None
        """whether anybody gets the spans"""
        self.root_context = trace.INVALID_SPAN_CONTEXT
        """trace id, flags and state of the run's first span, which the others share"""
        self.plain_trace_id: int | None = None
        """the trace id, where there is no trace state"""
        self.captures = capture_content
        self.base = set_value(RUN_KEY, self, context)
        """the context of the call, with the run in it"""
        self._clock = time_ns() - perf_counter_ns()

    def now(self) -> int:
        """Return nanoseconds since the epoch; never goes backwards within a run."""
        return self._clock + perf_counter_ns()

    def start(
        self,
        name: str,
        parent: RecordedSpan | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[trace.Link] = (),
    ) -> RecordedSpan:
        """Start a span under `parent`, or under the context that the run was called in."""
        if attributes and self.late is not None:
            attributes = redact_late(self.late, attributes)
        merged = {**self.common, **attributes} if attributes else self.common.copy()
        started = self._clock + perf_counter_ns()
        told = self.tracer is not None and not self.closed
        inner = self._start_inner(name, parent, kind, merged, links, started) if told else None
        span = RecordedSpan(name, kind, merged, started, inner, self)
        if parent is None or inner is not None:
            self._place(span, parent, inner)
        else:
            span.span_id, span.parent_id = _random.getrandbits(64) or 1, parent.span_id
        if links:
            span.links = list(links)
        if not self.closed:
            self.open[span.span_id] = span
        return span

    def _place(self, span: RecordedSpan, parent: RecordedSpan | None, inner: Span | None) -> None:
        above = trace.get_current_span(self.base).get_span_context() if parent is None else parent.context
        own = _new_context(above) if inner is None else inner.get_span_context()
        span.place(own, above if above.is_valid else None)
        if parent is None:
            self.root_context, self.plain_trace_id = own, None if own.trace_state else own.trace_id

    def ended(self, span: Any) -> None:
        """Hand an ended span to the sinks: one of the run's, or one of somebody else's that happened inside it."""
        for sink in self.sinks:
            try:
                sink.on_end(span)
            except Exception as error:  # noqa: BLE001 - a sink must not end a run
                count_drop("sink failed", repr(error))

    def durable(self) -> None:
        """Have every sink write what has ended so far."""
        for sink in self.sinks:
            try:
                sink.durable()
            except Exception as error:  # noqa: BLE001 - a sink must not end a run
                count_drop("sink failed", repr(error))

    def close(self) -> None:
        """End the spans that are still open, innermost first; later ones are not recorded."""
        self.closed = True
        for span in reversed(list(self.open.values())):
            span.end()

    def disown(self) -> None:
        """In a forked child: forget everybody who gets the spans; they get them from the parent."""
        self.closed, self.sinks, self.tracer = True, (), None
        self.open.clear()

    def clean(self, value: Any) -> Any:
        """Return the recordable form of what user code says about a span; the provider of the model never sees it."""
        value = self.boundary.clean(value)
        return value if self.late is None else self.late.clean(value)

    def shows(self, key: str) -> bool:
        """Tell whether the user's tracer may see this attribute."""
        return self.captures or key not in semconv.CONTENT

    def below_root(self, span_id: int) -> SpanContext:
        """Return the context of a span of the run, given its id."""
        root = self.root_context
        return SpanContext(root.trace_id, span_id, False, root.trace_flags, root.trace_state)

    def context_of(self, span: RecordedSpan) -> Context:
        """Return the OpenTelemetry context in which `span` is the current one."""
        return set_span_in_context(span, self.base)

    def _start_inner(
        self,
        name: str,
        parent: RecordedSpan | None,
        kind: SpanKind,
        attributes: Mapping[str, Any],
        links: Sequence[trace.Link],
        started: int,
    ) -> Span | None:
        """Return a span of the user's tracer, None when that makes none with an id of its own."""
        assert self.tracer is not None
        context = self.base if parent is None else parent.as_context()
        shown = {key: value for key, value in attributes.items() if self.shows(key)}
        try:
            inner = self.tracer.start_span(name, context, kind, shown, links or None, started)
            own, above = inner.get_span_context(), trace.get_current_span(context).get_span_context()
        except Exception as error:  # noqa: BLE001 - the user's tracer, sampler and processors
            count_drop("the tracer provider failed", repr(error))
            return None
        return inner if own.is_valid and own.span_id != above.span_id else None


def _new_context(parent: SpanContext) -> SpanContext:
    trace_id = parent.trace_id if parent.is_valid else _random.getrandbits(128) or 1
    flags = parent.trace_flags if parent.is_valid else TraceFlags(0)
    state = parent.trace_state if parent.is_valid else None
    return SpanContext(trace_id, _random.getrandbits(64) or 1, False, flags, state)


class RecordedSpan(Span):
    """One span of a run.  The public methods are for user code and clean what they get; `put` and `happened` are ours.

    Has what the SDK's `ReadableSpan` has, so that SDK exporters accept it.
    """

    __slots__ = (
        "_as_context", "_context", "_inner", "_parent", "_recorder", "attributes", "end_time", "events",
        "instrumentation_scope", "kind", "links", "name", "parent_id", "resource", "span_id", "start_time", "status",
    )  # fmt: skip

    dropped_attributes = 0
    dropped_events = 0
    dropped_links = 0

    def __init__(
        self,
        name: str,
        kind: SpanKind,
        attributes: dict[str, Any],
        start_time: int,
        inner: Span | None,
        recorder: Recorder,
    ) -> None:
        self.name = name
        self.span_id = 0
        self.parent_id = 0
        """0 without a parent"""
        self.kind = kind
        self.attributes = attributes
        self.start_time = start_time
        self.end_time = 0
        self.events: list[Event] = []
        self.links: list[Any] = []
        self.status = UNSET
        self.resource = recorder.resource
        self.instrumentation_scope = recorder.scope
        self._inner = inner
        self._recorder = recorder
        self._as_context: Context | None = None
        self._context: SpanContext | None = None
        self._parent: SpanContext | None = None

    # --- for the run ------------------------------------------------------------------------------------------------

    @property
    def context(self) -> SpanContext:
        """Return the ids of the span; an object is made only for those who ask."""
        if self._context is None:
            self._context = self._recorder.below_root(self.span_id)
        return self._context

    @property
    def parent(self) -> SpanContext | None:
        """Return the ids of the parent, None without one."""
        if self._parent is None and self.parent_id:
            self._parent = self._recorder.below_root(self.parent_id)
        return self._parent

    @property
    def plain_ids(self) -> tuple[int, int, int] | None:
        """Return the ids of trace, span and parent; None when there is more to say about them."""
        trace_id = self._recorder.plain_trace_id
        return None if trace_id is None or self._context is not None else (trace_id, self.span_id, self.parent_id)

    def place(self, context: SpanContext, parent: SpanContext | None) -> None:
        """Give the span ids that are not just a new one below its parent's."""
        self._context, self._parent = context, parent
        self.span_id, self.parent_id = context.span_id, parent.span_id if parent is not None else 0

    def as_context(self) -> Context:
        """Return the OpenTelemetry context in which this span is the current one."""
        if self._as_context is None:
            self._as_context = self._recorder.context_of(self)
        return self._as_context

    def put(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes that have passed the boundary already."""
        if self.end_time:
            return
        if self._recorder.late is not None:
            attributes = redact_late(self._recorder.late, attributes)
        self.attributes.update(attributes)
        if self._inner is not None:
            self._tell("set_attributes", {k: v for k, v in attributes.items() if self._recorder.shows(k)})

    def happened(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Add an event whose attributes have passed the boundary already."""
        if self.end_time:
            return
        if self._recorder.late is not None:
            attributes = redact_late(self._recorder.late, attributes)
        at = self._recorder.now()
        self.events.append(Event(name, attributes, at))
        if self._inner is not None:
            self._tell("add_event", name, {k: v for k, v in attributes.items() if self._recorder.shows(k)}, at)

    def failed(self, error_type: str, message: str = "") -> None:
        """Set the error status; `error_type` is low-cardinality, `message` is content."""
        if self.end_time:
            return
        self.put({semconv.ERROR_TYPE: error_type})
        if self._recorder.late is not None:
            message = self._recorder.late.text(message)
        self.status = Status(StatusCode.ERROR, message or None)
        if self._inner is not None:
            shown = message if self._recorder.shows(semconv.EXCEPTION_MESSAGE) else ""
            self._tell("set_status", Status(StatusCode.ERROR, shown or None))

    def _tell(self, method: str, *args: Any) -> None:
        try:
            getattr(self._inner, method)(*args)
        except Exception as error:  # noqa: BLE001 - the user's span and processors
            count_drop("the tracer provider failed", repr(error))

    # --- opentelemetry.trace.Span: for user code --------------------------------------------------------------------

    def get_span_context(self) -> SpanContext:
        """Return the ids of the span."""
        return self.context

    def is_recording(self) -> bool:
        """Tell whether the span is still open."""
        return not self.end_time

    def set_attribute(self, key: str, value: Any) -> None:
        """Set one attribute."""
        self.set_attributes({key: value})

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set some attributes; their values pass the run's boundary."""
        self.put(self._recorder.clean(attributes))

    def add_event(self, name: str, attributes: Mapping[str, Any] | None = None, timestamp: int | None = None) -> None:
        """Add an event; its values pass the run's boundary."""
        self.happened(self._recorder.clean(str(name)), self._recorder.clean(attributes or {}))
        if timestamp is not None and self.events:
            self.events[-1].timestamp = timestamp

    def add_link(self, context: SpanContext, attributes: Mapping[str, Any] | None = None) -> None:
        """Link another span."""
        if self.end_time:
            return
        attributes = self._recorder.clean(attributes or {})
        self.links.append(trace.Link(context, attributes))
        if self._inner is not None:
            self._tell("add_link", context, attributes)

    def update_name(self, name: str) -> None:
        """Do nothing: the names of looplet's spans are fixed."""

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set an error status; looplet decides what success is."""
        code = status.status_code if isinstance(status, Status) else status
        words = status.description if isinstance(status, Status) else description
        if code is StatusCode.ERROR:
            self.failed(semconv.OTHER_ERROR, self._recorder.boundary.text(words or ""))

    def record_exception(
        self,
        exception: BaseException,
        attributes: Mapping[str, Any] | None = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Add an exception event, without the stack trace."""
        self.add_event(semconv.EVENT_EXCEPTION, {**describe(exception), **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        """End the span; the first time counts."""
        ended = max(end_time or self._recorder.now(), self.start_time)
        if self._recorder.open.pop(self.span_id, None) is None:  # atomic: two threads may end a stuck call
            return
        self.end_time = ended
        self._recorder.ended(self)  # at once: a Ctrl-C in between would lose the span
        if self._inner is not None:
            self._tell("end", ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.end()


def describe(error: BaseException) -> dict[str, Any]:
    """Return the attributes of an exception event."""
    return {semconv.EXCEPTION_TYPE: error_name(error), semconv.EXCEPTION_MESSAGE: words_of(error)}


def error_name(error: BaseException) -> str:
    """Return the low-cardinality name of an exception: its class, qualified unless it is a builtin."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def new_id() -> str:
    """Return 32 random hex digits."""
    return f"{_random.getrandbits(128):032x}"

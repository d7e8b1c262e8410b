"""`RecordedSpan`: looplet's own span.

It implements the OpenTelemetry API's `Span`, so that user code inside a tool finds a proper current span, and has what
the SDK's `ReadableSpan` has, so that SDK exporters accept it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode

from looplet.errors import words_of
from looplet.telemetry import semconv
from looplet.telemetry.drops import count_drop
from looplet.telemetry.redaction import redact_late

if TYPE_CHECKING:
    from looplet.telemetry.recorder import Recorder

UNSET: Final = Status()


class Event:
    """A named moment of a span."""

    __slots__ = ("attributes", "name", "timestamp")

    dropped_attributes = 0

    def __init__(self, name: str, attributes: Mapping[str, Any], timestamp: int) -> None:
        self.name = name
        self.attributes = attributes
        self.timestamp = timestamp


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
        self.links: Sequence[Any] = ()
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
        context = self._as_context
        if context is None:
            context = self._as_context = self._recorder.context_of(self)
        return context

    def put(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes that have passed the boundary already."""
        if self.end_time:
            return
        if self._recorder.late is not None:
            attributes = redact_late(self._recorder.late, attributes)
        self.attributes.update(attributes)
        if self._inner is not None:
            self._forward("set_attributes", {k: v for k, v in attributes.items() if self._recorder.shows(k)})

    def happened(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Add an event whose attributes have passed the boundary already."""
        if self.end_time:
            return
        if self._recorder.late is not None:
            attributes = redact_late(self._recorder.late, attributes)
        at = self._recorder.now()
        self.events.append(Event(name, attributes, at))
        if self._inner is not None:
            self._forward("add_event", name, {k: v for k, v in attributes.items() if self._recorder.shows(k)}, at)

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
            self._forward("set_status", Status(StatusCode.ERROR, shown or None))

    def _forward(self, method: str, *args: Any) -> None:
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
        self.links = [*self.links, trace.Link(context, attributes)]
        if self._inner is not None:
            self._forward("add_link", context, attributes)

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
        recorder = self._recorder
        ended = max(end_time or recorder.now(), self.start_time)
        if recorder.open.pop(self.span_id, None) is None:  # atomic: two threads may end a stuck call
            return
        self.end_time = ended
        self._as_context = None  # which holds the span: no need to wait for the collector
        try:
            recorder.ended(self)  # at once: a Ctrl-C in between would lose the span
        finally:
            if self._inner is not None:
                self._forward("end", ended)

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

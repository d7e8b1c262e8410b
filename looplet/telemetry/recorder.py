"""The recorder of a run: it starts the spans and hands the ended ones to the outlets.

A span may feed the run's *sinks* (files: everything) and the *user's tracer* (a real span held inside: ids, flags,
and everything except content unless capture is on).  So the local file depends neither on the user's sampler nor on
his attribute limits, `OTEL_SDK_DISABLED` or shutdown order, and content never reaches a network exporter by accident.

Nothing in here may raise into a run: what the user's tracer raises is counted and logged once.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter_ns, time_ns
from typing import Any, Final, Protocol

from opentelemetry import trace
from opentelemetry.context import Context, set_value
from opentelemetry.trace import Span, SpanContext, SpanKind, TraceFlags, set_span_in_context

from looplet.boundary import Boundary
from looplet.ledger import Ledger
from looplet.telemetry import semconv
from looplet.telemetry.drops import count_drop, drops
from looplet.telemetry.recorded_span import Event, RecordedSpan, describe, error_name
from looplet.telemetry.redaction import redact_late

__all__ = [
    "RUN_KEY", "Event", "RecordedSpan", "Recorder", "Resource", "Scope", "Sink", "count_drop", "describe", "drops",
    "error_name", "new_id",
]  # fmt: skip

RUN_KEY: Final = "looplet.run"
"""the OpenTelemetry context key under which code inside a run finds its recorder"""

_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)  # two processes must not draw the same ids


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
        self.file: Path | None = None
        """where the segments before this one are, of a run that goes on after a pause"""
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
        self.clock = time_ns() - perf_counter_ns()
        """nanoseconds between `perf_counter_ns` and the epoch"""

    def now(self) -> int:
        """Return nanoseconds since the epoch; never goes backwards within a run."""
        return self.clock + perf_counter_ns()

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
        started = self.clock + perf_counter_ns()
        inner = None
        if self.tracer is not None and not self.closed:
            inner = self._start_inner(name, parent, kind, merged, links, started)
        span = RecordedSpan(name, kind, merged, started, inner, self)
        if parent is None or inner is not None:
            self._place(span, parent, inner)
        else:
            span.span_id, span.parent_id = _random.getrandbits(64) or 1, parent.span_id
        if links:
            span.links = links
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

    @property
    def is_decided(self) -> bool:
        """Tell whether a sampler, here or above, has decided about the run's trace."""
        return self.tracer is not None or trace.get_current_span(self.base).get_span_context().is_valid

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


def new_id() -> str:
    """Return 32 random hex digits."""
    return f"{_random.getrandbits(128):032x}"

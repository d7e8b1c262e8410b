"""The router: one processor per tracer provider brings the user's spans inside a run into the run's file.

It routes by a key in the OpenTelemetry context (`recorder.RUN_KEY`), not by trace id: two runs may share a trace.  It
is installed once per provider and stays, because processors cannot be removed; without a run it costs one look-up.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any, Final

from opentelemetry.context import Context, get_value
from opentelemetry.trace import Link, SpanContext, Status

from looplet.boundary import Boundary
from looplet.telemetry import semconv
from looplet.telemetry.recorder import RUN_KEY, Event, Recorder, count_drop

_routed: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


_open: dict[tuple[int, int], Recorder] = {}
"""trace id and span id → the run that a span of the application began in"""
_ended: OrderedDict[tuple[int, int], str] = OrderedDict()
"""run ids of the last such spans that ended"""
MAX_ENDED: Final = 8192
"""more than batching processors hold back"""


class Router:
    """A span processor: remembers which run a span was started in, hands it over when it ends."""

    def on_start(self, span: Any, parent_context: Context | None = None) -> None:
        """Note the run that the span begins in; looplet's own spans reach the sinks by themselves."""
        recorder = get_value(RUN_KEY, parent_context)
        if not isinstance(recorder, Recorder) or not recorder.sinks:
            return
        if getattr(span.instrumentation_scope, "name", "") != semconv.SCOPE:
            _open[span.context.trace_id, span.context.span_id] = recorder

    def on_end(self, span: Any) -> None:
        """Give the span to its run; what it says passes the run's boundary on the way."""
        context = span.context
        if context is None:
            return
        key = (context.trace_id, context.span_id)
        if (recorder := _open.get(key)) is not None:
            _ended[key] = recorder.run_id
            del _open[key]
            while len(_ended) > MAX_ENDED:
                _ended.popitem(last=False)
            try:
                copy = copy_redacted(span, recorder.boundary)
                if recorder.late is not None:
                    copy = copy_redacted(copy, recorder.late)
                copy.attributes[semconv.RUN_ID] = recorder.run_id
                recorder.ended(copy)
            except Exception as error:  # noqa: BLE001 - somebody else's span
                count_drop("a span of the application could not be recorded", repr(error))

    def _on_ending(self, span: Any) -> None:
        """Do nothing."""

    def shutdown(self) -> None:
        """Do nothing: spans that are still open may end yet."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Return True: nothing is held back."""
        return True


def run_of(context: SpanContext) -> str | None:
    """Return the id of the run that a span of the application belongs to, None outside of one."""
    key = (context.trace_id, context.span_id)
    recorder = _open.get(key)
    return recorder.run_id if recorder is not None else _ended.get(key)


class ForeignSpan:
    """A copy of somebody else's ended span: plain values, redacted."""

    __slots__ = (
        "attributes", "context", "dropped_attributes", "dropped_events", "dropped_links", "end_time", "events",
        "instrumentation_scope", "kind", "links", "name", "parent", "resource", "start_time", "status",
    )  # fmt: skip

    def __init__(self, span: Any) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(span, name, None))


def copy_redacted(span: Any, boundary: Boundary) -> Any:
    """Return a copy of a span whose strings have passed `boundary`, without stack traces."""
    copy: Any = ForeignSpan(span)
    copy.name = boundary.text(span.name)
    copy.attributes = boundary.clean(dict(span.attributes or {}))
    copy.links = [Link(link.context, boundary.clean(dict(link.attributes or {}))) for link in span.links or ()]
    copy.events = [_copy_event(event, boundary) for event in span.events or ()]
    if (status := span.status) is not None and status.description:
        copy.status = Status(status.status_code, boundary.text(status.description))
    return copy


def _copy_event(event: Any, boundary: Boundary) -> Event:
    attributes = {k: v for k, v in (event.attributes or {}).items() if k != semconv.EXCEPTION_STACKTRACE}
    return Event(boundary.text(event.name), boundary.clean(attributes), event.timestamp)


def route(provider: Any) -> None:
    """Install the router on a provider that takes processors, once."""
    add = getattr(provider, "add_span_processor", None)
    if not callable(add):
        return
    with _lock:
        try:
            if provider in _routed:
                return
            _routed.add(provider)
            add(Router())
        except Exception as error:  # noqa: BLE001 - somebody else's provider
            count_drop("the router could not be installed", repr(error))

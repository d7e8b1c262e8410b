"""Spans out of OTLP JSON, whoever wrote it.

Besides the lines that `looplet.telemetry.otlp` writes, this reads what is legal or common elsewhere: the answers of
Jaeger's API v3, ids in base64 or upper case, enums by name, 64-bit integers as numbers, keys of OTLP before 0.19;
unknown fields are ignored and missing ones empty.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from looplet.errors import TraceError

_KINDS: Final = {
    "SPAN_KIND_INTERNAL": 1,
    "SPAN_KIND_SERVER": 2,
    "SPAN_KIND_CLIENT": 3,
    "SPAN_KIND_PRODUCER": 4,
    "SPAN_KIND_CONSUMER": 5,
}
_STATUS_CODES: Final = {"STATUS_CODE_OK": 1, "STATUS_CODE_ERROR": 2}
MAX_DEPTH: Final = 100
"""of values in values: protobuf's readers go no deeper"""
_INT64: Final = 1 << 63
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_URL_SAFE: Final = str.maketrans("-_", "+/")

_decode_json = msgspec.json.Decoder().decode


@dataclass(slots=True)
class EventRecord:
    """Something that happened during a span."""

    name: str
    time_ns: int
    attributes: dict[str, Any]


@dataclass(slots=True)
class LinkRecord:
    """A span that another one points to; ids as in `SpanRecord`."""

    trace_id: str
    span_id: str
    attributes: dict[str, Any]


@dataclass(slots=True)
class SpanRecord:
    """A span as a file tells it; what the file leaves out is empty, and times are nanoseconds since 1970."""

    name: str
    trace_id: str
    """32 lower-case hex digits"""
    span_id: str
    """16 lower-case hex digits"""
    parent_id: str
    """like `span_id`; empty for a root"""
    kind: int
    """as OTLP counts: 1 internal, 2 server, 3 client, 4 producer, 5 consumer"""
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[EventRecord]
    links: list[LinkRecord]
    status_code: int
    """0 unset, 1 ok, 2 error"""
    status_message: str
    resource: dict[str, Any]
    """shared by the spans of one resource: not to be changed"""
    scope: str
    scope_version: str
    schema_url: str
    """of the scope, or else of the resource"""
    trace_state: str
    dropped_attributes: int
    dropped_events: int
    dropped_links: int
    line: int
    """where in the file it began; from 1, 0 for none"""


def decode_line(data: bytes, *, line: int = 0) -> list[SpanRecord]:
    """Return the spans in one line, or in any JSON text that `spans_in` knows.

    Raises `TraceError` for anything else; `line` goes into the records and the error.
    """
    try:
        spans = spans_in(parse_json(data), line=line)
    except ValueError as error:
        raise TraceError(f"this is not an OTLP trace: {error}", line=line) from error
    if spans is None:
        raise TraceError("this JSON holds no spans: a trace has the key 'resourceSpans'", line=line)
    return spans


def parse_json(data: bytes) -> Any:
    """Return what the JSON text `data` says, with U+FFFD for lone surrogates.  Raises ValueError."""
    try:
        return _decode_json(data)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except ValueError as error:
        try:
            loose = json.dumps(json.loads(data.decode()), ensure_ascii=False)
        except (ValueError, RecursionError):
            raise ValueError(str(error)) from None
        return json.loads(_SURROGATE.sub("\ufffd", loose))


def spans_in(document: Any, *, line: int = 0) -> list[SpanRecord] | None:
    """Return the spans of a `TracesData`, of an answer of Jaeger's API v3, or of a list of these; None for other JSON.

    Raises ValueError where a trace is not built like one.
    """
    try:
        traces = list(_traces_in(document))
        return [record for trace in traces for record in _records(trace, line)] if traces else None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a part of it is not built as OTLP says ({error})") from error


def _traces_in(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, list):
        for item in document:
            yield from _traces_in(item)
    elif isinstance(document, dict):
        if "resourceSpans" in document:
            yield document
        elif "result" in document:
            yield from _traces_in(document["result"])


def _records(trace: dict[str, Any], line: int) -> Iterator[SpanRecord]:
    for resource_spans in trace["resourceSpans"] or ():
        resource = _mapping((resource_spans.get("resource") or {}).get("attributes"))
        for group in resource_spans.get("scopeSpans") or resource_spans.get("instrumentationLibrarySpans") or ():
            scope = group.get("scope") or group.get("instrumentationLibrary") or {}
            names = _text(scope.get("name")), _text(scope.get("version"))
            url = _text(group.get("schemaUrl") or resource_spans.get("schemaUrl"))
            for span in group.get("spans") or ():
                yield _record(span, resource, (*names, url), line)


def _record(span: dict[str, Any], resource: dict[str, Any], scope: tuple[str, str, str], line: int) -> SpanRecord:
    get = span.get
    events, links, status = get("events"), get("links"), get("status") or {}
    parent_id = _hex(get("parentSpanId"), 8)
    return SpanRecord(
        _text(get("name")),
        _hex(get("traceId"), 16),
        _hex(get("spanId"), 8),
        "" if parent_id == "0000000000000000" else parent_id,
        _enum(get("kind"), _KINDS),
        _time(get("startTimeUnixNano")),
        _time(get("endTimeUnixNano")),
        _mapping(get("attributes")),
        [_event(event) for event in events] if events else [],
        [_link(link) for link in links] if links else [],
        _enum(status.get("code"), _STATUS_CODES),
        _text(status.get("message")),
        resource,
        *scope,
        _text(get("traceState")),
        _int(get("droppedAttributesCount")),
        _int(get("droppedEventsCount")),
        _int(get("droppedLinksCount")),
        line,
    )


def _event(event: dict[str, Any]) -> EventRecord:
    return EventRecord(_text(event.get("name")), _time(event.get("timeUnixNano")), _mapping(event.get("attributes")))


def _link(link: dict[str, Any]) -> LinkRecord:
    return LinkRecord(_hex(link.get("traceId"), 16), _hex(link.get("spanId"), 8), _mapping(link.get("attributes")))


def _hex(value: str | None, size: int) -> str:
    """Return an id of `size` bytes as lower-case hex; protobuf's own JSON has it in base64."""
    if not value:
        return ""
    if len(value) == (size + 2) // 3 * 4:
        try:
            return b64decode(value.translate(_URL_SAFE), validate=True).hex()
        except ValueError:
            pass
    return value.lower()


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"text is wanted, not {value!r:.60}")
    return value or ""


def _time(value: Any) -> int:
    """Return nanoseconds since 1970, 0 for what is no number; OTLP has 64 bits for them."""
    try:
        time_ns = int(value or 0)
    except (TypeError, ValueError, OverflowError):
        return 0
    if not 0 <= time_ns < 1 << 64:
        raise TypeError(f"a time is wanted, not {value!r:.60}")
    return time_ns


def _enum(value: Any, names: Mapping[str, int]) -> int:
    return value if type(value) is int else names[value] if value in names else _int(value)


def _int(value: Any) -> int:
    number = _int_value(value) if value else 0
    return number if isinstance(number, int) else 0


def _mapping(pairs: Any, depth: int = 0) -> dict[str, Any]:
    return {_text(pair.get("key")): _value(pair.get("value"), depth) for pair in pairs} if pairs else {}


def _value(any_value: dict[str, Any] | None, depth: int) -> Any:
    """Return the Python value of an AnyValue; None for an empty one and for kinds that are not known."""
    if any_value:
        for kind, value in any_value.items():
            if kind == "stringValue":
                return None if value is None else _text(value)
            if kind in _DECODERS and value is not None:
                return _DECODERS[kind](value)
            if kind in _CONTAINERS and value is not None:
                if depth >= MAX_DEPTH:
                    raise ValueError("it is nested too deeply")
                return _CONTAINERS[kind](value, depth + 1)
    return None


def _int_value(value: Any) -> Any:
    """Return a whole number of 64 bits; what is none stays as it is written."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return value
    return number if -_INT64 <= number < _INT64 else str(value)


def _double_value(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _bytes_value(value: Any) -> Any:
    try:
        return b64decode(value.translate(_URL_SAFE), validate=True)
    except ValueError:
        return value


def _array_value(value: dict[str, Any], depth: int) -> list[Any]:
    return [_value(item, depth) for item in value.get("values") or ()]


def _kvlist_value(value: dict[str, Any], depth: int) -> dict[str, Any]:
    return _mapping(value.get("values"), depth)


_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "boolValue": lambda value: value in (True, "true"),
    "intValue": _int_value,
    "doubleValue": _double_value,
    "bytesValue": _bytes_value,
}
_CONTAINERS: Final[dict[str, Callable[[Any, int], Any]]] = {"arrayValue": _array_value, "kvlistValue": _kvlist_value}

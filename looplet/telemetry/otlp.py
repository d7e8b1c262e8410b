"""OTLP JSON: spans to lines, as the OTLP file-exporter specification has them; and back, in `otlp_decode`.

One line is one `TracesData`: ids in hex, enums as integers, 64-bit integers as decimal strings.  Encoding takes
anything shaped like the OpenTelemetry SDK's `ReadableSpan` and never fails on a value.  For files see `otlp_file`.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from math import isfinite
from typing import Any, Final

import msgspec
from opentelemetry.trace import SpanKind, StatusCode

from looplet.telemetry.otlp_decode import EventRecord, LinkRecord, SpanRecord, decode_line
from looplet.telemetry.recorded_span import UNSET

__all__ = ["EventRecord", "LinkRecord", "SpanRecord", "decode_line", "encode_spans"]

_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1  # of an intValue
_MAX_DEPTH: Final = 24  # of nested values; protobuf readers give up at 100 messages, a nested mapping takes three
_MAX_FRAMES: Final = 64

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_LOCAL, _REMOTE = 256, 768  # SpanFlags: whether the parent is remote is known (256), and it is (512)
_INTERNAL, _UNSET = SpanKind.INTERNAL, StatusCode.UNSET  # looking up a member of an enum class takes a while

_json = msgspec.json.Encoder().encode


class _Attribute(msgspec.Struct, gc=False):
    key: str
    value: Any


class _String(msgspec.Struct, rename="camel", gc=False):
    string_value: str


class _Int(msgspec.Struct, rename="camel", gc=False):
    int_value: str


class _Span(msgspec.Struct, rename="camel", omit_defaults=True, gc=False):
    trace_id: str
    span_id: str
    flags: int
    name: str
    kind: int
    start_time_unix_nano: str
    end_time_unix_nano: str
    parent_span_id: str = ""
    attributes: list[_Attribute] = []
    events: Sequence[_Event] = ()
    links: Sequence[_Link] = ()
    status: _Status | None = None


class _ForeignSpan(_Span, gc=False):
    trace_state: str = ""
    dropped_attributes_count: int = 0
    dropped_events_count: int = 0
    dropped_links_count: int = 0


class _Event(msgspec.Struct, rename="camel", omit_defaults=True, gc=False):
    time_unix_nano: str
    name: str
    attributes: list[_Attribute] = []
    dropped_attributes_count: int = 0


class _Link(msgspec.Struct, rename="camel", omit_defaults=True, gc=False):
    trace_id: str
    span_id: str
    flags: int
    attributes: list[_Attribute] = []
    dropped_attributes_count: int = 0


class _Status(msgspec.Struct, omit_defaults=True, gc=False):
    code: int
    message: str = ""


def encode_spans(spans: Iterable[Any], *, on_error: Callable[[Any, Exception], None] | None = None) -> bytes:
    """Return all `spans` as one line for each pair of resource and scope; as a rule that is one line.

    A span is anything with the attributes of the SDK's `ReadableSpan`.  One that has not even those is left out and
    handed to `on_error` with what was raised.  Resources and scopes are encoded once each: they must not change.
    """
    lines: dict[_Frame, list[_Span]] = {}
    frame: _Frame | None = None
    for span in spans:
        try:
            made = _span(span)
            if frame is None or span.resource is not frame.resource or span.instrumentation_scope is not frame.scope:
                frame = _frame(span.resource, span.instrumentation_scope)
                line = lines.setdefault(frame, [])
            line.append(made)
        except Exception as error:  # noqa: BLE001 - spans are foreign objects; one must not cost us the others
            if on_error is not None:
                on_error(span, error)
    return b"".join([part for frame, line in lines.items() for part in (frame.head, _encoded(line), frame.tail)])


class _Frame:
    """The line around the spans of one resource and scope."""

    __slots__ = ("head", "resource", "scope", "tail")

    def __init__(self, resource: Any, scope: Any) -> None:
        self.resource = resource
        self.scope = scope
        about = {"name": getattr(scope, "name", None), "version": getattr(scope, "version", None)}
        spans = {"scope": _fields(scope, about), "spans": [], **_schema(scope)}
        around = _encoded({"resource": _fields(resource, {}), "scopeSpans": [spans], **_schema(resource)})
        head, _, tail = around.partition(b'"spans":[]')  # quotes inside strings are escaped: it is there once
        self.head = b'{"resourceSpans":[%b"spans":' % head
        self.tail = b"%b]}\n" % tail


_frames: dict[tuple[int, int], _Frame] = {}  # by identity, and keeping both alive: hashes of SDK resources are slow


def _frame(resource: Any, scope: Any) -> _Frame:
    key = id(resource), id(scope)
    frame = _frames.get(key)
    if frame is None:
        if len(_frames) >= _MAX_FRAMES:
            _frames.clear()
        frame = _frames[key] = _Frame(resource, scope)
    return frame


def _fields(owner: Any, texts: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: _text(text) for name, text in texts.items() if text}
    if attributes := getattr(owner, "attributes", None):
        fields["attributes"] = _attributes(attributes)
    return fields


def _schema(owner: Any) -> dict[str, str]:
    url = getattr(owner, "schema_url", None)
    return {"schemaUrl": _text(url)} if url else {}


def _span(span: Any) -> _Span:
    """Return a span as it is encoded; those of looplet's own are told sooner than others."""
    plain = getattr(span, "plain_ids", None)
    if plain is None:
        return _foreign_span(span)
    trace_id, span_id, parent_id = plain
    made = _Span(
        _trace_id(trace_id),
        f"{span_id:016x}",
        _LOCAL,
        span.name,
        1 if span.kind is _INTERNAL else span.kind.value + 1,
        str(span.start_time),
        str(span.end_time),
        f"{parent_id:016x}",
        _attributes(span.attributes),
    )
    if span.events or span.links or span.status is not UNSET:
        _add_rest(span, made)
    return made


def _foreign_span(span: Any) -> _Span:
    """Return a span of somebody else's, or one of looplet's whose ids are not all there is to say about its place."""
    own, parent = span.context, span.parent
    made = _ForeignSpan(
        _trace_id(own.trace_id),
        f"{own.span_id:016x}",
        _REMOTE if parent is not None and parent.is_remote else _LOCAL,
        _text(span.name),
        span.kind.value + 1,
        str(span.start_time or 0),
        str(span.end_time or 0),
        "" if parent is None else f"{parent.span_id:016x}",
        _attributes(span.attributes or {}),
        trace_state=_text(own.trace_state.to_header()) if own.trace_state else "",
        dropped_attributes_count=getattr(span, "dropped_attributes", 0),
        dropped_events_count=getattr(span, "dropped_events", 0),
        dropped_links_count=getattr(span, "dropped_links", 0),
    )
    _add_rest(span, made)
    return made


def _add_rest(span: Any, made: _Span) -> None:
    """Add what few spans have."""
    if span.events:
        made.events = [_event(event) for event in span.events]
    if span.links:
        made.links = [_link(link) for link in span.links]
    if span.status is not None and span.status.status_code is not _UNSET:
        made.status = _Status(span.status.status_code.value, _text(span.status.description or ""))


@lru_cache(maxsize=64)
def _trace_id(trace_id: int) -> str:
    return trace_id.to_bytes(16, "big").hex()


def _event(event: Any) -> _Event:
    attributes = _attributes(event.attributes or {})
    return _Event(str(event.timestamp or 0), _text(event.name), attributes, getattr(event, "dropped_attributes", 0))


def _link(link: Any) -> _Link:
    context = link.context
    flags = _REMOTE if context.is_remote else _LOCAL
    attributes = _attributes(link.attributes or {})
    dropped = getattr(link, "dropped_attributes", 0)
    return _Link(_trace_id(context.trace_id), f"{context.span_id:016x}", flags, attributes, dropped)


def _attributes(attributes: Mapping[str, Any]) -> list[_Attribute]:
    try:
        return [_Attribute(key, _SIMPLE.get(type(value), _value)(value)) for key, value in attributes.items()]
    except RuntimeError:  # another thread just added one
        return [_Attribute(key, _value(value)) for key, value in list(attributes.items())]


def _value(value: Any, path: tuple[int, ...] = ()) -> Any:
    """Return an AnyValue, such as `{"stringValue": "x"}`; `{}` for None.

    `path` holds the ids of the containers around the value.  Never raises.
    """
    try:
        return _known(value, path)
    except Exception:  # noqa: BLE001 - the value is foreign, and so is its __str__
        return _String(f"<unprintable {type(value).__name__}>")


def _known(value: Any, path: tuple[int, ...]) -> Any:
    if value is None:
        return {}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, float):
        return {"doubleValue": float(value) if isfinite(value) else _not_finite(value)}
    if isinstance(value, str):
        return _String(_text(value))
    if isinstance(value, int) and _MIN_INT <= value <= _MAX_INT:
        return _Int(str(int(value)))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytesValue": b64encode(value).decode()}
    if isinstance(value, (list, tuple)):
        return _array(value, path)
    if isinstance(value, Mapping):
        return _kvlist(value, path)
    return _String(_text(value))


def _array(value: Sequence[Any], path: tuple[int, ...] = ()) -> Any:
    if id(value) in path or len(path) >= _MAX_DEPTH:
        return _String(_text(value))
    path = (*path, id(value))
    items = [_value(item, path) for item in value]
    return {"arrayValue": {"values": items} if items else {}}


def _kvlist(value: Mapping[Any, Any], path: tuple[int, ...]) -> Any:
    if id(value) in path or len(path) >= _MAX_DEPTH:
        return _String(_text(value))
    path = (*path, id(value))
    pairs = [_Attribute(_text(key), _value(item, path)) for key, item in value.items()]
    return {"kvlistValue": {"values": pairs} if pairs else {}}


def _whole(value: int) -> Any:
    return _Int(str(value)) if _MIN_INT <= value <= _MAX_INT else _value(value)


_SIMPLE: Final[dict[type, Callable[[Any], Any]]] = {str: _String, int: _whole, list: _array}
"""what makes an AnyValue of the most frequent types, sooner than `_value` does"""


def _not_finite(value: float) -> str:
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _text(value: object) -> str:
    if type(value) is str:
        return value
    return str.__str__(value if isinstance(value, str) else str(value))


def _encoded(value: Any) -> bytes:
    """Return JSON, with U+FFFD for lone surrogates, which UTF-8 cannot hold."""
    try:
        return _json(value)
    except UnicodeEncodeError:
        return _json(_without_surrogates(msgspec.to_builtins(value)))


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value

"""OTLP JSON: spans to lines, as the OTLP file-exporter specification has them; and back, in `otlp_decode`.

One line is one `TracesData`: ids in hex, enums as integers, 64-bit integers as decimal strings.  Encoding takes
anything shaped like the OpenTelemetry SDK's `ReadableSpan` and never fails on a value.  For files see `otlp_file`.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, Final

import msgspec
from opentelemetry.trace import SpanKind, StatusCode

from looplet.telemetry.otlp_decode import EventRecord, LinkRecord, SpanRecord, decode_line

__all__ = ["EventRecord", "LinkRecord", "SpanRecord", "decode_line", "encode_spans"]

# Spans are joined from bytes: the start of every attribute is cached per key, values go through msgspec one by one.
# Measured: 0.75 of the time that dicts handed to msgspec as a whole take (spans of 8 attributes, 2 to 8 in a line).
# Joining str with the quoting of the json module takes 1.2 times as long for short values, 5 times for long ones.

_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1  # of an intValue
_MAX_DEPTH: Final = 24  # of nested values; protobuf readers give up at 100 messages, a nested mapping takes three
_MAX_KEYS: Final = 4096
_MAX_FRAMES: Final = 64

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_SPAN: Final = b'{%b,"name":%b,"kind":%d,"startTimeUnixNano":"%b","endTimeUnixNano":"%b"'
_LOCAL, _REMOTE = 256, 768  # SpanFlags: whether the parent is remote is known (256), and it is (512)
_PLAIN: Final = b'"traceId":"%%b","spanId":"%%016x","parentSpanId":"%%016x","flags":%d' % _LOCAL

_INTERNAL, _UNSET = SpanKind.INTERNAL, StatusCode.UNSET  # looking up a member of an enum class takes a while

_json = msgspec.json.Encoder().encode


class _Keys(dict[str, bytes]):
    """Attribute key → `}},{"key":"...","value":{` and the value's own start: closes one attribute, opens the next."""

    def __init__(self, opening: bytes) -> None:
        super().__init__()
        self._opening = opening

    def __missing__(self, key: str) -> bytes:
        if len(self) >= _MAX_KEYS:
            self.clear()
        start = self[key] = b'}},{"key":%b,"value":{%b' % (_text(key), self._opening)
        return start


_STRING, _DOUBLE = _Keys(b'"stringValue":'), _Keys(b'"doubleValue":')
_INT, _ANY = _Keys(b'"intValue":"'), _Keys(b"")


def encode_spans(spans: Iterable[Any], *, on_error: Callable[[Any, Exception], None] | None = None) -> bytes:
    """Return all `spans` as one line for each pair of resource and scope; as a rule that is one line.

    A span is anything with the attributes of the SDK's `ReadableSpan`.  One that has not even those is left out and
    handed to `on_error` with what was raised.  Resources and scopes are encoded once each: they must not change.
    """
    lines: dict[_Frame, list[bytes]] = {}
    resource = scope = line = None
    for span in spans:
        try:
            encoded = _span(span)
            if line is None or span.resource is not resource or span.instrumentation_scope is not scope:
                frame = _frame(span.resource, span.instrumentation_scope)
                resource, scope = frame.resource, frame.scope
                line = lines.setdefault(frame, [frame.head])
            line += encoded
        except Exception as error:  # noqa: BLE001 - spans are foreign objects; one must not cost us the others
            if on_error is not None:
                on_error(span, error)
    for frame, line in lines.items():
        line[-1] = frame.tail  # which also ends the last span
    return b"".join([b"".join(line) for line in lines.values()])


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """The line around the spans of one resource and scope."""

    resource: Any
    scope: Any
    head: bytes
    tail: bytes


_frames: dict[tuple[int, int], _Frame] = {}  # by identity, and keeping both alive: hashes of SDK resources are slow


def _frame(resource: Any, scope: Any) -> _Frame:
    key = id(resource), id(scope)
    frame = _frames.get(key)
    if frame is None:
        if len(_frames) >= _MAX_FRAMES:
            _frames.clear()
        around = b'{"resourceSpans":[{"resource":{%b},"scopeSpans":[{"scope":{%b},"spans":['
        head = around % (_resource(resource), _scope(scope))
        tail = b"}]%b}]%b}]}\n" % (_schema(scope), _schema(resource))
        frame = _frames[key] = _Frame(resource, scope, head, tail)
    return frame


def _resource(resource: Any) -> bytes:
    fields: list[bytes] = []
    _add_attributes(getattr(resource, "attributes", None), fields)
    return b"".join(fields)[1:]


def _scope(scope: Any) -> bytes:
    fields = [_field(b"name", getattr(scope, "name", None)), _field(b"version", getattr(scope, "version", None))]
    _add_attributes(getattr(scope, "attributes", None), fields)
    return b"".join(fields)[1:]


def _schema(owner: Any) -> bytes:
    return _field(b"schemaUrl", getattr(owner, "schema_url", None))


def _span(span: Any) -> list[bytes]:
    """Return the span as fragments; the last is `},`."""
    plain = getattr(span, "plain_ids", None)
    out = [
        _SPAN
        % (
            _ids(span.context, span.parent) if plain is None else _PLAIN % (_trace_id(plain[0]), plain[1], plain[2]),
            _name(span.name),
            1 if span.kind is _INTERNAL else span.kind.value + 1,
            _json(span.start_time or 0),
            _json(span.end_time or 0),
        )
    ]
    _add_attributes(span.attributes, out)
    if span.events:
        _add_all(_add_event, span.events, b',"events":[', out)
    if span.links:
        _add_all(_add_link, span.links, b',"links":[', out)
    if span.status is not None and span.status.status_code is not _UNSET:
        out.append(_status(span.status))
    dropped = (
        getattr(span, "dropped_attributes", 0),
        getattr(span, "dropped_events", 0),
        getattr(span, "dropped_links", 0),
    )
    if dropped != (0, 0, 0):
        out.append(_dropped(*dropped))
    out.append(b"},")
    return out


@lru_cache(maxsize=64)
def _trace_id(trace_id: int) -> bytes:
    return b"%032x" % trace_id


@lru_cache(maxsize=_MAX_KEYS)
def _name(name: Any) -> bytes:
    return _text(name)


def _ids(context: Any, parent: Any) -> bytes:
    above = b"" if parent is None else b',"parentSpanId":"%016x"' % parent.span_id
    flags = _REMOTE if parent is not None and parent.is_remote else _LOCAL
    state = _field(b"traceState", context.trace_state.to_header()) if context.trace_state else b""
    return b'"traceId":"%b","spanId":"%016x"%b,"flags":%d%b' % (
        _trace_id(context.trace_id), context.span_id, above, flags, state
    )  # fmt: skip


def _field(key: bytes, text: Any) -> bytes:
    return b',"%b":%b' % (key, _text(text)) if text else b""


def _count(key: bytes, count: int) -> bytes:
    return b',"%b":%d' % (key, count) if count else b""


def _dropped(attributes: int, events: int, links: int) -> bytes:
    counts = _count(b"droppedEventsCount", events) + _count(b"droppedLinksCount", links)
    return _count(b"droppedAttributesCount", attributes) + counts


def _status(status: Any) -> bytes:
    return b',"status":{"code":%d%b}' % (status.status_code.value, _field(b"message", status.description))


def _add_all(add: Callable[[Any, list[bytes]], None], things: Iterable[Any], opening: bytes, out: list[bytes]) -> None:
    for thing in things:
        out.append(opening)
        add(thing, out)
        opening = b","
    out.append(b"]")


def _add_event(event: Any, out: list[bytes]) -> None:
    out.append(b'{"timeUnixNano":"%d","name":%b' % (event.timestamp or 0, _text(event.name)))
    _add_attributes(event.attributes, out)
    out.append(_count(b"droppedAttributesCount", getattr(event, "dropped_attributes", 0)))
    out.append(b"}")


def _add_link(link: Any, out: list[bytes]) -> None:
    context = link.context
    flags = _REMOTE if context.is_remote else _LOCAL
    out.append(b'{"traceId":"%032x","spanId":"%016x","flags":%d' % (context.trace_id, context.span_id, flags))
    _add_attributes(link.attributes, out)
    out.append(_count(b"droppedAttributesCount", getattr(link, "dropped_attributes", 0)))
    out.append(b"}")


def _add_attributes(attributes: Mapping[str, Any] | None, out: list[bytes]) -> None:
    """Append `,"attributes":[{"key":...,"value":...},...]`, or nothing."""
    if not attributes:
        return
    out.append(b',"attributes":[')
    mark = len(out)
    try:
        _add_pairs(attributes, out.append)
    except Exception:  # noqa: BLE001 - a lone surrogate, or another thread just added one: take the careful way
        del out[mark:]
        for key, value in list(attributes.items()):
            out += (_ANY[key], _inside(value))
    out[mark] = out[mark][3:]  # nothing to close before the first
    out.append(b"}}]")


def _add_pairs(attributes: Mapping[str, Any], add: Callable[[bytes], None]) -> None:
    for key, value in attributes.items():
        kind = type(value)
        if kind is str:
            add(_STRING[key])
            add(_json(value))
        elif kind is int and _MIN_INT <= value <= _MAX_INT:
            add(_INT[key])
            add(_json(value))
            add(b'"')
        elif kind is float and isfinite(value):
            add(_DOUBLE[key])
            add(_json(value))
        else:
            add(_ANY[key])
            add(_inside(value))


def _inside(value: Any, path: tuple[int, ...] = ()) -> bytes:
    """Return the inside of an AnyValue, such as `"stringValue":"x"`; nothing for None.

    `path` holds the ids of the containers around the value.  Never raises.
    """
    try:
        return _known(value, path)
    except Exception:  # noqa: BLE001 - the value is foreign, and so is its __str__
        return b'"stringValue":' + _text(f"<unprintable {type(value).__name__}>")


def _known(value: Any, path: tuple[int, ...]) -> bytes:
    if value is None:
        return b""
    if isinstance(value, bool):
        return b'"boolValue":true' if value else b'"boolValue":false'
    if isinstance(value, float):
        return b'"doubleValue":' + _double(float(value))
    if isinstance(value, str):
        return b'"stringValue":' + _text(value)
    if isinstance(value, int) and _MIN_INT <= value <= _MAX_INT:
        return b'"intValue":"%d"' % value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return b'"bytesValue":"%b"' % b64encode(value)
    if isinstance(value, (list, tuple, Mapping)):
        return _container(value, path)
    return b'"stringValue":' + _text(value)


def _double(value: float) -> bytes:
    if isfinite(value):
        return _json(value)
    return b'"NaN"' if value != value else b'"Infinity"' if value > 0 else b'"-Infinity"'


def _container(value: Any, path: tuple[int, ...]) -> bytes:
    if id(value) in path or len(path) >= _MAX_DEPTH:
        return b'"stringValue":' + _text(value)
    path = (*path, id(value))
    if isinstance(value, Mapping):
        pairs = [b'{"key":%b,"value":{%b}}' % (_text(k), _inside(v, path)) for k, v in value.items()]
        return b'"kvlistValue":{"values":[%b]}' % b",".join(pairs) if pairs else b'"kvlistValue":{}'
    items = [b"{%b}" % _inside(item, path) for item in value]
    return b'"arrayValue":{"values":[%b]}' % b",".join(items) if items else b'"arrayValue":{}'


def _text(value: object) -> bytes:
    """Return `str(value)` as JSON, with U+FFFD for lone surrogates, which UTF-8 cannot hold."""
    if type(value) is not str:
        value = str.__str__(value if isinstance(value, str) else str(value))
    try:
        return _json(value)
    except UnicodeEncodeError:
        return _json(_SURROGATE.sub("\ufffd", value))

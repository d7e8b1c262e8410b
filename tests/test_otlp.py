"""OTLP JSON: our lines against the official encoder and parser, and files against damage."""

from __future__ import annotations

import base64
import enum
import errno
import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans as official_encode_spans
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from looplet.errors import TraceError
from looplet.telemetry.otlp import EventRecord, LinkRecord, decode_line, encode_spans
from looplet.telemetry.otlp_file import OtlpFile, Problem, read_file

TRACE, SPAN, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, 0x00F067AA0BA902B7
CONTEXT = SpanContext(TRACE, SPAN, is_remote=False, trace_flags=TraceFlags(1))
STATE = TraceState([("vendor", "a=b"), ("other", "x")])
REMOTE = SpanContext(TRACE, PARENT, is_remote=True, trace_flags=TraceFlags(1), trace_state=STATE)
NESTED = {
    "text": 'quotes " and \\ and \n and \u2028 and 😀',
    "empty": "",
    "yes": True,
    "no": False,
    "zero": 0,
    "big": 2**63 - 1,
    "small": -(2**63),
    "float": 0.1,
    "whole": 5.0,
    "tiny": 5e-324,
    "nan": float("nan"),
    "up": float("inf"),
    "down": float("-inf"),
    "none": None,
    "bytes": b"\x00\xff",
    "list": ["a", 1, None, [2.5, []], {}],
    "mapping": {"a": {"b": [True, {"c": b""}]}, "": None},
}


def span(**fields):
    """Return a finished span with `fields`, as the SDK would hand it to an exporter."""
    given = {"name": "chat m", "context": CONTEXT, "kind": SpanKind.CLIENT, "start_time": 1, "end_time": 2}
    return ReadableSpan(**{"resource": Resource({}), **given, **fields})


def bare(**fields):
    """Return the least that counts as a span: no resource, no scope, no status, no counts of what was dropped."""
    names = ("parent", "attributes", "events", "links", "status", "resource", "instrumentation_scope")
    given = {"name": "chat m", "context": CONTEXT, "kind": SpanKind.CLIENT, "start_time": 1, "end_time": 2}
    return SimpleNamespace(**{**dict.fromkeys(names), **given, **fields})


def sdk_spans():
    """Return six spans of two scopes, made and ended by the SDK: errors, events, links, a remote parent, overflow."""
    memory = InMemorySpanExporter()
    limits = SpanLimits(max_span_attributes=3, max_events=1, max_links=1, max_event_attributes=1)
    provider = TracerProvider(resource=Resource({"service.name": "s", "n": [1, 2]}, "https://r"), span_limits=limits)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    one = provider.get_tracer("one", "1.2", schema_url="https://s", attributes={"scope": True})
    two = provider.get_tracer("two")
    incoming = set_span_in_context(NonRecordingSpan(REMOTE))
    with one.start_as_current_span("root", context=incoming, kind=SpanKind.SERVER, attributes={"a": "é", "b": (1, 2)}):
        with two.start_as_current_span("child", links=[Link(REMOTE, {"l": 1}), Link(CONTEXT)]) as child:
            child.set_attributes({f"k{n}": n for n in range(9)})
            child.add_event("first")
            child.add_event("second", {"x": 1.5, "y": 2}, timestamp=77)
            child.set_status(Status(StatusCode.ERROR, "broken"))
        with pytest.raises(ZeroDivisionError), one.start_as_current_span("raises", kind=SpanKind.PRODUCER):
            _ = 1 / 0
        one.start_span("fine", kind=SpanKind.CONSUMER).end()
        with two.start_as_current_span("ok") as ok:
            ok.set_status(StatusCode.OK)
    one.start_span("root of its own", context=set_span_in_context(NonRecordingSpan(SpanContext(0, 0, False)))).end()
    provider.shutdown()
    return list(memory.get_finished_spans())


def flat(*documents):
    """Return every span of some `TracesData` beside its resource and scope, in an order of their own."""
    found = []
    for resource_spans in (r for document in documents for r in document["resourceSpans"]):
        around = [resource_spans.get("resource", {}), resource_spans.get("schemaUrl")]
        for scope_spans in resource_spans["scopeSpans"]:
            around_span = [*around, scope_spans.get("scope", {}), scope_spans.get("schemaUrl")]
            found += [[one["spanId"], *around_span, one] for one in scope_spans["spans"]]
    return sorted(found, key=lambda entry: entry[0])


def official(spans):
    """Return what the official encoder makes of `spans`, in OTLP's own JSON."""
    document = json_format.MessageToDict(official_encode_spans(spans), use_integers_for_enums=True)
    for *_, one in (entries := flat(document)):
        if not one.get("status"):
            one.pop("status", None)
    return flat(document) if not entries else flat(with_ids(document, lambda text: base64.b64decode(text).hex()))


def with_ids(node, convert):
    """Return the JSON value `node` with every id converted."""
    if isinstance(node, list):
        return [with_ids(item, convert) for item in node]
    if not isinstance(node, dict):
        return node
    ids = ("traceId", "spanId", "parentSpanId")
    return {k: convert(v) if k in ids and isinstance(v, str) else with_ids(v, convert) for k, v in node.items()}


def lines_of(data: bytes):
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data[:-1].split(b"\n")]


def attributes_after(attributes):
    (record,) = decode_line(encode_spans([bare(attributes=attributes)]))
    return record.attributes


# --- encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param(sdk_spans(), id="made by the SDK"),
        pytest.param([span(attributes=NESTED)], id="nested attributes"),
        pytest.param([span(events=[Event("e", NESTED, 5)], links=[Link(REMOTE, NESTED)])], id="nested elsewhere"),
        pytest.param([span(parent=REMOTE), span(context=REMOTE)], id="remote parent, trace state"),
        pytest.param([span(name="", parent=CONTEXT, attributes={})], id="local parent, nothing else"),
        pytest.param([span(instrumentation_scope=InstrumentationScope("n", "1", "u", {"k": [1]}))], id="scope"),
    ],
)
def test_a_line_says_what_the_official_encoder_says(spans):
    data = encode_spans(spans)
    ours = flat(*lines_of(data))
    for *_, one in ours:
        if not one["name"]:
            del one["name"]  # protobuf leaves out what is empty
        for pair in (p for a in _pair_lists(one) for p in a if p.get("key") == ""):
            del pair["key"]
    assert ours == official(spans)


def _pair_lists(node):
    if isinstance(node, dict):
        yield from (v for k, v in node.items() if k in ("attributes", "values") and isinstance(v, list))
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _pair_lists(item)


def test_the_official_parser_accepts_our_lines():
    spans = [*sdk_spans(), span(attributes=NESTED, parent=REMOTE), bare()]
    names = []
    for line in lines_of(encode_spans(spans)):
        as_protobuf = with_ids(line, lambda text: base64.b64encode(bytes.fromhex(text)).decode())
        parsed = json_format.Parse(json.dumps(as_protobuf), TracesData())
        names += [s.name for r in parsed.resource_spans for group in r.scope_spans for s in group.spans]
    assert sorted(names) == sorted(s.name for s in spans)
    assert len(names) == 8


def test_the_least_of_a_span_is_a_short_line():
    assert encode_spans([bare()]) == (
        b'{"resourceSpans":[{"resource":{},"scopeSpans":[{"scope":{},"spans":[{"traceId":"0af7651916cd43dd8448eb211c80319c"'
        b',"spanId":"b7ad6b7169203331","flags":256,"name":"chat m","kind":3,"startTimeUnixNano":"1",'
        b'"endTimeUnixNano":"2"}]}]}]}\n'
    )


def test_no_spans_are_no_line():
    assert encode_spans([]) == b""


def test_spans_of_one_resource_and_scope_share_a_line():
    resource, other, scope = Resource({"a": 1}), Resource({"b": 1}), InstrumentationScope("s")
    spans = [bare(name=str(n), resource=r, instrumentation_scope=scope) for n, r in enumerate([resource, other] * 2)]
    first, second = (decode_line(line) for line in encode_spans(spans).splitlines())
    assert [[(r.name, r.resource, r.scope) for r in group] for group in (first, second)] == [
        [("0", {"a": 1}, "s"), ("2", {"a": 1}, "s")],
        [("1", {"b": 1}, "s"), ("3", {"b": 1}, "s")],
    ]


def test_many_short_lived_resources_keep_their_own_attributes():
    for number in range(300):
        (record,) = decode_line(encode_spans([bare(resource=Resource({"n": number}))]))
        assert record.resource == {"n": number}


def test_many_keys_keep_their_own_names():
    for start in range(0, 9000, 3000):
        attributes = {f"k{n}": n for n in range(start, start + 3000)}
        assert attributes_after(attributes) == attributes


def test_a_broken_span_does_not_cost_the_others():
    class Broken:
        attributes = property(lambda self: {}[0])

    broken, reported = bare(), []
    broken.context = None
    half = bare(name="half", links=[SimpleNamespace(context=None, attributes=None)])
    spans = [Broken(), bare(name="1"), broken, bare(name="2"), half, bare(name="3"), bare(resource=Broken()), object()]
    data = encode_spans(spans, on_error=lambda span, error: reported.append((span, type(error))))
    assert [record.name for record in decode_line(data)] == ["1", "2", "3"]
    assert [spans.index(span) for span, _ in reported] == [0, 2, 4, 6, 7]
    assert encode_spans([object()]) == b""


class Unprintable:
    def __str__(self):
        raise RuntimeError("no")


class Colour(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


CYCLE: list[object] = ["a"]
CYCLE += [CYCLE, CYCLE]
DEEP: object = "bottom"
for _ in range(200_000):  # deeper than `repr` of any Python goes
    DEEP = [DEEP]


ODD_VALUES = {
    "unprintable": (Unprintable(), "<unprintable Unprintable>"),
    "unprintable in a list": ([1, Unprintable()], [1, "<unprintable Unprintable>"]),
    "unprintable key": ({Unprintable(): 1}, "<unprintable dict>"),
    "enum of str": (Colour.RED, "red"),
    "enum of int": (Size.BIG, 3),
    "int above 64 bits": (2**63, "9223372036854775808"),
    "int below 64 bits": (-(2**70), str(-(2**70))),
    "int that Python does not print": (10**5000, "<unprintable int>"),
    "key that is no str": ({1: 2}, {"1": 2}),
    "tuples": ((1, (2,)), [1, [2]]),
    "set": (frozenset({1}), "frozenset({1})"),
    "bytearray": (bytearray(b"x"), b"x"),
    "surrogates": ("\ud800 and \udc00", "\ufffd and \ufffd"),
    "surrogate in a list": (["\ud800"], ["\ufffd"]),
    "surrogates in keys": ({"\ud800": {"\udfff": "x"}}, {"\ufffd": {"\ufffd": "x"}}),
    "any object": (Path("a"), "a"),
    "cycle": (CYCLE, ["a", str(CYCLE), str(CYCLE)]),
}


@pytest.mark.parametrize("case", ODD_VALUES)
def test_any_value_can_be_written(case):
    value, read = ODD_VALUES[case]
    assert attributes_after({"before": 1, "key": value, "after": "x"}) == {"before": 1, "key": read, "after": "x"}


def test_nesting_is_cut_before_readers_give_up():
    line = encode_spans([bare(attributes={"deep": DEEP}, events=[Event("e", {"maps": _nest_mappings(60)}, 1)])])
    as_protobuf = with_ids(json.loads(line), lambda text: base64.b64encode(bytes.fromhex(text)).decode())
    json_format.Parse(json.dumps(as_protobuf), TracesData())
    (record,) = decode_line(line)
    assert "<unprintable list>" in json.dumps(record.attributes)


def _nest_mappings(depth):
    value = {"bottom": 1}
    for _ in range(depth):
        value = {"k": value}
    return value


def test_lone_surrogates_are_replaced_wherever_text_goes():
    bad = "\ud800"
    scope = InstrumentationScope(bad, bad, bad, {bad: bad})
    one = bare(
        name=bad,
        attributes={bad: bad, "n": 1},
        events=[Event(bad, {bad: 1}, 1)],
        links=[Link(CONTEXT, {bad: 1})],
        status=Status(StatusCode.ERROR, bad),
        instrumentation_scope=scope,
    )
    (record,) = decode_line(encode_spans([one]))
    assert (record.name, record.attributes, record.status_message) == ("\ufffd", {"\ufffd": "\ufffd", "n": 1}, "\ufffd")
    assert (record.events[0].name, record.links[0].attributes, record.scope) == ("\ufffd", {"\ufffd": 1}, "\ufffd")


def test_attributes_that_change_meanwhile_are_read_again():
    class Restless(dict):
        calls = 0

        def items(self):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("dictionary changed size during iteration")
            return super().items()

    assert attributes_after(Restless(a=1, b="x")) == {"a": 1, "b": "x"}


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON_LIKE, max_size=6))
def test_attributes_survive_the_round_trip(attributes):
    assert repr(attributes_after(attributes)) == repr(attributes)  # repr: NaN is not equal to itself, 1 equals True


@given(st.text(st.characters(codec=None)), st.integers(0, 2**63), st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1))
def test_the_rest_of_a_span_survives_the_round_trip(text, time, trace_id, span_id):
    context = SpanContext(trace_id, span_id, is_remote=False)
    one = bare(name=text, context=context, parent=context, start_time=time, end_time=time, attributes={text: text})
    (record,) = decode_line(encode_spans([one]))
    clean = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert (record.name, record.start_ns, record.end_ns) == (clean, time, time)
    assert (record.trace_id, record.span_id, record.parent_id) == (
        f"{trace_id:032x}",
        f"{span_id:016x}",
        record.span_id,
    )


# --- decoding -------------------------------------------------------------------------------------------------------


def full_line():
    one = span(
        parent=REMOTE,
        attributes={"k": [1, {"x": b"y"}]},
        events=[Event("e", {"n": 1}, 5)],
        links=[Link(REMOTE, {"l": "x"})],
        status=Status(StatusCode.ERROR, "broken"),
        resource=Resource({"service.name": "s"}, "https://r"),
        instrumentation_scope=InstrumentationScope("scope", "1.0"),
    )
    return encode_spans([one])


def test_a_record_holds_everything_in_the_line():
    (record,) = decode_line(full_line(), line=7)
    assert (record.name, record.kind, record.start_ns, record.end_ns, record.line) == ("chat m", 3, 1, 2, 7)
    assert (record.trace_id, record.span_id, record.parent_id) == (f"{TRACE:032x}", f"{SPAN:016x}", f"{PARENT:016x}")
    assert record.attributes == {"k": [1, {"x": b"y"}]}
    assert record.events == [EventRecord("e", 5, {"n": 1})]
    assert record.links == [LinkRecord(f"{TRACE:032x}", f"{PARENT:016x}", {"l": "x"})]
    assert (record.status_code, record.status_message) == (2, "broken")
    assert (record.resource, record.scope, record.scope_version) == ({"service.name": "s"}, "scope", "1.0")
    assert (record.schema_url, record.trace_state) == ("https://r", "")


def test_counts_of_dropped_things_are_read():
    (record,) = [
        r for line in lines_of(encode_spans(sdk_spans())) for r in decode_line(_dump(line)) if r.name == "child"
    ]
    assert (record.dropped_attributes, record.dropped_events, record.dropped_links) == (6, 1, 1)


def _dump(document, **options):
    return json.dumps(document, **options).encode()


def _enum_names(document):
    return json.loads(
        json.dumps(document)
        .replace('"kind": 3', '"kind": "SPAN_KIND_CLIENT"')
        .replace('"code": 2', '"code": "STATUS_CODE_ERROR"')
    )


def _numbers(node):
    if isinstance(node, dict):
        return {k: int(v) if k.endswith("Nano") or k == "intValue" else _numbers(v) for k, v in node.items()}
    return [_numbers(item) for item in node] if isinstance(node, list) else node


def _legacy(document):
    return json.loads(
        json.dumps(document)
        .replace('"scopeSpans"', '"instrumentationLibrarySpans"')
        .replace('"scope":', '"instrumentationLibrary":')
    )


def _unknown_fields(node):
    if isinstance(node, dict):
        return {"fromTheFuture": [{}], **{k: _unknown_fields(v) for k, v in node.items()}}
    return [_unknown_fields(item) for item in node] if isinstance(node, list) else node


def _official_json(document):
    as_protobuf = with_ids(document, lambda text: base64.b64encode(bytes.fromhex(text)).decode())
    return json_format.MessageToDict(json_format.Parse(json.dumps(as_protobuf), TracesData()))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: with_ids(d, str.upper),
        lambda d: with_ids(d, lambda text: base64.b64encode(bytes.fromhex(text)).decode()),
        lambda d: with_ids(d, lambda text: base64.urlsafe_b64encode(bytes.fromhex(text)).decode()),
        _official_json,
        _enum_names,
        _numbers,
        _legacy,
        _unknown_fields,
        lambda d: [d],
        lambda d: {"result": d},
        lambda d: {"result": [d, {"resourceSpans": None}]},
        lambda d: [{"result": d}, {"resourceSpans": []}],
    ],
)
def test_other_ways_to_write_the_same_trace_are_read_alike(change):
    assert decode_line(_dump(change(json.loads(full_line())))) == decode_line(full_line())


@pytest.mark.parametrize("parent", ["", None, "0" * 16, "AAAAAAAAAAA="])
def test_a_span_without_parent_is_a_root(parent):
    (record,) = decode_line(_dump({"resourceSpans": [{"scopeSpans": [{"spans": [{"parentSpanId": parent}]}]}]}))
    assert record.parent_id == ""


def test_missing_and_null_fields_are_empty():
    bare_span = {
        "name": None,
        "attributes": [{"key": "a"}, {"value": {"stringValue": "x"}}],
        "events": [{}],
        "links": [{}],
    }
    (record,) = decode_line(_dump({"resourceSpans": [{"scopeSpans": [{"spans": [bare_span]}]}, {}]}))
    assert (record.name, record.trace_id, record.parent_id, record.kind, record.start_ns) == ("", "", "", 0, 0)
    assert record.attributes == {"a": None, "": "x"}
    assert (record.events, record.links) == ([EventRecord("", 0, {})], [LinkRecord("", "", {})])


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ({"intValue": 3}, 3),
        ({"intValue": "x"}, "x"),
        ({"doubleValue": "NaN"}, float("nan")),
        ({"doubleValue": 1}, 1.0),
        ({"boolValue": "false"}, False),
        ({"bytesValue": "not base64!"}, "not base64!"),
        ({"stringValue": None, "intValue": 1}, None),
        ({"intValue": None, "boolValue": True}, True),
        ({"arrayValue": {}}, []),
        ({"kvlistValue": {"values": [{"key": "k", "value": {}}]}}, {"k": None}),
        ({"futureValue": 1}, None),
    ],
)
def test_odd_values_of_other_writers_are_read(value, read):
    span_json = {"attributes": [{"key": "k", "value": value}]}
    (record,) = decode_line(_dump({"resourceSpans": [{"scopeSpans": [{"spans": [span_json]}]}]}))
    assert repr(record.attributes["k"]) == repr(read)


@pytest.mark.parametrize("kind", [99, "SPAN_KIND_OF_TOMORROW"])
def test_unknown_enums_are_kept_or_unspecified(kind):
    (record,) = decode_line(_dump({"resourceSpans": [{"scopeSpans": [{"spans": [{"kind": kind}]}]}]}))
    assert record.kind == (99 if kind == 99 else 0)


def test_surrogates_written_by_others_are_replaced():
    line = full_line().replace(b'"chat m"', b'"\\ud800 \\ud83d\\ude00"')
    assert decode_line(line)[0].name == "\ufffd 😀"


@pytest.mark.parametrize("data", [b"", b"x", b'{"resourceMetrics":[]}', b"3", b'{"resourceSpans":5}', b"[" * 100_000])
def test_what_is_no_trace_is_refused_with_its_line(data):
    with pytest.raises(TraceError) as caught:
        decode_line(data, line=3)
    assert caught.value.line == 3


def test_values_nested_too_deeply_are_refused():
    value = '{"arrayValue":{"values":[' * 320 + "]}}" * 320
    line = '{"resourceSpans":[{"scopeSpans":[{"spans":[{"attributes":[{"key":"k","value":' + value + "}]}]}]}]}"
    with pytest.raises(TraceError):
        decode_line(line.encode())


# --- reading files --------------------------------------------------------------------------------------------------


def line(name, **fields):
    return encode_spans([bare(name=name, **fields)])


def names(path):
    return [record.name for record in read_file(path).spans]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.jsonl"


def test_lines_are_split_at_newlines_only(path):
    odd = "a\u2028b\u0085c\rd"
    path.write_bytes(line(odd) + b"\n  \r\n" + line("second"))
    contents = read_file(path)
    assert [(record.name, record.line) for record in contents.spans] == [(odd, 1), ("second", 4)]
    assert contents.problems == []


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: [d, d], lambda d: {"result": d}])
@pytest.mark.parametrize("options", [{}, {"indent": 2}])
def test_documents_of_other_tools_are_files_too(path, wrap, options):
    document = wrap(json.loads(full_line()))
    expected = ["chat m"] * (2 if isinstance(document, list) else 1)
    path.write_bytes(_dump(document, **options))
    assert names(path) == expected


def test_several_pretty_printed_documents_are_read_with_their_lines(path):
    one = _dump({"result": json.loads(full_line())}, indent=1)
    path.write_bytes(one + b"\n" + one + b"\n")
    assert [record.line for record in read_file(str(path)).spans] == [1, 2 + one.count(b"\n")]


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: b"\xef\xbb\xbf" + data])
def test_gzip_and_byte_order_mark_are_accepted(path, pack):
    path.write_bytes(pack(line("a") + line("b")))
    assert names(path) == ["a", "b"]


def test_damage_before_the_end_is_refused_with_file_and_line(path):
    path.write_bytes(line("a") + line("b")[:-20] + b"\n" + line("c"))
    with pytest.raises(TraceError, match="damaged") as caught:
        read_file(path)
    assert (caught.value.path, caught.value.line) == (str(path), 2)


def test_two_damaged_lines_at_the_end_are_refused(path):
    path.write_bytes(line("a") + b"{broken\n{broken\n")
    with pytest.raises(TraceError) as caught:
        read_file(path)
    assert caught.value.line == 2


@pytest.mark.parametrize("damage", [b'{"resourceSpans":[{"re', b"\0\0\0", b'{"a\xff"}', b"{\n\n{"])
def test_damage_that_its_writer_marked_is_skipped_and_reported(path, damage):
    marker = b'\n\n{"resourceSpans":[],"looplet.recovered":true}\n'
    path.write_bytes(line("a") + damage + marker + line("b"))
    contents = read_file(path)
    assert [record.name for record in contents.spans] == ["a", "b"]
    assert contents.problems
    assert contents.problems[0].line == 2


def test_damage_in_the_first_line_can_be_marked_too(path):
    path.write_bytes(b'{"resou\n{"resourceSpans":[],"looplet.recovered":true}\n' + line("b"))
    assert names(path) == ["b"]


def test_lines_of_other_signals_are_reported(path):
    path.write_bytes(line("a") + b'{"resourceMetrics":[]}\n{"resourceLogs":[]}\n[1]\n' + line("b"))
    contents = read_file(path)
    assert [record.name for record in contents.spans] == ["a", "b"]
    assert contents.problems == [
        Problem(2, "OTLP metrics instead of spans"),
        Problem(3, "OTLP logs instead of spans"),
        Problem(4, "other JSON instead of spans"),
    ]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"\x89PNG\r\n\x1a\n", "not an OTLP trace|damaged"),
        (b"hello", "not an OTLP trace"),
        (b'{"resourceMetrics":[]}\n' * 2, "OTLP metrics"),
        (b'{"data":[{"traceID":"x"}]}', "Jaeger"),
        (b'{\n "name": "looplet"\n}', "other JSON"),
        (b'{"resourceSpans":5}', "not a valid trace"),
        (gzip.compress(b"x" * 99, mtime=0)[:-9], "gzip"),
    ],
)
def test_files_of_another_kind_are_refused(path, data, says):
    path.write_bytes(data)
    with pytest.raises(TraceError, match=says) as caught:
        read_file(path)
    assert caught.value.path == str(path)


def test_folders_and_missing_files_are_refused(tmp_path):
    with pytest.raises(TraceError, match="folder"):
        read_file(tmp_path)
    with pytest.raises(TraceError, match="No such file"):
        read_file(tmp_path / "nothing.jsonl")


# --- writing files --------------------------------------------------------------------------------------------------


def test_nothing_is_created_before_the_first_write(tmp_path):
    path = tmp_path / "new" / "folder" / "trace.jsonl"
    file = OtlpFile(path, fsync=True)
    file.write(b"")
    assert not path.parent.exists()
    file.write(line("a"))
    file.write(line("b"))
    file.close()
    assert names(path) == ["a", "b"]


def test_a_closed_file_stays_closed(path):
    file = OtlpFile(path)
    file.write(line("a"))
    file.close()
    file.close()
    with pytest.raises(OSError, match="is closed"):
        file.write(line("b"))
    assert names(path) == ["a"]


def test_a_file_torn_at_any_byte_stays_readable_and_can_be_appended_to(path):
    first, second = line("a"), line("b", attributes={"text": "é😀"})
    whole, torn = first + second, path.with_name("trace.jsonl.torn")
    for cut in range(1, len(whole)):
        complete = ["a"] if len(first) - 1 <= cut < len(whole) - 1 else ["a", "b"] if cut >= len(first) else []
        path.write_bytes(whole[:cut])
        before = read_file(path)
        assert [record.name for record in before.spans] == complete
        file = OtlpFile(path)
        file.write(line("later"))
        file.close()
        assert [record.name for record in read_file(path).spans] == [*complete, "later"]
        assert read_file(path).problems == []
        moved = torn.read_bytes() if torn.exists() else b""
        assert moved == (whole[:cut].rpartition(b"\n")[2] + b"\n" if before.problems else b"")
        torn.unlink(missing_ok=True)


def test_torn_lines_are_collected_beside_the_file(path):
    for number in (1, 2):
        with path.open("ab") as raw:
            raw.write(b'{"torn":%d' % number)
        file = OtlpFile(path)
        file.write(line(str(number)))
        file.close()
    assert names(path) == ["1", "2"]
    assert path.with_name("trace.jsonl.torn").read_bytes() == b'{"torn":1\n{"torn":2\n'


def test_a_torn_line_longer_than_a_block_is_cut_off_whole(path):
    tail = b'{"resourceSpans":[' + b" " * 200_000
    path.write_bytes(line("a") + tail)
    file = OtlpFile(path)
    file.write(line("b"))
    file.close()
    assert path.read_bytes() == line("a") + line("b")
    assert path.with_name("trace.jsonl.torn").read_bytes() == tail + b"\n"


def test_a_torn_line_that_cannot_be_moved_is_marked(path):
    path.write_bytes(line("a") + b'{"torn')
    path.with_name("trace.jsonl.torn").mkdir()
    file = OtlpFile(path)
    file.write(line("b"))
    file.write(line("c"))
    file.close()
    contents = read_file(path)
    assert [record.name for record in contents.spans] == ["a", "b", "c"]
    assert [problem.line for problem in contents.problems] == [2]


def test_two_writers_may_append_in_turn(path):
    one, two = OtlpFile(path), OtlpFile(path)
    for number in range(6):
        (two if number % 2 else one).write(line(str(number)))
    one.close()
    two.close()
    assert names(path) == list("012345")


def test_what_others_appended_is_never_cut_off(path):
    file = OtlpFile(path)
    file.write(line("a"))
    start = path.stat().st_size
    with path.open("ab") as other:
        other.write(b'{"ours in part' + b"\n" + b'{"resourceSpans":[]}\n')
    file._take_back(file._fd, start, len(b'{"ours in part'))
    file.close()
    assert path.read_bytes().endswith(b'{"resourceSpans":[]}\n')


def run(script, *arguments, **options):
    """Run `script` in a Python of its own, with `line` and what files need; return its output, fail if it fails."""
    helpers = """
        import os, resource, sys
        from types import SimpleNamespace
        from opentelemetry.trace import SpanContext, SpanKind
        from looplet.telemetry.otlp import encode_spans
        from looplet.telemetry.otlp_file import OtlpFile
        names = "parent", "attributes", "events", "links", "status", "resource", "instrumentation_scope"
        rest = dict(context=SpanContext(1, 2, False), kind=SpanKind.CLIENT, start_time=1, end_time=2)
        def line(name, size=0):
            return encode_spans([SimpleNamespace(**dict.fromkeys(names) | rest, name=name) for _ in range(1 + size)])
        def refused(file, data):
            try:
                file.write(data)
            except OSError as error:
                return error.errno
        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    """
    program = textwrap.dedent(helpers) + textwrap.dedent(script)
    command = [*options.pop("before", ()), sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    stdout = options.pop("stdout", subprocess.PIPE)
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, env=environment, timeout=60, check=False, **options
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_a_write_cut_short_by_the_system_leaves_no_trace(path):
    errors = run(
        """
        file = OtlpFile(sys.argv[1])
        file.write(line("a"))
        full = os.path.getsize(sys.argv[1])
        limit(full + 100)
        print(refused(file, line("lost", 9)), os.path.getsize(sys.argv[1]) == full)
        print(refused(file, line("lost", 9)), os.path.getsize(sys.argv[1]) == full)
        limit(-1)
        file.write(line("b"))
        """,
        path,
    )
    assert errors.decode().split() == [str(errno.EFBIG), "True"] * 2
    assert path.read_bytes().count(b"\n") == 2
    contents = read_file(path)
    assert ([record.name for record in contents.spans], contents.problems) == (["a", "b"], [])


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs a file that cannot shrink")
def test_what_cannot_be_taken_back_is_marked(path):
    copied = run(
        """
        import fcntl
        sealed = os.memfd_create("trace", os.MFD_ALLOW_SEALING)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.symlink(f"/proc/{os.getpid()}/fd/{sealed}", sys.argv[1])
        file = OtlpFile(sys.argv[1])
        file.write(line("a"))
        for extra in (50, 20):
            limit(os.fstat(sealed).st_size + extra)
            assert refused(file, line("lost"))
        limit(-1)
        file.write(line("b"))
        file.write(line("c"))
        sys.stdout.buffer.write(os.pread(sealed, 10**6, 0))
        """,
        path,
    )
    path.unlink()
    path.write_bytes(copied)
    assert copied.count(b'"looplet.recovered":true') == 1
    contents = read_file(path)
    assert [record.name for record in contents.spans] == ["a", "b", "c"]
    assert [problem.line for problem in contents.problems] == [2, 3]


FULL_DISK = """
    import subprocess
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", sys.argv[1]], capture_output=True).returncode:
        sys.exit(print("skip"))
    path = sys.argv[1] + "/trace.jsonl"
    file = OtlpFile(path)
    written = 0
    while not (error := refused(file, line(str(written), 20))):
        written += 1
    whole = open(path, "rb").read()
    os.truncate(path, whole.index(b"\\n") + 1)
    file.write(line("later"))
    print(error, whole.count(b"\\n") == written, whole.endswith(b"\\n"), open(path, "rb").read().count(b"\\n"))
"""


def test_a_full_disk_costs_only_what_did_not_fit(tmp_path):
    try:
        output = run(FULL_DISK, tmp_path, before=["unshare", "--map-root-user", "--mount"])
    except (FileNotFoundError, AssertionError):
        pytest.skip("needs the right to mount in a namespace of its own")
    if output.strip() == b"skip":
        pytest.skip("needs the right to mount")
    assert output.decode().split() == [str(errno.ENOSPC), "True", "True", "2"]


def test_a_forked_child_disowns_the_file(path):
    run(
        """
        file = OtlpFile(sys.argv[1])
        file.write(line("parent"))
        child = os.fork()
        if not child:
            file.disown()
            file.close()
            os._exit(0 if refused(file, line("child")) else 1)
        assert os.waitpid(child, 0)[1] == 0
        file.write(line("parent again"))
        """,
        path,
    )
    assert names(path) == ["parent", "parent again"]


def test_a_disowned_file_stays_disowned(path):
    file = OtlpFile(path)
    file.write(line("a"))
    descriptor = file._fd
    file.disown()
    file.close()
    os.close(descriptor)  # was left alone
    with pytest.raises(OSError, match="belongs to the parent"):
        file.write(line("b"))
    assert names(path) == ["a"]


def test_redirected_output_is_marked_but_never_cut(path):
    script = """
        os.write(1, b"{words, and no newline")
        file = OtlpFile("/dev/stdout")
        limit(os.fstat(1).st_size + 50)
        assert refused(file, line("lost"))
        limit(-1)
        file.write(line("a"))
        file.write(line("b"))
    """
    with path.open("wb") as output:
        run(script, stdout=output)
    assert path.read_bytes().startswith(b'{words, and no newline{"resourceSpans":')
    assert path.read_bytes().count(b'"looplet.recovered":true') == 1
    assert names(path) == ["a", "b"]


def test_standard_output_is_a_file_too(path):
    script = """
        file = OtlpFile("/dev/stdout")
        file.write(line("a"))
        file.write(line("b"))
    """
    path.write_bytes(run(script))
    assert names(path) == ["a", "b"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_written_without_repair(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    file = OtlpFile(pipe)
    file.write(line("a"))
    file.close()
    assert decode_line(os.read(reader, 65536))[0].name == "a"
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")  # noqa: PTH110
def test_a_full_device_raises_every_time():
    file = OtlpFile("/dev/full")
    for _ in range(2):
        with pytest.raises(OSError, match="No space") as caught:
            file.write(line("a"))
        assert caught.value.errno == errno.ENOSPC
    file.close()

"""What is in the files is OTLP, and speaks the GenAI conventions' language."""

from __future__ import annotations

import ast
import base64
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from jsonschema.validators import validator_for
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans as official_encoder
from opentelemetry.proto.trace.v1.trace_pb2 import Status, TracesData
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import SpanKind

import looplet
from looplet import (
    Deny,
    LoopConfig,
    ProvenanceSink,
    Reply,
    Stop,
    ToolCall,
    ToolContext,
    ToolError,
    ToolResult,
    Trace,
    Usage,
    composable_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.testing import MockLLMBackend, ScriptedBackend

ROOT = Path(__file__).resolve().parent.parent
CONVENTIONS = ROOT.parent / "shared" / "semconv"
"""the GenAI conventions as data; not part of the project"""
REGISTRY = "genai_resolved_fe5608e.json"

needs_conventions = pytest.mark.skipif(
    not (CONVENTIONS / REGISTRY).exists(),
    reason=f"THE GENAI CONVENTIONS ARE NOT CHECKED: no {REGISTRY} in ../shared/semconv beside the checkout",
)


# --- runs over many features ----------------------------------------------------------------------------------------


@tool
def echo(value: Any, ctx: ToolContext) -> Any:
    """Return the value."""
    ctx.warn("careful")
    ctx.report_progress("half", {"at": 0.5})
    return value


@tool(concurrent_safe=True)
def look(name: str, depth: int = 1, tags: list[str] | None = None) -> dict:
    """Look something up."""
    return {"name": name, "depth": depth}


@tool
def crash(how: str = "plain") -> None:
    """Fail."""
    raise ToolError("bad unit", kind="validation", recovery_hint=["m"]) if how == "told" else TimeoutError("too slow")


class Hook:
    def __init__(self):
        self.done = 0

    def pre_loop(self, state, log, context):
        return "welcome"

    def pre_prompt(self, state, log, context, step):
        return context.rewrite(lambda text: text.replace("secret", "[secret]")) if step % 2 else "a hint"

    def pre_dispatch(self, state, log, call, step):
        return Deny("not this", retry=True) if call.args.get("name") == "forbidden" else None

    def post_dispatch(self, state, log, call, result, step):
        return ToolResult("echo", data="rewritten") if call.args.get("value") == "rewrite me" else None

    def check_done(self, state, log, context, step):
        self.done += 1
        return "not yet" if self.done == 1 else None

    def should_stop(self, state, step, entities):
        return Stop("satisfied") if step > 30 else None


class Reviewer(Hook):
    """The same, without rewriting requests."""

    def pre_prompt(self, state, log, context, step):
        return None


class Server:
    """A backend that says where it is, and everything a reply may say."""

    model, provider = "gpt-x", "openai"
    server_address, server_port = "models.example", 8443

    def __init__(self, replies):
        self.script = ScriptedBackend(replies)

    def chat(self, messages, *, tools, system_prompt, max_tokens, temperature):
        return self.script.chat(messages)


VALUES = [
    None,
    True,
    0,
    1 << 70,
    -1.5,
    float("nan"),
    "",
    "ü\u2028\ud800\x00",
    [1, [2]],
    {"a": {"b": None}},
    {"": []},
    b"\xff",
]
REPLIES = [
    *[("echo", {"value": value}) for value in VALUES],
    [("look", {"name": name}) for name in ("a", "b", "forbidden")],
    ("crash", {}),
    ("crash", {"how": "told"}),
    ("unknown tool", {"x": 1}),
    ("look", {"nam": "x"}),
    ("echo", {"value": "rewrite me"}),
    "no call at all",
    Reply(
        'Sure: {"tool": "echo", "args": {"value": 1}}',
        usage=Usage(9, 8, 7, 6, 0.5, cache_write_tokens=1),
        model="gpt-x-2026",
        response_id="r1",
        finish_reason="length",
        reasoning="because",
        metadata={"x": 1},
    ),
    Reply(
        "Now",
        parts=({"type": "reasoning", "content": "hm", "signature": "s"}, {"type": "text"}),
        tool_calls=(ToolCall("echo", {"value": 2}, reasoning="why", metadata={"theory": "t"}),),
        usage=Usage(1, 2),
    ),
    ("done", {"answer": "early"}),
    ("done", {"answer": "late"}),
]
TEXTS = ['{"tool": "echo", "args": {"value": "a\\nb"}}', "hm", '{"tools": [{"tool": "look", "args": {"name": "x"}}]}']


class Collector:
    """A sink that keeps the recorder's spans."""

    def __init__(self):
        self.spans = []
        self.looplet_sink = self

    def attach(self, recorder):
        pass

    def on_end(self, span):
        self.spans.append(span)

    def durable(self):
        pass

    def detach(self, recorder):
        pass


def make_runs(provider, *sinks):
    """Return runs that go through the features, all into these sinks."""
    settings = LoopConfig(max_steps=40, system_prompt="be brief", temperature=0, max_tokens=100, agent_name="tester")
    tools = tools_from([echo, look, crash], include_think=True, include_done=True)
    common = {"task": {"goal": "secret", "n": [1, 2]}, "tools": tools, "tracer_provider": provider}
    plain = LoopConfig(max_steps=40)
    return [
        composable_loop(Server(REPLIES), hooks=[Hook(), *sinks], config=settings, **common),
        composable_loop(ScriptedBackend(REPLIES), hooks=[Reviewer(), *sinks], config=plain, **common),
        composable_loop(MockLLMBackend(TEXTS), hooks=[*sinks], max_steps=4, **common),
        composable_loop(MockLLMBackend([ConnectionError("gone")]), hooks=[*sinks], **common),
        composable_loop(ScriptedBackend(["a", "b", "c", "d"]), hooks=[*sinks], max_steps=1, **common),
        composable_loop(ScriptedBackend([REPLIES[-1]]), hooks=[*sinks], stream=lambda event: None, **common),
    ]


class Samples(Sampler):
    """A sampler that keeps what it was asked about: name → attributes at the start of the span."""

    def __init__(self):
        self.asked = []

    def should_sample(self, parent_context, trace_id, name, kind=None, attributes=None, links=None, trace_state=None):
        self.asked.append((name, dict(attributes or {})))
        return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)

    def get_description(self):
        return "keeps"


@dataclass
class Recording:
    """A file and the spans that were written to it."""

    path: Path
    spans: list[Any]

    @property
    def nodes(self):
        return Trace.load(self.path).spans


@pytest.fixture(scope="module", params=["no provider", "a provider"])
def recordings(request, tmp_path_factory):
    """Return what all these runs recorded."""
    provider = TracerProvider(shutdown_on_exit=False) if request.param == "a provider" else None
    out = []
    for number in range(6):
        folder, collector = tmp_path_factory.mktemp("run"), Collector()
        list(make_runs(provider, ProvenanceSink(folder), collector)[number])
        out.append(Recording(folder / "trace.jsonl", collector.spans))
    assert [Trace.load(r.path).runs[0].stop_reason for r in out] == [
        "done", "done", "budget_exhausted", "llm_error", "budget_exhausted", "done",
    ]  # fmt: skip
    return out


# --- OTLP -----------------------------------------------------------------------------------------------------------

HEX_IDS = {"traceId", "spanId", "parentSpanId"}


def in_base64(value, key=""):
    """Return OTLP JSON with base64 ids, which is what protobuf's own JSON has instead of hex."""
    if isinstance(value, dict):
        return {name: in_base64(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [in_base64(inner) for inner in value]
    return base64.b64encode(bytes.fromhex(value)).decode() if key in HEX_IDS else value


def without_empty_status(span):
    """Return the span; an unset status, written or left out, says the same."""
    if span.status == Status():
        span.ClearField("status")
    return span


def by_id(messages):
    """Return span id → everything that the protobuf messages say about the span."""
    return {
        span.span_id: (without_empty_status(span), around.resource, around.schema_url, inner.scope, inner.schema_url)
        for message in messages
        for around in message.resource_spans
        for inner in around.scope_spans
        for span in inner.spans
    }


def test_google_s_parser_reads_each_line_and_finds_what_the_official_encoder_writes(recordings):
    for recording in recordings:
        lines = [json.loads(line) for line in recording.path.read_bytes().splitlines()]
        read = by_id(json_format.ParseDict(in_base64(line), TracesData()) for line in lines)
        assert read == by_id([official_encoder(recording.spans)])
        assert len(read) == len(recording.spans)


def test_ids_are_hex_enums_integers_and_64_bit_integers_strings(recordings):
    for recording in recordings:
        text = recording.path.read_text()
        assert not re.search(r'"(kind|code|flags)":"', text)
        assert not re.search(r'"(traceId|spanId|parentSpanId)":"(?![0-9a-f]{16}(?:[0-9a-f]{16})?")', text)
        assert not re.search(r'"(intValue|\w*UnixNano)":[-0-9]', text)


# --- the GenAI conventions ------------------------------------------------------------------------------------------


@cache
def registry() -> dict[str, Any]:
    return json.loads((CONVENTIONS / REGISTRY).read_text())


@cache
def schema_of(name: str) -> Any:
    """Return a validator of one of the JSON schemas, for the draft that it declares."""
    schema = json.loads((CONVENTIONS / name).read_text())
    kind = validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


OPEN_ENUMS = {semconv.PROVIDER_NAME}
"""a provider that the conventions do not know has a name of its own"""


def problems_with(key: str, value: Any) -> list[str]:
    """Return how the value of a `gen_ai.*` attribute is not what the registry says."""
    known = registry()["attributes"].get(key)
    if known is None:
        return [f"{key} is not in the registry"]
    kind = known["type"]
    if isinstance(kind, dict):
        members = [member["value"] for member in kind["enum"] if not member["deprecated"]]
        fits = isinstance(value, str) and (value in members or key in OPEN_ENUMS)
    else:
        fits = {
            "string": lambda: isinstance(value, str),
            "int": lambda: type(value) is int,
            "double": lambda: type(value) is float,
            "boolean": lambda: type(value) is bool,
            "string[]": lambda: isinstance(value, list) and all(isinstance(v, str) for v in value),
            "any": lambda: isinstance(value, str),  # JSON, see below
        }[kind]()
    return [] if fits else [f"{key}={value!r} is no {kind}"]


@needs_conventions
def test_every_genai_attribute_is_in_the_registry_with_its_type(recordings):
    seen, problems = set(), []
    for recording in recordings:
        for node in recording.nodes:
            told = {**node.attributes, **{k: v for event in node.events for k, v in event.attributes.items()}}
            genai = {key: value for key, value in told.items() if key.startswith("gen_ai.")}
            seen |= genai.keys()
            problems += [p for key, value in genai.items() for p in problems_with(key, value)]
    assert problems == []
    table = {value for value in vars(semconv).values() if isinstance(value, str) and value.startswith("gen_ai.")}
    assert table <= registry()["attributes"].keys()
    assert seen == table


@needs_conventions
def test_messages_fit_the_conventions_json_schemas(recordings):
    checked = Counter()
    for recording in recordings:
        for node in recording.nodes:
            for key, value in node.attributes.items():
                annotations = registry()["attributes"].get(key, {}).get("annotations")
                if annotations:
                    told = json.loads(value)
                    if key == semconv.TOOL_CALL_RESULT and not isinstance(told, dict):
                        continue  # the schema knows "object-like" results only; a tool may return anything
                    schema_of(Path(annotations["type"]["json_schema"]).name).validate(told)
                    checked[key] += 1
    assert checked.keys() == {
        semconv.INPUT_MESSAGES, semconv.OUTPUT_MESSAGES, semconv.TOOL_DEFINITIONS, semconv.TOOL_CALL_ARGUMENTS,
        semconv.TOOL_CALL_RESULT,
    }  # fmt: skip
    assert sum(checked.values()) > 100


@needs_conventions
def test_whole_requests_fit_the_schema_too(recordings):
    for recording in recordings:
        (view,) = Trace.load(recording.path).runs
        for chat in view.chats:
            schema_of("gen-ai-input-messages.json").validate([message.to_dict() for message in view.request(chat)])


SPANS = {
    semconv.INVOKE_AGENT: ("gen_ai.invoke_agent.internal", SpanKind.INTERNAL, semconv.AGENT_NAME),
    semconv.CHAT: ("gen_ai.inference.client", SpanKind.CLIENT, semconv.REQUEST_MODEL),
    semconv.EXECUTE_TOOL: ("gen_ai.execute_tool.internal", SpanKind.INTERNAL, semconv.TOOL_NAME),
}
"""operation → the conventions' span type, its kind, and what its name ends with"""


@needs_conventions
def test_spans_are_named_and_filled_as_the_conventions_say(recordings):
    seen = Counter()
    for recording in recordings:
        for node in recording.nodes:
            operation = node.attributes.get(semconv.OPERATION_NAME)
            if operation is None:
                assert node.name.startswith("looplet.")
                continue
            span_type, kind, subject = SPANS[operation]
            known = registry()["spans"][span_type]["attributes"]
            required = {key for key, told in known.items() if told["level"] == "required"}
            assert required <= node.attributes.keys()
            assert {key for key in node.attributes if key.startswith("gen_ai.")} <= known.keys()
            assert node.name == f"{operation} {node.attributes[subject]}"
            assert node.record.kind == kind.value + 1
            assert (semconv.ERROR_TYPE in node.attributes) == node.is_error
            assert (semconv.SERVER_PORT in node.attributes) == (semconv.SERVER_ADDRESS in node.attributes)
            seen[operation] += 1
    assert seen.keys() == SPANS.keys()


@needs_conventions
def test_a_sampler_sees_what_the_conventions_want_it_to_see():
    sampler = Samples()
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    collector = Collector()
    list(make_runs(provider, collector)[0])
    ended = {span.name: span.attributes for span in collector.spans}
    checked = 0
    for name, asked in sampler.asked:
        operation = name.split(" ")[0]
        if operation in SPANS:
            known = registry()["spans"][SPANS[operation][0]]["attributes"]
            relevant = {key for key, told in known.items() if told.get("sampling_relevant")} & ended[name].keys()
            assert relevant <= asked.keys()
            checked += len(relevant)
    assert checked > 50


def test_successes_are_unset_and_errors_have_a_type(recordings):
    for recording in recordings:
        for node in recording.nodes:
            assert node.record.status_code in (0, 2)
            assert node.is_error == (semconv.ERROR_TYPE in node.attributes)


def test_every_span_says_which_schema_it_follows(recordings):
    for recording in recordings:
        assert {node.record.schema_url for node in recording.nodes} == {semconv.SCHEMA_URL}


# --- one table ------------------------------------------------------------------------------------------------------

PACKAGE = Path(looplet.__file__).resolve().parent
TABLE = {value for value in vars(semconv).values() if isinstance(value, str)}
NAMES = re.compile(r"(gen_ai|looplet)\.[a-z]")


def literals_in(path: Path):
    """Yield the strings that look like names of the table; docstrings and names of modules and variables are none."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    excepted = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    excepted |= {id(arg) for node in nodes if is_labelling(node) for arg in node.args}
    joined = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in excepted | joined:
            continue
        if NAMES.match(node.value) and (node.value in TABLE or not is_module(node.value)):
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value!r}"


def is_labelling(node: ast.AST) -> bool:
    """Tell whether a call names something that is neither span nor attribute."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("ContextVar", "getLogger"))


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*re.split(r"\W", name)[1:2])
    return path.is_dir() or path.with_suffix(".py").exists()


def test_names_of_spans_and_attributes_are_written_in_one_table_only():
    table = PACKAGE / "telemetry" / "semconv.py"
    found = [hit for path in sorted(PACKAGE.rglob("*.py")) if path != table for hit in literals_in(path)]
    assert found == []
    assert len(list(literals_in(table))) > 50

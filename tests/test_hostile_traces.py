"""Files that no writer of looplet's made: whatever is in them, a reader raises TraceError or reads them."""

from __future__ import annotations

import copy
import json
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support import make_tools
from test_properties import moderate

from looplet import (
    ApprovalHook,
    EvalContext,
    HookDecision,
    Message,
    ProvenanceSink,
    Trace,
    TraceError,
    composable_loop,
    tool,
    tools_from,
)
from looplet.cli.show import show_command
from looplet.evals.context import load_contexts
from looplet.prompt import render
from looplet.telemetry import semconv
from looplet.telemetry.folder import write_folder
from looplet.telemetry.otlp_decode import MAX_DEPTH
from looplet.testing import MockLLMBackend, ScriptedBackend

ADD, LOOK, BOOM = ("add", {"a": 1, "b": 2}), ("look", {"name": "x"}), ("boom", {})
DONE = ("done", {"answer": "x"})


# --- real traces to damage --------------------------------------------------------------------------------------------


class Edits:
    """Drop every other old message, so that references are given relative to earlier requests."""

    def pre_prompt(self, state, log, ctx, step):
        talk = list(state.conversation)
        state.conversation.replace([m for i, m in enumerate(talk) if i % 3 or i == 0])
        return f"fact {step}"


class Steers:
    """Deny, replace results, write notes."""

    def check_permission(self, call, state):
        return call.tool != "boom"

    def post_dispatch(self, state, log, call, result, step):
        log.record(step, "theory", "note", "because", findings=["found"])


class Rewrites:
    """Rewrite requests: results are told only as they are sent."""

    def pre_prompt(self, state, log, prompt, step):
        return prompt.rewrite(str.upper)


def record(folder: Path, llm, *hooks, tools=None) -> None:
    tools = make_tools() if tools is None else tools
    list(composable_loop(llm, {"goal": "g"}, tools, hooks=[*hooks, ProvenanceSink(folder)], max_steps=20))


def record_sub_agent(folder: Path) -> None:
    sink = ProvenanceSink(folder)

    @tool
    def ask(name: str) -> int:
        """Let a sub-agent work."""
        return len(list(composable_loop(ScriptedBackend([ADD, DONE]), {"goal": name}, make_tools(), hooks=[sink])))

    tools = tools_from([ask], include_done=True)
    list(composable_loop(ScriptedBackend([("ask", {"name": "n"}), DONE]), {}, tools, hooks=[sink]))


class AsksAHuman:
    def check_permission(self, call, state):
        return HookDecision(permission="ask") if call.tool == "add" else None


def record_paused(folder: Path) -> None:
    llm, rest = ScriptedBackend([[LOOK, ADD], DONE]), {"task": {"goal": "g"}}
    for _ in range(2):
        hooks = [AsksAHuman(), ApprovalHook(), ProvenanceSink(folder)]
        list(composable_loop(llm, tools=make_tools(), hooks=hooks, **rest))
        rest = {"resume": folder, "verdict": "approve"}


FOREIGN = {
    "resourceSpans": [
        {
            "scopeSpans": [
                {
                    "spans": [
                        {
                            "traceId": "a" * 32,
                            "spanId": f"{number:016x}",
                            "parentSpanId": f"{parent:016x}" if parent else "",
                            "name": name,
                            "startTimeUnixNano": str(1000 + number),
                            "endTimeUnixNano": str(2000 + number),
                            "attributes": [{"key": k, "value": {"stringValue": v}} for k, v in told.items()],
                            "events": [{"name": "said", "attributes": []}],
                        }
                        for number, parent, name, told in [
                            (1, 0, "agent", {semconv.OPERATION_NAME: "invoke_agent"}),
                            (2, 1, "chat", {
                                semconv.OPERATION_NAME: "chat",
                                semconv.INPUT_MESSAGES: '[{"role": "user", "content": "hello"}]',
                                semconv.OUTPUT_MESSAGES: "plain text",
                                semconv.INPUT_TOKENS: "12",
                            }),
                            (3, 1, "execute_tool t", {
                                semconv.OPERATION_NAME: "execute_tool",
                                semconv.TOOL_NAME: "t",
                                semconv.TOOL_CALL_ARGUMENTS: "plain text",
                                semconv.TOOL_CALL_RESULT: "plain text",
                            }),
                        ]
                    ]
                }
            ]
        }
    ]
}  # fmt: skip

WAYS = {
    "plain": lambda folder: record(folder, ScriptedBackend([[LOOK, LOOK], ADD, BOOM, DONE])),
    "edited": lambda folder: record(folder, ScriptedBackend([*[ADD] * 14, DONE]), Edits()),
    "steered": lambda folder: record(folder, ScriptedBackend([ADD, BOOM, "words", DONE]), Steers()),
    "rewritten": lambda folder: record(folder, ScriptedBackend([ADD, BOOM, DONE]), Rewrites()),
    "text": lambda folder: record(folder, MockLLMBackend(['{"tool": "add", "args": {"a": 1, "b": 1}}', "?", "?"])),
    "sub-agent": record_sub_agent,
    "paused": record_paused,
}


@cache
def originals() -> dict[str, list]:
    """Return the lines of each trace, decoded; a killed run and one of another writer with them."""
    found = {}
    for name, way in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            way(Path(folder))
            found[name] = [json.loads(line) for line in (Path(folder) / "trace.jsonl").read_text().splitlines()]
    found["killed"] = found["plain"][: len(found["plain"]) * 2 // 3]
    found["foreign"] = [FOREIGN]
    return found


# --- damage -----------------------------------------------------------------------------------------------------------

DEEP = '[{"a":' * 60
JUNK = st.sampled_from(
    [
        None, True, 0, -1, 1.5, 1 << 70, -(1 << 63), "", "x", "1", "0-999999999999", "5^3,1", "1^99999999999",
        "9" * 400, [], {}, [[]], [None], {"a": 1}, {"stringValue": 5}, {"intValue": "1" * 30}, {"intValue": -1},
        {"stringValue": "{}"}, {"stringValue": "[]"}, {"stringValue": '"x'}, {"stringValue": "[1, [2]]"},
        {"stringValue": DEEP + "1" + "}]" * 60}, {"stringValue": "[" * 5000}, {"stringValue": '[{"role": 1}]'},
        {"stringValue": '[{"role": "user", "parts": [{"type": "text"}]}]'}, {"stringValue": '{"tool": 1}'},
        {"stringValue": '[{"role": "tool", "parts": [{"type": "tool_call_response"}]}]'},
        {"stringValue": '{"step": 1e99, "tool_call": {}}'}, {"stringValue": "\ud800"}, {"stringValue": '"\\ud800"'},
        {"stringValue": '{"error": 5, "error_detail": {"kind": "odd"}, "warnings": 3}'}, {"doubleValue": "NaN"},
        {"arrayValue": {"values": [{"intValue": 1}]}}, {"kvlistValue": {"values": [{"key": "a", "value": {}}]}},
        {"bytesValue": "AAAA"}, {"boolValue": True}, {"doubleValue": 1e308}, {"doubleValue": 10**400},
    ]
)  # fmt: skip
"""values to put into the place of others"""
PLACES = st.lists(st.integers(0, 40), min_size=1, max_size=9)
KEYS = st.sampled_from(sorted(v for k, v in vars(semconv).items() if k.isupper() and isinstance(v, str)))
DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("put"), PLACES, JUNK),
        st.tuples(st.just("drop"), PLACES, st.none()),
        st.tuples(st.just("attribute"), PLACES, st.tuples(KEYS, JUNK)),
        st.tuples(st.just("attribute"), PLACES, st.tuples(KEYS, JUNK)),
        st.tuples(st.just("event"), PLACES, st.tuples(KEYS, JUNK)),
        st.tuples(st.just("cut"), PLACES, st.integers(0, 60)),
        st.tuples(st.just("parent"), PLACES, st.integers(0, 40)),
        st.tuples(st.just("id"), PLACES, st.integers(0, 40)),
        st.tuples(st.just("copy"), PLACES, st.tuples(KEYS, st.integers(0, 40))),
    ),
    min_size=1,
    max_size=4,
)


def spans_of(lines):
    groups = [g for line in lines for r in line["resourceSpans"] for g in r["scopeSpans"]]
    return [span for group in groups for span in group["spans"]]


def attributes_of(span):
    return span.setdefault("attributes", [])


def apply(lines, how, places, what) -> None:
    """Do one kind of damage; what it meets may have been damaged already."""
    spans = spans_of(lines)
    span = spans[places[0] % len(spans)]
    if how in ("put", "drop"):
        around, key = place_in(lines if places[0] % 5 == 0 else span, places[1:])
        if around is not None and how == "put":
            around[key] = what
        elif around is not None:
            del around[key]
    elif how == "attribute":
        set_attribute(attributes_of(span), *what)
    elif how == "event":
        events = span.setdefault("events", [])
        event = {"name": semconv.EVENT_STEP, "timeUnixNano": "5", "attributes": []}
        (events or [event])[0].setdefault("attributes", []).append({"key": what[0], "value": what[1]})
        span["events"] = events or [event]
    elif how == "cut":
        values = [a["value"] for a in attributes_of(span) if isinstance(a["value"].get("stringValue"), str)]
        if values:
            value = values[places[-1] % len(values)]
            value["stringValue"] = value["stringValue"][:what]
    elif how in ("parent", "id"):
        other = spans[what % len(spans)]
        span["parentSpanId" if how == "parent" else "spanId"] = other["spanId"]
    else:
        other = spans[what[1] % len(spans)]
        for attribute in attributes_of(other):
            if attribute["key"] == what[0]:
                set_attribute(attributes_of(span), what[0], attribute["value"])


def place_in(value, places):
    """Follow the numbers down into JSON; return the container and the key where they end."""
    around, key = None, None
    for place in places:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        if not keys:
            break
        around, key = value, keys[place % len(keys)]
        value = around[key]
    return around, key


def set_attribute(attributes, key, value) -> None:
    attributes[:] = [a for a in attributes if a["key"] != key]
    attributes.append({"key": key, "value": value})


def damaged(name, damage) -> list:
    lines = copy.deepcopy(originals()[name])
    for one in damage:
        with suppress(KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError, IndexError):
            apply(lines, *copy.deepcopy(one))  # what is damaged beyond use is not damaged further
    return lines


# --- reading all of it ------------------------------------------------------------------------------------------------


def read_everything(file: Path) -> list[TraceError]:
    """Use everything that reads a trace; return what it refused.  Any other exception comes out."""
    refused: list[TraceError] = []

    def attempt(read, *args):
        try:
            return read(*args)
        except TraceError as error:
            refused.append(error)
            return None

    attempt(load_contexts, file)
    attempt(EvalContext.from_trace, file)
    attempt(write_folder, file)
    trace = attempt(Trace.load, file)
    if trace is None:
        return refused
    assert trace.find("*") == trace.spans
    assert sum(1 + len(list(root.descendants())) for root in trace.roots) == len(trace)
    for view in attempt(lambda: trace.runs) or ():
        for name in dir(view):
            if not name.startswith("_"):
                attempt(getattr, view, name)
        for chat in view.chats:
            for read in (view.request, view.new_messages, view.answer):
                use_messages(attempt(read, chat))
        use_messages(attempt(view.conversation))
        if (context := attempt(EvalContext.from_view, view)) is not None:
            assert len(context.tool_sequence) == context.step_count
            assert all(step.pretty() and step.summary() for step in context.steps)
    return refused


def use_messages(messages: list[Message] | None) -> None:
    for message in messages or ():
        assert isinstance(message.text + render([message]), str)
        assert all(isinstance(call.args, dict) for call in message.tool_calls)


def show(file: Path) -> None:
    for options in ([], ["--full"], ["--json", "--full"]):
        result = CliRunner().invoke(show_command, [str(file), *options])
        assert isinstance(result.exception, (SystemExit, type(None))), result.exception
        assert result.exit_code in (0, 2), result.output


def check(lines, *, show_too: bool = True) -> list[TraceError]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        refused = read_everything(file)
        assert all(error.path == str(file) and str(error).startswith(str(file)) for error in refused)
        if show_too:
            show(file)
    return refused


@pytest.mark.parametrize("name", [*WAYS, "killed", "foreign"])
def test_what_is_not_damaged_is_read(name):
    assert check(originals()[name]) == []


@moderate(400)
@given(st.sampled_from([*WAYS, "killed", "foreign"]), DAMAGE, st.integers(0, 9))
def test_a_damaged_trace_is_read_or_refused_with_a_trace_error(name, damage, die):
    check(damaged(name, damage), show_too=die == 0)


# --- what a fuzzer rarely finds ---------------------------------------------------------------------------------------


def span_of(name, number, parent="", **told):
    attributes = [{"key": key, "value": {"stringValue": value}} for key, value in told.items()]
    return {"traceId": "a" * 32, "spanId": f"{number:016x}", "parentSpanId": parent and f"{parent:016x}", "name": name,
            "attributes": attributes}  # fmt: skip


def lines_of(*spans):
    return [{"resourceSpans": [{"scopeSpans": [{"scope": {"name": "looplet"}, "spans": list(spans)}]}]}]


def test_spans_nested_as_deep_as_a_file_can_hold_are_read():
    run = {semconv.RUN_ID: "r", semconv.OPERATION_NAME: "invoke_agent"}
    spans = [span_of("a", 1, **run), *(span_of("a", n, n - 1, **{semconv.RUN_ID: "r"}) for n in range(2, 3000))]
    assert check(lines_of(*spans)) == []


def test_runs_that_started_each_other_are_shown_once():
    spans = []
    for number, (run, above) in enumerate([("a", "b"), ("b", "a"), ("c", "c"), ("d", "c")], 1):
        spans.append(span_of("invoke_agent x", number, **{semconv.RUN_ID: run}))
        told = {semconv.RUN_ID: run, semconv.PARENT_RUN_ID: above}
        spans.append(span_of(semconv.START, number + 10, number, **told))
    check(lines_of(*spans))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.jsonl"
        file.write_text(json.dumps(lines_of(*spans)[0]))
        said = CliRunner().invoke(show_command, [str(file), "--json"])
        runs = json.loads(said.output)["runs"]
        assert [(run["run_id"], [sub["run_id"] for sub in run["sub_runs"]]) for run in runs] == [
            ("a", []), ("b", []), ("c", ["d"]),
        ]  # fmt: skip
        assert CliRunner().invoke(show_command, [str(file), "--run", "c"]).exit_code == 0


@pytest.mark.parametrize("depth", [40, 400])
def test_runs_nested_deeply_are_shown_or_refused(depth):
    spans = []
    for number in range(1, depth):
        parent = number - 1 or ""
        spans.append(span_of("invoke_agent x", number, parent, **{semconv.RUN_ID: f"r{number}"}))
    check(lines_of(*spans))


def test_values_nested_deeper_than_otlp_allows_are_refused():
    value = {"intValue": "1"}
    for _ in range(MAX_DEPTH + 1):
        value = {"arrayValue": {"values": [value]}}
    span = {**span_of("a", 1), "attributes": [{"key": "a", "value": value}]}
    (error, *_) = check(lines_of(span))
    assert "nested too deeply" in str(error)


@pytest.mark.parametrize("refs", ["0-999999999999", "0," * 3 + "-", "0,1,", "x", "1^1", "0^1", "²", "0-0," * 600_000])
def test_references_that_no_request_has_are_refused_at_once(refs):
    lines = copy.deepcopy(originals()["plain"])
    (chat, *_) = [span for span in spans_of(lines) if span["name"].startswith("chat")]
    set_attribute(chat["attributes"], semconv.INPUT_REFS, {"stringValue": refs})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (view,) = Trace.load(file).runs
        with pytest.raises(TraceError, match=rf"{file}:2: span 'chat scripted' .*(request|list of message numbers)"):
            view.request(view.chats[0])


def test_an_error_names_file_line_and_span():
    lines = copy.deepcopy(originals()["plain"])
    (boom,) = [span for span in spans_of(lines) if span["name"] == "execute_tool boom"]
    line = next(number for number, line in enumerate(lines, 1) if boom in spans_of([line]))
    set_attribute(boom["attributes"], semconv.STEP_NUMBER, {"stringValue": "four"})
    (error, *_) = check(lines)
    assert error.line == line
    words = f"span 'execute_tool boom' ({boom['spanId']}): looplet.step.number is 'four', and no whole number"
    assert words in str(error)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (semconv.TOOL_CALL_ARGUMENTS, "[1]", "Expected `object`, got `array`"),
        (semconv.TOOL_CALL_ARGUMENTS, '{"a": ', "was it cut by a limit"),
        (semconv.TOOL_CALL_ARGUMENTS, "[" * 200 + "]" * 200, "nested more than 120 levels deep"),
        (semconv.TOOL_CALL, '{"reasoning": 5}', r"Expected `str`, got `int` - at `\$.reasoning`"),
        (semconv.TOOL_RESULT, '{"warnings": [1]}', r"at `\$.warnings"),
        (semconv.TOOL_RESULT, '{"error_detail": {"kind": "odd", "message": "m"}}', "Invalid enum value 'odd'"),
    ],
)
def test_what_looplet_cannot_have_written_is_named(key, value, words):
    lines = copy.deepcopy(originals()["plain"])
    (add,) = [span for span in spans_of(lines) if span["name"] == "execute_tool add"]
    set_attribute(add["attributes"], key, {"stringValue": value})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (view,) = Trace.load(file).runs
        with pytest.raises(TraceError, match=rf"span 'execute_tool add' .*{key}.*{words}"):
            view.steps  # noqa: B018 - reading it is the test


def test_long_texts_that_are_no_json_stay_text():
    spans = [span_of("chat m", 1, **{semconv.OPERATION_NAME: "chat", semconv.OUTPUT_MESSAGES: "[" * 1_000_000})]
    lines = lines_of(*spans)
    lines[0]["resourceSpans"][0]["scopeSpans"][0]["scope"]["name"] = "theirs"
    assert check(lines) == []


def test_spans_without_a_trace_id_are_one_run():
    spans = [
        span_of("chat m", 1, **{semconv.OPERATION_NAME: "chat"}),
        span_of("chat m", 2, 1, **{semconv.OPERATION_NAME: "chat"}),
    ]
    for span in spans:
        del span["traceId"]
    assert check(lines_of(*spans)) == []

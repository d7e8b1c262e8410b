"""Reading traces back: queries, foreign traces, several runs in a file, damage."""

import json
import sys
from collections import Counter

import pytest
from handmade import Spans
from support import add, both, make_tools

from looplet import (
    EvalContext,
    Message,
    ProvenanceSink,
    Reply,
    ToolCall,
    ToolContext,
    Trace,
    TraceError,
    Usage,
    composable_loop,
    tool,
    tools_from,
)
from looplet.evals.context import load_contexts
from looplet.telemetry import semconv
from looplet.telemetry.folder import WHOLE_PROMPTS
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

ADD, BOOM, DONE = ("add", {"a": 1, "b": 2}), ("boom", {}), ("done", {"answer": "x"})


def record(folder, *replies, hooks=(), **rest):
    sink = ProvenanceSink(folder)
    run = composable_loop(
        ScriptedBackend(replies or [ADD, BOOM, DONE]), {"goal": "g"}, make_tools(), hooks=[*hooks, sink], **rest
    )
    list(run)
    return sink, run


def test_spans_are_found_by_name_attributes_and_condition(tmp_path):
    record(tmp_path)
    trace = Trace.load(tmp_path)
    assert [n.name for n in trace.find("execute_tool *")] == [
        "execute_tool add",
        "execute_tool boom",
        "execute_tool done",
    ]
    (failed,) = trace.find(attributes={"error.type": "execution"})
    assert [n.name for n in failed.ancestors()] == ["looplet.dispatch", "looplet.turn", "invoke_agent looplet"]
    assert trace.find(where=lambda n: n.is_error) == [failed]
    assert trace.span(failed.span_id) is failed
    assert failed.duration_s >= 0
    assert len(list(trace.roots[0].descendants())) == len(trace) - 1
    with pytest.raises(KeyError):
        trace.span("0" * 16)


def test_the_conversation_is_rebuilt_with_its_hashes_verified(tmp_path):
    record(tmp_path)
    (run,) = Trace.load(tmp_path).runs
    assert [m.role for m in run.conversation()] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    file = tmp_path / "trace.jsonl"
    file.write_bytes(file.read_bytes().replace(b"goal: g", b"goal: h"))
    (forged,) = Trace.load(tmp_path).runs
    with pytest.raises(TraceError, match="do not have its hash"):
        forged.request(forged.chats[0])


def test_a_lost_message_is_named(tmp_path):
    record(tmp_path)
    file = tmp_path / "trace.jsonl"
    lines = [
        line
        for line in file.read_bytes().splitlines(keepends=True)
        if b'"chat scripted"' not in line or b'"0-2"' not in line
    ]
    file.write_bytes(b"".join(lines))
    (run,) = Trace.load(tmp_path).runs
    with pytest.raises(TraceError, match="message 1 of the request is not in the trace"):
        run.request(run.chats[-1])


def test_an_attribute_cut_by_a_limit_is_named(tmp_path):
    record(tmp_path)
    file = tmp_path / "trace.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"{\\"a\\":1,\\"b\\":2}"', b'"{\\"a\\":1,"'))
    with pytest.raises(TraceError, match="was it cut by a limit"):
        EvalContext.from_trace(tmp_path)


def test_a_new_run_into_a_folder_sets_the_old_one_aside(tmp_path):
    _, first = record(tmp_path)
    sink, second = record(tmp_path, DONE)
    sink.flush()
    assert EvalContext.from_trace(tmp_path).step_count == 1
    assert EvalContext.from_trace(tmp_path / f"trace-{first.trace_id}.jsonl").step_count == 3
    assert [label for label, _ in load_contexts(tmp_path)] == [f"trace-{first.trace_id}.jsonl", "trace.jsonl"]
    assert second.trace_id != first.trace_id


def test_a_folder_without_a_trace_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"no trace.jsonl in this folder"):
        Trace.load(tmp_path)
    assert load_contexts(tmp_path) == []


def test_several_runs_in_one_file_are_told_apart(tmp_path):
    sink = ProvenanceSink(tmp_path)
    one, two = (
        composable_loop(ScriptedBackend([ADD, DONE]), {"goal": "g"}, make_tools(), hooks=[sink]) for _ in range(2)
    )
    for _ in zip(one, two, strict=True):
        pass
    list(one), list(two)
    trace = Trace.load(tmp_path)
    assert [view.run_id for view in trace.runs] == [one.run_id, two.run_id]
    assert EvalContext.from_trace(tmp_path, two.run_id) == EvalContext.from_run(two)
    with pytest.raises(TraceError, match="2 runs fit; pass run_id="):
        EvalContext.from_trace(tmp_path)
    assert len(load_contexts(tmp_path)) == 2


def span(name, span_id, parent="", at=0, **attributes):
    return {
        "traceId": "a" * 32,
        "spanId": f"{span_id:016x}",
        "parentSpanId": parent and f"{parent:016x}",
        "name": name,
        "kind": 1,
        "startTimeUnixNano": str(1000 + at),
        "endTimeUnixNano": str(2000 + at),
        "status": {"code": 2, "message": "no route"} if attributes.pop("failed", False) else {},
        "attributes": [
            {"key": k, "value": {"stringValue": v} if isinstance(v, str) else {"intValue": v}}
            for k, v in attributes.items()
        ],
    }


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"result": t}, lambda t: [t]], ids=["otlp", "jaeger", "array"])
def test_a_foreign_trace_in_the_conventions_can_be_judged(tmp_path, wrap):
    op = "gen_ai.operation.name"
    spans = [
        span("invoke_agent theirs", 1, **{op: "invoke_agent", "gen_ai.agent.name": "theirs"}),
        span("chat m", 2, 1, 1, **{op: "chat", "gen_ai.usage.input_tokens": "12", "gen_ai.usage.output_tokens": "3"}),
        span(
            "execute_tool find",
            3,
            1,
            2,
            **{
                op: "execute_tool",
                "gen_ai.tool.name": "find",
                "gen_ai.tool.call.arguments": '{"q": 1}',
                "gen_ai.tool.call.result": '"found"',
            },
        ),
        span("execute_tool lose", 4, 1, 3, failed=True, **{op: "execute_tool", "gen_ai.tool.name": "lose"}),
    ]
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(wrap({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]})))
    context = EvalContext.from_trace(file)
    assert context.tool_sequence == ["find", "lose"]
    assert context.steps[0].tool_result.data == "found"
    assert context.errors == ["no route"]
    assert (context.stop_reason, context.completed) == ("unknown", False)
    (view,) = Trace.load(file).runs
    assert (view.agent, view.usage.input_tokens) == ("theirs", 12)


def test_spans_that_are_each_others_parents_end():
    from looplet.telemetry.otlp import decode_line

    spans = [span("a", 1, 2), span("b", 2, 1), span("c", 3, 2)]
    trace = Trace(decode_line(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode()))
    assert [root.name for root in trace.roots] == ["a"]
    assert [node.name for node in trace.roots[0].descendants()] == ["b", "c"]


def test_a_request_that_builds_on_itself_is_refused(tmp_path):
    record(tmp_path)
    file = tmp_path / "trace.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"0-2"', b'"1^2"'))
    (run,) = Trace.load(tmp_path).runs
    with pytest.raises(TraceError, match="builds on a later request"):
        run.request(run.chats[1])


# --- traces of other writers ------------------------------------------------------------------------------------------


def foreign(*spans: tuple[str, int, int, dict]) -> Spans:
    """Return spans without a run of looplet's: name, id, parent's id, attributes."""
    made = Spans()
    for name, number, parent, told in spans:
        told = {semconv.OPERATION_NAME: name.split()[0], **told}
        made.add(name, number, parent, (number, number + 1), told, scope="theirs", run="")
    return made


@pytest.mark.parametrize(
    ("arguments", "args"),
    [
        ("look at x", {"text": "look at x"}),
        ('{"q": 1, ', {"text": '{"q": 1, '}),
        ("[1, 2]", {"text": "[1, 2]"}),
        ('{"q": 1}', {"q": 1}),
        ({"q": "x", "n": 1}, {"q": "x", "n": 1}),
        ([1, 2], {"text": "[1,2]"}),
        (7, {"text": "7"}),
        ("", {}),
    ],
)
def test_arguments_of_others_are_read_whatever_they_are(tmp_path, arguments, args):
    told = {semconv.TOOL_NAME: "t", semconv.TOOL_CALL_ARGUMENTS: arguments}
    (step,) = foreign(("execute_tool t", 1, 0, told)).view(tmp_path).steps
    assert step.tool_call.args == args


@pytest.mark.parametrize(
    ("result", "data"),
    [
        ("sunny, 21 degrees", "sunny, 21 degrees"),
        ('{"t": 21', '{"t": 21'),
        ('{"t": 21}', {"t": 21}),
        ({"t": 21}, {"t": 21}),
    ],
)
def test_results_of_others_are_read_whatever_they_are(tmp_path, result, data):
    (step,) = foreign(("execute_tool t", 1, 0, {semconv.TOOL_CALL_RESULT: result})).view(tmp_path).steps
    assert step.tool_result.data == data


HELLO = {"type": "text", "content": "hello"}
CALL = {"type": "tool_call", "id": "", "name": "t", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("told", "messages"),
    [
        ("hello", [("user", [HELLO])]),
        ('"hello"', [("user", [HELLO])]),
        ('["hello"]', [("user", [HELLO])]),
        ('[{"role": "system", "parts": [{"type": "text", "content": "hello"}]}]', [("system", [HELLO])]),
        ('[{"role": "system", "content": "hello"}]', [("system", [HELLO])]),
        ('[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]',
         [("user", [{**HELLO, "text": "hello"}])]),
        ('[{"role": "user", "parts": ["hello"]}]', [("user", [HELLO])]),
        ('[{"role": "assistant", "parts": [{"type": "tool_call", "name": "t", "arguments": "{\\"a\\": 1}"}]}]',
         [("assistant", [CALL])]),
        ('[{"role": "tool", "parts": [{"type": "tool_call_response", "id": null, "result": 3}]}]',
         [("tool", [{"type": "tool_call_response", "id": "", "result": 3, "response": 3}])]),
        ('[{"role": "user", "parts": [{"type": "blob", "modality": "image"}]}]',
         [("user", [{"type": "blob", "modality": "image"}])]),
        ([{"role": "user", "parts": [HELLO]}], [("user", [HELLO])]),
    ],
)  # fmt: skip
def test_messages_of_others_are_read_whatever_they_are(tmp_path, told, messages):
    view = foreign(("chat m", 1, 0, {semconv.INPUT_MESSAGES: told})).view(tmp_path)
    read = view.request(view.chats[0])
    assert [(message.role, list(message.parts)) for message in read] == messages
    assert view.conversation() == read


def test_answers_of_others_may_be_plain_text(tmp_path):
    view = foreign(("chat m", 1, 0, {semconv.INPUT_MESSAGES: "hello", semconv.OUTPUT_MESSAGES: "hi"})).view(tmp_path)
    assert [(message.role, message.text) for message in view.conversation()] == [("user", "hello"), ("assistant", "hi")]


def test_a_chat_inside_a_chat_of_others_counts_nothing_twice(tmp_path):
    tokens = {semconv.INPUT_TOKENS: 12, semconv.OUTPUT_TOKENS: 3}
    view = foreign(
        ("invoke_agent a", 1, 0, tokens),
        ("chat m", 2, 1, tokens),
        ("chat m", 3, 2, tokens),
        ("execute_tool t", 4, 1, {}),
        ("chat m", 5, 4, tokens),
    ).view(tmp_path)
    assert [int(chat.span_id, 16) for chat in view.chats] == [2, 5]
    assert (view.usage.input_tokens, view.usage.output_tokens) == (24, 6)
    assert [step.usage.input_tokens for step in view.steps] == [12]


@pytest.mark.parametrize(("told", "tokens"), [(3, 3), ("3", 3), ("many", 0), (-3, 0), ([3], 0), (10**15, 0), (True, 0)])
def test_tokens_of_others_count_where_they_are_numbers(tmp_path, told, tokens):
    assert foreign(("chat m", 1, 0, {semconv.INPUT_TOKENS: told})).view(tmp_path).usage.input_tokens == tokens


# --- whose usage it is, live and read back ----------------------------------------------------------------------------


def test_usage_of_tools_that_ask_a_model_is_told_alike_by_the_run_and_its_file():
    @tool
    def ask(text: str, ctx: ToolContext) -> str:
        """Ask the model."""
        return ctx.llm.generate(text)

    @tool(concurrent_safe=True)
    def twice(text: str, ctx: ToolContext) -> str:
        """Ask the model twice, at the same time as others."""
        return ctx.llm.generate(text) + ctx.llm.generate(text)

    def reply(tokens, *calls):
        return Reply("said", tuple(ToolCall(name, dict(args)) for name, args in calls), Usage(tokens, 1))

    def make(is_async):
        plain = [reply(10**n) for n in range(4, 10)]
        replies = [
            reply(1, ("ask", {"text": "a"}), ("add", {"a": 1, "b": 2}), ("ask", {"text": "b"}), ("nowhere", {})),
            *plain[:2],
            reply(10, ("twice", {"text": "c"}), ("twice", {"text": "d"}), ("ask", {"text": "e"})),
            *plain[2:4], *plain[2:4], plain[4],
            reply(100, DONE),
        ]  # fmt: skip
        tools = tools_from([ask, twice, add], include_done=True)
        return {"llm": (AsyncScriptedBackend if is_async else ScriptedBackend)(replies), "task": {}, "tools": tools}

    outcome = both(make)
    (view,) = outcome.trace.runs
    spent = [step.usage.input_tokens for step in outcome.steps]
    assert spent == [10_001, 0, 100_000, 0, 10 + 2 * 10**6 + 2 * 10**7, 0, 10**8, 100]
    assert sum(spent) == view.usage.input_tokens
    assert [bool(step.prompt) for step in outcome.steps] == [n in (1, 5, 8) for n in range(1, 9)]
    assert len(view.agent_chats) == 3


# --- growth -----------------------------------------------------------------------------------------------------------


class Briefs:
    """Say something new before every request, so that references to the rest are given relative to earlier ones."""

    def pre_prompt(self, state, log, ctx, step):
        return f"fact {step}"


def calls_during(read) -> Counter:
    """Return how often each function was called while `read` worked."""
    counted: Counter = Counter()

    def note(frame, event, arg):
        if event == "call":
            counted[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        read()
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize("order", [1, -1], ids=["oldest first", "newest first"])
def test_rebuilding_every_request_resolves_and_hashes_each_thing_once(tmp_path, order):
    record(tmp_path, *[ADD] * 60, DONE, hooks=[Briefs()], max_steps=99)
    (view,) = Trace.load(tmp_path).runs
    relative = sum("^" in chat.attributes[semconv.INPUT_REFS] for chat in view.chats)
    assert relative > 40
    counted = calls_during(lambda: [view.request(chat) for chat in view.chats[::order]])
    assert counted["_resolved"] <= len(view.chats) + 1  # the first one that others build on, a second time
    assert counted["digest"] <= len(view.message_log)


def test_the_folder_of_a_long_run_grows_with_what_was_said(tmp_path):
    calls = [("add", {"a": number, "b": 1}) for number in range(WHOLE_PROMPTS + 9)]
    sink, _ = record(tmp_path, *calls, DONE, max_steps=99)
    sink.flush()
    last_whole, first_new = (
        (tmp_path / f"call_{number}_prompt.txt").read_text() for number in (WHOLE_PROMPTS - 1, WHOLE_PROMPTS)
    )
    assert last_whole.count("═══ 0 user ═══") == 1
    assert "goal: g" not in first_new
    head, *rest = first_new.splitlines()
    assert head == f"# call {WHOLE_PROMPTS} — method=chat turn={WHOLE_PROMPTS + 1}"
    assert f"run.request(run.chats[{WHOLE_PROMPTS}])" in rest[0]
    assert rest[1:] == [f"═══ {2 * WHOLE_PROMPTS - 1} assistant calls add [call_{WHOLE_PROMPTS}] ═══",
                        f'{{"a":{WHOLE_PROMPTS - 1},"b":1}}',
                        f"═══ {2 * WHOLE_PROMPTS} tool [call_{WHOLE_PROMPTS}] ═══", str(WHOLE_PROMPTS)]  # fmt: skip
    (view,) = Trace.load(tmp_path).runs
    assert Message.of_text("user", "goal: g") in view.request(view.chats[WHOLE_PROMPTS])
    assert len(list(tmp_path.glob("call_*_response.txt"))) == len(view.chats)

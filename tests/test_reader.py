"""Reading traces back: queries, foreign traces, several runs in a file, damage."""

import json

import pytest
from support import make_tools

from looplet import EvalContext, ProvenanceSink, Trace, TraceError, composable_loop
from looplet.evals.context import load_contexts
from looplet.testing import ScriptedBackend

ADD, BOOM, DONE = ("add", {"a": 1, "b": 2}), ("boom", {}), ("done", {"answer": "x"})


def record(folder, *replies, **rest):
    sink = ProvenanceSink(folder)
    run = composable_loop(
        ScriptedBackend(replies or [ADD, BOOM, DONE]), {"goal": "g"}, make_tools(), hooks=[sink], **rest
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

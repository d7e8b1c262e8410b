"""Tools of MCP servers: real servers in processes of their own, and over HTTP."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support import both, python, run_sync

from looplet import (
    BaseToolRegistry,
    CancelToken,
    ConfigError,
    ErrorKind,
    LoopConfig,
    MCPToolAdapter,
    ToolCall,
    ToolContext,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.testing import ScriptedBackend

pytest.importorskip("mcp_types", reason='the MCP tests need the official SDK, 2.0 or newer: pip install "looplet[mcp]"')
from mcp_servers.legacy_http import LegacyServer

SERVERS = Path(__file__).parent / "mcp_servers"
PLAIN = [sys.executable, str(SERVERS / "plain.py")]
EVERYTHING = "LOOPLET_MCP_EVERYTHING"
DONE = ("done", {"answer": "ok"})


def rude(mode: str, notes: Path | None = None) -> list[str]:
    return [sys.executable, str(SERVERS / "rude.py"), mode, *([str(notes)] if notes else [])]


@pytest.fixture(scope="module")
def plain():
    """Return an adapter that no test breaks."""
    with MCPToolAdapter(PLAIN) as adapter:
        yield adapter


def registry_of(*adapters: MCPToolAdapter) -> BaseToolRegistry:
    registry = tools_from([], include_done=True)
    for adapter in adapters:
        adapter.register_all(registry)
    return registry


def call(adapter: MCPToolAdapter, name: str, /, **arguments):
    """Call a tool outside of any loop."""
    return registry_of(adapter).dispatch(ToolCall(name, arguments))


def wait_until(is_so) -> None:
    """Wait until something is so that another process brings about."""
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen within 30 s"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def calls_of(outcome, name: str) -> list:
    return [node for node in outcome.trace.runs[0].spans if node.name == f"{semconv.EXECUTE_TOOL} {name}"]


# --- what tools are there ---------------------------------------------------------------------------------------------


def test_tools_keep_their_whole_schema_and_say_when_they_only_read(plain):
    specs = {spec.name: spec for spec in plain.tools()}
    assert specs["add"].json_schema == {
        "type": "object",
        "title": "addArguments",
        "properties": {
            "a": {"title": "A", "type": "integer"},
            "b": {"title": "B", "type": "integer", "default": 1},
        },
        "required": ["a"],
    }
    assert specs["add"].description == "Add two numbers."
    assert specs["add"].concurrent_safe
    assert not specs["person"].concurrent_safe
    assert specs["add"].required_parameters() == ["a"]


def test_list_tools_says_what_the_server_says(plain):
    listed = {tool["name"]: tool for tool in plain.list_tools()}
    assert listed["add"]["annotations"] == {"readOnlyHint": True}
    assert listed["add"]["inputSchema"]["required"] == ["a"]


def test_a_name_that_providers_refuse_is_made_acceptable_and_calls_the_right_tool(plain):
    assert call(plain, "dotted_name_with-more").data == "dotted"


def test_every_page_of_a_list_is_asked_for():
    with MCPToolAdapter(rude("pages")) as adapter:
        assert [spec.name for spec in adapter.tools()] == ["call0", "call1", "call2"]


def test_a_server_without_tools_has_none():
    with MCPToolAdapter(rude("no-tools")) as adapter:
        assert adapter.tools() == []


def test_a_huge_schema_arrives_whole_and_is_checked():
    with MCPToolAdapter(rude("huge")) as adapter:
        (spec,) = adapter.tools()
        assert len(spec.json_schema["properties"]) == 5000
        assert call(adapter, "call", field_7="x", field_4999="y").data == '{"field_4999": "y", "field_7": "x"}'
        assert "needs argument 'field_7'" in call(adapter, "call").error


def test_a_schema_without_properties_takes_anything():
    with MCPToolAdapter(rude("no-properties")) as adapter:
        assert call(adapter, "call", x=[1]).data == '{"x": [1]}'


def test_arguments_may_be_called_self_and_ctx():
    with MCPToolAdapter(rude("reserved")) as adapter:
        assert call(adapter, "call", self="s", ctx=1).data == '{"ctx": 1, "self": "s"}'


def test_a_malformed_schema_is_refused_with_the_name_of_the_tool():
    with (
        MCPToolAdapter(rude("malformed")) as adapter,
        pytest.raises(ConfigError, match=r"server 'rude': the tool 'call' cannot be used: the declared parameters"),
    ):
        adapter.tools()


def test_two_tools_that_come_to_the_same_name_are_refused_naming_both():
    with MCPToolAdapter(rude("twins")) as adapter, pytest.raises(ConfigError, match=r"'a\.b' and 'a/b' would both"):
        adapter.tools()


def test_a_name_that_is_taken_is_refused_naming_both_and_nothing_is_registered(plain):
    @tool
    def person() -> None:
        """Clash."""

    registry = tools_from([person])
    with pytest.raises(ConfigError) as caught:
        plain.register_all(registry)
    assert "the tool 'person' of the MCP server" in str(caught.value)
    assert f"{person.execute.__module__}.{person.execute.__qualname__} have the same name" in str(caught.value)
    assert "prefix=" in str(caught.value)
    assert registry.tool_names == ["person"]


def test_two_adapters_at_once_keep_apart_by_prefix():
    with MCPToolAdapter(rude("ok"), prefix="one_") as one, MCPToolAdapter(rude("error"), prefix="two-") as two:
        registry = registry_of(one, two)
        assert registry.tool_names == ["done", "one_call", "two-call"]
        assert registry.dispatch(ToolCall("one_call")).data == "{}"
        assert registry.dispatch(ToolCall("two-call")).error == "MCP error -32000: out of cheese"


def test_two_servers_with_the_same_names_are_refused_naming_both():
    with MCPToolAdapter(rude("ok")) as one, MCPToolAdapter(rude("ok")) as two:
        registry = registry_of(one)
        with pytest.raises(
            ConfigError, match=r"the tool 'call' of the MCP server 'rude' and .*\(the MCP server 'rude'\)\.call"
        ):
            two.register_all(registry)


REFERENCES = {
    "a reference": ({"kind": "circle", "at": {"x": 1}}, "('circle', Point(x=1, y=0), None, 1)", None),
    "a recursive one": (
        {"kind": "square", "tree": {"name": "a", "children": [{"name": "b"}]}, "size": "big"},
        "('square', None, Tree(name='a', children=[Tree(name='b', children=[])]), 'big')",
        None,
    ),
    "no such choice": ({"kind": "circel"}, None, "$.kind: expected one of 'circle', 'square', got 'circel'"),
    "a mistake behind a reference": ({"kind": "circle", "at": {"x": "q"}}, None, "$.at.x: expected integer, got 'q'"),
    "one deep down": (
        {"kind": "circle", "tree": {"name": "a", "children": [{}]}},
        None,
        "$.tree.children[0].name: expected string, got nothing",
    ),
    "no alternative": ({"kind": "circle", "size": [1]}, None, "$.size: expected integer or string, got array"),
}


@pytest.mark.parametrize("what", REFERENCES)
def test_schemas_with_references_alternatives_and_choices_are_checked_here_and_fit_there(plain, what):
    arguments, data, error = REFERENCES[what]
    result = call(plain, "shape", **arguments)
    assert result.data == data
    assert (result.error is None) if error is None else (error in result.error)


# --- what comes back --------------------------------------------------------------------------------------------------

ANSWERS = {
    "text": ("add", {"a": 2, "b": 3}, "5"),
    "structured data": ("person", {"name": "Ann"}, {"name": "Ann", "age": 7}),
    "several texts": ("several", {}, ["one", "two"]),
    "nothing": ("nothing", {}, None),
    "a picture": (
        "picture",
        {},
        [
            "look:",
            {
                "type": "image",
                "mimeType": "image/png",
                "bytes": 5,
                "note": "the content itself is not shown: it is not text",
            },
        ],
    ),
    "files": (
        "files",
        {},
        [
            {"type": "resource", "uri": "mem://a", "text": "A"},
            {
                "type": "resource",
                "mimeType": "application/octet-stream",
                "bytes": 3,
                "note": "the content itself is not shown: it is not text",
                "uri": "mem://b",
            },
        ],
    ),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_become_data(plain, kind):
    name, arguments, data = ANSWERS[kind]
    assert call(plain, name, **arguments).data == data


def test_a_picture_itself_is_there_for_hooks(plain, tmp_path):
    class Look:
        def post_dispatch(self, state, log, tool_call, result, step):
            if tool_call.tool == "picture":
                seen.append(result.raw["content"][1]["data"])

    seen: list[str] = []

    def make(*, is_async):
        return {
            "llm": ScriptedBackend([("picture", {}), DONE]),
            "tools": registry_of(plain),
            "hooks": [Look()],
            "task": {"goal": "look"},
        }

    outcome = run_sync(make, tmp_path)
    assert seen == ["MTIzNDU="]
    assert "MTIzNDU=" not in (tmp_path / "trace.jsonl").read_text()
    assert outcome.live == outcome.saved


def test_a_tool_that_says_it_failed_is_an_execution_error_with_its_words(plain):
    result = call(plain, "fail", why="the moon is full")
    assert result.error_kind is ErrorKind.EXECUTION
    assert "the moon is full" in result.error


def test_a_json_rpc_error_has_its_code_and_data():
    with MCPToolAdapter(rude("error")) as adapter:
        result = call(adapter, "call")
        assert (result.error, result.error_kind) == ("MCP error -32000: out of cheese", ErrorKind.EXECUTION)
        assert result.error_detail.context == {"code": -32000, "data": {"left": 0}}
        assert adapter.connected


def test_very_long_answers_and_rare_characters_arrive_as_they_are(plain):
    assert call(plain, "long", size=2_000_000).data == "é" * 2_000_000
    assert call(plain, "odd").data == "a\u2028b\x00c\x1b[31m\U0001f600\r\n"


def test_a_server_that_asks_for_what_is_not_offered_is_refused_and_the_call_goes_on(plain):
    assert call(plain, "ask").data.startswith("refused: ")


def test_resources_that_tools_refer_to_can_be_read(plain):
    with MCPToolAdapter(PLAIN, resources=True, prefix="my_") as adapter:

        def make(*, is_async):
            uris = ["mem://notes", "mem://dot", "mem://sound", "mem://nothing"]
            calls = [("my_link", {}), [("my_read_resource", {"uri": uri}) for uri in uris], DONE]
            return {"llm": ScriptedBackend(calls), "tools": registry_of(adapter), "task": {"goal": "read"}}

        outcome = both(make)
    linked, notes, dot, sound, nothing, _ = (step.tool_result for step in outcome.steps)
    assert [one["uri"] for one in linked.data] == ["mem://notes", "mem://dot"]
    assert notes.data == "buy milk"
    assert dot.data["mime_type"] == "image/png"
    assert (sound.data["type"], sound.data["bytes"], sound.data["uri"]) == ("resource", 5, "mem://sound")
    assert (nothing.error_kind, "mem://nothing" in nothing.error) == (ErrorKind.VALIDATION, True)
    (span, *_) = calls_of(outcome, "my_read_resource")
    assert span.attributes[semconv.MCP_METHOD_NAME] == "resources/read"
    assert "read_resource" not in [spec.name for spec in plain.tools()]


def test_an_answer_that_is_none_of_the_protocol_is_an_error():
    with MCPToolAdapter(rude("malformed-result")) as adapter:
        result = call(adapter, "call")
        assert "'rude' gave a malformed answer" in result.error
        assert adapter.connected


def test_a_message_at_which_the_sdk_itself_fails_ends_the_session_and_the_next_call_begins_another(capfd):
    def make(*, is_async):
        script = [("call", {"wait": True}), ("call", {}), DONE]
        return {"llm": ScriptedBackend(script), "tools": registry_of(adapter), "task": {"goal": "count"}}

    with MCPToolAdapter(rude("endless-number")) as adapter:
        outcome = both(make)
    assert "'rude' was lost during the call" in outcome.steps[0].tool_result.error
    assert outcome.steps[1].tool_result.data == "{}"
    assert capfd.readouterr().err == ""


def test_what_a_server_prints_on_stdout_does_not_end_the_session():
    with MCPToolAdapter(rude("chatty")) as adapter:
        assert call(adapter, "call").data == "{}"


def test_garbage_in_place_of_an_answer_times_out_and_is_quoted():
    with MCPToolAdapter(rude("garbage"), timeout=2) as adapter:
        result = call(adapter, "call")
        assert result.error_kind is ErrorKind.TIMEOUT
        assert "it said what is no JSON-RPC message: 'this is not JSON'" in result.error


# --- in loops ---------------------------------------------------------------------------------------------------------


def test_tools_of_a_server_are_steps_like_others_and_their_spans_say_mcp(plain):
    def make(*, is_async):
        calls = [("add", {"a": 1}), ("fail", {"why": "no"}), ("add", {"a": "x"}), DONE]
        return {"llm": ScriptedBackend(calls), "tools": registry_of(plain), "task": {"goal": "add"}}

    outcome = both(make)
    assert [step.tool_result.data for step in outcome.steps[:1]] == ["2"]
    assert [step.tool_result.error_kind for step in outcome.steps] == [
        None,
        ErrorKind.EXECUTION,
        ErrorKind.VALIDATION,
        None,
    ]
    added, failed = *calls_of(outcome, "add"), *calls_of(outcome, "fail")
    for node in (added, failed):
        assert node.attributes[semconv.MCP_METHOD_NAME] == "tools/call"
        assert node.attributes[semconv.NETWORK_TRANSPORT] == "pipe"
        assert node.attributes[semconv.MCP_PROTOCOL_VERSION]
        assert int(node.attributes[semconv.JSONRPC_REQUEST_ID]) > 0
    assert added.attributes[semconv.JSONRPC_REQUEST_ID] != failed.attributes[semconv.JSONRPC_REQUEST_ID]
    assert failed.attributes[semconv.ERROR_TYPE] == "execution"
    assert [node.name for node in outcome.trace.runs[0].spans if "MCP" in node.name] == []


def test_a_json_rpc_error_is_on_the_span():
    with MCPToolAdapter(rude("error")) as adapter:

        def make(*, is_async):
            return {"llm": ScriptedBackend([("call", {}), DONE]), "tools": registry_of(adapter), "task": {"goal": "x"}}

        (node,) = calls_of(both(make), "call")
    assert node.attributes[semconv.RPC_STATUS_CODE] == "-32000"
    assert semconv.TOOL_ABANDONED not in node.attributes


def test_reading_tools_run_at_the_same_time(plain):
    def make(*, is_async):
        calls = [[("add", {"a": number}) for number in range(4)], DONE]
        return {"llm": ScriptedBackend(calls), "tools": registry_of(plain), "task": {"goal": "add"}}

    outcome = both(make)
    assert [step.tool_result.data for step in outcome.steps[:4]] == ["1", "2", "3", "4"]


def test_progress_of_a_server_reaches_the_stream_the_hooks_and_the_trace(plain):
    heard, told = [], []

    class Listener:
        def on_event(self, payload):
            if payload.event == "tool_progress":
                told.append((payload.step_num, payload.extra["stage"]))

    def make(*, is_async):
        calls = [("count", {"to": 3}), DONE]
        return {
            "llm": ScriptedBackend(calls),
            "tools": registry_of(plain),
            "task": {"goal": "count"},
            "hooks": [Listener()],
            "stream": heard.append,
        }

    (node,) = calls_of(both(make), "count")
    expected = [(1, f"number {n}", {"progress": float(n), "total": 3.0}) for n in (1, 2, 3)]
    assert [(e.step, e.stage, e.data) for e in heard if e.kind == "tool_progress"] == expected * 2
    assert told == [(step, stage) for step, stage, _ in expected] * 2
    stages = [e.attributes[semconv.PROGRESS_STAGE] for e in node.events if e.name == semconv.EVENT_PROGRESS]
    assert stages == [stage for _, stage, _ in expected]


def test_somebody_who_fails_to_listen_to_progress_hurts_nobody(plain):
    def fail(stage, data):
        raise RuntimeError("not listening")

    result = registry_of(plain).dispatch(ToolCall("count", {"to": 2}), ctx=ToolContext(on_progress=fail))
    assert (result.data, result.error) == ("counted", None)
    assert call(plain, "add", a=1).data == "2"


def test_the_trace_context_of_the_call_reaches_the_server(plain, tmp_path):
    from opentelemetry import baggage, context

    def make(*, is_async):
        return {"llm": ScriptedBackend([("traceparent", {}), DONE]), "tools": registry_of(plain), "task": {"goal": "x"}}

    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        outcome = run_sync(make, tmp_path)
    finally:
        context.detach(token)
    (node,) = calls_of(outcome, "traceparent")
    parent, sent_baggage, _ = outcome.steps[0].tool_result.data.split()
    assert parent.split("-")[1:3] == [node.record.trace_id, node.record.span_id]
    assert sent_baggage == "tenant=blue"


def test_a_process_gets_the_trace_context_the_safe_variables_and_those_given(monkeypatch):
    from opentelemetry import trace

    monkeypatch.setenv("MY_SECRET", "x")
    span = trace.NonRecordingSpan(trace.SpanContext(0xABC, 0xDEF, is_remote=False))
    with trace.use_span(span), MCPToolAdapter(PLAIN, env={"MY_SETTING": "y"}) as adapter:
        assert call(adapter, "traceparent").data.split()[-1] == f"00-{0xABC:032x}-{0xDEF:016x}-00"
        names = call(adapter, "environment").data.split()
    assert {"PATH", "MY_SETTING", "TRACEPARENT"} <= set(names)
    assert "MY_SECRET" not in names


def test_threads_share_an_adapter(plain):
    registry = registry_of(plain)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda number: registry.dispatch(ToolCall("add", {"a": number})).data, range(40))
        assert list(results) == [str(number + 1) for number in range(40)]


def test_an_async_context_manager_does_the_same():
    async def main() -> list:
        async with MCPToolAdapter(rude("ok")) as adapter:
            run = async_composable_loop(
                ScriptedBackend([("call", {}), DONE]), {"goal": "x"}, registry_of(adapter), max_steps=3
            )
            steps = [step async for step in run]
        assert not adapter.connected
        return steps

    assert asyncio.run(main())[0].tool_result.data == "{}"


# --- time-outs and cancellation ---------------------------------------------------------------------------------------


def test_a_slow_call_times_out_is_cancelled_at_the_server_and_the_session_goes_on(tmp_path):
    notes = tmp_path / "notes"
    with MCPToolAdapter(rude("slow", notes), timeout=2) as adapter:

        def make(*, is_async):
            calls = [("call", {"wait": True}), ("call", {}), DONE]
            return {"llm": ScriptedBackend(calls), "tools": registry_of(adapter), "task": {"goal": "wait"}}

        outcome = both(make)
        wait_until(lambda: notes.read_text().count("cancelled") == 2)
    slow, quick, _ = (step.tool_result for step in outcome.steps)
    assert slow.error == "the MCP server 'rude' gave no answer within 2 s; it was told to cancel the call"
    assert (slow.error_kind, slow.error_retriable) == (ErrorKind.TIMEOUT, True)
    assert quick.data == "{}"
    assert [node.attributes.get(semconv.TOOL_ABANDONED) for node in calls_of(outcome, "call")] == [True, None]


def test_a_cancelled_task_cancels_the_call_at_the_server(tmp_path):
    notes = tmp_path / "notes"

    async def main(adapter) -> None:
        backend = ScriptedBackend([("call", {"wait": True}), DONE])
        run = async_composable_loop(backend, {"goal": "wait"}, registry_of(adapter))
        task = asyncio.ensure_future(anext(run))
        while "called" not in notes.read_text():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        await run.aclose()

    with MCPToolAdapter(rude("slow", notes)) as adapter:
        asyncio.run(main(adapter))
        wait_until(lambda: "cancelled" in notes.read_text())
        assert call(adapter, "call").data == "{}"


def test_a_token_that_is_cancelled_cancels_the_call_at_the_server_and_the_session_goes_on(tmp_path):
    notes = [tmp_path / "sync", tmp_path / "async"]
    with MCPToolAdapter(rude("slow", notes[0])) as one, MCPToolAdapter(rude("slow", notes[1])) as other:

        def make(*, is_async):
            note, token = notes[is_async], CancelToken()

            def cancel():
                wait_until(lambda: "called" in note.read_text())
                token.cancel("enough")

            threading.Thread(target=cancel).start()
            return {
                "llm": ScriptedBackend([("call", {"wait": True}), DONE]),
                "tools": registry_of(other if is_async else one),
                "task": {"goal": "wait"},
                "config": LoopConfig(cancel_token=token),
            }

        outcome = both(make)
        assert outcome.stop_reason == "cancelled"
        (step,) = outcome.steps
        assert (step.tool_result.error, step.tool_result.error_kind) == (
            "cancelled: enough; the server was told",
            ErrorKind.CANCELLED,
        )
        assert calls_of(outcome, "call")[0].attributes[semconv.TOOL_ABANDONED] is True
        for adapter, note in zip((one, other), notes, strict=True):
            wait_until(lambda note=note: "cancelled" in note.read_text())
            assert call(adapter, "call").data == "{}"


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_token_that_is_cancelled_ends_the_reading_of_a_resource(is_async, tmp_path):
    note, token = tmp_path / "notes", CancelToken()

    def cancel():
        wait_until(lambda: "called" in note.read_text())
        token.cancel("enough")

    with MCPToolAdapter(rude("slow", note), resources=True) as adapter:
        script = [("read_resource", {"uri": "mem://notes"}), DONE]
        given = {"tools": registry_of(adapter), "task": {"goal": "read"}, "config": LoopConfig(cancel_token=token)}
        threading.Thread(target=cancel).start()
        if is_async:
            run = async_composable_loop(ScriptedBackend(script), **given)
            asyncio.run(_exhaust(run))
        else:
            run = composable_loop(ScriptedBackend(script), **given)
            list(run)
        assert [step.tool_result.error_kind for step in run.state.steps] == [ErrorKind.CANCELLED]
        wait_until(lambda: "cancelled" in note.read_text())


async def _exhaust(run):
    return [step async for step in run]


def test_ctrl_c_cancels_the_call_at_the_server(tmp_path):
    notes = tmp_path / "notes"
    program = f"""
import os, signal, threading, time
from pathlib import Path
from looplet import MCPToolAdapter, composable_loop, tools_from
from looplet.testing import ScriptedBackend

def wait_for(note):
    while note not in Path({str(notes)!r}).read_text():
        time.sleep(0.01)

def interrupt():
    wait_for("called")
    while not heard.is_set():  # a lock whose wait has just begun does not hear of a signal until the next one
        os.kill(os.getpid(), signal.SIGINT)
        heard.wait(2)

def handle(*args):
    heard.set()
    raise KeyboardInterrupt

heard = threading.Event()
signal.signal(signal.SIGINT, handle)
with MCPToolAdapter({rude("slow", notes)!r}) as adapter:
    adapter.register_all(tools := tools_from([], include_done=True))
    backend = ScriptedBackend([("call", {{"wait": True}})])
    threading.Thread(target=interrupt).start()
    try:
        for step in composable_loop(backend, {{"goal": "x"}}, tools):
            print(step.pretty())
    except KeyboardInterrupt:
        print("interrupted")
        wait_for("cancelled")
"""
    done = python("-c", program)
    assert (done.stdout, done.returncode) == ("interrupted\n", 0), done.stderr
    assert notes.read_text().splitlines()[1:] == ["called", "cancelled"]


def test_a_server_that_never_answers_is_refused_and_ended(tmp_path):
    notes = tmp_path / "notes"
    with pytest.raises(ConfigError, match=r"the MCP server 'python.*' did not answer within 1 s"):
        MCPToolAdapter.connect_stdio(rude("mute", notes), timeout=1)
    assert is_gone(int(notes.read_text()))


# --- servers that end -------------------------------------------------------------------------------------------------


def test_a_server_killed_in_mid_call_is_not_called_again_and_started_anew_by_the_next_call(tmp_path):
    with MCPToolAdapter(PLAIN) as adapter:

        def make(*, is_async):
            note = tmp_path / "note"
            note.unlink(missing_ok=True)
            calls = [("die", {"note": str(note)}), ("add", {"a": 1}), DONE]
            return {"llm": ScriptedBackend(calls), "tools": registry_of(adapter), "task": {"goal": "die"}}

        outcome = both(make)
    died, added, _ = (step.tool_result for step in outcome.steps)
    assert (tmp_path / "note").read_text() == "x"
    assert died.error.startswith(
        "the MCP server 'plain' was lost during the call, which may have had its effect and was not made again; "
        "the next call starts or reaches the server anew; its last words on stderr: "
    )
    assert died.error.endswith("I do not feel so good")
    assert (died.error_kind, died.error_retriable) == (ErrorKind.NETWORK, False)
    assert added.data == "2"
    assert calls_of(outcome, "die")[0].attributes[semconv.TOOL_ABANDONED] is True


def test_a_server_that_ended_between_calls_is_started_anew(tmp_path):
    notes = tmp_path / "notes"
    with MCPToolAdapter(rude("ok", notes)) as adapter:
        registry = registry_of(adapter)
        assert registry.dispatch(ToolCall("call")).data == "{}"
        os.kill(int(notes.read_text()), signal.SIGKILL)
        wait_until(lambda: not adapter.connected)
        assert registry.dispatch(ToolCall("call")).data == "{}"
    one, two = map(int, notes.read_text().split())
    assert one != two
    assert is_gone(one)
    assert is_gone(two)


def test_a_server_that_cannot_be_started_again_is_an_error_for_the_model(tmp_path):
    script = tmp_path / "server.py"
    script.write_text((SERVERS / "rude.py").read_text())
    notes = tmp_path / "notes"
    with MCPToolAdapter([sys.executable, str(script), "ok", str(notes)]) as adapter:
        registry = registry_of(adapter)
        script.write_text("raise SystemExit('out of order')")
        os.kill(int(notes.read_text()), signal.SIGKILL)
        wait_until(lambda: not adapter.connected)
        result = registry.dispatch(ToolCall("call"))
        assert result.error.startswith("not called: the MCP server 'python")
        assert result.error.endswith("ended before it answered; its last words on stderr: out of order")
        assert (result.error_kind, result.error_retriable) == (ErrorKind.NETWORK, True)


def test_a_server_that_crashes_at_the_start_is_refused_with_its_last_words():
    with pytest.raises(ConfigError, match=r"ended before it answered; .* stderr: ImportError: no module named nothing"):
        MCPToolAdapter.connect_stdio(rude("crash"))


def test_a_command_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"the MCP server 'no-such-program' cannot be started: .* check the command"):
        MCPToolAdapter.connect_stdio("no-such-program --flag")


def test_closing_ends_the_server_and_the_thread_and_the_tools_say_so(tmp_path):
    notes = tmp_path / "notes"
    before = threading.active_count()
    adapter = MCPToolAdapter(rude("ok", notes))
    registry = registry_of(adapter)
    adapter.close()
    adapter.close()
    assert is_gone(int(notes.read_text()))
    wait_until(lambda: threading.active_count() <= before)
    assert "this adapter is closed; make a new one" in registry.dispatch(ToolCall("call")).error
    with pytest.raises(ConfigError, match="this adapter is closed"):
        adapter.tools()


def test_closing_ends_a_call_that_still_runs(tmp_path):
    notes = tmp_path / "notes"
    adapter = MCPToolAdapter(rude("slow", notes))
    registry = registry_of(adapter)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(registry.dispatch, ToolCall("call", {"wait": True}))
        wait_until(lambda: adapter.connected)
        adapter.close()
        assert waiting.result(timeout=30).error is not None


def test_an_adapter_that_nobody_has_any_more_ends_its_server(tmp_path):
    notes = tmp_path / "notes"
    adapter = MCPToolAdapter.connect_stdio(rude("ok", notes))
    pid = int(notes.read_text())
    registry = registry_of(adapter)
    del adapter
    gc.collect()
    assert registry.dispatch(ToolCall("call")).data == "{}"  # the tools keep it
    del registry
    gc.collect()
    wait_until(lambda: is_gone(pid))


def test_an_open_adapter_at_exit_leaves_no_process_no_warning_and_no_noise(tmp_path):
    notes = tmp_path / "notes"
    program = f"""
from looplet import MCPToolAdapter, tools_from, ToolCall
adapter = MCPToolAdapter({PLAIN!r})
rude = MCPToolAdapter({rude("chatty", notes)!r}, prefix="rude_")
tools = tools_from([])
adapter.register_all(tools)
rude.register_all(tools)
print(tools.dispatch(ToolCall("noisy")).data, tools.dispatch(ToolCall("rude_call")).data)
"""
    done = python("-X", "dev", "-W", "error", "-c", program)
    assert (done.stdout, done.stderr, done.returncode) == ("quiet {}\n", "", 0)
    assert is_gone(int(notes.read_text()))


def test_a_forked_child_leaves_the_session_to_its_parent():
    program = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from looplet import ConfigError, MCPToolAdapter, ToolCall, tools_from
with MCPToolAdapter({rude("ok")!r}) as adapter:
    tools = tools_from([])
    adapter.register_all(tools)
    if not (pid := os.fork()):
        print(tools.dispatch(ToolCall("call")).error, flush=True)
        sys.exit()
    os.waitpid(pid, 0)
    print(tools.dispatch(ToolCall("call")).data)
"""
    done = python("-c", program)
    first, second = done.stdout.splitlines()
    assert "belongs to the parent process" in first
    assert second == "{}"


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_a_server_over_http_gets_the_headers_and_a_farewell():
    with LegacyServer() as server:

        def make(*, is_async):
            calls = [("call", {"x": 1}), DONE]
            return {"llm": ScriptedBackend(calls), "tools": registry_of(adapter), "task": {"goal": "call"}}

        with MCPToolAdapter.connect_http(server.url, headers={"Authorization": "Bearer abc"}) as adapter:
            outcome = both(make)
        assert {headers["authorization"] for headers in server.headers} == {"Bearer abc"}
        assert (server.opened, server.farewells) == (1, 1)
    assert outcome.steps[0].tool_result.data == "session-1"
    (node,) = calls_of(outcome, "call")
    assert node.attributes[semconv.NETWORK_TRANSPORT] == "tcp"
    assert node.attributes[semconv.MCP_SESSION_ID] == "session-1"
    assert f"127.0.0.1:{node.attributes[semconv.SERVER_PORT]}" in server.url
    assert (
        server.calls[0]["_meta"]["traceparent"].split("-")[1] != server.calls[1]["_meta"]["traceparent"].split("-")[1]
    )


@pytest.mark.parametrize("status", [404, 400])
def test_a_session_that_the_server_forgot_is_opened_anew_and_the_refused_call_made_once_more(status):
    with LegacyServer() as server, MCPToolAdapter.connect_http(server.url) as adapter:
        registry = registry_of(adapter)
        server.refusal = status
        server.sessions.clear()
        assert registry.dispatch(ToolCall("call")).data == "session-2"
        assert len(server.calls) == 1
        assert registry.dispatch(ToolCall("call")).data == "session-2"


def test_a_server_that_refuses_every_session_is_asked_twice_and_no_more():
    class Forgetful(LegacyServer):
        def answer(self, message, session):
            if message["method"] == "tools/call":
                self.calls.append(message)
                return 404, {}, None
            return super().answer(message, session)

    with Forgetful() as server, MCPToolAdapter.connect_http(server.url) as adapter:
        result = registry_of(adapter).dispatch(ToolCall("call"))
        assert result.error == "MCP error -32600: Session terminated"
        assert len(server.calls) == 2


@contextmanager
def over_http(port: int = 0):
    """Serve the SDK's server over HTTP in a process; give the process and its port."""
    command = [*PLAIN, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_server_of_the_sdk_over_http_is_the_same_as_on_stdio():
    with over_http() as (_, port), MCPToolAdapter(url=f"http://127.0.0.1:{port}/mcp") as adapter:

        def make(*, is_async):
            calls = [[("add", {"a": n}) for n in range(4)], ("person", {"name": "Ann"}), ("fail", {"why": "no"}), DONE]
            return {"llm": ScriptedBackend(calls), "tools": registry_of(adapter), "task": {"goal": "add"}}

        outcome = both(make)
    assert [step.tool_result.data for step in outcome.steps[:5]] == ["1", "2", "3", "4", {"name": "Ann", "age": 7}]
    assert "no" in outcome.steps[5].tool_result.error
    (node,) = calls_of(outcome, "person")
    assert node.attributes[semconv.NETWORK_TRANSPORT] == "tcp"


def test_a_server_over_http_killed_in_mid_call_is_not_called_again_and_reached_anew_by_the_next_call(tmp_path):
    note = tmp_path / "note"
    with over_http() as (_, port):
        adapter = MCPToolAdapter.connect_http(f"http://127.0.0.1:{port}/mcp")
        registry = registry_of(adapter)
        result = registry.dispatch(ToolCall("die", {"note": str(note)}))
    with closing(adapter):
        assert "was lost during the call, which may have had its effect and was not made again" in result.error
        assert (result.error_kind, result.error_retriable) == (ErrorKind.NETWORK, False)
        assert note.read_text() == "x"
        with over_http(port):
            assert registry.dispatch(ToolCall("add", {"a": 1})).data == "2"


def test_an_address_where_nobody_listens_is_refused():
    with LegacyServer() as server:
        url = server.url
    with pytest.raises(ConfigError, match=r"at http://127\.0\.0\.1:\d+/mcp cannot be reached: .*; check the URL"):
        MCPToolAdapter.connect_http(url.replace("http://", "http://user:secret@") + "?token=secret")


def test_a_server_that_went_away_is_an_error_for_the_model_and_reached_again_when_it_is_back():
    with LegacyServer() as server:
        adapter = MCPToolAdapter.connect_http(server.url)
        registry = registry_of(adapter)
    with adapter:
        result = registry.dispatch(ToolCall("call"))
        assert result.error.startswith(f"not called: the MCP server at {server.url} cannot be reached")
        assert (result.error_kind, result.error_retriable) == (ErrorKind.NETWORK, True)
        with LegacyServer(server.port) as again:
            assert registry.dispatch(ToolCall("call")).data == "session-1"
            adapter.close()
        assert len(again.calls) == 1


# --- arguments --------------------------------------------------------------------------------------------------------

REFUSED = {
    "nothing": ({}, "give either a command"),
    "both": ({"command": "x", "url": "http://x"}, "give either a command"),
    "an empty command": ({"command": ""}, "is not a command line"),
    "an empty list": ({"command": []}, "is not a command line"),
    "a word that is none": ({"command": ["x", 1]}, "is not a command line"),
    "an open quote": ({"command": "x 'y"}, "cannot be split into words"),
    "no address": ({"url": "127.0.0.1:8000"}, "give an http:// or https:// address"),
    "another scheme": ({"url": "ftp://x/y"}, "give an http:// or https:// address"),
    "env for a URL": ({"url": "http://x/mcp", "env": {}}, "env= is for a server that is started"),
    "headers for a command": ({"command": "x", "headers": {}}, "headers= is for a server with a URL"),
    "no time": ({"command": "x", "timeout": 0}, "timeout=0: give seconds"),
    "a bad prefix": ({"command": "x", "prefix": "a.b"}, "prefix='a.b': use ASCII letters"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_cannot_work_are_refused_at_once(what):
    arguments, words = REFUSED[what]
    with pytest.raises(ConfigError, match=words):
        MCPToolAdapter(**arguments)


def test_a_command_line_is_split_like_a_shell_does_and_no_shell_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the server takes `exit` for the file that it writes its notes to
    server = tmp_path / "my server.py"
    server.write_text((SERVERS / "rude.py").read_text())
    with MCPToolAdapter(f'"{sys.executable}" "{server}" ok "{tmp_path / "notes"}" ; exit 1') as adapter:
        assert call(adapter, "call").data == "{}"


# --- servers of others ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    EVERYTHING not in os.environ,
    reason=f"set {EVERYTHING} to dist/index.js of the npm package @modelcontextprotocol/server-everything",
)
def test_the_reference_server_of_the_protocol_works():
    with MCPToolAdapter(["node", os.environ[EVERYTHING]]) as adapter:
        assert call(adapter, "echo", message="hi").data == "Echo: hi"
        assert call(adapter, "get-sum", a=1, b=2).data == "The sum of 1 and 2 is 3."
        assert call(adapter, "get-tiny-image").data[1].mime_type == "image/png"
        assert set(call(adapter, "get-structured-content", location="Chicago").data) >= {"temperature", "conditions"}
        assert "expected one of 'New York', 'Chicago'" in call(adapter, "get-structured-content", location="Rome").error
        reader = MCPToolAdapter(["node", os.environ[EVERYTHING]], resources=True)
        with reader:
            assert "Resource 1" in call(reader, "read_resource", uri="demo://resource/dynamic/text/1").data
        stages = []
        ctx = ToolContext(on_progress=lambda stage, data: stages.append(data))
        registry_of(adapter).dispatch(
            ToolCall("trigger-long-running-operation", {"duration": 0.1, "steps": 2}), ctx=ctx
        )
        assert stages == [{"progress": 1.0, "total": 2.0}, {"progress": 2.0, "total": 2.0}]

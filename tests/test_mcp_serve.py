"""`looplet mcp serve`: our tools for the clients of others, and for our own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import both, environment, run_sync

from looplet import ErrorKind, MCPToolAdapter, ToolCall, tools_from
from looplet.cli import main
from looplet.cli.mcp import load_tools
from looplet.telemetry import semconv
from looplet.testing import ScriptedBackend

pytest.importorskip("mcp_types", reason='serving needs the official SDK, 2.0 or newer: pip install "looplet[mcp]"')

SERVED = Path(__file__).parent / "mcp_servers" / "served.py"
NAMES = ["greet", "later", "refuse", "warn", "current_trace", "thread", "stuck", "count", "copy", "obey", "meet"]
DONE = ("done", {"answer": "ok"})


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "looplet", "mcp", "serve", *map(str, arguments)]


@pytest.fixture(scope="module")
def served():
    """Return an adapter to our own server; its registry checks nothing, so that the server has to."""
    with MCPToolAdapter(command(f"{SERVED}:everything"), env={"PYTHONPATH": environment()["PYTHONPATH"]}) as adapter:
        yield adapter


def registry_of(adapter: MCPToolAdapter):
    registry = tools_from([], include_done=True)
    adapter.register_all(registry)
    return registry


def answer_of(adapter: MCPToolAdapter, name: str, /, **arguments):
    """Return what the server says, unchecked by our own registry."""
    (spec,) = (spec for spec in adapter.tools() if spec.name == name)
    return asyncio.run(spec.execute(**arguments))


def test_schemas_are_served_and_tools_that_end_runs_are_not(served):
    specs = {spec.name: spec for spec in served.tools()}
    assert list(specs) == NAMES
    assert specs["greet"].json_schema == load_tools(f"{SERVED}:greet").find("greet").json_schema
    assert specs["greet"].description == "Greet someone."


def test_tools_run_in_loops_and_what_they_print_is_not_on_the_wire(served):
    def make(*, is_async):
        calls = [("greet", {"name": "Ann", "times": 2}), ("later", {"words": "soon"}), ("warn", {}), DONE]
        return {"llm": ScriptedBackend(calls), "tools": registry_of(served), "task": {"goal": "greet"}}

    outcome = both(make)
    assert [step.tool_result.data for step in outcome.steps[:3]] == [
        {"greeting": "Hello, Ann!Hello, Ann!"},
        "soon",
        ["[1,2]", "warning: mind the gap"],
    ]


def test_wrong_arguments_are_told_in_words_for_the_model(served):
    from looplet import ToolError

    with pytest.raises(ToolError) as caught:
        answer_of(served, "greet", nam="Ann")
    assert caught.value.kind is ErrorKind.EXECUTION
    assert caught.value.message.splitlines() == [
        "tool 'greet' has no argument 'nam'; did you mean 'name'? it takes: name, times",
        "tool 'greet' needs argument 'name' (string)",
    ]


def test_what_a_tool_raises_and_a_time_out_are_told(served):
    registry = registry_of(served)
    assert registry.dispatch(ToolCall("refuse", {"why": "no"})).error == "refused: no"
    assert registry.dispatch(ToolCall("stuck")).error == "no answer within 0.05 s; the call was abandoned"


def test_a_run_of_serial_tools_keeps_its_thread(served):
    registry = registry_of(served)
    names = {registry.dispatch(ToolCall("thread")).data for _ in range(3)}
    assert names == {"looplet-worker"}


def test_the_trace_of_the_call_goes_on_in_the_tool(served, tmp_path):
    from opentelemetry import baggage, context

    def make(*, is_async):
        calls = [("current_trace", {}), DONE]
        return {"llm": ScriptedBackend(calls), "tools": registry_of(served), "task": {"goal": "trace"}}

    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        outcome = run_sync(make, tmp_path)
    finally:
        context.detach(token)
    (node,) = [n for n in outcome.trace.runs[0].spans if n.name == f"{semconv.EXECUTE_TOOL} current_trace"]
    expected = f"{node.record.trace_id}-{node.record.span_id} {{'tenant': 'blue'}}"
    assert outcome.steps[0].tool_result.data == expected


def test_the_official_client_gets_the_same_and_a_protocol_error_for_unknown_tools():
    from mcp import Client, MCPError, StdioServerParameters, stdio_client

    async def talk():
        program, *arguments = command(f"{SERVED}:everything", "--name", "mine")
        parameters = StdioServerParameters(command=program, args=arguments, env=environment())
        async with Client(stdio_client(parameters, sys.stderr)) as client:
            greeted = await client.call_tool("greet", {"name": "Ann"})
            with pytest.raises(MCPError) as caught:
                await client.call_tool("done", {"answer": "x"})
            return client.server_info.name, greeted, caught.value

    name, greeted, error = asyncio.run(talk())
    assert name == "mine"
    assert greeted.structured_content == {"greeting": "Hello, Ann!"}
    assert greeted.content[0].text == '{"greeting":"Hello, Ann!"}'
    assert (error.code, error.message) == (-32602, f"unknown tool 'done'; available: {', '.join(NAMES)}")


def with_official_client(talk, target=f"{SERVED}:everything"):
    """Return what `talk(client)` comes to, with the SDK's own client."""
    from mcp import Client, StdioServerParameters, stdio_client

    async def main():
        program, *arguments = command(target)
        async with Client(
            stdio_client(StdioServerParameters(command=program, args=arguments, env=environment()), sys.stderr)
        ) as client:
            return await talk(client)

    return asyncio.run(main())


def test_calls_of_safe_tools_run_at_the_same_time_and_each_client_gets_its_own_answers(tmp_path):
    async def talk(client):
        meetings = [client.call_tool("meet", {"note": str(tmp_path / "x"), "others": 12}) for _ in range(12)]
        greetings = [client.call_tool("greet", {"name": f"n{number}"}) for number in range(12)]
        met, greeted = await asyncio.gather(*meetings), await asyncio.gather(*greetings)
        return [a.content[0].text for a in met], [a.structured_content["greeting"] for a in greeted]

    met, greeted = with_official_client(talk)
    assert met == ["12"] * 12
    assert greeted == [f"Hello, n{number}!" for number in range(12)]


def test_progress_reaches_a_client_that_asks_for_it_in_order_and_before_the_answer():
    async def talk(client):
        heard, answers = [], []

        async def hear(progress, total, message):
            heard.append((progress, total, message))

        for name, arguments in (("count", {"to": 3}), ("copy", {"files": 2})):
            answers.append((await client.call_tool(name, arguments, progress_callback=hear)).content[0].text)
            answers.append(list(heard))
            heard.clear()
        answers.append((await client.call_tool("count", {"to": 3})).content[0].text)
        return [*answers, heard]

    assert with_official_client(talk) == [
        "counted",
        [(1.0, None, "number 1"), (2.0, None, "number 2"), (3.0, None, "number 3")],
        "copied",
        [(0.0, 20.0, "copying"), (10.0, 20.0, "copying")],
        "counted",
        [],
    ]


def test_a_call_that_the_client_cancels_is_told_to_the_tool_and_the_session_goes_on(tmp_path):
    note = tmp_path / "note"
    note.touch()

    async def written(lines):
        async with asyncio.timeout(60):
            while note.read_text().splitlines() != lines:
                await asyncio.sleep(0.01)

    async def talk(client):
        call = asyncio.create_task(client.call_tool("obey", {"note": str(note)}))
        await written(["begun"])
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await written(["begun", "cancelled"])
        return (await client.call_tool("later", {"words": "still here"})).content[0].text

    assert with_official_client(talk) == "still here"


@contextmanager
def serving_http():
    """Serve over HTTP in a process; return it and its URL."""
    with subprocess.Popen(
        command(f"{SERVED}:listed", "--http", "0"), stderr=subprocess.PIPE, env=environment(), text=True
    ) as process:
        try:
            yield process, process.stderr.readline().split()[-1]
        finally:
            process.kill()


def test_tools_are_served_over_http_on_the_local_interface_only():
    with serving_http() as (_, url):
        assert url.startswith("http://127.0.0.1:")
        with MCPToolAdapter.connect_http(url) as adapter:

            def make(*, is_async):
                calls = [("greet", {"name": "Ann"}), ("plain", {"x": 3}), DONE]
                return {"llm": ScriptedBackend(calls), "tools": registry_of(adapter), "task": {"goal": "greet"}}

            outcome = both(make)
    assert [step.tool_result.data for step in outcome.steps[:2]] == [{"greeting": "Hello, Ann!"}, "3"]


def test_ctrl_c_ends_serving_over_http_and_on_stdio():
    import signal

    with serving_http() as (process, url):
        MCPToolAdapter.connect_http(url).close()  # it serves
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
        assert (process.returncode, words) == (130, "error: interrupted\n")
    with subprocess.Popen(
        command(f"{SERVED}:listed"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(), text=True,
    ) as process:  # fmt: skip
        process.stdin.write('{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
        process.stdin.flush()
        process.stdout.readline()  # it serves
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT


def test_a_port_that_is_taken_is_wrong_usage():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["mcp", "serve", f"{SERVED}:listed", "--http", str(port)])
    assert result.exit_code == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in result.stderr


def test_nothing_to_serve_is_refused(tmp_path):
    file = tmp_path / "kit.py"
    file.write_text("from looplet import tools_from\nkit = tools_from([], include_done=True)\n")
    result = CliRunner().invoke(main, ["mcp", "serve", f"{file}:kit"])
    assert result.exit_code == 2
    assert "there is no tool to serve" in result.stderr

"""Attacks on pausing and resuming: doing things twice, edited files, redactors, other sinks, other tools."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
import threading
from copy import deepcopy
from dataclasses import asdict, dataclass

import pytest
from click.testing import CliRunner
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased
from support import environment

from looplet import (
    AnthropicBackend,
    ConfigError,
    DefaultState,
    EvalContext,
    InjectContext,
    LoopConfig,
    OpenAIBackend,
    ProvenanceSink,
    StaticMemorySource,
    Trace,
    TraceError,
    async_composable_loop,
    composable_loop,
    run_sub_loop,
    tool,
    tools_from,
)
from looplet.approval import ApprovalHook, Verdict
from looplet.budgets import Budget
from looplet.cli import main
from looplet.compaction import TruncateCompact
from looplet.decisions import HookDecision
from looplet.pause import Settings
from looplet.subagents import agent_tool
from looplet.telemetry import semconv
from looplet.telemetry.otlp_file import claim
from looplet.testing import (
    AnthropicServer,
    AsyncMockLLMBackend,
    AsyncScriptedBackend,
    MockLLMBackend,
    OpenAIServer,
    ScriptedBackend,
)
from looplet.types import ToolCall

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
SOURCE = pytest.mark.parametrize("source", ["run", "file"])
DONE = ("done", {"answer": "ok"})
LOOK = ("look", {})
DELETE_A, DELETE_B = ("delete", {"path": "a"}), ("delete", {"path": "b"})
SECRET = "alice@example.org"


def hide(text):
    return text.replace(SECRET, "[email]")


def ask(question="really?"):
    return HookDecision(permission="ask", block=question)


class Gate:
    """Has a human asked about every deletion."""

    def check_permission(self, tool_call, state):
        return ask(f"delete {tool_call.args['path']}?") if tool_call.tool == "delete" else None


class Listens(ScriptedBackend):
    """Notes the system prompt."""

    def chat(self, messages, *, system_prompt="", **settings):
        self.heard = system_prompt
        return super().chat(messages, **settings)


class Ran(list):
    """Tools that note what they did."""

    def tools(self, *more):
        @tool
        def delete(path: str) -> dict:
            """Delete a file."""
            self.append(path)
            return {"deleted": path}

        @tool
        def look() -> str:
            """Look around."""
            self.append("look")
            return "nothing"

        return tools_from([delete, look, *more], include_done=True)


@tool
def deploy(ctx) -> dict:
    """Deploy, if a human says so."""
    answer = ctx.approve("deploy?")
    return {"needs_approval": True, "approval_description": "deploy?"} if answer is None else {"answer": answer}


def go(llm, tools, hooks=(), *, is_async=False, **more):
    """Run to the end."""
    if isinstance(llm, list):
        llm = AsyncScriptedBackend(llm) if is_async else ScriptedBackend(llm)
    hooks = [*hooks, ApprovalHook()]
    if not is_async:
        run = composable_loop(llm, tools=tools, hooks=hooks, **more)
        for _ in run:
            pass
        return run
    run = async_composable_loop(llm, tools=tools, hooks=hooks, **more)

    async def drive():
        async for _ in run:
            pass

    asyncio.run(drive())
    return run


def pause(folder, replies=(DELETE_A,), ran=None, hooks=(), tools=(), **more):
    """Run until it waits for a human; return the run and what ran."""
    ran = Ran() if ran is None else ran
    more = {"task": {"goal": "tidy up"}, **more}
    run = go(list(replies), ran.tools(*tools), [Gate(), *hooks, ProvenanceSink(folder)], **more)
    assert run.stop_reason == "waiting_for_approval"
    return run, ran


def resume(what, ran, replies=(DONE,), hooks=(), tools=(), verdict="approve", **more):
    return go(list(replies), ran.tools(*tools), [Gate(), *hooks], resume=what, verdict=verdict, **more)


def source_of(source, run, folder):
    return run if source == "run" else folder


def require_same(folder, run):
    """Require that the file says what the run says, and that every request can be put together again."""
    assert EvalContext.from_trace(folder, run.run_id) == EvalContext.from_run(run)
    (view,) = [view for view in Trace.load(folder).runs if view.run_id == run.run_id]
    for chat in view.chats:
        view.request(chat)
    return view


def edit(folder, change):
    """Change the pause record in a file."""
    path = folder / "trace.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        for spans in (scope["spans"] for entry in document["resourceSpans"] for scope in entry["scopeSpans"]):
            for told in (told for span in spans for told in span.get("attributes", ())):
                if told["key"] == semconv.PAUSE:
                    record = json.loads(told["value"]["stringValue"])
                    change(record)
                    told["value"]["stringValue"] = json.dumps(record)
        lines.append(json.dumps(document, separators=(",", ":")))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def on_disk(folder):
    return "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file())


# --- once, and no more ------------------------------------------------------------------------------------------------


@SOURCE
def test_a_pause_is_gone_on_from_once(source, tmp_path):
    run, ran = pause(tmp_path)
    resume(source_of(source, run, tmp_path), ran)
    before = on_disk(tmp_path)
    for what in (run, tmp_path, run.paused):
        with pytest.raises(
            ConfigError, match=r"can be resumed, and it ended with 'done'|gone on from this pause already"
        ):
            resume(what, ran)
    assert (ran, on_disk(tmp_path)) == (["a"], before)


@BOTH
@SOURCE
def test_of_two_runs_made_from_one_pause_the_second_ends_before_its_first_step(is_async, source, tmp_path):
    run, ran = pause(tmp_path)
    make = async_composable_loop if is_async else composable_loop
    backend = AsyncScriptedBackend if is_async else ScriptedBackend
    what = source_of(source, run, tmp_path)
    first, second = [
        make(backend([DONE]), tools=ran.tools(), hooks=[Gate()], resume=what, verdict="approve") for _ in range(2)
    ]

    async def drive(run):
        return [step async for step in run]

    def steps(run):
        return asyncio.run(drive(run)) if is_async else list(run)

    assert len(steps(first)) == 2
    with pytest.raises(ConfigError, match="gone on from this pause already"):
        steps(second)
    assert ran == ["a"]
    require_same(tmp_path, first)


def test_a_run_that_was_never_started_uses_nothing_up(tmp_path):
    run, ran = pause(tmp_path)
    for what in (run, tmp_path):
        composable_loop(ScriptedBackend([]), tools=ran.tools(), hooks=[Gate()], resume=what, verdict="approve").close()
    assert resume(tmp_path, ran).stop_reason == "done"


def test_without_a_file_a_pause_is_gone_on_from_once_as_well():
    ran = Ran()
    run = go([DELETE_A], ran.tools(), [Gate()], task={})
    first, second = [
        composable_loop(ScriptedBackend([DONE]), tools=ran.tools(), hooks=[Gate()], resume=run, verdict=True)
        for _ in range(2)
    ]
    list(first)
    with pytest.raises(ConfigError, match="gone on"):
        list(second)
    with pytest.raises(ConfigError, match="gone on"):
        resume(run, ran)
    assert ran == ["a"]


def test_threads_that_resume_at_the_same_time_run_the_call_once(tmp_path):
    run, ran = pause(tmp_path)
    barrier, refused = threading.Barrier(6), []

    def race(what):
        mine = composable_loop(ScriptedBackend([DONE]), tools=ran.tools(), hooks=[Gate()], resume=what, verdict=True)
        barrier.wait()
        try:
            list(mine)
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=race, args=[what]) for what in (run, tmp_path) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (ran, len(refused)) == (["a"], 5)
    assert Trace.load(tmp_path).runs[0].stop_reason == "done"


GO_ON = """
import os, sys, time
from looplet import ConfigError, composable_loop, tool, tools_from
from looplet.testing import ScriptedBackend

@tool
def delete(path: str) -> dict:
    "Delete a file."
    with open(sys.argv[2], "a") as file:
        file.write(path)
    return {}

@tool
def die() -> None:
    "Kill the process."
    os.kill(os.getpid(), 9)

class Gate:
    def check_permission(self, tool_call, state):
        return True

llm = ScriptedBackend([("die" if "die" in sys.argv else "done", {"answer": "x"} if "die" not in sys.argv else {})])
tools = tools_from([delete, die], include_done=True)
run = composable_loop(llm, tools=tools, hooks=[Gate()], resume=sys.argv[1], verdict="approve")
print("ready", flush=True)
sys.stdin.readline()
try:
    list(run)
except ConfigError as error:
    print(error)
"""


def processes(tmp_path, number, *more):
    script = tmp_path / "go_on.py"
    script.write_text(GO_ON, encoding="utf-8")
    command = [sys.executable, str(script), str(tmp_path / "traces"), str(tmp_path / "ran"), *more]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment()}
    running = [subprocess.Popen(command, **pipes) for _ in range(number)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=60)[0] for process in running]


def test_processes_that_resume_at_the_same_time_run_the_call_once(tmp_path):
    pause(tmp_path / "traces")
    said = processes(tmp_path, 3)
    assert sum("gone on from this pause already" in words for words in said) == 2
    assert (tmp_path / "ran").read_text() == "a"
    assert Trace.load(tmp_path / "traces").runs[0].stop_reason == "done"


def test_a_segment_that_was_killed_is_not_begun_again(tmp_path):
    run, ran = pause(tmp_path / "traces")
    processes(tmp_path, 1, "die")
    assert (tmp_path / "ran").read_text() == "a"
    view = Trace.load(tmp_path / "traces").runs[0]
    assert (view.stop_reason, len(view.segments)) == ("interrupted", 2)
    assert [step.tool_call.tool for step in view.steps] == ["delete"]
    assert [call.tool for call in view.unfinished_calls] == ["die"]
    with pytest.raises(ConfigError, match="ended with 'interrupted'"):
        resume(tmp_path / "traces", ran)
    with pytest.raises(ConfigError, match="gone on from this pause already"):
        resume(run, ran)
    assert ran == []


def test_a_segment_that_was_killed_on_a_machine_whose_clock_is_behind_is_not_begun_again(tmp_path):
    _, ran = pause(tmp_path / "traces")
    processes(tmp_path, 1, "die")
    path = tmp_path / "traces" / "trace.jsonl"
    lines, is_later = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        if semconv.RESUMED in document:  # and nobody has noted who goes on, either
            is_later = True
            continue
        for span in (s for e in document["resourceSpans"] for scope in e["scopeSpans"] for s in scope["spans"]):
            for key in ("startTimeUnixNano", "endTimeUnixNano") if is_later else ():
                span[key] = str(int(span[key]) - 10**12)
        lines.append(json.dumps(document, separators=(",", ":")))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="gone on from this pause already"):
        resume(tmp_path / "traces", ran)
    assert ran == []


def test_who_claims_a_pause_and_dies_at_once_has_used_it_up(tmp_path):
    run, ran = pause(tmp_path)
    other = composable_loop(ScriptedBackend([]), tools=ran.tools(), hooks=[Gate()], resume=tmp_path, verdict=True)
    other._scope.approvals.claim()
    for what in (tmp_path, run):
        with pytest.raises(ConfigError, match="gone on from this pause already"):
            resume(what, ran)
    assert ran == []


def test_of_two_claims_that_cross_the_first_line_in_the_file_wins(tmp_path, monkeypatch):
    pause(tmp_path)
    path, write, other = tmp_path / "trace.jsonl", os.write, []

    def late(fd, data):
        if not other:
            other.append(None)
            other.append(claim(path, "00" * 8))
        return write(fd, data)

    monkeypatch.setattr("os.write", late)
    assert claim(path, "00" * 8) is False
    assert other == [None, True]
    assert claim(path, "01" * 8) is True


def test_a_file_that_cannot_be_written_is_not_resumed(tmp_path, monkeypatch):
    _, ran = pause(tmp_path)

    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(TraceError, match=r"No space left on device.*nothing was run"):
        resume(tmp_path, ran)
    monkeypatch.undo()
    assert ran == []
    assert resume(tmp_path, ran).stop_reason == "done"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_torn_tail_is_moved_out_of_the_way(tmp_path):
    _, ran = pause(tmp_path)
    with (tmp_path / "trace.jsonl").open("a") as file:
        file.write('{"resourceSpans":[{"reso')
    require_same(tmp_path, resume(tmp_path, ran))
    assert (tmp_path / "trace.jsonl.torn").read_text() == '{"resourceSpans":[{"reso\n'
    assert ran == ["a"]


def test_a_file_whose_last_line_was_torn_off_is_no_run_that_waits(tmp_path):
    _, ran = pause(tmp_path)
    path = tmp_path / "trace.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="ended with 'interrupted'"):
        resume(tmp_path, ran)


def test_a_file_of_another_name_goes_on_itself(tmp_path):
    _, ran = pause(tmp_path)
    (tmp_path / "trace.jsonl").rename(tmp_path / "waits.jsonl")
    pause(tmp_path)
    other = (tmp_path / "trace.jsonl").read_bytes()
    run = resume(tmp_path / "waits.jsonl", ran)
    require_same(tmp_path / "waits.jsonl", run)
    assert (tmp_path / "trace.jsonl").read_bytes() == other


@pytest.mark.parametrize("form", ["gzip", "document"])
def test_a_file_without_lines_is_refused(form, tmp_path):
    _, ran = pause(tmp_path)
    data = (tmp_path / "trace.jsonl").read_bytes()
    path = tmp_path / "other"
    pretty = b"[" + b",\n".join(data.splitlines()) + b"\n]"
    path.write_bytes(gzip.compress(data) if form == "gzip" else pretty)
    with pytest.raises(TraceError, match="goes on only in a file of plain OTLP JSON lines"):
        resume(path, ran)
    assert ran == []


def test_a_sink_in_another_folder_is_refused(tmp_path):
    _, ran = pause(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"a run is one file.*leave the sink out"):
        resume(tmp_path / "one", ran, hooks=[ProvenanceSink(tmp_path / "two")])
    assert resume(tmp_path / "one", ran).stop_reason == "done"


def test_a_sink_cannot_begin_in_the_middle_of_a_run(tmp_path):
    ran = Ran()
    run = go([DELETE_A], ran.tools(), [Gate()], task={})
    with pytest.raises(ConfigError, match="which no file holds"):
        resume(run, ran, hooks=[ProvenanceSink(tmp_path)])


class Spans:
    """A sink that is no file."""

    looplet_sink = property(lambda self: self)

    def __init__(self):
        self.names = []

    def attach(self, recorder):
        pass

    detach = attach

    def on_end(self, span):
        self.names.append(span.name)

    def durable(self):
        pass


def test_beside_another_sink_the_file_is_written_as_well(tmp_path):
    _, ran = pause(tmp_path)
    spans = Spans()
    run = resume(tmp_path, ran, hooks=[spans])
    assert "execute_tool delete" in spans.names
    require_same(tmp_path, run)


@SOURCE
def test_a_sink_that_has_written_another_run_since_goes_back_to_the_file(source, tmp_path):
    sink, ran = ProvenanceSink(tmp_path), Ran()
    run = go([DELETE_A], ran.tools(), [Gate(), sink], task={})
    other = go([LOOK, DONE], ran.tools(), [sink], task={})
    (aside,) = tmp_path.glob("trace-*.jsonl")
    again = resume(run if source == "run" else aside, ran, hooks=[sink])
    require_same(aside, again)
    require_same(tmp_path, other)


@SOURCE
def test_the_same_sink_and_a_new_one_write_the_same_file(source, tmp_path):
    sink, ran = ProvenanceSink(tmp_path), Ran()
    run = go([DELETE_A], ran.tools(), [Gate(), sink], task={})
    run = resume(source_of(source, run, tmp_path), ran, [DELETE_B], hooks=[sink])
    require_same(tmp_path, run)
    run = resume(source_of(source, run, tmp_path), ran, hooks=[ProvenanceSink(tmp_path)])
    assert len(require_same(tmp_path, run).segments) == 3
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["trace.jsonl"]


def test_a_sink_that_is_writing_another_run_is_refused(tmp_path):
    sink, ran = ProvenanceSink(tmp_path), Ran()
    run = go([DELETE_A], ran.tools(), [Gate(), sink], task={})
    other = composable_loop(ScriptedBackend([LOOK, DONE]), tools=ran.tools(), hooks=[sink], task={})
    next(other)
    with pytest.raises(ConfigError, match="this sink is writing another run into"):
        resume(run, ran, hooks=[sink])
    again = resume(run, ran, hooks=[ProvenanceSink(tmp_path)])
    list(other)
    require_same(tmp_path, other)
    (aside,) = tmp_path.glob("trace-*.jsonl")
    require_same(aside, again)


def test_one_of_several_runs_in_a_file_is_named_by_its_view(tmp_path):
    sink, ran = ProvenanceSink(tmp_path), Ran()
    runs = [
        composable_loop(
            ScriptedBackend([LOOK, delete]), tools=ran.tools(), hooks=[Gate(), ApprovalHook(), sink], task={}
        )
        for delete in (DELETE_A, DELETE_B)
    ]
    for _ in zip(*runs, strict=True):
        pass
    with pytest.raises(ConfigError, match=r"2 runs wait.*runs\[n\] with n one of 0, 1"):
        resume(tmp_path, ran)
    for number in (1, 0):
        require_same(tmp_path, resume(Trace.load(tmp_path).runs[number], ran))
    assert ran == ["look", "look", "b", "a"]
    with pytest.raises(ConfigError, match="ended with 'done'"):
        resume(Trace.load(tmp_path).runs[0], ran)


def test_a_file_that_was_moved_in_between_is_no_trap(tmp_path):
    _, ran = pause(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    require_same(tmp_path / "two", resume(tmp_path / "two", ran))
    assert ran == ["a"]


WRONG = {
    "gone": None, "null": None, "number": 7, "text": "zz", "list": [1], "dict": {"a": 1}, "huge": 10**30, "below": -1,
}  # fmt: skip


def places(value, path=()):
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_an_edited_record_is_refused_in_words_or_harmless(wrong, tmp_path):
    pause(tmp_path, [LOOK, [DELETE_A, DELETE_B]])
    path = tmp_path / "trace.jsonl"
    original = path.read_bytes()
    records = []
    edit(tmp_path, lambda record: records.append(deepcopy(record)))
    for *above, last in places(records[0]):

        def change(record, above=above, last=last):
            for key in above:
                record = record[key]
            if wrong == "gone":
                del record[last]
            else:
                record[last] = WRONG[wrong]

        path.write_bytes(original)
        edit(tmp_path, change)
        ran = Ran()
        try:
            run = resume(tmp_path, ran, verdict={"call_2": "approve"}, max_steps=9)
        except (ConfigError, TraceError) as error:
            assert len(str(error)) > 30  # noqa: PT017 - only what is raised has words
            assert ran == []
        else:
            assert ran in (["a"], []), (above, last)
            Trace.load(tmp_path).runs  # noqa: B018 - reading it raises if the segment has spoilt the file
            assert run.stop_reason in ("waiting_for_approval", "budget_exhausted"), (above, last)


def test_other_arguments_than_those_that_were_shown_are_refused(tmp_path):
    def change(record):
        record["requests"][0]["args"] = record["held"][0]["args"] = {"path": "everything"}

    _, ran = pause(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(TraceError, match=r"'call_1' \(delete\) is not what was asked about: the file was edited"):
        resume(tmp_path, ran)
    assert ran == []


def test_a_call_that_was_put_in_the_place_of_the_approved_one_is_refused(tmp_path):
    def change(record):
        record["held"][0]["tool"] = "look"

    _, ran = pause(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(TraceError, match="there is no call 'call_1' of delete"):
        resume(tmp_path, ran)
    assert ran == []


# --- verdicts ---------------------------------------------------------------------------------------------------------


class Rewrite:
    def pre_dispatch(self, state, log, tool_call, step):
        return HookDecision(updated_args={"path": "everything"}) if tool_call.tool == "delete" else None


@BOTH
@pytest.mark.parametrize("asks", [True, False], ids=["gate", "gate that asks no more"])
def test_a_word_of_approval_holds_for_the_arguments_that_were_shown(is_async, asks, tmp_path):
    _, ran = pause(tmp_path)
    hooks = [Rewrite(), Gate() if asks else Open()]
    run = go([DONE], ran.tools(), hooks, resume=tmp_path, verdict="approve", is_async=is_async)
    assert (ran, run.stop_reason) == ([], "waiting_for_approval")
    assert run.pending[0].args == {"path": "everything"}
    require_same(tmp_path, run)


class Open(Gate):
    """Lets everything run."""

    def check_permission(self, tool_call, state):
        return None


class EarlyGate:
    def pre_dispatch(self, state, log, tool_call, step):
        return ask() if tool_call.tool == "delete" else None


@BOTH
def test_a_human_sees_the_arguments_as_the_last_hook_leaves_them(is_async):
    ran = Ran()
    run = go([DELETE_A], ran.tools(), [EarlyGate(), Rewrite()], task={}, is_async=is_async)
    assert run.pending[0].args == {"path": "everything"}
    run = go([DONE], ran.tools(), [EarlyGate(), Rewrite()], resume=run, verdict="approve", is_async=is_async)
    assert (ran, run.stop_reason) == (["everything"], "done")


@BOTH
def test_a_handler_is_asked_once_about_a_call_and_sees_what_will_run(is_async):
    asked = []

    def handler(prompt, options):
        asked.append(prompt)
        return "approve"

    async def async_handler(prompt, options):
        return handler(prompt, options)

    class Plain:
        def check_permission(self, tool_call, state):
            return HookDecision(permission="ask") if tool_call.tool == "delete" else None

    ran = Ran()
    config = LoopConfig(approval_handler=async_handler if is_async else handler)
    go([DELETE_A, DONE], ran.tools(), [Plain(), Rewrite(), Gate()], task={}, config=config, is_async=is_async)
    assert (asked, ran) == (["Run delete(path='everything')?"], ["everything"])


def test_a_gate_that_refuses_beats_one_that_asks():
    class No:
        def check_permission(self, tool_call, state):
            return tool_call.tool != "delete"

    ran = Ran()
    run = go([DELETE_A, DONE], ran.tools(), [Gate(), No()], task={})
    assert (run.stop_reason, ran, run.pending) == ("done", [], ())


def test_a_verdict_of_another_run_is_refused(tmp_path):
    one, _ = pause(tmp_path / "one")
    _, ran = pause(tmp_path / "two")
    with pytest.raises(ConfigError, match=f"was given for run {one.run_id}"):
        resume(tmp_path / "two", ran, verdict=one.pending[0].answer("approve"))
    assert resume(tmp_path / "two", ran, verdict=Verdict("approve", "call_1")).stop_reason == "done"


@SOURCE
def test_a_call_id_that_a_provider_uses_again_gets_no_old_verdict(source, tmp_path):
    class Forget:
        def compact(self, *, conversation, **rest):
            conversation.replace(list(conversation)[:1])

        def should_compact(self, *args):
            return True

    def call(name, **args):
        return ToolCall(name, args, call_id="call_0")

    hooks = [Forget()]
    run, ran = pause(tmp_path, [call("look"), call("look"), call("delete", path="a")], hooks=hooks)
    for path in ("b", "a"):
        replies = [call("look"), call("delete", path=path)]
        run = resume(source_of(source, run, tmp_path), ran, replies, hooks=hooks)
        assert run.stop_reason == "waiting_for_approval"
        require_same(tmp_path, run)
    assert ran == ["look", "look", "a", "look", "b", "look"]
    run = resume(source_of(source, run, tmp_path), ran, hooks=hooks)
    ids = [step.tool_call.call_id for step in run.state.steps]
    assert len(set(ids)) == len(ids) == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_a_handler_that_is_interrupted_ends_the_run(error, tmp_path):
    def handler(prompt, options):
        raise error

    ran = Ran()
    hooks, config = [Gate(), ProvenanceSink(tmp_path)], LoopConfig(approval_handler=handler)
    run = composable_loop(ScriptedBackend([DELETE_A]), tools=ran.tools(), hooks=hooks, task={}, config=config)
    with pytest.raises(error):
        list(run)
    assert (ran, run.stop_reason) == ([], "cancelled")
    require_same(tmp_path, run)


# --- who waits, and who does not --------------------------------------------------------------------------------------


@tool(concurrent_safe=True)
def remove(path: str) -> str:
    """Remove something."""
    return path


class GateOfOne:
    def __init__(self, stop_at=""):
        self.stop_at = stop_at

    def check_permission(self, tool_call, state):
        path = tool_call.args.get("path", "")
        return ask() if path == "asks" else HookDecision(stop="enough") if path and path == self.stop_at else None


class StopAfter:
    def post_dispatch(self, state, log, tool_call, result, step):
        return HookDecision(stop="danger")


@BOTH
@pytest.mark.parametrize(("hooks", "reason"), [([GateOfOne("last")], "enough"), ([GateOfOne(), StopAfter()], "danger")])
def test_a_hook_that_stops_the_run_beats_a_question(is_async, hooks, reason, tmp_path):
    batch = [("remove", {"path": path}) for path in ("first", "asks", "last")]
    tools = tools_from([remove], include_done=True)
    run = go([batch], tools, [*hooks, ProvenanceSink(tmp_path)], task={}, is_async=is_async)
    assert (run.stop_reason, run.pending, run.paused) == (reason, (), None)
    assert run.state.steps[0].tool_result.data == "first"
    assert len(run.state.steps) == (3 if reason == "enough" else 1)
    assert all(step.tool_result.error for step in run.state.steps[1:])
    require_same(tmp_path, run)


@BOTH
@SOURCE
def test_two_tools_of_one_batch_ask_by_themselves_and_a_third_waits(is_async, source, tmp_path):
    asked = []

    @tool(concurrent_safe=True)
    def ship(path: str, ctx) -> dict:
        """Ship."""
        answer = ctx.approve("ship?")
        asked.append((path, answer))
        return {"needs_approval": True} if answer is None else {"shipped": path}

    tools = tools_from([ship], include_done=True)
    batch = [("ship", {"path": path}) for path in ("one", "two", "asks")]
    run = go([batch], tools, [GateOfOne(), ProvenanceSink(tmp_path)], task={}, is_async=is_async)
    require_same(tmp_path, run)
    assert [(r.args["path"], r.has_run) for r in run.pending] == [("asks", False), ("one", True), ("two", True)]
    verdicts = {request.call_id: "approve" for request in run.pending}
    what = source_of(source, run, tmp_path)
    run = go([DONE], tools, [GateOfOne()], resume=what, verdict=verdicts, is_async=is_async)
    assert run.stop_reason == "done"
    assert sorted(asked, key=str) == sorted(
        [("one", None), ("two", None), ("one", "approve"), ("two", "approve"), ("asks", "approve")], key=str
    )
    require_same(tmp_path, run)


@BOTH
@SOURCE
@pytest.mark.parametrize("verdict", ["approve", "deny"])
def test_an_ending_may_need_an_approval(is_async, source, verdict, tmp_path):
    class GateOfDone:
        def check_permission(self, tool_call, state):
            return ask() if tool_call.tool == "done" else None

    ran = Ran()
    hooks = [GateOfDone(), ProvenanceSink(tmp_path)]
    run = go([DONE], ran.tools(), hooks, task={}, is_async=is_async)
    what = source_of(source, run, tmp_path)
    run = go([LOOK, DONE], ran.tools(), hooks, resume=what, verdict=verdict, is_async=is_async)
    assert run.stop_reason == ("done" if verdict == "approve" else "waiting_for_approval")
    assert ran == ([] if verdict == "approve" else ["look"])
    require_same(tmp_path, run)


@SOURCE
def test_a_done_tool_that_asks_by_itself_has_not_ended_the_run(source, tmp_path):
    @tool
    def done(answer: str, ctx) -> dict:
        """Finish."""
        return {"answer": answer} if ctx.approve("finish?") else {"needs_approval": True}

    tools = tools_from([done])
    run = go([DONE], tools, [ProvenanceSink(tmp_path)], task={})
    assert (run.stop_reason, run.pending[0].tool) == ("waiting_for_approval", "done")
    run = go([], tools, resume=source_of(source, run, tmp_path), verdict="approve")
    assert (run.stop_reason, run.result.final_output) == ("done", {"answer": "ok"})
    require_same(tmp_path, run)


@pytest.mark.parametrize("options", [3, "yes", {}, None, []])
def test_options_that_are_no_list_are_the_usual_ones(options):
    @tool
    def odd() -> dict:
        """Ask in an odd way."""
        return {"needs_approval": True, "approval_options": options}

    run = go([("odd", {})], tools_from([odd], include_done=True), task={})
    assert run.pending[0].options == ("approve", "deny")


def test_an_approval_hook_that_is_used_again_waits_for_nothing_once_the_run_has_gone_on(tmp_path):
    hook, ran = ApprovalHook(), Ran()
    run = go([DELETE_A], ran.tools(), [Gate(), hook], task={})
    assert hook.pending is not None
    resume(run, ran, hooks=[hook])
    assert hook.pending is None


@BOTH
def test_an_approver_may_be_async_and_one_that_raises_ends_the_run(is_async, tmp_path):
    class Store:
        def __init__(self, error=None):
            self.error, self.told = error, []

        async def looplet_approvals(self, requests, run_id):
            self.told.append([request.tool for request in requests])
            if requests and self.error:
                raise self.error

    store, ran = Store(), Ran()
    go([DELETE_A], ran.tools(), [Gate(), store], task={}, is_async=is_async)
    assert store.told == [[], ["delete"]]
    make = async_composable_loop if is_async else composable_loop
    backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([DELETE_A])
    run = make(backend, tools=ran.tools(), hooks=[Gate(), Store(OSError("full")), ProvenanceSink(tmp_path)], task={})

    async def drive():
        return [step async for step in run]

    with pytest.raises(OSError, match="full"):
        asyncio.run(drive()) if is_async else list(run)
    assert (run.stop_reason, run.paused, run.pending) == ("error", None, ())
    require_same(tmp_path, run)


def test_a_hook_whose_memory_cannot_be_had_ends_the_run(tmp_path):
    class Broken:
        def post_dispatch(self, *args):
            return None

        def state_dict(self):
            raise OSError("no memory")

        def load_state_dict(self, told):
            raise AssertionError

    run = composable_loop(
        ScriptedBackend([DELETE_A]),
        tools=Ran().tools(),
        hooks=[Gate(), ApprovalHook(), Broken(), ProvenanceSink(tmp_path)],
        task={},
    )
    with pytest.raises(OSError, match="no memory"):
        list(run)
    assert (run.stop_reason, run.paused, run.pending) == ("error", None, ())
    assert require_same(tmp_path, run).stop_reason == "error"


class Counter:
    def __init__(self, told=None):
        self.count, self.told = 0, told

    def post_dispatch(self, *args):
        self.count += 1

    def state_dict(self):
        return {"count": self.count, "thing": object(), 1: (1, 2)}

    def load_state_dict(self, told):
        self.count, self.told = told["count"], told


@SOURCE
def test_hooks_find_their_memory_at_another_place_in_the_list(source, tmp_path):
    run, ran = pause(tmp_path, [LOOK, DELETE_A], hooks=[Counter(), Counter()])
    first, second = Counter(), Counter()
    hooks = [first, Gate(), StopNever(), second, ApprovalHook()]
    what = source_of(source, run, tmp_path)
    again = composable_loop(ScriptedBackend([DONE]), tools=ran.tools(), hooks=hooks, resume=what, verdict=True)
    assert first.told == second.told == {"count": 1, "thing": "<object>", "1": [1, 2]}
    list(again)
    assert (first.count, second.count) == (3, 3)


class StopNever:
    def should_stop(self, state, step, entities):
        return False


def test_pre_loop_hooks_are_asked_in_every_segment(tmp_path):
    class Begins:
        def __init__(self):
            self.steps = []

        def pre_loop(self, state, log, context):
            self.steps.append(len(state.steps))

    begins = Begins()
    _, ran = pause(tmp_path, [LOOK, DELETE_A], hooks=[begins])
    require_same(tmp_path, resume(tmp_path, ran, hooks=[begins]))
    assert begins.steps == [0, 1]


def test_a_pre_loop_hook_may_stop_a_segment_before_the_approved_call(tmp_path):
    class Stops:
        def pre_loop(self, state, log, context):
            return HookDecision(stop="not today")

    _, ran = pause(tmp_path)
    run = resume(tmp_path, ran, hooks=[Stops()])
    assert (run.stop_reason, ran) == ("not today", [])
    require_same(tmp_path, run)


# --- other tools, other models ----------------------------------------------------------------------------------------


def test_a_tool_that_is_gone_is_said_at_the_call_and_uses_nothing_up(tmp_path):
    _, ran = pause(tmp_path)
    with pytest.raises(ConfigError, match="the run waits for 'delete', which is not among the tools: done"):
        go([DONE], tools_from([], include_done=True), [Gate()], resume=tmp_path, verdict="approve")
    assert resume(tmp_path, ran).stop_reason == "done"


def said(name, **args):
    return json.dumps({"tool": name, "args": args})


@BOTH
@SOURCE
def test_the_text_protocol_pauses_too(is_async, source, tmp_path):
    backend, ran = AsyncMockLLMBackend if is_async else MockLLMBackend, Ran()
    hooks = [Gate(), ProvenanceSink(tmp_path)]
    run = go(backend([said("look"), said("deploy")]), ran.tools(deploy), hooks, task={"goal": "x"}, is_async=is_async)
    for reply in (said("delete", path="a"), said("done", answer="x")):
        what = source_of(source, run, tmp_path)
        run = go(backend([reply]), ran.tools(deploy), hooks, resume=what, verdict="approve", is_async=is_async)
        require_same(tmp_path, run)
    assert run.stop_reason == "done"
    assert [step.tool_result.data for step in run.state.steps][2] == {"answer": "approve"}
    ids = [step.tool_call.call_id for step in run.state.steps]
    assert len(set(ids)) == len(ids) == 5


@pytest.mark.parametrize(
    ("server", "backend"),
    [(OpenAIServer, OpenAIBackend), (AnthropicServer, AnthropicBackend)],
    ids=["openai", "claude"],
)
def test_a_run_of_the_text_protocol_goes_on_with_a_model_that_calls_tools(server, backend, tmp_path):
    ran = Ran()
    llm = MockLLMBackend([said("look"), said("delete", path="a")])
    go(llm, ran.tools(), [Gate(), ProvenanceSink(tmp_path)], task={"goal": "x"})
    with server([[DONE]]) as served, backend(base_url=served.base_url, api_key="key", model="m") as native:
        run = go(native, ran.tools(), [Gate()], resume=tmp_path, verdict="approve")
    assert (run.stop_reason, ran) == ("done", ["look", "a"])
    require_same(tmp_path, run)
    run, ran = pause(tmp_path, [LOOK, DELETE_A])
    run = go(MockLLMBackend([said("done", answer="x")]), ran.tools(), [Gate()], resume=tmp_path, verdict="approve")
    assert run.stop_reason == "done"
    require_same(tmp_path, run)


@pytest.mark.parametrize(
    ("server", "backend"),
    [(OpenAIServer, OpenAIBackend), (AnthropicServer, AnthropicBackend)],
    ids=["openai", "claude"],
)
@SOURCE
def test_a_provider_accepts_what_is_sent_after_a_tool_has_asked_in_the_middle_of_a_reply(
    server, backend, source, tmp_path
):
    ran = Ran()
    with (
        server([[("deploy", {}), LOOK, ("deploy", {})], [DONE]]) as served,
        backend(base_url=served.base_url, api_key="key", model="m") as llm,
    ):
        run = go(llm, ran.tools(deploy), [ProvenanceSink(tmp_path)], task={"goal": "x"})
        for verdict in ("approve", "deny"):
            run = go(llm, ran.tools(deploy), resume=source_of(source, run, tmp_path), verdict=verdict)
    assert (run.stop_reason, ran) == ("done", ["look"])
    require_same(tmp_path, run)


# --- redaction --------------------------------------------------------------------------------------------------------


class Mailbox(Ran):
    def tools(self, *more):
        @tool
        def mail() -> str:
            """Read a mail."""
            return f"from {SECRET}"

        return super().tools(mail, *more)


MAIL = ("mail", {})


class Redacts:
    looplet_redact = staticmethod(hide)


@BOTH
@SOURCE
@pytest.mark.parametrize("how", ["config", "hook", "sink"])
def test_a_run_that_redacts_does_so_in_every_segment(is_async, source, how, tmp_path):
    def settings():
        hooks = [Gate(), ProvenanceSink(tmp_path, redact=hide if how == "sink" else None)]
        config = {"config": LoopConfig(redact=hide)} if how == "config" else {}
        return {"hooks": [*hooks, *([Redacts()] if how == "hook" else [])], **config, "is_async": is_async}

    ran = Mailbox()
    run = go([MAIL, DELETE_A], ran.tools(), task={"goal": SECRET}, **settings())
    with pytest.raises(ConfigError, match="the paused run redacts what enters it"):
        go([], ran.tools(), [Gate()], resume=tmp_path, verdict="approve", is_async=is_async)
    llm = (AsyncScriptedBackend if is_async else ScriptedBackend)([MAIL, DONE])
    run = go(llm, ran.tools(), resume=source_of(source, run, tmp_path), verdict="approve", **settings())
    assert run.stop_reason == "done"
    assert SECRET not in on_disk(tmp_path) + str([list(request) for request in llm.requests])
    require_same(tmp_path, run)


def test_a_live_run_goes_on_with_its_own_sinks_and_settings(tmp_path):
    ran = Mailbox()
    settings = {"max_steps": 3, "config": LoopConfig(redact=str.strip, system_prompt="be kind")}
    run = go([MAIL, DELETE_A], ran.tools(), [Gate(), ProvenanceSink(tmp_path, redact=hide)], task={}, **settings)
    llm = Listens([MAIL, MAIL])
    run = go(llm, ran.tools(), [Gate()], resume=run, verdict="approve")
    assert llm.heard == "be kind"
    assert (run.stop_reason, len(run.state.steps)) == ("budget_exhausted", 3)
    assert SECRET not in on_disk(tmp_path)


@BOTH
@SOURCE
def test_what_is_redacted_for_the_file_only_stays_so_in_every_segment(is_async, source, tmp_path):
    def sink():
        return ProvenanceSink(tmp_path, redact=hide, redact_upstream=False)

    class Notes:
        def post_dispatch(self, state, log, *args):
            state.metadata["from"] = SECRET
            return InjectContext(f"it was {SECRET}")

        def state_dict(self):
            return {"who": SECRET}

        def load_state_dict(self, told):
            pass

    ran = Mailbox()
    hooks = [Gate(), Notes(), sink()]
    run = go([MAIL, DELETE_A], ran.tools(), hooks, task={"goal": SECRET}, is_async=is_async)
    assert SECRET not in on_disk(tmp_path)
    with pytest.raises(ConfigError, match="redacts what is recorded"):
        go([], ran.tools(), [Gate()], resume=tmp_path, verdict="approve", is_async=is_async)
    llm = (AsyncScriptedBackend if is_async else ScriptedBackend)([MAIL, DONE])
    what = source_of(source, run, tmp_path)
    run = go(llm, ran.tools(), [Gate(), Notes(), sink()], resume=what, verdict="approve", is_async=is_async)
    assert SECRET not in on_disk(tmp_path)
    assert SECRET in str(list(llm.requests[1]))
    view = Trace.load(tmp_path).runs[0]
    assert [len(view.request(chat)) for chat in view.chats] == [1, 4, 6, 8]


@pytest.mark.parametrize("is_held", [False, True], ids=["asked about", "held"])
def test_arguments_that_the_file_does_not_hold_as_they_are_are_not_run_from_it(is_held, tmp_path):
    sink = ProvenanceSink(tmp_path, redact=hide, redact_upstream=False)
    ran = Ran()
    calls = [DELETE_A, ("delete", {"path": SECRET})]
    run = go([calls if is_held else calls[1]], ran.tools(), [Gate(), sink], task={})
    with pytest.raises(TraceError, match="its sink redacts what is recorded"):
        go([], ran.tools(), [Gate(), sink], resume=tmp_path, verdict="approve")
    assert ran == []
    run = go([DONE], ran.tools(), [Gate(), sink], resume=run, verdict="approve")
    assert ran == (["a"] if is_held else [SECRET])


def test_a_late_redactor_cannot_break_the_record(tmp_path):
    def harsh(text):
        return "".join("#" if c in '0123456789"{' else c for c in text)

    def sink():
        return ProvenanceSink(tmp_path, redact=harsh, redact_upstream=False)

    ran = Ran()
    go([LOOK, DELETE_A], ran.tools(), [Gate(), sink()], task={"goal": "count to 10"})
    run = go([DONE], ran.tools(), [Gate(), sink()], resume=tmp_path, verdict="approve")
    assert (run.stop_reason, ran) == ("done", ["look", "a"])


@SOURCE
def test_what_was_redacted_is_not_redacted_again(source, tmp_path):
    def double(text):
        return text.replace("tidy", "tidy tidy")

    config = LoopConfig(redact=double)
    run, ran = pause(tmp_path, config=config)
    llm = ScriptedBackend([DONE])
    again = go(llm, ran.tools(), [Gate()], resume=source_of(source, run, tmp_path), verdict="approve", config=config)
    assert llm.requests[0][0].text == "goal: tidy tidy up"
    require_same(tmp_path, again)


def test_a_redactor_that_comes_later_redacts_what_the_provider_is_sent(tmp_path):
    _, ran = pause(tmp_path, task={"goal": SECRET})
    llm = ScriptedBackend([DONE])
    go(llm, ran.tools(), [Gate(), Redacts()], resume=tmp_path, verdict="approve")
    assert SECRET not in str(list(llm.requests[0]))


@SOURCE
def test_what_hooks_write_into_the_session_log_is_redacted_and_goes_on(source, tmp_path):
    class Notes:
        def post_dispatch(self, state, log, tool_call, result, step):
            log.record(step, "a theory", "note", "why", entities=[f"e{step}"], findings=[SECRET])

    config = LoopConfig(redact=hide)
    run, ran = pause(tmp_path, [LOOK, DELETE_A], hooks=[Notes()], config=config)
    assert SECRET not in on_disk(tmp_path)
    require_same(tmp_path, run)
    again = resume(source_of(source, run, tmp_path), ran, hooks=[Notes()], config=config)
    assert again.session_log.all_entities() == ["e1", "e2", "e3"]
    assert [entry.tool for entry in again.session_log.entries] == ["note", "look", "note", "delete", "note", "done"]
    require_same(tmp_path, again)


class Scrub:
    def pre_prompt(self, state, log, ctx, step):
        return ctx.rewrite(hide)


@BOTH
def test_what_a_rewriting_hook_has_not_seen_is_in_no_segment_of_the_file(is_async, tmp_path):
    class GateOfMail:
        def check_permission(self, tool_call, state):
            return ask(f"mail to {SECRET}?") if tool_call.tool == "mail" else None

    @tool
    def write(ctx) -> dict:
        """Write a mail."""
        answer = ctx.approve("write?")
        return {"to": SECRET} if answer else {"needs_approval": True, "approval_description": f"to {SECRET}?"}

    ran = Mailbox()
    hooks = [Scrub(), GateOfMail(), ProvenanceSink(tmp_path)]
    settings = {"is_async": is_async}
    run = go([MAIL], ran.tools(write), hooks, task={"goal": SECRET}, **settings)
    with pytest.raises(ConfigError, match="a pre_prompt hook of the paused run rewrites"):
        go([], ran.tools(write), [GateOfMail()], resume=run, verdict="approve", **settings)
    for replies in ([("write", {})], [MAIL], [DONE]):
        run = go(replies, ran.tools(write), hooks, resume=run, verdict="approve", **settings)
    assert run.stop_reason == "done"
    assert SECRET not in on_disk(tmp_path)
    view = Trace.load(tmp_path).runs[0]
    assert [len(view.request(chat)) for chat in view.chats] == [1, 3, 7, 9]


# --- what goes on -----------------------------------------------------------------------------------------------------


@SOURCE
def test_the_settings_of_the_run_go_on_unless_others_are_given(source, tmp_path):
    config = LoopConfig(system_prompt="be brief", agent_name="tidier", budget=Budget(model_calls=3), done_tool="stop")
    stop = tool(name="stop")(lambda answer: answer)
    run, ran = pause(tmp_path, [LOOK, DELETE_A], config=config, tools=[stop], max_steps=7)
    llm = Listens([LOOK, LOOK])
    what = source_of(source, run, tmp_path)
    again = go(llm, ran.tools(stop), [Gate()], resume=what, verdict="approve")
    assert llm.heard == "be brief"
    assert (again.stop_reason, again.state.max_steps) == ("budget_exhausted", 7)
    assert {node.name for node in Trace.load(tmp_path).runs[0].segments} == {"invoke_agent tidier"}
    again = go([DELETE_A], ran.tools(stop), [Gate(), ProvenanceSink(tmp_path / "b")], task={}, config=config)
    other = LoopConfig(budget=Budget(model_calls=9))
    again = go([LOOK], ran.tools(stop), [Gate()], resume=again, verdict="approve", max_steps=2, config=other)
    assert (again.stop_reason, len(again.state.steps)) == ("budget_exhausted", 2)


def test_every_plain_setting_goes_on():
    config = LoopConfig(
        max_steps=3, temperature=0.5, done_tools=("stop",), budget=Budget(5, usd=1.5), context_window=9,
        tool_result_max_chars=None, capture_content=True, use_native_tools=False, max_depth=2,
    )  # fmt: skip
    assert asdict(Settings.of(config, "").config()) == {**asdict(config), "done_tools": ["stop"]}
    plain = (bool, int, float, str, tuple, type(None))
    names = {name for name, value in vars_of(LoopConfig()).items() if isinstance(value, plain)}
    others = {"redact", "approval_handler", "cancel_token", "compact_service", "memory_sources"}
    assert names - others == set(Settings.__dataclass_fields__)


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@SOURCE
def test_steps_are_counted_over_segments(source, tmp_path):
    run, ran = pause(tmp_path, [LOOK, DELETE_A], max_steps=3)
    run = resume(source_of(source, run, tmp_path), ran, [LOOK, LOOK, LOOK])
    assert (run.stop_reason, ran) == ("budget_exhausted", ["look", "a", "look"])
    require_same(tmp_path, run)


class OwnState:
    def __init__(self):
        self.steps = []
        self.queries_used = 0
        self.budget_remaining = 9


class SubState(DefaultState):
    pass


@dataclass
class RichState(DefaultState):
    mood: str = "calm"


@SOURCE
@pytest.mark.parametrize("kind", [OwnState, SubState, RichState])
def test_states_of_the_callers_own_go_on(kind, source, tmp_path):
    run, ran = pause(tmp_path, [LOOK, DELETE_A], state=kind())
    state = kind()
    run = resume(source_of(source, run, tmp_path), ran, state=state)
    assert run.state is state
    assert (len(state.steps), state.queries_used) == (3, 2)
    require_same(tmp_path, run)


def test_a_state_that_has_steps_is_refused(tmp_path):
    run, ran = pause(tmp_path, [LOOK, DELETE_A])
    with pytest.raises(ConfigError, match="state has the steps of an earlier run"):
        resume(run, ran, state=run.state)


@SOURCE
def test_metadata_usage_and_a_briefing_are_there_when_the_held_call_runs(source, tmp_path):
    class Looks:
        def __init__(self):
            self.seen = []

        def pre_dispatch(self, state, log, tool_call, step):
            self.seen.append((state.metadata.get("n"), state.usage.input_tokens))

        def post_dispatch(self, state, *args):
            state.metadata["n"] = state.metadata.get("n", 0) + 1
            return InjectContext("look twice")

    run, ran = pause(tmp_path, [("deploy", {})], hooks=[Looks()], tools=[deploy])
    looks, llm = Looks(), ScriptedBackend([DONE])
    what = source_of(source, run, tmp_path)
    run = go(llm, ran.tools(deploy), [Gate(), looks], resume=what, verdict="approve")
    assert looks.seen == [(1, 10), (2, 20)]
    assert [message.text for message in llm.requests[0]].count("look twice") == 1
    require_same(tmp_path, run)


@BOTH
@SOURCE
def test_memory_compaction_a_stream_and_a_typed_output_over_three_segments(is_async, source, tmp_path):
    @dataclass
    class Output:
        n: int

    class Full:
        def should_compact(self, state, log, conversation, step):
            return len(conversation) > 3

    events = []
    config = LoopConfig(memory_sources=[StaticMemorySource("remember")], compact_service=TruncateCompact(keep_recent=1))
    settings = {"config": config, "stream": events.append, "output_type": Output, "is_async": is_async}
    hooks = [Full(), Gate(), ProvenanceSink(tmp_path)]
    ran = Ran()
    run = go([LOOK, LOOK, [LOOK, DELETE_A]], ran.tools(), hooks, task={"goal": "x"}, **settings)
    for replies in ([LOOK, [LOOK, DELETE_B]], [LOOK, ("done", {"n": "many"}), ("done", {"n": 3})]):
        require_same(tmp_path, run)
        what = source_of(source, run, tmp_path)
        llm = (AsyncScriptedBackend if is_async else ScriptedBackend)(replies)
        run = go(llm, ran.tools(), hooks, resume=what, verdict="approve", **settings)
        assert llm.requests[0][0].text == "MEMORY\nremember"
    view = require_same(tmp_path, run)
    assert (type(run.result.output), run.result.output.n) == (Output, 3)
    assert [step.number for step in run.state.steps] == list(range(1, 11))
    assert sum(node.name == semconv.COMPACT for node in view.own) >= 2
    kinds = [event.kind for event in events]
    assert (kinds.count("run_start"), kinds.count("run_end"), kinds[0], kinds[-1]) == (3, 3, "run_start", "run_end")
    assert len({event.run_id for event in events}) == 1


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "is_sampled"),
    [
        (ALWAYS_ON, True),
        (ParentBased(ALWAYS_ON), True),
        (ALWAYS_OFF, False),
        (ParentBased(TraceIdRatioBased(0.0)), False),
    ],
)
def test_the_samplers_decision_holds_for_all_segments_of_one_trace(sampler, is_sampled, tmp_path):
    exporter, ran = InMemorySpanExporter(), Ran()

    def provider(sampler):
        made = TracerProvider(sampler=sampler)
        made.add_span_processor(SimpleSpanProcessor(exporter))
        return made

    go([DELETE_A], ran.tools(), [Gate(), ProvenanceSink(tmp_path)], task={}, tracer_provider=provider(sampler))
    later = sampler if sampler is ALWAYS_OFF else ParentBased(ALWAYS_ON)
    go([DONE], ran.tools(), [Gate()], resume=tmp_path, verdict="approve", tracer_provider=provider(later))
    exported = exporter.get_finished_spans()
    assert bool(exported) is is_sampled
    trace = Trace.load(tmp_path)
    assert len(trace.roots) == 1
    first, second = trace.runs[0].segments
    (link,) = second.record.links
    assert (link.trace_id, link.span_id) == (first.trace_id, first.span_id)
    if is_sampled:
        assert {f"{span.context.trace_id:032x}" for span in exported} == {first.trace_id}
        roots = [span for span in exported if span.name.startswith("invoke_agent")]
        assert [f"{link.context.span_id:016x}" for link in roots[1].links] == [first.span_id]


def test_a_provider_that_comes_later_gets_its_segment(tmp_path):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    _, ran = pause(tmp_path)
    resume(tmp_path, ran, tracer_provider=provider)
    assert "execute_tool delete" in {span.name for span in exporter.get_finished_spans()}


def test_a_trace_state_goes_on(tmp_path):
    from opentelemetry import context, trace

    above = trace.SpanContext(5, 6, True, trace.TraceFlags(1), trace.TraceState([("vendor", "x")]))
    token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(above)))
    try:
        _, ran = pause(tmp_path)
    finally:
        context.detach(token)
    run = resume(tmp_path, ran)
    assert {node.record.trace_state for node in Trace.load(tmp_path).spans} == {"vendor=x"}
    require_same(tmp_path, run)


def test_spans_of_the_user_are_in_every_segment(tmp_path):
    provider = TracerProvider()
    tracer = provider.get_tracer("mine")

    @tool
    def work() -> str:
        """Work."""
        with tracer.start_as_current_span("mine"):
            return "done"

    class GateOfWork:
        def check_permission(self, tool_call, state):
            return ask() if tool_call.tool == "work" else None

    tools, hooks = tools_from([work], include_done=True), [GateOfWork(), ProvenanceSink(tmp_path)]
    with tracer.start_as_current_span("request"):
        go([("work", {})], tools, hooks, task={}, tracer_provider=provider)
    for reply in (("work", {}), DONE):
        run = go([reply], tools, hooks, resume=tmp_path, verdict="approve", tracer_provider=provider)
    assert [node.parent.name for node in Trace.load(tmp_path).find("mine")] == ["execute_tool work"] * 2
    require_same(tmp_path, run)


# --- sub-agents -------------------------------------------------------------------------------------------------------


def test_a_sub_agent_that_pauses_tells_its_parent_what_it_waits_for(tmp_path):
    ran = Ran()

    @tool
    def helper() -> dict:
        """Help."""
        return run_sub_loop(ScriptedBackend([DELETE_A]), {}, ran.tools(), hooks=[Gate(), ApprovalHook()])

    run, _ = pause(tmp_path, [("helper", {}), DELETE_B], ran, tools=[helper])
    outcome = run.state.steps[0].tool_result.data
    assert outcome["stop_reason"] == "waiting_for_approval"
    assert "it waits for a human: delete a?" in outcome["summary"]
    run = resume(tmp_path, ran, tools=[helper])
    assert (run.stop_reason, ran) == ("done", ["b"])
    require_same(tmp_path, run)
    with pytest.raises(ConfigError, match="it ended with 'done'"):
        resume(tmp_path, ran)
    (sub,) = [view for view in Trace.load(tmp_path).runs if view.stop_reason == "waiting_for_approval"]
    require_same(tmp_path, resume(sub, ran))
    assert ran == ["b", "a"]
    assert len(Trace.load(tmp_path).roots) == 1


def test_an_agent_tool_that_cannot_ask_anybody_refuses_and_goes_on():
    ran = Ran()

    class Hooks:
        def check_permission(self, tool_call, state):
            return None

    helper = agent_tool(ScriptedBackend([DELETE_A, DONE]), ran.tools(), name="helper", description="Help.")
    run = go([("helper", {"task": "x"}), DONE], tools_from([helper], include_done=True), [Hooks()], task={})
    assert (run.stop_reason, run.state.steps[0].tool_result.data) == ("done", "ok")


def test_a_tool_may_resume_the_sub_agent_that_it_has_started(tmp_path):
    ran = Ran()

    @tool
    def helper() -> str:
        """Help."""
        sub = go([DELETE_A], ran.tools(), [Gate()], task={})
        return resume(sub, ran).stop_reason

    run = go([("helper", {}), DONE], tools_from([helper], include_done=True), [ProvenanceSink(tmp_path)], task={})
    assert (run.state.steps[0].tool_result.data, ran) == ("done", ["a"])
    trace = Trace.load(tmp_path)
    assert [(view.stop_reason, len(view.segments)) for view in trace.runs] == [("done", 1), ("done", 2)]
    assert len(trace.roots) == 1
    require_same(tmp_path, run)


def test_a_tool_may_resume_a_run_of_another_file(tmp_path):
    _, ran = pause(tmp_path / "one")

    @tool
    def helper() -> str:
        """Help."""
        return resume(tmp_path / "one", ran).stop_reason

    tools = tools_from([helper], include_done=True)
    run = go([("helper", {}), DONE], tools, [ProvenanceSink(tmp_path / "two")], task={})
    assert (run.state.steps[0].tool_result.data, ran) == ("done", ["a"])
    assert Trace.load(tmp_path / "one").runs[0].stop_reason == "done"
    require_same(tmp_path / "two", run)


# --- many pauses, and what commands say -------------------------------------------------------------------------------


def test_a_file_grows_by_the_same_amount_with_every_pause(tmp_path):
    class Briefs:
        def post_dispatch(self, *args):
            return InjectContext("go on")

    sink, ran = ProvenanceSink(tmp_path), Ran()
    hooks = [Gate(), Briefs(), sink]
    run = go([DELETE_A], ran.tools(), hooks, task={}, max_steps=300)
    sizes = []
    for number in range(200):
        run = go([("delete", {"path": f"p{number:03}"})], ran.tools(), hooks, resume=run, verdict="approve")
        sizes.append(sink.path.stat().st_size)
    early, late = sizes[59] - sizes[19], sizes[199] - sizes[159]
    assert late < 1.02 * early
    assert len(ran) == 200
    view = require_same(tmp_path, run)
    assert len(view.segments) == 201


@pytest.mark.parametrize("is_json", [False, True])
def test_commands_say_that_a_run_waits_and_for_what(is_json, tmp_path):
    _, ran = pause(tmp_path, [LOOK, DELETE_A])
    (tmp_path / "eval_it.py").write_text("def eval_it(ctx):\n    return True\n", encoding="utf-8")
    more = ["--json"] if is_json else []

    def shown():
        return CliRunner().invoke(main, ["show", str(tmp_path), *more]).stdout

    def evaluated():
        return CliRunner().invoke(main, ["eval", str(tmp_path), "--evals", str(tmp_path / "eval_it.py"), *more])

    if is_json:
        (request,) = json.loads(shown())["runs"][0]["waits_for"]
        assert (request["tool"], request["description"]) == ("delete", "delete a?")
    else:
        assert "waits for delete(path='a') (#2, call_2): delete a? [approve, deny]" in shown()
    assert "trace.jsonl is not finished, it waits for an approval" in evaluated().stderr
    resume(tmp_path, ran)
    assert "waits for delete" not in shown()
    assert "waits for" not in evaluated().stderr

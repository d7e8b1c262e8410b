"""Where effects run: threads, event loops, time-outs, context variables; and that all of it is given back."""

from __future__ import annotations

import asyncio
import gc
import socket
import sqlite3
import sys
import threading
import warnings
from contextvars import ContextVar, copy_context
from textwrap import dedent

import pytest
from opentelemetry import trace as trace_api
from opentelemetry.context import Context
from support import CountingProvider, add, look, python, require_whole

from looplet import (
    ConfigError,
    ProvenanceSink,
    Trace,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.awaiting import InContext
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "3"})
BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def make(is_async, replies, tools=(), hooks=(), **settings):
    backend = AsyncScriptedBackend(replies) if is_async else ScriptedBackend(replies)
    registry = tools_from([*tools, add, look], include_done=True)
    loop = async_composable_loop if is_async else composable_loop
    return loop(backend, {"goal": "g"}, registry, hooks=list(hooks), **settings)


async def steps_of(run):
    return [step async for step in run]


def go(run):
    return asyncio.run(steps_of(run)) if hasattr(run, "__anext__") else list(run)


def current_ids():
    context = trace_api.get_current_span().get_span_context()
    return context.trace_id, context.span_id


# --- stuck tools ----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kind", ["one by one", "parallel", "async"])
def test_stuck_tools_are_abandoned_and_starve_nobody(tmp_path, is_async, kind):
    forever, provider, after = threading.Event(), CountingProvider(), []

    def stuck() -> str:
        """Get stuck."""
        forever.wait(30)
        return "late"

    async def stuck_coroutine() -> str:
        """Get stuck."""
        await asyncio.Event().wait()
        return "late"

    settings = {"timeout_s": 0.02, "concurrent_safe": kind == "parallel"}
    stuck_tool = tool(name="stuck", **settings)(stuck_coroutine if kind == "async" else stuck)
    calls = [("stuck", {})] * 8
    sink = ProvenanceSink(tmp_path)
    run = make(
        is_async, [calls, ADD, [("look", {"name": "a"})] * 4, DONE], [stuck_tool], [sink], tracer_provider=provider
    )

    async def main():
        steps = await steps_of(run)
        after.append(await asyncio.to_thread(lambda: "default executor"))
        after.append(await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM))
        return steps

    steps = asyncio.run(main()) if is_async else list(run)
    assert len(after) == (2 if is_async else 0)
    assert [step.tool_result.error_kind for step in steps[:8]] == ["timeout"] * 8
    assert [step.tool_result.error for step in steps[8:]] == [None] * 6
    spans = require_whole(tmp_path, provider, "done").find("execute_tool stuck")
    told = [(span.attributes[semconv.ERROR_TYPE], span.attributes[semconv.TOOL_ABANDONED]) for span in spans]
    assert told == [("timeout", True)] * 8
    forever.set()


@BOTH
def test_a_tool_that_comes_back_after_its_deadline_changes_nothing(tmp_path, is_async):
    release, late = threading.Event(), threading.Event()

    @tool(timeout_s=0.02)
    def slow(ctx) -> str:
        """Come back late, and do everything that a tool can do."""
        span = trace_api.get_current_span()
        release.wait(30)
        span.set_attribute("late", True)
        span.add_event("late")
        ctx.report_progress("late")
        ctx.warn("late")
        ctx.metadata["late"] = True
        other = ProvenanceSink(tmp_path / "other")
        list(make(False, [DONE], hooks=[other]))
        late.set()
        return "late"

    sink = ProvenanceSink(tmp_path / "traces")
    run = make(is_async, [("slow", {}), DONE], [slow], [sink])
    steps = go(run)
    before = sink.path.read_bytes(), [step.to_dict() for step in steps]
    release.set()
    assert late.wait(30)
    sink.flush()
    assert (sink.path.read_bytes(), [step.to_dict() for step in run.state.steps]) == before
    assert sorted(path.name for path in sink.dir.glob("*.jsonl")) == ["manifest.jsonl", "trace.jsonl"]
    (alone,) = Trace.load(tmp_path / "other").roots
    assert alone.attributes[semconv.STOP_REASON] == "cancelled"  # its call was given up, and so is what it starts


@BOTH
def test_parallel_calls_that_come_back_after_a_ctrl_c_change_nothing(tmp_path, is_async):
    release, late, other_began = threading.Event(), threading.Event(), threading.Event()
    seen = []

    @tool(concurrent_safe=True)
    def slow() -> None:
        """Come back late."""
        other_began.set()
        release.wait(30)
        trace_api.get_current_span().set_attribute("late", True)
        late.set()

    @tool(concurrent_safe=True)
    def broken() -> None:
        """Interrupt the loop, not this thread."""
        other_began.wait(30)
        raise KeyboardInterrupt

    class Watch:
        def on_phase_end(self, end):
            seen.append(end.phase)

    sink = ProvenanceSink(tmp_path)
    run = make(is_async, [[("broken", {}), ("slow", {})]], [slow, broken], [sink, Watch()])
    if not is_async:  # the calls of a reply are all waited for, unless the waiting itself is interrupted
        threading.Timer(0.03, release.set).start()
    with pytest.raises(KeyboardInterrupt):
        go_interrupted(run, release) if is_async else list(run)
    before = sink.path.read_bytes()
    assert late.wait(30)
    sink.flush()
    assert sink.path.read_bytes() == before
    assert seen.count("execute_tool") == 2


def go_interrupted(run, release):
    threading.Timer(0.03, release.set).start()
    return go(run)


def test_the_interpreter_does_not_wait_for_stuck_threads():
    done = python(
        "-X",
        "dev",
        "-W",
        "error",
        "-c",
        dedent(
            """
            import asyncio, threading
            from looplet import *
            from looplet.testing import AsyncScriptedBackend, ScriptedBackend

            @tool(timeout_s=0.02, concurrent_safe=True)
            def stuck():
                "Get stuck."
                threading.Event().wait()

            @tool(timeout_s=0.02)
            async def stuck_loop():
                "Keep the event loop from turning."
                threading.Event().wait()

            tools = tools_from([stuck, stuck_loop], include_done=True)
            calls = [("stuck", {}), ("stuck", {}), ("stuck_loop", {})]
            script = [calls, ("stuck", {}), ("done", {"answer": "x"})]
            print(len(list(composable_loop(ScriptedBackend(script), {}, tools))))

            async def main():
                del calls[2]
                run = async_composable_loop(AsyncScriptedBackend(script), {}, tools)
                print(len([step async for step in run]))

            asyncio.run(main())
            """
        ),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n4\n", "")


# --- threads --------------------------------------------------------------------------------------------------------


def test_sync_tools_of_an_async_run_share_a_thread_and_parallel_ones_do_not():
    where, together = [], threading.Barrier(3, timeout=30)
    handle = []

    @tool
    def use_database() -> int:
        """Keep a handle that no other thread may use."""
        where.append(threading.get_ident())
        if not handle:
            handle.append(sqlite3.connect(":memory:"))
        return handle[0].execute("select 7").fetchone()[0]

    @tool
    def close_database() -> None:
        """Close the handle, in its thread."""
        handle[0].close()

    @tool(concurrent_safe=True)
    def meet() -> int:
        """Wait for the others."""
        together.wait()
        return threading.get_ident()

    script = [("use_database", {}), [("meet", {})] * 3, ("use_database", {}), [("use_database", {})] * 2]
    run = make(True, [*script, ("close_database", {}), DONE], [use_database, close_database, meet])
    steps = go(run)
    assert [step.tool_result.data for step in steps if step.tool_call.tool == "use_database"] == [7] * 4
    met = {step.tool_result.data for step in steps if step.tool_call.tool == "meet"}
    assert len(set(where)) == 1
    assert len(met) == 3
    assert not met & set(where)
    assert threading.get_ident() not in met | set(where)


def test_sync_tools_of_a_sync_run_are_called_where_the_loop_is():
    here = tool(name="here")(lambda: threading.get_ident())
    assert next(make(False, [("here", {}), DONE], [here])).tool_result.data == threading.get_ident()


def test_parallel_async_tools_under_for_share_one_event_loop():
    loops = []

    @tool(concurrent_safe=True)
    async def meet() -> None:
        """Note the event loop."""
        loops.append(asyncio.get_running_loop())
        while len(loops) < 6:
            await asyncio.sleep(0)

    assert [s.tool_result.error for s in make(False, [[("meet", {})] * 6, DONE], [meet])] == [None] * 7
    assert len(set(loops)) == 1


@tool(concurrent_safe=True)
async def nap() -> None:
    """Yield to the event loop."""
    await asyncio.sleep(0)


def test_a_coroutine_that_the_collector_closed_first_is_closed_in_peace():
    stepper = InContext(asyncio.sleep(0), copy_context()).__await__()
    next(stepper)
    stepper.gi_frame.f_locals["inner"].close()
    stepper.close()
    assert stepper.gi_frame is None


@tool(timeout_s=0.001)
async def oversleep() -> None:
    """Be abandoned."""
    await asyncio.sleep(30)


class Napping:
    """A hook with coroutines."""

    async def pre_prompt(self, *args):
        await asyncio.sleep(0)

    async def on_loop_end(self, *args):
        await asyncio.sleep(0)


def busy_run(is_async, number):
    look_twice = [("look", {"name": "a"}), ("look", {"name": "b"})]
    ending = [DONE] if number % 2 else [("oversleep", {}), DONE]
    return make(is_async, [[("nap", {})] * 2, look_twice, ADD, *ending], [nap, oversleep], [Napping()])


def two_hundred_runs():
    for number in range(200):
        run = busy_run(False, number)
        for _ in run:
            if number % 5 == 4:
                break
        if number % 10 == 9:
            run.close()


async def two_hundred_async_runs():
    for number in range(200):
        run = busy_run(True, number)
        async for _ in run:
            if number % 5 == 4:
                break
        if number % 10 == 9:
            await run.aclose()


@BOTH
def test_runs_give_their_threads_and_loops_back(is_async, monkeypatch):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    before = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(two_hundred_async_runs(), debug=True) if is_async else two_hundred_runs()
        gc.collect()
    assert threading.active_count() <= before + 40  # 32 idle ones are kept, and some have not ended yet
    assert complaints == []


# --- context variables ----------------------------------------------------------------------------------------------

mood = ContextVar("mood", default="unset")


class Seen:
    """What tools, hooks and a backend see: the caller's variable, and a current span."""

    def __init__(self):
        self.by_lane = {}

    def note(self, lane):
        self.by_lane.setdefault(lane, set()).add((mood.get(), trace_api.get_current_span().is_recording()))
        mood.set(f"changed by {lane}")

    def noting(self, lane, **settings):
        return tool(name=lane, description="Look around.", **settings)(lambda: self.note(lane))

    def async_noting(self, lane, **settings):
        async def look_around():
            await asyncio.sleep(0)
            self.note(lane)

        return tool(name=lane, description="Look around.", **settings)(look_around)

    def pre_prompt(self, *args):
        self.note("hook")

    async def post_dispatch(self, *args):
        await asyncio.sleep(0)
        self.note("async_hook")

    def on_loop_end(self, *args):
        self.note("last_hook")


class NotingBackend(ScriptedBackend):
    def __init__(self, replies, seen):
        super().__init__(replies)
        self.seen = seen

    def chat(self, messages, **settings):
        self.seen.note("backend")
        return super().chat(messages)


@BOTH
def test_context_variables_of_the_caller_are_seen_in_every_lane_and_no_span_is_seen_outside(tmp_path, is_async):
    seen = Seen()
    tools = [
        seen.noting("plain"),
        seen.noting("timed", timeout_s=30),
        seen.noting("parallel", concurrent_safe=True),
        seen.async_noting("coroutine"),
        seen.async_noting("timed_coroutine", timeout_s=30),
        seen.async_noting("parallel_coroutine", concurrent_safe=True),
        seen.async_noting("timed_parallel_coroutine", timeout_s=30, concurrent_safe=True),
    ]
    lanes = [spec.name for spec in tools]
    backend = NotingBackend([*([(lane, {})] * 2 for lane in lanes), DONE], seen)
    loop = async_composable_loop if is_async else composable_loop
    run = loop(backend, {}, tools_from(tools, include_done=True), hooks=[seen, ProvenanceSink(tmp_path)])

    def check():
        assert (mood.get(), trace_api.get_current_span()) == ("the caller's", trace_api.INVALID_SPAN)

    async def main():
        mood.set("the caller's")
        async for _ in run:
            check()
        check()

    if is_async:
        asyncio.run(main())
    else:
        token = mood.set("the caller's")
        for _ in run:
            check()
        check()
        mood.reset(token)
    everywhere = [*lanes, "hook", "async_hook", "last_hook", "backend"]
    assert seen.by_lane == {lane: {("the caller's", True)} for lane in everywhere}


@BOTH
def test_interleaved_runs_never_mix_their_spans(tmp_path, is_async):
    def run_of(name):
        seen = []

        @tool
        def where() -> None:
            """Note the trace."""
            seen.append(current_ids()[0])

        class Hook:
            def pre_prompt(self, *args):
                seen.append(current_ids()[0])

        run = make(is_async, [("where", {})] * 3, [where], [Hook(), ProvenanceSink(tmp_path / name)])
        return run, seen

    (one, seen_one), (two, seen_two) = run_of("one"), run_of("two")

    async def main():
        for _ in range(3):
            await anext(one)
            await anext(two)
        await one.aclose()
        await two.aclose()

    if is_async:
        asyncio.run(main())
    else:
        for _ in range(3):
            next(one), next(two)
        one.close(), two.close()
    for name, run, seen in (("one", one, seen_one), ("two", two, seen_two)):
        assert set(seen) == {int(run.trace_id, 16)}
        (root,) = Trace.load(tmp_path / name).roots
        assert {node.run_id for node in (root, *root.descendants())} == {run.run_id}
    assert one.trace_id != two.trace_id


@BOTH
@pytest.mark.parametrize("kind", ["sync", "async", "sync in thread", "sync in coroutine"])
def test_a_run_inside_a_tool_is_a_child_of_the_tools_span(tmp_path, is_async, kind):
    inner = []

    def sub_run(is_async):
        inner.append(make(is_async, [ADD, DONE]))
        return inner[0]

    def delegate() -> int:
        """Ask a sub-agent."""
        return len(list(sub_run(False)))

    async def delegate_async() -> int:
        """Ask a sub-agent."""
        return len(await steps_of(sub_run(True)))

    async def delegate_blocking() -> int:
        """Ask a sub-agent, and keep the event loop waiting."""
        return len(list(sub_run(False)))

    function = {"async": delegate_async, "sync in coroutine": delegate_blocking}.get(kind, delegate)
    settings = {"timeout_s": 30} if kind == "sync in thread" else {}
    outer_tool = tool(name="delegate", **settings)(function)
    run = make(is_async, [("delegate", {}), DONE], [outer_tool], [ProvenanceSink(tmp_path)])
    assert [step.tool_result.error for step in go(run)] == [None, None]
    (sub,) = inner
    assert (sub.trace_id, sub.stop_reason) == (run.trace_id, "done")
    (node,) = [node for node in Trace.load(tmp_path).find("invoke_agent *") if node.run_id == sub.run_id]
    assert (node.parent.name, node.parent.run_id) == ("execute_tool delegate", run.run_id)


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_an_async_backend_under_for_names_the_cure():
    with pytest.raises(ConfigError, match="async for"):
        composable_loop(AsyncScriptedBackend([DONE]), {}, tools_from([], include_done=True))

    class Disguised:
        def chat(self, messages, **settings):
            return AsyncScriptedBackend([DONE]).chat(messages)

    run = composable_loop(Disguised(), {}, tools_from([], include_done=True))
    (step,) = list(run)
    assert "async for" in step.tool_result.error
    assert run.stop_reason == "llm_error"


class FirstError(BaseException):
    pass


class SecondError(BaseException):
    pass


@BOTH
@pytest.mark.parametrize(
    "pair", [(FirstError, SecondError), (KeyboardInterrupt, SecondError), (FirstError, KeyboardInterrupt)]
)
@pytest.mark.parametrize("kind", ["threads", "coroutines"])
def test_the_first_of_two_errors_in_call_order_is_raised(tmp_path, is_async, pair, kind):
    second_failed = threading.Event()
    provider = CountingProvider()

    def first() -> None:
        """Fail second."""
        second_failed.wait(30)
        raise pair[0]

    def second() -> None:
        """Fail first."""
        second_failed.set()
        raise pair[1]

    async def first_coroutine() -> None:
        """Fail second."""
        while not second_failed.is_set():
            await asyncio.sleep(0)
        raise pair[0]

    async def second_coroutine() -> None:
        """Fail first."""
        second()

    functions = (first, second) if kind == "threads" else (first_coroutine, second_coroutine)
    tools = [tool(name=name, concurrent_safe=True)(f) for name, f in zip(("one", "two"), functions, strict=True)]
    run = make(is_async, [[("one", {}), ("two", {})]], tools, [ProvenanceSink(tmp_path)], tracer_provider=provider)
    with pytest.raises(pair[0]) as caught:
        go(run)
    assert caught.type is pair[0]
    assert run.stop_reason == "cancelled"
    trace = require_whole(tmp_path, provider, "cancelled")
    assert [span.is_error for span in trace.find("execute_tool *")] == [True, True]


@BOTH
def test_coroutine_objects_that_are_only_awaitable_work_as_well(is_async):
    class Later:
        def __await__(self):
            yield from asyncio.sleep(0).__await__()
            return "waited"

    wait = tool(name="wait")(lambda: Later())
    assert go(make(is_async, [("wait", {}), DONE], [wait]))[0].tool_result.data == "waited"


@BOTH
def test_a_tool_that_raises_stop_iteration_is_an_observation(is_async):
    empty = tool(name="empty")(lambda: next(iter(())))
    steps = go(make(is_async, [("empty", {}), DONE], [empty]))
    assert "StopIteration" in steps[0].tool_result.error
    assert steps[1].tool_result.error is None


def test_a_busy_thread_of_a_run_is_given_to_nobody_else():
    from looplet import threads
    from looplet.executors import AsyncExecutor
    from looplet.plan import SERIAL, Call

    started, release = threading.Event(), threading.Event()

    def stuck():
        started.set()
        release.wait(30)

    async def main():
        executor = AsyncExecutor()
        task = asyncio.create_task(executor.perform(Call(stuck, Context(), SERIAL)))
        while not started.is_set():
            await asyncio.sleep(0.001)
        idle = len(threads._idle)
        executor.close()  # as a finaliser does, while the call is still waited for
        assert len(threads._idle) == idle
        other = AsyncExecutor()
        assert await asyncio.wait_for(other.perform(Call(lambda: "served", Context(), SERIAL)), 10) == "served"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.wait_for(other.perform(Call(lambda: "again", Context(), SERIAL)), 10) == "again"
        other.close()

    try:
        asyncio.run(main())
    finally:
        release.set()

"""Attacks on what a run does beyond a plain turn: leaving it anywhere, cancelling it, money, events, long texts."""

from __future__ import annotations

import asyncio
import dis
import gc
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace as trace_api
from support import CountingProvider, add, boom, both, look, require_whole, signals_to_main

from looplet import (
    BackendRouter,
    BudgetCap,
    HookDecision,
    LifecycleEvent,
    LoopConfig,
    ProvenanceSink,
    RateLimitedBackend,
    ResilientBackend,
    SummarizeCompact,
    ToolContext,
    Trace,
    async_composable_loop,
    composable_loop,
    run_sub_loop,
    tool,
    tools_from,
)
from looplet.awaiting import PrivateLoop
from looplet.backends.rate_limit import MinuteLimit
from looplet.cancel import CancelToken
from looplet.errors import BackendError, ConfigError, ContextOverflow, ToolError
from looplet.streaming import RunStartEvent, Stream
from looplet.subagents import async_run_sub_loop
from looplet.telemetry import semconv
from looplet.telemetry.drops import drops
from looplet.telemetry.otlp_file import read_file
from looplet.testing import AsyncScriptedBackend, PolicyBackend, ScriptedBackend
from looplet.testing.backends import to_reply
from looplet.threads import _idle
from looplet.types import Delta, Reply, ToolCall, ToolResult, Usage

ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "3"})
BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
PATIENCE_S = 30
"""what ends at once has ended by then, on the busiest machine; what is stuck is so for twice as long"""


class Place:
    """A folder for one trace file, and runs that are written to it and counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.provider = CountingProvider()
        self.sink = ProvenanceSink(folder)

    def run(self, is_async, replies=(ADD, ADD, DONE), *, llm=None, tools=(), hooks=(), **settings):
        backend = llm or (AsyncScriptedBackend(replies) if is_async else ScriptedBackend(replies))
        registry = tools_from([*tools, add, look], include_done=True)
        settings |= {"hooks": [*hooks, self.sink], "tracer_provider": self.provider}
        return (async_composable_loop if is_async else composable_loop)(backend, {"goal": "g"}, registry, **settings)

    def is_complete(self) -> bool:
        """Tell whether every span that was started is in the file, and has ended for the provider, too."""
        written = {record.span_id for record in read_file(self.folder / "trace.jsonl").spans}
        return written == set(self.provider.ends) and set(self.provider.ends.values()) == {1}

    def whole(self, reason: str, runs: int = 1) -> Trace:
        assert trace_api.get_current_span() is trace_api.INVALID_SPAN
        return require_whole(self.folder, self.provider, reason)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "traces")


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    """Require that every thread of looplet's ends, or is free for the next call."""
    yield
    gc.collect()
    soon(lambda: sum(thread.name == "looplet-worker" for thread in threading.enumerate()) <= len(_idle))


def soon(is_true: Callable[[], bool]) -> None:
    """Wait until something is true that other threads are about to make true."""
    late = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < late
        time.sleep(0.002)


@tool
def report(ctx: ToolContext) -> str:
    """Tell how far it is."""
    ctx.report_progress("half", {"done": 1})
    return "reported"


def hook(**methods):
    """Return a hook with these methods; each gets only what the run passes."""
    return type("Hook", (), {name: staticmethod(function) for name, function in methods.items()})()


async def steps_of(run):
    return [step async for step in run]


def go(run):
    """Iterate to the end; return the steps."""
    return asyncio.run(steps_of(run)) if hasattr(run, "__anext__") else list(run)


def books(trace: Trace) -> tuple[int, int]:
    """Return the input tokens of all chat spans, and what the first run's span says of itself and all below."""
    chats = trace.find(semconv.CHAT + "*")
    told = sum(chat.attributes.get(semconv.INPUT_TOKENS, 0) for chat in chats)
    return told, trace.roots[0].attributes[semconv.TOTAL_INPUT_TOKENS]


# --- leaving while the run is stuck somewhere -------------------------------------------------------------------------


@dataclass
class Stuck:
    """Where a run gets stuck, until it is released; and what was opened and closed there."""

    is_async: bool
    begun: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    log: list[str] = field(default_factory=list)

    def block(self, *args: Any, **kwargs: Any) -> str:
        self.begun.set()
        self.release.wait(2 * PATIENCE_S)
        return "approve"

    async def wait(self, *args: Any, **kwargs: Any) -> str:
        self.begun.set()
        while not self.release.is_set():
            await asyncio.sleep(0.001)
        return "approve"

    def backend(self, replies, sub=None):
        """Return a scripted backend that is stuck when it is asked something that begins with `sub`."""
        here = self
        if self.is_async:

            class Async(AsyncScriptedBackend):
                async def chat(self, messages, **settings):
                    if messages[-1].text.startswith("sub"):
                        await here.wait()
                        return Reply("answer", usage=Usage(100, 10))
                    return await super().chat(messages)

            return Async(replies)

        class Sync(ScriptedBackend):
            def chat(self, messages, **settings):
                if messages[-1].text.startswith("sub"):
                    here.block()
                    return Reply("answer", usage=Usage(100, 10))
                return super().chat(messages)

        return Sync(replies)


def streaming(stuck: Stuck, where: str) -> dict[str, Any]:
    """Return a run whose stream is stuck before, between or after its deltas."""
    reply = Reply(tool_calls=(ToolCall("done", {"answer": "x"}),), usage=Usage(10, 5))

    class Sync:
        model = "streams"

        def chat(self, messages, **settings):
            raise AssertionError

        def stream(self, messages, **settings):
            stuck.log.append("open")
            try:
                for point, item in (("open", Delta("text", "x")), ("between", Delta("text", "y")), ("", reply)):
                    if point == where:
                        stuck.block()
                    yield item
            finally:
                stuck.log.append("close")
                if where == "close":
                    stuck.block()

    class Async:
        model = "streams"

        async def chat(self, messages, **settings):
            raise AssertionError

        async def stream(self, messages, **settings):
            stuck.log.append("open")
            try:
                for point, item in (("open", Delta("text", "x")), ("between", Delta("text", "y")), ("", reply)):
                    if point == where:
                        await stuck.wait()
                    yield item
            finally:
                stuck.log.append("close")
                if where == "close":
                    await stuck.wait()

    return {"llm": Async() if stuck.is_async else Sync(), "stream": lambda event: None}


def sync_streaming(stuck: Stuck) -> dict[str, Any]:
    """Return a run whose backend is sync whatever the run is: under `async for` it works in a thread."""
    return streaming(Stuck(False, stuck.begun, stuck.release, stuck.log), "between")


def retrying(stuck: Stuck) -> dict[str, Any]:
    """Return a run that waits to ask again, after an attempt that was charged for."""
    failure = BackendError("busy", kind="rate_limit", retryable=True, usage=Usage(7, 0))
    llm = ResilientBackend(stuck.backend([ADD, failure, DONE]), base_delay_s=60, max_delay_s=60)
    return {"llm": llm, "stream": lambda event: event.kind == "chat_retry" and stuck.begun.set()}


def limited(stuck: Stuck) -> dict[str, Any]:
    """Return a run that waits for a rate limit."""

    class Limited(RateLimitedBackend):
        def looplet_candidates(self, purpose):
            found = super().looplet_candidates(purpose)
            reserve = self.limit.reserve

            def reserve_and_tell(tokens):
                taken = reserve(tokens)
                if taken.wait_s > 0:
                    stuck.begun.set()
                return taken

            self.limit.reserve = reserve_and_tell
            return found

    return {"llm": Limited(stuck.backend([ADD, DONE]), requests_per_minute=1)}


def compacting(stuck: Stuck, how: str) -> dict[str, Any]:
    """Return a run that is stuck in a compaction service, or in the model that the service asks."""

    class Service:
        def compact(self, *, llm, **rest):
            stuck.block() if how == "service" else llm.generate("sub")

    class AsyncService:
        async def compact(self, *, llm, **rest):
            await (stuck.wait() if how == "async service" else llm.generate("sub"))

    service = AsyncService() if how.startswith("async") else Service()
    hooks = [hook(should_compact=lambda state, log, talk, step: step == 2)]
    config = LoopConfig(compact_service=service)
    return {"llm": stuck.backend([ADD, ADD, DONE]), "hooks": hooks, "config": config}


def asking(stuck: Stuck, how: str) -> dict[str, Any]:
    """Return a run whose tool is stuck in its model."""

    @tool(name="ask", concurrent_safe=how == "parallel")
    def ask(ctx: ToolContext) -> str:
        """Ask."""
        return ctx.llm.generate("sub")

    @tool(name="ask")
    async def ask_async(ctx: ToolContext) -> str:
        """Ask."""
        return await ctx.llm.generate("sub")

    @tool(name="ask")
    def ask_in_thread(ctx: ToolContext) -> str:
        """Ask in a thread of the tool's own."""
        said = []

        def work():
            try:
                said.append(ctx.llm.generate("sub"))
            except BaseException as error:  # nobody looks at a thread's exceptions
                said.append(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join()
        if isinstance(said[0], BaseException):
            raise said[0]
        return said[0]

    made = {"async tool": ask_async, "thread": ask_in_thread}.get(how, ask)
    calls = [("ask", {})] * (2 if how == "parallel" else 1)
    return {"llm": stuck.backend([ADD, calls, DONE]), "tools": [made]}


def nesting(stuck: Stuck) -> dict[str, Any]:
    """Return a run with sub-agents in parallel tools, whose tools are stuck: both are, before anybody is told."""
    together = threading.Barrier(2)

    @tool(name="stuck")
    def work() -> str:
        """Get stuck."""
        together.wait(PATIENCE_S)
        return stuck.block()

    @tool(name="delegate", concurrent_safe=True)
    def delegate() -> str:
        """Run an agent."""
        backend = ScriptedBackend([Reply(tool_calls=(ToolCall("stuck", {}),))])
        return run_sub_loop(backend, {"t": 1}, tools_from([work]))["stop_reason"]

    return {"llm": stuck.backend([ADD, [("delegate", {})] * 2, DONE]), "tools": [delegate]}


def approving(stuck: Stuck, how: str) -> dict[str, Any]:
    """Return a run whose human thinks it over."""

    @tool(name="ask")
    def ask(ctx: ToolContext) -> str | None:
        """Ask a human."""
        return ctx.approve("Go?")

    handler = stuck.wait if how == "async gate" else stuck.block
    gate = hook(check_permission=lambda call, state: None)
    if how != "tool":
        gate = hook(check_permission=lambda call, state: HookDecision(permission="ask", block="Go?"))
    call = ("ask", {}) if how == "tool" else ADD
    config = LoopConfig(approval_handler=handler)
    return {"llm": stuck.backend([call, DONE]), "tools": [ask], "hooks": [gate], "config": config}


PLACES: dict[str, Callable[[Stuck], dict[str, Any]]] = {
    "stream, open": lambda stuck: streaming(stuck, "open"),
    "stream, between": lambda stuck: streaming(stuck, "between"),
    "stream, close": lambda stuck: streaming(stuck, "close"),
    "stream, sync backend": sync_streaming,
    "retry wait": retrying,
    "rate-limit wait": limited,
    "compaction service": lambda stuck: compacting(stuck, "service"),
    "compaction service, async": lambda stuck: compacting(stuck, "async service"),
    "summary": lambda stuck: compacting(stuck, "summary"),
    "summary, async": lambda stuck: compacting(stuck, "async summary"),
    "ctx.llm": lambda stuck: asking(stuck, "tool"),
    "ctx.llm, async tool": lambda stuck: asking(stuck, "async tool"),
    "ctx.llm, parallel": lambda stuck: asking(stuck, "parallel"),
    "ctx.llm, own thread": lambda stuck: asking(stuck, "thread"),
    "sub-agents": nesting,
    "approval, gate": lambda stuck: approving(stuck, "gate"),
    "approval, async gate": lambda stuck: approving(stuck, "async gate"),
    "approval, tool": lambda stuck: approving(stuck, "tool"),
}


def left(place, where, is_async, leave, token=None):
    """Have a run get stuck, leave it, release it; return where it was stuck, its router and what its file counts."""
    stuck = Stuck(is_async)
    settings = PLACES[where](stuck)
    settings["config"] = replace(settings.get("config", LoopConfig()), cancel_token=token)
    router = settings["llm"] = BackendRouter(settings["llm"])
    run = place.run(is_async, **settings)
    try:
        reason = leave(run, stuck)
    finally:
        stuck.release.set()
    assert run.stop_reason == reason
    soon(place.is_complete)  # a sub-agent ends when its tool has come back
    trace = place.whole(reason)
    soon(lambda: gc.collect() >= 0 and stuck.log.count("open") == stuck.log.count("close"))  # in whatever thread
    spans, total = books(trace)
    assert spans == total
    return stuck, router, total


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_cancelled_task(place, where, how):
    def leave(run, stuck):
        async def steps_within(limit):
            async with limit:
                return await steps_of(run)

        async def main():
            limit = asyncio.timeout(None)
            task = asyncio.ensure_future(steps_within(limit))
            while not stuck.begun.is_set():
                await asyncio.sleep(0.001)
            task.cancel() if how == "cancel" else limit.reschedule(0)
            return await task

        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError if how == "cancel" else TimeoutError):
            asyncio.run(main(), debug=True)
        assert time.monotonic() - began < PATIENCE_S
        return "cancelled"

    _, router, total = left(place, where, True, leave)
    assert router.total_input_tokens == total


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("thread", ["here", "elsewhere"])
def test_an_event_loop_that_is_thrown_away(place, where, thread):
    """Nobody cancels the task: its loop is closed, and a garbage collector, in whatever thread, finds the rest."""

    def leave(run, stuck):
        loop = asyncio.new_event_loop()

        async def until_stuck():
            while not stuck.begun.is_set():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.001)

        task = loop.create_task(steps_of(run))
        task._log_destroy_pending = False
        loop.run_until_complete(until_stuck())
        for other in asyncio.all_tasks(loop):
            other._log_destroy_pending = False
        step = task.get_coro()
        loop.close()
        closer = threading.Thread(target=step.close)
        closer.start() if thread == "elsewhere" else step.close()
        if thread == "elsewhere":
            closer.join()
        gc.collect()
        if stuck.log == ["open"] and where != "stream, sync backend":
            stuck.log.clear()  # an async generator without its loop: before Python 3.13 nobody can await its end
        return "cancelled"

    left(place, where, True, leave)


@pytest.mark.parametrize("where", PLACES)
def test_aclose_while_the_run_is_stuck(place, where):
    def leave(run, stuck):
        async def main():
            task = asyncio.ensure_future(steps_of(run))
            while not stuck.begun.is_set():
                await asyncio.sleep(0.001)
            await run.aclose()
            stuck.release.set()
            return await asyncio.wait_for(task, PATIENCE_S)

        asyncio.run(main(), debug=True)
        return "closed_by_caller"

    left(place, where, True, leave)


@pytest.mark.parametrize("where", PLACES)
@BOTH
def test_a_token_that_is_cancelled_while_the_run_is_stuck(place, where, is_async):
    """Waits end at once; what nothing can interrupt is let to its end, and then the run ends."""
    token = CancelToken()

    def leave(run, stuck):
        def cancel():
            stuck.begun.wait(PATIENCE_S)
            token.cancel("enough")
            if "wait" not in where:
                stuck.release.set()

        canceller = threading.Thread(target=cancel)
        canceller.start()
        began = time.monotonic()
        go(run)
        canceller.join()
        assert time.monotonic() - began < PATIENCE_S
        return "cancelled"

    _, router, total = left(place, where, is_async, leave, token)
    assert router.total_input_tokens == total
    assert token._callbacks == {}


@pytest.mark.parametrize("where", PLACES)
def test_ctrl_c_while_the_run_is_stuck(place, where):
    def leave(run, stuck):
        def interrupt(send):
            stuck.begun.wait(PATIENCE_S)
            send()

        began = time.monotonic()
        with signals_to_main() as send:
            interrupter = threading.Thread(target=interrupt, args=[send])
            interrupter.start()
            with pytest.raises(KeyboardInterrupt):
                list(run)
            interrupter.join()
        assert time.monotonic() - began < PATIENCE_S
        return "cancelled"

    if "stream, sync backend" in where:
        pytest.skip("that is the other one")
    left(place, where, False, leave)


# --- the garbage collector comes at the worst moment ------------------------------------------------------------------


class Sweeping(MinuteLimit):
    """A limit whose clock makes the garbage collector run, while the limit is being worked on."""

    def __init__(self):
        self.sweeps = False
        super().__init__(1, clock=self._now)

    def _now(self):
        if self.sweeps:
            self.sweeps = False
            gc.collect()
        return time.monotonic()


def waiting_run(limit):
    """Make a run that waits for the limit, drop it in a cycle with its event loop, and return a weak reference."""
    llm = RateLimitedBackend(AsyncScriptedBackend([ADD, DONE]), requests_per_minute=1)
    llm.limit = limit
    run = async_composable_loop(llm, {}, tools_from([add], include_done=True))
    loop = asyncio.new_event_loop()
    task = loop.create_task(steps_of(run))
    task._log_destroy_pending = False
    for _ in range(200):
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    task.itself = task.get_coro()
    return weakref.ref(run)


def test_a_run_that_waits_for_a_limit_is_collected_while_somebody_asks_the_limit():
    limit = Sweeping()
    gc.disable()
    try:
        gone = waiting_run(limit)
        limit.sweeps = True
        asker = threading.Thread(target=limit.reserve, args=[1], daemon=True)
        asker.start()
        asker.join(PATIENCE_S)
        assert not asker.is_alive()
    finally:
        gc.enable()
    gc.collect()
    assert gone() is None
    assert len(limit._waiting) == 1  # the asker; the place of the run is free again


# --- the token --------------------------------------------------------------------------------------------------------


@tool
def hang(ctx: ToolContext) -> str:
    """Hang something on the token and leave it there."""
    ctx.cancel_token.on_cancel(lambda: None)
    return "hung"


@tool(timeout_s=0.005)
def hang_late(ctx: ToolContext) -> None:
    """Take too long, with something on the token."""
    ctx.cancel_token.on_cancel(lambda: None)
    ctx.cancel_token.wait(2 * PATIENCE_S)


@BOTH
def test_a_token_that_many_runs_share_keeps_nothing(is_async):
    token = CancelToken()
    config = LoopConfig(cancel_token=token)
    registry = tools_from([hang, hang_late], include_done=True)
    backend = AsyncScriptedBackend if is_async else ScriptedBackend
    loop = async_composable_loop if is_async else composable_loop
    for number in range(1_000):
        calls = [("hang", {}), *([("hang_late", {})] if number % 100 == 0 else [])]
        run = loop(backend([calls, DONE]), {}, registry, config=config)
        assert [step.tool_call.tool for step in go(run)][-1] == "done"
    assert (token._callbacks, token._hung) == ({}, {})


@BOTH
def test_a_token_keeps_nothing_of_runs_that_are_left(is_async):
    token = CancelToken()
    told = []

    @tool(concurrent_safe=True)
    def work(ctx: ToolContext) -> None:
        """Raise an interrupt, with something on the token."""
        ctx.cancel_token.on_cancel(lambda: told.append(ctx.cancel_token.reason))
        raise KeyboardInterrupt

    for calls in ([("work", {})], [("work", {})] * 2):
        loop, backend = (
            (async_composable_loop, AsyncScriptedBackend) if is_async else (composable_loop, ScriptedBackend)
        )
        run = loop(backend([calls]), {}, tools_from([work]), config=LoopConfig(cancel_token=token))
        with pytest.raises(KeyboardInterrupt):
            go(run)
    assert token._callbacks == {}
    assert len(told) == 3


def test_what_watches_a_call_that_has_come_back_still_hears_of_the_token():
    token, watched = CancelToken(), threading.Event()

    @tool
    def start(ctx: ToolContext) -> str:
        """Start something that goes on."""
        threading.Thread(target=lambda: ctx.cancel_token.wait(2 * PATIENCE_S) and watched.set(), daemon=True).start()
        return "started"

    run = composable_loop(
        ScriptedBackend([("start", {}), ADD, DONE]), {}, tools_from([start, add]), config=LoopConfig(cancel_token=token)
    )
    next(run)
    token.cancel()
    assert list(run) == []
    assert watched.wait(PATIENCE_S)
    assert run.stop_reason == "cancelled"


def test_a_token_is_cancelled_by_a_signal_handler_at_any_moment(tmp_path):
    """Between any two bytecodes of the token's own methods, those of the thread that gets the signal included."""
    token = CancelToken()
    files = {CancelToken.wait.__code__.co_filename}
    moments = 0

    def cancel_at(moment):
        nonlocal token, moments
        token, moments = CancelToken(), 0
        child = token.child()
        told = []

        def trace_line(frame, event, arg):
            nonlocal moments
            frame.f_trace_opcodes = True
            if event == "opcode":
                moments += 1
                if moments == moment:
                    sys.settrace(None)
                    token.cancel("signal")  # what a handler would do just here
            return trace_line

        def calls(frame, event, arg):
            return trace_line if frame.f_code.co_filename in files else None

        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # before `settrace`: Python 3.12 looks for it there only
        sys.settrace(calls)
        try:
            forget = child.on_cancel(lambda: told.append("callback"))
            waited = child.wait(0.0)
            forget()
        finally:
            sys.settrace(before)
        return told, waited, child.is_cancelled

    cancel_at(-1)
    total = moments
    assert total > 100
    for moment in range(1, total + 1):
        told, waited, cancelled = cancel_at(moment)
        assert cancelled
        assert len(told) <= 1
        assert told or not waited
        assert token._callbacks == {}


@BOTH
@pytest.mark.parametrize(
    "method",
    ["pre_loop", "pre_prompt", "pre_dispatch", "check_permission", "check_done", "post_dispatch", "should_stop"],
)
def test_a_token_that_is_cancelled_in_a_hook(place, is_async, method):
    token = CancelToken()
    hooks = [hook(**{method: lambda *args: token.cancel("seen enough")})]
    run = place.run(is_async, [ADD, DONE], hooks=hooks, config=LoopConfig(cancel_token=token))
    go(run)
    last = run.state.steps[-1].tool_call.tool if run.state.steps else None
    assert run.stop_reason == ("done" if last == "done" else "cancelled")
    place.whole(run.stop_reason)


@BOTH
@pytest.mark.parametrize("event", [event for event in LifecycleEvent if not event.startswith("subagent")])
def test_a_token_that_is_cancelled_in_an_event(place, is_async, event):
    token = CancelToken()

    def on_event(payload):
        if payload.event == event:
            token.cancel("seen enough")
        if payload.event == "pre_tool_use" and event == "hook_decision":
            return HookDecision(additional_context="x")
        return None

    hooks = [hook(on_event=on_event, should_compact=lambda state, *rest: True)]
    replies = [[("add", {"a": 1, "b": 2}), ("report", {}), ("boom", {})], DONE]
    run = place.run(is_async, replies, hooks=hooks, tools=[report, boom], config=LoopConfig(cancel_token=token))
    go(run)
    assert token.is_cancelled
    assert run.stop_reason == ("done" if event in ("done_accepted", "stop") else "cancelled")
    place.whole(run.stop_reason)


def test_sub_agents_and_their_tools_are_told(place):
    """A token that is cancelled while a tool of a sub-agent of a sub-agent works."""
    token, begun, heard = CancelToken(), threading.Event(), []

    @tool
    def work(ctx: ToolContext) -> str:
        """Work until told otherwise."""
        begun.set()
        heard.append((ctx.cancel_token.wait(2 * PATIENCE_S), ctx.cancel_token.reason))
        return "stopped"

    def agent(name, tools, replies):
        @tool(name=name)
        def delegate() -> dict:
            """Run an agent."""
            return run_sub_loop(ScriptedBackend(replies), {"t": 1}, tools_from(tools))

        return delegate

    inner = agent("inner", [work], [("work", {}), DONE])
    outer = agent("outer", [inner], [("inner", {}), DONE])

    def cancel():
        begun.wait(PATIENCE_S)
        token.cancel("enough")

    canceller = threading.Thread(target=cancel)
    canceller.start()
    run = place.run(False, [("outer", {}), DONE], tools=[outer], config=LoopConfig(cancel_token=token))
    began = time.monotonic()
    list(run)
    canceller.join()
    assert time.monotonic() - began < PATIENCE_S
    assert heard == [(True, "enough")]
    trace = place.whole("cancelled")
    assert [view.stop_reason for view in trace.runs] == ["cancelled"] * 3


# --- lifecycle events -------------------------------------------------------------------------------------------------


class Diary:
    """Writes every event down, and answers some of them."""

    def __init__(self, **answers):
        self.heard = []
        self._answers = answers

    def on_event(self, payload):
        self.heard.append(payload)
        answer = self._answers.get(payload.event)
        return answer(payload) if callable(answer) else answer

    @property
    def events(self):
        return [str(payload.event) for payload in self.heard]


class AsyncDiary(Diary):
    async def on_event(self, payload):
        await asyncio.sleep(0)
        return super().on_event(payload)


DIARIES = pytest.mark.parametrize("kind", [Diary, AsyncDiary])


def settings_of(is_async, replies, **settings):
    """Return the arguments of a run whose tools report, add and fail."""
    backend = (AsyncScriptedBackend if is_async else ScriptedBackend)(replies)
    registry = tools_from([report, add, look, boom], include_done=True)
    return {"llm": backend, "task": {"goal": "g"}, "tools": registry, **settings}


@DIARIES
def test_all_events_of_a_run_in_their_order(kind):
    """Two events are those of `run_sub_loop`; the other twelve come from every run."""
    diaries = []

    def make(is_async):
        diaries.append(kind())
        compact = hook(should_compact=lambda state, log, talk, step: step == 3)
        return settings_of(is_async, [("report", {}), ("boom", {}), ADD, DONE], hooks=[compact, diaries[-1]])

    both(make)
    late = "tool_progress"
    expected = [
        "session_start",
        *["pre_llm_call", "post_llm_response", "pre_tool_use", late, "post_tool_use"],
        *["pre_llm_call", "post_llm_response", "pre_tool_use", "post_tool_failure"],
        *["hook_decision", "pre_compact", "post_compact"],
        *["pre_llm_call", "post_llm_response", "pre_tool_use", "post_tool_use"],
        *["pre_llm_call", "post_llm_response", "pre_tool_use", "done_accepted", "post_tool_use", "stop"],
    ]
    for diary in diaries:
        if kind is AsyncDiary:  # awaited at the end of the turn
            assert sorted(diary.events) == sorted(expected)
        else:
            assert diary.events == expected
        told = {payload.event: payload for payload in diary.heard}
        assert [payload.step_num for payload in diary.heard if payload.event == "pre_tool_use"] == [1, 2, 3, 4]
        assert told[late].extra == {"stage": "half", "data": {"done": 1}}
        assert told[late].tool_call.tool == "report"
        assert (told["stop"].termination_reason, told["post_tool_failure"].tool_result.error) == (
            "done",
            "RuntimeError: kaput",
        )
        assert told["hook_decision"].hook_slot == "should_compact"
        assert "goal: g" in next(p.prompt for p in diary.heard if p.event == "pre_llm_call")
        assert told["pre_llm_call"].prompt == told["post_llm_response"].prompt
        assert (told["post_llm_response"].usage, told["pre_compact"].messages_before) == (Usage(10, 5), 5)


def test_a_rejected_done_and_a_reply_without_a_call(place):
    diary = Diary()
    rejects = hook(check_done=lambda state, *rest: "not yet" if len(state.steps) < 1 else None)
    run = place.run(False, [DONE, "hm", DONE], hooks=[rejects, diary])
    list(run)
    asked = ["pre_llm_call", "post_llm_response"]
    assert diary.events == [
        "session_start",
        *[*asked, "pre_tool_use", "hook_decision"],
        *asked,
        *[*asked, "pre_tool_use", "done_accepted", "post_tool_use", "stop"],
    ]


@DIARIES
def test_what_is_injected_before_a_request_is_in_that_request(kind):
    made = []

    def make(is_async):
        diary = kind(pre_llm_call=lambda payload: HookDecision(additional_context=f"note {payload.step_num}"))
        made.append(settings_of(is_async, [ADD, DONE], hooks=[diary]))
        return made[-1]

    both(make)
    for settings in made:
        first, second = settings["llm"].requests
        assert "note 1" in first[-1].text
        assert "note 2" in second[-1].text
        assert not any("note 1" in message.text for message in second)


@DIARIES
@pytest.mark.parametrize("event", ["pre_llm_call", "post_llm_response", "pre_tool_use", "post_tool_use"])
def test_an_event_stops_the_run(kind, event):
    ran = []

    @tool(name="add")
    def count(a: int, b: int) -> int:
        """Count."""
        ran.append((a, b))
        return a + b

    def make(is_async):
        ran.clear()
        settings = settings_of(is_async, [[ADD, ADD], DONE], hooks=[kind(**{event: HookDecision(stop="enough")})])
        settings["tools"] = tools_from([count], include_done=True)
        return settings

    outcome = both(make)
    assert outcome.stop_reason == "enough"
    assert len(outcome.trace.find("chat*")) == (0 if event == "pre_llm_call" else 1)
    assert len(ran) == (1 if event == "post_tool_use" else 0)
    (decided,) = decisions(outcome.trace)
    assert decided[:3] == (kind.__name__, f"on_event({event})", "stop")
    assert decided[3] == "enough"


def decisions(trace):
    """Return hook, method, decision and reason of every decision in the file; each tells how long it took."""
    told = [e.attributes for node in trace.spans for e in node.events if e.name == semconv.EVENT_HOOK]
    assert all(t[semconv.HOOK_DURATION] >= 0 for t in told)
    keys = (semconv.HOOK_NAME, semconv.HOOK_METHOD, semconv.HOOK_DECISION, semconv.HOOK_REASON)
    return [tuple(t.get(key, "") for key in keys) for t in told]


EVENT_ANSWERS = {
    "denied": (
        {"pre_tool_use": lambda p: HookDecision(permission="deny", block="no") if p.tool_call.tool == "add" else None},
        ("on_event(pre_tool_use)", "block+permission", "no"),
        "Permission denied for tool 'add': no",
    ),
    "other arguments": (
        {"pre_tool_use": lambda p: HookDecision(updated_args={"a": 5, "b": 5}) if p.tool_call.tool == "add" else None},
        ("on_event(pre_tool_use)", "updated_args", ""),
        10,
    ),
    "known already": (
        {"pre_tool_use": lambda p: HookDecision(updated_result=RESULT) if p.tool_call.tool == "add" else None},
        ("on_event(pre_tool_use)", "updated_result", ""),
        "from the hook",
    ),
    "rewritten": (
        {"post_tool_use": lambda p: HookDecision(updated_result=RESULT) if p.tool_call.tool == "add" else None},
        ("on_event(post_tool_use)", "updated_result", ""),
        "from the hook",
    ),
}
RESULT = ToolResult("add", "", "from the hook")


@DIARIES
@pytest.mark.parametrize("name", EVENT_ANSWERS)
def test_what_an_event_decides_counts_and_is_seen(kind, name):
    answers, decided, data = EVENT_ANSWERS[name]
    outcome = both(lambda is_async: settings_of(is_async, [ADD, DONE], hooks=[kind(**answers)]))
    result = outcome.steps[0].tool_result
    assert (result.error or result.data) == data
    assert decisions(outcome.trace) == [(kind.__name__, *decided)]


@DIARIES
def test_a_compaction_that_an_event_refuses(kind):
    asked = hook(should_compact=lambda state, *rest: len(state.steps) == 1)
    outcome = both(
        lambda is_async: settings_of(
            is_async, [ADD, DONE], hooks=[asked, kind(pre_compact=HookDecision(block="not now"))]
        )
    )
    (span,) = outcome.trace.find(semconv.COMPACT)
    assert span.attributes[semconv.COMPACT_COMPACTED] is False
    assert decisions(outcome.trace) == [
        ("Hook", "should_compact", "compact", ""),
        (kind.__name__, "on_event(pre_compact)", "block", "not now"),
    ]


@DIARIES
@pytest.mark.parametrize("event", [event for event in LifecycleEvent if not event.startswith("subagent")])
def test_an_event_that_raises(kind, event):
    """It ends the run, but for the progress of a tool, where a hook only watches."""

    def raises(payload):
        raise OSError("broken")

    def make(is_async):
        compact = hook(should_compact=lambda state, *rest: True)
        return settings_of(is_async, [[("report", {}), ("boom", {})], DONE], hooks=[compact, kind(**{event: raises})])

    outcome = both(make)
    if event == LifecycleEvent.TOOL_PROGRESS:
        assert (outcome.stop_reason, outcome.raised) == ("done", None)
    else:
        assert (outcome.stop_reason, outcome.raised) == ("error", "OSError")


@DIARIES
@pytest.mark.parametrize("event", [event for event in LifecycleEvent if not event.startswith("subagent")])
def test_a_decision_that_has_no_meaning_is_never_ignored(kind, event, caplog):
    drops.clear()

    def make(is_async):
        compact = hook(should_compact=lambda state, *rest: True)
        answers = kind(**{event: HookDecision(compact=True)})
        return settings_of(is_async, [[("report", {}), ("boom", {})], DONE], hooks=[compact, answers])

    outcome = both(make)
    if event == LifecycleEvent.TOOL_PROGRESS:
        assert sum(drops.values()) == 2
        assert "on_event(tool_progress) returned a HookDecision with compact" in caplog.text
    else:
        assert outcome.raised == "ConfigError"


@BOTH
def test_a_decision_is_told_once_and_to_others_only_about_it(is_async):
    """What hears of decisions may not decide; it is not told of itself."""
    one, other = Diary(pre_llm_call=HookDecision(additional_context="x")), Diary()
    go((async_composable_loop if is_async else composable_loop)(**settings_of(is_async, [DONE], hooks=[one, other])))
    for diary in (one, other):
        (told,) = [payload for payload in diary.heard if payload.event == "hook_decision"]
        assert (told.hook_slot, told.hook_name) == ("on_event(pre_llm_call)", "Diary")
        assert told.extra["decision"].additional_context == "x"


@BOTH
def test_progress_of_tools_at_the_same_time_reaches_hooks_in_their_threads(is_async):
    threads, late = set(), []

    @tool(concurrent_safe=True)
    def work(ctx: ToolContext) -> None:
        """Report."""
        meet.wait(PATIENCE_S)
        ctx.report_progress("at work")

    class Watcher:
        def on_event(self, payload):
            if payload.event == "tool_progress":
                threads.add(threading.get_ident())
                return self.later()
            return None

        async def later(self):
            await asyncio.sleep(0)
            late.append("awaited")

    meet = threading.Barrier(2)
    loop, backend = (async_composable_loop, AsyncScriptedBackend) if is_async else (composable_loop, ScriptedBackend)
    go(loop(backend([[("work", {})] * 2, DONE]), {}, tools_from([work], include_done=True), hooks=[Watcher()]))
    assert threading.get_ident() not in threads
    assert (len(threads), late) == (2, ["awaited"] * 2)


def test_progress_of_a_call_that_nobody_waits_for_is_told_to_nobody():
    said, go_on = [], threading.Event()

    @tool(timeout_s=0.005)
    def work(ctx: ToolContext) -> None:
        """Report too late."""
        go_on.wait(PATIENCE_S)
        ctx.report_progress("late")
        said.append("reported")

    diary = Diary()
    settings = settings_of(False, [("work", {}), DONE], hooks=[diary])
    list(composable_loop(**settings | {"tools": tools_from([work], include_done=True)}))
    go_on.set()
    soon(lambda: said == ["reported"])
    assert "tool_progress" not in diary.events


# --- replies that are cut ---------------------------------------------------------------------------------------------


def cut(text, **facts):
    return Reply(text, finish_reason="length", usage=Usage(10, 5), **facts)


CALL = '{"tool": "add", "args": {"a": 1, "b": 2}}'
LAST = '{"tool": "done", "args": {"answer": "3"}}'
ENDLESS = PolicyBackend(lambda messages: cut("and so on "))


class AsyncEndless(PolicyBackend):
    def __init__(self):
        super().__init__(ENDLESS.policy)

    async def chat(self, messages, **settings):
        return super().chat(messages)

    async def stream(self, messages, **settings):
        for item in super().stream(messages):
            yield item


@pytest.mark.parametrize("native", [True, False], ids=["native", "text"])
@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("redact", [None, lambda text: text.replace("secret", "[gone]")], ids=["plain", "redacted"])
def test_a_reply_that_never_ends_is_given_up(native, streams, redact):
    events = []

    def make(is_async):
        config = LoopConfig(use_native_tools=native, redact=redact, parse_recovery=1, max_turn_continuations=3)
        settings = settings_of(is_async, [], config=config, max_steps=2)
        settings["llm"] = AsyncEndless() if is_async else ENDLESS
        return settings | ({"stream": events.append} if streams else {})

    outcome = both(make)
    assert outcome.stop_reason == "budget_exhausted"
    assert [step.tool_call.tool for step in outcome.steps] == ["__parse_error__"] * 2
    assert len(outcome.trace.find("chat*")) == 2 * 2 * 4  # two steps of two tries, each continued three times
    assert books(outcome.trace) == (160, 160)


@pytest.mark.parametrize("native", [True, False], ids=["native", "text"])
@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("at", range(1, len(CALL)))
def test_a_call_in_a_text_that_is_cut_anywhere(native, streams, at):
    replies = [cut(CALL[:at]), Reply(CALL[at:], finish_reason="stop", usage=Usage(10, 5)), LAST]

    def make(is_async):
        settings = settings_of(is_async, replies, config=LoopConfig(use_native_tools=native))
        return settings | ({"stream": lambda event: None} if streams else {})

    outcome = both(make)
    assert [step.tool_result.data for step in outcome.steps][:1] == [3]
    assert outcome.stop_reason == "done"
    assert outcome.steps[0].usage == Usage(20, 10)


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
def test_a_native_call_that_is_cut_is_made_again(streams):
    broken = ToolCall("add", {"_raw_arguments": '{"a": 1, "b'})
    replies = [cut("", tool_calls=(broken,))] * 2 + [ADD, DONE]

    def make(is_async):
        settings = settings_of(is_async, replies)
        return settings | ({"stream": lambda event: None} if streams else {})

    outcome = both(make)
    assert [step.tool_call.tool for step in outcome.steps] == ["add", "done"]
    events = [e.name for node in outcome.trace.spans for e in node.events]
    assert (events.count(semconv.EVENT_PARSE_FAILURE), events.count(semconv.EVENT_CONTINUATION)) == (2, 0)


def test_a_secret_that_is_cut_in_two_is_not_put_together_on_disk(tmp_path):
    replies = [cut('{"tool": "add", "args": {"a": 1, "b": 2}, "reasoning": "sec'), 'ret"}', LAST]
    config = LoopConfig(redact=lambda text: text.replace("secret", "[gone]"))
    list(composable_loop(**settings_of(False, replies, config=config, hooks=[ProvenanceSink(tmp_path)])))
    assert "secret" not in (tmp_path / "trace.jsonl").read_text()


# --- requests that are too long ---------------------------------------------------------------------------------------


class Windowed:
    """A backend with a window, in characters, that answers with the replies of a script."""

    model = "windowed"

    def __init__(self, replies, chars):
        self.replies, self.chars, self.requests = list(replies), chars, []

    def chat(self, messages, **settings):
        self.requests.append([message.text or str(message.parts) for message in messages])
        if sum(map(len, self.requests[-1])) > self.chars:
            raise ContextOverflow("too long", status=400)
        return to_reply(self.replies.pop(0))


class AsyncWindowed(Windowed):
    async def chat(self, messages, **settings):
        return super().chat(messages)


@tool
def read(number: int) -> str:
    """Read a long text."""
    return f"text {number} " + "x" * 3_000


READ = [("read", {"number": n}) for n in range(3)]


def overflowing(is_async, replies, *, made=None, chars=8_000, **settings):
    llm = (AsyncWindowed if is_async else Windowed)(replies, chars)
    if made is not None:
        made.append(llm)
    return {"llm": llm, "task": {"goal": "g"}, "tools": tools_from([read, add], include_done=True), **settings}


def test_what_hooks_said_is_in_the_request_that_was_made_shorter():
    """Whoever says a thing once has said it in the request that was refused; it is not lost with that."""
    made = []

    class Once:
        def __init__(self):
            self.notes = ["said once"]

        def pre_prompt(self, state, log, ctx, step):
            return self.notes.pop() if step == 4 and self.notes else f"step {step}"

        def post_dispatch(self, state, log, call, result, step):
            return f"seen {step}"

    outcome = both(lambda is_async: overflowing(is_async, [*READ, DONE], made=made, hooks=[Once()]))
    assert outcome.stop_reason == "done"
    for llm in made:
        refused, shorter = llm.requests[3:5]
        assert [len(r) for r in llm.requests[:3]] == [2, 4, 6]
        assert refused[-1] == "seen 3\n\nsaid once"
        assert shorter[-1] == "seen 3\n\nsaid once\n\nstep 4"


def test_a_hook_that_rewrites_rewrites_the_shorter_request_too(tmp_path):
    made = []

    class Scrub:
        def pre_prompt(self, state, log, ctx, step):
            return ctx.replace("secret", "[gone]")

        def post_dispatch(self, state, log, call, result, step):
            return f"secret {step}"

    for is_async in (False, True):
        loop = async_composable_loop if is_async else composable_loop
        run = loop(**overflowing(is_async, [*READ, DONE], made=made, hooks=[Scrub(), ProvenanceSink(tmp_path)]))
        go(run)
        assert run.stop_reason == "done"
        assert "secret" not in (tmp_path / "trace.jsonl").read_text()
    for llm in made:
        assert llm.requests[4][-1] == "[gone] 3"
        assert not any("secret" in text for request in llm.requests for text in request)


@pytest.mark.parametrize("method", ["pre_prompt", "on_event"])
def test_a_hook_that_stops_the_run_before_the_shorter_request(method):
    asked = []

    def stop(*args):
        if method == "on_event" and args[0].event != "pre_llm_call":
            return None
        asked.append(args)
        return HookDecision(stop="too much") if len(asked) == 5 else None

    def make(is_async):
        asked.clear()
        return overflowing(is_async, [*READ, DONE], hooks=[hook(**{method: stop})])

    outcome = both(make)
    assert outcome.stop_reason == "too much"
    assert len(outcome.steps) == 3
    assert len(outcome.trace.find("chat*")) == 4


def test_a_shorter_request_whose_answer_is_cut_is_continued_with_the_shorter_one():
    made = []
    replies = [*READ, cut(LAST[:20]), LAST[20:]]
    outcome = both(lambda is_async: overflowing(is_async, replies, made=made))
    assert outcome.stop_reason == "done"
    assert [len(llm.requests) for llm in made] == [6, 6]


def test_an_answer_that_cannot_be_continued_is_left_and_the_next_turn_is_shorter():
    made = []
    replies = [*READ[:2], cut("{" + "y" * 2_000), ADD, DONE]
    outcome = both(lambda is_async: overflowing(is_async, replies, made=made))
    assert outcome.stop_reason == "done"
    assert [step.tool_call.tool for step in outcome.steps] == ["read", "read", "add", "done"]


def test_a_request_that_stays_too_long_is_tried_twice_and_no_more():
    made = []
    outcome = both(lambda is_async: overflowing(is_async, [*READ, DONE], made=made, chars=1_500))
    assert outcome.stop_reason == "llm_error"
    assert [len(llm.requests) for llm in made] == [3, 3]


# --- budgets ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("limit", ["tokens", "usd", "seconds", "steps", "model_calls", "tool_calls"])
def test_a_budget_of_nothing(place, is_async, limit):
    run = place.run(is_async, hooks=[BudgetCap(**{limit: 0})])
    assert (go(run), run.stop_reason) == ([], "budget_exhausted")
    root = place.whole("budget_exhausted").roots[0]
    assert root.attributes[semconv.BUDGET_EXHAUSTED] == limit


@BOTH
@pytest.mark.parametrize("where", ["summary", "service raises"])
def test_a_budget_that_ends_during_compaction(place, is_async, where):
    """The call that nobody may make any more is no error of the model: the run ends with its budget."""
    asked = []

    class Service:
        def compact(self, *, llm, **rest):
            asked.append(1)
            llm.generate("summarise")
            if where == "service raises":
                llm.generate("once more")

    class AsyncService:
        async def compact(self, *, llm, **rest):
            asked.append(1)
            await llm.generate("summarise")
            if where == "service raises":
                await llm.generate("once more")

    replies = [ADD, Reply("a summary", usage=Usage(100, 0)), ADD, DONE]
    hooks = [hook(should_compact=lambda state, *rest: len(state.steps) == 1), BudgetCap(model_calls=2)]
    config = LoopConfig(compact_service=AsyncService() if is_async else Service())
    run = place.run(is_async, replies, hooks=hooks, config=config)
    assert len(go(run)) == 1
    assert (run.stop_reason, asked) == ("budget_exhausted", [1])
    trace = place.whole("budget_exhausted")
    assert books(trace) == (110, 110)
    assert trace.roots[0].attributes[semconv.BUDGET_EXHAUSTED] == "model_calls"


def test_seconds_of_a_clock_that_stands_still_or_leaps(place):
    at = [0.0]
    for now, reason in ((0.0, "done"), (100.0, "budget_exhausted")):
        run = composable_loop(
            ScriptedBackend([ADD, DONE]), {}, tools_from([add], include_done=True), hooks=[BudgetCap(seconds=5)]
        )
        run._scope.guard._clock = lambda: at[0]
        at[0] = 0.0
        next(run)
        at[0] = now
        list(run)
        assert run.stop_reason == reason


# --- what else was found ----------------------------------------------------------------------------------------------


@BOTH
def test_a_stream_whose_close_fails_has_still_been_answered(place, is_async):
    class Items:
        def __init__(self):
            self.items = iter([Delta("text", "x"), Reply(tool_calls=(ToolCall("done", {"answer": "x"}),), usage=USED)])

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.items)

        def close(self):
            raise OSError("reset by peer")

    class Backend:
        model = "streams"

        def chat(self, messages, **settings):
            raise AssertionError

        def stream(self, messages, **settings):
            return Items()

    run = place.run(is_async, llm=Backend(), stream=lambda event: None)
    (step,) = go(run)
    assert (run.stop_reason, step.usage) == ("done", USED)
    assert books(place.whole("done")) == (10, 10)


USED = Usage(10, 5)


def test_a_run_that_is_closed_in_another_loop_asks_its_model_there(place):
    class Goodbye:
        async def on_loop_end(self, state, log, context, llm):
            said.append(await llm.generate("bye?"))

    class Wrong:
        def on_loop_end(self, state, log, context, llm):
            llm.generate("bye?")

    for hooks, words in ((Goodbye(), None), (Wrong(), "make it `async def`")):
        said = []
        run = async_composable_loop(
            AsyncScriptedBackend([ADD, "bye"]), {}, tools_from([add], include_done=True), hooks=[hooks]
        )

        async def one(run=run):
            return await anext(run)

        asyncio.run(one())
        if words is None:
            asyncio.run(run.aclose())
            assert said == ["bye"]
        else:
            with pytest.raises(ConfigError, match=words):
                asyncio.run(run.aclose())


@BOTH
@pytest.mark.parametrize("kind", ["call", "thread"])
def test_a_model_is_not_asked_after_the_run(place, is_async, kind):
    kept = []

    @tool
    def keep(ctx: ToolContext) -> str:
        """Keep the model for later."""
        kept.append(ctx.llm)
        return "kept"

    run = place.run(is_async, [("keep", {}), DONE, "late"], tools=[keep])
    go(run)
    with pytest.raises(ToolError, match="the run has ended"):
        kept[0].generate("still there?")
    assert len(place.whole("done").find("chat*")) == 2


@BOTH
def test_a_call_that_was_given_up_asks_its_model_no_more(place, is_async):
    """While the run goes on: what nobody waits for may not spend its money."""
    raised, go_on = [], threading.Event()

    @tool(timeout_s=0.005)
    def late(ctx: ToolContext) -> None:
        """Ask too late."""
        go_on.wait(PATIENCE_S)
        try:
            ctx.llm.generate("sub")
        except ToolError as error:
            raised.append(str(error.kind))
            raise

    @tool
    def release() -> None:
        """Let the other one go on, and wait for its end."""
        go_on.set()
        soon(lambda: raised)

    run = place.run(is_async, [("late", {}), ("release", {}), DONE], tools=[late, release])
    go(run)
    assert (raised, run.stop_reason) == (["cancelled"], "done")
    place.whole("done")


@BOTH
def test_a_retry_wait_of_a_call_that_was_given_up_ends(place, is_async):
    """The tool's thread does not wait a minute for an answer that nobody wants."""
    raised = []
    busy = BackendError("busy", retryable=True)

    @tool(timeout_s=0.02)
    def ask(ctx: ToolContext) -> None:
        """Ask a busy model."""
        try:
            ctx.llm.generate("sub")
        except BaseException as error:
            raised.append(type(error).__name__)
            raise

    backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("ask", {}), busy, DONE])
    run = place.run(is_async, llm=ResilientBackend(backend, base_delay_s=60, max_delay_s=60), tools=[ask])
    go(run)
    soon(lambda: raised == ["ToolError"])
    assert run.stop_reason == "done"


def test_a_human_who_is_to_be_awaited_cannot_be_asked_by_a_plain_tool(place):
    async def handler(prompt, options):
        return "approve"

    @tool
    def plain(ctx: ToolContext) -> str | None:
        """Ask."""
        return ctx.approve("Go?")

    @tool
    async def awaiting(ctx: ToolContext) -> str | None:
        """Ask and await."""
        return await ctx.approve("Go?")

    for is_async in (False, True):
        run = place.run(
            is_async,
            [("plain", {}), ("awaiting", {}), DONE],
            tools=[plain, awaiting],
            config=LoopConfig(approval_handler=handler),
        )
        first, second, _ = go(run)
        assert "async def" in first.tool_result.error
        assert second.tool_result.data == "approve"
        gc.collect()


# --- a token ends the wait for a model --------------------------------------------------------------------------------


class Silent:
    """A backend whose answer to the second request, or to a sub-agent, does not come before it is let go."""

    model = "silent"

    def __init__(self, first):
        self.first = first
        self.begun, self.release = threading.Event(), threading.Event()
        self.log, self.threads = [], []

    def scripted(self, messages):
        self.threads.append(threading.get_ident())
        if not self.first:
            return None
        return to_reply(self.first.pop(0))

    def chat(self, messages, **settings):
        if (reply := self.scripted(messages)) is not None:
            return reply
        self.begun.set()
        self.release.wait(PATIENCE_S)
        self.log.append("came back")
        return to_reply(DONE)

    def stream(self, messages, **settings):
        yield Delta("text", "x")
        yield self.chat(messages)


class AsyncSilent(Silent):
    async def chat(self, messages, **settings):
        if (reply := self.scripted(messages)) is not None:
            return reply
        self.begun.set()
        try:
            await asyncio.wait_for(asyncio.Event().wait(), PATIENCE_S)
        except asyncio.CancelledError:
            self.log.append("told")
            raise
        return to_reply(DONE)

    async def stream(self, messages, **settings):
        yield Delta("text", "x")
        yield await self.chat(messages)


@tool
def ask(ctx: ToolContext) -> str:
    """Ask the model."""
    return ctx.llm.generate("sub")


@tool(name="ask")
async def ask_async(ctx: ToolContext) -> str:
    """Ask the model."""
    return await ctx.llm.generate("sub")


def delegating(backend, is_async):
    """Return a tool that runs an agent with the backend."""

    def delegate() -> str:
        """Run an agent."""
        return run_sub_loop(backend, {"t": 1}, tools_from([add]))["stop_reason"]

    async def delegate_async() -> str:
        """Run an agent."""
        return (await async_run_sub_loop(backend, {"t": 1}, tools_from([add])))["stop_reason"]

    return tool(name="ask")(delegate_async if is_async else delegate)


ASK = ("ask", {})
SILENT = ["agent", "resilient", "stream", "resilient stream", "ctx.llm", "sub-agent", "summary"]


def silent(where, awaits):
    """Return the backend that is silent there, and the arguments of the run."""
    first = {"ctx.llm": [ASK], "sub-agent": [ADD]}.get(where, [ADD])
    backend = (AsyncSilent if awaits else Silent)(first)
    settings: dict[str, Any] = {"llm": backend}
    if where.startswith("resilient"):
        settings["llm"] = ResilientBackend(backend, timeout_s=60)
    if where.endswith("stream"):
        settings["stream"] = lambda event: None
    if where == "ctx.llm":
        settings["tools"] = [ask_async if awaits else ask]
    if where == "sub-agent":
        settings["llm"] = (AsyncScriptedBackend if awaits else ScriptedBackend)([ASK])
        settings["tools"] = [delegating(backend, awaits)]
    if where == "summary":
        settings["hooks"] = [hook(should_compact=lambda state, log, talk, step: step == 2)]
        settings["config"] = LoopConfig(compact_service=SummarizeCompact(keep_recent=1))
    return backend, settings


KINDS = pytest.mark.parametrize(
    ("is_async", "awaits"), [(False, False), (True, False), (True, True)], ids=["sync", "async, sync backend", "async"]
)


@KINDS
@pytest.mark.parametrize("where", SILENT)
@pytest.mark.parametrize("who", ["another thread", "a signal handler"])
def test_a_token_ends_the_wait_for_a_model(place, where, who, is_async, awaits):
    """The call is left to itself as a tool past its time-out is; the run ends in order."""
    token = CancelToken()
    backend, settings = silent(where, awaits)
    settings["config"] = replace(settings.get("config", LoopConfig()), cancel_token=token)
    router = settings["llm"] = BackendRouter(settings["llm"])
    run = place.run(is_async, **settings)

    def cancel():
        assert backend.begun.wait(PATIENCE_S)
        if who == "another thread":
            token.cancel("enough")
            token.cancel("once more")
        while not token.is_cancelled:  # one signal may come right before asyncio goes to sleep, and not wake it
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            backend.release.wait(0.01)

    before = signal.signal(signal.SIGUSR1, lambda *rest: token.cancel("signal"))
    canceller = threading.Thread(target=cancel)
    canceller.start()
    try:
        go(run)
        assert "came back" not in backend.log
    finally:
        signal.signal(signal.SIGUSR1, before)
        backend.release.set()
        canceller.join()
    assert run.stop_reason == "cancelled"
    trace = place.whole("cancelled")
    assert trace.find("chat*")[-1].attributes[semconv.ERROR_TYPE] == "cancelled"
    spans, total = books(trace)
    assert spans == total
    assert total == router.total_input_tokens or where == "sub-agent"  # whose backend is another one
    soon(lambda: backend.log == (["told"] if awaits else ["came back"]))
    assert token._callbacks == {}


IN_PLAIN_TOOLS = [("ctx.llm", False), ("sub-agent", False)]


@pytest.mark.parametrize(
    ("where", "awaits"),
    [case for where in SILENT for case in ((where, False), (where, True)) if case not in IN_PLAIN_TOOLS],
)
def test_aclose_does_not_wait_for_a_model(place, where, awaits):
    """But for a plain tool, which cannot be stopped, and waits in it."""
    backend, settings = silent(where, awaits)
    run = place.run(True, **settings)
    cancelling = []

    async def main():
        task = asyncio.ensure_future(steps_of(run))
        while not backend.begun.is_set():
            await asyncio.sleep(0.001)
        await run.aclose("going home")
        await run.aclose("said twice")
        await task
        cancelling.append(task.cancelling())

    try:
        asyncio.run(main(), debug=True)
        assert "came back" not in backend.log
    finally:
        backend.release.set()
    assert (run.stop_reason, cancelling) == ("going home", [0])
    place.whole("going home")


def test_a_task_that_is_cancelled_with_its_token_is_cancelled(place):
    """Who cancels the task himself gets his CancelledError, whatever the token says."""
    token = CancelToken()
    backend, settings = silent("agent", True)
    run = place.run(True, config=LoopConfig(cancel_token=token), **settings)

    async def main():
        task = asyncio.ensure_future(steps_of(run))
        while not backend.begun.is_set():
            await asyncio.sleep(0.001)
        token.cancel()
        task.cancel()
        return await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    place.whole("cancelled")


def test_a_time_out_of_the_backend_is_none_of_the_token(place):
    class Slow:
        async def chat(self, messages, **settings):
            raise TimeoutError("mine")

    run = place.run(True, llm=Slow(), config=LoopConfig(cancel_token=CancelToken()))
    (step,) = go(run)
    assert (run.stop_reason, "mine" in step.tool_result.error) == ("llm_error", True)


@pytest.mark.parametrize("given", [False, True], ids=["without a token", "with a token"])
def test_a_backend_is_called_in_the_thread_of_the_caller_unless_somebody_may_cancel(given):
    main, other = Silent([ADD, ASK, DONE]), Silent([ADD, DONE])
    tools = tools_from([add, delegating(other, False)], include_done=True)
    config = LoopConfig(cancel_token=CancelToken() if given else None)
    assert len(list(composable_loop(main, {}, tools, config=config))) == 3
    here = [thread == threading.get_ident() for thread in main.threads + other.threads]
    assert here == [not given] * 5


def test_the_first_reason_to_close_counts(place):
    backend, settings = silent("agent", False)
    run = place.run(False, config=LoopConfig(cancel_token=CancelToken()), **settings)

    def close():
        assert backend.begun.wait(PATIENCE_S)
        run.close("first")
        run.close("second")

    closer = threading.Thread(target=close)
    closer.start()
    list(run)
    closer.join()
    backend.release.set()
    assert run.stop_reason == "first"
    place.whole("first")


# --- what tools raise and return --------------------------------------------------------------------------------------


def raising(error, how):
    """Return a tool that raises."""

    def plain() -> None:
        """Raise."""
        raise error

    async def awaiting() -> None:
        """Raise later."""
        await asyncio.sleep(0)
        raise error

    async def of_a_task() -> None:
        """Await a task of its own that raises."""

        async def work():
            await asyncio.sleep(0)
            raise error

        await asyncio.ensure_future(work())

    async def of_a_future() -> None:
        """Await something that somebody has cancelled."""
        future = asyncio.get_running_loop().create_future()
        future.cancel("by somebody")
        await future

    function = {"plain": plain, "async": awaiting, "task": of_a_task, "future": of_a_future}[how.split(", ")[0]]
    settings = {"timed": {"timeout_s": 30.0}, "parallel": {"concurrent_safe": True}}.get(how.split(", ")[-1], {})
    return tool(name="raise", **settings)(function)


ERRORS = [
    (StopIteration("x"), "StopIteration: x", "plain"),
    (StopAsyncIteration("x"), "StopAsyncIteration: x", "plain async task"),
    (GeneratorExit("x"), "GeneratorExit: x", "plain async"),
    (asyncio.CancelledError("x"), "CancelledError: x", "plain async task"),
    (asyncio.CancelledError("by somebody"), "CancelledError: by somebody", "future"),
    (SystemExit("x"), "SystemExit: x", "plain async"),
]


@pytest.mark.parametrize(
    ("error", "words", "how"),
    [
        pytest.param(error, words, f"{how}, {lane}", id=f"{words}-{how}-{lane}")
        for error, words, hows in ERRORS
        for how in hows.split()
        for lane in ("alone", "timed", "parallel")
    ],
)
def test_what_a_tool_raises_by_itself_is_an_observation(error, words, how):
    """Also what ends generators and coroutines, and a CancelledError of somebody else's task."""
    calls = [("raise", {})] * (2 if "parallel" in how else 1)

    def make(is_async):
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([calls, ADD, DONE])
        return {"llm": backend, "task": {}, "tools": tools_from([raising(error, how), add], include_done=True)}

    outcome = both(make)
    assert outcome.stop_reason == "done"
    assert [step.tool_result.error for step in outcome.steps] == [*[words] * len(calls), None, None]


@pytest.mark.parametrize("error", [StopIteration("x"), GeneratorExit("x")], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["backend", "hook", "goodbye"])
def test_what_ends_generators_ends_no_run_in_silence(error, where):
    said = []

    def fail(*args, **kwargs):
        raise error

    class Backend:
        def __init__(self):
            self.chat = fail

    def make(is_async):
        said.clear()
        bad = {"hook": {"pre_prompt": fail}, "goodbye": {"on_loop_end": fail}}.get(where, {})
        hooks = [*([hook(**bad)] if bad else []), hook(on_loop_end=lambda *args: said.append("bye"))]
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([DONE])
        llm = Backend() if where == "backend" else backend
        return {"llm": llm, "task": {}, "tools": tools_from([add], include_done=True), "hooks": hooks}

    outcome = both(make)
    assert said == ["bye"]
    if where == "backend":
        assert (outcome.stop_reason, outcome.raised) == ("llm_error", None)
        assert repr(error) in outcome.steps[0].tool_result.error
    else:
        assert (outcome.stop_reason, outcome.raised) == ("error", "Escaped")


def numbers():
    """Yield."""
    yield 1


async def async_numbers():
    """Yield."""
    yield 1


async def unawaited():
    """Return a coroutine."""
    return numbers_later()


async def numbers_later():
    return [1]


@pytest.mark.parametrize(
    ("function", "kind"), [(numbers, "a generator"), (async_numbers, "an async generator"), (unawaited, "a coroutine")]
)
@pytest.mark.parametrize("settings", [{}, {"timeout_s": 30.0}, {"concurrent_safe": True}])
def test_a_tool_that_has_not_begun_has_failed(function, kind, settings):
    def make(is_async):
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([[("lazy", {})] * 2, DONE])
        return {
            "llm": backend,
            "task": {},
            "tools": tools_from([tool(name="lazy", **settings)(function)], include_done=True),
        }

    outcome = both(make)
    assert outcome.stop_reason == "done"
    for step in outcome.steps[:2]:
        assert f"lazy returned {kind} and has done nothing" in step.tool_result.error
    gc.collect()


def test_a_signal_handler_that_exits_means_the_process_and_not_the_tool(place):
    """`signal.signal(SIGTERM, lambda *_: sys.exit())`, and a plain tool at work."""

    @tool
    def work() -> str:
        """Be interrupted by a signal."""
        signal.raise_signal(signal.SIGUSR1)
        return "went on"

    before = signal.signal(signal.SIGUSR1, lambda *rest: sys.exit("terminated"))
    run = place.run(False, [("work", {}), DONE], tools=[work])
    try:
        with pytest.raises(SystemExit, match="terminated"):
            list(run)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert run.stop_reason == "cancelled"
    place.whole("cancelled")


# --- threads, loops and locks that are left at a bad moment -----------------------------------------------------------


def test_a_private_loop_that_is_closed_before_it_has_begun_ends_what_was_asked_of_it(monkeypatch):
    may_begin = threading.Event()
    serve = PrivateLoop._serve

    def serve_later(self):
        may_begin.wait(PATIENCE_S)
        serve(self)

    async def work():
        await asyncio.Event().wait()

    monkeypatch.setattr(PrivateLoop, "_serve", serve_later)
    loop = PrivateLoop()
    job, _ = loop.begin(work(), copy_context())
    loop.close()
    may_begin.set()
    job.wait_done(PATIENCE_S)
    with pytest.raises(asyncio.CancelledError):
        job.outcome()


@pytest.mark.parametrize("settings", [{}, {"timeout_s": 30.0}])
def test_a_parallel_call_that_comes_back_after_a_ctrl_c_starts_nothing(settings):
    """What it returns is to be awaited, and there is nobody to do it: no event loop, no thread is left behind."""
    begun, release, ran = threading.Barrier(3), threading.Event(), []

    @tool(concurrent_safe=True, **settings)
    def late() -> Any:
        """Return a coroutine, late."""
        begun.wait(PATIENCE_S)
        release.wait(PATIENCE_S)

        async def work():
            ran.append("ran")

        return work()

    def interrupt(send):
        begun.wait(PATIENCE_S)
        send()

    run = composable_loop(ScriptedBackend([[("late", {})] * 2]), {}, tools_from([late], include_done=True))
    with signals_to_main() as send:
        interrupter = threading.Thread(target=interrupt, args=[send])
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            list(run)
        interrupter.join()
    release.set()
    soon(lambda: sum(thread.name == "looplet-worker" for thread in threading.enumerate()) <= len(_idle))
    assert ran == []


def test_a_stream_is_not_silent_after_a_ctrl_c_anywhere_in_it():
    """An interrupt comes after a call, a jump back, or at the beginning of a function."""
    files = {Stream.emit.__code__.co_filename}
    moments = 0

    def emit_interrupted(at):
        nonlocal moments
        moments, said, last = 0, [], {}
        stream = Stream([lambda event: said.append(event.run_id)])

        def trace_line(frame, event, arg):
            nonlocal moments
            frame.f_trace_opcodes = True
            if event == "opcode":
                done = last.get(frame)
                last[frame] = frame.f_lasti
                name = "RESUME" if done is None else dis.opname[frame.f_code.co_code[done]]
                if name.startswith(("CALL", "JUMP_BACKWARD", "RESUME")):
                    moments += 1
                    if moments == at:
                        raise KeyboardInterrupt
            return trace_line

        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # before `settrace`: Python 3.12 looks for it there only
        sys.settrace(lambda frame, *rest: trace_line if frame.f_code.co_filename in files else None)
        try:
            with suppress(KeyboardInterrupt):
                stream.emit(RunStartEvent("first"))
        finally:
            sys.settrace(before)
        stream.emit(RunStartEvent("second"))
        return said

    assert emit_interrupted(0) == ["first", "second"]
    total = moments
    assert total > 5
    for at in range(1, total + 1):
        assert emit_interrupted(at)[-1] == "second", at


def test_an_emitter_that_emits_is_heard_after_what_it_heard():
    order = []

    class Echo:
        def emit(self, event):
            order.append(("echo", event.run_id))
            if event.run_id == "call":
                stream.emit(RunStartEvent("answer"))

    stream = Stream([Echo(), lambda event: order.append(("other", event.run_id))])
    stream.emit(RunStartEvent("call"))
    assert order == [("echo", "call"), ("other", "call"), ("echo", "answer"), ("other", "answer")]

"""Time-outs: the call is left at the deadline, the tool is told, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import add, both, signals_to_main

from looplet import (
    CancelToken,
    ErrorKind,
    LoopConfig,
    ToolContext,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

DONE = ("done", {"answer": "ok"})
ADD = ("add", {"a": 1, "b": 2})
PATIENCE_S = 5
"""for what must happen soon"""


def making(*replies: Any, tools: list[Any], **rest: Any) -> Callable[..., dict[str, Any]]:
    """Return a `make` for `both`."""

    def make(*, is_async: bool) -> dict[str, Any]:
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([*replies, DONE])
        return {"llm": backend, "task": {}, "tools": tools_from([add, *tools], include_done=True), **rest}

    return make


def run_of(is_async: bool, make: Callable[..., dict[str, Any]]) -> Any:
    return (async_composable_loop if is_async else composable_loop)(**make(is_async=is_async))


def steps_of(run: Any) -> list[Any]:
    async def collect():
        return [step async for step in run]

    return asyncio.run(collect()) if hasattr(run, "__anext__") else list(run)


class Told:
    """Remembers what tools were told, from whatever thread."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._more = threading.Semaphore(0)

    def hear(self, ctx: ToolContext) -> None:
        assert ctx.cancel_token.is_cancelled
        self.reasons.append(ctx.cancel_token.reason)
        self._more.release()

    def wait(self, times: int) -> list[str]:
        for _ in range(times):
            assert self._more.acquire(timeout=PATIENCE_S), f"only {self.reasons} were told"
        reasons, self.reasons = self.reasons, []
        return reasons


def stuck_tools(told: Told) -> list[Any]:
    @tool(timeout_s=0.02, concurrent_safe=True)
    def stuck(ctx, n: int = 0) -> None:
        """Work until told to stop."""
        ctx.cancel_token.wait()
        told.hear(ctx)

    @tool(timeout_s=0.02, concurrent_safe=True)
    async def astuck(ctx, n: int = 0) -> None:
        """Work until told to stop."""
        ctx.warn(f"slow {n}")  # before the deadline for sure: a thread may begin late, a coroutine does not
        ctx.cancel_token.on_cancel(lambda: told.hear(ctx))
        await asyncio.Event().wait()

    return [stuck, astuck]


@pytest.mark.parametrize("name", ["stuck", "astuck"])
def test_a_call_ends_at_its_deadline_and_the_tool_is_told(name):
    told = Told()
    outcome = both(making((name, {"n": 1}), ADD, tools=stuck_tools(told)))
    assert told.wait(2) == ["timeout", "timeout"]
    first, second, _ = (step.tool_result for step in outcome.steps)
    assert (first.error_kind, first.error_retriable) == (ErrorKind.TIMEOUT, True)
    assert first.error == "TimeoutError: no answer within 0.02 s; the call was abandoned"
    assert first.warnings == (("slow 1",) if name == "astuck" else ())
    assert second.data == 3
    (span,) = outcome.trace.find(f"execute_tool {name}")
    assert span.attributes[semconv.ERROR_TYPE] == "timeout"
    assert span.attributes[semconv.TOOL_ABANDONED] is True


@pytest.mark.parametrize("name", ["stuck", "astuck"])
def test_eight_stuck_tools_come_back_once_they_are_told(name):
    told = Told()
    calls = [(name, {"n": n}) for n in range(8)]
    outcome = both(making(calls, ADD, tools=stuck_tools(told)))
    assert told.wait(16) == ["timeout"] * 16
    assert [step.tool_result.error_kind for step in outcome.steps[:8]] == [ErrorKind.TIMEOUT] * 8
    assert [step.tool_result.data for step in outcome.steps[8:]] == [3, {"status": "completed", "answer": "ok"}]


@pytest.mark.parametrize("is_async", [False, True])
def test_eight_tools_that_do_not_listen_starve_nobody(is_async):
    release, back = threading.Event(), threading.Semaphore(0)

    @tool(timeout_s=0.02, concurrent_safe=True)
    def deaf(n: int) -> None:
        """Work on, whatever one is told."""
        release.wait(PATIENCE_S)
        back.release()

    @tool(timeout_s=PATIENCE_S, concurrent_safe=True)
    def quick(n: int) -> int:
        """Answer at once, in a thread."""
        return n

    deaf_calls = [("deaf", {"n": n}) for n in range(8)]
    make = making(deaf_calls, [("quick", {"n": n}) for n in range(8)], tools=[deaf, quick], max_steps=40)
    try:
        steps = steps_of(run_of(is_async, make))
        assert [step.tool_result.data for step in steps[8:16]] == list(range(8))
        others = steps_of(run_of(is_async, making([("quick", {"n": n}) for n in range(8)], tools=[quick])))
        assert [step.tool_result.data for step in others[:8]] == list(range(8))
        assert not release.is_set()
    finally:
        release.set()
    for _ in range(8):
        assert back.acquire(timeout=PATIENCE_S)


def test_a_call_in_time_is_told_nothing():
    tokens = []

    @tool(timeout_s=PATIENCE_S)
    def quick(ctx) -> str:
        """Answer."""
        tokens.append(ctx.cancel_token)
        return "x"

    both(making(("quick", {}), ("quick", {}), tools=[quick]))
    assert len({id(token) for token in tokens}) == 4  # each call has its own
    assert [token.reason for token in tokens] == [""] * 4


def test_a_callback_that_fails_hurts_nobody(caplog):
    @tool(timeout_s=0.02)
    def stuck(ctx) -> None:
        """Wait with a faulty callback."""
        ctx.cancel_token.on_cancel(lambda: 1 / 0)
        ctx.cancel_token.wait()

    outcome = both(making(("stuck", {}), ADD, tools=[stuck]))
    assert [step.tool_result.error_kind for step in outcome.steps] == [ErrorKind.TIMEOUT, None, None]


def test_progress_of_an_abandoned_call_is_not_heard():
    reported = Told()

    @tool(timeout_s=0.02)
    def stuck(ctx) -> None:
        """Report when nobody waits any more."""
        ctx.report_progress("begun")
        ctx.cancel_token.wait()
        ctx.report_progress("too late")
        reported.hear(ctx)

    events: list[Any] = []
    run = composable_loop(**making(("stuck", {}), tools=[stuck])(is_async=False), stream=events.append)
    list(run)
    reported.wait(1)
    assert [event.stage for event in events if event.kind == "tool_progress"] == ["begun"]


# --- leaving the run while a tool works -----------------------------------------------------------------------------


def test_a_cancelled_task_tells_the_tools_that_run():
    told, begun = Told(), threading.Semaphore(0)

    @tool(concurrent_safe=True)
    def work(ctx) -> None:
        """Work until told to stop."""
        begun.release()
        ctx.cancel_token.wait()
        told.hear(ctx)

    async def main():
        run = run_of(True, making([("work", {})] * 3, tools=[work]))
        task = asyncio.ensure_future(anext(run))
        for _ in range(3):
            await asyncio.to_thread(begun.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return run.stop_reason

    assert asyncio.run(main()) == "cancelled"
    assert len(told.wait(3)) == 3


def test_ctrl_c_tells_the_tools_that_run():
    told, begun = Told(), threading.Semaphore(0)

    @tool(concurrent_safe=True)
    def work(ctx, last: bool = False) -> None:
        """Work until told to stop."""
        if last:
            begun.acquire()
            send()
        else:
            begun.release()
        ctx.cancel_token.wait(PATIENCE_S)
        told.hear(ctx)

    run = run_of(False, making([("work", {}), ("work", {"last": True})], tools=[work]))
    with signals_to_main() as send, pytest.raises(KeyboardInterrupt):
        list(run)
    assert len(told.wait(2)) == 2
    assert run.stop_reason == "cancelled"


def test_a_tool_sees_the_token_of_the_config():
    def make(*, is_async: bool) -> dict[str, Any]:
        token = CancelToken()

        @tool
        def work(ctx) -> bool:
            """Have somebody else cancel the run."""
            threading.Thread(target=token.cancel).start()
            return ctx.cancel_token.wait(PATIENCE_S)

        config = LoopConfig(cancel_token=token)
        return making(("work", {}), ADD, tools=[work], config=config)(is_async=is_async)

    outcome = both(make)
    assert outcome.stop_reason == "cancelled"
    assert [step.tool_result.data for step in outcome.live.steps] == [True]

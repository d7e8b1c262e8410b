"""Runs that stream, wait, compact, ask and delegate, and get real Ctrl-Cs: started by `test_core_attacks.py`.

    python attacked_runs.py FOLDER SEED COUNT    COUNT runs, an interrupt at a random moment of each; prints JSON

The interrupts come from an interval timer: between any two bytecodes, in the loop as in its caller.
"""

import asyncio
import gc
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from opentelemetry import trace

from looplet import (
    BackendRouter,
    LoopConfig,
    ProvenanceSink,
    RateLimitedBackend,
    ResilientBackend,
    ToolContext,
    Trace,
    async_composable_loop,
    composable_loop,
    run_sub_loop,
    tool,
    tools_from,
)
from looplet.errors import BackendError, TraceError
from looplet.telemetry.otlp_file import read_file
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from looplet.threads import _idle
from looplet.types import Reply, ToolCall, Usage

STEPS = 12
MAX_DELAY_S = 0.012
USED = Usage(10, 5)
DONE = Reply(tool_calls=(ToolCall("done", {"answer": "3"}),), usage=USED)


class Streams(ScriptedBackend):
    """Counts the streams that were opened, and those that were closed."""

    opened = closed = 0

    def stream(self, messages, **settings):
        Streams.opened += 1
        try:
            yield from super().stream(messages)
        finally:
            Streams.closed += 1


class AsyncStreams(AsyncScriptedBackend):
    async def stream(self, messages, **settings):
        Streams.opened += 1
        try:
            async for item in super().stream(messages):
                await asyncio.sleep(0)
                yield item
        finally:
            Streams.closed += 1


@tool(concurrent_safe=True)
def ask(ctx: ToolContext) -> str:
    """Ask the model."""
    return ctx.llm.generate("sub")


@tool
def think(ctx: ToolContext) -> str | None:
    """Ask a human."""
    return ctx.approve("Go?")


@tool(concurrent_safe=True)
def delegate() -> str:
    """Run an agent."""
    return run_sub_loop(Streams([call("think"), DONE]), {"t": 1}, tools_from([think]))["stop_reason"]


def call(*names):
    return Reply("some text " * 9, tuple(ToolCall(name, {}) for name in names), USED)


class Compact:
    def should_compact(self, state, *rest):
        return True

    def compact(self, *, llm, **rest):
        llm.generate("sub")


def make(sink, kind, steps=STEPS):
    is_async = kind.startswith("async")
    turn = {
        "tools": [call("ask", "ask"), Reply("a", usage=USED), Reply("b", usage=USED)],
        "agents": [call("delegate", "delegate")],
        "retries": [BackendError("busy", retryable=True, usage=Usage(1, 0)), call("think")],
        "summaries": [Reply("a summary", usage=USED), call("think")],
    }.get(kind.split()[-1], [call("think")])
    llm = (AsyncStreams if is_async else Streams)([*turn * steps, DONE, *[DONE] * steps])
    if kind.endswith("retries"):
        llm = ResilientBackend(llm, base_delay_s=0.0002)
    if kind.endswith("limits"):
        llm = RateLimitedBackend(llm, requests_per_minute=60 * 3_000)
        llm.limit.reserve(0)
        llm.limit._buckets["requests_per_minute"]._left = 0
    hooks = [Compact()] if kind.endswith("summaries") else []
    return (async_composable_loop if is_async else composable_loop)(
        BackendRouter(llm),
        {"goal": "g"},
        tools_from([ask, think, delegate], include_done=True),
        hooks=[*hooks, sink],
        max_steps=3 * STEPS,
        stream=(lambda event: None) if kind.endswith(("streams", "retries")) else None,
        config=LoopConfig(approval_handler=lambda prompt, options: "approve"),
    )


def iterate(kind, run):
    async def main():
        async with run:
            async for _ in run:
                pass

    if kind.startswith("async"):
        asyncio.run(main())
    else:
        with run:
            for _ in run:
                pass


WHAT = ["streams", "tools", "agents", "retries", "summaries", "limits"]
KINDS = [f"{how} {what}" for what in WHAT for how in ("sync", "async")]


def interrupt_one(sink, kind, delay, counts):
    run = make(sink, kind)
    recorder = run._scope.trace.recorder
    done = False
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        iterate(kind, run)
        done = True
        time.sleep(0.05)  # the interrupt is still to come, unless a finaliser has swallowed it
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    counts["late" if done else "interrupted"] += 1
    counts["current"] += trace.get_current_span() is not trace.INVALID_SPAN
    if not recorder.root_context.is_valid:
        return
    counts["spans left open"] += bool(recorder.open)
    del run
    gc.collect()
    settle()
    judge(sink, recorder, counts)


def settle():
    """Wait for the threads that nobody waits for any more."""
    for _ in range(200):
        if sum(thread.name == "looplet-worker" for thread in threading.enumerate()) <= len(_idle):
            return
        time.sleep(0.002)


def judge(sink, recorder, counts):
    try:
        found = Trace.load(sink.path)
        ids = [record.span_id for record in read_file(sink.path).spans]
    except TraceError as error:
        counts["not whole" if "empty" in str(error) or "no trace" in str(error) else "damaged"] += 1
        return
    counts["damaged"] += bool(found.problems) or len(ids) != len(set(ids))
    counts["not whole"] += bool(recorder.open) or len(found.roots) != 1 or any(node.synthetic for node in found.spans)
    spent = sum(chat.attributes.get("gen_ai.usage.input_tokens", 0) for chat in found.find("chat*"))
    counts["money"] += found.roots[0].attributes.get("looplet.usage.total.input_tokens", 0) != spent


def interrupt_many(folder, seed, count):
    dice, counts = random.Random(seed), Counter()
    names = ["interrupted", "late", "current", "spans left open", "not whole", "damaged", "money", "next run failed"]
    counts.update(dict.fromkeys([*names, "swallowed", "threads", "streams left open"], 0))
    sys.unraisablehook = lambda caught: counts.update({"swallowed": caught.exc_type is KeyboardInterrupt})
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    iterate("sync streams", make(ProvenanceSink(folder / "warm"), "sync streams", 1))
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        sink = ProvenanceSink(folder / str(number))
        interrupt_one(sink, kind, dice.uniform(0.00002, MAX_DELAY_S), counts)
        run = make(sink, kind, 1)
        iterate(kind, run)
        counts["next run failed"] += run.stop_reason != "done"
    gc.collect()
    counts["streams left open"] = Streams.opened - Streams.closed
    working = sum(thread.name == "looplet-worker" for thread in threading.enumerate())
    counts["threads"] = max(0, working - len(_idle))
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    interrupt_many(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

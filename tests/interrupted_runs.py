"""Runs that get real Ctrl-Cs: started by `test_leaving.py` in a process of its own.

    python interrupted_runs.py FOLDER SEED COUNT    COUNT runs, an interrupt at a random moment of each; prints JSON
    python interrupted_runs.py FOLDER KIND          one run with stuck tools, interrupted; prints its stop reason

The interrupts of the first form come from an interval timer: between any two bytecodes, in the loop as in its caller.
"""

import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from opentelemetry import trace
from support import signals_to_main

from looplet import (
    CancelToken,
    LoopConfig,
    ProvenanceSink,
    Trace,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.errors import TraceError
from looplet.telemetry.otlp_file import read_file
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

STEPS = 100
MAX_DELAY_S = 0.006
"""much shorter than STEPS steps take on any machine"""


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


@tool(concurrent_safe=True)
def look(name: str) -> str:
    """Look."""
    return name


@tool
async def wait() -> str:
    """Wait."""
    await asyncio.sleep(0)
    return "waited"


TOOLS = tools_from([add, look, wait], include_done=True)
DONE = ("done", {"answer": "3"})
CALLS = {
    "parallel": [("look", {"name": "a"}), ("look", {"name": "b"})],
    "async tools": ("wait", {}),
}


class Hook:
    """Do a little everywhere."""

    def pre_prompt(self, state, log, context, step):
        return "hint"

    def on_loop_end(self, *args):
        return None


def make(sink, kind, steps=STEPS):
    script = [CALLS.get(kind, ("add", {"a": 1, "b": 2}))] * steps + [DONE]
    is_async = kind == "async for"
    loop, backend = (async_composable_loop, AsyncScriptedBackend) if is_async else (composable_loop, ScriptedBackend)
    config = LoopConfig(cancel_token=CancelToken() if kind == "token" else None, max_steps=3 * STEPS)
    return loop(backend(script), {"goal": "g"}, TOOLS, hooks=[Hook(), sink], config=config)


def held(run):
    try:
        for _ in run:
            pass
    finally:
        run.close()


def within(run):
    with run:
        for _ in run:
            pass


def anonymous(runs):
    for _ in runs.pop():
        pass


def iterate(kind, runs):
    async def main(run):
        async with run:
            async for _ in run:
                pass

    if kind == "anonymous":
        anonymous(runs)
    elif kind == "async for":
        asyncio.run(main(runs.pop()))
    elif kind == "with":
        within(runs.pop())
    else:
        held(runs.pop())


KINDS = ["anonymous", "held", "with", "parallel", "async tools", "async for", "token"]


def interrupt_one(sink, kind, delay, counts):
    runs = [make(sink, kind)]
    recorder = runs[0]._scope.trace.recorder
    done = False
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        iterate(kind, runs)
        done = True
        time.sleep(0.05)  # the interrupt is still to come, unless a finaliser has swallowed it
    except (KeyboardInterrupt, asyncio.CancelledError):  # asyncio.run mixes them up before its coroutine has begun
        pass
    counts["late" if done else "interrupted"] += 1
    counts["current"] += trace.get_current_span() is not trace.INVALID_SPAN
    if not recorder.root_context.is_valid:  # before the first step
        return
    counts["spans left open"] += bool(recorder.open)
    try:
        found = Trace.load(sink.path)
        ids = [record.span_id for record in read_file(sink.path).spans]
    except TraceError as error:
        counts["not whole" if "empty" in str(error) or "no trace" in str(error) else "damaged"] += 1
        return
    counts["damaged"] += bool(found.problems) or len(ids) != len(set(ids))
    counts["not whole"] += bool(recorder.open) or len(found.roots) != 1 or any(node.synthetic for node in found.spans)


def next_run_works(sink):
    run = make(sink, "held", 1)
    list(run)
    roots = [root for root in Trace.load(sink.path).roots if root.run_id == run.run_id]
    return len(roots) == 1 and run.stop_reason == "done"


def interrupt_many(folder, seed, count):
    dice, counts = random.Random(seed), Counter()
    names = (
        "interrupted",
        "late",
        "current",
        "spans left open",
        "not whole",
        "damaged",
        "next run failed",
        "swallowed",
    )
    counts.update(dict.fromkeys(names, 0))
    # In a finaliser or a weak reference's callback Python drops an interrupt.
    sys.unraisablehook = lambda caught: counts.update({"swallowed": caught.exc_type is KeyboardInterrupt})
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    list(make(ProvenanceSink(folder / "warm"), "async tools", 1))
    for number in range(count):
        sink = ProvenanceSink(folder / str(number))
        interrupt_one(sink, KINDS[number % len(KINDS)], dice.uniform(0.00002, MAX_DELAY_S), counts)
        counts["next run failed"] += not next_run_works(sink)
    sys.stdout.write(json.dumps(counts))


def stuck_run(folder, kind):
    begun, release = threading.Event(), threading.Event()

    def stuck():
        """Get stuck."""
        begun.set()
        release.wait(60)

    async def stuck_coroutine():
        """Get stuck."""
        begun.set()
        await asyncio.Event().wait()

    settings = {"timed": {"timeout_s": 60}, "parallel": {"concurrent_safe": True}}.get(kind.split()[-1], {})
    stuck_tool = tool(name="stuck", **settings)(stuck_coroutine if "async" in kind.split()[:1] else stuck)
    script = [[("stuck", {})] * (2 if "parallel" in kind else 1)]
    registry, sink = tools_from([stuck_tool], include_done=True), ProvenanceSink(folder)
    run = (
        async_composable_loop(AsyncScriptedBackend(script), {}, registry, hooks=[sink])
        if kind == "under async for"
        else composable_loop(ScriptedBackend(script), {}, registry, hooks=[sink])
    )

    async def main():
        return [step async for step in run]

    def interrupt(send):
        begun.wait(60)
        send()

    try:
        if kind == "under async for":  # asyncio hears of every signal, and only looks after the usual handler
            threading.Thread(target=interrupt, args=[lambda: os.kill(os.getpid(), signal.SIGINT)]).start()
            asyncio.run(main())
        else:
            with signals_to_main() as send:
                threading.Thread(target=interrupt, args=[send]).start()
                list(run)
    except KeyboardInterrupt:
        assert not release.is_set()
        sys.stdout.write(f"{run.stop_reason}\n")
    release.set()


if __name__ == "__main__":
    if len(sys.argv) == 4:
        interrupt_many(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    else:
        stuck_run(Path(sys.argv[1]), sys.argv[2])

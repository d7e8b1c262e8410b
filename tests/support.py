"""What many tests need: a few tools, one run done sync and async, and span trees as plain data."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opentelemetry import trace as trace_api

import looplet
from looplet import (
    EvalContext,
    ProvenanceSink,
    Step,
    Trace,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.telemetry.otlp_file import read_file


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool(concurrent_safe=True)
def look(name: str) -> dict:
    """Look something up."""
    return {"name": name, "found": True}


@tool
def boom(why: str = "kaput") -> None:
    """Fail."""
    raise RuntimeError(why)


def make_tools():
    return tools_from([add, look, boom], include_done=True)


@dataclass
class Outcome:
    """What came of one run."""

    steps: list[Step]
    stop_reason: str | None
    raised: str | None
    tree: tuple
    live: EvalContext
    saved: EvalContext
    trace: Trace


def node_of(node) -> tuple:
    """Return a span as plain data, without ids and times."""
    told = node.attributes
    return (
        node.name,
        {0: "UNSET", 2: "ERROR"}[node.record.status_code],
        told.get(semconv.ERROR_TYPE),
        told.get(semconv.STOP_REASON),
        tuple(event.name for event in node.events),
        tuple(sorted((node_of(child) for child in node.children), key=repr))
        if node.name == semconv.DISPATCH
        else tuple(node_of(child) for child in node.children),
    )


def names_of(node, depth: int = 0) -> list[str]:
    """Return the tree as indented names."""
    lines = ["  " * depth + node.name]
    for child in node.children:
        lines += names_of(child, depth + 1)
    return lines


def run_sync(make: Callable[..., dict[str, Any]], folder: Path, body: Callable[[Step], Any] | None = None) -> Outcome:
    """Run what `make(is_async=False)` describes; `body` gets each step and may raise."""
    sink = ProvenanceSink(folder)
    arguments = make(is_async=False)
    run = composable_loop(**{**arguments, "hooks": [*arguments.get("hooks", ()), sink]})
    steps, raised = [], None
    try:
        with run:
            for step in run:
                steps.append(step)
                if body is not None and body(step):
                    break
    except Exception as error:
        raised = type(error).__name__
    return outcome_of(run, steps, raised, folder)


def run_async(make: Callable[..., dict[str, Any]], folder: Path, body: Callable[[Step], Any] | None = None) -> Outcome:
    """Like `run_sync`, under `async for`."""
    sink = ProvenanceSink(folder)
    arguments = make(is_async=True)
    run = async_composable_loop(**{**arguments, "hooks": [*arguments.get("hooks", ()), sink]})
    steps, raised = [], None

    async def main():
        async with run:
            async for step in run:
                steps.append(step)
                if body is not None and body(step):
                    break

    try:
        asyncio.run(main())
    except Exception as error:
        raised = type(error).__name__
    return outcome_of(run, steps, raised, folder)


def outcome_of(run, steps, raised, folder) -> Outcome:
    """Read the trace back and put everything side by side."""
    trace = Trace.load(folder)
    return Outcome(
        [timeless(step) for step in steps],
        run.stop_reason,
        raised,
        tuple(node_of(root) for root in trace.roots),
        EvalContext.from_run(run),
        EvalContext.from_trace(folder, run.run_id),
        trace,
    )


def timeless(step: Step) -> Step:
    """Return the step without what differs between two equal runs."""
    return replace(step, tool_result=replace(step.tool_result, duration_ms=0.0))


def both(make: Callable[..., dict[str, Any]], body: Callable[[Step], Any] | None = None) -> Outcome:
    """Run sync and async, require the same of both and of what the file says; return the sync outcome.

    `make(is_async=...)` returns fresh arguments of the loop each time: backend, task, tools, hooks, config.
    """
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        sync = run_sync(make, Path(one), body)
        other = run_async(make, Path(two), body)
    assert sync.steps == other.steps
    assert (sync.stop_reason, sync.raised) == (other.stop_reason, other.raised)
    assert sync.tree == other.tree
    assert sync.live == sync.saved
    assert other.live == other.saved
    return sync


def environment(**more: str) -> dict[str, str]:
    """Return the variables of a sub-process that finds this looplet and no endpoint; `more` comes on top."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return {**kept, "PYTHONPATH": str(Path(looplet.__file__).resolve().parent.parent), **more}


def python(*arguments: object, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a sub-process and return what came of it."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, encoding="utf-8", errors="replace", timeout=120
    )


@contextmanager
def signals_to_main(number: int = signal.SIGINT) -> Iterator[Callable[[], None]]:
    """Yield a function that sends the main thread a signal, again every two seconds until its handler has begun.

    Once is not enough: a lock or a socket whose wait begins just then does not hear of it.
    """
    heard, before = threading.Event(), signal.getsignal(number)
    assert callable(before)

    def handle(*args: Any) -> Any:
        heard.set()
        return before(*args)

    def send() -> None:
        while not heard.is_set():
            signal.pthread_kill(threading.main_thread().ident, number)
            heard.wait(2)

    signal.signal(number, handle)
    try:
        yield send
    finally:
        signal.signal(number, before)


class CountingProvider(trace_api.TracerProvider):
    """A tracer provider that notes which spans were started, and how often each was ended."""

    def __init__(self):
        self.ends: dict[str, int] = {}

    def get_tracer(self, *args: Any, **settings: Any) -> trace_api.Tracer:
        return _CountingTracer(self.ends)


class _CountingTracer(trace_api.Tracer):
    def __init__(self, ends):
        self._ends = ends

    def start_span(self, name, context=None, *args, **settings):
        above = trace_api.get_current_span(context).get_span_context()
        trace_id = above.trace_id if above.is_valid else random.getrandbits(128)
        return _CountedSpan(trace_api.SpanContext(trace_id, random.getrandbits(64) or 1, False), self._ends)

    def start_as_current_span(self, *args, **settings):
        raise NotImplementedError


class _CountedSpan(trace_api.NonRecordingSpan):
    def __init__(self, context, ends):
        super().__init__(context)
        self._key = f"{context.span_id:016x}"
        self._ends = ends
        ends[self._key] = 0

    def end(self, end_time=None):
        self._ends[self._key] += 1


def require_whole(file: Path, provider: CountingProvider, reason: str) -> Trace:
    """Require that every span that was started ended once, is in the file once, and that one root says `reason`."""
    trace = Trace.load(file)
    assert trace.problems == []
    ids = sorted(record.span_id for record in read_file(trace.path).spans)
    assert set(provider.ends.values()) == {1}
    assert ids == sorted(provider.ends)
    (root,) = trace.roots
    assert not any(node.synthetic for node in trace.spans)
    assert (root.name.split()[0], root.attributes[semconv.STOP_REASON]) == (semconv.INVOKE_AGENT, reason), root
    return trace

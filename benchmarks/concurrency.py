"""Many runs at the same time in one event loop: does each keep to itself, and what does it cost beside bare calls?

Every run has a name in its task, asks the same provider three times through one router, and calls a tool in between.
The yardstick is the same number of calls with the bare `openai` client, as many tasks, over as many connections.

    alone     each run in a trace file of its own: a `ProvenanceSink` each
    together  all runs in one file: one `ProvenanceSink` for all

    mixed     spans or messages of one run that tell of another: none
    x bare    wall time of the runs, divided by that of the bare calls
    blocked   the longest time for which one callback held the event loop up
    lag       the longest time for which the event loop did not come round; with a thousand tasks that all have
              something to do, it takes that many callbacks
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

import click
import openai
from billing import AGENT, MODEL, PRICED_AT, Bill, Provider, nano_usd
from memory import resident_bytes

from looplet import (
    AsyncOpenAIBackend,
    BackendRouter,
    Message,
    ProvenanceSink,
    Trace,
    async_composable_loop,
    tool,
    tools_from,
)
from looplet.backends.completions import reply_of, request_of
from looplet.backends.resilient import ResilientBackend
from looplet.telemetry import semconv
from looplet.telemetry.runs import RunView
from looplet.types import NO_USAGE

TURNS: Final = 3
TICK_S: Final = 0.005
CONNECTIONS: Final = 64
"""of the client; the server has a thread for each, and turns away who comes when too many knock at once"""


@tool
def echo(name: str, turn: int) -> str:
    """Return the name."""
    return f"{name} {turn}"


@tool(name="echo")
async def async_echo(name: str, turn: int) -> str:
    """Return the name."""
    await asyncio.sleep(0)
    return f"{name} {turn}"


@dataclass
class Meter:
    """Watches the process while the event loop is busy."""

    lag_s: float = 0.0
    blocked_s: float = 0.0
    threads: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    before_bytes: int = 0
    after_bytes: int = 0
    _ticking: Any = None
    _run_callback: Any = None
    _began: tuple[float, float] = field(default=(0.0, 0.0))

    async def __aenter__(self) -> Meter:
        gc.collect()
        self.before_bytes = resident_bytes()
        self._ticking = asyncio.create_task(self._tick())
        self._run_callback = asyncio.Handle._run
        asyncio.Handle._run = self._timed()  # type: ignore[method-assign]
        self._began = perf_counter(), process_time()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.wall_s, self.cpu_s = perf_counter() - self._began[0], process_time() - self._began[1]
        asyncio.Handle._run = self._run_callback  # type: ignore[method-assign]
        self._ticking.cancel()
        with suppress(asyncio.CancelledError):
            await self._ticking
        self.after_bytes = resident_bytes()

    def _timed(self) -> Any:
        run_callback = self._run_callback

        def timed(handle: asyncio.Handle) -> None:
            began = perf_counter()
            run_callback(handle)
            self.blocked_s = max(self.blocked_s, perf_counter() - began)

        return timed

    async def _tick(self) -> None:
        while True:
            began = perf_counter()
            await asyncio.sleep(TICK_S)
            self.lag_s = max(self.lag_s, perf_counter() - began - TICK_S)
            self.threads = max(self.threads, threading.active_count())


@dataclass
class Crowd:
    """Many runs, and everything that tells of them."""

    runs: list[Any]
    meter: Meter
    router: BackendRouter
    bill: Bill
    folders: list[Path]

    @property
    def traces(self) -> Iterator[Trace]:
        """Yield the traces, one for each folder."""
        return map(Trace.load, self.folders)


def crowd(count: int, folder: Path, *, shares_sink: bool, sync_tools: bool = False) -> Crowd:
    """Have many runs at the same time, to their ends."""
    folders = [folder] if shares_sink else [folder / str(number) for number in range(count)]
    sinks = [ProvenanceSink(path) for path in folders]
    tools = tools_from([echo if sync_tools else async_echo], include_done=True)
    with Provider("echo", turns=TURNS) as provider:
        client = client_for(provider)
        backend = AsyncOpenAIBackend(client, model=MODEL)
        backend.base_url = PRICED_AT
        router = BackendRouter(ResilientBackend(backend, retries=0))

        def run(number: int) -> Any:
            hooks, task = [sinks[number % len(sinks)]], {"name": f"n{number}"}
            return async_composable_loop(router, task, tools, hooks=hooks, system_prompt=AGENT)

        runs, meter = asyncio.run(_all(run, count, client))
        bill = provider.bill()
    return Crowd(runs, meter, router, bill, folders)


def client_for(provider: Provider) -> openai.AsyncOpenAI:
    """Return a client of few connections, which waits for them as long as it takes."""
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=CONNECTIONS)  # httpx.Limits, whichever httpx it is
    http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=None)
    return openai.AsyncOpenAI(base_url=provider.base_url, api_key="none", max_retries=0, http_client=http)


async def _all(make: Any, count: int, client: openai.AsyncOpenAI) -> tuple[list[Any], Meter]:
    async with client:
        async with Meter() as meter:
            runs = await asyncio.gather(*(_finished(make(number)) for number in range(count)))
        return runs, meter


async def _finished(run: Any) -> Any:
    async for _ in run:
        pass
    return run


def bare(count: int) -> Meter:
    """Make as many calls with the bare client, as many at a time."""
    with Provider("echo", turns=TURNS) as provider:

        async def all_calls() -> Meter:
            async with client_for(provider) as client:
                async with Meter() as meter:
                    await asyncio.gather(*(_bare_run(client, f"n{number}") for number in range(count)))
                return meter

        return asyncio.run(all_calls())


async def _bare_run(client: openai.AsyncOpenAI, name: str) -> None:
    """Send what a run sends, written by hand."""
    said = [Message.of_text("system", AGENT), Message.of_text("user", f"name: {name}")]
    schemas = tools_from([echo], include_done=True).tool_schemas()
    for turn in range(1, TURNS + 1):
        answer = await client.chat.completions.create(
            **request_of(said, model=MODEL, tools=schemas, tool_choice="auto")
        )
        reply = reply_of(answer)
        said += [Message.of_reply(reply), Message.of_result(reply.tool_calls[0].call_id, f"{name} {turn}")]


# --- what must be true afterwards -----------------------------------------------------------------------------------


def problems(done: Crowd) -> Iterator[str]:
    """Yield what is wrong with runs that have ended."""
    yield from done.bill.errors
    failed = [run for run in done.runs if run.stop_reason != "done"]
    if failed:
        yield f"{len(failed)} runs did not end with done: {failed[0].state.steps[-1].pretty()}"
    by_id = {run.run_id: run for run in done.runs}
    seen, spent = 0, NO_USAGE
    for trace in done.traces:
        yield from map(str, trace.problems)
        if strays := sum(node.synthetic or not node.run_id for node in trace.spans):
            yield f"{strays} spans in {trace.path} belong to no run, or never ended"
        if len(done.folders) > 1 and len(trace.runs) != 1:
            yield f"{len(trace.runs)} runs in {trace.path}"
        for view in trace.runs:
            seen, spent = seen + 1, spent + view.usage
            yield from _problems_of_run(view, by_id[view.run_id])
    if seen != len(done.runs):
        yield f"{seen} runs in the files, and {len(done.runs)} were made"
    charged, router = done.bill.tokens, done.router
    books = {
        "bill": (charged["input"], charged["output"], nano_usd(charged)),
        "spans": (spent.input_tokens, spent.output_tokens, round((spent.cost_usd or 0) * 1_000_000_000)),
        "router": (router.total_input_tokens, router.total_output_tokens, round((router.total_cost_usd or 0) * 1e9)),
    }
    if len(set(books.values())) != 1:
        yield f"the books do not agree: {books}"


def _problems_of_run(view: RunView, run: Any) -> Iterator[str]:
    name = run.task["name"]
    if view.task != run.task:
        yield f"{name}: the file tells of {view.task}"
    if len({node.trace_id for node in view.spans}) != 1 or view.root.synthetic:
        yield f"{name}: spans of other traces"
    steps = [(step.tool_call.tool, step.tool_call.args) for step in view.steps]
    wanted = [("echo", {"name": name, "turn": turn}) for turn in range(1, TURNS)] + [("done", {"answer": name})]
    if steps != wanted:
        yield f"{name}: the steps are {steps}"
    if [step.tool_result.data for step in view.steps[:-1]] != [f"{name} {turn}" for turn in range(1, TURNS)]:
        yield f"{name}: results of another run"
    if view.usage != run.result.usage or view.usage.input_tokens != view.root.attributes[semconv.RUN_INPUT_TOKENS]:
        yield f"{name}: usage {view.usage} in the file, {run.result.usage} in the result"
    for chat in view.chats:
        told = [text for message in view.request(chat) for text in _texts(message) if text.startswith("n")]
        if strange := [text for text in told if not text.startswith((f"name: {name}", f"{name} "))]:
            yield f"{name}: was sent {strange}"


def _texts(message: Any) -> Iterator[str]:
    for part in message.parts:
        for value in (part.get("content"), part.get("response")):
            if isinstance(value, str):
                yield value


# --- what is printed ------------------------------------------------------------------------------------------------


def report(done: Crowd, yardstick: Meter) -> dict[str, Any]:
    """Return what was measured as one JSON-like value."""
    meter, runs = done.meter, len(done.runs)
    return {
        "runs": runs,
        "files": len(done.folders),
        "requests": done.bill.requests,
        "wall_s": round(meter.wall_s, 2),
        "cpu_s": round(meter.cpu_s, 2),
        "bare_wall_s": round(yardstick.wall_s, 2),
        "bare_cpu_s": round(yardstick.cpu_s, 2),
        "x_bare": round(meter.wall_s / yardstick.wall_s, 2),
        "cpu_ms_per_turn_beyond_bare": round((meter.cpu_s - yardstick.cpu_s) / runs / TURNS * 1e3, 2),
        "most_threads": meter.threads,
        "blocked_ms": round(meter.blocked_s * 1e3, 1),
        "bare_blocked_ms": round(yardstick.blocked_s * 1e3, 1),
        "lag_ms": round(meter.lag_s * 1e3, 1),
        "bare_lag_ms": round(yardstick.lag_s * 1e3, 1),
        "memory_before_mb": round(meter.before_bytes / 1e6, 1),
        "memory_after_mb": round(meter.after_bytes / 1e6, 1),
        "memory_kb_per_run": round((meter.after_bytes - meter.before_bytes) / runs / 1e3, 1),
        "bare_memory_kb_per_run": round((yardstick.after_bytes - yardstick.before_bytes) / runs / 1e3, 1),
    }


@click.command(help=__doc__.splitlines()[0])
@click.option("--runs", default=1_000, show_default=True, type=click.IntRange(1), help="at the same time")
@click.option("--sync-tools", is_flag=True, help="the tool is a plain function: each run needs a thread")
def main(runs: int, sync_tools: bool) -> None:
    """Run, print what was measured, exit with 1 when something is wrong."""
    bare(min(runs, 20))  # imports, first connections
    yardstick, found = bare(runs), []
    for name, shares_sink in (("alone", False), ("together", True)):
        with tempfile.TemporaryDirectory() as folder:
            done = crowd(runs, Path(folder), shares_sink=shares_sink, sync_tools=sync_tools)
            print(json.dumps({name: report(done, yardstick)}, indent=2))
            found += [f"{name}: {problem}" for problem in problems(done)]
    for problem in found[:20]:
        print(problem, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

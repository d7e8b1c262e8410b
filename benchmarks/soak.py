"""One very long run in which everything goes wrong now and then: does it stay small, fast, and honest about money?

money      the chat spans of the file, the totals on the run's span, the router's counters, the steps, the stream
           and the provider's own bill say the same, to the token and to the billionth of a dollar
spans      every span ended once and none is missing; each sub-agent's run hangs below the call that started it
requests   every request can be read back from the file, and has its hash
tools      no call ran more often than the tool was declared to bear
memory     a turn of the last quarter leaves no more behind than one of the second: the steps, which a run keeps
time       a turn of the last quarter takes no more CPU than one of the second
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import tempfile
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

import click
from billing import AGENT, MODEL, PRICED_AT, Bill, Provider, nano_usd
from memory import resident_bytes
from soak_tools import HELPERS, Tally, attempts_of, make_tools

from looplet import (
    AsyncOpenAIBackend,
    BackendRouter,
    LoopConfig,
    OpenAIBackend,
    ProvenanceSink,
    PruneToolResults,
    SummarizeCompact,
    Trace,
    TruncateCompact,
    Usage,
    async_composable_loop,
    compact_chain,
    composable_loop,
)
from looplet.backends.resilient import ResilientBackend
from looplet.telemetry import semconv
from looplet.telemetry.otlp_file import read_file
from looplet.telemetry.runs import usage_of
from looplet.types import NO_USAGE

WINDOW: Final = 6_000
"""tokens of the context: full after about fifteen turns"""
MOST_GROWTH: Final = 1.25
"""of memory and time per turn, from the second quarter to the last"""
LEAST_TURNS: Final = 1_000
"""below, neither is judged: caches fill, and the garbage collector comes when it likes"""


@dataclass
class Watch:
    """Takes the run's events: counts them, adds up what they say was used, and reads the clocks after each turn."""

    turns: int
    events: Counter[str] = field(default_factory=Counter)
    usage: Usage = NO_USAGE
    cpu: Any = field(default_factory=lambda: array("d"))
    wall: Any = field(default_factory=lambda: array("d"))
    memory: list[int] = field(default_factory=list)
    """bytes, at the ends of the quarters"""
    snapshots: list[Any] = field(default_factory=list)

    def __call__(self, event: Any) -> None:
        """Take an event; they come one at a time."""
        self.events[event.kind] += 1
        if event.kind == "chat_end" and event.usage is not None:
            self.usage = self.usage + event.usage
        if event.kind == "turn_end":
            if event.turn % (self.turns // 4) == 0:
                self._weigh()
            self.cpu.append(process_time())
            self.wall.append(perf_counter())

    def _weigh(self) -> None:
        gc.collect()
        if tracemalloc.is_tracing():
            self.memory.append(tracemalloc.get_traced_memory()[0])
            self.snapshots.append(tracemalloc.take_snapshot())
        else:
            self.memory.append(resident_bytes())

    def per_turn(self, clock: Any) -> list[float]:
        """Return the milliseconds that a turn took, in each quarter."""
        size = self.turns // 4
        marks = [clock[min(at * size, len(clock) - 1)] for at in range(5)]
        return [(after - before) / size * 1e3 for before, after in pairwise(marks)]

    def kept_per_turn(self) -> list[float]:
        """Return the bytes that a turn left behind, in each quarter but the first."""
        return [(after - before) / (self.turns // 4) for before, after in pairwise(self.memory)]


@dataclass
class Soak:
    """One run, and everything that tells of it."""

    turns: int
    run: Any
    watch: Watch
    router: BackendRouter
    tally: Tally
    helped: Tally
    bill: Bill
    folder: Path


def soak(turns: int, folder: Path, *, is_async: bool = False, **more: Any) -> Soak:
    """Make the run, to its end; `more`: further arguments of the loop."""
    tally, helped, watch = Tally(turns), Tally(turns), Watch(turns)
    with Provider("soak", turns=turns) as provider:
        backend = (AsyncOpenAIBackend if is_async else OpenAIBackend)(base_url=provider.base_url, model=MODEL)
        backend.base_url = PRICED_AT
        router = BackendRouter(ResilientBackend(backend, retries=4, base_delay_s=0.001, timeout_s=10))
        run = (async_composable_loop if is_async else composable_loop)(
            router,
            {"goal": "hold out"},
            make_tools(router, tally, helped, is_async=is_async),
            hooks=[ProvenanceSink(folder)],
            config=LoopConfig(
                max_steps=10 * turns,
                context_window=WINDOW,
                compact_service=compact_chain(PruneToolResults, SummarizeCompact, TruncateCompact),
                system_prompt=AGENT,
            ),
            stream=watch,
            **more,
        )
        if is_async:
            asyncio.run(_finish(run, backend))
        else:
            with backend:
                for _ in run:
                    pass
        bill = provider.bill()
    return Soak(turns, run, watch, router, tally, helped, bill, folder)


async def _finish(run: Any, backend: AsyncOpenAIBackend) -> None:
    async with backend:
        async for _ in run:
            pass


# --- what must be true afterwards -----------------------------------------------------------------------------------


def problems(done: Soak) -> Iterator[str]:
    """Yield what is wrong with a run that has ended."""
    trace = Trace.load(done.folder)
    if done.run.stop_reason != "done":
        yield f"the run stopped with {done.run.stop_reason!r}: {done.run.state.steps[-1].pretty()}"
    yield from done.bill.errors
    yield from _problems_of_money(done, trace)
    yield from _problems_of_spans(done, trace)
    yield from _problems_of_requests(trace)
    yield from _problems_of_tools(done)
    yield from _problems_of_events(done)
    if done.turns >= LEAST_TURNS:
        yield from _problems_of_growth(done)


def books(done: Soak, trace: Trace) -> dict[str, dict[str, int]]:
    """Return what everybody says was used, in tokens and billionths of a dollar."""
    charged = done.bill.tokens
    root = trace.roots[0].attributes
    spans = NO_USAGE
    for run in trace.runs:
        spans = spans + run.usage
    router = done.router
    return {
        "bill": {"input": charged["input"], "output": charged["output"], "nano_usd": nano_usd(charged)},
        "spans": _book(spans.input_tokens, spans.output_tokens, spans.cost_usd),
        "root": _book(
            *(root[n] for n in (semconv.TOTAL_INPUT_TOKENS, semconv.TOTAL_OUTPUT_TOKENS, semconv.TOTAL_COST_USD))
        ),
        "router": _book(router.total_input_tokens, router.total_output_tokens, router.total_cost_usd),
    }


def own_books(done: Soak, trace: Trace) -> dict[str, dict[str, int]]:
    """Return what everybody says that the run used without its sub-agents."""
    root = trace.roots[0].attributes
    steps = NO_USAGE
    for step in done.run.state.steps:
        steps = steps + step.usage
    told = {"result": done.run.result.usage, "steps": steps, "stream": done.watch.usage, "spans": trace.runs[0].usage}
    of_root = _book(*(root[n] for n in (semconv.RUN_INPUT_TOKENS, semconv.RUN_OUTPUT_TOKENS, semconv.RUN_COST_USD)))
    return {"root": of_root} | {n: _book(u.input_tokens, u.output_tokens, u.cost_usd) for n, u in told.items()}


def _book(input_tokens: int, output_tokens: int, cost_usd: float | None) -> dict[str, int]:
    return {"input": input_tokens, "output": output_tokens, "nano_usd": round((cost_usd or 0) * 1_000_000_000)}


def _problems_of_money(done: Soak, trace: Trace) -> Iterator[str]:
    for title, told in (("all", books(done, trace)), ("own", own_books(done, trace))):
        first = next(iter(told.values()))
        if any(book != first for book in told.values()):
            yield f"the books do not agree ({title}): {json.dumps(told)}"
    cached = sum(usage_of(chat).cached_tokens for run in trace.runs for chat in run.chats)
    if cached != done.bill.tokens["cached"]:
        yield f"{cached} cached tokens in the file, {done.bill.tokens['cached']} on the bill"
    chats = trace.find(semconv.CHAT + " *", where=lambda chat: not chat.is_error)
    if done.router.total_calls != len(chats):
        yield f"the router counted {done.router.total_calls} calls, and {len(chats)} chat spans are no error"


def _problems_of_spans(done: Soak, trace: Trace) -> Iterator[str]:
    yield from map(str, trace.problems)
    ids = Counter(record.span_id for record in read_file(trace.path).spans)
    if twice := [span_id for span_id, count in ids.items() if count > 1]:
        yield f"{len(twice)} spans are in the file twice"
    if made_up := sum(node.synthetic for node in trace.spans):
        yield f"{made_up} spans never ended"
    if left := done.run._scope.trace.recorder.open:
        yield f"{len(left)} spans are still open"
    if len(trace.roots) != 1 or trace.roots[0].run_id != done.run.run_id:
        yield f"{len(trace.roots)} roots"
    if strays := sum(not node.run_id for node in trace.spans):
        yield f"{strays} spans belong to no run"
    begun, ended = len(trace.find(semconv.TOOL_START)), len(trace.find(semconv.EXECUTE_TOOL + " *"))
    if begun != ended:
        yield f"{begun} tool calls began, {ended} ended"
    helpers = Counter(run.root.parent.name.split()[-1] for run in trace.runs[1:] if run.root.parent is not None)
    calls = Counter(step.tool_call.tool for step in done.run.state.steps)
    if helpers != Counter({name: calls[name] for name in HELPERS if calls[name]}):
        yield f"sub-agents by the tool above them: {helpers}; calls: {calls}"
    if strange := Counter(run.stop_reason for run in trace.runs) - Counter({"done": len(trace.runs)}):
        yield f"runs did not end with done: {strange}"
    if [step.tool_call for step in trace.runs[0].steps] != [step.tool_call for step in done.run.state.steps]:
        yield "the steps in the file are not the steps of the run"


def _problems_of_requests(trace: Trace) -> Iterator[str]:
    for run in trace.runs:
        for chat in run.chats:
            try:
                run.request(chat)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is said
                yield f"a request cannot be read back: {error}"
                return


def _problems_of_tools(done: Soak) -> Iterator[str]:
    calls = [step.tool_call for step in done.run.state.steps if "key" in step.tool_call.args]
    wanted = {call.args["key"]: attempts_of(call.tool, call.args["key"]) for call in calls}
    if wrong := [key for key, count in wanted.items() if done.tally[key] != count]:
        yield f"{len(wrong)} calls did not run as often as they should, {wrong[0]} {done.tally[wrong[0]]} times"
    if done.tally.total != sum(wanted.values()):
        yield f"the tools ran {done.tally.total} times, {sum(wanted.values())} are known"
    helped = [call.args["key"] for call in calls if call.tool in HELPERS]
    if done.helped.total != len(helped) or any(done.helped[key] != 1 for key in helped):
        yield f"the tools of {len(helped)} sub-agents ran {done.helped.total} times"


def _problems_of_events(done: Soak) -> Iterator[str]:
    told = done.watch.events
    for one, other in (("run_start", "run_end"), ("turn_start", "turn_end"), ("chat_start", "chat_end")):
        if told[one] != told[other]:
            yield f"{told[one]} events {one}, {told[other]} {other}"
    if told["tool_result"] != len(done.run.state.steps) or told["turn_end"] != done.turns:
        yield f"{told['tool_result']} results and {told['turn_end']} turns in the stream"


def _problems_of_growth(done: Soak) -> Iterator[str]:
    kept, cpu = done.watch.kept_per_turn(), done.watch.per_turn(done.watch.cpu)
    if kept[2] > MOST_GROWTH * kept[0]:
        yield f"memory: {kept[0]:.0f} bytes per turn in the second quarter, {kept[2]:.0f} in the last"
    if cpu[3] > MOST_GROWTH * cpu[1]:
        yield f"time: {cpu[1]:.2f} ms of CPU per turn in the second quarter, {cpu[3]:.2f} in the last"


# --- what is printed ------------------------------------------------------------------------------------------------


def report(done: Soak) -> dict[str, Any]:
    """Return what was measured as one JSON-like value."""
    trace = Trace.load(done.folder)
    kept, cpu, wall = (
        done.watch.kept_per_turn(),
        done.watch.per_turn(done.watch.cpu),
        done.watch.per_turn(done.watch.wall),
    )
    steps = len(done.run.state.steps)
    compactions = Counter(node.attributes[semconv.COMPACT_REASON] for node in trace.find(semconv.COMPACT))
    return {
        "turns": done.turns,
        "steps": steps,
        "sub_agents": len(trace.runs) - 1,
        "requests": done.bill.requests,
        "billed": done.bill.billed,
        "asked": done.bill.asked,
        "faults": done.bill.faults,
        "compactions": compactions,
        "spans": len(trace),
        "trace_bytes_per_turn": round(Path(trace.path).stat().st_size / done.turns),
        "books": books(done, trace),
        "events": done.watch.events,
        "cpu_ms_per_turn": [round(ms, 3) for ms in cpu],
        "wall_ms_per_turn": [round(ms, 3) for ms in wall],
        "cpu_last_to_second_quarter": round(cpu[3] / cpu[1], 3),
        "memory_bytes": done.watch.memory,
        "kept_bytes_per_turn": [round(size) for size in kept],
        "kept_bytes_per_step": round(kept[-1] * done.turns / steps),
        "kept_last_to_second_quarter": round(kept[2] / kept[0], 3) if kept[0] else None,
    }


def print_growth(watch: Watch) -> None:
    """Print the lines of code that hold more after the last quarter than after the second."""
    if len(watch.snapshots) == 4:
        found = watch.snapshots[3].compare_to(watch.snapshots[1], "lineno")
        for line in found[:25]:
            print(line, file=sys.stderr)


@click.command(help=__doc__.splitlines()[0])
@click.option("--turns", default=5_000, show_default=True, type=click.IntRange(40), help="length of the run")
@click.option("--async", "is_async", is_flag=True, help="under `async for`")
@click.option("--memory", "traces_memory", is_flag=True, help="say which lines of code keep memory (takes much longer)")
@click.option("--keep", type=click.Path(path_type=Path), help="folder for the trace, instead of a temporary one")
def main(turns: int, is_async: bool, traces_memory: bool, keep: Path | None) -> None:
    """Run, print what was measured, exit with 1 when something is wrong."""
    if traces_memory:
        tracemalloc.start(1)
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        done = soak(turns, keep or Path(folder), is_async=is_async)
        print_growth(done.watch)
        print(json.dumps(report(done), indent=2))
        found = list(problems(done))
        for problem in found:
            print(problem, file=sys.stderr)
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

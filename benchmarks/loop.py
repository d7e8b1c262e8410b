"""CPU time of one turn: a scripted model, a trivial tool, and what looplet adds around them.

Four loops run side by side, interleaved, in this process:

    bare         what one writes by hand: ask, run the tool, append the messages; no looplet
    quiet        `composable_loop` without sink and provider: no spans are made
    file         with a `ProvenanceSink`: every phase is a span in a file that is durable at each step
    sdk + file   the same, and every span also goes to an SDK provider with an in-memory exporter

A sample covers about the same number of turns for each length of run, from the first step of a run to its end.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import process_time

import click
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from looplet import ProvenanceSink, Reply, ToolCall, Usage, composable_loop, tool, tools_from

LENGTHS = (100, 300, 1000, 3000)
MOST_FLAT = 1.15
MOST_US_PER_TURN = 100.0


@tool
def echo(text: str) -> str:
    """Return the text."""
    return text


class EchoModel:
    """A chat backend that calls `echo` for ever."""

    provider = "benchmark"
    model = "scripted"

    def __init__(self) -> None:
        self.calls = 0

    def chat(self, messages, *, tools=None, system_prompt="", max_tokens=None, temperature=None):
        """Return a reply with one tool call, a new text each time."""
        self.calls += 1
        call = ToolCall("echo", {"text": f"number {self.calls}"}, call_id=f"call_{self.calls}")
        return Reply(tool_calls=(call,), finish_reason="tool_call", usage=Usage(100, 10), model="scripted")


def bare_loop(turns: int) -> Iterator[str]:
    """Do by hand what the loop does, without traces, checks and hooks."""
    model, tools = EchoModel(), {"echo": echo.execute}
    messages = [{"role": "user", "content": "goal: benchmark"}]
    schemas = [echo.to_json_schema()]
    for _ in range(turns):
        reply = model.chat(messages, tools=schemas, system_prompt="Repeat what you hear.")
        for call in reply.tool_calls:
            arguments = json.dumps(call.args)
            messages.append({"role": "assistant", "id": call.call_id, "name": call.tool, "arguments": arguments})
            result = tools[call.tool](**call.args)
            messages.append({"role": "tool", "id": call.call_id, "content": json.dumps(result)})
            yield result


def looplet_run(turns: int, hooks=(), tracer_provider=None):
    """Return a run of `turns` turns."""
    tools = tools_from([echo], include_done=True)
    return composable_loop(
        EchoModel(),
        {"goal": "benchmark"},
        tools,
        hooks=hooks,
        max_steps=turns,
        system_prompt="Repeat what you hear.",
        tracer_provider=tracer_provider,
    )


@dataclass
class Loop:
    """One of the loops that are compared."""

    name: str
    start: Callable[[int], Iterator[object]]
    tidy: Callable[[], object] = lambda: None
    samples: dict[int, list[float]] = field(default_factory=dict)
    """length of a run → CPU µs per turn, one for each sample"""

    def sample(self, turns: int, at_least: int) -> None:
        """Add one sample: enough runs of `turns` turns to make `at_least` turns."""
        spent, done = 0.0, 0
        while done < at_least:
            steps = self.start(turns + 1)
            next(steps)
            began = process_time()
            count = sum(1 for _ in steps)
            spent += process_time() - began
            if count != turns:
                raise SystemExit(f"{self.name}: {count} steps instead of {turns}")
            done += turns
            self.tidy()
        self.samples.setdefault(turns, []).append(spent / done * 1e6)

    def us_per_turn(self, turns: int) -> float:
        """Return the median of the samples."""
        return median(self.samples[turns])


@contextmanager
def loops() -> Iterator[list[Loop]]:
    """Yield the loops to compare; the files they write are removed afterwards."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with tempfile.TemporaryDirectory() as folder:

        def tidy() -> None:
            exporter.clear()
            for file in Path(folder).glob("*"):
                file.unlink()

        def sink() -> ProvenanceSink:
            return ProvenanceSink(folder)

        yield [
            Loop("bare", bare_loop),
            Loop("quiet", looplet_run),
            Loop("file", lambda turns: looplet_run(turns, [sink()]), tidy),
            Loop("sdk + file", lambda turns: looplet_run(turns, [sink()], provider), tidy),
        ]
    provider.shutdown()


def measure(compared: list[Loop], lengths: list[int], samples: int) -> None:
    """Take the samples, all loops and lengths in turn, so that a slow minute of the machine hits all of them."""
    at_least = max(lengths)
    for loop in compared:
        loop.sample(min(lengths), min(lengths))
        loop.samples.clear()
    for number in range(samples):
        for turns in lengths:
            for loop in compared:
                print(f"\rsample {number + 1}/{samples}, {turns} turns, {loop.name:12}", end="", file=sys.stderr)
                loop.sample(turns, at_least)
    print("\r" + " " * 60, end="\r", file=sys.stderr)


def report(compared: list[Loop], lengths: list[int]) -> dict[str, object]:
    """Return what was measured as one JSON-like value."""
    first, last = lengths[0], lengths[-1]
    bare = compared[0]
    rows = {
        loop.name: {
            "us_per_turn": {str(turns): loop.us_per_turn(turns) for turns in lengths},
            "flatness": loop.us_per_turn(last) / loop.us_per_turn(first),
            "times_bare": loop.us_per_turn(last) / bare.us_per_turn(last),
        }
        for loop in compared
    }
    file = next(loop for loop in compared if loop.name == "file")
    return {
        "lengths": lengths,
        "loops": rows,
        "targets": {
            "file_us_per_turn": {"most": MOST_US_PER_TURN, "measured": max(map(file.us_per_turn, lengths))},
            "file_flatness": {"most": MOST_FLAT, "measured": rows["file"]["flatness"]},
        },
    }


def print_table(found: dict, lengths: list[int]) -> None:
    """Print the report for people."""
    print("CPU µs per turn, median of the samples")
    flat = f"{lengths[-1]}/{lengths[0]}"
    print(f"{'loop':12}" + "".join(f"{f'{n} turns':>12}" for n in lengths) + f"{flat:>12}{'x bare':>10}")
    for name, row in found["loops"].items():
        cells = "".join(f"{us:12.1f}" for us in row["us_per_turn"].values())
        print(f"{name:12}{cells}{row['flatness']:12.2f}{row['times_bare']:10.1f}")
    print()
    for name, target in found["targets"].items():
        verdict = "ok" if target["measured"] <= target["most"] else "MISSED"
        print(f"{name}: {target['measured']:.2f}, at most {target['most']:g}: {verdict}")


@click.command(help=__doc__.splitlines()[0])
@click.option("--samples", default=7, show_default=True, type=click.IntRange(1), help="samples of each cell")
@click.option("--turns", "lengths", multiple=True, default=LENGTHS, type=click.IntRange(1), help="length of a run")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def main(samples: int, lengths: tuple[int, ...], as_json: bool) -> None:
    """Measure and print."""
    ordered = sorted(set(lengths))
    with loops() as compared:
        measure(compared, ordered, samples)
        found = report(compared, ordered)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_table(found, ordered)


if __name__ == "__main__":
    main()

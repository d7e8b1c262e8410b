"""`looplet show`: what happened in the runs of a trace, for people and, with `--json`, for programs."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import click

from looplet.boundary import Boundary
from looplet.cli import Command, one_line
from looplet.cli.runs import (
    Row,
    children_in,
    families,
    missing_of,
    models_of,
    parent_of,
    reason_of,
    roots_of,
    rows_of,
    started,
    step_times,
    turns_of,
    unreported,
)
from looplet.errors import TraceError
from looplet.messages import Message
from looplet.prompt import render
from looplet.resume import waits_for
from looplet.scope import final_output_of
from looplet.telemetry import semconv
from looplet.telemetry.reader import TRACE_FILE, SpanNode, Trace
from looplet.telemetry.runs import INTERRUPTED, RunView
from looplet.types import Step, summarize_args

Families: TypeAlias = Mapping[str, Sequence[RunView]]

WIDTH: Final = 100
LEAST_WIDTH: Final = 72
MAX_CALL: Final = 48
MAX_TASK_LINES: Final = 12
INDENT: Final = "    "
"""of a sub-run"""
NAMED_TRACES: Final = 3
"""how many traces further down an error names"""

EPILOG: Final = """
\b
Examples:
  looplet show traces/run_1
  looplet show traces/run_1/trace.jsonl --full
  looplet show traces/run_1 --json
\b
Exit code: 0 the trace was read; 2 there is none, or it cannot be read.
"""


@click.command("show", cls=Command, epilog=EPILOG, short_help="Show what happened in a trace.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--run", "wanted", metavar="ID", help="Only the run whose id begins with this.")
@click.option("--full", is_flag=True, help="Add every span with its duration, and what each turn sent to the model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show_command(path: Path, wanted: str | None, full: bool, as_json: bool) -> None:
    """Show the runs in PATH: a trace file, or the folder of a run."""
    try:
        _show(path, wanted, full, as_json)
    except RecursionError:
        raise TraceError("its runs, or their spans, are nested too deeply to be shown", path=str(path)) from None


def _show(path: Path, wanted: str | None, full: bool, as_json: bool) -> None:
    trace = load(path)
    family = families(trace.runs)
    runs = choose(trace, wanted) if wanted is not None else family[""]
    problems = [f"{trace.path}:{problem.line}: {problem.message}" for problem in trace.problems]
    if as_json:
        told = {"path": trace.path, "problems": problems, "runs": [document(run, family, full) for run in runs]}
        click.echo(json.dumps(Boundary().clean(told), indent=2, allow_nan=False))
        return
    lines = [line for run in runs for line in page(run, family, full, _width())]
    _print([*lines, *(Line(one_line(f"problem: {words}"), "yellow") for words in problems)])


def load(path: Path) -> Trace:
    """Read a trace; raises TraceError that says what to name instead."""
    where = str(path)
    if not path.exists():
        raise TraceError("no such file or folder: name a trace file, or the folder of a run", path=where)
    if path.is_dir() and not (path / TRACE_FILE).exists():
        below = sorted(path.rglob(TRACE_FILE))
        named = ", ".join(str(file.parent) for file in below[:NAMED_TRACES]) + (", ..." if below[NAMED_TRACES:] else "")
        advice = f"name one of the runs below it: {named}" if below else "name a trace file, or the folder of a run"
        raise TraceError(f"there is no {TRACE_FILE} in this folder: {advice}", path=where)
    try:
        trace = Trace.load(path)
    except TraceError as error:
        if error.line > 1:
            raise
        raise TraceError(f"{error}; wanted is a file of OTLP JSON lines, or the folder of a run") from error
    if not trace.runs:
        words = (
            f"it holds {len(trace)} spans, but no run of an agent: none of them has an attribute gen_ai.operation.name"
        )
        raise TraceError(words, path=trace.path)
    return trace


def choose(trace: Trace, wanted: str) -> list[RunView]:
    """Return the one run with that beginning of an id; raises TraceError that names the ids there are."""
    fitting = [run for run in trace.runs if run.run_id.startswith(wanted)]
    if len(fitting) != 1:
        ids = ", ".join(run.run_id for run in fitting or trace.runs)
        raise TraceError(
            f"{len(fitting)} runs have an id that begins with {wanted!r}; use one of: {ids}", path=trace.path
        )
    return fitting


# --- as JSON ----------------------------------------------------------------------------------------------------------


def document(run: RunView, family: Families, full: bool) -> dict[str, Any]:
    """Return one run, the runs that it started included."""
    times, usage = step_times(run), run.usage
    parent, step = parent_of(run)
    return {
        "run_id": run.run_id,
        "trace_id": run.trace_id,
        "parent_run_id": parent or None,
        "parent_step": step or None,
        "agent": run.agent,
        "models": models_of(run),
        "stop_reason": run.stop_reason,
        "started_at": started(run).isoformat(),
        "duration_s": run.duration_s,
        "turns": turns_of(run),
        "model_calls": len(run.chats),
        "usage": {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "cost_usd": usage.cost_usd,
            "unreported_calls": unreported(run),
        },
        "task": run.task,
        "final_output": final_output_of(run.steps, run.stop_reason),
        "steps": [{"turn": times.get(s.number, (0, 0))[0], "pretty": s.pretty(), **s.to_dict()} for s in run.steps],
        "notes": [{"turn": row.turn, "text": row.note} for row in rows_of(run) if row.step is None],
        "problems": missing_of(run),
        "waits_for": [request.to_dict() for request in waits_for(run)],
        "unfinished_calls": [{"tool": call.tool, "call_id": call.call_id} for call in run.unfinished_calls],
        **({"spans": [_span(run, node) for node in roots_of(run)]} if full else {}),
        "sub_runs": [document(sub, family, full) for sub in family.get(run.run_id, ())],
    }


def _span(run: RunView, node: SpanNode) -> dict[str, Any]:
    return {
        "name": node.name,
        "span_id": node.span_id,
        "duration_s": node.duration_s,
        "is_error": node.is_error,
        "synthetic": node.synthetic,
        "attributes": node.attributes,
        "events": [{"name": event.name, "attributes": event.attributes} for event in node.events],
        "children": [_span(run, child) for child in children_in(run, node)],
    }


# --- as text ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One line for a terminal, without control characters; the style is rich's."""

    text: str
    style: str = ""


def page(run: RunView, family: Families, full: bool, width: int) -> Iterator[Line]:
    """Yield the lines about one run and, indented, those about the runs that it started."""
    yield from header(run, width)
    yield from task_lines(run, width)
    yield Line("")
    yield from table(rows_of(run), width)
    for request in waits_for(run):
        call = f"{request.tool}({summarize_args(request.args)})"
        words = f"waits for {call} (#{request.step}, {request.call_id}): {request.description}"
        yield Line(one_line(f"{words} [{', '.join(request.options)}]"), "yellow")
    if full:
        yield from span_tree(run)
        yield from conversation(run)
    yield from (Line(one_line(f"problem: {words}"), "yellow") for words in missing_of(run))
    yield Line("")
    for sub in family.get(run.run_id, ()):
        _, step = parent_of(sub)
        yield Line(f"{INDENT}sub-run" + (f" of step #{step}" if step else ""), "bold")
        for line in page(sub, family, full, max(width - len(INDENT), LEAST_WIDTH)):
            yield replace(line, text=INDENT + line.text if line.text else "")


def header(run: RunView, width: int) -> Iterator[Line]:
    """Yield who ran, how it ended, and what it took."""
    models, usage = models_of(run), run.usage
    limit = run.last.attributes.get(semconv.BUDGET_EXHAUSTED)
    why = f" ({limit})" if limit else ""
    why += f" — {run.last.record.status_message}" if run.last.record.status_message else ""
    numbers = {"turn": turns_of(run), "step": len(run.steps), "model call": len(run.chats)}
    counts = ", ".join(f"{number} {noun}" + "s" * (number != 1) for noun, number in numbers.items())
    at_least = "at least " if run.stop_reason == INTERRUPTED else ""
    facts = {
        "agent": run.agent or "(no name)",
        "run": run.run_id,
        "trace": run.trace_id,
        "ended": run.stop_reason + why,
        "took": f"{at_least}{duration(run.duration_s)}, from {started(run):%Y-%m-%d %H:%M:%S} UTC",
        "did": counts + (f" ({', '.join(models)})" if models else ""),
        "tokens": _tokens(run),
        "cost": "unknown" if usage.cost_usd is None else f"{usage.cost_usd:.6f} USD",
    }
    for name, value in facts.items():
        yield Line(shorten(f"{name:<8}{value}", width), "bold" if name == "agent" else "")


def _tokens(run: RunView) -> str:
    silent, calls = unreported(run), len(run.chats)
    if calls and silent == calls:
        return "not reported"
    told = f"{run.usage.input_tokens} in, {run.usage.output_tokens} out"
    told += f" ({silent} of {calls} calls reported none)" if silent else ""
    totals = [run.last.attributes.get(name, 0) for name in (semconv.TOTAL_INPUT_TOKENS, semconv.TOTAL_OUTPUT_TOKENS)]
    if all(isinstance(n, int) for n in totals) and totals > [run.usage.input_tokens, run.usage.output_tokens]:
        told += f"; with sub-runs {totals[0]} in, {totals[1]} out"
    return told


def task_lines(run: RunView, width: int) -> Iterator[Line]:
    """Yield the task; a long one is cut."""
    said = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in run.task.items()]
    raw = [one_line(line) for text in said for line in text.splitlines()]
    lines = [line for text in raw for line in textwrap.wrap(text, width - 8)] or ["(not told)"]
    for number, line in enumerate(lines[:MAX_TASK_LINES]):
        yield Line(f"{'' if number else 'task':<8}{line}")
    if lines[MAX_TASK_LINES:]:
        yield Line(f"{'':<8}... ({len(lines) - MAX_TASK_LINES} more lines)", "dim")


def table(rows: Sequence[Row], width: int) -> Iterator[Line]:
    """Yield the steps by turn, with what hooks and replies added to them."""
    calls = [len(_call(row.step)) for row in rows if row.step is not None]
    room = max(4, min(max(calls, default=0), MAX_CALL))
    rest = width - room - 26
    yield Line(f"{'turn':>4}  {'step':>5}   {'call':<{room}}  {'result':<{rest}}  {'took':>8}", "dim")
    before = None
    for row in rows:
        turn = "" if row.turn == before or not row.turn else str(row.turn)
        before = row.turn
        if row.step is None:
            yield Line(shorten(f"{turn:>4}  {'':>5} · {row.note}", width), "red" if row.is_bad else "dim")
            continue
        failed = row.step.tool_result.error is not None
        took = duration(row.step.tool_result.duration_ms / 1000) if row.step.tool_result.duration_ms else "-"
        number = f"{turn:>4}  {'#' + str(row.step.number):>5} {'✗' if failed else '✓'}"
        call, tail = shorten(_call(row.step), room), shorten(_tail(row.step), rest)
        yield Line(f"{number} {call:<{room}}  {tail:<{rest}}  {took:>8}", "red" if failed else "")


def _call(step: Step) -> str:
    return f"{step.tool_result.tool}({step.tool_result.args_summary})"


def _tail(step: Step) -> str:
    """Return what `Step.pretty` says about the result."""
    timeless = replace(step, tool_result=replace(step.tool_result, duration_ms=0.0))
    return timeless.pretty().partition(_call(step))[2].removeprefix(" → ")


def span_tree(run: RunView) -> Iterator[Line]:
    """Yield every span of the run with its duration."""
    yield Line("")
    yield Line("spans", "bold")
    stack = [(node, 1) for node in reversed(roots_of(run))]
    while stack:
        node, depth = stack.pop()
        remarks = ([reason_of(node)] if node.is_error else []) + (["(inferred)"] if node.synthetic else [])
        name = shorten("  " * depth + node.name, 56)
        text = f"{name:<56} {duration(node.duration_s):>9}  {' '.join(remarks)}"
        yield Line(one_line(text), "red" if node.is_error else "")
        stack += [(child, depth + 1) for child in reversed(children_in(run, node))]


def conversation(run: RunView) -> Iterator[Line]:
    """Yield what was new in each request, and the last answer."""
    for number, chat in enumerate(run.chats, 1):
        yield Line("")
        yield Line(one_line(f"turn {chat.turn_number or number}, sent to {chat.name.removeprefix('chat ')}"), "bold")
        yield from _messages(run.new_messages(chat), chat.attributes.get(semconv.INPUT_FIRST, 0))
    if run.chats:
        yield Line("")
        yield Line("the last answer", "bold")
        yield from _messages(run.answer(run.chats[-1]), 0)
        yield Line("")


def _messages(messages: Sequence[Message], first: int) -> Iterator[Line]:
    text = render(messages, first)
    for line in text.splitlines() or ["(nothing new)"]:
        yield Line("  " + one_line(line.expandtabs(4)))


def duration(seconds: float) -> str:
    """Return a duration in three digits and a unit."""
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < size * 999.5:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def shorten(text: str, width: int) -> str:
    """Return one line of at most `width` characters."""
    line = one_line(text)
    return line if len(line) <= width else line[: width - 1] + "…"


def _width() -> int:
    if not sys.stdout.isatty():
        return WIDTH
    from shutil import get_terminal_size

    return max(get_terminal_size().columns, LEAST_WIDTH)


def _print(lines: Sequence[Line]) -> None:
    texts = [line.text.rstrip() for line in lines]
    if not sys.stdout.isatty():
        click.echo("\n".join(texts).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for text, line in zip(texts, lines, strict=True):
        console.print(Text(text, line.style), soft_wrap=True)

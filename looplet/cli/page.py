"""A run as text: who ran and how it ended, the task, the steps by turn, what it came to."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from looplet.cli import one_line
from looplet.cli.runs import (
    Row,
    answer_of,
    children_in,
    missing_of,
    models_of,
    parent_of,
    reason_of,
    roots_of,
    rows_of,
    started,
    turns_of,
    unpriced,
    unreported,
)
from looplet.messages import Message
from looplet.prompt import render
from looplet.resume import waits_for
from looplet.telemetry import semconv
from looplet.telemetry.runs import INTERRUPTED, RunView
from looplet.types import Step, summarize_args

Families: TypeAlias = Mapping[str, Sequence[RunView]]

LEAST_WIDTH: Final = 60
MAX_CALL: Final = 48
CALL_SHARE: Final = 0.6
"""how much of a row calls may take from results that need the room"""
MAX_TASK_LINES: Final = 12
LABEL: Final = 8
"""the width of `agent`, `run`, ... before what they say"""
COLUMN: Final = 14
"""where calls begin in a row, and what is said below it"""
TIME: Final = 12
"""the width of the last column, with the gaps before it and before the one in front of it"""
INDENT: Final = "    "
"""of a sub-run"""


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
    if answer := answer_of(run):
        yield Line("")
        yield Line(shorten(f"{'answer':<{LABEL}}{answer}", width), "bold")
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
    models = models_of(run)
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
        "cost": _cost(run),
    }
    for name, value in facts.items():
        for number, text in enumerate(wrapped(value, width - LABEL) or [""]):
            yield Line(f"{'' if number else name:<{LABEL}}{text}", "bold" if name == "agent" else "")


def _tokens(run: RunView) -> str:
    silent, calls = unreported(run), len(run.chats)
    if calls and silent == calls:
        return "not reported"
    words = f"{run.usage.input_tokens} in, {run.usage.output_tokens} out"
    words += f" ({silent} of {calls} calls reported none)" if silent else ""
    totals = [run.last.attributes.get(name, 0) for name in (semconv.TOTAL_INPUT_TOKENS, semconv.TOTAL_OUTPUT_TOKENS)]
    if all(isinstance(n, int) for n in totals) and totals > [run.usage.input_tokens, run.usage.output_tokens]:
        words += f"; with sub-runs {totals[0]} in, {totals[1]} out"
    return words


def _cost(run: RunView) -> str:
    cost, unknown, calls = run.usage.cost_usd, unpriced(run), len(run.chats)
    words = "unknown" if cost is None else f"{cost:.6f} USD"
    words += f" ({unknown} of {calls} calls have no price)" if cost is not None and unknown else ""
    total = run.last.attributes.get(semconv.TOTAL_COST_USD)
    if isinstance(total, (int, float)) and total > (cost or 0):
        words += f"; with sub-runs {total:.6f} USD"
    return words


def task_lines(run: RunView, width: int) -> Iterator[Line]:
    """Yield the task; a long one is cut."""
    said = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in run.task.items()]
    lines = [line for text in said for line in wrapped(text, width - LABEL)] or ["(not told)"]
    for number, line in enumerate(lines[:MAX_TASK_LINES]):
        yield Line(f"{'' if number else 'task':<{LABEL}}{line}")
    if lines[MAX_TASK_LINES:]:
        yield Line(f"{'':<{LABEL}}... ({len(lines) - MAX_TASK_LINES} more lines)", "dim")


def table(rows: Sequence[Row], width: int) -> Iterator[Line]:
    """Yield the steps by turn, with what hooks and replies added to them; errors in full."""
    steps = [row.step for row in rows if row.step is not None]
    call_width, result_width = _columns(
        [len(_call(step)) for step in steps], [len(_tail(step)) for step in steps], width
    )
    yield Line(f"{'turn':>4}  {'step':>5}   {'call':<{call_width}}  {'result':<{result_width}}  {'took':>8}", "dim")
    before = None
    for row in rows:
        turn = "" if row.turn == before or not row.turn else str(row.turn)
        before = row.turn
        if row.step is None:
            yield from _note(row, turn, width)
            continue
        yield from _step(row.step, turn, call_width, result_width)


def _step(step: Step, turn: str, call_width: int, result_width: int) -> Iterator[Line]:
    result, tail = step.tool_result, _tail(step)
    failed = result.error is not None
    below = tail.partition(": ")[2] if failed and ("\n" in tail or len(tail) > result_width) else ""
    tail = "ERROR" if below else tail
    took = duration(result.duration_ms / 1000) if result.duration_ms else "-"
    number, style = f"{turn:>4}  {'#' + str(step.number):>5} {'✗' if failed else '✓'}", "red" if failed else ""
    call, tail = shorten(_call(step), call_width), shorten(tail, result_width)
    yield Line(f"{number} {call:<{call_width}}  {tail:<{result_width}}  {took:>8}", style)
    below = "\n".join(filter(None, (below, _raised_at(step))))
    yield from (Line(" " * COLUMN + text, style) for text in wrapped(below, call_width + result_width + TIME))


def _columns(calls: Sequence[int], results: Sequence[int], width: int) -> tuple[int, int]:
    """Return the widths of the two columns that share what the others leave."""
    both = width - COLUMN - TIME
    call_width = max(both - max(results, default=0), int(both * CALL_SHARE))
    call_width = max(4, min(call_width, MAX_CALL, max(calls, default=0)))
    return call_width, both - call_width


def _note(row: Row, turn: str, width: int) -> Iterator[Line]:
    style = "red" if row.is_bad else "dim"
    for number, text in enumerate(wrapped(row.note, width - COLUMN)):
        lead = " " * COLUMN if number else f"{turn:>4}  {'':>5} · "
        yield Line(lead + text, style)


def _call(step: Step) -> str:
    return f"{step.tool_result.tool}({step.tool_result.args_summary})"


def _tail(step: Step) -> str:
    """Return what `Step.pretty` says about the result; of an error, all of it."""
    if step.tool_result.error is not None:
        return f"ERROR: {step.tool_result.error}"
    timeless = replace(step, tool_result=replace(step.tool_result, duration_ms=0.0))
    return timeless.pretty().partition(_call(step))[2].removeprefix(" → ")


def _raised_at(step: Step) -> str:
    """Return which line of the tool raised, if one did."""
    detail = step.tool_result.error_detail
    at = detail.context.get("at") if detail is not None else None
    return f"at {at}" if at else ""


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
    """Yield what was new in each request, and the last answer.

    Messages that a pause kept are in the log, and no request was the first to send them.
    """
    shown = 0
    for number, chat in enumerate(run.chats, 1):
        yield Line("")
        yield Line(one_line(f"turn {chat.turn_number or number}, sent to {chat.name.removeprefix('chat ')}"), "bold")
        new, first = run.new_messages(chat), chat.attributes.get(semconv.INPUT_FIRST, 0)
        kept = [run.message_log[place] for place in range(shown, first) if place in run.message_log]
        yield from _messages([*kept, *new], first - len(kept))
        shown = max(shown, first + len(new))
    if run.chats:
        yield Line("")
        yield Line("the last answer", "bold")
        yield from _messages(run.answer(run.chats[-1]), 0)
        yield Line("")


def _messages(messages: Sequence[Message], first: int) -> Iterator[Line]:
    text = render(messages, first)
    for line in text.splitlines() or ["(nothing new)"]:
        yield Line("  " + one_line(line.expandtabs(4)))


def wrapped(text: str, width: int) -> list[str]:
    """Return all of a text in lines of at most `width` characters; its own line breaks stay."""
    lines = (one_line(line.expandtabs(4)) for line in text.splitlines())
    return [part for line in lines for part in textwrap.wrap(line, width, break_on_hyphens=False)]


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

"""`looplet show`: what happened in the runs of a trace, for people and, with `--json`, for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from looplet.boundary import Boundary
from looplet.cli import Command, one_line
from looplet.cli.page import LEAST_WIDTH, Families, Line, page
from looplet.cli.runs import (
    children_in,
    families,
    missing_of,
    models_of,
    parent_of,
    roots_of,
    rows_of,
    started,
    step_times,
    turns_of,
    unreported,
)
from looplet.errors import TraceError
from looplet.resume import waits_for
from looplet.scope import final_output_of
from looplet.telemetry.reader import TRACE_FILE, SpanNode, Trace
from looplet.telemetry.runs import RunView

WIDTH: Final = 100
"""of what is piped"""
NAMED_TRACES: Final = 3
"""how many traces further down an error names"""

EPILOG: Final = """
\b
Examples:
  looplet show traces/run_1              how it ended, what it did, its cost
  looplet show traces/run_1 --full       every span, and every message once
  looplet show traces/run_1 --run 4f3a   one run of several in the file
  looplet show traces/run_1 --json       for programs
\b
✓ is a call that worked, ✗ one that failed or was refused, · what hooks,
retries and compactions did.  The runs of sub-agents are indented.
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
        found = {"path": trace.path, "problems": problems, "runs": [document(run, family, full) for run in runs]}
        click.echo(json.dumps(Boundary().clean(found), indent=2, allow_nan=False))
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


# --- as text ---------------------------------------------------------------------------------------------------------


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

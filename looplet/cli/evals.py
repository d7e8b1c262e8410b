"""`looplet eval`: score the runs in traces with `eval_*` functions and say whether they are good enough.

The command fails closed: whatever could not be read, found or scored is a problem, and a problem is never a pass.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

import click

from looplet.approval import WAITING
from looplet.boundary import Boundary
from looplet.cli import one_line
from looplet.errors import ConfigError, TraceError
from looplet.evals.runner import EvalRow, Evaluator, eval_discover, eval_files, eval_run_batch
from looplet.evals.score import DEFAULT_THRESHOLD

if TYPE_CHECKING:
    from rich.table import Table

EPILOG: Final = """
\b
An evaluator is a function of a run; write some into eval_my_agent.py:
\b
  from looplet import eval_mark
\b
  def eval_has_answer(ctx):
      return "answer" in ctx.final_output          # True or False
\b
  @eval_mark("budget")                             # --include budget
  def eval_few_steps(ctx):
      return min(1.0, 5 / max(1, ctx.step_count))  # a score in 0..1
\b
  @eval_mark(required=False)                       # shown, decides nothing
  def eval_no_errors(ctx):
      return not ctx.errors
\b
ctx has steps, task, final_output, stop_reason, completed, tool_sequence,
errors, step_count, artifacts, session_log_text and metadata.
\b
Examples:
  looplet eval traces/
  looplet eval traces/ --evals eval_my_agent.py --threshold 0.7 -v
  looplet eval traces/run_1/trace.jsonl --include budget --json
\b
Exit code: 0 every required evaluator passed in every run; 1 one did not, or
something could not be read, found or scored; 2 wrong usage.
"""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What the user asked for."""

    threshold: float = DEFAULT_THRESHOLD
    mean: bool = False
    """compare each evaluator's average with the threshold instead of each of its scores"""
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    judge_llm: Any = None


@dataclass(frozen=True, slots=True)
class Report:
    """What all evaluators said about all runs."""

    options: EvalOptions
    runs: int
    rows: Sequence[EvalRow]
    problems: Sequence[str]
    """what could not be read, found or scored; none of it may pass"""

    @property
    def passed(self) -> bool:
        """Tell whether there was no problem and every required evaluator, at least one, has passed."""
        required = [row for row in self.rows if row["required"]]
        return not self.problems and bool(required) and all(row["passed"] for row in required)

    @property
    def overall(self) -> float | None:
        """The mean of the evaluators' averages, None when nothing was scored."""
        averages = [row["avg_score"] for row in self.rows if row["avg_score"] is not None]
        return fmean(averages) if averages else None

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        document: dict[str, Any] = Boundary().clean(
            {
                "passed": self.passed,
                "threshold": self.options.threshold,
                "mean": self.options.mean,
                "overall": self.overall,
                "runs": self.runs,
                "evals": list(self.rows),
                "problems": list(self.problems),
            }
        )
        return document


def run_evals(
    contexts: Sequence[tuple[str, Any]],
    problems: Iterable[str],
    evaluators: Sequence[Evaluator],
    options: EvalOptions,
) -> Report:
    """Score every run with every chosen evaluator; `problems` are those that loading had.

    Raises ConfigError for an `include` tag that no evaluator has.
    """
    found = list(problems)
    if not found and not contexts:
        found.append("no run found: name a trace file, the folder of a run or a folder above it")
    if not found and not evaluators:
        found.append("no evaluator found: write eval_* functions into eval_*.py, or name a file with --evals FILE")
    rows: list[EvalRow] = []
    if contexts and evaluators:
        rows = eval_run_batch(
            evaluators,
            contexts,
            judge_llm=options.judge_llm,
            include=options.include,
            exclude=options.exclude,
            threshold=options.threshold,
            mean=options.mean,
        )
        found += _problems_of(rows)
    return Report(options, len(contexts), rows, found)


def _problems_of(rows: Sequence[EvalRow]) -> list[str]:
    if not rows:
        return ["no evaluator is left after --include and --exclude: leave one of them out"]
    required = [row for row in rows if row["required"]]
    if not required:
        return ["every evaluator is marked required=False, so nothing decides: leave that out on one of them"]
    return [f"{row['name']}: {error}" for row in required for error in row["errors"]]


@click.command("eval", epilog=EPILOG, short_help="Score traces with eval_* functions.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--evals",
    "files",
    multiple=True,
    metavar="FILE|DIR",
    type=click.Path(exists=True, path_type=Path),
    help="Where the evaluators are; may be repeated.  [default: eval_*.py in the current folder]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=DEFAULT_THRESHOLD,
    show_default=True,
    callback=lambda _context, _option, value: _number(value),
    help="The least score that passes.",
)
@click.option("--mean", is_flag=True, help="Compare each evaluator's average over the runs, not every single score.")
@click.option("--include", multiple=True, metavar="TAG", help="Only evaluators with this tag; may be repeated.")
@click.option("--exclude", multiple=True, metavar="TAG", help="No evaluators with this tag; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-v", "--verbose", is_flag=True, help="Print the score and the explanation of every run.")
def eval_command(
    paths: tuple[Path, ...],
    files: tuple[Path, ...],
    threshold: float,
    mean: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Score the runs in traces with eval_* functions.

    PATH is a trace file, the folder of a run, or any folder above; every run in every trace counts.  The command
    succeeds when every required evaluator gives every run at least the threshold.
    """
    with redirect_stdout(sys.stderr):  # what evaluators print is no result
        evaluators, problems = load_evaluators(files or (Path(),))
        contexts, unread = load_runs(paths)
        try:
            report = run_evals(contexts, problems + unread, evaluators, EvalOptions(threshold, mean, include, exclude))
        except ConfigError as error:
            _tell(problems + unread, ())
            raise click.UsageError(str(error)) from None
    for label, ctx in contexts:
        if ctx.stop_reason == WAITING:
            words = f"note: {label} is not finished, it waits for an approval: `looplet show` says for what"
            click.echo(one_line(words), err=True)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        _print(report, verbose)
        _tell(report.problems, report.rows)
    sys.exit(0 if report.passed else 1)


def load_evaluators(paths: Sequence[Path]) -> tuple[list[Evaluator], list[str]]:
    """Return the evaluators in files and folders, each file once, and a problem for every one that gives none."""
    evaluators: list[Evaluator] = []
    problems: list[str] = []
    files: dict[Path, Path] = {}
    for path in paths:
        here = eval_files(path)
        files.update({file.resolve(): file for file in here})
        if not here:
            problems.append(f"no eval_*.py in {str(path.resolve())!r}: write one, or name a file with --evals FILE")
    for file in files.values():
        try:
            found = eval_discover(file)
        except ConfigError as error:
            problems.append(str(error))
            continue
        evaluators += found
        if not found:
            problems.append(f"no evaluator in {str(file)!r}: define a function whose name begins with eval_")
    return evaluators, problems


def load_runs(paths: Sequence[Path]) -> tuple[list[tuple[str, Any]], list[str]]:
    """Return a label and a context for every run below the paths, and a problem for every trace that is unreadable."""
    contexts: list[tuple[str, Any]] = []
    problems: list[str] = []
    for path in paths:
        found, unread = _load_below(path)
        contexts += [(label if len(paths) == 1 else _in(path, label), ctx) for label, ctx in found]
        problems += unread
        if not found and not unread:
            problems.append(f"no run found in {str(path)!r}: name a trace file, the folder of a run or a folder above")
    return contexts, problems


def _load_below(path: Path) -> tuple[list[tuple[str, Any]], list[str]]:
    """Load a path as a whole or, when a trace in it is unreadable, part by part, so that the others still count."""
    from looplet.evals.context import load_contexts

    try:
        return load_contexts(path), []
    except TraceError as error:
        failure = str(error)
    contexts: list[tuple[str, Any]] = []
    problems: list[str] = []
    parts = sorted(path.iterdir()) if path.is_dir() else []
    for part in parts:
        if part.is_dir() or part.match("trace*.jsonl"):
            found, unread = _load_below(part)
            contexts += [(_below(part, label), ctx) for label, ctx in found]
            problems += unread
    return contexts, problems or [failure]


def _in(path: Path, label: str) -> str:
    """Return a label that tells which of several paths a run is in."""
    return f"{path.parent / label}" if path.is_file() else f"{path / label}"


def _below(part: Path, label: str) -> str:
    return label if part.is_file() or label.startswith(f"{part.name}/") else f"{part.name}/{label}"


def _number(value: float) -> float:
    if math.isnan(value):
        raise click.BadParameter("nan is not in the range 0<=x<=1.")
    return value


# --- for people -------------------------------------------------------------------------------------------------------


def _print(report: Report, verbose: bool) -> None:
    if report.rows:
        click.echo(f"Found {_count(len(report.rows), 'eval')}, {_count(report.runs, 'run')}\n")
    if report.rows and sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(report.rows))
        _echo_lines(line for row in report.rows for line in _titled(row, details(row, report.options, verbose)))
    else:
        width = max((len(row["name"]) for row in report.rows), default=0)
        for row in report.rows:
            click.echo(f"  {_mark(row)} {row['name']:<{width}}  {_scores(row)}")
            _echo_lines(details(row, report.options, verbose))
    _echo_lines(("", *closing(report)))


def closing(report: Report) -> list[str]:
    """Return the last two lines: the overall score and the verdict."""
    overall = "no scores" if report.overall is None else f"{report.overall:.2f}"
    counts = f"({_count(len(report.rows), 'eval')}, {_count(report.runs, 'run')})"
    kind = " (mean)" if report.options.mean else ""
    verdict = "PASS" if report.passed else "FAIL"
    return [f"  overall: {overall} {counts}", f"  threshold: {report.options.threshold:.2f}{kind} → {verdict}"]


def details(row: EvalRow, options: EvalOptions, verbose: bool) -> list[str]:
    """Return a line for every run, or, when not verbose, for every run that is scored and below the threshold."""
    runs = row["per_run"]
    if not verbose:
        runs = [] if options.mean else [run for run in runs if run["score"] is not None and not run["passed"]]
    return [f"      {run['run']}: {_words(run)}" for run in runs]


def table(rows: Sequence[EvalRow]) -> Table:
    """Return the rows as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    result = Table("", "eval", *(f"{kind} score" for kind in ("avg", "min", "max")), "runs")
    for row in rows:
        scores = (row["avg_score"], row["min_score"], row["max_score"])
        style = "green" if row["passed"] else "red" if row["required"] else "yellow"
        cells = [_mark(row), row["name"], *("-" if s is None else f"{s:.2f}" for s in scores), str(row["runs"])]
        result.add_row(*(Text(cell) for cell in cells), style=style)
    return result


def _titled(row: EvalRow, lines: list[str]) -> list[str]:
    return [f"  {row['name']}", *lines] if lines else []


def _scores(row: EvalRow) -> str:
    runs = _count(row["runs"], "run") + ("" if row["required"] else ", not required")
    if row["avg_score"] is None:
        return f"(no scores)  ({runs})"
    return f"avg={row['avg_score']:.2f}  min={row['min_score']:.2f}  max={row['max_score']:.2f}  ({runs})"


def _mark(row: EvalRow) -> str:
    return "✓" if row["passed"] else "✗" if row["required"] else "-"


def _words(run: dict[str, Any]) -> str:
    score = [] if run["score"] is None else [f"{run['score']:.4g}"]
    words = [str(run[key]) for key in ("label", "explanation") if run[key]]
    return one_line("  ".join(score + words) or "no score")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _echo_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _tell(problems: Sequence[str], rows: Sequence[EvalRow]) -> None:
    """Print problems, and the errors of evaluators that decide nothing, on stderr."""
    for problem in problems:
        click.echo(one_line(f"problem: {problem}"), err=True)
    for row in rows:
        for error in () if row["required"] else row["errors"]:
            click.echo(one_line(f"note: {row['name']}: {error}"), err=True)

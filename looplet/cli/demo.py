"""`looplet demo`: the Dependency Doctor at work on a real folder, scored from the trace that it leaves."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click

from looplet.cli import Command, one_line
from looplet.errors import ConfigError, TraceError

if TYPE_CHECKING:
    from looplet.evals.score import EvalResult
    from looplet.examples.dep_doctor.report import Findings
    from looplet.run import Run
    from looplet.telemetry.provenance import ProvenanceSink

WIDTH: Final = 100
EVALS: Final = Path(__file__).resolve().parent.parent / "examples" / "dep_doctor" / "eval_dep_doctor.py"
STYLES: Final = {"✓": "green", "✗": "red"}

Say: TypeAlias = Callable[..., None]

EPILOG: Final = """
\b
Examples:
  looplet demo                      the current folder, without a network
  looplet demo ~/code/project --scripted
  OPENAI_BASE_URL=http://127.0.0.1:11434/v1 OPENAI_API_KEY=ollama \\
    OPENAI_MODEL=llama3.1 looplet demo ~/code/project
\b
Exit code: 0 the audit is done, whatever the grades; 1 it did not get to its
end, or an eval failed; 2 wrong usage.
"""


@click.command("demo", cls=Command, epilog=EPILOG, short_help="Audit the dependencies of a project, step by step.")
@click.argument("path", default=".", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--scripted", is_flag=True, help="Let rules decide each call, even when an endpoint is set.")
@click.option("--max-steps", type=click.IntRange(1), default=None, help="Tool calls at most.  [default: 100]")
@click.option(
    "--trace-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the trace goes.  [default: traces/<time>-<id>]",
)
@click.option(
    "--advisories",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of OSV files, in place of the shipped snapshot.",
)
@click.option("--online", is_flag=True, help="Ask the package index and OSV over the network, too.")
@click.option("--no-installed", is_flag=True, help="Take no hints from the packages of this interpreter.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; the rest goes to stderr.")
def demo_command(
    path: Path,
    scripted: bool,
    max_steps: int | None,
    trace_dir: Path | None,
    advisories: Path | None,
    online: bool,
    no_installed: bool,
    as_json: bool,
) -> None:
    """Run the Dependency Doctor over the project folder PATH (the current folder).

    It reads the dependency files, checks them for security, licence and maintenance risks and writes a report card.
    The model of OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL decides each call; without one, rules do.
    """
    from looplet.examples.dep_doctor.agent import MAX_STEPS, make_run
    from looplet.examples.dep_doctor.project import Project
    from looplet.examples.dep_doctor.report import Findings
    from looplet.telemetry.provenance import ProvenanceSink

    say = partial(_say, err=as_json)
    llm, who = choose_backend(scripted)
    project = Project(path, advisories_dir=advisories, online=online, use_installed=not no_installed)
    findings, sink = Findings(), ProvenanceSink(trace_dir or new_trace_dir())
    run = make_run(project, llm, findings=findings, hooks=[sink], max_steps=max_steps or MAX_STEPS)
    make_folder(sink.dir)
    say(_wrapped(f"Dependency Doctor looks at {project.path}"))
    say(_wrapped(who) + "\n")
    with llm if hasattr(llm, "__exit__") else nullcontext():
        perform(run, sink, say)
    audit = Audit(run, findings, sink, *score(sink, run.run_id))
    tell(audit, say)
    if as_json:
        click.echo(json.dumps(audit.to_dict(), indent=2))
    sys.exit(0 if audit.passed else 1)


@dataclass(frozen=True, slots=True)
class Audit:
    """An audit that has ended, one way or another."""

    run: Run
    findings: Findings
    sink: ProvenanceSink
    evals: Sequence[EvalResult]
    problem: str
    """why the trace could not be scored, empty otherwise"""

    @property
    def passed(self) -> bool:
        """Tell whether the audit got to its end and every eval passed."""
        completed = self.run.stop_reason == "done" and self.findings.card is not None
        return completed and not self.problem and all(result.passed for result in self.evals)

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        card = self.findings.card
        return {
            "passed": self.passed,
            "stop_reason": self.run.stop_reason,
            "steps": len(self.run.state.steps),
            "run_id": self.run.run_id,
            "trace_id": self.run.trace_id,
            "trace": str(self.sink.path),
            "card": card.to_dict() if card is not None else None,
            "evals": [result.to_dict() for result in self.evals],
            "problems": [self.problem] if self.problem else [],
        }


def perform(run: Run, sink: ProvenanceSink, say: Say) -> None:
    """Run the audit, printing each step as it happens."""
    try:
        with run:
            for step in run:
                say(cut(step.pretty()), style="red" if step.tool_result.error is not None else None)
    except KeyboardInterrupt:
        say("\n" + _wrapped(f"The trace so far: {sink.path}"))
        raise


def score(sink: ProvenanceSink, run_id: str) -> tuple[list[EvalResult], str]:
    """Return what the evals say about the trace file, and why they cannot when they cannot."""
    from looplet.evals.context import EvalContext
    from looplet.evals.runner import eval_discover, eval_run

    try:
        return eval_run(eval_discover(EVALS), EvalContext.from_trace(sink.flush(), run_id)), ""
    except TraceError as error:
        return [], str(error)


def choose_backend(scripted: bool) -> tuple[Any, str]:
    """Return what decides the calls, and a line that says so.  Raises ConfigError for settings that cannot work."""
    from looplet.examples.dep_doctor.policy import rule_based_backend

    if scripted:
        return rule_based_backend(), "--scripted: a rule-based policy decides each call"
    given = [name for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL") if os.environ.get(name)]
    if not given:
        return rule_based_backend(), "no OPENAI_* endpoint is set: a rule-based policy decides each call"
    if "OPENAI_MODEL" not in given:
        why = f"{' and '.join(given)} set, but no OPENAI_MODEL: a rule-based policy decides each call"
        return rule_based_backend(), why
    if given == ["OPENAI_MODEL"]:
        why = "OPENAI_MODEL set, but no OPENAI_BASE_URL or OPENAI_API_KEY: a rule-based policy decides each call"
        return rule_based_backend(), why
    from looplet.backends.openai import OpenAIBackend

    where = os.environ.get("OPENAI_BASE_URL") or "the API's own address"
    return OpenAIBackend.from_env(), f"the model {os.environ['OPENAI_MODEL']} at {where} decides each call"


def new_trace_dir() -> Path:
    """Return the default folder of a trace: `traces/20260131-235959-a1b2c3`."""
    return Path("traces") / f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def make_folder(folder: Path) -> None:
    """Make the folder of the trace; raises ConfigError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the trace cannot be written to {str(folder)!r} ({error.strerror}): name another folder with --trace-dir"
        ) from error


# --- for people -------------------------------------------------------------------------------------------------------


def tell(audit: Audit, say: Say) -> None:
    """Print the report card, the scores, where the trace is, and what to do with it."""
    card = audit.findings.card
    if card is not None:
        say("\n" + "\n".join(one_line(line) for line in card.to_text().splitlines()))
    else:
        say("\n" + _wrapped(f"No report was written: the run ended with {audit.run.stop_reason}."))
    if audit.run.stop_reason == "llm_error":
        say("The model could not be asked; with --scripted, none is needed.")
    say("\nScored from the trace file:")
    for result in audit.evals:
        mark = "✓" if result.passed else "✗"
        points = "   -" if result.score is None else f"{result.score:.2f}"
        say(cut(f"  {mark} {result.name:<33} {points}  {result.explanation}"), style=STYLES[mark])
    if audit.problem:
        say(_wrapped(f"  ✗ {audit.problem}"))
    steps = len(audit.run.state.steps)
    say("\n" + _wrapped(f"Trace: {audit.sink.path} ({steps} steps, {audit.run.stop_reason})") + "\n")
    say("\n".join(next_commands(audit.sink.dir)))


def next_commands(folder: Path) -> list[str]:
    """Return what to do with the trace."""
    from looplet.evals.runner import shown

    here, evals = shlex.quote(str(folder)), shlex.quote(shown(str(EVALS)))
    following = shlex.quote(str(folder.resolve().parent))
    one, two = f"  looplet eval {here}", f"--evals {evals} -v"
    return [
        "Next:",
        f"  looplet show {here}",
        *([f"{one} {two}"] if len(f"{one} {two}") <= WIDTH else [f"{one} \\", f"    {two}"]),
        "  Jaeger: upload trace.jsonl in its UI (Search → Upload); or, in a checkout of looplet,",
        f"    LOOPLET_TRACES={following} docker compose up",
        "  and open http://localhost:16686",
    ]


def cut(text: str) -> str:
    """Return one line that fits."""
    line = one_line(text)
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _wrapped(text: str) -> str:
    """Return text in lines that fit; paths stay whole."""
    return textwrap.fill(one_line(text), WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _say(text: str, *, err: bool, style: str | None = None) -> None:
    """Print at once; in colour on a terminal only."""
    stream = sys.stderr if err else sys.stdout
    if style is None or not stream.isatty():
        click.echo(text, err=err)
        return
    from rich.console import Console
    from rich.text import Text

    Console(file=stream).print(Text(text, style), soft_wrap=True)

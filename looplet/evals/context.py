"""`EvalContext`: what an evaluator sees of a run; the same live and read back from its trace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from looplet.errors import TraceError
from looplet.scope import final_output_of
from looplet.telemetry.reader import TRACE_FILE, Trace
from looplet.telemetry.runs import RunView
from looplet.types import Step


@dataclass
class EvalContext:
    """One run, ready to be judged."""

    steps: Sequence[Step]
    task: dict[str, Any] = field(default_factory=dict)
    final_output: dict[str, Any] = field(default_factory=dict)
    """the arguments of the accepted `done` call; `{}` without one"""
    session_log_text: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    stop_reason: str | None = None

    @property
    def completed(self) -> bool:
        """Tell whether the run ended with an accepted `done`."""
        return self.stop_reason == "done"

    @property
    def tool_sequence(self) -> list[str]:
        """Return the names of the tools called, in order."""
        return [step.tool_call.tool for step in self.steps]

    @property
    def errors(self) -> list[str]:
        """Return the errors of the steps that have one."""
        return [step.tool_result.error for step in self.steps if step.tool_result.error is not None]

    @property
    def step_count(self) -> int:
        """Return the number of steps."""
        return len(self.steps)

    @classmethod
    def from_run(cls, run: Any) -> EvalContext:
        """Return the context of a run in this process, ended or not."""
        steps = list(run.state.steps)
        return cls(
            steps,
            dict(run.task),
            final_output_of(steps, run.stop_reason),
            run.session_log_text,
            stop_reason=run.stop_reason,
        )

    @classmethod
    def from_view(cls, view: RunView) -> EvalContext:
        """Return the context of a run in a trace."""
        return cls(
            view.steps,
            view.task,
            final_output_of(view.steps, view.stop_reason),
            view.session_log_text,
            stop_reason=view.stop_reason,
        )

    @classmethod
    def from_trace(cls, path: str | os.PathLike[str], run_id: str | None = None) -> EvalContext:
        """Read a trace file or a run folder: its only top-level run, or the one with `run_id`.  Raises TraceError."""
        trace = Trace.load(path)
        wanted = [view for view in trace.runs if view.run_id == run_id or (run_id is None and _is_top_level(view))]
        if len(wanted) != 1:
            ids = ", ".join(view.run_id for view in trace.runs) or "none"
            raise TraceError(f"{len(wanted)} runs fit; pass run_id=, one of: {ids}", path=trace.path)
        return cls.from_view(wanted[0])

    @classmethod
    def from_trajectory_dir(cls, path: str | os.PathLike[str]) -> EvalContext:
        """Read a run folder: the trace inside it.  Raises TraceError."""
        return cls.from_trace(path)


def load_contexts(path: str | os.PathLike[str]) -> list[tuple[str, EvalContext]]:
    """Return a label and a context for every top-level run in every trace at or below `path`.  Raises TraceError."""
    where = Path(path)
    found = []
    for file in trace_files(where):
        name = str(file.relative_to(where)) if file != where else file.name
        views = [view for view in Trace.load(file).runs if _is_top_level(view)]
        for view in views:
            label = name if len(views) == 1 else f"{name}#{view.run_id[:8]}"
            found.append((label, EvalContext.from_view(view)))
    return found


def trace_files(path: Path) -> list[Path]:
    """Return the trace files at or below a path, sorted; a file is taken as it is."""
    if not path.is_dir():
        return [path]
    return sorted({*path.rglob(TRACE_FILE), *path.rglob("trace-*.jsonl")})


def _is_top_level(view: RunView) -> bool:
    """Tell whether the run is no sub-agent of another run."""
    return not any(node.run_id and node.run_id != view.run_id for node in view.root.ancestors())

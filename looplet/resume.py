"""`resume=`: a paused run, out of the live one or out of its trace file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looplet.approval import WAITING
from looplet.errors import ConfigError, TraceError
from looplet.message_log import MessageLog
from looplet.segments import Paused
from looplet.telemetry import semconv
from looplet.telemetry.reader import Trace
from looplet.telemetry.runs import RunView, decode

if TYPE_CHECKING:
    from looplet.telemetry.reader import SpanNode


def paused_of(resume: Any) -> Paused:
    """Return what `resume=` stands for: a `Run` that waits, its trace file, or its folder.

    Raises ConfigError for a run that does not wait, TraceError for a file that cannot be read.
    """
    if isinstance(resume, (str, os.PathLike)):
        return _from_file(resume)
    paused = getattr(resume, "paused", None)
    if isinstance(paused, Paused):
        return paused
    if hasattr(resume, "stop_reason"):
        raise ConfigError(_not_waiting(resume.stop_reason))
    raise ConfigError(f"resume takes a run, a trace file or a run folder, not {type(resume).__name__}")


def _not_waiting(reason: str | None) -> str:
    words = f"it ended with {reason!r}" if reason else "it has not ended"
    return f"only a run that waits for an approval can be resumed, and {words}"


def _from_file(path: str | os.PathLike[str]) -> Paused:
    trace = Trace.load(path)
    views = [view for view in trace.runs if view.is_ours and view.root.run_id == view.run_id]
    waiting = [view for view in views if view.stop_reason == WAITING]
    if not waiting:
        raise ConfigError(f"{trace.path}: " + _not_waiting(views[0].stop_reason if views else "no run in it"))
    if len(waiting) > 1:
        raise ConfigError(f"{trace.path}: {len(waiting)} runs wait; keep one of them in the file, or resume=run")
    return _of_view(waiting[0], Path(trace.path))


def _of_view(view: RunView, path: Path) -> Paused:
    end = _last_end(view)
    if end is None or semconv.PAUSE not in end.attributes:
        raise TraceError(
            "the run waits, but the file does not hold what it goes on with: its pre_prompt hooks rewrite requests "
            "(resume the run itself in its own process), or its content was not recorded",
            path=str(path),
        )
    record = decode(str(end.attributes[semconv.PAUSE]), str(path))
    requests = [int(n.attributes[semconv.INPUT_REQUEST]) for n in view.spans if semconv.INPUT_REQUEST in n.attributes]
    return Paused(
        view.run_id,
        int(view.trace_id, 16),
        int(view.segments[0].span_id, 16),
        int(view.segments[-1].span_id, 16),
        record,
        view.task,
        view.steps,
        view.request(end),
        MessageLog.restored(view.message_log, max(requests, default=-1) + 1),
        path,
    )


def _last_end(view: RunView) -> SpanNode | None:
    return next((node for node in reversed(view.spans) if node.name == semconv.END), None)

"""`resume=`: a paused run, out of the live one or out of its trace file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from looplet.approval import WAITING, ApprovalRequest
from looplet.approval_state import ALREADY_RESUMED
from looplet.config import LoopConfig
from looplet.errors import ConfigError, TraceError
from looplet.message_log import MessageLog
from looplet.pause import FORMAT, Pause, hash_calls
from looplet.segments import Paused
from looplet.telemetry import semconv
from looplet.telemetry.attributes import hash_arguments
from looplet.telemetry.otlp_file import require_lines
from looplet.telemetry.reader import SpanNode, Trace
from looplet.telemetry.runs import RunView
from looplet.telemetry.values import MAX_NUMBER, as_type, json_of
from looplet.types import ToolCall


def paused_of(resume: Any) -> Paused:
    """Return what `resume=` stands for: a `Run` that waits, its trace file or folder, or a `RunView` out of that.

    Raises ConfigError for a run that does not wait, TraceError for a file that cannot be read or gone on in.
    """
    if isinstance(resume, (str, os.PathLike)):
        return _of_view(_waiting_in(Trace.load(resume)))
    if isinstance(resume, RunView):
        return _of_view(resume)
    paused = resume if isinstance(resume, Paused) else getattr(resume, "paused", None)
    if isinstance(paused, Paused):
        return paused
    if hasattr(resume, "stop_reason"):
        raise ConfigError(_not_waiting(resume.stop_reason))
    raise ConfigError(f"resume takes a run, a trace file or a run folder, not {type(resume).__name__}")


def waits_for(view: RunView) -> list[ApprovalRequest]:
    """Return what a run in a trace waits for; nothing when it does not wait, or when the file does not tell.

    Raises TraceError.
    """
    if (end := _pause_of(view)) is None:
        return []
    record = as_type(end, semconv.PAUSE, json_of(end, semconv.PAUSE), dict[str, Any])
    return as_type(end, semconv.PAUSE, record.get("requests"), list[ApprovalRequest])


def _not_waiting(reason: str | None) -> str:
    words = f"it ended with {reason!r}" if reason else "it has not ended"
    return f"only a run that waits for an approval can be resumed, and {words}"


def _waiting_in(trace: Trace) -> RunView:
    """Return the run in a file that waits; sub-agents do not count, the run above has been told that they stopped."""
    views = [view for view in trace.runs if view.is_ours and semconv.PARENT_RUN_ID not in view.manifest]
    waiting = [view for view in views if _waits(view)]
    if not waiting:
        reason = views[0].stop_reason if views else "no run in it"
        raise ConfigError(f"{trace.path}: {_not_waiting(reason)}")
    if len(waiting) > 1:
        at = ", ".join(str(place) for place, view in enumerate(trace.runs) if view in waiting)
        words = f"{len(waiting)} runs wait; name one, resume=Trace.load(path).runs[n] with n one of {at}"
        raise ConfigError(f"{trace.path}: {words}")
    return waiting[0]


def _of_view(view: RunView) -> Paused:
    if not _waits(view):
        raise ConfigError(f"{view.path}: {_not_waiting(view.stop_reason)}")
    if (end := _pause_of(view)) is None:
        raise TraceError(
            "the run waits, but the file does not hold what it goes on with: its pre_prompt hooks rewrite requests "
            "(resume the run itself in its own process), or its content was not recorded",
            path=view.path,
        )
    require_lines(view.path)
    record = _record_of(end)
    _check_record(view, end, record)
    requests = [int(node.attributes[semconv.INPUT_REQUEST]) for node in view.own if _sends(node)]
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
        _call_ids(view),
        _config_of(end, record),
        Path(view.path),
    )


def _waits(view: RunView) -> bool:
    return view.is_ours and (view.stop_reason == WAITING or _pause_of(view) is not None)


def _pause_of(view: RunView) -> SpanNode | None:
    """Return the span with the pause record of a run's last segment, None when there is none."""
    ends = (node for node in view.last.children if node.name == semconv.END and semconv.PAUSE in node.attributes)
    return next(ends, None) if view.is_ours else None


def _record_of(end: SpanNode) -> Pause:
    record = as_type(end, semconv.PAUSE, json_of(end, semconv.PAUSE), dict[str, Any])
    if type(written := record.get("format", 1)) is int and written != FORMAT:
        age = "an older" if written < FORMAT else "a newer"
        raise end.problem(f"{age} looplet wrote this pause (format {written}, not {FORMAT}); resume with that looplet")
    return as_type(end, semconv.PAUSE, record, Pause)


def _check_record(view: RunView, end: SpanNode, record: Pause) -> None:
    """Refuse a record that does not say what a human was shown, or that the run has left behind."""
    if any(node.attributes.get(semconv.SEGMENT_NUMBER, 1) > record.segment for node in view.own):
        raise ConfigError(f"{view.path}: {ALREADY_RESUMED}")
    if not all(0 < number <= MAX_NUMBER for number in (record.turn, record.segment)):
        raise end.problem(f"{semconv.PAUSE} has turn {record.turn} and segment {record.segment}; both count from 1")
    for request in record.requests:
        if hash_arguments(ToolCall(request.tool, request.args)) != request.arguments_sha256:
            raise end.problem(_CHANGED.format(f"call {request.call_id!r} ({request.tool}) is not what was asked about"))
        made = [step.tool_call for step in view.steps] if request.has_run else record.held
        if not any((call.call_id, call.tool) == (request.call_id, request.tool) for call in made):
            raise end.problem(_CHANGED.format(f"there is no call {request.call_id!r} of {request.tool}"))
    if hash_calls(record.held) != record.held_sha256 or not record.requests:
        raise end.problem(_CHANGED.format("the calls of the last reply are not those with which the run paused"))


_CHANGED: Final = (
    "{}: the file was edited, or its sink redacts what is recorded (then resume the run itself, in its own process)"
)


def _config_of(end: SpanNode, record: Pause) -> LoopConfig:
    try:
        return record.settings.config()
    except ConfigError as error:
        raise end.problem(f"{semconv.PAUSE} holds settings that cannot be: {error}") from None


def _sends(node: SpanNode) -> bool:
    return semconv.INPUT_REQUEST in node.attributes


def _call_ids(view: RunView) -> list[str]:
    """Return the ids of all calls that the file tells of."""
    said = [*view.message_log.values(), *(message for chat in view.agent_chats for message in view.answer(chat))]
    parts = (part for message in said for part in message.parts)
    in_messages = (str(part["id"]) for part in parts if part["type"] in ("tool_call", "tool_call_response"))
    return list(dict.fromkeys((*in_messages, *(step.tool_call.call_id for step in view.steps))))

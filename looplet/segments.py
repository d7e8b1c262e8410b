"""Segments: how a run pauses, and how it goes on in this process or in another.

A run that waits for a human ends its segment with a record of what the next one needs (`PAUSE`), and with its
conversation as references over the message log.  The next segment has the same run id and the same trace; turns, steps
and the log go on counting.  The record is the same whether it comes from the live run or from its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opentelemetry.trace import Link

from looplet.approval import ApprovalRequest, Verdict, Verdicts, verdicts_of
from looplet.message_log import MessageLog
from looplet.messages import Message
from looplet.scope import RunScope, note_state
from looplet.state import LogEntry, SessionLog
from looplet.types import Step, ToolCall, Usage


@dataclass(frozen=True, slots=True)
class Paused:
    """What a paused run goes on with."""

    run_id: str
    trace_id: int
    first_span_id: int
    """of the first segment's span, under which the later ones stand"""
    last_span_id: int
    """of the segment that paused"""
    record: Mapping[str, Any]
    """what `record_of` said"""
    task: dict[str, Any]
    steps: Sequence[Step]
    conversation: Sequence[Message]
    log: MessageLog
    path: Path | None = None
    """the trace file, where the run has one"""

    @property
    def requests(self) -> list[ApprovalRequest]:
        """Return what the run waits for."""
        return [ApprovalRequest.from_dict(request) for request in self.record["requests"]]

    @property
    def held(self) -> list[ToolCall]:
        """Return the calls of its last reply that were not begun."""
        return [ToolCall(**call) for call in self.record["held"]]


def record_of(run: RunScope) -> dict[str, Any]:
    """Return the record of a run that pauses: JSON-like, and clean."""
    state, ledger = run.state, run.trace.recorder.ledger
    counters = ("queries_used", "free_steps", "last_error")
    return {
        "requests": [request.to_dict() for request in run.requests],
        "held": [call.to_dict() for call in run.held],
        "turn": run.trace.turn_number,
        "segment": run.segment,
        "model_calls": run.model_calls,
        "trace_flags": int(run.trace.recorder.root_context.trace_flags),
        "state": {name: getattr(state, name, None) for name in counters},
        "session_log": {"theory": run.session_log.current_theory, "entries": run.session_log.to_list()},
        "briefing": list(run.briefing),
        "turn_prompt": run.turn_prompt,
        "unclaimed": asdict(run.unclaimed),
        "ledger": ledger.to_dict(),
        "elapsed_s": run.guard.elapsed_s,
        "hooks": [[name, run.boundary.clean(told)] for name, told in run.hooks.state_dicts()],
    }


def paused_run(run: RunScope) -> Paused | None:
    """Return what a live run goes on with, None unless it waits."""
    if run.pause is None:
        return None
    root = run.trace.root
    assert root is not None
    first = root.context.span_id if run.segment == 1 else root.parent_id
    path = next((Path(sink.path) for sink in run.trace.recorder.sinks if hasattr(sink, "path")), None)
    return Paused(
        run.run_id,
        root.context.trace_id,
        first,
        root.context.span_id,
        run.pause,
        run.recorded_task,
        list(run.state.steps),
        list(run.conversation),
        run.log,
        path,
    )


def prepare(paused: Paused, verdict: Verdicts | None) -> tuple[list[ToolCall], dict[str, Verdict], list[Message]]:
    """Return the calls to go on with, the verdicts by call id, and messages to add to the conversation.

    A tool that asked by itself has run, and its call has its answer; so the call is made once more, with the verdict.
    """
    requests = paused.requests
    verdicts = verdicts_of(requests, verdict)
    known = {step.tool_call.call_id for step in paused.steps} | {call.call_id for call in paused.held}
    again: list[ToolCall] = []
    for request in requests:
        if request.has_run:
            call = ToolCall(request.tool, dict(request.args), call_id=_new_id(request.call_id, known))
            verdicts[call.call_id] = replace(verdicts.pop(request.call_id), call_id=call.call_id)
            again.append(call)
    said = [{"type": "tool_call", "id": c.call_id, "name": c.tool, "arguments": c.args} for c in again]
    return [*again, *paused.held], verdicts, [Message("assistant", tuple(said))] if said else []


def go_on(run: RunScope, paused: Paused, verdict: Verdicts | None) -> None:
    """Put a new run into the place where the paused one stopped.  Raises ConfigError for verdicts that do not fit."""
    record, recorder = paused.record, run.trace.recorder
    run.held, run.verdicts, asked_again = prepare(paused, verdict)
    run.task = run.recorded_task = paused.task
    run.conversation.replace([*paused.conversation, *asked_again])
    run.log = paused.log
    run.call_ids = dict.fromkeys(_ids(run.conversation), 1)
    run.briefing, run.turn_prompt = list(record["briefing"]), record["turn_prompt"]
    run.model_calls, run.segment = record["model_calls"], record["segment"] + 1
    run.links = [Link(recorder.below_root(paused.last_span_id))]
    run.trace.turn_number = record["turn"] - 1  # the turn goes on
    recorder.ledger.restore(record["ledger"])
    recorder.resumes = True
    run.guard.resume(record["elapsed_s"])
    run.give_back(Usage(**record["unclaimed"]))
    run.hooks.load_state_dicts(record["hooks"])
    _restore_state(run.state, paused)
    _restore_session_log(run.session_log, record["session_log"])


def _restore_state(state: Any, paused: Paused) -> None:
    state.steps[:] = paused.steps
    for name, value in paused.record["state"].items():
        note_state(state, name, value)


def _restore_session_log(log: SessionLog, told: Mapping[str, Any]) -> None:
    log.entries = [LogEntry.from_dict(entry) for entry in told["entries"]]
    log.current_theory = told["theory"]


def _ids(conversation: Iterable[Message]) -> Iterator[str]:
    for message in conversation:
        for part in message.parts:
            if part["type"] == "tool_call":
                yield str(part["id"])


def _new_id(call_id: str, known: set[str]) -> str:
    number = 2
    while (name := f"{call_id}_{number}") in known:
        number += 1
    known.add(name)
    return name

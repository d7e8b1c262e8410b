"""Segments: how a run pauses, and how it goes on in this process or in another.

A run that waits for a human ends its segment with a record of what the next one needs (`Pause`), and with its
conversation as references over the message log.  The next segment has the same run id and the same trace; turns, steps
and the log go on counting.  The record is the same whether it comes from the live run or from its file, and one run
only goes on from it: what it waits for is done once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opentelemetry.trace import Link, SpanContext, TraceFlags, TraceState

from looplet.approval import ApprovalRequest, Verdict, Verdicts, verdicts_of
from looplet.approval_state import ALREADY_RESUMED, Once
from looplet.call_ids import CallIds
from looplet.config import LoopConfig
from looplet.errors import ConfigError
from looplet.guards import require_guards
from looplet.message_log import MessageLog
from looplet.messages import Message
from looplet.pause import Counters, Pause, Settings, hash_calls
from looplet.scope import RunScope, note_state
from looplet.state import LogEntry, SessionLog, entry_of
from looplet.telemetry.otlp_file import claim
from looplet.types import Step, ToolCall


@dataclass(frozen=True, slots=True)
class Paused:
    """A paused run, with all that its next segment needs."""

    run_id: str
    trace_id: int
    first_span_id: int
    """of the first segment's span, under which the later ones stand"""
    last_span_id: int
    """of the segment that paused"""
    record: Pause
    task: dict[str, Any]
    steps: Sequence[Step]
    conversation: Sequence[Message]
    log: MessageLog
    call_ids: Iterable[str]
    """of all calls that the run has made"""
    config: LoopConfig
    """settings for a next segment that names none"""
    path: Path | None = None
    """the trace file, where the run has one"""
    sinks: Sequence[Any] = ()
    """who writes it, of a live run"""
    rewrites: bool = False
    """a `pre_prompt` hook rewrote requests: `steps` and `conversation` hold what nobody may see"""
    once: Once = field(default_factory=Once)

    @property
    def context(self) -> SpanContext:
        """Return the first segment's place in its trace, the sampler's decision included."""
        return self._span(self.first_span_id)

    @property
    def link(self) -> Link:
        """Return a link to the segment that paused."""
        return Link(self._span(self.last_span_id))

    def claim(self) -> None:
        """Become the one run that goes on from here.

        Raises ConfigError when another has, TraceError when that cannot be written into the trace file.
        """
        self.once.take(self._claim_file)

    def _claim_file(self) -> None:
        if self.path is not None and self.path.exists() and not claim(self.path, f"{self.last_span_id:016x}"):
            raise ConfigError(f"{self.path}: {ALREADY_RESUMED}")

    def _span(self, span_id: int) -> SpanContext:
        state = TraceState.from_header([self.record.trace_state]) if self.record.trace_state else None
        return SpanContext(self.trace_id, span_id, True, TraceFlags(self.record.trace_flags), state)


# --- pausing --------------------------------------------------------------------------------------------------------


def record_of(run: RunScope) -> Pause:
    """Return the record of a run that pauses.  Raises what a hook's `state_dict()` raises."""
    state, recorder, clean = run.state, run.trace.recorder, run.boundary.clean
    context, metadata = recorder.root_context, clean(getattr(state, "metadata", None))
    return Pause(
        requests=list(run.approvals.requests),
        held=list(run.approvals.held),
        held_sha256=hash_calls(run.approvals.held),
        turn=run.trace.turn_number,
        segment=run.segment,
        model_calls=run.outgoing.count,
        trace_flags=int(context.trace_flags) if recorder.is_decided else int(TraceFlags.SAMPLED),
        trace_state=context.trace_state.to_header(),
        counters=Counters.of(state),
        metadata=metadata if isinstance(metadata, dict) else {},
        theory=run.boundary.text(run.session_log.current_theory),
        notes=_notes(run),
        briefing=list(run.outgoing.briefing),
        turn_prompt=run.outgoing.text,
        unclaimed=run.ledger.unclaimed,
        spent=recorder.ledger.written(),
        elapsed_s=run.guard.elapsed_s,
        hooks=[(name, clean(memory)) for name, memory in run.hooks.state_dicts()],
        settings=Settings.of(run.config, run.boundary.text(run.config.system_prompt)),
        redacted=bool(run.boundary.redactors),
        redacted_late=recorder.late is not None,
        guards=[kinds[0] for kinds in run.hooks.guards()],
        limits=run.guard.limited,
    )


def _notes(run: RunScope) -> list[LogEntry] | None:
    if run.session_log.entries == entries_of(run.state.steps):
        return None
    clean = run.boundary.clean
    return [LogEntry.from_dict({**clean(e.to_dict()), "step": e.step}) for e in run.session_log.entries]


def entries_of(steps: Iterable[Step]) -> list[LogEntry]:
    """Return the session log that the loop alone writes: a line for each step."""
    return [entry_of(step) for step in steps if not step.tool_call.tool.startswith("__")]


def paused_run(run: RunScope) -> Paused | None:
    """Return a live run as one that is paused, None unless it waits."""
    if run.approvals.pause is None:
        return None
    root = run.trace.root
    assert root is not None
    first = root.context.span_id if run.segment == 1 else root.parent_id
    sinks = run.trace.recorder.sinks
    return Paused(
        run.run_id,
        root.context.trace_id,
        first,
        root.context.span_id,
        run.approvals.pause,
        run.recorded_task,
        list(run.state.steps),
        list(run.conversation),
        run.outgoing.log,
        list(run.call_ids),
        run.config,
        next((file for sink in sinks if (file := _file_of(sink, run.run_id)) is not None), None),
        sinks,
        run.rewrites,
        run.approvals.once,
    )


def _file_of(sink: Any, run_id: str) -> Path | None:
    """Return where a sink has written a run: the file may have got another name since."""
    find = getattr(sink, "file_of", None)
    return None if find is None else find(run_id)


# --- going on -------------------------------------------------------------------------------------------------------


def prepare(paused: Paused, verdict: Verdicts | None) -> tuple[list[ToolCall], dict[str, Verdict], list[Message]]:
    """Return the calls to go on with, the verdicts by call id, and messages to add to the conversation.

    A tool that asked by itself has run, and its call has its answer; so the call is made once more, with the verdict.
    """
    requests, held = paused.record.requests, paused.record.held
    verdicts = verdicts_of(requests, verdict)
    known = {*paused.call_ids, *(call.call_id for call in held)}
    again: list[ToolCall] = []
    for request in requests:
        if request.has_run:
            call = ToolCall(request.tool, dict(request.args), call_id=_new_id(request.call_id, known))
            verdicts[call.call_id] = replace(verdicts.pop(request.call_id), call_id=call.call_id)
            again.append(call)
    parts = [{"type": "tool_call", "id": c.call_id, "name": c.tool, "arguments": c.args} for c in again]
    return [*again, *held], verdicts, [Message("assistant", tuple(parts))] if parts else []


def go_on(run: RunScope, paused: Paused, verdict: Verdicts | None) -> None:
    """Put a new run into the place where the paused one stopped.  Raises ConfigError for what does not fit it."""
    if paused.once.is_taken:
        raise ConfigError(ALREADY_RESUMED)
    record, recorder = paused.record, run.trace.recorder
    _check_redaction(run, paused)
    require_guards(record.guards, record.limits, run.hooks.guards(), run.guard.limited)
    _check_tools(run, record.requests)
    run.approvals.held, run.approvals.verdicts, asked_again = prepare(paused, verdict)
    run.approvals.claim = paused.claim
    run.task = run.recorded_task = paused.task
    run.rewrites = run.trace.withhold_results = paused.rewrites
    _restore_messages(run, paused, asked_again)
    run.call_ids = CallIds((*paused.call_ids, *(call.call_id for call in run.approvals.held)))
    run.outgoing.briefing, run.outgoing.text = list(record.briefing), record.turn_prompt
    run.outgoing.count, run.segment = record.model_calls, record.segment + 1
    run.links = [paused.link]
    run.trace.turn_number = record.turn - 1  # the turn goes on
    recorder.ledger.restore(record.spent)
    recorder.file = paused.path
    run.guard.resume(record.elapsed_s)
    run.ledger.unclaimed = record.unclaimed
    _restore_state(run, paused)
    _restore_session_log(run.session_log, paused)
    run.hooks.load_state_dicts(record.hooks)


def _check_redaction(run: RunScope, paused: Paused) -> None:
    """Refuse to show, or to write down, what the segments before kept to themselves."""
    record, early = paused.record, bool(run.boundary.redactors)
    if record.redacted and not early:
        raise ConfigError("the paused run redacts what enters it; pass its redact=, or the hook that does it, again")
    if record.redacted_late and not early and run.trace.recorder.late is None:
        raise ConfigError("the paused run redacts what is recorded; pass its ProvenanceSink(redact=...) again")
    if paused.rewrites and not run.asks_rewriters:
        raise ConfigError("a pre_prompt hook of the paused run rewrites its requests; pass it in hooks=[...] again")


def _check_tools(run: RunScope, requests: Iterable[ApprovalRequest]) -> None:
    for request in requests:
        if request.tool not in run.tools:
            known = ", ".join(run.tools.tool_names)
            raise ConfigError(f"the run waits for {request.tool!r}, which is not among the tools: {known}")


def _restore_messages(run: RunScope, paused: Paused, more: Iterable[Message]) -> None:
    """Take over conversation and log.  What was redacted once is not redacted again."""
    is_clean = paused.record.redacted or not run.boundary.redactors
    for message in (*paused.conversation, *more):
        run.conversation.append(message, clean=is_clean)
    late = run.trace.recorder.late
    run.outgoing.log = paused.log
    run.outgoing.log.redact_with(None if late is None else late.clean)


def _restore_state(run: RunScope, paused: Paused) -> None:
    state, record = run.state, paused.record
    state.steps[:] = paused.steps
    for name in ("queries_used", "free_steps", "last_error"):
        if (value := getattr(record.counters, name)) is not None:
            note_state(state, name, value)
    note_state(state, "usage", run.ledger.own)
    if isinstance(given := getattr(state, "metadata", None), dict):
        note_state(state, "metadata", {**record.metadata, **given})


def _restore_session_log(log: SessionLog, paused: Paused) -> None:
    notes = paused.record.notes
    log.restore(entries_of(paused.steps) if notes is None else notes, paused.record.theory)


def _new_id(call_id: str, known: set[str]) -> str:
    number = 2
    while (name := f"{call_id}_{number}") in known:
        number += 1
    known.add(name)
    return name

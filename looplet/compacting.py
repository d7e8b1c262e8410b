"""Compaction in a run: when it is due, which service does it, and what is recorded of it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, Final

from looplet.compact_outcome import CompactOutcome, Snapshot, outcome_of
from looplet.compaction import OVERFLOW, ClipToolResults, PruneToolResults, TruncateCompact, compact_chain
from looplet.events import LifecycleEvent
from looplet.handle import handle_of
from looplet.plan import INLINE, SERIAL, Effects
from looplet.prompt import render_task
from looplet.scope import RunScope
from looplet.steering import announce, consult
from looplet.stream_events import CompactionEvent
from looplet.telemetry import semconv
from looplet.telemetry.spans import Phase

FULL: Final = 0.75
"""of the context window: from here on a run compacts by itself"""
THRESHOLD: Final = "threshold"
PURPOSE: Final = "compaction"


def compact_if_due(run: RunScope, above: Phase) -> Effects[None]:
    """Make the conversation shorter if a hook asks for it, or if the context window is getting full."""
    reason = yield from _reason(run, above)
    if reason and run.stop is None:
        yield from compact(run, above, reason)


def compact(run: RunScope, above: Phase, reason: str) -> Effects[CompactOutcome | None]:
    """Have a service make the conversation shorter; return what came of it, None when that is nothing.

    A service that raises is an error of its span; the run goes on.
    """
    service = _service(run, reason)
    conversation = run.conversation
    _mark_task(run)
    outcome = None
    with above.phase(semconv.COMPACT) as phase:
        is_refused = yield from _is_refused(run, phase, len(conversation))
        before = Snapshot.of(conversation)
        if not is_refused:
            try:
                returned = yield from _ask(run, phase, service, reason)
                outcome = outcome_of(returned, service, conversation, reason, before)
            except Exception as error:  # noqa: BLE001 - services are foreign code, and the run can go on without
                before.undo_damage(conversation)
                phase.fail_with(error)
        known = outcome or CompactOutcome(
            reason, len(before.messages), len(conversation), before.tokens, conversation.tokens
        )
        _record(run, phase, service, known)
        counts = {"messages_before": known.messages_before, "messages_after": known.messages_after}
        extra = {"reason": reason, "outcome": outcome}
        yield from announce(run, phase, LifecycleEvent.POST_COMPACT, **counts, extra=extra)
    return outcome


def _reason(run: RunScope, above: Phase) -> Effects[str]:
    for bound in run.hooks.of("should_compact"):
        args = (run.state, run.session_log, run.conversation, len(run.state.steps) + 1)
        decision = yield from consult(run, above, bound, *args)
        if decision.compact:
            return bound.hook
    window = run.config.context_window
    is_full = window is not None and run.conversation.tokens >= FULL * window
    return THRESHOLD if is_full else ""


def _own_service(run: RunScope) -> Any:
    """Return what the caller gave to compact with; hooks may put something else into `state.compact_service`."""
    return getattr(run.state, "compact_service", None) or run.compact_service


def _service(run: RunScope, reason: str) -> Any:
    own = _own_service(run)
    if reason != OVERFLOW:
        return own if own is not None else compact_chain(PruneToolResults, TruncateCompact)
    stages = [own] if own is not None else []
    return compact_chain(
        *stages, PruneToolResults, TruncateCompact, ClipToolResults, target_tokens=_fitting_tokens(run)
    )


def _fitting_tokens(run: RunScope) -> int:
    """Return how long a request may be after one that was too long: half of whatever is known of the window."""
    known = (run.conversation.tokens, run.conversation.estimate.reported, run.config.context_window)
    return min(tokens for tokens in known if tokens) // 2 if any(known) else 0


def _mark_task(run: RunScope) -> None:
    """Say which message is the run's task, where the conversation of another run stands before it."""
    shown = render_task(run.task)
    run.conversation.task = run.outgoing.task or next((m for m in run.conversation if m.text == shown), None)


def _is_refused(run: RunScope, phase: Phase, messages: int) -> Effects[bool]:
    decisions = yield from announce(run, phase, LifecycleEvent.PRE_COMPACT, messages_before=messages)
    return any(decision.is_block() for decision in decisions)


def _ask(run: RunScope, phase: Phase, service: Any, reason: str) -> Effects[Any]:
    is_async = inspect.iscoroutinefunction(service.compact)
    token = run.cancel_token.child()
    llm = None if _is_withheld(run) else handle_of(run, phase, PURPOSE, is_async=is_async, token=token)
    ask = partial(
        service.compact,
        state=run.state,
        session_log=run.session_log,
        llm=llm,
        conversation=run.conversation,
        step_num=len(run.state.steps) + 1,
        reason=reason,
    )
    try:
        return (yield from phase.call(ask, INLINE if is_async else SERIAL))
    except BaseException:
        token.cancel()  # it may be at work in its thread still
        raise


def _is_withheld(run: RunScope) -> bool:
    """Tell whether a `pre_prompt` hook rewrites requests: then no model may see the conversation as it is."""
    return run.rewrites or (run.asks_rewriters and not run.outgoing.count)


def _record(run: RunScope, phase: Phase, service: Any, outcome: CompactOutcome) -> None:
    phase.put(
        {
            semconv.COMPACT_REASON: outcome.reason,
            semconv.COMPACT_SERVICE: type(service).__name__,
            semconv.COMPACT_COMPACTED: outcome.compacted,
            semconv.COMPACT_MESSAGES_BEFORE: outcome.messages_before,
            semconv.COMPACT_MESSAGES_AFTER: outcome.messages_after,
            semconv.COMPACT_TOKENS_BEFORE: outcome.tokens_before,
            semconv.COMPACT_TOKENS_AFTER: outcome.tokens_after,
        }
    )
    if outcome.stages:
        phase.put({semconv.COMPACT_STAGES: list(outcome.stages)})
    if outcome.warnings:
        phase.put({semconv.COMPACT_WARNINGS: list(outcome.warnings)})
    if outcome.compacted:
        counts = {"messages_before": outcome.messages_before, "messages_after": outcome.messages_after}
        run.emit(CompactionEvent, reason=outcome.reason, **counts)

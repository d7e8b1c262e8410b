"""Asking hooks: what one answered, what it did to the run, and what happens when it raises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

from looplet.decisions import HookDecision, interpret
from looplet.errors import ToolError, words_of
from looplet.events import EventPayload, LifecycleEvent, slot
from looplet.hooks import GATES, BoundMethod
from looplet.plan import Effects, Skipped
from looplet.scope import RunScope
from looplet.telemetry import attributes, semconv
from looplet.telemetry.recorder import error_name
from looplet.telemetry.spans import Phase
from looplet.types import Step, ToolResult

logger = logging.getLogger("looplet")


def consult(run: RunScope, phase: Phase, bound: BoundMethod, *args: Any, **kwargs: Any) -> Effects[HookDecision]:
    """Ask one hook and let its answer count: context and stop are taken up here, the rest is the caller's.

    A gate that raises has refused.  Any other hook that raises ends the run.
    """
    return (yield from consult_raw(run, phase, bound, partial(bound.function, *args, **kwargs), _no_rewrite))


def consult_raw(
    run: RunScope,
    phase: Phase,
    bound: BoundMethod,
    thunk: Callable[[], Any],
    take: Callable[[Any], bool],
) -> Effects[HookDecision]:
    """Like `consult`, but `take` sees the raw answer first and returns True when it needs no interpretation."""
    began = perf_counter()
    try:
        value = yield from phase.call(thunk)
        if take(value):
            _record(run, phase, bound, ["rewrite"], "", perf_counter() - began)
            yield from _announce_decision(run, phase, bound, HookDecision())
            return HookDecision()
        decision = _clean(run, interpret(value, bound.hook, bound.method))
    except Skipped:
        raise
    except Exception as error:  # noqa: BLE001 - hooks are foreign code; _failed decides what it means
        decision = _failed(run, phase, bound, error, perf_counter() - began)
    else:
        if effects := ["ask"] if decision.is_ask() else decision.effects():
            _record(run, phase, bound, effects, decision.reason, perf_counter() - began)
            yield from _announce_decision(run, phase, bound, decision)
    if decision.additional_context:
        run.outgoing.briefing.append(decision.additional_context)
    if decision.stop is not None:
        run.say_stop(decision.stop)
    return decision


def announce(run: RunScope, phase: Phase, event: LifecycleEvent, **facts: Any) -> Effects[list[HookDecision]]:
    """Tell the hooks of an event; return what they answered.  Facts are fields of `EventPayload`."""
    decisions = []
    for bound in run.hooks.of(slot(event)):
        decision = yield from consult(run, phase, bound, payload(run, event, **facts))
        decisions.append(decision)
    return decisions


def payload(run: RunScope, event: LifecycleEvent, **facts: Any) -> EventPayload:
    """Return what hooks are told of an event."""
    facts.setdefault("step_num", len(run.state.steps) + 1)
    return EventPayload(event, state=run.state, session_log=run.session_log, context=run.context, **facts)


def record_results(run: RunScope, phase: Phase, steps: Iterable[Step]) -> None:
    """Record results that were withheld until hooks had seen them; not where a hook rewrites requests."""
    for step in () if run.rewrites else steps:
        phase.event(semconv.EVENT_STEP, attributes.of_step(step))


def clean_result(run: RunScope, result: ToolResult, duration_ms: float | None = None) -> ToolResult:
    """Return a result whose content has passed the boundary; the call's name and summary are clean already."""
    clean = run.boundary
    detail = result.error_detail
    if detail is not None:
        detail = ToolError(
            clean.text(str(detail.message)),
            kind=detail.kind,
            retriable=detail.retriable,
            context=clean.clean(detail.context),
            recovery_hint=clean.clean(detail.recovery_hint),
        )
    return ToolResult(
        result.tool,
        result.args_summary,
        clean.clean(result.data),
        None if result.error is None else clean.text(str(result.error)),
        detail,
        result.duration_ms if duration_ms is None else duration_ms,
        clean.clean(result.result_key),
        result.call_id,
        tuple([clean.text(str(w)) for w in result.warnings]),
        clean.clean(result.metadata),
        raw=result.data if result.raw is None else result.raw,
    )


def _announce_decision(run: RunScope, phase: Phase, bound: BoundMethod, decision: HookDecision) -> Effects[None]:
    if bound.method != slot(LifecycleEvent.HOOK_DECISION):
        facts = {"hook_slot": bound.method, "hook_name": bound.hook, "extra": {"decision": decision}}
        yield from announce(run, phase, LifecycleEvent.HOOK_DECISION, **facts)


def _no_rewrite(value: Any) -> bool:
    return False


def _clean(run: RunScope, decision: HookDecision) -> HookDecision:
    if decision.is_noop() and decision.permission is None:
        return decision
    clean = run.boundary

    def text(value: str | None) -> str | None:
        return None if value is None else clean.text(str(value))

    return replace(
        decision,
        block=text(decision.block),
        stop=None if decision.stop is None else run.trace.recorder.clean(str(decision.stop)),
        additional_context=text(decision.additional_context),
        updated_args=None if decision.updated_args is None else clean.clean(dict(decision.updated_args)),
        updated_result=None if decision.updated_result is None else _clean_answer(run, decision.updated_result),
    )


def _clean_answer(run: RunScope, result: ToolResult) -> ToolResult:
    """Return a hook's own result, cleaned: its names are the hook's words too."""
    clean = run.boundary.text
    return replace(
        clean_result(run, result), tool=clean(str(result.tool)), args_summary=clean(str(result.args_summary))
    )


def _failed(run: RunScope, phase: Phase, bound: BoundMethod, error: Exception, took_s: float) -> HookDecision:
    words = run.boundary.text(f"{type(error).__name__}: {words_of(error)}")
    _record(run, phase, bound, ["error"], words, took_s, error_type=error_name(error))
    phase.put({semconv.HOOK_NAME: bound.hook, semconv.HOOK_METHOD: bound.method})
    if bound.method not in GATES:
        raise error
    key = (bound.index, bound.method)
    run.gate_failures[key] += 1
    if run.gate_failures[key] >= run.config.gate_failures:
        raise error
    phase.fail_with(error)
    logged = None if run.boundary.redactors else error  # a log is no place for what must not be seen
    logger.error("looplet: the gate %s.%s failed, which refuses", bound.hook, bound.method, exc_info=logged)
    if bound.method == "check_done":
        return HookDecision(block=f"the gate {bound.hook} failed ({words}); the final answer was not accepted")
    return HookDecision(permission="deny", block=f"the gate {bound.hook} failed ({words})")


def _record(
    run: RunScope,
    phase: Phase,
    bound: BoundMethod,
    effects: list[str],
    reason: str,
    took_s: float,
    *,
    error_type: str | None = None,
) -> None:
    attributes: dict[str, Any] = {
        semconv.HOOK_NAME: bound.hook,
        semconv.HOOK_METHOD: bound.method,
        semconv.HOOK_DECISION: "+".join(effects),
        semconv.HOOK_DURATION: took_s,
    }
    if reason and not run.trace.withhold_results:
        attributes[semconv.HOOK_REASON] = reason
    if error_type:
        attributes[semconv.ERROR_TYPE] = error_type
    phase.event(semconv.EVENT_HOOK, attributes)

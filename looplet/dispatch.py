"""The second half of a turn: admit the calls of a reply, run them, let hooks see what came of it, make the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from looplet.admission import Pending, check_done, pre_dispatch, record_request, request_of
from looplet.approval import OPTIONS, WAITING
from looplet.clipping import clip_result
from looplet.decisions import HookDecision
from looplet.errors import ToolError
from looplet.events import LifecycleEvent, slot
from looplet.execution import execute_tools
from looplet.messages import Message
from looplet.plan import Effects, Plan
from looplet.scope import RunScope, note_state
from looplet.steering import announce, consult, payload
from looplet.streaming import ToolDispatchEvent, ToolResultEvent
from looplet.telemetry import attributes, semconv
from looplet.telemetry.spans import Phase
from looplet.tools import failure
from looplet.types import Step, ToolCall, ToolResult


def take_calls(run: RunScope, turn: Phase, calls: Sequence[ToolCall]) -> Plan[Step, int]:
    """Run a reply's calls, batch by batch; yield a step for each.  Return how many new entities they brought.

    Neighbouring `concurrent_safe` calls make a batch and run at the same time; any other call waits for the one
    before it, so that a caller who breaks, or a hook that stops the run, prevents those that follow.
    """
    entities = made = 0
    for batch in _batches(run, calls):
        if run.stop is not None or (room := _room(run)) <= 0:
            break
        run.check_cancelled()
        first = len(run.state.steps) + 1
        pending = yield from pre_dispatch(run, turn, [Pending(first + i, c) for i, c in enumerate(batch[:room])])
        if not pending:  # the first of them waits for a human
            break
        yield from check_done(run, turn, pending)
        run.check_cancelled()  # perhaps while a human was asked
        try:
            yield from dispatch(run, turn, pending)
            steps, new = yield from post_dispatch(run, turn, pending)
        except BaseException:
            _keep_finished(run, turn, pending)
            raise
        entities, made = entities + new, made + len(steps)
        yield from steps
    if made < len(calls):
        _leave_rest(run, turn, calls)
    return entities


def dispatch(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[None]:
    """Run the calls that nothing refused."""
    for item in pending:
        if item.result is None:
            _reserve(run, item)
    runnable = [item for item in pending if item.result is None]
    if not runnable:
        return
    with turn.phase(semconv.DISPATCH) as phase:
        for item in runnable:
            run.emit(ToolDispatchEvent, step=item.number, tool_call=item.call)
        yield from execute_tools(run, phase, runnable)


def _room(run: RunScope) -> int:
    """Return how many more calls the budgets allow."""
    left = run.guard.calls_left()
    steps: int = run.state.budget_remaining
    return steps if left is None else min(left, steps)


def _reserve(run: RunScope, item: Pending) -> None:
    """Count a call that is about to run, or refuse it: a sub-agent may have been faster."""
    if (limit := run.guard.take_tool_call()) is not None:
        item.result = failure(item.call, ToolError(f"not run: the run's budget is used up: {limit}"))


def post_dispatch(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[tuple[list[Step], int]]:
    """Let hooks see the results, then add the steps to the run.  Return them, and the number of new entities."""
    steps, entities = [], 0
    with turn.phase(semconv.POST_DISPATCH) as phase:
        for item in pending:
            if _ends(run, item) and not _asks(run, item):
                run.stop = "done"
                yield from announce(run, phase, LifecycleEvent.DONE_ACCEPTED, **_facts(item))
            if not item.rejected:
                yield from _review(run, phase, item)
            _note_request(run, phase, item)
            step = _add_step(run, phase, item)
            entities += run.session_log.record_step(step)
            steps.append(step)
    return steps, entities


def _batches(run: RunScope, calls: Sequence[ToolCall]) -> Iterator[list[ToolCall]]:
    batch: list[ToolCall] = []
    for call in calls:
        joins = _is_concurrent(run, call)
        if batch and (not joins or len(batch) >= run.config.max_parallel_calls):
            yield batch
            batch = []
        batch.append(call)
        if not joins:
            yield batch
            batch = []
    if batch:
        yield batch


def _is_concurrent(run: RunScope, call: ToolCall) -> bool:
    spec = run.tools.get(call.tool)
    if spec is None or not spec.concurrent_safe or not run.config.concurrent_dispatch:
        return False
    return call.tool not in run.ending_tools


def _ends(run: RunScope, item: Pending) -> bool:
    result = item.result
    return item.ran and result is not None and result.error is None and item.call.tool in run.ending_tools


def _review(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    for bound in run.hooks.of("post_dispatch"):
        args = (run.state, run.session_log, item.call, item.result, item.number)
        _take_result(item, (yield from consult(run, phase, bound, *args)))
    assert item.result is not None
    event = LifecycleEvent.POST_TOOL_USE if item.result.error is None else LifecycleEvent.POST_TOOL_FAILURE
    for bound in run.hooks.of(slot(event)) if item.ran else ():
        _take_result(item, (yield from consult(run, phase, bound, payload(run, event, **_facts(item)))))


def _take_result(item: Pending, decision: HookDecision) -> None:
    if decision.updated_result is not None:
        item.result = replace(decision.updated_result, call_id=item.call.call_id)


def _facts(item: Pending) -> dict[str, Any]:
    return {"step_num": item.number, "tool_call": item.call, "tool_result": item.result}


def _note_request(run: RunScope, phase: Phase, item: Pending) -> None:
    """Pause the run where the tool itself said that a human has to approve."""
    if not _asks(run, item):
        return
    assert item.result is not None
    data, options = item.result.data, item.result.data.get("approval_options")
    named = [str(option) for option in options] if isinstance(options, list) else []
    question = str(data.get("approval_description") or "")
    request = request_of(run, item, question, named or OPTIONS, has_run=True)
    record_request(run, phase, request)
    run.approvals.requests.append(request)
    run.say_stop(WAITING)


def _asks(run: RunScope, item: Pending) -> bool:
    data = item.result.data if item.result is not None else None
    return bool(run.approvals.askers) and isinstance(data, dict) and bool(data.get("needs_approval"))


def _add_step(run: RunScope, phase: Phase, item: Pending) -> Step:
    assert item.result is not None
    step = Step(item.number, item.call, item.result, run.ledger.claim(), run.outgoing.take_text(), item.context)
    if withheld := phase.recording and run.withholds_results:
        run.unseen.append(step)
    if item.recorded is not item.result and phase.recording:
        phase.event(semconv.EVENT_STEP, attributes.of_withheld_step(step) if withheld else attributes.of_step(step))
    _count_step(run, item)
    run.state.steps.append(step)
    response, _ = clip_result(response_of(item.result), run.config.tool_result_max_chars)
    run.conversation.append(Message.of_result(item.call.call_id, response), clean=True)
    run.emit(ToolResultEvent, step=step.number, tool_result=step.tool_result)
    return step


def _keep_finished(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> None:
    """Add the steps of tools that had finished when something went wrong: what happened is part of the run."""
    known = {step.number for step in run.state.steps[-len(pending) :]}
    for item in pending:
        if item.recorded is not None and item.number not in known:
            run.session_log.record_step(_add_step(run, turn, item))


def _count_step(run: RunScope, item: Pending) -> None:
    state = run.state
    if item.spec is not None and item.spec.free and item.ran:
        note_state(state, "free_steps", getattr(state, "free_steps", 0) + 1)
    else:
        run.ledger.count_step()
        if item.ran and item.call.tool not in run.ending_tools:
            note_state(state, "queries_used", state.queries_used + 1)
    if item.ran and item.recorded is not None:
        note_state(state, "last_error", item.recorded.error)


def response_of(result: ToolResult) -> Any:
    """Return what the model reads about a call."""
    if result.error is None:
        return result.data
    response: dict[str, Any] = {"error": result.error, "kind": str(result.error_kind)}
    if result.error_retriable:
        response["error_retriable"] = True
    if result.error_detail is not None and result.error_detail.recovery_hint:
        response["recovery_hint"] = result.error_detail.recovery_hint
    return response


def _leave_rest(run: RunScope, turn: Phase, calls: Sequence[ToolCall]) -> None:
    """Keep the calls that were not run for later, when the run pauses.

    Else answer them, if the conversation goes on: providers want a result for each.
    """
    begun = {step.tool_call.call_id for step in run.state.steps[-len(calls) :]}
    rest = [call for call in calls if call.call_id not in begun]
    if run.stop == WAITING:
        run.approvals.held = rest
    else:
        for call in rest:
            turn.event(semconv.EVENT_CALL_DROPPED, {semconv.TOOL_CALL_ID: call.call_id})
            run.conversation.append(Message.of_result(call.call_id, {"error": "not run"}), clean=True)

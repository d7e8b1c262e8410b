"""The second half of a turn: admit the calls of a reply, run them, let hooks see what came of it, make the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from looplet.admission import Pending, check_done, pre_dispatch
from looplet.execution import execute_tool
from looplet.messages import Message
from looplet.plan import PARALLEL, SERIAL, Effects, Plan, gather
from looplet.scope import RunScope, note_state
from looplet.steering import consult
from looplet.telemetry import attributes, semconv
from looplet.telemetry.spans import Phase
from looplet.types import NO_USAGE, Step, ToolCall, ToolResult


def take_calls(run: RunScope, turn: Phase, calls: Sequence[ToolCall]) -> Plan[Step, int]:
    """Run a reply's calls, batch by batch; yield a step for each.  Return how many new entities they brought.

    Neighbouring `concurrent_safe` calls make a batch and run at the same time; any other call waits for the one
    before it, so that a caller who breaks, or a hook that stops the run, prevents those that follow.
    """
    entities = 0
    for batch in _batches(run, calls):
        if run.stop is not None or run.state.budget_remaining <= 0:
            break
        first = len(run.state.steps) + 1
        pending = [Pending(first + i, c) for i, c in enumerate(batch[: max(1, run.state.budget_remaining)])]
        yield from pre_dispatch(run, turn, pending)
        yield from check_done(run, turn, pending)
        try:
            yield from dispatch(run, turn, pending)
            steps, new = yield from post_dispatch(run, turn, pending)
        except BaseException:
            _keep_finished(run, turn, pending)
            raise
        entities += new
        yield from steps
    _answer_dropped(run, turn, calls)
    return entities


def dispatch(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[None]:
    """Run the calls that nothing refused."""
    runnable = [item for item in pending if item.result is None]
    if not runnable:
        return
    with turn.phase(semconv.DISPATCH) as phase:
        lane = PARALLEL if len(runnable) > 1 else SERIAL
        yield from gather([execute_tool(run, phase, item, lane) for item in runnable])


def post_dispatch(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[tuple[list[Step], int]]:
    """Let hooks see the results, then add the steps to the run.  Return them, and the number of new entities."""
    steps, entities = [], 0
    with turn.phase(semconv.POST_DISPATCH) as phase:
        for item in pending:
            if _ends(run, item):
                run.stop = "done"
            if not item.rejected:
                yield from _review(run, phase, item)
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
    return call.tool not in run.config.ending_tools


def _ends(run: RunScope, item: Pending) -> bool:
    result = item.result
    return item.ran and result is not None and result.error is None and item.call.tool in run.config.ending_tools


def _review(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    for bound in run.hooks.of("post_dispatch"):
        args = (run.state, run.session_log, item.call, item.result, item.number)
        decision = yield from consult(run, phase, bound, *args)
        if decision.updated_result is not None:
            item.result = replace(decision.updated_result, call_id=item.call.call_id)


def _add_step(run: RunScope, phase: Phase, item: Pending) -> Step:
    assert item.result is not None
    usage, prompt = run.turn_usage, run.turn_prompt
    run.turn_usage, run.turn_prompt = NO_USAGE, ""
    step = Step(item.number, item.call, item.result, usage, prompt, item.context)
    if item.recorded is not item.result and phase.recording:
        withheld = run.trace.withhold_results
        phase.event(semconv.EVENT_STEP, attributes.of_withheld_step(step) if withheld else attributes.of_step(step))
    _count_step(run, item)
    run.state.steps.append(step)
    run.conversation.append(Message.of_result(item.call.call_id, response_of(item.result)), clean=True)
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
    elif item.ran and item.call.tool not in run.config.ending_tools:
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


def _answer_dropped(run: RunScope, turn: Phase, calls: Sequence[ToolCall]) -> None:
    """Answer the calls that were not run, if the conversation goes on: providers want a result for each."""
    begun = {step.tool_call.call_id for step in run.state.steps[-len(calls) :]} if calls else set()
    for call in calls:
        if call.call_id not in begun:
            turn.event(semconv.EVENT_CALL_DROPPED, {semconv.TOOL_CALL_ID: call.call_id})
            run.conversation.append(Message.of_result(call.call_id, {"error": "not run"}), clean=True)

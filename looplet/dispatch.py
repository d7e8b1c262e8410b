"""The second half of a turn: admit each tool call, run it, let hooks see what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from looplet.errors import ErrorKind, ToolError
from looplet.messages import Message
from looplet.plan import INLINE, PARALLEL, SERIAL, CallTimeout, Effects, Plan, gather
from looplet.scope import RunScope, note_state
from looplet.steering import clean_result, consult
from looplet.telemetry import attributes, semconv
from looplet.telemetry.spans import Phase
from looplet.tools import ToolContext, ToolSpec, failure, success, to_tool_error
from looplet.types import NO_USAGE, Step, ToolCall, ToolResult


@dataclass(slots=True)
class Pending:
    """A call on its way to becoming a step."""

    number: int
    """of its step"""
    call: ToolCall
    spec: ToolSpec | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    """as the function takes them"""
    result: ToolResult | None = None
    ran: bool = False
    rejected: bool = False
    recorded: ToolResult | None = None
    """the result that the call's span tells"""
    context: Any = None


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


def pre_dispatch(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[None]:
    """Decide about each call: as it is, rewritten, answered already, or refused."""
    with turn.phase(semconv.PRE_DISPATCH) as phase:
        for item in pending:
            _name_arguments(run, item)
            yield from _admit(run, phase, item)
            yield from _permit(run, phase, item)
            if item.result is None:
                _validate(run, item)
            if item.result is not None:
                phase.note(tool_call=item.call, tool_result=item.result, step_number=item.number)


def check_done(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[None]:
    """Ask the gates about an ending, before the `done` tool executes."""
    for item in pending:
        if item.result is not None or item.call.tool not in run.config.ending_tools:
            continue
        with turn.phase(semconv.CHECK_DONE) as phase:
            for bound in run.hooks.of("check_done"):
                extra = {"tool_call": item.call} if bound.wants_call else {}
                args = (run.state, run.session_log, run.context, item.number)
                decision = yield from consult(run, phase, bound, *args, **extra)
                if decision.is_block():
                    _reject(item, decision.block or "not accepted")
                    break
                if run.stop is not None:
                    _reject(item, f"the run is stopped: {run.stop}")
                    break


def dispatch(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[None]:
    """Run the calls that nothing refused."""
    runnable = [item for item in pending if item.result is None]
    if not runnable:
        return
    with turn.phase(semconv.DISPATCH) as phase:
        lane = PARALLEL if len(runnable) > 1 else SERIAL
        yield from gather([execute_tool(run, phase, item, lane) for item in runnable])


def execute_tool(run: RunScope, above: Phase, item: Pending, lane: str) -> Effects[None]:
    """Run one tool.  A failing tool is an observation for the model, never an exception."""
    spec, call = item.spec, item.call
    assert spec is not None
    marked = attributes.of_call_marker(call, item.number) if run.trace.recording else None
    told = attributes.of_call(call, item.number, True) if run.trace.recording else None
    with above.phase(semconv.TOOL_START, attributes=marked):
        pass
    run.trace.durable()  # from here on a resumed run knows that the call may have had its effect
    with above.phase(semconv.EXECUTE_TOOL, call.tool, attributes=told) as phase:
        ctx = _tool_context(run, phase, spec)
        item.ran, item.context = True, phase.context
        try:
            lane = INLINE if spec.is_async else lane
            value = yield from phase.call(spec.bind(item.arguments, ctx), lane, spec.timeout_s)
            result = success(call, value, warnings=ctx.warnings)
        except CallTimeout:
            words = f"TimeoutError: no answer within {spec.timeout_s:g} s; the call was abandoned"
            result = failure(call, ToolError(words, kind=ErrorKind.TIMEOUT, retriable=True))
            phase.put({semconv.TOOL_ABANDONED: True})
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tool raises, the model gets to see it
            result = failure(call, to_tool_error(error), warnings=ctx.warnings)
        item.result = item.recorded = result = clean_result(run, result, duration_ms=phase.stop_clock())
        _record_result(run, phase, call, result)
    run.trace.durable()


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


def _admit(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    if run.stop is not None:  # said about a neighbour in the same batch
        _refuse_stopped(run, item)
        return
    for bound in run.hooks.of("pre_dispatch"):
        decision = yield from consult(run, phase, bound, run.state, run.session_log, item.call, item.number)
        if decision.updated_args is not None:
            item.call = replace(item.call, args=decision.updated_args)
        if decision.updated_result is not None:
            item.result = replace(decision.updated_result, call_id=item.call.call_id)
        elif decision.is_block():
            _deny(run, item, decision.block, decision.retry)
        elif decision.stop is not None:
            _refuse_stopped(run, item)
        if item.result is not None:
            return


def _permit(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    for bound in run.hooks.of("check_permission"):
        if item.result is not None:
            return
        decision = yield from consult(run, phase, bound, item.call, run.state)
        if decision.updated_args is not None:
            item.call = replace(item.call, args=decision.updated_args)
        if decision.is_block():
            _deny(run, item, decision.block, decision.retry)
        elif decision.stop is not None:
            _refuse_stopped(run, item)


def _deny(run: RunScope, item: Pending, reason: str | None, retry: bool) -> None:
    words = f"Permission denied for tool {item.call.tool!r}" + (f": {reason}" if reason else "")
    item.result = failure(item.call, ToolError(words, kind=ErrorKind.PERMISSION_DENIED, retriable=retry))
    if retry:
        note_state(run.state, "last_error", None)


def _reject(item: Pending, reason: str) -> None:
    item.rejected = True
    item.result = failure(
        item.call,
        ToolError(reason, kind=ErrorKind.VALIDATION, retriable=True),
        args_summary="rejected",
        data={"rejected": True, "reason": reason},
    )


def _name_arguments(run: RunScope, item: Pending) -> None:
    """Put the arguments under the names that the tool will get, so that gates judge what will run."""
    spec = run.tools.get(item.call.tool)
    if spec is not None and (named := spec.named(item.call.args)) != item.call.args:
        item.call = replace(item.call, args=named)


def _refuse_stopped(run: RunScope, item: Pending) -> None:
    item.result = failure(item.call, ToolError(f"not run: the run is stopped: {run.stop}"))


def _validate(run: RunScope, item: Pending) -> None:
    try:
        spec = run.tools.find(item.call.tool)
        _name_arguments(run, item)  # a hook may have written new ones
        item.arguments = spec.arguments(item.call.args)
        run.tools.needed(spec)
        item.spec = spec
    except ToolError as error:
        item.result = failure(item.call, error)  # in our words, about arguments that are clean


def _tool_context(run: RunScope, phase: Phase, spec: ToolSpec) -> ToolContext:
    return ToolContext(
        session_id=run.trace.recorder.run_id,
        metadata={**run.config.tool_metadata, **getattr(run.state, "metadata", {})},
        llm=run.model.llm,
        on_progress=partial(_record_progress, run, phase),
        request_approval=run.config.approval_handler,
        resources=run.tools.needed(spec),
    )


def _record_progress(run: RunScope, phase: Phase, stage: str, data: Any) -> None:
    clean = run.boundary.clean
    told = {semconv.PROGRESS_STAGE: clean(str(stage)), semconv.PROGRESS_DATA: clean(data)}
    phase.event(semconv.EVENT_PROGRESS, {} if run.trace.withhold_results else told)


def _record_result(run: RunScope, phase: Phase, call: ToolCall, result: ToolResult) -> None:
    phase.note(tool_call=call, tool_result=result)
    if phase.recording:
        withheld = run.trace.withhold_results
        phase.put({semconv.TOOL_WITHHELD: True} if withheld else attributes.of_result(result))
    if result.error is not None and result.error_kind is not None:
        phase.fail(str(result.error_kind), "" if run.trace.withhold_results else result.error)


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

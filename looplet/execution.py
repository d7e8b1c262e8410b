"""Execution: one tool call, from its marker in the trace to its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

from opentelemetry.context import set_value

from looplet.admission import Pending
from looplet.awaiting import discard, is_awaitable
from looplet.cancel import CANCEL_KEY, CancelToken
from looplet.decisions import interpret
from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.events import LifecycleEvent, slot
from looplet.handle import handle_of
from looplet.plan import INLINE, PARALLEL, SERIAL, Call, CallTimeout, Closing, Effects, Wait, gather
from looplet.scope import RunScope
from looplet.steering import clean_result, payload
from looplet.stream_events import ToolProgressEvent
from looplet.telemetry import attributes, semconv
from looplet.telemetry.drops import count_drop
from looplet.telemetry.spans import Phase
from looplet.toolerrors import retry_delay_s, to_tool_error
from looplet.tools import ToolContext, failure, success
from looplet.types import ToolCall, ToolResult


def execute_tools(run: RunScope, above: Phase, items: Sequence[Pending]) -> Effects[None]:
    """Run tools, several of them at the same time.

    Whoever still works when the run is left is told so by the token of his call.
    """
    lane = PARALLEL if len(items) > 1 else SERIAL
    token = run.cancel_token.child()
    try:
        yield from gather([execute_tool(run, above, item, lane, token) for item in items])
    except BaseException as error:
        _tell(token, _reason_of(error))
        raise


def execute_tool(run: RunScope, above: Phase, item: Pending, lane: str, token: CancelToken) -> Effects[None]:
    """Run one tool.  A failing tool is an observation for the model, never an exception."""
    call = item.call
    marked = attributes.of_call_marker(call, item.number) if run.trace.recording else None
    told = attributes.of_call(call, item.number, True) if run.trace.recording else None
    with above.phase(semconv.TOOL_START, attributes=marked):
        pass
    run.trace.durable()  # from here on a resumed run knows that the call may have had its effect
    with above.phase(semconv.EXECUTE_TOOL, call.tool, attributes=told) as phase:
        item.ran, item.context = True, phase.context
        result = yield from _perform(run, phase, item, lane, token)
        item.result = item.recorded = result = clean_result(run, result, duration_ms=phase.stop_clock())
        _record_result(run, phase, call, result)
    run.trace.durable()


def _perform(run: RunScope, phase: Phase, item: Pending, lane: str, token: CancelToken) -> Effects[ToolResult]:
    """Make the call, and again as often as the tool was declared to bear it."""
    spec = item.spec
    assert spec is not None
    for attempt in count(1):
        result: ToolResult = yield from _attempt(run, phase, item, lane, token.child())
        error = result.error_detail
        if error is None or attempt > spec.retries:
            break
        delay_s = retry_delay_s(error, attempt, idempotent=spec.idempotent)
        if delay_s is None or token.is_cancelled:
            break
        _record_retry(run, phase, attempt, error, delay_s)
        yield Wait(delay_s, token)
        if token.is_cancelled:
            break
    return result


def _attempt(run: RunScope, phase: Phase, item: Pending, lane: str, token: CancelToken) -> Effects[ToolResult]:
    """Make the call once."""
    spec, call = item.spec, item.call
    assert spec is not None
    ctx = _tool_context(run, phase, item, token)
    try:
        context = set_value(CANCEL_KEY, token, phase.context)
        lane = INLINE if spec.is_async else lane
        value = yield Call(spec.bind(item.arguments, ctx), context, lane, spec.timeout_s)
        result = success(call, value, warnings=ctx.warnings)
    except CallTimeout:
        _tell(token, "timeout")
        phase.put({semconv.TOOL_ABANDONED: True})
        words = f"TimeoutError: no answer within {spec.timeout_s:g} s; the call was abandoned"
        error = ToolError(words, kind=ErrorKind.TIMEOUT, retriable=True)
        result = failure(call, error, warnings=ctx.warnings)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tool raises, the model gets to see it
        result = failure(call, to_tool_error(error), warnings=ctx.warnings)
    except BaseException as error:
        _tell(token, _reason_of(error))
        raise
    token.forget()  # the caller's token may live for ever
    return result


def _reason_of(error: BaseException) -> str:
    return error.reason if isinstance(error, Closing) else "cancelled"


def _tell(token: CancelToken, reason: str) -> None:
    try:
        token.cancel(reason)
    except Exception as error:  # noqa: BLE001 - a callback of the tool's own
        count_drop("a tool's on_cancel callback failed", repr(error))


def _tool_context(run: RunScope, phase: Phase, item: Pending, token: CancelToken) -> ToolContext:
    spec = item.spec
    assert spec is not None
    return ToolContext(
        cancel_token=token,
        on_progress=partial(_report_progress, run, phase, item, token),
        session_id=run.run_id,
        metadata={**run.config.tool_metadata, **getattr(run.state, "metadata", {})},
        llm=handle_of(run, phase, "tool", is_async=spec.is_async, token=token),
        request_approval=_asker(item.approver(run.config.approval_handler), awaits=spec.is_async),
        resources=run.tools.needed(spec),
    )


def _asker(handler: Callable[..., Any] | None, *, awaits: bool) -> Callable[[str, list[str]], Any] | None:
    """Return who answers a tool's questions; a plain tool cannot await an answer."""
    if handler is None or awaits:
        return handler

    def ask(prompt: str, options: list[str]) -> Any:
        answer = handler(prompt, options)
        if is_awaitable(answer):
            discard(answer)
            raise ConfigError("the approval_handler is `async def`: make the tool that asks `async def`, and await it")
        return answer

    return ask


def _report_progress(run: RunScope, phase: Phase, item: Pending, token: CancelToken, stage: str, data: Any) -> None:
    if token.is_cancelled or run.trace.recorder.closed:  # nobody waits for this call any more
        return
    stage, data = run.boundary.text(str(stage)), run.boundary.clean(data)
    told = {semconv.PROGRESS_STAGE: stage, semconv.PROGRESS_DATA: data}
    phase.event(semconv.EVENT_PROGRESS, {} if run.trace.withhold_results else told)
    if run.stream:
        event = ToolProgressEvent(run.run_id, step=item.number, call_id=item.call.call_id, stage=stage, data=data)
        run.stream.emit(event)
    facts = {"step_num": item.number, "tool_call": item.call, "extra": {"stage": stage, "data": data}}
    for bound in run.hooks.of(slot(LifecycleEvent.TOOL_PROGRESS)):  # in the tool's own thread, where nobody can steer
        told_hook = partial(bound.function, payload(run, LifecycleEvent.TOOL_PROGRESS, **facts))
        run.trace.tell(bound.function, told_hook, partial(interpret, hook=bound.hook, method=bound.method))


def _record_retry(run: RunScope, phase: Phase, attempt: int, error: ToolError, delay_s: float) -> None:
    told: dict[str, Any] = {
        semconv.ATTEMPT: attempt,
        semconv.ERROR_TYPE: str(error.kind),
        semconv.RETRY_DELAY: delay_s,
    }
    if not run.trace.withhold_results:
        told[semconv.EXCEPTION_MESSAGE] = run.boundary.text(error.message)
    phase.event(semconv.EVENT_TOOL_RETRY, told)
    if error.kind is ErrorKind.TIMEOUT:
        phase.put({semconv.TOOL_ABANDONED: False})  # the next attempt says what the call came to


def _record_result(run: RunScope, phase: Phase, call: ToolCall, result: ToolResult) -> None:
    phase.note(tool_call=call, tool_result=result)
    if phase.recording:
        withheld = run.trace.withhold_results
        phase.put({semconv.TOOL_WITHHELD: True} if withheld else attributes.of_result(result))
    if result.error is not None and result.error_kind is not None:
        phase.fail(str(result.error_kind), "" if run.trace.withhold_results else result.error)

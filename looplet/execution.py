"""Execution: one tool call, from its marker in the trace to its result."""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from traceback import walk_tb
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, Final

from opentelemetry.context import set_value

from looplet.admission import Pending
from looplet.approval import answer_of
from looplet.awaiting import discard, is_awaitable, is_cancelled_here
from looplet.cancel import CANCEL_KEY, CancelToken
from looplet.decisions import interpret
from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.events import LifecycleEvent, slot
from looplet.handle import handle_of
from looplet.plan import INLINE, PARALLEL, SERIAL, Call, CallTimeout, Closing, Effects, Escaped, Wait, gather
from looplet.scope import RunScope
from looplet.steering import clean_result, payload
from looplet.stream_events import ToolProgressEvent
from looplet.telemetry import attributes, semconv
from looplet.telemetry.drops import count_drop
from looplet.telemetry.spans import Phase
from looplet.toolerrors import retry_delay_s, to_tool_error
from looplet.tools import ToolContext, failure, success
from looplet.types import ToolCall, ToolResult

NO_CONTEXT: Final = ToolContext()
"""for tools without a parameter `ctx`"""

_LAZY: Final[dict[type, tuple[str, str]]] = {
    GeneratorType: ("a generator", "return list(...)"),
    AsyncGeneratorType: ("an async generator", "return [x async for x in ...]"),
    CoroutineType: ("a coroutine", "return await ..."),
}
"""results whose code has not run yet → what they are called, what to write instead"""


def execute_tools(run: RunScope, above: Phase, items: Sequence[Pending]) -> Effects[None]:
    """Run tools, several of them at the same time.

    When the run is left, the tokens of the calls that still run are cancelled.
    """
    lane = PARALLEL if len(items) > 1 else SERIAL
    token = run.cancel_token.child()
    try:
        yield from gather([execute_tool(run, above, item, lane, token) for item in items])
    except BaseException as error:
        _cancel(token, _reason_of(error))
        raise


def execute_tool(run: RunScope, above: Phase, item: Pending, lane: str, token: CancelToken) -> Effects[None]:
    """Run one tool.  A failing tool is an observation for the model, never an exception."""
    call = item.call
    marked = attributes.of_call_marker(call, item.number) if run.trace.recording else None
    facts = attributes.of_call(call, item.number, True) if run.trace.recording else None
    with above.phase(semconv.TOOL_START, attributes=marked):
        pass
    run.trace.durable()  # from here on a resumed run knows that the call may have had its effect
    with above.phase(semconv.EXECUTE_TOOL, call.tool, attributes=facts) as phase:
        item.ran, item.context = True, phase.context
        result = yield from _perform(run, phase, item, lane, token)
        item.result = item.recorded = result = clean_result(run, result, duration_ms=phase.stop_clock())
        _record_result(run, phase, call, result)
    run.trace.durable()


def _perform(run: RunScope, phase: Phase, item: Pending, lane: str, token: CancelToken) -> Effects[ToolResult]:
    """Make the call, and retry it as the tool's `retries` and `idempotent` allow."""
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
    ctx = _tool_context(run, phase, item, token) if spec.accepts_ctx else NO_CONTEXT
    try:
        context = set_value(CANCEL_KEY, token, phase.context)
        lane = INLINE if spec.is_async else lane
        value = yield Call(spec.bind(item.arguments, ctx), context, lane, spec.timeout_s)
        result = success(call, _require_eager(call.tool, value), warnings=ctx.warnings)
    except CallTimeout:
        _cancel(token, "timeout")
        phase.put({semconv.TOOL_ABANDONED: True})
        words = f"TimeoutError: no answer within {spec.timeout_s:g} s; the call was abandoned"
        error = ToolError(words, kind=ErrorKind.TIMEOUT, retriable=True)
        result = failure(call, error, warnings=ctx.warnings)
    except BaseException as error:
        if not _is_tool_failure(error):
            _cancel(token, _reason_of(error))
            raise
        result = failure(call, to_tool_error(_raised(error)), warnings=ctx.warnings)
    token.forget()  # the caller's token may live for ever
    return result


def _require_eager(tool: str, value: Any) -> Any:
    """Return what a tool returned.  Raises ToolError for a generator or a coroutine: the tool's code has not run."""
    if type(value) not in _LAZY:
        return value
    kind, cure = _LAZY[type(value)]
    discard(value)
    raise ToolError(f"{tool} returned {kind} and has done nothing; its function must return values: {cure}")


def _raised(error: BaseException) -> BaseException:
    """Return what the tool itself raised."""
    return error.__cause__ or error if isinstance(error, Escaped) else error


def _is_tool_failure(error: BaseException) -> bool:
    """Tell whether an error is a result of the tool, for the model to read; any other, such as a Ctrl-C, ends the run.

    `SystemExit`: the tool has failed, unless a signal handler raised it.  `CancelledError`: the tool has failed when
    what it waited for was cancelled; the run ends when the task of the run was.
    """
    if isinstance(error, SystemExit):
        return not _is_of_signal_handler(error)
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and isinstance(error, asyncio.CancelledError):
        return not is_cancelled_here()
    return isinstance(error, Exception)


def _is_of_signal_handler(error: SystemExit) -> bool:
    handlers = [getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()]
    return any(frame.f_code in handlers for frame, _ in walk_tb(error.__traceback__))


def _reason_of(error: BaseException) -> str:
    return error.reason if isinstance(error, Closing) else "cancelled"


def _cancel(token: CancelToken, reason: str) -> None:
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
        request_approval=item.approver(_asker(run.config.approval_handler, awaits=spec.is_async)),
        resources=run.tools.needed(spec),
    )


def _asker(handler: Callable[..., Any] | None, *, awaits: bool) -> Callable[[str, list[str]], Any] | None:
    """Return who answers a tool's questions, with one of the options or None; a plain tool cannot await an answer."""
    if handler is None:
        return None

    def ask(prompt: str, options: list[str]) -> Any:
        answer = handler(prompt, list(options))
        if not is_awaitable(answer):
            return answer if answer is None else answer_of(answer, options)
        if awaits:
            return _awaited(answer, options)
        discard(answer)
        raise ConfigError("the approval_handler is `async def`: make the tool that asks `async def`, and await it")

    return ask


async def _awaited(answer: Awaitable[Any], options: list[str]) -> str | None:
    said = await answer
    return said if said is None else answer_of(said, options)


def _report_progress(run: RunScope, phase: Phase, item: Pending, token: CancelToken, stage: str, data: Any) -> None:
    if token.is_cancelled or run.trace.recorder.closed:  # nobody waits for this call any more
        return
    stage, data = run.boundary.text(str(stage)), run.boundary.clean(data)
    progress = {semconv.PROGRESS_STAGE: stage, semconv.PROGRESS_DATA: data}
    phase.event(semconv.EVENT_PROGRESS, {} if run.trace.withhold_results else progress)
    if run.stream:
        event = ToolProgressEvent(run.run_id, step=item.number, call_id=item.call.call_id, stage=stage, data=data)
        run.stream.emit(event)
    facts = {"step_num": item.number, "tool_call": item.call, "extra": {"stage": stage, "data": data}}
    for bound in run.hooks.of(slot(LifecycleEvent.TOOL_PROGRESS)):  # in the tool's own thread, where nobody can steer
        notify_hook = partial(bound.function, payload(run, LifecycleEvent.TOOL_PROGRESS, **facts))
        run.trace.notify(bound.function, notify_hook, partial(interpret, hook=bound.hook, method=bound.method))


def _record_retry(run: RunScope, phase: Phase, attempt: int, error: ToolError, delay_s: float) -> None:
    facts: dict[str, Any] = {
        semconv.ATTEMPT: attempt,
        semconv.ERROR_TYPE: str(error.kind),
        semconv.RETRY_DELAY: delay_s,
    }
    if not run.trace.withhold_results:
        facts[semconv.EXCEPTION_MESSAGE] = run.boundary.text(error.message)
    phase.event(semconv.EVENT_TOOL_RETRY, facts)
    if error.kind is ErrorKind.TIMEOUT:
        phase.put({semconv.TOOL_ABANDONED: False})  # the next attempt says what the call came to


def _record_result(run: RunScope, phase: Phase, call: ToolCall, result: ToolResult) -> None:
    phase.note(tool_call=call, tool_result=result)
    if phase.recording:
        withheld = run.withholds_results
        phase.put({semconv.TOOL_WITHHELD: True} if withheld else attributes.of_result(result))
    if result.error is not None and result.error_kind is not None:
        phase.fail(str(result.error_kind), "" if run.withholds_results else result.error)

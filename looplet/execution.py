"""Execution: one tool call, from its marker in the trace to its result."""

from __future__ import annotations

from functools import partial
from typing import Any

from looplet.admission import Pending
from looplet.errors import ErrorKind, ToolError
from looplet.plan import INLINE, CallTimeout, Effects
from looplet.scope import RunScope
from looplet.steering import clean_result
from looplet.telemetry import attributes, semconv
from looplet.telemetry.spans import Phase
from looplet.tools import ToolContext, ToolSpec, failure, success, to_tool_error
from looplet.types import ToolCall, ToolResult


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

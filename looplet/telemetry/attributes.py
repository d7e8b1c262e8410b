"""How looplet's values look as span attributes: pure functions, testable without a tracer."""

from __future__ import annotations

from typing import Any

from looplet.ledger import Ledger
from looplet.message_log import LoggedRequest
from looplet.messages import Message, encode, sha256
from looplet.telemetry import semconv
from looplet.types import Reply, Step, ToolCall, ToolResult, Usage

Attributes = dict[str, Any]


def of_request(request: LoggedRequest) -> Attributes:
    """Return what was new in a request, and references to the rest (`looplet.message_log`)."""
    attributes: Attributes = {
        semconv.INPUT_REFS: request.refs,
        semconv.INPUT_SHA256: request.sha256,
        semconv.INPUT_REQUEST: request.number,
    }
    if request.new:
        attributes[semconv.INPUT_FIRST] = request.first
        attributes[semconv.INPUT_MESSAGES] = request.new_json
    return attributes


def of_reply(reply: Reply) -> Attributes:
    """Return what the model answered; for what it cost see `of_usage`."""
    message = {**Message.of_reply(reply).to_dict(), "finish_reason": reply.finish_reason or "stop"}
    attributes: Attributes = {
        semconv.OUTPUT_MESSAGES: encode([message]).decode(),
        semconv.RESPONSE_FINISH_REASONS: [reply.finish_reason or "stop"],
    }
    if reply.model:
        attributes[semconv.RESPONSE_MODEL] = reply.model
    if reply.response_id:
        attributes[semconv.RESPONSE_ID] = reply.response_id
    return attributes


def of_usage(usage: Usage | None) -> Attributes:
    """Return the tokens of one model call; a call without reported usage says so and counts nothing."""
    if usage is None:
        return {semconv.USAGE_REPORTED: False}
    attributes: Attributes = {
        semconv.INPUT_TOKENS: usage.input_tokens,
        semconv.OUTPUT_TOKENS: usage.output_tokens,
    }
    if usage.cached_tokens:
        attributes[semconv.CACHE_READ_TOKENS] = usage.cached_tokens
    if usage.cache_write_tokens:
        attributes[semconv.CACHE_WRITE_TOKENS] = usage.cache_write_tokens
    if usage.reasoning_tokens:
        attributes[semconv.REASONING_TOKENS] = usage.reasoning_tokens
    if usage.cost_usd is not None:
        attributes[semconv.COST_USD] = usage.cost_usd
    return attributes


def of_ledger(ledger: Ledger) -> Attributes:
    """Return the totals of a run: of its own model calls, and with those of the runs below it."""
    own, total = ledger.own, ledger.total
    attributes: Attributes = {
        semconv.RUN_INPUT_TOKENS: own.input_tokens,
        semconv.RUN_OUTPUT_TOKENS: own.output_tokens,
        semconv.TOTAL_INPUT_TOKENS: total.input_tokens,
        semconv.TOTAL_OUTPUT_TOKENS: total.output_tokens,
    }
    if own.cost_usd is not None:
        attributes[semconv.RUN_COST_USD] = own.cost_usd
    if total.cost_usd is not None:
        attributes[semconv.TOTAL_COST_USD] = total.cost_usd
    if ledger.unreported:
        attributes[semconv.UNREPORTED_CALLS] = ledger.unreported
    return attributes


def of_call(call: ToolCall, step_number: int, known: bool) -> Attributes:
    """Return a tool call as it begins to run."""
    attributes: Attributes = {
        semconv.OPERATION_NAME: semconv.EXECUTE_TOOL,
        semconv.TOOL_NAME: call.tool if known else semconv.UNKNOWN_TOOL,
        semconv.TOOL_TYPE: "function",
        semconv.TOOL_CALL_ID: call.call_id,
        semconv.STEP_NUMBER: step_number,
        semconv.TOOL_CALL_ARGUMENTS: encode(call.args).decode(),
    }
    extra = {"reasoning": call.reasoning, "metadata": call.metadata}
    if any(extra.values()):
        attributes[semconv.TOOL_CALL] = encode(extra).decode()
    return attributes


def of_call_marker(call: ToolCall, step_number: int) -> Attributes:
    """Return the marker that is on disk before a tool runs."""
    return {
        semconv.TOOL_NAME: call.tool,
        semconv.TOOL_CALL_ID: call.call_id,
        semconv.STEP_NUMBER: step_number,
        semconv.ARGUMENTS_SHA256: hash_arguments(call),
    }


def hash_arguments(call: ToolCall) -> str:
    """Return the hash that binds a verdict or a resumed run to the arguments of a call."""
    return str(sha256(encode(call.args)).hexdigest())


def of_result(result: ToolResult) -> Attributes:
    """Return what a tool call came to, but for its duration, which is the span's."""
    attributes: Attributes = {}
    if result.error is None:
        attributes[semconv.TOOL_CALL_RESULT] = encode(result.data).decode()
    rest = {
        "error": result.error,
        "error_detail": result.error_detail and result.error_detail.to_dict(),
        "result_key": result.result_key,
        "warnings": list(result.warnings),
        "metadata": result.metadata,
    }
    said = {name: value for name, value in rest.items() if value not in (None, [], {})}
    if result.error is not None and result.data is not None:
        said["data"] = result.data
    if said:
        attributes[semconv.TOOL_RESULT] = encode(said).decode()
    return attributes


def of_step(step: Step) -> Attributes:
    """Return a whole step, for steps that no `execute_tool` span tells."""
    return {semconv.STEP_NUMBER: step.number, semconv.STEP_RECORD: encode(step.to_dict()).decode()}


def of_withheld_step(step: Step) -> Attributes:
    """Return a step but for its result, which is told only as a request sends it."""
    record = {"step": step.number, "tool_call": step.tool_call.to_dict()}
    return {
        semconv.STEP_NUMBER: step.number,
        semconv.TOOL_WITHHELD: True,
        semconv.STEP_RECORD: encode(record).decode(),
    }


def of_task(task: dict[str, Any]) -> Attributes:
    """Return the run's task, as JSON."""
    return {semconv.TASK: encode(task).decode()}

"""Redacting what is recorded where the provider's copy stays raw (`redact_upstream=False`).

By then the values are attributes, many of them JSON.  JSON is redacted value by value, never as a text, and what holds
our own records together (roles, types, ids, numbers) stays, so that a trace can be read whatever the redactor does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from looplet.boundary import Boundary
from looplet.telemetry import semconv

_VALUES: Final = frozenset({semconv.TASK, semconv.TOOL_CALL_ARGUMENTS, semconv.TOOL_CALL_RESULT})
"""attributes whose JSON is somebody else's value"""
_RECORDS: Final = frozenset(
    {semconv.OUTPUT_MESSAGES, semconv.TOOL_DEFINITIONS, semconv.TOOL_CALL, semconv.TOOL_RESULT, semconv.STEP_RECORD}
)
"""attributes whose JSON is a record of ours around such values"""
_SAID_IN_PAUSE: Final = frozenset(
    {
        "args", "description", "options", "reasoning", "metadata", "last_error", "theory", "entities", "findings",
        "highlights", "recall_key", "briefing", "turn_prompt", "system_prompt", "hooks",
    }
)  # fmt: skip
"""what of a pause record is somebody else's"""
_FRAME: Final = frozenset(
    {"role", "type", "id", "finish_reason", "step", "call_id", "kind", "retriable", "duration_ms"}
)
_NESTED: Final = frozenset({"parts", "tool_call", "tool_result", "error_detail"})
_JSON: Final = _VALUES | _RECORDS | {semconv.PAUSE}


def redact_late(boundary: Boundary, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes whose content is redacted."""
    return {
        key: _redact(boundary, key, value)
        if key in semconv.CONTENT and key != semconv.INPUT_MESSAGES  # the message log has seen to those
        else value
        for key, value in attributes.items()
    }


def _redact(boundary: Boundary, key: str, value: Any) -> Any:
    import msgspec

    if key not in _JSON:
        return boundary.clean(value)
    try:
        told = msgspec.json.decode(value)
    except (msgspec.DecodeError, TypeError):  # user code gave a span of ours such an attribute
        return boundary.clean(value)
    data: bytes = msgspec.json.encode(_redact_json(boundary, key, told))
    return data.decode()


def _redact_json(boundary: Boundary, key: str, told: Any) -> Any:
    if key in _VALUES:
        return boundary.clean(told)
    return _redact_pause(boundary, told) if key == semconv.PAUSE else _redact_record(boundary, told)


def _redact_pause(boundary: Boundary, told: Any) -> Any:
    if isinstance(told, list):
        return [_redact_pause(boundary, item) for item in told]
    if not isinstance(told, dict):
        return told
    return {
        name: boundary.clean(value) if name in _SAID_IN_PAUSE else _redact_pause(boundary, value)
        for name, value in told.items()
    }


def _redact_record(boundary: Boundary, record: Any) -> Any:
    if isinstance(record, list):
        return [_redact_record(boundary, item) for item in record]
    if not isinstance(record, dict):
        return record
    return {
        name: value if name in _FRAME else _redact_record(boundary, value) if name in _NESTED else boundary.clean(value)
        for name, value in record.items()
    }

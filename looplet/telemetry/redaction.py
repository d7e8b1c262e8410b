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
_FRAME: Final = frozenset(
    {"role", "type", "id", "finish_reason", "step", "call_id", "kind", "retriable", "duration_ms"}
)
_NESTED: Final = frozenset({"parts", "tool_call", "tool_result", "error_detail"})


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

    if key not in _VALUES and key not in _RECORDS:
        return boundary.clean(value)
    try:
        told = msgspec.json.decode(value)
    except (msgspec.DecodeError, TypeError):  # user code gave a span of ours such an attribute
        return boundary.clean(value)
    data: bytes = msgspec.json.encode(boundary.clean(told) if key in _VALUES else _redact_record(boundary, told))
    return data.decode()


def _redact_record(boundary: Boundary, record: Any) -> Any:
    if isinstance(record, list):
        return [_redact_record(boundary, item) for item in record]
    if not isinstance(record, dict):
        return record
    return {
        name: value if name in _FRAME else _redact_record(boundary, value) if name in _NESTED else boundary.clean(value)
        for name, value in record.items()
    }

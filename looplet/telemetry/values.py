"""Values of attributes as they are read back: typed, and a TraceError with file, line and span where they are not.

looplet's own attributes are strict: what is not as looplet writes it was cut or changed.  Those of other writers are
read as far as they go: text that is no JSON stays text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from looplet.errors import ErrorKind, ToolError, TraceError
from looplet.messages import Message, Part
from looplet.telemetry import semconv
from looplet.telemetry.nodes import SpanNode
from looplet.telemetry.otlp_decode import parse_json
from looplet.types import ToolCall, ToolResult, Usage

T = TypeVar("T")

MAX_DEPTH: Final = 120
"""of JSON in an attribute: the boundary lets 100 levels through, a record of ours puts some around them"""
MAX_NUMBER: Final = 10**12
"""of turns, steps, tokens: larger ones are damage"""

_WHOLE: Final = frozenset(
    {
        semconv.TURN_NUMBER, semconv.STEP_NUMBER, semconv.SEGMENT_NUMBER, semconv.STEP_COUNT, semconv.TURN_COUNT,
        semconv.INPUT_FIRST, semconv.INPUT_REQUEST, semconv.INPUT_TOKENS, semconv.OUTPUT_TOKENS,
        semconv.CACHE_READ_TOKENS, semconv.CACHE_WRITE_TOKENS, semconv.REASONING_TOKENS,
    }
)  # fmt: skip
_TEXT: Final = frozenset(
    {
        semconv.RUN_ID, semconv.STOP_REASON, semconv.TASK, semconv.CONFIG, semconv.SESSION_LOG, semconv.INPUT_REFS,
        semconv.INPUT_SHA256, semconv.CHAT_PURPOSE, semconv.PROTOCOL, semconv.TOOL_RESULT, semconv.TOOL_CALL,
        semconv.STEP_RECORD, semconv.PARENT_RUN_ID, semconv.PARENT_CALL_ID, semconv.OPERATION_NAME,
        semconv.AGENT_NAME, semconv.TOOL_NAME, semconv.TOOL_CALL_ID, semconv.TOOL_CALL_ARGUMENTS,
        semconv.TOOL_CALL_RESULT, semconv.INPUT_MESSAGES, semconv.OUTPUT_MESSAGES, semconv.REQUEST_MODEL,
        semconv.RESPONSE_MODEL, semconv.ERROR_TYPE, semconv.PAUSE,
    }
)  # fmt: skip


def check(node: SpanNode) -> None:
    """Raise TraceError where an attribute is not of the type that looplet gives it.

    On spans of others this holds for the names that are looplet's own.
    """
    for attributes in (node.attributes, *(event.attributes for event in node.events)):
        for key in attributes.keys() & _TYPED:
            if node.is_own or key.startswith("looplet."):
                _check_value(node, key, attributes[key])


def _check_value(node: SpanNode, key: str, value: Any) -> None:
    if key in _WHOLE and not _is_count(value):
        raise node.problem(f"{key} is {_shown(value)}, and no whole number from 0 to {MAX_NUMBER}")
    if key in _TEXT and not isinstance(value, str):
        raise node.problem(f"{key} is {_shown(value)}, and no text")
    if key == semconv.COST_USD and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise node.problem(f"{key} is {_shown(value)}, and no number")


_TYPED: Final = _WHOLE | _TEXT | {semconv.COST_USD}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- JSON in attributes -------------------------------------------------------------------------------------------


def decode(text: str, path: str = "", line: int = 0) -> Any:
    """Return the value of a JSON attribute; raises TraceError when it was cut, as attribute limits do."""
    try:
        return parse_attribute(text)
    except ValueError as error:
        words = f"an attribute is not whole JSON ({_shown(text)}): {_cause(error)}"
        raise TraceError(words, path=path, line=line) from None


def _cause(error: ValueError) -> str:
    return str(error) if "nested" in str(error) else "was it cut by a limit?"


def parse_attribute(text: str) -> Any:
    """Return the value of a JSON text.  Raises ValueError."""
    value = parse_json(text.encode())
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if type(outer) in (dict, list) for inner in _items(outer)]
        if not level:
            return False
    return True


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def json_of(node: SpanNode, key: str) -> Any:
    """Return the value of a JSON attribute of looplet's, None without one; raises TraceError when it was cut."""
    text = node.attributes.get(key)
    return None if text is None else json_in(node, key, text)


def json_in(node: SpanNode, key: str, text: str) -> Any:
    """Return the value of a JSON text from somewhere in a span of looplet's; raises TraceError when it was cut."""
    try:
        return parse_attribute(text)
    except ValueError as error:
        raise node.problem(f"{key} is not whole JSON ({_shown(text)}): {_cause(error)}") from None


def as_type(node: SpanNode, key: str, value: Any, kind: type[T]) -> T:
    """Return a decoded value as `kind`; raises TraceError that says where in it what is missing."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, ValueError, TypeError, RecursionError) as error:
        raise node.problem(f"{key} is not as looplet writes it: {error}") from None


def text_or_json(node: SpanNode, key: str) -> Any:
    """Return the value of another writer's attribute: of JSON what it says, else the text; None without one."""
    value = node.attributes.get(key)
    if not isinstance(value, str):
        return value
    try:
        return parse_attribute(value)
    except ValueError:
        return value


# --- calls and results --------------------------------------------------------------------------------------------


class _Detail(msgspec.Struct):
    message: str
    kind: ErrorKind = ErrorKind.EXECUTION
    retriable: bool = False
    context: dict[str, Any] = {}
    recovery_hint: Any = None

    def build(self) -> ToolError:
        return ToolError(
            self.message,
            kind=self.kind,
            retriable=self.retriable,
            context=self.context,
            recovery_hint=self.recovery_hint,
        )


class Outcome(msgspec.Struct):
    """What a file says of a tool result."""

    tool: str = ""
    args_summary: str = ""
    data: Any = None
    error: str | None = None
    error_detail: _Detail | None = None
    duration_ms: float = 0.0
    result_key: Any = None
    call_id: str | None = None
    warnings: list[str] = []
    metadata: Any = {}

    def build(self, **known: Any) -> ToolResult:
        """Return the result, with some fields as they are known from elsewhere."""
        told = {name: getattr(self, name) for name in self.__struct_fields__}
        detail = self.error_detail.build() if self.error_detail is not None else None
        return ToolResult(**{**told, "error_detail": detail, "warnings": tuple(self.warnings), **known})


class CallRest(msgspec.Struct):
    """What a tool call holds beside name, id and arguments."""

    reasoning: str = ""
    metadata: dict[str, Any] = {}


class StepTold(msgspec.Struct):
    """A whole step; without a result when that was withheld."""

    step: int
    tool_call: ToolCall
    tool_result: Outcome | None = None


def usage_of(chat: SpanNode) -> Usage:
    """Return the usage that a `chat` span reports; zero when it reports none."""
    told = chat.attributes
    cost = told.get(semconv.COST_USD)
    return Usage(
        _count(told.get(semconv.INPUT_TOKENS)),
        _count(told.get(semconv.OUTPUT_TOKENS)),
        _count(told.get(semconv.CACHE_READ_TOKENS)),
        _count(told.get(semconv.REASONING_TOKENS)),
        cost if isinstance(cost, (int, float)) else None,
        _count(told.get(semconv.CACHE_WRITE_TOKENS)),
    )


def _count(value: Any) -> int:
    """Return a number of tokens, however it was written; 0 for what is none."""
    is_number = isinstance(value, str) and value.isdecimal() and len(value) < 20
    if is_number or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return value if _is_count(value) else 0


# --- messages -----------------------------------------------------------------------------------------------------


class _Told(msgspec.Struct):
    role: str
    parts: list[dict[str, Any]]


_FIELDS: Final[dict[str, dict[str, type | tuple[type, ...]]]] = {
    "text": {"content": str},
    "reasoning": {"content": str},
    "tool_call": {"id": str, "name": str, "arguments": (dict, type(None))},
    "tool_call_response": {"id": str, "response": object},
}
"""what a part of each type must hold"""


def messages_of(node: SpanNode, key: str) -> list[Message]:
    """Return the messages in an attribute of looplet's; raises TraceError where it holds something else."""
    told = as_type(node, key, json_of(node, key) or [], list[_Told])
    for message in told:
        for part in message.parts:
            if problem := _wrong_in(part):
                raise node.problem(f"{key} is not as looplet writes it: a part of a message {problem}")
    return [Message(message.role, tuple(message.parts)) for message in told]


def _wrong_in(part: Part) -> str:
    if not isinstance(part.get("type"), str):
        return "has no type"
    for name, kind in _FIELDS.get(part["type"], {}).items():
        if name not in part or not isinstance(part[name], kind):
            return f"of type {part['type']!r} has no proper {name!r}"
    return ""


def foreign_messages(node: SpanNode, key: str, role: str) -> list[Message]:
    """Return the messages in an attribute of another writer's; what has no form of a message is a text of `role`."""
    told = text_or_json(node, key)
    if told is None:
        return []
    return [_foreign_message(message, role) for message in (told if isinstance(told, list) else [told])]


def _foreign_message(told: Any, role: str) -> Message:
    if not isinstance(told, dict):
        return Message.of_text(role, _as_text(told))
    role = str(told.get("role") or role)
    parts = told.get("parts", told.get("content"))
    if isinstance(parts, list):
        return Message(role, tuple(map(_foreign_part, parts)))
    return Message.of_text(role, _as_text(told if parts is None else parts))


def _foreign_part(told: Any) -> Part:
    if not isinstance(told, dict) or not isinstance(told.get("type"), str):
        return {"type": "text", "content": _as_text(told)}
    filled: Part = _FILLED.get(told["type"], dict)(told)
    return {"type": "text", "content": _as_text(told)} if _wrong_in(filled) else filled


def _filled_text(told: Part) -> Part:
    return {**told, "content": told.get("content", told.get("text"))}


def _filled_call(told: Part) -> Part:
    arguments = told.get("arguments")
    return {**told, "id": str(told.get("id") or ""), "name": str(told.get("name") or ""),
            "arguments": arguments if arguments is None else as_arguments(arguments)}  # fmt: skip


def _filled_response(told: Part) -> Part:
    return {**told, "id": str(told.get("id") or ""), "response": told.get("response", told.get("result"))}


_FILLED: Final[dict[str, Callable[[Part], Part]]] = {
    "text": _filled_text,
    "reasoning": _filled_text,
    "tool_call": _filled_call,
    "tool_call_response": _filled_response,
}


def as_arguments(value: Any) -> dict[str, Any]:
    """Return another writer's arguments of a call as a dict; what is none stands under `text`."""
    if isinstance(value, str):
        try:
            decoded = parse_attribute(value)
        except ValueError:
            decoded = None
        value = decoded if isinstance(decoded, dict) else value
    if value is None or value == "":
        return {}
    return value if isinstance(value, dict) else {"text": _as_text(value)}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()

"""OpenAI's Chat Completions format: from our messages to a request, from a response to a `Reply`.

Pure functions; `looplet.backends.openai` does the asking.  Responses come from many servers that only claim the format,
so everything in one may be missing or of another type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from looplet.errors import BackendError
from looplet.messages import Message, Part, encode
from looplet.prompt import part_text
from looplet.types import Reply, ToolCall, Usage, cut

Wire = dict[str, Any]

REPAIRS: Final[Mapping[str, str | None]] = {"max_tokens": "max_completion_tokens", "temperature": None}
"""parameters that some models refuse, and what to send instead"""
NOT_RUN: Final = '{"error":"not run"}'
"""stands for the result of a call that has none: the API wants one for each"""

_FINISH_REASONS: Final = {
    "stop": "stop",
    "length": "length",
    "model_length": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_call",
    "function_call": "tool_call",
    "error": "error",
    "insufficient_system_resource": "error",
}


# --- requests -------------------------------------------------------------------------------------------------------


def request_of(
    messages: Sequence[Message],
    *,
    model: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: Any = None,
    system_prompt: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Wire:
    """Return the keyword arguments of `client.chat.completions.create`; `extra` wins over everything else."""
    request: Wire = {"model": model, "messages": wire_messages(messages, system_prompt)}
    if tools:
        request["tools"] = [{"type": "function", "function": dict(tool)} for tool in tools]
        if tool_choice is not None:
            request["tool_choice"] = tool_choice
    if max_tokens is not None:
        request["max_tokens"] = max_tokens
    if temperature is not None:
        request["temperature"] = temperature
    return {**request, **(extra or {})}


def repaired(request: Wire, refused: str) -> Wire:
    """Return the request for a model that refuses one of the `REPAIRS`."""
    rest = {name: value for name, value in request.items() if name != refused}
    instead = REPAIRS[refused]
    if instead is not None and refused in request:
        rest.setdefault(instead, request[refused])
    return rest


def wire_messages(messages: Sequence[Message], system_prompt: str = "") -> list[Wire]:
    """Return the messages as the API takes them: each tool call is followed by its result, wherever that stood.

    A result whose call is not there (compacted away, or made in plain text) becomes a user message.
    """
    wire: list[Wire] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    waiting: dict[str, Wire] = {}
    for message in messages:
        if message.role == "tool":
            wire += _lone_results(message, waiting)
            continue
        wire.append(_wire_message(message))
        for call in wire[-1].get("tool_calls", ()):
            result = {"role": "tool", "tool_call_id": call["id"], "content": NOT_RUN}
            waiting[call["id"]] = result
            wire.append(result)
    return wire


def _lone_results(message: Message, waiting: dict[str, Wire]) -> list[Wire]:
    """Put each result behind its call; return those that have none."""
    lone = []
    for part in message.parts:
        call_id = str(part.get("id") or "")
        result = waiting.pop(call_id, None)
        if result is not None:
            result["content"] = part_text(part)
        else:
            lone.append({"role": "user", "content": f"Result of tool call {call_id}:\n{part_text(part)}"})
    return lone


def _wire_message(message: Message) -> Wire:
    text = message.text
    calls = [_wire_call(part) for part in message.parts if part["type"] == "tool_call"]
    if not calls:
        return {"role": message.role, "content": text}
    return {"role": message.role, "content": text or None, "tool_calls": calls}


def _wire_call(part: Part) -> Wire:
    arguments = part.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else encode(arguments).decode()
    function = {"name": _wire_name(str(part.get("name") or "")), "arguments": text}
    return {"id": str(part.get("id") or ""), "type": "function", "function": function}


def _wire_name(name: str) -> str:
    """Return a name that the API takes back: models make up names that it refuses."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64] or "unknown"


# --- responses ------------------------------------------------------------------------------------------------------


def reply_of(completion: Any) -> Reply:
    """Return what a response says; raises BackendError (`bad_response`) when it says nothing."""
    choice = _first_choice(completion)
    message = _field(choice, "message")
    calls = tuple(_call_of(call) for call in _field(message, "tool_calls") or ())
    refusal = _text(_field(message, "refusal"))
    return Reply(
        text=_text(_field(message, "content")) or refusal,
        tool_calls=calls,
        usage=_usage_of(_field(completion, "usage")),
        model=_text(_field(completion, "model")),
        response_id=_text(_field(completion, "id")),
        finish_reason=_finish_reason(_field(choice, "finish_reason"), calls),
        reasoning=_text(_field(message, "reasoning_content") or _field(message, "reasoning")),
        metadata={"refusal": refusal} if refusal else {},
    )


def _first_choice(completion: Any) -> Any:
    choices = _field(completion, "choices")
    if isinstance(choices, list) and choices and _field(choices[0], "message") is not None:
        return choices[0]
    if isinstance(completion, str):
        words = f"the answer is no JSON: {cut(' '.join(completion.split()), 120)!r}; does base_url= end in /v1?"
        raise BackendError(words, kind="bad_response")
    error = _field(completion, "error")
    said = _text(_field(error, "message")) or (str(error) if error else "")
    words = "the answer has no choices" + (f"; it says: {cut(said, 300)}" if said else "; try again")
    raise BackendError(words, kind="bad_response", retryable=True)


def _call_of(call: Any) -> ToolCall:
    function = _field(call, "function")
    arguments = _arguments(_field(function, "arguments"))
    return ToolCall(_text(_field(function, "name")), arguments, call_id=_text(_field(call, "id")))


def _arguments(given: Any) -> dict[str, Any]:
    """Return a call's arguments; what is no JSON object goes to the registry as it is, which tells the model."""
    if isinstance(given, Mapping):
        return dict(given)
    if given is None or given == "":
        return {}
    try:
        value = json.loads(given)
    except (TypeError, ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"_raw_arguments": given if isinstance(given, str) else str(given)}


def _usage_of(usage: Any) -> Usage | None:
    sent, received = _field(usage, "prompt_tokens"), _field(usage, "completion_tokens")
    if sent is None and received is None:
        return None
    return Usage(
        _count(sent),
        _count(received),
        _count(_field(_field(usage, "prompt_tokens_details"), "cached_tokens")),
        _count(_field(_field(usage, "completion_tokens_details"), "reasoning_tokens")),
    )


def _finish_reason(reason: Any, calls: Sequence[ToolCall]) -> str:
    return _FINISH_REASONS.get(str(reason)) or ("tool_call" if calls else "stop")


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _text(value: Any) -> str:
    """Return a string as it is, the text parts of a list joined, an empty string for anything else."""
    if isinstance(value, list):
        return "".join(_text(_field(part, "text")) for part in value)
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0

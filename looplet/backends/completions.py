"""OpenAI's Chat Completions format: from our messages to a request, from a response to a `Reply`.

Pure functions; `looplet.backends.openai` does the asking.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, Final

from looplet.backends.wire import (
    NOT_RUN,
    Wire,
    bad_response,
    call_of,
    count_of,
    counts_of,
    field_of,
    finish_reason,
    is_image,
    results_of,
    text_of,
    wire_name,
)
from looplet.messages import Message, Part, encode
from looplet.prompt import part_text
from looplet.types import Reply, ToolCall, Usage

REPAIRS: Final[Mapping[str, str | None]] = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "stream_options": None,
}
"""parameters that some models refuse, and what to send instead"""

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


def wire_messages(messages: Sequence[Message], system_prompt: str = "") -> list[Wire]:
    """Return the messages as the API takes them: each tool call is followed by its result, wherever that stood.

    A result whose call is not there (compacted away, or made in plain text) becomes a user message.  So do the images
    of results, for which the API has no room: one message behind all results that were given together.
    """
    wire: list[Wire] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    waiting: dict[str, Wire] = {}
    for are_results, group in groupby(messages, key=lambda message: message.role == "tool"):
        if are_results:
            wire += _settle(group, waiting)
            continue
        for message in group:
            wire.append(_wire_message(message))
            for call in wire[-1].get("tool_calls", ()):
                result = {"role": "tool", "tool_call_id": call["id"], "content": NOT_RUN}
                waiting[call["id"]] = result
                wire.append(result)
    return wire


def _settle(messages: Iterable[Message], waiting: dict[str, Wire]) -> Iterator[Wire]:
    """Write each result into the place that waits for it; yield the user messages that say what had no place."""
    shown: list[Wire] = []
    for result in chain.from_iterable(results_of(message, waiting) for message in messages):
        images = [*map(_image, result.images)]
        if result.place is None:
            yield {"role": "user", "content": [_text(result.text), *images] if images else result.text}
            continue
        result.place["content"] = result.text
        if images:
            shown += [_text(f"Images of tool call {result.place['tool_call_id']}:"), *images]
    if shown:
        yield {"role": "user", "content": shown}


def _wire_message(message: Message) -> Wire:
    text = message.text
    calls = [_wire_call(part) for part in message.parts if part["type"] == "tool_call"]
    if calls:
        return {"role": message.role, "content": text or None, "tool_calls": calls}
    if message.role == "user" and any(map(is_image, message.parts)):
        return {"role": "user", "content": [*_user_content(message.parts)]}
    return {"role": message.role, "content": text}


def _user_content(parts: Iterable[Part]) -> Iterator[Wire]:
    for part in parts:
        if is_image(part):
            yield _image(part)
        elif text := part_text(part):
            yield _text(text)


def _text(text: str) -> Wire:
    return {"type": "text", "text": text}


def _image(part: Part) -> Wire:
    url = part["uri"] if part["type"] == "uri" else f"data:{part['mime_type']};base64,{part['content']}"
    return {"type": "image_url", "image_url": {"url": url}}


def _wire_call(part: Part) -> Wire:
    arguments = part.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else encode(arguments).decode()
    function = {"name": wire_name(str(part.get("name") or "")), "arguments": text}
    return {"id": str(part.get("id") or ""), "type": "function", "function": function}


# --- responses ------------------------------------------------------------------------------------------------------


def reply_of(completion: Any) -> Reply:
    """Return what a response says; raises BackendError (`bad_response`) when it says nothing."""
    choice = _first_choice(completion)
    message = field_of(choice, "message")
    calls = tuple(_call_of(call) for call in field_of(message, "tool_calls") or ())
    refusal = text_of(field_of(message, "refusal"))
    return Reply(
        text=text_of(field_of(message, "content")) or refusal,
        tool_calls=calls,
        usage=_usage_of(field_of(completion, "usage")),
        model=text_of(field_of(completion, "model")),
        response_id=text_of(field_of(completion, "id")),
        finish_reason=finish_reason(_FINISH_REASONS.get(str(field_of(choice, "finish_reason"))), bool(calls)),
        reasoning=text_of(field_of(message, "reasoning_content") or field_of(message, "reasoning")),
        metadata={"refusal": refusal} if refusal else {},
    )


def _first_choice(completion: Any) -> Any:
    choices = field_of(completion, "choices")
    if isinstance(choices, list) and choices and field_of(choices[0], "message") is not None:
        return choices[0]
    raise bad_response(completion, "choices", "does base_url= end in /v1?", _usage_of(field_of(completion, "usage")))


def _call_of(call: Any) -> ToolCall:
    function = field_of(call, "function")
    return call_of(field_of(function, "name"), field_of(function, "arguments"), field_of(call, "id"))


def _usage_of(usage: Any) -> Usage | None:
    counts = counts_of(usage, "prompt_tokens", "completion_tokens")
    if counts is None:
        return None
    return Usage(
        *counts,
        count_of(field_of(field_of(usage, "prompt_tokens_details"), "cached_tokens")),
        count_of(field_of(field_of(usage, "completion_tokens_details"), "reasoning_tokens")),
    )

"""What OpenAI's chat completions API refuses in a request, as far as an agent engine can get it wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from looplet.testing._answers import Fault

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_IMAGE_URL = re.compile(
    r"https?://.+|data:image/(png|jpeg|gif|webp);base64,([A-Za-z0-9+/]{4})*[A-Za-z0-9+/]{2,4}={0,2}"
)


def _bad(message: str, param: str | None = None, code: str | None = None) -> Fault:
    return Fault.error(400, message, param=param, code=code)


def problems(body: Any) -> Iterator[Fault]:
    """Yield what the real API refuses.  Only the first is looked at: each check relies on those before it."""
    if not isinstance(body, dict):
        yield _bad("We could not parse the JSON body of your request: a JSON object is needed.")
    if not isinstance(body.get("model"), str) or not body["model"]:
        yield _bad("you must provide a model parameter", "model", "missing_required_parameter")
    if "messages" not in body:
        yield _bad("Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
    for name in ("messages", "tools"):
        if name in body and (not isinstance(body[name], list) or not body[name]):
            yield _bad(f"Invalid {name!r}: expected an array with minimum length 1.", name, "invalid_type")
    if "stream_options" in body and not body.get("stream"):
        yield _bad("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    for index, tool in enumerate(body.get("tools", ())):
        yield from _name_problems(tool, f"tools[{index}]")
    for index, message in enumerate(body["messages"]):
        yield from _message_problems(message, f"messages[{index}]")
    yield from _pairing_problems(body["messages"])


def _name_problems(entry: Any, where: str) -> Iterator[Fault]:
    match entry:
        case {"function": {"name": str(name)}} if _NAME.fullmatch(name):
            return
    where += ".function.name"
    text = f"Invalid {where!r}: expected a string that matches the pattern '^{_NAME.pattern}$'."
    yield _bad(text, where, "invalid_value")


def _message_problems(message: Any, where: str) -> Iterator[Fault]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        yield _bad(f"Invalid value for '{where}.role': supported are {', '.join(_ROLES)}.", where, "invalid_value")
    calls = message.get("tool_calls")
    if not isinstance(message.get("content"), str | list) and not calls:
        yield _bad(f"Invalid value for '{where}.content': expected a string or an array.", where, "invalid_type")
    yield from _content_problems(message, where)
    if calls is not None and (not isinstance(calls, list) or not calls):
        yield _bad(f"Invalid '{where}.tool_calls': expected an array with minimum length 1.", where, "invalid_type")
    for index, call in enumerate(calls or ()):
        place = f"{where}.tool_calls[{index}]"
        yield from _name_problems(call, place)
        if not isinstance(call.get("id"), str) or not isinstance(call["function"].get("arguments"), str):
            yield _bad(f"Invalid type for {place!r}: 'id' and 'arguments' must be strings.", place, "invalid_type")


def _content_problems(message: dict[str, Any], where: str) -> Iterator[Fault]:
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        place = f"{where}.content[{index}]"
        match part:
            case {"type": "text", "text": str()} | {"type": "refusal", "refusal": str()}:
                continue
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                if message["role"] != "user":
                    text = f"Invalid '{where}'. Image URLs are only allowed for messages with role 'user', but this"
                    text += f" message with role {message['role']!r} contains an image URL."
                    yield _bad(text, where, "invalid_value")
                if not _IMAGE_URL.fullmatch(url):
                    yield _bad(f"Invalid image URL in {place!r}: a valid image is needed.", place, "invalid_image_url")
            case _:
                yield _bad(f"Invalid value: {place!r}: supported are 'text' and 'image_url'.", place, "invalid_value")


def _pairing_problems(messages: list[dict[str, Any]]) -> Iterator[Fault]:
    waiting: list[str] = []
    for index, message in enumerate([*messages, {"role": "end"}]):
        where, answered = f"messages.[{index}].role", message.get("tool_call_id")
        if message["role"] == "tool" and answered in waiting:
            waiting.remove(answered)
        elif message["role"] == "tool":
            text = "Invalid parameter: messages with role 'tool' must be a response to a preceding message with"
            yield _bad(f"{text} 'tool_calls'; no call waits for 'tool_call_id' {answered!r}.", where)
        elif waiting:
            text = "An assistant message with 'tool_calls' must be followed by tool messages responding to each"
            text += " 'tool_call_id'. The following tool_call_ids did not have response messages: "
            yield _bad(text + ", ".join(waiting), where)
        else:
            waiting = [call["id"] for call in message.get("tool_calls") or ()]

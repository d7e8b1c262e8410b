"""Anthropic's Messages format: from our messages to a request, from a response to a `Reply`.

Pure functions; `looplet.backends.anthropic` does the asking.

The API signs what the model thought, and wants it back as it was while the model works with tools.  So a reply's
`parts` keep each thinking block: `{"type": "reasoning", "content", "signature"}`, or `"encrypted"` where the text is
hidden.  A block that something changed on its way (redaction, a rewritten prompt) has lost its seal and stays here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Literal

from looplet.backends.wire import (
    NOT_RUN,
    Wire,
    arguments_of,
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
from looplet.errors import ConfigError
from looplet.messages import Message, Part
from looplet.prompt import part_text
from looplet.types import Reply, Usage

REPAIRS: Final[Mapping[str, str | None]] = {"temperature": None}
"""parameters that some models refuse, and what to send instead"""
MAX_MARKERS: Final = 4
"""how many cache markers the API takes in one request"""
MIN_BUDGET: Final = 1024
"""the smallest thinking budget that the API takes, tokens"""
GO_ON: Final = "(go on)"
"""stands where the API wants a word of the user and there is none"""

_THINKING: Final = ("thinking", "redacted_thinking")
_FINISH_REASONS: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_call",
    "refusal": "content_filter",
}


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """Which beginnings of a request the provider is to keep: each marker ends one.

    Reading what was kept costs a tenth of reading it anew, writing it a quarter more (`5m`) or twice as much (`1h`).
    Raises ConfigError for more than the four markers that the API takes.
    """

    tools: bool = True
    """mark the end of the tool definitions"""
    system: bool = True
    """mark the end of the system prompt"""
    messages: int = 2
    """mark the last so many messages of the user, tool results being such; with 2, each request reads what the one
    before it wrote"""
    ttl: Literal["5m", "1h"] = "5m"
    """how long it is kept after it was last read"""

    def __post_init__(self) -> None:
        if self.ttl not in ("5m", "1h"):
            raise ConfigError(f"ttl must be '5m' or '1h', not {self.ttl!r}")
        if self.messages < 0 or self.tools + self.system + self.messages > MAX_MARKERS:
            raise ConfigError(
                f"a request takes {MAX_MARKERS} cache markers, and this policy sets {self.tools + self.system} and "
                f"messages={self.messages}"
            )

    @property
    def marker(self) -> Wire:
        """Return what stands at a marked place."""
        return {"type": "ephemeral"} if self.ttl == "5m" else {"type": "ephemeral", "ttl": self.ttl}


# --- requests -------------------------------------------------------------------------------------------------------


def request_of(
    messages: Sequence[Message],
    *,
    model: str,
    max_tokens: int,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system_prompt: str = "",
    temperature: float | None = None,
    thinking: Mapping[str, Any] | None = None,
    cache: CachePolicy | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Wire:
    """Return the keyword arguments of `client.messages.create`; `extra` wins over everything else."""
    request: Wire = {"model": model, "max_tokens": max_tokens, "messages": wire_messages(messages)}
    texts = [system_prompt, *(message.text for message in messages if message.role == "system")]
    if system := "\n\n".join(text for text in texts if text.strip()):
        request["system"] = system
    request |= _tools(tools, request["messages"])
    if temperature is not None:
        request["temperature"] = temperature
    if thinking is not None:
        _add_thinking(request, thinking)
    if cache is not None:
        _mark(request, cache)
    return {**request, **(extra or {})}


def thinking_of(given: int | str | Mapping[str, Any] | None) -> Wire | None:
    """Return the API's `thinking` object; a number is a budget in tokens.  Raises ConfigError."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return dict(given)
    if given == "adaptive":
        return {"type": "adaptive"}
    if isinstance(given, int) and given >= MIN_BUDGET:
        return {"type": "enabled", "budget_tokens": given}
    raise ConfigError(
        f"thinking takes a budget in tokens (from {MIN_BUDGET}), 'adaptive' or the API's own object, not {given!r}"
    )


def wire_messages(messages: Iterable[Message]) -> list[Wire]:
    """Return the messages as the API takes them: by turns, the user first, each call followed by its result.

    A result whose call is not there becomes a text.  System messages are not here: they are not messages to the API.
    """
    wire: list[Wire] = []
    waiting: dict[str, Wire] = {}
    ids: set[str] = set()
    for message in messages:
        if message.role == "tool":
            _say(wire, "user", list(_settle(message, waiting)))
        elif message.role != "system":
            role = "assistant" if message.role == "assistant" else "user"
            results: list[Wire] = []
            _say(wire, role, list(_blocks(message, ids, waiting, results)))
            _say(wire, "user", results)
    return wire or [{"role": "user", "content": [_text(GO_ON)]}]


def _settle(message: Message, waiting: dict[str, Wire]) -> Iterator[Wire]:
    """Write each result into the place that waits for it; yield the blocks of those that have none."""
    for result in results_of(message, waiting):
        shown = [] if result.failed else [*map(_image, result.images)]  # the API takes no image of an error
        blocks = [_text(result.text), *shown]
        if result.place is None:
            yield from blocks
        else:
            result.place.update(content=blocks if shown else result.text, is_error=result.failed)


def _say(wire: list[Wire], role: str, blocks: list[Wire]) -> None:
    """Add blocks to the last message, or a message where the role changes."""
    if not blocks:
        return
    last = wire[-1]["role"] if wire else "assistant"
    if role == "assistant" == last and (not wire or blocks[0]["type"] in _THINKING):
        wire.append({"role": "user", "content": [_text(GO_ON)]})  # thoughts stand first in a message
        last = "user"
    if wire and role == last:
        wire[-1]["content"] += blocks
    else:
        wire.append({"role": role, "content": blocks})


def _blocks(message: Message, ids: set[str], waiting: dict[str, Wire], results: list[Wire]) -> Iterator[Wire]:
    """Yield the content blocks of a message; add a place for the result of each call to `waiting` and `results`."""
    for part in message.parts:
        if part["type"] == "tool_call":
            call_id = _unused_id(str(part.get("id") or ""), ids)
            result = {"type": "tool_result", "tool_use_id": call_id, "content": NOT_RUN, "is_error": True}
            waiting[str(part.get("id") or "")] = result
            results.append(result)
            name = wire_name(str(part.get("name") or ""))
            yield {"type": "tool_use", "id": call_id, "name": name, "input": arguments_of(part.get("arguments"))}
        elif part["type"] == "reasoning":
            yield from _thought(part)
        elif message.role == "user" and is_image(part):
            yield _image(part)
        elif (text := part_text(part)).strip():  # the API refuses blank texts
            yield _text(text)


def _thought(part: Part) -> Iterator[Wire]:
    if "signature" in part:
        yield {"type": "thinking", "thinking": part["content"], "signature": part["signature"]}
    elif "encrypted" in part:
        yield {"type": "redacted_thinking", "data": part["encrypted"]}


def _text(text: str) -> Wire:
    return {"type": "text", "text": text}


def _image(part: Part) -> Wire:
    if part["type"] == "uri":
        return {"type": "image", "source": {"type": "url", "url": part["uri"]}}
    source = {"type": "base64", "media_type": part["mime_type"], "data": part["content"]}
    return {"type": "image", "source": source}


def _unused_id(call_id: str, used: set[str]) -> str:
    """Return an id that the API takes: of few characters, and once in a request."""
    name = base = re.sub(r"[^a-zA-Z0-9_-]", "_", call_id) or "call"
    again = 1
    while name in used:
        again += 1
        name = f"{base}_{again}"
    used.add(name)
    return name


def _tools(tools: Sequence[Mapping[str, Any]] | None, messages: list[Wire]) -> Wire:
    """Return the tools; where there are none and the messages hold calls, stand-ins: the API wants every tool named."""
    if tools:
        return {"tools": [_tool(tool["name"], tool["parameters"], tool.get("description", "")) for tool in tools]}
    called = {block["name"]: None for m in messages for block in m["content"] if block["type"] == "tool_use"}
    if not called:
        return {}
    return {"tools": [_tool(name, {"type": "object"}) for name in called], "tool_choice": {"type": "none"}}


def _tool(name: str, schema: Any, description: str = "") -> Wire:
    return {"name": name, **({"description": description} if description else {}), "input_schema": schema}


def _add_thinking(request: Wire, thinking: Mapping[str, Any]) -> None:
    """Let the model think, where the API allows it, and take out or change what does not go with it."""
    kind, budget = thinking.get("type"), thinking.get("budget_tokens") or 0
    start = _start_of_turn(request["messages"])
    if kind == "enabled" and start is not None and start["content"][0]["type"] not in _THINKING:
        return  # what the model thought at the start of its turn is lost; the API refuses to let it think on
    request["thinking"] = dict(thinking)
    if kind != "disabled" and request.get("temperature") != 1:
        request.pop("temperature", None)
    if request["max_tokens"] <= budget:
        request["max_tokens"] += budget


def _start_of_turn(messages: list[Wire]) -> Wire | None:
    """Return the message with which the model began what it is about to go on with, None when it begins anew."""
    start = None
    for message in reversed(messages):
        if message["role"] == "assistant":
            start = message
        elif not any(block["type"] == "tool_result" for block in message["content"]):
            break
    return start


def _mark(request: Wire, policy: CachePolicy) -> None:
    marker = policy.marker
    if policy.tools and "tools" in request:
        request["tools"][-1]["cache_control"] = marker
    if policy.system and "system" in request:
        request["system"] = [{**_text(request["system"]), "cache_control": marker}]
    said = [message for message in request["messages"] if message["role"] == "user"]
    for message in said[::-1][: policy.messages]:
        message["content"][-1]["cache_control"] = marker


# --- responses ------------------------------------------------------------------------------------------------------


def reply_of(message: Any) -> Reply:
    """Return what a response says; raises BackendError (`bad_response`) when it says nothing."""
    blocks = field_of(message, "content")
    if not isinstance(blocks, list):
        usage = _usage_of(field_of(message, "usage"))
        raise bad_response(message, "content", "base_url= takes the address without /v1", usage)
    parts = [part for block in blocks for part in _parts_of(block)]
    calls = tuple(call_of(p["name"], p["arguments"], p["id"]) for p in parts if p["type"] == "tool_call")
    thoughts = [part["content"] for part in parts if part["type"] == "reasoning"]
    refusal = text_of(field_of(field_of(message, "stop_details"), "explanation"))
    return Reply(
        text="\n".join(_texts(parts)),
        tool_calls=calls,
        usage=_usage_of(field_of(message, "usage")),
        model=text_of(field_of(message, "model")),
        response_id=text_of(field_of(message, "id")),
        finish_reason=finish_reason(_FINISH_REASONS.get(str(field_of(message, "stop_reason"))), bool(calls)),
        reasoning="\n".join(filter(None, thoughts)),
        metadata={"refusal": refusal} if refusal else {},
        parts=tuple(part if part["type"] == "reasoning" else {"type": part["type"]} for part in parts)
        if thoughts
        else (),
    )


def _texts(parts: list[Part]) -> Iterator[str]:
    """Yield the texts; the API cuts one into pieces where it cites something."""
    for kind, pieces in groupby(parts, key=lambda part: part["type"]):
        if kind == "text":
            yield "".join(piece["content"] for piece in pieces)


def hour_tokens(message: Any) -> int:
    """Return how many input tokens were written to be kept for an hour: they have a price of their own."""
    written = field_of(field_of(field_of(message, "usage"), "cache_creation"), "ephemeral_1h_input_tokens")
    return count_of(written)


def _parts_of(block: Any) -> Iterator[Part]:
    kind = field_of(block, "type")
    if kind == "text":
        yield {"type": "text", "content": text_of(field_of(block, "text"))}
    elif kind == "thinking":
        thought = {"type": "reasoning", "content": text_of(field_of(block, "thinking"))}
        yield {**thought, "signature": text_of(field_of(block, "signature"))}
    elif kind == "redacted_thinking":
        yield {"type": "reasoning", "content": "", "encrypted": text_of(field_of(block, "data"))}
    elif kind == "tool_use":
        named = {"id": field_of(block, "id"), "name": field_of(block, "name")}
        yield {"type": "tool_call", **named, "arguments": field_of(block, "input")}


def _usage_of(usage: Any) -> Usage | None:
    """Return the usage; the API counts what it read from its cache, and wrote to it, beside the input, we within."""
    counts = counts_of(usage, "input_tokens", "output_tokens")
    if counts is None:
        return None
    fresh, received = counts
    read = count_of(field_of(usage, "cache_read_input_tokens"))
    written = count_of(field_of(usage, "cache_creation_input_tokens"))
    return Usage(
        fresh + read + written,
        received,
        read,
        count_of(field_of(field_of(usage, "output_tokens_details"), "thinking_tokens")),
        cache_write_tokens=written,
    )

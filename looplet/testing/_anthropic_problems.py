"""What Anthropic's messages API refuses in a request, as far as an agent engine can get it wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from looplet.testing._answers import Fault
from looplet.testing._anthropic_wire import Block, sign

THINKING = ("thinking", "redacted_thinking")

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_ID = re.compile(r"[a-zA-Z0-9_-]+")
_BLOCKS = {"user": ("text", "image", "document", "tool_result"), "assistant": ("text", "tool_use", *THINKING)}


def _bad(message: str) -> Fault:
    return Fault.error(400, message)


def problems(body: Any, issued: Mapping[str, list[Block]]) -> Iterator[Fault]:
    """Yield what the real API refuses.  Only the first is looked at: each check relies on those before it.

    `issued`: by the id of a call, the content of the response that made it.
    """
    if not isinstance(body, dict):
        yield _bad("The request body is not valid JSON: an object is needed")
    for name, kind in (("model", str), ("max_tokens", int), ("messages", list)):
        if not isinstance(body.get(name), kind) or not body[name]:
            wrong = "Field required" if name not in body else "Input should be a valid, non-empty value"
            yield _bad(f"{name}: {wrong}")
    yield from _setting_problems(body)
    for index, message in enumerate(body["messages"]):
        yield from _message_problems(message, index)
    messages = [{**message, "content": blocks_of(message["content"])} for message in body["messages"]]
    yield from _turn_problems(messages)
    yield from _pairing_problems(messages)
    yield from _tool_problems(body, messages)
    yield from _thinking_problems(body, messages, issued)
    yield from _cache_problems(body, messages)


def blocks_of(content: Any) -> list[Block]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _setting_problems(body: dict[str, Any]) -> Iterator[Fault]:
    system = body.get("system", "")
    if not isinstance(system, str) and not (isinstance(system, list) and all(_is_text(block) for block in system)):
        yield _bad("system: Input should be a valid string or a list of text blocks")
    if not 0 <= body.get("temperature", 0) <= 1:
        yield _bad("temperature: range: 0..1")
    thinking = body.get("thinking") or {}
    if thinking.get("type") not in ("enabled", "adaptive"):
        return
    if body.get("temperature", 1) != 1:
        yield _bad("`temperature` may only be set to 1 when thinking is enabled.")
    if (body.get("tool_choice") or {}).get("type") in ("any", "tool"):
        yield _bad("Thinking may not be enabled when tool_choice forces tool use.")
    if thinking["type"] == "enabled" and not 1024 <= thinking.get("budget_tokens", 0) < body["max_tokens"]:
        yield _bad("`max_tokens` must be greater than `thinking.budget_tokens`, and that at least 1024.")


def _message_problems(message: Any, index: int) -> Iterator[Fault]:
    where = f"messages.{index}"
    if not isinstance(message, dict) or message.get("role") not in _BLOCKS:
        text = f"{where}: Unexpected role {message.get('role') if isinstance(message, dict) else message!r}."
        yield _bad(f"{text} The Messages API accepts a top-level `system` parameter, not a message.")
    blocks = blocks_of(message.get("content"))
    if not isinstance(blocks, list) or not blocks:
        yield _bad(f"{where}: all messages must have non-empty content")
    for at, block in enumerate(blocks):
        yield from _block_problems(block, message["role"], f"{where}.content.{at}")


def _block_problems(block: Any, role: str, where: str) -> Iterator[Fault]:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind not in _BLOCKS[role]:
        yield _bad(f"{where}: Input tag {kind!r} found does not match any of the expected tags: {_BLOCKS[role]}")
    if kind == "text" and not _is_text(block):
        yield _bad("messages: text content blocks must be non-empty")
    if kind == "thinking" and block.get("signature") != sign(block["thinking"]):
        yield _bad(f"{where}: Invalid `signature` in `thinking` block")
    if kind == "tool_result":
        yield from _tool_result_problems(block, where)
    if kind == "image":
        yield from _image_problems(block, where)
    if kind == "tool_use":
        yield from _tool_use_problems(block, where)


def _tool_result_problems(block: Block, where: str) -> Iterator[Fault]:
    content = block.get("content")
    if block.get("is_error") and not content:
        yield _bad(f"{where}: content cannot be empty if `is_error` is true")
    for at, inner in enumerate(content if isinstance(content, list) else ()):
        kind, place = inner.get("type") if isinstance(inner, dict) else None, f"{where}.tool_result.content.{at}"
        if kind not in ("text", "image"):
            yield _bad(f"{place}: Input tag {kind!r} found does not match any of the expected tags: 'text', 'image'")
        if kind == "image" and block.get("is_error"):
            yield _bad(f"{where}.tool_result: all content must be type `text` if `is_error` is true")
        if kind == "text" and not _is_text(inner):
            yield _bad("messages: text content blocks must be non-empty")
        if kind == "image":
            yield from _image_problems(inner, place)


def _image_problems(block: Block, where: str) -> Iterator[Fault]:
    match block.get("source"):
        case {"type": "base64", "media_type": str(media_type), "data": str(data)}:
            if media_type not in _IMAGES:
                yield _bad(f"{where}.image.source.base64.media_type: Input should be {', '.join(_IMAGES)}")
            if len(data) % 4 or not _BASE64.fullmatch(data):
                yield _bad(f"{where}.image.source.base64: invalid base64 data")
        case {"type": "url", "url": str(url)} if url.startswith(("https://", "http://")):
            return
        case _:
            yield _bad(f"{where}.image.source: Input tag does not match any of the expected tags: 'base64', 'url'")


def _tool_use_problems(block: Block, where: str) -> Iterator[Fault]:
    for name, pattern in (("id", _ID), ("name", _NAME)):
        if not pattern.fullmatch(str(block.get(name) or "")):
            yield _bad(f"{where}.tool_use.{name}: String should match pattern '^{pattern.pattern}$'")
    if not isinstance(block.get("input"), dict):
        yield _bad(f"{where}.tool_use.input: Input should be a valid dictionary")


def _is_text(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "text" and bool(str(block.get("text") or "").strip())


def _turn_problems(messages: list[dict[str, Any]]) -> Iterator[Fault]:
    """The real API joins messages of one role today; it did not always, and not every server does."""
    roles = [message["role"] for message in messages]
    if roles[0] != "user":
        yield _bad('messages: first message must use the "user" role')
    for one, two in pairwise(roles):
        if one == two:
            text = f'messages: roles must alternate between "user" and "assistant", but found multiple "{one}" roles'
            yield _bad(f"{text} in a row")


def _pairing_problems(messages: list[dict[str, Any]]) -> Iterator[Fault]:
    seen: set[str] = set()
    waiting: list[str] = []
    for index, message in enumerate([*messages, {"role": "user", "content": []}]):
        found = [block["tool_use_id"] for block in message["content"] if block["type"] == "tool_result"]
        kinds = [block["type"] == "tool_result" for block in message["content"]]
        missing = [call_id for call_id in waiting if call_id not in found]
        if missing or (found and kinds != sorted(kinds, reverse=True)):
            text = f"messages.{index - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
            yield _bad(text + ", ".join(missing or found) + ". Each needs its result at the head of the next message.")
        if strange := [call_id for call_id in found if call_id not in waiting]:
            text = f"messages.{index}: unexpected `tool_use_id` found in `tool_result` blocks: {', '.join(strange)}."
            yield _bad(text + " Each must have a corresponding `tool_use` block in the previous message.")
        waiting = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
        if len({*waiting, *seen}) < len(waiting) + len(seen):
            yield _bad("messages: `tool_use` ids must be unique")
        seen.update(waiting)


def _tool_problems(body: dict[str, Any], messages: list[dict[str, Any]]) -> Iterator[Fault]:
    tools = body.get("tools") or []
    for index, tool in enumerate(tools):
        if not _NAME.fullmatch(str(tool.get("name") or "")):
            yield _bad(f"tools.{index}.custom.name: String should match pattern '^{_NAME.pattern}$'")
        if (tool.get("input_schema") or {}).get("type") != "object":
            yield _bad(f"tools.{index}.custom.input_schema.type: Field required, and it must be 'object'")
    if len({tool["name"] for tool in tools}) < len(tools):
        yield _bad("tools: Tool names must be unique.")
    if not tools and any(block["type"] == "tool_use" for message in messages for block in message["content"]):
        yield _bad("Requests which include `tool_use` or `tool_result` blocks must define tools")


def _thinking_problems(
    body: dict[str, Any], messages: list[dict[str, Any]], issued: Mapping[str, list[Block]]
) -> Iterator[Fault]:
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    for index, blocks in enumerate(said):
        if any(block["type"] in THINKING for block in blocks) and blocks[0]["type"] not in THINKING:
            text = f"messages.{index * 2 + 1}.content.0: If an assistant message contains any thinking blocks, the"
            yield _bad(f"{text} first block must be `thinking` or `redacted_thinking`. Found `{blocks[0]['type']}`.")
    if said:
        yield from _seal_problems(said[-1], issued)
    start = _start_of_turn(messages)
    enabled = (body.get("thinking") or {}).get("type") == "enabled"
    if enabled and start is not None and start["content"][0]["type"] not in THINKING:
        text = f"Expected `thinking` or `redacted_thinking`, but found `{start['content'][0]['type']}`. When `thinking`"
        yield _bad(f"{text} is enabled, the model's turn must start with a thinking block.")


def _seal_problems(blocks: list[Block], issued: Mapping[str, list[Block]]) -> Iterator[Fault]:
    """Compare what the model thought in its latest message with what it thought then; all of it may be left out."""
    given = [block for block in blocks if block["type"] in THINKING]
    calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
    original = next((issued[call_id] for call_id in calls if call_id in issued), None)
    if given and original is not None and given != [block for block in original if block["type"] in THINKING]:
        text = "`thinking` or `redacted_thinking` blocks in the latest assistant message cannot be modified."
        yield _bad(f"{text} These blocks must remain as they were in the original response.")


def _start_of_turn(messages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first assistant message of the tool loop that the request is in the middle of, if it is in one."""
    start = None
    for message in messages:
        if message["role"] == "assistant":
            start = start or message
        elif all(block["type"] != "tool_result" for block in message["content"]):
            start = None
    return start


def _cache_problems(body: dict[str, Any], messages: list[dict[str, Any]]) -> Iterator[Fault]:
    blocks = [*(body.get("tools") or ()), *blocks_of(body.get("system") or [])]
    blocks += [block for message in messages for block in message["content"]]
    marked = [block for block in blocks if "cache_control" in block]
    if len(marked) > 4:
        yield _bad(f"A maximum of 4 blocks with cache_control may be provided. Found {len(marked)}.")
    for block in marked:
        marker = block["cache_control"]
        if marker.get("type") != "ephemeral" or marker.get("ttl", "5m") not in ("5m", "1h"):
            yield _bad(f"cache_control: {marker!r} is no marker")
        if block.get("type") in THINKING:
            yield _bad("cache_control: Extra inputs are not permitted in thinking blocks")

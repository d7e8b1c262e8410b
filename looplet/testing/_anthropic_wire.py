"""Answers as the bytes of Anthropic's messages API: JSON bodies and server-sent events."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any

from looplet.testing._answers import Answer, ChatRequest, Fault, PolicyAnswer, as_answer, call_of
from looplet.testing._pieces import pieces
from looplet.testing._serving import Response, encode
from looplet.types import Usage

Block = dict[str, Any]

_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def failure(fault: Fault) -> Response:
    kind = _TYPES.get(fault.status) or ("api_error" if fault.status >= 500 else "invalid_request_error")
    body = {"type": "error", "error": {"type": kind, "message": fault.message}, "request_id": "req_0"}
    return Response((encode(body),), fault.status, fault.retry_after_s)


def render(request: ChatRequest, answer: PolicyAnswer) -> tuple[Response, list[Block]]:
    """Return the response, and the content blocks that it holds."""
    fault = answer if isinstance(answer, Fault) else None
    if fault and fault.kind == "error":
        return failure(fault), []
    message = _message(request, as_answer(fault.answer if fault else answer))
    blocks = message["content"]
    is_stream, is_empty = bool(request.body.get("stream")), fault is not None and fault.kind == "empty"
    if is_empty:
        del message["content"]
    if not is_stream:
        return Response.spoilt((encode(message),), fault), blocks
    events = [{"type": "ping"}] if is_empty else _events(message)
    return Response.spoilt(tuple(map(_event, events)), fault, is_stream=True), blocks


def sign(thought: str) -> str:
    """Return the signature of a thought; the real one knows who thought it, ours only what."""
    return "sig_" + sha256(thought.encode()).hexdigest()[:32]


def _message(request: ChatRequest, answer: Answer) -> dict[str, Any]:
    blocks = list(_blocks(answer, request.number))
    message: dict[str, Any] = {
        "id": answer.id or f"msg_{request.number}",
        "type": "message",
        "role": "assistant",
        "model": answer.model or request.model,
        "content": blocks,
        "stop_reason": answer.finish_reason or ("tool_use" if answer.tool_calls else "end_turn"),
        "stop_sequence": None,
    }
    if answer.usage != ():
        counted = (sum(_words(m["content"]) for m in request.messages), _words(blocks))
        message["usage"] = _usage(counted if answer.usage is None else answer.usage)
    return message


def _blocks(answer: Answer, number: int) -> Iterator[Block]:
    for thought in answer.thinking:
        if isinstance(thought, bytes):
            yield {"type": "redacted_thinking", "data": b64encode(thought).decode()}
        else:
            yield {"type": "thinking", "thinking": thought, "signature": sign(thought)}
    if answer.text:
        yield {"type": "text", "text": answer.text}
    for index, call in enumerate(answer.tool_calls):
        call_id, name, args = call_of(call, f"toolu_{number}_{index}")
        if isinstance(args, str):
            with suppress(ValueError):
                args = json.loads(args)
        yield {"type": "tool_use", "id": call_id, "name": name, "input": args}


def _event(event: dict[str, Any]) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + encode(event) + b"\n\n"


def _events(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a message: what was read is counted at the beginning, what was said at the end."""
    usage = message.get("usage")
    stop = {name: message[name] for name in ("stop_reason", "stop_sequence")}
    begun = {"usage": {**usage, "output_tokens": 1}} if usage else {}
    yield {"type": "message_start", "message": {**message, **dict.fromkeys(stop), "content": [], **begun}}
    for index, block in enumerate(message["content"]):
        empty, deltas = _deltas(block)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        yield from ({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas)
        yield {"type": "content_block_stop", "index": index}
    counted = {name: count for name, count in usage.items() if name.startswith("output")} if usage else None
    yield {"type": "message_delta", "delta": stop, "usage": counted}
    yield {"type": "message_stop"}


def _deltas(block: Block) -> tuple[Block, list[dict[str, Any]]]:
    """Return the block as it begins, and how it goes on."""
    if block["type"] == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": piece} for piece in pieces(block["text"])]
    if block["type"] == "thinking":
        thoughts = [{"type": "thinking_delta", "thinking": piece} for piece in pieces(block["thinking"])]
        seal = {"type": "signature_delta", "signature": block["signature"]}
        return {**block, "thinking": "", "signature": ""}, [*thoughts, seal]
    if block["type"] == "tool_use":
        text = block["input"] if isinstance(block["input"], str) else json.dumps(block["input"], ensure_ascii=False)
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": piece} for piece in pieces(text)]
    return block, []


def _usage(given: Any) -> dict[str, Any]:
    """Return the counts as the API has them: what was read from the cache, or written to it, is not in the input."""
    usage = Usage(*given) if isinstance(given, tuple) else given
    return {
        "input_tokens": usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _words(content: Any) -> int:
    if isinstance(content, str):
        return len(content.split())
    parts = (
        block.get("text") or block.get("thinking") or block.get("content") or block.get("input") for block in content
    )
    return sum(len(str(value).split()) for value in parts if value)

"""Answers as the bytes of OpenAI's chat completions API: JSON bodies and server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from looplet.testing._answers import Answer, ChatRequest, Fault, PolicyAnswer, as_answer, call_of
from looplet.testing._pieces import pieces
from looplet.testing._serving import Response, encode, text_of
from looplet.types import Usage


def failure(fault: Fault) -> Response:
    error = {"message": fault.message, "type": fault.type, "param": fault.param, "code": fault.code}
    return Response((encode({"error": error}),), fault.status, fault.retry_after_s)


def render(request: ChatRequest, answer: PolicyAnswer) -> Response:
    fault = answer if isinstance(answer, Fault) else None
    if fault and fault.kind == "error":
        return failure(fault)
    completion = _completion(request, as_answer(fault.answer if fault else answer))
    if fault and fault.kind == "empty":
        completion["choices"] = []
    is_stream = bool(request.body.get("stream"))
    parts = tuple(_events(request, completion)) if is_stream else (encode(completion),)
    return Response.spoilt(parts, fault, is_stream=is_stream)


def _completion(request: ChatRequest, answer: Answer) -> dict[str, Any]:
    calls = [_tool_call(call, f"call_{request.number}_{i}") for i, call in enumerate(answer.tool_calls)]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if calls else ""), "refusal": None}
    if thoughts := [thought for thought in answer.thinking if isinstance(thought, str)]:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    reason = answer.finish_reason or ("tool_calls" if calls else "stop")
    completion = {
        "id": answer.id or f"chatcmpl-{request.number}",
        "object": "chat.completion",
        "created": 0,
        "model": answer.model or request.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
    }
    if answer.usage != ():
        counted = (sum(map(_words, request.messages)), _words(message))
        completion["usage"] = _usage(counted if answer.usage is None else answer.usage)
    return completion


def _tool_call(call: Any, default_id: str) -> dict[str, Any]:
    call_id, name, args = call_of(call, default_id)
    arguments = args if isinstance(args, str) else json.dumps(args, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _usage(given: Any) -> dict[str, Any]:
    usage = Usage(*given) if isinstance(given, tuple) else given
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _words(message: Mapping[str, Any]) -> int:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return len(" ".join([text_of(message), *(f"{f['name']} {f['arguments']}" for f in functions)]).split())


def _events(request: ChatRequest, completion: dict[str, Any]) -> Iterator[bytes]:
    """Yield the server-sent events of a completion; `usage` is null in all but the last when it was asked for."""
    with_usage = bool((request.body.get("stream_options") or {}).get("include_usage"))
    usage = completion.pop("usage", None)
    head = {**completion, "object": "chat.completion.chunk", "choices": []} | ({"usage": None} if with_usage else {})
    for choice in completion["choices"]:
        for delta in _deltas(choice["message"]):
            yield _event(head, {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None})
        yield _event(head, {"index": 0, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]})
    if with_usage and usage:
        yield _event({**head, "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(head: dict[str, Any], *choices: dict[str, Any]) -> bytes:
    return b"data: " + encode({**head, "choices": choices}) + b"\n\n"


def _deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": "" if message["content"] is not None else None}
    for piece in pieces(message.get("reasoning_content", "")):
        yield {"reasoning_content": piece}
    for piece in pieces(message["content"] or ""):
        yield {"content": piece}
    for index, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        yield {"tool_calls": [{"index": index, **call, "function": {"name": function["name"], "arguments": ""}}]}
        for piece in pieces(function["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}

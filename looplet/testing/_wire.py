"""Answers as the bytes of OpenAI's chat completions API: JSON bodies and server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from looplet.errors import ConfigError
from looplet.testing._answers import Answer, ChatRequest, Fault, PolicyAnswer
from looplet.types import Usage


@dataclass(frozen=True, slots=True)
class Response:
    """What goes over the wire: one part, or one per server-sent event; `is_cut` ends the connection too early."""

    parts: tuple[bytes, ...]
    status: int = 200
    retry_after_s: float | None = None
    is_stream: bool = False
    is_cut: bool = False

    @classmethod
    def of(cls, value: Any) -> Response:
        return cls((_encode(value),))

    def frames(self) -> Iterator[bytes]:
        """Yield what follows the headers: half of the body when it is cut, HTTP chunks for a stream."""
        if not self.is_stream:
            body = self.parts[0]
            yield body[: len(body) // 2] if self.is_cut else body
            return
        for part in self.parts:
            yield b"%x\r\n%b\r\n" % (len(part), part)
        if not self.is_cut:
            yield b"0\r\n\r\n"


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def parse(raw: bytes) -> Any:
    try:
        return json.loads(raw) if raw else None
    except ValueError:
        return raw.decode(errors="replace")


def failure(fault: Fault) -> Response:
    error = {"message": fault.message, "type": fault.type, "param": fault.param, "code": fault.code}
    return Response((_encode({"error": error}),), fault.status, fault.retry_after_s)


def render(request: ChatRequest, answer: PolicyAnswer) -> Response:
    fault = answer if isinstance(answer, Fault) else None
    if fault and fault.kind == "error":
        return failure(fault)
    completion = _completion(request, _as_answer(fault.answer if fault else answer))
    if fault and fault.kind == "empty":
        completion["choices"] = []
    is_stream = bool(request.body.get("stream"))
    parts = tuple(_events(request, completion)) if is_stream else (_encode(completion),)
    if fault and fault.kind == "malformed":
        parts = (parts[0].rstrip()[:-1] + b"\n\n",)
    is_cut = fault is not None and fault.kind == "cut"
    return Response(parts[:2] if is_cut else parts, is_stream=is_stream, is_cut=is_cut)


def _as_answer(value: PolicyAnswer) -> Answer:
    if isinstance(value, str):
        return Answer(value)
    if isinstance(value, list):
        return Answer(tool_calls=value)
    if isinstance(value, Answer):
        return value
    raise ConfigError(f"a policy answers with a str, a list of tool calls, an Answer or a Fault, not {value!r}")


def _completion(request: ChatRequest, answer: Answer) -> dict[str, Any]:
    calls = [_tool_call(call, f"call_{request.number}_{i}") for i, call in enumerate(answer.tool_calls)]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if calls else ""), "refusal": None}
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
    match call:
        case (str(name), args):
            call_id = default_id
        case (
            {"function": {"name": str(name), "arguments": args}}
            | {"name": str(name), "args": args}
            | {"name": str(name), "arguments": args}
        ):
            call_id = call.get("id") or default_id
        case _:
            raise ConfigError(f"a tool call is ('name', {{args}}) or a dict with 'name' and 'args', not {call!r}")
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


def text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


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
    return b"data: " + _encode({**head, "choices": choices}) + b"\n\n"


def _deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": "" if message["content"] is not None else None}
    for piece in _pieces(message["content"] or ""):
        yield {"content": piece}
    for index, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        yield {"tool_calls": [{"index": index, **call, "function": {"name": function["name"], "arguments": ""}}]}
        for piece in _pieces(function["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def _pieces(text: str) -> list[str]:
    size = max(1, -(-len(text) // 4))
    return [text[start : start + size] for start in range(0, len(text), size)]

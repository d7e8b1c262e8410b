"""Backends that need no model: replies in order, or a function that decides from the conversation."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from looplet.errors import BackendError, ConfigError, LoopletError
from looplet.messages import Message
from looplet.testing._pieces import pieces
from looplet.types import Delta, Reply, ToolCall, Usage

Scripted: TypeAlias = "Reply | ToolCall | Sequence[ToolCall] | tuple[str, dict[str, Any]] | str | Exception | Cut"


class LLMResponsesExhausted(LoopletError):
    """A scripted backend was asked more often than its script is long."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A scripted reply that breaks off: its stream after some deltas, `chat` at once."""

    reply: Scripted
    after: int = 1
    """how many deltas come through"""
    usage: Usage | None = None
    """what the provider charges for it"""


class MockLLMBackend:
    """Answers `generate` with texts, in order: the text protocol.

    `cycle=True` begins again after the last one; otherwise it raises LLMResponsesExhausted.
    """

    provider = "looplet.testing"

    def __init__(self, responses: Sequence[str | Exception] | None = None, *, cycle: bool = True) -> None:
        if isinstance(responses, str):
            raise ConfigError(f"{type(self).__name__} takes a list of replies: [{responses!r:.60}]")
        self.responses = list(responses or ['{"tool": "done", "args": {"answer": "ok"}}'])
        self.cycle = cycle
        self.model = "mock"
        self.calls = 0

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 2000,
        system_prompt: str = "",
        temperature: float = 0.2,
    ) -> str:
        """Return the next text; raises it when it is an exception."""
        if self.calls >= len(self.responses) and not self.cycle:
            raise LLMResponsesExhausted(f"the script has {len(self.responses)} replies; this is call {self.calls + 1}")
        response = self.responses[self.calls % len(self.responses)]
        self.calls += 1
        if isinstance(response, Exception):
            raise response
        return response

    def reset(self) -> None:
        """Begin again with the first text."""
        self.calls = 0


class AsyncMockLLMBackend(MockLLMBackend):
    """`MockLLMBackend` for `async for`."""

    async def generate(self, prompt: str, **settings: Any) -> str:  # type: ignore[override]
        """Return the next text."""
        return super().generate(prompt, **settings)


class ScriptedBackend:
    """Answers `chat` and `stream` with replies in order: native tool calls, usage and all.

    A reply is a `Reply`; or short for one: `("search", {"query": "x"})`, a list of such calls, a text, an exception.
    `Cut(reply)` breaks off.
    """

    provider = "looplet.testing"

    def __init__(self, replies: Sequence[Scripted], *, model: str = "scripted") -> None:
        if isinstance(replies, str) or _is_pair(replies):
            raise ConfigError(f"{type(self).__name__} takes a list of replies: [{replies!r:.60}]")
        self.replies = list(replies)
        self.model = model
        self.requests: list[Sequence[Message]] = []
        """what the model was sent, oldest first"""
        self.settings: list[dict[str, Any]] = []
        """what went along with each request: `system_prompt`, `tools`, `temperature`, ..."""

    def chat(self, messages: Sequence[Message], **settings: Any) -> Reply:
        """Return the next reply; raises LLMResponsesExhausted after the last."""
        return to_reply(self._next(messages, settings))

    def stream(self, messages: Sequence[Message], **settings: Any) -> Iterator[Delta | Reply]:
        """Yield the next reply in pieces, then the reply; raises LLMResponsesExhausted after the last."""
        yield from in_pieces(self._next(messages, settings))

    def _next(self, messages: Sequence[Message], settings: dict[str, Any]) -> Scripted:
        number = len(self.requests)
        self.requests.append(messages)
        self.settings.append(settings)
        if number >= len(self.replies):
            raise LLMResponsesExhausted(f"the script has {len(self.replies)} replies; this is call {number + 1}")
        return self.replies[number]


class AsyncScriptedBackend(ScriptedBackend):
    """`ScriptedBackend` for `async for`."""

    async def chat(self, messages: Sequence[Message], **settings: Any) -> Reply:  # type: ignore[override]
        """Return the next reply."""
        return super().chat(messages, **settings)

    async def stream(self, messages: Sequence[Message], **settings: Any) -> AsyncIterator[Delta | Reply]:  # type: ignore[override]
        """Yield the next reply in pieces, then the reply."""
        for item in super().stream(messages, **settings):
            yield item


class PolicyBackend:
    """Asks a function for the next reply: `policy(messages)` sees the conversation, real tool results included."""

    provider = "looplet.testing"

    def __init__(self, policy: Callable[[Sequence[Message]], Scripted], *, model: str = "policy") -> None:
        self.policy = policy
        self.model = model

    def chat(self, messages: Sequence[Message], **settings: Any) -> Reply:
        """Return what the policy decides."""
        return to_reply(self.policy(messages))

    def stream(self, messages: Sequence[Message], **settings: Any) -> Iterator[Delta | Reply]:
        """Yield what the policy decides in pieces, then the reply."""
        yield from in_pieces(self.policy(messages))


def to_reply(said: Scripted) -> Reply:
    """Return the reply that `said` is short for; raises it when it is an exception."""
    if isinstance(said, Exception):
        raise said
    if isinstance(said, Cut):
        raise _broken(said)
    if isinstance(said, Reply):
        return said
    if isinstance(said, str):
        return Reply(text=said, finish_reason="stop")
    calls: list[Any] = [said] if isinstance(said, ToolCall) or _is_pair(said) else list(said)
    made = tuple(call if isinstance(call, ToolCall) else ToolCall(call[0], dict(call[1])) for call in calls)
    return Reply(tool_calls=made, finish_reason="tool_call", usage=Usage(10, 5))


def in_pieces(said: Scripted) -> Iterator[Delta | Reply]:
    """Yield the deltas of what `to_reply` returns, then that; a `Cut` breaks off."""
    reply = to_reply(said.reply if isinstance(said, Cut) else said)
    for number, delta in enumerate(deltas_of(reply)):
        if isinstance(said, Cut) and number >= said.after:
            break
        yield delta
    if isinstance(said, Cut):
        raise _broken(said)
    yield reply


def deltas_of(reply: Reply) -> Iterator[Delta]:
    """Yield a reply as a stream would bring it: what was thought, the text, then call by call."""
    yield from (Delta("reasoning", piece) for piece in pieces(reply.reasoning))
    yield from (Delta("text", piece) for piece in pieces(reply.text))
    for index, call in enumerate(reply.tool_calls):
        yield Delta("tool_call", "", index, call.call_id, call.tool)
        yield from (Delta("tool_call", piece, index) for piece in pieces(json.dumps(call.args, ensure_ascii=False)))


def _broken(cut: Cut) -> BackendError:
    return BackendError("the script cuts this reply", kind="stream_cut", retryable=True, usage=cut.usage)


def assert_exhausted(backend: MockLLMBackend | ScriptedBackend) -> None:
    """Raise AssertionError unless every scripted reply was used."""
    length = len(backend.responses if isinstance(backend, MockLLMBackend) else backend.replies)
    used = backend.calls if isinstance(backend, MockLLMBackend) else len(backend.requests)
    if used < length:
        raise AssertionError(f"{length - used} of {length} scripted replies were not used")


def _is_pair(said: Any) -> bool:
    return isinstance(said, tuple) and len(said) == 2 and isinstance(said[0], str) and isinstance(said[1], Mapping)

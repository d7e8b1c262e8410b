"""Backends that need no model: replies in order, or a function that decides from the conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from looplet.errors import LoopletError
from looplet.messages import Message
from looplet.types import Reply, ToolCall, Usage

Scripted: TypeAlias = "Reply | ToolCall | Sequence[ToolCall] | tuple[str, dict[str, Any]] | str | Exception"


class LLMResponsesExhausted(LoopletError):
    """A scripted backend was asked more often than its script is long."""


class MockLLMBackend:
    """Answers `generate` with texts, in order: the text protocol.

    `cycle=True` begins again after the last one; otherwise it raises LLMResponsesExhausted.
    """

    provider = "looplet.testing"

    def __init__(self, responses: Sequence[str | Exception] | None = None, *, cycle: bool = True) -> None:
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
    """Answers `chat` with replies in order: native tool calls, usage and all.

    A reply is a `Reply`; or short for one: `("search", {"query": "x"})`, a list of such calls, a text, an exception.
    """

    provider = "looplet.testing"

    def __init__(self, replies: Sequence[Scripted], *, model: str = "scripted") -> None:
        self.replies = list(replies)
        self.model = model
        self.requests: list[Sequence[Message]] = []

    def chat(self, messages: Sequence[Message], **settings: Any) -> Reply:
        """Return the next reply; raises LLMResponsesExhausted after the last."""
        number = len(self.requests)
        self.requests.append(messages)
        if number >= len(self.replies):
            raise LLMResponsesExhausted(f"the script has {len(self.replies)} replies; this is call {number + 1}")
        return to_reply(self.replies[number])


class AsyncScriptedBackend(ScriptedBackend):
    """`ScriptedBackend` for `async for`."""

    async def chat(self, messages: Sequence[Message], **settings: Any) -> Reply:  # type: ignore[override]
        """Return the next reply."""
        return super().chat(messages, **settings)


class PolicyBackend:
    """Asks a function for the next reply: `policy(messages)` sees the conversation, real tool results included."""

    provider = "looplet.testing"

    def __init__(self, policy: Callable[[Sequence[Message]], Scripted], *, model: str = "policy") -> None:
        self.policy = policy
        self.model = model

    def chat(self, messages: Sequence[Message], **settings: Any) -> Reply:
        """Return what the policy decides."""
        return to_reply(self.policy(messages))


def to_reply(said: Scripted) -> Reply:
    """Return the reply that `said` is short for; raises it when it is an exception."""
    if isinstance(said, Exception):
        raise said
    if isinstance(said, Reply):
        return said
    if isinstance(said, str):
        return Reply(text=said, finish_reason="stop")
    calls: list[Any] = [said] if isinstance(said, ToolCall) or _is_pair(said) else list(said)
    made = tuple(call if isinstance(call, ToolCall) else ToolCall(call[0], dict(call[1])) for call in calls)
    return Reply(tool_calls=made, finish_reason="tool_call", usage=Usage(10, 5))


def assert_exhausted(backend: MockLLMBackend | ScriptedBackend) -> None:
    """Raise AssertionError unless every scripted reply was used."""
    length = len(backend.responses if isinstance(backend, MockLLMBackend) else backend.replies)
    used = backend.calls if isinstance(backend, MockLLMBackend) else len(backend.requests)
    if used < length:
        raise AssertionError(f"{length - used} of {length} scripted replies were not used")


def _is_pair(said: Any) -> bool:
    return isinstance(said, tuple) and len(said) == 2 and isinstance(said[0], str) and isinstance(said[1], Mapping)

"""What the policy of a scripted server receives, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from looplet.errors import ConfigError
from looplet.types import Usage


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One valid chat request, as the policy receives it."""

    model: str
    messages: list[dict[str, Any]]
    """oldest first"""
    tools: list[dict[str, Any]]
    body: dict[str, Any]
    number: int
    """from 0; only requests that reach the policy count"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says, where a string or a list of tool calls is not enough."""

    text: str = ""
    tool_calls: Sequence[Any] = ()
    """`("name", {args})`, `{"name": ..., "args": ..., "id": ...}` or OpenAI's own shape; text as args goes out raw"""
    usage: Usage | tuple[int, int] | tuple[()] | None = None
    """input and output tokens; None counts words, `()` reports no usage at all"""
    finish_reason: str | None = None
    model: str | None = None
    id: str | None = None
    thinking: Sequence[str | bytes] = ()
    """what the model thought first: a text is signed, bytes are hidden (by `AnthropicServer`; the other one sends the
    texts as `reasoning_content`, and no bytes)"""


@dataclass(frozen=True, slots=True)
class Fault:
    """A way to go wrong; made by the class methods below."""

    kind: Literal["error", "slow", "cut", "malformed", "empty"]
    status: int = 200
    message: str = ""
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    delay_s: float = 0.0
    answer: PolicyAnswer = ""

    @classmethod
    def error(cls, status: int, message: str, *, param: str | None = None, code: str | None = None) -> Fault:
        """Refuse with any HTTP status, in the provider's error shape."""
        return cls("error", status, message, param=param, code=code)

    @classmethod
    def rate_limited(cls, retry_after: float | None = None) -> Fault:
        """Refuse with 429 and, when it is given, `Retry-After` in seconds."""
        text = "Rate limit reached; please try again later."
        return cls("error", 429, text, "requests", code="rate_limit_exceeded", retry_after_s=retry_after)

    @classmethod
    def server_error(cls, message: str = "The server had an error while processing your request.") -> Fault:
        """Fail with 500."""
        return cls("error", 500, message, "server_error")

    @classmethod
    def overloaded(cls) -> Fault:
        """Refuse with 529, as Anthropic does when it has too much to do."""
        return cls("error", 529, "Overloaded", "overloaded_error")

    @classmethod
    def slow(cls, seconds: float, answer: PolicyAnswer) -> Fault:
        """Wait before the first byte of `answer`; `close` ends the wait and cuts the connection."""
        return cls("slow", delay_s=seconds, answer=answer)

    @classmethod
    def cut(cls, answer: PolicyAnswer = "the rest of this is lost") -> Fault:
        """Close the connection half-way through the body, or after the second event of a stream."""
        return cls("cut", answer=answer)

    @classmethod
    def malformed(cls) -> Fault:
        """Answer 200 with broken JSON."""
        return cls("malformed")

    @classmethod
    def empty(cls) -> Fault:
        """Answer 200 without any choice, or content."""
        return cls("empty")

    @classmethod
    def refuses(cls, param: str, value: object = 0.2) -> Fault:
        """Refuse `max_tokens`, `temperature` or another parameter with 400, in the words of newer models."""
        if param in ("temperature", "top_p"):
            text = f"Unsupported value: {param!r} does not support {value} with this model."
            text += " Only the default (1) value is supported."
            return cls.error(400, text, param=param, code="unsupported_value")
        text = f"Unsupported parameter: {param!r} is not supported with this model."
        text += " Use 'max_completion_tokens' instead." if param == "max_tokens" else ""
        return cls.error(400, text, param=param, code="unsupported_parameter")

    @classmethod
    def context_overflow(cls, tokens: int = 9000, limit: int = 8192) -> Fault:
        """Refuse with 400: the messages are longer than the model's window."""
        text = f"This model's maximum context length is {limit} tokens. However, your messages resulted in {tokens}"
        text += " tokens. Please reduce the length of the messages."
        return cls.error(400, text, param="messages", code="context_length_exceeded")

    @classmethod
    def unauthorized(cls) -> Fault:
        """Refuse with 401."""
        return cls.error(401, "Incorrect API key provided.", code="invalid_api_key")


PolicyAnswer: TypeAlias = "str | list[Any] | Answer | Fault"
Policy: TypeAlias = "Callable[[ChatRequest], PolicyAnswer] | list[Any] | tuple[Any, ...] | None"


def as_answer(value: PolicyAnswer) -> Answer:
    if isinstance(value, str):
        return Answer(value)
    if isinstance(value, list):
        return Answer(tool_calls=value)
    if isinstance(value, Answer):
        return value
    raise ConfigError(f"a policy answers with a str, a list of tool calls, an Answer or a Fault, not {value!r}")


def call_of(call: Any, default_id: str) -> tuple[str, str, Any]:
    """Return id, name and arguments of a tool call, whichever way it was written."""
    match call:
        case (str(name), args):
            return default_id, name, args
        case (
            {"function": {"name": str(name), "arguments": args}}
            | {"name": str(name), "args": args}
            | {"name": str(name), "arguments": args}
        ):
            return call.get("id") or default_id, name, args
    raise ConfigError(f"a tool call is ('name', {{args}}) or a dict with 'name' and 'args', not {call!r}")

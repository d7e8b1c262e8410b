"""The values that a run hands around: calls, results, replies, steps.

All are frozen.  What they hold has passed the run's boundary (`looplet.boundary`): JSON-like and redacted, so that
the live object and the one read back from a trace are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from looplet.errors import ErrorKind, ToolError
from looplet.parts import describe, with_markers

JSON: TypeAlias = "dict[str, Any] | list[Any] | str | int | float | bool | None"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and money of model calls; cached and reasoning tokens are part of input and output."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    """input tokens that were read from the provider's cache"""
    reasoning_tokens: int = 0
    """output tokens spent on reasoning"""
    cost_usd: float | None = None
    """None when the price is unknown; never guessed"""
    cache_write_tokens: int = 0
    """input tokens that were written to the provider's cache"""

    @property
    def total_tokens(self) -> int:
        """Input plus output."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        if self is NO_USAGE:
            return other
        costs = [c for c in (self.cost_usd, other.cost_usd) if c is not None]
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            sum(costs) if costs else None,
            self.cache_write_tokens + other.cache_write_tokens,
        )


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A request by the model to run one tool."""

    tool: str
    args: dict[str, Any] = field(default_factory=dict)
    reasoning: str = ""
    call_id: str = ""
    """unique within its run; looplet makes one where the model gave none"""
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-like dict."""
        return {
            "tool": self.tool,
            "args": self.args,
            "reasoning": self.reasoning,
            "call_id": self.call_id,
            "metadata": self.metadata,
        }


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What one tool call came to: `data` on success, `error` and `error_detail` otherwise."""

    tool: str
    args_summary: str = ""
    data: Any = None
    error: str | None = None
    error_detail: ToolError | None = None
    duration_ms: float = 0.0
    result_key: str | None = None
    call_id: str | None = None
    warnings: Sequence[str] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    raw: Any = field(default=None, compare=False, repr=False)
    """what the tool returned, before the boundary; for hooks in this process, never recorded"""

    @property
    def error_kind(self) -> ErrorKind | None:
        """Return why the call failed, None after a success."""
        if self.error is None:
            return None
        return self.error_detail.kind if self.error_detail else ErrorKind.EXECUTION

    @property
    def error_retriable(self) -> bool:
        """Tell whether the same call may succeed when it is made again."""
        return bool(self.error_detail and self.error_detail.retriable)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-like dict; `from_dict` is the inverse, but for `raw`."""
        return {
            "tool": self.tool,
            "args_summary": self.args_summary,
            "data": self.data,
            "error": self.error,
            "error_detail": self.error_detail.to_dict() if self.error_detail else None,
            "duration_ms": self.duration_ms,
            "result_key": self.result_key,
            "call_id": self.call_id,
            "warnings": list(self.warnings),
            "metadata": self.metadata,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ToolResult:
        """Build the result that `to_dict` described."""
        fields = dict(data)
        detail = fields.pop("error_detail", None)
        warnings = tuple(fields.pop("warnings", ()))
        return cls(**fields, warnings=warnings, error_detail=ToolError.from_dict(detail) if detail else None)


@dataclass(frozen=True, slots=True)
class Reply:
    """One model response, whatever the provider."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage | None = None
    """None when the provider reported none: such calls are counted apart, never guessed"""
    model: str = ""
    response_id: str = ""
    finish_reason: str = ""
    """`stop`, `tool_call`, `length`, `content_filter` or `error`, as the GenAI conventions spell them"""
    reasoning: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    parts: tuple[dict[str, Any], ...] = ()
    """the message's parts in the provider's order, where its reasoning must go back as it came (`looplet.messages`);
    a `text` or `tool_call` part marks a place only: `text` and `tool_calls` say what stands there"""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply as it streams in; a backend's `stream` yields them and then the whole `Reply`."""

    kind: str
    """`text`, `reasoning` or `tool_call`"""
    text: str = ""
    """what is added: to the text, to the reasoning, or to the call's arguments, as JSON text"""
    index: int = 0
    """of a tool call: which of the reply's, from 0"""
    call_id: str = ""
    """of a tool call: on one of its deltas, best on the first; an event has what was said so far"""
    tool: str = ""
    """the tool's name, as `call_id`"""


@dataclass(frozen=True, slots=True)
class Step:
    """One tool call as the caller receives it, after the tool ran; a turn yields one or more."""

    number: int
    """from 1, without gaps"""
    tool_call: ToolCall
    tool_result: ToolResult
    usage: Usage = NO_USAGE
    """of the turn's model calls on the turn's first step, zero on the others"""
    prompt: str = ""
    """the text of what was new in the turn's request; on the turn's first step"""
    context: Any = field(default=None, compare=False, repr=False)
    """the OpenTelemetry context of the step's span"""

    @contextmanager
    def use(self) -> Iterator[None]:
        """Make the step's span the current one, for spans of the caller's own."""
        from opentelemetry.context import attach, detach

        if self.context is None:
            yield
            return
        token = attach(self.context)
        try:
            yield
        finally:
            detach(token)

    def pretty(self) -> str:
        """Return one line for people: `#1 ✓ search(query='loops') → 12 items [182ms]`."""
        result = self.tool_result
        mark = "✗" if result.error is not None else "✓"
        tail = _tail(result)
        took = f" [{result.duration_ms:.0f}ms]" if result.duration_ms > 0 else ""
        return f"#{self.number} {mark} {result.tool}({result.args_summary})" + (f" → {tail}" if tail else "") + took

    def summary(self) -> str:
        """Return one line for prompts: `S1 ✓ search(query='loops') → total: 12`."""
        result = self.tool_result
        mark = "✗" if result.error is not None else "✓"
        head = f"S{self.number} {mark} {result.tool}({result.args_summary})"
        if result.error is not None:
            return f"{head} → {cut(result.error, 60)}"
        if isinstance(result.data, dict) and not describe(result.data):
            totals = {k: v for k, v in result.data.items() if k in ("total", "total_items")}
            shown = totals or dict(list(result.data.items())[:3])
            return f"{head} → " + ", ".join(f"{k}: {_short(v)}" for k, v in shown.items())
        return f"{head} → {_short(result.data)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the step as a JSON-like dict."""
        return {"step": self.number, "tool_call": self.tool_call.to_dict(), "tool_result": self.tool_result.to_dict()}


def cut(text: str, limit: int) -> str:
    """Return `text`, shortened to `limit` characters and `...` when it is longer."""
    return text if len(text) <= limit else text[:limit] + "..."


def summarize_args(args: Mapping[str, Any]) -> str:
    """Return `query='loops', limit=5`: what stands between the parentheses of `Step.pretty`."""
    return ", ".join(f"{name}={cut(repr(value), 50)}" for name, value in args.items())


def _tail(result: ToolResult) -> str:
    data = result.data
    if result.error is not None:
        return "ERROR: " + result.error.replace("\n", " ")[:80]
    if data is None:
        return ""
    if isinstance(data, list):
        return f"{len(data)} items"
    if isinstance(data, dict) and not describe(data):
        return _dict_tail(data)
    return _short(data)


def _short(value: Any) -> str:
    return cut(describe(value) or str(with_markers(value)), 60)


def _dict_tail(data: dict[str, Any]) -> str:
    if data.get("needs_approval"):
        description = str(data.get("approval_description") or "")[:80]
        return "⏸ awaiting approval" + (f": {description}" if description else "")
    lists = [(k, v) for k, v in data.items() if isinstance(v, list)]
    if len(lists) == 1:
        return f"{len(lists[0][1])} {lists[0][0]}"
    if len(data) == 1:
        key, value = next(iter(data.items()))
        return f"{key}: {_short(value)}"
    return f"{len(data)} keys"

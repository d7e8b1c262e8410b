"""The events of a stream: what a run says while it goes on.

All are frozen, and what they hold has passed the run's boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from looplet.types import ToolCall, ToolResult, Usage


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """What all events are; `kind` names the class in `to_dict`."""

    run_id: str
    kind: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the event as a JSON-like dict, its kind first."""
        return {"kind": self.kind, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


@dataclass(frozen=True, slots=True)
class RunStartEvent(StreamEvent):
    """A run begins."""

    kind = "run_start"
    task: Mapping[str, Any] = field(default_factory=dict)
    parent_run_id: str = ""
    """of the run whose tool started this one"""


@dataclass(frozen=True, slots=True)
class TurnStartEvent(StreamEvent):
    """A turn begins: one model request and what follows from it."""

    kind = "turn_start"
    turn: int
    """from 1"""


@dataclass(frozen=True, slots=True)
class ChatStartEvent(StreamEvent):
    """A model is asked."""

    kind = "chat_start"
    turn: int
    model: str
    purpose: str = "agent"


@dataclass(frozen=True, slots=True)
class TextDeltaEvent(StreamEvent):
    """More of the reply's text."""

    kind = "text_delta"
    turn: int
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDeltaEvent(StreamEvent):
    """More of what the model thinks."""

    kind = "reasoning_delta"
    turn: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolArgumentsDeltaEvent(StreamEvent):
    """More of a tool call's arguments, as JSON text; the first of a call may hold none yet."""

    kind = "tool_arguments_delta"
    turn: int
    index: int
    """which of the reply's calls, from 0"""
    call_id: str
    """the provider's; looplet gives a call another one where it is missing or was there before"""
    tool: str
    text: str


@dataclass(frozen=True, slots=True)
class ChatRetryEvent(StreamEvent):
    """The model call failed and is made again: the deltas since `ChatStartEvent` or the last retry are void."""

    kind = "chat_retry"
    turn: int
    attempt: int
    """the one that failed, from 1"""
    error_type: str
    delay_s: float = 0.0
    """how long looplet waits before it asks again"""


@dataclass(frozen=True, slots=True)
class ChatEndEvent(StreamEvent):
    """A model has answered, or `error_type` says why not."""

    kind = "chat_end"
    turn: int
    model: str
    purpose: str = "agent"
    usage: Usage | None = None
    finish_reason: str = ""
    error_type: str | None = None


@dataclass(frozen=True, slots=True)
class ToolDispatchEvent(StreamEvent):
    """A tool is about to run."""

    kind = "tool_dispatch"
    turn: int
    step: int
    tool_call: ToolCall


@dataclass(frozen=True, slots=True)
class ToolProgressEvent(StreamEvent):
    """A tool that runs said how far it is (`ctx.report_progress`)."""

    kind = "tool_progress"
    step: int
    call_id: str
    stage: str
    data: Any = None


@dataclass(frozen=True, slots=True)
class ToolResultEvent(StreamEvent):
    """A tool call has come to its end, one that was refused included; the same as in the step."""

    kind = "tool_result"
    turn: int
    step: int
    tool_result: ToolResult


@dataclass(frozen=True, slots=True)
class TurnEndEvent(StreamEvent):
    """A turn is over."""

    kind = "turn_end"
    turn: int


@dataclass(frozen=True, slots=True)
class CompactionEvent(StreamEvent):
    """The conversation was made shorter."""

    kind = "compaction"
    turn: int
    reason: str
    messages_before: int
    messages_after: int


@dataclass(frozen=True, slots=True)
class RunEndEvent(StreamEvent):
    """A run is over; no event of it follows."""

    kind = "run_end"
    stop_reason: str
    steps: int
    usage: Usage


def _plain(value: Any) -> Any:
    if callable(to_dict := getattr(value, "to_dict", None)):
        return to_dict()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value

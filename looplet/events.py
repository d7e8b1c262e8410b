"""Lifecycle events: what `on_event(payload)` of a hook is told, beside the hook methods of its own.

A hook with `on_event` hears of each moment below, in order.  Where the table of `looplet.decisions` gives an answer a
meaning (`on_event(pre_tool_use)`, ...), it counts as that of the method would.  A hook that has the method itself
(`pre_dispatch`, `post_dispatch`) is not told the same moment twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from looplet.types import ToolCall, ToolResult, Usage


class LifecycleEvent(StrEnum):
    """A moment in the life of a run."""

    SESSION_START = "session_start"
    PRE_LLM_CALL = "pre_llm_call"
    POST_LLM_RESPONSE = "post_llm_response"
    PRE_TOOL_USE = "pre_tool_use"
    TOOL_PROGRESS = "tool_progress"
    POST_TOOL_USE = "post_tool_use"
    POST_TOOL_FAILURE = "post_tool_failure"
    PRE_COMPACT = "pre_compact"
    POST_COMPACT = "post_compact"
    HOOK_DECISION = "hook_decision"
    DONE_ACCEPTED = "done_accepted"
    STOP = "stop"
    SUBAGENT_START = "subagent_start"
    SUBAGENT_STOP = "subagent_stop"


COVERED_BY: Final[Mapping[LifecycleEvent, str]] = {
    LifecycleEvent.PRE_TOOL_USE: "pre_dispatch",
    LifecycleEvent.POST_TOOL_USE: "post_dispatch",
    LifecycleEvent.POST_TOOL_FAILURE: "post_dispatch",
}
"""events that a hook with this method is not told"""


@dataclass(frozen=True, slots=True)
class EventPayload:
    """One event; the fields that do not belong to it are None."""

    event: LifecycleEvent
    step_num: int = 0
    """of the step that comes next, or that the event is about"""
    state: Any = None
    session_log: Any = None
    context: Any = None
    prompt: str | None = None
    """the text of what is new in the request"""
    raw_response: str | None = None
    tool_call: ToolCall | None = None
    tool_result: ToolResult | None = None
    usage: Usage | None = None
    termination_reason: str | None = None
    messages_before: int | None = None
    messages_after: int | None = None
    subagent_id: str | None = None
    hook_slot: str | None = None
    hook_name: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """`tool_progress`: stage and data; `hook_decision`: decision; `post_compact`: reason and outcome"""


def slot(event: LifecycleEvent) -> str:
    """Return under which name the hooks of an event are kept, and what spans call the method."""
    return _SLOTS[event]


_SLOTS: Final = {event: f"on_event({event})" for event in LifecycleEvent}

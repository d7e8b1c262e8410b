"""Everything one run works with: what it was given, and what it has come to so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from looplet.backends.adapter import Model
from looplet.boundary import Boundary
from looplet.config import LoopConfig
from looplet.hooks import HookSet
from looplet.message_log import MessageLog
from looplet.messages import Conversation, Message
from looplet.prompt import Shown
from looplet.state import SessionLog
from looplet.telemetry.spans import RunTrace
from looplet.tools import BaseToolRegistry
from looplet.types import Step, Usage


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to; `Run.result` once it has ended."""

    run_id: str
    trace_id: str
    """32 hex digits"""
    stop_reason: str
    final_output: dict[str, Any]
    """the arguments of the accepted `done` call, `{}` without one"""
    steps: Sequence[Step]
    usage: Usage
    task: dict[str, Any]


@dataclass(slots=True)
class RunScope:
    """The working set of a run; the phases share it."""

    model: Model
    tools: BaseToolRegistry
    hooks: HookSet
    config: LoopConfig
    boundary: Boundary
    trace: RunTrace
    state: Any
    session_log: SessionLog
    conversation: Conversation
    task: dict[str, Any]
    parent: tuple[str, str] | None = None
    """run id and tool-call id of the run whose tool started this one"""
    context: Any = None
    """the caller's own object for hooks; without one, `pre_prompt` gets the `Prompt`"""
    head: tuple[Message, ...] = ()
    """the messages that every request begins with: system prompt, text protocol"""
    log: MessageLog = field(default_factory=MessageLog)
    shown: Shown = field(default_factory=Shown)
    """the conversation as text, for hooks that get the `Prompt`"""
    task_message: Message | None = None
    """the message that shows the task"""
    briefing: list[str] = field(default_factory=list)
    """texts for the next request only"""
    stop: str | None = None
    """the stop reason, once there is one"""
    ending: str | None = None
    """the stop reason of a run that has ended"""
    gate_failures: Counter[tuple[int, str]] = field(default_factory=Counter)
    call_ids: dict[str, int] = field(default_factory=dict)
    """the ids of the run's calls, and how often each was proposed"""
    model_calls: int = 0
    parse_failures: int = 0
    """replies in a row that held no tool call"""
    logged_prefix: int = 0
    """how many leading messages the next request shares with the last one, if the conversation was only appended to"""
    logged_edits: int = 0
    task_position: int | None = None
    """of the task's message in the first request, None while there is none"""
    recorded_task: dict[str, Any] = field(default_factory=dict)
    """the task as the trace tells it; `{}` while a hook that may rewrite it has not seen it"""
    rewrites: bool = False
    """a `pre_prompt` hook rewrites requests: what it has not seen yet must not reach the trace"""
    turn_usage: Usage = field(default_factory=Usage)
    turn_prompt: str = ""

    @property
    def asks_rewriters(self) -> bool:
        """Tell whether a hook may rewrite what is sent, and so what may be recorded."""
        return self.context is None and bool(self.hooks.of("pre_prompt"))

    def say_stop(self, reason: str) -> None:
        """End the run after this turn; the first reason counts."""
        if self.stop is None:
            self.stop = reason

    def unique_call_id(self, proposed: str, number: int) -> str:
        """Return `proposed`, or an id like it that this run has not used."""
        name = base = proposed or f"call_{number}"
        again = self.call_ids.get(base, 1)
        while name in self.call_ids:
            again += 1
            name = f"{base}_{again}"
        self.call_ids[base] = again
        self.call_ids.setdefault(name, 1)
        return name

    def result(self, ending: str) -> RunResult:
        """Return what the run came to."""
        return RunResult(
            self.trace.recorder.run_id,
            self.trace.trace_id or "",
            ending,
            final_output_of(self.state.steps, ending),
            self.state.steps,
            self.trace.recorder.ledger.own,
            self.recorded_task,
        )


def note_state(state: Any, name: str, value: Any) -> None:
    """Set a field of the run's state; a class of the caller's own need not have our fields."""
    try:
        setattr(state, name, value)
    except AttributeError:
        return


def final_output_of(steps: Sequence[Step], stop_reason: str | None) -> dict[str, Any]:
    """Return the arguments of the accepted `done` call; `answer` is there under either of its names."""
    if stop_reason != "done" or not steps:
        return {}
    output = dict(steps[-1].tool_call.args)
    if "answer" not in output and "summary" in output:
        output["answer"] = output["summary"]
    return output

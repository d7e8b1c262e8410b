"""`Pause`: the record with which a run that waits for a human ends its segment; plain, typed data.

It is written as JSON and read back by `looplet.resume`, which refuses what is not of these types.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Final, Self

from looplet.approval import ApprovalRequest
from looplet.budgets import Budget
from looplet.config import LoopConfig
from looplet.ledger import Spent
from looplet.messages import encode, sha256
from looplet.state import LogEntry
from looplet.types import ToolCall, Usage

FORMAT: Final = 2
"""of the record.  2: it names the guards; those of format 1 have no number"""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the state of a run counts; None where a state of the caller's own has no such field."""

    queries_used: int | None
    free_steps: int | None
    last_error: str | None

    @classmethod
    def of(cls, state: Any) -> Self:
        """Return the counters of a state."""
        error = getattr(state, "last_error", None)
        return cls(_number(state, "queries_used"), _number(state, "free_steps"), error if type(error) is str else None)


def _number(state: Any, name: str) -> int | None:
    value = getattr(state, name, None)
    return value if type(value) is int else None


@dataclass(frozen=True, slots=True)
class Settings:
    """Those settings of a run (`LoopConfig`) that are plain values."""

    max_steps: int
    max_tokens: int | None
    temperature: float | None
    system_prompt: str
    agent_name: str
    done_tool: str
    done_tools: list[str]
    use_native_tools: bool
    concurrent_dispatch: bool
    max_parallel_calls: int
    parse_recovery: int
    gate_failures: int
    capture_content: bool | None
    budget: Budget | None
    max_turn_continuations: int
    context_window: int | None
    tool_result_max_chars: int | None
    max_depth: int

    @classmethod
    def of(cls, config: LoopConfig, system_prompt: str) -> Self:
        """Return the plain values of a config, with the system prompt as it may be recorded."""
        values = {f.name: getattr(config, f.name) for f in fields(cls)}
        return cls(**{**values, "system_prompt": system_prompt, "done_tools": list(config.done_tools)})

    def config(self) -> LoopConfig:
        """Return a config with these settings.  Raises ConfigError for values that cannot be."""
        return LoopConfig(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Pause:
    """What the next segment needs beside steps and messages; it has passed the run's boundary."""

    requests: list[ApprovalRequest]
    """what the run waits for"""
    held: list[ToolCall]
    """the calls of its last reply that were not begun"""
    held_sha256: str
    """over them: a sink that redacts what is recorded may have changed their arguments"""
    turn: int
    segment: int
    model_calls: int
    trace_flags: int
    trace_state: str
    counters: Counters
    metadata: dict[str, Any]
    """of the state"""
    theory: str
    notes: list[LogEntry] | None
    """the session log, None where it follows from the steps"""
    briefing: list[str]
    turn_prompt: str
    unclaimed: Usage
    spent: Spent
    elapsed_s: float
    hooks: list[tuple[str, Any]]
    """what hooks remember, by name"""
    settings: Settings
    redacted: bool
    """whether what entered the run was redacted"""
    redacted_late: bool
    """whether what was recorded of it was"""
    guards: list[str]
    """classes of the hooks that may refuse or stop"""
    limits: list[str]
    """what the budgets limit, those of the runs above included"""
    format: int = FORMAT


def hash_calls(calls: Iterable[ToolCall]) -> str:
    """Return a hash over some calls: tools, ids and arguments."""
    return str(sha256(encode([(call.tool, call.call_id, call.args) for call in calls])).hexdigest())

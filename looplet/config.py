"""`LoopConfig`: the settings of a run that are not values of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from looplet.arguments import (
    DICT,
    FLAG,
    FUNCTION,
    NAMES,
    NUMBER,
    TEXT,
    check_fields,
    int_from,
    optional,
    shown,
    strict_names,
)
from looplet.errors import ConfigError
from looplet.former_settings import INSTEAD

if TYPE_CHECKING:
    from looplet.budgets import Budget
    from looplet.cancel import CancelToken


_KINDS: Final = {
    "max_steps": optional(int_from(0)),
    "max_tokens": optional(int_from(1)),
    "temperature": optional(NUMBER),
    "system_prompt": optional(TEXT),
    "agent_name": TEXT,
    "done_tool": TEXT,
    "done_tools": NAMES,
    "use_native_tools": FLAG,
    "concurrent_dispatch": FLAG,
    "max_parallel_calls": int_from(1),
    "parse_recovery": int_from(0),
    "gate_failures": int_from(1),
    "redact": optional(FUNCTION),
    "capture_content": optional(FLAG),
    "tool_metadata": DICT,
    "generate_kwargs": DICT,
    "approval_handler": optional(FUNCTION),
    "max_turn_continuations": int_from(0),
    "context_window": optional(int_from(1)),
    "tool_result_max_chars": optional(int_from(1)),
    "max_depth": int_from(1),
}


@strict_names(INSTEAD.get)
@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Settings of a run.  A run never changes the object it was given."""

    max_steps: int = 15
    """tool calls, `free` ones not counted"""
    max_tokens: int | None = None
    """output limit of one model call; None leaves it to the provider"""
    temperature: float | None = None
    """None leaves it to the provider"""
    system_prompt: str = ""
    agent_name: str = "looplet"
    """names the run's span and metrics"""
    done_tool: str = "done"
    done_tools: Sequence[str] = ()
    """further tools that end the run when they succeed"""
    use_native_tools: bool = True
    """False: teach the tools in the prompt and read calls out of the text, whatever the backend can do"""
    concurrent_dispatch: bool = True
    """run neighbouring calls of `concurrent_safe` tools at the same time"""
    max_parallel_calls: int = 10
    parse_recovery: int = 2
    """corrective turns in a row after replies that hold no tool call"""
    gate_failures: int = 3
    """how often one gate may raise before the run ends with `error`"""
    redact: Callable[[str], str] | None = None
    """maps every string that enters the run to what may be seen of it"""
    capture_content: bool | None = None
    """show content to the tracer provider too; None: as OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT says"""
    tool_metadata: Mapping[str, Any] = field(default_factory=dict)
    """handed to tools as `ctx.metadata`"""
    generate_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """further keyword arguments of every model call"""
    approval_handler: Callable[[str, list[str]], Any] | None = None
    """answers `ctx.approve(prompt, options)` of tools, and the questions of gates; may be `async def` for gates"""
    budget: Budget | None = None
    """what the run, with its sub-agents, may spend"""
    cancel_token: CancelToken | None = None
    """asks the run to stop; looked at between phases, ends waits, the wait for a model too, and is handed to tools"""
    max_turn_continuations: int = 2
    """how often a reply that was cut by the output limit is continued"""
    context_window: int | None = None
    """tokens; with it, `compact_service` (or clearing and dropping what is old) runs before the window is full"""
    compact_service: Any = None
    """makes the conversation shorter (`looplet.compaction`)"""
    memory_sources: Sequence[Any] = ()
    """what the model is to remember (`looplet.memory`)"""
    tool_result_max_chars: int | None = 30_000
    """longer tool results are clipped for the model; the step and the trace have all of it"""
    max_depth: int = 8
    """how deep sub-agents may call sub-agents"""

    def __post_init__(self) -> None:
        if isinstance(self.done_tools, str):
            raise ConfigError(f"done_tools is a list of names: done_tools=[{self.done_tools!r}]")
        check_fields(self, _KINDS)
        if self.cancel_token is not None and not _has(self.cancel_token, "on_cancel"):
            raise ConfigError(f"cancel_token takes a CancelToken(), not {shown(self.cancel_token)}")
        if self.budget is not None and not _has(self.budget, "limits"):
            raise ConfigError(
                f"budget takes a Budget(...), not {shown(self.budget)}; a BudgetCap goes into hooks=[...]"
            )

    @property
    def ending_tools(self) -> frozenset[str]:
        """Return the names of the tools that end a run."""
        return frozenset((self.done_tool, *self.done_tools))


def _has(given: object, attribute: str) -> bool:
    return not isinstance(given, type) and hasattr(given, attribute)

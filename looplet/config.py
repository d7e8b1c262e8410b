"""`LoopConfig`: the settings of a run that are not values of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from looplet.errors import ConfigError

if TYPE_CHECKING:
    from looplet.budgets import Budget
    from looplet.cancel import CancelToken


_LEAST: Final = {
    "max_tokens": 1,
    "max_parallel_calls": 1,
    "parse_recovery": 0,
    "gate_failures": 1,
    "max_turn_continuations": 0,
    "context_window": 1,
    "tool_result_max_chars": 1,
    "max_depth": 1,
}
"""the smallest value of settings that are whole numbers"""


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
    """asks the run to stop; looked at between phases, and handed to tools"""
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
        self._check_numbers()
        for name in ("redact", "approval_handler"):
            if (given := getattr(self, name)) is not None and not callable(given):
                raise ConfigError(f"{name} must be a function, not {type(given).__name__}")
        for name in ("generate_kwargs", "tool_metadata"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} must be a dict, not {type(getattr(self, name)).__name__}")
        if isinstance(self.done_tools, str):
            raise ConfigError(f"done_tools is a list of names: done_tools=[{self.done_tools!r}]")
        if self.cancel_token is not None and not callable(getattr(self.cancel_token, "on_cancel", None)):
            raise ConfigError(f"cancel_token takes a CancelToken(), not {type(self.cancel_token).__name__}")
        if self.budget is not None and not hasattr(self.budget, "limits"):
            raise ConfigError(
                f"budget takes a Budget(...), not {type(self.budget).__name__}; a BudgetCap goes into hooks=[...]"
            )

    def _check_numbers(self) -> None:
        for name, least in _LEAST.items():
            given = getattr(self, name)
            if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < least):
                raise ConfigError(f"{name} must be a whole number from {least}, not {given!r}")
        if self.temperature is not None and not isinstance(self.temperature, (int, float)):
            raise ConfigError(f"temperature must be a number, not {self.temperature!r}")

    @property
    def ending_tools(self) -> frozenset[str]:
        """Return the names of the tools that end a run."""
        return frozenset((self.done_tool, *self.done_tools))

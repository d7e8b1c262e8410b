"""`LoopConfig`: the settings of a run that are not values of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from looplet.errors import ConfigError


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
    approval_handler: Callable[[str, list[str]], str | None] | None = None
    """answers `ctx.approve(prompt, options)` of tools"""

    def __post_init__(self) -> None:
        if self.redact is not None and not callable(self.redact):
            raise ConfigError(f"redact must be a function from str to str, not {type(self.redact).__name__}")

    @property
    def ending_tools(self) -> frozenset[str]:
        """Return the names of the tools that end a run."""
        return frozenset((self.done_tool, *self.done_tools))

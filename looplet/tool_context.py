"""`ToolContext`: what a tool gets beside its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from looplet.cancel import CancelToken


@dataclass(slots=True)
class ToolContext:
    """What a tool gets beside its arguments; fresh for each call."""

    cancel_token: CancelToken = field(default_factory=CancelToken)
    """cancelled when nobody waits for the call any more: it took too long, or the run was left"""
    on_progress: Callable[[str, Any], Any] | None = None
    """gets what `report_progress` reports: stage, data"""
    session_id: str | None = None
    """the run's id"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """`LoopConfig.tool_metadata` and the state's, in a dict of this call's own"""
    llm: Any = None
    """the run's model; what it is asked is part of the run"""
    request_approval: Callable[[str, list[str]], str | None] | None = None
    """asks a human: question, options → the option chosen, None when nobody can be asked"""
    warnings: list[str] = field(default_factory=list)
    """become those of the result"""
    resources: dict[str, Any] = field(default_factory=dict)
    """what the tool `requires`, by name"""

    def report_progress(self, stage: str, data: Any = None) -> None:
        """Tell how far the call is."""
        if self.on_progress is not None:
            self.on_progress(stage, data)

    def warn(self, message: str) -> None:
        """Add a warning to the call's result."""
        self.warnings.append(message)

    def approve(self, prompt: str, options: Sequence[str] = ("approve", "deny")) -> str | None:
        """Ask a human; returns one of the options, None when nobody can be asked."""
        return self.request_approval(prompt, list(options)) if self.request_approval else None

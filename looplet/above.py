"""`RunAbove`: what a run shares with the runs that its tools start; they find it in the context of the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from opentelemetry import context as otel_context
from opentelemetry import trace

from looplet.budgets import Guard
from looplet.telemetry import semconv
from looplet.telemetry.recorder import Recorder

ABOVE_KEY: Final = "looplet.above"
"""the OpenTelemetry context key under which a run that a tool starts finds the run above it"""


@dataclass(frozen=True, slots=True)
class RunAbove:
    """A run as those see it that its tools start."""

    recorder: Recorder
    guard: Guard
    """what the run may spend; those below spend it, too"""
    tool_names: tuple[str, ...]
    """of the run and those above: their guards may be shared"""
    depth: int
    """1, or more for a run that a tool of another run started"""
    max_depth: int
    """how deep such runs may be nested"""

    @classmethod
    def of_here(cls) -> Self | None:
        """Return the run inside which we are called, None outside of any."""
        found = otel_context.get_value(ABOVE_KEY)
        return found if isinstance(found, cls) else None

    @property
    def call(self) -> tuple[str, str]:
        """Return the ids of the run and of its tool call inside which we are called."""
        attributes = getattr(trace.get_current_span(), "attributes", None) or {}
        return self.recorder.run_id, str(attributes.get(semconv.TOOL_CALL_ID, ""))

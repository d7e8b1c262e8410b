"""`ParentRun`: what a run shares with the runs that its tools start (sub-agents)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from opentelemetry import context as otel_context
from opentelemetry import trace

from looplet.budgets import Guard
from looplet.telemetry import semconv
from looplet.telemetry.recorder import Recorder

PARENT_KEY: Final = "looplet.parent_run"
"""the key of the run's `ParentRun` in the OpenTelemetry context of its tool calls"""


@dataclass(frozen=True, slots=True)
class ParentRun:
    """A run, as a run that one of its tools starts sees it."""

    recorder: Recorder
    guard: Guard
    """what the run may spend; what its sub-agents spend counts, too"""
    tool_names: tuple[str, ...]
    """the tools of this run and of the runs above it: a guard may be shared among them"""
    depth: int
    """1 for a run that no tool started, 2 for its sub-agents, ..."""
    max_depth: int
    """the largest `depth` that is allowed"""

    @classmethod
    def current(cls) -> Self | None:
        """Return the run whose tool is calling; None outside of a run."""
        found = otel_context.get_value(PARENT_KEY)
        return found if isinstance(found, cls) else None

    @property
    def call(self) -> tuple[str, str]:
        """Return the run's id and the id of the tool call that is calling; "" outside of a tool call."""
        attributes = getattr(trace.get_current_span(), "attributes", None) or {}
        return self.recorder.run_id, str(attributes.get(semconv.TOOL_CALL_ID, ""))

"""What a run remembers: `DefaultState`, and `SessionLog`, its running notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from looplet.types import Step, Usage


@dataclass(slots=True)
class DefaultState:
    """The mutable state of a run; hooks get it, only the loop writes the fields it owns."""

    steps: list[Step] = field(default_factory=list)
    queries_used: int = 0
    """tool calls that really ran, `free` tools and `done` not counted"""
    max_steps: int = 15
    metadata: dict[str, Any] = field(default_factory=dict)
    """yours"""
    step_context: dict[str, Any] = field(default_factory=dict)
    """yours; emptied at the start of each turn"""
    task: dict[str, Any] = field(default_factory=dict)
    conversation: Any = None
    usage: Usage = field(default_factory=Usage)
    """of all model calls so far"""
    last_error: str | None = None
    """error of the most recent call that really ran; None after a success"""
    budget: Any = None
    """what the run has spent and what is left: `.spent`, `.remaining` (`looplet.budgets.BudgetView`)"""
    free_steps: int = 0
    """steps of `free` tools, which cost no budget"""
    compact_service: Any = None
    """yours: from now on, this makes the conversation shorter, whatever the run was given"""

    @property
    def step_count(self) -> int:
        """Return the number of steps so far."""
        return len(self.steps)

    @property
    def budget_remaining(self) -> int:
        """Return how many more steps the run may take."""
        return max(0, self.max_steps - len(self.steps) + self.free_steps)

    def context_summary(self) -> str:
        """Return the last steps in words."""
        return "\n".join(step.summary() for step in self.steps[-5:])

    def snapshot(self) -> dict[str, Any]:
        """Return the counters and the metadata as one dict."""
        return {
            "step_count": self.step_count,
            "queries_used": self.queries_used,
            "budget_remaining": self.budget_remaining,
            **self.metadata,
        }


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of a session log."""

    step: int
    theory: str
    tool: str
    reasoning: str
    entities: Sequence[str] = ()
    findings: Sequence[str] = ()
    highlights: Sequence[str] = ()
    recall_key: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-like dict; `from_dict` is the inverse."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value if isinstance(value, (str, int)) else list(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LogEntry:
        """Build the entry that `to_dict` described."""
        fields_: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
        return cls(**fields_)


def entry_of(step: Step) -> LogEntry:
    """Return the line that the loop adds for a step."""
    call = step.tool_call
    return LogEntry(step.number, str(call.metadata.get("theory", "")), step.tool_result.tool, call.reasoning)


class SessionLog:
    """Notes on what was tried and why: the loop adds a line for each step, hooks may add their own."""

    def __init__(self, *, title: str = "SESSION LOG", highlights_label: str = "highlights") -> None:
        self.title = title
        self.highlights_label = highlights_label
        self.entries: list[LogEntry] = []
        self.current_theory = ""
        self._entities: dict[str, None] = {}

    def record(
        self,
        step: int,
        theory: str,
        tool: str,
        reasoning: str,
        entities: Sequence[str] | None = None,
        findings: Sequence[str] | None = None,
        highlights: Sequence[str] | None = None,
        recall_key: str = "",
    ) -> int:
        """Add a line; return how many of its entities were new."""
        self.entries.append(
            LogEntry(
                step,
                theory,
                tool,
                reasoning,
                tuple(entities or ()),
                tuple(findings or ()),
                tuple(highlights or ()),
                recall_key,
            )
        )
        if theory:
            self.current_theory = theory
        new = [entity for entity in entities or () if entity not in self._entities]
        self._entities.update(dict.fromkeys(new))
        return len(new)

    def record_step(self, step: Step) -> int:
        """Add the line of a step; return how many new entities it brought (0: the loop extracts none)."""
        entry = entry_of(step)
        self.entries.append(entry)
        self.current_theory = entry.theory or self.current_theory
        return 0

    def restore(self, entries: Sequence[LogEntry], theory: str) -> None:
        """Go on from the lines of an earlier segment of the run."""
        self.entries, self.current_theory = list(entries), theory
        self._entities = dict.fromkeys(entity for entry in entries for entity in entry.entities)

    def all_entities(self) -> list[str]:
        """Return every entity once, in the order of first mention."""
        return list(self._entities)

    def render(self) -> str:
        """Return the log as text; an empty string when there is nothing in it."""
        if not self.entries:
            return ""
        lines = [self.title]
        if self.current_theory:
            lines.append(f"Current theory: {self.current_theory}")
        lines.append("Steps:")
        for entry in self.entries:
            lines.append(f"  S{entry.step}: {entry.tool}" + (f" — {entry.reasoning[:80]}" if entry.reasoning else ""))
            lines += [f"    {finding}" for finding in entry.findings]
            if entry.highlights:
                lines.append(f"    {self.highlights_label}: {', '.join(entry.highlights)}")
        return "\n".join(lines)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the lines as JSON-like dicts."""
        return [entry.to_dict() for entry in self.entries]

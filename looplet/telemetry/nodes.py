"""`SpanNode`: one span of a trace, its parent and its children."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from looplet.errors import TraceError
from looplet.telemetry import semconv
from looplet.telemetry.otlp_decode import EventRecord, SpanRecord

AGENT: Final = "agent"
"""the purpose of a model call that names none"""


@dataclass(slots=True, eq=False)
class SpanNode:
    """One span, its parent and its children in the order of their starts."""

    record: SpanRecord
    parent: SpanNode | None = None
    children: list[SpanNode] = field(default_factory=list)
    synthetic: bool = False
    """the span is missing in the file; its name, times and place are inferred"""
    path: str = field(default="", repr=False)
    """of the file"""

    @property
    def name(self) -> str:
        """Return the span's name, `chat gpt-4o`."""
        return self.record.name

    @property
    def operation(self) -> str:
        """Return what the span is about: its GenAI operation, else its name without the subject."""
        return str(self.record.attributes.get(semconv.OPERATION_NAME) or self.record.name.partition(" ")[0])

    @property
    def span_id(self) -> str:
        """Return 16 hex digits."""
        return self.record.span_id

    @property
    def trace_id(self) -> str:
        """Return 32 hex digits."""
        return self.record.trace_id

    @property
    def attributes(self) -> dict[str, Any]:
        """Return the span's attributes."""
        return self.record.attributes

    @property
    def events(self) -> list[EventRecord]:
        """Return the span's events, oldest first."""
        return self.record.events

    @property
    def duration_s(self) -> float:
        """Return seconds from start to end."""
        return (self.record.end_ns - self.record.start_ns) / 1e9

    @property
    def is_error(self) -> bool:
        """Tell whether the status is ERROR."""
        return self.record.status_code == 2

    @property
    def run_id(self) -> str:
        """Return the id of the looplet run, empty for foreign spans outside one."""
        return str(self.record.attributes.get(semconv.RUN_ID, ""))

    @property
    def is_own(self) -> bool:
        """Tell whether looplet itself made the span; inside a run there may be others' as well."""
        return self.record.scope == semconv.SCOPE and semconv.RUN_ID in self.record.attributes

    @property
    def is_request(self) -> bool:
        """Tell whether this is a request of the loop itself, and no model call for a tool, a judge or a summary."""
        purpose = self.record.attributes.get(semconv.CHAT_PURPOSE, AGENT)
        return self.operation == semconv.CHAT and purpose == AGENT and self.turn_number > 0

    @property
    def turn_number(self) -> int:
        """Return the turn, from 1; 0 outside one."""
        number = self.record.attributes.get(semconv.TURN_NUMBER, 0)
        return number if isinstance(number, int) else 0

    def ancestors(self) -> Iterator[SpanNode]:
        """Yield the parent, its parent, and so on."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def descendants(self) -> Iterator[SpanNode]:
        """Yield every span below this one, depth first."""
        stack = list(reversed(self.children))
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))

    def matches(self, name: str | None, attributes: Mapping[str, Any] | None) -> bool:
        """Tell whether the name fits (`*` and `?` are wildcards) and all these attributes have these values."""
        if name is not None and not fnmatchcase(self.record.name, name):
            return False
        mine = self.record.attributes
        return all(key in mine and mine[key] == value for key, value in (attributes or {}).items())

    def problem(self, words: str) -> TraceError:
        """Return the error that says what is wrong with this span, and where it is."""
        return TraceError(
            f"span {self.record.name[:60]!r} ({self.record.span_id[:16]}): {words}",
            path=self.path,
            line=self.record.line,
        )

"""`Trace`: an OTLP file as a tree of spans, with queries.

Reads what looplet writes and any other trace in the GenAI conventions (`otlp_file.read_file` says which forms).  Of a
killed run the spans that never ended are missing; the tree is rebuilt around the gaps, and what was made up is marked
`synthetic`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from looplet.errors import TraceError
from looplet.telemetry import semconv
from looplet.telemetry.otlp_decode import EventRecord, SpanRecord
from looplet.telemetry.otlp_file import Problem, read_file

if TYPE_CHECKING:
    from looplet.telemetry.runs import RunView

TRACE_FILE: Final = "trace.jsonl"


@dataclass(slots=True, eq=False)
class SpanNode:
    """One span, its parent and its children in the order of their starts."""

    record: SpanRecord
    parent: SpanNode | None = None
    children: list[SpanNode] = field(default_factory=list)
    synthetic: bool = False
    """the span is missing in the file; its name, times and place are inferred"""

    @property
    def name(self) -> str:
        """Return the span's name, `chat gpt-4o`."""
        return self.record.name

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


class Trace:
    """The spans of one file."""

    def __init__(self, records: Iterable[SpanRecord], *, path: str = "", problems: Iterable[Problem] = ()) -> None:
        self.path = path
        self.problems = list(problems)
        """what could not be read and was left out"""
        by_id = {(r.trace_id, r.span_id): SpanNode(r) for r in records}  # a line written twice counts once
        self._by_id = by_id
        self.roots: list[SpanNode] = []
        """spans without a parent in the file"""
        _fill_gaps(by_id)
        self.spans = sorted(by_id.values(), key=lambda n: (n.record.start_ns, n.record.end_ns))
        """all spans in the order of their starts"""
        for node in self.spans:
            parent = by_id.get((node.record.trace_id, node.record.parent_id))
            if parent is None or parent is node:
                self.roots.append(node)
            else:
                node.parent = parent
                parent.children.append(node)
        self._cut_cycles()

    def _cut_cycles(self) -> None:
        """Make a root of a span that is its own ancestor: no writer makes one, but a file may hold it."""
        reached = {id(node) for root in self.roots for node in (root, *root.descendants())}
        for node in self.spans:
            if id(node) not in reached:
                assert node.parent is not None
                node.parent.children.remove(node)
                node.parent = None
                self.roots.append(node)
                reached |= {id(below) for below in (node, *node.descendants())}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a trace file, or the `trace.jsonl` in a folder.  Raises TraceError."""
        where = Path(path)
        if where.is_dir():
            if not (where / TRACE_FILE).exists():
                raise TraceError(f"there is no {TRACE_FILE} in this folder", path=str(where))
            where = where / TRACE_FILE
        contents = read_file(where)
        return cls(contents.spans, path=str(where), problems=contents.problems)

    def find(
        self,
        name: str | None = None,
        *,
        attributes: Mapping[str, Any] | None = None,
        where: Callable[[SpanNode], bool] | None = None,
    ) -> list[SpanNode]:
        """Return the spans that fit: name (wildcards allowed), attribute values, and a condition of your own."""
        return [n for n in self.spans if n.matches(name, attributes) and (where is None or where(n))]

    def span(self, span_id: str) -> SpanNode:
        """Return the span with this id; raises KeyError."""
        for (_, own), node in self._by_id.items():
            if own == span_id:
                return node
        raise KeyError(span_id)

    @cached_property
    def runs(self) -> list[RunView]:
        """Return the runs in the file, oldest first."""
        from looplet.telemetry.runs import runs_of

        return runs_of(self)

    def __len__(self) -> int:
        return len(self.spans)


def _fill_gaps(by_id: dict[tuple[str, str], SpanNode]) -> None:
    """Add a synthetic span for each parent of a looplet span that is missing: of runs that were killed."""
    skeleton = _Skeleton(by_id.values())
    level = list(by_id.values())
    while level:
        made: dict[tuple[str, str], SpanNode] = {}
        for node in level:
            record = node.record
            key = (record.trace_id, record.parent_id)
            if (
                not record.parent_id
                or key in by_id
                or not node.run_id
                or node.span_id == skeleton.roots.get(node.run_id)
            ):
                continue
            gap = made.setdefault(key, skeleton.gap_above(node))
            gap.record.start_ns = min(gap.record.start_ns, record.start_ns)
            gap.record.end_ns = max(gap.record.end_ns, record.end_ns)
        by_id.update(made)
        level = list(made.values())


class _Skeleton:
    """The ids that a run's root and turns must have, known from themselves or from their children."""

    def __init__(self, nodes: Iterable[SpanNode]) -> None:
        self.roots: dict[str, str] = {}
        self.turns: dict[tuple[str, int], str] = {}
        ours = [node for node in nodes if node.run_id and node.record.scope == semconv.SCOPE]
        for node in ours:
            name = node.name.split(" ")[0]
            if name == semconv.INVOKE_AGENT:
                self.roots[node.run_id] = node.span_id
            elif name == semconv.TURN:
                self.turns[node.run_id, node.turn_number] = node.span_id
        for node in ours:
            name = node.name.split(" ")[0]
            if name in _BELOW_ROOT:
                self.roots.setdefault(node.run_id, node.record.parent_id)
            elif name in _BELOW_TURN:
                self.turns.setdefault((node.run_id, node.turn_number), node.record.parent_id)

    def gap_above(self, child: SpanNode) -> SpanNode:
        """Return the span that must have been above `child`."""
        name, parent = self._missing(child)
        record = child.record
        keys = (semconv.RUN_ID,) if name == semconv.INVOKE_AGENT else (semconv.RUN_ID, semconv.TURN_NUMBER)
        made = SpanRecord(
            name=name, trace_id=record.trace_id, span_id=record.parent_id, parent_id=parent, kind=1,
            start_ns=record.start_ns, end_ns=record.end_ns,
            attributes={k: record.attributes[k] for k in keys if k in record.attributes}, events=[], links=[],
            status_code=0, status_message="", resource=record.resource, scope=record.scope,
            scope_version=record.scope_version, schema_url=record.schema_url, trace_state="",
            dropped_attributes=0, dropped_events=0, dropped_links=0, line=0,
        )  # fmt: skip
        return SpanNode(made, synthetic=True)

    def _missing(self, child: SpanNode) -> tuple[str, str]:
        root = self.roots.get(child.run_id, "")
        turn = self.turns.get((child.run_id, child.turn_number), "")
        if child.record.parent_id == root:
            return semconv.INVOKE_AGENT, ""
        if child.record.parent_id == turn:
            return semconv.TURN, root
        if child.name.split(" ")[0] in (semconv.TOOL_START, semconv.EXECUTE_TOOL):
            return semconv.DISPATCH, turn
        return UNFINISHED, turn or root


UNFINISHED: Final = "(unfinished)"
_BELOW_ROOT: Final = frozenset({semconv.START, semconv.PRE_LOOP, semconv.TURN, semconv.END})
_BELOW_TURN: Final = frozenset(
    {
        semconv.PRE_PROMPT,
        semconv.CHAT,
        semconv.PRE_DISPATCH,
        semconv.CHECK_DONE,
        semconv.DISPATCH,
        semconv.POST_DISPATCH,
        semconv.SHOULD_STOP,
    }
)

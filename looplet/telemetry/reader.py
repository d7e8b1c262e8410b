"""`Trace`: an OTLP file as a tree of spans, with queries.

Reads what looplet writes and any other trace in the GenAI conventions (`otlp_file.read_file` says which forms).  Of a
killed run the spans that never ended are missing; the tree is rebuilt around the gaps (`looplet.telemetry.gaps`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from looplet.errors import TraceError
from looplet.telemetry.gaps import fill_gaps
from looplet.telemetry.nodes import SpanNode
from looplet.telemetry.otlp_decode import SpanRecord
from looplet.telemetry.otlp_file import Problem, read_file
from looplet.telemetry.runs import RunView, runs_of

__all__ = ["TRACE_FILE", "SpanNode", "Trace"]

TRACE_FILE: Final = "trace.jsonl"


class Trace:
    """The spans of one file."""

    def __init__(self, records: Iterable[SpanRecord], *, path: str = "", problems: Iterable[Problem] = ()) -> None:
        self.path = path
        self.problems = list(problems)
        """what could not be read and was left out"""
        by_id = {(r.trace_id, r.span_id): SpanNode(r, path=path) for r in records}  # a line written twice counts once
        self._by_id = by_id
        self.roots: list[SpanNode] = []
        """spans without a parent in the file"""
        fill_gaps(by_id)
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
        """Return the runs in the file, oldest first.  Raises TraceError for spans that looplet cannot have written."""
        return runs_of(self)

    def __len__(self) -> int:
        return len(self.spans)

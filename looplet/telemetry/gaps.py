"""Gaps: the spans that a killed run never ended, put back as far as the others tell of them.

Every span of looplet carries its run, its turn and its parent's id.  What stood above it follows from its name, so
that every span has its run and its turn above it; what is made up here is marked `synthetic`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from looplet.telemetry import semconv
from looplet.telemetry.nodes import SpanNode
from looplet.telemetry.otlp_decode import SpanRecord

Nodes: TypeAlias = dict[tuple[str, str], SpanNode]
"""trace id and span id → span"""

UNFINISHED: Final = "(unfinished)"
"""the name of a missing span that could be one of several"""

_BELOW_ROOT: Final = frozenset({semconv.START, semconv.PRE_LOOP, semconv.TURN, semconv.END})
_BELOW_TURN: Final = frozenset(
    {semconv.PRE_PROMPT, semconv.PRE_DISPATCH, semconv.CHECK_DONE, semconv.DISPATCH, semconv.POST_DISPATCH,
     semconv.SHOULD_STOP}
)  # fmt: skip
_BELOW_DISPATCH: Final = frozenset({semconv.TOOL_START, semconv.EXECUTE_TOOL})


def fill_gaps(nodes: Nodes) -> None:
    """Add a synthetic span for each parent of a looplet span that is missing: of runs that were killed."""
    skeleton = _Skeleton(nodes.values())
    level = list(nodes.values())
    while level:
        made: Nodes = {}
        for node in level:
            record = node.record
            key = (record.trace_id, record.parent_id)
            if not record.parent_id or key in nodes or not node.run_id or _is_top(node):
                continue
            gap = made.get(key) or made.setdefault(key, skeleton.gap_above(node))
            gap.record.start_ns = min(gap.record.start_ns, record.start_ns)
            gap.record.end_ns = max(gap.record.end_ns, record.end_ns)
        nodes.update(made)
        level = list(made.values())


class _Skeleton:
    """The ids that the roots of a run's segments and its turns must have, known from themselves or their children."""

    def __init__(self, nodes: Iterable[SpanNode]) -> None:
        roots: dict[str, _Times] = defaultdict(dict)
        turns: dict[tuple[str, int], _Times] = defaultdict(dict)
        for node in nodes:
            if node.is_own:
                _note_root(roots[node.run_id], node)
                _note_turn(turns[node.run_id, node.turn_number], node)
        self._roots = {run_id: _in_order(found) for run_id, found in roots.items()}
        self._turns = {key: _in_order(found) for key, found in turns.items()}
        self._segments = {
            (run_id, span_id): number
            for run_id, found in self._roots.items()
            for number, (_, span_id) in enumerate(found, 1)
        }
        self._known_turns = {(key, span_id) for key, found in self._turns.items() for _, span_id in found}

    def gap_above(self, child: SpanNode) -> SpanNode:
        """Return the span that must have been above `child`."""
        name, parent_id = self._missing(child)
        record = child.record
        told: dict[str, Any] = {semconv.RUN_ID: child.run_id}
        if name == semconv.INVOKE_AGENT:
            number = self._segments[child.run_id, record.parent_id]
            told |= {semconv.OPERATION_NAME: name, semconv.SEGMENT_NUMBER: number}
        elif semconv.TURN_NUMBER in record.attributes:
            told[semconv.TURN_NUMBER] = record.attributes[semconv.TURN_NUMBER]
        made = SpanRecord(
            name=name, trace_id=record.trace_id, span_id=record.parent_id, parent_id=parent_id, kind=1,
            start_ns=record.start_ns, end_ns=record.end_ns, attributes=told, events=[], links=[],
            status_code=0, status_message="", resource=record.resource,
            scope=record.scope if name == UNFINISHED else semconv.SCOPE,
            scope_version=record.scope_version, schema_url=record.schema_url, trace_state="",
            dropped_attributes=0, dropped_events=0, dropped_links=0, line=0,
        )  # fmt: skip
        return SpanNode(made, synthetic=True, path=child.path)

    def _missing(self, child: SpanNode) -> tuple[str, str]:
        """Return the name of the span above `child`, and the id of the one above that."""
        run_id, parent_id = child.run_id, child.record.parent_id
        roots, key = self._roots.get(run_id, []), (run_id, child.turn_number)
        if (number := self._segments.get((run_id, parent_id))) is not None:
            return semconv.INVOKE_AGENT, roots[0][1] if number > 1 else ""
        root = _latest(roots, child.record)
        if (key, parent_id) in self._known_turns:
            return semconv.TURN, root
        above = _latest(self._turns.get(key, []), child.record) or root
        return semconv.DISPATCH if child.is_own and child.operation in _BELOW_DISPATCH else UNFINISHED, above


def _is_top(node: SpanNode) -> bool:
    """Tell whether the span is the root of its run: what is above it belongs to somebody else."""
    return node.is_own and node.operation == semconv.INVOKE_AGENT and _is_first(node)


_Times: TypeAlias = dict[str, int]
"""span id → when the span began, at the latest"""


def _note_root(times: _Times, node: SpanNode) -> None:
    if node.operation == semconv.INVOKE_AGENT:
        _note(times, node.span_id, node.record.start_ns)
        if not _is_first(node):
            _note(times, node.record.parent_id, 0)  # the first segment, before all others
    elif node.operation in _BELOW_ROOT:
        _note(times, node.record.parent_id, node.record.start_ns)


def _note_turn(times: _Times, node: SpanNode) -> None:
    if node.operation == semconv.TURN:
        _note(times, node.span_id, node.record.start_ns)
    elif node.operation in _BELOW_TURN or node.is_request:
        _note(times, node.record.parent_id, node.record.start_ns)


def _note(times: _Times, span_id: str, at: int) -> None:
    if span_id:
        times[span_id] = min(at, times.get(span_id, at))


def _in_order(times: _Times) -> list[tuple[int, str]]:
    return sorted((at, span_id) for span_id, at in times.items())


def _latest(found: list[tuple[int, str]], record: SpanRecord) -> str:
    """Return the id of the last one that had begun before a span did; of the first, if none had."""
    if not found:
        return ""
    return found[max(0, bisect_right(found, (record.start_ns, _LAST_ID)) - 1)][1]


_LAST_ID: Final = "\U0010ffff"


def _is_first(root: SpanNode) -> bool:
    """Tell whether a segment is the first of its run: what is above it belongs to somebody else."""
    number = root.attributes.get(semconv.SEGMENT_NUMBER, 1)
    return not isinstance(number, int) or number <= 1

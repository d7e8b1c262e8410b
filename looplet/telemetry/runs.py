"""`RunView`: one run as its spans tell it: steps, messages, usage, and how it ended.

Everything that evals, replay and reports know about a run is derived here, from the file alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from looplet.messages import Message
from looplet.state import SessionLog
from looplet.telemetry import semconv
from looplet.telemetry.nodes import SpanNode
from looplet.telemetry.requests import Requests
from looplet.telemetry.told_steps import ToldSteps
from looplet.telemetry.values import as_type, check, decode, json_of, usage_of
from looplet.types import NO_USAGE, Step, ToolCall, Usage

if TYPE_CHECKING:
    from looplet.telemetry.reader import Trace

__all__ = ["INTERRUPTED", "UNKNOWN", "RunView", "decode", "runs_of", "usage_of"]

INTERRUPTED: Final = "interrupted"
"""the stop reason of a run whose end is not in the file: it was killed, or still goes on"""
UNKNOWN: Final = "unknown"
"""the stop reason of a foreign trace, which does not say"""


def runs_of(trace: Trace) -> list[RunView]:
    """Return the runs in a trace, oldest first: looplet's by run id, others by trace id.  Raises TraceError."""
    groups: dict[str, list[SpanNode]] = {}
    others: list[SpanNode] = []
    for node in trace.spans:
        if node.run_id:
            groups.setdefault(node.run_id, []).append(node)
        elif semconv.OPERATION_NAME in node.attributes:
            others.append(node)
    inside = _inside_runs(others)
    for node in others:
        if id(node) not in inside:
            groups.setdefault(node.trace_id or UNKNOWN, []).append(node)
    for nodes in groups.values():
        for node in nodes:
            check(node)
    return [RunView(run_id, nodes, trace.path) for run_id, nodes in groups.items()]


def _inside_runs(nodes: Iterable[SpanNode]) -> set[int]:
    """Return the ids of those nodes that stand inside a run of looplet's."""
    return {id(node) for node in nodes if any(above.run_id for above in node.ancestors())}


@dataclass
class RunView:
    """One run in a trace."""

    run_id: str
    spans: list[SpanNode] = field(repr=False)
    """in the order of their starts; those of others inside the run, too"""
    path: str = ""

    @cached_property
    def segments(self) -> list[SpanNode]:
        """Return the spans of the run's segments, oldest first: more than one when it was paused and went on."""
        nodes = self._looplets_own or (self.spans if self.is_ours else ())
        roots = [node for node in nodes if node.operation == semconv.INVOKE_AGENT]
        roots.sort(key=lambda node: (node.attributes.get(semconv.SEGMENT_NUMBER, 1), node.record.start_ns))
        return roots or [self._foreign_root()]

    def _foreign_root(self) -> SpanNode:
        agents = (node for node in self.spans if node.operation == semconv.INVOKE_AGENT)
        return next(agents, None) or next((n for n in self.spans if n.parent is None), self.spans[0])

    @property
    def root(self) -> SpanNode:
        """Return the `invoke_agent` span, of the first segment; else the first span without a parent in the run."""
        return self.segments[0]

    @property
    def last(self) -> SpanNode:
        """Return the span of the last segment: it says how the run ended, and its totals."""
        return self.segments[-1]

    @property
    def duration_s(self) -> float:
        """Return seconds from the start of the run to its end, pauses included."""
        return (self.last.record.end_ns - self.root.record.start_ns) / 1e9

    @property
    def trace_id(self) -> str:
        """Return 32 hex digits."""
        return self.root.trace_id

    @property
    def agent(self) -> str:
        """Return the agent's name; of a killed run, the one in its manifest."""
        told = self.root.attributes.get(semconv.AGENT_NAME)
        if told is None and self.root.synthetic and (start := self._start) is not None:
            config = as_type(start, semconv.CONFIG, json_of(start, semconv.CONFIG) or {}, dict[str, Any])
            told = config.get("agent_name")
        return str(told or "")

    @cached_property
    def is_ours(self) -> bool:
        """Tell whether looplet wrote the run."""
        return any(semconv.RUN_ID in node.attributes for node in self.spans)

    @cached_property
    def own(self) -> list[SpanNode]:
        """Return the spans that tell the run: looplet's own, by segment and start; all of a foreign run."""
        nodes = self._looplets_own or self.spans
        return nodes if len(self.segments) == 1 else sorted(nodes, key=self._segment_of)

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the attributes of the first `looplet.start`, `{}` when it is missing."""
        return self._start.attributes if self._start is not None else {}

    @cached_property
    def task(self) -> dict[str, Any]:
        """Return the task; `{}` when the trace does not tell it."""
        for node in self.own:
            if semconv.TASK in node.attributes:
                return as_type(node, semconv.TASK, json_of(node, semconv.TASK), dict[str, Any])
        return {}

    @property
    def stop_reason(self) -> str:
        """Return why the run ended, its last segment counts; `interrupted` when its end is missing."""
        reason = self.last.attributes.get(semconv.STOP_REASON)
        if reason is not None and not self.last.synthetic:
            return str(reason)
        return INTERRUPTED if self.is_ours else UNKNOWN

    @cached_property
    def chats(self) -> list[SpanNode]:
        """Return the run's model calls, oldest first: each once, although an instrumented client may tell it, too."""
        chats = [node for node in self.own if _is_chat(node)]
        if self._looplets_own:
            return chats
        return [chat for chat in chats if not any(map(_is_chat, chat.ancestors()))]

    @cached_property
    def agent_chats(self) -> list[SpanNode]:
        """Return the model calls that the loop itself made: none for tools, judges or summaries."""
        return [chat for chat in self.chats if chat.is_request or not self.is_ours]

    @cached_property
    def replies(self) -> dict[int, SpanNode]:
        """Return turn → the model call whose reply the turn went on with: the last one that did not fail."""
        return {chat.turn_number: chat for chat in self.agent_chats if not chat.is_error}

    @cached_property
    def usage(self) -> Usage:
        """Return the sum over the run's model calls."""
        total = NO_USAGE
        for chat in self.chats:
            total = total + usage_of(chat)
        return total

    @cached_property
    def steps(self) -> list[Step]:
        """Return the run's steps, as the caller of the loop got them."""
        told = ToldSteps(self.own, self.chats, self._requests, self._segment_of, is_ours=self.is_ours)
        return told.steps()

    @cached_property
    def session_log_text(self) -> str:
        """Return the session log: as recorded where hooks wrote into it, else retold from the steps."""
        for node in reversed(self.own):
            if semconv.SESSION_LOG in node.attributes and self._segment_of(node) == len(self.segments) - 1:
                return str(node.attributes[semconv.SESSION_LOG])
        log = SessionLog()
        for step in self.steps:
            if not step.tool_call.tool.startswith("__"):
                log.record_step(step)
        return log.render()

    @property
    def unfinished_calls(self) -> list[ToolCall]:
        """Return the calls that began and whose end is missing: whether they had their effect is not known."""
        done = {s.tool_call.call_id for s in self.steps}
        marks = [n for n in self.own if n.name == semconv.TOOL_START and semconv.TOOL_CALL_ID in n.attributes]
        return [
            ToolCall(str(n.attributes.get(semconv.TOOL_NAME, "")), call_id=str(n.attributes[semconv.TOOL_CALL_ID]))
            for n in marks
            if n.attributes[semconv.TOOL_CALL_ID] not in done
        ]

    # --- messages ---------------------------------------------------------------------------------------------------

    @property
    def message_log(self) -> dict[int, Message]:
        """Return the run's messages by number, as the requests first sent them."""
        return self._requests.log

    def request(self, chat: SpanNode) -> list[Message]:
        """Return what a model call was sent, its hash verified.  Raises TraceError when the trace does not tell."""
        return self._requests.of(chat)

    def new_messages(self, chat: SpanNode) -> list[Message]:
        """Return what no earlier request of the run had sent; of another writer's trace, the whole request."""
        return self._requests.new(chat)

    def answer(self, chat: SpanNode) -> list[Message]:
        """Return what a model call answered: one message, as a rule, and none when it failed."""
        return self._requests.answer(chat)

    def conversation(self) -> list[Message]:
        """Return the loop's last request and the model's answer to it."""
        if not self.agent_chats:
            return []
        last = self.agent_chats[-1]
        last = self.replies.get(last.turn_number, last)
        return [*self.request(last), *self.answer(last)]

    # --- inside -----------------------------------------------------------------------------------------------------

    @cached_property
    def _looplets_own(self) -> list[SpanNode]:
        return [node for node in self.spans if node.is_own]

    @property
    def _start(self) -> SpanNode | None:
        return next((node for node in self.own if node.name == semconv.START), None)

    @cached_property
    def _requests(self) -> Requests:
        nodes = self.own if self.is_ours else self.chats
        keys = {semconv.INPUT_MESSAGES, semconv.INPUT_REQUEST}
        return Requests([n for n in nodes if n.attributes.keys() & keys], is_ours=self.is_ours)

    def _segment_of(self, node: SpanNode) -> int:
        """Return the place of the node's segment among the run's, from 0."""
        if len(self.segments) == 1:
            return 0
        places = self._segment_places
        return next((places[id(above)] for above in (node, *node.ancestors()) if id(above) in places), 0)

    @cached_property
    def _segment_places(self) -> dict[int, int]:
        return {id(root): place for place, root in enumerate(self.segments)}


def _is_chat(node: SpanNode) -> bool:
    return bool(node.attributes.get(semconv.OPERATION_NAME) == semconv.CHAT)

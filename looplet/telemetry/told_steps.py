"""Steps as a trace tells them: each call with its result, and what the model calls since the step before used.

A step is told by its `execute_tool` span, or by an event `looplet.step`; the last one to tell it counts.  Steps are
made one after the other, in `looplet.post_dispatch` as a rule; what model calls used goes to the next step that is
made after they ended, the text of the last request with it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

from looplet.messages import tells_failure
from looplet.prompt import render
from looplet.telemetry import semconv
from looplet.telemetry.nodes import SpanNode
from looplet.telemetry.otlp_decode import EventRecord
from looplet.telemetry.requests import Requests
from looplet.telemetry.values import (
    MAX_NUMBER,
    CallRest,
    Outcome,
    StepTold,
    as_arguments,
    as_type,
    json_in,
    json_of,
    text_or_json,
    usage_of,
)
from looplet.types import NO_USAGE, Step, ToolCall, ToolResult, Usage, summarize_args

Moment: TypeAlias = tuple[int, int]
"""segment and nanoseconds: clocks of different processes do not compare"""

_LATEST: Final = 1 << 64


@dataclass(slots=True)
class ToldStep:
    """A step on its way back from the file."""

    number: int
    made: Moment
    """when the step was made, at the latest"""
    call: ToolCall
    result: ToolResult


class ToldSteps:
    """The steps of one run.

    `nodes`: the run's own spans, oldest first; `chats`: the model calls among them that count; `segment_of`: the
    number of the segment that a span belongs to; `is_ours`: whether looplet wrote them.
    """

    def __init__(
        self,
        nodes: Sequence[SpanNode],
        chats: Sequence[SpanNode],
        requests: Requests,
        segment_of: Callable[[SpanNode], int],
        *,
        is_ours: bool,
    ) -> None:
        self._nodes = nodes
        self._chats = chats
        self._requests = requests
        self._segment_of = segment_of
        self._is_ours = is_ours

    def steps(self) -> list[Step]:
        """Return the steps by number, as the caller of the loop got them.  Raises TraceError."""
        told: dict[int, ToldStep] = {}
        for step in (*self._of_spans(), *self._of_events()):
            if step.number in told:  # a result may be told later than the call
                step.made = min(step.made, told[step.number].made)
            told[step.number] = step
        ordered = [told[number] for number in sorted(told)]
        latest = (_LATEST, _LATEST)
        for step in reversed(ordered):  # a step is made before those that come after it
            step.made = latest = min(step.made, latest)
        claims = self._claims([step.made for step in ordered])
        return [
            Step(step.number, step.call, step.result, usage, prompt)
            for step, (usage, prompt) in zip(ordered, claims, strict=True)
        ]

    def _claims(self, moments: Sequence[Moment]) -> Iterator[tuple[Usage, str]]:
        """Yield for each step what was used, and the new text that was sent, since the step before."""
        ended = sorted(((self._at(chat, chat.record.end_ns), i) for i, chat in enumerate(self._chats)), reverse=True)
        for made in moments:
            usage, request = NO_USAGE, None
            while ended and ended[-1][0] <= made:
                chat = self._chats[ended.pop()[1]]
                usage = usage + usage_of(chat)
                request = chat if chat.is_request or not self._is_ours else request
            yield usage, "" if request is None else self._new_text(request)

    def _new_text(self, chat: SpanNode) -> str:
        return render(self._requests.new(chat), chat.attributes.get(semconv.INPUT_FIRST, 0))

    def _at(self, node: SpanNode, time_ns: int) -> Moment:
        return self._segment_of(node), time_ns

    # --- steps told by their spans ----------------------------------------------------------------------------------

    def _of_spans(self) -> Iterator[ToldStep]:
        for place, node in enumerate([n for n in self._nodes if n.operation == semconv.EXECUTE_TOOL], 1):
            if self._is_ours and not node.attributes.keys() & _ENDED:
                continue  # nothing says what the call came to
            call = self._call_of(node)
            number = node.attributes.get(semconv.STEP_NUMBER, place)
            yield ToldStep(number, self._made(node), call, self._result_of(node, call))

    def _made(self, node: SpanNode) -> Moment:
        """Return the end of the `looplet.post_dispatch` that came after the call, else that of the call."""
        at = self._at(node, node.record.end_ns)
        reviews = self._reviews.get((at[0], node.turn_number), ())
        after = bisect_left(reviews, at[1], key=lambda review: review.record.start_ns)
        return (at[0], reviews[after].record.end_ns) if after < len(reviews) else self._end_of_turn(node, at)

    def _end_of_turn(self, node: SpanNode, at: Moment) -> Moment:
        """Return when the turn of a call ended; steps that it did not come to in order are made there."""
        turn = next((above for above in node.ancestors() if above.operation == semconv.TURN), node)
        return max(at, self._at(turn, turn.record.end_ns))

    @cached_property
    def _reviews(self) -> dict[tuple[int, int], list[SpanNode]]:
        """Segment and turn → its `looplet.post_dispatch` spans, oldest first: one for each batch of calls."""
        found: dict[tuple[int, int], list[SpanNode]] = defaultdict(list)
        for node in self._nodes:
            if node.operation == semconv.POST_DISPATCH:
                found[self._segment_of(node), node.turn_number].append(node)
        return found

    def _call_of(self, node: SpanNode) -> ToolCall:
        told = node.attributes
        name, call_id = str(told.get(semconv.TOOL_NAME, "")), str(told.get(semconv.TOOL_CALL_ID, ""))
        if not self._is_ours:
            return ToolCall(name, as_arguments(told.get(semconv.TOOL_CALL_ARGUMENTS)), call_id=call_id)
        key = semconv.TOOL_CALL_ARGUMENTS
        args = as_type(node, key, json_of(node, key) or {}, dict[str, Any])
        rest = as_type(node, semconv.TOOL_CALL, json_of(node, semconv.TOOL_CALL) or {}, CallRest)
        return ToolCall(name, args, rest.reasoning, call_id, rest.metadata)

    def _result_of(self, node: SpanNode, call: ToolCall) -> ToolResult:
        known = {
            "tool": call.tool,
            "args_summary": summarize_args(call.args),
            "duration_ms": (node.record.end_ns - node.record.start_ns) / 1e6,
            "call_id": call.call_id,
        }
        if not self._is_ours:
            return self._foreign_result(node).build(**known)
        told = json_of(node, semconv.TOOL_RESULT) or {}
        if semconv.TOOL_WITHHELD in node.attributes:
            told = {**as_type(node, semconv.TOOL_RESULT, told, dict[str, Any]), **self._sent(call.call_id)}
        outcome = as_type(node, semconv.TOOL_RESULT, told, Outcome)
        if semconv.TOOL_CALL_RESULT in node.attributes:
            outcome.data = json_of(node, semconv.TOOL_CALL_RESULT)
        return outcome.build(**known)

    def _foreign_result(self, node: SpanNode) -> Outcome:
        outcome = Outcome(data=text_or_json(node, semconv.TOOL_CALL_RESULT))
        if node.is_error:
            outcome.error = node.record.status_message or str(node.attributes.get(semconv.ERROR_TYPE))
        return outcome

    # --- steps told by events ---------------------------------------------------------------------------------------

    def _of_events(self) -> Iterator[ToldStep]:
        for node in self._nodes:
            for event in node.events:
                if event.name == semconv.EVENT_STEP:
                    yield self._of_event(node, event)

    def _of_event(self, node: SpanNode, event: EventRecord) -> ToldStep:
        text = event.attributes.get(semconv.STEP_RECORD)
        if text is None:
            raise node.problem(f"an event {semconv.EVENT_STEP} has no {semconv.STEP_RECORD}")
        told = as_type(node, semconv.STEP_RECORD, json_in(node, semconv.STEP_RECORD, text), StepTold)
        if not 0 < told.step <= MAX_NUMBER:
            raise node.problem(f"{semconv.STEP_RECORD} has the number {told.step}, and steps count from 1")
        call = told.tool_call
        if semconv.TOOL_WITHHELD in event.attributes:
            named = {"tool": call.tool, "args_summary": summarize_args(call.args), "call_id": call.call_id}
            result = as_type(node, semconv.STEP_RECORD, {**named, **self._sent(call.call_id)}, Outcome)
        elif told.tool_result is not None:
            result = told.tool_result
        else:
            raise node.problem(f"{semconv.STEP_RECORD} has no result")
        return ToldStep(told.step, self._at(node, event.time_ns), call, result.build())

    # --- results that are told only as a request sends them ---------------------------------------------------------

    def _sent(self, call_id: str) -> dict[str, Any]:
        """Return a withheld result as the model got it, rewritten; nothing when it was never sent."""
        if call_id not in self._responses:
            return {}
        response = self._responses[call_id]
        return {"error": response["error"]} if tells_failure(response) else {"data": response}

    @cached_property
    def _responses(self) -> dict[str, Any]:
        """Call id → the response to it that a request sent first."""
        found: dict[str, Any] = {}
        for message in self._requests.log.values():
            for part in message.parts:
                if part["type"] == "tool_call_response":
                    found.setdefault(part["id"], part["response"])
        return found


_ENDED: Final = frozenset({semconv.TOOL_CALL_RESULT, semconv.TOOL_RESULT, semconv.TOOL_WITHHELD})
"""one of these is on the span of a call that came to its end"""

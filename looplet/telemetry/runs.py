"""`RunView`: one run as its spans tell it: steps, messages, usage, and how it ended.

Everything that evals, replay and reports know about a run is derived here, from the file alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import msgspec

from looplet.errors import TraceError
from looplet.message_log import resolve
from looplet.messages import Message, digest, tells_failure
from looplet.prompt import render
from looplet.state import SessionLog
from looplet.telemetry import semconv
from looplet.types import NO_USAGE, Step, ToolCall, ToolResult, Usage, summarize_args

if TYPE_CHECKING:
    from looplet.telemetry.reader import SpanNode, Trace

INTERRUPTED: Final = "interrupted"
"""the stop reason of a run whose end is not in the file: it was killed, or still goes on"""
UNKNOWN: Final = "unknown"
"""the stop reason of a foreign trace, which does not say"""


def runs_of(trace: Trace) -> list[RunView]:
    """Return the runs in a trace, oldest first: looplet's by run id, others by trace id."""
    groups: dict[str, list[SpanNode]] = {}
    for node in trace.spans:
        if node.run_id:
            groups.setdefault(node.run_id, []).append(node)
    for node in trace.spans:
        if semconv.OPERATION_NAME in node.attributes and not any(n.run_id for n in (node, *node.ancestors())):
            groups.setdefault(node.trace_id, []).append(node)
    return [RunView(run_id, nodes, trace.path) for run_id, nodes in groups.items()]


@dataclass(slots=True)
class _Told:
    """A step on its way back from the file."""

    turn: int
    call: ToolCall
    result: ToolResult


@dataclass
class RunView:
    """One run in a trace."""

    run_id: str
    spans: list[SpanNode] = field(repr=False)
    """in the order of their starts"""
    path: str = ""

    @cached_property
    def root(self) -> SpanNode:
        """Return the `invoke_agent` span, else the first span without a parent in the run."""
        for node in self.spans:
            if _kind(node) == semconv.INVOKE_AGENT:
                return node
        return next((n for n in self.spans if n.parent is None), self.spans[0])

    @property
    def trace_id(self) -> str:
        """Return 32 hex digits."""
        return self.root.trace_id

    @property
    def agent(self) -> str:
        """Return the agent's name; of a killed run, the one in its manifest."""
        told = self.root.attributes.get(semconv.AGENT_NAME)
        if told is None and self.root.synthetic:
            told = decode(self.manifest.get(semconv.CONFIG, "{}"), self.path).get("agent_name")
        return str(told or "")

    @cached_property
    def is_ours(self) -> bool:
        """Tell whether looplet wrote the run."""
        return any(semconv.RUN_ID in node.attributes for node in self.spans)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Return the attributes of `looplet.start`, `{}` when it is missing."""
        return next((n.attributes for n in self.spans if n.name == semconv.START), {})

    @cached_property
    def task(self) -> dict[str, Any]:
        """Return the task; `{}` when the trace does not tell it."""
        for node in self.spans:
            if semconv.TASK in node.attributes:
                return dict(self._json(node, semconv.TASK))
        return {}

    @property
    def stop_reason(self) -> str:
        """Return why the run ended; `interrupted` when its end is missing."""
        reason = self.root.attributes.get(semconv.STOP_REASON)
        if reason is not None and not self.root.synthetic:
            return str(reason)
        return INTERRUPTED if self.is_ours else UNKNOWN

    @cached_property
    def chats(self) -> list[SpanNode]:
        """Return the run's model calls, oldest first."""
        return [n for n in self.spans if n.attributes.get(semconv.OPERATION_NAME) == semconv.CHAT]

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
        told = {int(n): t for n, t in self._told()}
        usage = dict(self._usage_by_turn(sorted({t.turn for t in told.values()})))
        steps = []
        for number in sorted(told):
            item = told[number]
            spent, prompt = usage.pop(item.turn, (NO_USAGE, ""))
            steps.append(Step(number, item.call, item.result, spent, prompt))
        return steps

    @cached_property
    def session_log_text(self) -> str:
        """Return the session log: as recorded where hooks wrote into it, else retold from the steps."""
        for node in self.spans:
            if semconv.SESSION_LOG in node.attributes:
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
        marks = [n for n in self.spans if n.name == semconv.TOOL_START]
        return [
            ToolCall(str(n.attributes.get(semconv.TOOL_NAME, "")), call_id=str(n.attributes[semconv.TOOL_CALL_ID]))
            for n in marks
            if n.attributes.get(semconv.TOOL_CALL_ID) not in done
        ]

    # --- messages ---------------------------------------------------------------------------------------------------

    @cached_property
    def message_log(self) -> dict[int, Message]:
        """Return the run's messages by number, as the requests first sent them."""
        entries: dict[int, Message] = {}
        for chat in self.chats:
            if semconv.INPUT_MESSAGES in chat.attributes:
                first = int(chat.attributes.get(semconv.INPUT_FIRST, len(entries)))
                for at, message in enumerate(self._json(chat, semconv.INPUT_MESSAGES)):
                    entries[first + at] = Message.from_dict(message)
        return entries

    def request(self, chat: SpanNode) -> list[Message]:
        """Return what a model call was sent, its hash verified.  Raises TraceError when the trace does not tell."""
        refs = chat.attributes.get(semconv.INPUT_REFS)
        if refs is None:
            return [Message.from_dict(m) for m in self._json(chat, semconv.INPUT_MESSAGES) or ()]
        try:
            messages = [self.message_log[n] for n in self._numbers(chat)]
        except (KeyError, ValueError) as error:
            raise TraceError(
                f"{chat.name}: message {error} of the request is not in the trace", path=self.path
            ) from None
        sha = hashlib.sha256()
        for message in messages:
            sha.update(digest(message))
        if sha.hexdigest() != chat.attributes.get(semconv.INPUT_SHA256):
            raise TraceError(f"{chat.name}: the request's messages do not have its hash", path=self.path)
        return messages

    def conversation(self) -> list[Message]:
        """Return the last request and the model's answer to it."""
        if not self.chats:
            return []
        last = self.chats[-1]
        answer = self._json(last, semconv.OUTPUT_MESSAGES) or ()
        return [*self.request(last), *(Message.from_dict(m) for m in answer)]

    # --- inside -----------------------------------------------------------------------------------------------------

    @cached_property
    def _requests(self) -> dict[int, SpanNode]:
        return {
            int(n.attributes[semconv.INPUT_REQUEST]): n for n in self.chats if semconv.INPUT_REQUEST in n.attributes
        }

    def _numbers(self, chat: SpanNode) -> list[int]:
        """Resolve references; those relative to an earlier request are followed back, then applied forward."""
        chain = [str(chat.attributes[semconv.INPUT_REFS])]
        at = int(chat.attributes.get(semconv.INPUT_REQUEST, 0))
        while "^" in chain[-1]:
            base = int(chain[-1].partition("^")[0])
            if base >= at:
                raise ValueError(f"list {chain[-1]!r} (which builds on a later request)")
            chain.append(str(self._requests[base].attributes[semconv.INPUT_REFS]))
            at = base
        numbers: list[int] = []
        for refs in reversed(chain):
            numbers = resolve(refs, numbers)
        return numbers

    def _told(self) -> Iterator[tuple[int, _Told]]:
        """Yield every telling of every step; a later one of the same number counts."""
        for node in self.spans:
            if _kind(node) == semconv.EXECUTE_TOOL and (told := self._of_span(node)):
                yield told
        for node in self.spans:
            for event in node.events:
                if event.name == semconv.EVENT_STEP:
                    record = decode(event.attributes[semconv.STEP_RECORD], self.path)
                    call = ToolCall(**record["tool_call"])
                    if semconv.TOOL_WITHHELD in event.attributes:
                        record["tool_result"] = self._sent_step_result(call)
                    yield record["step"], _Told(node.turn_number, call, ToolResult.from_dict(record["tool_result"]))

    def _of_span(self, node: SpanNode) -> tuple[int, _Told] | None:
        told = node.attributes
        ended = semconv.TOOL_CALL_RESULT in told or semconv.TOOL_RESULT in told or semconv.TOOL_WITHHELD in told
        if self.is_ours and not ended:
            return None
        args = self._json(node, semconv.TOOL_CALL_ARGUMENTS) or {}
        more = self._json(node, semconv.TOOL_CALL) or {}
        name, call_id = str(told.get(semconv.TOOL_NAME, "")), str(told.get(semconv.TOOL_CALL_ID, ""))
        call = ToolCall(name, args, more.get("reasoning", ""), call_id, more.get("metadata", {}))
        number = told.get(semconv.STEP_NUMBER) or 1 + sum(
            n.record.start_ns < node.record.start_ns for n in self.spans if _kind(n) == semconv.EXECUTE_TOOL
        )
        return int(number), _Told(node.turn_number, call, self._result_of(node, call))

    def _result_of(self, node: SpanNode, call: ToolCall) -> ToolResult:
        rest = self._json(node, semconv.TOOL_RESULT) or {}
        if semconv.TOOL_WITHHELD in node.attributes:
            rest.update(self._sent_result(call.call_id))
        elif not self.is_ours and node.is_error:
            rest.setdefault("error", node.record.status_message or str(node.attributes.get(semconv.ERROR_TYPE)))
        result = ToolResult.from_dict({"tool": call.tool, **rest})
        data = (
            self._json(node, semconv.TOOL_CALL_RESULT) if semconv.TOOL_CALL_RESULT in node.attributes else result.data
        )
        took_ms = (node.record.end_ns - node.record.start_ns) / 1e6
        summary = summarize_args(call.args)
        return replace(result, data=data, duration_ms=took_ms, args_summary=summary, call_id=call.call_id)

    def _sent_step_result(self, call: ToolCall) -> dict[str, Any]:
        named = {"tool": call.tool, "args_summary": summarize_args(call.args), "call_id": call.call_id}
        return {**named, **self._sent_result(call.call_id)}

    def _sent_result(self, call_id: str) -> dict[str, Any]:
        """Return a withheld result as the model got it, rewritten; nothing when it was never sent."""
        for message in self.message_log.values():
            for part in message.parts:
                if part["type"] == "tool_call_response" and part["id"] == call_id:
                    response = part["response"]
                    return {"error": response["error"]} if tells_failure(response) else {"data": response}
        return {}

    def _usage_by_turn(self, turns_with_steps: list[int]) -> Iterator[tuple[int, tuple[Usage, str]]]:
        """Yield turn → usage and new prompt text; what turns without a step spent counts for the next that has one."""
        spent, waiting = NO_USAGE, iter(turns_with_steps)
        turn = next(waiting, None)
        prompt = ""
        for chat in self.chats:
            while turn is not None and chat.turn_number > turn:
                yield turn, (spent, prompt)
                spent, prompt, turn = NO_USAGE, "", next(waiting, None)
            spent += usage_of(chat)
            if semconv.CHAT_PURPOSE not in chat.attributes:  # what a tool or a judge asked is no step's prompt
                prompt = self._new_text(chat)
        if turn is not None:
            yield turn, (spent, prompt)

    def _new_text(self, chat: SpanNode) -> str:
        messages = [Message.from_dict(m) for m in self._json(chat, semconv.INPUT_MESSAGES) or ()]
        return render(messages, int(chat.attributes.get(semconv.INPUT_FIRST, 0)))

    def _json(self, node: SpanNode, key: str) -> Any:
        value = node.attributes.get(key)
        return decode(value, self.path) if isinstance(value, str) else value


def usage_of(chat: SpanNode) -> Usage:
    """Return the usage that a `chat` span reports; zero when it reports none."""
    told = chat.attributes
    return Usage(
        int(told.get(semconv.INPUT_TOKENS, 0)),
        int(told.get(semconv.OUTPUT_TOKENS, 0)),
        int(told.get(semconv.CACHE_READ_TOKENS, 0)),
        int(told.get(semconv.REASONING_TOKENS, 0)),
        told.get(semconv.COST_USD),
        int(told.get(semconv.CACHE_WRITE_TOKENS, 0)),
    )


def decode(text: str, path: str = "") -> Any:
    """Return the value of a JSON attribute; raises TraceError when it was cut, as attribute limits do."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise TraceError(
            f"an attribute is not whole JSON ({text[:60]!r}...): was it cut by a limit?", path=path
        ) from None


def _kind(node: SpanNode) -> str:
    return str(node.attributes.get(semconv.OPERATION_NAME) or node.name.split(" ")[0])

"""Traces made by hand: spans as plain data, for what no short run does by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from looplet import Trace
from looplet.messages import Message, digest, encode, sha256
from looplet.telemetry import semconv
from looplet.telemetry.runs import RunView

TRACE_ID = "a" * 32
RUN_ID = "b" * 32


class Spans:
    """The spans of a file, in the order in which they end."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self._messages = 0
        self._requests = 0

    def add(
        self,
        name: str,
        number: int,
        parent: int = 0,
        times: tuple[int, int] = (0, 0),
        told: Mapping[str, Any] | None = None,
        *,
        scope: str = semconv.SCOPE,
        run: str = RUN_ID,
        events: tuple[tuple[str, int, Mapping[str, Any]], ...] = (),
        failed: str = "",
        links: tuple[int, ...] = (),
    ) -> None:
        """Add a span; `number` is its id, `times` its start and end in nanoseconds."""
        common = {semconv.RUN_ID: run} if run else {}
        self.lines.append(
            (
                scope,
                {
                    "traceId": TRACE_ID,
                    "spanId": f"{number:016x}",
                    "parentSpanId": f"{parent:016x}" if parent else "",
                    "name": name,
                    "kind": 1,
                    "startTimeUnixNano": str(times[0]),
                    "endTimeUnixNano": str(times[1]),
                    "attributes": pairs({**common, **(told or {})}),
                    "events": [{"name": n, "timeUnixNano": str(at), "attributes": pairs(t)} for n, at, t in events],
                    "links": [{"traceId": TRACE_ID, "spanId": f"{link:016x}"} for link in links],
                    "status": {"code": 2, "message": failed} if failed else {},
                },
            )
        )

    def root(
        self, number: int, times: tuple[int, int], segment: int = 1, reason: str = "done", parent: int = 0
    ) -> None:
        """Add the span of a segment."""
        told = {semconv.OPERATION_NAME: semconv.INVOKE_AGENT, semconv.AGENT_NAME: "hand"}
        told |= {semconv.SEGMENT_NUMBER: segment, semconv.STOP_REASON: reason}
        self.add("invoke_agent hand", number, parent, times, told, links=(parent,) if segment > 1 else ())

    def turn(self, number: int, parent: int, times: tuple[int, int], turn: int, *events: Any) -> None:
        """Add the span of a turn."""
        self.add(semconv.TURN, number, parent, times, {semconv.TURN_NUMBER: turn}, events=events)

    def phase(self, name: str, number: int, parent: int, times: tuple[int, int], turn: int, *events: Any) -> None:
        """Add a phase of a turn."""
        self.add(name, number, parent, times, {semconv.TURN_NUMBER: turn}, events=events)

    def chat(
        self,
        number: int,
        parent: int,
        times: tuple[int, int],
        turn: int = 0,
        *,
        tokens: int = 0,
        new: str = "",
        said: str = "",
        purpose: str = "",
        again: bool = False,
        failed: str = "",
    ) -> None:
        """Add a model call that sends one new message; `again`: the request before it, once more."""
        if again:
            self._messages, self._requests = self._messages - 1, self._requests - 1
        message = Message.of_text("user", new)
        told: dict[str, Any] = {
            semconv.OPERATION_NAME: semconv.CHAT,
            semconv.INPUT_REQUEST: self._requests,
            semconv.INPUT_FIRST: self._messages,
            semconv.INPUT_REFS: str(self._messages),
            semconv.INPUT_MESSAGES: encode([message.to_dict()]).decode(),
            semconv.INPUT_SHA256: sha256(digest(message)).hexdigest(),
        }
        self._messages, self._requests = self._messages + 1, self._requests + 1
        if turn:
            told[semconv.TURN_NUMBER] = turn
        if tokens:
            told[semconv.INPUT_TOKENS] = tokens
        if said:
            told[semconv.OUTPUT_MESSAGES] = encode([Message.of_text("assistant", said).to_dict()]).decode()
        if purpose:
            told[semconv.CHAT_PURPOSE] = purpose
        self.add("chat m", number, parent, times, told, failed=failed)

    def tool(self, number: int, parent: int, times: tuple[int, int], turn: int, step: int) -> None:
        """Add a tool call that returned the step's number."""
        told = {
            semconv.OPERATION_NAME: semconv.EXECUTE_TOOL,
            semconv.TOOL_NAME: "count",
            semconv.TOOL_CALL_ID: f"call_{step}",
            semconv.TOOL_CALL_ARGUMENTS: "{}",
            semconv.TOOL_CALL_RESULT: str(step),
            semconv.STEP_NUMBER: step,
            semconv.TURN_NUMBER: turn,
        }
        self.add("execute_tool count", number, parent, times, told)

    def write(self, folder: Path) -> Path:
        """Write the file, one line for each span."""
        file = folder / "trace.jsonl"
        with file.open("w") as out:
            for scope, span in self.lines:
                group = {"scope": {"name": scope}, "spans": [span]}
                out.write(json.dumps({"resourceSpans": [{"scopeSpans": [group]}]}) + "\n")
        return file

    def without(self, *numbers: int) -> Spans:
        """Return the same without some spans: they never ended."""
        spans = Spans()
        lost = {f"{number:016x}" for number in numbers}
        spans.lines = [line for line in self.lines if line[1]["spanId"] not in lost]
        return spans

    def view(self, folder: Path) -> RunView:
        """Write and read back the only run of looplet's in the file."""
        (view,) = Trace.load(self.write(folder)).runs
        return view


def pairs(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return attributes as OTLP has them."""
    return [{"key": key, "value": any_value(value)} for key, value in told.items()]


def any_value(value: Any) -> dict[str, Any]:
    """Return one value as OTLP has it."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, (list, tuple)):
        return {"arrayValue": {"values": [any_value(item) for item in value]}}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": pairs(value)}}
    return {"stringValue": value}


def step_event(step: int, at: int, tool: str = "count") -> tuple[str, int, dict[str, Any]]:
    """Return the event that tells a whole step."""
    result = {"tool": tool, "error": "refused"}
    record = {"step": step, "tool_call": {"tool": tool, "call_id": f"call_{step}"}, "tool_result": result}
    return semconv.EVENT_STEP, at, {semconv.STEP_NUMBER: step, semconv.STEP_RECORD: encode(record).decode()}

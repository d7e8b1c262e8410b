"""Streamed answers put together again: events in, deltas out, and at the end what would have come in one piece.

An assembly's `answer` has the shape of the response that the API gives without streaming, so that one function reads
both.  Pure; `looplet.backends.clients` does the asking.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, Protocol

from looplet.backends.wire import Wire, field_of, text_of
from looplet.types import Delta


class Assembly(Protocol):
    """One answer in the making."""

    def add(self, event: Any) -> Iterator[Delta]:
        """Take an event; yield the deltas in it, few or none."""

    @property
    def is_whole(self) -> bool:
        """Tell whether the provider has said that the answer ends here."""

    @property
    def answer(self) -> Wire:
        """Return what came so far, as a response."""


class CompletionAssembly:
    """An answer of the Chat Completions API, from its chunks."""

    def __init__(self) -> None:
        self._head: Wire = {"id": "", "model": "", "usage": None}
        self._said = {"content": "", "refusal": "", "reasoning": ""}
        self._calls: list[Wire] = []
        self._places: dict[Any, int] = {}
        """where in `_calls` the call is that the API numbers so; some servers number all of them 0, or none"""
        self._finish_reason: Any = None

    @property
    def is_whole(self) -> bool:
        return self._finish_reason is not None

    @property
    def answer(self) -> Wire:
        message = {**self._said, "tool_calls": self._calls}
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        return {**self._head, "choices": [choice]}

    def add(self, event: Any) -> Iterator[Delta]:
        """Take a chunk; the last one may hold the usage and no choice."""
        for name, value in self._head.items():
            if name == "usage" or not value:
                self._head[name] = field_of(event, name) or value
        for choice in field_of(event, "choices") or ():
            if not field_of(choice, "index"):  # of several answers, the first counts
                self._finish_reason = field_of(choice, "finish_reason") or self._finish_reason
                yield from self._more(field_of(choice, "delta"))

    def _more(self, delta: Any) -> Iterator[Delta]:
        if thought := text_of(field_of(delta, "reasoning_content") or field_of(delta, "reasoning")):
            self._said["reasoning"] += thought
            yield Delta("reasoning", thought)
        for name in ("content", "refusal"):
            if text := text_of(field_of(delta, name)):
                self._said[name] += text
                if name == "content" or not self._said["content"]:
                    yield Delta("text", text)
        for piece in field_of(delta, "tool_calls") or ():
            yield from self._more_of_call(piece)

    def _more_of_call(self, piece: Any) -> Iterator[Delta]:
        place, is_new = self._place_of(piece)
        call, function = self._calls[place], field_of(piece, "function")
        name, arguments = text_of(field_of(function, "name")), field_of(function, "arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments) if arguments else ""
        call["id"] = call["id"] or text_of(field_of(piece, "id"))
        call["function"]["name"] = call["function"]["name"] or name
        call["function"]["arguments"] += text
        if is_new:
            yield Delta("tool_call", text, place, call["id"], name)
        elif text:
            yield Delta("tool_call", text, place)

    def _place_of(self, piece: Any) -> tuple[int, bool]:
        number, call_id = field_of(piece, "index"), text_of(field_of(piece, "id"))
        place = self._places.get(number)
        if place is not None and (not call_id or self._calls[place]["id"] in ("", call_id)):
            return place, False
        self._places[number] = len(self._calls)
        self._calls.append({"id": "", "function": {"name": "", "arguments": ""}})
        return self._places[number], True


_FIELDS: Final = ("text", "thinking", "signature", "data", "id", "name", "input")
"""what the blocks hold that a reply has a place for"""
_COUNTS: Final = (
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "cache_creation",
    "output_tokens_details",
)


class MessageAssembly:
    """An answer of the Messages API, from its events."""

    def __init__(self) -> None:
        self._message: Any = None
        self._usage: Wire = {}
        self._stop: Wire = {"stop_reason": None, "stop_details": None}
        self._blocks: dict[Any, Wire] = {}
        self._inputs: dict[Any, str] = {}
        """the arguments of the calls so far, by block"""
        self._last = ""
        """the kind of the block before, of those that a reply has a place for"""
        self._spoke = self._thought = False
        self.is_whole = False

    @property
    def answer(self) -> Wire:
        named = {name: field_of(self._message, name) for name in ("id", "model")}
        blocks = [self._finished(number) for number in self._blocks]
        return {**named, "content": blocks, "usage": self._usage, **self._stop}

    def add(self, event: Any) -> Iterator[Delta]:
        """Take an event; those that say nothing are passed over."""
        kind, number = field_of(event, "type"), field_of(event, "index")
        if kind == "message_start":
            self._message = field_of(event, "message")
            self._count(field_of(self._message, "usage"))
        elif kind == "content_block_start":
            yield from self._begin(number, field_of(event, "content_block"))
        elif kind == "content_block_delta" and number in self._blocks:
            yield from self._more(number, field_of(event, "delta"))
        elif kind == "message_delta":
            self._count(field_of(event, "usage"))
            found = {name: field_of(field_of(event, "delta"), name) for name in self._stop}
            self._stop |= {name: value for name, value in found.items() if value is not None}
        elif kind == "message_stop":
            self.is_whole = True

    def _count(self, usage: Any) -> None:
        """Take counts over: later ones are totals, and may leave some out."""
        found = {name: field_of(usage, name) for name in _COUNTS}
        self._usage |= {name: value for name, value in found.items() if value is not None}

    def _begin(self, number: Any, block: Any) -> Iterator[Delta]:
        kind = text_of(field_of(block, "type"))
        found = {name: field_of(block, name) for name in _FIELDS}
        self._blocks[number] = {"type": kind, **{name: value for name, value in found.items() if value is not None}}
        if kind == "tool_use":
            self._inputs[number] = ""
            given = json.dumps(found["input"]) if found["input"] else ""
            place = len(self._inputs) - 1
            yield Delta("tool_call", given, place, text_of(found["id"]), text_of(found["name"]))
        elif kind == "text":
            text = ("\n" if self._spoke and self._last != "text" else "") + text_of(found["text"])
            self._spoke = True
            if text:
                yield Delta("text", text)
        elif kind == "thinking" and (thought := text_of(found["thinking"])):
            yield from self._think(thought, is_first=True)
        if kind in ("text", "thinking", "redacted_thinking", "tool_use"):
            self._last = kind

    def _more(self, number: Any, delta: Any) -> Iterator[Delta]:
        block, kind = self._blocks[number], field_of(delta, "type")
        if kind == "text_delta" and block["type"] == "text":
            text = text_of(field_of(delta, "text"))
            block["text"] = block.get("text", "") + text
            yield Delta("text", text)
        elif kind == "thinking_delta":
            thought = text_of(field_of(delta, "thinking"))
            said = block.get("thinking", "")
            block["thinking"] = said + thought
            yield from self._think(thought, is_first=not said)
        elif kind == "signature_delta":
            block["signature"] = text_of(field_of(delta, "signature"))
        elif kind == "input_json_delta" and number in self._inputs:
            text = text_of(field_of(delta, "partial_json"))
            self._inputs[number] += text
            if text:
                yield Delta("tool_call", text, list(self._inputs).index(number))

    def _think(self, thought: str, *, is_first: bool) -> Iterator[Delta]:
        if thought:
            yield Delta("reasoning", ("\n" if is_first and self._thought else "") + thought)
            self._thought = True

    def _finished(self, number: Any) -> Wire:
        """Return a block as it is without streaming: a call's input is an object where it can be one."""
        block, text = self._blocks[number], self._inputs.get(number)
        if not text:
            return block
        try:
            return {**block, "input": json.loads(text)}
        except ValueError:  # the output limit cut it
            return {**block, "input": text}

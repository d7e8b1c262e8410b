"""Messages and the conversation of a run.

A `Message` has the shape of the GenAI conventions (role and typed parts), so that what is recorded is what is kept.
A request to the model is a sequence of messages; `looplet.message_log` writes each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import Any, Final, TypeAlias, overload

from looplet.tokens import TokenEstimate
from looplet.types import Reply, ToolCall

Part: TypeAlias = dict[str, Any]
SEALS: Final = ("signature", "encrypted")


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `role` is system, user, assistant or tool; `parts` are typed as the GenAI conventions have them.

    `{"type": "text", "content"}`, `{"type": "reasoning", "content"}`,
    `{"type": "tool_call", "id", "name", "arguments"}`, `{"type": "tool_call_response", "id", "response"}`.
    A reasoning part may carry `signature` or `encrypted`: the provider's seal, by which it knows its own words again.
    Treat the parts as immutable.
    """

    role: str
    parts: tuple[Part, ...]

    @classmethod
    def of_text(cls, role: str, text: str) -> Message:
        """Return a message of one text part."""
        return cls(role, ({"type": "text", "content": text},))

    @classmethod
    def of_reply(cls, reply: Reply) -> Message:
        """Return what the model said, as the assistant message of the next requests."""
        text = [{"type": "text", "content": reply.text}] if reply.text else []
        calls = [{"type": "tool_call", "id": c.call_id, "name": c.tool, "arguments": c.args} for c in reply.tool_calls]
        if reply.parts:
            return cls("assistant", _placed(reply.parts, text, calls))
        reasoning = [{"type": "reasoning", "content": reply.reasoning}] if reply.reasoning else []
        return cls("assistant", (*reasoning, *text, *calls))

    @classmethod
    def of_result(cls, call_id: str, response: Any) -> Message:
        """Return what a tool call came to, as the model will read it."""
        return cls("tool", ({"type": "tool_call_response", "id": call_id, "response": response},))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Message:
        """Build the message that `to_dict` described."""
        return cls(data["role"], tuple(data["parts"]))

    def to_dict(self) -> dict[str, Any]:
        """Return the message in the conventions' JSON schema."""
        return {"role": self.role, "parts": list(self.parts)}

    @property
    def text(self) -> str:
        """Return the text parts, joined by newlines."""
        return "\n".join(p["content"] for p in self.parts if p["type"] == "text")

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Return the calls that this message asks for."""
        return [
            ToolCall(p["name"], p["arguments"] or {}, call_id=p["id"]) for p in self.parts if p["type"] == "tool_call"
        ]


def _placed(places: Iterable[Part], text: Iterable[Part], calls: Iterable[Part]) -> tuple[Part, ...]:
    """Return the parts in the provider's order; what it gave no place comes last."""
    said = {"text": iter(text), "tool_call": iter(calls)}
    parts = [next(said[p["type"]], None) if p["type"] in said else p for p in places]
    return (*(part for part in parts if part is not None), *said["text"], *said["tool_call"])


def clean_message(message: Message, clean: Callable[[Any], Any]) -> Message:
    """Return the message with everything in it cleaned but what holds it together."""
    return Message(message.role, tuple(clean_part(part, clean) for part in message.parts))


def clean_part(part: Part, clean: Callable[[Any], Any]) -> Part:
    """Return a part with everything in it cleaned but its type and id."""
    cleaned = {name: value if name in ("type", "id") else clean(value) for name, value in part.items()}
    return cleaned if part.get("type") != "reasoning" or cleaned == part else unsealed(cleaned)


def unsealed(part: Part) -> Part:
    """Return a reasoning part without its seal: it no longer holds the provider's own words."""
    return {name: value for name, value in part.items() if name not in SEALS}


def tells_failure(response: Any) -> bool:
    """Tell whether what the model reads about a call (`tool_call_response`) says that the call failed."""
    return isinstance(response, dict) and "error" in response and "kind" in response


class Conversation:
    """What was said so far, oldest first.  Appending is cheap; any other change copies the list.

    In a run, messages that somebody else adds pass the run's boundary.
    """

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self._messages = list(messages)
        self._clean: Callable[[Any], Any] | None = None
        self.edits = 0
        """how often something other than appending happened"""
        self.task: Message | None = None
        """the message that says what is to be done, where it is not the first of the user; compaction keeps it"""
        self.estimate = TokenEstimate()

    @property
    def tokens(self) -> int:
        """Return about how many tokens the next request will have, tool schemas and system prompt included."""
        return self.estimate.of(self._messages)

    def calibrate(self, input_tokens: int) -> None:
        """Take note of how long the provider says that a request with the messages as they are now was."""
        self.estimate.calibrate(self._messages, input_tokens)

    def join(self, clean: Callable[[Any], Any]) -> None:
        """Become the conversation of a run; `clean` is its boundary."""
        self._clean = clean
        self._messages = [clean_message(message, clean) for message in self._messages]
        self.edits += 1

    def append(self, message: Message, *, clean: bool = False) -> None:
        """Add a message at the end; `clean` says that it has passed the run's boundary already."""
        self._messages.append(message if clean or self._clean is None else clean_message(message, self._clean))

    def replace(self, messages: Iterable[Message]) -> None:
        """Put other messages in the place of all: how compaction, pruning and truncation are written."""
        if self._clean is None:
            self._messages = list(messages)
        else:
            known = {id(message) for message in self._messages}
            self._messages = [m if id(m) in known else clean_message(m, self._clean) for m in messages]
        self.edits += 1

    def restore(self, messages: Iterable[Message]) -> None:
        """Put messages back that were all here before: what has passed the boundary does not pass it again."""
        self._messages = list(messages)
        self.edits += 1

    def truncate(self, keep_last: int) -> None:
        """Keep the first message (the task) and the last `keep_last`, never parting a tool call from its result."""
        tail = self._messages[1:][-keep_last:] if keep_last > 0 else []
        while tail and tail[0].role == "tool":
            tail = tail[1:]
        self.replace([*self._messages[:1], *tail])

    def fork(self) -> Conversation:
        """Return an independent copy."""
        return Conversation(self._messages)

    def view(self, head: Sequence[Message] = (), tail: Sequence[Message] = ()) -> Sequence[Message]:
        """Return `head`, the messages as they are now, and `tail` as one read-only sequence, without copying."""
        return MessageView(head, self._messages, len(self._messages), tail)

    def serialize(self) -> dict[str, Any]:
        """Return a JSON-like form; `deserialize` is the inverse."""
        return {"messages": [m.to_dict() for m in self._messages], "version": 2}

    @classmethod
    def deserialize(cls, data: Mapping[str, Any]) -> Conversation:
        """Build the conversation that `serialize` described."""
        return cls(Message.from_dict(m) for m in data["messages"])

    def __iter__(self) -> Iterator[Message]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return self._messages[index]


class MessageView(Sequence[Message]):
    """A read-only sequence over part of a conversation; costs the same however long that is."""

    __slots__ = ("_body", "_head", "_length", "_size", "_tail")

    def __init__(self, head: Sequence[Message], body: list[Message], length: int, tail: Sequence[Message]) -> None:
        self._head = head
        self._body = body
        self._length = length
        self._tail = tail
        self._size = len(head) + length + len(tail)

    def __repr__(self) -> str:
        return repr(list(self))

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Message]:
        return chain(self._head, islice(self._body, self._length), self._tail)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | Sequence[Message]:
        if isinstance(index, slice):
            return self._slice(*index.indices(self._size))
        at = index if index >= 0 else index + self._size
        inside = at - len(self._head)
        if 0 <= inside < self._length:
            return self._body[inside]
        if not 0 <= at < self._size:
            raise IndexError("message index out of range")
        return self._head[at] if inside < 0 else self._tail[inside - self._length]

    def _slice(self, low: int, high: int, stride: int) -> Sequence[Message]:
        """Return some of the messages; all but the first few are another view, others are copied."""
        before = len(self._head)
        if stride == 1 and low <= before and high == self._size:
            return MessageView(self._head[low:], self._body, self._length, self._tail)
        if stride == 1 and before <= low <= high <= before + self._length:
            return self._body[low - before : high - before]
        return [self[i] for i in range(low, high, stride)]


def digest(message: Message) -> bytes:
    """Return the hash that stands for the message in `looplet.input.sha256`."""
    return bytes(sha256(encode(message.to_dict())).digest())


def encode(value: Any) -> bytes:
    """Return compact JSON; equal values built in the same order give equal bytes."""
    data: bytes = _encoder()(value)
    return data


def sha256(data: bytes = b"") -> Any:
    """Return the hash object over `data`."""
    return _hash_function()(data)


@cache
def _hash_function() -> Any:
    import hashlib

    return hashlib.sha256


@cache
def _encoder() -> Any:
    import msgspec

    return msgspec.json.Encoder().encode

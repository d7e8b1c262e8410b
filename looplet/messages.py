"""The conversation of a run, and the append-only log that writes every message of it once.

A `Message` has the shape of the GenAI conventions (role and typed parts), so that what is recorded is what is kept.
A request to the model is a sequence of messages.  The log numbers each distinct message the first time a request
sends it; a request is then described by references, `"0,3-17,41"`, and by a hash over its messages' hashes.  So a trace
grows with what was said, not with how often it was sent.

References of a request that would be long are given relative to the one before: `"7^37,91"` means the first 37
messages of request 7, then message 91.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import Any, Final, TypeAlias, overload

from looplet.types import Reply, ToolCall

Part: TypeAlias = dict[str, Any]
SEALS: Final = ("signature", "encrypted")
MAX_RANGES: Final = 8
"""longer reference lists are written relative to the request before"""


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
        text = iter([{"type": "text", "content": reply.text}] if reply.text else ())
        calls = iter(
            [{"type": "tool_call", "id": c.call_id, "name": c.tool, "arguments": c.args} for c in reply.tool_calls]
        )
        said: dict[str, Iterator[Part]] = {"text": text, "tool_call": calls}
        reasoning = ({"type": "reasoning", "content": reply.reasoning},) if reply.reasoning else ()
        placed = [next(said[p["type"]], None) if p["type"] in said else p for p in reply.parts or reasoning]
        return cls("assistant", (*(part for part in placed if part is not None), *text, *calls))

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

    __slots__ = ("_body", "_head", "_length", "_tail")

    def __init__(self, head: Sequence[Message], body: list[Message], length: int, tail: Sequence[Message]) -> None:
        self._head = head
        self._body = body
        self._length = length
        self._tail = tail

    def __len__(self) -> int:
        return len(self._head) + self._length + len(self._tail)

    def __iter__(self) -> Iterator[Message]:
        return chain(self._head, islice(self._body, self._length), self._tail)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | Sequence[Message]:
        if isinstance(index, slice):
            low, high, stride = index.indices(len(self))
            if low <= len(self._head) and high == len(self) and stride == 1:  # without the system prompt: no copy
                return MessageView(self._head[low:], self._body, self._length, self._tail)
            return [self[i] for i in range(low, high, stride)]
        at = index if index >= 0 else index + len(self)
        inside = at - len(self._head)
        if 0 <= inside < self._length:
            return self._body[inside]
        if not 0 <= at < len(self):
            raise IndexError("message index out of range")
        return self._head[at] if inside < 0 else self._tail[inside - self._length]


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """How a request is recorded: what was new in it, and references to all of it."""

    number: int
    refs: str
    sha256: str
    first: int
    """number of the first new message"""
    new: tuple[Message, ...]
    new_json: str
    """the new messages as a JSON array"""


class MessageLog:
    """Numbers the messages of one run, in the order in which requests first send them.

    `clean` maps what is recorded of a message, where that differs from what is sent.
    """

    def __init__(self, clean: Callable[[Any], Any] | None = None) -> None:
        self._clean = clean
        self._numbers: dict[bytes, int] = {}
        self._known: dict[int, tuple[Message, int, bytes]] = {}  # by id(); holds the message, so that ids stay its own
        self._requests = 0
        self._stable = _References()

    def request(self, messages: Sequence[Message], *, unchanged: int = 0, stable: int | None = None) -> LoggedRequest:
        """Log a request and return how to record it.

        `stable` says how many leading messages the next request is likely to begin with; `unchanged`, how many of
        those of the request before this one still begins with.  With both, the cost is that of the new messages.
        """
        stable = len(messages) if stable is None else stable
        first = len(self._numbers)
        new: list[tuple[Message, bytes]] = []
        before = self._stable
        shared = unchanged
        if unchanged != len(before.order):
            self._stable = _References()
            unchanged = 0
        for at in range(unchanged, stable):
            self._stable.add(*self._number(messages[at], new))
        if unchanged == 0:
            shared = _common_prefix(before.order, self._stable.order)
        tail = [self._number(messages[at], new) for at in range(stable, len(messages))]
        refs, sha256 = self._stable.describe(tail, base=self._requests - 1, shared=shared)
        logged = LoggedRequest(
            number=self._requests,
            refs=refs,
            sha256=sha256,
            first=first,
            new=tuple(message for message, _ in new),
            new_json="[" + b",".join(data for _, data in new).decode() + "]",
        )
        self._requests += 1
        return logged

    def _number(self, message: Message, new: list[tuple[Message, bytes]]) -> tuple[int, bytes]:
        known = self._known.get(id(message))
        if known is None:
            data = encode((message if self._clean is None else clean_message(message, self._clean)).to_dict())
            digest = sha256(data).digest()
            number = self._numbers.get(digest)
            if number is None:
                number = self._numbers[digest] = len(self._numbers)
                new.append((message, data))
            known = self._known[id(message)] = (message, number, digest)
        return known[1], known[2]


class _References:
    """The numbers of the messages that requests begin with, their ranges, and the hash over their hashes."""

    __slots__ = ("order", "ranges", "sha")

    def __init__(self) -> None:
        self.order: list[int] = []
        self.ranges: list[tuple[int, int]] = []
        self.sha = sha256()

    def add(self, number: int, digest: bytes) -> None:
        self.order.append(number)
        self.sha.update(digest)
        _extend(self.ranges, number)

    def describe(self, tail: list[tuple[int, bytes]], *, base: int, shared: int) -> tuple[str, str]:
        """Return references and hash of these messages and `tail`; request `base` shares the first `shared`."""
        sha = self.sha.copy()
        for _, digest in tail:
            sha.update(digest)
        numbers = [number for number, _ in tail]
        if len(self.ranges) <= MAX_RANGES or base < 0 or shared == 0:
            ranges = list(self.ranges)
            for number in numbers:
                _extend(ranges, number)
            return format_ranges(ranges), sha.hexdigest()
        rest = ranges_of([*self.order[shared:], *numbers])
        return f"{base}^{shared}" + (f",{format_ranges(rest)}" if rest else ""), sha.hexdigest()


def _extend(ranges: list[tuple[int, int]], number: int) -> None:
    if ranges and ranges[-1][1] == number - 1:
        ranges[-1] = (ranges[-1][0], number)
    else:
        ranges.append((number, number))


def format_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    """Return `[(0, 0), (3, 17)]` as `"0,3-17"`."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def ranges_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return runs of consecutive numbers, in the given order."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        _extend(ranges, number)
    return ranges


def resolve(refs: str, base_numbers: Sequence[int] = ()) -> list[int]:
    """Return the message numbers that `refs` names, given those of the request it builds on.  Raises ValueError."""
    base, _, rest = refs.rpartition("^")
    numbers: list[int] = []
    if base:
        count, _, rest = rest.partition(",")
        numbers += base_numbers[: int(count)]
    for item in filter(None, rest.split(",")):
        low, _, high = item.partition("-")
        numbers += range(int(low), int(high or low) + 1)
    return numbers


def _common_prefix(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


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

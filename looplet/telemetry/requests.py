"""Requests of a run, put together again from its message log: references, hashes, and what was new in each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final

from looplet.errors import TraceError
from looplet.messages import Message, digest, sha256
from looplet.telemetry import semconv
from looplet.telemetry.nodes import SpanNode
from looplet.telemetry.values import foreign_messages, messages_of

MAX_MESSAGES: Final = 1_000_000
"""in one request; references to more are damage"""
KEPT: Final = 64
"""how many requests, on which others build, are kept as numbers"""


class Requests:
    """The messages of one run by number, and which of them each request sent.

    `nodes`: the spans that may hold messages, oldest first; `is_ours`: whether looplet wrote them.
    """

    def __init__(self, nodes: Iterable[SpanNode], *, is_ours: bool) -> None:
        self._nodes = list(nodes)
        self._is_ours = is_ours
        self._hashes: dict[int, bytes] = {}
        self._kept: OrderedDict[int, Sequence[int]] = OrderedDict()

    @cached_property
    def log(self) -> dict[int, Message]:
        """Return the messages by number, as they were first sent."""
        entries: dict[int, Message] = {}
        for node in self._nodes:
            if semconv.INPUT_MESSAGES in node.attributes:
                first = node.attributes.get(semconv.INPUT_FIRST, len(entries))
                entries.update(enumerate(self.new(node), first if isinstance(first, int) else len(entries)))
        return entries

    def new(self, node: SpanNode) -> list[Message]:
        """Return the messages that no earlier request had sent; of another writer's span, all it holds."""
        return self._read(node, semconv.INPUT_MESSAGES, "user")

    def answer(self, chat: SpanNode) -> list[Message]:
        """Return what the model answered; nothing when the call failed."""
        return self._read(chat, semconv.OUTPUT_MESSAGES, "assistant")

    def of(self, node: SpanNode) -> list[Message]:
        """Return what a model call was sent, its hash verified.  Raises TraceError when the trace does not tell."""
        if semconv.INPUT_REFS not in node.attributes:
            return self.new(node)
        numbers = self._numbers(node)
        sha = sha256()
        messages = []
        for number in numbers:
            messages.append(self._message(node, number))
            sha.update(self._hash(number))
        if sha.hexdigest() != node.attributes.get(semconv.INPUT_SHA256):
            raise node.problem("the request's messages do not have its hash")
        return messages

    def _read(self, node: SpanNode, key: str, role: str) -> list[Message]:
        return messages_of(node, key) if self._is_ours else foreign_messages(node, key, role)

    def _message(self, node: SpanNode, number: int) -> Message:
        try:
            return self.log[number]
        except KeyError:
            raise node.problem(f"message {number} of the request is not in the trace") from None

    def _hash(self, number: int) -> bytes:
        found = self._hashes.get(number)
        if found is None:
            found = self._hashes[number] = digest(self.log[number])
        return found

    # --- references -------------------------------------------------------------------------------------------------

    @cached_property
    def _by_number(self) -> dict[int, SpanNode]:
        return {n.attributes[semconv.INPUT_REQUEST]: n for n in self._nodes if semconv.INPUT_REQUEST in n.attributes}

    def _numbers(self, node: SpanNode) -> Sequence[int]:
        """Resolve references; those relative to an earlier request are followed back, then applied forward."""
        chain: list[tuple[int, SpanNode, _References]] = []
        base: Sequence[int] = ()
        at = node.attributes.get(semconv.INPUT_REQUEST, 0)
        while True:
            if at in self._kept and self._by_number[at] is node:
                self._kept.move_to_end(at)
                base = self._kept[at]
                break
            references = _References.of(node)
            chain.append((at, node, references))
            if references.base is None:
                break
            if references.base >= at:
                raise references.problem(node, "builds on a later request")
            at = references.base
            if at not in self._by_number:
                raise references.problem(node, f"builds on request {at}, which is not in the trace")
            node = self._by_number[at]
        for at, node, references in reversed(chain):
            base = self._resolved(node, references, base)
            if references.base is not None and self._by_number.get(at) is node:
                self._keep(at, base)
        return base

    def _keep(self, request: int, numbers: Sequence[int]) -> None:
        self._kept[request] = numbers
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _resolved(self, node: SpanNode, references: _References, base: Sequence[int]) -> list[int]:
        numbers = list(base[: references.shared])
        for low, high in references.ranges:
            if high - low >= len(self.log):
                self._message(node, next(n for n in range(low, high + 1) if n not in self.log))
            numbers.extend(range(low, high + 1))
            if len(numbers) > MAX_MESSAGES:
                raise references.problem(node, f"names more than {MAX_MESSAGES} messages")
        return numbers


class _References:
    """What `looplet.input.refs` says: `0,3-17,41`, or `7^37,91`: the first 37 messages of request 7, then 91."""

    __slots__ = ("base", "ranges", "shared", "text")

    def __init__(self, text: str) -> None:
        """Raise ValueError for what is no list of references."""
        self.text = text
        head, relative, rest = text.rpartition("^")
        self.base = int(head) if relative else None
        self.shared = 0
        if relative:
            shared, _, rest = rest.partition(",")
            self.shared = max(0, int(shared))
        self.ranges = list(_ranges(rest))

    @classmethod
    def of(cls, node: SpanNode) -> _References:
        text = node.attributes[semconv.INPUT_REFS]
        try:
            return cls(text)
        except ValueError:
            raise node.problem(f"{semconv.INPUT_REFS} is {text[:60]!r}, and no list of message numbers") from None

    def problem(self, node: SpanNode, words: str) -> TraceError:
        return node.problem(f"the request {words} ({semconv.INPUT_REFS} {self.text[:60]!r})")


def _ranges(text: str) -> Iterator[tuple[int, int]]:
    for item in filter(None, text.split(",")):
        low, _, high = item.partition("-")
        yield int(low), int(high or low)

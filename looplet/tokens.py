"""How many tokens a conversation takes: an estimate without a tokenizer, corrected by what providers report.

A token is about four bytes of UTF-8: four letters of English, two of Russian, a bit over one of Chinese.  That will do
to begin with.  Each reported request is then a point on a line, tokens = overhead + ratio x bytes: the overhead is what
the conversation does not show (tool schemas, system prompt), the ratio is the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from looplet.parts import is_blob

BYTES_PER_TOKEN: Final = 4
IMAGE_BYTES: Final = 1_500 * BYTES_PER_TOKEN
"""an image counts the same however large it is: providers charge for pixels, not for bytes"""
MESSAGE_BYTES: Final = 4 * BYTES_PER_TOKEN
"""what holds a message together: its role, its marks"""
LEAST_RATIO: Final = 1 / 16
MOST_RATIO: Final = 1.0
"""tokens per byte; no tokenizer is outside, so a report that says otherwise counted something else"""
LEAST_GROWTH: Final = 4_000
"""bytes between two reports from which a ratio can be learnt"""

_ELSEWHERE: Final = ("uri", "file")
"""parts that name what the provider fetches by itself"""


class Message(Protocol):
    """What is needed of a message."""

    @property
    def parts(self) -> tuple[dict[str, Any], ...]: ...


class TokenEstimate:
    """The estimate of one conversation.  Costs what was appended since the last question, and nothing until asked.

    A list of messages may only grow; whoever edits puts another list in its place.
    """

    __slots__ = ("_counted", "_first", "_least", "_list", "_overhead", "_ratio", "_report", "_size", "reported")

    def __init__(self) -> None:
        self.reported = 0
        """input tokens of the last request, as the provider counted them and as far as it is believed; else 0"""
        self._list: list[Any] = []
        self._counted = 0
        self._size = 0
        self._overhead = 0.0
        self._ratio = 1 / BYTES_PER_TOKEN
        self._least = 0.0
        """tokens per byte below which no request is taken to be: not 0 where the line alone would lead below zero"""
        self._report: tuple[list[Any], int, int] | None = None
        """messages, how many of them, input tokens: not looked at yet"""
        self._first: tuple[int, int] | None = None
        """bytes and tokens of the first report"""

    def of(self, messages: list[Any]) -> int:
        """Return the tokens of a request that sends these messages."""
        self._learn()
        size = self._size_of(messages, len(messages))
        return round(max(self._least * size, self._overhead + self._ratio * size))

    def calibrate(self, messages: list[Any], input_tokens: int) -> None:
        """Take note that a request with these messages was `input_tokens` long."""
        self._report = messages, len(messages), input_tokens
        if self._first is None:
            self._learn()

    def _learn(self) -> None:
        if self._report is None:
            return
        (messages, count, tokens), self._report = self._report, None
        size = self._size_of(messages, count)
        if tokens < LEAST_RATIO * size:  # some servers report only what they had not cached
            return
        self.reported = tokens
        first_size, first_tokens = self._first = self._first or (size, tokens)
        if abs(grown := size - first_size) >= LEAST_GROWTH:
            self._ratio = min(MOST_RATIO, max(LEAST_RATIO, (tokens - first_tokens) / grown))
        self._overhead = tokens - self._ratio * size
        self._least = tokens / size if self._overhead < 0 else 0.0

    def _size_of(self, messages: list[Any], count: int) -> int:
        if messages is not self._list or count < self._counted:
            self._list, self._counted, self._size = messages, 0, 0
        for at in range(self._counted, count):
            self._size += size_of(messages[at])
        self._counted = count
        return self._size


def size_of(message: Message) -> int:
    """Return the size of a message in bytes of text."""
    return MESSAGE_BYTES + sum(map(_size_of_part, message.parts))


def size_of_all(messages: Iterable[Message]) -> int:
    """Return the size of all messages in bytes of text."""
    return sum(map(size_of, messages))


def _size_of_part(part: Mapping[str, Any]) -> int:
    kind = part.get("type")
    if kind in _ELSEWHERE or is_blob(part):
        return IMAGE_BYTES
    if kind in ("text", "reasoning"):  # a reasoning part's seal is no text
        return _size(part.get("content"))
    return _size({name: value for name, value in part.items() if name != "type"})


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
    if isinstance(value, Mapping):
        return IMAGE_BYTES if is_blob(value) else 2 + sum(4 + _size(k) + _size(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return 2 + sum(1 + _size(item) for item in value)
    return len(str(value))

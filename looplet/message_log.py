"""The append-only log that writes every message of a run once.

It numbers each distinct message the first time a request sends it; a request is then described by references,
`"0,3-17,41"`, and by a hash over its messages' hashes.  So a trace grows with what was said, not with how often it was
sent.  References of a request that would be long are given relative to an earlier one: `"7^37,91"` means the first 37
messages of request 7, then message 91.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from looplet.messages import Message, clean_message, digest, encode, sha256

MAX_RANGES: Final = 8
"""longer reference lists are written relative to an earlier request"""


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
        self._next = 0
        self._known: dict[int, tuple[Message, int, bytes]] = {}
        """what the last request began with, by id(); holds the messages, so that ids stay their own"""
        self._requests = 0
        self._base = -1
        """number of the run's last request; that of others in between does not count"""
        self._stable = _References()
        self._lock = threading.RLock()  # tools that ask a model log from threads of their own

    @classmethod
    def restored(cls, entries: Mapping[int, Message], requests: int) -> MessageLog:
        """Return the log of a run that goes on: its messages by number, and how many requests it has seen."""
        log = cls()
        log._numbers = {digest(message): number for number, message in sorted(entries.items())}
        log._next = max(entries, default=-1) + 1
        log._requests = requests
        return log

    def redact_with(self, clean: Callable[[Any], Any] | None) -> None:
        """Have what is recorded from now on cleaned by another function."""
        with self._lock:
            self._clean = clean

    def request(self, messages: Sequence[Message], *, unchanged: int = 0, stable: int | None = None) -> LoggedRequest:
        """Log a request and return how to record it.

        `stable` says how many leading messages the next request is likely to begin with; `unchanged`, how many of
        those of the request before this one still begins with.  With both, the cost is that of the new messages.
        """
        with self._lock:
            return self._request(messages, unchanged, len(messages) if stable is None else stable)

    def aside(self, messages: Sequence[Message]) -> LoggedRequest:
        """Log a request that is no part of the run's own sequence: a summary, a tool that asks a model."""
        with self._lock:
            first = self._next
            new: list[tuple[Message, bytes]] = []
            references = _References()
            references.extend([self._number(message, new) for message in messages])
            return self._logged(first, new, format_ranges(references.ranges), references.sha.hexdigest())

    def _request(self, messages: Sequence[Message], unchanged: int, stable: int) -> LoggedRequest:
        first = self._next
        new: list[tuple[Message, bytes]] = []
        before = self._stable
        shared = unchanged
        if unchanged != len(before.order):
            self._stable = _References()
            unchanged = 0
            self._known = {id(m): known for m in messages if (known := self._known.get(id(m))) is not None}
        self._stable.extend([self._number(message, new, keep=True) for message in messages[unchanged:stable]])
        if unchanged == 0:
            shared = _common_prefix(before.order, self._stable.order)
        tail = [self._number(message, new) for message in messages[stable:]] if stable < len(messages) else []
        refs, sha256_hex = self._stable.describe(tail, base=self._base, shared=shared)
        self._base = self._requests
        return self._logged(first, new, refs, sha256_hex)

    def _logged(self, first: int, new: list[tuple[Message, bytes]], refs: str, sha256_hex: str) -> LoggedRequest:
        number, self._requests = self._requests, self._requests + 1
        said = b",".join([data for _, data in new]).decode()
        return LoggedRequest(number, refs, sha256_hex, first, tuple([message for message, _ in new]), f"[{said}]")

    def _number(self, message: Message, new: list[tuple[Message, bytes]], *, keep: bool = False) -> tuple[int, bytes]:
        known = self._known.get(id(message))
        if known is None:
            shown = message if self._clean is None else clean_message(message, self._clean)
            data = encode({"role": shown.role, "parts": shown.parts})
            hashed = sha256(data).digest()
            number = self._numbers.get(hashed)
            if number is None:
                number = self._numbers[hashed] = self._next
                self._next += 1
                new.append((message, data))
            known = (message, number, hashed)
            if keep:
                self._known[id(message)] = known
        return known[1], known[2]


class _References:
    """The numbers of the messages that requests begin with, their ranges, and the hash over their hashes."""

    __slots__ = ("order", "ranges", "sha")

    def __init__(self) -> None:
        self.order: list[int] = []
        self.ranges: list[tuple[int, int]] = []
        self.sha = sha256()

    def extend(self, messages: Iterable[tuple[int, bytes]]) -> None:
        for number, hashed in messages:
            self.order.append(number)
            self.sha.update(hashed)
            _extend(self.ranges, number)

    def describe(self, tail: list[tuple[int, bytes]], *, base: int, shared: int) -> tuple[str, str]:
        """Return references and hash of these messages and `tail`; request `base` shares the first `shared`."""
        sha = self.sha.copy()
        for _, hashed in tail:
            sha.update(hashed)
        numbers = [number for number, _ in tail]
        if len(self.ranges) <= MAX_RANGES or base < 0 or shared == 0:
            return format_ranges(ranges_of(numbers, after=self.ranges)), sha.hexdigest()
        rest = ranges_of([*self.order[shared:], *numbers])
        return f"{base}^{shared}" + (f",{format_ranges(rest)}" if rest else ""), sha.hexdigest()


def _extend(ranges: list[tuple[int, int]], number: int) -> None:
    if ranges and ranges[-1][1] == number - 1:
        ranges[-1] = (ranges[-1][0], number)
    else:
        ranges.append((number, number))


def format_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    """Return `[(0, 0), (3, 17)]` as `"0,3-17"`."""
    return ",".join([str(a) if a == b else f"{a}-{b}" for a, b in ranges])


def ranges_of(numbers: Iterable[int], after: Iterable[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Return runs of consecutive numbers, in the given order, those of `after` first."""
    ranges = list(after)
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

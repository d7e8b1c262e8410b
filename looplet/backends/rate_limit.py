"""`RateLimitedBackend`: no more requests and tokens a minute than the provider allows, over all runs that share it.

    llm = RateLimitedBackend(OpenAIBackend.from_env(model="gpt-4o-mini"), requests_per_minute=60)

A token bucket, as providers have it: it holds what one minute allows and fills up evenly.  A place is taken when a
request is about to go out, and the answer says when that may be; places come free in the order in which they were
taken.  How many tokens a request takes is known afterwards only, so it is estimated, and corrected by the usage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from looplet.backends.attempts import Clock
from looplet.backends.candidates import Candidate, candidates, require_alike
from looplet.backends.direct import Wrapper
from looplet.errors import ConfigError

REQUESTS: Final = "requests_per_minute"
TOKENS: Final = "tokens_per_minute"
_MINUTE: Final = 60.0


class RateLimitedBackend(Wrapper):
    """A backend that is asked no more often than its provider allows; all that use this object share the limit.

    Give one of `requests_per_minute` and `tokens_per_minute` (input and output), or both.  A failed attempt is a
    request; its tokens are given back.  Raises ConfigError for limits that are no positive numbers.
    """

    def __init__(
        self, inner: Any, *, requests_per_minute: float | None = None, tokens_per_minute: float | None = None
    ) -> None:
        require_alike(type(self).__name__, {"inner": inner})
        self.inner = inner
        self.limit = MinuteLimit(requests_per_minute, tokens_per_minute)

    def looplet_candidates(self, purpose: str) -> tuple[Candidate, ...]:
        """Return the candidates of the backend inside, under this limit."""
        return tuple(replace(c, limits=(self.limit, *c.limits)) for c in candidates(self.inner, purpose))


class MinuteLimit:
    """Requests and tokens a minute, for any number of threads.  It says how long to wait and never waits itself."""

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        given = {REQUESTS: requests_per_minute, TOKENS: tokens_per_minute}
        for name, rate in given.items():
            if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0):
                raise ConfigError(f"{name} must be a number above 0, not {rate!r}")
        if requests_per_minute is None and tokens_per_minute is None:
            raise ConfigError(f"a rate limit needs {REQUESTS}= or {TOKENS}=")
        now = clock()
        self._buckets = {name: _Bucket(rate, now) for name, rate in given.items() if rate is not None}
        self._clock = clock
        self._lock = threading.RLock()  # the garbage collector may come in here, and end a run that waits
        self._usual = 0
        """tokens: what a request took lately, the estimate for one of which nobody knows more"""
        self._waiting: list[_Place] = []
        """in the order in which they may go"""

    def reserve(self, tokens: int = 0) -> _Place:
        """Take a place for a request of about `tokens` tokens, 0 when nobody knows."""
        with self._lock:
            now = self._clock()
            self._waiting = [place for place in self._waiting if place.ready_at > now]
            taken = {REQUESTS: 1, TOKENS: tokens or self._usual}
            waits = {name: bucket.take(taken[name], now) for name, bucket in self._buckets.items()}
            limit = max(waits, key=lambda name: waits[name])
            ready_at = max([now + waits[limit], *(place.ready_at for place in self._waiting[-1:])])
            place = _Place(limit, ready_at - now, ready_at, taken, self._correct)
            if place.wait_s > 0:
                self._waiting.append(place)
            return place

    def _correct(self, place: _Place, took: dict[str, int]) -> None:
        """Put back what a place took too much, or take what it took too little."""
        with self._lock:
            if place in self._waiting and not took[REQUESTS]:
                self._waiting.remove(place)
            if took[REQUESTS] and took[TOKENS]:
                self._usual = took[TOKENS]
            now = self._clock()
            for name, bucket in self._buckets.items():
                bucket.take(took[name] - place.taken[name], now)
            place.taken = took


class _Bucket:
    """What is left of one minute's allowance; below zero, that many are waiting for it."""

    __slots__ = ("_at", "_left", "_size")

    def __init__(self, size: float, now: float) -> None:
        self._size = self._left = float(size)
        self._at = now

    def take(self, amount: float, now: float) -> float:
        """Take `amount` (or put it back, if it is negative); return the seconds until it is there.

        More than the bucket holds waits for a full one, and leaves a debt.
        """
        self._left = min(self._size, self._left + max(0.0, now - self._at) * self._size / _MINUTE)
        self._at = now
        missing = min(amount, self._size) - self._left
        self._left = min(self._size, self._left - amount)
        return max(0.0, missing) * _MINUTE / self._size


class _Place:
    """A `Reservation`."""

    __slots__ = ("_correct", "limit", "ready_at", "taken", "wait_s")

    def __init__(
        self,
        limit: str,
        wait_s: float,
        ready_at: float,
        taken: dict[str, int],
        correct: Callable[[_Place, dict[str, int]], None],
    ) -> None:
        self.limit = limit
        self.wait_s = wait_s
        self.ready_at = ready_at
        self.taken = taken
        self._correct = correct

    def settle(self, tokens: int) -> None:
        """Say how many tokens the request took."""
        self._correct(self, {REQUESTS: 1, TOKENS: tokens})

    def give_back(self) -> None:
        """Say that the request never went out."""
        self._correct(self, {REQUESTS: 0, TOKENS: 0})

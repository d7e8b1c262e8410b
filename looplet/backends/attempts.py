"""Asking one backend under its rules: rate limits before each attempt, time-outs, and retries.

A piece of plan: it waits and asks through effects, so it is the same under `for`, under `async for`, and outside of a
run; and no thread sleeps where waiting can be awaited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from looplet.backends.candidates import LONGEST_WAIT_S, Candidate, RateLimit, Reservation, Retry, kind_of, name_of
from looplet.errors import BackendError
from looplet.plan import Call, CallTimeout, Effect, Effects

T = TypeVar("T")
Clock: TypeAlias = Callable[[], float]
"""seconds, from any beginning"""
Notify: TypeAlias = Callable[[str, dict[str, Any]], None]

RETRY: Final = "retry"
"""`attempt` (from 1: the one that failed), `error`, `error_type`, `delay_s`, `usage` (what it cost, or None)"""
RATE_LIMITED: Final = "rate_limited"
"""`seconds`, `limit` (its name)"""


def attempts(
    candidate: Candidate,
    ask: Callable[[], Effects[T]],
    wait: Callable[[float], Effects[None]],
    notify: Notify,
    *,
    tokens: int = 0,
    clock: Clock = time.monotonic,
) -> Effects[T]:
    """Ask until there is an answer or the candidate's rules give up; then the last error is raised, with a note.

    ask: one attempt; its calls get the candidate's time-out, and one that takes longer is a BackendError (`timeout`).
    wait: lets seconds pass.  notify: told of `RETRY` and `RATE_LIMITED`, before the wait.  tokens: about how many the
    request has, for limits on tokens.  Only an `Exception` is tried again: never a cancellation, never a Ctrl-C.
    """
    began, attempt, retry = clock(), 0, candidate.retry
    while True:
        attempt += 1
        places: list[Reservation] = []
        if candidate.limits:
            places = yield from _places(candidate, tokens, wait, notify, partial(_left_s, retry, began, clock))
        try:
            value = yield from _in_time(candidate, ask(), began, clock)
        except Exception as error:
            usage = getattr(error, "usage", None)
            _settle(places, usage, failed=True)
            elapsed = clock() - began
            delay = retry.delay_s(attempt, error, elapsed) if retry is not None else None
            if delay is None:
                _say_why(error, retry, attempt, elapsed)
                raise
            facts = {"attempt": attempt, "error": error, "error_type": kind_of(error), "delay_s": delay, "usage": usage}
        else:
            _settle(places, getattr(value, "usage", None), failed=False)
            return value
        notify(RETRY, facts)
        yield from wait(delay)


def _left_s(retry: Retry | None, began: float, clock: Clock) -> float | None:
    """Return the seconds until the deadline, None when there is none."""
    if retry is None or retry.deadline_s is None:
        return None
    return max(0.0, began + retry.deadline_s - clock())


# --- rate limits ----------------------------------------------------------------------------------------------------


def _places(
    candidate: Candidate,
    tokens: int,
    wait: Callable[[float], Effects[None]],
    notify: Notify,
    left_s: Callable[[], float | None],
) -> Effects[list[Reservation]]:
    """Take a place under every rate limit and wait until all are free."""
    places: list[Reservation] = []
    try:
        for limit in candidate.limits:
            places.append(_reserved(limit, tokens, left_s()))
            if places[-1].wait_s > 0:
                notify(RATE_LIMITED, {"seconds": places[-1].wait_s, "limit": places[-1].limit})
                yield from wait(places[-1].wait_s)
    except BaseException:  # cancelled while waiting
        for place in places:
            place.give_back()
        raise
    return places


def _reserved(limit: RateLimit, tokens: int, left_s: float | None) -> Reservation:
    place = limit.reserve(tokens)
    if left_s is not None and place.wait_s > left_s:
        place.give_back()
        words = f"{place.limit} leaves no room for {place.wait_s:.1f} s, and deadline_s only {left_s:.1f} s"
        raise BackendError(f"{words}; raise deadline_s=, or ask less often", kind="rate_limit", retryable=True)
    return place


def _settle(places: Sequence[Reservation], usage: Any, *, failed: bool) -> None:
    """Correct the estimates; an answer that reports nothing took what was reserved, a failure took nothing."""
    if usage is None and not failed:
        return
    for place in places:
        place.settle(usage.total_tokens if usage is not None else 0)


# --- time-outs ------------------------------------------------------------------------------------------------------


def _in_time(candidate: Candidate, plan: Effects[T], began: float, clock: Clock) -> Effects[T]:
    """Return one attempt with each of its calls in the time that the rules give it."""
    retry = candidate.retry
    if retry is None or (retry.timeout_s is None and retry.deadline_s is None):
        return plan
    return _timed(candidate.llm, retry, plan, began, clock)


def _timed(llm: Any, retry: Retry, plan: Effects[T], began: float, clock: Clock) -> Effects[T]:
    def allowed_s() -> float:
        left = _left_s(retry, began, clock)
        return min(seconds for seconds in (retry.timeout_s, left) if seconds is not None)

    try:
        return (yield from _limited(plan, allowed_s))
    except CallTimeout as error:
        spent = "deadline_s" if _left_s(retry, began, clock) == 0 else "timeout_s"
        words = f"no answer from {name_of(llm)} in {getattr(retry, spent):g} s; raise {spent}= to wait longer"
        raise BackendError(words, kind="timeout", retryable=True) from error


def _limited(plan: Effects[T], allowed_s: Callable[[], float]) -> Effects[T]:
    """Pass a plan's effects on, with a time-out on each call; what follows on an error is cleaning up and has none."""
    resume: Callable[[Any], Effect] = plan.send
    value: Any = None
    failed = False
    while True:
        try:
            effect = resume(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if isinstance(effect, Call) and not failed:
            effect.timeout_s = allowed_s()
        try:
            value, resume = (yield effect), plan.send
        except BaseException as error:  # noqa: BLE001 - relayed into the plan, which re-raises
            value, resume, failed = error, plan.throw, True


def _say_why(error: Exception, retry: Retry | None, attempt: int, elapsed_s: float) -> None:
    """Note on the error how often and how long was tried, and what a deadline had to do with it."""
    asked_s = getattr(error, "retry_after_s", None)
    left = max(0.0, retry.deadline_s - elapsed_s) if retry is not None and retry.deadline_s is not None else None
    if left is not None and asked_s is not None and asked_s > left:
        error.add_note(f"the provider asked to wait {asked_s:g} s, and deadline_s leaves {left:.1f} s")
    elif retry is not None and asked_s is not None and asked_s > LONGEST_WAIT_S:
        error.add_note(f"the provider asked to wait {asked_s:g} s, which is more than an hour")
    if attempt > 1:
        error.add_note(f"gave up after {attempt} attempts in {elapsed_s:.1f} s")

"""No more requests and tokens a minute than allowed, in the order of asking; time is the test's own."""

from __future__ import annotations

import asyncio
import threading

import pytest
from provider_support import HELLO
from support import both, make_tools

from looplet import BackendError, ConfigError, Reply, Usage
from looplet.backends.attempts import attempts
from looplet.backends.candidates import Candidate, candidates
from looplet.backends.rate_limit import MinuteLimit, RateLimitedBackend
from looplet.backends.resilient import Backoff, ResilientBackend
from looplet.plan import Call, Wait
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

SCRIPTED = (ScriptedBackend, AsyncScriptedBackend)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def waits(limit, count, tokens=0):
    return [limit.reserve(tokens).wait_s for _ in range(count)]


# --- the limit ------------------------------------------------------------------------------------------------------


def test_what_a_minute_allows_goes_at_once_and_the_rest_evenly():
    assert waits(MinuteLimit(3, clock=Clock()), 6) == [0, 0, 0, 20, 40, 60]


def test_no_minute_after_the_first_has_more_than_it_allows():
    clock = Clock()
    limit = MinuteLimit(6, clock=clock)
    starts = [clock.now + limit.reserve(0).wait_s for _ in range(60)]
    later = [start for start in starts if start > 0]
    assert all(sum(begin < start <= begin + 60 for start in later) <= 6 for begin in later)


def test_time_fills_the_bucket_and_no_further_than_a_minute():
    clock = Clock()
    limit = MinuteLimit(3, clock=clock)
    waits(limit, 3)
    clock.now += 20
    assert waits(limit, 2) == [0, 20]
    clock.now += 10_000
    assert waits(limit, 4) == [0, 0, 0, 20]


def test_tokens_are_limited_as_well_and_the_longer_wait_counts():
    limit = MinuteLimit(600, 1000, clock=Clock())
    places = [limit.reserve(500) for _ in range(3)]
    assert [(place.wait_s, place.limit) for place in places[2:]] == [(30, "tokens_per_minute")]


def test_a_request_larger_than_a_minutes_tokens_waits_for_a_full_bucket_and_leaves_a_debt():
    clock = Clock()
    limit = MinuteLimit(None, 1000, clock=clock)
    assert waits(limit, 2, tokens=3000) == [0, 180]


def test_the_usage_corrects_the_estimate():
    clock = Clock()
    limit = MinuteLimit(None, 1000, clock=clock)
    limit.reserve(900).settle(100)
    assert limit.reserve(900).wait_s == 0
    limit = MinuteLimit(None, 1000, clock=clock)
    limit.reserve(100).settle(1000)
    assert limit.reserve(100).wait_s == 6


def test_without_an_estimate_a_request_counts_as_the_last_one_did():
    limit = MinuteLimit(None, 1000, clock=Clock())
    limit.reserve().settle(600)
    assert waits(limit, 2) == [12, 48]


def test_places_come_free_in_the_order_in_which_they_were_taken():
    clock = Clock()
    limit = MinuteLimit(None, 1000, clock=clock)
    first = limit.reserve(1000)
    second = limit.reserve(1000)
    first.settle(1)  # it gave nearly all of it back
    assert second.wait_s == 60
    assert limit.reserve(1).wait_s == 60


def test_a_place_that_is_given_back_is_free_for_the_next():
    limit = MinuteLimit(1, clock=Clock())
    limit.reserve()
    limit.reserve().give_back()
    assert limit.reserve().wait_s == 60


def test_threads_get_a_place_each():
    limit = MinuteLimit(40, clock=Clock())
    places = []

    def take():
        places.extend(waits(limit, 50))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(places) == pytest.approx([0] * 40 + [1.5 * n for n in range(1, 161)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "requests_per_minute= or tokens_per_minute="),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"tokens_per_minute": -5}, "tokens_per_minute"),
        ({"requests_per_minute": "60"}, "requests_per_minute"),
        ({"requests_per_minute": True}, "requests_per_minute"),
        ({"tokens_per_minute": float("nan")}, "tokens_per_minute"),
    ],
)
def test_limits_that_cannot_work_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        RateLimitedBackend(ScriptedBackend([]), **settings)


# --- asking under it ------------------------------------------------------------------------------------------------


def asked(limits, script, *, rules=None, tokens=0, clock):
    """Ask through `attempts`; return what came of it and what was notified.  Waiting lets the clock go on."""
    told, answers = [], iter(script)

    def ask():
        return (yield Call(lambda: next(answers), None))

    def wait(seconds):
        yield Wait(seconds)

    plan = attempts(
        Candidate("llm", rules, limits), ask, wait, lambda *now: told.append(now), tokens=tokens, clock=clock
    )
    resume, value = plan.send, None
    while True:
        try:
            effect = resume(value)
        except StopIteration as stop:
            return stop.value, told
        value, resume = None, plan.send
        if isinstance(effect, Wait):
            clock.now += effect.seconds
            continue
        try:
            value = effect.thunk()
            if isinstance(value, Exception):
                raise value
        except Exception as error:
            value, resume = error, plan.throw


def test_a_wait_is_told_before_it_begins():
    clock = Clock()
    limit = MinuteLimit(2, clock=clock)
    told = [asked((limit,), ["hello"], clock=clock)[1] for _ in range(3)]
    assert told == [[], [], [("rate_limited", {"seconds": 30.0, "limit": "requests_per_minute"})]]
    assert clock.now == 30


def test_each_attempt_takes_a_place():
    clock = Clock()
    limit = MinuteLimit(1, clock=clock)
    busy = BackendError("busy", retryable=True)
    _, told = asked((limit,), [busy, "hello"], rules=Backoff(random=lambda: 0.5), clock=clock)
    assert [(what, facts.get("delay_s", facts.get("seconds"))) for what, facts in told] == [
        ("retry", 0.5),
        ("rate_limited", 59.5),
    ]


def test_all_limits_are_waited_for():
    clock = Clock()
    limits = (MinuteLimit(1, clock=clock), MinuteLimit(None, 100, clock=clock))
    asked(limits, ["hello"], tokens=100, clock=clock)
    _, told = asked(limits, ["hello"], tokens=100, clock=clock)
    assert [facts["seconds"] for _, facts in told] == [60.0]
    _, told = asked(limits[::-1], ["hello"], tokens=200, clock=clock)
    assert [facts["limit"] for _, facts in told] == ["tokens_per_minute"]


def test_an_answer_settles_what_it_used():
    clock = Clock()
    limit = MinuteLimit(None, 1000, clock=clock)
    asked((limit,), [Reply(usage=Usage(600, 200))], tokens=1000, clock=clock)
    assert limit.reserve(500).wait_s == 18


def test_a_failed_attempt_gives_its_tokens_back_but_not_its_request():
    clock = Clock()
    limit = MinuteLimit(1, 1000, clock=clock)
    with pytest.raises(BackendError):
        asked((limit,), [BackendError("no")], tokens=1000, clock=clock)
    place = limit.reserve(1000)
    assert (place.wait_s, place.limit) == (60, "requests_per_minute")


def test_a_wait_beyond_the_deadline_is_not_begun():
    clock = Clock()
    limit = MinuteLimit(1, clock=clock)
    limit.reserve()
    with pytest.raises(BackendError, match=r"requests_per_minute .* 60\.0 s, and deadline_s only 10\.0 s") as caught:
        asked((limit,), ["hello"], rules=Backoff(deadline_s=10.0), clock=clock)
    assert (caught.value.kind, clock.now) == ("rate_limit", 0)
    assert limit.reserve().wait_s == 60  # its place was given back


def test_whoever_is_cancelled_while_waiting_gives_the_place_back():
    clock = Clock()
    limit = MinuteLimit(1, clock=clock)
    limit.reserve()

    def wait(seconds):
        yield Wait(seconds)

    plan = attempts(Candidate("llm", None, (limit,)), None, wait, lambda *_: None, clock=clock)
    assert next(plan).seconds == 60
    plan.close()
    assert limit.reserve().wait_s == 60


# --- the wrapper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_limited_backend_answers_like_the_one_inside(is_async):
    llm = RateLimitedBackend(SCRIPTED[is_async](["hello"]), requests_per_minute=6000, tokens_per_minute=10**6)
    reply = asyncio.run(llm.chat(HELLO)) if is_async else llm.chat(HELLO)
    assert reply.text == "hello"


def test_all_that_use_the_wrapper_share_its_limit():
    llm = RateLimitedBackend(ScriptedBackend([]), requests_per_minute=1)
    (one,), (other,) = candidates(llm, "agent"), candidates(ResilientBackend(llm), "judge")
    assert one.limits == other.limits == (llm.limit,)


def test_limits_around_limits_all_count():
    inner = RateLimitedBackend(ScriptedBackend([]), requests_per_minute=1)
    outer = RateLimitedBackend(inner, tokens_per_minute=1)
    assert candidates(outer)[0].limits == (outer.limit, inner.limit)


def test_a_run_waits_for_its_place_and_its_span_tells_of_it():
    def make(is_async):
        llm = SCRIPTED[is_async]([("add", {"a": 1, "b": 2}), ("done", {"answer": "3"})])
        limited = RateLimitedBackend(llm, requests_per_minute=1)
        limited.limit = MinuteLimit(6000, clock=Clock())  # a clock that stands still: 10 ms, then 20 ms
        waits(limited.limit, 6000)
        return {"llm": limited, "task": {"goal": "g"}, "tools": make_tools()}

    outcome = both(make)
    assert outcome.stop_reason == "done"
    chats = [node for node in outcome.trace.spans if node.name.startswith("chat ")]
    assert [[(e.name, e.attributes[semconv.RATE_LIMIT_WAIT]) for e in chat.events] for chat in chats] == [
        [(semconv.EVENT_RATE_LIMITED, pytest.approx(0.01))],
        [(semconv.EVENT_RATE_LIMITED, pytest.approx(0.02))],
    ]

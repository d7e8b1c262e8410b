"""Retries, time-outs, deadlines and fallbacks: by hand and in whole runs, over a socket where it matters."""

from __future__ import annotations

import asyncio
import copy
import inspect
import threading
from contextlib import ExitStack

import pytest
from provider_support import HELLO
from support import both, make_tools

from looplet import BackendError, CancelToken, ConfigError, LoopConfig, ProvenanceSink, Reply, ToolCall, Usage
from looplet.backends.attempts import attempts
from looplet.backends.candidates import Candidate, candidates, gives_way, parts
from looplet.backends.openai import AsyncOpenAIBackend, OpenAIBackend
from looplet.backends.rate_limit import RateLimitedBackend
from looplet.backends.resilient import Backoff, ResilientBackend
from looplet.backends.router import BackendRouter
from looplet.errors import ContextOverflow
from looplet.plan import Call, Wait
from looplet.telemetry import semconv
from looplet.testing import Answer, AsyncScriptedBackend, Fault, MockLLMBackend, OpenAIServer, ScriptedBackend
from looplet.types import Delta

KINDS = (OpenAIBackend, AsyncOpenAIBackend)
SCRIPTED = (ScriptedBackend, AsyncScriptedBackend)
OVERLOADED = BackendError("too much to do", kind="overloaded", status=529, retryable=True)
REFUSED = BackendError("no such key", kind="auth", status=401)

sync_and_async = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def resilient(inner, **settings):
    return ResilientBackend(inner, **{"base_delay_s": 0.001, **settings})


def chat(llm, is_async, messages=HELLO, **settings):
    if is_async:
        return asyncio.run(llm.chat(messages, **settings))
    return llm.chat(messages, **settings)


def over_http(wrap, policy, is_async, *, backend=()):
    """Ask `wrap(backend)` once over a socket; return the reply or the BackendError, and the number of requests."""
    with OpenAIServer(policy=policy) as server:

        async def ask_async():
            async with AsyncOpenAIBackend(base_url=server.base_url, model="m", **dict(backend)) as llm:
                return await wrap(llm).chat(HELLO)

        try:
            if is_async:
                answer = asyncio.run(ask_async())
            else:
                with OpenAIBackend(base_url=server.base_url, model="m", **dict(backend)) as llm:
                    answer = wrap(llm).chat(HELLO)
        except BackendError as error:
            answer = error
        return answer, len(server.requests)


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def driven(plan, clock):
    """Perform a plan's effects without waiting; return its value and the seconds of each wait."""
    waits = []
    resume, value = plan.send, None
    while True:
        try:
            effect = resume(value)
        except StopIteration as stop:
            return stop.value, waits
        value, resume = None, plan.send
        if isinstance(effect, Wait):
            waits.append(round(effect.seconds, 6))
            clock.now += effect.seconds
            continue
        assert isinstance(effect, Call)
        try:
            value = effect.thunk()
        except Exception as error:
            value, resume = error, plan.throw


def try_script(script, rules, *, takes_s=0.0):
    """Ask through `attempts` what the script says; return what came of it, the waits, and what was notified."""
    clock, told, answers = Clock(), [], iter(script)

    def answer():
        clock.now += takes_s
        said = next(answers)
        if isinstance(said, BaseException):
            raise said
        return said

    def ask():
        return (yield Call(answer, None))

    def wait(seconds):
        yield Wait(seconds)

    plan = attempts(Candidate("llm", rules), ask, wait, lambda *told_now: told.append(told_now), clock=clock)
    try:
        value, waits = driven(plan, clock)
    except BackendError as error:
        return error, clock.now - 1000, told
    return value, waits, told


def steady(**settings):
    """Return rules without chance."""
    return Backoff(**{"random": lambda: 0.5, **settings})


# --- the rules ------------------------------------------------------------------------------------------------------


def test_waits_double_up_to_the_longest():
    rules = steady(retries=7)
    assert [rules.delay_s(n, OVERLOADED, 0.0) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 8, 8, None]


def test_waits_vary_by_the_jitter_and_stay_below_the_longest():
    shortest, longest = (Backoff(jitter=0.2, random=lambda chance=chance: chance) for chance in (0.0, 1.0))
    assert shortest.delay_s(1, OVERLOADED, 0.0) == pytest.approx(0.4)
    assert longest.delay_s(1, OVERLOADED, 0.0) == pytest.approx(0.6)
    assert Backoff(retries=9, random=lambda: 1.0).delay_s(9, OVERLOADED, 0.0) == 8.0


def test_two_backends_do_not_wait_in_step():
    assert len({Backoff().delay_s(1, OVERLOADED, 0.0) for _ in range(20)}) > 1


def test_very_many_retries_are_only_long():
    assert steady(retries=10**6).delay_s(99_999, OVERLOADED, 0.0) == 8.0


def test_the_provider_may_ask_for_a_longer_wait_but_not_for_a_shorter_one():
    asked = [BackendError("later", retryable=True, retry_after_s=seconds) for seconds in (30.0, 0.1)]
    assert [steady().delay_s(1, error, 0.0) for error in asked] == [30.0, 0.5]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OVERLOADED, True),
        (REFUSED, False),
        (ContextOverflow("too long"), False),
        (ConfigError("stream=True is not for chat()"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ValueError("a bug"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_may_go_away_is_tried_again(error, again):
    assert (steady().delay_s(1, error, 0.0) is not None) == again


@pytest.mark.parametrize(
    "settings",
    [
        {"retries": -1},
        {"retries": 1.5},
        {"retries": True},
        {"timeout_s": 0},
        {"timeout_s": "60"},
        {"deadline_s": -1},
        {"base_delay_s": -0.1},
        {"max_delay_s": float("nan")},
        {"jitter": 2},
        {"fallbacks": ScriptedBackend([])},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_cannot_work_are_named(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        ResilientBackend(ScriptedBackend([]), **settings)


def test_a_backend_is_asked_until_it_answers():
    value, waits, told = try_script([OVERLOADED, OVERLOADED, "hello"], steady())
    assert (value, waits) == ("hello", [0.5, 1.0])
    assert [(what, facts["attempt"], facts["error_type"], facts["delay_s"]) for what, facts in told] == [
        ("retry", 1, "overloaded", 0.5),
        ("retry", 2, "overloaded", 1.0),
    ]


def test_a_failed_attempt_that_was_charged_for_says_so():
    charged = BackendError("cut", kind="stream_cut", retryable=True, usage=Usage(7, 1))
    _, _, told = try_script([charged, "hello"], steady())
    assert told[0][1]["usage"] == Usage(7, 1)


def test_the_last_error_is_raised_and_says_how_often_was_tried():
    last = BackendError("the last", retryable=True)
    error, _, told = try_script([OVERLOADED, OVERLOADED, last], steady(retries=2), takes_s=2.0)
    assert error is last
    assert error.__notes__ == ["gave up after 3 attempts in 7.5 s"]
    assert len(told) == 2


def test_an_error_at_the_first_attempt_has_no_note():
    error, _, _ = try_script([BackendError("no", kind="auth")], steady())
    assert not hasattr(error, "__notes__")


def test_no_wait_begins_that_the_deadline_does_not_allow():
    errors = [BackendError("busy", retryable=True) for _ in range(9)]
    error, passed_s, told = try_script(errors, steady(retries=9, deadline_s=10.0), takes_s=1.0)
    assert (passed_s, len(told)) == (3 * 1.0 + 0.5 + 1.0 + 2.0 + 1.0, 3)  # a wait of 4 s would end at 11.5
    assert error.__notes__ == ["gave up after 4 attempts in 7.5 s"]


def test_a_retry_after_beyond_the_deadline_gives_up_at_once_and_says_so():
    later = BackendError("slow down", kind="rate_limit", retryable=True, retry_after_s=60.0)
    error, passed_s, told = try_script([later], steady(deadline_s=10.0), takes_s=1.0)
    assert (passed_s, told) == (1.0, [])
    assert error.__notes__ == ["the provider asked to wait 60 s, and deadline_s leaves 9.0 s"]


def test_each_call_of_an_attempt_gets_the_time_that_is_left():
    clock, allowed = Clock(), []

    def ask():
        for _ in range(3):
            effect = Call(lambda: None, None)
            yield effect
            allowed.append(effect.timeout_s)
            clock.now += 4.0
        return "hello"

    rules = steady(timeout_s=5.0, deadline_s=10.0)
    driven(attempts(Candidate("llm", rules), ask, None, None, clock=clock), clock)
    assert allowed == [5.0, 5.0, 2.0]


def test_cleaning_up_after_an_error_has_no_time_out():
    effects = []

    def ask():
        try:
            yield Call(lambda: 1 / 0, None)
        finally:
            effects.append(Call(lambda: None, None))
            yield effects[0]

    with pytest.raises(ZeroDivisionError):
        driven(attempts(Candidate("llm", steady(timeout_s=5.0)), ask, None, None), Clock())
    assert effects[0].timeout_s is None


# --- over a socket --------------------------------------------------------------------------------------------------

PASSING = [Fault.rate_limited(0), Fault.rate_limited(), Fault.server_error(), Fault.overloaded(), Fault.cut(),
           Fault.malformed(), Fault.empty(), Fault.error(408, "timed out"), Fault.error(409, "locked")]  # fmt: skip


@sync_and_async
@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind}{fault.status}")
def test_what_passes_is_asked_again_once(fault, is_async):
    reply, requests = over_http(resilient, [fault, "hello"], is_async)
    assert (reply.text, requests) == ("hello", 2)


@sync_and_async
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault.unauthorized(), "auth"),
        (Fault.context_overflow(), "context_overflow"),
        (Fault.error(400, "no"), "bad_request"),
    ],
    ids=["unauthorized", "context_overflow", "bad_request"],
)
def test_what_does_not_pass_is_asked_once(fault, kind, is_async):
    error, requests = over_http(resilient, [fault, "hello"], is_async)
    assert (error.kind, requests) == (kind, 1)


@sync_and_async
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_n_retries_are_n_requests_more_whatever_the_client_was_told(retries, is_async):
    def wrap(llm):
        return resilient(llm, retries=retries)

    error, requests = over_http(wrap, lambda _: Fault.server_error(), is_async, backend={"max_retries": 2})
    assert (error.kind, requests) == ("server_error", 1 + retries)


def test_a_client_of_the_callers_own_is_asked_once_per_attempt_as_well():
    import openai

    with (
        OpenAIServer(policy=lambda _: Fault.server_error()) as server,
        openai.OpenAI(base_url=server.base_url, api_key="k", max_retries=2) as client,
    ):
        with pytest.raises(BackendError):
            resilient(OpenAIBackend(client, model="m"), retries=1).chat(HELLO)
        assert len(server.requests) == 2


def test_the_backend_inside_keeps_its_own_retries_for_others():
    with (
        OpenAIServer(policy=lambda _: Fault.rate_limited(0.01)) as server,
        OpenAIBackend(base_url=server.base_url, model="m", max_retries=1) as inner,
    ):
        for llm, requests in ((resilient(inner, retries=0), 1), (inner, 2)):
            before = len(server.requests)
            with pytest.raises(BackendError):
                llm.chat(HELLO)
            assert len(server.requests) - before == requests


@sync_and_async
def test_an_attempt_that_takes_too_long_is_given_up_and_made_again(is_async):
    def wrap(llm):
        return resilient(llm, timeout_s=0.05, retries=50)  # a slow machine may need more than one

    def policy(request):
        return "hello" if request.number else Fault.slow(30, "late")

    reply, requests = over_http(wrap, policy, is_async)
    assert reply.text == "hello"
    assert requests > 1


@sync_and_async
def test_when_all_attempts_take_too_long_it_says_what_to_raise(is_async):
    def wrap(llm):
        return resilient(llm, timeout_s=0.02, retries=1)

    error, _ = over_http(wrap, lambda _: Fault.slow(30, "late"), is_async)
    assert error.kind == "timeout"
    assert "timeout_s=" in str(error)
    assert "gave up after 2 attempts" in error.__notes__[0]


@sync_and_async
def test_a_deadline_ends_an_attempt(is_async):
    def wrap(llm):
        return resilient(llm, deadline_s=0.03)

    error, _ = over_http(wrap, lambda _: Fault.slow(30, "late"), is_async)
    assert error.kind == "timeout"
    assert "deadline_s=" in str(error)


@sync_and_async
def test_a_parameter_that_the_model_refuses_costs_no_retry(is_async):
    def wrap(llm):
        return resilient(llm, retries=0)

    policy = [Fault.refuses("max_tokens"), "hello"]
    reply, requests = over_http(wrap, policy, is_async, backend={"default_max_tokens": 9})
    assert (reply.text, requests) == ("hello", 2)


# --- fallbacks ------------------------------------------------------------------------------------------------------


def named(kind, model, *script):
    return kind(list(script), model=model)


@sync_and_async
@pytest.mark.parametrize(
    "error", [OVERLOADED, REFUSED, BackendError("no", kind="quota"), ConnectionRefusedError()], ids=str
)
def test_another_backend_answers_where_the_first_gave_up(error, is_async):
    first, second = named(SCRIPTED[is_async], "a", error, error), named(SCRIPTED[is_async], "b", "hello")
    assert chat(resilient(first, retries=1, fallbacks=[second]), is_async).text == "hello"


@pytest.mark.parametrize("error", [ContextOverflow("too long"), ConfigError("no"), ValueError("a bug")], ids=str)
def test_another_backend_is_not_asked_for_what_is_not_the_providers_failure(error):
    second = named(ScriptedBackend, "b", "hello")
    with pytest.raises(type(error)):
        resilient(named(ScriptedBackend, "a", error), fallbacks=[second]).chat(HELLO)
    assert second.requests == []
    assert not gives_way(error)


@sync_and_async
def test_when_all_fail_the_last_error_tells_of_the_others(is_async):
    last = BackendError("down", kind="server_error", retryable=True)
    first, second = named(SCRIPTED[is_async], "a", REFUSED), named(SCRIPTED[is_async], "b", last, last)
    with pytest.raises(BackendError) as caught:
        chat(resilient(first, retries=1, fallbacks=[second]), is_async)
    assert caught.value is last
    tried, before = caught.value.__notes__
    assert tried.startswith("gave up after 2 attempts in ")
    assert before == "asked before: a: auth: no such key"


def test_the_next_call_begins_with_the_first_backend_again():
    first, second = named(ScriptedBackend, "a", REFUSED, "well again"), named(ScriptedBackend, "b", "hello")
    llm = resilient(first, fallbacks=[second])
    assert [llm.chat(HELLO).text for _ in range(2)] == ["hello", "well again"]


def test_a_backend_that_is_resilient_itself_keeps_its_own_rules():
    errors = [BackendError("busy", retryable=True) for _ in range(9)]
    inner = named(ScriptedBackend, "a", *errors)
    other = named(ScriptedBackend, "b", *errors)
    with pytest.raises(BackendError):
        resilient(resilient(inner, retries=1), retries=5, fallbacks=[resilient(other, retries=0)]).chat(HELLO)
    assert (len(inner.requests), len(other.requests)) == (2, 1)


@pytest.mark.parametrize(("odd", "kinds"), [(r"fallbacks\[0\]", SCRIPTED), ("inner", SCRIPTED[::-1])])
def test_sync_and_async_backends_do_not_mix(odd, kinds):
    with pytest.raises(ConfigError, match=rf"{odd} \(AsyncScriptedBackend\) is async and "):
        ResilientBackend(kinds[0]([]), fallbacks=[kinds[1]([])])


@pytest.mark.parametrize("given", [OpenAIBackend, "gpt-4o-mini", None])
def test_what_is_no_backend_is_refused(given):
    with pytest.raises(ConfigError, match="inner takes a backend"):
        ResilientBackend(given)


# --- a backend like any other ---------------------------------------------------------------------------------------


class Interrupted:
    """Is interrupted every time it is asked."""

    def __init__(self, error):
        self.error, self.asked = error, 0

    def chat(self, messages, **settings):
        self.asked += 1
        raise self.error


def test_an_interruption_is_not_tried_again():
    inner = Interrupted(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        resilient(inner).chat(HELLO)
    assert inner.asked == 1


def test_a_cancelled_task_does_not_go_on_asking():
    asked = []

    class Waits:
        async def chat(self, messages, **settings):
            asked.append(1)
            await asyncio.sleep(30)

    async def main():
        task = asyncio.create_task(resilient(Waits()).chat(HELLO))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert asked == [1]


def test_a_task_that_is_cancelled_while_it_waits_is_cancelled_at_once():
    inner = AsyncScriptedBackend([BackendError("later", retryable=True, retry_after_s=3600.0)])

    async def main():
        task = asyncio.create_task(resilient(inner).chat(HELLO))
        while not inner.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_attributes_are_those_of_the_backend_inside():
    with OpenAIServer() as server, OpenAIBackend(base_url=server.base_url, model="m") as inner:
        llm = resilient(inner)
        assert [getattr(llm, name) for name in ("model", "base_url", "server_address", "server_port", "provider")] == [
            "m", server.base_url, "127.0.0.1", inner.server_port, "openai",
        ]  # fmt: skip
        assert inspect.signature(llm.chat) == inspect.signature(inner.chat)


def test_it_can_do_what_the_backend_inside_can():
    assert [hasattr(resilient(ScriptedBackend([])), name) for name in ("chat", "generate")] == [True, True]
    assert not hasattr(resilient(ScriptedBackend([])), "generate_with_tools")
    assert [hasattr(resilient(MockLLMBackend()), name) for name in ("chat", "generate")] == [False, True]
    assert inspect.iscoroutinefunction(resilient(AsyncScriptedBackend([])).chat)


def test_it_can_be_copied():
    llm = copy.copy(resilient(ScriptedBackend(["hello"])))
    assert llm.chat(HELLO).text == "hello"


def test_a_text_is_asked_for_by_generate():
    assert resilient(MockLLMBackend([OVERLOADED, "hello"])).generate("hi") == "hello"


def test_a_backend_that_does_not_answer_as_a_wrapper_of_the_callers_own_does_is_not_passed_over():
    class Shouting:
        def __init__(self, inner):
            self.wrapped = inner

        def chat(self, messages, **settings):
            return Reply(text=self.wrapped.chat(messages, **settings).text.upper())

        def __getattr__(self, name):
            return getattr(self.wrapped, name)

    shouting = Shouting(resilient(ScriptedBackend([OVERLOADED, "hello"])))
    (candidate,) = candidates(shouting)
    assert candidate.llm is shouting
    assert shouting.chat(HELLO).text == "HELLO"


def test_all_backends_inside_can_be_found(tmp_path):
    a, b, c, d = (ScriptedBackend([], model=name) for name in "abcd")
    sink = ProvenanceSink(tmp_path)
    llm = sink.wrap_llm(resilient(BackendRouter(a, judge=RateLimitedBackend(b, requests_per_minute=1)), fallbacks=[c]))
    found = [id(part) for part in parts(llm)]
    assert [id(leaf) in found for leaf in (a, b, c, d)] == [True, True, True, False]
    assert len(found) == len(set(found))


# --- streams by hand ------------------------------------------------------------------------------------------------


class Streams:
    """Streams what its script says: items, and exceptions to raise; says when a stream was closed."""

    model = "s"

    def __init__(self, *scripts):
        self.scripts, self.opened, self.closed = list(scripts), 0, 0

    def chat(self, messages, **settings):
        raise NotImplementedError

    def stream(self, messages, **settings):
        script = self.scripts[self.opened]
        self.opened += 1
        try:
            for item in script:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed += 1


class AsyncStreams(Streams):
    async def chat(self, messages, **settings):
        raise NotImplementedError

    async def stream(self, messages, **settings):
        for item in super().stream(messages, **settings):
            yield item


def streamed(llm, is_async, *, at_most=99):
    """Return the items of a stream, and the error that it ended with."""
    items = []

    async def main():
        stream = llm.stream(HELLO)
        try:
            async for item in stream:
                items.append(item)
                if len(items) == at_most:
                    break
        finally:
            await stream.aclose()

    try:
        if is_async:
            asyncio.run(main())
        else:
            stream = llm.stream(HELLO)
            try:
                for item in stream:
                    items.append(item)
                    if len(items) == at_most:
                        break
            finally:
                stream.close()
    except Exception as error:
        return items, error
    return items, None


A, B, DONE = Delta("text", "a"), Delta("text", "b"), Reply(text="ab", usage=Usage(3, 2))
CUT = BackendError("cut", kind="stream_cut", retryable=True)
STREAMS = (Streams, AsyncStreams)


@sync_and_async
def test_a_stream_that_fails_before_its_first_piece_is_opened_again(is_async):
    inner = STREAMS[is_async]([CUT], [A, B, DONE])
    assert streamed(resilient(inner), is_async) == ([A, B, DONE], None)
    assert (inner.opened, inner.closed) == (2, 2)


@sync_and_async
def test_a_stream_of_which_a_piece_was_seen_is_not_opened_again(is_async):
    inner, other = STREAMS[is_async]([A, CUT], [A, B, DONE]), STREAMS[is_async]([A, B, DONE])
    assert streamed(resilient(inner, fallbacks=[other]), is_async) == ([A], CUT)
    assert (inner.opened, inner.closed, other.opened) == (1, 1, 0)


@sync_and_async
def test_another_backend_streams_where_the_first_gave_up(is_async):
    inner, other = STREAMS[is_async]([REFUSED]), STREAMS[is_async]([A, DONE])
    assert streamed(resilient(inner, fallbacks=[other]), is_async) == ([A, DONE], None)


@sync_and_async
def test_a_stream_that_ends_without_a_reply_was_cut(is_async):
    inner = STREAMS[is_async]([], [A, DONE])
    assert streamed(resilient(inner), is_async) == ([A, DONE], None)


@sync_and_async
def test_leaving_a_stream_closes_it(is_async):
    inner = STREAMS[is_async]([A, B, DONE])
    assert streamed(resilient(inner), is_async, at_most=1) == ([A], None)
    assert inner.closed == 1


@sync_and_async
def test_a_streamed_answer_is_counted_once(is_async):
    router = BackendRouter(resilient(STREAMS[is_async]([CUT], [A, DONE])))
    streamed(router, is_async)
    assert (router.total_calls, router.total_input_tokens, router.total_output_tokens) == (1, 3, 2)


def test_the_stream_of_a_wrapper_around_a_wrapper_is_async_where_the_backend_is():
    inner = AsyncStreams([CUT], [A, DONE])
    assert streamed(BackendRouter(resilient(inner)), True) == ([A, DONE], None)


# --- in whole runs --------------------------------------------------------------------------------------------------

SCRIPT = [[("add", {"a": 1, "b": 2})], [("done", {"answer": "3"})]]


class Closes:
    """Closes a backend at the end of the run."""

    def __init__(self, llm, is_async):
        self.llm = llm
        if is_async:
            self.on_loop_end = self.aclose

    def on_loop_end(self, *_):
        self.llm.close()

    async def aclose(self, *_):
        await self.llm.aclose()


def run(wrap, policy):
    """Run `wrap(backend)` over a socket, sync and async; return the outcome and the numbers of requests."""
    servers = []
    with ExitStack() as stack:

        def make(is_async):
            servers.append(stack.enter_context(OpenAIServer(policy=policy)))
            llm = KINDS[is_async](base_url=servers[-1].base_url, model="m")
            return scripted(is_async, wrap(llm), hooks=[Closes(llm, is_async)])

        outcome = both(make)
        return outcome, [len(server.requests) for server in servers]


def faulty(*faults):
    """Return a policy that goes wrong first, then follows the script."""
    return lambda request: [*faults, *SCRIPT][request.number]


def chats(outcome):
    return [node for node in outcome.trace.spans if node.name.startswith(semconv.CHAT + " ")]


def events(node, name):
    return [dict(event.attributes) for event in node.events if event.name == name]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind}{fault.status}")
def test_a_run_gets_over_what_passes_and_its_span_tells_of_it(fault):
    outcome, requests = run(resilient, faulty(fault))
    assert (outcome.stop_reason, requests) == ("done", [3, 3])
    first, second = chats(outcome)
    (retry,) = events(first, semconv.EVENT_RETRY)
    assert retry[semconv.ATTEMPT] == 1
    assert events(second, semconv.EVENT_RETRY) == []


def test_a_run_ends_with_what_does_not_pass():
    outcome = both(lambda is_async: scripted(is_async, resilient(named(SCRIPTED[is_async], "a", REFUSED))))
    assert outcome.stop_reason == "llm_error"
    (chat_span,) = chats(outcome)
    assert (chat_span.attributes[semconv.ERROR_TYPE], events(chat_span, semconv.EVENT_RETRY)) == ("auth", [])


def test_a_run_that_asks_in_vain_stops_after_the_retries():
    def make(is_async):
        return scripted(is_async, resilient(named(SCRIPTED[is_async], "a", *[OVERLOADED] * 9), retries=2))

    outcome = both(make)
    assert outcome.stop_reason == "llm_error"
    (chat_span,) = chats(outcome)
    assert [e[semconv.ATTEMPT] for e in events(chat_span, semconv.EVENT_RETRY)] == [1, 2]
    assert chat_span.attributes[semconv.ERROR_TYPE] == "overloaded"


def scripted(is_async, llm, **more):
    return {"llm": llm, "task": {"goal": "g"}, "tools": make_tools(), **more}


def test_another_model_is_another_span():
    def make(is_async):
        first = named(SCRIPTED[is_async], "a", OVERLOADED, OVERLOADED, ("add", {"a": 1, "b": 2}))
        second = named(SCRIPTED[is_async], "b", ("look", {"name": "x"}), ("done", {"answer": "3"}))
        return scripted(is_async, resilient(first, retries=1, fallbacks=[second]))

    outcome = both(make)
    assert [(node.name, node.attributes.get(semconv.ERROR_TYPE)) for node in chats(outcome)] == [
        ("chat a", "overloaded"),
        ("chat b", None),
        ("chat a", None),
        ("chat a", "LLMResponsesExhausted"),
    ]
    assert [step.tool_call.tool for step in outcome.steps] == ["look", "add", "__llm_error__"]


def test_a_request_that_is_too_long_is_not_sent_to_another_model():
    asked = []

    def make(is_async):
        first = named(SCRIPTED[is_async], "a", ContextOverflow("too long"))
        asked.append(named(SCRIPTED[is_async], "b", ("done", {"answer": "3"})))
        return scripted(is_async, resilient(first, fallbacks=[asked[-1]]))

    assert both(make).stop_reason == "llm_error"
    assert [llm.requests for llm in asked] == [[], []]


def kinds_of(heard):
    """Return the chat events and deltas of a run, by name."""
    names = [type(event).__name__.removesuffix("Event") for event in heard]
    return [name for name in names if name.startswith("Chat") or name.endswith("Delta")]


FINISHED = Reply(tool_calls=(ToolCall("done", {"answer": "x"}),), usage=Usage(3, 2))


@pytest.mark.parametrize(
    ("script", "heard"),
    [([CUT], []), ([A, CUT], ["TextDelta"]), ([], [])],
    ids=["before the first piece", "after a piece", "without a reply"],
)
def test_in_a_run_a_stream_that_breaks_off_is_opened_again_and_the_run_says_so(script, heard):
    events_heard = []

    def make(is_async):
        events_heard.append([])
        llm = resilient(STREAMS[is_async](script, [A, B, FINISHED]))
        return scripted(is_async, llm, stream=events_heard[-1].append)

    outcome = both(make)
    assert outcome.stop_reason == "done"
    again = ["ChatStart", *heard, "ChatRetry", "TextDelta", "TextDelta", "ChatEnd"]
    assert [kinds_of(events) for events in events_heard] == [again, again]
    assert [e[semconv.ERROR_TYPE] for e in events(chats(outcome)[0], semconv.EVENT_RETRY)] == ["stream_cut"]


class Hangs:
    """Hangs when it is asked for the first time, however it is asked, and finishes the task from then on."""

    model = "h"

    def __init__(self, until):
        self.until, self.asked = until, 0

    def chat(self, messages, **settings):
        self.asked += 1
        if self.asked == 1:
            self.until.wait(30)
        return FINISHED

    def stream(self, messages, **settings):
        yield self.chat(messages)


class AsyncHangs(Hangs):
    async def chat(self, messages, **settings):
        self.asked += 1
        if self.asked == 1:
            await asyncio.sleep(30)
        return FINISHED

    async def stream(self, messages, **settings):
        yield await self.chat(messages)


class Impatient:
    """Rules by which the first attempt alone has a time-out: no machine is too slow for the second."""

    deadline_s = None

    def __init__(self):
        self.seconds = 0.02

    @property
    def timeout_s(self):
        return self.seconds

    def delay_s(self, attempt, error, elapsed_s):
        self.seconds = None
        return 0.0


@pytest.mark.parametrize("stream", [None, lambda event: None], ids=["whole", "streamed"])
@pytest.mark.parametrize("kinds", [(Hangs, AsyncHangs), (Hangs, Hangs)], ids=["", "sync under async for"])
def test_a_run_gives_up_an_attempt_that_hangs_and_makes_another(kinds, stream):
    until, asked = threading.Event(), []

    def make(is_async):
        asked.append(resilient(kinds[is_async](until)))
        asked[-1].rules = Impatient()
        return scripted(is_async, asked[-1], stream=stream)

    outcome = both(make)
    until.set()
    assert (outcome.stop_reason, [llm.asked for llm in asked]) == ("done", [2, 2])
    assert [e[semconv.ERROR_TYPE] for e in events(chats(outcome)[0], semconv.EVENT_RETRY)] == ["timeout"]


def test_cancelling_a_run_ends_its_wait():
    busy = BackendError("later", kind="rate_limit", retryable=True, retry_after_s=3600.0)

    def make(is_async):
        token = CancelToken()

        def cancel_from_elsewhere(event):
            if type(event).__name__ == "ChatRetryEvent":
                threading.Thread(target=token.cancel).start()

        config = LoopConfig(cancel_token=token)
        return scripted(
            is_async, resilient(named(SCRIPTED[is_async], "a", busy)), config=config, stream=cancel_from_elsewhere
        )

    assert both(make).stop_reason == "cancelled"


def test_a_fallback_is_told_where_the_turn_is():
    def make(is_async):
        first, second = (
            named(SCRIPTED[is_async], "a", REFUSED),
            named(SCRIPTED[is_async], "b", ("done", {"answer": "x"})),
        )
        return scripted(is_async, resilient(first, fallbacks=[second]))

    (turn,) = [node for node in both(make).trace.spans if node.name == semconv.TURN]
    assert [e[semconv.ERROR_TYPE] for e in events(turn, semconv.EVENT_FALLBACK)] == ["auth"]


def test_what_failed_attempts_were_charged_is_in_the_sum():
    charged = BackendError("cut", kind="stream_cut", retryable=True, usage=Usage(7, 1))
    routers = []

    def make(is_async):
        reply = Reply(tool_calls=(), text='{"tool": "done", "args": {"answer": "x"}}', usage=Usage(10, 5))
        routers.append(BackendRouter(resilient(named(SCRIPTED[is_async], "a", charged, reply))))
        return scripted(is_async, routers[-1])

    outcome = both(make)
    (chat_span,) = chats(outcome)
    assert chat_span.attributes[semconv.INPUT_TOKENS] == 17
    assert outcome.steps[0].usage.total_tokens == 23
    assert [router.total_input_tokens + router.total_output_tokens for router in routers] == [23, 23]


@pytest.mark.parametrize("wraps", ["around", "inside", "fallback", "routed"])
def test_a_sink_records_the_run_wherever_it_is(wraps, tmp_path):
    from looplet import Trace, composable_loop

    inner, other = named(ScriptedBackend, "a", OVERLOADED, ("done", {"answer": "x"})), named(ScriptedBackend, "b")
    sink = ProvenanceSink(tmp_path)
    llm = {
        "around": lambda: sink.wrap_llm(resilient(inner)),
        "inside": lambda: resilient(sink.wrap_llm(inner)),
        "fallback": lambda: resilient(inner, fallbacks=[sink.wrap_llm(other)]),
        "routed": lambda: resilient(BackendRouter(inner, judge=sink.wrap_llm(other))),
    }[wraps]()
    steps = list(composable_loop(llm=llm, task={"goal": "g"}, tools=make_tools(), config=LoopConfig()))
    assert [step.tool_call.tool for step in steps] == ["done"]
    spans = Trace.load(tmp_path).spans
    assert [span.name for span in spans if span.name.startswith("chat ")] == ["chat a"]


def test_an_answer_over_a_socket_is_counted_where_it_was_given():
    def policy(request):
        return [Fault.overloaded(), Answer(tool_calls=[("done", {"answer": "x"})], usage=Usage(100, 10))][
            request.number
        ]

    routers = []

    def wrap(llm):
        routers.append(BackendRouter(resilient(llm)))
        return routers[-1]

    outcome, _ = run(wrap, policy)
    assert [(r.total_calls, r.total_input_tokens, r.by_purpose["agent"].calls) for r in routers] == [(1, 100, 1)] * 2
    assert sum(step.usage.input_tokens for step in outcome.steps) == 100

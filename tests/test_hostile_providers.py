"""Servers that answer with nonsense: a clear error or the right numbers, every span ended, and books that agree."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from provider_support import HELLO, Closing, canned
from support import both, make_tools

from looplet import (
    AnthropicBackend,
    AsyncAnthropicBackend,
    AsyncOpenAIBackend,
    BackendError,
    BackendRouter,
    Delta,
    LoopConfig,
    LoopletError,
    OpenAIBackend,
    Price,
    Reply,
    ResilientBackend,
    ToolCall,
    Usage,
)
from looplet.backends.adapter import Model
from looplet.backends.resilient import Backoff
from looplet.boundary import Boundary
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

KINDS = (OpenAIBackend, AsyncOpenAIBackend)
TEN = {"prompt_tokens": 10, "completion_tokens": 5}


# --- a server that writes bytes -------------------------------------------------------------------------------------


@contextmanager
def writing(write):
    """Serve any number of requests, each with what `write(connection, is_over)` writes before the connection closes."""
    is_over = threading.Event()
    threads = []

    def serve(connection):
        with connection, suppress(OSError):
            connection.settimeout(20)
            _read_request(connection)
            write(connection, is_over)

    def accept():
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            is_over.set()
            listener.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def _read_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536) or b"\r\n\r\n"
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().splitlines() if b"content-length:" in line), 0)
    while len(body) < length and (more := connection.recv(65536)):
        body += more


def response(body: bytes, *headers: str, length: int | None = None, kind: str = "application/json") -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {kind}", *headers, "Connection: close"]
    if length != -1:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(usage: Any = TEN, model: str = "m") -> dict[str, Any]:
    function = {"name": "done", "arguments": '{"answer": "3"}'}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
    return {"id": "x", "model": model, "choices": [choice], "usage": usage}


BODY = json.dumps(completion()).encode()
PACKED = gzip.compress(BODY, mtime=0)
GZIP = "Content-Encoding: gzip"


def run_over(write, *, kinds=KINDS, stream=None, wrap=lambda llm: llm, **backend):
    """Run against the server, sync and async; return the outcome and the routers that kept count."""
    routers = []
    with writing(write) as url:

        def make(*, is_async):
            llm = kinds[is_async](base_url=url, model="m", max_retries=0, **backend)
            routers.append(BackendRouter(wrap(llm)))
            given = {"task": {}, "tools": make_tools(), "config": LoopConfig(parse_recovery=0)}
            return {**given, "llm": routers[-1], "stream": stream, "hooks": [Closing(is_async)]}

        outcome = both(make)
    return outcome, routers


def books(outcome, routers):
    """Return what the span, the steps, the run and the routers say was used; require that they say the same."""
    (chat,) = outcome.trace.find("chat *")
    (root,) = outcome.trace.roots
    assert outcome.trace.problems == []
    assert not any(node.synthetic for node in outcome.trace.spans)
    told = chat.attributes.get(semconv.INPUT_TOKENS), chat.attributes.get(semconv.OUTPUT_TOKENS)
    used = (told[0] or 0, told[1] or 0)
    assert (root.attributes[semconv.RUN_INPUT_TOKENS], root.attributes[semconv.RUN_OUTPUT_TOKENS]) == used
    for router in routers:
        assert (router.total_input_tokens, router.total_output_tokens) == used
    if outcome.steps:
        usage = outcome.steps[0].usage
        assert (usage.input_tokens, usage.output_tokens) == used
    return told


def refusal(raw):
    """Return the error that a server which writes this is."""
    with (
        writing(lambda connection, over: connection.sendall(raw)) as url,
        OpenAIBackend(base_url=url, model="m", max_retries=0) as llm,
        pytest.raises(BackendError) as caught,
    ):
        llm.chat(HELLO)
    return caught.value


# --- answers that are none ------------------------------------------------------------------------------------------

BROKEN = {
    "shorter than it says": (response(BODY, length=len(BODY) + 50), "network"),
    "longer than it says": (response(BODY, length=len(BODY) - 20), "bad_response"),
    "of negative length": (response(BODY, "Content-Length: -5", length=-1), "network"),
    "packed and not gzip": (response(BODY, GZIP), "bad_response"),
    "packed and cut": (response(PACKED[:-12], GZIP), "bad_response"),
    "packed and damaged": (response(PACKED[:20] + b"\x00\xff\x00" + PACKED[23:], GZIP), "bad_response"),
    "a page": (response(b"<html>log in</html>", kind="text/html"), "bad_response"),
    "a page that says it is JSON": (response(b"<html>log in</html>"), "bad_response"),
    "empty": (response(b""), "bad_response"),
    "nothing at all": (b"", "network"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", "network"),
    "too deep": (response(b"[" * 100_000 + b"]" * 100_000), "bad_response"),
    "not UTF-8": (response(BODY.replace(b"done", b"d\xe9\xffe")), "bad_response"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_answer_is_an_error_of_its_kind(case):
    raw, kind = BROKEN[case]
    outcome, routers = run_over(lambda connection, over: connection.sendall(raw))
    (chat,) = outcome.trace.find("chat *")
    assert (outcome.stop_reason, chat.attributes[semconv.ERROR_TYPE]) == ("llm_error", kind)
    assert books(outcome, routers) == (None, None)


def test_an_answer_that_cannot_be_unpacked_says_so_and_may_be_asked_for_again():
    error = refusal(BROKEN["packed and not gzip"][0])
    assert error.retryable
    assert "cannot be unpacked" in str(error)


def trickle(connection, over):
    """Write an answer that never ends, slowly, and never so slowly that one byte is late."""
    connection.sendall(response(b"", length=10_000_000))
    while not over.wait(0.01):
        connection.sendall(b" ")


def trickle_events(connection, over):
    connection.sendall(response(b"", length=-1, kind="text/event-stream"))
    while not over.wait(0.01):
        connection.sendall(b": still here\n\n")


@pytest.mark.parametrize(
    ("write", "stream"), [(trickle, None), (trickle_events, lambda event: None)], ids=["whole", "streamed"]
)
def test_an_answer_that_trickles_in_for_ever_is_over_when_its_time_is(write, stream):
    outcome, routers = run_over(write, stream=stream, wrap=lambda llm: ResilientBackend(llm, retries=0, timeout_s=0.1))
    (chat,) = outcome.trace.find("chat *")
    assert (outcome.stop_reason, chat.attributes[semconv.ERROR_TYPE]) == ("llm_error", "timeout")
    assert books(outcome, routers) == (None, None)


# --- usage ----------------------------------------------------------------------------------------------------------

NOBODY_KNOWS = (None, None)
USAGES = {
    "null": (None, NOBODY_KNOWS),
    "a text": ("10", NOBODY_KNOWS),
    "a list": ([10, 5], NOBODY_KNOWS),
    "empty": ({}, NOBODY_KNOWS),
    "negative": ({**TEN, "prompt_tokens": -10}, NOBODY_KNOWS),
    "huge": ({**TEN, "prompt_tokens": 10**30}, NOBODY_KNOWS),
    "a fraction": ({**TEN, "prompt_tokens": 10.5}, NOBODY_KNOWS),
    "in words": ({**TEN, "completion_tokens": "5"}, NOBODY_KNOWS),
    "true": ({**TEN, "completion_tokens": True}, NOBODY_KNOWS),
    "not a number": ({**TEN, "completion_tokens": float("nan")}, NOBODY_KNOWS),
    "without end": ({**TEN, "completion_tokens": float("inf")}, NOBODY_KNOWS),
    "floats": ({"prompt_tokens": 10.0, "completion_tokens": 5.0}, (10, 5)),
    "one side": ({"prompt_tokens": 10, "completion_tokens": None}, (10, 0)),
    "odd details": ({**TEN, "prompt_tokens_details": "x", "completion_tokens_details": [1]}, (10, 5)),
    "negative details": ({**TEN, "prompt_tokens_details": {"cached_tokens": -3}}, (10, 5)),
    "more cached than sent": ({**TEN, "prompt_tokens_details": {"cached_tokens": 50}}, (10, 5)),
}


@pytest.mark.parametrize("case", USAGES)
def test_made_up_usage_is_no_usage_and_never_0(case):
    usage, counts = USAGES[case]
    raw = response(json.dumps(completion(usage)).encode())
    outcome, routers = run_over(lambda connection, over: connection.sendall(raw))
    (chat,) = outcome.trace.find("chat *")
    assert books(outcome, routers) == counts
    assert chat.attributes.get(semconv.USAGE_REPORTED, True) is (counts != NOBODY_KNOWS)
    assert [router.unreported_calls for router in routers] == [counts == NOBODY_KNOWS] * 2


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"input_tokens": -1, "output_tokens": 5}, None),
        ({"input_tokens": 10.0, "output_tokens": 5, "cache_read_input_tokens": None}, Usage(10, 5)),
        ({"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": -4}, Usage(10, 5)),
        ({"input_tokens": 10, "output_tokens": 10**30}, None),
    ],
)
@pytest.mark.parametrize("kind", [AnthropicBackend, AsyncAnthropicBackend])
def test_the_other_format_does_the_same(kind, usage, counts):
    import asyncio

    content = [{"type": "text", "text": "hello"}]
    message = {"type": "message", "role": "assistant", "model": "m", "content": content, "usage": usage}
    with canned(message) as url:
        llm = kind(base_url=url.removesuffix("/v1"), model="m", max_retries=0)
        if kind is AnthropicBackend:
            with llm:
                assert llm.chat(HELLO).usage == counts
            return

        async def main():
            async with llm:
                assert (await llm.chat(HELLO)).usage == counts

        asyncio.run(main())


def events(*told: Any) -> bytes:
    said = b"".join(b"data: %s\n\n" % (one if isinstance(one, bytes) else json.dumps(one).encode()) for one in told)
    return response(said, length=-1, kind="text/event-stream")


def chunk(*, finish=None, call=False, **more):
    function = {"name": "done", "arguments": '{"answer": "3"}'}
    calls = {"tool_calls": [{"index": 0, "id": "c1", "function": function}]} if call else {}
    return {"id": "x", "model": "m", "choices": [{"index": 0, "delta": calls, "finish_reason": finish}], **more}


CALL, END = chunk(call=True), chunk(finish="tool_calls")
STREAMS = {
    "without usage": (events(CALL, END, b"[DONE]"), NOBODY_KNOWS),
    "usage in every piece": (
        events({**CALL, "usage": {"prompt_tokens": 10, "completion_tokens": 1}}, {**END, "usage": TEN}, b"[DONE]"),
        (10, 5),
    ),
    "usage twice": (events(CALL, {**END, "usage": TEN}, {"choices": [], "usage": TEN}, b"[DONE]"), (10, 5)),
    "usage, then null": (events(CALL, {**END, "usage": TEN}, {"choices": [], "usage": None}, b"[DONE]"), (10, 5)),
    "usage without choices": (events(CALL, END, {"choices": None, "usage": TEN}, b"[DONE]"), (10, 5)),
    "negative usage": (events(CALL, {**END, "usage": {**TEN, "prompt_tokens": -1}}, b"[DONE]"), NOBODY_KNOWS),
    "other things in between": (events(CALL, b"5", b"null", b"[]", b'"x"', {**END, "usage": TEN}, b"[DONE]"), (10, 5)),
    "no last word": (events(CALL, {**END, "usage": TEN}), (10, 5)),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_streams_usage_is_its_last_word(case):
    raw, counts = STREAMS[case]
    outcome, routers = run_over(lambda connection, over: connection.sendall(raw), stream=lambda event: None)
    assert outcome.stop_reason == "done"
    assert books(outcome, routers) == counts


# --- who answered ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["m-2026-01-01", "", None, 7, "x" * 100_000])
@pytest.mark.parametrize("price", [None, Price(1, 1)])
def test_whoever_says_that_he_answered_the_numbers_are_right(said, price):
    raw = response(json.dumps(completion(model=said)).encode())
    outcome, routers = run_over(lambda connection, over: connection.sendall(raw), price=price)
    (chat,) = outcome.trace.find("chat *")
    assert books(outcome, routers) == (10, 5)
    assert chat.attributes[semconv.REQUEST_MODEL] == "m"
    assert [list(router.by_model) for router in routers] == [["m"]] * 2
    cost = None if price is None else pytest.approx(0.000015)
    assert [router.total_cost_usd for router in routers] == [cost] * 2


# --- Retry-After ----------------------------------------------------------------------------------------------------

BUSY = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: %s\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


@pytest.mark.parametrize(
    ("asked", "wait"),
    [
        (b"-5", 0.0),
        (b"0", 0.0),
        (b"7.5", 7.5),
        (b"Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        (b"soon", None),
        (b"nan", None),
        (b"inf", None),
        (b"1e400", None),
        (b"99999999999", 99999999999.0),
    ],
)
def test_any_retry_after_is_a_number_of_seconds_or_none(asked, wait):
    error = refusal(BUSY % asked)
    assert (error.kind, error.retry_after_s) == ("rate_limit", wait)


@pytest.mark.parametrize("asked", [b"99999999999", b"Wed, 21 Oct 2099 07:28:00 GMT", b"3601"])
def test_nobody_waits_longer_than_an_hour_and_the_next_one_is_asked(asked):
    def make(*, is_async):
        busy = KINDS[is_async](base_url=url, model="m", max_retries=0)
        reply = Reply(tool_calls=(ToolCall("done", {"answer": ""}),))
        other = (ScriptedBackend, AsyncScriptedBackend)[is_async]([reply])
        llm = ResilientBackend(busy, retries=3, base_delay_s=0, fallbacks=[other])
        return {"llm": llm, "task": {}, "tools": make_tools(), "hooks": [Closing(is_async)]}

    with writing(lambda connection, over: connection.sendall(BUSY % asked)) as url:
        outcome = both(make)
    assert outcome.stop_reason == "done"
    asked_first, _ = outcome.trace.find("chat *")
    assert (asked_first.attributes[semconv.ERROR_TYPE], [event.name for event in asked_first.events]) == (
        "rate_limit",
        ["exception"],
    )


def test_an_hour_is_waited_for_and_the_error_says_when_it_would_be_more():
    rules = Backoff(retries=3)
    late = [BackendError("busy", retryable=True, retry_after_s=seconds) for seconds in (3600.0, 3600.5)]
    assert [rules.delay_s(1, error, 0) for error in late] == [3600.0, None]
    llm = ResilientBackend(ScriptedBackend([late[1]]))
    with pytest.raises(BackendError) as caught:
        llm.chat(HELLO)
    assert caught.value.__notes__ == ["the provider asked to wait 3600.5 s, which is more than an hour"]


# --- a backend of one's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        ({"input_tokens": 5}, "must be a looplet.Usage"),
        (Usage(None, 5), "each count must be a whole number from 0"),
        (Usage(1.5, 5), "each count must be a whole number from 0"),
        (Usage(5, -1), "each count must be a whole number from 0"),
        (Usage(5, 1, cached_tokens="3"), "each count must be a whole number from 0"),
        (Usage(10**30, 1), "each count must be a whole number from 0"),
        (Usage(True, 1), "each count must be a whole number from 0"),
        (Usage(1, 1, cost_usd=float("nan")), "cost_usd must be a number from 0"),
        (Usage(1, 1, cost_usd=-0.5), "cost_usd must be a number from 0"),
        (Usage(1, 1, cost_usd="0.5"), "cost_usd must be a number from 0"),
    ],
)
def test_usage_that_cannot_be_counted_is_an_error_that_says_what_to_write(usage, words):
    reply = Reply("hello", usage=usage)
    outcome = both(lambda *, is_async: {
        "llm": (ScriptedBackend, AsyncScriptedBackend)[is_async]([reply]), "task": {}, "tools": make_tools(),
    })  # fmt: skip
    (chat,) = outcome.trace.find("chat *")
    assert (outcome.stop_reason, chat.attributes[semconv.ERROR_TYPE]) == ("llm_error", "LoopletError")
    assert outcome.trace.problems == []
    model = Model(ScriptedBackend([]), LoopConfig(), sync=True)
    with pytest.raises(LoopletError, match=rf"chat\(\) returned a Reply with usage=.*{words}, and usage None where"):
        model.reply(reply, Boundary())


class Streaming(ScriptedBackend):
    """Streams what it was given."""

    def stream(self, messages, **settings):
        yield from self.replies


class AsyncStreaming(AsyncScriptedBackend):
    async def stream(self, messages, **settings):
        for item in self.replies:
            yield item


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["hello"], "yielded a str; it yields Deltas"),
        ([{"kind": "text", "text": "hello"}], "yielded a dict; it yields Deltas"),
        ([None], "yielded a NoneType; it yields Deltas"),
        ([Delta("text", "hel"), Delta("tool", "{}")], "yielded a Delta of the kind 'tool'; it yields Deltas"),
    ],
)
def test_a_stream_of_something_else_is_an_error_that_says_what_to_yield(items, words):
    outcome = both(lambda *, is_async: {
        "llm": (Streaming, AsyncStreaming)[is_async]([*items, Reply("hello")]),
        "task": {}, "tools": make_tools(), "stream": lambda event: None,
    })  # fmt: skip
    (chat,) = outcome.trace.find("chat *")
    assert (outcome.stop_reason, chat.attributes[semconv.ERROR_TYPE]) == ("llm_error", "LoopletError")
    (error,) = [event for event in chat.events if event.name == "exception"]
    assert words in error.attributes["exception.message"]
    assert "(text, reasoning, tool_call), then a Reply" in error.attributes["exception.message"]

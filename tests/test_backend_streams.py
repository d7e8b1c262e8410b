"""Streams of the provider backends: the same `Reply` as in one piece, whatever happens on the way."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import set_span_in_context
from provider_support import HELLO, canned

from looplet import (
    AnthropicBackend,
    AsyncAnthropicBackend,
    AsyncOpenAIBackend,
    BackendError,
    ConfigError,
    ContextOverflow,
    OpenAIBackend,
    Reply,
    ToolCall,
    Usage,
)
from looplet.backends import completions, messages_api
from looplet.backends.streams import CompletionAssembly, MessageAssembly
from looplet.boundary import Boundary
from looplet.telemetry.recorder import Recorder, Resource, Scope
from looplet.testing import Answer, AnthropicServer, ChatRequest, Fault, OpenAIServer, _anthropic_wire, _wire
from looplet.types import Delta


@dataclass(frozen=True)
class Provider:
    server: type
    backend: type
    async_backend: type
    stream: Callable[[Any], bytes]
    """an answer in one piece → the same as server-sent events"""


def completion_events(completion: dict[str, Any]) -> bytes:
    request = ChatRequest("m", [], [], {"stream_options": {"include_usage": True}}, 0)
    return b"".join(_wire._events(request, json.loads(json.dumps(completion))))


def message_events(message: dict[str, Any]) -> bytes:
    return b"".join(map(_anthropic_wire._event, _anthropic_wire._events(message)))


OPENAI = Provider(OpenAIServer, OpenAIBackend, AsyncOpenAIBackend, completion_events)
ANTHROPIC = Provider(AnthropicServer, AnthropicBackend, AsyncAnthropicBackend, message_events)
providers = pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
sync_and_async = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def make(provider: Provider, url: str, is_async: bool, **settings: Any) -> Any:
    kind = provider.async_backend if is_async else provider.backend
    return kind(**{"base_url": url, "model": "m", "max_retries": 0, **settings})


def items_of(llm: Any, items: list[Any], times: int = 1, messages=HELLO, **settings: Any) -> list[Any]:
    """Stream, keep what comes in `items`, also where it ends with an error, and close the backend."""

    async def main() -> None:
        async with llm:
            for _ in range(times):
                async for item in llm.stream(messages, **settings):
                    items.append(item)

    if hasattr(llm, "aclose"):
        asyncio.run(main())
    else:
        with llm:
            for _ in range(times):
                items += llm.stream(messages, **settings)
    return items


def broken(llm: Any) -> tuple[BackendError, list[Any]]:
    items: list[Any] = []
    with pytest.raises(BackendError) as caught:
        items_of(llm, items)
    return caught.value, items


def chatted(llm: Any) -> Reply:
    async def main() -> Reply:
        async with llm:
            return await llm.chat(HELLO)

    if hasattr(llm, "aclose"):
        return asyncio.run(main())
    with llm:
        return llm.chat(HELLO)


def gathered(items: list[Any]) -> tuple[Any, ...]:
    """Return what the deltas add up to: text, reasoning, and (id, tool, arguments) of each call."""
    *deltas, _ = items
    said = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("text", "reasoning")}
    calls: list[list[str]] = []
    for delta in deltas:
        if delta.kind != "tool_call":
            continue
        if delta.index == len(calls):
            calls.append([delta.call_id, delta.tool, ""])
        else:
            assert (delta.call_id, delta.tool) == ("", "")
        calls[delta.index][2] += delta.text
    return said["text"], said["reasoning"], calls


def told(reply: Reply) -> tuple[Any, ...]:
    return reply.text, reply.reasoning, [[call.call_id, call.tool, call.args] for call in reply.tool_calls]


def parsed(summed: tuple[Any, ...]) -> tuple[Any, ...]:
    text, reasoning, calls = summed
    return text, reasoning, [[call_id, tool, json.loads(args or "{}")] for call_id, tool, args in calls]


def sse(*events: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    """Return chunks of the Chat Completions API as a stream."""
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + end


def chunk(finish_reason: str | None = None, /, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "r", "object": "chat.completion.chunk", "model": "m1", "choices": [choice]}


def block_events(*events: dict[str, Any]) -> bytes:
    start = {"type": "message_start", "message": {"id": "r", "model": "m1", "content": [], "usage": COUNTED}}
    return b"".join(map(_anthropic_wire._event, (start, *events)))


COUNTED = {"input_tokens": 9, "output_tokens": 1}
EVENT_STREAM = {"kind": "text/event-stream"}

# --- the same reply -------------------------------------------------------------------------------------------------

ANSWERS = {
    "text": "a longer text, in pieces",
    "lines": "line\u2028separator \x85 and 🙂\n\n",
    "one character": "x",
    "calls": [
        ("search", {"query": "loops 🙂", "deep": {"n": [1, 2.5, None]}}),
        ("done", {}),
        ("search", {"query": ""}),
    ],
    "text and calls": Answer("I look.", [("look", {"name": "x"})], id="resp-7", model="m-2026-01"),
    "thoughts": Answer("So.", [("look", {"name": "x"})], thinking=["Hm, hm.", "Aha!"]),
    "usage": Answer("hi", usage=Usage(100, 20, 40, 7)),
    "no usage": Answer("hi", usage=()),
    "cut arguments": Answer("", [("add", '{"a": 1, ')], finish_reason="length"),
    "arguments that are no object": Answer("", [("add", '["a"]')]),
}


@providers
@sync_and_async
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=list(ANSWERS))
def test_the_reply_of_a_stream_is_that_of_chat(provider, is_async, answer):
    with provider.server(policy=[answer]) as one, provider.server(policy=[answer]) as two:
        reply = chatted(make(provider, one.base_url, is_async))
        items = items_of(make(provider, two.base_url, is_async), [])
    assert items[-1] == reply
    assert all(type(item) is Delta for item in items[:-1])
    if not any("_raw_arguments" in call.args for call in reply.tool_calls):
        assert parsed(gathered(items)) == told(reply)


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        (OPENAI, Answer("and so", finish_reason="length")),
        (OPENAI, Answer("", finish_reason="content_filter")),
        (ANTHROPIC, Answer("and so", finish_reason="max_tokens")),
        (ANTHROPIC, Answer("", finish_reason="refusal")),
        (ANTHROPIC, Answer("a", [("look", {})], thinking=["Hm.", b"hidden", "Aha!"])),
        (ANTHROPIC, Answer("a", usage=Usage(100, 20, 40, 7, cache_write_tokens=30))),
    ],
)
@sync_and_async
def test_ends_seals_and_caches_are_told_in_a_stream_too(provider, answer, is_async):
    with provider.server(policy=[answer]) as one, provider.server(policy=[answer]) as two:
        reply = chatted(make(provider, one.base_url, is_async))
        assert items_of(make(provider, two.base_url, is_async), [])[-1] == reply
    said = {"length": "length", "max_tokens": "length", "content_filter": "content_filter", "refusal": "content_filter"}
    assert reply.finish_reason == said.get(answer.finish_reason, "tool_call" if answer.tool_calls else "stop")
    assert [part.get("signature", part.get("encrypted")) for part in reply.parts[:3]].count(None) == 0


def completion(message: dict[str, Any], reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **message}, "finish_reason": reason}
    return {"id": "r1", "object": "chat.completion", "model": "m1", "choices": [choice]}


def message(*content: Any, **more: Any) -> dict[str, Any]:
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    return {"id": "r1", "type": "message", "role": "assistant", "model": "m1", "content": [*content], **ended, **more}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def thought(said: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": said, "signature": f"sealed {said}"}


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        (OPENAI, completion({"content": "a", "reasoning_content": "hm"})),
        (ANTHROPIC, message(text("a "), text("cited"), thought("x"), text("b"), thought("y"), thought("z"), text("c"))),
        (ANTHROPIC, message({"type": "server_tool_use", "id": "s", "name": "web", "input": {}}, text("a"))),
        (ANTHROPIC, message(thought(""), thought("only this"), text(""))),
        (ANTHROPIC, message(text("a"), usage={**COUNTED, "cache_creation": {"ephemeral_1h_input_tokens": 5}})),
    ],
)
@sync_and_async
def test_answers_of_all_shapes_are_put_together_as_they_were(provider, answer, is_async):
    with canned(answer) as one, canned(provider.stream(answer), **EVENT_STREAM) as two:
        reply = chatted(make(provider, one, is_async))
        items = items_of(make(provider, two, is_async), [])
    assert items[-1] == reply
    assert parsed(gathered(items)) == told(reply)


@sync_and_async
def test_a_refusal_is_the_text_and_known_as_one(is_async):
    pieces = [chunk(role="assistant", content=None), chunk(refusal="I will "), chunk(refusal="not."), chunk("stop")]
    with canned(completion({"refusal": "I will not."})) as one, canned(sse(*pieces), **EVENT_STREAM) as two:
        reply = chatted(make(OPENAI, one, is_async))
        items = items_of(make(OPENAI, two, is_async), [])
    assert (reply.text, reply.metadata) == ("I will not.", {"refusal": "I will not."})
    assert (items[-1].text, items[-1].metadata) == (reply.text, reply.metadata)
    assert [item.text for item in items[:-1]] == ["I will ", "not."]


@sync_and_async
def test_why_a_model_refused_is_told_at_the_end_of_its_stream(is_async):
    details = {"type": "refusal", "explanation": "not that"}
    ending = {"stop_reason": "refusal", "stop_details": details}
    events = block_events({"type": "message_delta", "delta": ending, "usage": {}}, {"type": "message_stop"})
    with canned(message(**ending, usage=COUNTED)) as one, canned(events, **EVENT_STREAM) as two:
        reply = chatted(make(ANTHROPIC, one, is_async))
        streamed = items_of(make(ANTHROPIC, two, is_async), [])[-1]
    assert reply.metadata == streamed.metadata == {"refusal": "not that"}
    assert (reply.finish_reason, streamed.finish_reason) == ("content_filter", "content_filter")


ARGUMENTS = st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=9), max_size=3)
SAID = st.builds(
    Answer,
    text=st.text(max_size=30),
    tool_calls=st.lists(st.tuples(st.sampled_from(["look", "add"]), ARGUMENTS), max_size=3),
    thinking=st.lists(st.text(max_size=9), max_size=3),
    usage=st.none() | st.just(()) | st.just(Usage(9, 4, 3, 2)),
)
ASKED = ChatRequest("m", [{"role": "user", "content": "hi"}], [], {"stream_options": {"include_usage": True}}, 0)


@given(SAID)
def test_any_answer_survives_being_cut_into_chunks(answer):
    whole = _wire._completion(ASKED, answer)
    assembly = CompletionAssembly()
    chunks = completion_events(whole).removesuffix(b"data: [DONE]\n\n").split(b"\n\n")[:-1]
    deltas = [d for c in chunks for d in assembly.add(json.loads(c.removeprefix(b"data: ")))]
    reply = completions.reply_of(whole)
    assert completions.reply_of(assembly.answer) == reply
    assert assembly.is_whole
    assert parsed(gathered([*deltas, None])) == told(reply)


@given(SAID)
def test_any_answer_survives_being_cut_into_events(answer):
    whole = _anthropic_wire._message(ASKED, answer)
    assembly = MessageAssembly()
    deltas = [d for event in _anthropic_wire._events(whole) for d in assembly.add(event)]
    reply = messages_api.reply_of(whole)
    assert messages_api.reply_of(assembly.answer) == reply
    assert assembly.is_whole
    assert parsed(gathered([*deltas, None])) == told(reply)


# --- servers that only claim the format -----------------------------------------------------------------------------


def call_piece(arguments: Any, index: int | None = 0, **more: Any) -> dict[str, Any]:
    name = more.pop("name", None)
    return {"index": index, **more, "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "pieces",
    [
        [call_piece('{"n":', id="a", name="f"), call_piece("1}"), call_piece('{"n":2}', id="b", name="g")],
        [call_piece('{"n":1}', None, id="a", name="f"), call_piece('{"n":2}', None, id="b", name="g")],
        [
            call_piece('{"n":', id="a", name="f"),
            call_piece('{"n":', 1, id="b", name="g"),
            call_piece("1}", id="a", name="f"),
            call_piece("2}", 1, id="b", name="g"),
        ],
        [call_piece({"n": 1}, id="a", name="f"), call_piece({"n": 2}, 1, id="b", name="g")],
    ],
    ids=["all numbered 0", "not numbered", "interleaved, names repeated", "objects"],
)
def test_calls_are_told_apart_however_a_server_numbers_them(pieces):
    assembly = CompletionAssembly()
    deltas = [delta for piece in pieces for delta in assembly.add(chunk(tool_calls=[piece]))]
    reply = completions.reply_of(assembly.answer)
    assert reply.tool_calls == (ToolCall("f", {"n": 1}, call_id="a"), ToolCall("g", {"n": 2}, call_id="b"))
    assert parsed(gathered([*deltas, None])) == told(reply)


def test_the_last_usage_counts_and_only_the_first_of_several_answers():
    assembly = CompletionAssembly()
    usage = [{"prompt_tokens": 9, "completion_tokens": n} for n in (1, 2)]
    other = {"index": 1, "delta": {"content": "no"}, "finish_reason": "stop"}
    for event in (
        {**chunk(content="yes"), "usage": usage[0]},
        {"choices": [other]},
        {"choices": [], "usage": usage[1]},
    ):
        list(assembly.add(event))
    assert not assembly.is_whole
    reply = completions.reply_of(assembly.answer)
    assert (reply.text, reply.usage, reply.response_id) == ("yes", Usage(9, 2), "r")


# --- what is asked --------------------------------------------------------------------------------------------------


@sync_and_async
def test_usage_is_asked_for(is_async):
    with OpenAIServer(policy=["hi"]) as server:
        items_of(make(OPENAI, server.base_url, is_async), [])
    body = server.requests[0].body
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


def refuse_politely(request: ChatRequest) -> Any:
    if "stream_options" in request.body:
        return Fault.error(422, '[{"loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]')
    return "hi"


@sync_and_async
@pytest.mark.parametrize(
    "settings", [{"policy": ["hi", "ho"], "refusing": ["stream_options"]}, {"policy": refuse_politely}]
)
def test_a_server_that_refuses_to_report_usage_is_asked_without_from_then_on(is_async, settings):
    with OpenAIServer(**settings) as server:
        items = items_of(make(OPENAI, server.base_url, is_async), [], times=2)
    assert ["stream_options" in request.body for request in server.requests] == [True, False, False]
    assert [item.usage for item in items if isinstance(item, Reply)] == [None, None]


@sync_and_async
def test_other_refusals_are_repaired_in_streams_too(is_async):
    with OpenAIServer(policy=["hi"], refusing=["max_tokens"]) as server:
        items = items_of(make(OPENAI, server.base_url, is_async), [], max_tokens=7)
    assert items[-1].text == "hi"
    assert server.requests[-1].body["max_completion_tokens"] == 7


@providers
@sync_and_async
def test_an_error_before_the_stream_is_that_of_chat(provider, is_async):
    with provider.server(policy=[Fault.rate_limited(3), Fault.context_overflow()]) as server:
        error, items = broken(make(provider, server.base_url, is_async))
        with pytest.raises(ContextOverflow):
            items_of(make(provider, server.base_url, is_async), items)
    assert (error.kind, error.status, error.retry_after_s, items) == ("rate_limit", 429, 3.0, [])


@providers
@pytest.mark.parametrize("method", ["chat", "stream"])
def test_stream_is_a_method_and_not_a_setting(provider, method):
    with make(provider, "http://127.0.0.1:9", False) as llm, pytest.raises(ConfigError, match=r"stream\(\)"):
        list(getattr(llm, method)(HELLO, stream=True))


@sync_and_async
def test_an_answer_too_long_to_wait_for_can_be_streamed(is_async):
    with AnthropicServer(policy=["hi"]) as server:
        items = items_of(make(ANTHROPIC, server.base_url, is_async, default_max_tokens=100_000), [])
    assert items[-1].text == "hi"


def test_an_async_backend_streams_in_one_event_loop_after_another():
    async def main(llm: Any) -> str:
        async with llm:
            return "".join([item.text async for item in llm.stream(HELLO) if isinstance(item, Delta)])

    with OpenAIServer(policy=["one", "two"]) as server:
        llm = make(OPENAI, server.base_url, True)
        assert [asyncio.run(main(llm)) for _ in range(2)] == ["one", "two"]


# --- streams that break ---------------------------------------------------------------------------------------------


@providers
@sync_and_async
def test_a_cut_connection_is_a_cut_stream(provider, is_async):
    with provider.server(policy=[Fault.cut("abcdefgh")]) as server:
        error, items = broken(make(provider, server.base_url, is_async))
    assert (error.kind, error.retryable, error.status) == ("stream_cut", True, None)
    assert [item.text for item in items] == (["ab"] if provider is OPENAI else [])


@sync_and_async
def test_what_a_cut_stream_was_charged_is_on_the_error(is_async):
    with AnthropicServer(policy=[Fault.cut(Answer("abc", usage=Usage(50, 9, 20)))]) as server:
        error, _ = broken(make(ANTHROPIC, server.base_url, is_async))
    assert error.usage == Usage(50, 1, 20)


@pytest.mark.parametrize(
    ("provider", "events"),
    [
        (OPENAI, sse(chunk(content="a"))),
        (OPENAI, sse(chunk(content="a"), end=b"")),
        (OPENAI, sse()),
        (OPENAI, b""),
        (ANTHROPIC, block_events({"type": "content_block_start", "index": 0, "content_block": text("a")})),
        (ANTHROPIC, block_events()),
        (ANTHROPIC, b""),
    ],
)
@sync_and_async
def test_a_stream_without_its_end_is_cut(provider, events, is_async):
    with canned(events, **EVENT_STREAM) as url:
        error, items = broken(make(provider, url, is_async))
    assert (error.kind, error.retryable) == ("stream_cut", True)
    assert [item.text for item in items] == (["a"] if b'"a"' in events else [])


@pytest.mark.parametrize(
    ("provider", "said", "expected"),
    [
        (OPENAI, {"message": "Too much", "type": "server_error", "code": None}, ("server_error", True)),
        (OPENAI, {"message": "Slow down", "code": "rate_limit_exceeded"}, ("rate_limit", True)),
        (OPENAI, {"message": "Bad gateway", "code": 502}, ("server_error", True)),
        (OPENAI, {"message": "No credits", "code": "insufficient_quota"}, ("quota", False)),
        (OPENAI, {"message": "odd", "code": 400}, ("bad_request", False)),
        (OPENAI, {"message": "something"}, ("stream_cut", True)),
        (ANTHROPIC, {"type": "overloaded_error", "message": "Overloaded"}, ("overloaded", True)),
        (ANTHROPIC, {"type": "api_error", "message": "Internal"}, ("server_error", True)),
        (ANTHROPIC, {"type": "invalid_request_error", "message": "no"}, ("bad_request", False)),
        (ANTHROPIC, {"type": "made_up", "message": "?"}, ("stream_cut", True)),
    ],
)
@sync_and_async
def test_an_error_in_the_stream_keeps_its_own_kind(provider, said, expected, is_async):
    error = {"type": "error", "error": said}
    begun = sse(chunk(content="a"), error) if provider is OPENAI else block_events() + _anthropic_wire._event(error)
    with canned(begun, **EVENT_STREAM) as url:
        caught, items = broken(make(provider, url, is_async))
    assert (caught.kind, caught.retryable) == expected
    assert said["message"] in str(caught)
    assert len(items) == (provider is OPENAI)


def test_a_request_that_turns_out_too_long_in_the_stream_is_an_overflow():
    said = {"error": {"message": "This model's maximum context length is 9 tokens.", "code": "context_length_exceeded"}}
    with canned(sse(said), **EVENT_STREAM) as url:
        error, _ = broken(make(OPENAI, url, False))
    assert isinstance(error, ContextOverflow)


@providers
@sync_and_async
def test_broken_json_in_a_stream_is_a_bad_response(provider, is_async):
    with provider.server(policy=[Fault.malformed()]) as server:
        error, _ = broken(make(provider, server.base_url, is_async))
    assert (error.kind, error.retryable) == ("bad_response", True)


@providers
@sync_and_async
def test_an_answer_in_one_piece_is_no_stream(provider, is_async):
    with canned({"hello": "there"}) as url:
        error, _ = broken(make(provider, url, is_async))
    assert (error.kind, error.retryable) == ("bad_response", False)
    assert "application/json" in str(error)


# --- connections ----------------------------------------------------------------------------------------------------


@contextmanager
def endless(first: bytes):
    """Serve the beginning of a stream and then nothing; yields the URL, and what is set when the client hangs up."""
    gone = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + first)
            while connection.recv(65536):
                pass
        gone.set()

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", gone
        thread.join(5)


FIRST = {
    OPENAI: sse(chunk(content="a"), end=b""),
    ANTHROPIC: block_events({"type": "content_block_start", "index": 0, "content_block": text("a")}),
}


@providers
def test_closing_the_iterator_hangs_up(provider):
    with endless(FIRST[provider]) as (url, gone), make(provider, url, False) as llm:
        stream = llm.stream(HELLO)
        assert next(stream) == Delta("text", "a")
        assert not gone.is_set()
        stream.close()
        assert gone.wait(5)
    gc.collect()  # what was left open would warn now


@providers
def test_closing_the_async_iterator_hangs_up(provider):
    async def main(url: str, gone: threading.Event) -> None:
        async with make(provider, url, True) as llm:
            stream = llm.stream(HELLO)
            assert await anext(stream) == Delta("text", "a")
            assert not gone.is_set()
            await stream.aclose()
            assert await asyncio.to_thread(gone.wait, 5)

    with endless(FIRST[provider]) as (url, gone):
        asyncio.run(main(url, gone))
    gc.collect()


@providers
def test_a_cancelled_task_hangs_up(provider):
    async def main(url: str, gone: threading.Event) -> None:
        async with make(provider, url, True) as llm:
            begun = asyncio.Event()

            async def read() -> None:
                async for _ in llm.stream(HELLO):
                    begun.set()

            task = asyncio.create_task(read())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(gone.wait, 5)

    with endless(FIRST[provider]) as (url, gone):
        asyncio.run(main(url, gone))
    gc.collect()


@providers
@sync_and_async
def test_a_stream_that_falls_silent_times_out(provider, is_async):
    with endless(FIRST[provider]) as (url, _):
        error, _ = broken(make(provider, url, is_async, timeout_s=0.05))
    assert (error.kind, error.retryable) == ("timeout", True)


# --- telling a call once --------------------------------------------------------------------------------------------


class Watched:
    """A client that notes, whenever it is at work, whether instrumentation is suppressed."""

    def __init__(self, client: openai.OpenAI) -> None:
        self.inner = client
        self.base_url = client.base_url
        self.chat = self.completions = self
        self.seen: list[bool] = []

    def look(self) -> bool:
        return bool(otel_context.get_value("suppress_instrumentation"))

    def create(self, **request: Any) -> Any:
        self.seen.append(self.look())
        self.stream = self.inner.chat.completions.create(**request)
        return self

    def __iter__(self) -> Any:
        for event in self.stream:
            self.seen.append(self.look())
            yield event

    def close(self) -> None:
        self.stream.close()


def test_an_instrumented_client_is_silent_during_the_stream_and_never_in_between():
    recorder = Recorder(
        run_id="r",
        boundary=Boundary(),
        sinks=[],
        tracer=None,
        context=Context(),
        resource=Resource({}),
        scope=Scope("0"),
    )
    with (
        OpenAIServer(policy=["abcd", "abcd"]) as server,
        openai.OpenAI(base_url=server.base_url, api_key="x") as client,
    ):
        watched = Watched(client)
        llm = OpenAIBackend(watched, model="m")
        list(llm.stream(HELLO))
        alone, watched.seen = watched.seen, []
        token = otel_context.attach(set_span_in_context(recorder.start("chat m")))
        try:
            outside = [watched.look() for _ in llm.stream(HELLO)]
        finally:
            otel_context.detach(token)
    assert set(alone) == {False}
    assert set(watched.seen) == {True}
    assert len(watched.seen) > len(outside) > 1
    assert not any(outside)

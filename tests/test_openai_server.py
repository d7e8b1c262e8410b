"""`OpenAIServer` as the real `openai` client sees it, over a real socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from looplet.errors import ConfigError
from looplet.testing.server import Answer, ChatRequest, Fault, OpenAIServer
from looplet.types import Usage

HELLO: Any = [{"role": "user", "content": "hello there"}]
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}


@contextmanager
def sync_client(server: OpenAIServer, **options: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="sk-mine", **{"max_retries": 0, **options}) as client:
        yield client


def ask_sync(server: OpenAIServer, **body: Any) -> Any:
    """Return the completion, or the list of chunks of a stream."""
    with sync_client(server) as client:
        reply: Any = client.chat.completions.create(**{"model": "gpt", "messages": HELLO, **body})
        return list(reply) if body.get("stream") else reply


def ask_async(server: OpenAIServer, **body: Any) -> Any:
    """Return what `ask_sync` returns, by way of the async client."""

    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="sk-mine", max_retries=0) as client:
            reply: Any = await client.chat.completions.create(**{"model": "gpt", "messages": HELLO, **body})
            return [chunk async for chunk in reply] if body.get("stream") else reply

    return asyncio.run(main())


both = pytest.mark.parametrize("ask", [ask_sync, ask_async], ids=["sync", "async"])
stream_or_not = pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])


@contextmanager
def connection(server: OpenAIServer) -> Iterator[http.client.HTTPConnection]:
    raw = http.client.HTTPConnection("127.0.0.1", urlsplit(server.base_url).port or 0)
    try:
        yield raw
    finally:
        raw.close()


def fetch(raw: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Return status and parsed JSON; a body that is no string goes out as JSON."""
    raw.request(method, path, body if isinstance(body, str | None) else json.dumps(body))
    response = raw.getresponse()
    return response.status, json.loads(response.read())


def post(server: OpenAIServer, body: Any) -> tuple[int, Any]:
    with connection(server) as raw:
        return fetch(raw, "POST", "/v1/chat/completions", body)


def text_of(chunks: list[Any]) -> list[str]:
    return [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]


# plain answers


@both
def test_a_string_is_the_assistants_text(ask: Any) -> None:
    with OpenAIServer(policy=lambda request: f"{request.model} got {len(request.messages)}") as server:
        reply = ask(server)
    assert reply.to_dict() == {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "gpt",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "gpt got 1", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_the_policy_receives_the_request_as_it_was_sent() -> None:
    seen: list[ChatRequest] = []

    def policy(request: ChatRequest) -> str:
        seen.append(request)
        return "ok"

    with OpenAIServer(policy=policy) as server:
        ask_sync(server, tools=[SEARCH], temperature=0.5)
        ask_sync(server)
    body = {"model": "gpt", "messages": HELLO, "tools": [SEARCH], "temperature": 0.5}
    assert seen == [
        ChatRequest("gpt", HELLO, [SEARCH], body, 0),
        ChatRequest("gpt", HELLO, [], {"model": "gpt", "messages": HELLO}, 1),
    ]


def test_a_policy_that_changes_the_messages_leaves_the_record_alone() -> None:
    def policy(request: ChatRequest) -> str:
        request.messages.clear()
        return "ok"

    with OpenAIServer(policy=policy) as server:
        ask_sync(server)
    assert server.requests[0].body["messages"] == HELLO


def test_without_a_policy_the_last_user_message_comes_back() -> None:
    parts = [{"type": "text", "text": "second"}, {"type": "text", "text": "part"}]
    messages = [*HELLO, {"role": "user", "content": parts}, {"role": "assistant", "content": "last"}]
    with OpenAIServer() as server:
        assert ask_sync(server, messages=messages).choices[0].message.content == "second part"
        assert ask_sync(server, messages=[{"role": "system", "content": "x"}]).choices[0].message.content == ""


def test_a_list_answers_in_order_and_then_fails() -> None:
    with OpenAIServer(policy=["one", Answer("two")]) as server:
        assert [ask_sync(server).choices[0].message.content for _ in range(2)] == ["one", "two"]
        with pytest.raises(openai.InternalServerError, match="script exhausted: it has 2 answers"):
            ask_sync(server)


def test_an_answer_overrides_what_the_server_would_choose() -> None:
    answer = Answer("cut sho", finish_reason="length", model="gpt-2026", id="chatcmpl-mine")
    with OpenAIServer(policy=[answer]) as server:
        reply = ask_sync(server)
    assert (reply.id, reply.model, reply.choices[0].finish_reason) == ("chatcmpl-mine", "gpt-2026", "length")


# tool calls


@both
def test_a_list_is_tool_calls_and_their_results_are_accepted(ask: Any) -> None:
    with OpenAIServer(policy=[[("search", {"query": "é"}), ("done", {})], "finished"]) as server:
        first = ask(server, tools=[SEARCH]).choices[0]
        calls = first.message.to_dict()["tool_calls"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in reversed(calls)]
        second = ask(server, messages=[*HELLO, first.message.to_dict(), *results])
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert calls == [
        {"id": "call_0_0", "type": "function", "function": {"name": "search", "arguments": '{"query": "é"}'}},
        {"id": "call_0_1", "type": "function", "function": {"name": "done", "arguments": "{}"}},
    ]
    assert second.choices[0].message.content == "finished"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"name": "f", "args": {"a": 1}}, ("call_0_0", "f", '{"a": 1}')),
        ({"name": "f", "arguments": {"a": 1}, "id": "mine"}, ("mine", "f", '{"a": 1}')),
        ({"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}, ("x", "f", "{}")),
        (("f", '{"a": '), ("call_0_0", "f", '{"a": ')),
    ],
)
def test_a_tool_call_may_be_written_in_several_ways(call: Any, expected: tuple[str, str, str]) -> None:
    with OpenAIServer(policy=[[call]]) as server:
        made = ask_sync(server).choices[0].message.tool_calls[0]
    assert (made.id, made.function.name, made.function.arguments) == expected


# streams


@both
@pytest.mark.parametrize("text", ["a longer text, in pieces", "line\u2028separator \x85 and 🙂\n\n", "x"])
def test_streamed_text_adds_up_to_the_answer(ask: Any, text: str) -> None:
    with OpenAIServer(policy=[text]) as server:
        chunks = ask(server, stream=True)
    assert "".join(text_of(chunks)) == text
    assert len(text_of(chunks)) == min(4, len(text))
    assert {(c.id, c.object, c.created, c.model) for c in chunks} == {("chatcmpl-0", "chat.completion.chunk", 0, "gpt")}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(c.usage is None for c in chunks)


@both
def test_streamed_tool_calls_begin_with_id_and_name(ask: Any) -> None:
    answer = Answer("thinking", tool_calls=[("search", {"query": "loops"}), ("done", {})])
    with OpenAIServer(policy=[answer]) as server:
        chunks = ask(server, stream=True)
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    heads = [(d.index, d.id, d.type, d.function.name, d.function.arguments) for d in deltas if d.id]
    assert heads == [(0, "call_0_0", "function", "search", ""), (1, "call_0_1", "function", "done", "")]
    pieces = [[d.function.arguments for d in deltas if d.index == i and not d.id] for i in (0, 1)]
    assert [json.loads("".join(p)) for p in pieces] == [{"query": "loops"}, {}]
    assert len(pieces[0]) > 1
    assert "".join(text_of(chunks)) == "thinking"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@both
def test_the_last_chunk_carries_the_usage_that_was_asked_for(ask: Any) -> None:
    with OpenAIServer(policy=[Answer("hi", usage=(7, 2))]) as server:
        chunks = ask(server, stream=True, stream_options={"include_usage": True})
    assert [c.choices for c in chunks if c.usage] == [[]]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 2)


def test_a_stream_is_server_sent_events_that_end_with_done() -> None:
    with OpenAIServer(policy=["hi"]) as server, connection(server) as raw:
        raw.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": HELLO, "stream": True}))
        response = raw.getresponse()
        events = response.read().decode().split("\n\n")
    assert response.getheader("Content-Type") == "text/event-stream"
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["created"] == 0 for event in events[:-2])


# usage


def test_usage_may_tell_cached_and_reasoning_tokens() -> None:
    usage = Usage(100, 20, cached_tokens=80, reasoning_tokens=15)
    with OpenAIServer(policy=[Answer("hi", usage=usage)]) as server:
        got = ask_sync(server).usage
    assert (got.prompt_tokens, got.completion_tokens, got.total_tokens) == (100, 20, 120)
    assert got.prompt_tokens_details.cached_tokens == 80
    assert got.completion_tokens_details.reasoning_tokens == 15


def test_default_usage_counts_words_of_texts_and_tool_calls() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"a": 1}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "c", "content": "one two three"}]
    with OpenAIServer(policy=[[("search", {"b": 2})]]) as server:
        got = ask_sync(server, messages=messages).usage
    assert (got.prompt_tokens, got.completion_tokens) == (2 + 3 + 3, 3)


@both
def test_usage_can_be_left_out(ask: Any) -> None:
    with OpenAIServer(policy=[Answer("a", usage=()), Answer("b", usage=())]) as server:
        assert ask(server).usage is None
        assert not any(c.usage for c in ask(server, stream=True, stream_options={"include_usage": True}))


# faults

STATUS_FAULTS = [
    (Fault.rate_limited(), openai.RateLimitError, 429, "rate_limit_exceeded", None),
    (Fault.server_error(), openai.InternalServerError, 500, None, None),
    (Fault.refuses("max_tokens"), openai.BadRequestError, 400, "unsupported_parameter", "max_tokens"),
    (Fault.refuses("temperature"), openai.BadRequestError, 400, "unsupported_value", "temperature"),
    (Fault.context_overflow(), openai.BadRequestError, 400, "context_length_exceeded", "messages"),
    (Fault.unauthorized(), openai.AuthenticationError, 401, "invalid_api_key", None),
    (Fault.error(409, "busy", code="busy"), openai.ConflictError, 409, "busy", None),
]


@both
@stream_or_not
@pytest.mark.parametrize(("fault", "error", "status", "code", "param"), STATUS_FAULTS)
def test_a_fault_is_the_clients_own_error(
    ask: Any, stream: bool, fault: Fault, error: Any, status: int, code: Any, param: Any
) -> None:
    with OpenAIServer(policy=[fault]) as server, pytest.raises(error) as caught:
        ask(server, stream=stream)
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)
    assert caught.value.body == {"message": fault.message, "type": fault.type, "param": param, "code": code}
    assert server.errors == []


def test_refusals_use_the_words_of_newer_models() -> None:
    assert Fault.refuses("max_tokens").message == (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    assert Fault.refuses("temperature", 0.7).message == (
        "Unsupported value: 'temperature' does not support 0.7 with this model."
        " Only the default (1) value is supported."
    )
    assert "max_completion_tokens" not in Fault.refuses("stop").message


@pytest.mark.parametrize(("seconds", "header"), [(1.5, "1.5"), (30, "30"), (None, None)])
def test_a_rate_limit_says_when_to_come_back(seconds: float | None, header: str | None) -> None:
    with OpenAIServer(policy=[Fault.rate_limited(seconds)]) as server, pytest.raises(openai.RateLimitError) as caught:
        ask_sync(server)
    assert caught.value.response.headers.get("Retry-After") == header


def test_the_clients_own_retry_gets_the_next_answer() -> None:
    policy = [Fault.rate_limited(0.01), "second time lucky"]
    with OpenAIServer(policy=policy) as server, sync_client(server, max_retries=1) as client:
        reply = client.chat.completions.create(model="gpt", messages=HELLO)
    assert reply.choices[0].message.content == "second time lucky"
    assert len(server.requests) == 2


@both
@stream_or_not
def test_a_cut_connection_is_a_connection_error(ask: Any, stream: bool) -> None:
    with OpenAIServer(policy=[Fault.cut()]) as server, pytest.raises(openai.APIConnectionError):
        ask(server, stream=stream)


def test_a_stream_is_cut_after_some_text() -> None:
    chunks: list[Any] = []
    with OpenAIServer(policy=[Fault.cut("abcdefgh")]) as server, sync_client(server) as client:
        stream = client.chat.completions.create(model="gpt", messages=HELLO, stream=True)
        with pytest.raises(openai.APIConnectionError):
            chunks.extend(stream)  # keeps what came before the error
    assert text_of(chunks) == ["ab"]


@both
@stream_or_not
def test_malformed_json_reaches_the_client(ask: Any, stream: bool) -> None:
    with OpenAIServer(policy=[Fault.malformed()]) as server, pytest.raises(json.JSONDecodeError):
        ask(server, stream=stream)


@both
def test_an_empty_answer_has_no_choices(ask: Any) -> None:
    with OpenAIServer(policy=[Fault.empty(), Fault.empty()]) as server:
        assert ask(server).choices == []
        assert all(chunk.choices == [] for chunk in ask(server, stream=True))


@both
@stream_or_not
def test_a_slow_answer_outlasts_an_impatient_client(ask: Any, stream: bool) -> None:
    with OpenAIServer(policy=[Fault.slow(600, "late")]) as server, pytest.raises(openai.APITimeoutError):
        ask(server, stream=stream, timeout=0.05)


def test_a_slow_answer_arrives_in_the_end() -> None:
    with OpenAIServer(policy=[Fault.slow(0.001, "late"), Fault.slow(0.001, Fault.unauthorized())]) as server:
        assert ask_sync(server).choices[0].message.content == "late"
        with pytest.raises(openai.AuthenticationError):
            ask_sync(server)


# requests that are refused before the policy is asked


def test_refused_parameters_never_reach_the_policy() -> None:
    with OpenAIServer(policy=["ok"], refusing=("max_tokens", "temperature")) as server:
        with pytest.raises(openai.BadRequestError, match="Use 'max_completion_tokens' instead") as caught:
            ask_sync(server, max_tokens=5, temperature=0.3)
        assert caught.value.code == "unsupported_parameter"
        with pytest.raises(openai.BadRequestError, match=r"does not support 0\.3 with this model") as caught:
            ask_sync(server, max_completion_tokens=5, temperature=0.3)
        assert caught.value.code == "unsupported_value"
        assert ask_sync(server, max_completion_tokens=5).id == "chatcmpl-0"
    assert len(server.requests) == 3


def call_message(*ids: str, name: str = "f") -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "ok"}


BAD_MESSAGES = [
    ([*HELLO, call_message("a", "b"), result("a")], "did not have response messages: b"),
    ([*HELLO, call_message("a"), *HELLO], "did not have response messages: a"),
    ([call_message("a"), *HELLO, result("a")], "did not have response messages: a"),
    ([call_message("a"), call_message("b"), result("a"), result("b")], "did not have response messages: a"),
    ([*HELLO, result("a")], "must be a response to a preceding message"),
    ([call_message("a"), result("b")], "no call waits for 'tool_call_id' 'b'"),
    ([call_message("a"), result("a"), result("a")], "no call waits for 'tool_call_id' 'a'"),
    ([call_message("a"), result("a"), *HELLO, result("a")], "no call waits for 'tool_call_id' 'a'"),
    ([call_message("a", name="no spaces"), result("a")], r"messages\[0\].tool_calls\[0\].function.name"),
    ([{"role": "assistant", "content": "x", "tool_calls": []}], "minimum length 1"),
    ([{"role": "robot", "content": "x"}], "messages.*role"),
    ([{"role": "user", "content": None}], "content.*expected a string"),
    ([{"role": "assistant"}], "content.*expected a string"),
]


@both
@pytest.mark.parametrize(("messages", "complaint"), BAD_MESSAGES)
def test_messages_that_the_real_api_refuses_are_refused(ask: Any, messages: Any, complaint: str) -> None:
    with OpenAIServer() as server, pytest.raises(openai.BadRequestError, match=complaint):
        ask(server, messages=messages)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HELLO}, "model"),
        ({"model": "", "messages": HELLO}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "m", "messages": []}, "messages"),
        ({"model": "m", "messages": "hi"}, "messages"),
        ({"model": "m", "messages": HELLO, "tools": []}, "tools"),
        ({"model": "m", "messages": HELLO, "stream_options": {}}, "stream_options"),
        ({"model": "m", "messages": ["hi"]}, "messages[0]"),
        (
            {
                "model": "m",
                "messages": [{**call_message("a"), "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
            },
            "messages[0].tool_calls[0]",
        ),
        ([1], None),
        ("{", None),
        ("", None),
    ],
)
def test_a_body_that_is_no_chat_request_is_a_400(body: Any, param: str | None) -> None:
    with OpenAIServer() as server:
        status, reply = post(server, body)
    assert (status, reply["error"]["param"]) == (400, param)
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert server.errors == []


@pytest.mark.parametrize(
    ("name", "status"), [("a-Z_9", 200), ("x" * 64, 200), ("x" * 65, 400), ("a.b", 400), ("a\n", 400), ("", 400)]
)
def test_tool_names_keep_to_the_real_apis_alphabet(name: str, status: int) -> None:
    tool = {"type": "function", "function": {"name": name, "parameters": {}}}
    with OpenAIServer() as server:
        assert post(server, {"model": "m", "messages": HELLO, "tools": [tool]})[0] == status


# policies that fail


def test_a_policy_that_raises_is_a_500_and_its_error_is_kept() -> None:
    boom = LookupError("no such answer")

    def policy(request: ChatRequest) -> str:
        raise boom

    with OpenAIServer(policy=policy) as server, pytest.raises(openai.InternalServerError) as caught:
        ask_sync(server)
    assert "LookupError: no such answer" in str(caught.value)
    assert server.errors == [boom]


@pytest.mark.parametrize(
    "answer", [42, ["search"], [("search", object())], Answer(tool_calls=[{"args": {}}]), "\ud800"]
)
def test_an_answer_of_the_wrong_kind_is_a_500(answer: Any) -> None:
    with OpenAIServer(policy=lambda _: answer) as server, pytest.raises(openai.InternalServerError):
        ask_sync(server)
    assert len(server.errors) == 1


# the HTTP around it


def test_requests_are_recorded_with_their_authorization() -> None:
    with OpenAIServer() as server:
        ask_sync(server)
        recorded = server.requests
        ask_sync(server)
    assert len(recorded) == 1
    assert (recorded[0].method, recorded[0].path) == ("POST", "/v1/chat/completions")
    assert recorded[0].headers["authorization"] == "Bearer sk-mine"
    assert recorded[0].body == {"model": "gpt", "messages": HELLO}


def test_models_and_health_answer() -> None:
    with OpenAIServer(model="my-model") as server, sync_client(server) as client, connection(server) as raw:
        assert [model.id for model in client.models.list()] == ["my-model"]
        assert fetch(raw, "GET", "/healthz") == (200, {"status": "ok"})


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/v1/embeddings"), ("DELETE", "/v1/models")])
def test_everything_else_is_a_404_in_openais_shape(method: str, path: str) -> None:
    with OpenAIServer() as server, connection(server) as raw:
        status, reply = fetch(raw, method, path)
    assert status == 404
    assert reply["error"]["message"] == f"Invalid URL ({method} {path})"


def test_a_connection_outlives_answers_streams_and_refusals() -> None:
    with OpenAIServer(policy=["a", "b", Fault.server_error(), "c"]) as server, connection(server) as raw:
        fetch(raw, "GET", "/healthz")
        socket = raw.sock
        bodies: list[dict[str, Any]] = [{}, {"stream": True}, {}, {"messages": []}, {}]
        for body in bodies:
            raw.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": HELLO, **body}))
            last = raw.getresponse().read()
        assert raw.sock is socket
    assert json.loads(last)["choices"][0]["message"]["content"] == "c"


def test_a_chunked_request_is_read_to_its_end() -> None:
    body = json.dumps({"model": "m", "messages": HELLO}).encode()
    with OpenAIServer() as server, connection(server) as raw:
        for _ in range(2):
            raw.request("POST", "/v1/chat/completions", iter([body[:9], body[9:]]), encode_chunked=True)
            assert json.loads(raw.getresponse().read())["choices"][0]["message"]["content"] == "hello there"


def test_a_request_of_unknown_length_is_hung_up_on() -> None:
    with OpenAIServer() as server, connection(server) as raw:
        raw.request("POST", "/v1/chat/completions", b"{}", {"Content-Length": "many"})
        with pytest.raises(ConnectionError):
            raw.getresponse()
    assert [type(error) for error in server.errors] == [ValueError]


@both
def test_eight_requests_are_answered_at_the_same_time(ask: Any) -> None:
    everyone = threading.Barrier(8, timeout=10)  # a server that takes one request at a time never passes it

    def policy(request: ChatRequest) -> Any:
        everyone.wait()
        return request.messages[0]["content"]

    def one(text: str) -> Any:
        return ask(server, messages=[{"role": "user", "content": text}]).choices[0].message.content

    words = [f"word {n}" for n in range(8)]
    with OpenAIServer(policy=policy) as server, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, words)) == words
    assert sorted(r.body["messages"][0]["content"] for r in server.requests) == words
    assert server.errors == []


# its life


def test_close_gives_back_the_port_and_the_threads() -> None:
    before = set(threading.enumerate())
    server = OpenAIServer().start()
    port = urlsplit(server.base_url).port or 0
    with connection(server) as idle:
        fetch(idle, "GET", "/healthz")
        assert set(threading.enumerate()) > before
        server.close()
        assert set(threading.enumerate()) == before
    server.close()
    with OpenAIServer(port=port) as second:
        assert urlsplit(second.base_url).port == port


def test_close_ends_a_slow_answer() -> None:
    asked = threading.Event()

    def policy(request: ChatRequest) -> Fault:
        asked.set()
        return Fault.slow(600, "late")

    with ThreadPoolExecutor(1) as pool:
        with OpenAIServer(policy=policy) as server:
            waiting = pool.submit(ask_sync, server)
            assert asked.wait(10)
        with pytest.raises(openai.APIConnectionError):
            waiting.result(10)


def test_a_closed_server_can_start_again() -> None:
    server = OpenAIServer(policy=["one", "two"])
    for expected in ("one", "two"):
        with server:
            assert ask_sync(server).choices[0].message.content == expected


def test_env_leads_a_client_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenAIServer(model="my-model") as server:
        env = server.env()
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        with openai.OpenAI(max_retries=0) as client:
            client.chat.completions.create(model=env["OPENAI_MODEL"], messages=HELLO)
    assert set(env) == {"OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"}
    assert server.requests[0].body["model"] == "my-model"
    assert server.requests[0].headers["authorization"] == f"Bearer {env['OPENAI_API_KEY']}"


def test_misuse_says_what_to_write_instead() -> None:
    with pytest.raises(ConfigError, match=r"policy must be a function, a list of answers or None, not 'hello'"):
        OpenAIServer(policy="hello")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"write \['max_tokens'\]"):
        OpenAIServer(refusing="max_tokens")
    with pytest.raises(ConfigError, match="call start"):
        OpenAIServer().env()
    with OpenAIServer() as server, pytest.raises(ConfigError, match="already runs"):
        server.start()

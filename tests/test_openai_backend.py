"""`OpenAIBackend` and its async twin: through the real `openai` client, over real sockets."""

from __future__ import annotations

import asyncio
import email.utils
import inspect
import subprocess
import sys
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from opentelemetry import context as otel_context
from provider_support import (
    EVERY_STEP,
    EVERYTHING,
    HELLO,
    Gate,
    askers,
    calling,
    canned,
    failed,
    gist,
    name_of_fault,
    over_the_socket,
)
from support import add, both, look, make_tools, run_async, run_sync

from looplet import (
    AsyncOpenAIBackend,
    ConfigError,
    ContextOverflow,
    Conversation,
    LoopConfig,
    Message,
    OpenAIBackend,
    ProvenanceSink,
    Reply,
    ToolCall,
    ToolSpec,
    Trace,
    Usage,
    async_composable_loop,
    composable_loop,
)
from looplet.backends.completions import wire_messages
from looplet.backends.failures import retry_after_s
from looplet.prices import priced
from looplet.telemetry import semconv
from looplet.testing import Answer, Fault, OpenAIServer

NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)


KINDS = (OpenAIBackend, AsyncOpenAIBackend)
sync_and_async = askers(OpenAIBackend, AsyncOpenAIBackend, model="gpt", max_retries=0)
classes = pytest.mark.parametrize("make", [OpenAIBackend, AsyncOpenAIBackend])


def completion(message: Any, **more: Any) -> dict[str, Any]:
    return {"id": "r1", "model": "m1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **more}


# --- settings -------------------------------------------------------------------------------------------------------


def test_the_openai_package_is_loaded_by_the_first_backend():
    code = "import sys; from looplet import OpenAIBackend; before = 'openai' in sys.modules; "
    code += "OpenAIBackend(base_url='http://127.0.0.1/v1', model='m'); print(before, 'openai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@classes
def test_from_env_reads_the_three_variables_and_arguments_win(make, monkeypatch):
    for name, value in (("BASE_URL", "http://127.0.0.1:1234/v1/"), ("API_KEY", " sk-env\n"), ("MODEL", "env-model")):
        monkeypatch.setenv(f"OPENAI_{name}", value)
    backend = make.from_env()
    assert (backend.model, backend.base_url, backend.client.api_key) == (
        "env-model",
        "http://127.0.0.1:1234/v1",
        "sk-env",
    )
    other = make.from_env(model="mine", base_url="http://localhost/v1", default_max_tokens=7)
    assert (other.model, other.base_url, other.default_max_tokens) == ("mine", "http://localhost/v1", 7)


@classes
def test_a_key_alone_means_openai_and_a_base_url_alone_needs_no_key(make, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    assert make.from_env(model="m").base_url == "https://api.openai.com/v1"
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:11434/v1")
    assert make.from_env(model="m").client.api_key == "none"


@classes
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "m"}, ["OPENAI_API_KEY", "OPENAI_BASE_URL"]),
        ({"base_url": NOWHERE}, ["model=", "OPENAI_MODEL"]),
        ({"base_url": "localhost:11434/v1", "model": "m"}, ["http://", "'localhost:11434/v1'"]),
        ({"model": "m", "api_key": "sk-…abc"}, ["'…'", "position 3", "ASCII"]),
        ({"model": "m", "api_key": "sk-a\nb"}, ["'\\n'"]),
        ({"client": "gpt-4o", "model": "m"}, ["str", "model='gpt-4o'"]),
    ],
)
def test_settings_that_cannot_work_say_what_to_write(make, settings, words):
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    assert [word for word in words if word not in str(caught.value)] == []


@classes
@pytest.mark.parametrize("variables", [{}, {"OPENAI_MODEL": "m"}, {"OPENAI_API_KEY": "sk"}])
def test_from_env_names_the_missing_variable(make, variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="OPENAI_MODEL" if "OPENAI_API_KEY" in variables else "OPENAI_API_KEY"):
        make.from_env()


@pytest.mark.parametrize(("make", "client"), [(OpenAIBackend, openai.AsyncOpenAI), (AsyncOpenAIBackend, openai.OpenAI)])
def test_a_client_of_the_other_kind_is_refused_and_so_are_two_sets_of_settings(make, client):
    with pytest.raises(ConfigError, match=f"not an {client.__name__}"):
        make(client(api_key="sk", base_url=NOWHERE), model="m")
    own = openai.OpenAI if client is openai.AsyncOpenAI else openai.AsyncOpenAI
    with pytest.raises(ConfigError, match="not both"):
        make(own(api_key="sk"), model="m", base_url=NOWHERE)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.openai.com/v1", ("openai", "api.openai.com", 443)),
        ("http://127.0.0.1:8000/v1", ("openai", "127.0.0.1", 8000)),
        ("http://box.lan/v1", ("openai", "box.lan", 80)),
        ("https://api.groq.com/openai/v1", ("groq", "api.groq.com", 443)),
        ("https://api.deepseek.com", ("deepseek", "api.deepseek.com", 443)),
        ("https://api.mistral.ai/v1", ("mistral_ai", "api.mistral.ai", 443)),
        ("https://api.x.ai/v1", ("x_ai", "api.x.ai", 443)),
        ("https://me.openai.azure.com/openai/v1", ("azure.ai.openai", "me.openai.azure.com", 443)),
        ("https://api.perplexity.ai", ("perplexity", "api.perplexity.ai", 443)),
        ("https://api.moonshot.cn/v1", ("moonshot_ai", "api.moonshot.cn", 443)),
        ("https://api.cohere.ai/compatibility/v1", ("cohere", "api.cohere.ai", 443)),
        ("https://evilgroq.com/v1", ("openai", "evilgroq.com", 443)),
    ],
)
def test_provider_and_server_come_from_the_base_url(url, expected):
    backend = OpenAIBackend(base_url=url, api_key="sk", model="m")
    assert (backend.provider, backend.server_address, backend.server_port) == expected
    assert backend.base_url == url


def test_both_backends_take_the_same_settings_and_the_same_request():
    for name in ("__init__", "from_env", "chat", "generate"):
        one, two = getattr(OpenAIBackend, name), getattr(AsyncOpenAIBackend, name)
        assert inspect.signature(one) == inspect.signature(two)


# --- requests -------------------------------------------------------------------------------------------------------


def result(call_id: str, response: Any) -> Message:
    return Message.of_result(call_id, response)


@sync_and_async
def test_a_conversation_goes_out_as_chat_completions_has_it(ask):
    messages = [
        *HELLO,
        calling(ToolCall("add", {"a": 1, "b": 2}, call_id="c1"), ToolCall("look", {}, call_id="c2"), text="let me see"),
        result("c1", 3),
        result("c2", "as it is"),
        calling(ToolCall("look", {"name": "ä"}, call_id="c3"), reasoning="nobody's business"),
        result("c3", {"found": True, "list": [1, None]}),
        Message.of_text("user", "and now?"),
    ]
    with OpenAIServer(policy=["fine"]) as server:
        settings = {
            "tools": make_tools().tool_schemas()[:1],
            "system_prompt": "be brief",
            "max_tokens": 9,
            "temperature": 0.5,
        }
        ask(server.base_url, messages, **settings)
    (request,) = server.requests
    assert request.headers["authorization"] == "Bearer none"
    function = {"name": "add", "description": "Add two numbers.", "parameters": add.json_schema}
    assert request.body == {
        "model": "gpt",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello there"},
            {
                "role": "assistant",
                "content": "let me see",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":2}'}},
                    {"id": "c2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "tool", "tool_call_id": "c2", "content": "as it is"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c3", "type": "function", "function": {"name": "look", "arguments": '{"name":"ä"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c3", "content": '{"found":true,"list":[1,null]}'},
            {"role": "user", "content": "and now?"},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "auto",
        "max_tokens": 9,
        "temperature": 0.5,
    }


@sync_and_async
def test_what_is_not_asked_for_is_not_sent(ask):
    with OpenAIServer() as server:
        ask(server.base_url, tools=[], backend={"tool_choice": "required"})
        ask(server.base_url, backend={"default_max_tokens": 5}, seed=1, extra_body={"top_k": 3})
        ask(server.base_url, backend={"default_max_tokens": 5}, max_tokens=6)
    bodies = [{name: value for name, value in r.body.items() if name != "messages"} for r in server.requests]
    assert bodies == [
        {"model": "gpt"},
        {"model": "gpt", "max_tokens": 5, "seed": 1, "top_k": 3},
        {"model": "gpt", "max_tokens": 6},
    ]


@sync_and_async
def test_broken_pairs_of_calls_and_results_are_mended(ask):
    messages = [
        result("gone", "of a call that was compacted away"),
        *HELLO,
        calling(
            ToolCall("add", {}, call_id="c1"), ToolCall("add", {}, call_id="c2"), ToolCall("add", {}, call_id="c3")
        ),
        result("c3", "three"),
        Message.of_text("user", "a word in between"),
        result("c1", "one"),
        calling(ToolCall("add", {}, call_id="c2")),
        result("c2", "of the second"),
    ]
    with OpenAIServer(policy=["fine"]) as server:
        assert ask(server.base_url, messages).text == "fine"
    told = [(m["role"], m.get("tool_call_id"), m["content"]) for m in server.requests[0].body["messages"]]
    assert told == [
        ("user", None, "Result of tool call gone:\nof a call that was compacted away"),
        ("user", None, "hello there"),
        ("assistant", None, None),
        ("tool", "c1", "one"),
        ("tool", "c2", '{"error":"not run"}'),
        ("tool", "c3", "three"),
        ("user", None, "a word in between"),
        ("assistant", None, None),
        ("tool", "c2", "of the second"),
    ]


@sync_and_async
@pytest.mark.parametrize(
    ("name", "sent"), [("repo.open file", "repo_open_file"), ("", "unknown"), ("x" * 99, "x" * 64)]
)
def test_a_tool_name_that_the_model_made_up_is_not_refused_on_its_way_back(ask, name, sent):
    with OpenAIServer(policy=["fine"]) as server:
        ask(server.base_url, [calling(ToolCall(name, {}, call_id="c")), result("c", "no such tool")])
    (call,) = server.requests[0].body["messages"][0]["tool_calls"]
    assert call["function"]["name"] == sent


@pytest.mark.parametrize("name", ["søk", "a.b", "", "x" * 65, "a\n"])
def test_a_tool_name_that_the_api_would_refuse_is_refused_at_once(name):
    with pytest.raises(ConfigError, match="ASCII letters"):
        ToolSpec(name, "does nothing")


def test_arguments_that_are_text_already_go_out_as_they_are():
    part = {"type": "tool_call", "id": "c", "name": "add", "arguments": '{"a": 1}'}
    (call,) = wire_messages([Message("assistant", (part,))])[0]["tool_calls"]
    assert call["function"]["arguments"] == '{"a": 1}'


@sync_and_async
def test_generate_asks_with_one_text(ask):
    with OpenAIServer(policy=lambda request: request.messages[0]["content"] + "!") as server:
        with OpenAIBackend(base_url=server.base_url, model="m") as llm:
            assert llm.generate("what?", max_tokens=3, system_prompt="sys") == "sys!"

        async def main():
            async with AsyncOpenAIBackend(base_url=server.base_url, model="m") as llm:
                return await llm.generate("what?")

        assert asyncio.run(main()) == "what?!"


# --- replies --------------------------------------------------------------------------------------------------------


@sync_and_async
def test_a_reply_holds_all_that_the_response_says(ask):
    calls = [("search", {"q": "ä"}), {"name": "open", "args": {}, "id": "mine"}]
    answer = Answer("both", calls, Usage(100, 20, 60, 15), model="gpt-2026", id="resp-7")
    with OpenAIServer(policy=[answer]) as server:
        assert ask(server.base_url) == Reply(
            text="both",
            tool_calls=(ToolCall("search", {"q": "ä"}, call_id="call_0_0"), ToolCall("open", {}, call_id="mine")),
            usage=Usage(100, 20, 60, 15),
            model="gpt-2026",
            response_id="resp-7",
            finish_reason="tool_call",
        )


@sync_and_async
def test_usage_that_was_not_reported_is_none(ask):
    with OpenAIServer(policy=[Answer("x", usage=())]) as server:
        assert ask(server.base_url).usage is None


@sync_and_async
@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "tool_call"),
        ("function_call", "tool_call"),
        ("error", "error"),
        ("something new", "stop"),
    ],
)
def test_finish_reasons_are_those_of_the_conventions(ask, reason, told):
    with OpenAIServer(policy=[Answer("x", finish_reason=reason)]) as server:
        assert ask(server.base_url).finish_reason == told


@sync_and_async
@pytest.mark.parametrize(
    ("sent", "args"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        ("{}", {}),
        ('{"a": 1', {"_raw_arguments": '{"a": 1'}),
        ("[1]", {"_raw_arguments": "[1]"}),
        ("search for x", {"_raw_arguments": "search for x"}),
        ("[" * 100_000, {"_raw_arguments": "[" * 100_000}),
    ],
    ids=["object", "empty", "none", "cut", "array", "prose", "deep"],
)
def test_arguments_that_are_no_object_are_kept_as_text(ask, sent, args):
    with OpenAIServer(policy=[[("add", sent)]]) as server:
        assert ask(server.base_url).tool_calls[0].args == args


@sync_and_async
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "x", "reasoning_content": "thinking"}, Reply("x", reasoning="thinking")),
        ({"content": "x", "reasoning": "thinking"}, Reply("x", reasoning="thinking")),
        ({"content": None, "refusal": "I will not"}, Reply("I will not", metadata={"refusal": "I will not"})),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "thinking"}, {"type": "text", "text": "b"}]},
            Reply("ab"),
        ),
        ({"role": "assistant"}, Reply()),
        (
            {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
            Reply(tool_calls=(ToolCall("add", {"a": 1}),)),
        ),
        ({"tool_calls": [{"id": None, "function": None}]}, Reply(tool_calls=(ToolCall(""),))),
    ],
    ids=["reasoning_content", "reasoning", "refusal", "parts", "bare", "arguments as an object", "no function"],
)
def test_what_compatible_servers_say_in_their_own_way_is_understood(ask, message, expected):
    with canned(completion(message)) as url:
        reply = ask(url)
    told = (reply.text, reply.tool_calls, reply.reasoning, reply.metadata)
    assert told == (expected.text, expected.tool_calls, expected.reasoning, expected.metadata)


@sync_and_async
def test_usage_of_odd_shapes_counts_what_can_be_counted(ask):
    usage = {"prompt_tokens": 5, "completion_tokens": None, "prompt_tokens_details": None}
    with canned(completion({"content": "x"}, usage=usage)) as url:
        assert ask(url).usage == Usage(5, 0)
    with canned(completion({"content": "x"}, usage={})) as url:
        assert ask(url).usage is None


# --- failures -------------------------------------------------------------------------------------------------------


@sync_and_async
@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (Fault.unauthorized(), (401, "auth", False, None), ["Incorrect API key provided", "OPENAI_API_KEY"]),
        (Fault.error(403, "not in your country"), (403, "auth", False, None), ["not in your country"]),
        (
            Fault.error(404, "no such model"),
            (404, "not_found", False, None),
            ["no such model", "'gpt'", "OPENAI_MODEL"],
        ),
        (Fault.error(408, "slow"), (408, "timeout", True, None), ["slow", "timeout_s="]),
        (Fault.error(409, "busy"), (409, "conflict", True, None), ["busy"]),
        (Fault.rate_limited(), (429, "rate_limit", True, None), ["Rate limit reached"]),
        (Fault.rate_limited(2.5), (429, "rate_limit", True, 2.5), ["again in 2.5 s"]),
        (Fault.error(429, "pay", code="insufficient_quota"), (429, "quota", False, None), ["pay", "billing"]),
        (Fault.server_error("out of order"), (500, "server_error", True, None), ["out of order", "later"]),
        (Fault.error(503, "overloaded"), (503, "server_error", True, None), ["answered 503: overloaded"]),
        (Fault.error(400, "bad 'x'"), (400, "bad_request", False, None), ["answered 400: bad 'x'"]),
        (Fault.error(422, "what?"), (422, "bad_request", False, None), ["what?"]),
        (Fault.refuses("top_p"), (400, "bad_request", False, None), ["Unsupported value", "leave 'top_p' out"]),
        (Fault.empty(), (None, "bad_response", True, None), ["no choices"]),
        (Fault.malformed(), (None, "bad_response", True, None), ["broken JSON"]),
        (Fault.cut(), (None, "network", True, None), ["cannot reach", "OPENAI_BASE_URL"]),
    ],
    ids=name_of_fault,
)
def test_a_fault_becomes_an_error_with_the_providers_words_and_what_to_do(ask, fault, expected, words):
    with OpenAIServer(policy=lambda _: fault) as server:
        error = failed(ask, server.base_url)
    assert gist(error) == expected
    assert [word for word in words if word not in str(error)] == []


@sync_and_async
@pytest.mark.parametrize(
    "fault",
    [
        Fault.context_overflow(),
        Fault.error(413, "the request exceeds the available context size", code="exceed_context_size_error"),
        Fault.error(400, "Input is longer than the model's context window"),
    ],
)
def test_a_request_longer_than_the_window_is_a_context_overflow(ask, fault):
    with OpenAIServer(policy=lambda _: fault) as server:
        error = failed(ask, server.base_url)
    assert isinstance(error, ContextOverflow)
    assert gist(error) == (fault.status, "context_overflow", False, None)
    assert fault.message.rstrip(".") in str(error)


@sync_and_async
def test_no_answer_in_time_is_a_timeout(ask):
    with OpenAIServer(policy=lambda _: Fault.slow(60, "late")) as server:
        error = failed(ask, server.base_url, backend={"timeout_s": 0.05})
    assert gist(error) == (None, "timeout", True, None)
    assert "timeout_s=" in str(error)


@sync_and_async
def test_a_server_that_is_not_there_is_a_network_error_that_names_the_cause(ask):
    with OpenAIServer() as server:
        url = server.base_url
    error = failed(ask, url)
    assert gist(error) == (None, "network", True, None)
    assert url in str(error)
    assert "refused" in str(error) or "attempts failed" in str(error)


@sync_and_async
@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"<html>login</html>", "text/html", ["no JSON", "<html>login</html>", "/v1"]),
        (b"\xff\xfe", "application/json", ["broken JSON"]),
        (b"null", "application/json", ["no choices"]),
        (b"[]", "application/json", ["no choices"]),
        (b'{"error": {"message": "upstream is down", "code": 502}}', "application/json", ["upstream is down"]),
        (b'{"error": "upstream is down"}', "application/json", ["upstream is down"]),
        (b'{"choices": [{"finish_reason": "stop"}]}', "application/json", ["no choices"]),
    ],
)
def test_a_response_that_is_no_completion_is_a_bad_response(ask, body, kind, words):
    with canned(body, kind=kind) as url:
        error = failed(ask, url)
    assert error.kind == "bad_response"
    assert [word for word in words if word not in str(error)] == []


@sync_and_async
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"detail": "Not Found"}, "answered 404: Not Found;"),
        ({"error": "model 'gpt' not found"}, "answered 404: model 'gpt' not found;"),
        ({"detail": [{"loc": ["body"]}]}, 'answered 404: [{"loc": ["body"]}];'),
        (b"<h1>404</h1>", "answered 404: <h1>404</h1>;"),
        (b"", "answered 404: Error code: 404;"),
    ],
)
def test_the_providers_words_are_found_wherever_they_are(ask, body, words):
    with canned(body, status=404) as url:
        assert words in str(failed(ask, url))


@sync_and_async
def test_an_error_asks_for_the_wait_that_its_headers_ask_for(ask):
    later = email.utils.formatdate(4_000_000_000, usegmt=True)
    for headers, wait in (((("retry-after-ms", "1500"), ("Retry-After", "9")), 1.5), ((("Retry-After", "7"),), 7.0)):
        with canned({}, 429, headers) as url:
            assert failed(ask, url).retry_after_s == wait
    with canned({}, 503, (("Retry-After", later),)) as url:
        assert failed(ask, url).retry_after_s > 1e8


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 90.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:01 GMT"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "3"}, 3.0),
    ],
)
def test_retry_after_is_milliseconds_seconds_or_a_date(headers, seconds):
    assert retry_after_s(headers, now=10.0) == seconds


@sync_and_async
def test_a_parameter_that_the_package_does_not_know_says_where_to_put_it(ask):
    with OpenAIServer() as server, pytest.raises(ConfigError, match=r"'top_k'.*extra_body"):
        ask(server.base_url, top_k=3)
    assert server.requests == []


@sync_and_async
def test_whatever_a_client_raises_is_a_backend_error(ask):
    with OpenAIServer() as server:
        error = failed(ask, server.base_url, seed=object())
        with pytest.raises(ConfigError, match="stream"):
            ask(server.base_url, stream=True)
    assert gist(error) == (None, "backend_error", False, None)


@sync_and_async
def test_the_package_makes_as_many_attempts_as_max_retries_says(ask):
    with OpenAIServer(policy=[Fault.rate_limited(0.01), "second", Fault.rate_limited(0.01), "never"]) as server:
        assert ask(server.base_url, backend={"max_retries": 1}).text == "second"
        assert failed(ask, server.base_url).kind == "rate_limit"
    assert len(server.requests) == 3


# --- parameters that some models refuse -----------------------------------------------------------------------------

BOTH = {"max_tokens": 9, "temperature": 0.2}


def parameters(server: OpenAIServer) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.body.items() if k not in ("messages", "model")} for r in server.requests]


@sync_and_async
def test_refused_parameters_are_replaced_once_and_remembered(ask):
    with OpenAIServer(refusing=["max_tokens", "temperature"]) as server:
        assert ask(server.base_url, times=2, **BOTH).text == "hello there"
    assert parameters(server) == [
        BOTH,
        {"temperature": 0.2, "max_completion_tokens": 9},
        {"max_completion_tokens": 9},
        {"max_completion_tokens": 9},
    ]


@sync_and_async
def test_what_is_remembered_belongs_to_one_model(ask):
    def policy(request):
        picky = request.model == "picky" and "temperature" in request.body
        return Fault.refuses("temperature") if picky else "fine"

    async def main(server):
        async with AsyncOpenAIBackend(base_url=server.base_url, model="gpt", max_retries=0) as llm:
            await llm.chat(HELLO, model="picky", temperature=0.2)
            await llm.chat(HELLO, temperature=0.2)

    with OpenAIServer(policy=policy) as server:
        if ask.__name__ == "ask_async":
            asyncio.run(main(server))
        else:
            with OpenAIBackend(base_url=server.base_url, model="gpt", max_retries=0) as llm:
                llm.chat(HELLO, model="picky", temperature=0.2)
                llm.chat(HELLO, temperature=0.2)
    assert [("temperature" in r.body, r.body["model"]) for r in server.requests] == [
        (True, "picky"),
        (False, "picky"),
        (True, "gpt"),
    ]


@sync_and_async
def test_a_refusal_in_other_words_is_understood(ask):
    plain = Fault.error(400, "Unsupported parameter: 'max_tokens' is not supported with this model.")
    with OpenAIServer(policy=[plain, "fine"]) as server:
        assert ask(server.base_url, max_tokens=9).text == "fine"


@sync_and_async
def test_a_model_that_takes_neither_form_is_asked_only_once_more(ask):
    with OpenAIServer(refusing=["max_tokens", "max_completion_tokens"]) as server:
        error = failed(ask, server.base_url, max_tokens=9)
    assert len(server.requests) == 2
    assert "leave 'max_completion_tokens' out" in str(error)


@sync_and_async
def test_a_server_that_keeps_refusing_what_is_not_sent_ends_the_call(ask):
    with OpenAIServer(policy=lambda _: Fault.refuses("temperature")) as server:
        assert "leave 'temperature' out" in str(failed(ask, server.base_url, temperature=0.2))
    assert len(server.requests) == 2


def test_threads_share_what_is_remembered():
    with (
        OpenAIServer(refusing=["max_tokens", "temperature"]) as server,
        OpenAIBackend(base_url=server.base_url, model="gpt", max_retries=0) as llm,
    ):
        replies: list[str] = []
        threads = [threading.Thread(target=lambda: replies.append(llm.chat(HELLO, **BOTH).text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = len(server.requests)
        llm.chat(HELLO, **BOTH)
        assert (replies, len(server.requests)) == (["hello there"] * 8, before + 1)


# --- clients --------------------------------------------------------------------------------------------------------


def test_a_client_that_was_given_stays_open():
    with OpenAIServer() as server, openai.OpenAI(base_url=server.base_url, api_key="sk-mine") as client:
        with OpenAIBackend(client, model="m") as llm:
            llm.chat(HELLO)
        assert not client.is_closed()
        assert server.requests[0].headers["authorization"] == "Bearer sk-mine"
        own = OpenAIBackend(base_url=server.base_url, model="m")
        own.close()
        assert own.client.is_closed()


def test_an_async_client_that_was_given_stays_open():
    async def main(server):
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="sk-mine") as client:
            async with AsyncOpenAIBackend(client, model="m") as llm:
                await llm.chat(HELLO)
            assert not client.is_closed()

    with OpenAIServer() as server:
        asyncio.run(main(server))
    assert server.requests[0].headers["authorization"] == "Bearer sk-mine"


def test_an_async_backend_works_in_one_event_loop_after_another():
    async def ask_and_close(llm):
        async with llm:
            return (await llm.chat(HELLO)).text

    with OpenAIServer() as server:
        llm = AsyncOpenAIBackend(base_url=server.base_url, model="m", max_retries=0)
        assert [asyncio.run(ask_and_close(llm)) for _ in range(3)] == ["hello there"] * 3


# --- through the loop -----------------------------------------------------------------------------------------------


def test_a_conversation_stays_valid_whatever_happens_in_it():
    servers: list[OpenAIServer] = []
    with ExitStack() as stack:
        outcome = both(over_the_socket(stack, OpenAIServer, KINDS, EVERYTHING, servers, hooks=[Gate()]))
    assert outcome.stop_reason == "done"
    assert [(s.tool_call.tool, s.tool_result.error is None) for s in outcome.steps] == EVERY_STEP
    assert "not valid JSON" in outcome.steps[7].tool_result.error
    assert [len(server.requests) for server in servers] == [7, 7]
    assert [r.body for r in servers[0].requests] == [r.body for r in servers[1].requests]


def test_the_chat_span_tells_model_server_and_usage():
    servers: list[OpenAIServer] = []
    with ExitStack() as stack:
        outcome = both(over_the_socket(stack, OpenAIServer, KINDS, EVERYTHING, servers, hooks=[Gate()]))
        port = int(servers[0].base_url.split(":")[2].split("/")[0])
    first = outcome.trace.find("chat *")[0]
    expected = {
        semconv.PROVIDER_NAME: "openai",
        semconv.REQUEST_MODEL: "m",
        semconv.RESPONSE_MODEL: "m-2026",
        semconv.RESPONSE_ID: "resp-1",
        semconv.RESPONSE_FINISH_REASONS: ["tool_call"],
        semconv.INPUT_TOKENS: 100,
        semconv.OUTPUT_TOKENS: 10,
        semconv.CACHE_READ_TOKENS: 40,
        semconv.REASONING_TOKENS: 4,
        semconv.SERVER_ADDRESS: "127.0.0.1",
        semconv.SERVER_PORT: port,
    }
    assert {name: first.attributes.get(name) for name in expected} == expected
    assert semconv.COST_USD not in first.attributes


@pytest.mark.parametrize("run", [run_sync, run_async])
def test_a_provider_error_ends_the_run_in_order(run, tmp_path):
    policy = [[("add", {"a": 1, "b": 2})], Fault.unauthorized()]
    with ExitStack() as stack:
        outcome = run(over_the_socket(stack, OpenAIServer, KINDS, policy, []), tmp_path)
    assert (outcome.stop_reason, outcome.raised) == ("llm_error", None)
    assert "OPENAI_API_KEY" in outcome.steps[-1].tool_result.error
    assert outcome.trace.find("chat *")[-1].attributes[semconv.ERROR_TYPE] == "auth"
    assert outcome.live == outcome.saved


def test_plain_text_calls_work_over_chat_too():
    servers: list[OpenAIServer] = []
    policy = ['{"tool": "add", "args": {"a": 1, "b": 2}}', '{"tool": "done", "args": {"answer": "x"}}'] * 2
    with ExitStack() as stack:
        settings = {"hooks": [Gate()], "config": LoopConfig(use_native_tools=False)}
        outcome = both(over_the_socket(stack, OpenAIServer, KINDS, policy, servers, **settings))
    assert [s.tool_call.tool for s in outcome.steps] == ["add", "done", "add", "done"]
    last = servers[0].requests[1].body
    assert "tools" not in last
    assert last["messages"][-1] == {"role": "user", "content": "Result of tool call call_1:\n3"}


def test_a_conversation_goes_on_after_a_break_between_two_calls():
    talk = Conversation()
    policy = [[("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})], [("done", {"answer": "x"})]]
    with OpenAIServer(policy=policy) as server, OpenAIBackend(base_url=server.base_url, model="m") as llm:
        for _ in composable_loop(llm, {"goal": "one"}, make_tools(), conversation=talk):
            break
        run = composable_loop(llm, {"goal": "two"}, make_tools(), conversation=talk)
        list(run)
    assert run.stop_reason == "done"
    contents = [m["content"] for m in server.requests[1].body["messages"]]
    assert contents == ["goal: one", None, "3", '{"error":"not run"}', "goal: two"]


def test_a_sync_backend_serves_async_for():
    async def main(llm):
        return [step async for step in async_composable_loop(llm, {}, make_tools())]

    policy = [[("look", {"name": "x"}), ("look", {"name": "y"})], [("done", {"answer": "x"})]]
    with OpenAIServer(policy=policy) as server, OpenAIBackend(base_url=server.base_url, model="m") as llm:
        assert [step.tool_call.tool for step in asyncio.run(main(llm))] == [look.name, look.name, "done"]


# --- telling a call once --------------------------------------------------------------------------------------------


class Instrumented:
    """A client that notes what an instrumentation would find in the context."""

    def __init__(self, client: Any) -> None:
        self.inner = client
        self.base_url = client.base_url
        self.chat = self.completions = self
        self.suppressed: list[bool] = []
        self.inference: list[Any] = []

    def create(self, **request: Any) -> Any:
        self.suppressed.append(bool(otel_context.get_value("suppress_instrumentation")))
        self.inference.append(otel_context.get_value("inference"))
        return self.inner.chat.completions.create(**request)


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("is_async", [False, True])
def test_an_instrumented_client_is_silent_inside_a_chat_span_only(is_async, is_recorded, tmp_path):
    hooks = [ProvenanceSink(tmp_path)] if is_recorded else []

    def run(server):
        with openai.OpenAI(base_url=server.base_url, api_key="sk") as client:
            spy = Instrumented(client)
            llm = OpenAIBackend(spy, model="m")
            llm.chat(HELLO)
            list(composable_loop(llm, {}, make_tools(), hooks=hooks))
            return spy.suppressed

    async def arun(server):
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="sk") as client:
            spy = Instrumented(client)
            llm = AsyncOpenAIBackend(spy, model="m")
            await llm.chat(HELLO)
            assert [step async for step in async_composable_loop(llm, {}, make_tools(), hooks=hooks)]
            return spy.suppressed

    with OpenAIServer(policy=["hi", [("done", {"answer": "x"})]]) as server:
        suppressed = asyncio.run(arun(server)) if is_async else run(server)
    assert suppressed == [False, is_recorded]
    assert otel_context.get_value("suppress_instrumentation") is None
    if is_recorded:
        assert len(Trace.load(tmp_path).find("chat *")) == 1


def test_the_genai_instrumentations_are_told_in_their_own_way(monkeypatch, tmp_path):
    class InferenceData:
        pass

    module = SimpleNamespace(CLIENT_INFERENCE_CONTEXT_KEY="inference", InferenceData=InferenceData)
    monkeypatch.setitem(sys.modules, "opentelemetry.util.genai.invocation", module)
    with (
        OpenAIServer(policy=[[("done", {"answer": "x"})]]) as server,
        openai.OpenAI(base_url=server.base_url, api_key="sk") as client,
    ):
        spy = Instrumented(client)
        list(composable_loop(OpenAIBackend(spy, model="m"), {}, make_tools(), hooks=[ProvenanceSink(tmp_path)]))
    assert [type(found) for found in spy.inference] == [InferenceData]


# --- money ----------------------------------------------------------------------------------------------------------


class At:
    """A backend at an address."""

    def __init__(self, base_url):
        self.base_url = base_url


def test_only_a_provider_with_a_price_list_has_a_cost():
    usage = Usage(1_000_000, 0)
    openai_url = OpenAIBackend(api_key="sk", model="gpt-4o").base_url
    assert priced(usage, "gpt-4o", At(openai_url)).cost_usd == pytest.approx(2.5)
    assert priced(usage, "gpt-4o", At("http://127.0.0.1:8000/v1")).cost_usd is None
    assert priced(usage, "no-such-model", At(openai_url)).cost_usd is None
    assert priced(usage, "gpt-4o", At("")).cost_usd is None


def test_the_cost_of_a_call_is_on_its_span(tmp_path):
    answer = Answer(tool_calls=[("done", {"answer": "x"})], usage=Usage(1_000_000, 0), model="gpt-4o-2024-08-06")
    with OpenAIServer(policy=[answer]) as server, openai.OpenAI(base_url=server.base_url, api_key="sk") as client:
        elsewhere = Instrumented(client)
        elsewhere.base_url = "https://api.openai.com/v1/"
        llm = OpenAIBackend(elsewhere, model="gpt-4o")
        (step,) = composable_loop(llm, {}, make_tools(), hooks=[ProvenanceSink(tmp_path)])
    (chat,) = Trace.load(tmp_path).find("chat *")
    assert chat.attributes[semconv.COST_USD] == step.usage.cost_usd == pytest.approx(2.5)
    assert chat.attributes[semconv.SERVER_ADDRESS] == "api.openai.com"

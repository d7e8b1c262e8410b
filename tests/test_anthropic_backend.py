"""`AnthropicBackend` and its async twin: through the real `anthropic` client, over real sockets."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
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
from support import add, both, make_tools, run_async, run_sync

from looplet import (
    AnthropicBackend,
    AsyncAnthropicBackend,
    CachePolicy,
    ConfigError,
    ContextOverflow,
    Conversation,
    LoopConfig,
    Message,
    OpenAIBackend,
    ProvenanceSink,
    Reply,
    ToolCall,
    Trace,
    Usage,
    async_composable_loop,
    composable_loop,
)
from looplet.backends.completions import wire_messages
from looplet.backends.messages_api import request_of
from looplet.messages import clean_message
from looplet.prices import priced
from looplet.prompt import Prompt
from looplet.telemetry import semconv
from looplet.testing import Answer, AnthropicServer, Fault
from looplet.testing._anthropic_wire import sign

anthropic = pytest.importorskip("anthropic", reason="NOT TESTED: AnthropicBackend, for want of the anthropic package")

NOWHERE = "http://127.0.0.1:9"
MARK = {"cache_control": {"type": "ephemeral"}}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("API_KEY", "BASE_URL", "MODEL", "AUTH_TOKEN"):
        monkeypatch.delenv(f"ANTHROPIC_{name}", raising=False)


KINDS = (AnthropicBackend, AsyncAnthropicBackend)
sync_and_async = askers(AnthropicBackend, AsyncAnthropicBackend, model="claude", max_retries=0)
classes = pytest.mark.parametrize("make", [AnthropicBackend, AsyncAnthropicBackend])


def result(call_id: str, response: Any) -> Message:
    return Message.of_result(call_id, response)


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def tool_use(call_id: str, name: str, /, **args: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": args}


def tool_result(call_id: str, content: str, *, is_error: bool = False) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, "is_error": is_error}


def thought(words: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": words, "signature": sign(words)}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


# --- settings -------------------------------------------------------------------------------------------------------


def test_the_anthropic_package_is_loaded_by_the_first_backend():
    code = "import sys; from looplet import AnthropicBackend; before = 'anthropic' in sys.modules; "
    code += "AnthropicBackend(base_url='http://127.0.0.1', model='m'); print(before, 'anthropic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@classes
@pytest.mark.parametrize("kind", [ImportError, ConfigError])
def test_without_the_package_the_error_names_the_extra(make, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "anthropic", None)
    with pytest.raises(kind, match=r'pip install "looplet\[anthropic\]"'):
        make(api_key="sk", model="m")


@classes
def test_from_env_reads_the_three_variables_and_arguments_win(make, monkeypatch):
    for name, value in (("BASE_URL", "http://127.0.0.1:1234/"), ("API_KEY", " sk-env\n"), ("MODEL", "env-model")):
        monkeypatch.setenv(f"ANTHROPIC_{name}", value)
    backend = make.from_env()
    assert (backend.model, backend.base_url, backend.client.api_key) == ("env-model", "http://127.0.0.1:1234", "sk-env")
    other = make.from_env(model="mine", base_url="http://localhost", default_max_tokens=7)
    assert (other.model, other.base_url, other.default_max_tokens) == ("mine", "http://localhost", 7)


@classes
def test_a_key_alone_means_anthropic_and_a_base_url_alone_needs_no_key(make, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-env")
    backend = make.from_env(model="m")
    told = (backend.provider, backend.base_url, backend.server_address, backend.server_port)
    assert told == ("anthropic", "https://api.anthropic.com", "api.anthropic.com", 443)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    assert make(base_url="http://localhost:11434", model="m").client.api_key == "none"


@classes
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "m"}, ["ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "api.anthropic.com"]),
        ({"base_url": NOWHERE}, ["model=", "ANTHROPIC_MODEL"]),
        ({"base_url": "localhost:11434", "model": "m"}, ["http://", "'localhost:11434'"]),
        ({"model": "m", "api_key": "sk-…abc"}, ["'…'", "position 3", "ANTHROPIC_API_KEY"]),
        ({"client": "claude-5", "model": "m"}, ["str", "model='claude-5'"]),
        ({"base_url": NOWHERE, "model": "m", "cache": True}, ["CachePolicy", "True"]),
        ({"base_url": NOWHERE, "model": "m", "thinking": 1000}, ["1024", "'adaptive'", "1000"]),
        ({"base_url": NOWHERE, "model": "m", "thinking": "much"}, ["'much'"]),
        ({"base_url": NOWHERE, "model": "m", "thinking": True}, ["True"]),
    ],
)
def test_settings_that_cannot_work_say_what_to_write(make, settings, words):
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("is_async", [False, True])
def test_a_client_of_the_other_kind_is_refused_and_so_are_two_sets_of_settings(is_async):
    make = AsyncAnthropicBackend if is_async else AnthropicBackend
    own, other = anthropic.Anthropic, anthropic.AsyncAnthropic
    own, other = (other, own) if is_async else (own, other)
    with pytest.raises(ConfigError, match=f"not an {other.__name__}"):
        make(other(api_key="sk", base_url=NOWHERE), model="m")
    with pytest.raises(ConfigError, match="not both"):
        make(own(api_key="sk"), model="m", base_url=NOWHERE)


@pytest.mark.parametrize(
    ("url", "provider"),
    [
        ("https://bedrock-runtime.us-east-1.amazonaws.com", "aws.bedrock"),
        ("https://us-east5-aiplatform.googleapis.com/v1", "gcp.vertex_ai"),
        ("http://127.0.0.1:8000", "anthropic"),
    ],
)
def test_the_provider_comes_from_the_base_url(url, provider):
    assert AnthropicBackend(base_url=url, api_key="sk", model="m").provider == provider


@pytest.mark.parametrize("name", ["chat", "generate", "from_env"])
def test_all_backends_with_clients_are_asked_the_same_way(name):
    signatures = {
        str(inspect.signature(getattr(kind, name))) for kind in (AnthropicBackend, AsyncAnthropicBackend, OpenAIBackend)
    }
    assert len(signatures) == 1


@pytest.mark.parametrize(
    ("settings", "words"), [({"messages": 3}, "4"), ({"messages": -1}, "messages=-1"), ({"ttl": "2h"}, "'2h'")]
)
def test_a_cache_policy_that_the_api_would_refuse_is_refused_at_once(settings, words):
    with pytest.raises(ConfigError, match=words):
        CachePolicy(**settings)


# --- requests -------------------------------------------------------------------------------------------------------


@sync_and_async
def test_a_conversation_goes_out_as_the_messages_api_has_it(ask):
    messages = [
        *HELLO,
        calling(ToolCall("add", {"a": 1, "b": 2}, call_id="c1"), ToolCall("look", {}, call_id="c2"), text="let me see"),
        result("c1", 3),
        result("c2", "as it is"),
        Message.of_text("user", "a briefing"),
        calling(ToolCall("look", {"name": "ä"}, call_id="c3"), reasoning="of another provider, unsigned"),
        result("c3", {"found": True, "list": [1, None]}),
        calling(ToolCall("boom", {}, call_id="c4")),
        result("c4", {"error": "kaput", "kind": "execution"}),
    ]
    with AnthropicServer(policy=["fine"]) as server:
        tools = make_tools().tool_schemas()[:1]
        ask(server.base_url, messages, tools=tools, system_prompt="be brief", max_tokens=9, temperature=0.5)
    (request,) = server.requests
    assert request.path == "/v1/messages"
    assert request.body == {
        "model": "claude",
        "max_tokens": 9,
        "system": "be brief",
        "temperature": 0.5,
        "tools": [{"name": "add", "description": "Add two numbers.", "input_schema": add.json_schema}],
        "messages": [
            user(text("hello there")),
            assistant(text("let me see"), tool_use("c1", "add", a=1, b=2), tool_use("c2", "look")),
            user(tool_result("c1", "3"), tool_result("c2", "as it is"), text("a briefing")),
            assistant(tool_use("c3", "look", name="ä")),
            user(tool_result("c3", '{"found":true,"list":[1,null]}')),
            assistant(tool_use("c4", "boom")),
            user(tool_result("c4", '{"error":"kaput","kind":"execution"}', is_error=True)),
        ],
    }


@sync_and_async
def test_what_is_not_asked_for_is_not_sent(ask):
    with AnthropicServer() as server:
        ask(server.base_url, tools=[])
        ask(server.base_url, backend={"default_max_tokens": 5}, top_k=1, extra_body={"new": 3})
        ask(server.base_url, backend={"default_max_tokens": 5}, max_tokens=6)
    bodies = [{name: value for name, value in r.body.items() if name != "messages"} for r in server.requests]
    assert bodies == [
        {"model": "claude", "max_tokens": 4096},
        {"model": "claude", "max_tokens": 5, "top_k": 1, "new": 3},
        {"model": "claude", "max_tokens": 6},
    ]


@sync_and_async
def test_broken_pairs_of_calls_and_results_are_mended(ask):
    messages = [
        calling(ToolCall("add", {}, call_id="c0"), text="begins in the middle"),
        result("gone", "of a call that was compacted away"),
        *HELLO,
        calling(ToolCall("add", {}, call_id="c1"), ToolCall("add", {}, call_id="c2")),
        Message.of_text("user", "a word in between"),
        result("c1", "one"),
        calling(ToolCall("add", {}, call_id="c2")),
        result("c2", "of the second"),
    ]
    with AnthropicServer(policy=["fine"]) as server:
        assert ask(server.base_url, messages, tools=make_tools().tool_schemas()).text == "fine"
    not_run = '{"error":"not run"}'
    assert server.requests[0].body["messages"] == [
        user(text("(go on)")),
        assistant(text("begins in the middle"), tool_use("c0", "add")),
        user(
            tool_result("c0", not_run, is_error=True),
            text("Result of tool call gone:\nof a call that was compacted away"),
            text("hello there"),
        ),
        assistant(tool_use("c1", "add"), tool_use("c2", "add")),
        user(tool_result("c1", "one"), tool_result("c2", not_run, is_error=True), text("a word in between")),
        assistant(tool_use("c2_2", "add")),
        user(tool_result("c2_2", "of the second")),
    ]


@sync_and_async
def test_messages_of_one_role_become_one_and_empty_ones_none(ask):
    messages = [
        Message.of_text("system", "rule one"),
        Message.of_text("user", "a"),
        Message.of_text("user", " \n"),
        Message.of_text("user", "b"),
        Message.of_text("assistant", "c"),
        Message.of_text("assistant", ""),
        Message.of_text("system", "rule two"),
        Message.of_text("assistant", "d"),
        Message.of_text("user", "e"),
    ]
    with AnthropicServer() as server:
        ask(server.base_url, messages, system_prompt="rule zero")
        ask(server.base_url, [Message.of_text("user", "")])
    first, second = (request.body for request in server.requests)
    assert first["system"] == "rule zero\n\nrule one\n\nrule two"
    assert first["messages"] == [user(text("a"), text("b")), assistant(text("c"), text("d")), user(text("e"))]
    assert second["messages"] == [user(text("(go on)"))]


@sync_and_async
@pytest.mark.parametrize(
    ("call", "sent"),
    [
        (ToolCall("repo.open file", {}, call_id="a b"), tool_use("a_b", "repo_open_file")),
        (ToolCall("", {}, call_id=""), tool_use("call", "unknown")),
        (ToolCall("x" * 99, {}, call_id="c"), tool_use("c", "x" * 64)),
    ],
)
def test_what_the_model_made_up_is_not_refused_on_its_way_back(ask, call, sent):
    with AnthropicServer(policy=["fine"]) as server:
        ask(server.base_url, [*HELLO, calling(call), result(call.call_id, "no such tool")])
    assert server.requests[0].body["messages"][1] == assistant(sent)
    assert server.requests[0].body["messages"][2] == user(tool_result(sent["id"], "no such tool"))


@sync_and_async
def test_calls_without_tools_get_stand_ins_that_must_not_be_called(ask):
    with AnthropicServer(policy=["fine"]) as server:
        ask(server.base_url, [*HELLO, calling(ToolCall("add", {}, call_id="c")), result("c", 3)])
    body = server.requests[0].body
    assert body["tools"] == [{"name": "add", "input_schema": {"type": "object"}}]
    assert body["tool_choice"] == {"type": "none"}


def test_arguments_that_are_text_already_go_out_as_an_object():
    parts = ('{"a": 1}', {"a": 1}), ("what?", {"_raw_arguments": "what?"}), (None, {})
    for given, sent in parts:
        part = {"type": "tool_call", "id": "c", "name": "add", "arguments": given}
        request = request_of([*HELLO, Message("assistant", (part,))], model="m", max_tokens=1)
        assert request["messages"][1]["content"][0]["input"] == sent


def test_generate_asks_with_one_text():
    with AnthropicServer() as server:
        with AnthropicBackend(base_url=server.base_url, model="m") as llm:
            assert llm.generate("what?", max_tokens=3, system_prompt="sys") == "what?"

        async def main():
            async with AsyncAnthropicBackend(base_url=server.base_url, model="m") as llm:
                return await llm.generate("what?")

        assert asyncio.run(main()) == "what?"
    assert [request.body.get("system") for request in server.requests] == ["sys", None]


# --- cache markers --------------------------------------------------------------------------------------------------

TALK = [
    *HELLO,
    calling(ToolCall("add", {}, call_id="c1")),
    result("c1", 1),
    calling(ToolCall("add", {}, call_id="c2")),
    result("c2", 2),
]


def marks(body: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return where the markers are."""
    places = [("tools", tool) for tool in body.get("tools", ())]
    places += [("system", block) for block in body["system"] if isinstance(block, dict)]
    places += [(f"{i}.{b['type']}", b) for i, m in enumerate(body["messages"]) for b in m["content"]]
    return [(where, block["cache_control"].get("ttl")) for where, block in places if "cache_control" in block]


@sync_and_async
@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (None, []),
        (CachePolicy(), [("tools", None), ("system", None), ("2.tool_result", None), ("4.tool_result", None)]),
        (CachePolicy(tools=False, messages=0, ttl="1h"), [("system", "1h")]),
        (CachePolicy(tools=False, system=False, messages=1), [("4.tool_result", None)]),
        (CachePolicy(tools=False, system=False, messages=4), [(f"{i}.{k}", None) for i, k in
         ((0, "text"), (2, "tool_result"), (4, "tool_result"))]),
    ],
    ids=["off", "default", "an hour", "last message", "more than there are"],
)  # fmt: skip
def test_cache_markers_stand_where_the_policy_says(ask, cache, expected):
    with AnthropicServer(policy=["fine"]) as server:
        tools = make_tools().tool_schemas()
        ask(server.base_url, TALK, backend={"cache": cache}, tools=tools, system_prompt="be brief")
    body = server.requests[0].body
    assert marks(body) == expected
    assert len(body["tools"]) == len(tools)


def test_marking_changes_nothing_else_and_nothing_of_ours():
    before = [message.to_dict() for message in TALK]
    settings = {"model": "m", "max_tokens": 1, "system_prompt": "s", "tools": make_tools().tool_schemas()}
    plain, marked = request_of(TALK, **settings), request_of(TALK, cache=CachePolicy(), **settings)
    for block in [*marked["tools"], *marked["system"], *(b for m in marked["messages"] for b in m["content"])]:
        block.pop("cache_control", None)
    assert marked == {**plain, "system": [text("s")]}
    assert [message.to_dict() for message in TALK] == before


def test_there_is_nothing_to_mark_in_what_is_not_sent():
    request = request_of(HELLO, model="m", max_tokens=1, cache=CachePolicy())
    assert set(request) == {"model", "max_tokens", "messages"}


# --- replies --------------------------------------------------------------------------------------------------------


@sync_and_async
def test_a_reply_holds_all_that_the_response_says(ask):
    calls = [("search", {"q": "ä"}), {"name": "open", "args": {}, "id": "mine"}]
    answer = Answer("both", calls, Usage(100, 20), model="claude-2026", id="msg-7")
    with AnthropicServer(policy=[answer]) as server:
        assert ask(server.base_url) == Reply(
            text="both",
            tool_calls=(ToolCall("search", {"q": "ä"}, call_id="toolu_0_0"), ToolCall("open", {}, call_id="mine")),
            usage=Usage(100, 20),
            model="claude-2026",
            response_id="msg-7",
            finish_reason="tool_call",
        )


@sync_and_async
def test_input_includes_what_was_read_from_the_cache_and_written_to_it(ask):
    usage = {"input_tokens": 5, "cache_read_input_tokens": 60, "cache_creation_input_tokens": 300, "output_tokens": 7}
    more = {"output_tokens_details": {"thinking_tokens": 4}}
    with canned({"type": "message", "content": [], "usage": {**usage, **more}}) as url:
        assert ask(url).usage == Usage(365, 7, 60, 4, cache_write_tokens=300)
    with canned({"type": "message", "content": [], "usage": {"output_tokens": 3}}) as url:
        assert ask(url).usage == Usage(0, 3)


@sync_and_async
def test_usage_that_was_not_reported_is_none(ask):
    with AnthropicServer(policy=[Answer("x", usage=())]) as server:
        assert ask(server.base_url).usage is None


@sync_and_async
@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_call"),
        ("refusal", "content_filter"),
        ("something new", "stop"),
    ],
)
def test_finish_reasons_are_those_of_the_conventions(ask, reason, told):
    with AnthropicServer(policy=[Answer("x", finish_reason=reason)]) as server:
        assert ask(server.base_url).finish_reason == told


@sync_and_async
@pytest.mark.parametrize(
    ("sent", "args"),
    [('{"a": 1}', {"a": 1}), ('{"a": 1', {"_raw_arguments": '{"a": 1'}), ("[1]", {"_raw_arguments": "[1]"})],
)
def test_arguments_that_are_no_object_are_kept_as_text(ask, sent, args):
    with AnthropicServer(policy=[[("add", sent)]]) as server:
        assert ask(server.base_url).tool_calls[0].args == args


@sync_and_async
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"content": []}, Reply()),
        ({"content": [text("a"), text("b"), tool_use("c", "add"), text("z")]}, Reply("ab\nz")),
        ({"content": [{"type": "server_tool_use", "id": "s"}, text("a")]}, Reply("a")),
        (
            {"content": [], "stop_reason": "refusal", "stop_details": {"type": "refusal", "explanation": "I will not"}},
            Reply(metadata={"refusal": "I will not"}),
        ),
    ],
    ids=["nothing", "texts", "unknown block", "refusal"],
)
def test_blocks_of_all_kinds_are_understood(ask, said, expected):
    with canned({"type": "message", **said}) as url:
        reply = ask(url)
    assert (reply.text, reply.metadata, reply.parts) == (expected.text, expected.metadata, ())


# --- thinking -------------------------------------------------------------------------------------------------------

THINK = {"thinking": 2000}


@sync_and_async
def test_thoughts_are_kept_in_order_with_what_seals_them(ask):
    said = [thought("first"), text("so"), {"type": "redacted_thinking", "data": "aGlkZGVu"}, tool_use("c", "add")]
    with canned({"type": "message", "content": [*said, thought("last")]}) as url:
        reply = ask(url)
    assert (reply.reasoning, reply.text) == ("first\nlast", "so")
    assert Message.of_reply(reply).parts == (
        {"type": "reasoning", "content": "first", "signature": sign("first")},
        {"type": "text", "content": "so"},
        {"type": "reasoning", "content": "", "encrypted": "aGlkZGVu"},
        {"type": "tool_call", "id": "c", "name": "add", "arguments": {}},
        {"type": "reasoning", "content": "last", "signature": sign("last")},
    )


def test_the_parts_of_a_reply_only_place_what_its_fields_say():
    seal = {"type": "reasoning", "content": "hm", "signature": "s"}
    reply = Reply("new", (ToolCall("b", call_id="2"), ToolCall("c", call_id="3")), parts=({"type": "tool_call"}, seal))
    kinds = [(part["type"], part.get("id")) for part in Message.of_reply(reply).parts]
    assert kinds == [("tool_call", "2"), ("reasoning", None), ("text", None), ("tool_call", "3")]
    silent = Reply(parts=(seal, {"type": "text"}, {"type": "tool_call"}))
    assert Message.of_reply(silent).parts == (seal,)


@sync_and_async
@pytest.mark.parametrize(
    ("thinking", "sent"),
    [
        (2000, {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 2009}),
        ("adaptive", {"thinking": {"type": "adaptive"}, "max_tokens": 9}),
        ({"type": "enabled", "budget_tokens": 1024}, {"thinking": {"type": "enabled", "budget_tokens": 1024},
                                                      "max_tokens": 1033}),
        ({"type": "disabled"}, {"thinking": {"type": "disabled"}, "max_tokens": 9, "temperature": 0.2}),
        (None, {"max_tokens": 9, "temperature": 0.2}),
    ],
    ids=["budget", "adaptive", "object", "disabled", "none"],
)  # fmt: skip
def test_a_thinking_model_gets_room_to_think_and_no_temperature(ask, thinking, sent):
    with AnthropicServer() as server:
        ask(server.base_url, backend={"thinking": thinking}, max_tokens=9, temperature=0.2)
    body = {name: value for name, value in server.requests[0].body.items() if name not in ("model", "messages")}
    assert body == sent


def test_a_budget_within_max_tokens_and_a_temperature_of_one_stay_as_they_are():
    settings = {"model": "m", "thinking": {"type": "enabled", "budget_tokens": 2000}}
    request = request_of(HELLO, max_tokens=2001, temperature=1, **settings)
    assert (request["max_tokens"], request["temperature"]) == (2001, 1)


THINKING_RUN = [
    Answer("I add.", [("add", {"a": 1, "b": 2})], thinking=["Let me see: 1 and 2.", b"hidden"]),
    Answer(tool_calls=[("look", {"name": "x"}), ("look", {"name": "y"})], thinking=["Now look."]),
    [("look", {"name": "z"})],
    Answer(tool_calls=[("boom", {})], thinking=[b"hidden again"]),
    Answer(tool_calls=[("done", {"answer": "3"})], thinking=["Enough."]),
]


def thoughts_in(messages: list[dict[str, Any]]) -> list[str]:
    told = (block for message in messages for block in message["content"])
    return [b.get("thinking") or b["data"] for b in told if b["type"] in ("thinking", "redacted_thinking")]


def test_thoughts_go_back_unchanged_over_a_tool_loop():
    servers: list[AnthropicServer] = []
    with ExitStack() as stack:
        outcome = both(over_the_socket(stack, AnthropicServer, KINDS, THINKING_RUN, servers, backend=THINK))
    assert outcome.stop_reason == "done"
    bodies = [request.body for request in servers[0].requests]
    assert bodies == [request.body for request in servers[1].requests]
    assert [len(thoughts_in(body["messages"])) for body in bodies] == [0, 2, 3, 3, 4]
    assert all(body["thinking"] == {"type": "enabled", "budget_tokens": 2000} for body in bodies)
    (run,) = outcome.trace.runs
    recorded = run.request(run.chats[-1])
    assert request_of(recorded[1:], model="m", max_tokens=1)["messages"] == bodies[-1]["messages"]
    assert run.conversation()[-1].parts[0] == {"type": "reasoning", "content": "Enough.", "signature": sign("Enough.")}


def test_a_redacted_thought_is_not_sent_back_and_the_turn_goes_on_without_thinking():
    servers: list[AnthropicServer] = []
    policy = [
        Answer(tool_calls=[("add", {"a": 1, "b": 2})], thinking=["the secret is 7"]),
        Answer(tool_calls=[("add", {"a": 1, "b": 2})]),
        Answer(tool_calls=[("done", {"answer": "3"})]),
    ]
    config = LoopConfig(redact=lambda said: said.replace("secret", "[gone]"))
    with ExitStack() as stack:
        outcome = both(over_the_socket(stack, AnthropicServer, KINDS, policy, servers, backend=THINK, config=config))
    assert outcome.stop_reason == "done"
    assert ["thinking" in request.body for request in servers[0].requests] == [True, False, False]
    assert [thoughts_in(request.body["messages"]) for request in servers[0].requests] == [[], [], []]
    (run,) = outcome.trace.runs
    assert run.request(run.chats[1])[2].parts[0] == {"type": "reasoning", "content": "the [gone] is 7"}


def test_the_next_turn_of_the_user_is_thought_about_again():
    lost = [*HELLO, calling(ToolCall("add", {}, call_id="c")), result("c", 3)]
    settings = {"model": "m", "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 2000}}
    assert "thinking" not in request_of(lost, **settings)
    again = [*lost, Message.of_text("assistant", "3"), Message.of_text("user", "and now?")]
    assert "thinking" in request_of(again, **settings)
    assert "thinking" in request_of(lost, **{**settings, "thinking": {"type": "adaptive"}})


def test_a_thought_that_something_changed_loses_its_seal():
    sealed = Message("assistant", ({"type": "reasoning", "content": "hm, 42", "signature": "s42"},))
    hidden = Message("assistant", ({"type": "reasoning", "content": "", "encrypted": "e42"},))
    for message, changed in ((sealed, {"content": "hm, x"}), (hidden, {"content": ""})):
        (part,) = clean_message(message, lambda said: said.replace("42", "x")).parts
        assert part == {"type": "reasoning", **changed}
        assert clean_message(message, str).parts == message.parts
    rewritten = Prompt.of([sealed]).rewrite(lambda said: said.replace("42", "x"))
    assert rewritten.messages[0].parts == ({"type": "reasoning", "content": "hm, x"},)
    assert Prompt.of([sealed, hidden]).rewrite(str).messages == [sealed, hidden]


@sync_and_async
def test_thoughts_never_stand_behind_other_words_of_a_message(ask):
    reply = Reply("b", parts=({"type": "reasoning", "content": "hm", "signature": sign("hm")},))
    talk = [*HELLO, Message.of_text("assistant", "a"), Message.of_reply(reply), Message.of_text("user", "c")]
    with AnthropicServer() as server:
        ask(server.base_url, talk)
    assert server.requests[0].body["messages"] == [
        user(text("hello there")),
        assistant(text("a")),
        user(text("(go on)")),
        assistant(thought("hm"), text("b")),
        user(text("c")),
    ]


def test_another_provider_gets_the_words_without_the_thoughts():
    reply = Reply("b", parts=({"type": "reasoning", "content": "hm", "signature": "s"},))
    assert wire_messages([Message.of_reply(reply)]) == [{"role": "assistant", "content": "b"}]


# --- failures -------------------------------------------------------------------------------------------------------


@sync_and_async
@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (Fault.unauthorized(), (401, "auth", False, None), ["Incorrect API key provided", "ANTHROPIC_API_KEY"]),
        (Fault.error(402, "pay"), (402, "quota", False, None), ["pay", "billing"]),
        (Fault.error(403, "not in your country"), (403, "auth", False, None), ["not in your country"]),
        (
            Fault.error(404, "model: claude"),
            (404, "not_found", False, None),
            ["model: claude", "'claude'", "ANTHROPIC_MODEL", "ANTHROPIC_BASE_URL"],
        ),
        (Fault.error(408, "slow"), (408, "timeout", True, None), ["slow", "timeout_s="]),
        (Fault.rate_limited(), (429, "rate_limit", True, None), ["Rate limit reached"]),
        (Fault.rate_limited(2.5), (429, "rate_limit", True, 2.5), ["again in 2.5 s"]),
        (Fault.server_error("out of order"), (500, "server_error", True, None), ["out of order", "later"]),
        (Fault.error(504, "gateway"), (504, "server_error", True, None), ["gateway"]),
        (Fault.overloaded(), (529, "overloaded", True, None), ["answered 529: Overloaded", "later"]),
        (Fault.error(400, "bad 'x'"), (400, "bad_request", False, None), ["answered 400: bad 'x'"]),
        (
            Fault.error(400, "Your credit balance is too low to access the API."),
            (400, "quota", False, None),
            ["credit balance", "billing"],
        ),
        (Fault.empty(), (None, "bad_response", True, None), ["no content"]),
        (Fault.malformed(), (None, "bad_response", True, None), ["broken JSON"]),
        (Fault.cut(), (None, "network", True, None), ["cannot reach", "ANTHROPIC_BASE_URL"]),
    ],
    ids=name_of_fault,
)
def test_a_fault_becomes_an_error_with_the_providers_words_and_what_to_do(ask, fault, expected, words):
    with AnthropicServer(policy=lambda _: fault) as server:
        error = failed(ask, server.base_url)
    assert gist(error) == expected
    assert [word for word in words if word not in str(error)] == []


@sync_and_async
@pytest.mark.parametrize(
    "fault",
    [
        Fault.context_overflow(),
        Fault.error(400, "prompt is too long: 208310 tokens > 200000 maximum"),
        Fault.error(400, "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000"),
        Fault.error(413, "Request exceeds the maximum size"),
    ],
)
def test_a_request_longer_than_the_window_is_a_context_overflow(ask, fault):
    with AnthropicServer(policy=lambda _: fault) as server:
        error = failed(ask, server.base_url)
    assert isinstance(error, ContextOverflow)
    assert gist(error) == (fault.status, "context_overflow", False, None)
    assert fault.message.rstrip(".") in str(error)


@sync_and_async
def test_no_answer_in_time_is_a_timeout(ask):
    with AnthropicServer(policy=lambda _: Fault.slow(60, "late")) as server:
        error = failed(ask, server.base_url, backend={"timeout_s": 0.05})
    assert gist(error) == (None, "timeout", True, None)


@sync_and_async
def test_a_server_that_is_not_there_is_a_network_error_that_names_the_cause(ask):
    with AnthropicServer() as server:
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
        (b"null", "application/json", ["no content"]),
        (b'{"error": {"message": "upstream is down"}}', "application/json", ["upstream is down"]),
        (b'{"content": "hello"}', "application/json", ["no content"]),
    ],
)
def test_a_response_that_is_no_message_is_a_bad_response(ask, body, kind, words):
    with canned(body, kind=kind) as url:
        error = failed(ask, url)
    assert error.kind == "bad_response"
    assert [word for word in words if word not in str(error)] == []


@pytest.mark.skipif(
    not hasattr(anthropic.Anthropic, "_calculate_nonstreaming_timeout"), reason="this client waits for any answer"
)
@sync_and_async
def test_an_answer_too_long_to_wait_for_says_what_to_set(ask):
    with AnthropicServer() as server:
        with pytest.raises(ConfigError, match="timeout_s="):
            ask(server.base_url, max_tokens=100_000)
        assert ask(server.base_url, max_tokens=100_000, backend={"timeout_s": 30}).text == "hello there"


@sync_and_async
def test_what_the_package_does_not_know_and_streams_say_what_to_do(ask):
    with AnthropicServer() as server:
        with pytest.raises(ConfigError, match=r"'seed'.*extra_body"):
            ask(server.base_url, seed=3)
        with pytest.raises(ConfigError, match="stream"):
            ask(server.base_url, stream=True)
        assert gist(failed(ask, server.base_url, metadata=object())) == (None, "backend_error", False, None)
    assert server.requests == []


@sync_and_async
def test_a_temperature_that_the_model_refuses_is_left_out_and_remembered(ask):
    with AnthropicServer(refusing=["temperature"]) as server:
        assert ask(server.base_url, times=2, temperature=0.2).text == "hello there"
    assert [request.body.get("temperature") for request in server.requests] == [0.2, None, None]


@sync_and_async
def test_another_refused_parameter_is_named(ask):
    with AnthropicServer(refusing=["top_p"]) as server:
        assert "leave 'top_p' out" in str(failed(ask, server.base_url, top_p=0.5))


# --- clients --------------------------------------------------------------------------------------------------------


def test_a_client_that_was_given_stays_open():
    with AnthropicServer() as server, anthropic.Anthropic(base_url=server.base_url, api_key="sk-mine") as client:
        with AnthropicBackend(client, model="m") as llm:
            llm.chat(HELLO)
        assert not client.is_closed()
        sent = server.requests[0].headers
        assert "sk-mine" in (sent.get("x-api-key") or sent["authorization"])
        own = AnthropicBackend(base_url=server.base_url, model="m")
        own.close()
        assert own.client.is_closed()


def test_an_async_backend_works_in_one_event_loop_after_another():
    async def ask_and_close(llm):
        async with llm:
            return (await llm.chat(HELLO)).text

    with AnthropicServer() as server:
        llm = AsyncAnthropicBackend(base_url=server.base_url, model="m", max_retries=0)
        assert [asyncio.run(ask_and_close(llm)) for _ in range(3)] == ["hello there"] * 3


# --- through the loop -----------------------------------------------------------------------------------------------


def test_a_conversation_stays_valid_whatever_happens_in_it():
    servers: list[AnthropicServer] = []
    with ExitStack() as stack:
        outcome = both(
            over_the_socket(
                stack, AnthropicServer, KINDS, EVERYTHING, servers, hooks=[Gate()], backend={"cache": CachePolicy()}
            )
        )
    assert outcome.stop_reason == "done"
    assert [(s.tool_call.tool, s.tool_result.error is None) for s in outcome.steps] == EVERY_STEP
    assert [len(server.requests) for server in servers] == [7, 7]
    assert [r.body for r in servers[0].requests] == [r.body for r in servers[1].requests]


def test_the_chat_span_tells_model_server_and_usage():
    servers: list[AnthropicServer] = []
    usage = Usage(100, 10, 40, 4, cache_write_tokens=30)
    policy = [Answer("I end.", [("done", {"answer": "x"})], usage, id="resp-1", model="m-2026")]
    with ExitStack() as stack:
        outcome = both(over_the_socket(stack, AnthropicServer, KINDS, policy, servers))
        port = int(servers[0].base_url.rsplit(":")[2])
    first = outcome.trace.find("chat *")[0]
    expected = {
        semconv.PROVIDER_NAME: "anthropic",
        semconv.REQUEST_MODEL: "m",
        semconv.RESPONSE_MODEL: "m-2026",
        semconv.RESPONSE_ID: "resp-1",
        semconv.RESPONSE_FINISH_REASONS: ["tool_call"],
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 40,
        "gen_ai.usage.cache_creation.input_tokens": 30,
        "gen_ai.usage.reasoning.output_tokens": 4,
        semconv.SERVER_ADDRESS: "127.0.0.1",
        semconv.SERVER_PORT: port,
    }
    assert {name: first.attributes.get(name) for name in expected} == expected
    assert outcome.steps[0].usage == usage
    assert outcome.trace.runs[0].usage.cache_write_tokens == 30


@pytest.mark.parametrize("run", [run_sync, run_async])
def test_a_provider_error_ends_the_run_in_order(run, tmp_path):
    policy = [[("add", {"a": 1, "b": 2})], Fault.overloaded()]
    with ExitStack() as stack:
        outcome = run(over_the_socket(stack, AnthropicServer, KINDS, policy, []), tmp_path)
    assert (outcome.stop_reason, outcome.raised) == ("llm_error", None)
    assert outcome.trace.find("chat *")[-1].attributes[semconv.ERROR_TYPE] == "overloaded"
    assert outcome.live == outcome.saved


def test_plain_text_calls_work_over_chat_too():
    servers: list[AnthropicServer] = []
    policy = ['{"tool": "add", "args": {"a": 1, "b": 2}}', '{"tool": "done", "args": {"answer": "x"}}']
    with ExitStack() as stack:
        outcome = both(
            over_the_socket(stack, AnthropicServer, KINDS, policy, servers, config=LoopConfig(use_native_tools=False))
        )
    assert [s.tool_call.tool for s in outcome.steps] == ["add", "done"]
    last = servers[0].requests[1].body
    assert "tools" not in last
    assert last["messages"][-1] == user(text("Result of tool call call_1:\n3"))


def test_a_conversation_goes_on_after_a_break_between_two_calls():
    talk = Conversation()
    policy = [[("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})], [("done", {"answer": "x"})]]
    with AnthropicServer(policy=policy) as server, AnthropicBackend(base_url=server.base_url, model="m") as llm:
        for _ in composable_loop(llm, {"goal": "one"}, make_tools(), conversation=talk):
            break
        run = composable_loop(llm, {"goal": "two"}, make_tools(), conversation=talk)
        list(run)
    assert run.stop_reason == "done"
    sent = server.requests[1].body["messages"]
    assert [block["type"] for block in sent[2]["content"]] == ["tool_result", "tool_result", "text"]


# --- telling a call once --------------------------------------------------------------------------------------------


class Instrumented:
    """A client that notes what an instrumentation would find in the context."""

    def __init__(self, client: Any) -> None:
        self.inner = client
        self.base_url = client.base_url
        self.messages = self
        self.suppressed: list[bool] = []

    def create(self, **request: Any) -> Any:
        self.suppressed.append(bool(otel_context.get_value("suppress_instrumentation")))
        return self.inner.messages.create(**request)


def test_an_instrumented_client_is_silent_inside_a_chat_span_only(tmp_path):
    with (
        AnthropicServer(policy=["hi", [("done", {"answer": "x"})]]) as server,
        anthropic.Anthropic(base_url=server.base_url, api_key="sk") as client,
    ):
        spy = Instrumented(client)
        llm = AnthropicBackend(spy, model="m")
        llm.chat(HELLO)
        list(composable_loop(llm, {}, make_tools(), hooks=[ProvenanceSink(tmp_path)]))
    assert spy.suppressed == [False, True]


@pytest.mark.skipif(
    "open_telemetry" not in inspect.signature(anthropic.Anthropic).parameters, reason="this client makes no spans"
)
@pytest.mark.parametrize("is_async", [False, True])
def test_spans_of_the_clients_own_are_not_made_inside_a_chat_span(is_async, tmp_path):
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    settings = {"api_key": "sk", "open_telemetry": {"tracer_provider": provider}}

    def run(server):
        with anthropic.Anthropic(base_url=server.base_url, **settings) as client:
            llm = AnthropicBackend(client, model="m")
            llm.chat(HELLO)
            hooks = [ProvenanceSink(tmp_path)]
            list(composable_loop(llm, {}, make_tools(), hooks=hooks, tracer_provider=provider))

    async def arun(server):
        async with anthropic.AsyncAnthropic(base_url=server.base_url, **settings) as client:
            llm = AsyncAnthropicBackend(client, model="m")
            await llm.chat(HELLO)
            hooks = [ProvenanceSink(tmp_path)]
            run = async_composable_loop(llm, {}, make_tools(), hooks=hooks, tracer_provider=provider)
            assert [step async for step in run]

    with AnthropicServer(policy=["hi", [("done", {"answer": "x"})]]) as server:
        asyncio.run(arun(server)) if is_async else run(server)
    names = [span.name for span in spans.get_finished_spans()]
    assert [name for name in names if name.startswith("anthropic.")] == ["anthropic.messages.create"]
    assert "chat m" in names
    assert len(Trace.load(tmp_path).runs[0].chats) == 1
    assert trace.get_current_span() is trace.INVALID_SPAN


# --- money ----------------------------------------------------------------------------------------------------------

SONNET = "claude-sonnet-4-5"
ANTHROPIC = "https://api.anthropic.com"


class Claude:
    base_url = ANTHROPIC


def test_reading_the_cache_is_cheaper_than_input_and_writing_it_dearer():
    plain, read, written = (
        priced(usage, SONNET, Claude()).cost_usd
        for usage in (Usage(100_000), Usage(100_000, 0, 100_000), Usage(100_000, cache_write_tokens=100_000))
    )
    assert (plain, read, written) == (pytest.approx(0.3), pytest.approx(0.03), pytest.approx(0.375))


def test_usage_adds_up_with_what_was_written():
    assert Usage(9, 1, cache_write_tokens=4) + Usage(1, cache_write_tokens=2) == Usage(10, 1, cache_write_tokens=6)


@pytest.mark.parametrize(("hour", "cost"), [(0, 0.375), (100_000, 0.6)])
def test_the_cost_of_a_call_is_on_its_span_and_an_hour_costs_more(hour, cost, tmp_path):
    usage = {"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 100_000}
    kept = {"cache_creation": {"ephemeral_1h_input_tokens": hour, "ephemeral_5m_input_tokens": 100_000 - hour}}
    content = [tool_use("c", "done", answer="x")]
    with (
        canned({"type": "message", "model": SONNET, "content": content, "usage": {**usage, **kept}}) as url,
        anthropic.Anthropic(base_url=url, api_key="sk") as client,
    ):
        elsewhere = Instrumented(client)
        elsewhere.base_url = ANTHROPIC
        llm = AnthropicBackend(elsewhere, model="sonnet")
        (step,) = composable_loop(llm, {}, make_tools(), hooks=[ProvenanceSink(tmp_path)])
    (chat,) = Trace.load(tmp_path).find("chat *")
    assert chat.attributes[semconv.COST_USD] == step.usage.cost_usd == pytest.approx(cost)

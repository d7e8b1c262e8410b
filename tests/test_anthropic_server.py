"""`AnthropicServer` as a client sees it: what it answers, and what it refuses like the real one."""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from looplet.errors import ConfigError
from looplet.testing import Answer, AnthropicServer, ChatRequest, Fault
from looplet.testing._anthropic_wire import sign
from looplet.types import Usage

HELLO: Any = {"role": "user", "content": "hello there"}
TOOL: Any = {"name": "search", "input_schema": {"type": "object", "properties": {}}}
CALL: Any = {"type": "tool_use", "id": "t1", "name": "search", "input": {}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "t1", "content": "3"}
THOUGHT: Any = {"type": "thinking", "thinking": "hm", "signature": sign("hm")}
ENABLED: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}
MARK: Any = {"cache_control": {"type": "ephemeral"}}


def request(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "claude", "max_tokens": 10, "messages": list(messages) or [HELLO], **more}


def asked(content: Any) -> Any:
    return {"role": "user", "content": content if isinstance(content, list | str) else [content]}


def said(*blocks: Any) -> Any:
    return {"role": "assistant", "content": list(blocks)}


def post(server: AnthropicServer, body: Any, path: str = "/v1/messages") -> tuple[int, Any]:
    raw = http.client.HTTPConnection("127.0.0.1", urlsplit(server.base_url).port or 0)
    try:
        raw.request("POST", path, body if isinstance(body, str) else json.dumps(body))
        response = raw.getresponse()
        return response.status, json.loads(response.read())
    finally:
        raw.close()


def looped(*blocks: Any) -> list[Any]:
    """Return a request in the middle of a tool loop, whose assistant message holds `blocks`."""
    return [HELLO, said(*blocks), asked(RESULT)]


# --- what it answers ------------------------------------------------------------------------------------------------


def test_an_answer_has_the_shape_of_the_api():
    answer = Answer("hi", [("search", {"q": 1})], Usage(100, 9, 40, 3, cache_write_tokens=50), thinking=["hm", b"x"])
    with AnthropicServer(policy=[answer]) as server:
        status, body = post(server, request(tools=[TOOL]))
    assert (status, body) == (
        200,
        {
            "id": "msg_0",
            "type": "message",
            "role": "assistant",
            "model": "claude",
            "content": [
                THOUGHT,
                {"type": "redacted_thinking", "data": "eA=="},
                {"type": "text", "text": "hi"},
                {"type": "tool_use", "id": "toolu_0_0", "name": "search", "input": {"q": 1}},
            ],
            "stop_reason": "tool_use",
            "stop_sequence": None,
            "usage": {
                "input_tokens": 10,
                "cache_creation_input_tokens": 50,
                "cache_read_input_tokens": 40,
                "output_tokens": 9,
                "output_tokens_details": {"thinking_tokens": 3},
            },
        },
    )


def test_the_policy_receives_the_request_as_it_was_sent_and_words_are_counted():
    seen: list[ChatRequest] = []
    with AnthropicServer(policy=lambda given: seen.append(given) or "three words here") as server:
        usage = post(server, request(tools=[TOOL]))[1]["usage"]
    assert seen == [ChatRequest("claude", [HELLO], [TOOL], request(tools=[TOOL]), 0)]
    assert (usage["input_tokens"], usage["output_tokens"]) == (2, 3)


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (Fault.error(400, "no"), 400, "invalid_request_error"),
        (Fault.unauthorized(), 401, "authentication_error"),
        (Fault.rate_limited(3), 429, "rate_limit_error"),
        (Fault.server_error("no"), 500, "api_error"),
        (Fault.overloaded(), 529, "overloaded_error"),
    ],
)
def test_a_fault_has_the_shape_of_the_api(fault, status, kind):
    with AnthropicServer(policy=[fault]) as server:
        told = post(server, request())
    error = {"type": kind, "message": fault.message}
    assert told == (status, {"type": "error", "error": error, "request_id": "req_0"})


def test_an_unknown_path_is_not_found_and_the_health_check_is():
    with AnthropicServer() as server:
        assert post(server, {}, "/v1/v1/messages")[0] == 404
        raw = http.client.HTTPConnection("127.0.0.1", urlsplit(server.base_url).port or 0)
        raw.request("GET", "/healthz")
        assert raw.getresponse().read() == b'{"status": "ok"}'
        raw.close()


def test_the_environment_leads_the_real_client_here(monkeypatch):
    anthropic = pytest.importorskip("anthropic", reason="NOT TESTED: AnthropicServer with the real client")
    asking = {"model": "m", "max_tokens": 5, "messages": [HELLO]}

    async def main():
        async with anthropic.AsyncAnthropic() as client:
            return await client.messages.create(**asking)

    with AnthropicServer() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        with anthropic.Anthropic() as client:
            texts = [client.messages.create(**asking).content[0].text, asyncio.run(main()).content[0].text]
    assert texts == ["hello there"] * 2


def test_a_policy_of_another_type_is_refused_at_once():
    with pytest.raises(ConfigError, match="policy must be"):
        AnthropicServer(policy=3)  # type: ignore[arg-type]


# --- what it refuses ------------------------------------------------------------------------------------------------


TEXT: Any = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    "body",
    [
        request(),
        request(*looped(CALL), tools=[TOOL], tool_choice={"type": "auto"}, temperature=1),
        request(*looped(THOUGHT, CALL), tools=[TOOL], **ENABLED),
        request(*looped(CALL), said(TEXT), asked("so?"), tools=[TOOL], **ENABLED),
        request(*looped(CALL), tools=[TOOL], thinking={"type": "adaptive"}),
        request(HELLO, said(CALL), asked([RESULT, TEXT]), tools=[TOOL]),
        request(asked({**TEXT, **MARK}), system=[{**TEXT, **MARK}], tools=[{**TOOL, **MARK}]),
    ],
)
def test_what_is_right_is_let_through(body):
    with AnthropicServer(policy=["ok"]) as server:
        assert post(server, body)[0] == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{", "not valid JSON"),
        ({"max_tokens": 1, "messages": [HELLO]}, "model: Field required"),
        ({"model": "m", "messages": [HELLO]}, "max_tokens: Field required"),
        ({"model": "m", "max_tokens": 1}, "messages: Field required"),
        ({"model": "m", "max_tokens": 1, "messages": []}, "messages: Input should be"),
        (request(max_tokens="9"), "max_tokens: Input should be"),
        (request(system=[{"type": "text", "text": " "}]), "system:"),
        (request(temperature=1.5), "range: 0..1"),
        (request({"role": "system", "content": "s"}, HELLO), "top-level `system`"),
        (request({"role": "tool", "content": "s"}), "Unexpected role 'tool'"),
        (request(said(TEXT)), 'must use the "user" role'),
        (request(HELLO, HELLO), "roles must alternate"),
        (request(asked("")), "must be non-empty"),
        (request(asked([])), "non-empty content"),
        (request(asked({"type": "text", "text": " \n"})), "must be non-empty"),
        (request(asked({"type": "tool_use", "id": "x", "name": "y", "input": {}})), "Input tag 'tool_use'"),
        (request(HELLO, said(RESULT), HELLO), "Input tag 'tool_result'"),
        (request(*looped({**CALL, "id": "a b"}), tools=[TOOL]), "tool_use.id: String should match"),
        (request(*looped({**CALL, "name": "a.b"}), tools=[TOOL]), "tool_use.name: String should match"),
        (request(*looped({**CALL, "input": "{}"}), tools=[TOOL]), "valid dictionary"),
        (request(HELLO, said(CALL), tools=[TOOL]), "without `tool_result` blocks immediately after: t1"),
        (request(HELLO, said(CALL), HELLO, tools=[TOOL]), "without `tool_result` blocks immediately after: t1"),
        (
            request(HELLO, said(CALL), asked([TEXT, RESULT]), tools=[TOOL]),
            "at the head of the next message",
        ),
        (request(asked(RESULT), tools=[TOOL]), "unexpected `tool_use_id` found in `tool_result` blocks: t1"),
        (request(*looped(CALL), said(CALL), asked(RESULT), tools=[TOOL]), "ids must be unique"),
        (request(HELLO, said(CALL), asked({**RESULT, "content": "", "is_error": True}), tools=[TOOL]), "is_error"),
        (request(*looped(CALL)), "must define tools"),
        (request(tools=[{**TOOL, "name": "a.b"}]), "custom.name"),
        (request(tools=[{"name": "a"}]), "input_schema"),
        (request(tools=[TOOL, TOOL]), "unique"),
        (request(**{**ENABLED, "max_tokens": 1024}), "`max_tokens` must be greater"),
        (request(**ENABLED, temperature=0.5), "`temperature` may only be set to 1"),
        (request(**ENABLED, tools=[TOOL], tool_choice={"type": "any"}), "forces tool use"),
        (request(*looped(CALL), tools=[TOOL], **ENABLED), "Expected `thinking`"),
        (
            request(*looped(TEXT, THOUGHT, CALL), tools=[TOOL]),
            "first block must be `thinking`",
        ),
        (request(*looped({**THOUGHT, "signature": "sig_0"}, CALL), tools=[TOOL]), "Invalid `signature`"),
        (request(*looped({**THOUGHT, "thinking": "ha"}, CALL), tools=[TOOL]), "Invalid `signature`"),
        (request(asked([{**TEXT, **MARK}] * 5)), "A maximum of 4 blocks"),
        (
            request(asked({**TEXT, "cache_control": {"type": "ephemeral", "ttl": "2h"}})),
            "no marker",
        ),
        (request(*looped({**THOUGHT, **MARK}, CALL), tools=[TOOL]), "in thinking blocks"),
    ],
)
def test_what_the_real_api_refuses_is_refused(body, words):
    with AnthropicServer(policy=lambda _: "ok") as server:
        status, told = post(server, body)
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")
    assert words in told["error"]["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda blocks: blocks, None),
        (lambda blocks: blocks[2:], None),
        (lambda blocks: blocks[1:], "cannot be modified"),
        (lambda blocks: [blocks[1], blocks[0], blocks[2]], "cannot be modified"),
        (lambda blocks: [blocks[0], {**blocks[1], "data": "eQ=="}, blocks[2]], "cannot be modified"),
    ],
    ids=["as they were", "none", "one missing", "in another order", "changed"],
)
def test_thoughts_of_the_latest_message_must_come_back_as_they_were(change, words):
    answer = Answer(tool_calls=[{"name": "search", "args": {}, "id": "t1"}], thinking=["hm", b"x"])
    with AnthropicServer(policy=[answer, "ok"]) as server:
        _, body = post(server, request(tools=[TOOL]))
        status, told = post(server, request(*looped(*change(body["content"])), tools=[TOOL]))
    assert status == (200 if words is None else 400)
    assert words is None or words in told["error"]["message"]


def test_parameters_of_refusing_are_refused():
    with AnthropicServer(refusing=["temperature"]) as server:
        status, told = post(server, request(temperature=0.5))
    assert (status, told["error"]["message"]) == (400, "`temperature` is deprecated for this model.")

"""Images in tool results and user messages, as the providers take them: checked by the servers, over real sockets."""

from __future__ import annotations

from typing import Any

import pytest
from provider_support import askers, calling

from looplet import AnthropicBackend, AsyncAnthropicBackend, AsyncOpenAIBackend, Message, OpenAIBackend, ToolCall
from looplet.backends.wire import images_of
from looplet.parts import with_markers
from looplet.testing import AnthropicServer, OpenAIServer, _anthropic_problems, _problems

PNG = {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "iVBORw0KGgoAAAANSUhEUg=="}
JPEG = {"type": "blob", "modality": "image", "mime_type": "image/jpeg", "content": "/9j/4AAQSkZJRgAB"}
ELSEWHERE = {"type": "uri", "modality": "image", "uri": "https://example.com/cat.png"}
MARKER = with_markers(PNG)
TASK = Message.of_text("user", "look at them")
SCHEMAS = [{"name": "shot", "description": "", "parameters": {"type": "object", "properties": {}}}]

openai = askers(OpenAIBackend, AsyncOpenAIBackend, model="gpt", max_retries=0)
anthropic = askers(AnthropicBackend, AsyncAnthropicBackend, model="claude", max_retries=0)


def sent(server_class: type, ask: Any, *messages: Message) -> list[Any]:
    """Return the messages as they came in; the server has refused nothing."""
    with server_class(policy=["ok"]) as server:
        ask(server.base_url, messages, tools=SCHEMAS)
    return server.requests[0].body["messages"]


def shots(*results: Any) -> list[Message]:
    """Return the task, a turn of calls, and what came of them."""
    calls = [ToolCall("shot", {}, call_id=f"c{number}") for number in range(len(results))]
    told = [Message.of_result(call.call_id, result) for call, result in zip(calls, results, strict=True)]
    return [TASK, calling(*calls), *told]


def image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def source(part: dict[str, Any]) -> dict[str, Any]:
    data = {"type": "base64", "media_type": part["mime_type"], "data": part["content"]}
    return {"type": "image", "source": data}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


PNG_URL = image_url(f"data:image/png;base64,{PNG['content']}")
JPEG_URL = image_url(f"data:image/jpeg;base64,{JPEG['content']}")
REMOTE = {"type": "image", "source": {"type": "url", "url": ELSEWHERE["uri"]}}

# --- taking images out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "images"),
    [
        (PNG, [PNG]),
        ([text("a"), PNG], [PNG]),
        ({"n": 1, "a": PNG, "b": [{"deep": JPEG}]}, [PNG, JPEG]),
        (ELSEWHERE, [ELSEWHERE]),
        ({"note": "no image"}, []),
        ("text", []),
        ({**PNG, "content": "[redacted]"}, []),
        ({**PNG, "modality": "audio", "mime_type": "audio/wav"}, []),
        ({**ELSEWHERE, "modality": "video"}, []),
    ],
)
def test_images_are_found_wherever_they_are(response, images):
    assert list(images_of(response)) == images


# --- tool results ---------------------------------------------------------------------------------------------------


@openai
def test_openai_gets_the_images_of_a_turn_behind_all_its_results(ask):
    wire = sent(OpenAIServer, ask, *shots({"shot": PNG}, "plain", [JPEG, ELSEWHERE]))
    assert [message["role"] for message in wire] == ["user", "assistant", "tool", "tool", "tool", "user"]
    assert wire[2]["content"] == f'{{"shot":"{MARKER}"}}'
    assert wire[3]["content"] == "plain"
    assert wire[5]["content"] == [
        text("Images of tool call c0:"),
        PNG_URL,
        text("Images of tool call c2:"),
        JPEG_URL,
        image_url(ELSEWHERE["uri"]),
    ]


@openai
def test_openai_gets_the_images_of_each_turn_before_the_next(ask):
    again = [calling(ToolCall("shot", {}, call_id="again")), Message.of_result("again", JPEG)]
    wire = sent(OpenAIServer, ask, *shots(PNG), *again)
    assert [message["role"] for message in wire] == ["user", *["assistant", "tool", "user"] * 2]


@anthropic
def test_anthropic_gets_images_inside_their_results(ask):
    wire = sent(AnthropicServer, ask, *shots({"shot": PNG}, "plain", ELSEWHERE))
    results = wire[2]["content"]
    assert results[0]["content"] == [text(f'{{"shot":"{MARKER}"}}'), source(PNG)]
    assert results[1]["content"] == "plain"
    assert results[2]["content"][1:] == [REMOTE]


@openai
def test_openai_gets_the_image_of_a_result_whose_call_is_gone(ask):
    wire = sent(OpenAIServer, ask, Message.of_result("gone", PNG))
    assert wire == [{"role": "user", "content": [text(f"Result of tool call gone:\n{MARKER}"), PNG_URL]}]


@anthropic
def test_anthropic_gets_the_image_of_a_result_whose_call_is_gone(ask):
    wire = sent(AnthropicServer, ask, Message.of_result("gone", PNG))
    assert wire == [{"role": "user", "content": [text(f"Result of tool call gone:\n{MARKER}"), source(PNG)]}]


@anthropic
def test_anthropic_takes_no_image_of_a_failed_call(ask):
    wire = sent(AnthropicServer, ask, *shots({"error": "it broke", "kind": "execution", "last": PNG}))
    result = wire[2]["content"][0]
    assert (result["is_error"], type(result["content"])) == (True, str)
    assert MARKER in result["content"]


@pytest.mark.parametrize("broken", [{**PNG, "content": "iVBOR[card]"}, {**PNG, "mime_type": "image/tiff"}])
@openai
def test_what_is_no_image_stays_out_of_the_request(ask, broken):
    wire = sent(OpenAIServer, ask, *shots(broken))
    assert [message["role"] for message in wire] == ["user", "assistant", "tool"]
    assert "iVBOR" not in str(wire)


# --- messages of the user -------------------------------------------------------------------------------------------

SHOWN = Message("user", ({"type": "text", "content": "what is this?"}, PNG, ELSEWHERE))


@openai
def test_openai_gets_images_of_the_user(ask):
    (message,) = sent(OpenAIServer, ask, SHOWN)
    assert message["content"] == [text("what is this?"), PNG_URL, image_url(ELSEWHERE["uri"])]


@anthropic
def test_anthropic_gets_images_of_the_user(ask):
    (message,) = sent(AnthropicServer, ask, SHOWN)
    assert message["content"] == [text("what is this?"), source(PNG), REMOTE]


# --- what the servers refuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "content", "words"),
    [
        ("assistant", [PNG_URL], "only allowed for messages with role 'user'"),
        ("user", [image_url("cat.png")], "Invalid image URL"),
        ("user", [image_url("data:image/tiff;base64,AAAA")], "Invalid image URL"),
        ("user", [{"type": "blob"}], "supported are"),
    ],
)
def test_the_openai_server_refuses_what_the_real_one_does(role, content, words):
    fault = next(_problems.problems({"model": "m", "messages": [{"role": role, "content": content}]}))
    assert words in fault.message


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": "AAAA"}}, "media_type"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAA"}}, "invalid base64"),
        ({"type": "image", "source": {"type": "url", "url": "cat.png"}}, "does not match"),
        (
            {"type": "tool_result", "tool_use_id": "c", "content": [source(PNG)], "is_error": True},
            "must be type `text`",
        ),
        ({"type": "tool_result", "tool_use_id": "c", "content": [{"type": "blob"}]}, "expected tags"),
    ],
)
def test_the_anthropic_server_refuses_what_the_real_one_does(block, words):
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [block]}]}
    assert words in next(_anthropic_problems.problems(body, {})).message

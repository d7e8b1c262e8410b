"""What tools return: text, JSON and images; what they report, warn of and get beside their arguments."""

from __future__ import annotations

import asyncio
import base64
import re
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support import both

from looplet import LoopConfig, Message, MockLLMBackend, Step, ToolCall, ToolError, ToolResult, composable_loop, tool
from looplet.boundary import Boundary
from looplet.parts import MAX_IMAGE_BYTES, Image, blobs_of, describe, is_sealed, size_text, with_blobs, with_markers
from looplet.prompt import Prompt, part_text
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from looplet.tools import tools_from

PNG = b"\x89PNG\r\n\x1a\n" + zlib.compress(bytes(range(256)) * 40, 0)
JPEG, GIF, WEBP = b"\xff\xd8\xff\xe0" + b"j" * 20, b"GIF89a" + b"g" * 9, b"RIFF\x10\x00\x00\x00WEBP" + b"w" * 9
BASE64 = base64.b64encode(PNG).decode()
BLOB = {"type": "blob", "modality": "image", "mime_type": "image/png", "content": BASE64}
DONE = ("done", {"answer": "ok"})


def making(value: Any, **rest: Any) -> Callable[..., dict[str, Any]]:
    """Return a `make` for `both`: a tool returns `value`."""

    def make(*, is_async: bool) -> dict[str, Any]:
        @tool
        def draw() -> Any:
            """Draw."""
            return value

        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("draw", {}), DONE])
        return {"llm": backend, "task": {"goal": "draw"}, "tools": tools_from([draw], include_done=True), **rest}

    return make


# --- the value ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "mime_type"),
    [(PNG, "image/png"), (JPEG, "image/jpeg"), (GIF, "image/gif"), (WEBP, "image/webp")],
)
def test_an_image_knows_its_type_and_becomes_a_blob_part(data, mime_type, tmp_path):
    file = tmp_path / "picture"
    file.write_bytes(data)
    text = base64.encodebytes(data).decode()  # with line breaks
    image = Image(data)
    assert image == Image(data, mime_type) == Image.from_path(file) == Image.from_base64(text)
    part = Boundary().clean(image)
    assert part == {
        "type": "blob",
        "modality": "image",
        "mime_type": mime_type,
        "content": base64.b64encode(data).decode(),
    }
    assert is_sealed(part)


def test_an_image_elsewhere_becomes_a_uri_part():
    assert Boundary().clean(Image.url("https://x.org/a.png")) == {
        "type": "uri",
        "modality": "image",
        "uri": "https://x.org/a.png",
    }
    assert Boundary().clean(Image.url("https://x.org/a", "image/gif"))["mime_type"] == "image/gif"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: Image(b"plain text"), "these 10 B are no PNG, JPEG, GIF or WebP image"),
        (lambda path: Image(b""), "these 0 B are no PNG"),
        (lambda path: Image(PNG, "image/jpeg"), "are no image/jpeg image"),
        (lambda path: Image(PNG + bytes(MAX_IMAGE_BYTES)), "has 3.8 MB, more than the 3.8 MB that models take"),
        (lambda path: Image.from_path(path), "has 9.0 MB, more than"),
        (lambda path: Image.from_base64("not base64!"), "not valid base64"),
        (lambda path: Image.url("file:///etc/passwd"), "begins with https://, not 'file:///etc/passwd'"),
    ],
    ids=["text", "empty", "other", "large", "large file", "base64", "file url"],
)
def test_what_is_no_image_for_a_model_is_said_in_words(make, words, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(PNG + bytes(9_000_000 - len(PNG)))
    with pytest.raises(ToolError, match=re.escape(words)):
        make(large)


@pytest.mark.parametrize(("size", "text"), [(812, "812 B"), (12_345, "12 kB"), (3_750_000, "3.8 MB")])
def test_sizes_read_as_people_say_them(size, text):
    assert size_text(size) == text


# --- at the boundary ------------------------------------------------------------------------------------------------


def test_no_redactor_touches_the_base64_of_an_image_and_none_is_fooled():
    boundary = Boundary(lambda text: re.sub("alice|[0-9A-Za-z+/]{12,}", "[x]", text))
    assert boundary.clean({"plot": Image(PNG), "who": "alice"}) == {"plot": BLOB, "who": "[x]"}
    assert boundary.clean(BLOB) == BLOB  # a second time changes nothing
    for fake in (
        {**BLOB, "content": "sec" + "retsecret1"},
        {**BLOB, "content": BASE64 + "\nalice@example.org"},
        {**BLOB, "mime_type": "image/jpeg"},
        {**BLOB, "note": "alice"},
    ):
        assert boundary.clean(fake) != fake
    assert boundary.clean(Image.url("https://x.org/alice"))["uri"] == "https://x.org/[x]"


def test_markers_stand_for_blobs_and_come_back():
    value = {"plots": [BLOB, {"again": BLOB}], "n": 3}
    shown = with_markers(value)
    assert shown == {"plots": ["[image/png 10 kB #1]", {"again": "[image/png 10 kB #2]"}], "n": 3}
    assert with_blobs(shown, value) == value
    assert blobs_of(value) == [BLOB, BLOB]
    assert (describe(BLOB), describe("x"), describe({"type": "blob"})) == ("image/png 10 kB", "", "")


# --- in messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", [BLOB, [BLOB, "a plot of alice"], {"plot": BLOB, "by": "alice"}])
def test_a_text_prompt_shows_a_marker_and_rewriting_keeps_the_image(response):
    messages = [Message.of_text("user", "draw"), Message.of_result("call_1", response)]
    prompt = Prompt.of(messages)
    assert BASE64[:40] not in prompt
    assert "[image/png 10 kB #1]" in prompt
    assert prompt.split_back(str(prompt)) == messages
    rewritten = prompt.split_back(prompt.replace("alice", "[name]").replace("draw", "paint"))
    assert rewritten[0].text == "paint"
    assert blobs_of(rewritten[1].parts[0]["response"]) == [BLOB]
    assert "alice" not in str(rewritten)
    assert prompt.rewrite(lambda text: text.replace("alice", "[name]")).messages[1] == rewritten[1]


def test_images_that_stand_in_a_message_by_themselves_are_markers_and_stay():
    uri = {"type": "uri", "modality": "image", "uri": "https://x.org/alice.png"}
    message = Message("user", ({"type": "text", "content": "look"}, BLOB, uri))
    prompt = Prompt.of([message])
    assert [part_text(part) for part in message.parts] == ["look", "[image/png 10 kB #1]", "https://x.org/alice.png"]
    rewritten = prompt.rewrite(lambda text: "[gone]").messages[0]
    assert rewritten.parts == ({"type": "text", "content": "[gone]"}, BLOB, {**uri, "uri": "[gone]"})


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected", "tail"),
    [
        (Image(PNG), BLOB, "image/png 10 kB"),
        ({"plot": Image(PNG)}, {"plot": BLOB}, "plot: image/png 10 kB"),
        ([Image(PNG), "caption"], [BLOB, "caption"], "2 items"),
        (Image.url("https://x.org/a.png"), None, "image https://x.org/a.png"),
        ({"plot": Image(PNG), "n": 1}, {"plot": BLOB, "n": 1}, "2 keys"),
    ],
    ids=["alone", "dict", "list", "url", "more"],
)
def test_a_tool_returns_an_image(value, expected, tail):
    outcome = both(making(value))
    step = outcome.steps[0]
    assert expected is None or step.tool_result.data == expected
    assert step.pretty() == f"#1 ✓ draw() → {tail}"
    assert BASE64[:30] not in step.summary()
    (span,) = outcome.trace.find("execute_tool draw")
    assert ("blob" in span.attributes[semconv.TOOL_CALL_RESULT]) == (expected is not None)
    assert BASE64[:40] not in outcome.steps[1].prompt


def test_an_image_reaches_the_model_as_a_part_of_the_result():
    arguments = making({"plot": Image(PNG)})(is_async=False)
    list(composable_loop(**arguments))
    last = arguments["llm"].requests[1][-1]
    assert last.parts[0]["response"] == {"plot": BLOB}


def test_an_image_is_whole_behind_redaction_and_clipping():
    config = LoopConfig(redact=lambda text: re.sub("[0-9]{2,}", "[n]", text), tool_result_max_chars=200)
    arguments = making({"plot": Image(PNG), "note": "call 0664 123456"}, config=config)(is_async=False)
    list(composable_loop(**arguments))
    response = arguments["llm"].requests[1][-1].parts[0]["response"]
    assert response == {"plot": BLOB, "note": "call [n] [n]"}
    outcome = both(making({"plot": Image(PNG), "note": "call 0664 123456"}, config=config))
    assert outcome.steps[0].tool_result.data == response


def test_the_text_protocol_never_gets_base64():
    prompts = []

    class Listening(MockLLMBackend):
        def generate(self, prompt, **settings):
            prompts.append(prompt)
            return super().generate(prompt, **settings)

    texts = ['{"tool": "draw", "args": {}}', '{"tool": "done", "args": {"answer": "ok"}}']
    arguments = making(Image(PNG))(is_async=False)
    list(composable_loop(**{**arguments, "llm": Listening(texts)}))
    assert "[image/png 10 kB #1]" in prompts[1]
    assert BASE64[:40] not in prompts[1]


def test_too_large_an_image_is_an_error_that_the_model_can_act_upon():
    def make(*, is_async: bool) -> dict[str, Any]:
        @tool
        def draw() -> Image:
            """Draw too much."""
            return Image(PNG + bytes(MAX_IMAGE_BYTES))

        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("draw", {}), DONE])
        return {"llm": backend, "task": {}, "tools": tools_from([draw], include_done=True)}

    assert "make it smaller" in both(make).steps[0].tool_result.error


def test_progress_reaches_the_stream_and_the_trace():
    events: list[Any] = []

    def make(*, is_async: bool) -> dict[str, Any]:
        @tool
        def work(ctx) -> str:
            """Work."""
            ctx.report_progress("half", {"secret": "hunter2"})
            ctx.report_progress("whole")
            return "x"

        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("work", {}), DONE])
        config = LoopConfig(redact=lambda text: text.replace("hunter2", "[secret]"))
        tools = tools_from([work], include_done=True)
        return {"llm": backend, "task": {}, "tools": tools, "stream": events.append, "config": config}

    outcome = both(make)
    heard = [(e.step, e.stage, e.data) for e in events if e.kind == "tool_progress"]
    assert heard == [(1, "half", {"secret": "[secret]"}), (1, "whole", None)] * 2
    (span,) = outcome.trace.find("execute_tool work")
    assert [e.attributes[semconv.PROGRESS_STAGE] for e in span.events if e.name == semconv.EVENT_PROGRESS] == [
        "half",
        "whole",
    ]


def test_metadata_is_a_copy_for_each_call():
    seen = []

    @tool
    def work(ctx) -> None:
        """Change what one was given."""
        seen.append(dict(ctx.metadata))
        ctx.metadata["k"] = "changed"

    config = LoopConfig(tool_metadata={"k": "v"})
    backend = ScriptedBackend([("work", {}), ("work", {}), DONE])
    list(composable_loop(backend, {}, tools_from([work], include_done=True), config=config))
    assert seen == [{"k": "v"}, {"k": "v"}]
    assert config.tool_metadata == {"k": "v"}


def test_a_step_from_a_trace_shows_an_image_as_the_live_one_does():
    result = ToolResult.from_dict(ToolResult("draw", data={"plot": BLOB}).to_dict())
    assert Step(1, ToolCall("draw"), result).pretty() == "#1 ✓ draw() → plot: image/png 10 kB"


# --- over MCP -------------------------------------------------------------------------------------------------------


def test_an_image_of_an_mcp_server_is_an_image():
    from mcp_types import CallToolResult, ImageContent, TextContent

    from looplet.mcp import outcome_of

    texts = [TextContent(type="text", text="look:")]
    for mime_type, data, expected in (
        ("image/png", BASE64, Image(PNG)),
        ("image/bmp", BASE64, {"type": "image", "mimeType": "image/bmp", "bytes": len(PNG)}),
        ("image/png", base64.b64encode(b"12345").decode(), {"type": "image", "mimeType": "image/png", "bytes": 5}),
    ):
        answer = CallToolResult(content=[*texts, ImageContent(type="image", data=data, mime_type=mime_type)])
        _, image = outcome_of(answer).data
        assert image == expected or {**image, **expected} == image


def test_an_image_is_served_to_mcp_clients_as_one():
    from mcp_types import CallToolRequestParams

    from looplet.mcp_server import ToolServer

    @tool
    def draw() -> Any:
        """Draw."""
        return {"plot": Image(PNG)}

    server = ToolServer(tools_from([draw]), "mine")
    answer = asyncio.run(server._call(SimpleNamespace(meta=None, session=None), CallToolRequestParams(name="draw")))
    text, image = answer.content
    assert (text.text, answer.structured_content) == (
        '{"plot":"[image/png 10 kB #1]"}',
        {"plot": "[image/png 10 kB #1]"},
    )
    assert (image.type, image.data, image.mime_type) == ("image", BASE64, "image/png")

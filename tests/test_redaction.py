"""No secret on disk, on the wire or in the live objects; and what is redacted still works."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, StatusCode, TraceFlags

from looplet import (
    Block,
    ConfigError,
    Conversation,
    Deny,
    EvalContext,
    HookDecision,
    InjectContext,
    LoopConfig,
    Message,
    ProvenanceSink,
    Reply,
    Stop,
    ToolCall,
    ToolContext,
    ToolError,
    ToolResult,
    Trace,
    Usage,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.boundary import WITHHELD, Boundary
from looplet.testing import ScriptedBackend

CARD = 4111111111111111
SECRETS = ["sk-live-4242", 'pa"ss\\word', "top\nsecret", "gehëim-ключ", "<tok&en>", str(CARD)]
BLOB = "before " + " | ".join(SECRETS) + " after"
NESTED = {"deep": [{BLOB: BLOB}, CARD, (BLOB,)], "card": CARD, CARD: "as a key"}


def redact(text: str) -> str:
    for secret in SECRETS:
        text = text.replace(secret, "[gone]")
    return text


def escaped(text: str) -> set[str]:
    """Return the forms in which a text may stand in JSON, in JSON inside JSON, and so on, and in a repr."""
    forms = {text, repr(text)[1:-1]}
    for _ in range(3):
        forms |= {json.dumps(form, ensure_ascii=ascii_)[1:-1] for form in forms for ascii_ in (True, False)}
    return forms


FORMS = {form for secret in SECRETS for form in escaped(secret)}


def leaks_in(text: str, forms=FORMS) -> set[str]:
    return {form for form in forms if form in text}


def files_below(folder: Path) -> dict[str, str]:
    """Return every file as text."""
    found = {str(f.relative_to(folder)): f.read_bytes().decode("utf-8") for f in folder.rglob("*") if f.is_file()}
    assert found
    return found


def leaks_on_disk(folder: Path, forms=FORMS) -> dict[str, set[str]]:
    return {name: leaks for name, text in files_below(folder).items() if (leaks := leaks_in(text, forms))}


# --- a run that leaks wherever it can -------------------------------------------------------------------------------


class Wiretap:
    """A backend that keeps everything that would leave the process."""

    model = "tapped"

    def __init__(self, replies):
        self.script = ScriptedBackend(replies)
        self.wire: list[Any] = []

    def __repr__(self):
        return "a backend"


class ChatTap(Wiretap):
    def chat(self, messages, *, tools, system_prompt, max_tokens=None, temperature=None):
        self.wire.append({"messages": [m.to_dict() for m in messages], "tools": tools, "system": system_prompt})
        return self.script.chat(messages)


class TextTap(Wiretap):
    """The smallest kind of backend; writes native replies out as text."""

    def generate(self, prompt, *, system_prompt, max_tokens=None, temperature=None):
        self.wire.append({"prompt": prompt, "system": system_prompt})
        reply = self.script.chat(())
        said = [{"tool": c.tool, "args": c.args, "reasoning": c.reasoning} for c in reply.tool_calls]
        return f"{reply.text}\n{json.dumps({'tools': said}, default=str)}" if said else reply.text


def on_wire(tap) -> str:
    return json.dumps(tap.wire, ensure_ascii=False)


def leaky_tools():
    @tool
    def fetch(value: Any, ctx: ToolContext) -> Any:
        """Return something with secrets in it."""
        ctx.warn(BLOB)
        ctx.report_progress(BLOB, NESTED)
        span = trace.get_current_span()
        span.set_attribute("said", BLOB)
        span.set_attributes({BLOB: [BLOB], "card": CARD})
        span.add_event(BLOB, {BLOB: BLOB})
        span.add_link(LINKED, {"why": BLOB})
        return NESTED

    @tool
    def text() -> str:
        """Return a text."""
        return BLOB

    @tool
    def result() -> ToolResult:
        """Return a result of its own."""
        return ToolResult(BLOB, BLOB, {"x": BLOB}, warnings=[BLOB], metadata={BLOB: BLOB}, result_key=BLOB)

    @tool
    def crash() -> None:
        """Crash."""
        raise RuntimeError(BLOB)

    @tool
    def refuse() -> None:
        """Refuse."""
        raise ToolError(BLOB, recovery_hint=[BLOB], context={BLOB: BLOB})

    return [fetch, text, result, crash, refuse]


LINKED = SpanContext(0xABC << 64, 0xDEF, True, TraceFlags(1))


class LeakyHook:
    """Says secrets in every method."""

    def __init__(self):
        self.asked = 0

    def pre_loop(self, state, log, context):
        log.record(0, BLOB, "note", BLOB, findings=[BLOB], highlights=[BLOB])
        return BLOB

    def pre_prompt(self, state, log, context, step):
        if step == 2:
            state.conversation.append(Message.of_text("user", BLOB))
        return InjectContext(BLOB)

    def pre_dispatch(self, state, log, call, step):
        if call.tool == "text" and step > 6:
            return {7: Deny(BLOB), 8: Block(BLOB), 9: HookDecision(updated_args={BLOB: BLOB})}.get(step)
        return ToolResult("text", data=BLOB) if step == 6 else None

    def check_permission(self, call, state):
        if call.tool == "refuse" and len(state.steps) > 9:
            raise LookupError(BLOB)

    def post_dispatch(self, state, log, call, result, step):
        if call.tool == "crash":
            return ToolResult("crash", error=BLOB, error_detail=ToolError(BLOB, recovery_hint=BLOB))
        return BLOB

    def check_done(self, state, log, context, step):
        self.asked += 1
        if self.asked == 1:
            return BLOB
        if self.asked == 2:
            raise LookupError(BLOB)
        return None

    def should_stop(self, state, step, entities):
        return Stop(BLOB) if self.asked > 2 else None


class AngryHook:
    def on_loop_end(self, state, log, context, llm):
        raise OSError(BLOB)


def call(name, **args):
    return ToolCall(name, args, reasoning=BLOB, metadata={"theory": BLOB})


REPLIES = [
    Reply(BLOB, (call("fetch", value=NESTED),), Usage(1, 1), reasoning=BLOB, metadata={"raw": BLOB}),
    Reply(
        "", (call("text"), call("result")), Usage(1, 1), parts=({"type": "reasoning", "content": BLOB, "note": BLOB},)
    ),
    Reply("", (call("crash"), call("refuse"))),
    Reply("", (call("text"), call("text"), call("text"), call("text"))),
    Reply("", (call("refuse"), call(BLOB, x=BLOB), call("fetch", **{BLOB: BLOB}))),
    BLOB,
    Reply("", (ToolCall("fetch", {"value": CARD}, call_id=BLOB),)),
    Reply("", (call("done", answer=BLOB),)),
    Reply("", (call("done", answer=BLOB),)),
    Reply("", (call("done", answer=BLOB),)),
]


@dataclass
class Leaky:
    """One leaky run and everything that came of it."""

    folder: Path
    tap: Any = None
    run: Any = None
    raised: Exception | None = None
    steps: list[Any] = field(default_factory=list)
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    def go(self, backend=ChatTap, *, is_async=False, sink=None, replies=REPLIES, hooks=(), body=None, **config):
        sink = sink or ProvenanceSink(self.folder)
        self.tap = backend(replies)
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        arguments = {
            "llm": self.tap,
            "task": {"goal": BLOB, BLOB: NESTED, "card": CARD},
            "tools": tools_from([*leaky_tools(), user_spans(provider)], include_done=True),
            "hooks": [LeakyHook(), *hooks, sink],
            "config": LoopConfig(system_prompt=BLOB, max_steps=40, generate_kwargs={}, **config),
            "tracer_provider": provider,
            "conversation": Conversation([Message.of_text("user", BLOB)]),
        }
        try:
            if is_async:
                asyncio.run(self._aiterate(async_composable_loop(**arguments), body))
            else:
                self._iterate(composable_loop(**arguments), body)
        except Exception as error:
            self.raised = error
        sink.flush()
        return self

    def _iterate(self, run, body):
        with run:
            self.run = run
            for step in run:
                self.steps.append(step)
                if body is not None:
                    body(step)

    async def _aiterate(self, run, body):
        async with run:
            self.run = run
            async for step in run:
                self.steps.append(step)
                if body is not None:
                    body(step)

    @property
    def live(self):
        return EvalContext.from_run(self.run)

    @property
    def saved(self):
        return EvalContext.from_trace(self.folder, self.run.run_id)

    def said_live(self) -> str:
        """Return everything that the live objects say."""
        context = self.live
        texts = [json.dumps(step.to_dict(), ensure_ascii=False) for step in (*self.steps, *context.steps)]
        texts += [step.prompt + step.pretty() + step.summary() for step in self.steps]
        texts += [repr(context.task), repr(context.final_output), context.session_log_text, repr(context.stop_reason)]
        return "\n".join([*texts, *context.errors, *context.tool_sequence])


def user_spans(provider):
    """Return a tool whose own spans hold secrets."""
    tracer = provider.get_tracer("app")

    @tool
    def spans() -> str:
        """Make spans."""
        with tracer.start_as_current_span(
            BLOB, attributes={BLOB: BLOB, "list": [BLOB]}, links=[Link(LINKED, {"a": BLOB})]
        ):
            inner = tracer.start_span("inner")
            inner.add_event(BLOB, {"x": BLOB})
            inner.set_status(StatusCode.ERROR, BLOB)
            inner.record_exception(ValueError(BLOB))
            inner.end()
        return "ok"

    return spans


SPANS = [Reply("", (ToolCall("spans"),)), *REPLIES]


def config_redacts(folder):
    return ProvenanceSink(folder), {"redact": redact}


def sink_redacts(folder):
    return ProvenanceSink(folder, redact=redact), {}


def both_redact(folder):
    half = {"redact": lambda text: text.replace(SECRETS[0], "[gone]")}
    return ProvenanceSink(folder, redact=redact), half


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("backend", [ChatTap, TextTap])
@pytest.mark.parametrize("redaction", [config_redacts, sink_redacts, both_redact])
def test_no_secret_is_on_disk_on_the_wire_or_in_the_live_objects(redaction, backend, is_async, tmp_path, caplog):
    sink, config = redaction(tmp_path)
    leaky = Leaky(tmp_path).go(backend, is_async=is_async, sink=sink, replies=SPANS, **config)
    assert leaky.raised is None
    assert [s.tool_call.tool for s in leaky.steps][:6] == ["spans", "fetch", "text", "result", "crash", "refuse"]
    assert leaks_on_disk(tmp_path) == {}
    assert leaks_in(on_wire(leaky.tap)) == set()
    assert leaks_in(leaky.said_live()) == set()
    assert leaks_in(caplog.text) == set()
    assert leaky.live == leaky.saved
    for text in (files_below(tmp_path)["trace.jsonl"], on_wire(leaky.tap), leaky.said_live()):
        assert "[gone]" in text


def test_without_redaction_the_same_run_says_every_secret_everywhere(tmp_path):
    leaky = Leaky(tmp_path).go()
    for text in (files_below(tmp_path)["trace.jsonl"], on_wire(leaky.tap), leaky.said_live()):
        for secret in SECRETS:
            assert leaks_in(text, escaped(secret))


@pytest.mark.parametrize("backend", [ChatTap, TextTap])
def test_secrets_in_exceptions_at_the_end_are_not_recorded(backend, tmp_path):
    def body(step):
        raise ValueError(BLOB)

    one = Leaky(tmp_path / "body").go(backend, body=body, redact=redact)
    two = Leaky(tmp_path / "hook").go(backend, hooks=[AngryHook()], redact=redact)
    three = Leaky(tmp_path / "backend").go(backend, replies=[ConnectionError(BLOB)], redact=redact)
    assert [type(run.raised) for run in (one, two, three)] == [ValueError, OSError, type(None)]
    assert three.run.stop_reason == "llm_error"
    assert leaks_on_disk(tmp_path) == {}
    assert leaks_in(one.said_live() + two.said_live() + three.said_live()) == set()


def test_looplet_s_spans_at_the_application_hold_no_secret_either(tmp_path):
    leaky = Leaky(tmp_path).go(redact=redact, capture_content=True)
    assert leaks_in("".join(span.to_json() for span in leaky.exporter.get_finished_spans())) == set()


def test_spans_that_reach_a_sink_through_a_processor_are_redacted(tmp_path):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(ProvenanceSink(tmp_path, redact=redact)))
    user_spans(provider).execute()
    (outer, inner) = Trace.load(tmp_path).spans
    assert leaks_on_disk(tmp_path) == {}
    assert inner.parent is outer
    assert inner.record.status_message == redact(BLOB)


# --- what a redactor does not see -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    r"see bob\u0040example.com",
    r'{"mail": "bob\x40example\u002ecom"}',
    json.dumps({"mail": ["bob@example.com\\"]}),
    json.dumps(json.dumps(json.dumps({"a": 'pa"ss', "b": "top\nsecret"}))),
    repr('pa"ss\n' + "it's"),
    repr(KeyError("top\nsecret")),
])  # fmt: skip
def test_what_an_escape_hides_is_redacted(text):
    def hide(said):
        return re.sub(r'bob@example\.com|pa"ss|top\nsecret', "[gone]", said)

    said = Boundary(hide).text(text)
    assert "[gone]" in said
    forms = {form for secret in ("bob@example.com", 'pa"ss', "top\nsecret") for form in escaped(secret)}
    assert leaks_in(said, forms) == set()


@pytest.mark.parametrize("text", [r"C:\new\temp", r"\d+\n", json.dumps({"a": "b\nc"}), "\\", r"\u00", "\\ud800"])
def test_escapes_that_hide_nothing_stay_as_they_are(text):
    assert Boundary(redact).text(text) == text


# --- each value once ------------------------------------------------------------------------------------------------


class Speaks:
    def pre_prompt(self, state, log, context, step):
        return BLOB

    def pre_dispatch(self, state, log, call, step):
        return Deny(BLOB) if step == 3 else None

    def post_dispatch(self, state, log, call, result, step):
        return ToolResult("text", data=BLOB) if step == 4 else None

    def should_stop(self, state, step, entities):
        return Stop(BLOB) if step >= 8 else None


@pytest.mark.parametrize("backend", [ChatTap, TextTap])
def test_a_value_is_redacted_exactly_once(backend, tmp_path):
    replies = [
        Reply(BLOB, (call("fetch", value=NESTED),), reasoning=BLOB),
        Reply("", (call("crash"), call("text"), call("text"), call("refuse"), call(BLOB, x=BLOB), call("fetch"))),
        "no call " + BLOB,
        Reply("", (call("text"),)),
    ]
    sink = ProvenanceSink(tmp_path, redact=lambda text: text.replace("after", "after]"))
    tap = backend(replies)
    run = composable_loop(
        tap, {BLOB: BLOB, "nested": NESTED}, tools_from(leaky_tools()), hooks=[Speaks(), sink], system_prompt=BLOB
    )
    assert len(list(run)) == 8
    sink.flush()
    for text in (*files_below(tmp_path).values(), on_wire(tap)):
        assert "after]]" not in text
    assert run.stop_reason == BLOB.replace("after", "after]")
    assert EvalContext.from_run(run) == EvalContext.from_trace(tmp_path)


# --- redactors that fail --------------------------------------------------------------------------------------------


def raises(text):
    raise RuntimeError(text)


JUNK = {"raises": raises, "None": lambda text: None, "bytes": lambda text: text.encode(), "number": len}


@pytest.mark.parametrize("backend", [ChatTap, TextTap])
@pytest.mark.parametrize("junk", JUNK)
def test_a_redactor_that_fails_withholds(junk, backend, tmp_path, caplog):
    leaky = Leaky(tmp_path).go(backend, redact=JUNK[junk])
    assert leaky.raised is None
    assert leaks_on_disk(tmp_path) == {}
    assert leaks_in(on_wire(leaky.tap) + leaky.said_live() + caplog.text) == set()
    assert WITHHELD in files_below(tmp_path)["trace.jsonl"]
    assert leaky.live == leaky.saved
    assert caplog.text.count("redactor failed") == 1


def test_a_redactor_that_fails_for_one_text_withholds_only_that(tmp_path):
    def picky(text):
        return raises(text) if redact(text) != text else text

    leaky = Leaky(tmp_path).go(redact=picky)
    assert leaks_on_disk(tmp_path) == {}
    assert leaky.steps[0].tool_call.tool == "fetch"
    assert leaky.steps[0].tool_result.data == {
        "deep": [{WITHHELD: WITHHELD}, WITHHELD, [WITHHELD]], "card": WITHHELD, WITHHELD: "as a key",
    }  # fmt: skip


# --- the provider gets it raw, the disk never -----------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("backend", [ChatTap, TextTap])
def test_without_redact_upstream_the_provider_gets_the_raw_text_and_the_disk_never(backend, is_async, tmp_path):
    sink = ProvenanceSink(tmp_path, redact=redact, redact_upstream=False)
    leaky = Leaky(tmp_path).go(backend, is_async=is_async, sink=sink, replies=SPANS)
    assert leaky.raised is None
    for secret in SECRETS:
        assert leaks_in(on_wire(leaky.tap), escaped(secret))
    assert leaks_on_disk(tmp_path) == {}
    assert [s.number for s in leaky.saved.steps] == [s.number for s in leaky.live.steps]
    (view,) = Trace.load(tmp_path).runs
    assert [len(view.request(chat)) for chat in view.chats]  # whose hashes fit


def test_both_kinds_of_redaction_apply_to_what_is_recorded(tmp_path):
    first, rest = SECRETS[0], SECRETS[1:]

    def late(text):
        for secret in rest:
            text = text.replace(secret, "[gone]")
        return text

    sink = ProvenanceSink(tmp_path, redact=late, redact_upstream=False)
    leaky = Leaky(tmp_path).go(sink=sink, replies=SPANS, redact=lambda text: text.replace(first, "[gone]"))
    assert leaks_on_disk(tmp_path) == {}
    assert leaks_in(on_wire(leaky.tap), escaped(first)) == set()
    for secret in rest:
        assert leaks_in(on_wire(leaky.tap), escaped(secret))


@pytest.mark.parametrize("junk", JUNK)
def test_a_trace_can_be_read_whatever_the_redactor_made_of_it(junk, tmp_path):
    sink = ProvenanceSink(tmp_path, redact=JUNK[junk], redact_upstream=False)
    leaky = Leaky(tmp_path).go(sink=sink)
    assert leaks_on_disk(tmp_path) == {}
    assert [s.number for s in leaky.saved.steps] == [s.number for s in leaky.live.steps]
    (view,) = Trace.load(tmp_path).runs
    assert [[m.role for m in view.request(chat)] for chat in view.chats] == [
        ["system", *(m["role"] for m in sent["messages"])] for sent in leaky.tap.wire
    ]


# --- replacements that look like JSON -------------------------------------------------------------------------------

AWKWARD = '"re\ndac\\ted"}]'


def awkward(text: str) -> str:
    for secret in SECRETS:
        text = text.replace(secret, AWKWARD)
    return text


def check_json(value: Any) -> None:
    """Decode every text in `value` that begins like JSON of ours."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "stringValue" and inner[:1] in ("{", "["):
                json.loads(inner)
            check_json(inner)
    elif isinstance(value, list):
        for inner in value:
            check_json(inner)


@pytest.mark.parametrize("upstream", [True, False])
@pytest.mark.parametrize("backend", [ChatTap, TextTap])
def test_a_replacement_with_quotes_and_newlines_keeps_every_json_valid(backend, upstream, tmp_path):
    sink = ProvenanceSink(tmp_path, redact=awkward, redact_upstream=upstream)
    leaky = Leaky(tmp_path).go(backend, sink=sink)
    assert leaks_on_disk(tmp_path) == {}
    for name, text in files_below(tmp_path).items():
        for document in text.splitlines() if name.endswith(".jsonl") else [text] if name.endswith(".json") else []:
            check_json(json.loads(document))
    first = leaky.saved.steps[0]
    assert first.tool_call.tool == "fetch"
    assert first.tool_call.args["value"]["card"] == AWKWARD
    assert first.tool_result.data["deep"][1] == AWKWARD


@pytest.mark.parametrize("said", [
    '{"tool": "echo", "args": {"value": 4111111111111111}}',
    '{"tool": "echo", "args": {"value": "4111\\u0031111\\u00311111111"}}',
    'Well: {"tool": "echo", "args": {"value": "4111111111111111"}, "reasoning": "4111111111111111"} - so be it',
    "{'tool': 'echo', 'args': {'value': 4111111111111111,}}",
])  # fmt: skip
@pytest.mark.parametrize("replacement", ["[card]", '"}', "", "4"])
def test_a_call_in_a_text_is_redacted_as_a_value_and_still_made(said, replacement, tmp_path):
    got = []

    @tool
    def echo(value: Any) -> Any:
        """Return the value."""
        got.append(value)
        return value

    class Once:
        def generate(self, prompt, *, system_prompt=""):
            return said

    run = composable_loop(
        Once(), tools=tools_from([echo]), max_steps=1, hooks=[ProvenanceSink(tmp_path)],
        config=LoopConfig(redact=lambda text: text.replace(str(CARD), replacement)),
    )  # fmt: skip
    list(run)
    assert got == [replacement]
    assert leaks_on_disk(tmp_path, {str(CARD)}) == {}
    assert EvalContext.from_run(run) == EvalContext.from_trace(tmp_path)


# --- the README's hook ----------------------------------------------------------------------------------------------

EMAIL = r"[\w.]+@[\w.]+\w"
ADDRESSES = ["ann@example.com", "bob.b@example.org", "carl@example.net", "dora@example.com", "eve@example.org"]


class RedactPII:
    def pre_prompt(self, state, log, ctx, step):
        return re.sub(EMAIL, "[email]", ctx)


class RewritePII:
    def pre_prompt(self, state, log, ctx, step):
        return ctx.rewrite(lambda text: re.sub(EMAIL, "[email]", text))


class AsyncRedactPII:
    async def pre_prompt(self, state, log, ctx, step):
        await asyncio.sleep(0)
        return re.sub(EMAIL, "[email]", ctx)


@tool
def directory(kind: str, ctx: ToolContext) -> Any:
    """Look people up."""
    ctx.warn(f"{kind} knows {ADDRESSES[4]}")
    ctx.report_progress(ADDRESSES[4], [ADDRESSES[4]])
    if kind == "crash":
        raise RuntimeError(f"no such person: {ADDRESSES[3]}")
    return {"text": f"write to {ADDRESSES[3]}", "nested": {"people": [{"mail": ADDRESSES[3]}], ADDRESSES[4]: 1}}[kind]


PII_REPLIES = [
    ("directory", {"kind": "text"}),
    ("directory", {"kind": "nested"}),
    ("directory", {"kind": "crash"}),
    ("director", {}),
    ("done", {"answer": "x"}),
]


def run_with(folder, hooks, backend=ChatTap, *, is_async=False, **more):
    tap = backend(PII_REPLIES)
    sink = ProvenanceSink(folder)
    arguments = {
        "llm": tap,
        "task": {"goal": f"mail {ADDRESSES[0]}", "cc": [ADDRESSES[1]], "n": 3},
        "system_prompt": f"you are {ADDRESSES[2]}",
        "tools": tools_from([directory], include_done=True),
        "hooks": [*hooks, sink],
        **more,
    }

    async def main(run):
        async for _ in run:
            pass
        return run

    if is_async:
        run = asyncio.run(main(async_composable_loop(**arguments)))
    else:
        list(run := composable_loop(**arguments))
    sink.flush()
    return run, tap


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("backend", [ChatTap, TextTap])
@pytest.mark.parametrize("hook", [RedactPII, RewritePII, AsyncRedactPII])
def test_the_readme_s_hook_leaves_no_address_on_the_wire_or_on_disk(hook, backend, is_async, tmp_path):
    run, tap = run_with(tmp_path, [hook()], backend, is_async=is_async)
    assert run.stop_reason == "done"
    assert leaks_in(on_wire(tap), ADDRESSES) == set()
    assert leaks_on_disk(tmp_path, ADDRESSES) == {}
    saved = EvalContext.from_trace(tmp_path)
    assert saved.task == {"goal": "mail [email]", "cc": ["[email]"], "n": 3}
    assert saved.tool_sequence == ["directory", "directory", "directory", "director", "done"]
    assert saved.steps[0].tool_result.data == "write to [email]"
    assert saved.steps[1].tool_result.data == {"people": [{"mail": "[email]"}], "[email]": 1}
    assert saved.steps[2].tool_result.error == "RuntimeError: no such person: [email]"
    assert "unknown tool 'director'" in saved.steps[3].tool_result.error
    assert saved.errors == [saved.steps[2].tool_result.error, saved.steps[3].tool_result.error]
    (view,) = Trace.load(tmp_path).runs
    assert len(view.request(view.chats[-1])) == len(view.message_log)


class Adds:
    def __init__(self, text):
        self.text = text

    def pre_prompt(self, state, log, ctx, step):
        return self.text


@pytest.mark.parametrize("backend", [ChatTap, TextTap])
def test_another_hook_may_still_add_to_a_rewritten_request(backend, tmp_path):
    run, tap = run_with(tmp_path, [RedactPII(), Adds("remember the milk")], backend)
    assert run.stop_reason == "done"
    for sent in tap.wire:
        assert json.dumps(sent).count("remember the milk") == 1
    assert leaks_in(on_wire(tap), ADDRESSES) == set()


@pytest.mark.parametrize("backend", [ChatTap, TextTap])
def test_what_an_earlier_hook_added_is_rewritten_too(backend, tmp_path):
    run, tap = run_with(tmp_path, [Adds(f"remember {ADDRESSES[4]}"), RedactPII(), Adds("the end")], backend)
    assert run.stop_reason == "done"
    for sent in tap.wire:
        assert json.dumps(sent).count("remember [email]") == 1
        assert json.dumps(sent).count("the end") == 1
    assert leaks_in(on_wire(tap), ADDRESSES) == set()
    assert leaks_on_disk(tmp_path, ADDRESSES) == {}


def test_what_a_hook_said_after_a_call_is_rewritten_too(tmp_path):
    class Says:
        def post_dispatch(self, state, log, call, result, step):
            return f"by the way: {ADDRESSES[4]}"

        def pre_dispatch(self, state, log, call, step):
            return Deny(f"ask {ADDRESSES[4]}") if step == 1 else None

    run, tap = run_with(tmp_path, [Says(), RedactPII()])
    assert run.stop_reason == "done"
    assert "by the way: [email]" in on_wire(tap)
    assert "ask [email]" in on_wire(tap)
    assert leaks_in(on_wire(tap), ADDRESSES) == set()
    assert leaks_on_disk(tmp_path, ADDRESSES) == {}


def test_a_hook_that_changes_the_conversation_and_rewrites_gets_both(tmp_path):
    class Both(RedactPII):
        def pre_loop(self, state, log, context):
            state.conversation.append(Message.of_text("user", f"from pre_loop {ADDRESSES[4]}"))

        def pre_prompt(self, state, log, ctx, step):
            state.conversation.append(Message.of_text("user", f"note {step}"))
            return super().pre_prompt(state, log, ctx, step)

    run, tap = run_with(tmp_path, [Both()])
    assert run.stop_reason == "done"
    assert leaks_in(on_wire(tap), ADDRESSES) == set()
    assert leaks_on_disk(tmp_path, ADDRESSES) == {}
    assert EvalContext.from_trace(tmp_path).task["goal"] == "mail [email]"


def test_the_task_is_not_recorded_when_a_hook_took_it_out_of_the_conversation(tmp_path):
    class Takes(RedactPII):
        def pre_loop(self, state, log, context):
            state.conversation.replace([Message.of_text("user", "something else")])

    _, tap = run_with(tmp_path, [Takes()])
    assert leaks_in(on_wire(tap), ADDRESSES) == set()
    assert leaks_on_disk(tmp_path, ADDRESSES) == {}
    assert EvalContext.from_trace(tmp_path).task == {}


@pytest.mark.parametrize("backend", [ChatTap, TextTap])
def test_a_rewritten_prompt_that_lost_a_header_is_a_config_error(backend, tmp_path):
    class Careless:
        def pre_prompt(self, state, log, ctx, step):
            if step == 1:
                return None
            return "\n".join(line for line in ctx.split("\n") if not line.startswith("═══ 2 "))

    with pytest.raises(ConfigError, match=r"without its header line '═══ 2 .*ctx\.rewrite"):
        run_with(tmp_path, [Careless()], backend)
    (node,) = Trace.load(tmp_path).find("looplet.pre_prompt", where=lambda node: node.is_error)
    assert node.attributes["looplet.hook.name"] == "Careless"


HEADERS = "\n".join(
    ["═══ 0 user ═══", " ═══ 1 user ═══", "═══", "  ═══ 2 tool [call_1] ═══ ", "text ═══ 3 user ═══", ""]
)


@pytest.mark.parametrize("backend", [ChatTap, TextTap])
@pytest.mark.parametrize("hook", [RedactPII, RewritePII])
def test_content_that_looks_like_a_header_survives(hook, backend, tmp_path):
    @tool
    def quote() -> str:
        """Return lines that look like headers."""
        return HEADERS

    tap = backend([("quote", {}), ("quote", {}), ("done", {"answer": "x"})])
    tools = tools_from([quote], include_done=True)
    run = composable_loop(
        tap, {"goal": HEADERS}, tools, hooks=[hook(), ProvenanceSink(tmp_path)], system_prompt=HEADERS
    )
    assert [step.tool_result.error for step in run] == [None, None, None]
    (view,) = Trace.load(tmp_path).runs
    last = view.request(view.chats[-1])
    texts = [part.get("content", part.get("response")) for message in last for part in message.parts]
    assert texts[0] == HEADERS
    assert f"goal: {HEADERS}" in texts
    assert texts.count(HEADERS) == 3
    assert view.task == {"goal": HEADERS}


def test_a_rewritten_request_is_redacted_as_well(tmp_path):
    class Invents:
        def pre_prompt(self, state, log, ctx, step):
            return ctx.replace("goal:", f"goal: {SECRETS[0]}")

    run, tap = run_with(tmp_path, [Invents()], config=LoopConfig(redact=redact))
    assert run.stop_reason == "done"
    assert "goal: [gone]" in on_wire(tap)
    assert leaks_on_disk(tmp_path) == {}
    assert leaks_in(on_wire(tap)) == set()

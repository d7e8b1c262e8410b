"""The file does not depend on the application's OpenTelemetry, and content does not reach it unless asked for."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import Counter
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from looplet import (
    Deny,
    LoopConfig,
    ProvenanceSink,
    Reply,
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
from looplet.telemetry import semconv
from looplet.telemetry.otlp_file import read_file
from looplet.testing import AsyncScriptedBackend, MockLLMBackend, ScriptedBackend

CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
PARENT = trace.SpanContext(0xFEED << 100, 0xBEEF, True, trace.TraceFlags(0))
"""of a request in another process that decided not to sample"""


# --- a run that says something everywhere ---------------------------------------------------------------------------

SAID = {
    "task key": "zq01",
    "task value": "zq02",
    "system prompt": "zq03",
    "prose": "zq04",
    "reasoning": "zq05",
    "argument": "zq06",
    "result": "zq07",
    "exception": "zq08",
    "tool error": "zq09",
    "hint": "zq10",
    "denial": "zq11",
    "injected": "zq12",
    "rewritten": "zq13",
    "not done": "zq14",
    "gate exception": "zq15",
    "warning": "zq16",
    "progress": "zq17",
    "unknown tool": "zq18",
    "note": "zq19",
    "answer": "zq20",
    "backend exception": "zq21",
    "hook exception": "zq22",
}
"""where content comes from → a word that is said nowhere else"""


def talkative_tools(mishap=lambda: None):
    @tool
    def search(query: str, ctx: ToolContext) -> dict:
        """Search."""
        ctx.warn(SAID["warning"])
        ctx.report_progress(SAID["progress"], {"found": SAID["progress"]})
        mishap()
        return {"found": SAID["result"]}

    @tool(concurrent_safe=True)
    def look(name: str) -> str:
        """Look."""
        return name * 2

    @tool
    def crash() -> None:
        """Crash."""
        raise RuntimeError(SAID["exception"])

    @tool
    def refuse() -> None:
        """Refuse."""
        raise ToolError(SAID["tool error"], recovery_hint=[SAID["hint"]])

    return tools_from([search, look, crash, refuse], include_done=True)


class Talkative:
    """A hook that says something in every method."""

    looplet_rewrites = False

    def __init__(self):
        self.gates = 0

    def pre_prompt(self, state, log, context, step):
        log.record(step, SAID["note"], "note", "")
        return SAID["injected"] if step == 2 else None

    def pre_dispatch(self, state, log, call, step):
        return Deny(SAID["denial"]) if call.tool == "look" and step == 4 else None

    def post_dispatch(self, state, log, call, result, step):
        return ToolResult("crash", error=SAID["rewritten"]) if call.tool == "crash" else None

    def check_done(self, state, log, context, step):
        self.gates += 1
        if self.gates == 1:
            return SAID["not done"]
        if self.gates == 2:
            raise LookupError(SAID["gate exception"])
        return None


class Furious:
    def on_loop_end(self, state, log, context, llm):
        raise OSError(SAID["hook exception"])


REPLIES = [
    Reply(
        SAID["prose"],
        (ToolCall("search", {"query": SAID["argument"]}),),
        Usage(10, 5),
        reasoning=SAID["reasoning"],
    ),
    ("crash", {}),
    ("refuse", {}),
    [("look", {"name": "a"}), ("look", {"name": "b"}), ("look", {"name": "c"})],
    (SAID["unknown tool"], {}),
    ("done", {"answer": "early"}),
    ("done", {"answer": "early"}),
    ("done", {"answer": SAID["answer"]}),
]


def talkative(sink=None, *, provider=None, replies=(), mishap=lambda: None, hooks=(), is_async=False, **config):
    """Return the arguments of a run that says every word of `SAID` but the last two."""
    return {
        "llm": (AsyncScriptedBackend if is_async else ScriptedBackend)([*REPLIES, *replies]),
        "task": {SAID["task key"]: SAID["task value"]},
        "tools": talkative_tools(mishap),
        "hooks": [Talkative(), *([sink] if sink else []), *hooks],
        "config": LoopConfig(system_prompt=SAID["system prompt"], **config),
        "tracer_provider": provider,
    }


def finish(run):
    """Iterate to the end; return what was raised."""
    try:
        for _ in run:
            pass
    except Exception as error:
        return error
    return None


async def afinish(run):
    try:
        async for _ in run:
            pass
    except Exception as error:
        return error
    return None


# --- the file is the same -------------------------------------------------------------------------------------------


def plain(node) -> tuple[Any, ...]:
    """Return a span of looplet's and those below it, without what differs between two equal runs."""
    record = node.record
    children = [plain(child) for child in node.children if child.record.scope == semconv.SCOPE]
    return (
        record.name,
        record.kind,
        (record.status_code, record.status_message),
        without(record.attributes),
        [(event.name, without(event.attributes)) for event in record.events],
        sorted(children, key=repr) if record.name == semconv.DISPATCH else children,
        (record.scope, record.scope_version, record.schema_url),
        (record.dropped_attributes, record.dropped_events, record.dropped_links),
    )


def without(attributes):
    return {k: v for k, v in attributes.items() if k not in (semconv.RUN_ID, semconv.HOOK_DURATION)}


def story(folder) -> tuple[Any, ...]:
    """Return the only run in a folder as plain data."""
    (root,) = (node for node in Trace.load(folder).roots if node.record.scope == semconv.SCOPE)
    return plain(root)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return what the file says where there is no provider at all."""
    folder = tmp_path_factory.mktemp("plain")
    finish(composable_loop(**talkative(ProvenanceSink(folder))))
    told = story(folder)
    assert all(word in repr(told) for word in list(SAID.values())[:-2])
    return told


def provider_of(*processors, **settings) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False, **settings)
    for processor in processors:
        provider.add_span_processor(processor)
    return provider


class RaisingProcessor(SpanProcessor):
    def __init__(self, *when):
        self.when = when

    def on_start(self, span, parent_context=None):
        if "start" in self.when:
            raise RuntimeError("no start")

    def on_end(self, span):
        if "end" in self.when:
            raise RuntimeError("no end")


class RaisingExporter(SpanExporter):
    def export(self, spans):
        raise RuntimeError("no export")


class HangingExporter(SpanExporter):
    """Hangs until it is let go."""

    def __init__(self):
        self.let_go = threading.Event()

    def export(self, spans):
        self.let_go.wait(30)
        return SpanExportResult.SUCCESS


@contextmanager
def closing(provider):
    yield provider
    provider.shutdown()


@contextmanager
def hanging():
    exporter = HangingExporter()
    provider = provider_of(BatchSpanProcessor(exporter, max_export_batch_size=1))
    yield provider
    exporter.let_go.set()
    provider.shutdown()


@contextmanager
def disabled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_SDK_DISABLED", "true")
        yield provider_of(SimpleSpanProcessor(InMemorySpanExporter()))


@contextmanager
def unsampled_parent():
    token = attach(trace.set_span_in_context(trace.NonRecordingSpan(PARENT)))
    try:
        yield provider_of(SimpleSpanProcessor(InMemorySpanExporter()))
    finally:
        detach(token)


TINY = SpanLimits(
    max_attributes=4, max_events=1, max_attribute_length=8, max_span_attribute_length=8, max_span_attributes=4
)
PROVIDERS = {
    "an SDK provider": lambda: closing(provider_of(SimpleSpanProcessor(InMemorySpanExporter()))),
    "a sampler that says no": lambda: closing(provider_of(sampler=ALWAYS_OFF)),
    "tiny limits": lambda: closing(provider_of(SimpleSpanProcessor(InMemorySpanExporter()), span_limits=TINY)),
    "a processor that raises at the start": lambda: closing(provider_of(RaisingProcessor("start"))),
    "a processor that raises at the end": lambda: closing(provider_of(RaisingProcessor("end"))),
    "an exporter that raises": lambda: closing(provider_of(SimpleSpanProcessor(RaisingExporter()))),
    "an exporter that raises later": lambda: closing(provider_of(BatchSpanProcessor(RaisingExporter()))),
    "an exporter that hangs": hanging,
    "OTEL_SDK_DISABLED": disabled,
    "a parent that is not sampled": unsampled_parent,
    "no tracer": lambda: closing(NoTracer()),
    "a tracer without ids": lambda: closing(NoIds()),
}


class NoIds:
    """A provider of somebody's own whose spans have no ids."""

    def get_tracer(self, *args, **kwargs):
        return self

    def start_span(self, *args, **kwargs):
        return trace.INVALID_SPAN

    def shutdown(self):
        pass


class NoTracer(NoIds):
    def start_span(self, *args, **kwargs):
        raise RuntimeError("no spans today")


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_the_file_is_the_same_whatever_the_provider_does(name, is_async, expected, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    with PROVIDERS[name]() as provider:
        arguments = talkative(ProvenanceSink(tmp_path), provider=provider, is_async=is_async)
        raised = (
            asyncio.run(afinish(async_composable_loop(**arguments)))
            if is_async
            else finish(composable_loop(**arguments))
        )
    assert raised is None
    assert story(tmp_path) == expected


def test_the_file_is_whole_when_the_provider_is_shut_down_in_the_middle(expected, tmp_path):
    provider = provider_of(SimpleSpanProcessor(InMemorySpanExporter()))
    arguments = talkative(ProvenanceSink(tmp_path), provider=provider, mishap=provider.shutdown)
    assert finish(composable_loop(**arguments)) is None
    assert story(tmp_path) == expected


def test_a_run_continues_the_trace_of_a_parent_that_is_not_sampled(tmp_path):
    exporter = InMemorySpanExporter()
    provider = provider_of(SimpleSpanProcessor(exporter))
    with unsampled_parent():
        finish(composable_loop(**talkative(ProvenanceSink(tmp_path), provider=provider)))
    (root,) = Trace.load(tmp_path).roots
    assert (root.trace_id, root.record.parent_id) == (f"{PARENT.trace_id:032x}", f"{PARENT.span_id:016x}")
    assert exporter.get_finished_spans() == ()


# --- content --------------------------------------------------------------------------------------------------------

FAILING = {"backend exception": ConnectionError(SAID["backend exception"])}


def exported(exporter) -> str:
    """Return everything that an exporter got, as one text."""
    return "\n".join(span.to_json() for span in exporter.get_finished_spans())


def words_in(text) -> set[str]:
    """Return where the content in `text` comes from."""
    return {source for source, word in SAID.items() if word in text}


def run_twice(provider, folder, **config):
    """Run once to the end and once into a failing backend and a hook that raises; every word is said."""
    finish(composable_loop(**talkative(ProvenanceSink(folder / "a"), provider=provider, **config)))
    failing = talkative(ProvenanceSink(folder / "b"), provider=provider, hooks=[Furious()], **config)
    failing["llm"] = ScriptedBackend([ConnectionError(SAID["backend exception"])])
    assert isinstance(finish(composable_loop(**failing)), OSError)


def test_no_content_reaches_the_application_s_exporter(tmp_path):
    exporter = InMemorySpanExporter()
    run_twice(provider_of(SimpleSpanProcessor(exporter)), tmp_path)
    assert len(exporter.get_finished_spans()) > 60
    assert words_in(exported(exporter)) == set()
    on_disk = "".join(file.read_text() for file in tmp_path.glob("*/trace.jsonl"))
    assert words_in(on_disk) == set(SAID)


@pytest.mark.parametrize("value", ["SPAN_ONLY", "span_and_event", "true"])
def test_content_is_captured_when_the_environment_asks_for_it(value, tmp_path, monkeypatch):
    monkeypatch.setenv(CAPTURE, value)
    exporter = InMemorySpanExporter()
    run_twice(provider_of(SimpleSpanProcessor(exporter)), tmp_path)
    assert words_in(exported(exporter)) == set(SAID)


@pytest.mark.parametrize("value", ["", "NO_CONTENT", "EVENT_ONLY", "false"])
def test_other_values_of_the_variable_capture_nothing(value, tmp_path, monkeypatch):
    monkeypatch.setenv(CAPTURE, value)
    exporter = InMemorySpanExporter()
    run_twice(provider_of(SimpleSpanProcessor(exporter)), tmp_path)
    assert words_in(exported(exporter)) == set()


@pytest.mark.parametrize("asked", [True, False])
def test_the_setting_beats_the_environment(asked, tmp_path, monkeypatch):
    monkeypatch.setenv(CAPTURE, "NO_CONTENT" if asked else "SPAN_ONLY")
    exporter = InMemorySpanExporter()
    run_twice(provider_of(SimpleSpanProcessor(exporter)), tmp_path, capture_content=asked)
    assert words_in(exported(exporter)) == (set(SAID) if asked else set())


def test_captured_content_is_redacted(tmp_path):
    exporter = InMemorySpanExporter()
    provider = provider_of(SimpleSpanProcessor(exporter))
    run_twice(provider, tmp_path, capture_content=True, redact=lambda text: text.replace("zq", "--"))
    assert words_in(exported(exporter)) == set()
    assert "--07" in exported(exporter)


# --- the application's own spans ------------------------------------------------------------------------------------


class Application:
    """Code of the application that makes spans, in tools and hooks of every kind."""

    def __init__(self, who="", provider=None):
        self.who = who
        self.exporter = InMemorySpanExporter()
        self.provider = provider or provider_of(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("app")

    def span(self, name):
        return self.tracer.start_as_current_span(name, attributes={"who": self.who})

    def tools(self):
        @tool
        def plain(name: str) -> str:
            """Work here."""
            with self.span(f"in {name}"), self.span(f"in in {name}"):
                return name

        @tool
        async def later(name: str) -> str:
            """Work later."""
            with self.span(f"in {name}"):
                await asyncio.sleep(0)
                with self.span(f"in in {name}"):
                    return name

        @tool(concurrent_safe=True)
        def beside(name: str) -> str:
            """Work beside others."""
            with self.span(f"in {name}"), self.span(f"in in {name}"):
                return name

        @tool(timeout_s=30)
        def timed(name: str) -> str:
            """Work in a thread."""
            with self.span(f"in {name}"), self.span(f"in in {name}"):
                return name

        return tools_from([plain, later, beside, timed], include_done=True)

    def hooks(self):
        application = self

        class Hook:
            def pre_prompt(self, state, log, context, step):
                with application.span("in pre_prompt"):
                    pass

            async def post_dispatch(self, state, log, call, result, step):
                with application.span("in post_dispatch"):
                    await asyncio.sleep(0)

            def on_loop_end(self, state, log, context, llm):
                with application.span("in on_loop_end"):
                    pass

        return [Hook()]

    def arguments(self, sink, *, is_async=False):
        replies = [
            ("plain", {"name": "one"}),
            ("later", {"name": "two"}),
            [("beside", {"name": f"three {i}"}) for i in range(4)],
            ("timed", {"name": "four"}),
            ("done", {"answer": "x"}),
        ]
        return {
            "llm": (AsyncScriptedBackend if is_async else ScriptedBackend)(replies),
            "tools": self.tools(),
            "hooks": [*self.hooks(), *([sink] if sink else [])],
            "tracer_provider": self.provider,
        }


NAMES = ["one", "two", *(f"three {i}" for i in range(4)), "four"]


def check_places(trace_, who):
    """Require the application's spans below the right ones of looplet's."""
    own = [node for node in trace_.spans if node.record.scope == "app"]
    assert {node.attributes["who"] for node in own} == {who}
    assert Counter(node.name for node in own) == Counter(
        [f"in {name}" for name in NAMES] + [f"in in {name}" for name in NAMES]
        + ["in pre_prompt"] * 5 + ["in post_dispatch"] * 8 + ["in on_loop_end"]
    )  # fmt: skip
    for node in own:
        above = node.parent
        if node.name.startswith("in in "):
            assert above.name == node.name[3:]
        elif node.name[3:] in NAMES:
            assert above.name.startswith(semconv.EXECUTE_TOOL)
            assert f'"{node.name[3:]}"' in above.attributes[semconv.TOOL_CALL_ARGUMENTS]
        else:
            expected = {"in on_loop_end": semconv.END}.get(node.name, f"looplet.{node.name[3:]}")
            assert above.name == expected
        assert node.run_id == above.run_id


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_the_application_s_spans_are_in_the_file_and_in_its_exporter_below_the_right_ones(is_async, tmp_path):
    application = Application("me")
    arguments = application.arguments(ProvenanceSink(tmp_path), is_async=is_async)
    if is_async:
        asyncio.run(afinish(async_composable_loop(**arguments)))
    else:
        finish(composable_loop(**arguments))
    trace_ = Trace.load(tmp_path)
    check_places(trace_, "me")
    in_file = {(n.span_id, n.record.parent_id, n.name) for n in trace_.spans}
    sent = list(application.exporter.get_finished_spans())
    assert in_file == {
        (f"{s.context.span_id:016x}", f"{s.parent.span_id:016x}" if s.parent else "", s.name) for s in sent
    }
    assert len(sent) == len(in_file)


def test_two_runs_in_one_thread_keep_the_application_s_spans_apart(tmp_path):
    provider = provider_of()
    applications = [Application(who, provider) for who in "ab"]
    runs = [composable_loop(**a.arguments(ProvenanceSink(tmp_path / a.who))) for a in applications]
    for _ in itertools.zip_longest(*runs):
        pass
    for application in applications:
        check_places(Trace.load(tmp_path / application.who), application.who)


def test_two_runs_under_one_request_keep_the_application_s_spans_apart(tmp_path):
    provider = provider_of()
    applications = [Application(who, provider) for who in "ab"]

    async def both():
        with provider.get_tracer("web").start_as_current_span("GET /"):
            runs = [
                async_composable_loop(**a.arguments(ProvenanceSink(tmp_path / a.who), is_async=True))
                for a in applications
            ]
            await asyncio.gather(*map(afinish, runs))

    asyncio.run(both())
    traces = [Trace.load(tmp_path / a.who) for a in applications]
    assert traces[0].roots[0].trace_id == traces[1].roots[0].trace_id
    for application, trace_ in zip(applications, traces, strict=True):
        check_places(trace_, application.who)
        assert not trace_.find("GET /")


def test_two_runs_in_two_threads_keep_the_application_s_spans_apart(tmp_path):
    provider = provider_of()
    applications = [Application(who, provider) for who in "ab"]
    threads = [
        threading.Thread(target=lambda a=a: finish(composable_loop(**a.arguments(ProvenanceSink(tmp_path / a.who)))))
        for a in applications
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for application in applications:
        check_places(Trace.load(tmp_path / application.who), application.who)


def test_spans_outside_of_the_run_are_not_in_the_file_and_those_inside_a_step_are(tmp_path):
    application = Application("me")
    sink = ProvenanceSink(tmp_path)
    with application.span("before"):
        run = composable_loop(**application.arguments(sink))
    steps = []
    for step in run:
        steps.append(step)
        with application.span("in the body"):
            pass
        if step.number == 1:
            with step.use(), application.span("in the step"):
                pass
    with application.span("after"):
        pass
    with steps[1].use(), application.span("in a step, late"):
        pass
    sink.flush()
    trace_ = Trace.load(tmp_path)
    outside = {"before", "in the body", "after"}
    assert outside <= {span.name for span in application.exporter.get_finished_spans()}
    assert not outside & {node.name for node in trace_.spans}
    (inside,) = trace_.find("in the step")
    assert inside.parent.name == "execute_tool plain"
    (late,) = trace_.find("in a step, late")
    assert late.parent.name == "execute_tool later"


def test_a_span_that_ends_after_its_run_never_gets_into_the_file_of_the_next(tmp_path):
    application = Application("me")
    sink = ProvenanceSink(tmp_path)
    first = composable_loop(**application.arguments(sink))
    (step, *_) = list(first)
    with step.use():
        straggler = application.tracer.start_span("straggler")
    straggler.end()
    second = composable_loop(**application.arguments(sink))
    finish(second)
    sink.flush()
    now = Trace.load(tmp_path)
    assert not now.find("straggler")
    assert {run.run_id for run in now.runs} == {second.run_id}
    assert len(Trace.load(tmp_path / f"trace-{first.trace_id}.jsonl").find("straggler")) == 1


def test_what_a_tool_says_about_its_own_span_is_in_the_file_and_with_the_application(tmp_path):
    exporter = InMemorySpanExporter()

    @tool
    def work() -> None:
        """Say something about the current span."""
        span = trace.get_current_span()
        span.set_attribute("answer", 42)
        span.add_event("half way", {"percent": 50})
        span.add_link(PARENT, {"why": "because"})

    finish(
        composable_loop(
            ScriptedBackend([("work", {})]), tools=tools_from([work]), max_steps=1, hooks=[ProvenanceSink(tmp_path)],
            tracer_provider=provider_of(SimpleSpanProcessor(exporter)),
        )
    )  # fmt: skip
    (node,) = Trace.load(tmp_path).find("execute_tool work")
    (span,) = (s for s in exporter.get_finished_spans() if s.name == "execute_tool work")
    for told in (node.attributes, span.attributes):
        assert told["answer"] == 42
    assert [e.name for e in node.events] == [e.name for e in span.events] == ["half way"]
    assert [link.attributes["why"] for link in node.record.links] == ["because"]
    assert [link.attributes["why"] for link in span.links] == ["because"]


def test_a_span_that_is_open_when_the_provider_is_shut_down_is_in_the_file(tmp_path):
    provider = provider_of()
    tracer = provider.get_tracer("app")

    @tool
    def work() -> None:
        """Shut the provider down in the middle."""
        with tracer.start_as_current_span("interrupted"):
            provider.shutdown()

    arguments = {"tools": tools_from([work]), "max_steps": 1, "tracer_provider": provider}
    finish(composable_loop(ScriptedBackend([("work", {})]), hooks=[ProvenanceSink(tmp_path)], **arguments))
    (node,) = Trace.load(tmp_path).find("interrupted")
    assert node.parent.name == "execute_tool work"


# --- the router -----------------------------------------------------------------------------------------------------


def test_three_thousand_sinks_add_one_processor(tmp_path):
    application = Application()
    before = len(application.provider._active_span_processor._span_processors)
    for number in range(3000):
        composable_loop(ScriptedBackend([]), tools=tools_from([]), hooks=[ProvenanceSink(tmp_path / str(number))],
                        tracer_provider=application.provider)  # fmt: skip
    assert len(application.provider._active_span_processor._span_processors) == before + 1


def test_a_provider_without_processors_is_left_alone(tmp_path):
    run = composable_loop(
        ScriptedBackend([]), tools=tools_from([]), hooks=[ProvenanceSink(tmp_path)], tracer_provider=NoIds()
    )
    assert finish(run) is None
    assert run.stop_reason == "llm_error"


# --- by hand, around the backend, in the hooks ------------------------------------------------------------------------


def ids_in(folder) -> Counter:
    """Count the spans in a file by id, before the reader makes one of those that were written twice."""
    return Counter(span.span_id for span in read_file(folder / "trace.jsonl").spans)


def test_a_sink_on_the_provider_alone_gets_every_span_once(tmp_path):
    sink = ProvenanceSink(tmp_path)
    application = Application("me", provider_of(SimpleSpanProcessor(sink)))
    finish(composable_loop(**application.arguments(None)))
    with application.span("after"):
        pass
    assert set(ids_in(tmp_path).values()) == {1}
    trace_ = Trace.load(tmp_path)
    assert [view.stop_reason for view in trace_.runs] == ["done"]
    assert len(trace_.find("in in *")) == len(NAMES)
    assert len(trace_.find("after")) == 1


@pytest.mark.parametrize("router_first", [False, True])
@pytest.mark.parametrize("processor", [SimpleSpanProcessor, BatchSpanProcessor])
def test_a_sink_on_the_provider_and_in_the_hooks_gets_every_span_once(processor, router_first, tmp_path):
    sink = ProvenanceSink(tmp_path / "it")
    provider = provider_of()
    if router_first:
        composable_loop(**Application("", provider).arguments(ProvenanceSink(tmp_path / "other")))
    provider.add_span_processor(processor(sink))
    application = Application("me", provider)
    finish(composable_loop(**application.arguments(sink)))
    provider.shutdown()
    sink.flush()
    assert set(ids_in(tmp_path / "it").values()) == {1}
    check_places(Trace.load(tmp_path / "it"), "me")
    (view,) = Trace.load(tmp_path / "it").runs
    assert view.manifest[semconv.REPLAYABLE] is True


def in_hooks(sink, arguments):
    arguments["hooks"].append(sink)


def as_trajectory_hook(sink, arguments):
    arguments["hooks"].insert(0, sink.trajectory_hook())


def around_the_backend(sink, arguments):
    arguments["llm"] = sink.wrap_llm(arguments["llm"])


WAYS = [in_hooks, as_trajectory_hook, around_the_backend]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "ways",
    [order for size in (1, 2, 3) for order in itertools.permutations(WAYS, size)],
    ids=lambda ways: "+".join(way.__name__ for way in ways),
)
def test_each_way_to_pass_a_sink_suffices_and_all_together_are_one(ways, is_async, expected, tmp_path):
    sink = ProvenanceSink(tmp_path)
    arguments = talkative(is_async=is_async)
    for way in ways:
        way(sink, arguments)
    if is_async:
        asyncio.run(afinish(async_composable_loop(**arguments)))
    else:
        finish(composable_loop(**arguments))
    assert set(ids_in(tmp_path).values()) == {1}
    assert without_hook_names(story(tmp_path)) == without_hook_names(expected)
    assert len(Trace.load(tmp_path).runs[0].chats) == len(REPLIES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["trace.jsonl"]


def without_hook_names(told):
    """Return a story without the list of hooks, in which the sink itself may stand."""
    name, kind, status, attributes, events, children, *rest = told
    attributes = {k: v for k, v in attributes.items() if k != semconv.HOOKS}
    return (name, kind, status, attributes, events, [without_hook_names(child) for child in children], *rest)


def test_a_sink_may_be_wrapped_around_twice_and_in_two_sinks(tmp_path):
    one, other = ProvenanceSink(tmp_path / "one"), ProvenanceSink(tmp_path / "other")
    arguments = talkative(one)
    arguments["llm"] = one.wrap_llm(other.wrap_llm(one.wrap_llm(arguments["llm"])))
    finish(composable_loop(**arguments))
    assert story(tmp_path / "one") == story(tmp_path / "other")
    assert ids_in(tmp_path / "one") == ids_in(tmp_path / "other")


class Rich:
    """A backend with everything of its own."""

    model = "rich-1"
    provider = "acme"
    base_url = "https://models.example/v1"
    server_address, server_port = "models.example", 443

    def __init__(self):
        self.seen: list[dict[str, Any]] = []

    def chat(self, messages, *, tools, system_prompt, seed=None):
        self.seen.append({"seed": seed, "system": system_prompt, "tools": [t["name"] for t in tools]})
        return Reply(tool_calls=(ToolCall("done", {"answer": "x"}),), usage=Usage(3, 4))

    def stream(self):
        return "streaming"


def test_a_wrapped_backend_keeps_every_capability(tmp_path):
    rich = Rich()
    wrapped = ProvenanceSink(tmp_path).wrap_llm(rich)
    assert wrapped.stream() == "streaming"
    assert (wrapped.model, wrapped.base_url) == (rich.model, rich.base_url)
    assert not hasattr(wrapped, "generate")
    config = LoopConfig(generate_kwargs={"seed": 7}, system_prompt="be brief")
    (step,) = composable_loop(wrapped, tools=tools_from([], include_done=True), config=config)
    assert rich.seen == [{"seed": 7, "system": "be brief", "tools": ["done"]}]
    assert step.usage == Usage(3, 4)
    (chat,) = Trace.load(tmp_path).find("chat rich-1")
    told = [semconv.PROVIDER_NAME, semconv.SERVER_ADDRESS, semconv.SERVER_PORT, semconv.PROTOCOL]
    assert [chat.attributes[key] for key in told] == ["acme", "models.example", 443, "chat"]


class Bare:
    """The smallest backend."""

    def generate(self, prompt, *, system_prompt, max_tokens, temperature):
        return '{"tool": "done", "args": {"answer": "x"}}'


class Blocks:
    """A backend of the older kind."""

    model = "blocks"

    def generate_with_tools(self, prompt, *, tools, max_tokens, system_prompt, temperature):
        return [{"type": "tool_use", "id": "b1", "name": "done", "input": {"answer": "x"}}]


@pytest.mark.parametrize("backend", [Bare, Blocks, MockLLMBackend])
def test_a_wrapped_backend_is_recorded_like_the_backend(backend, tmp_path):
    for name, wrap in (("bare", False), ("wrapped", True)):
        sink = ProvenanceSink(tmp_path / name)
        llm = sink.wrap_llm(backend()) if wrap else backend()
        run = composable_loop(llm, tools=tools_from([], include_done=True), hooks=[sink], max_steps=2)
        assert [step.tool_call.tool for step in run] == ["done"]
    assert story(tmp_path / "bare") == story(tmp_path / "wrapped")


def test_a_wrapped_backend_that_is_async_is_still_async(tmp_path):
    wrapped = ProvenanceSink(tmp_path).wrap_llm(AsyncScriptedBackend([("done", {"answer": "x"})]))
    assert asyncio.run(afinish(run := async_composable_loop(wrapped, tools=tools_from([], include_done=True)))) is None
    assert run.stop_reason == "done"
    with pytest.raises(TypeError, match="async for"):
        composable_loop(wrapped, tools=tools_from([], include_done=True))

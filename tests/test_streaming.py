"""The events of a stream, where they go, and how deltas become events."""

from __future__ import annotations

import asyncio
import json
import pickle
import queue
import sys
import threading
from dataclasses import FrozenInstanceError

import pytest
from support import both, make_tools

from looplet import (
    AsyncOpenAIBackend,
    BackendError,
    ConfigError,
    LoopConfig,
    Message,
    OpenAIBackend,
    Reply,
    ToolCall,
    ToolContext,
    ToolResult,
    Usage,
    composable_loop,
    stream_events,
    tool,
    tools_from,
)
from looplet.backends.resilient import ResilientBackend
from looplet.boundary import Boundary
from looplet.streaming import (
    FAILED,
    CallbackEmitter,
    ChatEndEvent,
    CompositeEmitter,
    DeltaGate,
    QueueEmitter,
    ReasoningDeltaEvent,
    RunEndEvent,
    RunStartEvent,
    Stream,
    StreamEvent,
    StreamingHook,
    TextDeltaEvent,
    ToolArgumentsDeltaEvent,
    ToolDispatchEvent,
    ToolProgressEvent,
    ToolResultEvent,
    TurnStartEvent,
    as_emitter,
)
from looplet.telemetry import drops as telemetry_drops
from looplet.testing import (
    Answer,
    AsyncScriptedBackend,
    Cut,
    LLMResponsesExhausted,
    OpenAIServer,
    PolicyBackend,
    ScriptedBackend,
)
from looplet.types import Delta

HELLO = [Message.of_text("user", "hi")]
EVENT = TurnStartEvent("r", 1)
EVENTS = {kind for kind in vars(stream_events).values() if isinstance(kind, type) and issubclass(kind, StreamEvent)}


@pytest.fixture(autouse=True)
def drops(monkeypatch):
    """Return what was counted as lost in this test."""
    counted: dict[str, int] = {}
    monkeypatch.setattr(telemetry_drops, "drops", counted)
    return counted


def numbered(count: int) -> list[TurnStartEvent]:
    return [TurnStartEvent("r", number) for number in range(count)]


# --- events ---------------------------------------------------------------------------------------------------------


def test_each_event_has_a_kind_of_its_own_after_its_class():
    kinds = {event.kind: event.__name__ for event in EVENTS if event is not StreamEvent}
    assert len(kinds) == len(EVENTS) - 1 > 12
    assert all(name == "".join(map(str.title, kind.split("_"))) + "Event" for kind, name in kinds.items())


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (RunStartEvent("r", {"n": 1}), {"kind": "run_start", "run_id": "r", "task": {"n": 1}, "parent_run_id": ""}),
        (TextDeltaEvent("r", 1, "a"), {"kind": "text_delta", "run_id": "r", "turn": 1, "text": "a"}),
        (
            RunEndEvent("r", "done", 2, Usage(3, 4)),
            {"kind": "run_end", "run_id": "r", "stop_reason": "done", "steps": 2, "usage": {
                "input_tokens": 3, "output_tokens": 4, "cached_tokens": 0, "reasoning_tokens": 0, "cost_usd": None,
                "cache_write_tokens": 0}},
        ),
        (ToolProgressEvent("r", 1, "c", "half", {"n": 1}),
         {"kind": "tool_progress", "run_id": "r", "step": 1, "call_id": "c", "stage": "half", "data": {"n": 1}}),
    ],
)  # fmt: skip
def test_an_event_is_told_as_json(event, told):
    assert event.to_dict() == told
    assert next(iter(event.to_dict())) == "kind"
    assert json.loads(json.dumps(event.to_dict())) == told


def test_calls_and_results_are_told_whole():
    call, result = ToolCall("look", {"n": 1}, call_id="c"), ToolResult("look", data=[1], call_id="c")
    assert ToolDispatchEvent("r", 1, 2, call).to_dict()["tool_call"] == call.to_dict()
    assert ToolResultEvent("r", 1, 2, result).to_dict()["tool_result"] == result.to_dict()
    assert ChatEndEvent("r", 1, "m").to_dict()["usage"] is None


def test_events_are_values():
    with pytest.raises(FrozenInstanceError):
        EVENT.turn = 2
    assert pickle.loads(pickle.dumps(EVENT)) == EVENT == TurnStartEvent("r", 1)
    assert not hasattr(EVENT, "__dict__")


# --- what is an emitter ---------------------------------------------------------------------------------------------


class Mine:
    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append(event)


def test_functions_queues_and_objects_with_emit_are_emitters():
    mine, events, waiting = Mine(), [], queue.Queue()
    for given in (mine, events.append, waiting):
        as_emitter(given).emit(EVENT)
    assert (mine.events, events, waiting.get_nowait()) == ([EVENT], [EVENT], EVENT)
    assert as_emitter(mine) is mine


async def coroutine(event):
    raise AssertionError


class AsyncMine:
    async def emit(self, event):
        raise AssertionError


class AsyncCallable:
    async def __call__(self, event):
        raise AssertionError


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([Mine()], "CompositeEmitter"),
        ("print", "not str"),
        (None, "not NoneType"),
        (Mine, "Mine(...)"),
        (coroutine, "`async def`"),
        (AsyncMine(), "`async def`"),
        (AsyncCallable(), "AsyncCallable is `async def`"),
    ],
)
def test_what_is_no_emitter_is_refused_with_what_to_write(given, words):
    with pytest.raises(ConfigError) as caught:
        as_emitter(given)
    assert words in str(caught.value)


def test_emitters_of_the_wrong_thing_are_refused():
    with pytest.raises(ConfigError, match="put_nowait"):
        QueueEmitter([])
    with pytest.raises(ConfigError, match="function"):
        CallbackEmitter("print")
    with pytest.raises(ConfigError, match="not NoneType"):
        StreamingHook(None)


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_without_emitters_is_false_and_harmless():
    assert not Stream()
    assert Stream([print])
    Stream().emit(EVENT)


def test_an_emitter_given_twice_emits_once():
    mine, events, waiting = Mine(), [], queue.Queue()
    hook = StreamingHook(events.append)
    given = [mine, events.append, waiting, CompositeEmitter([mine, waiting, CompositeEmitter([events.append])])]
    Stream([*given, hook.looplet_emitter, QueueEmitter(waiting)]).emit(EVENT)
    assert (len(mine.events), len(events), waiting.qsize()) == (1, 1, 1)


def test_two_emitters_of_one_kind_both_emit():
    one, two = [], []
    Stream([one.append, two.append, Mine(), Mine()]).emit(EVENT)
    assert one == two == [EVENT]
    assert len(Stream([queue.Queue(), queue.Queue(), Mine(), Mine()]).emitters) == 4


def fails(event):
    raise ValueError("no")


def test_an_emitter_that_raises_is_counted_logged_once_and_stops_nobody(drops, caplog):
    events = []
    stream = Stream([fails, CompositeEmitter([events.append, fails])])
    stream.emit(EVENT)
    stream.emit(EVENT)
    assert events == [EVENT, EVENT]
    assert drops == {FAILED: 2}
    assert [FAILED in message for message in caplog.messages] == [True]
    assert "ValueError('no')" in caplog.messages[0]


def test_a_composite_by_itself_does_not_raise_either(drops):
    events = []
    CompositeEmitter([fails, events.append]).emit(EVENT)
    assert (events, drops) == ([EVENT], {FAILED: 1})


def test_a_full_queue_loses_events_and_says_so(drops):
    waiting = queue.Queue(1)
    stream = Stream([waiting])
    for event in numbered(3):
        stream.emit(event)
    assert (waiting.get_nowait().turn, drops) == (0, {FAILED: 2})


def test_ctrl_c_in_an_emitter_passes_and_the_stream_goes_on():
    events = []

    def interrupted(event):
        if not events:
            events.append("interrupted")
            raise KeyboardInterrupt

    stream = Stream([interrupted, events.append])
    with pytest.raises(KeyboardInterrupt):
        stream.emit(EVENT)
    stream.emit(EVENT)
    assert events == ["interrupted", EVENT]


def test_what_an_emitter_emits_itself_comes_after():
    order = []

    def echo(event):
        order.append(("echo", event.turn))
        if event.turn == 0:
            stream.emit(TurnStartEvent("r", 1))
            order.append("back")

    stream = Stream([echo, lambda event: order.append(("other", event.turn))])
    stream.emit(TurnStartEvent("r", 0))
    assert order == [("echo", 0), "back", ("other", 0), ("echo", 1), ("other", 1)]


def test_threads_neither_lose_nor_mix_up_events():
    one, two, inside = [], [], []

    def slow(event):
        inside.append(event)
        assert len(inside) == 1, "two threads at once"
        one.append(event)
        inside.pop()

    stream = Stream([slow, two.append])
    old, start = sys.getswitchinterval(), threading.Barrier(4)
    sys.setswitchinterval(1e-6)

    def work(thread):
        start.wait()
        for number in range(300):
            stream.emit(ToolProgressEvent("r", thread, "c", str(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(old)
    assert one == two
    assert len(one) == 1200
    for thread in range(4):
        assert [event.stage for event in one if event.step == thread] == [str(number) for number in range(300)]


def test_a_stuck_emitter_holds_no_other_thread_up():
    entered, release, events = threading.Event(), threading.Event(), []

    def stuck(event):
        events.append(event.turn)
        if event.turn == 0:
            entered.set()
            release.wait(5)

    stream = Stream([stuck])
    thread = threading.Thread(target=stream.emit, args=(TurnStartEvent("r", 0),))
    thread.start()
    assert entered.wait(5)
    stream.emit(TurnStartEvent("r", 1))
    assert events == [0]
    release.set()
    thread.join()
    assert events == [0, 1]


# --- asyncio queues -------------------------------------------------------------------------------------------------


def test_a_reader_of_an_asyncio_queue_wakes_up_for_events_from_a_thread():
    async def main():
        waiting: asyncio.Queue = asyncio.Queue()
        stream = Stream([waiting])
        reading = asyncio.create_task(waiting.get())
        await asyncio.sleep(0)
        thread = threading.Thread(target=stream.emit, args=(EVENT,))
        thread.start()
        try:
            return await asyncio.wait_for(reading, 5)
        finally:
            thread.join()

    assert asyncio.run(main(), debug=True) == EVENT


def test_events_of_the_loop_and_of_threads_stay_in_order():
    async def main(emitter):
        stream = Stream([emitter])
        stream.emit(TurnStartEvent("r", 0))
        thread = threading.Thread(target=lambda: [stream.emit(TurnStartEvent("r", n)) for n in (1, 2)])
        thread.start()
        thread.join()
        stream.emit(TurnStartEvent("r", 3))
        return [emitter.queue.get_nowait().turn for _ in range(4)]

    outside = QueueEmitter(asyncio.Queue())  # made before there is a loop: its first event tells
    assert asyncio.run(main(outside)) == [0, 1, 2, 3]


def test_a_full_asyncio_queue_loses_events_of_threads_and_says_so(drops):
    async def main():
        waiting: asyncio.Queue = asyncio.Queue(1)
        stream = Stream([waiting])
        thread = threading.Thread(target=lambda: [stream.emit(event) for event in numbered(3)])
        thread.start()
        thread.join()
        return (await waiting.get()).turn

    assert asyncio.run(main()) == 0
    assert drops == {FAILED: 2}


def test_an_asyncio_queue_without_a_loop_is_filled_as_it_is():
    waiting: asyncio.Queue = asyncio.Queue()
    Stream([waiting]).emit(EVENT)
    assert waiting.get_nowait() == EVENT


# --- deltas ---------------------------------------------------------------------------------------------------------

DELTAS = [
    Delta("reasoning", "bob"),
    Delta("text", "write to bob@exa"),
    Delta("tool_call", "", 0, "c1", "mail"),
    Delta("tool_call", '{"to": "bob@exam', 0),
    Delta("text", "mple.com!"),
    Delta("tool_call", "", 1, "c2", "done"),
    Delta("tool_call", 'ple.com", "n": 1}', 0),
]


def hide(text: str) -> str:
    return text.replace("bob@example.com", "[mail]").replace("bob@exammple.com", "[mail]").replace("12345", "[number]")


def through_gate(boundary: Boundary, deltas: list[Delta]) -> tuple[list[StreamEvent], list[StreamEvent]]:
    """Return the events before the end of the reply, and those at its end."""
    events: list[StreamEvent] = []
    gate = DeltaGate(boundary, lambda kind, **facts: events.append(kind(run_id="r", turn=1, **facts)))
    for delta in deltas:
        gate.take(delta)
    early, events[:] = list(events), []
    gate.finish()
    return early, events


def test_without_redactors_each_delta_is_an_event_at_once():
    early, late = through_gate(Boundary(), DELTAS)
    assert late == []
    assert early == [
        ReasoningDeltaEvent("r", 1, "bob"),
        TextDeltaEvent("r", 1, "write to bob@exa"),
        ToolArgumentsDeltaEvent("r", 1, 0, "c1", "mail", ""),
        ToolArgumentsDeltaEvent("r", 1, 0, "c1", "mail", '{"to": "bob@exam'),
        TextDeltaEvent("r", 1, "mple.com!"),
        ToolArgumentsDeltaEvent("r", 1, 1, "c2", "done", ""),
        ToolArgumentsDeltaEvent("r", 1, 0, "c1", "mail", 'ple.com", "n": 1}'),
    ]


def test_with_redactors_nothing_comes_before_the_end_and_then_each_part_once():
    early, late = through_gate(Boundary(hide), DELTAS)
    assert early == []
    assert late == [
        ReasoningDeltaEvent("r", 1, "bob"),
        TextDeltaEvent("r", 1, "write to [mail]!"),
        ToolArgumentsDeltaEvent("r", 1, 0, "c1", "mail", '{"to":"[mail]","n":1}'),
        ToolArgumentsDeltaEvent("r", 1, 1, "c2", "done", ""),
    ]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"card": 12345}', '{"card":"[number]"}'),
        (r'{"to": "bob\u0040example.com"}', '{"to":"[mail]"}'),
        ('{"to": "bob@example.com", ', '{"to": "[mail]", '),
    ],
)
def test_arguments_are_redacted_as_the_call_will_be(arguments, shown):
    _, (event,) = through_gate(Boundary(hide), [Delta("tool_call", piece) for piece in arguments])
    assert event.text == shown


def test_deltas_can_always_be_encoded():
    (event,), _ = through_gate(Boundary(), [Delta("text", "\ud83d")])
    assert event.text == "\\ud83d"


def test_empty_texts_are_no_events():
    early, late = through_gate(Boundary(), [Delta("text", ""), Delta("reasoning", "")])
    assert (early, late) == ([], [])


# --- scripted backends ----------------------------------------------------------------------------------------------

CALLS = [ToolCall("look", {"name": "🙂 and more"}, call_id="c1"), ToolCall("done", {})]
SCRIPT = [Reply("some text", tuple(CALLS), Usage(3, 2), reasoning="thinking"), "short", [("look", {"name": "x"})]]


def streamed(llm) -> list:
    async def main():
        return [item async for item in llm.stream(HELLO, tools=None)]

    return asyncio.run(main()) if isinstance(llm, AsyncScriptedBackend) else list(llm.stream(HELLO, tools=None))


@pytest.mark.parametrize("kind", [ScriptedBackend, AsyncScriptedBackend])
def test_a_scripted_stream_ends_with_the_reply_of_chat(kind):
    llm, twin = kind(SCRIPT), ScriptedBackend(SCRIPT)
    for _ in SCRIPT:
        *deltas, reply = streamed(llm)
        assert reply == twin.chat(HELLO)
        assert "".join(d.text for d in deltas if d.kind == "text") == reply.text
        assert "".join(d.text for d in deltas if d.kind == "reasoning") == reply.reasoning
        for index, call in enumerate(reply.tool_calls):
            first, *rest = [d for d in deltas if d.kind == "tool_call" and d.index == index]
            assert (first.tool, first.call_id, first.text) == (call.tool, call.call_id, "")
            assert json.loads("".join(d.text for d in rest)) == call.args
    assert len(llm.requests) == 3
    with pytest.raises(LLMResponsesExhausted):
        streamed(llm)


@pytest.mark.parametrize("kind", [ScriptedBackend, AsyncScriptedBackend])
def test_an_exception_in_the_script_is_raised_by_the_stream(kind):
    with pytest.raises(BackendError, match="gone"):
        streamed(kind([BackendError("gone")]))


@pytest.mark.parametrize("make", [lambda said: ScriptedBackend([said]), lambda said: PolicyBackend(lambda _: said)])
@pytest.mark.parametrize(("after", "came"), [(0, ""), (2, "abcd"), (9, "abcdefg")])
def test_a_cut_reply_breaks_off_after_some_deltas(make, after, came):
    cut = Cut("abcdefg", after=after, usage=Usage(7))
    items = []
    with pytest.raises(BackendError) as caught:
        items.extend(make(cut).stream(HELLO))  # keeps what came before the error
    assert "".join(item.text for item in items) == came
    assert (caught.value.kind, caught.value.retryable, caught.value.usage) == ("stream_cut", True, Usage(7))
    with pytest.raises(BackendError, match="cuts"):
        make(cut).chat(HELLO)


def test_a_policy_is_streamed_too():
    *deltas, reply = PolicyBackend(lambda messages: messages[0].text * 2).stream(HELLO)
    assert "".join(delta.text for delta in deltas) == reply.text == "hihi"


# --- runs -----------------------------------------------------------------------------------------------------------

RUN = [Reply("I add.", (ToolCall("add", {"a": 1, "b": 2}),), Usage(3, 2)), ("done", {"answer": "3"})]


def streaming(script, streams: list[list], **more):
    """Return what `both` takes: a run over `script`; the events of each run go into a list of their own."""

    def make(is_async):
        events: list[StreamEvent] = []
        streams.append(events)
        llm = (AsyncScriptedBackend if is_async else ScriptedBackend)(script)
        wrap = more.get("wrap", lambda llm: llm)
        given = {"task": {"goal": "g"}, "tools": more.get("tools") or make_tools(), "config": more.get("config")}
        return {**given, "llm": wrap(llm), "stream": events.append}

    return make


def kinds(events: list[StreamEvent]) -> list[str]:
    """Return the kinds, one for any number of a kind in a row."""
    return [event.kind for number, event in enumerate(events) if not number or events[number - 1].kind != event.kind]


def timeless(events: list[StreamEvent]) -> list[dict]:
    told = json.loads(json.dumps([event.to_dict() for event in events]))
    for event in told:
        event.pop("run_id")
        event.get("tool_result", {}).pop("duration_ms", None)
    return told


def test_a_run_tells_what_happens_while_it_happens_sync_and_async_alike():
    streams: list[list[StreamEvent]] = []
    both(streaming(RUN, streams))
    sync, other = streams
    assert timeless(sync) == timeless(other)
    called = ["tool_arguments_delta", "chat_end", "tool_dispatch", "tool_result", "turn_end"]
    asked = ["turn_start", "chat_start"]
    assert kinds(sync) == ["run_start", *asked, "text_delta", *called, *asked, *called, "run_end"]
    assert len({event.run_id for event in sync}) == 1
    assert sync[-1].usage == Usage(13, 7)


def test_a_step_comes_after_the_events_of_its_tool():
    events: list = []
    run = composable_loop(ScriptedBackend(RUN), {}, make_tools(), stream=events.append)
    for step in run:
        events.append(step)  # noqa: PERF402 - the run appends to the same list
    steps = [number for number, event in enumerate(events) if not isinstance(event, StreamEvent)]
    assert [events[number - 1].tool_result.data for number in steps] == [3, {"status": "completed", "answer": "3"}]


def test_no_part_of_a_secret_gets_out_however_it_is_cut():
    secret = "bob@example.com"
    script = [
        Reply(f"I write to {secret}.", (ToolCall("look", {"name": secret}),), reasoning=f"{secret}, who is it?"),
        ("done", {"answer": secret}),
    ]
    streams: list[list[StreamEvent]] = []
    both(streaming(script, streams, config=LoopConfig(redact=hide)))
    for events in streams:
        told = "".join(getattr(event, "text", "") for event in events)
        assert "[mail]" in told
        assert not any(piece in json.dumps(timeless(events)) for piece in ("bob", "example.com"))


def test_a_reply_that_was_cut_is_void_and_told_again():
    streams: list[list[StreamEvent]] = []
    script = [Cut(RUN[0], after=2, usage=Usage(3)), *RUN]
    wrap = lambda llm: ResilientBackend(llm, retries=1, base_delay_s=0.0)  # noqa: E731
    outcome = both(streaming(script, streams, wrap=wrap))
    assert outcome.stop_reason == "done"
    for events in streams:
        (retry,) = [number for number, event in enumerate(events) if event.kind == "chat_retry"]
        assert (events[retry].attempt, events[retry].error_type) == (1, "stream_cut")
        texts = ["".join(e.text for e in part if e.kind == "text_delta") for part in (events[:retry], events[retry:])]
        assert texts == ["I ad", "I add."]
        assert events[-1].usage == Usage(16, 7)


def test_a_cut_that_nobody_mends_ends_the_run_and_the_stream():
    streams: list[list[StreamEvent]] = []
    outcome = both(streaming([Cut(RUN[0])], streams))
    assert outcome.stop_reason == "llm_error"
    for events in streams:
        assert [event.error_type for event in events if event.kind == "chat_end"] == ["stream_cut"]
        assert events[-1].stop_reason == "llm_error"


@tool(concurrent_safe=True)
def work(name: str, ctx: ToolContext) -> str:
    """Work, and say so."""
    for stage in ("begun", "ended"):
        ctx.report_progress(stage, {"name": name})
    return name


def test_progress_of_tools_that_run_at_the_same_time_is_told_in_order():
    names = [f"n{number}" for number in range(4)]
    script = [[("work", {"name": name}) for name in names], ("done", {"answer": "x"})]
    streams: list[list[StreamEvent]] = []
    both(streaming(script, streams, tools=tools_from([work], include_done=True)))
    for events in streams:
        for step, name in enumerate(names, 1):
            mine = [e for e in events if getattr(e, "step", None) == step]
            assert [e.kind for e in mine] == ["tool_dispatch", "tool_progress", "tool_progress", "tool_result"]
            assert [(e.stage, e.data) for e in mine[1:3]] == [("begun", {"name": name}), ("ended", {"name": name})]


@pytest.mark.parametrize("stream", [None, queue.Queue()])
def test_a_provider_is_asked_for_a_stream_only_when_somebody_listens(stream):
    policy = [Answer("I add.", [("add", {"a": 1, "b": 2})]), [("done", {"answer": "3"})]]
    with OpenAIServer(policy=policy) as server, OpenAIBackend(base_url=server.base_url, model="m") as llm:
        steps = list(composable_loop(llm, {"goal": "add"}, make_tools(), stream=stream))
    assert [bool(request.body.get("stream")) for request in server.requests] == [stream is not None] * 2
    assert [step.tool_call.tool for step in steps] == ["add", "done"]
    assert all(step.usage.input_tokens for step in steps)


def test_what_a_provider_streams_is_the_run_it_would_be_in_one_piece():
    policy = [Answer("I add.", [("add", {"a": 1, "b": 2})], Usage(9, 5, 4, 1)), [("done", {"answer": "3"})]]
    outcomes, servers = [], []

    def make(is_async):
        servers.append(OpenAIServer(policy=policy).start())
        llm = (AsyncOpenAIBackend if is_async else OpenAIBackend)(base_url=servers[-1].base_url, model="m")
        close = llm.aclose if is_async else llm.close
        tools = {"llm": llm, "task": {}, "tools": make_tools(), "hooks": [AtEnd(close, is_async)]}
        return tools | ({"stream": queue.Queue()} if len(servers) > 2 else {})

    try:
        outcomes += [both(make), both(make)]
    finally:
        for server in servers:
            server.close()
    plain, streamed = outcomes
    assert plain.steps == streamed.steps
    assert plain.tree == streamed.tree
    assert [bool(server.requests[0].body.get("stream")) for server in servers] == [False, False, True, True]


class AtEnd:
    """Closes a backend at the end of a run."""

    def __init__(self, close, is_async):
        self.close = close
        if is_async:
            self.on_loop_end = self.later

    def on_loop_end(self, state, log, context, llm):
        self.close()

    async def later(self, state, log, context, llm):
        await self.close()

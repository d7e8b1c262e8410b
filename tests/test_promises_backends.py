"""What is promised of models and streams, each promise kept by a whole run over real clients and a real socket."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest
from provider_support import over_the_socket
from support import both, make_tools, run_async, run_sync

from looplet import (
    AnthropicBackend,
    AsyncAnthropicBackend,
    AsyncOpenAIBackend,
    BackendRouter,
    BudgetCap,
    CachePolicy,
    Image,
    LoopConfig,
    OpenAIBackend,
    RateLimitedBackend,
    Reply,
    ResilientBackend,
    StreamingHook,
    SummarizeCompact,
    ToolCall,
    Usage,
    async_run_sub_loop,
    run_sub_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.testing import (
    Answer,
    AnthropicServer,
    AsyncScriptedBackend,
    Cut,
    Fault,
    OpenAIServer,
    ScriptedBackend,
)
from looplet.tools import ToolSpec

PROVIDERS = {
    "openai": (OpenAIServer, (OpenAIBackend, AsyncOpenAIBackend)),
    "anthropic": (AnthropicServer, (AnthropicBackend, AsyncAnthropicBackend)),
}
WAYS = pytest.mark.parametrize("run", [run_sync, run_async], ids=["sync", "async"])
"""for runs that fail: the provider's address, in the words of the error, is another one in each run"""
EACH = pytest.mark.parametrize("provider", PROVIDERS)
WORK = Answer("I work.", [("work", {"name": "Ann"})], Usage(7, 3))
END = Answer("I end.", [("done", {"answer": "x"})], Usage(11, 5))
FAULTS = {
    "rate_limit": Fault.rate_limited(0.01),
    "server_error": Fault.server_error(),
    "overloaded": Fault.overloaded(),
    "network": Fault.cut(),
    "bad_response": Fault.malformed(),
    "no_choice": Fault.empty(),
}
"""what may go away, by the `error.type` that the trace is to have; an empty answer is a bad response as well"""


def scripted(is_async: bool, *replies: Any, **settings: Any) -> Any:
    return (AsyncScriptedBackend if is_async else ScriptedBackend)(list(replies), **settings)


def over(stack: ExitStack, provider: str, policy: Any, servers: list[Any] | None = None, **more: Any):
    server, kinds = PROVIDERS[provider]
    return over_the_socket(stack, server, kinds, policy, [] if servers is None else servers, **more)


def chats(outcome) -> list[Any]:
    return outcome.trace.find("chat *")


def events_of(span) -> list[tuple[str, Any]]:
    return [(e.name, e.attributes.get(semconv.ERROR_TYPE)) for e in span.events]


# --- streams --------------------------------------------------------------------------------------------------------


def collapsed(events: list[Any]) -> list[Any]:
    """Return kinds and marks, one for any number of deltas in a row."""
    kinds = [event if isinstance(event, str) else event.kind for event in events]
    return [kind for number, kind in enumerate(kinds) if "delta" not in kind or kinds[number - 1] != kind]


@EACH
@pytest.mark.parametrize("way", ["stream", "hook"])
def test_a_stream_tells_each_event_once_and_in_order_and_of_a_tool_before_it_runs(provider, way):
    told: list[list[Any]] = []

    def stream_of(make):
        def arguments(is_async):
            heard: list[Any] = []
            told.append(heard)

            @tool
            def work(name: str, ctx) -> str:
                """Work."""
                heard.append("the tool runs")
                ctx.report_progress("half")
                return name

            given = make(is_async)
            extra = (
                {"hooks": [*given["hooks"], StreamingHook(heard.append)]} if way == "hook" else {"stream": heard.append}
            )
            return {**given, **extra, "tools": tools_from([work], include_done=True)}

        return arguments

    with ExitStack() as stack:
        outcome = both(stream_of(over(stack, provider, [WORK, END])))
    assert outcome.stop_reason == "done"
    asked = ["turn_start", "chat_start", "text_delta", "tool_arguments_delta", "chat_end", "tool_dispatch"]
    expected = [
        "run_start",
        *asked, "the tool runs", "tool_progress", "tool_result", "turn_end",
        *asked, "tool_result", "turn_end",
        "run_end",
    ]  # fmt: skip
    for heard in told:
        assert collapsed(heard) == expected
        deltas = [e for e in heard if not isinstance(e, str) and e.kind == "tool_arguments_delta" and e.turn == 1]
        assert json.loads("".join(e.text for e in deltas)) == {"name": "Ann"}
        assert "".join(e.text for e in heard if getattr(e, "kind", "") == "text_delta") == "I work.I end."
        assert [e.usage for e in heard if getattr(e, "kind", "") == "chat_end"] == [Usage(7, 3), Usage(11, 5)]
        assert heard[-1].usage == Usage(18, 8)


@EACH
def test_the_time_to_the_first_chunk_is_on_the_span_of_a_streamed_call_only(provider):
    for stream in ([].append, None):
        with ExitStack() as stack:
            make = over(stack, provider, [END])
            outcome = both(lambda is_async, make=make, stream=stream: {**make(is_async), "stream": stream})
        (chat,) = chats(outcome)
        first = chat.attributes.get(semconv.TIME_TO_FIRST_CHUNK)
        assert chat.attributes.get(semconv.REQUEST_STREAM, False) is (stream is not None)
        if stream is None:
            assert first is None
        else:
            assert 0 < first <= chat.duration_s


@EACH
@WAYS
def test_a_stream_cut_in_the_middle_ends_the_run_in_order(provider, run, tmp_path):
    with ExitStack() as stack:
        make = over(stack, provider, [Fault.cut(WORK), END])
        outcome = run(lambda is_async: {**make(is_async), "stream": [].append}, tmp_path)
    assert (outcome.stop_reason, outcome.raised, outcome.trace.problems) == ("llm_error", None, [])
    (chat,) = chats(outcome)
    assert (chat.record.status_code, chat.attributes[semconv.ERROR_TYPE]) == (2, "stream_cut")
    assert outcome.live == outcome.saved


@EACH
def test_a_stream_cut_in_the_middle_may_be_asked_again(provider):
    def again(is_async):
        arguments = make(is_async)
        llm = ResilientBackend(arguments["llm"], retries=1, base_delay_s=0.0)
        return {**arguments, "llm": llm, "stream": [].append}

    with ExitStack() as stack:
        make = over(stack, provider, [Fault.cut(WORK), END])
        mended = both(again)
    assert mended.stop_reason == "done"
    (chat,) = chats(mended)
    assert events_of(chat) == [(semconv.EVENT_RETRY, "stream_cut")]
    assert chat.record.status_code == 0


# --- retries, fallbacks, limits -------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("name", FAULTS)
def test_what_may_go_away_is_asked_again_and_seen_on_the_span(provider, name):
    def make(is_async):
        arguments = given(is_async)
        return {
            **arguments,
            "llm": ResilientBackend(arguments["llm"], retries=2, base_delay_s=0.001, max_delay_s=0.002),
        }

    servers: list[Any] = []
    with ExitStack() as stack:
        given = over(stack, provider, [FAULTS[name], FAULTS[name], END], servers)
        outcome = both(make)
    assert outcome.stop_reason == "done"
    (chat,) = chats(outcome)
    kind = "bad_response" if name == "no_choice" else name
    assert events_of(chat) == [(semconv.EVENT_RETRY, kind)] * 2
    assert [len(server.requests) for server in servers] == [3, 3]


@EACH
@WAYS
@pytest.mark.parametrize(
    ("fault", "kind"), [(Fault.unauthorized(), "auth"), (Fault.error(400, "no such thing"), "bad_request")]
)
def test_what_does_not_go_away_is_asked_once_and_ends_the_run_in_order(provider, run, fault, kind, tmp_path):
    def make(is_async):
        arguments = given(is_async)
        return {**arguments, "llm": ResilientBackend(arguments["llm"], retries=5)}

    servers: list[Any] = []
    with ExitStack() as stack:
        given = over(stack, provider, [fault, END], servers)
        outcome = run(make, tmp_path)
    assert (outcome.stop_reason, outcome.raised) == ("llm_error", None)
    (chat,) = chats(outcome)
    assert (chat.attributes[semconv.ERROR_TYPE], [len(server.requests) for server in servers]) == (kind, [1])


class Closes:
    """Closes these backends at the end of the run: a wrapper's `close` is that of its first one."""

    def __init__(self, is_async: bool, *backends: Any) -> None:
        self.backends = backends
        if is_async:
            self.on_loop_end = self.aclose

    def on_loop_end(self, state, log, context, llm):
        for backend in self.backends:
            backend.close()

    async def aclose(self, state, log, context, llm):
        for backend in self.backends:
            await backend.aclose()


def test_another_provider_takes_over_within_the_turn_and_is_counted_apart():
    routers = []
    with ExitStack() as stack:
        broken = over(stack, "openai", [Fault.unauthorized()] * 3)
        sound = over(stack, "anthropic", [Answer("", [("add", {"a": 1, "b": 2})], Usage(7, 3)), END])

        def make(is_async):
            one, other = broken(is_async), sound(is_async)
            routers.append(BackendRouter(ResilientBackend(one["llm"], retries=0, fallbacks=[other["llm"]])))
            return {**one, "llm": routers[-1], "hooks": [Closes(is_async, one["llm"], other["llm"])]}

        outcome = both(make)
    assert outcome.stop_reason == "done"
    providers = [chat.attributes[semconv.PROVIDER_NAME] for chat in chats(outcome)]
    assert providers == ["openai", "anthropic"] * 2 or len(set(providers)) == 2
    assert [chat.record.status_code for chat in chats(outcome)] == [2, 0, 2, 0]
    turns = outcome.trace.find(semconv.TURN)
    assert [[e.name for e in turn.events] for turn in turns] == [[semconv.EVENT_FALLBACK]] * 2
    for router in routers:
        assert (router.total_input_tokens, router.total_output_tokens) == (18, 8)


def test_a_token_limit_waits_visibly():
    from looplet.backends.rate_limit import MinuteLimit

    def make(is_async):
        reply = Reply(tool_calls=(ToolCall("add", {"a": 1, "b": 2}),), usage=Usage(900, 100))
        llm = RateLimitedBackend(scripted(is_async, reply, ("done", {"answer": "3"})), tokens_per_minute=1)
        llm.limit = MinuteLimit(None, 6_000_000, clock=lambda: 0.0)  # it stands still: 1,000 tokens are 10 ms
        llm.limit.reserve(6_000_000)
        return {"llm": llm, "task": {"goal": "g"}, "tools": make_tools()}

    outcome = both(make)
    assert outcome.stop_reason == "done"
    for chat in chats(outcome):
        (event,) = chat.events
        assert event.name == semconv.EVENT_RATE_LIMITED
        assert event.attributes[semconv.RATE_LIMIT_NAME] == "tokens_per_minute"
        assert 0 < event.attributes[semconv.RATE_LIMIT_WAIT] < 0.05


# --- purposes and money ---------------------------------------------------------------------------------------------


def test_every_purpose_of_a_run_is_routed_and_counted_and_all_books_agree():
    routers = []

    def make(is_async):
        def priced(tokens, *calls, text=""):
            usage = Usage(tokens, 1, cost_usd=tokens / 1000)
            return Reply(text, tuple(ToolCall(name, args) for name, args in calls), usage)

        agent = scripted(
            is_async,
            priced(100, ("delegate", {}), ("read", {})),
            priced(100, ("consult", {})),
            priced(1, text="the tool is told this"),
            *[priced(100, ("read", {}))] * 3,
            priced(100, ("done", {"answer": "x"})),
            model="large",
        )
        compaction = scripted(is_async, *[priced(20, text="short")] * 9, model="small")
        below = scripted(is_async, priced(30, ("done", {"answer": "below"})), model="tiny")
        router = BackendRouter(agent, compaction=compaction, subagent=below)
        routers.append(router)

        def delegate() -> str:
            return run_sub_loop(router, {"goal": "below"}, tools_from([]))["answer"]

        async def adelegate() -> str:
            return (await async_run_sub_loop(router, {"goal": "below"}, tools_from([])))["answer"]

        def consult(ctx) -> str:
            return ctx.llm.generate("?")

        async def aconsult(ctx) -> str:
            return await ctx.llm.generate("?")

        class Compacts:
            def should_compact(self, state, log, conversation, step_num):
                return len(state.steps) == 5

        def read() -> str:
            return "many words " * 200

        delegating = ToolSpec("delegate", "Have it done.", None, adelegate if is_async else delegate)
        consulting = ToolSpec("consult", "Ask.", None, aconsult if is_async else consult)
        config = LoopConfig(compact_service=SummarizeCompact(keep_recent=1))
        hooks = [Compacts(), BudgetCap(10**6, usd=10.0)]
        tools = tools_from([delegating, consulting, read], include_done=True)
        return {"llm": router, "task": {"goal": "g"}, "tools": tools, "config": config, "hooks": hooks}

    outcome = both(make)
    assert outcome.stop_reason == "done"
    for router in routers:
        calls = {name: spent.calls for name, spent in router.by_purpose.items()}
        assert calls == {"agent": 6, "tool": 1, "compaction": 1, "subagent": 1}
        assert {name: spent.calls for name, spent in router.by_model.items()} == {"large": 7, "small": 1, "tiny": 1}
    spans = chats(outcome)
    purposes = [chat.attributes.get(semconv.CHAT_PURPOSE, "agent") for chat in spans]
    assert sorted(purposes) == ["agent"] * 7 + ["compaction", "tool"]  # a sub-agent is an agent
    spent = sum(chat.attributes[semconv.INPUT_TOKENS] + chat.attributes[semconv.OUTPUT_TOKENS] for chat in spans)
    cost = sum(chat.attributes[semconv.COST_USD] for chat in spans)
    root = outcome.trace.roots[0].attributes
    router = routers[0]
    assert spent == router.total_input_tokens + router.total_output_tokens == 660
    assert spent == root[semconv.TOTAL_INPUT_TOKENS] + root[semconv.TOTAL_OUTPUT_TOKENS]
    assert spent == 10**6 - root[f"{semconv.BUDGET_REMAINING}.tokens"]
    for other in (router.total_cost_usd, root[semconv.TOTAL_COST_USD], 10.0 - root[f"{semconv.BUDGET_REMAINING}.usd"]):
        assert cost == pytest.approx(other) == pytest.approx(0.651)


# --- replies that are cut, and typed ones ---------------------------------------------------------------------------


@pytest.mark.parametrize(("pieces", "bound", "ends"), [(3, 2, "done"), (4, 2, "parse"), (2, 0, "parse")])
def test_a_turn_cut_by_the_output_limit_is_continued_up_to_the_bound(pieces, bound, ends):
    whole = '{"tool": "done", "args": {"answer": "a long story"}}'
    size = len(whole) // pieces + 1
    parts = [whole[at : at + size] for at in range(0, len(whole), size)]

    def make(is_async):
        cut = [Reply(part, finish_reason="length", usage=Usage(5, 2)) for part in parts[:-1]]
        llm = scripted(is_async, *cut, Reply(parts[-1], finish_reason="stop", usage=Usage(5, 2)), *["nothing"] * 9)
        return {
            "llm": llm,
            "task": {"goal": "g"},
            "tools": make_tools(),
            "config": LoopConfig(max_turn_continuations=bound, parse_recovery=0, use_native_tools=False, max_steps=1),
        }

    outcome = both(make)
    turn = outcome.trace.find(semconv.TURN)[0]
    continued = [e.name for e in turn.events].count(semconv.EVENT_CONTINUATION)
    if ends == "done":
        assert (outcome.stop_reason, outcome.steps[0].tool_call.args) == ("done", {"answer": "a long story"})
        assert outcome.steps[0].usage == Usage(5 * pieces, 2 * pieces)
        assert continued == pieces - 1
    else:
        assert outcome.steps[0].tool_call.tool == "__parse_error__"
        assert continued == bound


@dataclass
class Point:
    """A place."""

    x: int
    tags: list[str]


class Told(TypedDict):
    """A place as a dict."""

    x: int
    tags: list[str]


class Struct(msgspec.Struct):
    """A place of msgspec's."""

    x: int
    tags: list[str]


def model_of_pydantic() -> type:
    pydantic = pytest.importorskip("pydantic")
    return pydantic.create_model("Model", x=(int, ...), tags=(list[str], ...))


@pytest.mark.parametrize("kind", [Point, Told, Struct, model_of_pydantic], ids=lambda kind: kind.__name__)
@EACH
def test_the_payload_of_done_is_of_the_type_and_a_mismatch_goes_back_with_its_path(provider, kind):
    output_type = kind() if kind is model_of_pydantic else kind
    wrong = Answer("", [("done", {"x": 1, "tags": ["a", 2]})])
    right = Answer("", [("done", {"x": 1, "tags": ["a", "b"]})])
    runs: list[Any] = []

    class Keeps:
        def on_loop_end(self, state, log, context, llm):
            runs.append(state)

    servers: list[Any] = []
    with ExitStack() as stack:
        given = over(stack, provider, [wrong, right], servers)
        outcome = both(lambda is_async: {**given(is_async), "tools": tools_from([]), "output_type": output_type})
    assert outcome.stop_reason == "done"
    first, last = outcome.steps
    assert "$.tags[1]" in first.tool_result.error
    assert last.tool_result.error is None
    for server in servers:
        (schema,) = [t for t in server.requests[0].body["tools"] if "done" in json.dumps(t)]
        assert "tags" in json.dumps(schema)
        assert "$.tags[1]" in json.dumps(server.requests[1].body["messages"][-1])


# --- what one provider has ------------------------------------------------------------------------------------------


def test_thoughts_caches_and_images_survive_a_run_of_the_messages_api():
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

    @tool
    def draw() -> Image:
        """Draw."""
        return Image.from_base64(dot)

    policy = [
        Answer("", [("draw", {})], Usage(100, 10, 40, cache_write_tokens=30), thinking=["hm", b"hidden"]),
        Answer("", [("done", {"answer": "x"})], Usage(100, 10, 90), thinking=["aha"]),
    ]
    servers: list[Any] = []
    with ExitStack() as stack:
        backend = {"cache": CachePolicy(), "thinking": 1024}
        given = over(stack, "anthropic", policy, servers, backend=backend)
        outcome = both(lambda is_async: {**given(is_async), "tools": tools_from([draw], include_done=True)})
    assert outcome.stop_reason == "done"
    for server in servers:
        last = server.requests[1].body
        said = next(m for m in last["messages"] if m["role"] == "assistant")["content"]
        assert [block["type"] for block in said][:2] == ["thinking", "redacted_thinking"]
        assert dot in json.dumps(last["messages"])
        assert "cache_control" in json.dumps(last)
    first, second = chats(outcome)
    assert first.attributes[semconv.CACHE_READ_TOKENS] == 40
    assert first.attributes[semconv.CACHE_WRITE_TOKENS] == 30
    assert second.attributes[semconv.CACHE_READ_TOKENS] == 90


def test_a_cut_reply_of_a_script_is_charged_in_every_book():
    routers = []

    def make(is_async):
        reply = ("done", {"answer": "x"})
        llm = scripted(is_async, Cut(reply, usage=Usage(40, 2)), Reply("", (ToolCall(*reply),), Usage(40, 5)))
        routers.append(BackendRouter(ResilientBackend(llm, retries=1, base_delay_s=0.0)))
        return {"llm": routers[-1], "task": {"goal": "g"}, "tools": make_tools(), "stream": [].append}

    outcome = both(make)
    (chat,) = chats(outcome)
    assert (chat.attributes[semconv.INPUT_TOKENS], chat.attributes[semconv.OUTPUT_TOKENS]) == (80, 7)
    assert {(r.total_input_tokens, r.total_output_tokens) for r in routers} == {(80, 7)}
    assert outcome.steps[0].usage == Usage(80, 7)

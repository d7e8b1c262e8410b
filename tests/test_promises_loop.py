"""What is promised of budgets, hooks, tools, sub-agents and context, each kept by a whole run, sync and async."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from provider_support import over_the_socket
from support import add, both, look, make_tools, run_async, run_sync

from looplet import (
    AgentsMdMemorySource,
    Allow,
    AnthropicBackend,
    AsyncAnthropicBackend,
    AsyncOpenAIBackend,
    BudgetCap,
    CallableMemorySource,
    CancelToken,
    ContextBudget,
    ContextPressureHook,
    Deny,
    InjectContext,
    LoopConfig,
    OpenAIBackend,
    PermissionEngine,
    PermissionHook,
    PruneToolResults,
    Reply,
    StaticMemorySource,
    Stop,
    SummarizeCompact,
    ThresholdCompactHook,
    ToolCall,
    ToolContext,
    ToolResult,
    TruncateCompact,
    Usage,
    async_run_sub_loop,
    compact_chain,
    preview_prompt,
    run_sub_loop,
    tool,
    tools_from,
)
from looplet.budgets import Budget
from looplet.telemetry import semconv
from looplet.testing import Answer, AnthropicServer, AsyncScriptedBackend, Fault, OpenAIServer, ScriptedBackend
from looplet.tools import ToolSpec

ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "3"})
PROVIDERS = {
    "openai": (OpenAIServer, (OpenAIBackend, AsyncOpenAIBackend)),
    "anthropic": (AnthropicServer, (AnthropicBackend, AsyncAnthropicBackend)),
}
EACH = pytest.mark.parametrize("provider", PROVIDERS)


def scripted(is_async: bool, *replies: Any) -> Any:
    return (AsyncScriptedBackend if is_async else ScriptedBackend)(list(replies))


def running(*replies: Any, hooks: Callable[[], list[Any]] = list, **settings: Any) -> Callable[..., dict[str, Any]]:
    """Return what `both` takes: a run over `replies`; hooks are made anew for each run."""

    def make(is_async: bool) -> dict[str, Any]:
        given = {"llm": scripted(is_async, *replies), "task": {"goal": "g"}, "tools": make_tools(), "hooks": hooks()}
        return {**given, **settings}

    return make


def priced(*calls: tuple[str, dict[str, Any]], cost: float = 0.25) -> Reply:
    return Reply(tool_calls=tuple(ToolCall(*call) for call in calls), usage=Usage(10, 5, cost_usd=cost))


def hook_of(**methods: Callable[..., Any]) -> Any:
    """Return a hook with these methods; each gets only what the run passes."""
    return type("Hook", (), {name: staticmethod(function) for name, function in methods.items()})()


# --- budgets --------------------------------------------------------------------------------------------------------

LIMITS = {"tokens": 30, "usd": 0.5, "steps": 2, "model_calls": 2, "tool_calls": 2, "seconds": 600}


class Dawdles:
    """Takes its time after a call: all that is left of it."""

    def post_dispatch(self, state, log, tool_call, tool_result, step_num):
        for guard in state.budget._guard.levels:
            guard.resume(600)  # as if that long had passed


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("form", ["config", "hook"])
def test_a_budget_of_any_kind_ends_a_run_as_a_setting_and_as_a_hook(kind, form):
    limit = {kind: LIMITS[kind]}
    is_setting = form == "config"
    config = LoopConfig(budget=Budget(**limit)) if is_setting else None
    hooks = lambda: [Dawdles(), *([] if is_setting else [BudgetCap(**limit)])]  # noqa: E731
    outcome = both(running(*[priced(ADD)] * 5, hooks=hooks, config=config))
    assert outcome.stop_reason == "budget_exhausted"
    assert len(outcome.steps) == (1 if kind == "seconds" else 2)
    root = outcome.trace.roots[0].attributes
    assert root[semconv.BUDGET_EXHAUSTED] == kind
    assert root[f"{semconv.BUDGET_REMAINING}.{kind}"] == 0


@pytest.mark.parametrize("kind", ["usd", "seconds"])
def test_a_sub_agent_spends_the_money_and_the_time_of_the_run_above(kind):
    endings: list[str] = []

    def make(is_async):
        script = [priced(ADD, cost=0.2)] * 5
        below, hooks = tools_from([add]), [Dawdles()]

        def ask() -> None:
            endings.append(run_sub_loop(scripted(False, *script), {}, below, hooks=hooks)["stop_reason"])

        async def aask() -> None:
            endings.append((await async_run_sub_loop(scripted(True, *script), {}, below, hooks=hooks))["stop_reason"])

        tools = tools_from([ToolSpec("ask", "Ask.", None, aask if is_async else ask), add], include_done=True)
        cap = BudgetCap(**{kind: {"usd": 0.55, "seconds": 600}[kind]})
        return {"llm": scripted(is_async, priced(("ask", {})), priced(ADD)), "tools": tools, "hooks": [cap]}

    outcome = both(make)
    assert (outcome.stop_reason, endings) == ("budget_exhausted", ["budget_exhausted"] * 2)
    assert [step.tool_call.tool for step in outcome.steps] == ["ask"]
    assert outcome.trace.roots[0].attributes[semconv.BUDGET_EXHAUSTED] == kind


def test_what_is_left_is_there_for_every_hook():
    seen: list[list[tuple[str, float]]] = []

    def looks():
        mine: list[tuple[str, float]] = []
        seen.append(mine)

        def note(name: str, at: int = 0) -> Callable[..., None]:
            return lambda *args: mine.append((name, args[at].budget.remaining["tokens"]))

        methods = {
            name: note(name) for name in ("pre_loop", "pre_prompt", "pre_dispatch", "post_dispatch", "check_done")
        }
        later = {name: note(name) for name in ("should_stop", "should_compact", "on_loop_end")}
        return [hook_of(**methods, **later, check_permission=note("check_permission", 1)), BudgetCap(100)]

    assert both(running(priced(ADD), priced(DONE), hooks=looks)).stop_reason == "done"
    first = ["pre_dispatch", "check_permission", "post_dispatch", "should_stop"]
    last = ["pre_dispatch", "check_permission", "check_done", "post_dispatch"]
    expected = [("pre_loop", 100), ("should_compact", 100), ("pre_prompt", 100)]
    expected += [(name, 85) for name in [*first, "should_compact", "pre_prompt"]]
    expected += [(name, 70) for name in [*last, "on_loop_end"]]
    assert seen == [expected, expected]


# --- hooks ----------------------------------------------------------------------------------------------------------


def when_add(answer: Any) -> Callable[..., Any]:
    """Return `answer` about calls of `add` only."""
    return lambda *args: answer if any(getattr(arg, "tool", "") == "add" for arg in args) else None


FIVE = ToolResult("add", data=5)
ANSWERS: dict[str, tuple[dict[str, Any], tuple[str, str, str], str]] = {
    "pre_loop text": ({"pre_loop": lambda *_: "be brief"}, ("pre_loop", "additional_context", ""), "done"),
    "pre_loop stop": ({"pre_loop": lambda *_: Stop("enough")}, ("pre_loop", "stop", "enough"), "enough"),
    "pre_prompt text": (
        {"pre_prompt": lambda state, log, ctx, step: InjectContext("hint") if step == 1 else None},
        ("pre_prompt", "additional_context", ""),
        "done",
    ),
    "pre_prompt stop": ({"pre_prompt": lambda *_: Stop("enough")}, ("pre_prompt", "stop", "enough"), "enough"),
    "deny": ({"pre_dispatch": when_add(Deny("not today"))}, ("pre_dispatch", "block+permission", "not today"), "done"),
    "other arguments": (
        {"pre_dispatch": when_add(Allow({"a": 2, "b": 2}))},
        ("pre_dispatch", "updated_args", ""),
        "done",
    ),
    "a result": ({"pre_dispatch": when_add(FIVE)}, ("pre_dispatch", "updated_result", ""), "done"),
    "no permission": (
        {"check_permission": lambda call, state: call.tool != "add"},
        ("check_permission", "permission", ""),
        "done",
    ),
    "another result": ({"post_dispatch": when_add(FIVE)}, ("post_dispatch", "updated_result", ""), "done"),
    "stop after": ({"post_dispatch": when_add(Stop("enough"))}, ("post_dispatch", "stop", "enough"), "enough"),
    "should stop": ({"should_stop": lambda *_: "enough"}, ("should_stop", "stop", "enough"), "enough"),
    "not done yet": (
        {"check_done": lambda state, *_: None if len(state.steps) > 1 else "cite a source"},
        ("check_done", "block", "cite a source"),
        "done",
    ),
    "compact": ({"should_compact": lambda state, *_: len(state.steps) == 1}, ("should_compact", "compact", ""), "done"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_decision_that_changes_something_is_an_event_with_hook_decision_reason_and_duration(name):
    methods, (method, decision, reason), ending = ANSWERS[name]
    outcome = both(running(ADD, DONE, DONE, hooks=lambda: [hook_of(**methods)]))
    assert outcome.stop_reason == ending
    phase = {"should_compact": semconv.PRE_PROMPT, "check_permission": semconv.PRE_DISPATCH}.get(
        method, f"looplet.{method}"
    )
    (told,) = [e.attributes for node in outcome.trace.find(phase) for e in node.events if e.name == semconv.EVENT_HOOK]
    assert told.pop(semconv.HOOK_DURATION) >= 0
    expected = {semconv.HOOK_NAME: "Hook", semconv.HOOK_METHOD: method, semconv.HOOK_DECISION: decision}
    assert told == expected | ({semconv.HOOK_REASON: reason} if reason else {})


def test_a_hook_that_says_nothing_new_leaves_no_event():
    quiet = {
        name: lambda *_: None for name in ("pre_loop", "pre_prompt", "pre_dispatch", "post_dispatch", "check_done")
    }
    more = {"should_stop": lambda *_: False, "should_compact": lambda *_: False, "check_permission": lambda *_: True}
    outcome = both(running(ADD, DONE, hooks=lambda: [hook_of(**quiet, **more)]))
    assert [e.name for node in outcome.trace.spans for e in node.events if e.name == semconv.EVENT_HOOK] == []


def test_a_denial_is_recorded_with_its_rule_and_reason_once_for_each_call_and_done_is_ruled_by_name():
    engines = []

    def hooks():
        engine = (
            PermissionEngine()
            .deny("add", arg_matcher={"a": lambda a: a == 1}, reason="no ones")
            .deny("done", reason="not yet")
        )
        engines.append(engine)
        return [PermissionHook(engine)]

    outcome = both(running([ADD, ("add", {"a": 2, "b": 2})], DONE, hooks=hooks, max_steps=3))
    assert [step.tool_result.error is None for step in outcome.steps] == [False, True, False]
    told = [e.attributes for node in outcome.trace.find(semconv.PRE_DISPATCH) for e in node.events]
    assert [t[semconv.HOOK_REASON] for t in told] == ["no ones", "not yet"]
    for engine in engines:
        assert [(d["tool"], d["reason"]) for d in engine.denials] == [("add", "no ones"), ("done", "not yet")]
        assert all(d["rule"] for d in engine.denials)


# --- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "async def"])
def test_a_tool_gets_its_context_and_what_it_says_arrives_everywhere(kind):
    heard: list[Any] = []

    def work(ctx: ToolContext) -> dict[str, Any]:
        ctx.report_progress("half", {"of": 2})
        ctx.warn("mind the gap")
        return {"db": ctx.resources["db"], "tenant": ctx.metadata["tenant"], "cancelled": ctx.cancel_token.is_cancelled}

    async def awork(ctx: ToolContext) -> dict[str, Any]:
        return work(ctx)

    def make(is_async):
        spec = ToolSpec("work", "Work.", None, awork if kind == "async def" else work, requires=["db"])
        tools = tools_from([spec], include_done=True)
        tools.set_resources({"db": "users"})
        config = LoopConfig(tool_metadata={"tenant": "blue"})
        return {"llm": scripted(is_async, ("work", {}), DONE), "tools": tools, "config": config, "stream": heard.append}

    outcome = both(make)
    result = outcome.steps[0].tool_result
    assert result.data == {"db": "users", "tenant": "blue", "cancelled": False}
    assert list(result.warnings) == ["mind the gap"]
    (span,) = outcome.trace.find("execute_tool work")
    assert [(e.name, e.attributes[semconv.PROGRESS_STAGE]) for e in span.events] == [(semconv.EVENT_PROGRESS, "half")]
    assert [(e.stage, e.data) for e in heard if e.kind == "tool_progress"] == [("half", {"of": 2})] * 2


def test_a_token_is_looked_at_between_the_phases_and_ends_the_run():
    for place in ("pre_loop", "pre_prompt", "pre_dispatch", "post_dispatch", "should_stop"):
        tokens: list[CancelToken] = []

        def make(is_async, place=place, tokens=tokens):
            token = CancelToken()
            tokens.append(token)
            arguments = running(ADD, ADD, DONE, hooks=lambda: [hook_of(**{place: lambda *_: token.cancel()})])(is_async)
            return {**arguments, "config": LoopConfig(cancel_token=token)}

        outcome = both(make)
        assert (outcome.stop_reason, outcome.raised) == ("cancelled", None), place
        assert len(outcome.steps) == (place in ("post_dispatch", "should_stop")), place
        assert outcome.trace.problems == []


def test_calls_of_safe_tools_overlap_keep_their_order_and_one_that_fails_harms_no_other():
    @tool(concurrent_safe=True, retries=1)
    def fetch(n: int) -> int:
        """Fetch."""
        if n == 1:
            raise RuntimeError("lost")
        return n

    batch = [("fetch", {"n": n}) for n in range(4)]
    outcome = both(running(batch, DONE, tools=tools_from([fetch], include_done=True)))
    assert [step.tool_result.data for step in outcome.steps[:4]] == [0, None, 2, 3]
    (dispatch,) = [node for node in outcome.trace.find(semconv.DISPATCH) if len(node.children) > 2]
    spans = [node for node in dispatch.children if node.name == "execute_tool fetch"]
    assert sorted(node.attributes[semconv.STEP_NUMBER] for node in spans) == [1, 2, 3, 4]  # each begins when it can
    assert [node.is_error for node in spans].count(True) == 1


# --- sub-agents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["done", "llm_error", "error"])
def test_a_sub_agent_has_its_own_conversation_and_done_and_its_failure_is_the_tools_only(ending):
    backends: list[Any] = []

    def make(is_async):
        script = {"done": [ADD, DONE], "llm_error": [ADD, ConnectionError("gone")], "error": [ADD, DONE]}[ending]
        below = scripted(is_async, *script)
        backends.append(below)
        fails = hook_of(post_dispatch=when_add(None) if ending != "error" else lambda *_: 1 / 0)

        def ask() -> Any:
            return run_sub_loop(below, {"secret": "below"}, tools_from([add]), hooks=[fails])["stop_reason"]

        async def aask() -> Any:
            return (await async_run_sub_loop(below, {"secret": "below"}, tools_from([add]), hooks=[fails]))[
                "stop_reason"
            ]

        tools = tools_from([ToolSpec("ask", "Ask.", None, aask if is_async else ask), look], include_done=True)
        upper = scripted(is_async, ("ask", {}), ("look", {"name": "x"}), DONE)
        backends.append(upper)
        return {"llm": upper, "task": {"goal": "above"}, "tools": tools}

    outcome = both(make)
    assert outcome.stop_reason == "done"
    assert [step.tool_call.tool for step in outcome.steps] == ["ask", "look", "done"]
    first = outcome.steps[0].tool_result
    assert (first.data, first.error and "ZeroDivisionError" in first.error) == (
        (None, True) if ending == "error" else (ending, None)
    )
    for below, upper in (backends[:2], backends[2:]):
        below_was_sent, above_was_sent = ([list(request) for request in llm.requests] for llm in (below, upper))
        assert "secret" in str(below_was_sent)
        assert "above" not in str(below_was_sent)
        assert "above" in str(above_was_sent)
        assert "secret" not in str(above_was_sent)
    inner = [run for run in outcome.trace.runs if run.root is not outcome.trace.roots[0]]
    assert [run.root.attributes[semconv.STOP_REASON] for run in inner] == [ending]


# --- context --------------------------------------------------------------------------------------------------------

SERVICES = {
    "prune": lambda: PruneToolResults(keep_recent=1),
    "summarize": lambda: SummarizeCompact(keep_recent=1),
    "truncate": lambda: TruncateCompact(keep_recent=1),
    "chain": lambda: compact_chain(
        PruneToolResults(keep_recent=3), SummarizeCompact(keep_recent=1), TruncateCompact(1)
    ),
}


@tool
def read(page: int) -> str:
    """Read a page."""
    return f"page {page}: " + "many words " * 200


def reading(provider: str, stack: ExitStack, policy: Any, servers: list[Any], **settings: Any):
    server, kinds = PROVIDERS[provider]
    tools = tools_from([read], include_done=True)
    return over_the_socket(stack, server, kinds, policy, servers, task={"goal": "the task"}, tools=tools, **settings)


def pages(last: int) -> Callable[[Any], Any]:
    """Return a policy that reads one page after the other; who asks for a summary gets one."""

    def policy(request: Any) -> Any:
        if not request.tools:
            return Answer("a summary of what was read", (), Usage(50, 5))
        told = json.dumps(request.messages)
        read_so_far = [n for n in range(1, last + 1) if f'call_{n}"' in told]
        number = max(read_so_far, default=0) + 1
        call = {"name": "read", "args": {"page": number}, "id": f"call_{number}"}
        return [call] if number <= last else [("done", {"answer": "read"})]

    return policy


@EACH
@pytest.mark.parametrize("name", SERVICES)
def test_a_compaction_makes_the_next_request_smaller_on_the_wire_and_a_strict_provider_takes_it(provider, name):
    servers: list[Any] = []
    asks = hook_of(should_compact=lambda state, *_: len(state.steps) == 5)
    with ExitStack() as stack:
        config = LoopConfig(compact_service=SERVICES[name]())
        outcome = both(reading(provider, stack, pages(6), servers, hooks=[asks], config=config))
        bodies = [[r.body for r in server.requests if r.body.get("tools")] for server in servers]
    assert outcome.stop_reason == "done"
    (span,) = outcome.trace.find(semconv.COMPACT)
    assert span.attributes[semconv.COMPACT_TOKENS_AFTER] < span.attributes[semconv.COMPACT_TOKENS_BEFORE]
    for told in bodies:
        sizes = [len(json.dumps(body)) for body in told]
        assert sizes[5] < 0.7 * sizes[4]
        for body in told:
            assert "the task" in json.dumps(body["messages"])
            assert "s" in (body.get("system") or body["messages"][0]["content"])
    asked = [child.attributes.get(semconv.CHAT_PURPOSE) for child in span.children if child.name.startswith("chat")]
    assert asked == (["compaction"] if name in ("summarize", "chain") else [])


@EACH
@pytest.mark.parametrize("run", [run_sync, run_async], ids=["sync", "async"])
@pytest.mark.parametrize("times", [1, 2])
def test_an_overflow_that_the_provider_reports_is_compacted_once_and_then_fails_clearly(provider, run, times, tmp_path):
    refused = [0]

    def policy(request):
        told = json.dumps(request.messages)
        if "page 4" in told and "call_4" in told and refused[0] < times:
            refused[0] += 1
            return Fault.context_overflow()
        return pages(6)(request)

    servers: list[Any] = []

    with ExitStack() as stack:
        outcome = run(reading(provider, stack, policy, servers), tmp_path)
    reasons = [span.attributes[semconv.COMPACT_REASON] for span in outcome.trace.find(semconv.COMPACT)]
    failed = [chat.attributes.get(semconv.ERROR_TYPE) for chat in outcome.trace.find("chat *") if chat.is_error]
    assert reasons == ["overflow"]
    assert failed == ["context_overflow"] * times
    if times == 1:
        assert outcome.stop_reason == "done"
    else:
        assert outcome.stop_reason == "llm_error"
        assert "tokens" in outcome.steps[-1].tool_result.error


def test_a_very_long_result_is_clipped_with_a_marker_and_the_trace_has_all_of_it():
    backends: list[Any] = []
    long = "0123456789" * 10_000

    @tool
    def dump() -> str:
        """Dump."""
        return long

    def make(is_async):
        backends.append(scripted(is_async, ("dump", {}), DONE))
        tools = tools_from([dump], include_done=True)
        return {"llm": backends[-1], "tools": tools, "config": LoopConfig(tool_result_max_chars=1000)}

    outcome = both(make)
    assert outcome.steps[0].tool_result.data == long
    assert outcome.saved.steps[0].tool_result.data == long
    (span,) = outcome.trace.find("execute_tool dump")
    assert long in str(span.attributes[semconv.TOOL_CALL_RESULT])
    for backend in backends:
        shown = str(backend.requests[1][-1].parts)
        assert len(shown) < 1200
        assert "characters" in shown


@pytest.mark.parametrize("name", ["threshold", "pressure"])
def test_hooks_for_context_use_what_the_provider_reported(name):
    """The texts are short; only the reported usage says that the window is nearly full."""

    def hooks():
        if name == "threshold":
            return [ThresholdCompactHook(ContextBudget(1000, warning_at=600, error_at=800, compact_buffer=100))]
        return [ContextPressureHook(context_window=1000)]

    def report(tokens, *calls):
        return Reply(tool_calls=tuple(ToolCall(*call) for call in calls), usage=Usage(tokens, 5))

    long = ("look", {"name": "x" * 400})
    script = [report(200, long), report(400, long), report(850, long), report(300, DONE)]
    outcome = both(running(*script, hooks=hooks))
    assert outcome.stop_reason == "done"
    turns = [span.attributes[semconv.TURN_NUMBER] for span in outcome.trace.find(semconv.COMPACT)]
    assert turns == [4]


def test_memory_of_every_kind_is_in_each_request_and_a_preview_is_the_first_one(tmp_path):
    (tmp_path / "AGENTS.md").write_text("Use tabs.")
    backends: list[Any] = []

    def config():
        return LoopConfig(
            system_prompt="You help.",
            memory_sources=[
                StaticMemorySource("Ann is shy."),
                CallableMemorySource(lambda state: f"{state.step_count} steps."),
                AgentsMdMemorySource(tmp_path),
            ],
        )

    def make(is_async):
        backends.append(scripted(is_async, ADD, DONE))
        return {"llm": backends[-1], "task": {"goal": "g"}, "tools": make_tools(), "config": config()}

    assert both(make).stop_reason == "done"
    preview = preview_prompt({"goal": "g"}, make_tools(), config=config())
    for backend in backends:
        for number, request in enumerate(backend.requests):
            (memory,) = [m.text for m in request if "Ann is shy." in m.text]
            assert f"{number} steps." in memory
            assert "Use tabs." in memory
        assert all(message.text in preview for message in backend.requests[0])

"""Sub-agents: a run inside a tool is a child of the tool's span and shares what the run above has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import add, both, names_of

from looplet import (
    CancelToken,
    ConfigError,
    Conversation,
    DefaultState,
    LoopConfig,
    Message,
    ProvenanceSink,
    SessionLog,
    ToolSpec,
    Trace,
    Usage,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.backends.router import BackendRouter
from looplet.budgets import Budget
from looplet.decisions import Deny, Stop
from looplet.events import LifecycleEvent
from looplet.subagents import agent_tool, async_run_sub_loop, run_sub_loop
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

DONE = ("done", {"answer": "ok"})
FOUND = ("done", {"answer": "found"})
ADD = ("add", {"a": 1, "b": 2})


def scripted(is_async: bool, *replies: Any) -> Any:
    return (AsyncScriptedBackend if is_async else ScriptedBackend)(list(replies))


def timeless(told: dict[str, Any]) -> dict[str, Any]:
    """Return what a sub-agent came to, without its ids."""
    return {name: value for name, value in told.items() if name not in ("run_id", "subagent_id")}


def research_with(is_async: bool, llm: Any, tools: Any = None, **settings: Any) -> ToolSpec:
    """Return a tool that runs a sub-agent, sync or `async def`."""

    def research(topic: str) -> Any:
        return timeless(run_sub_loop(llm, {"topic": topic}, tools, **settings))

    async def aresearch(topic: str) -> Any:
        return timeless(await async_run_sub_loop(llm, {"topic": topic}, tools, **settings))

    return ToolSpec("research", "Look into it.", None, aresearch if is_async else research)


def making(*replies: Any, **settings: Any) -> Callable[..., dict[str, Any]]:
    """Return a `make` for `both`: an agent with one sub-agent, which says `replies`."""
    rest = {name: settings.pop(name) for name in ("config", "hooks") if name in settings}

    def make(*, is_async: bool) -> dict[str, Any]:
        tools = tools_from([research_with(is_async, scripted(is_async, *replies), **settings), add], include_done=True)
        backend = scripted(is_async, ("research", {"topic": "loops"}), DONE)
        return {"llm": backend, "task": {"goal": "g"}, "tools": tools, **rest}

    return make


def test_a_sub_agent_is_a_child_of_the_tool_that_started_it():
    outcome = both(making(ADD, FOUND, tools=tools_from([add])))
    assert outcome.steps[0].tool_result.data["answer"] == "found"
    (root,) = outcome.trace.roots
    lines = names_of(root)
    at = next(i for i, line in enumerate(lines) if line.strip() == "execute_tool research")
    assert lines[at + 1].strip() == "invoke_agent looplet"
    assert lines[at + 1].index("i") == lines[at].index("e") + 2
    inner, outer = (run for run in sorted(outcome.trace.runs, key=lambda run: run.root is root))
    assert [step.tool_call.tool for step in inner.steps] == ["add", "done"]
    assert [step.tool_call.tool for step in outer.steps] == ["research", "done"]


def test_a_plain_function_that_runs_a_loop_works_the_same():
    def make(*, is_async: bool) -> dict[str, Any]:
        @tool
        def research(topic: str) -> str:
            """Look into it."""
            run = composable_loop(ScriptedBackend([ADD, FOUND]), {"topic": topic}, tools_from([add], include_done=True))
            list(run)
            return run.result.final_output["answer"]

        @tool(name="research")
        async def aresearch(topic: str) -> str:
            """Look into it."""
            tools = tools_from([add], include_done=True)
            run = async_composable_loop(AsyncScriptedBackend([ADD, FOUND]), {"topic": topic}, tools)
            async for _ in run:
                pass
            return run.result.final_output["answer"]

        backend = scripted(is_async, ("research", {"topic": "x"}), DONE)
        tools = tools_from([aresearch if is_async else research], include_done=True)
        return {"llm": backend, "task": {"goal": "g"}, "tools": tools}

    outcome = both(make)
    assert outcome.steps[0].tool_result.data == "found"
    plain = names_of(outcome.trace.roots[0])
    assert plain == names_of(both(making(ADD, FOUND, tools=tools_from([add]))).trace.roots[0])


def test_what_a_sub_agent_came_to():
    log = SessionLog()
    log.record(1, "theory", "look", "because", entities=["a", "b"], findings=["f", "f"], highlights=["h"])

    class Notes:
        def pre_loop(self, state, session_log, context):
            session_log.entries.extend(log.entries)
            session_log._entities.update(log._entities)

    told = run_sub_loop(ScriptedBackend([ADD, FOUND]), {"t": 1}, tools_from([add]), hooks=[Notes()], subagent_id="sub")
    assert len(told.pop("run_id")) == 32
    assert told == {
        "summary": "found",
        "answer": "found",
        "entities": ["a", "b"],
        "findings": ["f"],
        "highlights": ["h"],
        "steps": 2,
        "llm_calls": 2,
        "stop_reason": "done",
        "usage": Usage(20, 10),
        "subagent_id": "sub",
    }


def test_the_summary_of_one_that_did_not_finish_says_so_and_may_be_the_callers():
    short = run_sub_loop(ScriptedBackend([ADD, ADD]), {"t": 1}, tools_from([add]), max_steps=1)
    assert (short["answer"], short["stop_reason"]) == (None, "budget_exhausted")
    assert short["summary"].splitlines()[0] == "stopped with 'budget_exhausted' before it was done"
    assert "S1 ✓ add(a=1, b=2)" in short["summary"]

    def summarise(state, session_log):
        return f"{len(state.steps)} steps, {len(session_log.entries)} notes"

    own = run_sub_loop(ScriptedBackend([ADD, FOUND]), {"t": 1}, tools_from([add]), build_summary=summarise)
    assert (own["summary"], own["subagent_id"]) == ("2 steps, 2 notes", own["run_id"])


def test_a_done_tool_is_added_where_there_is_none_and_nowhere_else():
    tools = tools_from([add])
    finish = LoopConfig(done_tool="finish")
    assert run_sub_loop(ScriptedBackend([FOUND]), {"t": 1}, tools)["answer"] == "found"
    assert run_sub_loop(ScriptedBackend([FOUND]), {"t": 1}, sub_tools=tools)["answer"] == "found"
    assert run_sub_loop(ScriptedBackend([FOUND]), {"t": 1})["answer"] == "found"
    assert run_sub_loop(ScriptedBackend([("finish", {"answer": 1})]), {}, tools, config=finish)["stop_reason"] != "done"
    assert run_sub_loop(ScriptedBackend([("finish", {"answer": "x"})]), {}, tools, config=finish)["answer"] == "x"
    assert tools.tool_names == ["add"]
    own = tools_from([], include_done=True, done_parameters={"verdict": "yes or no"})
    assert run_sub_loop(ScriptedBackend([("done", {"verdict": "no"})]), {}, own)["answer"] == {"verdict": "no"}
    with pytest.raises(ConfigError, match="tools must be a registry"):
        run_sub_loop(ScriptedBackend([FOUND]), {}, [add])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 5),
        ({"max_steps": 2}, 2),
        ({"config": LoopConfig(max_steps=3)}, 3),
        ({"config": LoopConfig(max_steps=3), "max_steps": 4}, 4),
        ({"state": DefaultState(max_steps=6)}, 6),
    ],
    ids=["default", "given", "config", "both", "state"],
)
def test_how_many_steps_a_sub_agent_has(settings, steps):
    assert run_sub_loop(ScriptedBackend([ADD] * 9), {}, tools_from([add]), **settings)["steps"] == steps


def test_a_sub_agent_goes_on_with_a_conversation_of_its_own():
    asked = []

    class Listening(ScriptedBackend):
        def chat(self, messages, *, system_prompt, **settings):
            asked.append((system_prompt, [message.text for message in messages]))
            return super().chat(messages, **settings)

    talk = Conversation([Message.of_text("user", "earlier")])
    run_sub_loop(Listening([FOUND]), {"t": "now"}, conversation=talk, system_prompt="Be brief.")
    run_sub_loop(Listening([FOUND]), {"t": "now"}, config=LoopConfig(system_prompt="Be kind."))
    assert asked == [("Be brief.", ["earlier", "t: now"]), ("Be kind.", ["t: now"])]


# --- what it shares -------------------------------------------------------------------------------------------------


def test_what_a_sub_agent_spends_is_in_the_totals_above():
    outcome = both(making(ADD, FOUND, tools=tools_from([add])))
    told = outcome.trace.roots[0].attributes
    assert (told[semconv.RUN_INPUT_TOKENS], told[semconv.TOTAL_INPUT_TOKENS]) == (20, 40)


def test_a_budget_covers_the_sub_agents():
    config = LoopConfig(budget=Budget(model_calls=3))
    outcome = both(making(*[ADD] * 5, tools=tools_from([add]), config=config))
    (told,) = [step.tool_result.data for step in outcome.live.steps]
    assert (told["llm_calls"], told["stop_reason"]) == (2, "budget_exhausted")
    assert outcome.stop_reason == "budget_exhausted"


def test_redaction_goes_down_to_the_sub_agents():
    config = LoopConfig(redact=lambda text: text.replace("hunter2", "[secret]"))

    def make(*, is_async: bool) -> dict[str, Any]:
        inner = scripted(is_async, ("add", {"a": "hunter2", "b": 2}), FOUND)
        tools = tools_from([research_with(is_async, inner, tools_from([add]))], include_done=True)
        backend = scripted(is_async, ("research", {"topic": "hunter2"}), DONE)
        return {"llm": backend, "task": {"goal": "g"}, "tools": tools, "config": config}

    outcome = both(make)
    inner = next(run for run in outcome.trace.runs if run.root is not outcome.trace.roots[0])
    assert inner.steps[0].tool_call.args["a"] == "[secret]"


def test_cancelling_the_run_ends_its_sub_agents():
    def make(*, is_async: bool) -> dict[str, Any]:
        token = CancelToken()

        @tool
        def stop() -> str:
            """Have the user cancel."""
            token.cancel()
            return "x"

        inner = scripted(is_async, ("stop", {}), FOUND)
        tools = tools_from([research_with(is_async, inner, tools_from([stop]))], include_done=True)
        backend = scripted(is_async, ("research", {"topic": "x"}), DONE)
        return {"llm": backend, "task": {}, "tools": tools, "config": LoopConfig(cancel_token=token)}

    outcome = both(make)
    assert outcome.stop_reason == "cancelled"
    told = outcome.live.steps[0].tool_result.data
    assert (told["stop_reason"], told["steps"]) == ("cancelled", 1)


def test_a_tool_that_took_too_long_takes_its_sub_agent_with_it():
    ended = threading.Event()
    reasons = []

    class Farewell:
        def on_loop_end(self, state, session_log, context, llm):
            reasons.append(len(state.steps))
            ended.set()

    @tool
    def slow(ctx) -> bool:
        """Work until told to stop."""
        return ctx.cancel_token.wait(5)

    @tool(timeout_s=0.02)
    def research() -> Any:
        """Run an agent that takes too long."""
        return run_sub_loop(ScriptedBackend([("slow", {})] * 9), {}, tools_from([slow]), hooks=[Farewell()])

    backend = ScriptedBackend([("research", {}), DONE])
    steps = list(composable_loop(backend, {}, tools_from([research], include_done=True)))
    assert steps[0].tool_result.error_kind == "timeout"
    assert steps[1].tool_call.tool == "done"
    assert ended.wait(5)
    assert reasons == [1]


def test_a_router_asks_the_sub_agents_backend():
    def make(*, is_async: bool) -> dict[str, Any]:
        router = BackendRouter(
            scripted(is_async, ("research", {"topic": "x"}), DONE), subagent=scripted(is_async, FOUND)
        )
        tools = tools_from([research_with(is_async, router)], include_done=True)
        return {"llm": router, "task": {}, "tools": tools}

    outcome = both(make)
    assert outcome.steps[0].tool_result.data["answer"] == "found"
    assert outcome.stop_reason == "done"


def test_the_model_of_the_run_serves_its_sub_agents_and_is_counted_once():
    def make(*, is_async: bool) -> dict[str, Any]:
        @tool
        def research(ctx) -> Any:
            """Ask the run's own model."""
            return run_sub_loop(ctx.llm, {"t": 1})["answer"]

        @tool(name="research")
        async def aresearch(ctx) -> Any:
            """Ask the run's own model."""
            return (await async_run_sub_loop(ctx.llm, {"t": 1}))["answer"]

        tools = tools_from([aresearch if is_async else research], include_done=True)
        return {"llm": scripted(is_async, ("research", {}), FOUND, DONE), "task": {}, "tools": tools}

    outcome = both(make)
    assert outcome.steps[0].tool_result.data == "found"
    assert outcome.trace.roots[0].attributes[semconv.TOTAL_INPUT_TOKENS] == 30
    assert len(outcome.trace.find("chat scripted")) == 3


def test_agents_that_call_themselves_are_stopped_at_a_depth():
    depths = []

    def make(*, is_async: bool) -> dict[str, Any]:
        def deeper() -> Any:
            depths.append(1)
            inner = ScriptedBackend([("deeper", {}), FOUND])
            return run_sub_loop(inner, {}, tools_from([ToolSpec("deeper", "Go.", None, deeper)]))["answer"]

        async def adeeper() -> Any:
            depths.append(1)
            inner = AsyncScriptedBackend([("deeper", {}), FOUND])
            tools = tools_from([ToolSpec("deeper", "Go.", None, adeeper)])
            return (await async_run_sub_loop(inner, {}, tools))["answer"]

        tools = tools_from([ToolSpec("deeper", "Go.", None, adeeper if is_async else deeper)], include_done=True)
        backend = scripted(is_async, ("deeper", {}), DONE)
        return {"llm": backend, "task": {}, "tools": tools, "config": LoopConfig(max_depth=3)}

    outcome = both(make)
    assert outcome.stop_reason == "done"
    assert len(depths) == 2 * 3
    refused = [step.tool_result for run in outcome.trace.runs for step in run.steps if step.tool_result.error]
    assert len(refused) == 1
    assert "4 deep" in refused[0].error
    assert "max_depth allows 3" in refused[0].error


# --- events ---------------------------------------------------------------------------------------------------------


class Parent:
    """Hears of sub-agents."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def on_event(self, payload):
        self.heard.append((payload.event, payload.subagent_id, payload.termination_reason, payload.usage))


class AsyncParent(Parent):
    async def on_event(self, payload):
        await asyncio.sleep(0)
        Parent.on_event(self, payload)


def test_the_hooks_above_hear_of_a_sub_agent():
    parent, later = Parent(), AsyncParent()
    run_sub_loop(ScriptedBackend([FOUND]), {}, parent_hooks=[parent, object()], subagent_id="s")
    asyncio.run(async_run_sub_loop(AsyncScriptedBackend([FOUND]), {}, parent_hooks=[parent, later], subagent_id="s"))
    start = (LifecycleEvent.SUBAGENT_START, "s", None, None)
    stop = (LifecycleEvent.SUBAGENT_STOP, "s", "done", Usage(10, 5))
    assert parent.heard == [start, stop] * 2
    assert later.heard == [start, stop]


def test_the_hooks_above_hear_of_a_sub_agent_that_failed():
    class Broken:
        def pre_prompt(self, state, session_log, context, step_num):
            raise RuntimeError("kaput")

    parent = Parent()
    with pytest.raises(RuntimeError, match="kaput"):
        run_sub_loop(ScriptedBackend([FOUND]), {}, hooks=[Broken()], parent_hooks=[parent])
    assert [heard[0] for heard in parent.heard] == [LifecycleEvent.SUBAGENT_START, LifecycleEvent.SUBAGENT_STOP]
    assert parent.heard[1][2] == "error"


def test_an_answer_that_means_nothing_there_is_refused():
    class Stops:
        def on_event(self, payload):
            return Stop("enough")

    with pytest.raises(ConfigError, match=r"Stops\.on_event\(subagent_start\) returned a HookDecision with stop"):
        run_sub_loop(ScriptedBackend([FOUND]), {}, parent_hooks=[Stops()])
    with pytest.raises(ConfigError, match="call async_run_sub_loop"):
        run_sub_loop(ScriptedBackend([FOUND]), {}, parent_hooks=[AsyncParent()])


# --- an agent as a tool ---------------------------------------------------------------------------------------------


def test_an_agent_is_a_tool():
    def make(*, is_async: bool) -> dict[str, Any]:
        inner = scripted(is_async, ADD, FOUND, ADD)
        spec = agent_tool(
            inner, tools_from([add]), name="ask_ann", description="Ask Ann.", max_steps=2, concurrent_safe=True
        )
        assert (spec.is_async, spec.concurrent_safe) == (is_async, True)
        calls = [("ask_ann", {"task": "one and two"}), ("ask_ann", {"task": "and more"})]
        tools = tools_from([spec], include_done=True)
        return {"llm": scripted(is_async, *calls, DONE), "task": {}, "tools": tools}

    outcome = both(make)
    assert [step.tool_result.data for step in outcome.steps[:1]] == ["found"]
    assert outcome.steps[1].tool_result.error == "ask_ann found no answer: it stopped with 'llm_error' after 2 steps"
    inner = outcome.trace.runs[1] if outcome.trace.runs[0].root is outcome.trace.roots[0] else outcome.trace.runs[0]
    assert inner.task == {"task": "one and two"}
    assert inner.root.attributes[semconv.AGENT_NAME] == "ask_ann"


def test_an_agent_as_a_tool_has_hooks_of_its_own():
    class Gate:
        def pre_dispatch(self, state, log, tool_call, step):
            return Deny("no sums") if tool_call.tool == "add" else None

    def make(*, is_async: bool) -> dict[str, Any]:
        inner = scripted(is_async, ADD, FOUND)
        spec = agent_tool(inner, tools_from([add]), name="ask_ann", description="Ask Ann.", hooks=[Gate()])
        llm = scripted(is_async, ("ask_ann", {"task": "one and two"}), DONE)
        return {"llm": llm, "task": {}, "tools": tools_from([spec], include_done=True)}

    sub_run = next(run for run in both(make).trace.runs if run.root.attributes[semconv.AGENT_NAME] == "ask_ann")
    assert sub_run.steps[0].tool_result.error == "Permission denied for tool 'add': no sums"


def test_an_agent_as_a_tool_keeps_a_name_of_its_own(tmp_path):
    config = LoopConfig(agent_name="ann")
    spec = agent_tool(ScriptedBackend([FOUND]), name="ask_ann", description="Ask Ann.", config=config)
    llm = ScriptedBackend([("ask_ann", {"task": "x"}), DONE])
    list(composable_loop(llm, {}, tools_from([spec], include_done=True), hooks=[ProvenanceSink(tmp_path)]))
    names = {run.root.attributes[semconv.AGENT_NAME] for run in Trace.load(tmp_path).runs}
    assert names == {"looplet", "ann"}

"""Observers, and hooks that are `async def`: the same in both drivers, with and without anybody recording."""

import asyncio

import pytest
from support import both, make_tools

from looplet import EvalContext, Trace, async_composable_loop, composable_loop
from looplet.telemetry.recorder import drops
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

ADD, BOOM, DONE = ("add", {"a": 1, "b": 2}), ("boom", {}), ("done", {"answer": "x"})


class Watcher:
    def __init__(self):
        self.seen = []

    def on_phase_end(self, phase):
        self.seen.append(phase)


def test_an_observer_sees_every_phase_with_typed_values_though_nobody_records():
    watcher = Watcher()
    list(composable_loop(ScriptedBackend([ADD, BOOM, DONE]), {"goal": "g"}, make_tools(), hooks=[watcher]))
    tools = [p for p in watcher.seen if p.phase == "execute_tool"]
    assert [(p.tool_call.tool, p.error_type, p.turn_number) for p in tools] == [
        ("add", None, 1),
        ("boom", "execution", 2),
        ("done", None, 3),
    ]
    chats = [p for p in watcher.seen if p.phase == "chat"]
    assert [(p.model, p.usage.input_tokens) for p in chats] == [("scripted", 10)] * 3
    last = watcher.seen[-1]
    assert (last.phase, last.stop_reason, last.steps, last.usage.input_tokens) == ("invoke_agent", "done", 3, 30)


def test_an_observer_that_raises_is_logged_once_and_the_run_goes_on(caplog):
    class Broken:
        def on_phase_end(self, phase):
            raise ValueError("oops")

    drops.clear()
    watcher = Watcher()
    loop = composable_loop(ScriptedBackend([ADD, DONE]), {}, make_tools(), hooks=[Broken(), watcher])
    assert [s.tool_call.tool for s in loop] == ["add", "done"]
    assert caplog.text.count("oops") == 1
    (cause,) = drops
    assert drops[cause] == len(watcher.seen)


@pytest.mark.parametrize("is_async", [False, True])
def test_async_observers_are_awaited_in_order(is_async):
    seen = []

    class Later:
        async def on_phase_end(self, phase):
            await asyncio.sleep(0)
            seen.append(phase.phase)

    backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([ADD, DONE])
    make = async_composable_loop if is_async else composable_loop
    run = make(backend, {}, make_tools(), hooks=[Later()])

    async def main():
        async for _ in run:
            pass

    asyncio.run(main()) if is_async else list(run)
    assert [name for name in seen if name in ("chat", "execute_tool")] == ["chat", "execute_tool"] * 2


def test_async_hooks_steer_like_sync_ones():
    class Hook:
        async def pre_prompt(self, state, log, context, step):
            await asyncio.sleep(0)
            return "hint"

        async def check_done(self, state, log, context, step, tool_call):
            return "too short" if len(tool_call.args["answer"]) < 2 else None

        async def on_loop_end(self, state, log, context, llm):
            state.metadata["ended"] = True

    def make(is_async):
        replies = [ADD, DONE, ("done", {"answer": "long"})]
        return {
            "llm": (AsyncScriptedBackend if is_async else ScriptedBackend)(replies),
            "task": {"goal": "g"},
            "tools": make_tools(),
            "hooks": [Hook()],
        }

    outcome = both(make)
    assert [s.tool_result.args_summary for s in outcome.steps] == ["a=1, b=2", "rejected", "answer='long'"]
    assert "hint" in outcome.steps[0].prompt


def test_a_run_inside_a_tool_is_a_child_and_shares_file_redaction_and_ledger(tmp_path):
    from looplet import ProvenanceSink, tool, tools_from

    @tool
    def delegate(goal: str) -> str:
        """Ask a sub-agent."""
        inner = composable_loop(ScriptedBackend([ADD, ("done", {"answer": "hush"})]), {"goal": goal}, make_tools())
        list(inner)
        return inner.result.final_output["answer"]

    sink = ProvenanceSink(tmp_path, redact=lambda s: s.replace("hush", "[x]"))
    outer = ScriptedBackend([("delegate", {"goal": "hush"}), DONE])
    run = composable_loop(outer, {"goal": "g"}, tools_from([delegate], include_done=True), hooks=[sink])
    steps = list(run)
    assert steps[0].tool_result.data == "[x]"
    trace = Trace.load(tmp_path)
    child = trace.runs[1].root
    assert (child.parent.name, child.trace_id) == ("execute_tool delegate", run.trace_id)
    assert trace.runs[1].manifest["looplet.parent.run.id"] == run.run_id
    assert trace.runs[1].manifest["looplet.parent.call.id"] == run.state.steps[0].tool_call.call_id
    totals = trace.runs[0].root.attributes
    assert (totals["looplet.usage.input_tokens"], totals["looplet.usage.total.input_tokens"]) == (20, 40)
    assert b"hush" not in (tmp_path / "trace.jsonl").read_bytes()
    assert EvalContext.from_trace(tmp_path) == EvalContext.from_run(run)


def test_a_step_can_be_used_as_the_current_span(tmp_path):
    from opentelemetry import trace as api

    from looplet import ProvenanceSink

    run = composable_loop(ScriptedBackend([ADD, DONE]), {}, make_tools(), hooks=[ProvenanceSink(tmp_path)])
    with run:
        step = next(run)
        assert api.get_current_span() is api.INVALID_SPAN
        with step.use():
            assert api.get_current_span().name == "execute_tool add"
        assert api.get_current_span() is api.INVALID_SPAN

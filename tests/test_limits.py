"""Limits per tool, warnings before a budget is used up, and runs that go round in circles."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support import both, make_tools

from looplet import ConfigError, DefaultState, Deny, Run, Stop, ToolCall, ToolResult, composable_loop, tool, tools_from
from looplet.approval import ApprovalHook
from looplet.budgets import BudgetCap
from looplet.limits import BudgetWarningHook, PerToolLimitHook
from looplet.per_run import PerRun
from looplet.permissions import PermissionEngine, PermissionHook
from looplet.stagnation import StagnationHook, tool_call_fingerprint
from looplet.telemetry import semconv
from looplet.testing import ScriptedBackend
from looplet.testing.backends import AsyncScriptedBackend

ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "ok"})


def look(name: Any) -> tuple[str, dict]:
    return ("look", {"name": str(name)})


def making(replies, *hooks: Any, **more: Any):
    """Return a `make` for `both`; the hooks are shared, as two runs one after another share them."""

    def make(*, is_async):
        llm = (AsyncScriptedBackend if is_async else ScriptedBackend)(replies)
        return {"llm": llm, "tools": make_tools(), "hooks": list(hooks), **more}

    return make


def ran(outcome) -> list[str]:
    return [step.tool_call.tool for step in outcome.steps if step.tool_result.error is None]


def told(outcome) -> list[str]:
    """Return what hooks added to the requests."""
    (run,) = outcome.trace.runs
    said = [
        part["content"] for m in run.message_log.values() for part in m.parts if m.role == "user" if "content" in part
    ]
    return [text for text in said if text.startswith("[")]


# --- per tool -------------------------------------------------------------------------------------------------------


def test_a_tool_is_refused_once_its_calls_are_used_up():
    outcome = both(making([ADD, ADD, look(1), ADD, DONE], PerToolLimitHook({"add": 2})))
    assert ran(outcome) == ["add", "add", "look", "done"]
    (error,) = [step.tool_result.error for step in outcome.steps if step.tool_result.error]
    assert error == (
        "Permission denied for tool 'add': 'add' may be called 2 times in a run, and that is used up; go on without it"
    )


def test_a_default_is_for_every_tool_but_done():
    outcome = both(making([ADD, ADD, look(1), look(2), DONE], PerToolLimitHook({"look": 2}, default_limit=1)))
    assert ran(outcome) == ["add", "look", "look", "done"]
    assert ran(both(making([ADD, DONE], PerToolLimitHook(default_limit=0)))) == ["done"]


def test_a_batch_of_parallel_calls_never_gets_past_the_limit():
    batch = [look(number) for number in range(5)]
    outcome = both(making([look("first"), batch, batch, DONE], PerToolLimitHook({"look": 3})))
    assert ran(outcome) == ["look"] * 3 + ["done"]


def test_calls_that_did_not_run_are_not_counted():
    class Refuses:
        def check_permission(self, tool_call, state):
            return Deny("odd") if tool_call.args.get("name") in ("1", "3") else None

    script = [[look(1), look(2), look(3)], look("4"), look("5"), DONE]
    outcome = both(making(script, PerToolLimitHook({"look": 3}), Refuses()))
    assert ran(outcome) == ["look"] * 3 + ["done"]


def test_a_call_that_failed_is_counted():
    outcome = both(making([("boom", {}), ("boom", {}), DONE], PerToolLimitHook({"boom": 1})))
    assert ["kaput" in (step.tool_result.error or "") for step in outcome.steps] == [True, False, False]


def test_each_run_is_counted_by_itself():
    hook = PerToolLimitHook({"add": 1})

    @tool
    def ask(name: str) -> int:
        """Let a sub-agent with the same hook work."""
        run = composable_loop(ScriptedBackend([ADD, ADD, DONE]), {}, make_tools(), hooks=[hook])
        return sum(step.tool_result.error is None for step in run)

    tools = tools_from([ask, *(make_tools().get(name) for name in ("add",))], include_done=True)
    script = [ADD, ("ask", {"name": "x"}), ADD, DONE]
    for _ in range(2):
        run = composable_loop(ScriptedBackend(script), {}, tools, hooks=[hook])
        data = [step.tool_result.data for step in run]
        assert data[:3] == [3, 2, None]


def test_runs_at_the_same_time_are_counted_each_by_itself():
    hook = PerToolLimitHook({"look": 5})
    counts: list[int] = []

    def work() -> None:
        run = composable_loop(
            ScriptedBackend([*map(look, range(9)), DONE]), {}, make_tools(), hooks=[hook], max_steps=20
        )
        counts.append(sum(step.tool_result.error is None for step in run))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [6] * 6


def paused_at_look(first: list[Any]) -> Run:
    """Return a run that has made these calls and waits for a human to allow a `look`."""
    hooks = [PermissionHook(PermissionEngine().ask("look")), ApprovalHook()]
    run = composable_loop(ScriptedBackend([*first, look(1)]), {}, make_tools(), hooks=hooks)
    list(run)
    assert run.stop_reason == "waiting_for_approval"
    return run


def test_a_run_that_goes_on_keeps_its_count():
    llm = ScriptedBackend([ADD, ADD, DONE])
    hooks = [PermissionHook(PermissionEngine()), PerToolLimitHook({"add": 3})]
    later = composable_loop(llm, None, make_tools(), resume=paused_at_look([ADD, ADD]), verdict="approve", hooks=hooks)
    assert [step.tool_result.error is None for step in later] == [True, True, False, True]


@pytest.mark.parametrize("wrong", [{"limits": {"add": "2"}}, {"limits": {"add": -1}}, {"default_limit": True}])
def test_a_limit_that_is_no_number_is_refused(wrong):
    with pytest.raises(ConfigError, match="whole number"):
        PerToolLimitHook(**wrong)


def test_the_words_can_be_chosen():
    hook = PerToolLimitHook({"add": 1}, message="{tool}: {used} of {limit}")
    outcome = both(making([ADD, ADD, DONE], hook))
    assert outcome.steps[1].tool_result.error == "Permission denied for tool 'add': add: 1 of 1"


# --- warnings -------------------------------------------------------------------------------------------------------


def test_the_model_is_told_once_for_each_threshold():
    outcome = both(making([ADD] * 9 + [DONE], BudgetWarningHook(), max_steps=10))
    assert told(outcome) == ["[budget] 50% of the steps are left (5).", "[budget] 20% of the steps are left (2)."]


def test_every_budget_is_watched():
    cap = BudgetCap(100, model_calls=5, tool_calls=100)
    outcome = both(making([ADD] * 9, BudgetWarningHook(thresholds=[0.5]), cap, max_steps=100))
    assert told(outcome) == [
        "[budget] 40% of the model calls are left (2).",
        "[budget] 40% of the tokens are left (40).",
    ]


def test_thresholds_that_are_crossed_at_once_are_one_warning():
    outcome = both(making([[ADD] * 9, ADD], BudgetWarningHook(), max_steps=10))
    assert told(outcome) == ["[budget] 10% of the steps are left (1)."]


def test_a_run_that_stays_far_from_its_limits_hears_nothing():
    assert told(both(making([ADD, DONE], BudgetWarningHook(), BudgetCap(1000)))) == []


def test_a_warning_hook_serves_many_runs():
    hook = BudgetWarningHook()
    for _ in range(2):
        assert len(told(both(making([ADD] * 9 + [DONE], hook, max_steps=10)))) == 2


@pytest.mark.parametrize("wrong", [20, -0.1, "half", True])
def test_a_threshold_is_a_fraction(wrong):
    with pytest.raises(ConfigError, match="fraction"):
        BudgetWarningHook(thresholds=[wrong])


# --- stagnation -----------------------------------------------------------------------------------------------------


def nudged(outcome) -> int:
    """Return how often the hook said something."""
    events = [event.attributes for node in outcome.trace.spans for event in node.events]
    said = [told[semconv.HOOK_DECISION] for told in events if told.get(semconv.HOOK_NAME) == "StagnationHook"]
    return said.count("additional_context")


def test_the_same_call_with_the_same_result_is_nudged_at_the_threshold():
    outcome = both(making([ADD, ADD, ADD, DONE], StagnationHook()))
    assert nudged(outcome) == 1
    assert "3 times" in told(outcome)[0]
    assert nudged(both(making([ADD, ADD, DONE], StagnationHook()))) == 0
    assert nudged(both(making([ADD, ADD, DONE], StagnationHook(threshold=2)))) == 1


def test_calls_that_take_turns_are_noticed_too():
    assert nudged(both(making([ADD, look(1), ADD, look(1), ADD, DONE], StagnationHook()))) == 0
    assert nudged(both(making([ADD, look(1), ADD, look(1), ADD, look(1), DONE], StagnationHook()))) == 1


def test_something_new_sets_the_count_back():
    outcome = both(making([ADD, ADD, look(1), ADD, ADD, look(2), ADD, ADD, DONE], StagnationHook()))
    assert nudged(outcome) == 0


def counting_tools():
    numbers = iter(range(99))

    @tool
    def clock() -> int:
        """Return another number each time."""
        return next(numbers)

    return tools_from([clock], include_done=True)


def test_another_result_is_progress_unless_only_the_call_counts():
    def make(hook):
        script = [("clock", {})] * 4 + [DONE]

        def made(*, is_async):
            llm = (AsyncScriptedBackend if is_async else ScriptedBackend)(script)
            return {"llm": llm, "tools": counting_tools(), "hooks": [hook]}

        return made

    assert nudged(both(make(StagnationHook()))) == 0
    assert nudged(both(make(StagnationHook(fingerprint=tool_call_fingerprint)))) == 1


def test_the_order_of_arguments_and_of_keys_makes_no_difference():
    seen = StagnationHook(threshold=2)
    state = DefaultState()
    first = seen.post_dispatch(
        state, None, ToolCall("t", {"a": 1, "b": 2}), ToolResult("t", data={"x": [{"p": 1, "q": 2}]}), 1
    )
    again = seen.post_dispatch(
        state, None, ToolCall("t", {"b": 2, "a": 1}), ToolResult("t", data={"x": [{"q": 2, "p": 1}]}), 2
    )
    assert (first, again is None) == (None, False)


def test_the_count_begins_again_after_a_nudge_or_goes_on():
    assert nudged(both(making([ADD] * 6 + [DONE], StagnationHook()))) == 2
    assert nudged(both(making([ADD] * 6 + [DONE], StagnationHook(reset_after_nudge=False)))) == 4


@pytest.mark.parametrize(("stop_after", "steps", "nudges"), [(0, 3, 0), (1, 6, 1), (2, 9, 2)])
def test_a_run_that_does_not_listen_is_stopped(stop_after, steps, nudges):
    outcome = both(making([ADD] * 20, StagnationHook(stop_after=stop_after), max_steps=30))
    assert (outcome.stop_reason, len(outcome.steps), nudged(outcome)) == ("stagnation", steps, nudges)


def test_ignored_tools_may_repeat_themselves():
    assert nudged(both(making([ADD] * 6 + [DONE], StagnationHook(ignore_tools=["add"])))) == 0


def test_what_is_progress_can_be_said():
    class Says:
        def __call__(self, state, tool_call, tool_result):
            return len(state.steps) % 2 == 0

    assert nudged(both(making([ADD] * 8 + [DONE], StagnationHook(progress=Says())))) == 0


def test_repeated_refusals_and_failures_are_stagnation():
    class Refuses:
        def check_permission(self, tool_call, state):
            return tool_call.tool != "add"

    assert nudged(both(making([ADD] * 3 + [DONE], StagnationHook(), Refuses()))) == 1
    assert nudged(both(making([("boom", {})] * 3 + [DONE], StagnationHook()))) == 1


def test_the_decision_to_stop_is_in_the_trace():
    outcome = both(making([ADD] * 20, StagnationHook(stop_after=0)))
    (root,) = outcome.trace.roots
    assert root.attributes[semconv.STOP_REASON] == "stagnation"


def test_a_run_that_goes_on_is_known_to_have_stagnated():
    llm, paused = ScriptedBackend([ADD, DONE]), paused_at_look([ADD, ADD])
    hook = StagnationHook(stop_after=0, ignore_tools=["look"])
    hooks = [PermissionHook(PermissionEngine()), hook]
    run = composable_loop(llm, None, make_tools(), resume=paused, verdict="approve", hooks=hooks)
    assert ([step.tool_call.tool for step in run], run.stop_reason) == (["look", "add"], "stagnation")


@pytest.mark.parametrize("wrong", [1, 0, True, 2.5, "3"])
def test_a_threshold_below_two_repeats_nothing(wrong):
    with pytest.raises(ConfigError, match="from 2"):
        StagnationHook(threshold=wrong)


# --- what hooks remember --------------------------------------------------------------------------------------------


def test_hooks_forget_runs_that_have_ended(monkeypatch):
    kept: list[PerRun] = []
    begin = PerRun.begin
    monkeypatch.setattr(PerRun, "begin", lambda self, state: (kept.append(self), begin(self, state))[1])

    class Stops:
        def post_dispatch(self, state, log, tool_call, result, step_num):
            return Stop("enough")

    class Breaks:
        def post_dispatch(self, state, log, tool_call, result, step_num):
            raise RuntimeError("broken hook")

    hooks = [PerToolLimitHook({"add": 1}), BudgetWarningHook(), StagnationHook()]
    for extra in ((), (Stops(),), (Breaks(),)):
        run = composable_loop(ScriptedBackend([ADD, ADD, DONE]), {}, make_tools(), hooks=[*hooks, *extra])
        try:
            with run:
                next(run)
        except RuntimeError:
            assert extra
    assert len(kept) == 9
    assert [len(memory) for memory in kept] == [0] * 9

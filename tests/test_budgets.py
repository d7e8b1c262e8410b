"""Budgets: what a run and its sub-agents may spend, counted the same under `for` and `async for`."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
from support import add, boom, both, look, make_tools

from looplet import (
    ConfigError,
    Deny,
    LoopConfig,
    ProvenanceSink,
    Reply,
    ToolCall,
    Trace,
    Usage,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.budgets import Budget, BudgetCap, BudgetView, Guard
from looplet.ledger import Ledger
from looplet.telemetry import semconv
from looplet.testing import ScriptedBackend
from looplet.testing.backends import AsyncScriptedBackend

KINDS = ("tokens", "usd", "seconds", "steps", "model_calls", "tool_calls")
ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "ok"})


def backend(replies, is_async):
    return (AsyncScriptedBackend if is_async else ScriptedBackend)(replies)


def reply(*calls: tuple[str, dict], usage: Usage | None = None) -> Reply:
    made = tuple(ToolCall(name, dict(args)) for name, args in calls)
    return Reply(tool_calls=made, finish_reason="tool_call", usage=usage)


def making(replies, budget: BudgetCap | None = None, **more: Any):
    """Return a `make` for `both`: a fresh run of this script under this budget."""

    def make(*, is_async: bool) -> dict[str, Any]:
        hooks = [*more.get("hooks", ()), *([] if budget is None else [budget])]
        rest = {name: value for name, value in more.items() if name != "hooks"}
        told = {"llm": backend(replies, is_async), "task": {"goal": "add"}, "tools": make_tools(), "hooks": hooks}
        return {**told, **rest}

    return make


def names(outcome) -> list[str]:
    return [step.tool_call.tool for step in outcome.steps]


def told(outcome) -> dict[str, Any]:
    """Return what the run's span says about budgets."""
    (root,) = outcome.trace.roots
    head = "looplet.budget."
    return {name.removeprefix(head): value for name, value in root.attributes.items() if name.startswith(head)}


# --- the values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrong", [-1, "10", True, float("nan"), float("inf")])
def test_a_limit_that_can_mean_nothing_names_its_field(name, wrong):
    for make in (Budget, BudgetCap):
        with pytest.raises(ConfigError, match=f"budget {name} must be a"):
            make(**{name: wrong})


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("usd", "seconds")])
def test_what_is_counted_is_limited_by_a_whole_number(name):
    with pytest.raises(ConfigError, match="whole number"):
        Budget(**{name: 1.5})


def test_a_budget_without_a_limit_is_refused():
    for make in (Budget, BudgetCap):
        with pytest.raises(ConfigError, match="limits nothing"):
            make()


def test_tokens_are_the_only_positional_limit():
    assert BudgetCap(10_000).looplet_budget == Budget(10_000) == Budget(tokens=10_000)
    with pytest.raises(TypeError):
        Budget(10_000, 5)


# --- the ledger -----------------------------------------------------------------------------------------------------


def test_what_a_run_below_spends_is_in_every_total_above_and_in_no_own():
    top = Ledger()
    middle = Ledger(top)
    bottom = Ledger(middle)
    for ledger in (top, middle, bottom):
        ledger.count_model_call()
        ledger.count(Usage(10, 5, cost_usd=0.5))
        ledger.count_tool()
        ledger.count_step()
    assert [ledger.own.total_tokens for ledger in (top, middle, bottom)] == [15, 15, 15]
    assert [ledger.total.total_tokens for ledger in (top, middle, bottom)] == [45, 30, 15]
    assert [ledger.total.cost_usd for ledger in (top, middle, bottom)] == [1.5, 1.0, 0.5]
    for name in ("model_calls", "tool_calls", "steps"):
        assert [getattr(ledger.counts, name) for ledger in (top, middle, bottom)] == [1, 1, 1]
        assert [getattr(ledger.total_counts, name) for ledger in (top, middle, bottom)] == [3, 2, 1]


def test_usage_that_nobody_reported_and_prices_that_nobody_knows_are_counted_apart():
    top = Ledger()
    below = Ledger(top)
    below.count(None)
    below.count(Usage(1, 1))
    below.count(Usage(1, 1, cost_usd=0.1))
    assert (below.unreported, below.counts.unpriced) == (1, 2)
    assert (top.unreported, top.total_counts.unreported, top.total_counts.unpriced) == (0, 1, 2)
    assert top.total.total_tokens == 4


def test_a_ledger_goes_on_from_what_it_said():
    top = Ledger()
    below = Ledger(top)
    below.count_tool()
    below.count(Usage(3, 4, cached_tokens=2))
    again = Ledger()
    again.restore(top.written())
    assert again.written() == top.written()
    again.count(Usage(1, 1))
    assert (again.total.total_tokens, again.own.total_tokens) == (9, 2)


def test_counting_from_many_threads_loses_nothing():
    top = Ledger()
    ledgers = [Ledger(top) for _ in range(4)]

    def spend(ledger: Ledger) -> None:
        for _ in range(500):
            ledger.count_tool()
            ledger.count(Usage(1, 1))

    threads = [threading.Thread(target=spend, args=(ledger,)) for ledger in ledgers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (top.total_counts.tool_calls, top.total.total_tokens) == (4000, 8000)
    assert [ledger.counts.tool_calls for ledger in ledgers] == [1000] * 4


# --- the guard ------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_smallest_of_several_budgets_counts():
    guard = Guard([Budget(100), Budget(50, usd=1), Budget(usd=2.0)], Ledger())
    assert guard.limits == {"tokens": 50, "usd": 1}
    assert guard.remaining() == {"tokens": 50, "usd": 1}


def test_a_guard_without_limits_lets_everything_pass_and_counts_it():
    guard = Guard([], Ledger())
    assert guard.exhausted() is guard.take_model_call() is guard.take_tool_call() is guard.calls_left() is None
    assert (guard.remaining(), guard.fraction_left(), guard.unchecked()) == ({}, {}, {})
    assert (guard.spent()["model_calls"], guard.spent()["tool_calls"]) == (1, 1)


def test_the_clock_starts_with_the_first_question_and_stands_still_during_a_pause():
    clock = Clock()
    guard = Guard([Budget(seconds=10)], Ledger(), clock=clock)
    clock.now += 1000
    assert (guard.elapsed_s, guard.exhausted()) == (0.0, None)
    clock.now += 9.5
    assert (guard.elapsed_s, guard.exhausted(), guard.remaining()) == (9.5, None, {"seconds": 0.5})
    later = Guard([Budget(seconds=10)], Ledger(), clock=clock)
    later.resume(guard.elapsed_s)
    clock.now += 1000
    assert later.exhausted() is None
    clock.now += 0.5
    assert later.exhausted() == "seconds"
    assert (later.remaining(), later.calls_left(), later.take_model_call(), later.take_tool_call()) == (
        {"seconds": 0.0}, 0, "seconds", "seconds",
    )  # fmt: skip


def test_a_limit_stops_what_would_spend_more_of_it():
    def used_up(**limit: int) -> Guard:
        return Guard([Budget(**limit)], Ledger())

    asking = {name: used_up(**{name: 0}).take_model_call() for name in KINDS}
    acting = {name: used_up(**{name: 0}).take_tool_call() for name in KINDS}
    assert asking == {**dict.fromkeys(KINDS), **{n: n for n in ("tokens", "usd", "seconds", "model_calls")}}
    assert acting == {**dict.fromkeys(KINDS), **{n: n for n in ("seconds", "steps", "tool_calls")}}
    assert [used_up(**{name: 0}).exhausted() for name in KINDS] == list(KINDS)


def test_a_run_below_is_bound_by_the_budgets_above():
    top = Guard([Budget(tool_calls=3, model_calls=9)], Ledger())
    middle = Guard([], Ledger(top.ledger), above=top)
    bottom = Guard([Budget(tool_calls=5, steps=2)], Ledger(middle.ledger), above=middle)
    assert bottom.remaining() == {"tool_calls": 3, "steps": 2, "model_calls": 9}
    assert (bottom.calls_left(), middle.calls_left()) == (2, 3)
    assert [bottom.take_tool_call() for _ in range(4)] == [None, None, None, "tool_calls"]
    assert bottom.spent()["tool_calls"] == top.spent()["tool_calls"] == 3
    assert (bottom.exhausted(), middle.exhausted(), bottom.calls_left()) == ("tool_calls", "tool_calls", 0)
    assert bottom.fraction_left() == {"tool_calls": 0.0, "steps": 1.0, "model_calls": 1.0}


def test_what_is_taken_at_the_same_time_never_exceeds_the_limit():
    top = Guard([Budget(model_calls=100, tool_calls=70)], Ledger())
    guards = [Guard([], Ledger(top.ledger), above=top) for _ in range(4)]
    taken: list[tuple[str, str | None]] = []

    def spend(guard: Guard) -> None:
        for _ in range(50):
            taken.append(("model", guard.take_model_call()))
            taken.append(("tool", guard.take_tool_call()))

    threads = [threading.Thread(target=spend, args=(guard,)) for guard in guards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken.count(("model", None)) == top.ledger.total_counts.model_calls == 100
    assert taken.count(("tool", None)) == top.ledger.total_counts.tool_calls == 70
    assert len(taken) == 400


def test_calls_that_a_limit_cannot_count_are_logged_once_for_each_limit_and_told(caplog):
    guard = Guard([Budget(100, usd=1.0)], Ledger())
    assert guard.exhausted() is None
    assert caplog.records == []
    guard.ledger.count(Usage(5, 5))
    guard.ledger.count(Usage(5, 5))
    with caplog.at_level(logging.WARNING, "looplet"):
        assert (guard.exhausted(), guard.unchecked()) == (None, {"usd": 2})
    assert len(caplog.records) == 1
    assert "the budget of usd" in caplog.text
    guard.ledger.count(None)
    assert (guard.unchecked(), len(caplog.records)) == ({"tokens": 1, "usd": 3}, 2)
    assert (guard.unchecked(), len(caplog.records)) == ({"tokens": 1, "usd": 3}, 2)


def test_calls_that_nobody_limits_are_not_complained_about(caplog):
    guard = Guard([Budget(steps=5)], Ledger())
    guard.ledger.count(None)
    assert (guard.exhausted(), guard.unchecked(), caplog.records) == (None, {}, [])


def test_the_view_shows_and_cannot_be_changed():
    guard = Guard([Budget(100)], Ledger())
    guard.ledger.count(Usage(30, 10))
    view = BudgetView(guard)
    assert (view.remaining, view.fraction_left, view.spent["tokens"]) == ({"tokens": 60}, {"tokens": 0.6}, 40)
    for name in ("remaining", "spent", "other"):
        with pytest.raises(AttributeError):
            setattr(view, name, {})


# --- runs -----------------------------------------------------------------------------------------------------------

FOUR = [reply(ADD, usage=Usage(10, 5, cost_usd=0.25)) for _ in range(4)]
LONG = [*FOUR, reply(DONE, usage=Usage(10, 5, cost_usd=0.25))]


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ({"tokens": 30}, 2),
        ({"tokens": 31}, 3),
        ({"usd": 0.5}, 2),
        ({"steps": 3}, 3),
        ({"model_calls": 2}, 2),
        ({"tool_calls": 3}, 3),
        ({"seconds": 0}, 0),
    ],
)
def test_a_run_ends_when_its_budget_is_used_up(limit, steps):
    outcome = both(making(LONG, BudgetCap(**limit)))
    assert (names(outcome), outcome.stop_reason) == (["add"] * steps, "budget_exhausted")
    ((name, most),) = limit.items()
    assert told(outcome)["exhausted"] == name
    spent = {"tokens": 15, "usd": 0.25}.get(name, 1) * steps
    assert told(outcome)[f"remaining.{name}"] == max(0, most - spent)


def test_a_run_that_stays_within_its_budgets_says_what_is_left():
    cap = BudgetCap(1000, usd=2, seconds=3600, steps=10, model_calls=5, tool_calls=6)
    outcome = both(making(LONG, cap))
    assert outcome.stop_reason == "done"
    left = told(outcome)
    assert 0 < left.pop("remaining.seconds") < 3600
    assert left == {
        "remaining.tokens": 925, "remaining.usd": 0.75, "remaining.steps": 5, "remaining.model_calls": 0,
        "remaining.tool_calls": 1,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_nothing_asks_no_model(kind):
    outcome = both(making([DONE], BudgetCap(**{kind: 0})))
    assert (outcome.steps, outcome.stop_reason, told(outcome)["exhausted"]) == ([], "budget_exhausted", kind)
    assert not [node for node in outcome.trace.spans if node.name.startswith(semconv.CHAT)]


def test_the_calls_of_a_reply_that_was_paid_for_still_run():
    for limit in ({"tokens": 1}, {"usd": 0.01}, {"model_calls": 1}):
        outcome = both(making([reply(ADD, DONE, usage=Usage(10, 5, cost_usd=0.25))], BudgetCap(**limit)))
        assert (names(outcome), outcome.stop_reason) == (["add", "done"], "done")


def test_max_steps_says_steps():
    outcome = both(making(LONG, max_steps=2))
    assert (outcome.stop_reason, told(outcome)) == ("budget_exhausted", {"exhausted": "steps"})


def test_the_budget_of_the_config_counts_as_well():
    config = LoopConfig(budget=Budget(tool_calls=1))
    assert names(both(making(LONG, BudgetCap(tool_calls=3), config=config))) == ["add"]
    assert names(both(making(LONG, BudgetCap(tool_calls=1), config=LoopConfig(budget=Budget(tool_calls=3))))) == ["add"]


@pytest.mark.parametrize("limit", ["tool_calls", "steps"])
def test_a_batch_of_parallel_calls_is_cut_to_what_is_left(limit):
    batch = [("look", {"name": str(number)}) for number in range(5)]
    outcome = both(making([ADD, batch, DONE], BudgetCap(**{limit: 4})))
    assert (names(outcome), outcome.stop_reason) == (["add", "look", "look", "look"], "budget_exhausted")
    assert told(outcome) == {"exhausted": limit, f"remaining.{limit}": 0}


@pytest.mark.parametrize("limit", ["tool_calls", "steps"])
def test_calls_one_after_another_in_a_turn_are_cut_to_what_is_left(limit):
    outcome = both(making([[ADD, ADD, ADD, ADD]], BudgetCap(**{limit: 3})))
    assert (names(outcome), outcome.stop_reason) == (["add"] * 3, "budget_exhausted")


def test_a_refused_call_is_a_step_and_no_tool_call():
    class Refuses:
        def pre_dispatch(self, state, log, tool_call, step_num):
            return Deny("no") if tool_call.args["b"] == 1 else None

    def script(*numbers):
        return [("add", {"a": 0, "b": number}) for number in numbers]

    by_call = both(making(script(1, 1, 2, 2, 2), BudgetCap(tool_calls=2), hooks=[Refuses()]))
    by_step = both(making(script(1, 1, 2, 2, 2), BudgetCap(steps=3), hooks=[Refuses()]))
    assert [step.tool_call.args["b"] for step in by_call.steps] == [1, 1, 2, 2]
    assert [step.tool_call.args["b"] for step in by_step.steps] == [1, 1, 2]


def test_free_tools_are_tool_calls_and_no_steps():
    @tool(free=True)
    def think(about: str) -> str:
        """Think."""
        return about

    def make(*, is_async):
        tools = tools_from([think, add], include_done=True)
        script = [("think", {"about": "x"}), ("think", {"about": "y"}), ADD, ADD, DONE]
        return {"llm": backend(script, is_async), "tools": tools, "hooks": [BudgetCap(**limit)]}

    limit: dict[str, int] = {"steps": 1}
    assert names(both(make)) == ["think", "think", "add"]
    limit = {"tool_calls": 1}
    assert names(both(make)) == ["think"]


def test_a_failing_tool_and_done_are_tool_calls():
    assert names(both(making([("boom", {}), ADD, DONE], BudgetCap(tool_calls=2)))) == ["boom", "add"]
    assert both(making([ADD, DONE], BudgetCap(tool_calls=2))).stop_reason == "done"


def test_usage_that_nobody_reports_is_said_on_the_run(caplog):
    outcome = both(making([reply(ADD), reply(DONE)], BudgetCap(100, usd=1.0)))
    assert outcome.stop_reason == "done"
    assert {name: told(outcome)[name] for name in ("unchecked.tokens", "unchecked.usd")} == {
        "unchecked.tokens": 2, "unchecked.usd": 2,
    }  # fmt: skip
    warned = [record.args[0] for record in caplog.records if "the budget of" in record.message]
    assert warned == ["tokens", "usd"] * 2  # sync, async


# --- sub-agents -----------------------------------------------------------------------------------------------------


def with_sub_agents(parent: list[Any], sub: list[Any], *, hooks: list[Any] | None = None, concurrent: bool = False):
    """Return a `make` whose tool `ask` runs a sub-agent by this script, and the endings of those sub-agents."""
    endings: list[str | None] = []

    def make(*, is_async: bool) -> dict[str, Any]:
        @tool(concurrent_safe=concurrent)
        def ask(name: str) -> str:
            """Let a sub-agent work."""
            run = composable_loop(ScriptedBackend(sub), {"goal": name}, make_tools(), hooks=hooks)
            steps = list(run)
            endings.append(run.stop_reason)
            return f"{len(steps)} steps"

        return {"llm": backend(parent, is_async), "tools": tools_from([ask, add, look, boom], include_done=True)}

    return make, endings


ASK = ("ask", {"name": "x"})


@pytest.mark.parametrize(
    ("limit", "sub_steps"),
    [
        ({"tokens": 45}, 2),  # the parent's request and two of the sub-agent's
        ({"model_calls": 3}, 2),
        ({"tool_calls": 3}, 2),  # `ask`, and two of the sub-agent's
        ({"steps": 2}, 2),  # `ask` is a step only when it has ended
    ],
)
def test_a_sub_agent_spends_its_parents_budget_and_stops_with_it(limit, sub_steps):
    make, endings = with_sub_agents([ASK, ADD, DONE], [ADD, ADD, ADD, ADD, DONE])
    outcome = both(lambda is_async: {**make(is_async=is_async), "hooks": [BudgetCap(**limit)]})
    assert [step.tool_result.data for step in outcome.steps] == [f"{sub_steps} steps"]
    assert (outcome.stop_reason, endings) == ("budget_exhausted", ["budget_exhausted"] * 2)
    assert told(outcome)["exhausted"] == next(iter(limit))


def test_a_sub_agent_with_a_budget_of_its_own_leaves_the_parents_run_going():
    make, endings = with_sub_agents([ASK, ADD, DONE], [ADD, ADD, ADD, DONE], hooks=[BudgetCap(tool_calls=1)])
    outcome = both(lambda is_async: {**make(is_async=is_async), "hooks": [BudgetCap(tool_calls=9)]})
    assert (names(outcome), outcome.stop_reason) == (["ask", "add", "done"], "done")
    assert (endings, told(outcome)) == (["budget_exhausted"] * 2, {"remaining.tool_calls": 5})


@pytest.mark.parametrize("limit", ["model_calls", "tool_calls"])
@pytest.mark.parametrize("is_async", [False, True])
def test_parallel_sub_agents_never_exceed_the_calls_of_the_budget(tmp_path, limit, is_async):
    calls = [("ask", {"name": str(number)}) for number in range(4)]
    make, endings = with_sub_agents([calls, DONE], [*[ADD] * 6, DONE], concurrent=True)
    arguments = {**make(is_async=is_async), "hooks": [BudgetCap(**{limit: 12}), ProvenanceSink(tmp_path)]}
    if is_async:
        run: Any = async_composable_loop(**arguments)
        asyncio.run(_drain(run))
    else:
        run = composable_loop(**arguments)
        list(run)
    spans = Trace.load(tmp_path).spans
    made = [
        node for node in spans if node.name.startswith({"model_calls": "chat", "tool_calls": "execute_tool"}[limit])
    ]
    assert len(made) == 12
    assert run.stop_reason == "budget_exhausted"
    assert endings.count("budget_exhausted") >= 3


async def _drain(run: Any) -> None:
    async for _ in run:
        pass


def test_what_a_tool_asks_the_model_counts():
    refused: list[str] = []

    def make(*, is_async):
        @tool
        def summarize(text: str, ctx: Any) -> str:
            """Ask the model, twice."""
            try:
                return str(ctx.llm.generate(text)) + str(ctx.llm.generate(text))
            except Exception as error:
                refused.append(str(error))
                raise

        script = [("summarize", {"text": "x"}), "short", "shorter"]
        tools = tools_from([summarize], include_done=True)
        return {"llm": backend(script, is_async), "tools": tools, "hooks": [BudgetCap(model_calls=2)]}

    outcome = both(make)
    (step,) = outcome.steps
    assert "the run's budget is used up: model_calls" in (step.tool_result.error or "")
    assert (outcome.stop_reason, len(refused)) == ("budget_exhausted", 2)


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_see_the_budget_on_the_state():
    def make(*, is_async):
        class Looks:
            def should_stop(self, state, step_num, new_entities):
                seen.append((state.budget.remaining["tool_calls"], state.budget.spent["model_calls"]))

        return {"llm": backend(LONG, is_async), "tools": make_tools(), "hooks": [Looks(), BudgetCap(tool_calls=9)]}

    seen: list[tuple[float, float]] = []
    both(make)
    assert seen == [(8, 1), (7, 2), (6, 3), (5, 4)] * 2


def test_a_hook_without_a_budget_sees_what_was_spent():
    class Looks:
        def on_loop_end(self, state, log, context, llm):
            seen.append((state.budget.remaining, state.budget.spent["tokens"]))

    seen: list[tuple[dict[str, float], float]] = []
    list(composable_loop(ScriptedBackend(LONG), {}, make_tools(), hooks=[Looks()]))
    assert seen == [({}, 75)]


def test_one_cap_serves_many_runs():
    cap = BudgetCap(tool_calls=2)
    for _ in range(2):
        run = composable_loop(ScriptedBackend(LONG), {}, make_tools(), hooks=[cap])
        assert len(list(run)) == 2

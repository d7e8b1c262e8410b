"""What must be refused is refused: gates with slips in them, hooks that are nearly hooks, settings that cannot work."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

import pytest
from support import both

from looplet import (
    ApprovalHook,
    BackendRouter,
    Budget,
    BudgetCap,
    ConfigError,
    EvalContext,
    HookDecision,
    LoopConfig,
    ResilientBackend,
    composable_loop,
    eval_run,
    tool,
    tools_from,
)
from looplet.hooks import ARGUMENTS, METHODS
from looplet.telemetry import drops
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from looplet.toolerrors import to_tool_error

DONE = ("done", {"answer": "ok"})


def make_with(hook, *replies, ran, **more):
    @tool
    def delete(path: str) -> str:
        """Delete a file."""
        ran.append(path)
        return "gone"

    def make(is_async):
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)(list(replies))
        return {"llm": backend, "task": {}, "tools": tools_from([delete], include_done=True), "hooks": [hook], **more}

    return make


@pytest.mark.parametrize("permission", ["DENY", "no", "deny ", "denny", False, 0])
def test_a_gate_with_a_slip_in_its_answer_has_refused(permission):
    class Gate:
        def check_permission(self, tool_call, state):
            return HookDecision(permission=permission) if tool_call.tool == "delete" else None

    ran = []
    outcome = both(make_with(Gate(), ("delete", {"path": "a"}), DONE, ran=ran))
    assert ran == []
    assert "permission is one of" in outcome.steps[0].tool_result.error


def test_a_done_gate_that_asks_a_human_is_told_where_to_ask_and_has_refused():
    class Gate:
        def check_done(self, state, log, context, step):
            return HookDecision(permission="ask", block="really?")

    outcome = both(make_with(Gate(), DONE, ran=[], config=LoopConfig(max_steps=1)))
    assert "ask in check_permission" in outcome.steps[0].tool_result.error
    assert outcome.stop_reason == "budget_exhausted"


def test_a_permission_may_have_a_human_asked_about_done():
    class Gate:
        def check_permission(self, tool_call, state):
            return HookDecision(permission="ask", block="really?") if tool_call.tool == "done" else None

    asked = []
    config = LoopConfig(approval_handler=lambda words, options: asked.append(words) or "approve")
    outcome = both(make_with(Gate(), DONE, ran=[], config=config))
    assert (outcome.stop_reason, asked) == ("done", ["really?", "really?"])  # once sync, once async


class Parent:
    def check_permision(self, tool_call, state):
        return False


class Child(Parent):
    def pre_prompt(self, state, log, context, step):
        return None


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_cannot_be_called_is_refused_before_the_run(method):
    registry = tools_from([], include_done=True)

    def too_few(self):
        """Take nothing."""

    def too_many(self, a, b, c, d, e, f):
        """Take six."""

    def anything(self, *args):
        """Take what comes."""

    for function in (too_few, too_many):
        words = rf"Odd\.{method} cannot be called as {method}\({ARGUMENTS[method]}\)"
        with pytest.raises(ConfigError, match=words):
            composable_loop(ScriptedBackend([DONE]), {}, registry, hooks=[type("Odd", (), {method: function})()])
    composable_loop(ScriptedBackend([DONE]), {}, registry, hooks=[type("Fit", (), {method: anything})()])


def test_a_misspelt_method_is_found_where_it_is_inherited_and_in_a_module():
    module = ModuleType("guards")
    module.pre_dispach = lambda *args: None
    module.pre_prompt = lambda *args: None
    for hook, name in ((Child(), "check_permision"), (module, "pre_dispach")):
        with pytest.raises(ConfigError, match=name):
            composable_loop(ScriptedBackend([]), tools=tools_from([], include_done=True), hooks=[hook])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LookupError("invoice 14290 not found"), "execution"),
        (RuntimeError("HTTP 429 Too Many Requests"), "rate_limit"),
        (RuntimeError("status code: 429"), "rate_limit"),
        (RuntimeError("429 rows"), "execution"),
    ],
)
def test_a_number_in_an_error_is_no_rate_limit(error, kind):
    assert str(to_tool_error(error).kind) == kind


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cancel_token": threading.Event()}, "takes a CancelToken"),
        ({"done_tools": "finish"}, r"done_tools=\['finish'\]"),
        ({"budget": BudgetCap(10)}, "goes into hooks"),
        ({"generate_kwargs": 3}, "must be a dict, not 3"),
        ({"max_depth": 0}, "from 1"),
        ({"max_parallel_calls": True}, "whole number"),
        ({"temperature": "hot"}, "must be a number"),
        ({"approval_handler": "me"}, "must be a function"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_to_write(settings, words):
    with pytest.raises(ConfigError, match=words):
        LoopConfig(**settings)


def test_a_budget_in_hooks_is_told_to_be_a_cap():
    with pytest.raises(ConfigError, match="BudgetCap"):
        composable_loop(ScriptedBackend([]), tools=tools_from([], include_done=True), hooks=[Budget(10)])


def test_evaluators_ask_the_router_as_judges():
    agent, judge = ScriptedBackend(["agent"]), ScriptedBackend(["judge"])
    router = BackendRouter(agent, judge=judge)

    def eval_words(ctx, llm):
        return llm.generate("Good?") == "judge"

    (result,) = eval_run([eval_words], EvalContext([]), judge_llm=router)
    assert result.passed is not False
    assert result.score == 1.0
    assert list(router.by_purpose) == ["judge"]


def test_a_wrapper_around_a_backend_with_chat_alone_answers_texts():
    assert ResilientBackend(ScriptedBackend(["yes"])).generate("well?") == "yes"


def test_one_approval_hook_keeps_the_questions_of_its_runs_apart():
    class Gate:
        def check_permission(self, tool_call, state):
            return HookDecision(permission="ask") if tool_call.tool == "delete" else None

    hook, ran = ApprovalHook(), []
    first = make_with(Gate(), ("delete", {"path": "a"}), ran=ran)(False)
    waiting = composable_loop(**{**first, "hooks": [Gate(), hook]})
    list(waiting)
    other = make_with(Gate(), DONE, ran=ran)(False)
    list(composable_loop(**{**other, "hooks": [Gate(), hook]}))
    assert hook.pending == waiting.pending[0]


def test_losses_are_counted_from_many_threads(caplog):
    cause, interval = "a test of counting", sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [drops.count_drop(cause) for _ in range(2000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert drops.drops.pop(cause) == 16_000
    assert len([record for record in caplog.records if cause in record.getMessage()]) == 1


@pytest.mark.parametrize("args", [{"amount": "1000", "dry_run": "false"}, {"amount": 1000.0, "dry_run": False}])
def test_gates_judge_the_arguments_that_the_tool_will_get(args):
    seen, ran = [], []

    class Gate:
        def pre_dispatch(self, state, log, tool_call, step):
            seen.append(tool_call.args)

        def check_permission(self, tool_call, state):
            return tool_call.args.get("amount") != 1000 or tool_call.args["dry_run"] is not False

    @tool
    def transfer(amount: int, dry_run: bool) -> str:
        """Transfer money."""
        ran.append(amount)
        return "gone"

    def make(is_async):
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("transfer", args), DONE])
        return {"llm": backend, "task": {}, "tools": tools_from([transfer], include_done=True), "hooks": [Gate()]}

    outcome = both(make)
    assert ran == []
    assert seen[0] == outcome.steps[0].tool_call.args == {"amount": 1000, "dry_run": False}
    assert type(seen[0]["amount"]) is int


def test_the_model_is_told_that_a_text_does_nothing_where_tools_are_native():
    backend = ScriptedBackend(["I think I am done.", DONE])
    list(composable_loop(backend, tools=tools_from([], include_done=True)))
    assert "to finish, call done" in backend.requests[1][-1].text


def test_a_chat_method_without_tools_is_taught_them_in_the_text():
    class Plain:
        def chat(self, messages):
            assert "TOOLS" in messages[0].text
            return ScriptedBackend(['{"tool": "done", "args": {"answer": "ok"}}']).chat(messages)

    run = composable_loop(Plain(), tools=tools_from([], include_done=True))
    assert [step.tool_call.tool for step in run] == ["done"]

"""Permissions: which calls may run, who is asked, and that a broken rule never lets one through."""

from __future__ import annotations

import asyncio
import threading

import pytest
from support import both, make_tools

from looplet import ConfigError, LoopConfig, ToolCall, tool, tools_from
from looplet.permissions import PermissionDecision, PermissionEngine, PermissionHook, PermissionOutcome, PermissionRule
from looplet.telemetry import semconv
from looplet.testing import ScriptedBackend
from looplet.testing.backends import AsyncScriptedBackend

ALLOW, DENY, ASK = PermissionDecision.ALLOW, PermissionDecision.DENY, PermissionDecision.ASK
ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "ok"})


def call(tool_name: str = "write", **args) -> ToolCall:
    return ToolCall(tool_name, args)


def decisions(engine: PermissionEngine, *names: str) -> list[str]:
    return [str(engine.evaluate(call(name)).decision) for name in names]


def raises(*values):
    raise RuntimeError("broken matcher")


# --- rules ----------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_decides_and_else_the_default():
    engine = PermissionEngine().deny("write", reason="read only").allow("write").ask("rm")
    assert decisions(engine, "write", "rm", "read") == ["deny", "ask", "allow"]
    assert decisions(PermissionEngine(default=DENY).allow("read"), "write", "read") == ["deny", "allow"]
    assert decisions(PermissionEngine(default="ask"), "write") == ["ask"]


def test_rules_can_be_given_as_a_list():
    rules = [PermissionRule("read", ALLOW), PermissionRule("*", "deny", reason="no")]
    engine = PermissionEngine(rules, ALLOW)
    assert decisions(engine, "read", "write") == ["allow", "deny"]
    assert engine.evaluate(call()) == PermissionOutcome(DENY, rules[1], "no")
    rules.clear()
    assert decisions(engine, "write") == ["deny"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("write", ["write"]),
        ("*", ["write", "write_file", "Write"]),
        ("write*", ["write", "write_file"]),
        ("w?ite", ["write"]),
    ],
)
def test_patterns_are_globs_and_case_counts(pattern, names):
    rule = PermissionRule(pattern, DENY)
    assert [name for name in ("write", "write_file", "Write") if rule.matches(call(name))] == names


def test_an_outcome_tells_whether_a_call_may_run():
    told = [(PermissionOutcome(d).allowed, PermissionOutcome(d).denied) for d in (ALLOW, DENY, ASK)]
    assert told == [(True, False), (False, True), (False, False)]


def test_no_wildcard_and_no_default_keeps_a_run_from_ending():
    engine = PermissionEngine(default=DENY, done_tools=("done", "finish")).deny("*").deny("d?ne").deny("fin*")
    assert decisions(engine, "done", "finish", "other") == ["allow", "allow", "deny"]
    assert decisions(PermissionEngine(default=ASK), "done", "finish") == ["allow", "ask"]
    assert decisions(PermissionEngine().deny("done"), "done") == ["deny"]


@pytest.mark.parametrize(
    ("matcher", "args", "matches"),
    [
        (None, {}, True),
        (lambda args: args["path"] == "a", {"path": "a"}, True),
        (lambda args: args["path"] == "a", {"path": "b"}, False),
        ({}, {"path": "a"}, True),
        ({"path": "a"}, {"path": "a"}, True),
        ({"path": "a"}, {"path": "b"}, False),
        ({"path": "src/*"}, {"path": "src/a/b.py"}, True),
        ({"path": "src/*"}, {"path": "lib/a.py"}, False),
        ({"path": "[x]"}, {"path": "[x]"}, True),
        ({"n": 3}, {"n": 3}, True),
        ({"n": 3}, {"n": "3"}, False),
        ({"n": lambda n: n > 3}, {"n": 4}, True),
        ({"n": lambda n: n > 3}, {"n": 3}, False),
        ({"path": "a", "n": 3}, {"path": "a", "n": 4}, False),
        ({"force": None}, {}, True),
        ({"force": True}, {}, False),
    ],
)  # fmt: skip
def test_a_rule_can_be_about_some_arguments_only(matcher, args, matches):
    for decision in PermissionDecision:
        assert PermissionRule("write", decision, matcher).matches(call(**args)) is matches


async def late(*values) -> bool:
    return False


@pytest.mark.parametrize("matcher", [raises, {"path": raises}, lambda args: args["missing"], late, {"path": late}])
def test_a_matcher_that_cannot_be_asked_fails_closed(matcher):
    matching = [d for d in PermissionDecision if PermissionRule("write", d, matcher).matches(call(path="a"))]
    assert matching == [DENY, ASK]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PermissionRule("", DENY), "tool name"),
        (lambda: PermissionRule("a", "never"), "'allow', 'deny', 'ask', not 'never'"),
        (lambda: PermissionRule("a", DENY, "src/*"), "arg_matcher of 'a'"),
        (lambda: PermissionEngine(["write"]), "PermissionRule objects, not str"),
        (lambda: PermissionEngine(default="perhaps"), "not 'perhaps'"),
        (lambda: PermissionEngine(ask_handler="me"), "ask_handler"),
        (lambda: PermissionHook([]), "takes a PermissionEngine"),
    ],
)
def test_what_cannot_work_is_said_at_once(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# --- asking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "decision"),
    [(True, ALLOW), (ALLOW, ALLOW), (False, DENY), (DENY, DENY), (ASK, DENY), (None, DENY), ("yes", DENY), (1, DENY)],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_only_a_clear_yes_lets_a_call_run(answer, decision, is_async):
    asked = []

    def handler(tool_call, reason):
        asked.append((tool_call.tool, reason))
        return answer

    async def async_handler(tool_call, reason):
        return handler(tool_call, reason)

    engine = PermissionEngine(ask_handler=async_handler if is_async else handler).ask("write", reason="careful")
    outcome = asyncio.run(engine.aevaluate(call())) if is_async else engine.evaluate(call())
    assert (outcome.decision, asked) == (decision, [("write", "careful")])
    assert len(engine.denials) == (decision is DENY)


def test_nobody_is_asked_about_a_call_that_a_rule_decides():
    engine = PermissionEngine(ask_handler=raises).deny("write").allow("*")
    assert decisions(engine, "write", "read") == ["deny", "allow"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_handler_that_raises_has_refused(is_async):
    async def async_raises(*values):
        raises()

    engine = PermissionEngine(ask_handler=async_raises if is_async else raises).ask("*", reason="careful")
    outcome = asyncio.run(engine.aevaluate(call()))
    assert (outcome.denied, outcome.reason) == (True, "the ask_handler failed (RuntimeError): careful")


def test_an_async_handler_cannot_be_asked_without_awaiting():
    with pytest.raises(ConfigError, match="aevaluate"):
        PermissionEngine(ask_handler=late).ask("*").evaluate(call())


def test_denials_tell_what_was_refused_and_why():
    engine = PermissionEngine(default=DENY).deny("write*", reason="read only").allow("read")
    for name in ("write_file", "read", "other"):
        engine.evaluate(call(name, path="a", __theory__="x"))
    assert engine.denials == [
        {"tool": "write_file", "args": {"path": "a"}, "rule": "write*", "reason": "read only"},
        {"tool": "other", "args": {"path": "a"}, "rule": None, "reason": ""},
    ]


def test_denials_from_many_threads_are_all_there():
    engine = PermissionEngine(default=DENY)
    threads = [threading.Thread(target=lambda: [engine.evaluate(call()) for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engine.denials) == 1600


# --- runs -----------------------------------------------------------------------------------------------------------


def making(replies, engine: PermissionEngine | None, **more):
    def make(*, is_async):
        llm = (AsyncScriptedBackend if is_async else ScriptedBackend)(replies)
        hooks = [*([] if engine is None else [PermissionHook(engine)]), *more.get("hooks", ())]
        return {"llm": llm, "tools": make_tools(), **more, "hooks": hooks}

    return make


def errors(outcome) -> list[str | None]:
    return [step.tool_result.error for step in outcome.steps]


def executed(outcome) -> list[str]:
    return [n.attributes[semconv.TOOL_NAME] for n in outcome.trace.spans if n.name.startswith(semconv.EXECUTE_TOOL)]


def test_a_denied_call_does_not_run_and_the_model_reads_why():
    outcome = both(making([ADD, DONE], PermissionEngine().deny("add", reason="sums are secret")))
    assert errors(outcome) == ["Permission denied for tool 'add': sums are secret", None]
    assert (executed(outcome), outcome.stop_reason) == (["done"], "done")
    assert str(outcome.steps[0].tool_result.error_kind) == "permission_denied"


def test_a_denial_without_a_reason_names_the_rule():
    by_rule = both(making([ADD, DONE], PermissionEngine().deny("a*")))
    by_default = both(making([ADD, DONE], PermissionEngine(default=DENY).allow("look")))
    assert errors(by_rule)[0] == "Permission denied for tool 'add': the rule 'a*' forbids it"
    assert errors(by_default)[0] == "Permission denied for tool 'add': no rule allows it"
    assert by_default.stop_reason == "done"


def test_rules_judge_the_arguments_that_will_run():
    class Rewrites:
        def pre_dispatch(self, state, log, tool_call, step_num):
            from looplet import Allow

            return Allow(updated_args={"a": 1, "b": 99}) if tool_call.tool == "add" else None

    engine = PermissionEngine().deny("add", arg_matcher={"b": 99}, reason="99 is too much")
    assert "99 is too much" in (errors(both(making([ADD, DONE], engine, hooks=[Rewrites()])))[0] or "")


@pytest.mark.parametrize("says_yes", [True, False])
@pytest.mark.parametrize("is_async_handler", [False, True])
def test_the_handler_is_asked_exactly_once_per_call(says_yes, is_async_handler):
    asked = []

    def handler(tool_call, reason):
        asked.append(tool_call.args["b"])
        return says_yes

    async def async_handler(tool_call, reason):
        return handler(tool_call, reason)

    engine = PermissionEngine(ask_handler=async_handler if is_async_handler else handler).ask("add", reason="costly")
    outcome = both(making([ADD, ("add", {"a": 1, "b": 3}), DONE], engine))
    assert asked == [2, 3] * 2  # sync, async
    refused = "Permission denied for tool 'add': a human refused it: costly"
    assert errors(outcome) == [None if says_yes else refused] * 2 + [None]


def test_without_an_ask_handler_the_runs_approval_handler_is_asked_once():
    asked = []

    def approve(prompt, options):
        asked.append((prompt, options))
        return "approve"

    engine = PermissionEngine().ask("add", reason="costly")
    outcome = both(making([ADD, DONE], engine, config=LoopConfig(approval_handler=approve)))
    assert (errors(outcome), engine.denials) == ([None, None], [])
    assert asked == [("costly", ["approve", "deny"])] * 2


def test_where_nobody_can_be_asked_the_call_is_refused():
    outcome = both(making([ADD, DONE], PermissionEngine().ask("add")))
    assert "nobody can be asked" in (errors(outcome)[0] or "")
    assert executed(outcome) == ["done"]


def test_done_can_be_forbidden_by_name():
    outcome = both(making([DONE, ADD, DONE], PermissionEngine().deny("done", reason="keep going"), max_steps=3))
    assert outcome.stop_reason == "budget_exhausted"
    assert errors(outcome)[0] == "Permission denied for tool 'done': keep going"


def test_a_wildcard_that_denies_everything_lets_the_run_end():
    outcome = both(making([ADD, DONE], PermissionEngine().deny("*", reason="closed")))
    assert (outcome.stop_reason, executed(outcome)) == ("done", ["done"])


def test_a_batch_is_judged_call_by_call():
    engine = PermissionEngine().deny("look", arg_matcher={"name": "b*"}, reason="not b")
    batch = [("look", {"name": name}) for name in ("a", "b", "c", "bb")]
    outcome = both(making([batch, DONE], engine))
    assert [error is None for error in errors(outcome)] == [True, False, True, False, True]
    assert [denial["args"]["name"] for denial in engine.denials] == ["b", "bb"] * 2


def test_a_decision_is_on_the_span_of_the_phase():
    outcome = both(making([ADD, DONE], PermissionEngine().deny("add", reason="sums are secret")))
    events = [event for node in outcome.trace.spans if node.name == semconv.PRE_DISPATCH for event in node.events]
    (event,) = [e for e in events if e.name == semconv.EVENT_HOOK]
    assert event.attributes[semconv.HOOK_NAME] == "PermissionHook"
    assert event.attributes[semconv.HOOK_REASON] == "sums are secret"


def test_a_call_with_a_secret_is_judged_and_logged_without_it():
    @tool
    def send(to: str) -> str:
        """Send."""
        return to

    def make(*, is_async):
        llm = (AsyncScriptedBackend if is_async else ScriptedBackend)([("send", {"to": "bob@x.org"}), DONE])
        config = LoopConfig(redact=lambda text: text.replace("bob@x.org", "[email]"))
        return {"llm": llm, "tools": tools_from([send], include_done=True), "config": config, "hooks": [hook]}

    engine = PermissionEngine().deny("send", arg_matcher={"to": "*bob*"}).deny("send", reason="no mail")
    hook = PermissionHook(engine)
    assert both(make).stop_reason == "done"
    assert engine.denials == [{"tool": "send", "args": {"to": "[email]"}, "rule": "send", "reason": "no mail"}] * 2

"""The loop, phase by phase: the same sync and async, live and read back."""

import pytest
from support import both, make_tools, names_of

from looplet import (
    ConfigError,
    Deny,
    HookDecision,
    InjectContext,
    LoopConfig,
    ToolResult,
    composable_loop,
    tool,
    tools_from,
)
from looplet.testing import AsyncScriptedBackend, ScriptedBackend


def script(*replies, hooks=lambda: (), **rest):
    def make(is_async):
        backend = AsyncScriptedBackend(replies) if is_async else ScriptedBackend(replies)
        return {"llm": backend, "task": {"goal": "g"}, "tools": make_tools(), "hooks": list(hooks()), **rest}

    return make


ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "3"})


def test_a_run_has_the_promised_tree():
    outcome = both(script(ADD, DONE))
    assert outcome.stop_reason == "done"
    (root,) = outcome.trace.roots
    assert names_of(root) == [
        "invoke_agent looplet",
        "  looplet.start",
        "  looplet.turn",
        "    looplet.pre_prompt",
        "    chat scripted",
        "    looplet.pre_dispatch",
        "    looplet.dispatch",
        "      looplet.tool.start",
        "      execute_tool add",
        "    looplet.post_dispatch",
        "  looplet.turn",
        "    looplet.pre_prompt",
        "    chat scripted",
        "    looplet.pre_dispatch",
        "    looplet.check_done",
        "    looplet.dispatch",
        "      looplet.tool.start",
        "      execute_tool done",
        "    looplet.post_dispatch",
        "  looplet.end",
    ]


def test_steps_print_as_promised():
    outcome = both(script(ADD, ("boom", {}), ("add", {"a": 1, "c": 2}), ("ad", {}), DONE))
    assert [step.pretty() for step in outcome.steps] == [
        "#1 ✓ add(a=1, b=2) → 3",
        "#2 ✗ boom() → ERROR: RuntimeError: kaput",
        "#3 ✗ add(a=1, c=2) → ERROR: tool 'add' has no argument 'c'; it takes: a, b tool 'add' needs argument 'b' (in",
        "#4 ✗ ad() → ERROR: unknown tool 'ad'; did you mean 'add'? available: add, look, boom, done",
        "#5 ✓ done(answer='3') → 2 keys",
    ]


def test_a_rejected_done_runs_no_tool():
    class Gate:
        def check_done(self, state, log, context, step):
            return "cite a source" if step == 1 else None

    outcome = both(script(DONE, DONE, hooks=lambda: [Gate()]))
    assert [s.pretty() for s in outcome.steps] == [
        "#1 ✗ done(rejected) → ERROR: cite a source",
        "#2 ✓ done(answer='3') → 2 keys",
    ]
    assert len(outcome.trace.find("execute_tool *")) == 1


def test_a_gate_that_raises_has_said_no_and_three_times_ends_the_run():
    class Broken:
        def check_done(self, state, log, context, step):
            raise KeyError("oops")

    outcome = both(script(DONE, DONE, DONE, DONE, hooks=lambda: [Broken()]))
    assert (outcome.stop_reason, outcome.raised) == ("error", "KeyError")
    assert [s.tool_result.args_summary for s in outcome.steps] == ["rejected", "rejected"]


@pytest.mark.parametrize(
    "method", ["pre_loop", "pre_prompt", "pre_dispatch", "post_dispatch", "should_stop", "on_loop_end"]
)
def test_a_steering_hook_that_raises_ends_the_run_and_reaches_the_caller(method):
    def fail(*args):
        raise OSError("hook broke")

    outcome = both(script(ADD, DONE, hooks=lambda: [type("Hook", (), {method: lambda self, *a: fail()})()]))
    assert (outcome.stop_reason, outcome.raised) == ("error", "OSError")
    (named,) = outcome.trace.find(attributes={"looplet.hook.name": "Hook"})
    assert named.is_error or method == "on_loop_end"


def test_deny_with_retry_invites_the_model_and_clears_the_last_error():
    class RetryFlakyTool:
        def pre_dispatch(self, state, log, tc, step):
            if tc.tool == "add" and state.last_error:
                return Deny("retry with backoff", retry=True)
            return None

    outcome = both(script(("boom", {}), ADD, ADD, DONE, hooks=lambda: [RetryFlakyTool()]))
    denied = outcome.steps[1].tool_result
    assert denied.error == "Permission denied for tool 'add': retry with backoff"
    assert denied.error_retriable
    assert outcome.steps[2].tool_result.data == 3


def test_hooks_rewrite_arguments_results_and_context():
    class Rewriter:
        def pre_dispatch(self, state, log, tc, step):
            return HookDecision(updated_args={"a": 10, "b": 20}) if step == 1 else None

        def post_dispatch(self, state, log, tc, result, step):
            if step == 1:
                return HookDecision(
                    updated_result=ToolResult("add", data=result.data + 1), additional_context="well done"
                )
            return None

    outcome = both(script(ADD, DONE, hooks=lambda: [Rewriter()]))
    assert outcome.steps[0].tool_result.data == 31
    assert "well done" in outcome.steps[1].prompt


def test_a_cached_result_runs_no_tool():
    class Cache:
        def pre_dispatch(self, state, log, tc, step):
            return ToolResult("add", data="cached") if tc.tool == "add" else None

    outcome = both(script(ADD, DONE, hooks=lambda: [Cache()]))
    assert outcome.steps[0].tool_result.data == "cached"
    assert [n.name for n in outcome.trace.find("execute_tool *")] == ["execute_tool done"]


def test_budget_counts_steps_and_a_batch_never_overshoots():
    batch = [("look", {"name": str(i)}) for i in range(4)]
    outcome = both(script(batch, batch, max_steps=2))
    assert (outcome.stop_reason, len(outcome.steps)) == ("budget_exhausted", 2)


def test_parallel_calls_keep_their_order_and_their_parents():
    batch = [("look", {"name": str(i)}) for i in range(4)]
    outcome = both(script(batch, DONE))
    assert [s.tool_result.data["name"] for s in outcome.steps[:4]] == ["0", "1", "2", "3"]
    assert {n.parent.name for n in outcome.trace.find("execute_tool look")} == {"looplet.dispatch"}


def test_a_call_after_a_failed_one_in_the_same_reply_sees_its_error():
    seen = []

    class Watch:
        def pre_dispatch(self, state, log, tc, step):
            seen.append((tc.tool, state.last_error))

    both(script([("boom", {}), ADD], DONE, hooks=lambda: [Watch()]))
    assert seen[1] == ("add", "RuntimeError: kaput")


def test_replies_without_a_call_get_corrective_turns_then_a_parse_error_step():
    outcome = both(script("hello", "hello", "hello", DONE))
    assert [s.tool_call.tool for s in outcome.steps] == ["__parse_error__", "done"]
    events = [e.name for n in outcome.trace.find("chat *") for e in n.events]
    assert events == ["looplet.parse_failure"] * 3


def test_a_failed_model_call_ends_the_run_with_llm_error():
    outcome = both(script(ADD, ConnectionError("no route")))
    assert (outcome.stop_reason, outcome.raised) == ("llm_error", None)
    assert outcome.steps[-1].pretty() == "#2 ✗ __llm_error__() → ERROR: LLM call failed: ConnectionError: no route"
    assert outcome.trace.find("chat *")[-1].is_error


def test_usage_of_corrective_turns_is_not_lost():
    from looplet import Reply, Usage

    outcome = both(script(Reply("hm", usage=Usage(7, 1)), ADD, DONE))
    assert sum((s.usage for s in outcome.steps), Usage()) == outcome.trace.runs[0].usage == Usage(27, 11)


def test_an_exception_in_the_body_is_told_from_a_break():
    def body(step):
        raise LookupError

    outcome = both(script(ADD, DONE), body)
    assert (outcome.stop_reason, outcome.raised) == ("exception_in_body", "LookupError")
    assert both(script(ADD, DONE), lambda step: True).stop_reason == "closed_by_caller"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "find bugs"}, "task={\"goal\": 'find bugs'}"),
        ({"tools": [1]}, "tools_from"),
        ({"tools": None}, "tools is required"),
        ({"llm": object()}, "chat, generate_with_tools, generate"),
        ({"hooks": [type("H", (), {"pre_promt": lambda self: None})()]}, "did you mean 'pre_prompt'"),
        ({"hooks": [type("H", (), {"pre_prompt": lambda self: None})]}, "not the class"),
        (
            {"hooks": [type("H", (), {"pre_prompt": lambda self: None, "pre_dispach": lambda self: None})()]},
            "'pre_dispatch'",
        ),
        ({"llm": "gpt-4o"}, "OpenAIBackend(model='gpt-4o')"),
        ({"state": {}}, "DefaultState()"),
        ({"system_prompt": 3}, "system_prompt must be a str"),
        ({"tracer_provider": "x"}, "TracerProvider"),
        ({"max_steps": -1}, "max_steps"),
        ({"config": {"max_steps": 3}}, "LoopConfig"),
    ],
)
def test_wrong_arguments_raise_at_the_call_with_what_to_write(arguments, words):
    good = {"llm": ScriptedBackend([DONE]), "task": {}, "tools": make_tools()}
    with pytest.raises(ConfigError, match=None) as caught:
        composable_loop(**{**good, **arguments})
    assert words in str(caught.value)


def test_a_meaningless_answer_of_a_hook_names_hook_and_method():
    class Odd:
        def pre_prompt(self, state, log, context, step):
            return HookDecision(updated_args={"x": 1})

    outcome = both(script(ADD, DONE, hooks=lambda: [Odd()]))
    assert outcome.raised == "ConfigError"
    run = composable_loop(**script(ADD, hooks=lambda: [Odd()])(is_async=False))
    with pytest.raises(ConfigError, match=r"Odd.pre_prompt returned .* updated_args"):
        next(run)


def test_stop_in_pre_prompt_ends_before_the_model_is_asked():
    class Stopper:
        def pre_prompt(self, state, log, context, step):
            return HookDecision(stop="enough") if step == 2 else InjectContext("hint")

    outcome = both(script(ADD, DONE, hooks=lambda: [Stopper()]))
    assert (outcome.stop_reason, len(outcome.steps)) == ("enough", 1)
    assert len(outcome.trace.find("chat *")) == 1


def test_config_is_never_changed():
    config = LoopConfig(max_steps=9)
    list(composable_loop(**script(DONE, config=config)(is_async=False), max_steps=3))
    assert config == LoopConfig(max_steps=9)


def test_gates_judge_the_arguments_that_will_run():
    seen = []

    class Gate:
        def check_permission(self, call, state):
            seen.append(call.args)
            return call.args.get("why") != "kaput"

    outcome = both(script('{"tool": "boom", "args": "kaput"}', DONE, hooks=lambda: [Gate()]))
    assert outcome.steps[0].tool_result.data is None
    assert seen[0] in ({"_raw_arg": "kaput"}, {"why": "kaput"})

    @tool
    def remove(path: str) -> str:
        """Remove a file."""
        return path

    class Paths:
        def check_permission(self, call, state):
            return call.args.get("path") != "/etc/passwd"

    backend = ScriptedBackend(['{"tool": "remove", "args": "/etc/passwd"}', DONE])
    steps = list(composable_loop(backend, {}, tools_from([remove], include_done=True), hooks=[Paths()]))
    assert steps[0].tool_result.error == "Permission denied for tool 'remove'"


@pytest.mark.parametrize("method", ["pre_dispatch", "check_permission"])
def test_a_stop_from_a_gate_keeps_the_tool_and_its_neighbours_from_running(method):
    class Stopper:
        pass

    setattr(Stopper, method, lambda self, *args: HookDecision(stop="enough"))
    batch = [("look", {"name": "a"}), ("look", {"name": "b"})]
    outcome = both(script(batch, DONE, hooks=lambda: [Stopper()]))
    assert outcome.stop_reason == "enough"
    assert outcome.trace.find("execute_tool *") == []
    assert all("not run" in step.tool_result.error for step in outcome.steps)


def test_a_sink_that_raises_everywhere_changes_nothing(caplog):
    class Broken:
        looplet_sink = property(lambda self: self)

        def fail(self, *args):
            raise OSError("sink broke")

        attach = on_end = durable = detach = fail

    steps = list(composable_loop(ScriptedBackend([ADD, DONE]), {}, make_tools(), hooks=[Broken()]))
    assert [step.tool_result.error for step in steps] == [None, None]


def test_a_sub_agent_of_a_quiet_run_inherits_redaction_and_ledger():
    inner = ScriptedBackend([DONE])

    @tool
    def delegate(goal: str) -> str:
        """Ask a sub-agent."""
        list(composable_loop(inner, {"goal": "the secret"}, make_tools()))
        return goal

    config = LoopConfig(redact=lambda text: text.replace("secret", "[x]"))
    run = composable_loop(
        ScriptedBackend([("delegate", {"goal": "g"}), DONE]),
        {},
        tools_from([delegate], include_done=True),
        config=config,
    )
    list(run)
    assert inner.requests[0][0].text == "goal: the [x]"
    assert run._scope.trace.recorder.ledger.total.input_tokens == 30

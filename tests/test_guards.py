"""Guards: a run that goes on has those that it had, they name tools that exist, and a human's odd answer is no yes."""

from __future__ import annotations

import asyncio
import json
from types import ModuleType

import pytest
from click.testing import CliRunner
from support import both, python

from looplet import (
    Allow,
    ApprovalHook,
    Block,
    Budget,
    BudgetCap,
    BudgetWarningHook,
    ConfigError,
    Continue,
    Deny,
    HookDecision,
    InjectContext,
    LoopConfig,
    PermissionEngine,
    PermissionHook,
    PerToolLimitHook,
    ProvenanceSink,
    StagnationHook,
    Stop,
    Trace,
    TraceError,
    async_composable_loop,
    composable_loop,
    run_sub_loop,
    tool,
    tools_from,
)
from looplet.approval import Verdict
from looplet.cli import main
from looplet.guards import require_guards
from looplet.hooks import HookSet
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
SOURCE = pytest.mark.parametrize("source", ["run", "file"])
DONE = ("done", {"answer": "ok"})
ASKS = ("deploy", {})
WIPE = ("wipe", {})


class Ran(list):
    """Tools that note what they did."""

    def tools(self, *more):
        @tool
        def deploy(ctx) -> dict:
            """Deploy, if a human says so."""
            if ctx.approve("deploy?") is None:
                return {"needs_approval": True, "approval_description": "deploy?"}
            self.append("deploy")
            return {}

        @tool
        def wipe() -> str:
            """Wipe everything."""
            self.append("wipe")
            return "gone"

        return tools_from([deploy, wipe, *more], include_done=True)


def go(is_async, replies, tools, hooks, **more):
    """Run to the end."""
    if not is_async:
        run = composable_loop(ScriptedBackend(replies), tools=tools, hooks=hooks, **more)
        list(run)
        return run
    run = async_composable_loop(AsyncScriptedBackend(replies), tools=tools, hooks=hooks, **more)

    async def drive():
        return [step async for step in run]

    asyncio.run(drive())
    return run


def pause(folder, *hooks, is_async=False, **more):
    """Run until a tool asks; return the run and what ran."""
    ran = Ran()
    hooks = [*hooks, ApprovalHook(), ProvenanceSink(folder)]
    run = go(is_async, [ASKS], ran.tools(), hooks, task={"goal": "ship"}, **more)
    assert run.stop_reason == "waiting_for_approval"
    return run, ran


def resume(what, ran, *hooks, is_async=False, replies=(DONE,), **more):
    return go(is_async, list(replies), ran.tools(), [*hooks, ApprovalHook()], resume=what, verdict="approve", **more)


def source_of(source, run, folder):
    return run if source == "run" else folder


def edit(folder, change):
    """Change the pause record in a file."""
    path = folder / "trace.jsonl"
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scopes = [scope for document in documents for entry in document["resourceSpans"] for scope in entry["scopeSpans"]]
    for told in (told for scope in scopes for span in scope["spans"] for told in span.get("attributes", ())):
        if told["key"] == semconv.PAUSE:
            record = json.loads(told["value"]["stringValue"])
            change(record)
            told["value"]["stringValue"] = json.dumps(record)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")


class Gate:
    def check_permission(self, tool_call, state):
        return tool_call.tool != "wipe"


class Strict(Gate):
    pass


class Early:
    def pre_dispatch(self, state, log, tool_call, step):
        return Deny("no") if tool_call.tool == "wipe" else None


class Cites:
    def check_done(self, state, log, context, step):
        return None


class Enough:
    def should_stop(self, state, step, entities):
        return False


class Watches:
    """All that a hook may do that guards nothing."""

    looplet_emitter = None

    def pre_loop(self, state, log, context):
        return None

    def post_dispatch(self, state, log, tool_call, result, step):
        return None

    def should_compact(self, state, log, conversation, step):
        return False

    def on_loop_end(self, state, log, context, llm):
        return None

    def on_event(self, payload):
        return None

    def on_phase_end(self, phase):
        return None


def rules():
    return PermissionHook(PermissionEngine().deny("wipe"))


# --- a run that goes on has the guards that it had -------------------------------------------------------------------


GUARDS = [
    (rules, "PermissionHook; pass hooks=[PermissionHook(...)] again"),
    (lambda: PerToolLimitHook({"wipe": 0}), "PerToolLimitHook; pass hooks=[PerToolLimitHook(...)] again"),
    (lambda: StagnationHook(stop_after=1), "StagnationHook; pass"),
    (
        lambda: BudgetCap(9_000, usd=1),
        "a budget of tokens, a budget of usd; pass hooks=[BudgetCap(tokens=..., usd=...)]",
    ),
    (Gate, "Gate; pass hooks=[Gate(...)] again"),
    (Early, "Early; pass"),
    (Cites, "Cites; pass"),
    (Enough, "Enough; pass"),
]


@BOTH
@SOURCE
@pytest.mark.parametrize(("make", "words"), GUARDS, ids=[words.split(";")[0] for _, words in GUARDS])
def test_a_run_does_not_go_on_without_a_guard_that_it_had(make, words, source, is_async, tmp_path):
    run, ran = pause(tmp_path, make(), Watches(), is_async=is_async)
    before = (tmp_path / "trace.jsonl").read_bytes()
    what = source_of(source, run, tmp_path)
    with pytest.raises(ConfigError, match="the paused run had guards that this one lacks: ") as caught:
        resume(what, ran, Watches(), is_async=is_async, config=LoopConfig())
    assert words in str(caught.value)
    assert (ran, (tmp_path / "trace.jsonl").read_bytes()) == ([], before)
    assert resume(what, ran, make(), is_async=is_async).stop_reason in ("done", "budget_exhausted")
    assert ran == ["deploy"]


@BOTH
@SOURCE
def test_a_budget_of_the_config_goes_on_and_is_missed_where_another_config_has_none(source, is_async, tmp_path):
    run, ran = pause(tmp_path, config=LoopConfig(budget=Budget(model_calls=2)), is_async=is_async)
    what = source_of(source, run, tmp_path)
    with pytest.raises(ConfigError, match=r"a budget of model_calls; .* or LoopConfig\(budget=Budget\(model_calls="):
        resume(what, ran, is_async=is_async, config=LoopConfig(temperature=0.0))
    again = resume(what, ran, is_async=is_async, replies=[WIPE, WIPE])
    assert (again.stop_reason, ran) == ("budget_exhausted", ["deploy", "wipe"])


@SOURCE
def test_all_guards_that_are_missing_are_named_at_once(source, tmp_path):
    run, ran = pause(tmp_path, rules(), Gate(), BudgetCap(99))
    words = r"PermissionHook, a budget of tokens; pass hooks=\[PermissionHook\(...\), BudgetCap\(tokens=...\)\] or"
    with pytest.raises(ConfigError, match=words):
        resume(source_of(source, run, tmp_path), ran, Gate())


@BOTH
@SOURCE
def test_another_guard_of_the_same_kind_is_the_callers_right(source, is_async, tmp_path):
    hooks = [rules(), BudgetCap(99), PerToolLimitHook({"wipe": 0})]
    run, ran = pause(tmp_path, *hooks, is_async=is_async)
    others = [PermissionHook(PermissionEngine()), PerToolLimitHook(), Watches()]
    config = LoopConfig(budget=Budget(10_000))
    what = source_of(source, run, tmp_path)
    again = resume(what, ran, *others, is_async=is_async, replies=[WIPE, DONE], config=config)
    assert (again.stop_reason, ran) == ("done", ["deploy", "wipe"])


@SOURCE
def test_what_guards_nothing_may_be_left_out(source, tmp_path):
    run, ran = pause(tmp_path, Watches(), BudgetWarningHook(), StagnationHook())
    again = go(False, [DONE], ran.tools(), [], resume=source_of(source, run, tmp_path), verdict="approve")
    assert (again.stop_reason, ran) == ("done", ["deploy"])


@SOURCE
def test_two_guards_of_one_class_are_two(source, tmp_path):
    run, ran = pause(tmp_path, rules(), rules())
    what = source_of(source, run, tmp_path)
    with pytest.raises(ConfigError, match="lacks: PermissionHook; pass"):
        resume(what, ran, rules())
    assert resume(what, ran, rules(), PermissionHook(PermissionEngine())).stop_reason == "done"


@SOURCE
def test_a_subclass_will_do_and_its_base_will_not(source, tmp_path):
    run, ran = pause(tmp_path / "one", Gate())
    assert resume(source_of(source, run, tmp_path / "one"), ran, Strict()).stop_reason == "done"
    run, ran = pause(tmp_path / "two", Strict())
    with pytest.raises(ConfigError, match="lacks: Strict; pass"):
        resume(source_of(source, run, tmp_path / "two"), ran, Gate())


@pytest.mark.parametrize(
    ("wanted", "given", "lacking"),
    [
        (["A", "B"], [["B", "A"], ["C", "A"]], None),
        (["B", "A"], [["C", "A"], ["B", "A"]], None),
        (["A", "B"], [["C", "B", "A"], ["D", "A"]], None),
        (["A", "B"], [["X", "A", "B"], ["Z", "Y", "A"]], None),
        (["A", "B"], [["Z", "Y", "A"], ["X", "A", "B"]], None),
        (["A", "A"], [["B", "A"]], "A"),
        (["A", "B"], [["B", "A"]], "A"),
        (["A", "A", "B"], [["A"]], "A, B"),
        ([], [["A"]], None),
    ],
)
def test_a_hook_stands_for_one_guard(wanted, given, lacking):
    if lacking is None:
        require_guards(wanted, [], given, [])
        return
    with pytest.raises(ConfigError, match=f"lacks: {lacking}; pass"):
        require_guards(wanted, [], given, [])


class Forwards:
    """A proxy that says what it is."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name):
        return getattr(self._target, name)


class Poses(Forwards):
    """A proxy that says that it is its target."""

    @property
    def __class__(self):
        return type(self._target)


@SOURCE
def test_proxies_are_guards(source, tmp_path):
    run, ran = pause(tmp_path / "one", Forwards(rules()))
    what = source_of(source, run, tmp_path / "one")
    for others in ([], [Forwards(Watches())]):
        with pytest.raises(ConfigError, match="lacks: Forwards; pass"):
            resume(what, ran, *others)
    assert resume(what, ran, Forwards(rules())).stop_reason == "done"
    for number, (first, later) in enumerate([(Poses(rules()), rules()), (rules(), Poses(rules()))]):
        run, ran = pause(tmp_path / f"pose{number}", first)
        what = source_of(source, run, tmp_path / f"pose{number}")
        with pytest.raises(ConfigError, match="lacks: PermissionHook; pass"):
            resume(what, ran)
        assert resume(what, ran, later, replies=[WIPE, DONE]).stop_reason == "done"
        assert ran == ["deploy"]


def test_a_module_is_a_guard_by_its_name(tmp_path):
    module = ModuleType("gates")
    module.check_permission = lambda tool_call, state: True
    _, ran = pause(tmp_path, module)
    with pytest.raises(ConfigError, match="lacks: gates; pass"):
        resume(tmp_path, ran)
    assert resume(tmp_path, ran, module).stop_reason == "done"


@SOURCE
def test_a_hook_may_say_itself_whether_it_guards(source, tmp_path):
    class Listens:
        looplet_guard = True

        def on_event(self, payload):
            return Deny("no") if payload.event == "pre_tool_use" and payload.tool_call.tool == "wipe" else None

    class Cache(Early):
        looplet_guard = False

    run, ran = pause(tmp_path, Listens(), Cache())
    what = source_of(source, run, tmp_path)
    with pytest.raises(ConfigError, match=r"lacks: Listens; pass hooks=\[Listens\(...\)\] again"):
        resume(what, ran)
    assert resume(what, ran, Listens()).stop_reason == "done"


@pytest.mark.parametrize("base", [BudgetWarningHook, StagnationHook])
def test_what_a_subclass_adds_to_a_hook_that_guards_nothing_counts(base):
    class Stops(base):
        def should_stop(self, state, step_num, new_entities):
            return True

    assert [kinds[0] for kinds in HookSet([Stops()]).guards()] == ["Stops"]
    assert HookSet([base()]).guards() == []


@SOURCE
def test_every_segment_hands_its_own_guards_on(source, tmp_path):
    run, ran = pause(tmp_path)
    second = resume(source_of(source, run, tmp_path), ran, Gate(), replies=[ASKS])
    assert second.stop_reason == "waiting_for_approval"
    what = source_of(source, second, tmp_path)
    with pytest.raises(ConfigError, match="lacks: Gate; pass"):
        resume(what, ran)
    third = resume(what, ran, Strict(), replies=[WIPE, ASKS])
    what = source_of(source, third, tmp_path)
    with pytest.raises(ConfigError, match="lacks: Strict; pass"):
        resume(what, ran, Gate())
    assert resume(what, ran, Strict(), replies=[WIPE, DONE]).stop_reason == "done"
    assert ran == ["deploy"] * 3
    assert len(Trace.load(tmp_path).runs[0].segments) == 4


def test_in_another_process_the_guards_are_missed_as_well(tmp_path):
    _, _ = pause(tmp_path / "traces", rules(), config=LoopConfig(budget=Budget(usd=5)))
    script = tmp_path / "go_on.py"
    script.write_text(
        """
import sys
from looplet import ConfigError, LoopConfig, PermissionEngine, PermissionHook, composable_loop, tool, tools_from
from looplet.testing import ScriptedBackend

@tool
def deploy(ctx) -> str:
    "Deploy."
    return ctx.approve("deploy?")

def run(**more):
    llm, tools = ScriptedBackend([("done", {"answer": "ok"})]), tools_from([deploy], include_done=True)
    run = composable_loop(llm, tools=tools, resume=sys.argv[1], verdict="approve", **more)
    return [step.tool_result.data for step in run][0]

try:
    run(config=LoopConfig())
except ConfigError as error:
    print(error)
print(run(hooks=[PermissionHook(PermissionEngine())]))
""",
        encoding="utf-8",
    )
    done = python(script, tmp_path / "traces")
    assert done.returncode == 0, done.stderr
    refused, data = done.stdout.splitlines()
    assert "lacks: PermissionHook, a budget of usd; pass hooks=[PermissionHook(...), BudgetCap(usd=...)]" in refused
    assert data == "approve"


def test_a_sub_agent_goes_on_within_the_budget_of_the_run_above_or_with_one_of_its_own(tmp_path):
    ran = Ran()

    @tool
    def helper() -> dict:
        """Help."""
        return run_sub_loop(
            ScriptedBackend([ASKS]), {}, ran.tools(), hooks=[Gate(), BudgetCap(steps=9), ApprovalHook()]
        )

    hooks = [BudgetCap(10_000), ProvenanceSink(tmp_path)]
    run = go(False, [("helper", {}), DONE], tools_from([helper], include_done=True), hooks, task={})
    assert run.stop_reason == "done"
    (sub,) = [view for view in Trace.load(tmp_path).runs if view.stop_reason == "waiting_for_approval"]
    with pytest.raises(ConfigError, match="lacks: Gate, a budget of steps, a budget of tokens; pass"):
        resume(sub, ran)
    assert resume(sub, ran, Gate(), BudgetCap(5_000, steps=9)).stop_reason == "done"


@BOTH
def test_a_sub_agent_that_its_tool_resumes_has_the_budget_of_the_run_above(is_async):
    ran = Ran()

    @tool
    def helper() -> str:
        """Help."""
        sub = go(False, [ASKS], ran.tools(), [Gate(), ApprovalHook()], task={})
        return resume(sub, ran, Gate()).stop_reason

    tools = tools_from([helper], include_done=True)
    run = go(is_async, [("helper", {}), DONE], tools, [BudgetCap(10_000)], task={})
    assert (run.state.steps[0].tool_result.data, ran) == ("done", ["deploy"])


def test_a_budget_that_was_edited_out_of_the_file_is_missed(tmp_path):
    _, ran = pause(tmp_path, config=LoopConfig(budget=Budget(5_000)))
    edit(tmp_path, lambda record: record["settings"].update(budget=None))
    with pytest.raises(ConfigError, match="a budget of tokens"):
        resume(tmp_path, ran)
    assert ran == []


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("guards"),
        lambda record: record.update(guards="Gate"),
        lambda record: record.update(guards=[3]),
        lambda record: record.pop("limits"),
        lambda record: record.update(limits={"usd": 1}),
        lambda record: record.update(format="2"),
    ],
)
def test_a_record_that_does_not_say_how_it_was_guarded_is_refused(change, tmp_path):
    _, ran = pause(tmp_path, Gate())
    edit(tmp_path, change)
    with pytest.raises(TraceError, match=r"looplet\.pause is not as looplet writes it"):
        resume(tmp_path, ran, Gate())
    assert ran == []


# --- the format of the record ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("number", "words"), [(None, "an older looplet"), (1, "an older"), (3, "a newer looplet")])
def test_a_pause_of_another_looplet_says_so(number, words, is_async, tmp_path):
    def change(record):
        del record["format"], record["guards"], record["settings"]
        if number is not None:
            record["format"] = number

    _, ran = pause(tmp_path)
    edit(tmp_path, change)
    before = (tmp_path / "trace.jsonl").read_bytes()
    with pytest.raises(TraceError, match=rf"{words}.* wrote this pause \(format {number or 1}, not 2\); resume with"):
        resume(tmp_path, ran, is_async=is_async)
    assert (ran, (tmp_path / "trace.jsonl").read_bytes()) == ([], before)
    assert "waits for deploy" in CliRunner().invoke(main, ["show", str(tmp_path)]).stdout


# --- names of tools --------------------------------------------------------------------------------------------------


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "which the run does not have" in record.getMessage()]


@BOTH
@pytest.mark.parametrize(
    ("make", "who"),
    [
        (lambda name: PerToolLimitHook({name: 1}), "PerToolLimitHook"),
        (lambda name: PermissionHook(PermissionEngine().deny(name)), "PermissionHook"),
        (lambda name: StagnationHook(ignore_tools=[name]), "StagnationHook"),
    ],
)
def test_a_guard_about_a_tool_that_is_not_there_is_logged_once(make, who, is_async, caplog):
    name = f"wip{'e' * (2 + is_async)}"
    for _ in range(2):
        run = go(is_async, [DONE], Ran().tools(), [make(name)], task={})
        assert run.stop_reason == "done"
    words = f"looplet: a {who} is about the tool {name!r}, which the run does not have; did you mean 'wipe'?"
    assert warnings_of(caplog) == [words]


def test_patterns_endings_and_tools_that_are_there_are_not_logged(caplog):
    engine = PermissionEngine().deny("wip_*").deny("[a]x").ask("wip?x").allow("done").allow("wipe").deny("*")
    hooks = [PermissionHook(engine), PerToolLimitHook({"done": 1, "deploy": 2}, default_limit=3)]
    go(False, [DONE], Ran().tools(), hooks, task={})
    assert warnings_of(caplog) == []


def test_a_guard_that_is_shared_with_a_sub_agent_is_told_of_its_tools_and_those_above(caplog):
    ran = Ran()
    shared = PerToolLimitHook({"helper_of_test": 3, "wipe": 0})

    @tool
    def helper_of_test() -> dict:
        """Help."""
        return run_sub_loop(ScriptedBackend([WIPE, DONE]), {}, ran.tools(), hooks=[shared])

    tools = ran.tools(helper_of_test)
    run = go(False, [("helper_of_test", {}), DONE], tools, [shared], task={})
    assert (run.stop_reason, ran) == ("done", [])
    assert warnings_of(caplog) == []


def test_a_tool_that_is_registered_while_the_run_goes_on_is_guarded():
    ran = Ran()

    def make(is_async):
        tools = tools_from([], include_done=True)

        @tools.tool
        def find_tools() -> str:
            """Find more tools."""
            tools.register(ran.tools().get("wipe"))
            return "there is one more"

        llm = (AsyncScriptedBackend if is_async else ScriptedBackend)([("find_tools", {}), WIPE, DONE])
        return {"llm": llm, "task": {}, "tools": tools, "hooks": [rules()]}

    outcome = both(make)
    assert [step.tool_result.error is None for step in outcome.steps] == [True, False, True]
    assert ran == []


# --- answers ---------------------------------------------------------------------------------------------------------


class Agrees:
    """Equal to everything."""

    def __eq__(self, other):
        return True

    __hash__ = None


ODD = [Agrees(), "yes", "approved", "", 1, 1.0, None, [], {"approve": True}, b"approve", object]


def asked(answer, is_async_handler=False, gate=None):
    """Return how to make a run in which a human is asked about `wipe`, and what ran."""
    ran = Ran()

    def handler(prompt, options):
        return answer

    async def async_handler(prompt, options):
        return answer

    def make(is_async):
        llm = (AsyncScriptedBackend if is_async else ScriptedBackend)([WIPE, DONE])
        config = LoopConfig(approval_handler=async_handler if is_async_handler else handler)
        hook = PermissionHook(PermissionEngine().ask("wipe")) if gate is None else gate
        return {"llm": llm, "task": {}, "tools": ran.tools(), "hooks": [hook, ApprovalHook()], "config": config}

    return make, ran


@pytest.mark.parametrize("is_async_handler", [False, True])
@pytest.mark.parametrize("answer", ODD, ids=lambda answer: type(answer).__name__)
def test_an_odd_answer_of_the_handler_is_no_and_says_what_it_may_answer(answer, is_async_handler, caplog):
    make, ran = asked(answer, is_async_handler)
    outcome = both(make)
    assert ran == []
    error = outcome.steps[0].tool_result.error
    assert error.startswith("Permission denied for tool 'wipe': the approval_handler answered ")
    assert error.endswith("; it may answer 'approve' or 'deny' or True or False")
    assert str(outcome.steps[0].tool_result.error_kind) == "permission_denied"
    assert outcome.stop_reason == "done"
    logged = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    words = f"looplet: the approval_handler gave a {type(answer).__name__} that is none of 'approve', 'deny'"
    assert logged == [words] * 2  # once sync, once async


@pytest.mark.parametrize(("answer", "runs"), [("approve", True), (True, True), ("deny", False), (False, False)])
def test_the_answers_that_count(answer, runs):
    make, ran = asked(answer)
    outcome = both(make)
    assert bool(ran) is runs
    assert outcome.steps[0].tool_result.error == (None if runs else DENIED)


DENIED = "Permission denied for tool 'wipe': a human refused it"


@pytest.mark.parametrize("answer", ["yes", 1, None, "approve", object()], ids=["yes", "1", "None", "approve", "object"])
@pytest.mark.parametrize("is_async_handler", [False, True])
def test_an_odd_answer_of_the_engines_own_handler_is_no_and_says_what_it_may_answer(answer, is_async_handler):
    async def async_handler(call, reason):
        return answer

    handler = async_handler if is_async_handler else lambda call, reason: answer
    make, ran = asked(None, gate=PermissionHook(PermissionEngine(ask_handler=handler).ask("wipe")))
    outcome = both(make)
    assert ran == []
    error = outcome.steps[0].tool_result.error
    assert "the ask_handler answered" in error
    assert "none of True, False, PermissionDecision.ALLOW and .DENY" in error


def test_an_odd_answer_is_not_shown_where_it_must_not_be():
    make, _ = asked("alice@example.org")

    def hides(is_async):
        arguments = make(is_async)
        config = arguments["config"]
        redact = lambda text: text.replace("alice@example.org", "[email]")  # noqa: E731
        return {**arguments, "config": LoopConfig(approval_handler=config.approval_handler, redact=redact)}

    outcome = both(hides)
    assert "[email]" in outcome.steps[0].tool_result.error
    assert "alice@" not in str([(node.attributes, node.events) for node in outcome.trace.spans])


@pytest.mark.parametrize("is_async_handler", [False, True])
@pytest.mark.parametrize("answer", ["yes", 1, True, None, "canary"], ids=repr)
def test_a_tool_that_asks_gets_one_of_its_options_or_none(answer, is_async_handler):
    got = []

    async def async_handler(prompt, options):
        return answer

    def make(is_async):
        @tool
        async def ship(ctx) -> str:
            """Ship."""
            said = ctx.approve("where to?", ["canary", "deny"])
            got.append(await said if is_async_handler else said)
            return "shipped"

        llm = (AsyncScriptedBackend if is_async else ScriptedBackend)([("ship", {}), DONE])
        config = LoopConfig(approval_handler=async_handler if is_async_handler else lambda prompt, options: answer)
        return {"llm": llm, "task": {}, "tools": tools_from([ship], include_done=True), "config": config}

    outcome = both(make)
    if answer in ("canary", None):
        assert got == [answer] * 2
    else:
        assert got == []
        assert "it may answer 'canary' or 'deny'" in outcome.steps[0].tool_result.error


@pytest.mark.parametrize(
    "verdict", ["yes", "", 1, 0, None, ["approve"], {}, b"approve", {"call_1": 1}, {"call_1": None}], ids=repr
)
def test_an_odd_verdict_names_what_is_accepted_and_uses_nothing_up(verdict, tmp_path):
    _, ran = pause(tmp_path)
    with pytest.raises(ConfigError, match=r"verdict.*(approve|option)"):
        go(False, [DONE], ran.tools(), [], resume=tmp_path, verdict=verdict)
    assert ran == []
    assert resume(tmp_path, ran).stop_reason == "done"


# --- values of the wrong kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Deny(5), r"the reason of Deny\(reason\) must be a str, not 5"),
        (lambda: Deny(None), r"the reason of Deny\(reason\) must be a str, not None"),
        (lambda: Block(None), r"the reason of Block\(reason\) must be a str"),
        (lambda: Stop(""), "a stop reason must not be empty"),
        (lambda: Stop(True), r"the reason of Stop\(reason\) must be a str"),
        (lambda: InjectContext(["text"]), "additional_context must be a str"),
        (lambda: Continue(5), "additional_context must be a str"),
        (lambda: Allow("path"), "updated_args must be a dict"),
        (lambda: HookDecision(stop=""), "a stop reason must not be empty"),
        (lambda: HookDecision(block=False), "HookDecision: block must be a str, not False"),
        (lambda: HookDecision(updated_result="x"), "updated_result must be a ToolResult"),
        (lambda: HookDecision(compact=1), "compact must be True or False, not 1"),
        (lambda: Verdict(True), "the answer of a Verdict must be a str, not True"),
        (lambda: Budget(tokens="5"), "budget tokens must be a whole number from 0, not '5'"),
        (lambda: BudgetCap(usd=True), "budget usd must be a number from 0, not True"),
        (lambda: BudgetCap(seconds=float("nan")), "budget seconds must be a number from 0, not nan"),
        (lambda: BudgetCap(steps=2.0), "budget steps must be a whole number from 0, not 2.0"),
        (lambda: PermissionEngine().deny("x", reason=5), "the reason of the rule 'x' must be a str, not 5"),
        (lambda: PerToolLimitHook(["add"]), r"limits must be a dict, not \['add'\]"),
        (lambda: PerToolLimitHook({"add": True}), "the limit of 'add' must be a whole number from 0, not True"),
        (lambda: PerToolLimitHook(default_limit="2"), "default_limit must be a whole number from 0, not '2'"),
        (lambda: PerToolLimitHook(message="{name}"), "message must be a str, with no other braces in it than {tool}"),
        (lambda: BudgetWarningHook(message=5), "message must be a str"),
        (lambda: BudgetWarningHook(thresholds=[True]), "a threshold is a fraction"),
        (lambda: StagnationHook(nudge="{"), "nudge must be a str"),
        (lambda: StagnationHook(stop_after=-1), "stop_after must be a whole number from 0, not -1"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_name(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_done_tool_may_be_named_by_a_single_text():
    hook = PerToolLimitHook(default_limit=0, done_tools="done")
    assert go(False, [DONE], Ran().tools(), [hook], task={}).stop_reason == "done"


@pytest.mark.parametrize("make", [lambda: Deny(5), lambda: Block(None), lambda: HookDecision(block=0)])
def test_a_gate_that_cannot_make_its_decision_has_refused(make):
    class Slips:
        def check_permission(self, tool_call, state):
            return make() if tool_call.tool == "wipe" else None

    gate, ran = asked("approve", gate=Slips())
    outcome = both(gate)
    assert ran == []
    assert "the gate Slips failed (ConfigError: " in outcome.steps[0].tool_result.error

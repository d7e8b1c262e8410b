"""A run that waits for a human: who asks, who answers, and how it goes on in this process and in another."""

from __future__ import annotations

import asyncio
import json
from dataclasses import fields, replace
from itertools import pairwise

import pytest
from support import both, python

from looplet import (
    ConfigError,
    EvalContext,
    LoopConfig,
    ProvenanceSink,
    Trace,
    TraceError,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.approval import ApprovalHook, ApprovalRequest, Verdict
from looplet.decisions import HookDecision
from looplet.pause import Settings
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from looplet.types import Reply, ToolCall, Usage

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
SOURCE = pytest.mark.parametrize("source", ["run", "file"])
DONE = ("done", {"answer": "ok"})
DELETE_A, DELETE_B = ("delete", {"path": "a"}), ("delete", {"path": "b"})


class Gate:
    """Has a human asked about every deletion."""

    def check_permission(self, tool_call, state):
        if tool_call.tool == "delete":
            return HookDecision(permission="ask", block=f"delete {tool_call.args['path']}?")
        return None


class Ran(list):
    """Tools that note what they did."""

    def tools(self, **settings):
        @tool(**settings)
        def delete(path: str) -> dict:
            """Delete a file."""
            self.append(path)
            return {"deleted": path}

        @tool
        def look() -> str:
            """Look around."""
            self.append("look")
            return "nothing"

        return tools_from([delete, look], include_done=True)


def go(is_async, replies, tools, hooks, **more):
    """Run to the end; return the run and its steps."""
    if not is_async:
        run = composable_loop(ScriptedBackend(replies), tools=tools, hooks=hooks, **more)
        return run, list(run)
    run = async_composable_loop(AsyncScriptedBackend(replies), tools=tools, hooks=hooks, **more)

    async def main():
        return [step async for step in run]

    return run, asyncio.run(main())


def pause(is_async, folder, *replies, ran=None, hooks=(), **settings):
    """Run until it waits for a human."""
    ran = Ran() if ran is None else ran
    hooks = [Gate(), ApprovalHook(), *hooks, ProvenanceSink(folder)]
    run, _ = go(is_async, list(replies), ran.tools(**settings), hooks, task={"goal": "tidy up"})
    assert run.stop_reason == "waiting_for_approval"
    return run, ran


def resume(is_async, source, run, folder, verdict, *replies, ran, hooks=None, **settings):
    """Go on from the run or from its file; in both cases the file must say what the live run says."""
    hooks = [Gate(), ApprovalHook()] if hooks is None else hooks
    sinks = [] if source == "file" else [ProvenanceSink(folder)]
    what = folder if source == "file" else run
    again, steps = go(is_async, list(replies), ran.tools(**settings), [*hooks, *sinks], resume=what, verdict=verdict)
    assert EvalContext.from_trace(folder) == EvalContext.from_run(again)
    return again, steps


@BOTH
@SOURCE
def test_a_call_that_needs_an_approval_pauses_the_run_before_it_runs(is_async, source, tmp_path):
    run, ran = pause(is_async, tmp_path, DELETE_A, DONE)
    assert (ran, len(run.state.steps), run.pending[0].description) == ([], 0, "delete a?")
    again, steps = resume(is_async, source, run, tmp_path, "approve", DONE, ran=ran)
    assert ran == ["a"]
    assert [step.tool_call.tool for step in steps] == ["delete", "done"]
    assert (again.run_id, again.trace_id, again.stop_reason) == (run.run_id, run.trace_id, "done")
    assert [step.number for step in again.state.steps] == [1, 2]


@BOTH
@SOURCE
def test_a_denied_call_never_runs_and_the_model_is_told_why(is_async, source, tmp_path):
    run, ran = pause(is_async, tmp_path, DELETE_A)
    verdict = run.pending[0].answer("deny", "still needed")
    _, steps = resume(is_async, source, run, tmp_path, verdict, DONE, ran=ran)
    assert ran == []
    assert steps[0].tool_result.error == "Permission denied for tool 'delete': still needed"
    assert str(steps[0].tool_result.error_kind) == "permission_denied"


@BOTH
@SOURCE
def test_several_calls_of_one_batch_wait_together(is_async, source, tmp_path):
    run, ran = pause(is_async, tmp_path, [DELETE_A, DELETE_B], concurrent_safe=True)
    first, second = run.pending
    verdicts = {first.call_id: "deny", second.call_id: "approve"}
    again, steps = resume(is_async, source, run, tmp_path, verdicts, DONE, ran=ran, concurrent_safe=True)
    assert ran == ["b"]
    assert [step.tool_result.error is None for step in steps] == [False, True, True]
    assert again.stop_reason == "done"


@BOTH
@SOURCE
def test_calls_one_after_the_other_pause_one_after_the_other(is_async, source, tmp_path):
    run, ran = pause(is_async, tmp_path, [("look", {}), DELETE_A, DELETE_B])
    assert (ran, [request.args for request in run.pending]) == (["look"], [{"path": "a"}])
    again, _ = resume(is_async, source, run, tmp_path, "approve", ran=ran)
    assert (ran, again.stop_reason) == (["look", "a"], "waiting_for_approval")
    assert [request.args for request in again.pending] == [{"path": "b"}]
    last, _ = resume(is_async, source, again, tmp_path, "approve", DONE, ran=ran)
    assert (ran, last.stop_reason) == (["look", "a", "b"], "done")
    view = Trace.load(tmp_path).runs[0]
    assert [node.attributes[semconv.SEGMENT_NUMBER] for node in view.segments] == [1, 2, 3]


@BOTH
@SOURCE
def test_a_tool_that_asks_by_itself_is_called_again_with_the_answer(is_async, source, tmp_path):
    answers = []

    @tool
    def deploy(where: str, ctx) -> dict:
        """Deploy."""
        answer = ctx.approve(f"deploy to {where}?", ["staging", "deny"])
        answers.append(answer)
        if answer is None:
            return {"needs_approval": True, "approval_description": "deploy?", "approval_options": ["staging", "deny"]}
        return {"deployed": answer}

    tools = tools_from([deploy], include_done=True)
    replies = [("deploy", {"where": "x"})]
    run, steps = go(is_async, replies, tools, [ApprovalHook(), ProvenanceSink(tmp_path)], task={"goal": "ship"})
    assert (run.stop_reason, run.pending[0].has_run) == ("waiting_for_approval", True)
    assert steps[0].pretty().startswith("#1 ✓ deploy(where='x') → ⏸ awaiting approval: deploy?")
    more = {"resume": run if source == "run" else tmp_path, "verdict": "staging"}
    hooks = [ApprovalHook(), ProvenanceSink(tmp_path)]
    again, steps = go(is_async, [DONE], tools, hooks, **more)
    assert answers == [None, "staging"]
    assert [step.tool_result.data for step in again.state.steps][1] == {"deployed": "staging"}
    assert len({step.tool_call.call_id for step in again.state.steps}) == 3
    assert EvalContext.from_trace(tmp_path) == EvalContext.from_run(again)


@BOTH
def test_a_handler_answers_at_once(is_async, tmp_path):
    asked = []

    def handler(prompt, options):
        asked.append((prompt, options))
        return "approve" if prompt == "delete a?" else "deny"

    ran = Ran()
    config = LoopConfig(approval_handler=handler)
    hooks = [Gate(), ProvenanceSink(tmp_path)]
    _, steps = go(is_async, [DELETE_A, DELETE_B, DONE], ran.tools(), hooks, task={"goal": "x"}, config=config)
    assert ran == ["a"]
    assert asked == [("delete a?", ["approve", "deny"]), ("delete b?", ["approve", "deny"])]
    assert [step.tool_result.error is None for step in steps] == [True, False, True]
    events = [e.name for node in Trace.load(tmp_path).spans for e in node.events if "approval" in e.name]
    assert events == [semconv.EVENT_APPROVAL_REQUESTED, semconv.EVENT_APPROVAL_ANSWERED] * 2


def test_a_handler_that_fails_has_refused_and_the_run_goes_on():
    def handler(prompt, options):
        raise OSError("no terminal")

    def make(is_async):
        ran = Ran()
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([DELETE_A, DONE])
        config = LoopConfig(approval_handler=handler)
        return {"llm": backend, "task": {}, "tools": ran.tools(), "hooks": [Gate()], "config": config}

    outcome = both(make)
    assert "the approval handler failed (OSError)" in outcome.steps[0].tool_result.error
    assert outcome.stop_reason == "done"


def test_where_nobody_can_be_asked_the_call_is_refused():
    def make(is_async):
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([DELETE_A, DONE])
        return {"llm": backend, "task": {}, "tools": Ran().tools(), "hooks": [Gate()]}

    outcome = both(make)
    assert "nobody can be asked" in outcome.steps[0].tool_result.error


@BOTH
def test_a_call_that_cannot_run_is_not_shown_to_a_human(is_async, tmp_path):
    run, steps = go(is_async, [("delete", {"pth": "a"}), DONE], Ran().tools(), [Gate2(), ApprovalHook()], task={})
    assert (run.stop_reason, run.pending) == ("done", ())
    assert str(steps[0].tool_result.error_kind) == "validation"


class Gate2:
    def check_permission(self, tool_call, state):
        return HookDecision(permission="ask") if tool_call.tool == "delete" else None


@BOTH
def test_a_verdict_is_bound_to_the_arguments_that_were_shown(is_async, tmp_path):
    class Rewrite:
        def pre_dispatch(self, state, log, tool_call, step):
            if tool_call.tool == "delete":
                return HookDecision(updated_args={"path": "everything"})
            return None

    run, ran = pause(is_async, tmp_path, DELETE_A)
    hooks = [Rewrite(), Gate(), ApprovalHook()]
    again, _ = resume(is_async, "file", run, tmp_path, run.pending[0].answer("approve"), ran=ran, hooks=hooks)
    assert (ran, again.stop_reason) == ([], "waiting_for_approval")
    assert again.pending[0].args == {"path": "everything"}


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (None, "pass verdict='approve' or 'deny'"),
        ("yes please", "is none of 'approve', 'deny'"),
        ({"nonsense": "approve"}, "verdict for call 'nonsense'"),
        ({}, "verdict= is missing for"),
        (Verdict("approve", "call_1", "0" * 64), "for other arguments"),
        (3, "verdict takes"),
    ],
)
def test_verdicts_that_do_not_fit_are_refused_before_anything_runs(verdict, words, tmp_path):
    run, ran = pause(False, tmp_path, DELETE_A)
    before = run._scope.trace.recorder.sinks[0].path.read_bytes()
    if isinstance(verdict, Verdict):
        verdict = replace(verdict, call_id=run.pending[0].call_id)
    with pytest.raises(ConfigError, match=words):
        composable_loop(ScriptedBackend([]), tools=ran.tools(), hooks=[Gate()], resume=run, verdict=verdict)
    assert (tmp_path / "trace.jsonl").read_bytes() == before
    assert ran == []


def test_one_verdict_for_several_calls_is_refused(tmp_path):
    run, ran = pause(False, tmp_path, [DELETE_A, DELETE_B], concurrent_safe=True)
    with pytest.raises(ConfigError, match="a verdict for each"):
        composable_loop(ScriptedBackend([]), tools=ran.tools(), hooks=[Gate()], resume=run, verdict="approve")


@SOURCE
def test_only_a_run_that_waits_can_be_resumed(source, tmp_path):
    run, _ = go(False, [DONE], Ran().tools(), [ProvenanceSink(tmp_path)], task={})
    with pytest.raises(ConfigError, match=r"only a run that waits for an approval .* 'done'"):
        composable_loop(ScriptedBackend([]), tools=Ran().tools(), resume=run if source == "run" else tmp_path)


def test_what_cannot_be_resumed_says_so(tmp_path):
    tools = Ran().tools()
    with pytest.raises(ConfigError, match="resume takes a run, a trace file or a run folder, not int"):
        composable_loop(ScriptedBackend([]), tools=tools, resume=3)
    with pytest.raises(TraceError):
        composable_loop(ScriptedBackend([]), tools=tools, resume=tmp_path / "nothing.jsonl")
    with pytest.raises(ConfigError, match="pass that run, or its trace, as resume="):
        composable_loop(ScriptedBackend([]), tools=tools, verdict="approve")
    run, _ = pause(False, tmp_path, DELETE_A)
    with pytest.raises(ConfigError, match="leave out task="):
        composable_loop(ScriptedBackend([]), tools=tools, resume=run, verdict="approve", task={"goal": "other"})


@BOTH
@SOURCE
def test_usage_turns_and_budgets_go_on(is_async, source, tmp_path):
    from looplet.budgets import Budget

    asked = Reply(tool_calls=(ToolCall("delete", {"path": "a"}),), usage=Usage(100, 10))
    run, ran = pause(is_async, tmp_path, asked)
    config = LoopConfig(budget=Budget(model_calls=2))
    more = {"resume": run if source == "run" else tmp_path, "verdict": "approve", "config": config}
    hooks = [Gate(), ApprovalHook(), ProvenanceSink(tmp_path)]
    again, steps = go(is_async, [("look", {}), ("look", {})], ran.tools(), hooks, **more)
    assert again.stop_reason == "budget_exhausted"
    assert steps[0].usage == Usage(100, 10)
    assert again.result.usage == again.state.usage == Usage(110, 15)
    view = Trace.load(tmp_path).runs[0]
    assert view.usage == Usage(110, 15)
    assert [step.usage for step in view.steps] == [step.usage for step in again.state.steps]


@BOTH
def test_every_request_of_a_resumed_run_can_be_rebuilt_from_the_file(is_async, tmp_path):
    run, ran = pause(is_async, tmp_path, ("look", {}), DELETE_A)
    again, _ = resume(is_async, "file", run, tmp_path, "approve", ("look", {}), DONE, ran=ran)
    view = Trace.load(tmp_path).runs[0]
    requests = [view.request(chat) for chat in view.chats]
    assert [len(request) for request in requests] == [1, 3, 5, 7]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(requests))
    assert again.stop_reason == "done"


def test_hooks_that_remember_get_their_memory_back(tmp_path):
    class Counter:
        def __init__(self):
            self.count = 0

        def post_dispatch(self, state, log, call, result, step):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, told):
            self.count = told["count"]

    run, ran = pause(False, tmp_path, ("look", {}), DELETE_A, hooks=[Counter()])
    counter = Counter()
    resume(False, "file", run, tmp_path, "approve", DONE, ran=ran, hooks=[Gate(), ApprovalHook(), counter])
    assert counter.count == 3


def test_a_run_resumes_in_another_process(tmp_path):
    run, _ = pause(False, tmp_path / "traces", ("look", {}), DELETE_A)
    script = tmp_path / "go_on.py"
    script.write_text(
        """
import json, sys
from looplet import composable_loop, tool, tools_from
from looplet.approval import ApprovalHook
from looplet.testing import ScriptedBackend

@tool
def delete(path: str) -> dict:
    "Delete a file."
    return {"deleted": path}

class Gate:
    def check_permission(self, tool_call, state):
        return True

llm = ScriptedBackend([("done", {"answer": "ok"})])
tools = tools_from([delete], include_done=True)
run = composable_loop(llm, tools=tools, hooks=[Gate()], resume=sys.argv[1], verdict="approve")
print(json.dumps([[step.number, step.tool_call.tool, step.tool_result.data] for step in run]))
print(run.run_id, run.stop_reason, len(llm.requests[0]))
""",
        encoding="utf-8",
    )
    done = python(script, tmp_path / "traces")
    assert done.returncode == 0, done.stderr
    steps, ending = done.stdout.splitlines()
    assert json.loads(steps)[0] == [2, "delete", {"deleted": "a"}]
    assert ending == f"{run.run_id} done 5"
    context = EvalContext.from_trace(tmp_path / "traces")
    assert (context.stop_reason, context.tool_sequence) == ("done", ["look", "delete", "done"])


def test_a_run_whose_requests_are_rewritten_resumes_in_its_own_process_only(tmp_path):
    class Scrub:
        def pre_prompt(self, state, log, ctx, step):
            return ctx.rewrite(lambda text: text.replace("secret", "[x]"))

    ran = Ran()
    hooks = [Scrub(), Gate(), ApprovalHook(), ProvenanceSink(tmp_path)]
    run, _ = go(False, [DELETE_A], ran.tools(), hooks, task={"goal": "the secret"})
    assert "secret" not in (tmp_path / "trace.jsonl").read_text()
    with pytest.raises(TraceError, match="rewrite requests"):
        composable_loop(ScriptedBackend([]), tools=ran.tools(), resume=tmp_path, verdict="approve")
    again, _ = go(False, [DONE], ran.tools(), hooks, resume=run, verdict="approve")
    assert (again.stop_reason, ran) == ("done", ["a"])
    assert "secret" not in (tmp_path / "trace.jsonl").read_text()


def test_requests_survive_json():
    request = ApprovalRequest(3, "delete", "really?", ("approve", "deny"), "call_3", {"path": "a"}, "ab", True)
    assert ApprovalRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_the_hook_says_what_the_run_waits_for(tmp_path):
    hook, ran = ApprovalHook(), Ran()
    run, _ = go(False, [DELETE_A], ran.tools(), [Gate(), hook], task={})
    assert hook.pending == run.pending[0]
    assert run.paused is not None
    again, _ = go(False, [DONE], ran.tools(), [Gate(), ApprovalHook()], resume=run, verdict=True)
    assert again.stop_reason == "done"


def test_every_setting_that_is_a_plain_value_goes_on_from_the_file():
    objects = {"redact", "generate_kwargs", "approval_handler", "compact_service", "cancel_token", "memory_sources"}
    assert {f.name for f in fields(LoopConfig)} - {f.name for f in fields(Settings)} == {*objects, "tool_metadata"}

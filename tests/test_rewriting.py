"""Hooks that may rewrite requests: a result waits for the request that shows it, before it reaches the file."""

import asyncio
import re
import shutil
from pathlib import Path

import pytest

from looplet import (
    ConfigError,
    ContextPressureHook,
    EvalContext,
    InjectContext,
    LoopConfig,
    ProvenanceSink,
    Summarize,
    ToolContext,
    Trace,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.telemetry.folder import write_folder
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from tests.support import both, timeless

ADDRESS = "eve@example.org"
CALLS = [("read", {"page": 1}), ("read", {"page": 2}), ("crash", {}), ("done", {"answer": "read"})]


@tool
def read(page: int, ctx: ToolContext) -> dict:
    """Read a page; the second holds an address."""
    ctx.warn("slow")
    return {"page": page, "mail": ADDRESS if page == 2 else "none"}


@tool
def crash() -> None:
    """Fail with an address."""
    raise RuntimeError(f"no such person: {ADDRESS}")


class Scrubs:
    """Rewrites only where there is something to rewrite."""

    def pre_prompt(self, state, log, ctx, step):
        return re.sub(r"[\w.]+@[\w.]+\w", "[mail]", ctx) if "@" in ctx else None


class SaysItScrubs(Scrubs):
    looplet_rewrites = True


class Adds:
    """Never rewrites, and does not say so."""

    def pre_prompt(self, state, log, ctx, step):
        return InjectContext(f"step {step}") if step % 2 else f"plain {step}"


class SaysItAdds(Adds):
    looplet_rewrites = False


def arguments(*hooks, is_async=False, calls=CALLS, **more):
    backend = AsyncScriptedBackend if is_async else ScriptedBackend
    tools = tools_from([read, crash], include_done=True)
    return {"llm": backend(calls), "task": {"goal": "read"}, "tools": tools, "hooks": list(hooks), **more}


def play(folder, *hooks, is_async=False, body=lambda step: None, **more):
    """Run to the end; `body` gets each step, when all that a killed run would have left is in the file."""
    given = arguments(*hooks, ProvenanceSink(folder), is_async=is_async, **more)
    run = (async_composable_loop if is_async else composable_loop)(**given)

    async def main():
        async with run:
            async for step in run:
                if body(step):
                    break

    if is_async:
        asyncio.run(main())
    else:
        with run:
            for step in run:
                if body(step):
                    break
    return run


def told_in(folder, words=ADDRESS):
    """Return the files below a folder that hold the words."""
    return [path.name for path in sorted(folder.rglob("*")) if path.is_file() and words in path.read_text()]


def as_if_killed(folder, to):
    """Return a folder with the file as it is now, rendered."""
    to.mkdir(parents=True)
    write_folder(Path(shutil.copy(folder / "trace.jsonl", to)))
    return to


modes = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@modes
@pytest.mark.parametrize("hook", [Scrubs, SaysItScrubs])
def test_a_hook_that_rewrites_only_now_and_then_leaves_no_address_on_disk_wherever_the_run_is_killed(
    hook, is_async, tmp_path
):
    kept = tmp_path / "kept"

    def killed(step):
        assert told_in(as_if_killed(tmp_path / "run", kept / str(step.number))) == []

    run = play(tmp_path / "run", hook(), is_async=is_async, body=killed)
    assert [step.tool_result.data for step in run.result.steps][1] == {"page": 2, "mail": ADDRESS}
    assert told_in(as_if_killed(tmp_path / "run", kept / "end")) == []
    saved = EvalContext.from_trace(tmp_path / "run").steps
    assert [saved[0].tool_result.data, saved[1].tool_result.data] == [
        {"page": 1, "mail": "none"}, {"page": 2, "mail": "[mail]"}
    ]  # fmt: skip
    assert saved[2].tool_result.error == "RuntimeError: no such person: [mail]"
    assert len(list((kept / "4" / "steps").glob("*.json"))) == 4


@pytest.mark.parametrize("ends", [None, 2, 3])
def test_of_a_hook_that_only_adds_the_file_tells_all_that_the_live_run_does(ends):
    outcome = both(
        lambda is_async: arguments(Adds(), is_async=is_async),
        None if ends is None else lambda step: step.number == ends,
    )
    assert [step.tool_result for step in outcome.saved.steps] == [step.tool_result for step in outcome.live.steps]
    assert outcome.saved.steps[0].tool_result.warnings == ("slow",)
    assert [timeless(step) for step in outcome.saved.steps] == outcome.steps


def test_a_limit_ends_the_run_of_a_hook_that_only_adds_with_its_last_result_told():
    outcome = both(lambda is_async: arguments(Adds(), is_async=is_async, config=LoopConfig(max_steps=2)))
    assert outcome.stop_reason == "budget_exhausted"
    assert outcome.saved.steps[1].tool_result.data == {"page": 2, "mail": ADDRESS}


@modes
def test_a_result_waits_for_one_request_and_no_longer(is_async, tmp_path):
    told = []

    def look(step):
        steps = EvalContext.from_trace(as_if_killed(tmp_path / "run", tmp_path / str(step.number))).steps
        told.append([bool(s.tool_result.warnings) for s in steps])

    play(tmp_path / "run", Adds(), is_async=is_async, body=look)
    assert told == [[False], [True, False], [True, True, False], [True, True, False, False]]


@modes
@pytest.mark.parametrize(
    ("hook", "more"),
    [(SaysItAdds, {}), (ContextPressureHook, {}), (Adds, {"context": "mine"})],
    ids=["says so", "ours", "with a context"],
)
def test_nothing_waits_where_nobody_can_rewrite(hook, more, is_async, tmp_path):
    def look(step):
        saved = EvalContext.from_trace(as_if_killed(tmp_path / "run", tmp_path / str(step.number))).steps
        assert saved[-1].tool_result == step.tool_result

    play(tmp_path / "run", hook(), is_async=is_async, body=look, **more)
    assert not [node for node in Trace.load(tmp_path / "run").spans if semconv.TOOL_WITHHELD in node.attributes]


@modes
def test_what_no_request_has_shown_is_not_told_where_a_hook_says_that_it_rewrites(is_async, tmp_path):
    run = play(tmp_path, SaysItScrubs(), is_async=is_async, body=lambda step: step.number == 2)
    assert run.stop_reason == "closed_by_caller"
    assert told_in(tmp_path) == []
    saved = EvalContext.from_trace(tmp_path)
    assert [step.tool_result.data for step in saved.steps] == [{"page": 1, "mail": "none"}, None]
    assert saved.task == {"goal": "read"}


def test_no_model_writes_a_summary_of_what_a_hook_that_says_it_rewrites_has_not_seen(tmp_path):
    class Asks(SaysItScrubs):
        def should_compact(self, state, log, conversation, step):
            return step == 3

    play(tmp_path, Asks(), config=LoopConfig(compact_service=Summarize(keep_recent=0)))
    (span,) = Trace.load(tmp_path).find(semconv.COMPACT)
    assert span.attributes[semconv.COMPACT_WARNINGS] == ["SummarizeCompact: no summary (LoopletError)"]
    assert told_in(tmp_path) == []


@modes
def test_a_hook_that_fails_at_rewriting_leaves_untold_what_it_could_not_rewrite(is_async, tmp_path):
    class Careless:
        def pre_prompt(self, state, log, ctx, step):
            if "@" in ctx:
                raise ValueError("what now?")

    with pytest.raises(ValueError, match="what now"):
        play(tmp_path, Careless(), is_async=is_async)
    assert told_in(tmp_path) == []
    assert len(EvalContext.from_trace(tmp_path).steps) == 2


@modes
def test_a_hook_that_says_it_never_rewrites_must_not(is_async, tmp_path):
    class Liar(Scrubs):
        looplet_rewrites = False

    with pytest.raises(
        ConfigError, match=r"Liar\.pre_prompt rewrote the request, but Liar says looplet_rewrites = False"
    ):
        play(tmp_path, Liar(), is_async=is_async)


def test_what_was_used_is_told_of_the_same_steps_when_results_are_told_later():
    class Asks:
        """Has a summary written before a request; that is used for the step after it."""

        def should_compact(self, state, log, conversation, step):
            return step == 3

    def make(is_async):
        config = LoopConfig(compact_service=Summarize(keep_recent=0))
        calls = [[("read", {"page": 1}), ("crash", {})], "a summary", ("read", {"page": 2}), ("done", {"answer": "x"})]
        return arguments(Adds(), Asks(), is_async=is_async, calls=calls, config=config)

    outcome = both(make)
    assert [step.usage for step in outcome.saved.steps] == [step.usage for step in outcome.live.steps]
    assert [step.prompt for step in outcome.saved.steps] == [step.prompt for step in outcome.live.steps]

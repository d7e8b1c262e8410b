"""What an adversary found in cancelling, withheld results and arguments, kept as tests."""

import asyncio
from decimal import Decimal

import pytest
from support import add, both

from looplet import (
    Budget,
    CancelToken,
    ConfigError,
    EvalContext,
    InjectContext,
    LoopConfig,
    ProvenanceSink,
    Summarize,
    async_composable_loop,
    composable_loop,
    tools_from,
)
from looplet.prices import Price
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

TOOLS = tools_from([add], include_done=True)
DONE = ("done", {"answer": "3"})
SECRET = "eve@example.org"
modes = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def play(script, *, is_async, **given):
    """Run a script to its end; return the run and the backend."""
    backend = (AsyncScriptedBackend if is_async else ScriptedBackend)(script)
    run = (async_composable_loop if is_async else composable_loop)(backend, {"goal": "add"}, TOOLS, **given)

    async def main():
        return [step async for step in run]

    asyncio.run(main()) if is_async else list(run)
    return run, backend


# --- cancelling -----------------------------------------------------------------------------------------------------


@modes
def test_a_run_that_is_cancelled_as_a_model_call_begins_does_not_make_it(is_async):
    token = CancelToken()

    def listen(event):
        if event.kind == "chat_start":
            token.cancel()

    run, backend = play([DONE], is_async=is_async, stream=listen, config=LoopConfig(cancel_token=token))
    assert (run.stop_reason, len(backend.requests), run.state.usage.total_tokens) == ("cancelled", 0, 0)


@modes
def test_one_token_for_many_runs_keeps_nothing_of_them(is_async):
    token = CancelToken()
    for _ in range(20):
        play([("add", {"a": 1, "b": 2}), DONE], is_async=is_async, config=LoopConfig(cancel_token=token))
    assert not token._callbacks
    assert not token._hung


# --- withheld results -----------------------------------------------------------------------------------------------


class Adds:
    """Never rewrites, and does not say so."""

    def pre_prompt(self, state, log, ctx, step):
        return InjectContext(f"step {step}")

    def should_compact(self, state, log, conversation, step):
        return step == 3


def test_a_run_that_is_cancelled_while_it_compacts_tells_its_last_result():
    def make(is_async):
        token, backend = CancelToken(), AsyncScriptedBackend if is_async else ScriptedBackend

        def listen(event):
            if event.kind == "chat_start" and event.purpose == "compaction":
                token.cancel()

        return {
            "llm": backend([("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4}), "a summary", DONE]),
            "task": {"goal": "add"},
            "tools": TOOLS,
            "hooks": [Adds()],
            "stream": listen,
            "config": LoopConfig(cancel_token=token, compact_service=Summarize(keep_recent=0)),
        }

    outcome = both(make)
    assert outcome.stop_reason == "cancelled"
    assert [step.tool_result.data for step in outcome.saved.steps] == [3, 7]


@modes
def test_notes_of_a_hook_are_not_in_the_file_of_a_run_whose_requests_are_rewritten(is_async, tmp_path):
    class Scrubs:
        looplet_rewrites = True

        def pre_prompt(self, state, log, ctx, step):
            return ctx.rewrite(lambda text: text.replace(SECRET, "[mail]"))

    class Notes:
        def post_dispatch(self, state, log, call, result, step):
            log.record(step, f"it is {SECRET}", call.tool, "", findings=[SECRET])

    run, _ = play(
        [("add", {"a": 1, "b": 2}), DONE], is_async=is_async, hooks=[Scrubs(), Notes(), ProvenanceSink(tmp_path)]
    )
    assert SECRET in run.session_log_text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]
    assert EvalContext.from_trace(tmp_path).session_log_text


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: LoopConfig(done_tools=(name for name in ["add"])),
            "done_tools must be a list of names, not generator",
        ),
        (lambda: LoopConfig(temperature=float("nan")), "temperature must be a number, not nan"),
        (lambda: LoopConfig(temperature=10**400), "temperature must be a number, not int"),
        (lambda: LoopConfig(temperature=Decimal("0.5")), "temperature must be a number, not Decimal"),
        (lambda: Budget(usd=10**400), "budget usd must be a number from 0, not int"),
        (lambda: Budget(seconds=float("inf")), "budget seconds must be a number from 0, not inf"),
        (lambda: Price(10**400, 1), "input_per_mtok must be a number of USD from 0, not int"),
    ],
)
def test_a_number_that_no_float_can_hold_and_names_that_can_be_read_once_are_refused(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)

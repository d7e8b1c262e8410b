"""Long runs and many runs, small enough for every day (`benchmarks/soak.py`, `benchmarks/concurrency.py`)."""

from __future__ import annotations

import asyncio
import copy
import gc
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import CountingProvider

from looplet import (
    AnthropicBackend,
    AsyncAnthropicBackend,
    AsyncOpenAIBackend,
    BackendRouter,
    Conversation,
    Message,
    OpenAIBackend,
    ProvenanceSink,
    PruneToolResults,
    Trace,
    Usage,
    async_composable_loop,
    composable_loop,
    tools_from,
)
from looplet.backends.resilient import ResilientBackend
from looplet.message_log import MessageLog
from looplet.telemetry import semconv
from looplet.telemetry.otlp_file import read_file
from looplet.testing import Answer, AnthropicServer, Fault, OpenAIServer

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("the benchmarks are tested in a checkout only", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import concurrency  # noqa: E402 - only where they are
import soak  # noqa: E402 - only where they are

sync_and_async = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


# --- a long run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def soaked(request, tmp_path_factory):
    """A run of 120 turns in which everything has gone wrong at least once, and how often its spans were ended."""
    provider = CountingProvider()
    done = soak.soak(120, tmp_path_factory.mktemp("soak"), is_async=request.param, tracer_provider=provider)
    return done, provider.ends


def test_a_long_run_in_which_everything_goes_wrong_ends_in_order_and_its_books_agree(soaked):
    done, ends = soaked
    assert list(soak.problems(done)) == []
    assert set(ends.values()) == {1}
    assert sorted(ends) == sorted(record.span_id for record in read_file(done.folder / "trace.jsonl").spans)
    assert_everything_went_wrong(done)


def assert_everything_went_wrong(done):
    """Require that the run was as bad as it should be: else it proves nothing."""
    trace = Trace.load(done.folder)
    kinds = ("rate_limited", "server_error", "overloaded", "cut", "malformed", "empty", "slow", "context_overflow")
    assert [kind for kind in kinds if not done.bill.faults.get(kind)] == []
    assert set(done.bill.asked) == {"agent", "helper", "compaction", "tool"}
    assert {node.attributes[semconv.COMPACT_REASON] for node in trace.find(semconv.COMPACT)} == {
        "threshold",
        "overflow",
    }
    events = Counter(event.name for node in trace.spans for event in node.events)
    assert events[semconv.EVENT_RETRY] > 5
    assert events[semconv.EVENT_TOOL_RETRY] > 1
    assert trace.find(attributes={semconv.TOOL_ABANDONED: True})
    assert len(trace.runs) == 5
    assert done.watch.events["tool_arguments_delta"] > 120


def test_books_that_do_not_agree_are_found(soaked):
    done, bill = soaked[0], copy.deepcopy(soaked[0].bill)
    bill.add(Usage(1, 0))
    (problem,) = soak.problems(replace(done, bill=bill))
    assert "the books do not agree (all)" in problem


# --- many runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares_sink", [False, True], ids=["a file each", "one file"])
def test_runs_at_the_same_time_keep_to_themselves(tmp_path, shares_sink):
    done = concurrency.crowd(60, tmp_path, shares_sink=shares_sink)
    assert list(concurrency.problems(done)) == []
    assert done.bill.requests == 60 * concurrency.TURNS
    assert len(list(tmp_path.rglob("trace*.jsonl"))) == (1 if shares_sink else 60)


def test_a_run_whose_messages_are_those_of_another_is_found(tmp_path):
    done = concurrency.crowd(2, tmp_path, shares_sink=True)
    one, other = done.runs
    one._scope.recorded_task, other._scope.recorded_task = other.task, one.task
    assert any("was sent" in problem for problem in concurrency.problems(done))


# --- what they have found -------------------------------------------------------------------------------------------


@sync_and_async
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_an_answer_without_a_choice_is_charged_for_as_the_provider_says(tmp_path, is_async, streams):
    nothing = Fault("empty", answer=Answer("", usage=Usage(700, 30)))
    done = Answer(tool_calls=[("done", {"answer": "x"})], usage=Usage(100, 10))
    with OpenAIServer(policy=[nothing, done]) as server:
        kind = AsyncOpenAIBackend if is_async else OpenAIBackend
        events = []
        router, run = one_run(kind(base_url=server.base_url, model="m"), tmp_path, events.append if streams else None)
    assert (run.result.usage.input_tokens, run.result.usage.output_tokens) == (800, 40)
    assert (router.total_input_tokens, router.total_output_tokens) == (800, 40)
    assert Trace.load(tmp_path).runs[0].usage == run.result.usage


@sync_and_async
def test_a_message_without_content_is_charged_for_as_the_provider_says(tmp_path, is_async):
    done = Answer(tool_calls=[("done", {"answer": "x"})], usage=Usage(100, 10))
    with AnthropicServer(policy=[Fault.empty(), done]) as server:
        kind = AsyncAnthropicBackend if is_async else AnthropicBackend
        router, run = one_run(kind(base_url=server.base_url, api_key="k", model="m"), tmp_path, None)
    (chat,) = Trace.load(tmp_path).find("chat *")
    (retry,) = (event for event in chat.events if event.name == semconv.EVENT_RETRY)
    charged = retry.attributes[semconv.INPUT_TOKENS]
    assert charged > 0
    assert router.total_input_tokens == run.result.usage.input_tokens == 100 + charged


def one_run(backend, folder, stream):
    """Make a run with retries; return its router and itself."""
    router = BackendRouter(ResilientBackend(backend, base_delay_s=0.001))
    is_async = hasattr(backend, "aclose")
    make = async_composable_loop if is_async else composable_loop
    run = make(router, {}, tools_from([], include_done=True), hooks=[ProvenanceSink(folder)], stream=stream)

    async def finish():
        async with backend:
            async for _ in run:
                pass

    if is_async:
        asyncio.run(finish())
    else:
        with backend:
            list(run)
    return router, run


def test_the_log_forgets_messages_that_are_asked_once_and_those_that_compaction_removed():
    log, mark = MessageLog(), "a text of which there is no other"
    talk = Conversation(Message.of_text("user", f"{mark} {number}") for number in range(4))
    log.request(talk.view(), unchanged=0, stable=4)
    talk.truncate(1)
    log.request(talk.view(), unchanged=0, stable=2)
    log.aside([Message.of_text("user", f"{mark} aside")])
    gc.collect()
    alive = [found.text for found in gc.get_objects() if type(found) is Message and mark in found.text]
    assert sorted(alive) == [f"{mark} 0", f"{mark} 3"]


def test_a_message_that_comes_back_after_it_was_forgotten_keeps_its_number():
    log, first, second = MessageLog(), Message.of_text("user", "first"), Message.of_text("user", "second")
    log.request([first, second], unchanged=0, stable=2)
    log.request([second], unchanged=0, stable=1)
    logged = log.request([first, second], unchanged=0, stable=2)
    assert (logged.refs, logged.new) == ("0-1", ())


class Untouchable:
    """A step that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError(f"looked at {name} of a step that is long gone")


@pytest.mark.parametrize("is_native", [True, False])
def test_pruning_looks_at_no_more_steps_than_there_are_results_in_the_conversation(is_native):
    def call(number):
        if is_native:
            part = {"type": "tool_call", "id": f"c{number}", "name": "look", "arguments": {}}
        else:
            part = {"type": "text", "content": "look, please"}
        return [Message("assistant", (part,)), Message.of_result(f"c{number}", "found " * 100)]

    talk = Conversation([Message.of_text("user", "task"), *call(1), *call(2), *call(3)])
    steps = [SimpleNamespace(tool_call=SimpleNamespace(call_id=f"c{n}", tool="look")) for n in (1, 2, 3)]
    state = SimpleNamespace(steps=[Untouchable(), *steps])
    outcome = PruneToolResults(keep_recent=1, compactable_tools=["look"]).compact(conversation=talk, state=state)
    assert outcome.compacted
    assert [message.parts[0]["response"][:5] for message in talk if message.role == "tool"] == [
        "[clea",
        "[clea",
        "found",
    ]

"""Which backend answers which purpose, and what all of them used."""

from __future__ import annotations

import asyncio
import threading

import pytest
from provider_support import HELLO
from support import both, make_tools

from looplet import BackendError, ConfigError, Reply, Usage, composable_loop, tool, tools_from
from looplet.backends.candidates import candidates
from looplet.backends.openai import OpenAIBackend
from looplet.backends.rate_limit import RateLimitedBackend
from looplet.backends.resilient import ResilientBackend
from looplet.backends.router import BackendRouter, Spent
from looplet.testing import Answer, AsyncScriptedBackend, MockLLMBackend, OpenAIServer, ScriptedBackend

SCRIPTED = (ScriptedBackend, AsyncScriptedBackend)
PURPOSES = ("agent", "compaction", "judge", "subagent", "tool", "something new")


def said(text="", calls=(), **usage):
    return Reply(text=text, tool_calls=calls, usage=Usage(**usage) if usage else None)


def leaves(llm, purpose):
    return [candidate.llm for candidate in candidates(llm, purpose)]


def counters(router):
    return (router.total_calls, router.total_input_tokens, router.total_output_tokens, router.total_cost_usd,
            router.unreported_calls, router.unpriced_calls)  # fmt: skip


# --- who is asked ---------------------------------------------------------------------------------------------------


def test_each_purpose_has_its_backend_and_the_rest_have_the_default():
    given = {name: ScriptedBackend([], model=name) for name in ("agent", "compaction", "judge", "subagent")}
    router = BackendRouter(default := ScriptedBackend([]), **given)
    assert [leaves(router, purpose) for purpose in PURPOSES] == [[given.get(purpose, default)] for purpose in PURPOSES]


def test_a_router_with_a_default_alone_asks_it_for_everything():
    default = ScriptedBackend([])
    assert [leaves(BackendRouter(default), purpose) for purpose in PURPOSES] == [[default]] * len(PURPOSES)


def test_by_hand_the_agents_backend_is_asked():
    router = BackendRouter(ScriptedBackend([], model="a"), agent=ScriptedBackend(["hello"], model="b"))
    assert (router.chat(HELLO).text, router.model) == ("hello", "b")


@pytest.mark.parametrize("purpose", ["agent", "compaction", "judge", "subagent"])
def test_sync_and_async_backends_do_not_mix(purpose):
    words = rf"{purpose} \(AsyncScriptedBackend\) is async and default \(ScriptedBackend\) is not"
    with pytest.raises(ConfigError, match=words):
        BackendRouter(ScriptedBackend([]), **{purpose: AsyncScriptedBackend([])})


@pytest.mark.parametrize(
    ("given", "words"), [(None, "default takes a backend"), (OpenAIBackend, "the class OpenAIBackend")]
)
def test_what_is_no_backend_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        BackendRouter(given)


# --- what is counted ------------------------------------------------------------------------------------------------


def test_nothing_was_used_before_the_first_call():
    router = BackendRouter(ScriptedBackend([]))
    assert counters(router) == (0, 0, 0, None, 0, 0)
    assert (router.by_model, router.by_purpose) == ({}, {})


def test_calls_are_counted_by_model_and_purpose():
    router = BackendRouter(ScriptedBackend([]))
    router.count("agent", "large", Usage(10, 5, cost_usd=0.5))
    router.count("agent", "large", None)
    router.count("judge", "small", Usage(3, 1))
    assert counters(router) == (3, 13, 6, 0.5, 1, 1)
    large, small = Spent(2, 1, 0, Usage(10, 5, cost_usd=0.5)), Spent(1, 0, 1, Usage(3, 1))
    assert router.by_model == {"large": large, "small": small}
    assert router.by_purpose == {"agent": large, "judge": small}


def test_a_backend_without_a_name_is_counted_as_such():
    router = BackendRouter(MockLLMBackend(["hello"]))
    router.inner.model = ""
    router.generate("hi")
    assert router.by_model == {"unnamed": Spent(1, 1)}


def test_a_call_without_usage_is_counted_apart_and_nothing_is_guessed():
    router = BackendRouter(ScriptedBackend([said("a"), said("b", input_tokens=10, output_tokens=2)]))
    router.chat(HELLO)
    router.chat(HELLO)
    assert counters(router) == (2, 10, 2, None, 1, 1)


def test_an_unknown_price_is_no_cost_and_a_known_one_is():
    router = BackendRouter(ScriptedBackend([said(input_tokens=10, cost_usd=0.25), said(input_tokens=10)]))
    router.chat(HELLO)
    assert (router.total_cost_usd, router.unpriced_calls) == (0.25, 0)
    router.chat(HELLO)
    assert (router.total_cost_usd, router.unpriced_calls) == (0.25, 1)


def test_a_call_by_hand_gets_the_list_price():
    class Listed(ScriptedBackend):
        base_url = "https://api.openai.com/v1"

    usage = Usage(1_000_000, 0)
    router = BackendRouter(Listed([Reply(usage=usage)], model="gpt-4o-mini"))
    router.chat(HELLO)
    assert router.total_cost_usd == pytest.approx(0.15)


def test_what_was_charged_for_a_failed_attempt_counts():
    cut = BackendError("cut", retryable=True, usage=Usage(7, 1))
    last = BackendError("cut", retryable=True, usage=Usage(1, 1))
    inner = ScriptedBackend([cut, "hello", cut, last])
    router = BackendRouter(ResilientBackend(inner, retries=1, base_delay_s=0))
    router.chat(HELLO)
    assert counters(router)[:3] == (1, 7, 1)
    with pytest.raises(BackendError):
        router.chat(HELLO)
    assert counters(router)[:3] == (2, 15, 3)


def test_text_by_hand_is_counted_where_the_backend_could_tell_the_usage():
    policy = [Answer("hello", usage=(12, 3))]
    with OpenAIServer(policy=policy) as server, OpenAIBackend(base_url=server.base_url, model="m") as llm:
        router = BackendRouter(llm)
        assert router.generate("hi") == "hello"
    assert counters(router)[:3] == (1, 12, 3)


def test_an_async_router_is_awaited():
    router = BackendRouter(AsyncScriptedBackend([said("hello", input_tokens=4)]))
    assert asyncio.run(router.chat(HELLO)).text == "hello"
    assert counters(router)[:2] == (1, 4)


def test_many_threads_lose_no_count():
    router = BackendRouter(ScriptedBackend([]))

    def count():
        for _ in range(500):
            router.count("agent", "m", Usage(1, 2))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters(router) == (2000, 2000, 4000, None, 0, 2000)
    assert router.by_model["m"].usage.total_tokens == 6000


def test_the_tables_are_copies():
    router = BackendRouter(ScriptedBackend([]))
    router.by_model["m"] = Spent(9)
    assert router.by_model == {}


def test_the_report_is_a_table():
    router = BackendRouter(ScriptedBackend([]))
    router.count("agent", "large", Usage(12_345, 678, cost_usd=0.0125))
    router.count("agent", "large", None)
    router.count("judge", "small", Usage(3, 1))
    assert router.report().splitlines() == [
        "               calls   input  output       cost",
        "purpose agent      2  12,345     678  $0.012500  1 without usage",
        "purpose judge      1       3       1    unknown  1 without price",
        "model large        2  12,345     678  $0.012500  1 without usage",
        "model small        1       3       1    unknown  1 without price",
        "total              3  12,348     679  $0.012500  1 without usage, 1 without price",
    ]


# --- nesting --------------------------------------------------------------------------------------------------------


def test_a_router_inside_a_resilient_backend_counts_its_calls():
    busy = BackendError("busy", retryable=True)
    router = BackendRouter(ScriptedBackend([busy, said("hello", input_tokens=4)]))
    assert ResilientBackend(router, base_delay_s=0).chat(HELLO).text == "hello"
    assert counters(router)[:2] == (1, 4)


def test_a_fallback_is_counted_by_the_router_around_it():
    first, second = ScriptedBackend([BackendError("no", kind="auth")], model="a"), ScriptedBackend(["hello"], model="b")
    router = BackendRouter(ResilientBackend(first, fallbacks=[second]))
    router.chat(HELLO)
    assert router.by_model == {"b": Spent(1, 1)}


def test_both_of_two_routers_count():
    inner = BackendRouter(ScriptedBackend([said("hello", input_tokens=4)]))
    outer = BackendRouter(RateLimitedBackend(inner, requests_per_minute=10))
    outer.chat(HELLO)
    assert [counters(router)[:2] for router in (inner, outer)] == [(1, 4), (1, 4)]


# --- in whole runs --------------------------------------------------------------------------------------------------


def test_a_run_counts_each_call_once_and_no_later_than_its_step():
    routers = []

    def make(is_async):
        replies = [
            Reply(tool_calls=ScriptedBackend([("add", {"a": 1, "b": 2})]).chat([]).tool_calls, usage=Usage(10, 5)),
            ("done", {"answer": "3"}),
        ]
        routers.append(BackendRouter(SCRIPTED[is_async](replies)))
        return {"llm": routers[-1], "task": {"goal": "g"}, "tools": make_tools()}

    seen = []
    outcome = both(make, lambda step: seen.append(routers[-1].total_input_tokens))
    assert seen == [10, 20, 10, 20]
    assert [counters(router)[:3] for router in routers] == [(2, 20, 10)] * 2
    assert sum(step.usage.input_tokens for step in outcome.steps) == 20


def test_a_run_over_the_text_protocol_counts_calls_without_usage():
    router = BackendRouter(MockLLMBackend())
    list(composable_loop(llm=router, task={"goal": "g"}, tools=make_tools()))
    assert counters(router) == (1, 0, 0, None, 1, 0)


def test_a_run_that_a_tool_starts_is_asked_of_the_subagents_backend():
    below = ScriptedBackend([("done", {"answer": "below"})], model="small")
    router = BackendRouter(
        ScriptedBackend([("delegate", {}), ("done", {"answer": "x"})], model="large"), subagent=below
    )

    @tool
    def delegate() -> str:
        """Have somebody else do it."""
        run = composable_loop(llm=router, task={"goal": "below"}, tools=tools_from([], include_done=True))
        return [step.tool_call.args["answer"] for step in run][-1]

    steps = list(composable_loop(llm=router, task={"goal": "g"}, tools=tools_from([delegate], include_done=True)))
    assert steps[0].tool_result.data == "below"
    assert {name: spent.calls for name, spent in router.by_purpose.items()} == {"agent": 2, "subagent": 1}
    assert {name: spent.calls for name, spent in router.by_model.items()} == {"large": 2, "small": 1}

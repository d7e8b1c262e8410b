"""What a call costs: a price of one's own, a provider's list, and the same number wherever it is told."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from datetime import date
from decimal import Decimal
from itertools import product

import pytest
from genai_prices import Usage as Tokens
from genai_prices import calc_price
from genai_prices.data_snapshot import DataSnapshot, get_snapshot, set_custom_snapshot
from genai_prices.types import (
    ClauseEquals,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    Provider,
    StartDateConstraint,
    Tier,
    TieredPrices,
)
from provider_support import HELLO, over_the_socket
from support import both, make_tools

from looplet import (
    AnthropicBackend,
    AsyncOpenAIBackend,
    BackendError,
    BackendRouter,
    Budget,
    ConfigError,
    ListPrice,
    LoopConfig,
    OpenAIBackend,
    Price,
    Reply,
    ResilientBackend,
    ToolCall,
    Usage,
    composable_loop,
    price_list,
)
from looplet.prices import priced
from looplet.telemetry import semconv
from looplet.testing import Answer, AsyncScriptedBackend, OpenAIServer, ScriptedBackend

OPENAI = "https://api.openai.com/v1"
MINI = Price(0.15, 0.60, cached_input_per_mtok=0.075)
SCRIPTED = (ScriptedBackend, AsyncScriptedBackend)


class Here:
    """A backend at an address, or with a price."""

    def __init__(self, base_url="", **more):
        self.base_url = base_url
        self.__dict__ |= more


def cost_of(usage, model="m", **backend):
    return priced(usage, model, Here(**backend)).cost_usd


# --- a price of one's own -------------------------------------------------------------------------------------------

MTOK = 1_000_000


@pytest.mark.parametrize(
    ("price", "usage", "cost"),
    [
        (Price(3, 15), Usage(MTOK, MTOK), 18.0),
        (Price(3, 15), Usage(MTOK, 0, cached_tokens=MTOK), 3.0),
        (Price(3, 15, 0.3), Usage(MTOK, 0, cached_tokens=MTOK), 0.3),
        (Price(3, 15, 0.3), Usage(MTOK, 0, cached_tokens=MTOK // 2), 1.65),
        (Price(3, 15, 0), Usage(MTOK, 0, cached_tokens=MTOK), 0.0),
        (Price(3, 15), Usage(MTOK, 0, cache_write_tokens=MTOK), 3.0),
        (Price(3, 15, 0.3, 3.75), Usage(MTOK, 0, cache_write_tokens=MTOK), 3.75),
        (Price(3, 15, 0.3, 3.75), Usage(MTOK, 0, MTOK // 4, cache_write_tokens=MTOK // 4), 2.5125),
        (Price(3, 15), Usage(0, MTOK, reasoning_tokens=MTOK - 1), 15.0),
        (Price(0, 0), Usage(MTOK, MTOK), 0.0),
        (Price(3, 15), Usage(10, 0, cached_tokens=11), None),
        (Price(3, 15), Usage(10, 0, cached_tokens=6, cache_write_tokens=5), None),
        (Price(3, 15), Usage(1, 1, cost_usd=0.5), 0.5),
    ],
)
def test_cached_and_reasoning_tokens_are_parts_of_input_and_output(price, usage, cost):
    assert cost_of(usage, price=price) == (None if cost is None else pytest.approx(cost, abs=1e-12))


def test_a_price_of_ones_own_beats_the_list_and_does_not_ask_for_the_models_name():
    usage = Usage(MTOK, 0)
    assert [cost_of(usage, name, base_url=OPENAI, price=Price(7, 7)) for name in ("gpt-4o", "?")] == [7.0, 7.0]


@pytest.mark.parametrize(
    ("wrong", "place"), [*product([-1, float("nan"), float("inf"), "3", True], range(4)), (None, 0), (None, 1)]
)
def test_what_is_no_price_is_refused(wrong, place):
    given = [1, 1, 1, 1]
    given[place] = wrong
    with pytest.raises(ConfigError, match=r"Price: \w+_per_mtok must be a number of USD from 0"):
        Price(*given)


@pytest.mark.parametrize("kind", [OpenAIBackend, AsyncOpenAIBackend, AnthropicBackend])
@pytest.mark.parametrize(("wrong", "said"), [(0.5, "0.5"), ("openai", "'openai'"), (Price, "the class Price")])
def test_a_backend_takes_no_other_price(kind, wrong, said):
    with pytest.raises(ConfigError, match=rf"price takes Price\(.*\), in USD, or ListPrice\(provider\), not {said}"):
        kind(api_key="sk", model="m", price=wrong)


def test_a_price_that_is_something_else_in_a_backend_of_ones_own_is_left_alone():
    assert cost_of(Usage(MTOK, 0), "gpt-4o", base_url=OPENAI, price="cheap") == pytest.approx(2.5)


# --- lists ----------------------------------------------------------------------------------------------------------


def test_a_proxy_may_charge_what_a_provider_does():
    usage, proxy = Usage(MTOK, 0, 0), "http://proxy.test/v1"
    asked = [ListPrice("openai"), ListPrice("openai", "gpt-4o"), ListPrice("anthropic", "claude-sonnet-4-5"), None]
    costs = [cost_of(usage, "gpt-4o-mini", base_url=proxy, price=price) for price in asked]
    assert costs == [pytest.approx(0.15), pytest.approx(2.5), pytest.approx(6.0), None]


@pytest.mark.parametrize("name", ["", "team-small", "gpt-4o-mini-but-ours" * 9])
def test_a_model_that_the_list_does_not_have_has_no_cost(name):
    assert cost_of(Usage(1, 1), name, price=ListPrice("anthropic")) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("opnai",), "no list of prices of 'opnai'; there are: .*openai"),
        (("openai", "our-own"), r"list of 'openai' has no model 'our-own'; say what it costs: Price\("),
        ((3,), "ListPrice: provider must be a str, not 3"),
        (("openai", None), "ListPrice: model must be a str"),
    ],
)
def test_a_list_that_does_not_exist_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        ListPrice(*given)


SIZES = (0, 1, 127_999, 128_000, 128_001, 200_000, 200_001, 272_001, 1_000_003)


def usages():
    """Yield usages around every step of a price, with every mix of parts."""
    for size, (read, written, thought) in zip(SIZES * 3, product((0, 2, 5), repeat=3), strict=True):
        parts = (size // read if read else 0, size // (written + 3) if written else 0)
        yield Usage(size, size // 3 + 7, parts[0], size // thought if thought > 2 else 0, None, parts[1])


def tokens_of(usage, hour):
    return Tokens(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        output_reasoning_tokens=usage.reasoning_tokens,
        cache_write_1h_tokens=hour,
    )


def asked_of_the_package(usage, hour, model, provider):
    try:
        return float(calc_price(tokens_of(usage, hour), model, provider_id=provider).total_price)
    except (LookupError, ValueError):
        return None


def differences(provider, models, some):
    for model in models:
        for usage, hour in some:
            told = price_list.cost_usd(usage, model, provider=provider, cache_write_1h_tokens=hour)
            if told != (right := asked_of_the_package(usage, hour, model, provider)):
                yield model, usage, hour, told, right


BIG = ("openai", "anthropic", "google", "azure", "groq", "deepseek", "mistral", "x-ai", "perplexity")


@pytest.mark.parametrize("provider", BIG)
def test_a_cost_is_what_the_package_says_for_every_model_and_on_both_sides_of_every_step(provider):
    (found,) = (p for p in get_snapshot().providers if p.id == provider)
    models = [model.id for model in found.models]
    some = [(usage, usage.cache_write_tokens // 2) for usage in usages()]
    assert list(differences(provider, models, some)) == []


def test_a_cost_is_what_the_package_says_at_every_other_provider():
    some = [(Usage(300_001, 12_345, 1000, 99, None, 500), 100), (Usage(10, 5), 0), (Usage(10, 5, 11), 0)]
    for found in get_snapshot().providers:
        assert list(differences(found.id, [model.id for model in found.models][:40], some)) == [], found.id


@contextmanager
def table_of(**models):
    """Have the package use a table with one provider, `https://api.list.test`, that has these models."""
    listed = Provider(id="listed", name="Listed", api_pattern=r"https://api\.list\.test", models=list(models.values()))
    set_custom_snapshot(DataSnapshot(providers=[listed], from_auto_update=False))
    try:
        yield lambda usage, model: cost_of(usage, model, base_url="https://api.list.test/v1")
    finally:
        set_custom_snapshot(None)


class Counting(ModelInfo):
    """A model that notes how often the package works a price out."""

    def calc_price(self, *args, **more):
        self.asked = getattr(self, "asked", 0) + 1
        return super().calc_price(*args, **more)


def model_of(prices, kind=Counting):
    return kind(id="m", match=ClauseEquals("m"), prices=prices)


def dollars(**prices):
    return ModelPrice(**{f"{name}_mtok": Decimal(price) for name, price in prices.items()})


def test_the_package_works_a_price_out_for_a_handful_of_calls_and_not_for_each():
    steps = TieredPrices(base=Decimal(1), tiers=[Tier(start=1000, price=Decimal(2))])
    model = model_of(ModelPrice(input_mtok=steps, output_mtok=Decimal(4)))
    with table_of(m=model) as cost:
        costs = {cost(Usage(size, 1), "m") for size in range(0, 2000, 5)}
    assert len(costs) == 400
    assert model.asked < 10


def test_a_price_that_a_card_cannot_hold_is_left_to_the_package():
    """A price per request, and one that sets a ceiling: what the next version of the package may think of."""

    class Capped(Counting):
        def calc_price(self, usage, provider, **more):
            told = super().calc_price(usage, provider, **more)
            told.total_price = min(told.total_price, Decimal("0.003"))
            return told

    per_request = ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(2), requests_kcount=Decimal(5))
    capped = model_of(dollars(input=1, output=2), Capped)
    with table_of(m=model_of(per_request)) as cost:
        assert [cost(Usage(n, 0), "m") for n in (0, MTOK)] == [pytest.approx(0.005), pytest.approx(1.005)]
    with table_of(m=capped) as cost:
        assert [cost(Usage(n, 0), "m") for n in (1000, MTOK)] == [pytest.approx(0.001), pytest.approx(0.003)]


def test_a_price_that_changes_with_time_and_a_table_that_is_updated_count_from_then_on():
    class Flag(StartDateConstraint):
        def active(self, moment):
            return self.start_date is not None

    flag = Flag(date(2020, 1, 1))
    dear = ConditionalPrice(constraint=flag, prices=dollars(input=8, output=1))
    told, usage = [], Usage(MTOK, 0)
    with table_of(m=model_of([ConditionalPrice(prices=dollars(input=2, output=1)), dear])) as cost:
        for flag.start_date in (None, date(2020, 1, 1), None):
            told += [cost(usage, "m"), cost(usage, "m")]
    with table_of(m=model_of(dollars(input=32, output=1))) as cost:
        told.append(cost(usage, "m"))
    with table_of() as cost:
        told.append(cost(usage, "m"))
    assert told == [2.0, 2.0, 8.0, 8.0, 2.0, 2.0, 32.0, None]


def test_a_server_that_makes_up_a_new_name_each_time_fills_no_memory():
    with table_of(m=model_of(dollars(input=2, output=1))) as cost:
        assert {cost(Usage(MTOK, 0), f"made-up-{n}") for n in range(3000)} == {None}
        assert cost(Usage(MTOK, 0), "m") == 2.0
        assert len(price_list._Table.now().known) <= 1001


def test_a_package_that_fails_costs_the_price_and_not_the_run_and_is_logged_once(caplog):
    class Broken(ModelInfo):
        def calc_price(self, *args, **more):
            raise RuntimeError("the table is torn")

    with table_of(m=model_of(dollars(input=1, output=1), Broken)) as cost, caplog.at_level(logging.WARNING, "looplet"):
        assert [cost(Usage(1, n), "m") for n in range(3)] == [None] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "looplet: genai-prices could not say what a call costs (RuntimeError: the table is torn); "
        "such calls count as unpriced"
    ]


# --- the same number everywhere -------------------------------------------------------------------------------------

ADD = ToolCall("add", {"a": 1, "b": 2})
DONE = ToolCall("done", {"answer": "3"})
SPENT = Usage(1_000_000, 100_000, 400_000, 50_000)
COST = 0.6 * 0.15 + 0.4 * 0.075 + 0.1 * 0.6


def told_everywhere(outcome, router):
    (root,) = outcome.trace.roots
    chats = [chat.attributes.get(semconv.COST_USD) for chat in outcome.trace.find("chat *")]
    return {
        "spans": chats,
        "steps": [step.usage.cost_usd for step in outcome.steps],
        "run": root.attributes.get(semconv.RUN_COST_USD),
        "router": (router.total_cost_usd, router.unpriced_calls),
    }


def answers():
    for number, call in enumerate((ADD, DONE)):
        yield Answer(tool_calls=[(call.tool, call.args)], usage=SPENT, model=f"alias-{number}")


@pytest.mark.parametrize("stream", [None, lambda event: None], ids=["whole", "streamed"])
def test_a_price_is_the_same_on_span_step_run_router_and_budget(stream):
    routers = []
    with ExitStack() as stack:
        make = over_the_socket(
            stack, OpenAIServer, (OpenAIBackend, AsyncOpenAIBackend), lambda request: [*answers()][request.number],
            [], backend={"price": MINI}, stream=stream,
        )  # fmt: skip

        def routed(*, is_async):
            given = make(is_async)
            routers.append(BackendRouter(given["llm"]))
            return {**given, "llm": routers[-1], "config": LoopConfig(budget=Budget(usd=1))}

        outcome = both(routed)
    for router in routers:
        told = told_everywhere(outcome, router)
        assert told["spans"] == told["steps"] == [pytest.approx(COST)] * 2
        assert told["run"] == router.total_cost_usd == pytest.approx(2 * COST)
        assert router.unpriced_calls == 0


def making(replies, price, given):
    def make(*, is_async):
        llm = SCRIPTED[is_async](replies)
        llm.price = price
        return {"llm": ResilientBackend(llm, retries=1, base_delay_s=0), "tools": make_tools(), **given}

    return make


@pytest.mark.parametrize(
    ("price", "usd", "stop", "warned"),
    [
        (Price(1, 1), 1.0, "budget_exhausted", False),
        (Price(1, 1), 5.0, "done", False),
        (Price(0, 0), 0.01, "done", False),
        (None, 0.01, "done", True),
    ],
)
def test_a_budget_in_usd_counts_what_has_a_price(price, usd, stop, warned, caplog):
    replies = [Reply(tool_calls=(call,), usage=Usage(MTOK, 0)) for call in (ADD, DONE)]
    given = {"task": {}, "config": LoopConfig(budget=Budget(usd=usd))}
    with caplog.at_level(logging.WARNING, "looplet"):
        outcome = both(making(replies, price, given))
    assert outcome.stop_reason == stop
    assert ("say what they cost (price= of the backend), or limit model_calls as well" in caplog.text) == warned


def test_a_free_model_costs_0_and_not_nothing():
    llm = ScriptedBackend([Reply(tool_calls=(DONE,), usage=Usage(5, 5))])
    llm.price = Price(0, 0)
    router = BackendRouter(llm)
    run = composable_loop(router, {}, make_tools())
    assert [step.usage.cost_usd for step in run] == [0.0]
    assert (router.total_cost_usd, router.unpriced_calls, run.result.usage.cost_usd) == (0.0, 0, 0.0)


def test_failed_attempts_that_were_charged_cost_what_others_do():
    failed = BackendError("cut", kind="stream_cut", retryable=True, usage=Usage(2 * MTOK, 0))
    replies = [failed, Reply(tool_calls=(DONE,), usage=Usage(MTOK, 0))]
    outcome = both(making(replies, Price(1, 1), {"task": {}}))
    (chat,) = outcome.trace.find("chat *")
    assert [event.attributes[semconv.COST_USD] for event in chat.events if event.name == semconv.EVENT_RETRY] == [2.0]
    assert chat.attributes[semconv.COST_USD] == outcome.steps[0].usage.cost_usd == 3.0


def test_by_hand_a_router_counts_the_same():
    failed = BackendError("cut", kind="stream_cut", retryable=True, usage=Usage(2 * MTOK, 0))
    llm = ScriptedBackend([failed, Reply("hi", usage=Usage(MTOK, 0))])
    llm.price = Price(1, 1)
    router = BackendRouter(ResilientBackend(llm, retries=1, base_delay_s=0))
    router.chat(HELLO)
    assert (router.total_cost_usd, router.total_calls, router.unpriced_calls) == (3.0, 1, 0)

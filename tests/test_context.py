"""Context budgets and the hooks that act on them."""

import pytest

from looplet import ConfigError, Conversation, LoopConfig, Message, Reply, ToolCall, Usage, tool, tools_from
from looplet.compaction import SUMMARY_PROMPT, Truncate
from looplet.context import ContextBudget, ContextPressureHook, ThresholdCompactHook
from looplet.telemetry import semconv
from tests.support import both


def of_tokens(tokens):
    """Return a conversation that the provider has counted."""
    talk = Conversation([Message.of_text("user", "x" * 40)])
    talk.calibrate(tokens)
    return talk


def test_a_budget_tells_how_full_a_window_is():
    budget = ContextBudget()
    tokens = [0, 119_999, 120_000, 159_999, 160_000, 186_999, 187_000, 10**9]
    tiers = ["ok", "ok", "warning", "warning", "error", "error", "blocking", "blocking"]
    assert [budget.classify(n) for n in tokens] == tiers
    assert budget.blocking_at == 187_000


def test_a_budget_of_another_window_has_the_same_proportions():
    assert ContextBudget.of_window(200_000) == ContextBudget()
    assert ContextBudget.of_window(8_000) == ContextBudget(8_000, 4_800, 6_400, 520)


@pytest.mark.parametrize(
    "values",
    [
        {"context_window": 8_000},
        {"warning_at": 170_000},
        {"error_at": 190_000},
        {"warning_at": 0},
        {"compact_buffer": 0},
    ],
    ids=str,
)
def test_a_budget_whose_limits_make_no_sense_says_what_does(values):
    with pytest.raises(ConfigError, match=r"ContextBudget.of_window\(\d+\) has proportions that fit"):
        ContextBudget(**values)


@pytest.mark.parametrize(("tier", "fires"), [("warning", [2, 3, 4]), ("error", [3, 4]), ("blocking", [4])])
def test_the_threshold_hook_fires_at_its_tier_and_above(tier, fires):
    hook = ThresholdCompactHook(ContextBudget(), fire_tier=tier)
    sizes = [1_000, 130_000, 170_000, 190_000]
    answers = [hook.should_compact(None, None, of_tokens(n), step) for step, n in enumerate(sizes, 1)]
    assert hook.fired_at == fires
    assert [step for step, said in enumerate(answers, 1) if said] == fires


def test_mistakes_in_the_threshold_hook_are_named():
    with pytest.raises(ConfigError, match="did you mean 'warning'"):
        ThresholdCompactHook(ContextBudget(), fire_tier="warn")
    with pytest.raises(ConfigError, match="takes a ContextBudget, not int"):
        ThresholdCompactHook(200_000)


# --- in a run ---------------------------------------------------------------------------------------------------------


@tool
def fetch(n: int) -> str:
    """Fetch something long."""
    return f"page {n}: " + "x" * 800


class Reader:
    """A model that fetches twelve pages; it counts four characters as a token."""

    provider = "looplet.testing"
    model = "reader"

    def __init__(self):
        self.tokens: list[int] = []
        self.notes: list[str] = []
        self.summaries = 0

    def chat(self, messages, *, system_prompt="", tools=None, max_tokens=None, temperature=None):
        if system_prompt == SUMMARY_PROMPT:
            self.summaries += 1
            return Reply(text="so far, so good", usage=Usage(100, 4))
        chars = sum(len(str(part)) for message in messages for part in message.parts)
        self.tokens.append(chars // 4)
        self.notes.append(messages[-1].text if "context window" in messages[-1].text else "")
        number = len(self.tokens)
        call = ToolCall("fetch", {"n": number}) if number <= 12 else ToolCall("done", {"answer": "ok"})
        return Reply(tool_calls=(call,), usage=Usage(chars // 4, 5))


class AsyncReader(Reader):
    async def chat(self, messages, **settings):
        return super().chat(messages, **settings)


def reading(hook, **config):
    made = []

    def make(is_async):
        made.append((AsyncReader if is_async else Reader)())
        return {
            "llm": made[-1],
            "task": {"goal": "read all pages"},
            "tools": tools_from([fetch], include_done=True),
            "hooks": [hook()],
            "config": LoopConfig(max_steps=40, **config),
        }

    outcome = both(make)
    assert outcome.stop_reason == "done"
    spans = [node for node in outcome.trace.spans if node.name == semconv.COMPACT]
    return made[0], spans


def test_the_threshold_hook_has_the_service_of_the_run_compact():
    hook = lambda: ThresholdCompactHook(ContextBudget.of_window(2_000))  # noqa: E731
    model, spans = reading(hook, compact_service=Truncate())
    assert max(model.tokens) < 1_900
    assert [span.attributes[semconv.COMPACT_REASON] for span in spans] == ["ThresholdCompactHook"] * len(spans)
    assert spans
    assert all(span.attributes[semconv.COMPACT_COMPACTED] for span in spans)


def test_the_pressure_hook_tells_the_model_and_keeps_the_window_free():
    model, spans = reading(lambda: ContextPressureHook(context_window=3_000))
    assert max(model.tokens) < 2_700
    assert spans
    said = [note for note in model.notes if note]
    assert "of the 3,000 tokens of your context window are in use" in said[0]
    assert not any(model.notes[:4])
    assert model.summaries == 0


def test_the_pressure_hook_with_a_model_has_a_summary_written():
    model, spans = reading(lambda: ContextPressureHook("any", context_window=3_000))
    stages = [stage for span in spans for stage in span.attributes.get(semconv.COMPACT_STAGES, ())]
    assert model.summaries == stages.count("SummarizeCompact") > 0


def test_the_pressure_hook_leaves_the_service_of_the_run_in_charge():
    _, spans = reading(lambda: ContextPressureHook("any", context_window=3_000), compact_service=Truncate())
    assert {span.attributes[semconv.COMPACT_SERVICE] for span in spans} == {"TruncateCompact"}


def test_the_pressure_hook_is_silent_where_it_cannot_know():
    assert ContextPressureHook().pre_prompt(object(), None, None, 1) is None


@pytest.mark.parametrize("per_byte", [0.5, 0.2, 0.1])
def test_another_model_in_the_middle_of_a_run_makes_no_estimate_absurd(per_byte):
    talk = Conversation([Message.of_text("user", "x" * 40_000)])
    talk.calibrate(10_000)
    talk.append(Message.of_text("assistant", "x" * 4_000))
    now = round(per_byte * 44_000)
    talk.calibrate(now)  # a fallback with another tokenizer answered
    assert talk.tokens == pytest.approx(now, rel=0.01)
    talk.replace([Message.of_text("user", "x" * 11_000)])
    assert now / 4.1 <= talk.tokens < now
    talk.calibrate(round(per_byte * 11_000))
    assert talk.tokens == pytest.approx(per_byte * 11_000, rel=0.01)


@pytest.mark.parametrize("reported", [0, -5, 10, 10**12])
def test_a_report_of_nonsense_or_of_what_was_not_cached_leaves_an_estimate(reported):
    talk = Conversation([Message.of_text("user", "x" * 40_000)])
    for _ in range(3):
        talk.calibrate(reported)
        talk.append(Message.of_text("assistant", "x" * 4_000))
        assert talk.tokens >= 10_000

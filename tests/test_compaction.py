"""Compaction: the conversation gets shorter, and nothing that must stay is lost."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplet import (
    Block,
    ConfigError,
    ContextOverflow,
    Conversation,
    LoopConfig,
    Message,
    Reply,
    ToolCall,
    Usage,
    tool,
    tools_from,
)
from looplet.compaction import (
    CLEARED,
    OVERFLOW,
    SUMMARY_PROMPT,
    AsyncChain,
    ClipToolResults,
    CompactOutcome,
    Prune,
    PruneToolResults,
    Summarize,
    SummarizeCompact,
    Truncate,
    TruncateCompact,
    check_service,
    compact_chain,
)
from looplet.telemetry import semconv
from looplet.telemetry.runs import runs_of
from looplet.testing import AsyncMockLLMBackend, AsyncScriptedBackend, MockLLMBackend, ScriptedBackend
from looplet.tokens import size_of
from looplet.turns import SUMMARY, answers, is_summary
from tests.support import both, run_async, run_sync


class Writer:
    """A model that writes summaries: it quotes an earlier one, and is asked with `generate`."""

    def __init__(self, text="noted"):
        self.text = text
        self.prompts = []

    def generate(self, prompt, *, system_prompt, max_tokens):
        self.prompts.append(prompt)
        if isinstance(self.text, Exception):
            raise self.text
        return self.text


class AsyncWriter(Writer):
    async def generate(self, prompt, **how):
        await asyncio.sleep(0)
        return super().generate(prompt, **how)


class ChatWriter:
    """A backend without `generate`."""

    def chat(self, messages, *, tools, system_prompt, max_tokens, temperature):
        return Reply(text=f"{len(messages)} message, {max_tokens} tokens")


def user(text):
    return Message.of_text("user", text)


def turn(number, size=400, tool="look"):
    """Return a reply with a call, and its result."""
    call = {"type": "tool_call", "id": f"c{number}", "name": tool, "arguments": {"n": number}}
    reply = Message("assistant", ({"type": "text", "content": f"thought {number}"}, call))
    return [reply, Message.of_result(f"c{number}", {"n": number, "text": "x" * size})]


def conversation(turns, size=400):
    return Conversation([user("goal: the task"), *(m for n in range(turns) for m in turn(n, size))])


def compact(service, talk, llm=None, reason="test", state=None):
    return service.compact(state=state, session_log=None, llm=llm, conversation=talk, step_num=1, reason=reason)


def responses(talk):
    return [m.parts[0]["response"] for m in talk if m.role == "tool"]


# --- what holds for every service, whatever the conversation ----------------------------------------------------------

SERVICES = {
    "prune": lambda: Prune(keep_recent=1),
    "prune_one_tool": lambda: Prune(keep_recent=0, compactable_tools=["look"]),
    "truncate": lambda: Truncate(keep_recent=1),
    "truncate_all": lambda: Truncate(keep_recent=0),
    "clip": lambda: ClipToolResults(200),
    "summarize": Summarize,
    "summarize_all": lambda: Summarize(keep_recent=0),
    "chain": lambda: compact_chain(Prune(keep_recent=1), Summarize, Truncate(keep_recent=0)),
    "whole_chain": lambda: compact_chain(Prune, Truncate, ClipToolResults, target_tokens=0),
}
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.integers(0, 2_000), st.integers(1, 3)),
        st.tuples(st.just("user"), st.integers(0, 500), st.just(0)),
        st.tuples(st.just("say"), st.integers(0, 500), st.just(0)),
        st.tuples(st.just("system"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("late"), st.integers(0, 900), st.just(0)),
    ),
    max_size=14,
)


def built(moves):
    """Return a conversation that a run may come to have, and some that it had better not."""
    talk = Conversation([user("goal: the task")])
    for number, (move, size, calls) in enumerate(moves):
        if move == "user":
            talk.append(user("u" * size))
        elif move == "say":
            talk.append(Message.of_text("assistant", "s" * size))
        elif move == "system":
            talk.append(Message.of_text("system", "rule " * size))
        else:
            ids = [f"c{number}_{n}" for n in range(max(1, calls))]
            parts = [
                {"type": "tool_call", "id": i, "name": ("look", "dig")[n % 2], "arguments": {}}
                for n, i in enumerate(ids)
            ]
            talk.append(Message("assistant", tuple(parts)))
            if move == "late":  # somebody said something before the result came
                talk.append(Message.of_text("assistant", "meanwhile"))
            for i in ids:
                talk.append(Message.of_result(i, "r" * size))
    return talk


def called(messages):
    return [part["id"] for m in messages for part in m.parts if part["type"] == "tool_call"]


def answered(messages):
    return [part["id"] for m in messages for part in m.parts if part["type"] == "tool_call_response"]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(MOVES, st.sampled_from(sorted(SERVICES)), st.sampled_from(["test", OVERFLOW]), st.integers(1, 900))
def test_nothing_that_must_stay_is_lost_and_the_request_is_smaller(moves, name, reason, summary_chars):
    service, talk, llm = SERVICES[name](), built(moves), Writer("w" * summary_chars)
    before, tokens = list(talk), talk.tokens
    outcome = compact(service, talk, llm, reason)
    after = list(talk)

    assert any(m is before[0] for m in after), "the task"
    assert [m for m in before if m.role == "system"] == [m for m in after if m.role == "system"]
    assert called(after) == answered(after), "pairs"
    kept = [m for m in after if any(m is old for old in before)]
    assert kept == [m for m in before if any(m is new for new in after)], "order"
    new = [m for m in after if not any(m is old for old in before)]
    assert all(m.role == "tool" or is_summary(m) for m in new)
    if outcome is None:
        assert after == before
    else:
        assert (outcome.tokens_before, outcome.tokens_after) == (tokens, talk.tokens)
        assert (outcome.messages_before, outcome.messages_after) == (len(before), len(after))
        assert outcome.compacted == (talk.tokens < tokens)
        assert outcome.compacted or after == before

    again = compact(service, talk, llm, reason)
    assert again is None or again.tokens_after <= again.tokens_before
    assert talk.tokens <= tokens
    assert sum(map(is_summary, talk)) <= 1


@settings(derandomize=True, max_examples=60, deadline=None)
@given(MOVES, st.integers(0, 4))
def test_the_same_service_finds_nothing_to_do_a_second_time(moves, keep):
    for service in (Prune(keep), Truncate(keep), ClipToolResults(150 * keep)):
        talk = built(moves)
        compact(service, talk, reason=OVERFLOW)
        edited = list(talk)
        assert compact(service, talk, reason=OVERFLOW) is None
        assert list(talk) == edited


# --- each service ----------------------------------------------------------------------------------------------------


def test_pruning_clears_old_results_and_keeps_the_recent_ones():
    talk = conversation(8)
    outcome = compact(PruneToolResults(), talk)
    assert responses(talk)[:3] == [CLEARED] * 3
    assert [r["n"] for r in responses(talk)[3:]] == [3, 4, 5, 6, 7]
    assert outcome.compacted
    assert outcome.stages == ("PruneToolResults",)
    assert outcome.messages_before == outcome.messages_after == len(talk)


def test_pruning_touches_only_the_tools_it_may():
    messages = [user("t"), *turn(0, tool="look"), *turn(1, tool="dig"), *turn(2, tool="look")]
    talk = Conversation([*messages, Message.of_text("assistant", "hm")])
    compact(Prune(keep_recent=0, compactable_tools=["dig"]), talk)
    assert [r == CLEARED for r in responses(talk)] == [False, True, False]
    assert [a is b for a, b in zip(talk, messages, strict=False)].count(False) == 1


def test_pruning_leaves_what_the_model_has_not_read_yet():
    calls = tuple({"type": "tool_call", "id": f"p{n}", "name": "look", "arguments": {}} for n in range(8))
    talk = conversation(3)
    talk.append(Message("assistant", calls))
    for n in range(8):
        talk.append(Message.of_result(f"p{n}", "y" * 500))
    compact(Prune(), talk, reason=OVERFLOW)
    assert [r == CLEARED for r in responses(talk)] == [True] * 3 + [False] * 8


def test_pruning_leaves_results_that_are_shorter_than_the_marker():
    talk = conversation(9, size=2)
    assert compact(Prune(cleared_marker="[" + "cleared" * 30 + "]"), talk, reason=OVERFLOW) is None


def test_short_results_stay_among_long_ones_that_are_cleared():
    talk = Conversation([user("t"), *turn(0, 900), Message.of_result("c0", "ok"), *turn(1, 900), *turn(2, 1)])
    compact(Prune(keep_recent=1), talk)
    assert responses(talk)[:3] == [CLEARED, "ok", CLEARED]


def test_an_edit_that_saves_little_is_not_made_because_it_costs_the_prompt_cache():
    talk = Conversation([user("t"), *turn(0, 300), *turn(1, 40_000)])
    assert compact(Prune(keep_recent=1), talk) is None
    assert compact(Prune(keep_recent=1), talk, reason=OVERFLOW).compacted


def test_truncation_keeps_the_task_and_whole_turns():
    talk = conversation(6)
    outcome = compact(TruncateCompact(), talk)
    assert [m.role for m in talk] == ["user", "assistant", "tool", "assistant", "tool"]
    assert called(talk) == ["c4", "c5"]
    assert outcome.stages == ("TruncateCompact",)


def test_the_marked_task_stays_where_another_conversation_stands_before_it():
    talk = conversation(3)
    talk.task = user("goal: the second task")
    talk.append(talk.task)
    for message in [m for n in range(3, 7) for m in turn(n)]:
        talk.append(message)
    compact(Truncate(keep_recent=1), talk)
    assert [m.text for m in talk if m.role == "user"] == ["goal: the second task"]


def test_what_the_user_said_last_is_recent_whatever_is_kept():
    talk = conversation(4)
    talk.append(user("by the way: hurry"))
    compact(Truncate(keep_recent=0), talk)
    assert [m.text for m in talk] == ["goal: the task", "by the way: hurry"]


def test_clipping_cuts_recent_results_too():
    talk = Conversation([user("t"), *turn(0, 50_000)])
    outcome = compact(ClipToolResults(1_000), talk, reason=OVERFLOW)
    assert outcome.tokens_after < 500
    assert responses(talk)[0]["n"] == 0


def test_a_summary_takes_the_place_of_the_old_turns_after_the_task():
    talk, llm = conversation(6), Writer("c0 to c3 looked fine")
    recent = list(talk)[-4:]
    outcome = compact(SummarizeCompact(), talk, llm)
    assert [m.text for m in list(talk)[:2]] == ["goal: the task", f"{SUMMARY}\nc0 to c3 looked fine"]
    assert list(talk)[2:] == recent
    assert (outcome.summary, outcome.stages, outcome.warnings) == ("c0 to c3 looked fine", ("SummarizeCompact",), ())
    (prompt,) = llm.prompts
    assert "goal: the task" in prompt
    assert '"n":3' in prompt
    assert '"n":4' not in prompt


def test_an_earlier_summary_is_folded_into_the_next():
    talk = conversation(6)
    compact(Summarize(), talk, Writer("first findings"))
    for message in [m for n in range(6, 12) for m in turn(n)]:
        talk.append(message)
    llm = Writer("first and second findings")
    outcome = compact(Summarize(), talk, llm)
    assert "first findings" in llm.prompts[0]
    assert [m.text for m in talk if is_summary(m)] == [f"{SUMMARY}\nfirst and second findings"]
    assert outcome.compacted


def test_nothing_is_asked_when_only_a_summary_could_be_summarised():
    talk, llm = conversation(6), Writer()
    compact(Summarize(), talk, llm)
    assert compact(Summarize(), talk, llm, OVERFLOW) is None
    assert len(llm.prompts) == 1


def test_truncation_keeps_an_earlier_summary():
    talk = conversation(6)
    compact(Summarize(), talk, Writer("findings"))
    for message in [m for n in range(6, 12) for m in turn(n)]:
        talk.append(message)
    compact(Truncate(), talk)
    assert [m.text for m in talk if m.role == "user"] == ["goal: the task", f"{SUMMARY}\nfindings"]


@pytest.mark.parametrize("said", [ConnectionError("down"), "", "  \n", None, 7], ids=repr)
def test_a_model_that_fails_leaves_a_truncated_conversation_and_a_warning(said):
    talk = conversation(6)
    outcome = compact(Summarize(), talk, Writer(said))
    assert outcome.compacted
    assert called(talk) == ["c4", "c5"]
    assert outcome.stages == ("TruncateCompact",)
    assert outcome.warnings[0].startswith("SummarizeCompact: no summary (")
    assert outcome.summary == ""


def test_without_a_model_there_is_no_summary():
    talk = conversation(6)
    assert compact(Summarize(), talk, None).warnings == ("SummarizeCompact: no summary (LoopletError)",)


def test_a_summary_that_is_no_shorter_is_not_used():
    talk = conversation(4, size=10)
    before = list(talk)
    outcome = compact(Summarize(), talk, Writer("long " * 500))
    assert list(talk) == before
    assert not outcome.compacted
    assert outcome.warnings == ("SummarizeCompact: the summary was no shorter",)


def test_a_summary_has_limits():
    talk = conversation(30)
    compact(Summarize(summary_max_chars=50), talk, Writer("s" * 900))
    (summary,) = [m for m in talk if is_summary(m)]
    assert summary.text == f"{SUMMARY}\n{'s' * 50}..."


def test_a_backend_with_chat_alone_is_asked_too():
    talk = conversation(6)
    assert compact(Summarize(summary_max_tokens=77), talk, ChatWriter()).summary == "1 message, 77 tokens"


def test_long_results_are_clipped_before_they_are_summarised():
    talk, llm = conversation(6, size=60_000), Writer()
    compact(Summarize(), talk, llm)
    assert len(llm.prompts[0]) < 4 * 3_000


def test_with_a_model_to_await_the_outcome_is_awaited():
    sync, other = conversation(6), conversation(6)
    outcome = compact(Summarize(), sync, Writer("the same"))
    assert asyncio.run(compact(Summarize(), other, AsyncWriter("the same"))) == outcome
    assert list(sync) == list(other)
    failed = asyncio.run(compact(Summarize(), conversation(6), AsyncWriter(ConnectionError("down"))))
    assert failed.warnings == ("SummarizeCompact: no summary (ConnectionError)",)


# --- chains -----------------------------------------------------------------------------------------------------------


class Broken:
    def compact(self, **given):
        raise RuntimeError("kaput")


class Silent:
    """A service of the user's that edits and says nothing."""

    def compact(self, *, conversation, **given):
        conversation.truncate(2)


class Elsewhere:
    """A service of the user's that awaits."""

    async def compact(self, *, conversation, llm, **given):
        await asyncio.sleep(0)
        conversation.truncate(6)


def test_a_chain_stops_when_its_target_is_met():
    talk = conversation(20, size=2_000)
    outcome = compact(compact_chain(Prune, Truncate), talk)
    assert outcome.stages == ("PruneToolResults",)
    assert outcome.tokens_after <= outcome.tokens_before / 2


def test_later_stages_run_when_the_earlier_ones_were_not_enough():
    talk = conversation(7)
    outcome = compact(compact_chain(Prune, Summarize, Truncate), talk, Writer("short"))
    assert outcome.stages == ("PruneToolResults", "SummarizeCompact")
    assert outcome.summary == "short"
    assert called(talk) == ["c5", "c6"]


def test_a_target_of_one_s_own_decides_how_far_a_chain_goes():
    all_of_it = compact(compact_chain(Prune, Truncate, target_tokens=0), conversation(20))
    assert all_of_it.stages == ("PruneToolResults", "TruncateCompact")
    assert compact(compact_chain(Prune, Truncate, target_tokens=10**6), conversation(20)) is None


def test_a_stage_that_raises_gives_way_to_the_next():
    outcome = compact(compact_chain(Broken, Truncate), conversation(6))
    assert outcome.stages == ("TruncateCompact",)
    assert outcome.warnings == ("Broken: RuntimeError",)


def test_a_chain_of_which_nothing_works_raises_what_went_wrong():
    with pytest.raises(RuntimeError, match="kaput"):
        compact(compact_chain(Broken, Truncate), conversation(1))


def test_a_stage_that_says_nothing_is_measured():
    outcome = compact(compact_chain(Silent, Truncate), conversation(20))
    assert outcome.stages == ("Silent",)
    assert outcome.compacted


def test_a_chain_with_an_async_stage_is_async():
    chain = compact_chain(Elsewhere, Summarize, target_tokens=0)
    assert isinstance(chain, AsyncChain)
    talk = conversation(20)
    outcome = asyncio.run(compact(chain, talk, AsyncWriter("so far so good")))
    assert outcome.stages == ("Elsewhere", "SummarizeCompact")
    assert asyncio.run(compact(compact_chain(Elsewhere), conversation(1))) is None


def test_chains_nest():
    inner = compact_chain(Prune, Truncate)
    assert compact(compact_chain(inner, Truncate(0), target_tokens=0), conversation(9)).stages == (
        "PruneToolResults", "TruncateCompact", "TruncateCompact"
    )  # fmt: skip


def test_an_outcome_tells_itself():
    outcome = CompactOutcome("threshold", 9, 3, 1_000, 200, "s", ("A",), ("B: slow",))
    assert outcome.to_dict() == {
        "reason": "threshold", "messages_before": 9, "messages_after": 3, "tokens_before": 1_000, "tokens_after": 200,
        "summary": "s", "stages": ["A"], "warnings": ["B: slow"], "compacted": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Prune(keep_recent=-1), "keep_recent must be a whole number from 0, not -1"),
        (lambda: Truncate(keep_recent=True), "keep_recent"),
        (lambda: Summarize(summary_max_tokens=1.5), "summary_max_tokens"),
        (compact_chain, "compact_chain needs stages"),
        (lambda: compact_chain(Prune, object()), "object is no compaction service"),
        (lambda: compact_chain(Prune, target_tokens=-5), "target_tokens"),
        (lambda: check_service(Prune), r"write PruneToolResults\(\)"),
    ],
)
def test_mistakes_say_what_to_write_instead(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_results_are_paired_with_the_nearest_call_of_their_id():
    found = list(answers([*turn(1), *turn(1)]))
    assert [(a.at, a.call_at, a.tool) for a in found] == [(1, 0, "look"), (3, 2, "look")]


# --- in a run ---------------------------------------------------------------------------------------------------------


class Window:
    """A model with a window: it counts tokens, refuses what is too long, and summarises when it is asked to."""

    provider = "looplet.testing"
    model = "window"

    def __init__(self, turns, limit=10**9, result=800):
        self.turns = turns
        self.limit = limit
        self.result = result
        self.sent: list[list[Message]] = []
        """the agent's requests"""
        self.tokens: list[int] = []
        self.summaries = 0

    def chat(self, messages, *, system_prompt="", tools=None, max_tokens=None, temperature=None):
        tokens = 200 + sum(map(size_of, messages)) // 3
        if tokens > self.limit:
            raise ContextOverflow(f"{tokens} tokens, the window has {self.limit}")
        if system_prompt == SUMMARY_PROMPT:
            self.summaries += 1
            return Reply(text=f"summary {self.summaries}", usage=Usage(tokens, 7))
        self.sent.append(list(messages))
        self.tokens.append(tokens)
        number = len(self.tokens)
        call = ("fetch", {"n": number, "chars": self.result}) if number <= self.turns else ("done", {"answer": "ok"})
        return Reply(tool_calls=(ToolCall(*call),), usage=Usage(tokens, 5))


class AsyncWindow(Window):
    async def chat(self, messages, **settings):
        return super().chat(messages, **settings)


@tool
def fetch(n: int, chars: int) -> str:
    """Fetch something long."""
    return f"page {n}: " + "x" * chars


def window_run(*, turns=12, limit=10**9, result=800, hooks=(), **config):
    """Return a maker of runs for `both`, and the backends that it made."""
    made = []

    def make(is_async):
        made.append((AsyncWindow if is_async else Window)(turns, limit, result))
        return {
            "llm": made[-1],
            "task": {"goal": "read all pages"},
            "tools": tools_from([fetch], include_done=True),
            "hooks": [hook() for hook in hooks],
            "config": LoopConfig(max_steps=40, system_prompt="Read.", **config),
        }

    return make, made


def compactions(outcome):
    return [node for node in outcome.trace.spans if node.name == semconv.COMPACT]


def told(node):
    return {
        name.removeprefix("looplet.compact."): value
        for name, value in node.attributes.items()
        if name.startswith("looplet.compact.") and "tokens" not in name
    }


def test_a_run_compacts_by_itself_before_its_window_is_full():
    make, made = window_run(limit=3_000, context_window=3_000, compact_service=compact_chain(Prune(2), Truncate))
    outcome = both(make)
    assert outcome.stop_reason == "done"
    assert max(made[0].tokens) < 3_000
    first = compactions(outcome)[0]
    assert told(first) == {
        "reason": "threshold",
        "service": "Chain",
        "compacted": True,
        "messages.before": first.attributes[semconv.COMPACT_MESSAGES_BEFORE],
        "messages.after": first.attributes[semconv.COMPACT_MESSAGES_BEFORE],
        "stages": ["PruneToolResults"],
    }
    assert first.parent.name == semconv.PRE_PROMPT
    assert made[0].sent == made[1].sent


def test_the_estimate_is_what_the_provider_counts_next():
    estimates = []

    class Watch:
        def should_compact(self, state, session_log, conversation, step_num):
            estimates.append(conversation.tokens)
            return False

    make, made = window_run(turns=12, hooks=[Watch])
    both(make)
    for estimate, counted in zip(estimates[7:13], made[0].tokens[7:], strict=True):
        assert estimate == pytest.approx(counted, rel=0.02)


def test_a_summary_is_a_recorded_and_counted_model_call_of_the_run():
    make, made = window_run(context_window=3_000, compact_service=Summarize())
    outcome = both(make)
    spans = compactions(outcome)
    assert made[0].summaries == len(spans) > 0
    for span in spans:
        (chat,) = span.children
        assert chat.name == "chat window"
        assert chat.attributes[semconv.CHAT_PURPOSE] == "compaction"
    spent = sum(node.attributes[semconv.OUTPUT_TOKENS] for node in outcome.trace.spans if node.name == "chat window")
    assert spent == 13 * 5 + 7 * len(spans)
    (root,) = outcome.trace.roots
    assert root.attributes[semconv.RUN_OUTPUT_TOKENS] == spent
    texts = [m.text for m in made[0].sent[-1]]
    assert [t for t in texts if t.startswith(SUMMARY)] == [f"{SUMMARY}\nsummary {len(spans)}"]


def test_every_request_can_be_read_back_from_the_trace_of_a_run_that_compacts(tmp_path):
    make, made = window_run(context_window=3_000, compact_service=compact_chain(Prune(2), Summarize, target_tokens=900))
    for run_it, number in ((run_sync, 0), (run_async, 1)):
        outcome = run_it(make, tmp_path / str(number))
        (view,) = runs_of(outcome.trace)
        asked = [chat for chat in view.chats if semconv.CHAT_PURPOSE not in chat.attributes]
        assert len(asked) < len(view.chats)
        assert [view.request(chat) for chat in asked] == [
            [Message.of_text("system", "Read."), *sent] for sent in made[number].sent
        ]


class Asks:
    """Asks for compaction before some steps."""

    def __init__(self, *steps):
        self.steps = steps

    def should_compact(self, state, session_log, conversation, step_num):
        return step_num in self.steps


def test_a_hook_asks_for_compaction_and_the_service_may_be_a_hook():
    make, made = window_run(hooks=[lambda: Asks(8, 11), lambda: compact_chain(Prune, Summarize, Truncate)])
    outcome = both(make)
    assert [told(span)["reason"] for span in compactions(outcome)] == ["Asks", "Asks"]
    assert made[0].tokens[7] < made[0].tokens[6] / 1.5


def test_without_a_service_a_hook_gets_pruning_and_truncation():
    make, made = window_run(hooks=[lambda: Asks(12)])
    (span,) = compactions(both(make))
    assert set(told(span)["stages"]) <= {"PruneToolResults", "TruncateCompact"}
    assert made[0].tokens[11] < made[0].tokens[10]


@pytest.mark.parametrize(
    "service", [Prune(), Truncate(), compact_chain(Prune, Truncate)], ids=["prune", "truncate", "chain"]
)
def test_the_next_request_is_smaller_whatever_the_service(service):
    make, plain = window_run(result=2_500)
    both(make)
    make, made = window_run(result=2_500, hooks=[lambda: Asks(8, 12)], compact_service=service)
    both(make)
    assert made[0].tokens[:7] == plain[0].tokens[:7]
    assert made[0].tokens[7] < 0.8 * plain[0].tokens[7]
    assert made[0].tokens[11] < 0.6 * plain[0].tokens[11]


def test_a_request_that_is_too_long_is_made_shorter_and_sent_again():
    make, _ = window_run(turns=8, limit=2_400)
    outcome = both(make)
    assert outcome.stop_reason == "done"
    reasons = {told(span)["reason"] for span in compactions(outcome)}
    assert reasons == {OVERFLOW}
    assert not [step for step in outcome.steps if step.tool_call.tool.startswith("__")]


def test_one_result_that_is_larger_than_the_window_is_clipped():
    make, _ = window_run(turns=2, limit=6_000, result=28_000)
    outcome = both(make)
    assert outcome.stop_reason == "done"
    assert "ClipToolResults" in told(compactions(outcome)[0])["stages"]


def test_a_request_that_stays_too_long_ends_the_run_with_words():
    make, _ = window_run(turns=3, limit=150)
    outcome = both(make)
    assert outcome.stop_reason == "llm_error"
    assert "compaction could not make the conversation shorter" in outcome.steps[-1].tool_result.error


def test_on_overflow_the_service_of_the_run_comes_first_and_its_failure_is_not_the_end():
    make, _ = window_run(turns=8, limit=2_400, compact_service=compact_chain(Broken))
    outcome = both(make)
    assert outcome.stop_reason == "done"
    assert told(compactions(outcome)[0])["warnings"] == ["Chain: RuntimeError"]


def test_a_service_that_raises_is_an_error_of_its_span_and_the_run_goes_on():
    make, _ = window_run(turns=9, hooks=[lambda: Asks(5)], compact_service=Broken())
    outcome = both(make)
    (span,) = compactions(outcome)
    assert (span.attributes[semconv.ERROR_TYPE], told(span)["compacted"]) == ("RuntimeError", False)
    assert outcome.stop_reason == "done"


def test_a_model_that_cannot_summarise_costs_only_the_summary():
    class Refuses:
        def compact(self, *, llm, **given):
            return Summarize().compact(llm=Writer(ConnectionError("down")), **given)

    make, _ = window_run(hooks=[lambda: Asks(9)], compact_service=Refuses())
    outcome = both(make)
    (span,) = compactions(outcome)
    assert told(span)["warnings"] == ["SummarizeCompact: no summary (ConnectionError)"]
    assert told(span)["compacted"]
    assert outcome.stop_reason == "done"


def test_an_async_service_awaits_the_model():
    class Own:
        async def compact(self, *, conversation, llm, **given):
            text = await llm.generate("in short?", system_prompt=SUMMARY_PROMPT)
            conversation.replace([*conversation[:1], Message.of_text("user", text)])

    make, made = window_run(hooks=[lambda: Asks(6)], compact_service=Own())
    (span,) = compactions(both(make))
    assert [child.name for child in span.children] == ["chat window"]
    assert [m.text for m in made[0].sent[5]] == ["goal: read all pages", "summary 1"]


def test_a_hook_may_replace_the_service_for_the_turns_to_come():
    class Switch(Asks):
        def post_dispatch(self, state, session_log, tool_call, tool_result, step_num):
            if step_num == 8:
                state.compact_service = Truncate()

    make, _ = window_run(hooks=[lambda: Switch(8, 12)], compact_service=Prune())
    assert [told(span)["service"] for span in compactions(both(make))] == ["PruneToolResults", "TruncateCompact"]


def test_events_tell_of_compaction_and_may_refuse_it():
    heard = []

    class Listener:
        def on_event(self, payload):
            if payload.event == "post_compact":
                heard.append((payload.extra["reason"], payload.messages_before, payload.messages_after))
            if payload.event == "pre_compact" and payload.step_num > 8:
                return Block("not now")
            return None

    make, _ = window_run(hooks=[lambda: Asks(8, 12), Listener], compact_service=Truncate())
    first, second = compactions(both(make))
    assert (told(first)["compacted"], told(second)["compacted"]) == (True, False)
    assert heard[:2] == [("Asks", 15, 5), ("Asks", 13, 13)]


@pytest.mark.parametrize("run_it", [run_sync, run_async])
def test_what_a_rewriting_hook_hides_is_not_shown_to_the_model_that_summarises(run_it, tmp_path):
    class Redact:
        def pre_prompt(self, state, session_log, ctx, step_num):
            return ctx.rewrite(lambda text: text.replace("page", "****"))

    make, made = window_run(hooks=[Redact, lambda: Asks(9)], compact_service=Summarize())
    outcome = run_it(make, tmp_path)
    (span,) = compactions(outcome)
    assert made[0].summaries == 0
    assert told(span)["warnings"] == ["SummarizeCompact: no summary (LoopletError)"]
    assert outcome.stop_reason == "done"


def test_redaction_reaches_what_is_summarised():
    make, made = window_run(
        context_window=3_000, compact_service=Summarize(), redact=lambda t: t.replace("page", "****")
    )
    outcome = both(make)
    assert made[0].summaries > 0
    assert "page 1" not in "".join(str(node.attributes) for node in outcome.trace.spans)


def test_the_task_of_the_run_stays_in_a_conversation_that_goes_on():
    earlier = [Message.of_text("user", "goal: an earlier task"), *turn(100), *turn(101)]
    make, made = window_run(hooks=[lambda: Asks(9)], compact_service=Truncate())

    def continued(is_async):
        return {**make(is_async), "conversation": Conversation(earlier)}

    both(continued)
    assert [m.text for m in made[0].sent[8] if m.role == "user"] == ["goal: read all pages"]


def test_text_protocol_runs_compact_too():
    def reply(n):
        return f'{{"tool": "fetch", "args": {{"n": {n}, "chars": 900}}, "reasoning": "r"}}'

    def make(is_async):
        backend = AsyncMockLLMBackend if is_async else MockLLMBackend
        return {
            "llm": backend([*map(reply, range(12)), '{"tool": "done", "args": {"answer": "ok"}}'], cycle=False),
            "task": {"goal": "read"},
            "tools": tools_from([fetch], include_done=True),
            "hooks": [Asks(9)],
            "config": LoopConfig(compact_service=Prune(keep_recent=2, compactable_tools=["fetch"])),
        }

    (span,) = compactions(both(make))
    assert told(span)["stages"] == ["PruneToolResults"]


def test_a_context_window_alone_is_kept_by_clearing_and_dropping():
    @tool
    def read(page: int) -> str:
        """Read a page."""
        return f"page {page}: " + "words " * 400

    def make(is_async):
        calls = [("read", {"page": n}) for n in range(12)]
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([*calls, ("done", {"answer": "ok"})])
        tools = tools_from([read], include_done=True)
        return {"llm": backend, "task": {"goal": "read"}, "tools": tools, "config": LoopConfig(context_window=4_000)}

    outcome = both(make)
    assert outcome.stop_reason == "done"
    assert outcome.trace.find(semconv.COMPACT)[0].attributes[semconv.COMPACT_COMPACTED] is True

"""Compaction where things go wrong: services that do harm, summaries that must not lose things, runs that pause."""

import asyncio
import re
from types import SimpleNamespace

import pytest

from looplet import (
    ApprovalHook,
    ContextOverflow,
    Conversation,
    EvalContext,
    HookDecision,
    LoopConfig,
    Message,
    ProvenanceSink,
    Trace,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.compaction import (
    CLEARED,
    OVERFLOW,
    ClipToolResults,
    Prune,
    Summarize,
    Truncate,
    compact_chain,
)
from looplet.parts import is_blob
from looplet.telemetry import semconv
from looplet.telemetry.runs import runs_of
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from looplet.turns import is_summary
from tests.support import both
from tests.test_compaction import (
    Asks,
    AsyncWriter,
    Writer,
    called,
    compact,
    compactions,
    conversation,
    told,
    turn,
    window_run,
)

# --- what a summary in a chain is written from ------------------------------------------------------------------------


def numbered(turns):
    """Return a conversation in which each result has words of its own."""
    talk = Conversation([Message.of_text("user", "goal: the task")])
    for n in range(turns):
        reply, _ = turn(n)
        talk.append(reply)
        talk.append(Message.of_result(f"c{n}", f"finding-{n} " + "x" * 400))
    return talk


def findings(text):
    return {int(n) for n in re.findall(r"finding-(\d+)", text)}


STAGES = {
    "prune": lambda: compact_chain(Prune, Summarize, Truncate, target_tokens=0),
    "clip": lambda: compact_chain(ClipToolResults(0), Summarize, target_tokens=0),
    "truncate": lambda: compact_chain(Truncate(6), Summarize, target_tokens=0),
    "nested": lambda: compact_chain(compact_chain(Prune, Truncate(4), target_tokens=0), Summarize, target_tokens=0),
    "nested summary": lambda: compact_chain(
        Prune, compact_chain(Prune(1), Summarize, target_tokens=0), target_tokens=0
    ),
}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("writer", [Writer, AsyncWriter])
def test_a_summary_in_a_chain_is_written_from_the_conversation_as_it_was_before_the_chain(stages, writer):
    talk, llm = numbered(10), writer("noted")
    outcome = compact(STAGES[stages](), talk, llm)
    outcome = asyncio.run(outcome) if asyncio.iscoroutine(outcome) else outcome
    assert findings(llm.prompts[0]) == set(range(8))
    assert CLEARED not in llm.prompts[0]
    assert outcome.summary == "noted"
    assert sum(map(is_summary, talk)) == 1
    assert called(talk) == ["c8", "c9"]


def test_a_chain_that_meets_its_target_by_clearing_asks_for_no_summary():
    talk, llm = conversation(20, size=2_000), Writer()
    outcome = compact(compact_chain(Prune, Summarize, Truncate), talk, llm)
    assert (outcome.stages, llm.prompts) == (("PruneToolResults",), [])


def test_what_stays_after_a_chain_is_as_the_earlier_stages_left_it():
    talk = numbered(10)
    kept = list(talk)[-4:]
    compact(compact_chain(Prune(1), Summarize, target_tokens=0), talk, Writer("noted"))
    assert [m is old for m, old in zip(list(talk)[-4:], kept, strict=True)] == [True, False, True, True]
    assert list(talk)[-3].parts[0]["response"] == CLEARED


class Narrow(Writer):
    """A model that summarises only what is short."""

    def generate(self, prompt, **how):
        if len(prompt) > 3_000:
            self.prompts.append("too long")
            raise ContextOverflow("too long")
        return super().generate(prompt, **how)


class AsyncNarrow(Narrow):
    async def generate(self, prompt, **how):
        await asyncio.sleep(0)
        return super().generate(prompt, **how)


@pytest.mark.parametrize("writer", [Narrow, AsyncNarrow])
def test_where_the_whole_is_too_long_for_the_model_the_summary_is_of_what_the_earlier_stages_left(writer):
    talk, llm = numbered(10), writer("noted")
    outcome = compact(compact_chain(Prune, Summarize, target_tokens=0), talk, llm)
    outcome = asyncio.run(outcome) if asyncio.iscoroutine(outcome) else outcome
    assert (outcome.summary, outcome.warnings) == ("noted", ())
    assert llm.prompts[0] == "too long"
    assert findings(llm.prompts[1]) == {5, 6, 7}


def test_a_model_that_finds_even_that_too_long_costs_the_summary_only():
    talk, llm = numbered(10), Writer(ContextOverflow("too long"))
    outcome = compact(compact_chain(Prune, Summarize, target_tokens=0), talk, llm)
    assert outcome.warnings == ("SummarizeCompact: no summary (ContextOverflow)",)
    assert len(llm.prompts) == 2
    assert called(talk) == ["c8", "c9"]


def test_a_stage_of_the_user_s_own_gets_the_messages_before_the_chain_if_it_asks():
    seen = []

    class Keeps:
        def compact(self, *, conversation, before, **given):
            seen.append((len(conversation), len(before)))

    class Plain:
        def compact(self, *, state, session_log, llm, conversation, step_num, reason):
            seen.append(len(conversation))

    compact(compact_chain(Truncate, Keeps, Plain, target_tokens=0), conversation(10))
    assert seen == [(5, 21), 5]


def test_what_a_redactor_took_out_is_in_no_summary_prompt():
    make, made = window_run(
        context_window=3_000,
        compact_service=compact_chain(Prune(1), Summarize, target_tokens=500),
        redact=lambda text: text.replace("page", "****"),
    )
    outcome = both(make)
    assert made[0].summaries > 0
    assert "page 1" not in "".join(str(node.attributes) for node in outcome.trace.spans)


def test_each_request_of_a_run_whose_chain_clears_and_summarises_can_be_read_back():
    make, made = window_run(
        context_window=3_000, compact_service=compact_chain(Prune(1), Summarize, Truncate, target_tokens=700)
    )
    outcome = both(make)
    (view,) = runs_of(outcome.trace)
    asked = [chat for chat in view.chats if semconv.CHAT_PURPOSE not in chat.attributes]
    assert [view.request(chat) for chat in asked] == [
        [Message.of_text("system", "Read."), *sent] for sent in made[0].sent
    ]
    assert {"PruneToolResults", "SummarizeCompact"} <= {
        s for span in compactions(outcome) for s in told(span)["stages"]
    }


# --- services that do harm --------------------------------------------------------------------------------------------


def edits(change):
    """Return a service that puts `change(messages)` into the conversation."""

    def edit(self, *, conversation, **given):
        conversation.replace(change(list(conversation)))

    return type("Own", (), {"compact": edit})


def and_raises(self, *, conversation, **given):
    conversation.replace([])
    raise RuntimeError("kaput")


async def returns_junk(self, **given):
    return 7


HARMFUL = {
    "empties it": (edits(lambda messages: []), "left no message of the user"),
    "drops the task": (edits(lambda messages: messages[1:]), "left no message of the user"),
    "splits a pair": (edits(lambda messages: [messages[0], *messages[2:]]), "parted the tool call 'call_1' from its"),
    "drops a result": (edits(lambda messages: messages[:-1]), "from its result"),
    "reverses it": (edits(lambda messages: messages[::-1]), "from its result"),
    "makes it longer": (edits(lambda messages: [*messages, *messages[:1] * 99]), "made the conversation longer"),
    "puts in what is no message": (edits(lambda messages: ["hello"]), ""),
    "empties it and raises": (type("Own", (), {"compact": and_raises}), "kaput"),
    "returns junk": (type("Own", (), {"compact": lambda self, **given: "shorter now"}), "returned str"),
    "returns junk later": (type("Own", (), {"compact": returns_junk}), "returned int"),
    "is no service": (SimpleNamespace, ""),
}


def with_own(service, **more):
    """Return a maker of runs in which a hook puts the service into the state, as users do."""

    class Puts(Asks):
        def pre_loop(self, state, session_log, context):
            state.compact_service = service()

    return window_run(turns=8, hooks=[lambda: Puts(5)], **more)


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_service_that_does_harm_leaves_the_conversation_as_it_was_and_its_span_says_why(harm):
    service, words = HARMFUL[harm]
    make, made = with_own(service)
    outcome = both(make)
    assert outcome.stop_reason == "done"
    (span,) = compactions(outcome)
    assert span.is_error
    assert words in span.record.status_message
    assert told(span)["compacted"] is False
    make, plain = window_run(turns=8)
    both(make)
    assert made[0].sent == plain[0].sent


@pytest.mark.parametrize("harm", sorted(HARMFUL.keys() - {"is no service"}))
def test_where_a_request_was_too_long_the_others_do_what_the_harmful_service_did_not(harm):
    make, _ = with_own(HARMFUL[harm][0], limit=2_400)
    outcome = both(make)
    assert outcome.stop_reason == "done"
    last = compactions(outcome)[-1]
    assert told(last)["warnings"][0].startswith("Own: ")
    assert told(last)["compacted"] is True


def test_a_service_with_its_own_summary_instead_of_the_task_is_no_harm():
    own = edits(lambda messages: [Message.of_text("user", "go on reading"), *messages[-2:]])
    make, made = with_own(own)
    (span,) = compactions(both(make))
    assert told(span)["compacted"] is True
    assert made[0].sent[4][0].text == "go on reading"


def test_a_redacted_conversation_that_is_put_back_is_not_redacted_again():
    times = []

    def redact(text):
        times.append(text)
        return text.replace("page", "p-page")  # not the same when it is done twice

    make, made = with_own(HARMFUL["empties it"][0], redact=redact)
    outcome = both(make)
    assert "p-p-page" not in str(made[0].sent)
    assert made[0].sent[-1][0] is made[0].sent[0][0], "the task's message is the same object"
    assert outcome.stop_reason == "done"


def test_what_a_hook_adds_before_a_compaction_is_not_taken_for_the_service_s_doing():
    class Notes:
        def on_event(self, payload):
            if payload.event == "pre_compact":
                payload.state.conversation.append(Message.of_text("user", "remember " + "m" * 4_000))

    make, made = window_run(turns=8, hooks=[lambda: Asks(2), Notes], compact_service=Prune())
    outcome = both(make)
    assert not compactions(outcome)[0].is_error
    assert any(m.text.startswith("remember") for m in made[0].sent[1])


# --- conversations that are special -----------------------------------------------------------------------------------

PIXELS = {"type": "blob", "mime_type": "image/png", "modality": "image", "content": "0000" * 1_000}
assert is_blob(PIXELS)
SEALED = {"type": "reasoning", "content": "let me think " * 30, "signature": "s" * 200}
HIDDEN = {"type": "reasoning", "content": "", "encrypted": "e" * 200}


def thoughtful(turns):
    """Return turns with thoughts, two parallel calls each, and a picture among the results."""
    talk = Conversation([Message.of_text("user", "goal: look")])
    for n in range(turns):
        calls = [{"type": "tool_call", "id": f"c{n}{x}", "name": "look", "arguments": {}} for x in "ab"]
        talk.append(Message("assistant", (SEALED, HIDDEN, *calls)))
        talk.append(Message.of_result(f"c{n}a", {"picture": PIXELS, "text": "t" * 900}))
        talk.append(Message.of_result(f"c{n}b", "done"))
    return talk


@pytest.mark.parametrize(
    "service",
    [
        Prune,
        Truncate,
        Summarize,
        lambda: ClipToolResults(200),
        lambda: compact_chain(Prune(1), Summarize, Truncate, target_tokens=0),
    ],
    ids=["prune", "truncate", "summarize", "clip", "chain"],
)
def test_thoughts_pictures_and_parallel_calls_stay_whole(service):
    talk, llm = thoughtful(8), Writer("seen")
    before = list(talk)
    assert compact(service(), talk, llm, OVERFLOW).compacted
    replies = [m for m in talk if m.role == "assistant"]
    assert all(any(m is old for old in before) for m in replies), "a sealed thought is the same or gone"
    assert called(talk) == [part["id"] for m in talk for part in m.parts if part["type"] == "tool_call_response"]
    assert "0000" not in "".join(llm.prompts)


@tool(concurrent_safe=True)
def dig(n: int) -> str:
    """Dig."""
    return f"stone {n} " + "x" * 800


@tool
def send(to: str) -> str:
    """Send it off; a human has to agree."""
    return f"sent to {to}"


class Gate:
    def pre_dispatch(self, state, log, call, step):
        return HookDecision(permission="ask") if call.tool == "send" else None


def digging(llm, folder, *, is_async, **more):
    hooks = [Gate(), ApprovalHook(), Asks(5, 6, 7), ProvenanceSink(folder)]
    config = LoopConfig(compact_service=compact_chain(Prune(1), Summarize, Truncate(1), target_tokens=0))
    given = {"tools": tools_from([dig, send], include_done=True), "hooks": hooks, "config": config, **more}
    backend = (AsyncScriptedBackend if is_async else ScriptedBackend)(llm)
    run = (async_composable_loop if is_async else composable_loop)(backend, **given)

    async def main():
        return [step async for step in run]

    return run, asyncio.run(main()) if is_async else list(run)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("from_file", [False, True], ids=["live", "file"])
def test_a_run_that_was_compacted_pauses_and_goes_on_and_is_compacted_again(is_async, from_file, tmp_path):
    batch = [[("dig", {"n": n}), ("dig", {"n": n + 1})] for n in (0, 2)]
    first = [*batch, "a summary", [("dig", {"n": 4}), ("send", {"to": "ann"})]]
    run, steps = digging(first, tmp_path, is_async=is_async, task={"goal": "dig"})
    assert (run.stop_reason, len(steps)) == ("waiting_for_approval", 5)
    script = [("dig", {"n": 5}), "another summary", ("done", {"answer": "dug"})]
    more = {"resume": tmp_path if from_file else run, "verdict": "approve"}
    run, steps = digging(script, tmp_path, is_async=is_async, **more)
    assert (run.stop_reason, [step.number for step in steps]) == ("done", [6, 7, 8])
    trace = Trace.load(tmp_path)
    spans = trace.find(semconv.COMPACT)
    assert [span.attributes.get(semconv.COMPACT_COMPACTED) for span in spans] == [True] * len(spans)
    assert len(spans) >= 2
    assert EvalContext.from_trace(tmp_path, run.run_id).steps[-1].tool_result.error is None


def test_a_done_that_comes_with_other_calls_ends_the_run_before_anything_is_compacted():
    class Always:
        def should_compact(self, state, session_log, conversation, step_num):
            return step_num > 1

    def make(is_async):
        backend = AsyncScriptedBackend if is_async else ScriptedBackend
        calls = [[("dig", {"n": 1}), ("dig", {"n": 2}), ("done", {"answer": "dug"})]]
        tools = tools_from([dig], include_done=True)
        return {"llm": backend(calls), "task": {"goal": "dig"}, "tools": tools, "hooks": [Always()]}

    outcome = both(make)
    assert (outcome.stop_reason, compactions(outcome)) == ("done", [])


def test_runs_may_share_a_service_at_the_same_time():
    service = compact_chain(Prune(1), Summarize, Truncate, target_tokens=400)
    make, made = window_run(context_window=3_000, compact_service=service)
    alone, expected = window_run(
        context_window=3_000, compact_service=compact_chain(Prune(1), Summarize, Truncate, target_tokens=400)
    )
    both(alone)

    async def one():
        return [step async for step in async_composable_loop(**make(is_async=True))]

    async def main():
        return await asyncio.gather(*(one() for _ in range(5)))

    runs = asyncio.run(main())
    assert len({len(steps) for steps in runs}) == 1
    assert all(backend.sent == expected[0].sent for backend in made)

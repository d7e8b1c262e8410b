"""A trace grows with what was said, not with how often it was sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from looplet import Message, ProvenanceSink, Trace, composable_loop, tool, tools_from
from looplet.messages import encode
from looplet.prompt import render
from looplet.telemetry import semconv
from looplet.testing import ScriptedBackend

TEXT = 2000
"""bytes of a tool result"""
SPAN = 1500
"""bytes that a span may cost beside the content"""
CONTENT = ("content", "arguments", "response")
"""keys of message parts that hold what was said"""
REFERENCES = 120
"""characters that may describe a request, whatever its length and history"""
GROWTH = 11
"""how many times the bytes of 40 turns 400 turns may take"""


@tool
def read(name: str) -> str:
    """Return a text that no other name has."""
    return (name + ", ") * (TEXT // (len(name) + 2))


def script(turns: int, name: str = "read", prefix: str = "file") -> ScriptedBackend:
    calls: list[Any] = [(name, {"name": f"{prefix} {number}"}) for number in range(turns)]
    return ScriptedBackend([*calls, ("done", {"answer": "ok"})])


class Prunes:
    """Replace the results of all but the last few calls by a word."""

    KEEP = 6

    def pre_prompt(self, state, log, ctx, step):
        talk = list(state.conversation)
        old = talk[: -self.KEEP]
        state.conversation.replace([*map(self.prune, old), *talk[-self.KEEP :]])

    def prune(self, message: Message) -> Message:
        if message.role != "tool" or message.parts[0]["response"] == "pruned":
            return message
        return Message("tool", ({**message.parts[0], "response": "pruned"},))


class Truncates:
    """Keep the task and a window of the last messages."""

    def pre_prompt(self, state, log, ctx, step):
        state.conversation.truncate(7)


class Briefs:
    """Say something new before every request."""

    def pre_prompt(self, state, log, ctx, step):
        return f"Step {step} of many. " + f"Mind fact {step}! " * 12


def plain(folder: Path, turns: int, hooks: Callable[[], Any] | None = None) -> None:
    tools, sink = tools_from([read], include_done=True), ProvenanceSink(folder)
    for _ in composable_loop(
        script(turns), {"goal": "read"}, tools, hooks=[*([hooks()] if hooks else []), sink], max_steps=turns + 1
    ):
        pass


def with_sub_conversations(folder: Path, turns: int) -> None:
    """Run two sub-agents, each with a conversation of its own, that share the reading."""
    sink = ProvenanceSink(folder)

    @tool
    def ask(name: str) -> str:
        """Let a sub-agent read."""
        tools = tools_from([read], include_done=True)
        run = composable_loop(script(turns // 2, prefix=name), {"goal": name}, tools, hooks=[sink], max_steps=turns)
        return f"{sum(1 for _ in run)} steps"

    for _ in composable_loop(
        script(2, "ask", "sub"), {"goal": "ask"}, tools_from([ask], include_done=True), hooks=[sink]
    ):
        pass


WAYS = {
    "plain": plain,
    "pruning": lambda folder, turns: plain(folder, turns, Prunes),
    "truncating": lambda folder, turns: plain(folder, turns, Truncates),
    "briefing": lambda folder, turns: plain(folder, turns, Briefs),
    "sub-conversations": with_sub_conversations,
}


def unique_bytes(trace: Trace) -> int:
    """Return the bytes of everything that was said: distinct texts, arguments and results, each once."""
    said: set[bytes] = set()
    for run in trace.runs:
        for message in run.message_log.values():
            said |= {encode(part[key]) for part in message.parts for key in CONTENT if key in part}
        for step in run.steps:
            said |= {encode(step.tool_call.args), encode(step.tool_result.data)}
    return sum(map(len, said))


@pytest.fixture(scope="module", params=WAYS)
def traces(request, tmp_path_factory) -> dict[int, Trace]:
    """Return the trace of a run, by its number of turns."""
    folder = tmp_path_factory.mktemp("size")
    for turns in (40, 400):
        WAYS[request.param](folder / str(turns), turns)
    return {turns: Trace.load(folder / str(turns)) for turns in (40, 400)}


def size_of(trace: Trace) -> int:
    return Path(trace.path).stat().st_size


def test_a_trace_takes_twice_its_unique_content_and_a_bit_for_each_span(traces):
    for trace in traces.values():
        assert size_of(trace) <= 2 * unique_bytes(trace) + SPAN * len(trace)


def test_ten_times_the_turns_take_about_ten_times_the_bytes(traces):
    assert size_of(traces[400]) <= GROWTH * size_of(traces[40])


def test_every_request_can_be_told_from_what_was_written_once(traces):
    for trace in traces.values():
        assert sum(len(run.request(chat)) for run in trace.runs for chat in run.chats) > 40 * 2


def test_references_stay_short_however_the_conversation_changes(traces):
    for trace in traces.values():
        assert max(len(chat.attributes[semconv.INPUT_REFS]) for run in trace.runs for chat in run.chats) <= REFERENCES


def test_hooks_are_shown_the_whole_request_however_the_conversation_changes():
    class Looks:
        def pre_prompt(self, state, log, prompt, step):
            shown.append((str(prompt), render(prompt.messages)))

    for way in (Truncates, Briefs, Prunes):
        shown = []
        tools = tools_from([read], include_done=True)
        for _ in composable_loop(script(12), {"goal": "read"}, tools, hooks=[way(), Looks()], max_steps=13):
            pass
        assert [text for text, _ in shown] == [text for _, text in shown]
        assert len(shown) == 13

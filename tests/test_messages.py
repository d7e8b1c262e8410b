"""The conversation and its log: each message is written once, each request can be rebuilt and verified."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplet import ConfigError, Conversation, Message, Prompt, Reply, ToolCall
from looplet.message_log import MAX_RANGES, MessageLog, resolve
from looplet.messages import digest
from looplet.prompt import render, render_task, reread_task


class Ledger:
    """Sends requests through a log, and reads them back as a reader would."""

    def __init__(self):
        self.log, self.entries, self.requests = MessageLog(), {}, []
        self.prefix = self.edits = 0

    def send(self, conversation, tail=()):
        view = conversation.view((), tail)
        unchanged = self.prefix if self.edits == conversation.edits else 0
        logged = self.log.request(view, unchanged=unchanged, stable=len(conversation))
        self.prefix, self.edits = len(conversation), conversation.edits
        self.entries |= {logged.first + i: message for i, message in enumerate(logged.new)}
        base = int(logged.refs.partition("^")[0]) if "^" in logged.refs else 0
        numbers = resolve(logged.refs, self.requests[base] if self.requests else ())
        self.requests.append(numbers)
        assert [self.entries[n] for n in numbers] == list(view)
        assert logged.sha256 == hashlib.sha256(b"".join(digest(self.entries[n]) for n in numbers)).hexdigest()
        return logged


def call(i):
    return Message("assistant", ({"type": "tool_call", "id": f"c{i}", "name": "t", "arguments": {"i": i}},))


@settings(derandomize=True, max_examples=60)
@given(st.lists(st.sampled_from(["turn", "turn", "briefing", "truncate", "prune", "same"]), max_size=40))
def test_every_request_can_be_rebuilt_whatever_happens_to_the_conversation(moves):
    ledger, talk = Ledger(), Conversation([Message.of_text("user", "task")])
    for i, move in enumerate(moves):
        if move == "turn":
            talk.append(call(i))
            talk.append(Message.of_result(f"c{i}", {"x": i}))
        elif move == "truncate":
            talk.truncate(6)
        elif move == "prune":
            talk.replace([Message.of_result(m.parts[0]["id"], "[cleared]") if m.role == "tool" else m for m in talk])
        ledger.send(talk, [Message.of_text("user", f"note {i}")] if move == "briefing" else ())


def test_a_message_is_new_once_and_equal_messages_are_one():
    ledger, talk = Ledger(), Conversation([Message.of_text("user", "a")])
    assert len(ledger.send(talk).new) == 1
    talk.append(Message.of_text("user", "a"))
    assert ledger.send(talk).new == ()


def test_references_stay_short_with_a_briefing_in_every_turn():
    ledger, talk = Ledger(), Conversation([Message.of_text("user", "task")])
    longest = 0
    for i in range(300):
        talk.append(call(i))
        longest = max(longest, len(ledger.send(talk, [Message.of_text("user", f"note {i}")]).refs))
    assert longest < 12 * MAX_RANGES


def test_truncation_never_parts_a_call_from_its_result():
    talk = Conversation([Message.of_text("user", "task")])
    for i in range(5):
        talk.append(call(i))
        talk.append(Message.of_result(f"c{i}", i))
    talk.truncate(3)
    assert [m.role for m in talk] == ["user", "assistant", "tool"]
    talk.truncate(0)
    assert [m.text for m in talk] == ["task"]


def test_a_view_does_not_change_with_the_conversation():
    talk = Conversation([Message.of_text("user", "a")])
    view = talk.view([Message.of_text("system", "s")], [Message.of_text("user", "z")])
    talk.append(Message.of_text("user", "b"))
    talk.replace([])
    assert [m.text for m in view] == ["s", "a", "z"]
    assert [view[0].text, view[-1].text, view[1].text] == ["s", "z", "a"]
    assert [m.text for m in view[1:]] == ["a", "z"]
    with pytest.raises(IndexError):
        view[3]


def test_conversations_serialise_and_fork():
    talk = Conversation([call(1), Message.of_result("c1", {"a": None})])
    assert list(Conversation.deserialize(talk.serialize())) == list(talk)
    fork = talk.fork()
    fork.append(call(2))
    assert (len(talk), len(fork)) == (2, 3)
    assert talk[0].tool_calls == [ToolCall("t", {"i": 1}, call_id="c1")]


def test_a_reply_becomes_an_assistant_message():
    reply = Reply("hi", (ToolCall("t", {}, call_id="c"),), reasoning="hm")
    assert [p["type"] for p in Message.of_reply(reply).parts] == ["reasoning", "text", "tool_call"]


# --- as text --------------------------------------------------------------------------------------------------------

MESSAGES = [
    Message.of_text("system", "be nice"),
    Message.of_text("user", "═══ not a header ═══\nmail me"),
    call(1),
    Message.of_result("c1", {"mail": "a@b"}),
    Message.of_result("c2", "plain a@b"),
]


def test_a_prompt_shows_every_part_under_its_own_header():
    assert render(MESSAGES[2:4], 7) == '═══ 7 assistant calls t [c1] ═══\n{"i":1}\n═══ 8 tool [c1] ═══\n{"mail":"a@b"}'


def test_a_rewritten_prompt_is_split_back_into_messages():
    prompt = Prompt.of(MESSAGES)
    rewritten = prompt.split_back(prompt.replace("a@b", "[mail]"))
    assert rewritten[:3] == MESSAGES[:3]
    assert rewritten[3] == Message.of_result("c1", {"mail": "[mail]"})
    assert rewritten[4] == Message.of_result("c2", "plain [mail]")
    assert prompt.rewrite(lambda text: text.replace("a@b", "[mail]")).messages == rewritten
    assert prompt.split_back(str(prompt)) == MESSAGES


def test_any_other_text_is_no_rewriting():
    assert Prompt.of(MESSAGES).split_back("remember to be brief") is None
    assert Prompt.of([]).split_back("x") is None


def test_a_rewriting_that_lost_a_header_says_which():
    prompt = Prompt.of(MESSAGES)
    with pytest.raises(ConfigError, match=r"header line '═══ 3 tool \[c1\] ═══'"):
        prompt.split_back(prompt.replace("═══ 3 tool [c1] ═══", ""))


def test_rewritten_arguments_stay_arguments():
    prompt = Prompt.of([call(1)])
    assert prompt.split_back(prompt.replace('"i":1', '"i":2'))[0].parts[0]["arguments"] == {"i": 2}
    assert prompt.split_back(prompt.replace('{"i":1}', "gone"))[0].parts[0]["arguments"] == {"text": "gone"}


def test_a_task_survives_being_shown_and_rewritten():
    task = {"goal": "find\nit", "limit": 3, "tags": ["a"]}
    text = render_task(task)
    assert reread_task(text, task) == task
    assert reread_task(text.replace("find", "seek"), task)["goal"] == "seek\nit"
    assert reread_task("all gone", task) == {"task": "all gone"}

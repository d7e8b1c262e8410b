"""How many tokens a conversation takes: an estimate that reported usage corrects, and that costs what was added."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplet import Conversation, Message
from looplet.tokens import BYTES_PER_TOKEN, IMAGE_BYTES, TokenEstimate, size_of

OVERHEAD = 900
"""tokens that no message shows"""


def user(text):
    return Message.of_text("user", text)


def turn(number, chars):
    yield Message("assistant", ({"type": "tool_call", "id": f"c{number}", "name": "t", "arguments": {"n": number}},))
    yield Message.of_result(f"c{number}", "x" * chars)


def provider_tokens(conversation, per_byte, overhead=OVERHEAD):
    return round(overhead + per_byte * sum(map(size_of, conversation)))


def test_four_letters_are_a_token_and_other_scripts_take_more():
    sizes = [size_of(user(text)) - size_of(user("")) for text in ("abcd", "язык", "你好世界")]
    assert [size / BYTES_PER_TOKEN for size in sizes] == [1, 2, 3]


def test_an_image_counts_the_same_whatever_its_size():
    small, large = (
        Message("user", ({"type": "blob", "modality": "image", "mime_type": "image/png", "content": "A" * n},))
        for n in (4, 400_000)
    )
    assert size_of(small) == size_of(large) >= IMAGE_BYTES
    inside = Message.of_result("c", {"page": 1, "shot": large.parts[0]})
    assert IMAGE_BYTES < size_of(inside) < 1.1 * IMAGE_BYTES


def test_the_seal_of_a_reasoning_part_is_no_text():
    sealed = {"type": "reasoning", "content": "hm", "signature": "s" * 5000}
    assert size_of(Message("assistant", (sealed,))) < 50


def test_after_a_report_the_estimate_is_what_was_reported_and_what_was_added_since():
    talk = Conversation([user("x" * 400)])
    talk.calibrate(1_000)
    assert talk.tokens == 1_000
    talk.append(user("y" * 4_000))
    assert talk.tokens == pytest.approx(2_000, abs=10)


@settings(derandomize=True, max_examples=50)
@given(st.floats(0.1, 0.7), st.lists(st.integers(0, 9_000), min_size=2, max_size=20), st.booleans())
def test_the_ratio_of_a_tokenizer_is_learnt_and_holds_after_an_edit(per_byte, sizes, asked_between):
    talk = Conversation([user("the task")])
    talk.calibrate(provider_tokens(talk, per_byte))
    for number, chars in enumerate([5_000, *sizes]):
        for message in turn(number, chars):
            talk.append(message)
        if asked_between:
            assert talk.tokens > 0
        talk.calibrate(provider_tokens(talk, per_byte))
    assert talk.tokens == pytest.approx(provider_tokens(talk, per_byte), abs=2)
    talk.truncate(2)
    assert talk.tokens == pytest.approx(provider_tokens(talk, per_byte), abs=3)


def test_a_report_is_not_forgotten_by_an_edit_that_comes_before_the_question():
    talk = Conversation([user("a")])
    talk.calibrate(500)
    for message in turn(1, 8_000):
        talk.append(message)
    talk.calibrate(500 + 4_000)  # twice as many tokens as four bytes each
    talk.truncate(0)
    talk.append(user("b" * 800))
    assert talk.tokens == pytest.approx(500 + 400, abs=15)


def test_a_report_that_no_tokenizer_can_give_is_not_believed():
    talk = Conversation([user("x" * 40_000)])
    talk.calibrate(10)  # a server that reports only what it had not cached
    assert talk.tokens == pytest.approx(10_000, abs=10)
    assert talk.estimate.reported == 0


def test_the_estimate_is_never_negative():
    talk = Conversation([user("x" * 10)])
    talk.calibrate(3)
    talk.append(user("x" * 10_000))
    talk.calibrate(9_000)
    assert talk.tokens == 9_000
    talk.replace([])
    assert talk.tokens >= 0


class Counted(Message):
    """A message that counts how often it is looked at."""

    __slots__ = ("looks",)

    def __init__(self, text):
        object.__setattr__(self, "looks", [])
        super().__init__("user", ({"type": "text", "content": text},))

    def __getattribute__(self, name):
        if name == "parts":
            object.__getattribute__(self, "looks").append(1)
        return super().__getattribute__(name)


def looks_at(messages):
    return [len(object.__getattribute__(message, "looks")) for message in messages]


def test_each_message_is_counted_once_however_often_the_question_is_asked():
    messages = []
    estimate = TokenEstimate()
    for number in range(200):
        messages.append(Counted(f"message {number}"))
        estimate.calibrate(messages, 100 + 5 * number)
        messages.append(Counted("answer"))
        estimate.of(messages)
        estimate.of(messages)
    assert set(looks_at(messages)) == {1}


def test_a_conversation_that_nobody_asks_about_is_counted_at_its_first_report_only():
    messages = [Counted("task")]
    estimate = TokenEstimate()
    for number in range(50):
        estimate.calibrate(messages, 100 + number)
        messages.append(Counted("more"))
    assert looks_at(messages) == [1] + [0] * 50

"""`Redactor`: what it hides, what it leaves alone, how long it takes, and that nothing gets past it in a run."""

from __future__ import annotations

import re
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import both

from looplet import ConfigError, LoopConfig, ProvenanceSink, composable_loop, tool, tools_from
from looplet.redactor import PATTERNS, Redactor, hide_cards
from looplet.testing import ScriptedBackend
from looplet.testing.backends import AsyncScriptedBackend

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc=\n-----END RSA PRIVATE KEY-----"
HIDDEN = {
    "mail bob@example.org, please": "mail [email], please",
    "<bob.o-neil+x@mail.example.co.uk>": "<[email]>",
    "füße@straße.de": "[email]",
    "bob@example.org.": "[email].",
    "a@b.de;c@d.fr": "[email];[email]",
    "1a@b.cc" * 20: "[email]" * 20,
    "(555) 234-5678" * 20: "[phone]" * 20,
    "+14155552671" * 20: "[phone]" * 20,
    "AKIAIOSFODNN7EXAMPLE" * 20: "[key]",
    "call +49 171 234 5678 now": "call [phone] now",
    "+14155552671": "[phone]",
    "tel:+44 (20) 7946-0958.": "tel:[phone].",
    "(555) 234-5678 or 555-234-5678 or 555.234.5678": "[phone] or [phone] or [phone]",
    "4111 1111 1111 1111": "[card]",
    "4111111111111111": "[card]",
    "3782-822463-10005, Amex": "[card], Amex",
    "card 4111 1111 1111 1111 123, exp 12/29": "card [card] 123, exp 12/29",
    "5555555555554444 6011111111111117": "[card] [card]",
    "key sk-proj-Ab12Cd34Ef56Gh78_xyz.": "key [key].",
    "sk-ant-api03-AAAAAAAAAAAAAAAAAAAA": "[key]",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789": "[key]",
    "github_pat_11ABCDEFG0abcdefghijkl_mnop": "[key]",
    "AKIAIOSFODNN7EXAMPLE": "[key]",
    "xoxb-123456789012-abcdefghij": "[key]",
    "AIza" + "B" * 35: "[key]",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123": "[key]",
    "Authorization: Bearer abcdefghij.klmnop1234": "Authorization: [key]",
    f"before {PEM} after": "before [private_key] after",
    f"before {PEM[:50]}": "before [private_key]",
    f"xoxb-123456789012-abcdefghij{PEM}": "[key][private_key]",
    PEM.replace("\n", "\\n"): "[private_key]",
    PEM.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK"): "[private_key]",
}
SHOWN = [
    "",
    "nothing to hide",
    "lodash@4.17.21 and user@localhost",
    "1700000000 1700000000000 1700000000000000000",
    "2.718281828459045 192.168.100.200 2024-01-15T10:00:00+02:00",
    "4111 1111 1111 1112",  # wrong check digit
    "00000000-0000-4000-8000-000000000000",
    "1234567890123456789012345678901234567890",
    "the bearer responsibilities of a task-management-and-planning role",
    "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
    "[email] [phone] [card] [key]",
    "S1: add(a=1, b=2) → 3",
]


@pytest.mark.parametrize("text", HIDDEN)
def test_what_must_not_be_seen_is_replaced(text):
    assert Redactor()(text) == HIDDEN[text]


@pytest.mark.parametrize("text", SHOWN)
def test_what_only_looks_like_it_is_left_alone(text):
    assert Redactor()(text) == text


@pytest.mark.parametrize("number", ["4111 1111 1111 1111", "5105-1051-0510-5100", "30569309025904", "6304000000000000"])
def test_a_digit_off_is_no_card(number):
    assert hide_cards(number, "x") == "x"
    for digit in "0123456789":
        changed = number[:-1] + digit
        assert hide_cards(changed, "x") == ("x" if changed == number else changed)


# --- idempotent -----------------------------------------------------------------------------------------------------

PIECES = [
    *HIDDEN, "bob@", "@example.org", "+49 ", "171 2345678", "4111", " 1111", "-", " ", ".", "sk-", "a" * 20, "[", "]",
    "[email]", "[card]", "email", "Bearer ", "-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----", "(555) ",
    "eyJ", "AKIA", "0", "12",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map("".join)


@given(texts)
def test_redacting_twice_is_redacting_once(text):
    redact = Redactor()
    once = redact(text)
    assert redact(once) == once


@given(texts)
def test_own_patterns_cannot_eat_what_is_redacted_already(text):
    redact = Redactor({**PATTERNS, "word": r"\w+", "any": r"[a-z]*"})
    once = redact(text)
    assert redact(once) == once


@given(texts, texts)
def test_what_was_hidden_stays_hidden_between_other_words(before, after):
    shown = Redactor()(f"{before}\n{PEM}\nbob@example.org {after}")
    assert "MIIEow" not in shown
    assert "bob@example.org" not in shown


# --- time -----------------------------------------------------------------------------------------------------------

SIZE = 100_000
NASTY = [
    "a", "1", ".", "-", "+", " ", "@", "[", "(", "a@", "a@b.", "a.b-c@d-e.f", "4 ", "444 ", "4111 1111 1111 1112 ",
    "4111-", "sk-", "sk_a", "eyJ", "eyJaaaaaaaa.", "eyJaaaaaaaa.eyJ", "bearer ", "Bearer a.", "+1", "+1 (", "+1 2 3",
    "555-234-", "(555) 234-", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----", "AKIA",
    "xoxb-", "[email]", "[ema", "ghp_", "a@b.cd ", "\\u0040", "ä", "à@é.", "_",
]  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer signal here")
@pytest.mark.parametrize("piece", NASTY)
def test_no_text_takes_long(piece):
    """A pattern that backtracks takes minutes for such a text; a linear one takes a fraction of a second."""

    def too_long(*args):
        raise AssertionError(f"{piece!r} repeated takes more than {limit_s} s")

    limit_s = 20
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        for text in (piece * (SIZE // len(piece)), "x" + piece * (SIZE // len(piece)) + "!"):
            Redactor()(text)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- patterns -------------------------------------------------------------------------------------------------------


def test_patterns_take_the_place_of_the_shipped_ones():
    text = "bob@example.org has badge B-123456 and key sk-abcdefghijklmnop"
    assert Redactor({"badge": r"B-[0-9]{6}"})(text) == text.replace("B-123456", "[badge]")
    more = Redactor({**PATTERNS, "badge": re.compile(r"b-[0-9]{6}", re.IGNORECASE)})
    assert more(text) == "[email] has badge [badge] and key [key]"
    assert Redactor({"email": PATTERNS["email"]})(text) == text.replace("bob@example.org", "[email]")
    assert Redactor({"who": lambda text, word: text.replace("bob", word)})("bob and bob") == "[who] and [who]"
    assert Redactor({})(text) == text


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["email"], "patterns must be a dict"),
        ("email", "patterns must be a dict"),
        ({"a": "("}, "'a' is no regular expression"),
        ({"a": 3}, "'a' is no regular expression"),
        ({"[a]": "x"}, "name of a pattern"),
        ({1: "x"}, "name of a pattern"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(patterns, words):
    with pytest.raises(ConfigError, match=words):
        Redactor(patterns)


def test_the_shipped_patterns_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        PATTERNS["email"] = "x"


# --- runs -----------------------------------------------------------------------------------------------------------

SECRETS = ("bob@example.org", "4111 1111 1111 1111", "sk-abcdefghijklmnop1234", "+49 171 2345678")


@tool
def find(who: str) -> dict:
    """Find somebody."""
    return {"who": who, "card": SECRETS[1], "nested": [SECRETS[2], {SECRETS[3]: 4111111111111111}]}


def arguments(replies, is_async=False):
    llm = (AsyncScriptedBackend if is_async else ScriptedBackend)(replies)
    return {"llm": llm, "task": {"goal": f"find {SECRETS[0]}"}, "tools": tools_from([find], include_done=True)}


SCRIPT = [("find", {"who": SECRETS[0]}), ("done", {"answer": f"{SECRETS[0]}: {SECRETS[1]}"})]
WAYS = {
    "hook": lambda redactor, sink: {"hooks": [sink, redactor]},
    "config": lambda redactor, sink: {"hooks": [sink], "config": LoopConfig(redact=redactor)},
    "sink": lambda redactor, sink: {"hooks": [sink]},
    "all": lambda redactor, sink: {"hooks": [redactor, sink], "config": LoopConfig(redact=redactor)},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_secret_reaches_the_provider_the_caller_or_the_disk(tmp_path, way):
    redactor = Redactor()
    sink = ProvenanceSink(tmp_path, redact=redactor if way in ("sink", "all") else None)
    told = arguments(SCRIPT)
    steps = list(composable_loop(**told, **WAYS[way](redactor, sink)))
    seen = [str(told["llm"].requests), str(steps)]
    seen += [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [secret for secret in (*SECRETS, "4111111111111111") for text in seen if secret in text]
    assert steps[0].tool_result.data == {"who": "[email]", "card": "[card]", "nested": ["[key]", {"[phone]": "[card]"}]}
    assert steps[1].tool_call.args == {"answer": "[email]: [card]"}


def test_the_hook_is_the_same_sync_and_async():
    redactor = Redactor()
    outcome = both(lambda is_async: {**arguments(SCRIPT, is_async), "hooks": [redactor]})
    assert outcome.stop_reason == "done"
    assert outcome.saved.task == {"goal": "find [email]"}

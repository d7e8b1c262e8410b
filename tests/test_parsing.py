"""Tool calls are found in what models write, and nothing else is taken for one."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplet.errors import LoopletError
from looplet.parsing import EXPECTED, ParseFailure, _Reader, _Search, parse_tool_calls
from looplet.types import ToolCall

SEARCH = '{"tool": "search", "args": {"query": "x"}}'
FOUND = [ToolCall("search", {"query": "x"})]

# ---- shapes


@pytest.mark.parametrize("name", ["tool", "name", "function"])
@pytest.mark.parametrize("args", ["args", "input", "parameters", "arguments"])
@pytest.mark.parametrize("reasoning", ["reasoning", "thinking", "thought"])
def test_every_spelling_of_the_keys_is_the_same_call(name, args, reasoning):
    reply = json.dumps({name: "search", args: {"query": "x"}, reasoning: "why"})
    assert parse_tool_calls(reply) == [ToolCall("search", {"query": "x"}, "why")]


def test_theory_and_call_id_are_kept():
    reply = '{"tool": "a", "args": {}, "theory": "it leaks", "call_id": "c1"}'
    assert parse_tool_calls(reply) == [ToolCall("a", call_id="c1", metadata={"theory": "it leaks"})]


@pytest.mark.parametrize(("given_id", "call_id"), [('"c7"', "c7"), ("7", ""), ("null", "")])
def test_an_id_counts_only_as_a_string(given_id, call_id):
    assert parse_tool_calls(f'{{"tool": "a", "args": {{}}, "id": {given_id}}}') == [ToolCall("a", call_id=call_id)]


@pytest.mark.parametrize(
    ("value", "args"),
    [
        ('"just words"', {"_raw_arg": "just words"}),
        ("[1, 2]", {"_raw_arg": [1, 2]}),
        ("0", {"_raw_arg": 0}),
        (r'"{\"query\": \"x\"}"', {"query": "x"}),
        (r'"{\"text\": \"two\nlines\"}"', {"text": "two\nlines"}),
        (r'" {} "', {}),
        ('"{name} said"', {"_raw_arg": "{name} said"}),
        ('"{not an object}"', {"_raw_arg": "{not an object}"}),
        ('"{} {}"', {"_raw_arg": "{} {}"}),
        ('"[1]"', {"_raw_arg": "[1]"}),
        ('""', {}),
        ("null", {}),
    ],
)
def test_args_that_are_not_an_object(value, args):
    assert parse_tool_calls(f'{{"tool": "a", "args": {value}}}') == [ToolCall("a", args)]


def test_flat_arguments_are_the_keys_that_mean_nothing_else():
    reply = '{"tool": "add_user", "name": "Ann", "age": 7, "id": 12, "thought": "t", "theory": "y", "call_id": "c"}'
    args = {"name": "Ann", "age": 7, "id": 12}
    assert parse_tool_calls(reply) == [ToolCall("add_user", args, "t", "c", {"theory": "y"})]


def test_an_args_key_makes_its_siblings_no_arguments():
    assert parse_tool_calls('{"tool": "a", "args": {"x": 1}, "confidence": 0.9}') == [ToolCall("a", {"x": 1})]


@pytest.mark.parametrize("key", ["tools", "tool_calls"])
def test_a_batch_gives_its_reasoning_and_theory_to_the_first_call_without(key):
    items = [{"tool": "a", "reasoning": "own"}, {"tool": "b"}, {"tool": "c"}]
    reply = json.dumps({key: items, "reasoning": "shared", "theory": "t"})
    assert parse_tool_calls(reply) == [
        ToolCall("a", reasoning="own", metadata={"theory": "t"}),
        ToolCall("b", reasoning="shared"),
        ToolCall("c"),
    ]


def test_openai_tool_calls_are_understood():
    function = {"name": "search", "arguments": '{"query": "x"}'}
    message = {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    assert parse_tool_calls(json.dumps(message)) == [ToolCall("search", {"query": "x"}, call_id="call_1")]


def test_a_flat_argument_called_tools_does_not_make_a_batch():
    assert parse_tool_calls('{"tool": "install", "tools": ["a"]}') == [ToolCall("install", {"tools": ["a"]})]


def test_a_top_level_array_is_a_batch():
    assert parse_tool_calls('[{"tool": "a"}, {"name": "b", "input": {"x": 1}}]') == [
        ToolCall("a"),
        ToolCall("b", {"x": 1}),
    ]


@pytest.mark.parametrize("between", ["\n", "", " and then ", ",\n", "\n```\n```json\n"])
def test_objects_after_one_another_are_all_calls(between):
    reply = f'{{"tool": "a"}}{between}{{"tool": "b"}}'
    assert [call.tool for call in parse_tool_calls(reply)] == ["a", "b"]


@pytest.mark.parametrize(
    "reply",
    [
        f"```json\n{SEARCH}\n```",
        f"```\n{SEARCH}\n```",
        f"~~~tool_code\n{SEARCH}\n~~~",
        f"```json\n{SEARCH}",
        f"Sure! I'll look (it's quick):\n\n```JSON\n{SEARCH}\n```\nLet me know.",
        f"<tool_call>{SEARCH}</tool_call>",
        f"<tool_call>\n{SEARCH}\n",
        f"<think>Maybe {{'tool': 'delete_all'}}?</think>\n{SEARCH}",
        f"\ufeff {SEARCH}",
        f"{SEARCH}}}",
        f"Like [1, 2], {{}} or {{curly}} [see here]: {SEARCH} {{",
        f"```json\n{SEARCH[:-1]}\n```\nDone.",
        f"<tool_call>{SEARCH[:-2]}</tool_call>",
    ],
)
def test_wrapping_is_ignored(reply):
    assert parse_tool_calls(reply) == FOUND


def test_code_fences_inside_a_string_stay():
    code = "# Title\n```python\nprint({'a': [1]})\n```\n"
    call = ToolCall("write", {"content": code})
    assert parse_tool_calls("```json\n" + json.dumps({"tool": "write", "args": call.args}) + "\n```") == [call]
    assert parse_tool_calls(f'Here: {{"tool": "write", "args": {{"content": "{code}"}}}}') == [call]


@pytest.mark.parametrize(
    "reply", ['search({"query": "x"})', 'I call search( {"query": "x"} ).', 'search {"query": "x"}']
)
def test_a_known_name_before_an_object_is_a_call(reply):
    assert parse_tool_calls(reply, ["search"]) == FOUND
    for known in ((), ["find"], ["arch"]):
        with pytest.raises(ParseFailure):
            parse_tool_calls(reply, known)


def test_a_known_name_before_an_object_outranks_a_key_called_name():
    assert parse_tool_calls('greet({"name": "Ann"})', ["greet"]) == [ToolCall("greet", {"name": "Ann"})]
    assert parse_tool_calls('I greet {"name": "Ann"}', ["greet"]) == [ToolCall("Ann")]
    assert parse_tool_calls('greet({"tool": "find"})', ["greet", "find"]) == [ToolCall("find")]


# ---- which candidate


def test_known_tools_are_preferred_and_else_the_first_is_kept():
    reply = 'For {"name": "Ann"}: {"tool": "search"} and {"tool": "done"}'
    assert [call.tool for call in parse_tool_calls(reply)] == ["Ann", "search", "done"]
    assert [call.tool for call in parse_tool_calls(reply, {"search", "done"})] == ["search", "done"]
    assert [call.tool for call in parse_tool_calls(reply, {"other"})] == ["Ann"]


def test_a_batch_with_one_known_tool_is_kept_whole():
    reply = 'ok {"tools": [{"tool": "serach"}, {"tool": "done"}]}'
    assert [call.tool for call in parse_tool_calls(reply, {"search", "done"})] == ["serach", "done"]


def test_a_single_unknown_tool_is_still_a_call():
    assert parse_tool_calls('{"tool": "serach"}', {"search"}) == [ToolCall("serach")]


# ---- repairs


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ('{"t": "two\nlines\tand a tab"}', {"t": "two\nlines\tand a tab"}),
        ('{"t": [1, 2,], "u": 3,}', {"t": [1, 2], "u": 3}),
        ("{'t': True, 'u': None, 'v': 'it\\'s', 'w': \"it's\"}", {"t": True, "u": None, "v": "it's", "w": "it's"}),
        ('{"u": "http://x#y", // a comment, "no": 1\n "v": 1 # {another\n}', {"u": "http://x#y", "v": 1}),
        ('{“t”: “say "hi"”, ‘u’: ‘v’}', {"t": 'say "hi"', "u": "v"}),
        ('{"t": "it’s “quoted”"}', {"t": "it’s “quoted”"}),
        ('{t: 1, max_results: 2, $u: {"v-w": 3}, 4: 5}', {"t": 1, "max_results": 2, "$u": {"v-w": 3}, "4": 5}),
        (r'{"pattern": "\d+\.\w", "path": "C:\\n\x41"}', {"pattern": r"\d+\.\w", "path": r"C:\nA"}),
        ('{"n": [1e999, -1e999, NaN, -Infinity, 1.5e3]}', {"n": ["1e999", "-1e999", "NaN", "-Infinity", 1500.0]}),
        ('{"n": 1, "n": 2}', {"n": 2}),
    ],
)
def test_slightly_broken_json_is_repaired(args, expected):
    assert parse_tool_calls(f'{{"tool": "a", "args": {args}}}') == [ToolCall("a", expected)]
    assert parse_tool_calls(f'Now: {{"args": {args}, "tool": "a"}} ok') == [ToolCall("a", expected)]


@pytest.mark.parametrize(
    "reply",
    [
        '{"tool": "a", "args": {"x": [1, {"y": 2}]}',
        '{"tool": "a", "args": {"x": [1, {"y": 2}',
        '[{"tool": "a", "args": {"x": [1, {"y": 2}]}}',
        '{"tools": [{"tool": "a", "args": {"x": [1, {"y": 2}]}\n```',
    ],
)
def test_missing_brackets_at_the_end_are_added(reply):
    assert parse_tool_calls(reply) == [ToolCall("a", {"x": [1, {"y": 2}]})]


def test_all_repairs_work_together():
    reply = "Ok:\n```python\n{'tool': “a”, args: {# why\n'x': [True, null,], 'y': 'two\nlines', // z\n"
    with pytest.raises(ParseFailure):  # more was to come after the comma
        parse_tool_calls(reply)
    assert parse_tool_calls(reply + "'z': None}") == [ToolCall("a", {"x": [True, None], "y": "two\nlines", "z": None})]


def test_an_integer_with_too_many_digits_stays_text():
    digits = "9" * 5000
    assert parse_tool_calls(f'{{"tool": "a", "args": {{"x": {digits}, "y": {2**80}}}}}') == [
        ToolCall("a", {"x": digits, "y": 2**80})
    ]


def test_surrogate_pairs_are_joined_and_halves_replaced():
    assert parse_tool_calls(r'ok {"tool": "a", "x": "\ud83d\ude00", "y": "\ud83d"}') == [
        ToolCall("a", {"x": "😀", "y": "\ufffd"})
    ]
    for half in ("\ud83d", "\udc00", r"\ud83d", r"\udc00", r"\ud83dx", r"\udc00\ud83d"):
        (call,) = parse_tool_calls(f'{{"tool": "a", "x": "{half}"}}')
        assert call.args["x"].strip("x").strip("\ufffd") == ""


# ---- failures


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("not json at all", "there is no JSON object in it."),
        ("", "there is no JSON object in it."),
        ("{}", "the object does not name a tool under 'tool' (line 1, column 1)."),
        ("So:\n  [1, 2]", "item 1 of the array is not an object (line 2, column 3)."),
        ('{"tools": []}', "'tools' is empty (line 1, column 1)."),
        ('{"tool": "", "args": {}}', "the object does not name a tool under 'tool' (line 1, column 1)."),
        ('{"tool": 7}', "the object does not name a tool under 'tool' (line 1, column 1)."),
        ('{"action": {"tool": "a"}}', "the object does not name a tool under 'tool' (line 1, column 1)."),
        (
            '[{"tool": "a"}, {"x": 1}]',
            "item 2 of the array: the object does not name a tool under 'tool' (line 1, column 1).",
        ),
        ('{"tool": "a", "args": {"x": "cut o', "a string is not closed (line 1, column 29)."),
        ('{"tool": "a",\n "args": {"x":', "the JSON ends where a value should follow (line 2, column 15)."),
        ('{"tool": "a", "args": {"x": 1, ', "the JSON ends where a key should follow (line 1, column 32)."),
        ('{"tool": "a", "args": {"x": [1, 2}}', "expected ',' or ']', found '}' (line 1, column 34)."),
        ('{"tool": "a" "args": {}}', "expected ',' or '}', found '\"args\"' (line 1, column 14)."),
        ('{"tool": search}', "expected a value, found 'search' (line 1, column 10)."),
        ('{"tool": "a", "args": ' + "[" * 300, "the JSON is nested deeper than 200 levels (line 1, column 222)."),
        ('note {"a": b} then {"tool": "x", "args": !}', "expected a value, found '!' (line 1, column 42)."),
    ],
)
def test_the_failure_says_what_was_wrong_and_what_is_expected(reply, problem):
    with pytest.raises(ParseFailure) as caught:
        parse_tool_calls(reply)
    assert str(caught.value).splitlines()[1:] == [f"Problem: {problem}", f"Reply with one JSON object: {EXPECTED}"]
    assert isinstance(caught.value, LoopletError)


def test_the_failure_starts_with_an_excerpt_on_one_line():
    with pytest.raises(ParseFailure, match=r"\ACould not parse JSON: not json at all\n") as caught:
        parse_tool_calls("  not json\n\n at all ")
    assert caught.value.excerpt == "not json at all"
    with pytest.raises(ParseFailure) as caught:
        parse_tool_calls("word " * 100_000)
    assert len(caught.value.excerpt) < 130
    with pytest.raises(ParseFailure, match=r"\ACould not parse JSON: \(an empty reply\)\n"):
        parse_tool_calls(" \n")


@pytest.mark.parametrize(
    "garbled",
    [
        '{"tool": "delegate", "args": {"task": oops, "sub": {"tool": "delete_all"}}}',
        '{"reasoning": oops, "args": {"tool": "delete_all"}, "tool": "delegate"}',
        '{"tool": "write", "args": {"text": "like "{"tool": "delete_all"}" here"}}',
        '{"tool": ..., "args": {"tool": "delete_all"}}',
    ],
)
def test_a_call_inside_a_garbled_call_does_not_run_in_its_place(garbled):
    with pytest.raises(ParseFailure):
        parse_tool_calls(garbled)
    assert parse_tool_calls(f"{garbled}\nI mean {SEARCH}") == FOUND


# ---- size

HOSTILE = [
    "{",
    "[",
    '{"',
    "['",
    '{"a":',
    '{"a":[',
    "{//",
    '["[",',
    '{"tool":"a","b":',
    "{} ",
    "[{}",
    '{"tool":1 "',
    "([",
]


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("tail", ["", '"', "\\", "!"])
def test_a_huge_hostile_reply_is_a_failure(piece, tail):
    with pytest.raises(ParseFailure):
        parse_tool_calls(piece * (30_000 // len(piece)) + tail, {"x"})


@pytest.mark.parametrize("piece", [*HOSTILE, '{"tool":1 "\\"', "{'", '{"x": "\\"', '{"a": [1, "["], '])
def test_the_search_reads_at_most_a_few_times_the_length(piece):
    text = piece * (60_000 // len(piece))
    search = _Search(text, ())
    search.run()
    assert search.fuel > -len(text) - 100  # the last attempt may overdraw by one reading


def test_a_megabyte_of_open_brackets_ends():
    for reply in ("{" * 1_000_000, '{"tool":"a","args":' + "[" * 1_000_000, '{"a":' * 200_000 + "1" + "}" * 200_000):
        with pytest.raises(ParseFailure):
            parse_tool_calls(reply)


def test_an_unclosed_string_is_not_read_to_the_end_again_and_again():
    for text in ("[" * 150 + '"' + "x" * 1_000_000, '{"tool": 1 "' + '\\"' * 500_000):
        search = _Search(text, ())
        search.run()
        assert not search.found
        assert search.fuel < len(text) + 100_000


def test_a_call_after_thousands_of_brackets_is_found():
    assert parse_tool_calls("[" * 100_000 + " are brackets: " + SEARCH) == FOUND


def test_a_huge_argument_comes_back_whole():
    call = ToolCall("write", {"text": 'line "x"\n' * 100_000, "numbers": list(range(20_000))})
    assert parse_tool_calls("ok\n" + json.dumps({"tool": "write", "args": call.args})) == [call]


# ---- properties

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=150)
names = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(
    ToolCall,
    names,
    st.dictionaries(st.text(max_size=6), values, max_size=3),
    st.text(max_size=10),
    st.just("") | names,
    st.just({}) | st.builds(lambda theory: {"theory": theory}, st.text(min_size=1, max_size=8)),
)
prose = st.sampled_from(
    ["", "I'll do it:", 'He said "no".', "An example is {} or [1, 2].", "A {brace} and [link](x).", "`"]
)


def item(call: ToolCall) -> dict:
    given = {"tool": call.tool, "args": call.args, "reasoning": call.reasoning, "id": call.call_id, **call.metadata}
    return {key: value for key, value in given.items() if value != "" or key == "tool"}


@st.composite
def wrapped(draw, groups):
    """Return a reply that holds each group of calls in some way, with prose between."""
    parts = [draw(prose)]
    for group in groups:
        items = [item(call) for call in group]
        whole = draw(
            st.sampled_from([items, {"tools": items}, {"tool_calls": items}, *(items if len(items) == 1 else [])])
        )
        body = json.dumps(whole, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))
        shape = draw(st.sampled_from(["{}", "```json\n{}\n```", "```\n{}\n```", "<tool_call>{}</tool_call>", "({})"]))
        parts += [shape.replace("{}", body), draw(prose)]
    return draw(st.sampled_from(["\n", " "])).join(parts)


groups_of_calls = st.lists(st.lists(calls, min_size=1, max_size=3), min_size=1, max_size=3)


@repeatable
@given(st.data(), groups_of_calls, st.booleans())
def test_calls_survive_any_wrapping(data, groups, are_known):
    flat = [call for group in groups for call in group]
    reply = data.draw(wrapped(groups))
    assert parse_tool_calls(reply, {call.tool for call in flat} if are_known else ()) == flat


@repeatable
@given(calls)
def test_a_python_literal_reads_like_the_json(call):
    assert parse_tool_calls(repr(item(call))) == [call]


@repeatable
@given(st.dictionaries(st.text(), values) | st.lists(values))
def test_the_forgiving_reader_agrees_with_the_strict_one(value):
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        reader = _Reader(text + " tail", 0)
        assert (reader.read(), reader.position) == (value, len(text))


def outcome(reply: str, known=()) -> list[ToolCall]:
    """Parse; a failure is an empty list, any other exception is the test's."""
    try:
        found = parse_tool_calls(reply, known)
    except ParseFailure as failure:
        str(failure).encode()
        return []
    assert found
    return found


@repeatable
@given(
    st.text(st.characters(codec=None)) | st.text("{}[]\"'“”\\,:/#`<>= \n1-.eNtTaoluxd"), st.sampled_from([(), {"a"}])
)
def test_any_text_is_calls_or_a_failure(text, known):
    for call in outcome(text, known):
        assert call.tool.strip() == call.tool != ""
        json.dumps(call.to_dict(), allow_nan=False, ensure_ascii=False).encode()


@repeatable
@given(st.data(), groups_of_calls)
def test_a_mutated_reply_is_calls_or_a_failure(data, groups):
    reply = data.draw(wrapped(groups))
    start = data.draw(st.integers(0, len(reply)))
    end = data.draw(st.integers(start, min(len(reply), start + 5)))
    mutated = (
        reply[:start] + data.draw(st.sampled_from(["", '"', "'", "{", "}", "]", ",", "\\", "NaN", "//"])) + reply[end:]
    )
    for call in outcome(mutated, {"x"}) + outcome(reply[:start]):
        assert call.tool


@repeatable
@given(calls, st.data())
def test_a_cut_reply_never_yields_a_shortened_string(call, data):
    text = json.dumps(item(call) | {"args": {"content": "a full sentence"}})
    cut_at = data.draw(st.integers(0, len(text)))
    assert all(found.args in ({}, {"content": "a full sentence"}) for found in outcome(text[:cut_at]))


def test_numbers_beyond_json_never_reach_a_tool_as_floats():
    for text in ("1e400", "-1e400", "NaN", "Infinity"):
        (call,) = parse_tool_calls(f'{{"tool": "a", "args": {{"x": {text}}}}}')
        assert not isinstance(call.args["x"], float) or math.isfinite(call.args["x"])

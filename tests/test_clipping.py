"""Clipping: what the model reads of a very long tool result."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplet import LoopConfig, Message, composable_loop, tool, tools_from
from looplet.clipping import LEAST_CHARS, clip_result, length_of
from looplet.messages import tells_failure
from looplet.parts import blobs_of
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from tests.support import both

IMAGE = {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "QUJD" * 5_000}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.integers(0, 3_000).map("ab ".__mul__)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**9) | TEXTS | st.just(IMAGE),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=10), inner, max_size=12),
    max_leaves=40,
)


@settings(derandomize=True, max_examples=200)
@given(VALUES, st.integers(LEAST_CHARS, 3_000))
def test_a_clipped_result_is_shorter_json_and_no_image_in_it_is_cut(value, max_chars):
    clipped, was_clipped = clip_result(value, max_chars)
    json.dumps(clipped)
    if was_clipped:
        assert length_of(clipped) < length_of(value)
        assert "left out here" in json.dumps(clipped)
    else:
        assert clipped is value
    assert all(blob == IMAGE for blob in blobs_of(clipped))


def test_what_fits_comes_back_as_the_same_object():
    for value in ("x" * 500, ["x" * 100], {"a": 1}, None, 3.5):
        assert clip_result(value, 500) == (value, False)
        assert clip_result(value, 500)[0] is value
    assert clip_result("x" * 10**6, None) == ("x" * 10**6, False)


def test_a_text_keeps_its_beginning_and_its_end_and_says_how_much_is_missing():
    text = "".join(f"line {n}\n" for n in range(1_000))
    clipped, _ = clip_result(text, 600)
    assert len(clipped) <= 600
    before, _, rest = clipped.partition("\n[… ")
    said, _, after = rest.partition(" …]\n")
    assert text.startswith(before)
    assert text.endswith(after)
    missing = int(said.split(" ")[0].replace(",", ""))
    assert len(before) + missing + len(after) == len(text)


def test_a_list_keeps_its_first_items_and_counts_the_others():
    clipped, _ = clip_result([{"row": n} for n in range(900)], 500)
    *rows, marker = clipped
    assert rows == [{"row": n} for n in range(len(rows))]
    assert len(rows) > 10
    assert f"{900 - len(rows)} of 900 items are left out" in marker
    assert length_of(clipped) <= 500


def test_a_list_of_one_long_text_keeps_some_of_it():
    clipped, _ = clip_result(["x" * 9_000, "tail"], 500)
    assert clipped[0].startswith("xxx")
    assert len(clipped[0]) < 500


def test_a_dict_keeps_its_keys_and_its_short_values():
    value = {"path": "a.py", "text": "x" * 9_000, "total": 3, "log": "y" * 9_000}
    clipped, _ = clip_result(value, 1_000)
    assert list(clipped) == list(value)
    assert (clipped["path"], clipped["total"]) == ("a.py", 3)
    assert length_of(clipped) <= 1_010
    assert min(len(clipped["text"]), len(clipped["log"])) > 300


def test_a_dict_of_very_many_keys_says_how_many_are_missing():
    clipped, _ = clip_result({f"key {n}": n for n in range(5_000)}, 1_000)
    assert clipped["key 0"] == 0
    assert f"{5_000 - len(clipped) + 1:,} of 5,000 keys are left out" in clipped["…"]
    assert length_of(clipped) <= 1_100


def test_images_stay_as_they_are():
    value = [{"shot": IMAGE, "text": "x" * 9_000}, IMAGE]
    clipped, was_clipped = clip_result(value, 400)
    assert was_clipped
    assert blobs_of(clipped) == [IMAGE, IMAGE]
    assert clip_result(IMAGE, 400) == (IMAGE, False)


def test_a_clipped_failure_still_tells_that_it_is_one():
    clipped, was_clipped = clip_result({"error": "no " * 9_000, "kind": "execution"}, 300)
    assert was_clipped
    assert tells_failure(clipped)


@tool
def dump(chars: int) -> str:
    """Return a long text."""
    return "d" * chars


def test_the_model_reads_the_clipped_result_and_the_step_keeps_the_whole():
    backend = ScriptedBackend([("dump", {"chars": 9_000}), ("done", {"answer": "ok"})])
    config = LoopConfig(tool_result_max_chars=1_000)
    steps = list(composable_loop(backend, {"goal": "g"}, tools_from([dump], include_done=True), config=config))
    (part,) = backend.requests[1][-1].parts
    assert len(part["response"]) <= 1_000
    assert "are left out here" in part["response"]
    assert steps[0].tool_result.data == "d" * 9_000


def test_live_and_file_agree_on_a_run_with_clipped_results():
    def make(is_async):
        backend = AsyncScriptedBackend if is_async else ScriptedBackend
        return {
            "llm": backend([("dump", {"chars": 9_000}), ("done", {"answer": "ok"})]),
            "task": {"goal": "g"},
            "tools": tools_from([dump], include_done=True),
            "config": LoopConfig(tool_result_max_chars=1_000),
        }

    outcome = both(make)
    assert outcome.saved.steps[0].tool_result.data == "d" * 9_000


@pytest.mark.parametrize("max_chars", [0, 1, 10])
def test_a_tiny_limit_leaves_room_for_the_words_that_say_so(max_chars):
    clipped, _ = clip_result("x" * 9_000, max_chars)
    assert "left out here" in clipped
    assert len(clipped) <= LEAST_CHARS
    assert Message.of_result("c", clipped).parts[0]["id"] == "c"

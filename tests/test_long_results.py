"""Reading on where a long result was clipped."""

from __future__ import annotations

from typing import Any

import pytest
from support import both

from looplet import ConfigError, LoopConfig, ResultReader, composable_loop, tool, tools_from
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

DONE = ("done", {"answer": "x"})
TEXT = "".join(f"<{number:05}>" for number in range(10_000))
"""70,000 characters; each seven say where they stand"""


@tool
def dump() -> str:
    """Return a long text."""
    return TEXT


@tool
def table() -> dict[str, Any]:
    """Return a long table."""
    return {"rows": list(range(20_000))}


@tool
def short() -> str:
    """Return a short text."""
    return "short"


def reading(*calls: Any, backends: list[Any] | None = None, **settings: Any):
    """Return what `both` takes: a run with a reader that answers these calls."""

    def make(is_async):
        reader = ResultReader(**settings)
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([*calls, DONE])
        if backends is not None:
            backends.append(backend)
        tools = tools_from([dump, table, short, reader.tool], include_done=True)
        return {"llm": backend, "task": {}, "tools": tools, "hooks": [reader]}

    return make


def read(**arguments: Any) -> tuple[str, dict[str, Any]]:
    return "read_result", arguments


def test_the_model_is_told_of_a_long_result_and_reads_on_where_it_likes():
    backends: list[Any] = []
    calls = [("short", {}), ("dump", {}), read(step=2, start=35_000), read(step="2", find="<09999>")]
    outcome = both(reading(*calls, backends=backends))
    assert outcome.stop_reason == "done"
    assert outcome.steps[2].tool_result.data == {
        "text": TEXT[35_000:45_000], "start": 35_000, "end": 45_000, "of": 70_000,
    }  # fmt: skip
    assert outcome.steps[3].tool_result.data == {"text": "<09999>", "start": 69_993, "end": 70_000, "of": 70_000}
    for backend in backends:
        told = [request[-1].text for request in backend.requests]
        assert [number for number, text in enumerate(told) if "The result of step 2 (dump) has 70,000" in text] == [2]
        assert "read_result(step=2, start=...) returns 10,000 characters" in told[2]
        before, after = (str(list(request)) for request in backend.requests[2:4])
        assert "<00000>" in before
        assert "<05000>" not in before
        assert "<05000>" in after


def test_what_is_no_text_is_read_as_json():
    outcome = both(reading(("table", {}), read(step=1, find="19999"), max_chars=7))
    assert outcome.steps[1].tool_result.data["text"] == "19999]}"


MISTAKES = {
    "no such step": (read(step=9), "there is no result of a step 9; there are those of [1]"),
    "no such text": (read(step=1, find="nowhere"), "'nowhere' does not stand there: the result of step 1 has 70,000"),
    "nothing there": (read(step=1, start=70_001), "there is nothing there: the result of step 1 has 70,000"),
    "a wrong argument": (read(step="one"), "argument $.step: expected integer, got 'one'"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told_in_words_for_the_model(what):
    call, words = MISTAKES[what]
    outcome = both(reading(("dump", {}), call))
    assert words in outcome.steps[1].tool_result.error
    assert outcome.stop_reason == "done"


def test_a_tool_whose_reader_is_no_hook_says_so():
    tools = tools_from([dump, ResultReader().tool], include_done=True)
    steps = list(composable_loop(ScriptedBackend([("dump", {}), read(step=1), DONE]), {}, tools))
    assert "write hooks=[reader]" in steps[1].tool_result.error


def test_short_results_failures_and_its_own_answers_are_not_spoken_about():
    backends: list[Any] = []
    both(reading(("short", {}), ("dump", {"no": 1}), ("dump", {}), read(step=3), backends=backends))
    for backend in backends:
        told = [request[-1].text for request in backend.requests]
        assert ["characters, and you see a part" in text for text in told] == [False, False, False, True, False]


def test_one_reader_serves_several_runs_and_other_limits():
    reader = ResultReader(longer_than=3, max_chars=2, name="more")
    config = LoopConfig(tool_result_max_chars=100)
    for _ in range(2):
        backend = ScriptedBackend([("short", {}), ("more", {"step": 1, "start": 1}), DONE])
        tools = tools_from([short, reader.tool], include_done=True)
        steps = list(composable_loop(backend, {}, tools, hooks=[reader], config=config))
        assert steps[1].tool_result.data == {"text": "ho", "start": 1, "end": 3, "of": 5}


@pytest.mark.parametrize("settings", [{"longer_than": 0}, {"max_chars": "many"}, {"name": 3}, {"name": "a b"}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError):
        ResultReader(**settings)

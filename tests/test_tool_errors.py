"""Where a tool raised: for its author, in the trace; the model does not get it."""

import json
from pathlib import Path

from click.testing import CliRunner
from support import both

from looplet import ProvenanceSink, ToolError, composable_loop, tool, tools_from
from looplet.cli import main
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from looplet.toolerrors import to_tool_error

HERE = Path(__file__).name


def helper(text):
    return json.loads(text)


def line_of(words):
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.strip() == words]
    return number


@tool
def parse(text: str) -> dict:
    """Parse."""
    return helper(text)


@tool
async def divide(a: int) -> float:
    """Divide."""
    return a / 0


@tool
def refuse() -> None:
    """Refuse."""
    raise ToolError("not today")


def make(*, is_async):
    script = [("parse", {"text": "{"}), ("divide", {"a": 1}), ("refuse", {}), ("parse", {}), ("done", {"answer": "x"})]
    backend = (AsyncScriptedBackend if is_async else ScriptedBackend)(script)
    return {"llm": backend, "task": {}, "tools": tools_from([parse, divide, refuse], include_done=True)}


def test_the_line_of_a_tool_that_raised_is_kept():
    steps = both(make).steps
    at = [step.tool_result.error_detail.context.get("at") for step in steps[:4]]
    parsing, dividing = line_of("return json.loads(text)"), line_of("return a / 0")
    assert at == [f"{HERE}:{parsing} in helper", f"{HERE}:{dividing} in divide", None, None]


def test_the_model_does_not_get_it():
    assert not any(HERE in step.prompt for step in both(make).steps)


def test_show_prints_it(tmp_path):
    list(composable_loop(**make(is_async=False), hooks=[ProvenanceSink(tmp_path)]))
    shown = CliRunner().invoke(main, ["show", str(tmp_path)]).output
    assert f"at {HERE}:{line_of('return a / 0')} in divide" in " ".join(shown.split())


def test_where_no_code_of_the_user_was_reached_nothing_is_said():
    assert to_tool_error(KeyError("a")).context == {}

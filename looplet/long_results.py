"""Reading on: what a model does about a tool result of which it sees a part (`LoopConfig.tool_result_max_chars`).

    reader = ResultReader()
    tools = tools_from([search, reader.tool], include_done=True)
    for step in composable_loop(llm=llm, tools=tools, task={"goal": "..."}, hooks=[reader]):
        ...

The steps of a run hold every result in full.  The reader answers out of them: it is the hook that answers the calls of
its tool, so one object serves several runs, and a run that goes on after a pause.
"""

from __future__ import annotations

from typing import Any, Final

from looplet.arguments import TEXT, int_from, require
from looplet.clipping import length_of
from looplet.errors import ErrorKind, ToolError
from looplet.messages import encode
from looplet.parts import with_markers
from looplet.tools import ToolSpec, failure, success
from looplet.types import Step, ToolCall, ToolResult

LONG: Final = 30_000
"""characters from which results are clipped, unless the config says otherwise"""


class ResultReader:
    """Lets the model read what was left out of a long tool result; it goes into the hooks, its `tool` into the tools.

    longer_than: characters of a result from which the model is told how to read on; as `tool_result_max_chars`.
    max_chars: of one answer.  Raises ConfigError for numbers that mean nothing.
    """

    def __init__(self, *, longer_than: int = LONG, max_chars: int = 10_000, name: str = "read_result") -> None:
        require("longer_than", longer_than, int_from(1))
        require("max_chars", max_chars, int_from(1))
        require("name", name, TEXT)
        self._longer_than = longer_than
        self._max_chars = max_chars
        self.tool: Final = ToolSpec(name, "Read on in the long result of an earlier step.", None, read_on)

    def post_dispatch(
        self, state: Any, session_log: Any, tool_call: ToolCall, tool_result: ToolResult, step_num: int
    ) -> str | None:
        """Tell the model that there is more."""
        if tool_result.error is not None or tool_call.tool == self.tool.name:
            return None
        if (length := length_of(tool_result.data)) <= self._longer_than:
            return None
        return (
            f"The result of step {step_num} ({tool_call.tool}) has {length:,} characters, and you see a part of it. "
            f"{self.tool.name}(step={step_num}, start=...) returns {self._max_chars:,} characters from there on; "
            f"with find='...' it begins where that text stands."
        )

    def pre_dispatch(self, state: Any, session_log: Any, tool_call: ToolCall, step_num: int) -> ToolResult | None:
        """Answer a call of the tool; one that is wrong is left to the run, which says so."""
        if tool_call.tool != self.tool.name:
            return None
        try:
            arguments = self.tool.arguments(tool_call.args)
        except ToolError:
            return None
        try:
            return success(tool_call, self._read(state.steps, **arguments))
        except ToolError as error:
            return failure(tool_call, error)

    def _read(self, steps: list[Step], step: int, start: int = 0, find: str = "") -> dict[str, Any]:
        text = _text_of(steps, step)
        begin = text.find(find, max(0, start)) if find else max(0, start)
        if begin < 0 or begin > len(text):
            what = f"{find!r} does not stand there" if find else "there is nothing there"
            raise ToolError(
                f"{what}: the result of step {step} has {len(text):,} characters, and you asked from {start}"
            )
        piece = text[begin : begin + self._max_chars]
        return {"text": piece, "start": begin, "end": begin + len(piece), "of": len(text)}


def read_on(step: int, start: int = 0, find: str = "") -> None:
    """Read on in a result.

    Args:
        step: number of the step whose result it is
        start: character to begin at
        find: begin where this text stands, at `start` or behind it
    """
    raise ToolError("the ResultReader of this tool is not among the run's hooks; write hooks=[reader]")


def _text_of(steps: list[Step], number: int) -> str:
    """Return the result of a step as the model would read it; raises ToolError."""
    for step in steps:
        if step.number == number and step.tool_result.error is None:
            data = with_markers(step.tool_result.data)
            return data if isinstance(data, str) else encode(data).decode()
    readable = [step.number for step in steps if step.tool_result.error is None]
    raise ToolError(f"there is no result of a step {number}; there are those of {readable}", kind=ErrorKind.VALIDATION)

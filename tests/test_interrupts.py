"""A Ctrl-C where a loop jumps back: Python raises it there, and 3.12 and 3.13 do so outside of the `try` around it."""

from __future__ import annotations

import dis
import sys
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from support import CountingProvider, add, require_whole

import looplet
from looplet import ProvenanceSink, composable_loop, tools_from
from looplet.testing import ScriptedBackend
from looplet.types import Delta, Reply, ToolCall

PACKAGE = str(Path(looplet.__file__).parent)
BACK = dis.opmap["JUMP_BACKWARD"]
TIMES = 3
"""how often the same jump is tried in one run"""


class Jumps:
    """Raises KeyboardInterrupt at the `fatal`-th jump back in looplet's own code, while it is entered; 0: at none."""

    def __init__(self, fatal: int) -> None:
        self._fatal = fatal
        self._seen: Counter[tuple[object, int]] = Counter()
        self._count = 0
        self.where = ""

    def __enter__(self) -> Jumps:
        self._before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # before `settrace`: Python 3.12 looks for it there only
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame, event, arg):
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] == BACK:
            place = (frame.f_code, frame.f_lasti)
            self._seen[place] += 1
            if self._seen[place] <= TIMES:
                self._count += 1
                if self._count == self._fatal:
                    self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                    raise KeyboardInterrupt
        return self._step


class Streaming:
    """A backend whose answers come in pieces, and which knows how many of them are open."""

    model = "streams"

    def __init__(self, replies) -> None:
        self._replies = replies
        self.open = 0

    def chat(self, messages, **settings):
        raise AssertionError

    def stream(self, messages, **settings):
        self.open += 1
        try:
            for text in "abc":
                yield Delta("text", text)
            yield self._replies.pop(0)
        finally:
            self.open -= 1


def make(kind, sink, provider):
    """Return a backend and a run of three steps; the first one has been taken."""
    calls = (ToolCall("add", {"a": 1, "b": 2}),) * 2
    replies = [Reply(tool_calls=calls), Reply(tool_calls=(ToolCall("done", {"answer": "3"}),))]
    backend = Streaming(replies) if kind == "streamed" else ScriptedBackend(replies)
    stream = {"stream": lambda event: None} if kind == "streamed" else {}
    tools = tools_from([add], include_done=True)
    run = composable_loop(backend, {"goal": "g"}, tools, hooks=[sink], tracer_provider=provider, **stream)
    assert next(run).tool_call.tool == "add"
    return backend, run


def take_the_rest(run):
    assert [next(run).tool_call.tool for _ in range(2)] == ["add", "done"]


@pytest.mark.parametrize("kind", ["whole", "streamed"])
def test_an_interrupt_at_the_end_of_any_loop_ends_the_run_in_order(tmp_path, kind):
    for number in count():
        sink, provider = ProvenanceSink(tmp_path / str(number)), CountingProvider()
        backend, run = make(kind, sink, provider)
        with suppress(KeyboardInterrupt), Jumps(number) as jumps:
            take_the_rest(run)
        if number > 0:  # the first run only imports what is imported late
            if not jumps.where:
                break
            assert (run.stop_reason, getattr(backend, "open", 0)) == ("cancelled", 0), jumps.where
            require_whole(sink.dir, provider, "cancelled")
    assert number > 20

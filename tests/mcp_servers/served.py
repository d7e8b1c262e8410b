"""Tools for `looplet mcp serve`."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from opentelemetry import baggage, trace

from looplet import BaseToolRegistry, ToolContext, ToolError, tool, tools_from
from looplet.tools import register_done_tool


@tool
def greet(name: str, times: int = 1) -> dict:
    """Greet someone."""
    sys.stdout.write("this must not reach the client\n")
    return {"greeting": f"Hello, {name}!" * times}


@tool
async def later(words: str) -> str:
    """Answer, but asynchronously."""
    return words


@tool
def refuse(why: str) -> None:
    """Refuse."""
    raise ToolError(f"refused: {why}")


@tool
def warn(ctx: ToolContext) -> list[int]:
    """Warn."""
    ctx.warn("mind the gap")
    return [1, 2]


@tool
def current_trace() -> str:
    """Return the current span and baggage."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}-{context.span_id:016x} {dict(baggage.get_all())}"


@tool
def thread() -> str:
    """Return the name of the thread."""
    return threading.current_thread().name


@tool(timeout_s=0.05)
def stuck() -> None:
    """Never return."""
    threading.Event().wait()


@tool
def count(to: int, ctx: ToolContext) -> str:
    """Count, and tell how far it is."""
    for number in range(1, to + 1):
        ctx.report_progress(f"number {number}")
    return "counted"


@tool
async def copy(files: int, ctx: ToolContext) -> str:
    """Tell how far it is in numbers of its own, at last without waiting for anything."""
    for number in range(files):
        ctx.report_progress("copying", {"progress": 10 * number, "total": 10 * files})
    return "copied"


@tool(concurrent_safe=True)
def obey(note: str, ctx: ToolContext) -> str:
    """Work until told to stop; write to the file `note` when work begins and why it ended."""
    with Path(note).open("a") as file:
        file.write("begun\n")
    ctx.cancel_token.wait(60)
    with Path(note).open("a") as file:
        file.write(f"{ctx.cancel_token.reason}\n")
    return "obeyed"


@tool(concurrent_safe=True)
def meet(note: str, others: int) -> int:
    """Wait until so many calls have begun; return how many there are."""
    with Path(note).open("a") as file:
        file.write("x")
    end = time.monotonic() + 60
    while len(Path(note).read_text()) < others and time.monotonic() < end:
        time.sleep(0.01)
    return len(Path(note).read_text())


def plain(x: int) -> int:
    """Return x."""
    return x


everything: BaseToolRegistry = tools_from(
    [greet, later, refuse, warn, current_trace, thread, stuck, count, copy, obey, meet], include_done=True
)
register_done_tool(everything, name="finish")
listed = [greet, plain]
number = 7
here = Path(__file__)

"""Tools for `looplet mcp serve`."""

from __future__ import annotations

import sys
import threading
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


def plain(x: int) -> int:
    """Return x."""
    return x


everything: BaseToolRegistry = tools_from([greet, later, refuse, warn, current_trace, thread, stuck], include_done=True)
register_done_tool(everything, name="finish")
listed = [greet, plain]
number = 7
here = Path(__file__)

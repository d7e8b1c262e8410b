"""The file does not depend on the application's OpenTelemetry, and content does not reach it unless asked for."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from looplet import (
    Deny,
    LoopConfig,
    ProvenanceSink,
    Reply,
    ToolContext,
    ToolError,
    ToolResult,
    Trace,
    Usage,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.telemetry.otlp_file import read_file
from looplet.testing import AsyncScriptedBackend, MockLLMBackend, ScriptedBackend

CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
PARENT = trace.SpanContext(0xFEED << 100, 0xBEEF, True, trace.TraceFlags(0))
"""of a request in another process that decided not to sample"""


# --- a run that says something everywhere ---------------------------------------------------------------------------

SAID = {
    "task key": "zq01",
    "task value": "zq02",
    "system prompt": "zq03",
    "prose": "zq04",
    "reasoning": "zq05",
    "argument": "zq06",
    "result": "zq07",
    "exception": "zq08",
    "tool error": "zq09",
    "hint": "zq10",
    "denial": "zq11",
    "injected": "zq12",
    "rewritten": "zq13",
    "not done": "zq14",
    "gate exception": "zq15",
    "warning": "zq16",
    "progress": "zq17",
    "unknown tool": "zq18",
    "note": "zq19",
    "answer": "zq20",
    "backend exception": "zq21",
    "hook exception": "zq22",
}
"""where content comes from → a word that is said nowhere else"""


def talkative_tools(mishap=lambda: None):
    @tool
    def search(query: str, ctx: ToolContext) -> dict:
        """Search."""
        ctx.warn(SAID["warning"])
        ctx.report_progress(SAID["progress"], {"found": SAID["progress"]})
        mishap()
        return {"found": SAID["result"]}

    @tool(concurrent_safe=True)
    def look(name: str) -> str:
        """Look."""
        return name * 2

    @tool
    def crash() -> None:
        """Crash."""
        raise RuntimeError(SAID["exception"])

    @tool
    def refuse() -> None:
        """Refuse."""
        raise ToolError(SAID["tool error"], recovery_hint=[SAID["hint"]])

    return tools_from([search, look, crash, refuse], include_done=True)


class Talkative:
    """A hook that says something in every method."""

    def __init__(self):
        self.gates = 0

    def pre_prompt(self, state, log, context, step):
        log.record(step, SAID["note"], "note", "")
        return SAID["injected"] if step == 2 else None

    def pre_dispatch(self, state, log, call, step):
        return Deny(SAID["denial"]) if call.tool == "look" and step == 4 else None

    def post_dispatch(self, state, log, call, result, step):
        return ToolResult("crash", error=SAID["rewritten"]) if call.tool == "crash" else None

    def check_done(self, state, log, context, step):
        self.gates += 1
        if self.gates == 1:
            return SAID["not done"]
        if self.gates == 2:
            raise LookupError(SAID["gate exception"])
        return None


class Furious:
    def on_loop_end(self, state, log, context, llm):
        raise OSError(SAID["hook exception"])


REPLIES = [
    Reply(
        SAID["prose"],
        (tools_call := ScriptedBackend([("search", {"query": SAID["argument"]})]).chat([]).tool_calls),
        Usage(10, 5),
        reasoning=SAID["reasoning"],
    ),
    ("crash", {}),
    ("refuse", {}),
    [("look", {"name": "a"}), ("look", {"name": "b"}), ("look", {"name": "c"})],
    (SAID["unknown tool"], {}),
    ("done", {"answer": "early"}),
    ("done", {"answer": "early"}),
    ("done", {"answer": SAID["answer"]}),
]

"""The manifest: what a run was given, on a span that ends at once, so that a killed run keeps it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from looplet._version import __version__
from looplet.messages import encode
from looplet.telemetry import attributes, semconv

if TYPE_CHECKING:
    from looplet.scope import RunScope


def manifest(run: RunScope) -> dict[str, Any]:
    """Return the attributes of `looplet.start`."""
    told: dict[str, Any] = {
        semconv.FORMAT: semconv.FORMAT_VERSION,
        semconv.VERSION: __version__,
        semconv.REPLAYABLE: bool(run.trace.recorder.sinks),
        semconv.TOOL_DEFINITIONS: _definitions(run),
        semconv.HOOKS: run.hooks.names,
        semconv.DONE_TOOLS: sorted(run.ending_tools),
        semconv.CONFIG: encode(run.trace.recorder.clean(_settings(run))).decode(),
    }
    if run.segment > 1:
        told[semconv.SEGMENT_NUMBER] = run.segment
    if run.parent is not None:
        told |= {semconv.PARENT_RUN_ID: run.parent[0], semconv.PARENT_CALL_ID: run.parent[1]}
    if not run.asks_rewriters:
        told |= attributes.of_task(run.task)
    return told


def _definitions(run: RunScope) -> str:
    return encode([{"type": "function", **run.boundary.clean(s)} for s in run.tools.tool_schemas()]).decode()


def _settings(run: RunScope) -> dict[str, Any]:
    """Return the settings that are values; the system prompt is the first message of the log."""
    settings = {f.name: getattr(run.config, f.name) for f in fields(run.config)}
    settings["max_steps"] = run.state.max_steps if hasattr(run.state, "max_steps") else run.config.max_steps
    settings["generate_kwargs"] = sorted(run.config.generate_kwargs)  # the values may be keys and headers
    return {k: v for k, v in settings.items() if not callable(v) and k not in ("system_prompt", "tool_metadata")}

"""What the model will see, without a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from looplet.awaiting import discard
from looplet.boundary import Boundary
from looplet.config import LoopConfig
from looplet.errors import ConfigError
from looplet.memory import check_sources, memory_message, text_of, with_memory
from looplet.messages import Message
from looplet.prompt import render, render_task, text_protocol
from looplet.state import DefaultState
from looplet.tools import BaseToolRegistry


def preview_prompt(
    task: Mapping[str, Any] | None = None,
    tools: BaseToolRegistry | None = None,
    state: Any = None,
    session_log: Any = None,
    *,
    config: LoopConfig | None = None,
    step_number: int = 1,
) -> str:
    """Return the text of a run's first request, as a backend with only `generate` reads it.

    A backend with native tools gets the tools as schemas instead.  Without a task, it is the next request of the run
    that `state` belongs to.  What hooks will add is not in it; `session_log` and `step_number` are no part of requests
    and change nothing.
    """
    settings = config if config is not None else LoopConfig()
    boundary = Boundary(settings.redact)
    head = []
    if settings.system_prompt:
        head.append(Message.of_text("system", boundary.text(settings.system_prompt)))
    if tools is not None:
        head.append(text_protocol(boundary.text(tools.tool_catalog_text())))
    conversation = getattr(state, "conversation", None)
    if task is not None or conversation is None:
        conversation = [Message.of_text("user", render_task(boundary.clean(dict(task or {}))))]
    return render([*with_memory(head, _memory(settings, state, boundary)), *conversation])


def _memory(settings: LoopConfig, state: Any, boundary: Boundary) -> Message | None:
    check_sources(settings.memory_sources)
    if state is None:
        state = DefaultState(max_steps=settings.max_steps)  # what the sources of a run get
    return memory_message([_load(source, state) for source in settings.memory_sources], boundary)


def _load(source: Any, state: Any) -> str:
    said = source.load(state)
    if inspect.isawaitable(said):
        discard(said)
        raise ConfigError(f"preview_prompt awaits nothing, and {type(source).__name__}.load is async")
    return text_of(source, said)

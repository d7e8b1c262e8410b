"""From the arguments of a loop to the working set of its run.  Whatever cannot work is said here, at the call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace

from looplet._version import __version__
from looplet.backends.adapter import Model, layers
from looplet.boundary import Boundary, Redact
from looplet.config import LoopConfig
from looplet.errors import ConfigError
from looplet.hooks import SINK, HookSet
from looplet.ledger import Ledger
from looplet.message_log import MessageLog
from looplet.messages import Conversation, Message
from looplet.prompt import render_task, text_protocol
from looplet.scope import RunScope
from looplet.state import DefaultState, SessionLog
from looplet.telemetry import semconv
from looplet.telemetry.recorder import RUN_KEY, Recorder, Resource, Scope, new_id
from looplet.telemetry.router import route
from looplet.telemetry.spans import RunTrace
from looplet.tools import BaseToolRegistry

CAPTURE_CONTENT: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"


def make_scope(
    llm: Any,
    task: dict[str, Any] | None,
    tools: Any,
    *,
    sync: bool,
    context: Any,
    hooks: Sequence[Any] | None,
    config: LoopConfig | None,
    state: Any,
    session_log: SessionLog | None,
    stream: Any,
    conversation: Conversation | None,
    max_steps: int | None,
    system_prompt: str | None,
    tracer_provider: Any,
) -> RunScope:
    """Check the arguments and put a run together; raises ConfigError that says what to write instead."""
    _check(task, tools, hooks, config, stream)
    _check_objects(state, system_prompt, tracer_provider)
    settings = _settings(config, max_steps, system_prompt, state)
    hook_list = list(hooks or ())
    above = _recorder_above()
    sinks = find_sinks(llm, hook_list, above)
    boundary, late = _boundaries(settings, sinks, above)
    state = _state(state, settings)
    model = Model(llm, settings, sync=sync)
    hook_set = HookSet(hook_list)
    run_trace = _trace(settings, boundary, late, sinks, hook_set, tracer_provider, above)
    clean_task = boundary.clean(dict(task or {}))
    talk = conversation if conversation is not None else Conversation()
    talk.join(boundary.clean)
    task_message = Message.of_text("user", render_task(clean_task))
    talk.append(task_message, clean=True)
    _tell_state(state, clean_task, talk)
    return RunScope(
        model,
        tools,
        hook_set,
        settings,
        boundary,
        run_trace,
        state,
        session_log if session_log is not None else SessionLog(),
        talk,
        clean_task,
        _parent(above),
        context,
        head=_head(settings, model, tools, boundary),
        log=MessageLog(late.clean if late is not None else None),
        task_message=task_message,
    )


def _recorder_above() -> Recorder | None:
    """Return the recorder of the run inside which we are called: then this run is a sub-agent of that one."""
    recorder = otel_context.get_value(RUN_KEY)
    return recorder if isinstance(recorder, Recorder) else None


def _parent(above: Recorder | None) -> tuple[str, str] | None:
    if above is None:
        return None
    attributes = getattr(trace.get_current_span(), "attributes", None) or {}
    return above.run_id, str(attributes.get(semconv.TOOL_CALL_ID, ""))


def find_sinks(llm: Any, hooks: Sequence[Any], above: Recorder | None = None) -> list[Any]:
    """Return the sinks of the run above, those among the hooks and those around the backend, each once."""
    inherited = above.sinks if above is not None and not above.closed else ()
    found: dict[int, Any] = {id(sink): sink for sink in inherited}
    for thing in hooks:
        if (sink := getattr(thing, SINK, None)) is not None:
            found[id(sink)] = sink
    for layer in layers(llm):
        if (sink := getattr(layer, "__dict__", {}).get(SINK)) is not None:
            found[id(sink)] = sink
    return list(found.values())


def _check(task: Any, tools: Any, hooks: Any, config: Any, stream: Any) -> None:
    if task is not None and not isinstance(task, Mapping):
        raise ConfigError(f'task must be a dict; write task={{"goal": {task!r:.60}}}')
    if tools is None:
        raise ConfigError("tools is required: tools=tools_from([...], include_done=True)")
    if isinstance(tools, (list, tuple)):
        raise ConfigError("tools must be a registry, not a list: tools=tools_from([...], include_done=True)")
    if not isinstance(tools, BaseToolRegistry):
        raise ConfigError(f"tools must be a BaseToolRegistry, not {type(tools).__name__}: tools=tools_from([...])")
    if hooks is not None and (isinstance(hooks, (str, bytes, Mapping)) or not isinstance(hooks, Sequence)):
        raise ConfigError(f"hooks must be a list of objects, not {type(hooks).__name__}: hooks=[MyHook()]")
    if config is not None and not isinstance(config, LoopConfig):
        raise ConfigError(f"config must be a LoopConfig, not {type(config).__name__}")
    if stream is not None:
        raise ConfigError("stream= is not available yet; iterate over the steps")


def _check_objects(state: Any, system_prompt: Any, tracer_provider: Any) -> None:
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise ConfigError(f"system_prompt must be a str, not {type(system_prompt).__name__}")
    if state is not None and not isinstance(getattr(state, "steps", None), list):
        raise ConfigError(f"state must have a list `steps`, like DefaultState(); {type(state).__name__} has none")
    if tracer_provider is not None and not callable(getattr(tracer_provider, "get_tracer", None)):
        raise ConfigError(f"tracer_provider must be a TracerProvider, not {type(tracer_provider).__name__}")


def _settings(config: LoopConfig | None, max_steps: int | None, system_prompt: str | None, state: Any) -> LoopConfig:
    settings = config or LoopConfig()
    steps = max_steps if max_steps is not None else settings.max_steps if config is not None else None
    given = getattr(state, "max_steps", None)
    if given is not None:
        steps = given if steps is None else min(steps, given)
    steps = settings.max_steps if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ConfigError(f"max_steps must be a whole number from 0, not {steps!r}")
    changes: dict[str, Any] = {"max_steps": steps}
    if system_prompt is not None:
        changes["system_prompt"] = system_prompt
    return replace(settings, **changes)


def _state(state: Any, settings: LoopConfig) -> Any:
    if state is None:
        return DefaultState(max_steps=settings.max_steps)
    if isinstance(state, type):
        raise ConfigError(f"state takes an object: pass {state.__name__}(), not the class")
    if getattr(state, "max_steps", settings.max_steps) != settings.max_steps:
        state.max_steps = settings.max_steps
    return state


def _tell_state(state: Any, task: dict[str, Any], conversation: Conversation) -> None:
    for name, value in (("task", task), ("conversation", conversation)):
        try:
            setattr(state, name, value)
        except AttributeError:  # a slotted class of the caller's own need not have our fields
            continue


def _head(settings: LoopConfig, model: Model, tools: BaseToolRegistry, boundary: Boundary) -> tuple[Message, ...]:
    head = []
    if settings.system_prompt:
        head.append(Message.of_text("system", boundary.text(settings.system_prompt)))
    if not model.native:
        head.append(text_protocol(boundary.text(tools.tool_catalog_text())))
    return tuple(head)


def _boundaries(settings: LoopConfig, sinks: Sequence[Any], above: Recorder | None) -> tuple[Boundary, Boundary | None]:
    """Return the boundary of the run, and one for what is recorded only (`redact_upstream=False`)."""
    early = [settings.redact, *(above.boundary.redactors if above is not None else ())]
    late: list[Redact | None] = []
    for sink in sinks:
        (early if getattr(sink, "redact_upstream", True) else late).append(getattr(sink, "redact", None))
    return Boundary(*dict.fromkeys(early)), Boundary(*dict.fromkeys(late)) if any(late) else None


def _trace(
    settings: LoopConfig,
    boundary: Boundary,
    late: Boundary | None,
    sinks: Sequence[Any],
    hooks: HookSet,
    tracer_provider: Any,
    above: Recorder | None,
) -> RunTrace:
    provider = tracer_provider if tracer_provider is not None else trace.get_tracer_provider()
    tracer = above.tracer if tracer_provider is None and above is not None else _tracer(provider)
    if tracer is not None and sinks:
        route(provider)
    base = otel_context.get_current()
    recorder = Recorder(
        run_id=new_id(),
        boundary=boundary,
        late=late,
        sinks=sinks,
        tracer=tracer,
        context=base,
        resource=getattr(provider, "resource", None) or default_resource(),
        scope=_scope(),
        capture_content=captures_content(settings, above),
        ledger=Ledger(above.ledger if above is not None else None),
    )
    return RunTrace(recorder, settings.agent_name, [bound.function for bound in hooks.observers])


def _tracer(provider: Any) -> trace.Tracer | None:
    """Return the user's tracer, None when no provider was ever set: there would be nobody to tell."""
    if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return None
    tracer: trace.Tracer = provider.get_tracer(semconv.SCOPE, __version__, schema_url=semconv.SCHEMA_URL)
    return tracer


def captures_content(settings: LoopConfig, above: Recorder | None = None) -> bool:
    """Tell whether the tracer provider may see what was said (GenAI conventions: off unless asked for).

    A sub-agent captures no more than the run above it.
    """
    if above is not None and not above.captures:
        return False
    if settings.capture_content is not None:
        return settings.capture_content
    return os.environ.get(CAPTURE_CONTENT, "").strip().lower() in ("span_only", "span_and_event", "true", "1")


@cache
def _scope() -> Scope:
    return Scope(__version__)


@cache
def default_resource() -> Resource:
    """Return the resource of spans where no provider has one."""
    return Resource(
        {
            semconv.SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or "looplet",
            semconv.SDK_NAME: semconv.SCOPE,
            semconv.SDK_LANGUAGE: "python",
            semconv.SDK_VERSION: __version__,
        }
    )

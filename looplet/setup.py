"""From the arguments of a loop to the working set of its run.  Whatever cannot work is said here, at the call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import set_value

from looplet._version import __version__
from looplet.backends.adapter import Model
from looplet.backends.candidates import parts
from looplet.boundary import Boundary, Redact
from looplet.budgets import BudgetView, Guard
from looplet.cancel import CANCEL_KEY, CancelToken
from looplet.compaction import check_service
from looplet.config import LoopConfig
from looplet.errors import ConfigError, ToolError
from looplet.hooks import APPROVALS, BUDGET, COMPACT, EMITTER, REDACT, SINK, HookSet
from looplet.ledger import Ledger
from looplet.memory import check_sources
from looplet.message_log import MessageLog
from looplet.messages import Conversation, Message
from looplet.models import Models
from looplet.output import with_output_type
from looplet.prompt import render_task, text_protocol
from looplet.scope import RunScope, note_state
from looplet.segments import Paused, go_on
from looplet.state import DefaultState, SessionLog
from looplet.streaming import Stream
from looplet.telemetry import semconv
from looplet.telemetry.recorder import RUN_KEY, Recorder, Resource, Scope, new_id
from looplet.telemetry.router import route
from looplet.telemetry.spans import RunTrace
from looplet.tools import BaseToolRegistry

UNFIT: Final = "unfit_for"
"""the method by which a sink that writes files says that it cannot go on with a run"""
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
    resume: Any,
    verdict: Any,
    output_type: Any,
    tracer_provider: Any,
) -> RunScope:
    """Check the arguments and put a run together; raises ConfigError that says what to write instead."""
    _check(task, tools, hooks, config)
    _check_objects(state, system_prompt, tracer_provider)
    paused = _paused(resume, verdict, task, conversation)
    settings = _settings(config or (paused.config if paused else None), max_steps, system_prompt, state)
    check_sources(settings.memory_sources)
    hook_set = HookSet(hooks or ())
    above = recorder_above()
    sinks = _sinks(llm, hook_set, above, paused)
    boundary, late = _boundaries(settings, hook_set, sinks, above)
    clean = boundary.clean if boundary.redactors else None
    models = Models(llm, settings, sync=sync, is_subagent=above is not None, clean=clean)
    run_trace = _trace(settings, boundary, late, sinks, hook_set, tracer_provider, above, paused)
    tools = tools if output_type is None else with_output_type(tools, output_type, settings.done_tool)
    run = RunScope(
        models,
        tools,
        hook_set,
        settings,
        boundary,
        run_trace,
        _state(state, settings),
        session_log if session_log is not None else SessionLog(),
        _conversation(conversation, boundary),
        boundary.clean(dict(task or {})),
        _guard(settings, hook_set, run_trace.recorder, above),
        _cancel_token(settings),
        _parent(above),
        context,
        head=_head(settings, models.primary, tools, boundary),
        log=MessageLog(late.clean if late is not None else None),
        stream=Stream([*([] if stream is None else [stream]), *hook_set.brought(EMITTER)]),
        approvers=hook_set.brought(APPROVALS),
        compact_service=_compact_service(settings, hook_set),
        output_type=output_type,
    )
    _hand_down(run, above)
    _start(run, paused, verdict)
    _tell_state(run)
    return run


def _start(run: RunScope, paused: Paused | None, verdict: Any) -> None:
    """Put the task before the model, or the run into the place where it paused."""
    if paused is not None:
        go_on(run, paused, verdict)
        return
    run.task_message = Message.of_text("user", render_task(run.task))
    run.conversation.append(run.task_message, clean=True)


def _hand_down(run: RunScope, above: Recorder | None) -> None:
    """Let runs that this one's tools start find what they share with it."""
    recorder = run.trace.recorder
    recorder.guard = run.guard
    recorder.depth = 1 if above is None else above.depth + 1
    recorder.max_depth = run.config.max_depth if above is None else min(above.max_depth, run.config.max_depth)
    if recorder.depth > recorder.max_depth:
        raise ToolError(f"sub-agents would be nested {recorder.depth} deep; max_depth allows {recorder.max_depth}")
    recorder.base = set_value(CANCEL_KEY, run.cancel_token, recorder.base)


def _cancel_token(settings: LoopConfig) -> CancelToken:
    """Return the run's own token: cancelled with the config's, and with that of the tool call that starts the run."""
    above = otel_context.get_value(CANCEL_KEY)
    return CancelToken(*(token for token in (settings.cancel_token, above) if isinstance(token, CancelToken)))


def _guard(settings: LoopConfig, hooks: HookSet, recorder: Recorder, above: Recorder | None) -> Guard:
    budgets = [*([settings.budget] if settings.budget is not None else []), *hooks.brought(BUDGET)]
    return Guard(budgets, recorder.ledger, above=above.guard if above is not None else None)


def _compact_service(settings: LoopConfig, hooks: HookSet) -> Any:
    """Return what makes the conversation shorter: the config's, else the first hook that can."""
    if settings.compact_service is not None:
        check_service(settings.compact_service)
        return settings.compact_service
    return next(iter(hooks.with_method(COMPACT)), None)


def _paused(resume: Any, verdict: Any, task: Any, conversation: Any) -> Paused | None:
    if resume is None:
        if verdict is not None:
            raise ConfigError("verdict= answers a run that waits: pass that run, or its trace, as resume=")
        return None
    if task is not None or conversation is not None:
        raise ConfigError("a resumed run has its task and its conversation; leave out task= and conversation=")
    from looplet.resume import paused_of

    return paused_of(resume)


def _sinks(llm: Any, hooks: HookSet, above: Recorder | None, paused: Paused | None) -> list[Any]:
    """Return who writes the run.

    One that was paused goes on in its file, named or not: else the file would go on to say that it waits.
    """
    if paused is None:
        return find_sinks(llm, hooks.brought(SINK), above)
    given = find_sinks(llm, hooks.brought(SINK)) or list(paused.sinks)
    if words := next(filter(None, (_unfit(sink, paused) for sink in given)), ""):
        raise ConfigError(f"{words}; leave the sink out of hooks=[...] and llm=...")
    inherited = [sink for sink in find_sinks(None, (), above) if not _unfit(sink, paused)]
    sinks = list({id(sink): sink for sink in (*inherited, *given)}.values())
    if paused.path is not None and not any(hasattr(sink, UNFIT) for sink in sinks):
        from looplet.telemetry.provenance import ProvenanceSink

        sinks.append(ProvenanceSink(paused.path.parent))
    return sinks


def _unfit(sink: Any, paused: Paused) -> str:
    ask = getattr(sink, UNFIT, None)
    return "" if ask is None else str(ask(paused.run_id, paused.path))


def recorder_above() -> Recorder | None:
    """Return the recorder of the run inside which we are called: then this run is a sub-agent of that one."""
    recorder = otel_context.get_value(RUN_KEY)
    return recorder if isinstance(recorder, Recorder) else None


def _parent(above: Recorder | None) -> tuple[str, str] | None:
    if above is None:
        return None
    attributes = getattr(trace.get_current_span(), "attributes", None) or {}
    return above.run_id, str(attributes.get(semconv.TOOL_CALL_ID, ""))


def find_sinks(llm: Any, brought: Sequence[Any] = (), above: Recorder | None = None) -> list[Any]:
    """Return the sinks of the run above, those that hooks brought and those around or inside the backend, each once."""
    inherited = above.sinks if above is not None and not above.closed else ()
    found: dict[int, Any] = {id(sink): sink for sink in inherited}
    around = [getattr(part, "__dict__", {}).get(SINK) for part in parts(llm)]
    found |= {id(sink): sink for sink in (*brought, *around) if sink is not None}
    return list(found.values())


def _check(task: Any, tools: Any, hooks: Any, config: Any) -> None:
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


def _check_objects(state: Any, system_prompt: Any, tracer_provider: Any) -> None:
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise ConfigError(f"system_prompt must be a str, not {type(system_prompt).__name__}")
    if state is not None and not isinstance(getattr(state, "steps", None), list):
        raise ConfigError(f"state must have a list `steps`, like DefaultState(); {type(state).__name__} has none")
    if state is not None and state.steps:
        raise ConfigError(f"state has the steps of an earlier run; pass a fresh one: {type(state).__name__}()")
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


def _conversation(given: Conversation | None, boundary: Boundary) -> Conversation:
    conversation = given if given is not None else Conversation()
    conversation.join(boundary.clean)
    return conversation


def _tell_state(run: RunScope) -> None:
    note_state(run.state, "task", run.task)
    note_state(run.state, "conversation", run.conversation)
    note_state(run.state, "budget", BudgetView(run.guard))


def _head(settings: LoopConfig, model: Model, tools: BaseToolRegistry, boundary: Boundary) -> tuple[Message, ...]:
    head = []
    if settings.system_prompt:
        head.append(Message.of_text("system", boundary.text(settings.system_prompt)))
    if not model.native:
        head.append(text_protocol(boundary.text(tools.tool_catalog_text())))
    return tuple(head)


def _boundaries(
    settings: LoopConfig, hooks: HookSet, sinks: Sequence[Any], above: Recorder | None
) -> tuple[Boundary, Boundary | None]:
    """Return the boundary of the run, and one for what is recorded only (`redact_upstream=False`)."""
    early = [settings.redact, *hooks.brought(REDACT), *(above.boundary.redactors if above is not None else ())]
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
    paused: Paused | None,
) -> RunTrace:
    provider = tracer_provider if tracer_provider is not None else trace.get_tracer_provider()
    tracer = above.tracer if tracer_provider is None and above is not None else _tracer(provider)
    if tracer is not None and sinks:
        route(provider)
    base = otel_context.get_current() if paused is None else _below_first_segment(paused)
    recorder = Recorder(
        run_id=new_id() if paused is None else paused.run_id,
        boundary=boundary,
        late=late,
        sinks=sinks,
        tracer=tracer,
        context=base,
        resource=above.resource if above is not None and tracer_provider is None else _resource_of(provider),
        scope=_scope(),
        capture_content=captures_content(settings, above),
        ledger=Ledger(above.ledger if above is not None else None),
    )
    return RunTrace(recorder, settings.agent_name, [bound.function for bound in hooks.observers])


def _below_first_segment(paused: Paused) -> otel_context.Context:
    """Return the context in which a later segment's span stands below the first one's."""
    return trace.set_span_in_context(trace.NonRecordingSpan(paused.context))


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


def _resource_of(provider: Any) -> Any:
    return getattr(provider, "resource", None) or default_resource()


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

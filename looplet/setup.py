"""From the arguments of a loop to the working set of its run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.context import set_value

from looplet.approval_state import ApprovalState
from looplet.backends.adapter import Model
from looplet.boundary import Boundary
from looplet.budgets import BudgetView, Guard
from looplet.cancel import CANCEL_KEY, CancelToken
from looplet.compaction import check_service
from looplet.config import LoopConfig
from looplet.errors import ToolError
from looplet.guards import warn_of_unknown_tools
from looplet.hooks import APPROVALS, BUDGET, COMPACT, EMITTER, HookSet
from looplet.ledger import Ledger
from looplet.loop_arguments import (
    check_definition,
    check_objects,
    merged_settings,
    run_to_resume,
    state_of_run,
    with_ending_tools,
)
from looplet.message_log import MessageLog
from looplet.messages import Conversation, Message
from looplet.models import Models
from looplet.outgoing import Outgoing
from looplet.parent_run import PARENT_KEY, ParentRun
from looplet.prompt import render_task, text_protocol
from looplet.scope import RunScope, note_state
from looplet.segments import Paused, go_on
from looplet.state import SessionLog
from looplet.streaming import Stream
from looplet.tools import BaseToolRegistry
from looplet.trace_setup import boundaries_of, sinks_of, trace_of


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
    check_definition(task, tools, hooks, config)
    check_objects(state, system_prompt, tracer_provider, session_log, conversation)
    paused = run_to_resume(resume, verdict, task, conversation)
    settings = merged_settings(config or (paused.config if paused else None), max_steps, system_prompt, state)
    hook_set = HookSet(hooks or ())
    above = ParentRun.current()
    recorder_above, parent = (None, None) if above is None else (above.recorder, above.call)
    sinks = sinks_of(llm, hook_set, recorder_above, paused)
    boundary, late = boundaries_of(settings, hook_set, sinks, recorder_above)
    clean = boundary.clean if boundary.redactors else None
    models = Models(llm, settings, sync=sync, is_subagent=above is not None, clean=clean)
    run_trace = trace_of(settings, boundary, late, sinks, hook_set, tracer_provider, recorder_above, paused)
    tools = with_ending_tools(tools, output_type, settings, hook_set)
    conversation = _conversation(conversation, boundary)
    log, head = MessageLog(late.clean if late else None), _head(settings, models.primary, tools, boundary)
    run = RunScope(
        models=models,
        tools=tools,
        hooks=hook_set,
        config=settings,
        boundary=boundary,
        trace=run_trace,
        state=state_of_run(state, settings),
        session_log=session_log if session_log is not None else SessionLog(),
        conversation=conversation,
        outgoing=Outgoing(conversation, log, head),
        task=boundary.clean(dict(task or {})),
        guard=_guard(settings, hook_set, run_trace.recorder.ledger, above),
        cancel_token=_cancel_token(settings),
        parent=parent,
        context=context,
        stream=Stream([*([] if stream is None else [stream]), *hook_set.brought(EMITTER)]),
        approvals=ApprovalState(hook_set.brought(APPROVALS)),
        compact_service=_compact_service(settings, hook_set),
        output_type=output_type,
    )
    _hand_down(run, above)
    _start(run, paused, verdict)
    return run


def _start(run: RunScope, paused: Paused | None, verdict: Any) -> None:
    """Put the task before the model, or the run into the place where it paused; let the state know what it is about."""
    if paused is not None:
        go_on(run, paused, verdict)
    else:
        run.outgoing.task = Message.of_text("user", render_task(run.task))
        run.conversation.append(run.outgoing.task, clean=True)
    note_state(run.state, "task", run.task)
    note_state(run.state, "conversation", run.conversation)
    note_state(run.state, "budget", BudgetView(run.guard))


def _hand_down(run: RunScope, above: ParentRun | None) -> None:
    """Let runs that this one's tools start find what they share with it."""
    recorder, max_depth = run.trace.recorder, run.config.max_depth
    depth, tool_names = 1, tuple(run.tools.tool_names)
    if above is not None:
        depth, max_depth = above.depth + 1, min(above.max_depth, max_depth)
        tool_names += above.tool_names
    warn_of_unknown_tools(run.hooks, tool_names)
    if depth > max_depth:
        raise ToolError(f"sub-agents would be nested {depth} deep; max_depth allows {max_depth}")
    shared = ParentRun(recorder, run.guard, tool_names, depth, max_depth)
    recorder.base = set_value(CANCEL_KEY, run.cancel_token, set_value(PARENT_KEY, shared, recorder.base))


def _cancel_token(settings: LoopConfig) -> CancelToken:
    """Return the run's own token: cancelled with the config's, and with that of the tool call that starts the run."""
    above = otel_context.get_value(CANCEL_KEY)
    return CancelToken.of_run(*(token for token in (settings.cancel_token, above) if isinstance(token, CancelToken)))


def _guard(settings: LoopConfig, hooks: HookSet, ledger: Ledger, above: ParentRun | None) -> Guard:
    budgets = [*([settings.budget] if settings.budget is not None else []), *hooks.brought(BUDGET)]
    return Guard(budgets, ledger, above=above.guard if above is not None else None)


def _compact_service(settings: LoopConfig, hooks: HookSet) -> Any:
    """Return what makes the conversation shorter: the config's, else the first hook that can."""
    if settings.compact_service is not None:
        check_service(settings.compact_service)
        return settings.compact_service
    return next(iter(hooks.with_method(COMPACT)), None)


def _conversation(given: Conversation | None, boundary: Boundary) -> Conversation:
    conversation = given if given is not None else Conversation()
    conversation.join(boundary.clean)
    return conversation


def _head(settings: LoopConfig, model: Model, tools: BaseToolRegistry, boundary: Boundary) -> tuple[Message, ...]:
    head = []
    if settings.system_prompt:
        head.append(Message.of_text("system", boundary.text(settings.system_prompt)))
    if not model.native:
        head.append(text_protocol(boundary.text(tools.tool_catalog_text())))
    return tuple(head)

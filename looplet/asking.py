"""The first half of a turn: build the request, let hooks see it, ask the model, read its reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from opentelemetry.trace import SpanKind

from looplet.errors import BackendError, ErrorKind, ToolError, words_of
from looplet.message_log import LoggedRequest
from looplet.messages import Message, clean_part
from looplet.parsing import ParseFailure, parse_tool_calls
from looplet.plan import Effects
from looplet.prompt import Prompt, render, reread_task
from looplet.scope import RunScope, note_state
from looplet.steering import consult, consult_raw
from looplet.telemetry import attributes, semconv
from looplet.telemetry.recorder import error_name
from looplet.telemetry.spans import Phase
from looplet.tools import failure
from looplet.types import Reply, Step, ToolCall, Usage


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply as the loop goes on with it."""

    reply: Reply
    problem: str = ""
    """why it holds no tool call, in words for the model"""
    error: Exception | None = None
    """the model call failed"""


def pre_prompt(run: RunScope, turn: Phase) -> Effects[Sequence[Message]]:
    """Return the messages to send, after every hook had its say."""
    with turn.phase(semconv.PRE_PROMPT) as phase:
        rewritten: Sequence[Message] | None = None
        for bound in run.hooks.of("pre_prompt"):
            if run.context is not None:
                yield from consult(run, phase, bound, run.state, run.session_log, run.context, _next_step(run))
                continue
            prompt = _prompt(run, rewritten)
            taken: list[Sequence[Message]] = []
            ask = partial(bound.function, run.state, run.session_log, prompt, _next_step(run))
            yield from consult_raw(run, phase, bound, ask, partial(_take, run, prompt, taken))
            if taken:
                _place_task(run, prompt)
                rewritten, run.briefing = taken[0], []
        if rewritten is not None:
            run.rewrites = run.trace.withhold_results = True
            phase.put({semconv.REQUEST_REWRITTEN: True})
        messages, run.briefing = _request(run, rewritten), []
        return messages


def chat(run: RunScope, turn: Phase, messages: Sequence[Message]) -> Effects[Answer]:
    """Send the messages and return what the model answered, or why it did not."""
    model = run.model
    logged = _log(run, messages)
    with turn.phase(
        semconv.CHAT, model.name, SpanKind.CLIENT, _identity(run) if run.trace.recording else None
    ) as phase:
        if phase.recording:
            phase.put(attributes.of_request(logged))
        if run.asks_rewriters and not run.model_calls:
            _record_late_task(run, phase, messages)
        phase.note(model=model.name, provider=model.provider)
        run.model_calls += 1
        run.turn_prompt = render(logged.new, logged.first)
        try:
            raw = yield from phase.call(model.request(messages, run.tools), model.lane)
            reply = model.reply(raw, run.boundary, run.tools.tool_names)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, the run ends in order
            _failed_call(run, phase, error)
            answer = Answer(Reply(), error=error)
        else:
            answer = _read(run, phase, reply)
            _count(run, reply.usage)
            phase.note(reply=answer.reply, usage=reply.usage)
            if phase.recording:
                phase.put(attributes.of_reply(answer.reply if reply.tool_calls else reply))
    run.trace.durable()
    return answer


def remember(run: RunScope, answer: Answer) -> None:
    """Add what the model said to the conversation."""
    reply = answer.reply
    if answer.problem:
        run.conversation.append(Message.of_text("assistant", reply.text or "(nothing)"), clean=True)
        run.conversation.append(Message.of_text("user", answer.problem), clean=True)
    elif run.model.native or not reply.text:
        run.conversation.append(Message.of_reply(reply), clean=True)
    else:  # the text protocol: the model must see its own words again, not our rendering of them
        run.conversation.append(Message.of_text("assistant", reply.text), clean=True)


def error_step(run: RunScope, answer: Answer) -> Step:
    """Return the step that stands for a failed model call or for replies that hold no tool call."""
    if answer.error is not None:
        words = run.boundary.text(f"LLM call failed: {type(answer.error).__name__}: {words_of(answer.error)}")
        call, error = ToolCall("__llm_error__"), ToolError(words, kind=ErrorKind.EXECUTION)
    else:
        call, error = ToolCall("__parse_error__"), ToolError(answer.problem, kind=ErrorKind.PARSE, retriable=True)
    usage, run.turn_usage = run.turn_usage, Usage()
    return Step(_next_step(run), call, failure(call, error), usage, run.turn_prompt)


def _next_step(run: RunScope) -> int:
    return len(run.state.steps) + 1


def _request(run: RunScope, rewritten: Sequence[Message] | None) -> Sequence[Message]:
    """Return the messages about to be sent, what hooks added so far included."""
    if rewritten is None:
        return run.conversation.view(run.head, _briefing(run.briefing))
    return [*rewritten, *_briefing(run.briefing)]


def _prompt(run: RunScope, rewritten: Sequence[Message] | None) -> Prompt:
    request = _request(run, rewritten)
    if rewritten is not None:
        return Prompt.of(request)
    stable = len(run.head) + len(run.conversation)
    return run.shown.prompt(request, stable=stable, edits=run.conversation.edits)


def _place_task(run: RunScope, prompt: Prompt) -> None:
    """Note where in the run's first request the task is, before a hook has rewritten it."""
    if not run.model_calls and run.task_position is None:
        run.task_position = next((at for at, m in enumerate(prompt.messages) if m is run.task_message), None)


def _briefing(texts: Sequence[str]) -> tuple[Message, ...]:
    return (Message.of_text("user", "\n\n".join(texts)),) if texts else ()


def _take(run: RunScope, prompt: Prompt, taken: list[Sequence[Message]], value: Any) -> bool:
    if isinstance(value, Prompt):
        messages: Sequence[Message] | None = value.messages
    else:
        messages = prompt.split_back(value) if isinstance(value, str) else None
    if messages is None:
        return False
    pairs = zip(prompt.messages, messages, strict=True)
    taken.append([old if new is old else _cleaned(run, old, new) for old, new in pairs])
    return True


def _cleaned(run: RunScope, old: Message, new: Message) -> Message:
    parts = zip(old.parts, new.parts, strict=True)
    return Message(new.role, tuple(n if n is o else clean_part(n, run.boundary.clean) for o, n in parts))


def _log(run: RunScope, messages: Sequence[Message]) -> LoggedRequest:
    if not run.rewrites:
        stable = len(run.head) + len(run.conversation)
        unchanged = run.logged_prefix if run.logged_edits == run.conversation.edits else 0
        run.logged_prefix, run.logged_edits = stable, run.conversation.edits
        return run.log.request(messages, unchanged=unchanged, stable=stable)
    return run.log.request(messages)


def _identity(run: RunScope) -> dict[str, Any]:
    model = run.model
    identity: dict[str, Any] = {
        semconv.OPERATION_NAME: semconv.CHAT,
        semconv.PROVIDER_NAME: model.provider,
        semconv.PROTOCOL: model.protocol,
    }
    if model.name:
        identity[semconv.REQUEST_MODEL] = model.name
    if run.config.max_tokens is not None:
        identity[semconv.REQUEST_MAX_TOKENS] = run.config.max_tokens
    if run.config.temperature is not None:
        identity[semconv.REQUEST_TEMPERATURE] = float(run.config.temperature)
    if model.server_address:
        identity[semconv.SERVER_ADDRESS] = str(model.server_address)
        if model.server_port:
            identity[semconv.SERVER_PORT] = int(model.server_port)
    return identity


def _record_late_task(run: RunScope, phase: Phase, messages: Sequence[Message]) -> None:
    """Record the task with the first request when a hook may rewrite it: not before the hook has seen it."""
    run.recorded_task = run.task
    if run.rewrites:
        sent = None if run.task_position is None else messages[run.task_position]
        if sent is None:  # taken out of the conversation before anybody could rewrite it
            run.recorded_task = {}
        elif sent is not run.task_message:
            run.recorded_task = reread_task(sent.text, run.task)
    phase.put(attributes.of_task(run.recorded_task))


def _failed_call(run: RunScope, phase: Phase, error: Exception) -> None:
    phase.fail_with(error, error.kind if isinstance(error, BackendError) else error_name(error))
    run.say_stop("llm_error")


def _read(run: RunScope, phase: Phase, reply: Reply) -> Answer:
    """Find the tool calls of a reply: native ones, else those in its text."""
    calls: Sequence[ToolCall] = reply.tool_calls
    if not calls:
        try:
            calls = parse_tool_calls(reply.text, run.tools.tool_names)
        except ParseFailure as error:
            run.parse_failures += 1
            phase.event(semconv.EVENT_PARSE_FAILURE, {semconv.PARSE_ATTEMPT: run.parse_failures})
            return Answer(reply, problem=str(error))
    run.parse_failures = 0
    named = tuple(_with_own_id(run, call, number) for number, call in enumerate(calls, _next_step(run)))
    if reply.tool_calls:
        return Answer(reply if named == reply.tool_calls else replace(reply, tool_calls=named))
    return Answer(replace(reply, tool_calls=named, text="" if run.model.native else reply.text))


def _with_own_id(run: RunScope, call: ToolCall, number: int) -> ToolCall:
    late = run.trace.recorder.late
    call_id = run.unique_call_id(call.call_id if late is None else late.text(call.call_id), number)
    return call if call_id == call.call_id else replace(call, call_id=call_id)


def _count(run: RunScope, usage: Usage | None) -> None:
    ledger = run.trace.recorder.ledger
    ledger.count(usage)
    if usage is not None:
        run.turn_usage = run.turn_usage + usage
        note_state(run.state, "usage", ledger.own)

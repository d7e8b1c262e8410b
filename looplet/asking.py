"""The first half of a turn: build the request, let hooks see it, ask the model, read its reply."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from looplet.backends.adapter import clean_text
from looplet.compacting import compact, compact_if_due
from looplet.compaction import OVERFLOW, CompactOutcome
from looplet.errors import BudgetExhausted, ContextOverflow, ErrorKind, LoopletError, ToolError, words_of
from looplet.events import LifecycleEvent, slot
from looplet.memory import refresh_memory
from looplet.message_log import LoggedRequest
from looplet.messages import Message, clean_part
from looplet.modelcall import Request, ask
from looplet.parsing import ParseFailure, parse_tool_calls
from looplet.plan import Effects
from looplet.prompt import Prompt, render, reread_task
from looplet.scope import RunScope
from looplet.steering import announce, consult, consult_raw
from looplet.telemetry import attributes, semconv
from looplet.telemetry.spans import Phase
from looplet.tools import failure
from looplet.types import Reply, Step, ToolCall

logger = logging.getLogger("looplet")


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply as the loop goes on with it."""

    reply: Reply
    problem: str = ""
    """why it holds no tool call, in words for the model"""
    error: Exception | None = None
    """the model call failed"""
    is_cut: bool = False
    """the output limit cut it before there was a tool call"""


CUT: Final = "length"
CONTINUE: Final = "Your reply was cut off at the output limit. Continue exactly where it stops; repeat nothing."
CUT_CALL: Final = "your reply was cut off at the output limit, in the middle of a tool call; make it again, shorter"


def pre_prompt(run: RunScope, turn: Phase) -> Effects[Sequence[Message]]:
    """Return the messages to send, after every hook had its say."""
    with turn.phase(semconv.PRE_PROMPT) as phase:
        run.briefed = []
        yield from refresh_memory(run, phase)
        yield from compact_if_due(run, phase)
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
                rewritten = taken[0]
                _take_briefing(run)
        if rewritten is not None:
            run.rewrites = run.trace.withhold_results = True
            phase.put({semconv.REQUEST_REWRITTEN: True})
        if run.hooks.of(slot(LifecycleEvent.PRE_LLM_CALL)):
            yield from announce(run, phase, LifecycleEvent.PRE_LLM_CALL, prompt=_new_text(run, rewritten))
        messages = _request(run, rewritten)
        _take_briefing(run)
        return messages


def chat(run: RunScope, turn: Phase, messages: Sequence[Message]) -> Effects[Answer | None]:
    """Send the messages and return what the model answered, or why it did not; None when a hook stopped the run.

    A request that is too long is made shorter and sent once more; an answer that the output limit cut is continued.
    """
    try:
        try:
            answer = yield from _ask(run, turn, messages)
        except ContextOverflow as error:
            outcome = yield from _shorten(run, turn, error)
            messages = yield from pre_prompt(run, turn)
            if run.stop is not None:
                return None
            answer = yield from _ask_again(run, turn, messages, outcome)
        return (yield from _continue(run, turn, messages, answer))
    except BudgetExhausted as error:
        run.exhaust(error.limit)
        return Answer(Reply(), error=error)
    except Exception as error:
        if not isinstance(error, LoopletError):
            told = None if run.boundary.redactors else error  # a log is no place for what must not be seen
            logger.error(
                "looplet: the backend raised %s, which is no BackendError", type(error).__name__, exc_info=told
            )
        run.say_stop("llm_error")
        return Answer(Reply(), error=error)


def _continue(run: RunScope, turn: Phase, messages: Sequence[Message], answer: Answer) -> Effects[Answer]:
    """Have the model go on where the output limit cut it."""
    for number in range(run.config.max_turn_continuations):
        if not answer.is_cut:
            break
        turn.event(semconv.EVENT_CONTINUATION, {semconv.ATTEMPT: number + 1})
        said = Message.of_text("assistant", answer.reply.text)
        more = [*messages, said, Message.of_text("user", CONTINUE)]
        try:
            answer = yield from _ask(run, turn, more, before=answer.reply.text)
        except ContextOverflow:  # the next turn begins with a shorter conversation
            break
    if answer.is_cut:
        _count_parse_failure(run, turn)
    return answer


def _ask(run: RunScope, turn: Phase, messages: Sequence[Message], before: str = "") -> Effects[Answer]:
    first, run.model_calls = run.model_calls == 0, run.model_calls + 1
    late = partial(_record_late_task, run, messages) if first and run.asks_rewriters else None
    request = Request(messages, partial(_log, run, messages), tools=run.tools)
    return (yield from ask(run, turn, request, partial(_read, run, before), late))


def _shorten(run: RunScope, turn: Phase, error: ContextOverflow) -> Effects[CompactOutcome]:
    """Make the conversation shorter; raises ContextOverflow when that cannot be done.

    What hooks had to say in the request that was refused, they say in the next one, too.
    """
    outcome = yield from compact(run, turn, OVERFLOW)
    if outcome is None or not outcome.compacted:
        raise ContextOverflow(
            f"{error}; compaction could not make the conversation shorter", status=error.status
        ) from error
    run.briefing = [*run.briefed, *run.briefing]
    return outcome


def _ask_again(run: RunScope, turn: Phase, messages: Sequence[Message], outcome: CompactOutcome) -> Effects[Answer]:
    """Ask with a request that was made shorter; raises ContextOverflow that says what was tried."""
    try:
        return (yield from _ask(run, turn, messages))
    except ContextOverflow as again:
        tried = f"{', '.join(outcome.stages)} took it from {outcome.tokens_before} to {outcome.tokens_after} tokens"
        raise ContextOverflow(f"{again}; {tried}", status=again.status) from again


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


def facts_of(run: RunScope, answer: Answer) -> dict[str, Any]:
    """Return what hooks are told of an answer."""
    return {"prompt": run.turn_prompt, "raw_response": answer.reply.text, "usage": answer.reply.usage}


def error_step(run: RunScope, answer: Answer) -> Step:
    """Return the step that stands for a failed model call or for replies that hold no tool call."""
    if answer.error is not None:
        words = run.boundary.text(f"LLM call failed: {type(answer.error).__name__}: {words_of(answer.error)}")
        call, error = ToolCall("__llm_error__"), ToolError(words, kind=ErrorKind.EXECUTION)
    else:
        call, error = ToolCall("__parse_error__"), ToolError(answer.problem, kind=ErrorKind.PARSE, retriable=True)
    return Step(_next_step(run), call, failure(call, error), run.claim_usage(), run.turn_prompt)


def _next_step(run: RunScope) -> int:
    return len(run.state.steps) + 1


def _request(run: RunScope, rewritten: Sequence[Message] | None) -> Sequence[Message]:
    """Return the messages about to be sent, what hooks added so far included."""
    if rewritten is None:
        return run.conversation.view(run.head, _briefing(run.briefing))
    return [*rewritten, *_briefing(run.briefing)]


def _new_text(run: RunScope, rewritten: Sequence[Message] | None) -> str:
    """Return the text of what the request at hand has more than the last one, all of it where hooks rewrite."""
    is_longer = not run.rewrites and run.logged_edits == run.conversation.edits
    first = run.logged_prefix if is_longer else 0
    return render(_request(run, rewritten)[first:], first)


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
    return (Message.of_text("user", "\n\n".join(dict.fromkeys(texts))),) if texts else ()


def _take_briefing(run: RunScope) -> None:
    """Note that the request at hand says what hooks have said so far."""
    run.briefed += run.briefing
    run.briefing = []


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
    """Number the messages of a request that is about to be sent."""
    if run.rewrites:
        logged = run.log.request(messages)
    else:
        stable = len(run.head) + len(run.conversation)
        unchanged = run.logged_prefix if run.logged_edits == run.conversation.edits else 0
        run.logged_prefix, run.logged_edits = stable, run.conversation.edits
        logged = run.log.request(messages, unchanged=unchanged, stable=stable)
    run.turn_prompt = render(logged.new, logged.first)
    return logged


def _record_late_task(run: RunScope, messages: Sequence[Message], phase: Phase) -> None:
    """Record the task with the first request when a hook may rewrite it: not before the hook has seen it."""
    run.recorded_task = run.task
    if run.rewrites:
        sent = None if run.task_position is None else messages[run.task_position]
        if sent is None:  # taken out of the conversation before anybody could rewrite it
            run.recorded_task = {}
        elif sent is not run.task_message:
            run.recorded_task = reread_task(sent.text, run.task)
    phase.put(attributes.of_task(run.recorded_task))


def _read(run: RunScope, before: str, phase: Phase, reply: Reply) -> tuple[Reply, Answer]:
    """Find the tool calls of a reply: native ones, else those in its text, of which `before` came earlier."""
    if reply.usage is not None and not before:
        run.conversation.calibrate(reply.usage.input_tokens)
    calls: Sequence[ToolCall] = reply.tool_calls
    known, is_cut = run.tools.tool_names, reply.finish_reason == CUT
    # what is redacted piece by piece may hold a secret when it is put together
    whole = replace(reply, text=clean_text(before + reply.text, run.boundary, known)) if before else reply
    if not calls:
        try:
            calls = parse_tool_calls(whole.text, known, is_cut=is_cut)
        except ParseFailure as error:
            if is_cut and reply.text:
                return reply, Answer(whole, problem=str(error), is_cut=True)
            return reply, _unparsed(run, phase, whole, _no_call(run) if run.model.native else str(error))
    elif is_cut and "_raw_arguments" in calls[-1].args:
        return reply, _unparsed(run, phase, replace(whole, tool_calls=()), CUT_CALL)
    run.parse_failures = 0
    named = tuple(_with_own_id(run, call, number) for number, call in enumerate(calls, _next_step(run)))
    if reply.tool_calls:
        told = reply if named == reply.tool_calls else replace(reply, tool_calls=named)
        return told, Answer(replace(whole, tool_calls=named) if before else told)
    return reply, Answer(replace(whole, tool_calls=named, text="" if run.model.native else whole.text))


def _no_call(run: RunScope) -> str:
    names, done = ", ".join(run.tools.tool_names), run.config.done_tool
    return f"your reply calls no tool, and only tool calls do anything; call one of {names}; to finish, call {done}"


def _unparsed(run: RunScope, phase: Phase, reply: Reply, problem: str) -> Answer:
    _count_parse_failure(run, phase)
    return Answer(reply, problem=problem)


def _count_parse_failure(run: RunScope, phase: Phase) -> None:
    run.parse_failures += 1
    phase.event(semconv.EVENT_PARSE_FAILURE, {semconv.PARSE_ATTEMPT: run.parse_failures})


def _with_own_id(run: RunScope, call: ToolCall, number: int) -> ToolCall:
    late = run.trace.recorder.late
    call_id = run.unique_call_id(call.call_id if late is None else late.text(call.call_id), number)
    if call_id == call.call_id:
        return call
    return ToolCall(call.tool, call.args, call.reasoning, call_id, call.metadata)  # `replace` takes four times as long

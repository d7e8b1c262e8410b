"""The first half of a turn: build the request, let hooks see it, ask the model, read its reply."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from looplet.backends.adapter import clean_text
from looplet.compact_outcome import CompactOutcome
from looplet.compacting import compact, compact_if_due
from looplet.compaction import OVERFLOW
from looplet.errors import BudgetExhausted, ConfigError, ContextOverflow, ErrorKind, LoopletError, ToolError, words_of
from looplet.events import LifecycleEvent, slot
from looplet.hooks import REWRITES, BoundMethod
from looplet.memory import refresh_memory
from looplet.messages import Message, clean_part
from looplet.modelcall import Request, ask
from looplet.parsing import ParseFailure, parse_tool_calls
from looplet.plan import Effects
from looplet.prompt import Prompt, reread_task
from looplet.scope import RunScope
from looplet.steering import announce, consult, consult_raw, record_results
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
        outgoing = run.outgoing
        outgoing.briefed = []
        if run.config.memory_sources:
            yield from refresh_memory(run, phase)
        yield from compact_if_due(run, phase)
        unseen, run.unseen = run.unseen, []  # not before hooks are asked: a run that is left until then tells them
        rewritten: Sequence[Message] | None = None
        for bound in run.hooks.of("pre_prompt"):
            if run.context is not None:
                yield from consult(run, phase, bound, run.state, run.session_log, run.context, _next_step(run))
                continue
            prompt = outgoing.prompt(rewritten)
            taken: list[Sequence[Message]] = []
            ask = partial(bound.function, run.state, run.session_log, prompt, _next_step(run))
            yield from consult_raw(run, phase, bound, ask, partial(_take, run, prompt, taken))
            if taken:
                _check_promise(bound)
                rewritten = taken[0]
                outgoing.take_briefing()
        if rewritten is not None:
            run.rewrites = run.trace.withhold_results = True
            phase.put({semconv.REQUEST_REWRITTEN: True})
        record_results(run, phase, unseen)
        if run.hooks.of(slot(LifecycleEvent.PRE_LLM_CALL)):
            text = outgoing.new_text(rewritten, whole=run.rewrites)
            yield from announce(run, phase, LifecycleEvent.PRE_LLM_CALL, prompt=text)
        messages = outgoing.request(rewritten)
        outgoing.take_briefing()
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
        return (yield from _continue(run, turn, messages, answer)) if answer.is_cut else answer
    except BudgetExhausted as error:
        run.exhaust(error.limit)
        return Answer(Reply(), error=error)
    except Exception as error:
        if not isinstance(error, LoopletError):
            logged = None if run.boundary.redactors else error  # a log is no place for what must not be seen
            logger.error(
                "looplet: the backend raised %s, which is no BackendError", type(error).__name__, exc_info=logged
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
    outgoing = run.outgoing
    late = partial(_record_late_task, run, messages) if run.asks_rewriters and not outgoing.count else None
    outgoing.count += 1
    request = Request(messages, partial(outgoing.number, messages, is_rewritten=run.rewrites), tools=run.tools)
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
    run.outgoing.briefing = [*run.outgoing.briefed, *run.outgoing.briefing]
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
    return {"prompt": run.outgoing.text, "raw_response": answer.reply.text, "usage": answer.reply.usage}


def error_step(run: RunScope, answer: Answer) -> Step:
    """Return the step that stands for a failed model call or for replies that hold no tool call."""
    if answer.error is not None:
        kind = "" if isinstance(answer.error, LoopletError) else f"{type(answer.error).__name__}: "
        words = run.boundary.text(f"LLM call failed: {kind}{words_of(answer.error)}")
        call, error = ToolCall("__llm_error__"), ToolError(words, kind=ErrorKind.EXECUTION)
    else:
        call, error = ToolCall("__parse_error__"), ToolError(answer.problem, kind=ErrorKind.PARSE, retriable=True)
    return Step(_next_step(run), call, failure(call, error), run.ledger.claim(), run.outgoing.text)


def _next_step(run: RunScope) -> int:
    return len(run.state.steps) + 1


def _check_promise(bound: BoundMethod) -> None:
    """Raise ConfigError for a hook that rewrites although it said it would not: the trace has relied on its word."""
    if bound.rewrites is False:
        raise ConfigError(f"{bound.hook}.pre_prompt rewrote the request, but {bound.hook} says {REWRITES} = False")


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


def _record_late_task(run: RunScope, messages: Sequence[Message], phase: Phase) -> None:
    """Record the task with the first request when a hook may rewrite it: not before the hook has seen it."""
    run.recorded_task = run.task
    if run.rewrites and not any(message is run.outgoing.task for message in messages):
        at = run.outgoing.task_position  # None: taken out of the conversation before anybody could rewrite it
        run.recorded_task = {} if at is None else reread_task(messages[at].text, run.task)
    phase.put(attributes.of_task(run.recorded_task))


def _read(run: RunScope, before: str, phase: Phase, reply: Reply) -> tuple[Reply, Answer]:
    """Find the tool calls of a reply: native ones, else those in its text, of which `before` came earlier."""
    if reply.usage is not None and not before:
        run.conversation.calibrate(reply.usage.input_tokens)
    calls: Sequence[ToolCall] = reply.tool_calls
    is_cut, whole = reply.finish_reason == CUT, reply
    if before:  # what is redacted piece by piece may hold a secret when it is put together
        whole = replace(reply, text=clean_text(before + reply.text, run.boundary, run.tools.tool_names))
    if not calls:
        try:
            calls = parse_tool_calls(whole.text, run.tools.tool_names, is_cut=is_cut)
        except ParseFailure as error:
            if is_cut and reply.text:
                return reply, Answer(whole, problem=str(error), is_cut=True)
            return reply, _unparsed(run, phase, whole, _no_call(run) if run.model.native else str(error))
    elif is_cut and "_raw_arguments" in calls[-1].args:
        return reply, _unparsed(run, phase, replace(whole, tool_calls=()), CUT_CALL)
    run.parse_failures = 0
    named = tuple([_with_own_id(run, call, number) for number, call in enumerate(calls, _next_step(run))])
    if reply.tool_calls:
        with_ids = reply if named == reply.tool_calls else replace(reply, tool_calls=named)
        return with_ids, Answer(replace(whole, tool_calls=named) if before else with_ids)
    return reply, Answer(replace(whole, tool_calls=named, text="" if run.model.native else whole.text))


def _no_call(run: RunScope) -> str:
    names, done = ", ".join(run.tools.tool_names), run.config.done_tool
    finish = f"; to finish, call {done}" if done in run.tools else ""
    return f"your reply calls no tool, and only tool calls do anything; call one of {names}{finish}"


def _unparsed(run: RunScope, phase: Phase, reply: Reply, problem: str) -> Answer:
    _count_parse_failure(run, phase)
    return Answer(reply, problem=problem)


def _count_parse_failure(run: RunScope, phase: Phase) -> None:
    run.parse_failures += 1
    phase.event(semconv.EVENT_PARSE_FAILURE, {semconv.PARSE_ATTEMPT: run.parse_failures})


def _with_own_id(run: RunScope, call: ToolCall, number: int) -> ToolCall:
    late = run.trace.recorder.late
    call_id = run.call_ids.unique(call.call_id if late is None else late.text(call.call_id), number)
    if call_id == call.call_id:
        return call
    return ToolCall(call.tool, call.args, call.reasoning, call_id, call.metadata)  # `replace` takes four times as long

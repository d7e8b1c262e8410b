"""Admission: what is decided about each tool call before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

from looplet.approval import OPTIONS, WAITING, ApprovalRequest, Verdict, answer_of
from looplet.decisions import HookDecision
from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.events import LifecycleEvent, slot
from looplet.plan import SERIAL, Effects
from looplet.scope import RunScope, note_state
from looplet.steering import consult, payload
from looplet.telemetry import attributes, semconv
from looplet.telemetry.spans import Phase
from looplet.tools import ToolSpec, failure
from looplet.types import ToolCall, ToolResult, summarize_args

logger = logging.getLogger("looplet")


@dataclass(slots=True)
class Pending:
    """A call on its way to becoming a step."""

    number: int
    """of its step"""
    call: ToolCall
    spec: ToolSpec | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    """as the function takes them"""
    result: ToolResult | None = None
    ran: bool = False
    rejected: bool = False
    waits: bool = False
    """a human has to decide, and the run pauses for it"""
    question: str | None = None
    """what a gate wants a human to be asked, empty for a question of our own"""
    verdict: Verdict | None = None
    """what a human has decided"""
    recorded: ToolResult | None = None
    """the result that the call's span tells"""
    context: Any = None

    def approver(self, handler: Callable[[str, list[str]], Any] | None) -> Callable[[str, list[str]], Any] | None:
        """Return who answers the tool's own questions: the verdict at hand, else `handler`."""
        verdict = self.verdict
        return handler if verdict is None else lambda prompt, options: verdict.answer


def pre_dispatch(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[Sequence[Pending]]:
    """Decide about each call: as it is, rewritten, answered already, refused, or for a human to decide.

    Returns the calls that go on: those before the first that waits for a human.
    """
    with turn.phase(semconv.PRE_DISPATCH) as phase:
        for item in pending:
            yield from _decide(run, phase, item)
        _withdraw_questions(run, pending)
        if run.trace.observed:
            phase.note(answered=tuple((item.call, item.result) for item in pending if item.result is not None))
    if not run.approvals.requests:
        return pending
    run.say_stop(WAITING)
    return list(takewhile(lambda item: not item.waits, pending))


def check_done(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[None]:
    """Ask the gates about an ending, before the `done` tool executes."""
    for item in pending:
        if item.result is not None or item.call.tool not in run.ending_tools:
            continue
        with turn.phase(semconv.CHECK_DONE) as phase:
            for bound in run.hooks.of("check_done"):
                extra = {"tool_call": item.call} if bound.wants_call else {}
                args = (run.state, run.session_log, run.context, item.number)
                decision = yield from consult(run, phase, bound, *args, **extra)
                if decision.is_block():
                    _reject(item, decision.block or "not accepted")
                    break
                if run.stop is not None:
                    _reject(item, f"the run is stopped: {run.stop}")
                    break


def _decide(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    _name_arguments(run, item)
    _check_verdict(run, phase, item)
    yield from _admit(run, phase, item)
    yield from _permit(run, phase, item)
    if item.result is None and (item.question is not None or item.verdict is not None):
        yield from _ask_human(run, phase, item, item.question or "")
    if item.result is None:
        _validate(run, item)
    if item.result is not None:
        phase.note(tool_call=item.call, tool_result=item.result, step_number=item.number)


def _withdraw_questions(run: RunScope, pending: Sequence[Pending]) -> None:
    """Have nobody wait for a human in a run that a hook has ended meanwhile."""
    if run.stop is None:
        return
    run.approvals.requests.clear()
    for item in pending:
        if item.waits:
            item.waits = False
            _refuse_stopped(run, item)


def _admit(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    if run.stop is not None:  # said about a neighbour in the same batch
        _refuse_stopped(run, item)
        return
    for bound in run.hooks.of("pre_dispatch"):
        if item.result is None:
            decision = yield from consult(run, phase, bound, run.state, run.session_log, item.call, item.number)
            _take(run, item, decision)
    for bound in run.hooks.of(slot(LifecycleEvent.PRE_TOOL_USE)):
        if item.result is None:
            event = payload(run, LifecycleEvent.PRE_TOOL_USE, step_num=item.number, tool_call=item.call)
            _take(run, item, (yield from consult(run, phase, bound, event)))


def _permit(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    for bound in run.hooks.of("check_permission"):
        if item.result is None:
            decision = yield from consult(run, phase, bound, item.call, run.state)
            _take(run, item, decision)


def _take(run: RunScope, item: Pending, decision: HookDecision) -> None:
    """Let a hook's decision about a call count."""
    if decision.updated_args is not None:
        item.call = replace(item.call, args=decision.updated_args)
    if decision.updated_result is not None:
        item.result = replace(decision.updated_result, call_id=item.call.call_id)
    elif decision.is_block():
        _deny(run, item, decision.block, decision.retry)
    elif decision.stop is not None:
        _refuse_stopped(run, item)
    elif decision.is_ask() and item.question is None:
        item.question = decision.block or ""


def _check_verdict(run: RunScope, phase: Phase, item: Pending) -> None:
    """Refuse a call that a human has refused."""
    item.verdict = run.approvals.verdicts.pop(item.call.call_id, None)
    if item.verdict is not None and item.verdict.denies:
        _record_answer(run, phase, item, item.verdict.answer)
        _deny(run, item, item.verdict.reason or "a human refused it", False)


def _ask_human(run: RunScope, phase: Phase, item: Pending, question: str) -> Effects[None]:
    """Get an answer: the verdict at hand, the handler's, or a later one; without anybody to ask, it is no.

    Asked is once, when all hooks have had their say: what a human sees is what will run.
    """
    _validate(run, item)  # nobody is asked about a call that cannot run
    if item.result is not None:
        return
    request = request_of(run, item, question)
    if item.verdict is not None and item.verdict.arguments_sha256 == request.arguments_sha256:
        _record_answer(run, phase, item, item.verdict.answer)
        return
    record_request(run, phase, request)
    if run.config.approval_handler is not None:
        yield from _ask_handler(run, phase, item, request)
    elif run.approvals.askers:
        item.waits = True
        run.approvals.requests.append(request)
    else:
        why = "it needs an approval and nobody can be asked (approval_handler=, or ApprovalHook() to pause)"
        _deny(run, item, why, False)


def _ask_handler(run: RunScope, phase: Phase, item: Pending, request: ApprovalRequest) -> Effects[None]:
    handler = run.config.approval_handler
    assert handler is not None
    try:
        answer = yield from phase.call(partial(handler, request.description, list(request.options)), SERIAL)
    except Exception as error:  # noqa: BLE001 - the caller's code; a gate that fails has refused
        phase.fail_with(error)
        _deny(run, item, f"the approval handler failed ({type(error).__name__})", False)
        return
    try:
        said = answer_of(answer, request.options)
    except ConfigError as error:
        phase.fail_with(error)
        _deny(run, item, run.boundary.text(str(error)), False)
        options = ", ".join(map(repr, request.options))
        logger.error("looplet: the approval_handler gave a %s that is none of %s", type(answer).__name__, options)
        return
    _record_answer(run, phase, item, said)
    if Verdict(said).denies:
        _deny(run, item, "a human refused it", False)


def request_of(
    run: RunScope, item: Pending, question: str, options: Sequence[str] = OPTIONS, has_run: bool = False
) -> ApprovalRequest:
    """Return the question about a call."""
    call = item.call
    words = question or f"Run {call.tool}({summarize_args(call.args)})?"
    sha256 = attributes.hash_arguments(call)
    named = call.tool, words, tuple(options), call.call_id
    return ApprovalRequest(item.number, *named, call.args, sha256, has_run, run.run_id)


def record_request(run: RunScope, phase: Phase, request: ApprovalRequest) -> None:
    """Record that a human has to decide; what it is about may be what a rewriting hook has not seen yet."""
    facts = {semconv.TOOL_NAME: request.tool, semconv.TOOL_CALL_ID: request.call_id}
    facts[semconv.ARGUMENTS_SHA256] = request.arguments_sha256
    if not run.trace.withhold_results:
        facts[semconv.APPROVAL_QUESTION] = request.description
    phase.event(semconv.EVENT_APPROVAL_REQUESTED, facts)


def _record_answer(run: RunScope, phase: Phase, item: Pending, answer: str) -> None:
    facts = {semconv.TOOL_CALL_ID: item.call.call_id, semconv.APPROVAL_VERDICT: run.boundary.text(answer)}
    phase.event(semconv.EVENT_APPROVAL_ANSWERED, facts)


def _deny(run: RunScope, item: Pending, reason: str | None, retry: bool) -> None:
    words = f"Permission denied for tool {item.call.tool!r}" + (f": {reason}" if reason else "")
    item.result = failure(item.call, ToolError(words, kind=ErrorKind.PERMISSION_DENIED, retriable=retry))
    if retry:
        note_state(run.state, "last_error", None)


def _reject(item: Pending, reason: str) -> None:
    item.rejected = True
    item.result = failure(
        item.call,
        ToolError(reason, kind=ErrorKind.VALIDATION, retriable=True),
        args_summary="rejected",
        data={"rejected": True, "reason": reason},
    )


def _name_arguments(run: RunScope, item: Pending) -> None:
    """Give the arguments the names and the forms that the tool will get, so that gates judge what will run."""
    spec = run.tools.get(item.call.tool)
    if spec is not None and (args := spec.as_they_will_run(item.call.args)) is not item.call.args:
        item.call = replace(item.call, args=args)


def _refuse_stopped(run: RunScope, item: Pending) -> None:
    item.result = failure(item.call, ToolError(f"not run: the run is stopped: {run.stop}"))


def _validate(run: RunScope, item: Pending) -> None:
    try:
        spec = run.tools.find(item.call.tool)
        _name_arguments(run, item)  # a hook may have written new ones
        item.arguments = spec.arguments(item.call.args)
        run.tools.needed(spec)
        item.spec = spec
    except ToolError as error:
        item.result = failure(item.call, error)  # in our words, about arguments that are clean

"""Admission: what is decided about each tool call before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from looplet.errors import ErrorKind, ToolError
from looplet.plan import Effects
from looplet.scope import RunScope, note_state
from looplet.steering import consult
from looplet.telemetry import semconv
from looplet.telemetry.spans import Phase
from looplet.tools import ToolSpec, failure
from looplet.types import ToolCall, ToolResult


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
    recorded: ToolResult | None = None
    """the result that the call's span tells"""
    context: Any = None


def pre_dispatch(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[None]:
    """Decide about each call: as it is, rewritten, answered already, or refused."""
    with turn.phase(semconv.PRE_DISPATCH) as phase:
        for item in pending:
            _name_arguments(run, item)
            yield from _admit(run, phase, item)
            yield from _permit(run, phase, item)
            if item.result is None:
                _validate(run, item)
            if item.result is not None:
                phase.note(tool_call=item.call, tool_result=item.result, step_number=item.number)


def check_done(run: RunScope, turn: Phase, pending: Sequence[Pending]) -> Effects[None]:
    """Ask the gates about an ending, before the `done` tool executes."""
    for item in pending:
        if item.result is not None or item.call.tool not in run.config.ending_tools:
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


def _admit(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    if run.stop is not None:  # said about a neighbour in the same batch
        _refuse_stopped(run, item)
        return
    for bound in run.hooks.of("pre_dispatch"):
        decision = yield from consult(run, phase, bound, run.state, run.session_log, item.call, item.number)
        if decision.updated_args is not None:
            item.call = replace(item.call, args=decision.updated_args)
        if decision.updated_result is not None:
            item.result = replace(decision.updated_result, call_id=item.call.call_id)
        elif decision.is_block():
            _deny(run, item, decision.block, decision.retry)
        elif decision.stop is not None:
            _refuse_stopped(run, item)
        if item.result is not None:
            return


def _permit(run: RunScope, phase: Phase, item: Pending) -> Effects[None]:
    for bound in run.hooks.of("check_permission"):
        if item.result is not None:
            return
        decision = yield from consult(run, phase, bound, item.call, run.state)
        if decision.updated_args is not None:
            item.call = replace(item.call, args=decision.updated_args)
        if decision.is_block():
            _deny(run, item, decision.block, decision.retry)
        elif decision.stop is not None:
            _refuse_stopped(run, item)


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
    """Put the arguments under the names that the tool will get, so that gates judge what will run."""
    spec = run.tools.get(item.call.tool)
    if spec is not None and (named := spec.named(item.call.args)) != item.call.args:
        item.call = replace(item.call, args=named)


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

"""The end of a run: the hooks' last word, the totals, and the promise that every span ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Final

from looplet.approval import WAITING
from looplet.decisions import interpret
from looplet.events import LifecycleEvent, slot
from looplet.executors import LastExecutor
from looplet.handle import handle_of
from looplet.hooks import BoundMethod
from looplet.messages import encode
from looplet.models import AGENT
from looplet.plan import Closing, Effects, Skipped, finish
from looplet.scope import RunScope
from looplet.segments import entries_of, record_of
from looplet.state import SessionLog
from looplet.steering import payload, record_results
from looplet.streaming import RunEndEvent, RunStartEvent
from looplet.telemetry import attributes, semconv
from looplet.telemetry.recorder import Recorder, count_drop, error_name
from looplet.telemetry.spans import NORMAL_ENDINGS, Phase

FAILURES: Final = frozenset({"error", "llm_error", "cancelled", "exception_in_body", "interpreter_exit"})
"""stop reasons that make the run's span an error"""


class Recording:
    """The run's span, as a `with` block: whatever happens inside, every span of the run ends with a reason, written.

    No generator: the garbage collector would finalise it before the run that it belongs to.
    """

    __slots__ = ("_root", "_run")

    def __init__(self, run: RunScope) -> None:
        self._run = run

    def __enter__(self) -> Phase:
        run = self._run
        run.emit(RunStartEvent, task=run.task, parent_run_id=run.parent[0] if run.parent else "")
        try:
            for sink in run.trace.recorder.sinks:
                _guarded(sink.attach, run.trace.recorder)
            self._root = run.trace.run(_identity(run), run.links)
        except BaseException:
            self._close()
            raise
        return self._root

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._end(error)
        finally:
            try:
                self._root.__exit__(kind, error, tb)
            finally:
                self._close()

    def _end(self, error: BaseException | None) -> None:
        run, trace = self._run, self._run.trace
        if error is not None:  # the end phase was left before its end
            run.ending = "error" if isinstance(error, Exception) else "cancelled"
        trace.leave_turns()
        ending = run.ending = run.ending or "error"
        trace.sweep(ending if ending in NORMAL_ENDINGS | FAILURES else "error")
        _record_totals(run, self._root, ending)

    def _close(self) -> None:
        recorder = self._run.trace.recorder
        recorder.close()
        try:
            recorder.durable()
        finally:
            for sink in recorder.sinks:
                _guarded(sink.detach, recorder)


def _guarded(tell: Callable[[Recorder], None], recorder: Recorder) -> None:
    try:
        tell(recorder)
    except Exception as error:  # noqa: BLE001 - a sink must not end a run
        count_drop("sink failed", repr(error))


def end_run(run: RunScope, root: Phase, failure: BaseException | None) -> Effects[BaseException | None]:
    """Ask every `on_loop_end` hook; return what is to be raised: `failure`, else what the first of them raised."""
    if not isinstance(failure, GeneratorExit):
        return (yield from _end(run, root, failure))
    # The garbage collector finalises the plan before its run: no effect can be asked for any more.
    run.ending = "closed_by_caller"
    finish(_end(run, root, None), LastExecutor(at_home=False).perform)
    return failure


def settle_observers(run: RunScope, root: Phase, failure: BaseException | None) -> Effects[None]:
    """Await what async observers answered, if anything can be awaited any more."""
    if isinstance(failure, GeneratorExit):
        finish(run.trace.settle(root), LastExecutor(at_home=True).perform)
    else:
        yield from run.trace.settle(root)


def _end(run: RunScope, root: Phase, failure: BaseException | None) -> Effects[BaseException | None]:
    run.trace.leave_turns()
    with root.phase(semconv.END) as phase:
        record_results(run, phase, run.unseen)
        stop = payload(run, LifecycleEvent.STOP, termination_reason=run.ending)
        for bound in run.hooks.of(slot(LifecycleEvent.STOP)):
            failure = failure or (yield from _say_goodbye(phase, bound, partial(bound.function, stop)))
        for bound in run.hooks.of("on_loop_end"):
            llm = handle_of(run, phase, AGENT, is_async=inspect.iscoroutinefunction(bound.function))
            thunk = partial(bound.function, run.state, run.session_log, run.context, llm)
            error = yield from _say_goodbye(phase, bound, thunk)
            failure = failure or error
        if run.ending == WAITING and failure is None:
            failure = yield from _pause(run, phase)
        if failure is not None and run.ending not in FAILURES:
            run.ending = "error"
        if run.ending != WAITING:
            run.approvals.requests.clear()
        phase.put({semconv.STOP_REASON: run.ending or ""})
        if not run.rewrites and (notes := own_notes(run)) is not None:  # a hook's words about what is rewritten
            phase.put({semconv.SESSION_LOG: notes})
        if failure is not None:
            phase.fail_with(failure)
    if isinstance(failure, Exception):
        root.fail_with(failure)
    elif failure is not None:
        root.fail("cancelled", error_name(failure))
    return failure


def _pause(run: RunScope, phase: Phase) -> Effects[Exception | None]:
    """Write down what the run goes on with, and say what it waits for; return what a hook raised at that.

    Not into the file where a hook rewrites requests: the conversation as it stands has not been rewritten.
    """
    try:
        record = record_of(run)
        for take in run.approvals.askers:
            yield from phase.call(partial(take, tuple(run.approvals.requests), run.run_id))
    except Exception as error:  # noqa: BLE001 - hooks, on whose memory and word the next segment would rely
        return error
    run.approvals.pause = record
    if phase.recording and not run.rewrites:
        phase.put(attributes.of_request(run.outgoing.log.aside(list(run.conversation))))
        phase.put({semconv.PAUSE: encode(run.approvals.pause).decode()})
    return None


def _say_goodbye(phase: Phase, bound: BoundMethod, thunk: Callable[[], Any]) -> Effects[Exception | None]:
    name = {semconv.HOOK_NAME: bound.hook, semconv.HOOK_METHOD: bound.method}
    try:
        value = yield from phase.call(thunk)
        interpret(value, bound.hook, bound.method)
    except (Skipped, Closing):
        phase.event(semconv.EVENT_HOOK_SKIPPED, name)
    except Exception as error:  # noqa: BLE001 - a hook; every other one still gets its turn
        phase.event(semconv.EVENT_HOOK, {**name, semconv.ERROR_TYPE: error_name(error)})
        phase.put(name)
        return error
    return None


def _identity(run: RunScope) -> dict[str, object]:
    return {
        semconv.OPERATION_NAME: semconv.INVOKE_AGENT,
        semconv.AGENT_NAME: run.trace.agent,
        semconv.SEGMENT_NUMBER: run.segment,
    }


def _record_totals(run: RunScope, root: Phase, ending: str) -> None:
    ledger = run.ledger
    root.put(
        {
            semconv.STOP_REASON: ending,
            semconv.STEP_COUNT: len(run.state.steps),
            semconv.TURN_COUNT: run.trace.turn_number,
            **attributes.of_ledger(ledger),
            **run.budget_left(),
            **{f"{semconv.BUDGET_UNCHECKED}.{name}": calls for name, calls in run.guard.unchecked().items()},
        }
    )
    if ending == "budget_exhausted" and run.spent_limit is not None:
        root.put({semconv.BUDGET_EXHAUSTED: run.spent_limit})
    if ending in FAILURES and not root.failed:
        root.fail(ending)
    root.note(stop_reason=ending, usage=ledger.own, steps=len(run.state.steps))
    run.emit(RunEndEvent, stop_reason=ending, steps=len(run.state.steps), usage=ledger.own)


def own_notes(run: RunScope) -> str | None:
    """Return the session log's text where somebody else wrote into it too: the steps alone do not tell it then."""
    if entries_of(run.state.steps) == run.session_log.entries and run.session_log.title == SessionLog().title:
        return None
    return run.boundary.text(run.session_log.render())

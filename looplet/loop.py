"""The plan of a run, phase by phase: pre_prompt, chat, pre_dispatch, check_done, dispatch, post_dispatch, yield, stop?

It is a generator that performs no I/O (`looplet.plan`); `looplet.run` drives it, sync or async.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from looplet.asking import chat, error_step, facts_of, pre_prompt, remember
from looplet.dispatch import take_calls
from looplet.ending import Recording, end_run, settle_observers
from looplet.events import LifecycleEvent, slot
from looplet.plan import Closing, Effects, Plan
from looplet.scope import RunResult, RunScope
from looplet.steering import announce, consult
from looplet.streaming import TurnEndEvent, TurnStartEvent
from looplet.telemetry import attributes, semconv
from looplet.telemetry.manifest import manifest
from looplet.telemetry.spans import Phase
from looplet.types import Step, ToolCall


def agent_plan(run: RunScope) -> Plan[Step, RunResult]:
    """Yield the steps of a run; return what it came to.  Every way out goes through the end phase."""
    failure: BaseException | None = None
    with Recording(run) as root:
        try:
            yield from begin(run, root)
            yield from take_turns(run, root)
            run.ending = run.stop or "budget_exhausted"
        except Closing as closing:
            run.ending = closing.reason
        except Exception as error:  # noqa: BLE001 - raised again below, after the end phase
            run.ending, failure = "error", error
        except BaseException as error:  # noqa: BLE001 - Ctrl-C, cancellation; raised again below
            run.ending, failure = "cancelled", error
        failure = yield from end_run(run, root, failure)
    yield from settle_observers(run, root, failure)
    if failure is not None:
        raise failure
    return run.result(run.ending)


def begin(run: RunScope, root: Phase) -> Effects[None]:
    """Write the manifest, so that a killed run keeps it, and ask the `pre_loop` hooks."""
    if not run.asks_rewriters:
        run.recorded_task = run.task
    elif any(hook.rewrites for hook in run.hooks.of("pre_prompt")):
        run.rewrites = run.trace.withhold_results = True
    with root.phase(semconv.START, attributes=manifest(run) if root.recording else None):
        pass
    run.trace.durable()
    for take in run.approvals.askers:  # who waited for an answer waits no more
        yield from root.call(partial(take, (), run.run_id))
    if run.hooks.of("pre_loop"):
        with root.phase(semconv.PRE_LOOP) as phase:
            for bound in run.hooks.of("pre_loop"):
                yield from consult(run, phase, bound, run.state, run.session_log, run.context)
    yield from announce(run, root, LifecycleEvent.SESSION_START)


def take_turns(run: RunScope, root: Phase) -> Plan[Step, None]:
    """Take turns until something says stop.

    By itself: a Ctrl-C where a `while` jumps back passes the `try` around it in Python 3.12 and 3.13 (gh-130279).
    """
    while run.stop is None and run.limit is None:
        yield from take_turn(run, root)


def take_turn(run: RunScope, root: Phase) -> Plan[Step, None]:
    """Ask the model once and run the calls of its reply; yield a step for each."""
    run.check_cancelled()
    with run.trace.turn(root) as turn:
        run.state.step_context = {}
        if turn.recording and run.guard.levels:
            turn.put(run.budget_left())
        run.emit(TurnStartEvent)
        try:
            calls = run.approvals.take_held() or (yield from propose(run, turn))
            entities = yield from take_calls(run, turn, calls)
            yield from should_stop(run, turn, entities)
            yield from run.trace.settle(turn)
        finally:
            run.emit(TurnEndEvent)
    run.trace.durable()


def propose(run: RunScope, turn: Phase) -> Plan[Step, Sequence[ToolCall]]:
    """Return the calls that the model wants; yield the step that stands for an answer without any."""
    messages = yield from pre_prompt(run, turn)
    if run.stop is not None:
        return ()
    answer = yield from chat(run, turn, messages)
    if answer is None:
        return ()
    if answer.error is None:
        remember(run, answer)
        if run.hooks.of(slot(LifecycleEvent.POST_LLM_RESPONSE)):
            yield from announce(run, turn, LifecycleEvent.POST_LLM_RESPONSE, **facts_of(run, answer))
    if run.stop == "llm_error" or run.parse_failures > run.config.parse_recovery:
        run.parse_failures = 0
        step = error_step(run, answer)
        turn.event(semconv.EVENT_STEP, attributes.of_step(step))
        run.ledger.count_step()
        run.state.steps.append(step)
        yield step
    return answer.reply.tool_calls


def should_stop(run: RunScope, turn: Phase, entities: int) -> Effects[None]:
    """Ask the hooks whether that was the last turn."""
    if not run.hooks.of("should_stop") or run.stop is not None:
        return
    with turn.phase(semconv.SHOULD_STOP) as phase:
        for bound in run.hooks.of("should_stop"):
            yield from consult(run, phase, bound, run.state, len(run.state.steps), entities)

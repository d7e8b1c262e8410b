"""What sync and async runs share: the plan, and every way of leaving it without waiting for anything."""

from __future__ import annotations

import atexit
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from looplet.errors import ConfigError
from looplet.executors import AsyncExecutor, LastExecutor, SyncExecutor
from looplet.plan import Closing

if TYPE_CHECKING:  # the loop itself is loaded by the first run, so that importing looplet stays cheap
    from looplet.approval import ApprovalRequest
    from looplet.scope import RunResult, RunScope
    from looplet.segments import Paused

ExecutorT = TypeVar("ExecutorT", SyncExecutor, AsyncExecutor)

_open_runs: dict[int, weakref.ref[BaseRun[Any]]] = {}
"""by `id`; a WeakSet would run Python code whenever a run goes away, and lose the Ctrl-C that comes just then"""


class BaseRun(Generic[ExecutorT]):
    """What sync and async runs share: the plan, and every way of leaving it."""

    def __init__(self, scope: RunScope, executor: ExecutorT) -> None:
        from looplet.loop import agent_plan

        self._scope = scope
        self._plan: Any = agent_plan(scope)  # a generator object: `gi_frame` and `gi_running` are asked for
        self._executor: ExecutorT = executor
        self._thread = threading.get_ident()
        self._pid = os.getpid()
        self._started = False
        self._driving = False
        self._asked_to_close: str | None = None
        self.result: RunResult | None = None
        """what the run came to; None until it has ended by itself"""

    @property
    def run_id(self) -> str:
        """Return the run's id: 32 hex digits."""
        return self._scope.trace.recorder.run_id

    @property
    def trace_id(self) -> str | None:
        """Return the trace's id, None before the first step."""
        return self._scope.trace.trace_id

    @property
    def stop_reason(self) -> str | None:
        """Return why the run ended, None while it has not."""
        return self._scope.ending if self._ended else None

    @property
    def state(self) -> Any:
        """Return the run's state."""
        return self._scope.state

    @property
    def pending(self) -> Sequence[ApprovalRequest]:
        """Return the calls that a paused run waits for a human to approve."""
        return tuple(self._scope.approvals.requests)

    @property
    def paused(self) -> Paused | None:
        """Return what a paused run goes on with; pass the run itself as `resume=`."""
        from looplet.segments import paused_run

        return paused_run(self._scope)

    @property
    def task(self) -> dict[str, Any]:
        """Return the task as it was recorded; `{}` while a hook that may rewrite it has not seen it."""
        return self._scope.recorded_task

    @property
    def session_log(self) -> Any:
        """Return the run's notes."""
        return self._scope.session_log

    @property
    def session_log_text(self) -> str:
        """Return the run's notes as the trace tells them."""
        from looplet.ending import own_notes

        notes = own_notes(self._scope)
        return self._scope.session_log.render() if notes is None else notes

    @property
    def _ended(self) -> bool:
        return self._plan.gi_frame is None

    def _begin(self) -> None:
        self._require_own_process()
        if self._driving:
            raise ConfigError("this run is being iterated already; one step at a time")
        if not self._started:
            if self._scope.approvals.claim is not None:
                self._scope.approvals.claim()
            self._started = True
            _open_runs[id(self)] = weakref.ref(self)
        self._thread = threading.get_ident()

    @property
    def _inherited(self) -> bool:
        return os.getpid() != self._pid

    def _require_own_process(self) -> None:
        if os.getpid() != self._pid:
            raise ConfigError("this run belongs to the parent process; start a new one after the fork")

    def _ask_to_close(self, reason: str) -> None:
        """Have the run left as soon as what is going on has come back, and tell the tools that work."""
        if self._asked_to_close is None:
            self._asked_to_close = self._scope.leaving_as = reason
        self._scope.cancel_token.cancel(self._asked_to_close)

    def _advance(self, resume: Callable[[Any], Any], value: Any) -> Any:
        """Resume the plan; return what it asks for next, after a close that somebody asked for meanwhile."""
        item = resume(value)
        if self._asked_to_close is None or self._scope.ending is not None:
            return item
        reason, self._asked_to_close = self._asked_to_close, None
        return self._plan.throw(Closing(reason))

    def _settle(self, error: BaseException | None = None) -> None:
        """Note that the plan has ended."""
        if isinstance(error, StopIteration):
            self.result = error.value
        _open_runs.pop(id(self), None)
        self._executor.close()

    def _nothing_to_leave(self, reason: str) -> bool:
        """Tell whether there is nothing to leave; a run that never started ends without a trace of itself."""
        if self._inherited:
            return True
        if inspect.getgeneratorstate(self._plan) == inspect.GEN_CREATED:
            self._plan.close()
            self._scope.ending = reason
        return self._ended

    def _leave_now(self, reason: str) -> BaseException | None:
        """Leave without waiting for anything; return what the run raises.

        What needs an event loop or a thread is skipped, and said to be.  So is everything of the caller's when this
        is not the run's thread: the garbage collector runs in any, with who knows which locks held.
        """
        if self._nothing_to_leave(reason):
            return None
        executor = LastExecutor(at_home=self._thread == threading.get_ident())
        resume: Callable[[Any], Any] = self._plan.throw
        value: Any = Closing(reason)
        while not self._plan.gi_running:  # else another thread is in it
            try:
                value, resume = executor.perform(resume(value)), self._plan.send
            except BaseException as error:  # noqa: BLE001 - relayed into the plan until it has ended
                if self._ended:
                    self._settle(error)
                    return None if isinstance(error, (StopIteration, Closing)) else error
                value, resume = error, self._plan.throw
        return None

    def __del__(self) -> None:
        if not getattr(self, "_started", False) or sys.is_finalizing() or self._inherited:
            return
        error = self._leave_now("closed_by_caller")
        self._settle(error)  # also when the collector finalised the plan first
        if error is not None:
            raise error  # Python reports it: "Exception ignored in ..."


def _runs_alive() -> list[BaseRun[Any]]:
    return [run for reference in list(_open_runs.values()) if (run := reference()) is not None]


@atexit.register
def _leave_open_runs() -> None:
    for run in _runs_alive():
        if (error := run._leave_now("interpreter_exit")) is not None:  # noqa: SLF001 - same module
            sys.excepthook(type(error), error, error.__traceback__)


def _disown_runs() -> None:
    """In a forked child: the runs are the parent's, and nothing that happens to them here is recorded."""
    for run in _runs_alive():
        run._scope.trace.recorder.disown()  # noqa: SLF001 - same module
    _open_runs.clear()


os.register_at_fork(after_in_child=_disown_runs)

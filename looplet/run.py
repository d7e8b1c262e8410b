"""`composable_loop` and its async twin: one plan, two drivers.

    for step in composable_loop(llm=..., tools=..., task={...}):
        print(step.pretty())

A run ends when its plan does.  It can also be left: `break`, `close()`, an exception in a `with` body, dropping it,
the end of the interpreter.  Leaving throws `Closing(reason)` into the plan and goes on performing its effects, so
that the end phase (`on_loop_end` hooks, totals, the last lines of the trace) happens however the run ends.
"""

from __future__ import annotations

import atexit
import inspect
import os
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from looplet.errors import ConfigError
from looplet.executors import AsyncExecutor, LastExecutor, SyncExecutor
from looplet.plan import Call, Closing, Gather, Wait

if TYPE_CHECKING:  # the loop itself is loaded by the first run, so that importing looplet stays cheap
    from looplet.config import LoopConfig
    from looplet.messages import Conversation
    from looplet.scope import RunResult, RunScope
    from looplet.types import Step

ExecutorT = TypeVar("ExecutorT", SyncExecutor, AsyncExecutor)

_open_runs: dict[int, weakref.ref[_Run[Any]]] = {}
"""by `id`; a WeakSet would run Python code whenever a run goes away, and lose the Ctrl-C that comes just then"""


class _Run(Generic[ExecutorT]):
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
            self._started = True
            _open_runs[id(self)] = weakref.ref(self)
        self._thread = threading.get_ident()

    @property
    def _inherited(self) -> bool:
        return os.getpid() != self._pid

    def _require_own_process(self) -> None:
        if self._inherited:
            raise ConfigError("this run belongs to the parent process; start a new one after the fork")

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


class Run(_Run[SyncExecutor], Iterator["Step"]):
    """One run under `for`.  Also a context manager, which can tell an exception in its body from a `break`."""

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        raise ConfigError("this run is for `for`; for `async for`, make it with async_composable_loop(...)")

    def __next__(self) -> Step:
        if self._ended:
            raise StopIteration
        self._begin()
        step: Step = self._drive(self._plan.send, None)
        return step

    def close(self, reason: str = "closed_by_caller") -> None:
        """End the run now, in order; does nothing when it has ended.

        From a hook or another thread: as soon as what is going on there has come back.
        """
        if self._nothing_to_leave(reason):
            return
        if self._driving:
            self._asked_to_close = reason
            return
        with suppress(StopIteration):
            self._drive(self._plan.throw, Closing(reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(_reason_for(kind))

    def _drive(self, resume: Callable[[Any], Any], value: Any) -> Any:
        """Perform effects until the plan yields a step; raises StopIteration, or what the run raises, at its end."""
        self._driving = True
        try:
            return self._perform(resume, value)
        except BaseException as error:
            if self._ended or self._inherited:
                raise
            return self._perform(self._plan.throw, error)  # a Ctrl-C in the driver itself, between two effects
        finally:
            self._driving = False

    def _perform(self, resume: Callable[[Any], Any], value: Any) -> Any:
        while True:
            self._require_own_process()  # a tool may have forked
            try:
                item = self._advance(resume, value)
                if not isinstance(item, (Call, Gather, Wait)):
                    return item
                value, resume = self._executor.perform(item), self._plan.send
            except BaseException as error:  # relayed into the plan until it has ended
                if self._inherited:
                    raise
                if self._ended:
                    self._settle(error)
                    raise
                value, resume = error, self._plan.throw


class AsyncRun(_Run[AsyncExecutor], AsyncIterator["Step"]):
    """One run under `async for`.  Also an async context manager."""

    def __aiter__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        raise ConfigError("this run is for `async for`; for `for`, make it with composable_loop(...)")

    async def __anext__(self) -> Step:
        if self._ended:
            raise StopAsyncIteration
        self._begin()
        try:
            step: Step = await self._drive(self._plan.send, None)
        except _PlanReturned:
            raise StopAsyncIteration from None
        return step

    async def aclose(self, reason: str = "closed_by_caller") -> None:
        """End the run now, in order; does nothing when it has ended.

        From a hook, or while another task awaits a step: as soon as what is going on there has come back.
        """
        if self._nothing_to_leave(reason):
            return
        if self._driving:
            self._asked_to_close = reason
            return
        with suppress(_PlanReturned):
            await self._drive(self._plan.throw, Closing(reason))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose(_reason_for(kind))

    async def _drive(self, resume: Callable[[Any], Any], value: Any) -> Any:
        """Like `Run._drive`; raises `_PlanReturned` at the end, because coroutines may not raise StopIteration."""
        self._driving = True
        try:
            return await self._perform(resume, value)
        except GeneratorExit:  # the awaiting coroutine is closed: nothing can be awaited any more
            self._leave_now("cancelled")
            raise
        except BaseException as error:
            if self._ended or self._inherited:
                raise
            return await self._perform(self._plan.throw, error)  # a Ctrl-C in the driver itself, between two effects
        finally:
            self._driving = False

    async def _perform(self, resume: Callable[[Any], Any], value: Any) -> Any:
        while True:
            self._require_own_process()  # a tool may have forked
            try:
                item = self._advance(resume, value)
                if not isinstance(item, (Call, Gather, Wait)):
                    return item
                value, resume = await self._executor.perform(item), self._plan.send
            except GeneratorExit:
                raise
            except BaseException as error:
                if self._inherited:
                    raise
                if self._ended:
                    self._settle(error)
                    if isinstance(error, StopIteration):
                        raise _PlanReturned from None
                    raise
                value, resume = error, self._plan.throw


class _PlanReturned(Exception):
    """The plan has returned its result."""


def _reason_for(kind: type[BaseException] | None) -> str:
    return "closed_by_caller" if kind is None or issubclass(kind, GeneratorExit) else "exception_in_body"


def composable_loop(
    llm: Any,
    task: dict[str, Any] | None = None,
    tools: Any = None,
    context: Any = None,
    hooks: Sequence[Any] | None = None,
    config: LoopConfig | None = None,
    state: Any = None,
    session_log: Any = None,
    stream: Any = None,
    conversation: Conversation | None = None,
    *,
    max_steps: int | None = None,
    system_prompt: str | None = None,
    tracer_provider: Any = None,
) -> Run:
    """Return the run of an agent: iterate over it to make it happen, a `Step` for each tool call.

    llm: a backend (`looplet.backends`).  task: JSON-like, shown to the model as `key: value` lines.
    tools: a `BaseToolRegistry` (`tools_from([...])`).  context: an object of yours that hooks get.
    max_steps: beats the config's; when an explicit state disagrees, the smaller wins.

    Raises ConfigError here, not at the first step, for arguments that cannot work.
    """
    from looplet.setup import make_scope

    settings: dict[str, Any] = dict(  # noqa: C408 - reads as the call it becomes
        context=context, hooks=hooks, config=config, state=state, session_log=session_log, stream=stream,
        conversation=conversation, max_steps=max_steps, system_prompt=system_prompt, tracer_provider=tracer_provider,
    )  # fmt: skip
    return Run(make_scope(llm, task, tools, sync=True, **settings), SyncExecutor())


def async_composable_loop(
    llm: Any,
    task: dict[str, Any] | None = None,
    tools: Any = None,
    context: Any = None,
    hooks: Sequence[Any] | None = None,
    config: LoopConfig | None = None,
    state: Any = None,
    session_log: Any = None,
    stream: Any = None,
    conversation: Conversation | None = None,
    *,
    max_steps: int | None = None,
    system_prompt: str | None = None,
    tracer_provider: Any = None,
) -> AsyncRun:
    """Return the run of an agent for `async for`; the parameters are those of `composable_loop`.

    Backends, tools and hooks may be `async def`; sync tools and backends run on looplet's own threads.
    """
    from looplet.setup import make_scope

    settings: dict[str, Any] = dict(  # noqa: C408 - reads as the call it becomes
        context=context, hooks=hooks, config=config, state=state, session_log=session_log, stream=stream,
        conversation=conversation, max_steps=max_steps, system_prompt=system_prompt, tracer_provider=tracer_provider,
    )  # fmt: skip
    return AsyncRun(make_scope(llm, task, tools, sync=False, **settings), AsyncExecutor())


def _runs_alive() -> list[_Run[Any]]:
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

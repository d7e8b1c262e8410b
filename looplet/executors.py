"""Who performs a plan's effects: under `for`, under `async for`, and when there is no time left.

Every call runs in a copy of the caller's context variables with the effect's OpenTelemetry context in it.  Nothing
is ever attached in the caller's own context, so nothing can stay there, however the call ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import Context as ContextVars
from contextvars import copy_context
from functools import partial
from typing import Any

from opentelemetry.context import Context, attach

from looplet.awaiting import (
    Outcome,
    PrivateLoop,
    awaited,
    cancel_task,
    discard,
    is_awaitable,
    job_done,
    outcome_of,
    pause,
    start_task,
    unless_cancelled,
)  # fmt: skip
from looplet.cancel import CancelToken
from looplet.errors import ConfigError
from looplet.plan import INLINE, PARALLEL, Call, Closing, Effect, Effects, Escaped, Skipped, Wait, finish
from looplet.threads import Job, Worker, acquire, wait_for_either


def _enter(context: Context, thunk: Callable[[], Any]) -> Any:
    attach(context)  # in a copy that nobody sees afterwards: no detach needed, none can be missed
    try:
        return thunk()
    except (StopIteration, GeneratorExit) as error:  # would end whichever generator or coroutine it comes through
        raise Escaped(error) from error


class LastExecutor:
    """Performs what needs neither waiting nor threads: for runs that were dropped, and at interpreter exit.

    at_home: whether this is the run's own thread.  In any other, nothing of the caller's is called.
    """

    def __init__(self, *, at_home: bool) -> None:
        self._at_home = at_home

    def perform(self, effect: Effect) -> Any:
        """Run an inline call; raises `Skipped` for everything else."""
        if not isinstance(effect, Call) or effect.lane != INLINE or not self._at_home:
            raise Skipped
        value = copy_context().run(_enter, effect.context, effect.thunk)
        if is_awaitable(value):
            discard(value)
            raise Skipped
        return value

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""


class SyncExecutor:
    """Performs effects under `for`: here, but for timed and parallel calls (threads) and `async def` (one loop)."""

    def __init__(self) -> None:
        self._loop: PrivateLoop | None = None
        self._starting = threading.Lock()
        self._closed = False

    def perform(self, effect: Effect) -> Any:
        """Perform one effect; raises what it raises, `CallTimeout` and `CallCancelled` when nobody waits any longer.

        A token that only the run itself can cancel interrupts nothing here: the run is in the call.
        """
        if not isinstance(effect, Call):
            return _wait(effect) if isinstance(effect, Wait) else self._gather(effect.plans)
        variables = copy_context()
        token = effect.token if effect.token is not None and effect.token.is_given else None
        if effect.lane == INLINE or (effect.timeout_s is None and token is None):
            value = variables.run(_enter, effect.context, effect.thunk)
        else:
            value = _in_thread(partial(variables.run, _enter, effect.context, effect.thunk), effect.timeout_s, token)
        if is_awaitable(value):
            value = self._await(value, variables, effect.timeout_s)
        return value

    def close(self) -> None:
        """Stop the private event loop, if a call ever needed one; a call that comes back late gets no other."""
        self._closed = True
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _await(self, value: Awaitable[Any], variables: ContextVars, timeout_s: float | None) -> Any:
        try:
            with self._starting:  # parallel calls must not start two loops
                if self._closed:
                    raise Closing("cancelled")
                if self._loop is None:
                    self._loop = PrivateLoop()
                loop = self._loop
        except BaseException:  # Ctrl-C; or no more threads
            discard(value)
            raise
        return loop.run(value, variables, timeout_s)

    def _gather(self, plans: tuple[Effects[Any], ...]) -> list[Any]:
        batch = _Batch(self.perform)
        try:
            for plan in plans:
                batch.begin(plan)
            return _unwrap(batch.outcomes())
        except BaseException:  # Ctrl-C while they run: nobody waits for them any more
            batch.abandon()
            raise


class _Batch:
    """Sub-plans that run at the same time, each on a thread of its own, with the caller's context variables."""

    def __init__(self, perform: Callable[[Effect], Any]) -> None:
        self._perform = perform
        self._abandoned = False
        self._running: list[tuple[Job, Worker]] = []

    def begin(self, plan: Effects[Any]) -> None:
        """Begin a sub-plan."""
        job = Job(partial(copy_context().run, finish, plan, self._perform_unless_abandoned))
        worker = acquire()
        self._running.append((job, worker))
        worker.submit(job)

    def outcomes(self) -> list[Outcome]:
        """Wait for all; return the value or the error of each, in order."""
        jobs = [job for job, _ in self._running]
        for job in jobs:
            job.wait_done()
        while self._running:
            self._running.pop()[1].release()
        return [(job.value, job.error) for job in jobs]

    def abandon(self) -> None:
        """Let go of them: what has not begun never does, and nobody hears of what comes back."""
        self._abandoned = True
        for _, worker in self._running:
            worker.abandon()

    def _perform_unless_abandoned(self, effect: Effect) -> Any:
        if self._abandoned:
            raise Closing("cancelled")
        value = self._perform(effect)
        if self._abandoned:
            raise Closing("cancelled")
        return value


def _unwrap(outcomes: list[Outcome]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]


def _wait(effect: Wait) -> None:
    if effect.token is None:
        time.sleep(effect.seconds)
    else:
        effect.token.wait(effect.seconds)


def _in_thread(thunk: Callable[[], Any], timeout_s: float | None, token: CancelToken | None) -> Any:
    job, worker = Job(thunk), acquire()
    try:
        worker.submit(job)
        if token is None:
            job.wait_done(timeout_s)
        else:
            wait_for_either(job, token, timeout_s)
    except BaseException:
        worker.abandon()
        raise
    worker.release()
    return job.outcome()


class AsyncExecutor:
    """Performs effects under `async for`: `async def` here, whatever may block on looplet's own threads."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    async def perform(self, effect: Effect) -> Any:
        """Perform one effect; raises what it raises, `CallTimeout` and `CallCancelled` when nobody waits any longer."""
        if not isinstance(effect, Call):
            return await (pause(effect) if isinstance(effect, Wait) else self._gather(effect.plans))
        if effect.token is None:
            return await self._call(effect)
        return await unless_cancelled(self._call(effect), effect.token)

    async def _call(self, effect: Call) -> Any:
        variables = copy_context()
        run = partial(variables.run, _enter, effect.context, effect.thunk)
        value = run() if effect.lane == INLINE else await self._in_thread(run, effect)
        if is_awaitable(value):
            value = await awaited(value, variables, effect.timeout_s)
        return value

    def close(self) -> None:
        """Give the run's thread back."""
        if self._worker is not None:
            self._worker.release()
            self._worker = None

    async def _in_thread(self, thunk: Callable[[], Any], effect: Call) -> Any:
        own = effect.lane == PARALLEL or effect.timeout_s is not None
        worker = acquire() if own else self._take_worker()
        job = Job(thunk)
        worker.submit(job)
        try:
            await job_done(job, effect.timeout_s)
        except BaseException:
            worker.abandon()
            raise
        if own or self._worker is not None:
            worker.release()
        else:
            self._worker = worker
        return job.outcome()

    def _take_worker(self) -> Worker:
        """Return the run's own thread, to be put back after its work: `close` must not give away one that is busy."""
        worker, self._worker = self._worker, None
        return worker or acquire()

    async def _gather(self, plans: tuple[Effects[Any], ...]) -> list[Any]:
        import asyncio

        loop = asyncio.get_running_loop()
        tasks = [start_task(loop, self.finish(plan), copy_context()) for plan in plans]
        try:
            await asyncio.wait(tasks)
        except BaseException as error:
            for task in tasks:
                cancel_task(task)
            if not isinstance(error, GeneratorExit):  # being closed, nothing can be awaited any more
                await asyncio.wait(tasks)
            raise
        return _unwrap([outcome_of(task) for task in tasks])

    async def finish(self, plan: Effects[Any]) -> Any:
        """Run a sub-plan to its end, performing its effects one by one."""
        resume: Callable[[Any], Effect] = plan.send
        value: Any = None
        while True:
            try:
                effect = resume(value)
            except StopIteration as stop:
                return stop.value
            try:
                value, resume = await self.perform(effect), plan.send
            except BaseException as error:  # noqa: BLE001 - relayed into the plan, which re-raises
                value, resume = error, plan.throw


def refuse_async(value: Any) -> Any:
    """Return `value`; raises `ConfigError` when it is awaitable: an async backend under `for`."""
    if is_awaitable(value):
        discard(value)
        raise ConfigError("this backend is async: iterate with `async for step in async_composable_loop(...)`")
    return value


__all__ = ["AsyncExecutor", "LastExecutor", "PrivateLoop", "SyncExecutor", "job_done", "refuse_async"]

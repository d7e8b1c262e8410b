"""Who performs a plan's effects: under `for`, under `async for`, and when there is no time left.

Every call runs in a copy of the caller's context variables with the effect's OpenTelemetry context in it.  Nothing
is ever attached in the caller's own context, so nothing can stay there, however the call ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from contextvars import Context as ContextVars
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context, attach

from looplet.errors import ConfigError
from looplet.plan import INLINE, PARALLEL, SERIAL, Call, CallTimeout, Effect, Effects, Gather, Skipped, finish
from looplet.threads import Job, Worker, acquire

if TYPE_CHECKING:
    import asyncio


def _enter(context: Context, thunk: Callable[[], Any]) -> Any:
    attach(context)  # in a copy that nobody sees afterwards: no detach needed, none can be missed
    return thunk()


def _discard(value: Any) -> None:
    """Close a coroutine that nobody will await."""
    if inspect.iscoroutine(value):
        value.close()


class LastExecutor:
    """Performs what needs neither waiting nor threads: for runs that were dropped, and at interpreter exit."""

    def perform(self, effect: Effect) -> Any:
        """Run an inline call; raises `Skipped` for everything else."""
        if isinstance(effect, Gather) or effect.lane != INLINE:
            raise Skipped
        value = copy_context().run(_enter, effect.context, effect.thunk)
        if inspect.isawaitable(value):
            _discard(value)
            raise Skipped
        return value

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""


class SyncExecutor:
    """Performs effects under `for`: here, but for timed and parallel calls (threads) and `async def` (one loop)."""

    def __init__(self) -> None:
        self._loop: PrivateLoop | None = None

    def perform(self, effect: Effect) -> Any:
        """Perform one effect; raises what it raises, and `CallTimeout` when it took too long."""
        if isinstance(effect, Gather):
            return self._gather(effect.plans)
        variables = copy_context()
        run = partial(variables.run, _enter, effect.context, effect.thunk)
        value = run() if effect.timeout_s is None or effect.lane == INLINE else _in_thread(run, effect.timeout_s)
        if inspect.isawaitable(value):
            value = self._await(value, variables, effect.timeout_s)
        return value

    def close(self) -> None:
        """Stop the private event loop, if a call ever needed one."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _await(self, value: Awaitable[Any], variables: ContextVars, timeout_s: float | None) -> Any:
        if self._loop is None:
            self._loop = PrivateLoop()
        return self._loop.run(value, variables, timeout_s)

    def _gather(self, plans: tuple[Effects[Any], ...]) -> list[Any]:
        jobs = []
        for plan in plans:
            job, worker = Job(partial(finish, plan, self.perform)), acquire()
            worker.submit(job)
            jobs.append((job, worker))
        try:
            outcomes = [_outcome(job) for job, _ in jobs]
        except BaseException:  # Ctrl-C while they run: nobody waits for them any more
            for _, worker in jobs:
                worker.abandon()
            raise
        for _, worker in jobs:
            worker.release()
        return _unwrap(outcomes)


def _outcome(job: Job) -> tuple[Any, BaseException | None]:
    job.wait_done()
    return job.value, job.error


def _unwrap(outcomes: list[tuple[Any, BaseException | None]]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]


def _in_thread(thunk: Callable[[], Any], timeout_s: float) -> Any:
    job, worker = Job(thunk), acquire()
    worker.submit(job)
    try:
        job.wait_done(timeout_s)
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
        """Perform one effect; raises what it raises, and `CallTimeout` when it took too long."""
        if isinstance(effect, Gather):
            return await self._gather(effect.plans)
        variables = copy_context()
        run = partial(variables.run, _enter, effect.context, effect.thunk)
        value = run() if effect.lane == INLINE else await self._in_thread(run, effect)
        if inspect.isawaitable(value):
            value = await _awaited(value, variables, effect.timeout_s)
        return value

    def close(self) -> None:
        """Give the run's thread back."""
        if self._worker is not None:
            self._worker.release()
            self._worker = None

    async def _in_thread(self, thunk: Callable[[], Any], effect: Call) -> Any:
        own = effect.lane == PARALLEL or effect.timeout_s is not None
        worker = acquire() if own else self._serial_worker()
        job = Job(thunk)
        worker.submit(job)
        try:
            await _job_done(job, effect.timeout_s)
        except BaseException:
            if worker is self._worker:
                self._worker = None
            worker.abandon()
            raise
        if own:
            worker.release()
        return job.outcome()

    def _serial_worker(self) -> Worker:
        if self._worker is None:
            self._worker = acquire()
        return self._worker

    async def _gather(self, plans: tuple[Effects[Any], ...]) -> list[Any]:
        import asyncio

        tasks = [asyncio.ensure_future(self._finish(plan)) for plan in plans]
        try:
            await asyncio.wait(tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return _unwrap([(None, e) if (e := _error_of(task)) else (task.result(), None) for task in tasks])

    async def _finish(self, plan: Effects[Any]) -> Any:
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


def _error_of(task: asyncio.Future[Any]) -> BaseException | None:
    import asyncio

    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def _job_done(job: Job, timeout_s: float | None) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    def done() -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(wake)

    job.notify(done)
    finished, _ = await asyncio.wait({future}, timeout=timeout_s)
    if not finished:
        raise CallTimeout


async def _awaited(value: Awaitable[Any], variables: ContextVars, timeout_s: float | None) -> Any:
    """Await `value` with the context variables in `variables`, for at most `timeout_s` seconds."""
    if timeout_s is None:
        return await InContext(value, variables)
    import asyncio

    task = asyncio.get_running_loop().create_task(_as_coroutine(value), context=variables)
    try:
        finished, _ = await asyncio.wait({task}, timeout=timeout_s)
    except BaseException:
        _abandon(task)
        raise
    if not finished:
        _abandon(task)
        raise CallTimeout
    return task.result()


async def _as_coroutine(value: Awaitable[Any]) -> Any:
    return await value


def _raise(error: BaseException) -> Any:
    raise error


def _abandon(task: asyncio.Future[Any]) -> None:
    task.add_done_callback(lambda t: t.cancelled() or t.exception())  # seen, so that asyncio does not complain
    task.cancel()


class InContext:
    """An awaitable that steps another one inside a context-variable copy.

    The awaiting task's own context is never touched: cancelling, dropping or closing it leaves nothing attached.
    """

    __slots__ = ("_awaitable", "_variables")

    def __init__(self, awaitable: Awaitable[Any], variables: ContextVars) -> None:
        self._awaitable = awaitable
        self._variables = variables

    def __await__(self) -> Generator[Any, Any, Any]:
        run = self._variables.run
        inner = self._awaitable.__await__()
        send: Callable[[Any], Any] = getattr(inner, "send", None) or (lambda _: next(inner))
        resume, value = send, None
        while True:
            try:
                future = run(resume, value)
            except StopIteration as stop:
                return stop.value
            try:
                value, resume = (yield future), send
            except BaseException as error:  # noqa: BLE001 - relayed into the awaitable, GeneratorExit included
                value, resume = error, getattr(inner, "throw", _raise)


class PrivateLoop:
    """One event loop in a thread of its own, for the `async def` tools and hooks of a run under `for`."""

    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.new_event_loop()
        self._worker = Worker()
        self._worker.submit(Job(self._serve))

    def run(self, value: Awaitable[Any], variables: ContextVars, timeout_s: float | None) -> Any:
        """Await `value` in the loop's thread; raises what it raises, `CallTimeout` after `timeout_s` seconds."""
        job = Job(lambda: None)
        tasks: list[asyncio.Task[Any]] = []

        def start() -> None:
            task = self._loop.create_task(_as_coroutine(value), context=variables)
            tasks.append(task)
            task.add_done_callback(end)

        def end(task: asyncio.Task[Any]) -> None:
            job.error = _error_of(task)
            job.value = None if job.error else task.result()
            job.finish()

        self._loop.call_soon_threadsafe(start)
        try:
            job.wait_done(timeout_s)
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: list(map(_abandon, tasks)))
            raise
        return job.outcome()

    def close(self) -> None:
        """Cancel what still runs and stop the loop; does not wait."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._worker.abandon()

    def _serve(self) -> None:
        import asyncio

        try:
            self._loop.run_forever()
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                _abandon(task)
            if pending:
                self._loop.run_until_complete(asyncio.wait(pending, timeout=1))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


def refuse_async(value: Any) -> Any:
    """Return `value`; raises `ConfigError` when it is awaitable: an async backend under `for`."""
    if inspect.isawaitable(value):
        _discard(value)
        raise ConfigError("this backend is async: iterate with `async for step in async_composable_loop(...)`")
    return value


__all__ = ["PARALLEL", "SERIAL", "AsyncExecutor", "LastExecutor", "SyncExecutor", "refuse_async"]

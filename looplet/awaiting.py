"""Awaiting on a run's behalf: in the caller's event loop, or in a private one.

Whatever is awaited sees the context variables it was started with, and nobody else does.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context as ContextVars
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias

from looplet.cancel import CancelToken
from looplet.plan import CallCancelled, CallTimeout, Escaped, Wait
from looplet.threads import Job, Worker

if TYPE_CHECKING:
    import asyncio

Outcome: TypeAlias = tuple[Any, BaseException | None]
"""a value, or what was raised instead"""


def is_awaitable(value: Any) -> bool:
    """Tell whether `value` can be awaited: `inspect.isawaitable`, at a tenth of its price."""
    kind = type(value)
    return hasattr(kind, "__await__") or (kind is GeneratorType and inspect.isawaitable(value))


def discard(value: Any) -> None:
    """Close a coroutine, or what a method of an async generator returns, that nobody will await."""
    if isinstance(value, Coroutine):
        with suppress(RuntimeError):  # an async generator that awaits while it is being closed
            value.close()


def start_task(loop: asyncio.AbstractEventLoop, value: Awaitable[Any], variables: ContextVars) -> asyncio.Task[Outcome]:
    """Await `value` in a task that never fails: a Ctrl-C or an exit in a task would tear down its event loop."""
    task = loop.create_task(_outcome(value), context=variables)
    task.add_done_callback(lambda _: discard(value))  # cancelled before it began
    return task


async def _outcome(value: Awaitable[Any]) -> Outcome:
    try:
        return await value, None
    except GeneratorExit as error:
        return None, Escaped(error)
    except BaseException as error:  # noqa: BLE001 - handed to the one who waits
        return None, error


def cancel_task(task: asyncio.Task[Outcome]) -> None:
    """Cancel a task, if its event loop is still there to hear of it."""
    with suppress(RuntimeError):
        task.cancel()


def outcome_of(task: asyncio.Task[Outcome]) -> Outcome:
    """Return what came of a task that is done."""
    import asyncio

    return (None, asyncio.CancelledError()) if task.cancelled() else task.result()


async def job_done(job: Job, timeout_s: float | None) -> None:
    """Wait for a job of another thread; raises `CallTimeout` after `timeout_s` seconds."""
    import asyncio

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    job.notify(partial(_call_soon, loop, wake))
    finished, _ = await asyncio.wait({future}, timeout=timeout_s)
    if not finished:
        raise CallTimeout


async def pause(effect: Wait) -> None:
    """Let time pass, until it is over or the token is cancelled."""
    import asyncio

    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not over.done():
            over.set_result(None)

    timer = loop.call_later(effect.seconds, wake)
    forget = effect.token.on_cancel(partial(_call_soon, loop, wake)) if effect.token is not None else None
    try:
        await over
    finally:
        timer.cancel()
        if forget is not None:
            forget()


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
        loop.call_soon_threadsafe(callback)


async def awaited(value: Awaitable[Any], variables: ContextVars, timeout_s: float | None) -> Any:
    """Await `value` with the context variables in `variables`, for at most `timeout_s` seconds."""
    if timeout_s is None:
        return await InContext(value, variables)
    import asyncio

    task = start_task(asyncio.get_running_loop(), value, variables)
    try:
        finished, _ = await asyncio.wait({task}, timeout=timeout_s)
    except BaseException:
        cancel_task(task)
        raise
    if not finished:
        task.cancel()
        raise CallTimeout
    result, error = outcome_of(task)
    if error is not None:
        raise error
    return result


async def unless_cancelled(call: Coroutine[Any, Any, Any], token: CancelToken) -> Any:
    """Await `call`; it is cancelled, as its task would cancel it, when the token is, and `CallCancelled` is raised."""
    import asyncio

    if asyncio.current_task() is None:  # stepped by hand
        return await call
    loop = asyncio.get_running_loop()
    scope = asyncio.timeout(None)

    def interrupt() -> None:
        with suppress(RuntimeError):  # it has come back
            scope.reschedule(loop.time())

    forget = None
    try:
        async with scope:
            forget = token.on_cancel(partial(_call_soon, loop, interrupt))
            return await call
    except TimeoutError:
        if scope.expired():
            raise CallCancelled from None
        raise
    finally:
        if forget is not None:
            forget()


def is_cancelled_here() -> bool:
    """Tell whether somebody has cancelled the task that runs this; a CancelledError in any other is somebody else's."""
    asyncio = sys.modules.get("asyncio")
    try:
        task = asyncio.current_task() if asyncio is not None else None
    except RuntimeError:
        return False
    return task is None or task.cancelling() > 0


def begin_in(
    loop: asyncio.AbstractEventLoop, make: Callable[[], Awaitable[Any]], variables: ContextVars
) -> tuple[Job, Callable[[], None]]:
    """Have the event loop of another thread await what `make` returns; return the job that ends with it, and its end.

    Raises RuntimeError when the loop is closed.
    """
    job = Job(lambda: None)
    tasks: list[asyncio.Task[Outcome]] = []

    def start() -> None:
        tasks.append(start_task(loop, make(), variables))
        tasks[0].add_done_callback(end)

    def end(task: asyncio.Task[Outcome]) -> None:
        job.value, job.error = outcome_of(task)
        job.finish()

    def give_up() -> None:
        with suppress(RuntimeError):  # the loop has been closed, and has cancelled what it still had
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])

    loop.call_soon_threadsafe(start)
    return job, give_up


async def _as_coroutine(value: Awaitable[Any]) -> Any:
    return await value


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
        inner = _as_coroutine(self._awaitable)
        resume: Callable[[Any], Any] = inner.send
        value: Any = None
        while True:
            try:
                future = run(resume, value)
            except StopIteration as stop:
                return stop.value
            except GeneratorExit as error:
                if isinstance(value, GeneratorExit):
                    raise
                raise Escaped(error) from error
            try:
                value, resume = (yield future), inner.send
            except BaseException as error:  # relayed into the awaitable, GeneratorExit included
                if inspect.getcoroutinestate(inner) == inspect.CORO_CLOSED:  # by the garbage collector, before this
                    raise
                value, resume = error, inner.throw


class PrivateLoop:
    """One event loop in a thread of its own: for `async def` tools and hooks of a run under `for`, for MCP sessions."""

    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._stopped = False
        self._worker = Worker()
        self._serving = Job(self._serve)
        self._worker.submit(self._serving)

    def begin(self, value: Awaitable[Any], variables: ContextVars) -> tuple[Job, Callable[[], None]]:
        """Start to await `value` in the loop's thread; return the job that ends with it, and what gives it up.

        Raises RuntimeError when the loop is closed.
        """
        with self._lock:  # what was started before the loop stops is cancelled by it; nothing may start later
            if self._closed:
                discard(value)
                raise RuntimeError("this event loop is closed")
            return begin_in(self._loop, lambda: value, variables)

    def run(self, value: Awaitable[Any], variables: ContextVars, timeout_s: float | None) -> Any:
        """Wait for `value` from another thread; raises what it raises, `CallTimeout` after `timeout_s` seconds."""
        job, give_up = self.begin(value, variables)
        try:
            job.wait_done(timeout_s)
        except BaseException:
            give_up()
            raise
        return job.outcome()

    async def wait(self, value: Awaitable[Any], variables: ContextVars) -> Any:
        """Await `value` from another event loop; cancelling the one cancels the other."""
        job, give_up = self.begin(value, variables)
        try:
            await job_done(job, None)
        except BaseException:
            give_up()
            raise
        return job.outcome()

    def close(self, wait_s: float = 0.0) -> None:
        """Cancel what still runs and stop the loop; wait up to `wait_s` seconds for its end."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop)
        self._worker.abandon()
        with suppress(CallTimeout):
            self._serving.wait_done(wait_s)

    def _stop(self) -> None:
        self._stopped = True
        self._loop.stop()

    def _serve(self) -> None:
        import asyncio

        try:
            while not self._stopped:  # by the loop itself: what was started before it stops has been started
                with suppress(KeyboardInterrupt, SystemExit):  # of a tool's own task; whoever awaits it gets it too
                    self._loop.run_forever()
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            if pending:
                self._loop.run_until_complete(asyncio.wait(pending, timeout=1))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

"""looplet's own daemon threads: never joined at exit, never shared with an event loop's default executor.

A stuck tool keeps its thread for ever; nobody waits for it, nobody reuses it, and the others are not starved.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final

from looplet.cancel import CancelToken
from looplet.latch import Latch
from looplet.plan import CallCancelled, CallTimeout

MAX_IDLE: Final = 32
"""threads kept for later calls; the ones beyond end with their call"""

_idle: list[Worker] = []


class Job:
    """A thunk that some thread runs; `outcome` says what came of it."""

    __slots__ = ("_callback", "_is_done", "_latch", "_lock", "_thunk", "error", "value")

    def __init__(self, thunk: Callable[[], Any]) -> None:
        self._thunk: Callable[[], Any] | None = thunk
        self._latch = Latch()
        self._is_done = False
        self._lock = threading.Lock()
        self._callback: Callable[[], object] | None = None
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the thunk, keep what came of it, tell whoever waits."""
        assert self._thunk is not None
        try:
            self.value = self._thunk()
        except BaseException as error:  # noqa: BLE001 - handed to the one who waits
            self.error = error
        self._thunk = None
        self.finish()

    def finish(self) -> None:
        """Mark the job as done and notify."""
        with self._lock:
            self._is_done = True
            callback = self._callback
        self._latch.open()
        if callback is not None:
            callback()

    def notify(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, in whatever thread ends the job; at once if it has ended."""
        with self._lock:
            if not self._is_done:
                self._callback = callback
                return
        callback()

    def wait_done(self, timeout_s: float | None = None) -> None:
        """Wait until the job has ended; raises `CallTimeout` after `timeout_s` seconds."""
        if not self._latch.wait(timeout_s):
            raise CallTimeout

    def outcome(self) -> Any:
        """Return the value or raise the error of a job that is done."""
        if self.error is not None:
            raise self.error
        return self.value


def wait_for_either(job: Job, token: CancelToken, timeout_s: float | None = None) -> None:
    """Wait until the job has ended; raises `CallCancelled` when the token is cancelled before, else `CallTimeout`."""
    over = CancelToken(token)
    job.notify(over.cancel)
    over.wait(timeout_s)
    try:
        job.wait_done(0)
    except CallTimeout:
        if token.is_cancelled:
            raise CallCancelled from None
        raise


class Worker:
    """One daemon thread and its queue."""

    __slots__ = ("_abandoned", "_jobs", "_pid")

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._abandoned = False
        self._pid = os.getpid()
        try:
            _start(threading.Thread(target=self._work, name="looplet-worker", daemon=True))
        except BaseException:
            self._jobs.put(None)  # the thread may have begun, and nobody would ever have work for it
            raise

    def submit(self, job: Job) -> None:
        """Run `job` after those submitted before."""
        self._jobs.put(job)

    def abandon(self) -> None:
        """Let the thread end with the job it runs; nobody waits for it."""
        self._abandoned = True
        self._jobs.put(None)

    def release(self) -> None:
        """Give an idle worker back for later calls."""
        if self._abandoned:
            return
        if len(_idle) < MAX_IDLE:
            _idle.append(self)
        else:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # an idle thread keeps nothing alive
            if self._abandoned or os.getpid() != self._pid:  # a tool has forked: nobody will give the child more to do
                return


def acquire() -> Worker:
    """Return an idle worker, or a new one."""
    with suppress(IndexError):
        return _idle.pop()
    return Worker()


def _start(thread: threading.Thread) -> None:
    """Start `thread`; a Ctrl-C in the midst of it stays a Ctrl-C.

    `Thread.start` waits on a `threading.Condition`, which is written in Python: an interrupt in the middle of it comes
    out as "release unlocked lock".
    """
    try:
        thread.start()
    except RuntimeError as error:
        interrupt = error.__context__
        if interrupt is None or isinstance(interrupt, Exception):
            raise
        raise interrupt from None


# A forked child inherits the list but not the threads.
os.register_at_fork(after_in_child=_idle.clear)

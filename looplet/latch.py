"""`Latch`: what one thread waits at until another opens it."""

from __future__ import annotations

import threading
import time
from typing import Final

PIECE_S: Final = 0.2
"""how long the main thread waits at a stretch"""


class Latch:
    """Closed until it is opened, once; then whoever waits, and whoever comes, goes through.

    It is a plain lock: `threading.Event` is written in Python, and a Ctrl-C in the middle of it leaves it locked.  The
    main thread waits in pieces: a signal that arrives after Python's last look for one, and before the wait has begun,
    does not end the wait.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let them through; to be called once."""
        self._lock.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for at most `timeout_s` seconds; tell whether the latch is open."""
        if not self._acquire(timeout_s):
            return False
        self._lock.release()  # for whoever else waits
        return True

    def _acquire(self, timeout_s: float | None) -> bool:
        if threading.get_ident() != threading.main_thread().ident:
            return self._lock.acquire(timeout=-1 if timeout_s is None else max(timeout_s, 0))
        end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not self._lock.acquire(timeout=max(0, min(PIECE_S, end - time.monotonic()))):
            if time.monotonic() >= end:
                return False
        return True

"""`CancelToken`: how a run, and each of its tools, is asked to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from looplet.errors import ErrorKind, ToolError

CANCEL_KEY: Final = "looplet.cancel"
"""the OpenTelemetry context key under which a run that a tool starts finds the token of the tool's call"""


class CancelToken:
    """Asks a run, and its tools through `ctx.cancel_token`, to stop; nothing is interrupted by force.

    A token with `parents` is cancelled when one of them is.  May be used from any thread.
    """

    __slots__ = ("_callbacks", "_is_cancelled", "_lock", "_parents", "reason")

    def __init__(self, *parents: CancelToken) -> None:
        self._parents = parents
        self.reason = ""
        """what `cancel` was told; of this token alone"""
        self._is_cancelled = False
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    @property
    def is_cancelled(self) -> bool:
        """Tell whether this token, or one above it, was cancelled."""
        return self._is_cancelled or any(parent.is_cancelled for parent in self._parents)

    def cancel(self, reason: str = "cancelled") -> None:
        """Ask; a second time changes nothing."""
        with self._lock:
            if self._is_cancelled:
                return
            self._is_cancelled, self.reason = True, reason
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def raise_if_cancelled(self) -> None:
        """Raise ToolError (kind `cancelled`) once the token is cancelled."""
        if self.is_cancelled:
            raise ToolError("the run was cancelled", kind=ErrorKind.CANCELLED)

    def child(self) -> CancelToken:
        """Return a token that is cancelled with this one, and alone."""
        return CancelToken(self)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the token is cancelled, for at most `timeout_s` seconds; tell whether it was."""
        gate = threading.Lock()
        gate.acquire()
        forget = self.on_cancel(gate.release)
        try:
            gate.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))
        finally:
            forget()
        return self.is_cancelled

    def on_cancel(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Have `callback` called once, by the thread that cancels; at once if that has happened.

        Returns a function that takes it back.
        """
        return self._hang(_Once(callback))

    def _hang(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Add a callback to this token and those above."""
        above = [parent._hang(callback) for parent in self._parents]  # noqa: SLF001 - its own class
        with self._lock:
            too_late = self._is_cancelled
            if not too_late:
                self._callbacks.append(callback)
        if too_late:
            callback()

        def take_back() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)
            for take_back_above in above:
                take_back_above()

        return take_back


class _Once:
    """A callback that is called at most once, however many tokens it hangs on."""

    __slots__ = ("_callback", "_lock")

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback: Callable[[], object] | None = callback
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            callback, self._callback = self._callback, None
        if callback is not None:
            callback()

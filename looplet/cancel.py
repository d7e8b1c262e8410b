"""`CancelToken`: how a run, and each of its tools, is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from looplet.errors import ErrorKind, ToolError
from looplet.latch import Latch

CANCEL_KEY: Final = "looplet.cancel"
"""the OpenTelemetry context key under which a run that a tool starts finds the token of the tool's call"""


class CancelToken:
    """Asks a run, and its tools through `ctx.cancel_token`, to stop; nothing is interrupted by force.

    A token with `parents` is cancelled when one of them is.  May be used from any thread, and in a signal handler: it
    has no lock, every step of it is one that Python makes as a whole.
    """

    __slots__ = ("_callbacks", "_hung", "_is_cancelled", "_parents", "_reason", "is_given")

    def __init__(self, *parents: CancelToken) -> None:
        self._parents = parents
        self.is_given: bool = not parents or any([parent.is_given for parent in parents])  # noqa: C419
        """somebody outside of the engine holds this token or one above it"""
        self._reason = ""
        self._is_cancelled = False
        self._callbacks: dict[Callable[[], object], None] = {}
        """of this token and those below, in order"""
        self._hung: dict[Callable[[], None], None] = {}
        """what takes back what `on_cancel` was given"""

    @property
    def is_cancelled(self) -> bool:
        """Tell whether this token, or one above it, was cancelled."""
        if self._is_cancelled or not self._parents:
            return self._is_cancelled
        return any([parent.is_cancelled for parent in self._parents])  # noqa: C419 - a generator takes twice as long

    @property
    def reason(self) -> str:
        """Return what `cancel` was told, here or above; an empty string while nobody has."""
        return self._reason or next((parent.reason for parent in self._parents if parent.is_cancelled), "")

    def cancel(self, reason: str = "cancelled") -> None:
        """Ask; a second time changes nothing.  Every callback is called; the first error of one is raised then."""
        if self._is_cancelled:
            return
        self._reason, self._is_cancelled = reason, True
        failed: Exception | None = None
        while callbacks := list(self._callbacks):
            for callback in callbacks:
                self._callbacks.pop(callback, None)
                try:
                    callback()
                except Exception as error:  # noqa: BLE001 - somebody's callback; the others are to hear of it, too
                    failed = failed or error
        self.forget()
        if failed is not None:
            raise failed

    def raise_if_cancelled(self) -> None:
        """Raise ToolError (kind `cancelled`) once the token is cancelled."""
        if self.is_cancelled:
            raise ToolError("the run was cancelled", kind=ErrorKind.CANCELLED)

    @classmethod
    def of_run(cls, *parents: CancelToken) -> CancelToken:
        """Return the token of a run: without parents, nobody but the run itself can cancel it."""
        token = cls(*parents)
        token.is_given = token.is_given and bool(parents)
        return token

    def child(self) -> CancelToken:
        """Return a token that is cancelled with this one, and alone."""
        return CancelToken(self)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the token is cancelled, for at most `timeout_s` seconds; tell whether it was."""
        latch = Latch()
        forget = self._hang(_Once(latch.open))
        try:
            latch.wait(timeout_s)
        finally:
            forget()
        return self.is_cancelled

    def on_cancel(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Have `callback` called once, by the thread that cancels; at once if that has happened.

        Returns a function that takes it back.  When a tool's call has come back, what its token was given is taken
        back: nobody waits for the call any more.
        """
        take_back = self._hang(_Once(callback))

        def forget() -> None:
            self._hung.pop(forget, None)
            take_back()

        self._hung[forget] = None
        if self.is_cancelled:
            forget()
        return forget

    def forget(self) -> None:
        """Take back what `on_cancel` of this token was given, here and above."""
        for forget in list(self._hung):
            forget()

    def _hang(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Add a callback to this token and those above."""
        above = [parent._hang(callback) for parent in self._parents]  # noqa: SLF001 - its own class
        self._callbacks[callback] = None
        if self._is_cancelled:  # asked after it was added: whoever cancels meanwhile finds it, or is found out here
            callback()

        def take_back() -> None:
            self._callbacks.pop(callback, None)
            for take_back_above in above:
                take_back_above()

        return take_back


class _Once:
    """A callback that is called at most once, however many tokens it hangs on."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback = [callback]

    def __call__(self) -> None:
        try:
            callback = self._callback.pop()
        except IndexError:
            return
        callback()

"""Effects: how a procedure is written once and run sync or async.

A *plan* is a generator that performs no I/O.  It yields a `Call` (or a `Gather` of sub-plans) when it needs the
outside world and anything else when it has a value for the caller.  An executor (`looplet.executors`) performs the
effects; `looplet.run` drives the plan.  The idea is httpx's `Auth.auth_flow`.

Two rules keep spans where they belong.  An effect carries the OpenTelemetry context it runs under, so the plan never
makes a span current; and leaving is an effect: a driver that wants a plan to end *throws* `Closing` into it and goes
on performing its effects, because a generator that is being closed can perform none.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final, TypeAlias, TypeVar

from opentelemetry.context import Context

from looplet.cancel import CancelToken

T = TypeVar("T")
Y = TypeVar("Y")

INLINE: Final = "inline"
"""run where the driver is: hooks, and every `async def`"""
SERIAL: Final = "serial"
"""may block: the caller's thread under `for`, the run's one thread under `async for`"""
PARALLEL: Final = "parallel"
"""may block: a thread of its own under `async for`"""


class Call:
    """Run `thunk` under `context`, await what it returns if that is awaitable, send the value back.

    token: cancelling it ends the wait for the call (`CallCancelled`).
    """

    __slots__ = ("context", "lane", "thunk", "timeout_s", "token")

    def __init__(
        self,
        thunk: Callable[[], Any],
        context: Context,
        lane: str = INLINE,
        timeout_s: float | None = None,
        token: CancelToken | None = None,
    ) -> None:
        self.thunk = thunk
        self.context = context
        self.lane = lane
        self.timeout_s = timeout_s
        self.token = token


class Wait:
    """Let time pass, in seconds; `token` ends the wait early when it is cancelled."""

    __slots__ = ("seconds", "token")

    def __init__(self, seconds: float, token: CancelToken | None = None) -> None:
        self.seconds = seconds
        self.token = token


class Gather:
    """Run sub-plans concurrently, send their results back in order.  The first error in order is raised."""

    __slots__ = ("plans",)

    def __init__(self, plans: tuple[Generator[Effect, Any, Any], ...]) -> None:
        self.plans = plans


Effect: TypeAlias = Call | Gather | Wait
Effects: TypeAlias = Generator[Effect, Any, T]
"""a piece of plan that only asks for effects and returns a T"""
Plan: TypeAlias = Generator[Effect | Y, Any, T]


class Closing(BaseException):
    """Thrown into a plan that is to end now; the plan goes on to its end phase."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CallTimeout(Exception):
    """A call took longer than its `timeout_s` and was abandoned: nobody waits for it any more."""


class CallCancelled(Exception):
    """A call's token was cancelled and the call was abandoned: nobody waits for it any more."""


class Escaped(RuntimeError):
    """Foreign code raised, by itself, what ends generators and coroutines: StopIteration or GeneratorExit."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"a call raised {error!r}")
        self.__cause__ = error


class Skipped(Exception):
    """An effect that cannot be performed here, such as an async hook while the interpreter exits."""


def gather(plans: list[Effects[T]]) -> Effects[list[T]]:
    """Fan out; a single plan runs in place, without a thread or a task."""
    if len(plans) == 1:
        return [(yield from plans[0])]
    results: list[T] = yield Gather(tuple(plans))
    return results


def finish(plan: Effects[T], perform: Callable[[Effect], Any]) -> T:
    """Run a sub-plan to its end, performing its effects one by one."""
    resume: Callable[[Any], Effect] = plan.send
    value: Any = None
    while True:
        try:
            effect = resume(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
        try:
            value, resume = perform(effect), plan.send
        except BaseException as error:  # noqa: BLE001 - relayed into the plan, which re-raises
            value, resume = error, plan.throw

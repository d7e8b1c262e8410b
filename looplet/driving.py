"""Driving a generator that yields what may have to be awaited: one body, whichever kind of model it asks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Asking: TypeAlias = Generator[Any, Any, T]
"""yields what may have to be awaited, gets what came of it"""


def drive(asking: Asking[Any]) -> Any:
    """Run it to its end and return what it returns; from the first value on that has to be awaited, a coroutine."""
    value: Any = None
    while True:
        try:
            value = asking.send(value)
        except StopIteration as stop:
            return stop.value
        if inspect.isawaitable(value):
            return _drive_later(asking, value)


async def _drive_later(asking: Asking[T], value: Any) -> T:
    while True:
        resume: Callable[[Any], Any] = asking.send
        try:
            value = await value if inspect.isawaitable(value) else value
        except Exception as error:  # noqa: BLE001 - relayed into the generator
            value, resume = error, asking.throw
        try:
            value = resume(value)
        except StopIteration as stop:
            result: T = stop.value
            return result

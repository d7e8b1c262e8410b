"""`drive`: one generator serves as a plain function and as a coroutine, whichever the model that it asks needs.

def summary(llm, text):
reply = yield llm.generate(text)  # a str, or an awaitable of one
return reply.strip()

drive(summary(llm, text))  # the summary, or a coroutine that returns it
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
MaybeAsync: TypeAlias = Generator[Any, Any, T]
"""yields values that may be awaitable and is sent each value, awaited where it was"""


def drive(body: MaybeAsync[Any]) -> Any:
    """Return what the body returns; a coroutine for the rest of it, as soon as it yields an awaitable."""
    value: Any = None
    while True:
        try:
            value = body.send(value)
        except StopIteration as stop:
            return stop.value
        if inspect.isawaitable(value):
            return _drive_later(body, value)


async def _drive_later(body: MaybeAsync[T], value: Any) -> T:
    while True:
        resume: Callable[[Any], Any] = body.send
        try:
            value = await value if inspect.isawaitable(value) else value
        except Exception as error:  # noqa: BLE001 - relayed into the generator
            value, resume = error, body.throw
        try:
            value = resume(value)
        except StopIteration as stop:
            result: T = stop.value
            return result

"""What a run says while it goes on: typed events, and where they go.

    composable_loop(..., stream=print)                     # a function, a queue, or an object with emit(event)
    composable_loop(..., hooks=[StreamingHook(queue)])     # the same, as a hook

Events come in the order in which things happened, from whatever thread they happened in.  What they hold has passed
the run's boundary.  An emitter that raises is counted and logged once; it stops neither the run nor other emitters.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from looplet.boundary import Boundary
from looplet.errors import ConfigError
from looplet.messages import encode
from looplet.stream_events import (
    ChatEndEvent,
    ChatRetryEvent,
    ChatStartEvent,
    CompactionEvent,
    ReasoningDeltaEvent,
    RunEndEvent,
    RunStartEvent,
    StreamEvent,
    TextDeltaEvent,
    ToolArgumentsDeltaEvent,
    ToolDispatchEvent,
    ToolProgressEvent,
    ToolResultEvent,
    TurnEndEvent,
    TurnStartEvent,
)
from looplet.telemetry.drops import count_drop
from looplet.types import Delta

__all__ = [
    "CallbackEmitter",
    "ChatEndEvent",
    "ChatRetryEvent",
    "ChatStartEvent",
    "CompactionEvent",
    "CompositeEmitter",
    "DeltaGate",
    "Emitter",
    "QueueEmitter",
    "ReasoningDeltaEvent",
    "RunEndEvent",
    "RunStartEvent",
    "Stream",
    "StreamEvent",
    "StreamingHook",
    "TextDeltaEvent",
    "ToolArgumentsDeltaEvent",
    "ToolDispatchEvent",
    "ToolProgressEvent",
    "ToolResultEvent",
    "TurnEndEvent",
    "TurnStartEvent",
    "as_emitter",
]

FAILED: Final = "stream emitter failed"
"""the cause under which events that an emitter did not take are counted"""


# --- where they go --------------------------------------------------------------------------------------------------


class Emitter(Protocol):
    """Takes events, from any thread, one at a time; a slow one holds the run up.

    class Printer:
        def emit(self, event):
            print(event.kind)
    """

    def emit(self, event: StreamEvent) -> object: ...


@dataclass(frozen=True, slots=True)
class CallbackEmitter:
    """Calls a function with each event."""

    callback: Callable[[StreamEvent], object]

    def __post_init__(self) -> None:
        if not callable(self.callback):
            raise ConfigError(f"CallbackEmitter takes a function of one event, not {type(self.callback).__name__}")
        _refuse_async(self.callback)

    def emit(self, event: StreamEvent) -> None:
        """Call the function."""
        self.callback(event)


class QueueEmitter:
    """Puts each event into a queue, without waiting: a `queue.Queue`, an `asyncio.Queue`, or one like them.

    An event for which a bounded queue has no room is lost, and counted.  An `asyncio.Queue` belongs to the event loop
    in which the emitter was made, or, where there was none, in which its first event came.
    """

    __slots__ = ("_is_async", "_late", "_loop", "queue")

    def __init__(self, queue: Any) -> None:
        if not callable(getattr(queue, "put_nowait", None)):
            raise ConfigError(f"QueueEmitter takes a queue, with put_nowait(event), not {type(queue).__name__}")
        asyncio = sys.modules.get("asyncio")
        self.queue = queue
        self._is_async = asyncio is not None and isinstance(queue, asyncio.Queue)
        self._loop: Any = (_running_loop() or ...) if self._is_async else None
        """where the queue is read; `...` until the first event comes"""
        self._late: deque[StreamEvent] = deque()

    def emit(self, event: StreamEvent) -> None:
        """Put the event into the queue; an `asyncio.Queue` is only touched by its own loop."""
        if not self._is_async:
            self.queue.put_nowait(event)
            return
        here = _running_loop()
        if self._loop is ...:
            self._loop = here
        if self._loop is not None and self._loop is not here:
            self._late.append(event)
            self._loop.call_soon_threadsafe(self._catch_up)
            return
        self._catch_up()
        self.queue.put_nowait(event)

    def _catch_up(self) -> None:
        """Put what came from other threads."""
        while self._late:
            try:
                self.queue.put_nowait(self._late.popleft())
            except Exception as error:  # noqa: BLE001 - the queue is full, and there is nobody to tell
                count_drop(FAILED, repr(error))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QueueEmitter) and other.queue is self.queue

    def __hash__(self) -> int:
        return hash((QueueEmitter, id(self.queue)))


class CompositeEmitter:
    """Hands each event to several emitters, each of them anything that `as_emitter` takes."""

    __slots__ = ("_stream",)

    def __init__(self, emitters: Iterable[Any]) -> None:
        self._stream = Stream(emitters)

    @property
    def emitters(self) -> tuple[Emitter, ...]:
        """Return the emitters, each once."""
        return self._stream.emitters

    def emit(self, event: StreamEvent) -> None:
        """Hand the event to each; one that raises does not stop the others."""
        self._stream.emit(event)


def as_emitter(given: Any) -> Emitter:
    """Return the emitter that `given` is or stands for; raises ConfigError for what is none."""
    if inspect.isclass(given):
        raise ConfigError(f"a stream takes objects: pass {given.__name__}(...), not the class {given.__name__}")
    if callable(emit := getattr(given, "emit", None)):
        _refuse_async(emit)
        emitter: Emitter = given
        return emitter
    if callable(getattr(given, "put_nowait", None)):
        return QueueEmitter(given)
    if callable(given):
        return CallbackEmitter(given)
    raise ConfigError(
        f"a stream takes a function, a queue or an object with emit(event), not {type(given).__name__}; "
        "for several of them write CompositeEmitter([...])"
    )


class Stream:
    """The events of one run on their way to its emitters; false when there is none.

    May be used from any thread: the events reach every emitter one at a time, in the order in which they were emitted.
    Nobody waits for a thread that is handing out events: that one hands out the others', too.
    """

    __slots__ = ("_handing_out", "_is_busy", "_waiting", "emitters")

    def __init__(self, emitters: Iterable[Any] = ()) -> None:
        kept: list[Emitter] = []
        for emitter in _flat(emitters):
            if emitter not in kept:
                kept.append(emitter)
        self.emitters = tuple(kept)
        self._waiting: deque[StreamEvent] = deque()
        self._handing_out = threading.RLock()  # a Ctrl-C may leave it taken; its thread can take it again
        self._is_busy = False

    def __bool__(self) -> bool:
        return bool(self.emitters)

    def emit(self, event: StreamEvent) -> None:
        """Hand an event to every emitter.  What an emitter raises is counted and logged once."""
        self._waiting.append(event)
        while self._waiting and self._handing_out.acquire(blocking=False):
            try:
                if self._is_busy:  # an emitter emits: whoever called it goes on
                    return
                self._hand_out()
            finally:
                self._handing_out.release()

    def _hand_out(self) -> None:
        self._is_busy = True
        try:
            while self._waiting:
                event = self._waiting.popleft()
                for emitter in self.emitters:
                    self._tell(emitter, event)
        finally:
            self._is_busy = False

    def _tell(self, emitter: Emitter, event: StreamEvent) -> None:
        try:
            emitter.emit(event)
        except Exception as error:  # noqa: BLE001 - the user's emitter; watching must not end the run
            count_drop(FAILED, f"{type(emitter).__name__}: {error!r}")


class StreamingHook:
    """Sends the events of a run to an emitter, as a hook: `hooks=[StreamingHook(queue)]`."""

    __slots__ = ("looplet_emitter",)

    def __init__(self, emitter: Any) -> None:
        self.looplet_emitter = as_emitter(emitter)


def _flat(emitters: Iterable[Any]) -> Iterator[Emitter]:
    for given in emitters:
        emitter = as_emitter(given)
        if isinstance(emitter, CompositeEmitter):
            yield from emitter.emitters
        else:
            yield emitter


def _refuse_async(function: Any) -> None:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(
            f"{name} is `async def`, and events are not awaited: pass a plain function or asyncio.Queue()"
        )


def _running_loop() -> Any:
    import asyncio

    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


# --- deltas ---------------------------------------------------------------------------------------------------------

Emit = Callable[..., object]
"""called with an event's class and its fields but `run_id` and `turn`"""


class DeltaGate:
    """Makes events of the deltas of one reply.

    A redactor must see a text whole: a secret may be split over deltas.  So where the boundary has redactors, nothing
    comes out before `finish`, and then one event for each part.  A gate that is never finished (the stream was cut)
    keeps what it holds.
    """

    __slots__ = ("_boundary", "_calls", "_emit", "_held")

    def __init__(self, boundary: Boundary, emit: Emit) -> None:
        self._boundary = boundary
        self._emit = emit
        self._calls: dict[int, tuple[str, str]] = {}
        """id and tool of the calls seen so far, by index"""
        self._held: dict[tuple[str, int], list[str]] = {}

    def take(self, delta: Delta) -> None:
        """Emit the delta, or hold it back."""
        if delta.kind == "tool_call":
            call_id, tool = self._calls.get(delta.index, ("", ""))
            self._calls[delta.index] = (delta.call_id or call_id, delta.tool or tool)
        if self._boundary.redactors:
            self._held.setdefault((delta.kind, delta.index), []).append(delta.text)
        else:
            self._tell(delta.kind, delta.index, self._boundary.text(delta.text))

    def finish(self) -> None:
        """Emit what was held back, redacted: the reply is whole."""
        for (kind, index), pieces in self._held.items():
            text = "".join(pieces)
            self._tell(kind, index, self._arguments(text) if kind == "tool_call" else self._boundary.text(text))
        self._held.clear()

    def _tell(self, kind: str, index: int, text: str) -> None:
        if kind == "tool_call":
            call_id, tool = map(self._boundary.text, self._calls[index])
            self._emit(ToolArgumentsDeltaEvent, index=index, call_id=call_id, tool=tool, text=text)
        elif text:
            self._emit(TextDeltaEvent if kind == "text" else ReasoningDeltaEvent, text=text)

    def _arguments(self, text: str) -> str:
        """Return JSON redacted value by value, as the call's arguments will be; what is none, as text."""
        import msgspec

        try:
            value = msgspec.json.decode(text)
        except msgspec.DecodeError:
            return self._boundary.text(text)
        return encode(self._boundary.clean(value)).decode()

"""Memory: what the model is told in every request, right after the system prompt.

A source is an object with `load(state) -> str`, a plain method or `async def`; it is asked before each request.  The
message is replaced only when its text has changed: a new one costs the provider's prompt cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

from looplet.boundary import Boundary
from looplet.errors import ConfigError
from looplet.messages import Message
from looplet.plan import Effects
from looplet.scope import RunScope
from looplet.telemetry import semconv
from looplet.telemetry.spans import Phase

AGENTS_MD: Final = "AGENTS.md"


class StaticMemorySource:
    """Always the same text."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise ConfigError(f"StaticMemorySource takes a str, not {type(text).__name__}")
        self.text = text

    def load(self, state: Any) -> str:
        """Return the text."""
        return self.text


class CallableMemorySource:
    """What a function of the run's state returns; it may be `async def`."""

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        if not callable(fn):
            raise ConfigError(f"CallableMemorySource takes a function of the state, not {type(fn).__name__}")
        self.fn = fn

    def load(self, state: Any) -> Any:
        """Return what the function says now."""
        return self.fn(state)


class AgentsMdMemorySource:
    """The AGENTS.md of a folder, read again when the file has changed; nothing while there is none.

    `path` is the folder or the file itself; None is the folder in which the source is made.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        given = Path.cwd() if path is None else Path(path)
        self.path = given if given.is_file() or given.suffix == ".md" else given / AGENTS_MD
        self._read: tuple[tuple[int, int], str] | None = None

    def load(self, state: Any) -> str:
        """Return the text of the file; raises OSError when it is there and cannot be read."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return ""
        version = found.st_mtime_ns, found.st_size
        if self._read is None or self._read[0] != version:
            self._read = version, self.path.read_text(encoding="utf-8", errors="replace")
        return self._read[1]


def refresh_memory(run: RunScope, phase: Phase) -> Effects[None]:
    """Put what the run's sources say now into its head.  A source that raises ends the run, as a hook does."""
    texts = []
    for source in run.config.memory_sources:
        try:
            texts.append(text_of(source, (yield from phase.call(partial(source.load, run.state)))))
        except Exception:
            phase.put({semconv.HOOK_NAME: type(source).__name__, semconv.HOOK_METHOD: "load"})
            raise
    old, new = run.outgoing.memory, memory_message(texts, run.boundary)
    if (old and old.text) == (new and new.text):
        return
    rest = [message for message in run.outgoing.head if message is not old]
    run.outgoing.begin_with(with_memory(rest, new), new)


def memory_message(texts: Iterable[str], boundary: Boundary) -> Message | None:
    """Return the message that tells what the sources said; None when that is nothing."""
    said = [text for text in map(str.strip, texts) if text]
    return Message.of_text("user", boundary.text("MEMORY\n" + "\n\n".join(said))) if said else None


def with_memory(head: Iterable[Message], memory: Message | None) -> tuple[Message, ...]:
    """Return the messages that requests begin with, the memory after the system prompt."""
    before = [message for message in head if message.role == "system"]
    after = [message for message in head if message.role != "system"]
    return (*before, *([memory] if memory is not None else []), *after)


def check_sources(sources: Any) -> None:
    """Raise ConfigError for what is no sequence of memory sources."""
    if isinstance(sources, (str, bytes)) or not isinstance(sources, (list, tuple)):
        raise ConfigError("memory_sources takes a list: memory_sources=[StaticMemorySource(text)]")
    for source in sources:
        if not callable(getattr(source, "load", None)):
            name = type(source).__name__
            raise ConfigError(
                f"{name} is no memory source, it has no method load; for a text: StaticMemorySource(text)"
            )


def text_of(source: Any, said: Any) -> str:
    """Return what a source said, None being nothing.  Raises ConfigError for anything but a str."""
    if said is None:
        return ""
    if not isinstance(said, str):
        raise ConfigError(f"{type(source).__name__}.load returned {type(said).__name__}; it must return a str")
    return said

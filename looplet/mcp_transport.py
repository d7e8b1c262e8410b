"""The way to an MCP server: its process or URL, the streams of a session, what is noticed on them.

The SDK's transports do the work.  Noticed is what they do not tell: that no message will come any more, which request
of a call went out, what the process last said on stderr, and how HTTP requests were answered.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx2
from mcp import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from opentelemetry import propagate

from looplet.awaiting import job_done
from looplet.plan import CallTimeout
from looplet.telemetry import semconv
from looplet.threads import Job, Worker

READ_S: Final = 300.0
"""seconds that an HTTP stream may be silent before it is opened again"""
SETTLE_S: Final = 0.5
"""seconds that an error message waits for the last words of a server that has ended"""
SESSION_HEADER: Final = "mcp-session-id"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server is: a command that starts it, or a URL."""

    command: tuple[str, ...] = ()
    url: str = ""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """Return how messages call the server; the model may read them: no arguments, no query, no password."""
        if self.command:
            return f"the MCP server {Path(self.command[0]).name!r}"
        parts = urlsplit(self.url)
        return f"the MCP server at {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def attributes(self) -> dict[str, Any]:
        """Return what spans say about the way to the server."""
        if self.command:
            return {semconv.NETWORK_TRANSPORT: "pipe"}
        parts = urlsplit(self.url)
        return {
            semconv.NETWORK_TRANSPORT: "tcp",
            semconv.SERVER_ADDRESS: parts.hostname or "",
            semconv.SERVER_PORT: parts.port or (443 if parts.scheme == "https" else 80),
        }


class Wire:
    """The transport of one session."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.target = target
        self.ended = False
        """no message will come any more"""
        self.forgotten = False
        """the server refused a request of the session as unknown or bad (HTTP 404, 400), so it did nothing"""
        self.status = 0
        """of the last HTTP answer to a message that was an error"""
        self.session_id = ""
        self._timeout_s = timeout_s
        self._tail = Tail() if target.command else None

    @asynccontextmanager
    async def streams(self) -> AsyncGenerator[Any, None]:
        """Start or reach the server; gives the streams that the SDK's client wants."""
        async with AsyncExitStack() as stack:
            if self._tail is not None:
                stack.callback(self._tail.close)
                transport = stdio_client(self._parameters(), errlog=self._tail.writing)
            else:
                http = await stack.enter_async_context(self._http_client())
                transport = streamable_http_client(self.target.url, http_client=http)
            reading, writing = await stack.enter_async_context(transport)
            if self._tail is not None:
                self._tail.close()  # the server has its own copy
            yield Reading(reading, self), Writing(writing, self)

    async def last_words(self) -> str:
        """Return what the process said on stderr, as the end of a sentence; nothing about a URL."""
        if self._tail is None:
            return ""
        if self.ended:
            await self._tail.settle()
        said = self._tail.text
        return f"; its last words on stderr: {said}" if said else "; it said nothing on stderr"

    def _parameters(self) -> StdioServerParameters:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        program, *arguments = self.target.command
        environment = {name.upper(): value for name, value in carrier.items()} | dict(self.target.env)
        return StdioServerParameters(command=program, args=arguments, env=environment)

    def _http_client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            headers=dict(self.target.headers),
            timeout=httpx2.Timeout(self._timeout_s, read=max(READ_S, self._timeout_s)),
            event_hooks={"response": [self._see]},
        )

    async def _see(self, response: httpx2.Response) -> None:
        self.session_id = response.headers.get(SESSION_HEADER, self.session_id)
        if response.status_code >= 400 and response.request.method == "POST":
            self.status = response.status_code
            self.forgotten |= response.status_code in (400, 404) and SESSION_HEADER in response.request.headers


class _Stream:
    """A stream of the SDK's, wrapped."""

    def __init__(self, stream: Any, wire: Wire) -> None:
        self._stream = stream
        self._wire = wire

    async def aclose(self) -> None:
        """Close the stream."""
        self._wire.ended = True
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        await self._stream.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        self._wire.ended = True  # also where the SDK fails at a message: it reads no further one
        left: bool | None = await self._stream.__aexit__(kind, error, tb)
        return left


class Reading(_Stream):
    """A server's messages; notes that there will be none any more."""

    @property
    def last_context(self) -> Any:
        """Return the context variables of whoever put the last message in, where the transport keeps them."""
        return getattr(self._stream, "last_context", None)

    async def receive(self) -> Any:
        """Return the next message."""
        try:
            return await self._stream.receive()
        except BaseException:
            self._wire.ended = True
            raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except BaseException:
            self._wire.ended = True
            raise


class Sending:
    """What became of a call's request on its way out."""

    __slots__ = ("request_id", "sent")

    def __init__(self) -> None:
        self.request_id = ""
        self.sent = False


sending: ContextVar[Sending | None] = ContextVar("looplet.mcp.sending", default=None)
"""of the call that the current task makes"""


class Writing(_Stream):
    """The messages to a server; notes which request went out for a call."""

    async def send(self, item: Any, /) -> None:
        """Send a message; one whose sending is interrupted counts as sent."""
        noted = sending.get()
        if noted is None or (request_id := getattr(item.message, "id", None)) is None:
            await self._stream.send(item)
            return
        noted.request_id, noted.sent = str(request_id), True
        try:
            await self._stream.send(item)
        except Exception:  # the stream is closed: the server is gone
            noted.sent, self._wire.ended = False, True
            raise


class Tail:
    """The end of what a process writes to a pipe; it is always read, so that the process never waits."""

    KEPT: Final = 2000
    """bytes"""
    SHOWN: Final = 500
    """characters"""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.writing = os.fdopen(writing, "w", encoding="utf-8")
        """for the process; `close` it when the process has its own copy"""
        self._kept = b""
        self._job = Job(lambda: self._read(reading))
        worker = Worker()
        worker.submit(self._job)
        worker.abandon()

    @property
    def text(self) -> str:
        """Return the last words."""
        return self._kept.decode(errors="replace").strip()[-self.SHOWN :]

    async def settle(self) -> None:
        """Wait a moment for the end of the pipe."""
        with suppress(CallTimeout):
            await job_done(self._job, SETTLE_S)

    def close(self) -> None:
        """Close this side of the pipe."""
        self.writing.close()

    def _read(self, descriptor: int) -> None:
        with open(descriptor, "rb", buffering=0) as pipe:
            while said := pipe.read(4096):
                self._kept = (self._kept + said)[-self.KEPT :]

"""Sessions with MCP servers: opened, used, lost and opened again, in one private event loop.

A `Connection` is one session; one task enters and leaves its context managers, as the SDK wants it.  A `Link` is what
an adapter keeps: it makes a connection when one is needed, may be used from any thread and any event loop, and is
closed once.  The protocol is the official SDK's.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Final, TypeAlias

import httpx2
from mcp import Client, MCPError
from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS, CallToolResult, Implementation, ReadResourceResult, Tool
from opentelemetry import propagate, trace

from looplet._version import __version__
from looplet.awaiting import PrivateLoop
from looplet.errors import ConfigError, ErrorKind, ToolError, words_of
from looplet.mcp_transport import SETTLE_S, Sending, Target, Wire, sending
from looplet.plan import CallTimeout
from looplet.telemetry import semconv
from looplet.telemetry.recorder import RecordedSpan
from looplet.types import cut

CLOSE_S: Final = 10.0
"""seconds that closing waits for a server; the SDK kills one that does not end within about 4"""
OnProgress: TypeAlias = Callable[[str, Any], Any]
"""called with what is going on, in words, and `{"progress": ..., "total": ...}`"""
PAGES: Final = 1000
"""pages that a list of tools may have"""

# The SDK logs a server's faults, which are told in errors here; without a handler Python would print them.
for _name in ("mcp", "client"):  # the second is that of `mcp.client.session`
    logging.getLogger(_name).addHandler(logging.NullHandler())


class NotSentError(Exception):
    """A call that certainly had no effect may be made again; `failure` is what to raise if that fails, too."""

    def __init__(self, failure: ToolError) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Connection:
    """One session with a server.  All methods run in the loop of its link."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.tools: list[Tool] = []
        self.label = str(target)
        """how messages call the server: by its own name, once it is known"""
        self._timeout_s = timeout_s
        self._wire = Wire(target, timeout_s)
        self._client: Client | None = None
        self._cause: Exception | None = None
        self._noise = ""
        self._ready = asyncio.Event()
        self._leave = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Tell whether calls can be made, as far as is known."""
        return self._client is not None and not self._wire.ended and not self._wire.forgotten

    async def open(self) -> None:
        """Shake hands and ask for the tools; raises ConfigError that says why that did not work."""
        self._task = asyncio.create_task(self._live())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._ready.wait()
            if self._client is None:
                raise ConfigError(await self._failure(self._cause)) from self._cause
            await self.list_tools()
        except BaseException as error:
            words = await self._failure(error) if isinstance(error, TimeoutError) else ""
            await self.close()
            if words:
                raise ConfigError(words) from None
            raise

    async def close(self) -> None:
        """Leave the session; a server that was started here is ended."""
        if self._task is not None:
            if self._client is None and not self._leave.is_set():
                self._task.cancel()  # once: a second time would interrupt the SDK's cleaning up
            self._leave.set()
            await asyncio.wait({self._task}, timeout=CLOSE_S)

    async def list_tools(self) -> None:
        """Ask for the list of tools; raises ConfigError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                self.tools = await self._all_pages()
        except Exception as error:
            raise ConfigError(await self._failure(error)) from error

    async def call(self, name: str, arguments: dict[str, Any], on_progress: OnProgress | None) -> CallToolResult:
        """Call a tool; raises as `_ask` does."""
        assert self._client is not None
        callback = None if on_progress is None else partial(relay, on_progress)
        result: CallToolResult = await self._ask(
            "tools/call", partial(self._client.call_tool, name, arguments, progress_callback=callback)
        )
        return result

    async def read(self, uri: str) -> ReadResourceResult:
        """Read a resource; raises as `_ask` does."""
        assert self._client is not None
        result: ReadResourceResult = await self._ask("resources/read", partial(self._client.read_resource, uri))
        return result

    async def _ask(self, method: str, send: Callable[..., Awaitable[Any]]) -> Any:
        """Ask on behalf of a tool; raises ToolError in words for the model, NotSentError when that may be repeated."""
        assert self._client is not None
        note, span = Sending(), tool_span()
        sending.set(note)  # in the context of this call's task only
        span.set_attributes({semconv.MCP_METHOD_NAME: method, **self._attributes(self._client)})
        meta: Any = {}
        propagate.inject(meta)  # the SDK does so, too, for now: it means to make that an option
        try:
            async with asyncio.timeout(self._timeout_s):
                return await send(meta=meta)
        except TimeoutError:
            span.set_attribute(semconv.TOOL_ABANDONED, True)
            words = f"{self.label} gave no answer within {self._timeout_s:g} s; it was told to cancel the call"
            raise ToolError(words + self._noise, kind=ErrorKind.TIMEOUT, retriable=True) from None
        except MCPError as error:
            raise await self._explain(error, note, span) from error
        except (RuntimeError, ValueError) as error:  # results that do not match the protocol or the tool's own schema
            raise ToolError(f"{self.label} gave a malformed answer: {words_of(error)}") from error
        finally:
            if note.request_id:
                span.set_attribute(semconv.JSONRPC_REQUEST_ID, note.request_id)

    async def _live(self) -> None:
        """Hold the session open until it is left or lost."""
        try:
            info = Implementation(name="looplet", version=__version__)
            client = Client(self._wire.streams(), cache=None, message_handler=self._take, client_info=info)
            async with client:
                if client.server_info is not None:
                    self.label = f"the MCP server {client.server_info.name!r}"
                self._client = client
                self._ready.set()
                await self._leave.wait()
        except Exception as error:  # noqa: BLE001 - the transport's; whoever waits for the session is told
            self._cause = innermost(error)
        finally:
            self._wire.ended = True
            self._ready.set()

    async def _all_pages(self) -> list[Tool]:
        client, cursor = self._client, None
        assert client is not None
        found: list[Tool] = []
        for _ in range(PAGES if client.server_capabilities.tools else 0):
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        return found

    async def _take(self, message: Any) -> None:
        """Remember the first thing that the server said and that is no message."""
        if isinstance(message, Exception) and not self._noise:
            details: Any = getattr(message, "errors", list)()
            said = str(details[0]["input"]) if details else words_of(message)
            self._noise = f"; it said what is no JSON-RPC message: {cut(said, 80)!r}"

    def _attributes(self, client: Client) -> dict[str, Any]:
        facts = {
            semconv.MCP_PROTOCOL_VERSION: client.protocol_version,
            **self._wire.target.attributes(),
        }
        return facts | ({semconv.MCP_SESSION_ID: self._wire.session_id} if self._wire.session_id else {})

    async def _explain(self, error: MCPError, note: Sending, span: trace.Span) -> Exception:
        """Return what to raise for a call that came back as a JSON-RPC error, or not at all."""
        is_lost = self._wire.ended or (self._wire.target.url and error.code == CONNECTION_CLOSED)
        if self._wire.forgotten:
            return NotSentError(answer_of(error))
        if not is_lost:
            span.set_attribute(semconv.RPC_STATUS_CODE, str(error.code))
            return answer_of(error)
        words = await self._last_words()
        if not note.sent or isinstance(self._cause, (httpx2.ConnectError, httpx2.ConnectTimeout)):
            return NotSentError(not_called(f"{self.label} cannot be reached{words}"))
        span.set_attribute(semconv.TOOL_ABANDONED, True)
        return ToolError(
            f"{self.label} was lost during the call, which may have had its effect and was not made again; "
            f"the next call starts or reaches the server anew{words}",
            kind=ErrorKind.NETWORK,
        )

    async def _failure(self, error: BaseException | None) -> str:
        """Return why there is no session."""
        if isinstance(error, TimeoutError):
            words = f"{self.label} did not answer within {self._timeout_s:g} s"
        elif isinstance(error, OSError) and self._wire.target.command:
            return f"{self.label} cannot be started: {error}; check the command"
        elif isinstance(error, httpx2.TransportError):
            return f"{self.label} cannot be reached: {words_of(error) or type(error).__name__}; check the URL"
        elif isinstance(error, MCPError) and error.code == CONNECTION_CLOSED:
            words = f"{self.label} ended before it answered"
        else:
            status = f" (HTTP {self._wire.status})" if self._wire.status else ""
            words = f"{self.label} cannot be used: {words_of(error) if error else 'it ended'}{status}"
        return words + await self._last_words() + self._noise

    async def _last_words(self) -> str:
        if self._wire.ended and self._task is not None:
            self._leave.set()
            await asyncio.wait({self._task}, timeout=SETTLE_S)
        cause = f": {words_of(self._cause)}" if isinstance(self._cause, httpx2.TransportError) else ""
        return cause + await self._wire.last_words()


class Link:
    """A server that is reached when it is needed, and again when it was lost; for any thread and event loop."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._connecting = asyncio.Lock()
        self._closed = False
        self._loop: PrivateLoop | None = None
        self._connection: Connection | None = None

    @property
    def label(self) -> str:
        """Return how messages call the server."""
        return self._connection.label if self._connection is not None else str(self._target)

    @property
    def connected(self) -> bool:
        """Tell whether there is a session, as far as is known."""
        connection = self._connection
        return connection is not None and connection.is_open

    def tools(self, *, fresh: bool = False) -> list[Tool]:
        """Return the tools that the server listed, asking anew if `fresh`; raises ConfigError without a session."""
        found: list[Tool] = self._running().run(self._tools(fresh), copy_context(), None)
        return found

    async def wait_tools(self) -> list[Tool]:
        """Like `tools`, without blocking the caller's event loop."""
        found: list[Tool] = await self._running().wait(self._tools(False), copy_context())
        return found

    async def call(self, name: str, arguments: dict[str, Any], on_progress: OnProgress | None = None) -> CallToolResult:
        """Call a tool; raises ToolError in words for the model."""
        result: CallToolResult = await self._ask(lambda connection: connection.call(name, arguments, on_progress))
        return result

    async def read(self, uri: str) -> ReadResourceResult:
        """Read a resource; raises ToolError in words for the model."""
        result: ReadResourceResult = await self._ask(lambda connection: connection.read(uri))
        return result

    async def _ask(self, ask: Callable[[Connection], Awaitable[Any]]) -> Any:
        loop = self._running()
        return await loop.wait(self._asked(ask), copy_context())

    def close(self) -> None:
        """Leave the session, end the server that was started, wait for both; the second time does nothing."""
        if (loop := self._give_up_loop()) is not None:
            with suppress(CallTimeout):
                loop.run(self._shut(), copy_context(), CLOSE_S)
            loop.close(CLOSE_S)

    async def wait_close(self) -> None:
        """Like `close`, without blocking the caller's event loop while the server takes its time."""
        if (loop := self._give_up_loop()) is not None:
            try:
                await loop.wait(self._shut(), copy_context())
            finally:
                loop.close(CLOSE_S)

    def drop(self) -> None:
        """Close without waiting: for garbage collection, which may come in any thread."""
        if (loop := self._give_up_loop()) is not None:
            job, _ = loop.begin(self._shut(), copy_context())
            job.notify(loop.close)

    def _running(self) -> PrivateLoop:
        if os.getpid() != self._pid:
            raise ConfigError(f"{self._target}: this adapter belongs to the parent process; make one after the fork")
        with self._lock:
            if self._closed:
                raise ConfigError(f"{self._target}: this adapter is closed; make a new one")
            if self._loop is None:
                self._loop = PrivateLoop()
                _open_links.add(self)
            return self._loop

    def _give_up_loop(self) -> PrivateLoop | None:
        with self._lock:
            self._closed = True
            loop, self._loop = self._loop, None
        _open_links.discard(self)
        return loop if os.getpid() == self._pid else None

    async def _tools(self, fresh: bool) -> list[Tool]:
        connection = await self._connected()
        if fresh:
            await connection.list_tools()
        return connection.tools

    async def _asked(self, ask: Callable[[Connection], Awaitable[Any]]) -> Any:
        try:
            try:
                return await ask(await self._connected())
            except NotSentError:  # the session was lost before this call, which may go through a new one
                return await ask(await self._connected())
        except NotSentError as error:
            raise error.failure from error
        except ConfigError as error:
            raise not_called(str(error)) from error
        except asyncio.CancelledError:
            if self._closed:
                raise ToolError(f"{self._target}: the adapter was closed during the call") from None
            raise

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._connection is None or not self._connection.is_open:
                await self._shut()
                self._connection = Connection(self._target, self._timeout_s)
                await self._connection.open()
            return self._connection

    async def _shut(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


_open_links: set[Link] = set()


@atexit.register
def _close_links() -> None:
    for link in list(_open_links):
        link.close()


os.register_at_fork(after_in_child=_open_links.clear)


def tool_span() -> trace.Span:
    """Return looplet's `execute_tool` span if that is the current one, else a span that records nothing."""
    span = trace.get_current_span()
    if isinstance(span, RecordedSpan) and span.attributes.get(semconv.OPERATION_NAME) == semconv.EXECUTE_TOOL:
        return span
    return trace.INVALID_SPAN


async def relay(on_progress: OnProgress, progress: float, total: float | None, message: str | None) -> None:
    """Hand a progress notification on to `on_progress`."""
    on_progress(message or "progress", {"progress": progress} | ({} if total is None else {"total": total}))


def answer_of(error: MCPError) -> ToolError:
    """Return what a JSON-RPC error means for the model."""
    kind = ErrorKind.VALIDATION if error.code == INVALID_PARAMS else ErrorKind.EXECUTION
    context = {"code": error.code} | ({} if error.data is None else {"data": error.data})
    return ToolError(f"MCP error {error.code}: {error.message}", kind=kind, context=context)


def not_called(why: str) -> ToolError:
    """Return what to tell the model about a call that did not happen."""
    return ToolError(f"not called: {why}", kind=ErrorKind.NETWORK, retriable=True)


def innermost(error: Exception) -> Exception:
    """Return the first exception inside groups."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error

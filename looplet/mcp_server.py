"""Serving looplet tools over the Model Context Protocol, on stdio or streamable HTTP.

Tools run as they do in a loop: sync ones on looplet's own threads, one at a time unless they are `concurrent_safe`;
arguments are validated in words for the model; a trace context that comes with a call is current while the tool runs;
progress goes to the client, and a call that the client cancels is told so by `ctx.cancel_token`.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Final

from mcp import MCPError, stdio_server
from mcp.server.lowlevel import Server
from mcp_types import (
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    ImageContent,
    ListToolsResult,
    TextContent,
    Tool,
)
from opentelemetry import propagate, trace
from opentelemetry.context import Context

from looplet._version import __version__
from looplet.boundary import Boundary
from looplet.errors import ConfigError, ToolError
from looplet.executors import AsyncExecutor
from looplet.messages import encode
from looplet.parts import blobs_of, with_markers
from looplet.plan import INLINE, PARALLEL, SERIAL, Call, CallTimeout
from looplet.toolerrors import to_tool_error
from looplet.tools import BaseToolRegistry, ToolContext, ToolSpec, make_done_tool
from looplet.types import ToolResult

HOST: Final = "127.0.0.1"
PATH: Final = "/mcp"


class ToolServer:
    """The tools of a registry, but for those that end a run, as MCP requests see them."""

    def __init__(self, registry: BaseToolRegistry, name: str = "looplet") -> None:
        self._registry = registry
        self._specs = [spec for spec in map(registry.find, registry.tool_names) if not _ends_runs(spec)]
        if not self._specs:
            raise ConfigError("there is no tool to serve (tools that end a run are left out)")
        self._boundary = Boundary()
        self._executor = AsyncExecutor()
        self._one_at_a_time = asyncio.Lock()
        self.protocol: Server[Any] = Server(
            name, version=__version__, on_list_tools=self._list, on_call_tool=self._call
        )

    @property
    def tool_names(self) -> list[str]:
        """Return the names of the tools that are served."""
        return [spec.name for spec in self._specs]

    async def _list(self, request: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(tools=[_described(spec) for spec in self._specs])

    async def _call(self, request: Any, params: CallToolRequestParams) -> CallToolResult:
        if params.name not in self.tool_names:
            raise MCPError(INVALID_PARAMS, f"unknown tool {params.name!r}; available: {', '.join(self.tool_names)}")
        report = Progress(request.session, self._boundary)
        result = await self._outcome(params, ToolContext(on_progress=report), incoming_context(request.meta))
        await report.settle()
        return result

    async def _outcome(self, params: CallToolRequestParams, ctx: ToolContext, context: Context) -> CallToolResult:
        spec = self._registry.find(params.name)
        try:
            arguments = spec.arguments(params.arguments or {})
            ctx.resources = self._registry.needed(spec)
            value = await self._run(spec, spec.bind(arguments, ctx), context)
        except CallTimeout:
            _tell(ctx, "timeout")
            return _failed(ToolError(f"no answer within {spec.timeout_s:g} s; the call was abandoned"))
        except asyncio.CancelledError:
            _tell(ctx, "cancelled")
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tool raises, the model gets to see it
            return _failed(to_tool_error(error))
        return self._answer(value, ctx.warnings)

    async def _run(self, spec: ToolSpec, thunk: Callable[[], Any], context: Context) -> Any:
        lane = INLINE if spec.is_async else PARALLEL if spec.concurrent_safe else SERIAL
        async with nullcontext() if spec.concurrent_safe else self._one_at_a_time:
            return await self._executor.perform(Call(thunk, context, lane, spec.timeout_s))

    def _answer(self, value: Any, warnings: Sequence[str]) -> CallToolResult:
        if isinstance(value, ToolResult):
            if value.error is not None:
                return _failed(value.error_detail or ToolError(value.error))
            warnings = [*value.warnings, *warnings]
            value = value.data
        data = self._boundary.clean(value)
        images = blobs_of(data)
        data = with_markers(data) if images else data
        texts = [] if data is None else [data if isinstance(data, str) else encode(data).decode()]
        texts += [f"warning: {self._boundary.text(str(words))}" for words in warnings]
        content = [*_texts(texts), *map(_shown, images)]
        return CallToolResult(content=content, structured_content=data if isinstance(data, dict) else None)


class Progress:
    """Tells a client what a tool reports, in order, from whichever thread; one that did not ask hears nothing."""

    def __init__(self, session: Any, boundary: Boundary) -> None:
        self._session = session
        self._boundary = boundary
        self._loop = asyncio.get_running_loop()
        self._last: float | None = None
        self._waiting: deque[tuple[float, float | None, str]] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._closed = False

    def __call__(self, stage: str, data: Any = None) -> None:
        """Report; with `{"progress": 2, "total": 3}` as `data` these are the numbers, else reports are counted."""
        report = data if isinstance(data, Mapping) else {}
        words = self._boundary.text(str(stage))
        with suppress(RuntimeError):  # the server has ended meanwhile
            self._loop.call_soon_threadsafe(
                self._take, words, _number(report.get("progress")), _number(report.get("total"))
            )

    async def settle(self) -> None:
        """Wait until all that was reported is sent."""
        await asyncio.sleep(0)  # what an `async def` tool said last is on its way here
        self._closed = True
        if self._sender is not None:
            await asyncio.wait({self._sender})

    def _take(self, words: str, number: float | None, total: float | None) -> None:
        if self._closed:
            return
        last = self._last  # numbers have to grow, says the protocol
        self._last = number if number is not None and (last is None or number > last) else (last or 0) + 1
        self._waiting.append((self._last, total, words))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while self._waiting:
            with suppress(Exception):  # the client has hung up: whoever sends the answer finds out
                await self._session.report_progress(*self._waiting.popleft())


def incoming_context(meta: Mapping[str, Any] | None) -> Context:
    """Return the trace context of a request; a span that the SDK has opened for it stays the current one."""
    here = trace.get_current_span()
    context = propagate.extract(dict(meta or {}))
    return trace.set_span_in_context(here, context) if here.get_span_context().is_valid else context


def serve_stdio(server: ToolServer) -> None:
    """Serve one client on stdin and stdout until it hangs up."""
    asyncio.run(_serve_stdio(server.protocol))


async def _serve_stdio(protocol: Server[Any]) -> None:
    async with stdio_server() as (reading, writing):
        await protocol.run(reading, writing, protocol.create_initialization_options())


def serve_http(server: ToolServer, port: int, ready: Callable[[str], object]) -> None:
    """Serve streamable HTTP on the local interface until Ctrl-C; `ready` is called with the URL.  Port 0: any free."""
    import uvicorn

    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise ConfigError(
            f"port {port} of {HOST} cannot be used: {error.strerror}; choose another, 0 is any"
        ) from error
    with listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an ACK
        config = uvicorn.Config(server.protocol.streamable_http_app(streamable_http_path=PATH), log_level="warning")
        ready(f"http://{HOST}:{listening.getsockname()[1]}{PATH}")
        uvicorn.Server(config).run(sockets=[listening])


def _described(spec: ToolSpec) -> Tool:
    return Tool(name=spec.name, description=spec.description, input_schema=spec.json_schema)


def _ends_runs(spec: ToolSpec) -> bool:
    made_by = getattr(spec.execute, "__qualname__", "")
    return spec.name == "done" or made_by.startswith(f"{make_done_tool.__name__}.")


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _tell(ctx: ToolContext, reason: str) -> None:
    with suppress(Exception):  # of a callback of the tool's own
        ctx.cancel_token.cancel(reason)


def _failed(error: ToolError) -> CallToolResult:
    return CallToolResult(content=_texts([error.message]), is_error=True)


def _shown(image: Mapping[str, Any]) -> ImageContent:
    return ImageContent(type="image", data=image["content"], mime_type=image["mime_type"])


def _texts(texts: Sequence[str]) -> list[Any]:
    return [TextContent(type="text", text=text) for text in texts]

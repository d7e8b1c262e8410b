"""MCP: the tools of a Model Context Protocol server as looplet tools.

    with MCPToolAdapter("npx -y @modelcontextprotocol/server-everything") as server:
        server.register_all(tools)
        for step in composable_loop(llm=llm, tools=tools, task={"goal": "..."}):
            ...

Needs the extra `looplet[mcp]`.  The session lives on a thread of its own, so the tools work under `for` and
`async for` alike, from any thread.  `looplet mcp serve` is the other direction.
"""

from __future__ import annotations

import os
import re
import shlex
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from looplet.awaiting import unless_cancelled
from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.parts import Image
from looplet.plan import CallCancelled
from looplet.telemetry import semconv
from looplet.tools import BaseToolRegistry, ToolContext, ToolSpec
from looplet.types import ToolResult

if TYPE_CHECKING:
    from looplet.cancel import CancelToken
    from looplet.mcp_session import Link

EXTRA: Final = 'MCP needs an extra package: pip install "looplet[mcp]"'
READ_RESOURCE: Final = "read_resource"
NAME_LIMIT: Final = 64
"""characters of a tool's name that all providers take"""


class MCPToolAdapter:
    """The tools of one MCP server.

    command: the program that is the server, as a command line (split like a shell would, but no shell runs) or as a
        list of words; or else url: of a server that speaks streamable HTTP.
    env: variables for the process, beside the few that are safe to hand on (PATH, HOME, ...) and TRACEPARENT.
    timeout: seconds that the server has to answer anything; a call that takes longer is cancelled there.
    headers: for HTTP, such as `{"Authorization": "Bearer ..."}`.
    prefix: put before the names of the tools, so that those of two servers do not clash.
    resources: add a tool `read_resource`, by which the model reads what tools refer to by URI.

    The server is started or reached at the first use, and once more at the next use after it was lost.  A call that
    may have had its effect is never made again.  Usable with `with` and `async with`; both close the session.

    Raises:
        ConfigError: arguments that cannot work; later, a server that cannot be started or reached.
        ImportError: the extra `looplet[mcp]` is not installed.
    """

    def __init__(
        self,
        command: str | Sequence[str] | None = None,
        *,
        url: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        prefix: str = "",
        resources: bool = False,
    ) -> None:
        words = _words_of(command, url, env, headers)
        if not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
            raise ConfigError(f"timeout={timeout!r}: give seconds, more than 0")
        if not re.fullmatch(r"[a-zA-Z0-9_-]*", prefix):
            raise ConfigError(f"prefix={prefix!r}: use ASCII letters, digits, '_' or '-', as in the names of tools")
        try:
            from looplet.mcp_session import Link
            from looplet.mcp_transport import Target
        except ImportError as error:
            raise ImportError(EXTRA) from error

        target = Target(words, url or "", dict(env or {}), dict(headers or {}))
        self._prefix = prefix
        self._resources = resources
        self._link: Link = Link(target, float(timeout))
        weakref.finalize(self, self._link.drop).atexit = False  # at exit, open links are closed in order

    @classmethod
    def connect_stdio(cls, command: str | Sequence[str], **settings: Any) -> Self:
        """Start a server and return its adapter; `settings` are those of the class.  Close it when done."""
        return cls(command, **settings).__enter__()

    @classmethod
    def connect_http(cls, url: str, **settings: Any) -> Self:
        """Reach a server that speaks streamable HTTP and return its adapter.  Close it when done."""
        return cls(url=url, **settings).__enter__()

    @property
    def connected(self) -> bool:
        """Tell whether there is a session, as far as is known."""
        return self._link.connected

    def list_tools(self) -> list[dict[str, Any]]:
        """Ask the server for its tools; return them as MCP has them: `name`, `description`, `inputSchema`, ..."""
        return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in self._link.tools(fresh=True)]

    def tools(self) -> list[ToolSpec]:
        """Return the tools that the server listed, with their whole schemas.

        A character that providers refuse in names becomes `_`.  Tools that say they only read may run concurrently.
        """
        specs = {tool.name: self._spec(tool) for tool in self._link.tools()}
        if self._resources:
            specs |= {f"{READ_RESOURCE} (resources=True)": self._reader()}
        often = Counter(spec.name for spec in specs.values())
        for name, spec in specs.items():
            if often[spec.name] > 1:
                other = next(n for n, s in specs.items() if s.name == spec.name and n != name)
                raise ConfigError(
                    f"{self._link.label}: the tools {name!r} and {other!r} would both be called {spec.name!r}"
                )
        return list(specs.values())

    def register_all(self, registry: BaseToolRegistry) -> list[ToolSpec]:
        """Add all tools to a registry, or none: raises ConfigError when one of the names is taken there."""
        specs = self.tools()
        for spec in specs:
            if (there := registry.get(spec.name)) is not None:
                raise ConfigError(
                    f"the tool {spec.name!r} of {self._link.label} and {_origin(there)} have the same name; "
                    f"give this server's tools another one: MCPToolAdapter(..., prefix='...')"
                )
        return [registry.register(spec) for spec in specs]

    def close(self) -> None:
        """End the session, and the server if it was started here; its tools can then no longer be called."""
        self._link.close()

    def __enter__(self) -> Self:
        try:
            self._link.tools()
        except BaseException:
            self._link.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        try:
            await self._link.wait_tools()
        except BaseException:
            self._link.drop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._link.wait_close()

    def _spec(self, tool: Any) -> ToolSpec:
        hints = tool.annotations
        try:
            return ServerToolSpec(
                self._prefix + re.sub(r"[^a-zA-Z0-9_-]", "_", tool.name)[: NAME_LIMIT - len(self._prefix)],
                tool.description or tool.title or "",
                {"type": "object", **tool.input_schema},
                ServerTool(self, self._link, tool.name),
                concurrent_safe=bool(hints and hints.read_only_hint),
                tags=("mcp",),
            )
        except ConfigError as error:
            raise ConfigError(f"{self._link.label}: the tool {tool.name!r} cannot be used: {error}") from error

    def _reader(self) -> ToolSpec:
        async def read_resource(uri: str, ctx: ToolContext) -> Any:
            return outcome_of_reading(await _unless_cancelled(self._link.read(uri), ctx.cancel_token))

        read_resource.__qualname__ = f"MCPToolAdapter({self._link.label}).{READ_RESOURCE}"
        return ToolSpec(
            self._prefix + READ_RESOURCE,
            f"Read a resource of {self._link.label} by its URI, such as one that a result of its tools names.",
            {"uri": "the URI of the resource"},
            read_resource,
            concurrent_safe=True,
            tags=("mcp",),
        )


class ServerTool:
    """One tool of a server, as a function; it keeps the adapter, and so the session, alive."""

    def __init__(self, adapter: MCPToolAdapter, link: Link, name: str) -> None:
        self._adapter = adapter
        self._link = link
        self._name = name
        self.__qualname__ = f"MCPToolAdapter({link.label}).{name}"

    async def __call__(self, /, **arguments: Any) -> Any:
        """Call the tool; raises ToolError."""
        return await self.call(arguments)

    async def call(self, arguments: dict[str, Any], ctx: ToolContext | None = None) -> Any:
        """Call the tool; the server's progress goes to `ctx`, from another thread, and its token cancels the call."""
        if ctx is None:
            return outcome_of(await self._link.call(self._name, arguments))
        tell = None if ctx.on_progress is None else ctx.report_progress
        return outcome_of(await _unless_cancelled(self._link.call(self._name, arguments, tell), ctx.cancel_token))


class ServerToolSpec(ToolSpec):
    """A tool of a server.  The call's context goes beside the arguments: one of those may be called `ctx`, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "accepts_ctx", True)

    def bind(self, kwargs: dict[str, Any], ctx: ToolContext) -> Callable[[], Awaitable[Any]]:
        """Return the call, ready to run."""
        function: ServerTool = self.execute  # type: ignore[assignment]
        return partial(function.call, kwargs, ctx)


async def _unless_cancelled(call: Coroutine[Any, Any, Any], token: CancelToken) -> Any:
    """Await the call of a server's tool; raises ToolError (kind `cancelled`) when the token is cancelled before."""
    from looplet.mcp_session import tool_span

    try:
        return await unless_cancelled(call, token)
    except CallCancelled:
        tool_span().set_attribute(semconv.TOOL_ABANDONED, True)
        raise ToolError(f"cancelled: {token.reason}; the server was told", kind=ErrorKind.CANCELLED) from None


def outcome_of(result: Any) -> Any:
    """Return what a tool's answer comes to: text, structured data, or a list when there is more than one thing.

    Images become images of ours; sound, files and images that models cannot see are described with type and size, and
    the result's `raw` has them for hooks.  Raises ToolError with the server's words when the answer says that the tool
    failed.
    """
    contents = [_data_of(content) for content in result.content]
    if result.is_error:
        said = [item if isinstance(item, str) else str(item) for item in contents]
        words = "\n".join(filter(None, said)) or "the tool failed and did not say why"
        raise ToolError(words, context=_structured_context(result))
    if result.structured_content is not None:  # its texts say the same again
        contents = [result.structured_content, *(item for item in contents if not isinstance(item, str))]
    data = contents[0] if len(contents) == 1 else contents or None
    if any(_bytes_of(content) is not None for content in result.content):
        return ToolResult("", data=data, raw=result.model_dump(mode="json", by_alias=True, exclude_none=True))
    return data


def outcome_of_reading(result: Any) -> Any:
    """Return what a resource holds: its text, an image, a description of what is neither; a list for several parts."""
    held = []
    for part in result.contents:
        image = None if not hasattr(part, "blob") else _image_of(part.blob, part.mime_type)
        held.append(image or (part.text if hasattr(part, "text") else _described("resource", part)))
    return held[0] if len(held) == 1 else held


def _structured_context(result: Any) -> dict[str, Any]:
    return {} if result.structured_content is None else {"structured_content": result.structured_content}


def _data_of(content: Any) -> Any:
    match content.type:
        case "text":
            return content.text
        case "image" if (image := _image_of(content.data, content.mime_type)) is not None:
            return image
        case "resource_link":
            return content.model_dump(mode="json", by_alias=True, exclude_none=True)
        case "resource" if hasattr(content.resource, "text"):
            return {"type": "resource", "uri": str(content.resource.uri), "text": content.resource.text}
    return _described(content.type, content.resource if content.type == "resource" else content)


def _described(kind: str, content: Any) -> dict[str, Any]:
    """Return what there is to say about content that is not shown."""
    mime_type = getattr(content, "mime_type", None) or "application/octet-stream"
    described = {"type": kind, "mimeType": mime_type, "bytes": _size_of(content)}
    if kind == "resource":
        described["uri"] = str(content.uri)
    return {**described, "note": "the content itself is not shown: it is not text"}


def _image_of(data: str, mime_type: str | None) -> Image | None:
    """Return an image that a model can be shown, None for any other."""
    try:
        return Image.from_base64(data, mime_type or "")
    except ToolError:
        return None


def _bytes_of(content: Any) -> int | None:
    """Return the size of content that is not text, None for text."""
    return _size_of(content.resource if content.type == "resource" else content)


def _size_of(encoded: Any) -> int | None:
    base64 = getattr(encoded, "data", None) or getattr(encoded, "blob", None)
    return None if base64 is None else len(base64) * 3 // 4 - base64[-2:].count("=")


def _words_of(command: str | Sequence[str] | None, url: str | None, env: Any, headers: Any) -> tuple[str, ...]:
    """Return the words of the command, none for a URL; raises ConfigError for what cannot work."""
    if (command is None) == (url is None):
        raise ConfigError('give either a command, MCPToolAdapter("python server.py"), or url="http://..."')
    if url is not None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ConfigError(f"url={url!r}: give an http:// or https:// address, such as http://127.0.0.1:8000/mcp")
        if env is not None:
            raise ConfigError("env= is for a server that is started by a command; for a URL there is headers=")
        return ()
    if headers is not None:
        raise ConfigError("headers= is for a server with a URL; for a command there is env=")
    try:
        words = shlex.split(command, posix=os.name == "posix") if isinstance(command, str) else list(command or ())
    except ValueError as error:
        raise ConfigError(f"the command {command!r} cannot be split into words: {error}") from error
    if not words or not all(isinstance(word, str) for word in words) or not words[0]:
        raise ConfigError(f"the command {command!r} is not a command line; write 'python server.py' or a list of words")
    return tuple(words)


def _origin(spec: ToolSpec) -> str:
    function = spec.execute
    where = getattr(function, "__qualname__", type(function).__name__)
    return where if where.startswith("MCPToolAdapter(") else f"{getattr(function, '__module__', '')}.{where}"

"""An MCP server made with the official SDK: tools that answer in every way there is, and some that misbehave.

On stdio, or with a port as argument over HTTP; 0 is any, and the port is printed.
"""

from __future__ import annotations

import base64
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import (
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ResourceLink,
    TextContent,
    TextResourceContents,
    ToolAnnotations,
)
from pydantic import BaseModel

server = MCPServer("plain")
READ_ONLY = ToolAnnotations(read_only_hint=True)


@server.tool(annotations=READ_ONLY, structured_output=False)
def add(a: int, b: int = 1) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def person(name: str) -> dict[str, Any]:
    """Return structured data."""
    return {"name": name, "age": 7}


@server.tool(structured_output=False)
def several() -> list[TextContent]:
    """Return two texts."""
    return [TextContent(type="text", text="one"), TextContent(type="text", text="two")]


@server.tool(structured_output=False)
def picture() -> list[Any]:
    """Return a text and a picture of 5 bytes."""
    return ["look:", Image(data=b"12345", format="png")]


@server.tool(structured_output=False)
def files() -> CallToolResult:
    """Return an embedded text and an embedded file of 3 bytes."""
    return CallToolResult(
        content=[
            EmbeddedResource(type="resource", resource=TextResourceContents(uri="mem://a", text="A")),
            EmbeddedResource(type="resource", resource=BlobResourceContents(uri="mem://b", blob="MTIz")),
        ]
    )


@server.tool(structured_output=False)
def nothing() -> None:
    """Return nothing."""


@server.tool(structured_output=False)
def fail(why: str) -> str:
    """Fail."""
    raise ToolError(why)


@server.tool(structured_output=False)
def traceparent(ctx: Context) -> str:
    """Return the trace context of the call and of the process."""
    meta: dict[str, Any] = dict(ctx.request_context.meta or {})
    return f"{meta.get('traceparent')} {meta.get('baggage')} {os.environ.get('TRACEPARENT')}"


@server.tool(structured_output=False)
def environment() -> str:
    """Return the names of the environment variables."""
    return " ".join(sorted(os.environ))


@server.tool(structured_output=False)
def pid() -> str:
    """Return the process id."""
    return str(os.getpid())


@server.tool(structured_output=False)
def die(note: str) -> str:
    """Write to the file `note`, complain, and die before answering."""
    with Path(note).open("a") as file:
        file.write("x")
    sys.stderr.write("I do not feel so good\n")
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return "never"


@server.tool(structured_output=False)
def noisy() -> str:
    """Write to stderr."""
    sys.stderr.write("noise " * 100_000)
    return "quiet"


DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@server.tool(structured_output=False)
def link() -> CallToolResult:
    """Return links to two resources."""
    links = [ResourceLink(type="resource_link", name=name, uri=f"mem://{name}") for name in ("notes", "dot")]
    return CallToolResult(content=links)


@server.resource("mem://notes")
def notes() -> str:
    """Return a text."""
    return "buy milk"


@server.resource("mem://dot", mime_type="image/png")
def dot() -> bytes:
    """Return a picture."""
    return base64.b64decode(DOT)


@server.resource("mem://sound", mime_type="audio/wav")
def sound() -> bytes:
    """Return what no model can be shown."""
    return b"12345"


@server.tool(structured_output=False)
async def count(to: int, ctx: Context) -> str:
    """Count, and tell how far it is."""
    for number in range(1, to + 1):
        await ctx.report_progress(number, to, f"number {number}")
    return "counted"


class Point(BaseModel):
    """A place."""

    x: int
    y: int = 0


class Tree(BaseModel):
    """A thing that holds things of its kind."""

    name: str
    children: list[Tree] = []


@server.tool(structured_output=False)
def shape(
    kind: Literal["circle", "square"], at: Point | None = None, tree: Tree | None = None, size: int | str = 1
) -> str:
    """Have a schema with references, alternatives and choices."""
    return repr((kind, at, tree, size))


@server.tool(structured_output=False)
def long(size: int) -> str:
    """Return very much."""
    return "é" * size


@server.tool(structured_output=False)
def odd() -> str:
    """Return characters that are seldom seen."""
    return "a\u2028b\x00c\x1b[31m\U0001f600\r\n"


@server.tool(structured_output=False)
async def ask(ctx: Context) -> str:
    """Ask the client for something that it does not offer."""
    try:
        return str(await ctx.elicit("who are you?", Point))
    except Exception as error:
        return f"refused: {type(error).__name__}"


@server.tool("dotted.name/with-more", structured_output=False)
def dotted() -> str:
    """Have a name that providers refuse."""
    return "dotted"


def serve_http(port: int) -> None:
    """Serve until killed."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", port))
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(server.streamable_http_app(), log_level="error")).run(sockets=[listening])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve_http(int(sys.argv[1]))
    else:
        server.run("stdio")

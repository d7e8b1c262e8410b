"""An MCP server made with the official SDK: tools that answer in every way there is, and some that misbehave."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import (
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    TextContent,
    TextResourceContents,
    ToolAnnotations,
)

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


@server.tool("dotted.name/with-more", structured_output=False)
def dotted() -> str:
    """Have a name that providers refuse."""
    return "dotted"


if __name__ == "__main__":
    server.run("stdio")

"""A process that is hardly an MCP server: it answers line by line, by hand, as its first argument says.

It has one tool, `call`, which returns its arguments as JSON unless the mode says otherwise.  A second argument is a
file: the pid goes there at the start, then every call that waits and every cancellation.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

MODE = sys.argv[1]
NOTES = Path(sys.argv[2] if len(sys.argv) > 2 else os.devnull)
HUGE = {f"field_{i}": {"type": "string", "description": "x" * 100} for i in range(5000)}
SCHEMAS: dict[str, Any] = {
    "huge": {"type": "object", "properties": HUGE, "required": ["field_7"]},
    "no-properties": {"type": "object"},
    "reserved": {"type": "object", "properties": {"self": {"type": "string"}, "ctx": {"type": "integer"}}},
    "malformed": {"type": "object", "properties": {"a": {"type": 3}}},
}


def note(words: str) -> None:
    with NOTES.open("a") as file:
        file.write(words + "\n")


def say(message: Any) -> None:
    sys.stdout.write((message if isinstance(message, str) else json.dumps(message)) + "\n")
    sys.stdout.flush()


def tools(cursor: str | None) -> dict[str, Any]:
    tool = {"name": "call", "inputSchema": SCHEMAS.get(MODE, {"type": "object", "properties": {}})}
    if MODE in ("slow", "endless-number"):
        tool["inputSchema"]["properties"] = {"wait": {"type": "boolean"}}
    if MODE == "twins":
        return {"tools": [{**tool, "name": "a.b"}, {**tool, "name": "a/b"}]}
    if MODE == "pages":
        number = int(cursor or 0)
        return {"tools": [{**tool, "name": f"call{number}"}]} | ({"nextCursor": str(number + 1)} if number < 2 else {})
    return {"tools": [tool]}


def answer(message: dict[str, Any]) -> None:
    number, method, params = message.get("id"), message["method"], message.get("params") or {}
    if method == "notifications/cancelled":
        note("cancelled")
    elif method == "initialize":
        say({"jsonrpc": "2.0", "id": number, "result": greeting(params)})
    elif method == "tools/list":
        say({"jsonrpc": "2.0", "id": number, "result": tools(params.get("cursor"))})
    elif method == "tools/call":
        call(number, params.get("arguments") or {})
    elif method == "resources/read" and MODE == "slow":
        note("called")
    elif number is not None:
        say({"jsonrpc": "2.0", "id": number, "error": {"code": -32601, "message": "no such method"}})


def greeting(params: dict[str, Any]) -> dict[str, Any]:
    version = params["protocolVersion"]
    capabilities: dict[str, Any] = {} if MODE == "no-tools" else {"tools": {}}
    return {"protocolVersion": version, "capabilities": capabilities, "serverInfo": {"name": "rude", "version": "1"}}


def call(number: Any, arguments: dict[str, Any]) -> None:
    if MODE == "garbage":
        say("this is not JSON")
    elif MODE == "endless-number" and arguments:
        told = {"progressToken": number, "progress": 10**400}
        say({"jsonrpc": "2.0", "method": "notifications/progress", "params": told})
    elif MODE == "error":
        error = {"code": -32000, "message": "out of cheese", "data": {"left": 0}}
        say({"jsonrpc": "2.0", "id": number, "error": error})
    elif MODE == "malformed-result":
        say({"jsonrpc": "2.0", "id": number, "result": {"content": "not a list"}})
    elif arguments.get("wait"):
        note("called")
    else:
        content = [{"type": "text", "text": json.dumps(arguments, sort_keys=True)}]
        say({"jsonrpc": "2.0", "id": number, "result": {"content": content}})


def main() -> None:
    note(str(os.getpid()))
    if MODE == "crash":
        sys.stderr.write("ImportError: no module named nothing\n")
        sys.exit(3)
    if MODE == "chatty":
        say("Welcome to my server!")
    for line in sys.stdin:
        if MODE != "mute":
            answer(json.loads(line))


main()

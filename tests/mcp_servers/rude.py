"""A process that is hardly an MCP server: it answers what its first argument says, by hand, line by line.

One tool, `call`, whose behaviour the mode decides: see `answer`.
"""

from __future__ import annotations

import json
import os
import sys

MODE = sys.argv[1]
HUGE = {f"field_{i}": {"type": "string", "description": "x" * 100} for i in range(5000)}
SCHEMAS = {
    "huge": {"type": "object", "properties": HUGE, "required": ["field_7"]},
    "no-schema": {"type": "object"},
    "reserved": {"type": "object", "properties": {"self": {"type": "string"}, "ctx": {"type": "integer"}}},
    "malformed": {"type": "object", "properties": {"a": {"type": 3}}},
}


def say(message: object) -> None:
    sys.stdout.write((message if isinstance(message, str) else json.dumps(message)) + "\n")
    sys.stdout.flush()


def tools(cursor: str | None) -> dict[str, object]:
    tool = {"name": "call", "inputSchema": SCHEMAS.get(MODE, {"type": "object", "properties": {}})}
    if MODE == "twins":
        return {"tools": [{**tool, "name": "a.b"}, {**tool, "name": "a/b"}]}
    if MODE == "pages":
        number = int(cursor or 0)
        return {"tools": [{**tool, "name": f"call{number}"}]} | ({"nextCursor": str(number + 1)} if number < 2 else {})
    return {"tools": [tool]}


def answer(request: dict[str, object]) -> None:
    number, method, params = request.get("id"), request["method"], request.get("params") or {}
    if method == "initialize":
        result = {
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "rude", "version": "1"},
        }
    elif method == "tools/list":
        result = tools(params.get("cursor"))
    elif method == "tools/call":
        return call(number, params.get("arguments") or {})
    elif number is None:
        return None
    else:
        return say({"jsonrpc": "2.0", "id": number, "error": {"code": -32601, "message": "no such method"}})
    return say({"jsonrpc": "2.0", "id": number, "result": result})


def call(number: object, arguments: dict[str, object]) -> None:
    if MODE == "garbage":
        return say("this is not JSON")
    if MODE == "error":
        error = {"code": -32000, "message": "out of cheese", "data": {"left": 0}}
        return say({"jsonrpc": "2.0", "id": number, "error": error})
    if MODE == "malformed-result":
        return say({"jsonrpc": "2.0", "id": number, "result": {"content": "not a list"}})
    text = json.dumps(arguments, sort_keys=True)
    return say({"jsonrpc": "2.0", "id": number, "result": {"content": [{"type": "text", "text": text}]}})


if MODE == "crash":
    sys.stderr.write("Traceback: no module named nothing\n")
    sys.exit(3)
if MODE == "chatty":
    say("Welcome to my server!")
for line in sys.stdin:
    if MODE == "mute":
        continue
    answer(json.loads(line))
    if MODE == "leaves" and "tools/list" in line:
        os._exit(0)

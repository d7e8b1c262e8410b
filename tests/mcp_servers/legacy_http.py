"""A small HTTP server with sessions, as MCP had them until 2025, in a thread of the test."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class LegacyServer:
    """Forgets its sessions on request; remembers headers, calls and farewells."""

    def __init__(self, port: int = 0) -> None:
        self.sessions: set[str] = set()
        self.opened = 0
        self.headers: list[dict[str, str]] = []
        self.calls: list[dict[str, Any]] = []
        self.farewells = 0
        self.refusal = 404
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/mcp"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, message: dict[str, Any], session: str) -> tuple[int, dict[str, str], Any]:
        """Return status, headers and body."""
        method, head = message["method"], {"jsonrpc": "2.0", "id": message.get("id")}
        if method == "initialize":
            self.opened += 1
            name = f"session-{self.opened}"
            self.sessions.add(name)
            version = message["params"]["protocolVersion"]
            info = {"name": "legacy", "version": "1"}
            result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
            return 200, {"mcp-session-id": name}, {**head, "result": result}
        if method == "server/discover":
            return 200, {}, {**head, "error": {"code": -32601, "message": "no such method"}}
        if session not in self.sessions:
            return self.refusal, {}, {"error": "who are you?"}
        if "id" not in message:
            return 202, {}, None
        if method == "tools/list":
            return 200, {}, {**head, "result": {"tools": [{"name": "call", "inputSchema": {"type": "object"}}]}}
        self.calls.append(message["params"])
        return 200, {}, {**head, "result": {"content": [{"type": "text", "text": session}]}}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.headers.append({name.lower(): value for name, value in self.headers.items()})
                self.reply(*owner.answer(message, self.headers.get("mcp-session-id", "")))

            def do_GET(self) -> None:
                self.reply(404, {}, None)

            def do_DELETE(self) -> None:
                owner.farewells += 1
                self.reply(200, {}, None)

            def reply(self, status: int, headers: dict[str, str], body: Any) -> None:
                data = b"" if body is None else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "content-type": "application/json"}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

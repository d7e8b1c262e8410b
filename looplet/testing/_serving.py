"""What scripted servers share: a socket on loopback, a policy that answers, and what came in."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

from looplet.errors import ConfigError
from looplet.testing._answers import ChatRequest, Fault, Policy, PolicyAnswer

API_KEY = "sk-looplet-test"
"""what `env()` hands out; every key is let in"""
CLOSE_TIMEOUT_S = 5.0
"""how long `close` waits for a policy that does not return, seconds"""

_HEALTH = ("GET", "/healthz")


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One request as it came in; header names are in lower case, `body` is the parsed JSON (text when it is none)."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True, slots=True)
class Response:
    """What goes over the wire: one part, or one per server-sent event; `is_cut` ends the connection too early."""

    parts: tuple[bytes, ...]
    status: int = 200
    retry_after_s: float | None = None
    is_stream: bool = False
    is_cut: bool = False

    @classmethod
    def of(cls, value: Any) -> Response:
        return cls((encode(value),))

    @classmethod
    def spoilt(cls, parts: tuple[bytes, ...], fault: Fault | None, *, is_stream: bool = False) -> Response:
        """Return what goes out when `fault` spoils the body: broken JSON, or too little of it."""
        if fault and fault.kind == "malformed":
            parts = (parts[0].rstrip()[:-1] + b"\n\n",)
        is_cut = fault is not None and fault.kind == "cut"
        return cls(parts[:2] if is_cut else parts, is_stream=is_stream, is_cut=is_cut)

    def frames(self) -> Iterator[bytes]:
        """Yield what follows the headers: half of the body when it is cut, HTTP chunks for a stream."""
        if not self.is_stream:
            body = self.parts[0]
            yield body[: len(body) // 2] if self.is_cut else body
            return
        for part in self.parts:
            yield b"%x\r\n%b\r\n" % (len(part), part)
        if not self.is_cut:
            yield b"0\r\n\r\n"


class ScriptedServer:
    """The server; a provider's class says where it listens, what it refuses and how it talks."""

    _chat_path: ClassVar[str]
    _prefix: ClassVar[str]
    """what the base URL has behind the port"""
    _environment: ClassVar[str]
    """what the names of the client's environment variables begin with"""

    def __init__(
        self, policy: Policy = None, *, port: int = 0, refusing: Sequence[str] = (), model: str = "looplet-test"
    ) -> None:
        if not (policy is None or callable(policy) or isinstance(policy, list | tuple)):
            raise ConfigError(f"policy must be a function, a list of answers or None, not {policy!r}")
        if isinstance(refusing, str):
            raise ConfigError(f"refusing must be a list of parameter names, not {refusing!r}; write [{refusing!r}]")
        self.model = model
        self._policy: Policy = policy
        self._port = port
        self._refusing = tuple(refusing)
        self._requests: list[RecordedRequest] = []
        self._errors: list[BaseException] = []
        self._asked = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._http: _HTTPServer | None = None

    # --- what a provider's class says -------------------------------------------------------------------------------

    def _problems(self, body: Any) -> Iterator[Fault]:
        """Yield what the real API refuses in a request; only the first is looked at."""
        raise NotImplementedError

    def _refusal(self, name: str, value: Any) -> Fault:
        """Return the refusal of a parameter of `refusing`."""
        raise NotImplementedError

    def _render(self, request: ChatRequest, answer: PolicyAnswer) -> Response:
        raise NotImplementedError

    def _failure(self, fault: Fault) -> Response:
        raise NotImplementedError

    def _other(self, route: tuple[str, str]) -> Response | None:
        """Return the answer to a request that is no chat request, None for one that the API does not know."""
        return None

    # --- running ----------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen; raises `OSError` when the port is taken and `ConfigError` when the server already runs."""
        if self._http is not None:
            raise ConfigError(f"the server already runs at {self.base_url}; close() it first")
        self._closing.clear()
        self._http = _HTTPServer(self._port, self._reply, self._errors.append)
        self._http.start()
        return self

    def close(self) -> None:
        """Stop listening, hang up on every client and end the threads; harmless when called twice."""
        http, self._http = self._http, None
        if http is not None:
            self._closing.set()
            http.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def base_url(self) -> str:
        """Return the URL that the client takes; raises `ConfigError` while the server does not run."""
        if self._http is None:
            raise ConfigError("the server does not run; call start() or use it in a `with` block")
        return f"http://127.0.0.1:{self._http.server_address[1]}{self._prefix}"

    @property
    def requests(self) -> list[RecordedRequest]:
        """Return every request so far, refused ones included, oldest first."""
        return list(self._requests)

    @property
    def errors(self) -> list[BaseException]:
        """Return what the policy raised (and what broke in the server itself), oldest first."""
        return list(self._errors)

    def env(self) -> dict[str, str]:
        """Return the environment variables that lead a sub-process here."""
        variables = {"BASE_URL": self.base_url, "API_KEY": API_KEY, "MODEL": self.model}
        return {f"{self._environment}_{name}": value for name, value in variables.items()}

    def _reply(self, method: str, target: str, headers: Mapping[str, str], raw: bytes) -> Response:
        named = {name.lower(): value for name, value in headers.items()}
        self._requests.append(RecordedRequest(method, target, named, parse(raw)))
        route = (method, urlsplit(target).path)
        if route == ("POST", self._chat_path):
            return self._chat(parse(raw))
        if route == _HEALTH:
            return Response.of({"status": "ok"})
        unknown = Fault.error(404, f"Invalid URL ({method} {target})", code="unknown_url")
        return self._other(route) or self._failure(unknown)

    def _chat(self, body: Any) -> Response:
        refused = (self._refusal(name, body[name]) for name in self._refusing if name in body)
        fault = next(chain(self._problems(body), refused), None)
        if fault is not None:
            return self._failure(fault)
        with self._lock:
            number, self._asked = self._asked, self._asked + 1
        request = ChatRequest(body["model"], body["messages"], body.get("tools") or [], body, number)
        try:
            return self._render(request, self._ask(request))
        except Exception as error:  # noqa: BLE001 - the policy is the caller's code; its failure is a 500
            self._errors.append(error)
            return self._failure(Fault.server_error(f"{type(error).__name__}: {error}"))

    def _ask(self, request: ChatRequest) -> PolicyAnswer:
        answer = self._policy_answer(request)
        while isinstance(answer, Fault) and answer.kind == "slow":
            answer = Fault.cut() if self._closing.wait(answer.delay_s) else answer.answer
        return answer

    def _policy_answer(self, request: ChatRequest) -> PolicyAnswer:
        if self._policy is None:
            return next((text_of(m) for m in reversed(request.messages) if m["role"] == "user"), "")
        if not isinstance(self._policy, list | tuple):
            return self._policy(request)
        if request.number < len(self._policy):
            answer: PolicyAnswer = self._policy[request.number]
            return answer
        return Fault.server_error(f"script exhausted: it has {len(self._policy)} answers, one more was asked for")


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests and writes responses until the client hangs up."""

    server: _HTTPServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; the second would wait for an acknowledgement

    def _handle(self) -> None:
        is_chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        raw = b"".join(self._chunks()) if is_chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._send(self.server.reply(self.command, self.path, dict(self.headers.items()), raw))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 - http.server's names

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass

    def _send(self, response: Response) -> None:
        self.send_response_only(response.status)
        self.send_header("Content-Type", "text/event-stream" if response.is_stream else "application/json")
        if response.retry_after_s is not None:
            self.send_header("Retry-After", f"{response.retry_after_s:g}")
        if response.is_stream:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(response.parts[0])))
        self.end_headers()
        for frame in response.frames():
            self.wfile.write(frame)
        self.close_connection |= response.is_cut

    def log_message(self, *_: Any) -> None:
        """Stay silent; `ScriptedServer.requests` is the log."""


class _HTTPServer(ThreadingHTTPServer):
    """Listens in a thread of its own and can hang up on its clients, which keep their connections open."""

    request_queue_size = 128  # five, the default, turns clients away that connect at the same moment

    def __init__(self, port: int, reply: Callable[..., Response], on_error: Callable[[BaseException], None]) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.reply = reply
        self.on_error = on_error
        self._connections: dict[threading.Thread, Any] = {}
        self._listener = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def server_bind(self) -> None:
        """Bind without asking DNS for the host's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)

    def start(self) -> None:
        self._listener.start()

    def stop(self) -> None:
        self.shutdown()
        self._listener.join()
        self.server_close()
        for connection in self._connections.values():
            with suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._connections:
            thread.join(CLOSE_TIMEOUT_S)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections = {thread: open_ for thread, open_ in self._connections.items() if thread.is_alive()}
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self._connections[thread] = request
        thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what went wrong; a client that hung up did nothing wrong."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.on_error(error)


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def parse(raw: bytes) -> Any:
    try:
        return json.loads(raw) if raw else None
    except ValueError:
        return raw.decode(errors="replace")


def text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))

"""What the tests of backends need: a server that talks nonsense, ways to ask, a script in which everything happens."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support import make_tools

from looplet import BackendError, Deny, Message, Reply, ToolCall, Usage
from looplet.testing import Answer, Fault

HELLO = [Message.of_text("user", "hello there")]


@contextmanager
def canned(body: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = (), kind: str = "application/json"):
    """Serve one answer to every request, whatever it is: for what a scripted server would never say."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in (*headers, ("Content-Type", kind), ("Content-Length", str(len(raw)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def askers(kind: type, async_kind: type, **defaults: Any) -> Any:
    """Return `parametrize("ask", ...)`: make a backend, ask it `times` times, close it, return the last reply."""

    def ask_sync(url: str, messages=HELLO, *, backend=(), times: int = 1, **settings: Any) -> Any:
        with kind(base_url=url, **{**defaults, **dict(backend)}) as llm:
            return [llm.chat(messages, **settings) for _ in range(times)][-1]

    def ask_async(url: str, messages=HELLO, *, backend=(), times: int = 1, **settings: Any) -> Any:
        async def main() -> Any:
            async with async_kind(base_url=url, **{**defaults, **dict(backend)}) as llm:
                return [await llm.chat(messages, **settings) for _ in range(times)][-1]

        return asyncio.run(main())

    return pytest.mark.parametrize("ask", [ask_sync, ask_async], ids=["sync", "async"])


def failed(ask, url: str, **settings: Any) -> BackendError:
    """Return the error that asking ends with."""
    with pytest.raises(BackendError) as caught:
        ask(url, **settings)
    return caught.value


def gist(error: BackendError) -> tuple[Any, ...]:
    """Return what a program goes by."""
    return (error.status, error.kind, error.retryable, error.retry_after_s)


def name_of_fault(value: Any) -> str:
    """Return a test id for a fault, an empty one for anything else."""
    return f"{value.kind}{value.status}" if isinstance(value, Fault) else ""


def calling(*calls: ToolCall, **more: Any) -> Message:
    """Return a message of the model that makes these calls."""
    return Message.of_reply(Reply(tool_calls=calls, **more))


class Closing:
    """Closes the run's backend at the end of the run."""

    def __init__(self, is_async: bool) -> None:
        if is_async:
            self.on_loop_end = self.aclose

    def on_loop_end(self, state, log, context, llm):
        llm.close()

    async def aclose(self, state, log, context, llm):
        await llm.aclose()


class Gate:
    """Denies one call and rejects the first ending."""

    def pre_dispatch(self, state, log, tool_call, step):
        return Deny("not that one") if tool_call.args.get("name") == "secret" else None

    def check_done(self, state, log, context, step):
        return None if any(s.tool_call.tool == "done" for s in state.steps) else "cite a source"


def over_the_socket(
    stack: ExitStack, server_class: type, kinds: tuple[type, type], policy: Any, servers: list[Any], **more: Any
):
    """Return what `both` takes: a scripted server and a backend (sync, async) that asks it, anew for each run.

    `servers` gets the servers; `backend=` are settings of the backend, the rest those of the loop.
    """
    settings, hooks = more.pop("backend", {}), more.pop("hooks", [])

    def make(is_async):
        server = stack.enter_context(server_class(policy=policy))
        servers.append(server)
        llm = kinds[is_async](base_url=server.base_url, model="m", max_retries=0, **settings)
        given = {"task": {"goal": "g"}, "tools": make_tools(), "system_prompt": "s", **more}
        return {**given, "llm": llm, "hooks": [*hooks, Closing(is_async)]}

    return make


EVERYTHING = [
    Answer("I add first.", [("add", {"a": 1, "b": 2})], Usage(100, 10, 40, 4), id="resp-1", model="m-2026"),
    [("look", {"name": "x"}), ("look", {"name": "y"}), ("look", {"name": "z"})],
    "I have nothing to call.",
    [("look", {"name": "secret"}), ("boom", {}), ("no.such tool", {})],
    [("add", '{"a": 1, ')],
    [("done", {"answer": "too early"}), ("add", {"a": 2, "b": 2})],
    [("done", {"answer": "3"}), ("look", {"name": "too late"})],
]
"""a script in which, with `Gate`, everything happens that makes a conversation hard to keep valid"""
EVERY_STEP = [
    ("add", True),
    ("look", True),
    ("look", True),
    ("look", True),
    ("look", False),
    ("boom", False),
    ("no.such tool", False),
    ("add", False),
    ("done", False),
    ("add", True),
    ("done", True),
]
"""the steps of a run over it, and whether they succeed"""

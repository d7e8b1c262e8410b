"""What the `openai` package is given to send: as it is, unless somebody wrapped the package to see it."""

from __future__ import annotations

import asyncio
from functools import wraps
from typing import Any

import openai
import pytest
from openai.resources.chat.completions import AsyncCompletions, Completions
from provider_support import EVERYTHING, HELLO, Gate
from support import make_tools

from looplet import AsyncOpenAIBackend, BackendError, Message, OpenAIBackend, async_composable_loop, composable_loop
from looplet.testing import OpenAIServer


class Wrapped:
    """A client that somebody put something around: the package gets what it would from anybody."""

    def __init__(self, client: Any) -> None:
        self.inner = client
        self.base_url = client.base_url
        self.chat = self.completions = self
        self.seen: list[dict[str, Any]] = []

    def create(self, **request: Any) -> Any:
        self.seen.append(request)
        return self.inner.chat.completions.create(**request)


def bodies(server: OpenAIServer) -> list[dict[str, Any]]:
    return [request.body for request in server.requests]


def run_over(client, is_async: bool, **settings: Any) -> None:
    """Run a script in which everything happens, and ask once by hand with settings of the server's own."""
    given = {"task": {"goal": "g"}, "tools": make_tools(), "system_prompt": "s", "hooks": [Gate()], **settings}
    extra = {"extra_body": {"top_k": 3}, "seed": 7, "response_format": {"type": "json_object"}}

    async def arun() -> None:
        llm = AsyncOpenAIBackend(client, model="m")
        async for _ in async_composable_loop(llm, **given):
            pass
        await llm.chat(HELLO, max_tokens=5, temperature=0.5, **extra)
        await client.close()

    if is_async:
        asyncio.run(arun())
        return
    llm = OpenAIBackend(client, model="m")
    for _ in composable_loop(llm, **given):
        pass
    llm.chat(HELLO, max_tokens=5, temperature=0.5, **extra)


@pytest.mark.parametrize("stream", [None, lambda event: None], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
def test_the_server_gets_the_same_whether_the_package_looks_at_it_or_not(kind, stream):
    is_async = kind is openai.AsyncOpenAI
    told = []
    for wrap in (lambda client: client, Wrapped):
        with OpenAIServer(policy=[*EVERYTHING, "by hand"]) as server:
            client = kind(base_url=server.base_url, api_key="sk")
            if wrap is Wrapped and is_async:
                client.chat.completions.create = seeing(client.chat.completions.create, [])
            run_over(client if is_async else wrap(client), is_async, stream=stream)
            told.append(bodies(server))
            if not is_async:
                client.close()
    assert told[0] == told[1]
    assert len(told[0]) == len(EVERYTHING) + 1
    assert told[0][-1] == {
        "model": "m", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 5, "temperature": 0.5,
        "seed": 7, "top_k": 3, "response_format": {"type": "json_object"},
    }  # fmt: skip


def seeing(create, seen):
    """Return `create` as an instrumentation wraps it."""

    @wraps(create)
    def wrapper(*args: Any, **request: Any) -> Any:
        seen.append(request)
        return create(*args, **request)

    return wrapper


class Proxy:
    """Stands for a function and looks like it in every respect, as the wrappers of instrumentation libraries do."""

    def __init__(self, create, seen, owner=None):
        self.create, self.seen, self.owner = create, seen, owner

    def __get__(self, owner, kind=None):
        return self if owner is None else Proxy(self.create, self.seen, owner)

    def __getattr__(self, name):
        return getattr(self.create if self.owner is None else self.create.__get__(self.owner), name)

    def __call__(self, **request):
        self.seen.append(request)
        return self.create(self.owner, **request)


@pytest.mark.parametrize("wrap", [seeing, Proxy])
@pytest.mark.parametrize(("kind", "resource"), [(OpenAIBackend, Completions), (AsyncOpenAIBackend, AsyncCompletions)])
def test_whoever_wraps_the_package_sees_the_messages(kind, resource, wrap, monkeypatch):
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(resource, "create", wrap(resource.create, seen))
    with OpenAIServer(policy=["hi"]) as server:
        llm = kind(base_url=server.base_url, model="m")
        asked = llm.chat(HELLO)
        if kind is AsyncOpenAIBackend:

            async def main() -> None:
                await asked
                await llm.aclose()

            asyncio.run(main())
        else:
            llm.close()
    assert [request["messages"] for request in seen] == [[{"role": "user", "content": "hello there"}]]


def test_azure_finds_its_deployment_and_the_messages():
    sent = []
    hooks = {"request": [lambda request: sent.append((request.url.path, request.read()))]}
    with OpenAIServer(policy=["hi"]) as server:
        address = server.base_url.removesuffix("/v1")
        http = openai.DefaultHttpxClient(event_hooks=hooks)
        client = openai.AzureOpenAI(azure_endpoint=address, api_key="k", api_version="2024-10-21", http_client=http)
        with pytest.raises(BackendError, match="404"):  # the scripted server has no deployments
            OpenAIBackend(client, model="my-deployment").chat([Message.of_text("user", "hello there")])
        client.close()
    ((path, body),) = sent
    assert path == "/openai/deployments/my-deployment/chat/completions"
    assert b'"hello there"' in body

"""Backends around a provider's own Python package: asking, sync and async, for whole answers and for streams.

The package is imported when the first backend is made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Final, Self

from looplet.backends.client_backend import ClientBackend
from looplet.backends.instrumented import recorded_once
from looplet.backends.streams import Assembly
from looplet.backends.wire import Wire
from looplet.messages import Message
from looplet.types import Delta, Reply

_END: Final = object()
"""what comes after the last event; `null` may be one"""


class SyncClientBackend(ClientBackend):
    """Asks and waits."""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        **extra: Any,
    ) -> Reply:
        """Ask the model; `extra` goes to the client's `create`.  Raises BackendError, ContextOverflow, ConfigError."""
        request = self._prepared(
            messages, max_tokens, tools=tools, system_prompt=system_prompt, temperature=temperature, extra=extra
        )
        return self._reply(self._answer(request))

    def stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        **extra: Any,
    ) -> Iterator[Delta | Reply]:
        """Ask like `chat`; yield the answer in pieces as it comes, and at the end the whole `Reply`.

        Raises what `chat` raises, and BackendError (`stream_cut`) when the answer breaks off.  Closing the iterator
        closes the connection.
        """
        request = self._prepared(
            messages, max_tokens, True, tools=tools, system_prompt=system_prompt, temperature=temperature, extra=extra
        )
        events, assembly = self._answer(request), self._assembly()
        try:
            yield from self._deltas(iter(events), assembly)
        finally:
            events.close()
        yield self._whole(events, assembly)

    def _deltas(self, items: Iterator[Any], assembly: Assembly) -> Iterator[Delta]:
        while (event := self._next(items, assembly)) is not _END:
            yield from assembly.add(event)

    def generate(self, prompt: str, **settings: Any) -> str:
        """Return the answer to a text; `settings` are those of `chat`."""
        return self.chat([Message.of_text("user", prompt)], **settings).text

    def _answer(self, request: Wire) -> Any:
        """Return the client's answer, or its stream of events, which has begun."""
        while True:
            try:
                with recorded_once() as is_recorded:
                    return self._create(self._ready(self.client), is_recorded)(**request)
            except Exception as error:  # noqa: BLE001 - a client lets more out than its own errors
                request = self._instead(request, error)

    def _next(self, items: Iterator[Any], assembly: Assembly) -> Any:
        try:
            with recorded_once():  # never beyond one event: what the caller does in between is his own
                return next(items, _END)
        except Exception as error:
            raise self._cut(assembly, error) from error

    def close(self) -> None:
        """Close the connections, unless the client was given."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClientBackend(ClientBackend):
    """Asks and lets others work meanwhile."""

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        **extra: Any,
    ) -> Reply:
        """Ask the model; `extra` goes to the client's `create`.  Raises BackendError, ContextOverflow, ConfigError."""
        request = self._prepared(
            messages, max_tokens, tools=tools, system_prompt=system_prompt, temperature=temperature, extra=extra
        )
        return self._reply(await self._answer(request))

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system_prompt: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        **extra: Any,
    ) -> AsyncIterator[Delta | Reply]:
        """Ask like `chat`; yield the answer in pieces as it comes, and at the end the whole `Reply`.

        Raises what `chat` raises, and BackendError (`stream_cut`) when the answer breaks off.  Closing the iterator
        (`aclose`) closes the connection.
        """
        request = self._prepared(
            messages, max_tokens, True, tools=tools, system_prompt=system_prompt, temperature=temperature, extra=extra
        )
        events, assembly = await self._answer(request), self._assembly()
        try:
            items = aiter(events)
            while (event := await self._next(items, assembly)) is not _END:
                for delta in assembly.add(event):
                    yield delta
        finally:
            await events.close()
        yield self._whole(events, assembly)

    async def generate(self, prompt: str, **settings: Any) -> str:
        """Return the answer to a text; `settings` are those of `chat`."""
        return (await self.chat([Message.of_text("user", prompt)], **settings)).text

    async def _answer(self, request: Wire) -> Any:
        """Return the client's answer, or its stream of events, which has begun."""
        while True:
            try:
                with recorded_once() as is_recorded:
                    return await self._create(self._ready(self._client_here()), is_recorded)(**request)
            except Exception as error:  # noqa: BLE001 - a client lets more out than its own errors
                request = self._instead(request, error)

    async def _next(self, items: AsyncIterator[Any], assembly: Assembly) -> Any:
        try:
            with recorded_once():  # never beyond one event: what the caller does in between is his own
                return await anext(items, _END)
        except Exception as error:
            raise self._cut(assembly, error) from error

    async def aclose(self) -> None:
        """Close the connections, unless the client was given."""
        if self._owns_client:
            await self._client_here().close()

    def _client_here(self) -> Any:
        """Return the client of the running event loop: pooled connections belong to the loop that opened them."""
        if not self._owns_client:
            return self.client
        import asyncio

        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._clients:
                self._clients[loop] = self._unused.pop() if self._unused else self._new_client()
            return self._clients[loop]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

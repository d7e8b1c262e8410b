"""`AnthropicBackend` and `AsyncAnthropicBackend`: Anthropic, and every server that speaks its Messages API.

    llm = AnthropicBackend.from_env(model="claude-sonnet-4-5", cache=CachePolicy())

The `anthropic` package (`pip install "looplet[anthropic]"`) is imported when the first backend is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

from looplet.arguments import strict_names
from looplet.backends.client_backend import ClientBackend
from looplet.backends.clients import AsyncClientBackend, SyncClientBackend
from looplet.backends.messages_api import REPAIRS, CachePolicy, hour_tokens, reply_of, request_of, thinking_of
from looplet.backends.streams import Assembly, MessageAssembly
from looplet.backends.wire import Wire
from looplet.errors import ConfigError
from looplet.messages import Message
from looplet.prices import ListPrice, Price, priced
from looplet.types import Reply

IN_BODY: Final = ("temperature", "top_p", "top_k", "thinking")
"""parameters of the API that some versions of the package have no argument for, older ones or newer ones"""


class _AnthropicBackend(ClientBackend):
    """What both backends share."""

    _package = "anthropic"
    _api = "messages"
    _default_url = "https://api.anthropic.com"
    _local_url = "http://localhost:11434"
    _repairs = REPAIRS
    _providers: ClassVar[Mapping[str, str]] = {"amazonaws.com": "aws.bedrock", "googleapis.com": "gcp.vertex_ai"}

    @strict_names()
    def __init__(
        self,
        client: Any = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        base_url: str | None = None,
        default_max_tokens: int = 4096,
        cache: CachePolicy | None = None,
        timeout_s: float | None = None,
        max_retries: int = 2,
        thinking: int | str | Mapping[str, Any] | None = None,
        price: Price | ListPrice | None = None,
    ) -> None:
        if cache is not None and not isinstance(cache, CachePolicy):
            raise ConfigError(f"cache takes a CachePolicy, not {cache!r}")
        self.cache = cache
        self.thinking = thinking_of(thinking)
        super().__init__(
            client,
            model=model,
            base_url=base_url,
            api_key=api_key,
            timeout_s=timeout_s,
            max_retries=max_retries,
            default_max_tokens=default_max_tokens,
            price=price,
        )

    def _request(self, messages: Sequence[Message], **asked: Any) -> Wire:
        return request_of(messages, model=self.model, thinking=self.thinking, cache=self.cache, **asked)

    def _create(self, client: Any, is_recorded: bool) -> Callable[..., Any]:
        create = (_untraced(client) if is_recorded else client).messages.create
        return lambda **request: create(**_for_any_version(request))

    def _reply(self, answer: Any) -> Reply:
        reply = reply_of(answer)
        hour = hour_tokens(answer)
        if reply.usage is None or not hour:
            return reply
        usage = priced(reply.usage, reply.model or self.model, self, cache_write_1h_tokens=hour)
        return replace(reply, usage=usage)

    def _assembly(self) -> Assembly:
        return MessageAssembly()


class AnthropicBackend(_AnthropicBackend, SyncClientBackend):
    """A model behind the Messages API.

    `client`: an `anthropic.Anthropic`, instead of `base_url`, `api_key`, `timeout_s` and `max_retries`.  Without
    `base_url` and `api_key` the variables ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY count; a base URL (without `/v1`)
    alone is enough for local servers.  `timeout_s`: seconds for one attempt, None for the package's 600, which then
    refuses a `max_tokens` that may take longer; `max_retries`: attempts beyond the first, made by the package.

    `cache`: what the provider is to keep of a request, None for nothing.  `thinking`: a budget in tokens, `"adaptive"`,
    or the API's own object; a budget is on top of a `max_tokens` that is no larger, and no temperature is sent with it.
    `price`: what a call costs, where `genai-prices` has no list for `base_url`: `Price(...)` or `ListPrice(...)`.
    Raises ConfigError for settings that cannot work.
    """

    _client_class = "Anthropic"
    _other_class = "AsyncAnthropic"


class AsyncAnthropicBackend(_AnthropicBackend, AsyncClientBackend):
    """`AnthropicBackend` for `async for`; `client` is an `anthropic.AsyncAnthropic`.

    May be used in one event loop after another (`asyncio.run` twice); a client that was given may not.
    """

    _client_class = "AsyncAnthropic"
    _other_class = "Anthropic"


def _for_any_version(request: Wire) -> Wire:
    """Return the arguments of `create` for the request, such that any version of the package takes them."""
    arguments = {name: value for name, value in request.items() if name not in IN_BODY}
    body = {name: value for name, value in request.items() if name in IN_BODY}
    return {**arguments, "extra_body": {**body, **(request.get("extra_body") or {})}} if body else arguments


def _untraced(client: Any) -> Any:
    """Return a copy of the client, on the same connections, that makes no span of its own; old ones make none."""
    try:
        return client.with_options(open_telemetry=False)
    except (AttributeError, TypeError):
        return client

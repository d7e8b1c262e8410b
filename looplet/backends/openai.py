"""`OpenAIBackend` and `AsyncOpenAIBackend`: OpenAI, and every server that speaks its Chat Completions API.

    llm = OpenAIBackend.from_env(model="gpt-4o-mini")
    llm = OpenAIBackend(base_url="http://localhost:11434/v1", model="llama3.2")

The `openai` package is imported when the first backend is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, ClassVar, Final

from looplet.arguments import strict_names
from looplet.backends.client_backend import ClientBackend
from looplet.backends.clients import AsyncClientBackend, SyncClientBackend
from looplet.backends.completions import REPAIRS, reply_of, request_of
from looplet.backends.streams import Assembly, CompletionAssembly
from looplet.backends.wire import Wire
from looplet.messages import Message
from looplet.prices import ListPrice, Price
from looplet.types import Reply

_PROVIDERS: Final = {
    "openai.azure.com": "azure.ai.openai",
    "cognitiveservices.azure.com": "azure.ai.openai",
    "groq.com": "groq",
    "deepseek.com": "deepseek",
    "mistral.ai": "mistral_ai",
    "x.ai": "x_ai",
    "perplexity.ai": "perplexity",
    "moonshot.ai": "moonshot_ai",
    "moonshot.cn": "moonshot_ai",
    "cohere.ai": "cohere",
    "cohere.com": "cohere",
}


class _OpenAIBackend(ClientBackend):
    """What both backends share."""

    _package = "openai"
    _api = "chat"
    _default_url = "https://api.openai.com/v1"
    _local_url = "http://localhost:11434/v1"
    _repairs = REPAIRS
    _streaming: ClassVar[Mapping[str, Any]] = {"stream": True, "stream_options": {"include_usage": True}}
    _providers = _PROVIDERS

    @strict_names()
    def __init__(
        self,
        client: Any = None,
        *,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_max_tokens: int | None = None,
        tool_choice: Any = "auto",
        timeout_s: float | None = None,
        max_retries: int = 2,
        price: Price | ListPrice | None = None,
    ) -> None:
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
        self.tool_choice = tool_choice

    def _request(self, messages: Sequence[Message], **asked: Any) -> Wire:
        return request_of(messages, model=self.model, tool_choice=self.tool_choice, **asked)

    def _create(self, client: Any, is_recorded: bool) -> Callable[..., Any]:
        create: Callable[..., Any] = client.chat.completions.create
        if not _is_the_packages(create):
            return create
        return lambda **request: create(**_as_it_is(request))

    def _reply(self, answer: Any) -> Reply:
        return reply_of(answer)

    def _assembly(self) -> Assembly:
        return CompletionAssembly()


class OpenAIBackend(_OpenAIBackend, SyncClientBackend):
    """A model behind the Chat Completions API.

    `client`: an `openai.OpenAI`, instead of `base_url`, `api_key`, `timeout_s` and `max_retries`.  Without `base_url`
    and `api_key` the variables OPENAI_BASE_URL and OPENAI_API_KEY count; a base URL alone is enough for local servers.
    `timeout_s`: seconds for one attempt, None for the package's 600; `max_retries`: attempts beyond the first, made by
    the package.  `tool_choice` is sent where there are tools.  `price`: what a call costs, where `genai-prices` has no
    list for `base_url`: `Price(...)` or `ListPrice(...)`.  Raises ConfigError for settings that cannot work.
    """

    _client_class = "OpenAI"
    _other_class = "AsyncOpenAI"


class AsyncOpenAIBackend(_OpenAIBackend, AsyncClientBackend):
    """`OpenAIBackend` for `async for`; `client` is an `openai.AsyncOpenAI`.

    May be used in one event loop after another (`asyncio.run` twice); a client that was given may not.
    """

    _client_class = "AsyncOpenAI"
    _other_class = "OpenAI"


def _is_the_packages(create: Callable[..., Any]) -> bool:
    """Tell whether this is the package's own method, which nobody wrapped to see what it is given."""
    made = getattr(getattr(create, "__func__", None), "__globals__", {}).get("__name__", "")
    return type(create) is MethodType and str(made).partition(".")[0] == "openai"


def _as_it_is(request: Wire) -> Wire:
    """Return the arguments of `create` such that the package sends messages and tools as they are.

    What it gets as `messages` it compares with every type that a message may have, part by part, which takes ten times
    as long as all the rest of a request.  `extra_body` takes precedence and is sent as it is.
    """
    body = {name: request[name] for name in ("messages", "tools") if name in request}
    rest = {name: value for name, value in request.items() if name != "tools"}
    return {**rest, "messages": [], "extra_body": {**body, **(request.get("extra_body") or {})}}

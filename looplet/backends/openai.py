"""`OpenAIBackend` and `AsyncOpenAIBackend`: OpenAI, and every server that speaks its Chat Completions API.

    llm = OpenAIBackend.from_env(model="gpt-4o-mini")
    llm = OpenAIBackend(base_url="http://localhost:11434/v1", model="llama3.2")

The `openai` package is imported when the first backend is made.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from looplet.backends.completions import REPAIRS, Wire, repaired, reply_of, request_of
from looplet.backends.failures import refused_parameter, to_backend_error
from looplet.backends.instrumented import told_once
from looplet.errors import ConfigError
from looplet.messages import Message
from looplet.types import Reply

if TYPE_CHECKING:
    import asyncio

DEFAULT_URL: Final = "https://api.openai.com/v1"
PLACEHOLDER_KEY: Final = "none"
"""for local servers, which look at no key; the client insists on one"""

# Domain → `gen_ai.provider.name`, for the hosts that the GenAI conventions have a word for.
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


class _OpenAIBackend:
    """What both backends share: all but the call itself."""

    _client_class: ClassVar[str]
    _other_class: ClassVar[str]

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
    ) -> None:
        self._owns_client = client is None
        if client is None:
            self._new_client = self._client_maker(base_url, api_key, timeout_s, max_retries)
            client = self._new_client()
        else:
            self._check_client(client, base_url, api_key, timeout_s)
        if not model:
            raise ConfigError(f"no model: pass model=, or set OPENAI_MODEL and use {type(self).__name__}.from_env()")
        self.client = client
        self.model = model
        self.default_max_tokens = default_max_tokens
        self.tool_choice = tool_choice
        self.base_url = str(getattr(client, "base_url", "") or DEFAULT_URL).rstrip("/")
        url = urlsplit(self.base_url)
        self.server_address = url.hostname or ""
        self.server_port = url.port or (80 if url.scheme == "http" else 443)
        self.provider = provider_of(self.server_address)
        self._refused: dict[str, frozenset[str]] = {}
        """the parameters that a model refuses, by model"""
        self._lock = threading.Lock()
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()
        self._unused = [client]

    @classmethod
    def from_env(cls, *, model: str | None = None, **settings: Any) -> Self:
        """Build a backend from OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL; arguments win.

        `settings` are those of the constructor.  Raises ConfigError that says which variable to set.
        """
        return cls(model=model or os.environ.get("OPENAI_MODEL"), **settings)

    def _client_maker(
        self, base_url: str | None, api_key: str | None, timeout_s: float | None, max_retries: int
    ) -> Callable[[], Any]:
        url = base_url or os.environ.get("OPENAI_BASE_URL")
        key = api_key or os.environ.get("OPENAI_API_KEY") or (PLACEHOLDER_KEY if url else "")
        if not key:
            raise ConfigError(
                "no endpoint: set OPENAI_API_KEY (or pass api_key=) for api.openai.com, "
                "or OPENAI_BASE_URL (base_url=) for another server, such as http://localhost:11434/v1"
            )
        if url and urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"base_url must begin with http:// or https://, not {url!r}")
        timeout = {} if timeout_s is None else {"timeout": timeout_s}
        client_class = getattr(_sdk(), self._client_class)
        settings = {"base_url": url or DEFAULT_URL, "api_key": _checked_key(key), "max_retries": max_retries}
        return partial(client_class, **settings, **timeout)

    def _check_client(self, client: Any, *settings: Any) -> None:
        if not hasattr(client, "chat"):
            hint = f"; write {type(self).__name__}(model={client!r})" if isinstance(client, str) else ""
            raise ConfigError(f"client takes an openai.{self._client_class}, not {type(client).__name__}{hint}")
        if isinstance(client, getattr(_sdk(), self._other_class)):
            raise ConfigError(
                f"{type(self).__name__} takes an openai.{self._client_class}, not an {type(client).__name__}"
            )
        if any(setting is not None for setting in settings):
            raise ConfigError(
                "a client brings its own base_url, api_key and time-out: pass those, or client=, not both"
            )

    def _request(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        system_prompt: str,
        max_tokens: int | None,
        temperature: float | None,
        extra: Mapping[str, Any],
    ) -> Wire:
        if extra.get("stream"):
            raise ConfigError("stream=True is not for chat(): it returns whole replies")
        request = request_of(
            messages,
            model=self.model,
            tools=tools,
            tool_choice=self.tool_choice,
            system_prompt=system_prompt,
            max_tokens=self.default_max_tokens if max_tokens is None else max_tokens,
            temperature=temperature,
            extra=extra,
        )
        for name in self._refused.get(request["model"], ()):
            request = repaired(request, name)
        return request

    def _instead(self, request: Wire, error: Exception) -> Wire:
        """Return the request to send after `error`; raises BackendError when there is none.

        Each repair takes a parameter away, so one call makes at most as many as there are `REPAIRS`.
        """
        name, model = refused_parameter(error), request["model"]
        if name not in REPAIRS or name not in request:
            raise to_backend_error(error, model=model, base_url=self.base_url) from error
        with self._lock:
            self._refused[model] = self._refused.get(model, frozenset()) | {name}
        return repaired(request, name)


class OpenAIBackend(_OpenAIBackend):
    """A model behind the Chat Completions API.

    `client`: an `openai.OpenAI`, instead of `base_url`, `api_key`, `timeout_s` and `max_retries`.  Without `base_url`
    and `api_key` the variables OPENAI_BASE_URL and OPENAI_API_KEY count; a base URL alone is enough for local servers.
    `timeout_s`: seconds for one attempt, None for the package's 600; `max_retries`: attempts beyond the first, made by
    the package.  `tool_choice` is sent where there are tools.  Raises ConfigError for settings that cannot work.
    """

    _client_class = "OpenAI"
    _other_class = "AsyncOpenAI"

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
        """Ask the model; `extra` goes to `client.chat.completions.create`.  Raises BackendError, ContextOverflow."""
        request = self._request(messages, tools, system_prompt, max_tokens, temperature, extra)
        while True:
            try:
                with told_once():
                    completion = self.client.chat.completions.create(**request)
            except Exception as error:  # noqa: BLE001 - a client lets more out than its own errors
                request = self._instead(request, error)
            else:
                return reply_of(completion)

    def generate(self, prompt: str, **settings: Any) -> str:
        """Return the answer to a text; `settings` are those of `chat`."""
        return self.chat([Message.of_text("user", prompt)], **settings).text

    def close(self) -> None:
        """Close the connections, unless the client was given."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncOpenAIBackend(_OpenAIBackend):
    """`OpenAIBackend` for `async for`; `client` is an `openai.AsyncOpenAI`.

    May be used in one event loop after another (`asyncio.run` twice); a client that was given may not.
    """

    _client_class = "AsyncOpenAI"
    _other_class = "OpenAI"

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
        """Ask the model; `extra` goes to `client.chat.completions.create`.  Raises BackendError, ContextOverflow."""
        request = self._request(messages, tools, system_prompt, max_tokens, temperature, extra)
        while True:
            try:
                with told_once():
                    completion = await self._client_here().chat.completions.create(**request)
            except Exception as error:  # noqa: BLE001 - a client lets more out than its own errors
                request = self._instead(request, error)
            else:
                return reply_of(completion)

    async def generate(self, prompt: str, **settings: Any) -> str:
        """Return the answer to a text; `settings` are those of `chat`."""
        return (await self.chat([Message.of_text("user", prompt)], **settings)).text

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


def provider_of(host: str) -> str:
    """Return `gen_ai.provider.name` for a host; an unknown one speaks OpenAI's format, and so is `openai`."""
    found = (name for domain, name in _PROVIDERS.items() if host == domain or host.endswith(f".{domain}"))
    return next(found, "openai")


def _checked_key(key: str) -> str:
    """Return the key without blanks around it; raises ConfigError for one that no HTTP header can carry."""
    key = key.strip()
    wrong = next((char for char in key if not "!" <= char <= "~"), None)
    if wrong is not None:
        raise ConfigError(
            f"the API key holds {wrong!r} at position {key.index(wrong)}, and keys are plain ASCII: "
            "paste it again (OPENAI_API_KEY or api_key=), watching for '…' and quotation marks"
        )
    return key


@cache
def _sdk() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ConfigError("the openai package is missing: pip install 'looplet[openai]'") from error
    return openai

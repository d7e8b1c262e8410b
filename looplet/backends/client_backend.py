"""`ClientBackend`: what the backends around a provider's own Python package share, but the asking.

A provider's class says how its requests, replies and refusals look; the classes of `looplet.backends.clients` ask.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from looplet.backends.failures import STREAM_CUT, refused_parameter, to_backend_error, to_stream_error
from looplet.backends.streams import Assembly
from looplet.backends.wire import Wire
from looplet.errors import BackendError, ConfigError, MissingExtra
from looplet.messages import Message
from looplet.prices import ListPrice, Price, checked
from looplet.types import Reply

if TYPE_CHECKING:
    import asyncio

PLACEHOLDER_KEY: Final = "none"
"""for local servers, which look at no key; the clients insist on one"""


class ClientBackend:
    """Everything but the waiting."""

    _package: ClassVar[str]
    """its name, that of looplet's extra, and in capitals the prefix of its environment variables"""
    _api: ClassVar[str]
    """the attribute of a client that asks the model"""
    _client_class: ClassVar[str]
    _other_class: ClassVar[str]
    _default_url: ClassVar[str]
    _local_url: ClassVar[str]
    """what the URL of a server on this machine looks like, for error messages"""
    _repairs: ClassVar[Mapping[str, str | None]]
    """parameters that some models refuse, and what to send instead"""
    _streaming: ClassVar[Mapping[str, Any]] = {"stream": True}
    """what asks for a stream"""
    _providers: ClassVar[Mapping[str, str]] = {}
    """domain → `gen_ai.provider.name`, for the hosts that the GenAI conventions have a word for"""

    def __init__(
        self,
        client: Any,
        *,
        model: str | None,
        base_url: str | None,
        api_key: str | None,
        timeout_s: float | None,
        max_retries: int,
        default_max_tokens: int | None,
        price: Price | ListPrice | None,
    ) -> None:
        self.price = checked(price)
        self._owns_client = client is None
        if client is None:
            self._new_client = self._client_maker(base_url, api_key, timeout_s, max_retries)
            client = self._new_client()
        else:
            self._check_client(client, base_url, api_key, timeout_s)
        if not model:
            variable = f"{self._package.upper()}_MODEL"
            raise ConfigError(f"no model: pass model=, or set {variable} and use {type(self).__name__}.from_env()")
        self.client = client
        self.model = model
        self.default_max_tokens = default_max_tokens
        self.base_url = str(getattr(client, "base_url", "") or self._default_url).rstrip("/")
        url = urlsplit(self.base_url)
        self.server_address = url.hostname or ""
        self.server_port = url.port or (80 if url.scheme == "http" else 443)
        self.provider = self._provider_of(self.server_address)
        self._refused: dict[str, frozenset[str]] = {}
        """the parameters that a model refuses, by model"""
        self._lock = threading.Lock()
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()
        self._unused = [client]
        self._options: dict[str, Any] = {}
        """how the client is to ask, where not as it was made to"""
        self._once: dict[float | None, Self] = {}

    @classmethod
    def from_env(cls, *, model: str | None = None, **settings: Any) -> Self:
        """Build a backend from the provider's _BASE_URL, _API_KEY and _MODEL variables; arguments win.

        `settings` are those of the constructor.  Raises ConfigError that says which variable to set.
        """
        return cls(model=model or os.environ.get(f"{cls._package.upper()}_MODEL"), **settings)

    def looplet_once(self, timeout_s: float | None) -> Self:
        """Return this backend, on the same connections, with one attempt per call, for rules that count the attempts.

        `timeout_s`: seconds for the attempt, None for what the client has.  The same object for the same time-out.
        """
        with self._lock:
            if timeout_s not in self._once:
                once = self._once[timeout_s] = copy(self)
                options = {"max_retries": 0} | ({} if timeout_s is None else {"timeout": timeout_s})
                once._once, once._options = {}, options  # noqa: SLF001 - its own class
            return self._once[timeout_s]

    # --- what a provider's class says -------------------------------------------------------------------------------

    def _request(self, messages: Sequence[Message], **asked: Any) -> Wire:
        """Return the keyword arguments of the call; `asked`: those of `chat`, and the rest of them as `extra`."""
        raise NotImplementedError

    def _create(self, client: Any, is_recorded: bool) -> Callable[..., Any]:
        """Return the client's function that asks; `is_recorded`: looplet records this call, the client should not."""
        raise NotImplementedError

    def _reply(self, answer: Any) -> Reply:
        """Return what the client's answer says.  Raises BackendError."""
        raise NotImplementedError

    def _assembly(self) -> Assembly:
        """Return what puts the answer together from the events of a stream."""
        raise NotImplementedError

    # --- inside -----------------------------------------------------------------------------------------------------

    def _client_maker(
        self, base_url: str | None, api_key: str | None, timeout_s: float | None, max_retries: int
    ) -> Callable[[], Any]:
        env = self._package.upper()
        url = base_url or os.environ.get(f"{env}_BASE_URL")
        key = api_key or os.environ.get(f"{env}_API_KEY") or (PLACEHOLDER_KEY if url else "")
        if not key:
            raise ConfigError(
                f"no endpoint: set {env}_API_KEY (or pass api_key=) for {urlsplit(self._default_url).hostname}, "
                f"or {env}_BASE_URL (base_url=) for another server, such as {self._local_url}"
            )
        if url and urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"base_url must begin with http:// or https://, not {url!r}")
        timeout = {} if timeout_s is None else {"timeout": timeout_s}
        client_class = getattr(self._sdk(), self._client_class)
        key = _checked_key(key, env)
        return partial(client_class, base_url=url or self._default_url, api_key=key, max_retries=max_retries, **timeout)

    def _check_client(self, client: Any, *settings: Any) -> None:
        wanted = f"{self._package}.{self._client_class}"
        if not hasattr(client, self._api):
            hint = f"; write {type(self).__name__}(model={client!r})" if isinstance(client, str) else ""
            raise ConfigError(f"client takes an {wanted}, not {type(client).__name__}{hint}")
        if isinstance(client, getattr(self._sdk(), self._other_class)):
            raise ConfigError(f"{type(self).__name__} takes an {wanted}, not an {type(client).__name__}")
        if any(setting is not None for setting in settings):
            raise ConfigError(
                "a client brings its own base_url, api_key and time-out: pass those, or client=, not both"
            )

    def _ready(self, client: Any) -> Any:
        """Return the client with this backend's options; a stand-in for one may have no options."""
        return client.with_options(**self._options) if self._options and hasattr(client, "with_options") else client

    def _prepared(
        self, messages: Sequence[Message], max_tokens: int | None, is_stream: bool = False, **asked: Any
    ) -> Wire:
        """Return the request without what the model has refused before."""
        limit = self.default_max_tokens if max_tokens is None else max_tokens
        request = self._request(messages, max_tokens=limit, **asked)
        if request.get("stream"):
            raise ConfigError("leave stream= out: chat() returns whole replies, and stream() streams them")
        if is_stream:
            request = {**self._streaming, **request}
        for name in self._refused.get(request["model"], ()):
            request = self._repaired(request, name)
        return request

    def _instead(self, request: Wire, error: Exception) -> Wire:
        """Return the request to send after `error`; raises BackendError when there is none.

        Each repair takes a parameter away, so one call makes at most as many as there are `_repairs`.
        """
        name, model = self._refused_by(error, request), request["model"]
        if name not in self._repairs or name not in request:
            raise to_backend_error(error, package=self._package, model=model, base_url=self.base_url) from error
        with self._lock:
            self._refused[model] = self._refused.get(model, frozenset()) | {name}
        return self._repaired(request, name)

    def _refused_by(self, error: Exception, request: Wire) -> str:
        """Return the parameter that `error` refuses, an empty string for none."""
        if name := refused_parameter(error):
            return name.partition(".")[0]
        if getattr(error, "status_code", None) not in (400, 422):
            return ""
        extras = (name for name in self._streaming if name in self._repairs and name in request)
        return next((name for name in extras if name in str(error)), "")  # each server has its own words for it

    def _repaired(self, request: Wire, refused: str) -> Wire:
        rest = {name: value for name, value in request.items() if name != refused}
        instead = self._repairs[refused]
        if instead is not None and refused in request:
            rest.setdefault(instead, request[refused])
        return rest

    def _cut(self, assembly: Assembly, error: Exception | None = None) -> BackendError:
        """Return the error for a stream that broke off, or ended before its answer; it says what was charged."""
        if error is None:
            words = f"the stream from {self.base_url} ended before the answer did; try again"
            cut = BackendError(words, kind=STREAM_CUT, retryable=True)
        else:
            cut = to_stream_error(error, package=self._package, model=self.model, base_url=self.base_url)
        cut.usage = self._reply(assembly.answer).usage
        return cut

    def _whole(self, events: Any, assembly: Assembly) -> Reply:
        """Return the reply when a stream is over; raises BackendError when it was none, or ended too early."""
        if assembly.is_whole:
            return self._reply(assembly.answer)
        kind = getattr(getattr(events, "response", None), "headers", {}).get("content-type", "text/event-stream")
        if "event-stream" in kind:
            raise self._cut(assembly)
        words = f"{self.base_url} answered with {kind}, not with a stream; is it the API, and can it stream?"
        raise BackendError(words, kind="bad_response")

    def _provider_of(self, host: str) -> str:
        """Return `gen_ai.provider.name`; an unknown host speaks the format of the package's own provider."""
        found = (name for domain, name in self._providers.items() if host == domain or host.endswith(f".{domain}"))
        return next(found, self._package)

    @classmethod
    def _sdk(cls) -> Any:
        try:
            return import_module(cls._package)
        except ImportError as error:
            raise MissingExtra.of(cls._package, cls._package) from error


def _checked_key(key: str, env: str) -> str:
    """Return the key without blanks around it; raises ConfigError for one that no HTTP header can carry."""
    key = key.strip()
    wrong = next((char for char in key if not "!" <= char <= "~"), None)
    if wrong is not None:
        raise ConfigError(
            f"the API key holds {wrong!r} at position {key.index(wrong)}, and keys are plain ASCII: "
            f"paste it again ({env}_API_KEY or api_key=), watching for '…' and quotation marks"
        )
    return key

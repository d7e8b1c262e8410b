"""One shape for every backend: whatever `llm=` is, the loop asks a `Model` and gets a `Reply`.

A backend is an object with one of these methods, sync or `async def`; the first it has is used:

    chat(messages, *, tools, system_prompt, max_tokens, temperature) -> Reply
    generate_with_tools(prompt, *, tools, max_tokens, system_prompt, temperature) -> list of content blocks
    generate(prompt, *, max_tokens, system_prompt, temperature) -> str

One with `chat` may also have `stream`, with the same arguments: an iterator (async: an async one) of `looplet.Delta`s
whose last item is the whole `Reply`.  A method gets only the keyword arguments that it takes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol

from looplet.backends.wire import MOST_TOKENS
from looplet.boundary import Boundary
from looplet.config import LoopConfig
from looplet.errors import ConfigError, LoopletError, did_you_mean
from looplet.executors import refuse_async
from looplet.messages import Message, clean_part, encode
from looplet.parsing import ParseFailure, parse_tool_calls
from looplet.plan import INLINE, SERIAL
from looplet.prices import priced
from looplet.prompt import render
from looplet.tools import BaseToolRegistry
from looplet.types import Reply, ToolCall, Usage

PROTOCOLS: Final = ("chat", "generate_with_tools", "generate")
_CLIENTS: Final = {"openai": "OpenAIBackend", "anthropic": "AnthropicBackend"}
DEFAULT_MAX_TOKENS: Final = 2000
"""for backends whose `max_tokens` has no default"""


class Backend(Protocol):
    """The full form of a backend."""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        system_prompt: str,
        max_tokens: int | None,
        temperature: float | None,
    ) -> Reply: ...


class Model:
    """A backend as the loop sees it; `clean` maps the tool definitions that it is sent."""

    def __init__(self, llm: Any, config: LoopConfig, *, sync: bool, clean: Callable[[Any], Any] | None = None) -> None:
        self.llm = llm
        self.protocol = _protocol_of(llm, native=config.use_native_tools)
        self.name = str(getattr(llm, "model", "") or "")
        self.provider = str(getattr(llm, "provider", "") or type(list(layers(llm))[-1]).__name__)
        self.server_address = getattr(llm, "server_address", None)
        self.server_port = getattr(llm, "server_port", None)
        self.streams = self.protocol == "chat" and callable(getattr(llm, "stream", None))
        self._method = getattr(llm, self.protocol)
        self._clean = clean
        self._sync = sync
        if sync and _is_async(self._method):
            raise ConfigError("this backend is async: iterate with `async for step in async_composable_loop(...)`")
        self.lane = INLINE if _is_async(self._method) else SERIAL
        self.native = config.use_native_tools and self.protocol != "generate" and bool(self._accepted({"tools": None}))
        self._settings = self._settings_for(config)
        self._needs_tools = self._requires("tools")
        self._takes_system = bool(self._accepted({"system_prompt": ""}))

    def request(
        self, messages: Sequence[Message], tools: BaseToolRegistry | None, overrides: Mapping[str, Any] | None = None
    ) -> Callable[[], Any]:
        """Return the call that asks the model; the messages begin with the system prompt, if there is one.

        `overrides`: keyword arguments that beat those of the run's settings, where the method takes them.
        """
        first, given = self._arguments(messages, tools, overrides)
        call = partial(self._method, first, **given)
        return (lambda: refuse_async(call())) if self._sync else call

    def stream(
        self, messages: Sequence[Message], tools: BaseToolRegistry | None, overrides: Mapping[str, Any] | None = None
    ) -> Callable[[], Any]:
        """Return the call that opens a stream of the answer."""
        first, given = self._arguments(messages, tools, overrides)
        return partial(self.llm.stream, first, **given)

    def _arguments(
        self, messages: Sequence[Message], tools: BaseToolRegistry | None, overrides: Mapping[str, Any] | None
    ) -> tuple[Any, dict[str, Any]]:
        system, first = self._split_system(messages)
        given = {**self._settings, **system}
        if overrides:
            given |= {name: v for name, v in self._accepted(dict(overrides)).items() if v is not None}
        if self.protocol != "chat":
            first = render(first)
        if self.native and tools is not None:
            schemas = tools.tool_schemas() if self.protocol == "chat" else _api_schemas(tools)
            given["tools"] = schemas if self._clean is None else self._clean(schemas)
        elif self._needs_tools:
            given.setdefault("tools", None if self.protocol == "chat" else [])
        return first, given

    def reply(self, raw: Any, boundary: Boundary, known: Collection[str] = ()) -> Reply:
        """Return the model's answer, cleaned; raises LoopletError when the backend returned something else.

        `known` names the tools, for calls that are to be found in the text.
        """
        reply = _reply_of(raw, self.protocol)
        usage = reply.usage
        if usage is not None:
            _check_usage(usage, self.protocol)
            usage = priced(usage, reply.model or self.name, self.llm)
        clean = boundary.text
        calls = tuple([_clean_call(call, boundary) for call in reply.tool_calls])
        text = clean(reply.text) if calls else clean_text(reply.text, boundary, known)
        return Reply(
            text, calls, usage, clean(reply.model), clean(reply.response_id), clean(reply.finish_reason),
            clean(reply.reasoning), boundary.clean(reply.metadata),
            tuple([clean_part(part, boundary.clean) for part in reply.parts]),
        )  # fmt: skip

    def _split_system(self, messages: Sequence[Message]) -> tuple[dict[str, str], Any]:
        """Return the system prompt as an argument, if the method takes it, and the messages without it."""
        if not self._takes_system:
            return {}, messages
        first = messages[0]
        if first.role == "system":
            return {"system_prompt": first.text}, messages[1:]
        return {"system_prompt": ""}, messages

    def _settings_for(self, config: LoopConfig) -> dict[str, Any]:
        wanted = {"max_tokens": config.max_tokens, "temperature": config.temperature}
        settings = {name: value for name, value in self._accepted(wanted).items() if value is not None}
        if "max_tokens" not in settings and self._requires("max_tokens"):
            settings["max_tokens"] = DEFAULT_MAX_TOKENS
        if "temperature" not in settings and self._requires("temperature"):
            settings["temperature"] = 0.2
        if strange := [name for name in config.generate_kwargs if not self._accepted({name: None})]:
            raise ConfigError(
                f"generate_kwargs has {strange[0]!r}, which {type(self.llm).__name__}.{self.protocol} does not take"
            )
        return {**settings, **config.generate_kwargs}

    def _accepted(self, wanted: dict[str, Any]) -> dict[str, Any]:
        parameters = _parameters(self._method)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return wanted
        return {name: value for name, value in wanted.items() if name in parameters}

    def _requires(self, name: str) -> bool:
        parameter = _parameters(self._method).get(name)
        return parameter is not None and parameter.default is parameter.empty


def _clean_call(call: ToolCall, boundary: Boundary) -> ToolCall:
    text, clean = boundary.text, boundary.clean
    return ToolCall(text(call.tool), clean(call.args), text(call.reasoning), text(call.call_id), clean(call.metadata))


def clean_text(text: str, boundary: Boundary, known: Collection[str]) -> str:
    r"""Return a reply's text, redacted such that the calls in it are those that were meant, redacted.

    Redacting JSON as a text may break it (`{"card": 4111...}` becomes `{"card": [card]}`) or miss what JSON escapes
    (`bob\u0040example.com`).  Where it does, the text is written anew out of the redacted calls.
    """
    cleaned = boundary.text(text)
    if not boundary.redactors:
        return cleaned
    try:
        meant = [_clean_call(call, boundary) for call in parse_tool_calls(text, known)]
    except ParseFailure:
        return cleaned
    with suppress(ParseFailure):
        if parse_tool_calls(cleaned, known) == meant:
            return cleaned
    said = [{"tool": c.tool, "args": c.args, "reasoning": c.reasoning, "id": c.call_id, **c.metadata} for c in meant]
    return encode({"tools": said}).decode()


def layers(llm: Any) -> Iterator[Any]:
    """Yield a backend and what it is wrapped around (`inner`), outermost first."""
    seen: set[int] = set()
    while llm is not None and id(llm) not in seen:
        seen.add(id(llm))
        yield llm
        llm = getattr(llm, "__dict__", {}).get("inner")


def _parameters(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(method).parameters
    except (TypeError, ValueError):  # no signature to be had: pass everything
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _protocol_of(llm: Any, *, native: bool) -> str:
    if inspect.isclass(llm):
        raise ConfigError(f"llm= takes a backend object: pass {llm.__name__}(...), not the class")
    for name in PROTOCOLS:
        if callable(getattr(llm, name, None)) and (
            native or name != "generate_with_tools" or not hasattr(llm, "generate")
        ):
            return name
    maker = type(llm).__module__.partition(".")[0]
    if isinstance(llm, str) or maker in _CLIENTS:
        given = f"model={llm!r}" if isinstance(llm, str) else "client=..., model=..."
        write = f"{_CLIENTS.get(maker, 'OpenAIBackend')}({given})"
        raise ConfigError(f"llm= takes a backend, not {type(llm).__name__}: pass {write}")
    public = [name for name in dir(llm) if not name.startswith("_")]
    hint = next((h for name in public if (h := did_you_mean(name, PROTOCOLS))), "")
    raise ConfigError(
        f"llm= takes an object with one of the methods {', '.join(PROTOCOLS)}; {type(llm).__name__} has none{hint}"
    )


def _api_schemas(tools: BaseToolRegistry) -> list[dict[str, Any]]:
    return [spec.to_api_schema() for name in tools.tool_names if (spec := tools.get(name))]


def _is_async(method: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(method)


def _reply_of(raw: Any, protocol: str) -> Reply:
    if isinstance(raw, Reply):
        return raw
    if isinstance(raw, str):
        return Reply(text=raw)
    if protocol == "generate_with_tools" and isinstance(raw, list):
        return _of_blocks(raw)
    expected = {"chat": "a looplet.Reply", "generate_with_tools": "a list of content blocks", "generate": "a str"}
    raise LoopletError(f"the backend's {protocol}() returned {type(raw).__name__}; it must return {expected[protocol]}")


def _check_usage(usage: Any, protocol: str) -> None:
    """Raise LoopletError for a usage that cannot be counted; one that the provider made up is None."""
    if (must := _wrong_in(usage)) is not None:
        said = f"the backend's {protocol}() returned a Reply with usage={usage!r:.200}"
        raise LoopletError(f"{said}; {must}, and usage None where nobody knows")


def _wrong_in(usage: Any) -> str | None:
    if not isinstance(usage, Usage):
        return "it must be a looplet.Usage"
    counts = (usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens,
              usage.cache_write_tokens)  # fmt: skip
    if not all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts):
        return "each count must be a whole number from 0"
    cost = usage.cost_usd
    if cost is not None and not (isinstance(cost, (int, float)) and 0 <= cost < math.inf):
        return "cost_usd must be a number from 0"
    return None


def _of_blocks(blocks: Sequence[Mapping[str, Any]]) -> Reply:
    text = "\n".join(str(b.get("text", "")) for b in blocks if b.get("type") == "text")
    calls = tuple(
        ToolCall(str(b.get("name", "")), dict(b.get("input") or {}), call_id=str(b.get("id") or ""))
        for b in blocks
        if b.get("type") == "tool_use"
    )
    return Reply(text=text, tool_calls=calls, finish_reason="tool_call" if calls else "stop")

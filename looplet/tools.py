"""Tools: `@tool`, `ToolSpec`, `BaseToolRegistry`, and the `done` tool.

A tool is a function.  Its parameters' JSON Schema comes from its type hints (`looplet.schema`); a parameter named `ctx`
receives a `ToolContext`.  A tool that raises is an observation for the model, never an exception for the caller.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Final, Self, overload

from looplet import arguments
from looplet.arguments import check_fields, optional, shown, strict_names
from looplet.boundary import is_json
from looplet.errors import ConfigError, ErrorKind, ToolError, did_you_mean
from looplet.messages import encode
from looplet.schema import Parameters, declared_parameters, function_parameters
from looplet.tool_context import ToolContext as ToolContext  # noqa: PLC0414 - its public home is here
from looplet.toolerrors import to_tool_error
from looplet.types import ToolCall, ToolResult, summarize_args

_KINDS: Final = {
    "description": arguments.TEXT,
    "parameters": optional(arguments.Kind("a dict", lambda value: isinstance(value, (Mapping, Parameters)))),
    "execute": arguments.FUNCTION,
    "concurrent_safe": arguments.FLAG,
    "free": arguments.FLAG,
    "timeout_s": optional(arguments.SECONDS),
    "requires": arguments.NAMES,
    "tags": arguments.NAMES,
    "aliases": arguments.DICT,
    "retries": arguments.int_from(0),
    "idempotent": arguments.FLAG,
}


@strict_names()
@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function as a tool.

    `parameters` is a JSON Schema of an object, or `{name: "description"}` with every parameter required unless its
    description begins with "(optional)", or what `looplet.schema` made; without it the function's signature says.
    Raises ConfigError for a name that providers refuse.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] | Parameters | None = None
    execute: Callable[..., Any] = lambda: None
    concurrent_safe: bool = False
    """may run at the same time as its neighbours"""
    free: bool = False
    """costs no step of the budget"""
    timeout_s: float | None = None
    """seconds; after them a call is abandoned and its `ctx.cancel_token` cancelled"""
    requires: Sequence[str] = ()
    """names of registry resources that `ctx.resources` must hold"""
    tags: Sequence[str] = ()
    render: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    """other names for arguments: `{"summary": "answer"}`"""
    retries: int = 0
    """how often a call is made again after an error that may pass: network, rate limit, ToolError(retriable=True)"""
    idempotent: bool = False
    """making the call twice does no more than making it once: it may be repeated when nobody knows its effect"""
    _signature: Parameters = field(init=False, repr=False, compare=False)
    accepts_ctx: bool = field(init=False, repr=False, compare=False)
    is_async: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", self.name):
            raise ConfigError(
                f"tool name {self.name!r}: use 1 to 64 ASCII letters, digits, '_' or '-', @tool(name=...)"
            )
        check_fields(self, _KINDS, f"tool {self.name!r}: ")
        inferred = function_parameters(self.execute)
        put = partial(object.__setattr__, self)
        put("_signature", _parameters_of(self.parameters, inferred))
        put("accepts_ctx", inferred.accepts_ctx)
        put("is_async", _is_async(self.execute))

    @property
    def json_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the arguments."""
        return self._signature.json_schema

    def parameter_names(self) -> list[str]:
        """Return the names of all parameters."""
        return list(self._signature.names)

    def required_parameters(self) -> list[str]:
        """Return the names of the parameters without a default."""
        return list(self._signature.required)

    def arguments(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword arguments for `execute`; raises ToolError (validation) in words for the model."""
        return self._signature.validate(self.name, self.rename(args))

    def rename(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments under their own names."""
        if not self.aliases or self.aliases.keys().isdisjoint(args):
            return dict(args)
        taken = set(args)
        return {
            (self.aliases[k] if k in self.aliases and self.aliases[k] not in taken else k): v for k, v in args.items()
        }

    def named(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments under the names that the function gets: aliases resolved, a bare value unwrapped."""
        renamed = self.rename(args) if self.aliases else dict(args)
        if "_raw_arg" not in renamed or "_raw_arg" in self._signature.names:
            return renamed
        required = self._signature.required
        return {required[0]: renamed["_raw_arg"]} if len(renamed) == len(required) == 1 else renamed

    def as_they_will_run(self, args: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments under their own names and converted (`"5"` to 5), where the result is JSON-like.

        What does not fit is left for `arguments` to refuse; arguments that need no change come back as they are.
        """
        named = self.named(args)
        try:
            values = self._signature.validate(self.name, named)
        except ToolError:
            return named if named != args else args
        if all([values.get(name, ...) is given for name, given in args.items()]):  # noqa: C419 - faster than a generator
            return args
        mended = {name: values[name] if is_json(values.get(name, ...)) else given for name, given in named.items()}
        return args if encode(mended) == encode(args) else mended

    def bind(self, kwargs: dict[str, Any], ctx: ToolContext) -> Callable[[], Any]:
        """Return the call, ready to run."""
        return partial(self.execute, **kwargs, ctx=ctx) if self.accepts_ctx else partial(self.execute, **kwargs)

    def spec_text(self) -> str:
        """Return two lines for prompts: the signature and the description."""
        properties = self.json_schema.get("properties", {})
        required = self._signature.required
        names = [f"{n}{'' if n in required else '?'}: {_kind(properties.get(n, {}))}" for n in self._signature.names]
        return f"  {self.name}({', '.join(names)})\n    {self.description}"

    def to_json_schema(self) -> dict[str, Any]:
        """Return the tool definition in the GenAI conventions' schema, which is OpenAI's inner form."""
        return {"name": self.name, "description": self.description, "parameters": self.json_schema}

    def to_api_schema(self) -> dict[str, Any]:
        """Return the tool definition in Anthropic's form."""
        return {"name": self.name, "description": self.description, "input_schema": self.json_schema}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.execute(*args, **kwargs)


@overload
def tool(fn: Callable[..., Any], /) -> ToolSpec: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    concurrent_safe: bool = False,
    free: bool = False,
    timeout_s: float | None = None,
    retries: int = 0,
    idempotent: bool = False,
    requires: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], ToolSpec]: ...
def tool(fn: Callable[..., Any] | None = None, /, **settings: Any) -> Any:
    """Make a function a tool; the description is the docstring's first paragraph unless given."""
    if fn is None:
        return partial(_spec_of, **settings)
    return _spec_of(fn, **settings)


def _parameters_of(given: Mapping[str, Any] | Parameters | None, inferred: Parameters) -> Parameters:
    if given is None:
        return inferred
    return given if isinstance(given, Parameters) else declared_parameters(dict(given))


def _spec_of(
    fn: Callable[..., Any], *, name: str | None = None, description: str | None = None, **rest: Any
) -> ToolSpec:
    if not callable(fn):
        raise ConfigError(f"@tool takes its settings by name, @tool(description=...), not {shown(fn)}")
    settings = [f.name for f in fields(ToolSpec) if f.init]
    if strange := [setting for setting in rest if setting not in settings]:
        raise ConfigError(f"@tool has no setting {strange[0]!r}{did_you_mean(strange[0], settings)}")
    words = description or _first_paragraph(fn)
    own_name: str = getattr(fn, "__name__", type(fn).__name__)
    return ToolSpec(name or own_name, words, execute=fn, **rest)


class BaseToolRegistry:
    """The tools of an agent, by name."""

    def __init__(self) -> None:
        self._tools: dict[str, ToolSpec] = {}
        self.resources: dict[str, Any] = {}

    def register(self, spec: ToolSpec | Callable[..., Any]) -> ToolSpec:
        """Add a tool; raises ConfigError when the name is taken."""
        if not callable(spec):
            raise ConfigError(f"a tool is a function or a ToolSpec, not {shown(spec)}")
        found = spec if isinstance(spec, ToolSpec) else tool(spec)
        if found.name in self._tools:
            raise ConfigError(f"two tools are called {found.name!r}; give one of them another name: @tool(name=...)")
        self._tools[found.name] = found
        return found

    def with_tool(self, spec: ToolSpec) -> Self:
        """Return a copy that has `spec`, in the place of the tool of that name if there is one."""
        registry = copy(self)
        registry._tools = {**self._tools, spec.name: spec}  # noqa: SLF001 - its own class
        return registry

    def tool(self, fn: Callable[..., Any] | None = None, /, **settings: Any) -> Any:
        """Register a function: `@tools.tool` or `@tools.tool(description=...)`."""
        if fn is None:
            return lambda function: self.register(_spec_of(function, **settings))
        return self.register(_spec_of(fn, **settings))

    def set_resources(self, resources: Mapping[str, Any]) -> None:
        """Give tools that `requires` them these objects as `ctx.resources`."""
        self.resources.update(resources)

    @property
    def tool_names(self) -> list[str]:
        """Return the names in the order of registration."""
        return list(self._tools)

    def tool_catalog_text(self) -> str:
        """Return all tools for a prompt."""
        return "\n".join(spec.spec_text() for spec in self._tools.values())

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Return the tool definitions: name, description, parameters."""
        return [spec.to_json_schema() for spec in self._tools.values()]

    def get(self, name: str) -> ToolSpec | None:
        """Return a tool, None when there is none of that name."""
        return self._tools.get(name)

    def find(self, name: str) -> ToolSpec:
        """Return a tool; raises ToolError (validation) in words for the model."""
        spec = self._tools.get(name)
        if spec is None:
            known, hint = ", ".join(self._tools), did_you_mean(name, self._tools)
            raise ToolError(
                f"unknown tool {name!r}{hint or ';'} available: {known}",
                kind=ErrorKind.VALIDATION,
                retriable=True,
                recovery_hint=known,
            )
        return spec

    def needed(self, spec: ToolSpec) -> dict[str, Any]:
        """Return the resources a tool requires; raises ToolError when one is missing."""
        if not spec.requires:
            return {}
        if missing := [name for name in spec.requires if name not in self.resources]:
            raise ToolError(f"tool {spec.name!r} needs resource {missing[0]!r}: registry.set_resources({{...}})")
        return {name: self.resources[name] for name in spec.requires}

    def dispatch(self, call: ToolCall, *, ctx: ToolContext | None = None) -> ToolResult:
        """Run one call outside of a loop; a failure is a result with `error`."""
        from time import perf_counter

        began = perf_counter()
        context = ctx or ToolContext()
        try:
            spec = self.find(call.tool)
            context.resources = {**context.resources, **self.needed(spec)}
            data = _finished(spec.bind(spec.arguments(call.args), context)())
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is its result
            return failure(call, to_tool_error(error), duration_ms=(perf_counter() - began) * 1000)
        return success(call, data, duration_ms=(perf_counter() - began) * 1000, warnings=context.warnings)

    def __len__(self) -> int:
        return len(self._tools)

    def __contains__(self, name: object) -> bool:
        return name in self._tools


@strict_names()
def tools_from(
    specs: Iterable[ToolSpec | Callable[..., Any]],
    *,
    include_think: bool = False,
    include_done: bool = False,
    done_name: str = "done",
    done_parameters: Mapping[str, Any] | None = None,
) -> BaseToolRegistry:
    """Build a registry out of functions and `ToolSpec`s; raises ConfigError when it is given something else."""
    if callable(specs) or isinstance(specs, (str, Mapping)) or not isinstance(specs, Iterable):
        name = getattr(specs, "name", "...")
        raise ConfigError(f"tools_from takes a list of tools, not {shown(specs)}: tools_from([{name}])")
    registry = BaseToolRegistry()
    for spec in specs:
        registry.register(spec)
    if include_think:
        register_think_tool(registry)
    if include_done:
        register_done_tool(registry, name=done_name, parameters=done_parameters)
    return registry


def register_done_tool(
    registry: BaseToolRegistry, *, name: str = "done", parameters: Mapping[str, Any] | None = None
) -> None:
    """Add the tool by which the model says that it has finished.

    Without `parameters` it takes `answer`, and accepts `summary` as another name for it.
    """
    registry.register(make_done_tool(name, parameters))


def make_done_tool(name: str = "done", parameters: Mapping[str, Any] | Parameters | None = None) -> ToolSpec:
    """Return the tool by which the model says that it has finished; `register_done_tool` says what it takes."""

    def done(answer: str) -> dict[str, Any]:
        return {"status": "completed", "answer": answer}

    def done_with(**fields: Any) -> dict[str, Any]:
        return {"status": "completed", **fields}

    spec = ToolSpec(
        name,
        "Finish: call this once, when the task is done.",
        parameters,
        done if parameters is None else done_with,
    )
    names = spec.parameter_names()
    return replace(spec, aliases={"summary": "answer"}) if "answer" in names and "summary" not in names else spec


def register_think_tool(registry: BaseToolRegistry) -> None:
    """Add a tool that lets the model think aloud; it costs no step."""

    def think(thought: str) -> dict[str, Any]:
        """Think; nothing happens."""
        return {"thought": thought}

    registry.register(tool(free=True)(think))


def success(call: ToolCall, data: Any, **rest: Any) -> ToolResult:
    """Return the result of a call that returned `data`; a ToolResult becomes this call's, warnings are added to it."""
    if isinstance(data, ToolResult):
        warnings = (*data.warnings, *rest.get("warnings", ()))
        summary = summarize_args(call.args)
        return replace(data, tool=call.tool, args_summary=summary, call_id=call.call_id, warnings=warnings)
    return ToolResult(call.tool, summarize_args(call.args), data, call_id=call.call_id, **rest)


def failure(call: ToolCall, error: ToolError, **rest: Any) -> ToolResult:
    """Return the result of a call that failed."""
    rest.setdefault("args_summary", summarize_args(call.args))
    return ToolResult(call.tool, error=error.message, error_detail=error, call_id=call.call_id, **rest)


def _finished(value: Any) -> Any:
    if inspect.iscoroutine(value):
        import asyncio

        return asyncio.run(value)
    return value


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _first_paragraph(fn: Callable[..., Any]) -> str:
    words = inspect.getdoc(fn) or ""
    return " ".join(words.split("\n\n")[0].split())


def _kind(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type") or ("enum" if "enum" in schema else "any")
    return "/".join(kind) if isinstance(kind, list) else str(kind)

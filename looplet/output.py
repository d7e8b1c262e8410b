"""Structured output: the end of a run as an object of the caller's type.

    composable_loop(..., output_type=Order)   ->   run.result.output is an Order

The `done` tool then takes the fields of the type, or one argument `answer` where the type is no object (`list[int]`).
What does not fit is an error that the model reads and mends; it does not end the run.  Dataclasses, TypedDicts,
msgspec Structs and builtin types are read by msgspec, whatever holds a pydantic model by pydantic.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypedDict

from looplet.errors import ConfigError, ErrorKind, ToolError, words_of
from looplet.schema import Parameters, exact_schema, unfolded
from looplet.tools import BaseToolRegistry, make_done_tool

ANSWER: Final = "answer"
"""the argument that holds an output which is no object"""


@dataclass(frozen=True, slots=True)
class _Form:
    """How a type is asked for, and how the arguments become an object of it."""

    schema: dict[str, Any]
    """of an object"""
    parse: Callable[[Any], Any]
    """raises ToolError"""


def with_output_type(tools: BaseToolRegistry, output_type: Any, done_tool: str) -> BaseToolRegistry:
    """Return a copy of the registry whose done tool takes an `output_type`, and does nothing else.

    Raises ConfigError for a type that has no JSON Schema.
    """
    form = _form_of(output_type)
    names, required = tuple(form.schema["properties"]), tuple(form.schema.get("required", ()))
    spec = make_done_tool(done_tool, Parameters(form.schema, names, required, check=form.parse))
    if (given := tools.get(done_tool)) is not None:
        spec = replace(spec, description=given.description, free=given.free, tags=given.tags)
    return tools.with_tool(spec)


def parse_output(output_type: Any, args: Mapping[str, Any]) -> Any:
    """Return the arguments of a done call as an `output_type`.

    Raises ToolError (validation), which names the JSON path and what was expected there: `$.items[0].price`.
    """
    return _form_of(output_type).parse(dict(args))


def _form_of(output_type: Any) -> _Form:
    try:
        return _msgspec_form(output_type)
    except Exception as error:  # noqa: BLE001 - resolving the hints of a foreign type may raise anything
        reason = words_of(error)
    try:
        if _holds_model(output_type, set()):
            return _pydantic_form(sys.modules["pydantic"].TypeAdapter(output_type))
    except Exception as error:  # noqa: BLE001 - as above
        reason = words_of(error)
    raise ConfigError(
        f"output_type={output_type!r} has no JSON Schema ({reason.splitlines()[0]}); "
        "use a dataclass, TypedDict, msgspec.Struct or pydantic model, defined at the top of a module"
    )


def _msgspec_form(output_type: Any) -> _Form:
    schema = exact_schema(output_type)
    if "properties" in schema:
        return _Form(schema, lambda args: _converted(args, output_type))
    make: Any = TypedDict
    holder = make("Output", {ANSWER: output_type})
    return _Form(exact_schema(holder), lambda args: _converted(args, holder)[ANSWER])


def _converted(args: dict[str, Any], form: Any) -> Any:
    import msgspec

    try:
        return msgspec.convert(args, form, strict=False)
    except msgspec.ValidationError as error:
        text, _, path = str(error).rpartition(" - at `")
        raise _mismatch({path.rstrip("`"): text} if text else {"$": str(error)}) from None


def _holds_model(type_: Any, seen: set[int]) -> bool:
    """Tell whether a type is or holds a pydantic model; whoever made one has imported pydantic."""
    if id(type_) in seen:
        return False
    seen.add(id(type_))
    if callable(getattr(type_, "model_json_schema", None)):
        return "pydantic" in sys.modules
    hints = typing.get_type_hints(type_).values() if isinstance(type_, type) else ()
    return any(_holds_model(part, seen) for part in (*typing.get_args(type_), *hints))


def _pydantic_form(adapter: Any) -> _Form:
    schema = dict(adapter.json_schema())
    definitions = schema.pop("$defs", {})
    root = unfolded(schema, definitions)
    if "properties" in root:
        return _Form(root, lambda args: _validated(args, adapter, "$"))
    holder = {"type": "object", "properties": {ANSWER: schema}, "required": [ANSWER], "additionalProperties": False}
    return _Form(unfolded(holder, definitions), lambda args: _validated(args.get(ANSWER), adapter, f"$.{ANSWER}"))


def _validated(value: Any, adapter: Any, path: str) -> Any:
    import pydantic

    try:
        return adapter.validate_python(value)
    except pydantic.ValidationError as error:
        problems = {path + _path_of(problem["loc"]): problem["msg"] for problem in error.errors()}
        raise _mismatch(problems) from None


def _path_of(location: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)


def _mismatch(problems: dict[str, str]) -> ToolError:
    lines = [f"the output does not fit at {path}: {text}" for path, text in problems.items()]
    hint = {"invalid": problems}
    return ToolError("\n".join(lines), kind=ErrorKind.VALIDATION, retriable=True, recovery_hint=hint)

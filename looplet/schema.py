"""Turn a tool's Python signature into JSON Schema, and check the arguments that a model sends against it.

Two sources, one result: `function_parameters` reads type hints, `declared_parameters` takes what the author wrote.
Everything is worked out once, when the tool is made.  A correct call of a function with plain hints is then one
`msgspec.convert`; only a wrong call (or one with nested objects, where unknown keys are looked for) is walked value
by value, to say everything that is wrong with it at once.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypedDict

from looplet.docstrings import docstring_texts
from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.jsonschema import Checker, Problem, Schema, additional_schema, expected_text, nearest_name, shown_value
from looplet.types import cut

_NOT_ARGUMENTS = frozenset({"self", "ctx"})


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """What a tool takes; made by `function_parameters` or `declared_parameters`."""

    json_schema: dict[str, Any]
    """an object schema that needs nothing from elsewhere; do not change it"""
    names: tuple[str, ...]
    required: tuple[str, ...]
    accepts_ctx: bool = False
    """the function has a parameter `ctx`, which is not the model's to fill"""
    _converters: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict, repr=False)
    _convert: Callable[[dict[str, Any]], dict[str, Any]] | None = field(default=None, repr=False)
    """converts a whole call, leaving out unknown names; None when that could hide unknown keys further in"""
    check: Callable[[dict[str, Any]], object] | None = field(default=None, repr=False)
    """looks at what else fits the schema; raises ToolError (validation)"""

    def validate(self, tool: str, args: dict[str, Any]) -> dict[str, Any]:
        """Return `args` as keyword arguments of the hinted types, without the names that begin with `__`.

        Scalars are converted where nothing is lost: `"5"` and `5.0` to 5, `"true"` to True.

        Raises:
            ToolError: kind `validation`, with all problems of the call, one per line; `recovery_hint` has them as
                data: `unexpected`, `did_you_mean`, `missing`, `invalid` (path to what was expected), `expected`.
        """
        if self._convert is not None:
            try:
                values = self._convert(args)
            except Exception:  # noqa: BLE001 - hinted types run code of their own; the slow way words any failure
                values = None
            if values is not None and len(values) == len(args):
                return values
        try:
            values = self._validate_each(tool, self._given(tool, args))
            if self.check is not None:
                self.check(values)
        except RecursionError:
            raise self._error([f"tool {tool!r}: the arguments are nested too deeply; send a flatter value"]) from None
        return values

    def _given(self, tool: str, args: dict[str, Any]) -> dict[str, Any]:
        args = {name: value for name, value in args.items() if not name.startswith("__")}
        takes = f"one JSON object with: {', '.join(self.names) or 'no arguments'}"
        if "_raw_arguments" in args and "_raw_arguments" not in self.names:
            text = cut(str(args["_raw_arguments"]), 80)
            raise self._error([f"tool {tool!r}: the arguments are not valid JSON: {text!r}; send {takes}"])
        if args.keys() == {"_raw_arg"} and "_raw_arg" not in self.names:
            if len(self.required) != 1:
                got = shown_value(args["_raw_arg"])
                raise self._error([f"tool {tool!r}: expected its arguments by name, got {got}; send {takes}"])
            return {self.required[0]: args["_raw_arg"]}
        return args

    def _validate_each(self, tool: str, args: dict[str, Any]) -> dict[str, Any]:
        checker = Checker(self.json_schema)
        values: dict[str, Any] = {}
        unknown = []
        for name, value in args.items():
            schema = self._schema_of(name)
            if schema is None:
                unknown.append(name)
            else:
                values[name] = self._one(checker, name, value, schema)
        missing = [name for name in self.required if name not in args]
        if not (unknown or missing or checker.problems):
            return values

        free = [name for name in self.names if name not in args]
        near = {name: nearest for name in unknown if (nearest := nearest_name(name, free))}
        lines = [
            *(self._unknown_text(tool, name, near.get(name)) for name in unknown),
            *(self._missing_text(tool, name) for name in missing),
            *(f"tool {tool!r}: argument {problem.path}: {problem.text}" for problem in checker.problems),
        ]
        invalid = {problem.path: problem.expected for problem in checker.problems}
        raise self._error(lines, unexpected=unknown, did_you_mean=near, missing=missing, invalid=invalid)

    def _schema_of(self, name: str) -> Any:
        """Return the schema for the argument `name`, None if there is no such argument."""
        properties = self.json_schema["properties"]
        if name in properties:
            return properties[name]
        if self.accepts_ctx and name in _NOT_ARGUMENTS:
            return None
        extra = additional_schema(self.json_schema)
        return None if extra is False else extra

    def _one(self, checker: Checker, name: str, value: Any, schema: Any) -> Any:
        path = f"$.{name}"
        if name not in self._converters:
            return checker.check(value, schema, path)
        found = Checker(checker.root)
        found.check(value, schema, path)
        try:
            converted = self._converters[name](value)
        except Exception as error:  # noqa: BLE001 - hinted types run code of their own (`__post_init__`)
            text = str(error) or type(error).__name__
            checker.problems += found.problems or [Problem(path, text, text)]
            return value
        checker.problems += [problem for problem in found.problems if problem.is_unknown_key]
        return converted

    def _unknown_text(self, tool: str, name: str, nearest: str | None) -> str:
        guess = f"; did you mean {nearest!r}?" if nearest else ";"
        takes = f"it takes: {', '.join(self.names)}" if self.names else "it takes no arguments"
        return f"tool {tool!r} has no argument {name!r}{guess} {takes}"

    def _missing_text(self, tool: str, name: str) -> str:
        schema = self.json_schema["properties"].get(name, {})
        expected = expected_text(schema, self.json_schema)
        kind = f" ({expected})" if expected != "any value" else ""
        text = schema.get("description") if isinstance(schema, dict) else None
        return f"tool {tool!r} needs argument {name!r}{kind}" + (f": {text}" if text else "")

    def _error(self, lines: list[str], **hint: Any) -> ToolError:
        hint["expected"] = list(self.names)
        full = {key: value for key, value in hint.items() if value}
        return ToolError("\n".join(lines), kind=ErrorKind.VALIDATION, retriable=True, recovery_hint=full)


def function_parameters(function: Callable[..., Any]) -> Parameters:
    """Read what `function` takes from its signature, type hints and docstring.

    A hint that cannot be resolved, or that msgspec has no schema for, accepts anything.  Descriptions come from
    `Annotated[..., "text"]`, `msgspec.Meta(description=...)`, or the docstring (Google, NumPy or reST form).

    Raises:
        ConfigError: the signature cannot be read, or has positional-only parameters.
    """
    parameters, is_open = _named_parameters(function)
    body = _body(function)
    namespace = getattr(body, "__globals__", None) or vars(sys.modules[body.__module__])
    written = {p.name: _hint(p.annotation, namespace) for p in parameters if p.name not in _NOT_ARGUMENTS}
    defaults = {p.name: p.default for p in parameters if p.name in written and p.default is not p.empty}
    hints = {name: _usable(hint, defaults.get(name, ...)) for name, hint in written.items()}
    required = tuple(name for name in hints if name not in defaults)

    schemas, definitions = _components(list(hints.values()))
    texts = docstring_texts(inspect.getdoc(body) or "")
    properties = {}
    for (name, hint), schema in zip(written.items(), schemas, strict=True):
        text = _annotated_text(hint) or texts.get(name)
        default = _default(defaults[name]) if name in defaults else {}
        properties[name] = _tidy(schema | ({"description": text} if text else {}) | default)
    json_schema = _object_schema(properties, required, is_open, definitions)

    has_nested = any("properties" in definition for definition in definitions.values())
    return Parameters(
        json_schema,
        names=tuple(hints),
        required=required,
        accepts_ctx=any(p.name == "ctx" for p in parameters),
        _converters={name: _converter(hint) for name, hint in hints.items()},
        _convert=None if has_nested else _call_converter(hints, required),
    )


def declared_parameters(parameters: Mapping[str, Any]) -> Parameters:
    """Take a JSON Schema (`{"type": "object", "properties": ...}`) or the short form `{name: "description"}`.

    In the short form every argument takes any value, and is required unless its text begins with `(optional)`.
    A JSON Schema is checked as `Checker` says.

    Raises:
        ConfigError: neither of the two.
    """
    if parameters.get("type") == "object" or isinstance(parameters.get("properties"), dict):
        schema: dict[str, Any] = {**parameters, "type": "object"}
        if "properties" not in schema:
            schema |= {"properties": {}, "additionalProperties": schema.get("additionalProperties", True)}
        _check_form(schema, Schema, "")
        return Parameters(schema, names=tuple(schema["properties"]), required=tuple(schema.get("required", ())))
    _check_form(dict(parameters), dict[str, str], ", or write a schema with 'type': 'object' and 'properties'")
    required = tuple(n for n, text in parameters.items() if not text.lstrip().lower().startswith("(optional)"))
    properties = {name: {"description": text} for name, text in parameters.items()}
    return Parameters(_object_schema(properties, required, False, {}), names=tuple(parameters), required=required)


def type_schema(type_: Any) -> dict[str, Any]:
    """Return the JSON Schema of any type; `{}`, which accepts anything, when msgspec has none for it."""
    return exact_schema(_usable(type_, ...))


def exact_schema(type_: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type; raises what msgspec raises (TypeError, NameError, ...) when it has none."""
    (schema,), definitions = _components([type_])
    return _tidy(unfolded(schema, definitions))


def unfolded(schema: dict[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that holds its definitions, with an object at its root instead of a reference to one.

    That reads better, and some providers insist on it.
    """
    definitions = dict(definitions)
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        schema = definitions[name] | {key: value for key, value in schema.items() if key != "$ref"}
        if f"'#/$defs/{name}'" not in repr((schema, definitions)):
            del definitions[name]
    return schema | ({"$defs": definitions} if definitions else {})


def _check_form(parameters: dict[str, Any], form: Any, advice: str) -> None:
    import msgspec

    try:
        msgspec.convert(parameters, form)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the declared parameters {list(parameters)} are malformed: {error}{advice}") from error


def _object_schema(
    properties: dict[str, Any], required: Iterable[str], is_open: bool, definitions: dict[str, Any]
) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": is_open}
    return schema | ({"$defs": definitions} if definitions else {})


# --- from a signature -------------------------------------------------------------------------------------------


def _named_parameters(function: Callable[..., Any]) -> tuple[list[inspect.Parameter], bool]:
    """Return the parameters that are passed by name, and whether there is a `**kwargs` as well."""
    name = getattr(function, "__name__", repr(function))
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tool {name!r}: its signature cannot be read ({error}); wrap it in a function") from error
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY:
            raise ConfigError(f"tool {name!r}: {p.name!r} is positional-only; arguments are passed by name, drop the /")
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _body(function: Any) -> Any:
    """Return the function inside partials and decorators: its module knows the names in the hints."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if inspect.isroutine(function) or isinstance(function, type) else type(function).__call__


def _hint(annotation: Any, namespace: dict[str, Any]) -> Any:
    def holder() -> None: ...

    if annotation is inspect.Parameter.empty:
        return Any
    holder.__annotations__ = {"hint": annotation}
    try:
        return typing.get_type_hints(holder, namespace, include_extras=True)["hint"]
    except Exception:  # noqa: BLE001 - evaluating a foreign annotation may raise anything
        return Any


def _usable(hint: Any, default: Any) -> Any:
    """Return `hint`, or `Any` if msgspec cannot handle it; a default of None makes it optional."""
    try:
        _components([hint])
    except Exception:  # noqa: BLE001 - a foreign type may raise anything when its fields are resolved
        return Any
    return typing.Optional[hint] if default is None and hint is not Any else hint  # noqa: UP045 - hint is a value


def _annotated_text(hint: Any) -> str | None:
    texts = (m if isinstance(m, str) else getattr(m, "description", None) for m in getattr(hint, "__metadata__", ()))
    return next((text for text in texts if text), None)


def _default(value: Any) -> dict[str, Any]:
    import json

    import msgspec

    try:
        plain = msgspec.to_builtins(value, str_keys=True)
        return {"default": json.loads(json.dumps(plain, allow_nan=False))}
    except (TypeError, ValueError, RecursionError):  # not JSON: the schema then only says that it may be left out
        return {}


def _components(types: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    import msgspec

    schemas, definitions = msgspec.json.schema_components(
        types, schema_hook=_path_schema, ref_template="#/$defs/{name}"
    )
    return list(schemas), {name: _tidy(definition) for name, definition in definitions.items()}


def _path_schema(type_: type) -> dict[str, Any]:
    from pathlib import PurePath

    if not issubclass(type_, PurePath):
        raise NotImplementedError
    return {"type": "string"}


def _converter(hint: Any) -> Callable[[Any], Any]:
    import msgspec

    return partial(msgspec.convert, type=hint, strict=False, dec_hook=lambda path_type, value: path_type(value))


def _call_converter(hints: dict[str, Any], required: tuple[str, ...]) -> Callable[[Any], Any]:
    """Return a converter for whole calls: a TypedDict leaves the defaults to the function.

    It stands in a struct, because msgspec works out once what a struct holds, and a TypedDict at each call.
    """
    import msgspec

    make: Any = TypedDict
    fields = {name: hint if name in required else typing.NotRequired[hint] for name, hint in hints.items()}
    convert = _converter(msgspec.defstruct("Call", [("arguments", make("Arguments", fields))]))
    return lambda args: convert({"arguments": args}).arguments


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """Return msgspec's schema in words that draft 7 and the providers read the same way; objects are closed."""
    tidy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            tidy[key] = {name: _tidy(inner) for name, inner in value.items()}
        elif key in ("anyOf", "prefixItems"):
            tidy[key] = [_tidy(inner) for inner in value]
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            tidy[key] = _tidy(value)
        else:
            tidy[key] = value
    if "$ref" in tidy and len(tidy) > 1:  # what stands next to a $ref is ignored in draft 7
        tidy = {"anyOf": [{"$ref": tidy.pop("$ref")}]} | tidy
    if tidy.get("type") == "array":  # `items: false` after `prefixItems` would allow nothing in draft 7
        tidy["items"] = tidy.get("items") or ({"anyOf": tidy["prefixItems"]} if tidy.get("prefixItems") else {})
    if "properties" in tidy:
        tidy.setdefault("additionalProperties", False)
    return tidy

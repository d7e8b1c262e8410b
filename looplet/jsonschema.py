"""Check a value against a JSON Schema, and say everything that is wrong with it, with the path.

Knows what tool parameters use; `Checker` lists the keywords.  Anything else is ignored.
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from looplet.types import cut

_JSON_TYPES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_PYTHON_TYPES = {"string": str, "boolean": bool, "integer": int, "number": int | float, "null": type(None)}
_TYPE_NAMES = frozenset(_JSON_TYPES.values())
_LIMITS: dict[str, tuple[Any, Callable[[Any, Any], bool], str]] = {
    "minimum": (int | float, operator.ge, "at least {}"),
    "maximum": (int | float, operator.le, "at most {}"),
    "minLength": (str, operator.ge, "at least {} characters"),
    "maxLength": (str, operator.le, "at most {} characters"),
}
Schema = TypedDict(
    "Schema",
    {
        "$ref": str,
        "type": str | list[str],
        "enum": list[Any],
        "anyOf": "list[Schema | bool]",
        "$defs": "dict[str, Schema | bool]",
        "definitions": "dict[str, Schema | bool]",
        "properties": "dict[str, Schema | bool]",
        "required": list[str],
        "additionalProperties": "Schema | bool",
        "items": "Schema | bool | list[Any]",
        "minimum": int | float,
        "maximum": int | float,
        "minLength": int | float,
        "maxLength": int | float,
    },
    total=False,
)
"""the form of what `Checker` understands"""
_COMPOSED = frozenset({"allOf", "anyOf", "oneOf", "patternProperties", "if"})


@dataclass(frozen=True, slots=True)
class Problem:
    path: str
    expected: str
    text: str
    is_type: bool = False
    """the value is of another JSON type: a union's alternative that fails so at its root was not meant"""
    is_unknown_key: bool = False


@dataclass(slots=True)
class Checker:
    """Check values against a schema, and collect what is wrong with them.

    Understood: `type`, `enum`, `const`, `anyOf`, `properties`, `required`, `additionalProperties`, `items`, `minimum`,
    `maximum`, `minLength`, `maxLength`, and `$ref` into the schema itself; everything else is ignored.  Unlike in
    JSON Schema, an object that lists its properties takes no others unless it says so.
    """

    root: dict[str, Any]
    is_lax: bool = True
    """convert scalars where nothing is lost"""
    problems: list[Problem] = field(default_factory=list)

    def check(self, value: Any, schema: Any, path: str) -> Any:
        """Return `value`, with its scalars converted; what does not fit is added to `problems`."""
        schema = _resolve(schema, self.root)
        if "anyOf" in schema:
            value = self._any_of(value, schema["anyOf"], path)
        if "type" in schema:
            try:
                value = _coerce(value, _type_names(schema), self.is_lax)
            except ValueError:
                self._fail(path, expected_text(schema, self.root), value, is_type=True)
                return value
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if choices is not None and not any(_is_same(value, choice) for choice in choices):
            near = nearest_name(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else None
            self._fail(path, _one_of(choices), value, near)
        self._check_limits(value, schema, path)
        if isinstance(value, dict):
            return self._object(value, schema, path)
        if isinstance(value, list | tuple) and "items" in schema:
            return [self.check(item, schema["items"], f"{path}[{i}]") for i, item in enumerate(value)]
        return value

    def _fail(self, path: str, expected: str, value: Any, near: str | None = None, **kind: bool) -> None:
        guess = f"; did you mean {near!r}?" if near else ""
        self.problems.append(Problem(path, expected, f"expected {expected}, got {shown_value(value)}{guess}", **kind))

    def _check_limits(self, value: Any, schema: dict[str, Any], path: str) -> None:
        for keyword, (type_, holds, text) in _LIMITS.items():
            if keyword in schema and isinstance(value, type_):
                size = len(value) if type_ is str else value
                if not holds(size, schema[keyword]):
                    self._fail(path, text.format(schema[keyword]), value)

    def _any_of(self, value: Any, options: list[Any], path: str) -> Any:
        """Take the first option that fits as it is, else the first that fits after conversion."""
        failures: list[list[Problem]] = []
        for is_lax in sorted({False, self.is_lax}):
            for option in options:
                attempt = Checker(self.root, is_lax)
                converted = attempt.check(value, option, path)
                if not attempt.problems:
                    return converted
                failures.append(attempt.problems)
        meant = [found for found in failures[-len(options) :] if not (found[0].is_type and found[0].path == path)]
        if meant:
            self.problems += sorted(meant, key=len)[0]
        else:
            self._fail(path, expected_text({"anyOf": options}, self.root), value, is_type=True)
        return value

    def _object(self, value: dict[str, Any], schema: dict[str, Any], path: str) -> dict[str, Any]:
        properties, extra = schema.get("properties", {}), additional_schema(schema)
        for name in schema.get("required", ()):
            if name not in value:
                self._fail(f"{path}.{name}", expected_text(properties.get(name, {}), self.root), ...)
        checked = {}
        for name, item in value.items():
            if name not in properties and extra is False:
                fields = ", ".join(map(repr, properties)) or "none"
                near = nearest_name(name, [p for p in properties if p not in value])
                self._fail(path, f"only the fields {fields}", name, near, is_unknown_key=True)
            checked[name] = self.check(item, properties.get(name, extra), f"{path}.{name}")
        return checked


def additional_schema(schema: dict[str, Any]) -> Any:
    """Return the schema of unlisted properties, True for any, False for none."""
    is_open = "properties" not in schema or not _COMPOSED.isdisjoint(schema)
    extra = schema.get("additionalProperties", is_open)
    return "patternProperties" in schema if extra is False else extra


def _resolve(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Follow `$ref` inside `root`; what leads nowhere (or in a circle), and `true`, accepts anything."""
    for _ in range(20):
        if not isinstance(schema, dict):
            break
        if "$ref" not in schema:
            return schema
        place, *parts = schema["$ref"].split("/")
        target: Any = root if place == "#" else None
        for part in parts:
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        schema = target
    return {}


def _type_names(schema: dict[str, Any]) -> list[str]:
    return [schema["type"]] if isinstance(schema["type"], str) else list(schema["type"])


def _coerce(value: Any, names: list[str], is_lax: bool) -> Any:
    """Return `value` as one of the named types; ValueError if it is none of them."""
    name = _json_type(value)
    if name in names or (name == "integer" and "number" in names) or not _TYPE_NAMES.issuperset(names):
        return value
    import msgspec

    targets = [_PYTHON_TYPES[name] for name in names if name in _PYTHON_TYPES]
    if not is_lax or not targets:
        raise ValueError
    return msgspec.convert(value, typing.Union[tuple(targets)], strict=False)  # noqa: UP007 - made at run time


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value)) or next(
        (_JSON_TYPES[t] for t in type(value).__mro__ if t in _JSON_TYPES), type(value).__name__
    )


def _is_same(value: Any, choice: Any) -> bool:
    return bool(value == choice) and isinstance(value, bool) == isinstance(choice, bool)


def expected_text(schema: Any, root: dict[str, Any]) -> str:
    schema = _resolve(schema, root)
    if "const" in schema or "enum" in schema:
        return _one_of([schema["const"]] if "const" in schema else schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(expected_text(option, root) for option in schema["anyOf"]))
    return " or ".join(_type_names(schema)) if "type" in schema else "any value"


def _one_of(choices: Sequence[Any]) -> str:
    return ("one of " if len(choices) > 1 else "") + cut(", ".join(map(shown_value, choices)), 500)


def shown_value(value: Any) -> str:
    if value is ...:
        return "nothing"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return cut(repr(value), 80) if isinstance(value, str | int | float) else _json_type(value)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant: spelt alike, or one the beginning of the other."""
    from difflib import get_close_matches

    spelled = {other.lower(): other for other in sorted(known, key=len)}
    name = name.lower()
    begins = [other for other in spelled if other and name and (other.startswith(name) or name.startswith(other))]
    near = get_close_matches(name, spelled, n=1) or begins[-1:]
    return spelled[near[0]] if near else None

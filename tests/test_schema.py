"""Signatures become JSON Schemas, and arguments are checked with messages that a model can act on."""

from __future__ import annotations

import enum
import functools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Optional, TypedDict

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.schema import Parameters, declared_parameters, function_parameters, type_schema

if TYPE_CHECKING:
    from nowhere import Missing


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Filter:
    field: str
    op: Literal["eq", "lt"] = "eq"
    value: int = 0


@dataclass
class Tree:
    name: str
    kids: list[Tree] = field(default_factory=list)


@dataclass
class Even:
    number: int

    def __post_init__(self):
        if self.number % 2:
            raise LookupError(f"{self.number} is odd")


class Options(TypedDict):
    deep: bool
    depth: NotRequired[int]


class Point(msgspec.Struct):
    x: int
    y: int = 0


def search(query: str, limit: int = 5):
    """Search.

    Args:
        query: what to look for
        limit: how many
    """


def properties(function):
    return function_parameters(function).json_schema["properties"]


def problem(parameters: Parameters, args: Any, tool: str = "search") -> ToolError:
    with pytest.raises(ToolError) as caught:
        parameters.validate(tool, args)
    assert (caught.value.kind, caught.value.retriable) == (ErrorKind.VALIDATION, True)
    json.dumps(caught.value.recovery_hint)
    return caught.value


def both(function) -> list[Parameters]:
    """Return the parameters by hints, and as if their schema had been declared."""
    hinted = function_parameters(function)
    return [hinted, declared_parameters(hinted.json_schema)]


# --- the schema of a function -----------------------------------------------------------------------------------


def test_signature_becomes_an_object_schema():
    assert function_parameters(search).json_schema == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "what to look for"},
            "limit": {"type": "integer", "description": "how many", "default": 5},
        },
        "required": ["query"],
        "additionalProperties": False,
    }


def test_context_self_and_star_args_are_not_the_models():
    def tool(self, ctx, a: int, *rest, b: int = 1): ...

    parameters = function_parameters(tool)
    assert (parameters.names, parameters.required, parameters.accepts_ctx) == (("a", "b"), ("a",), True)
    assert not function_parameters(search).accepts_ctx


def test_kwargs_accept_extra_arguments_but_never_the_context():
    def tool(ctx, a: int, **kwargs): ...

    parameters = function_parameters(tool)
    assert parameters.json_schema["additionalProperties"] is True
    assert parameters.validate("t", {"a": "1", "more": [1]}) == {"a": 1, "more": [1]}
    assert problem(parameters, {"a": 1, "ctx": 2}).recovery_hint["unexpected"] == ["ctx"]


def test_nested_types_are_local_definitions_and_closed():
    def tool(filters: list[Filter], point: Point, options: Options, color: Color = Color.RED): ...

    schema = function_parameters(tool).json_schema
    jsonschema.Draft7Validator.check_schema(schema)
    assert schema["properties"]["filters"] == {"type": "array", "items": {"$ref": "#/$defs/Filter"}}
    assert schema["properties"]["color"] == {"anyOf": [{"$ref": "#/$defs/Color"}], "default": "red"}
    assert sorted(schema["$defs"]) == ["Color", "Filter", "Options", "Point"]
    assert schema["$defs"]["Filter"]["additionalProperties"] is False
    assert schema["$defs"]["Options"]["required"] == ["deep"]


@pytest.mark.parametrize("validator", [jsonschema.Draft7Validator, jsonschema.Draft202012Validator])
def test_tuples_mean_the_same_in_draft_7_and_2020(validator):
    schema = type_schema(tuple[int, str])
    assert validator(schema).is_valid([1, "a"])
    assert not validator(schema).is_valid([1, "a", 2])


def test_unusable_hints_accept_anything_and_spare_the_other_parameters():
    def tool(a: Missing, b: object, c: Filter | Options, d: int, e, f: NoSuchName[int]): ...  # noqa: F821

    parameters = function_parameters(tool)
    kinds = {name: schema.get("type") for name, schema in parameters.json_schema["properties"].items()}
    assert kinds == {"a": None, "b": None, "c": None, "d": "integer", "e": None, "f": None}
    thing = object()
    args = {"a": 1, "b": thing, "c": [], "d": "4", "e": None, "f": {}}
    assert parameters.validate("t", args) == {**args, "d": 4}


def test_default_of_none_makes_a_parameter_optional():
    def tool(a: int = None): ...  # noqa: RUF013

    assert properties(tool)["a"] == {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    assert function_parameters(tool).validate("t", {"a": None}) == {"a": None}


def test_defaults_that_are_not_json_only_make_the_argument_optional():
    def tool(a: Any = object(), b: float = math.inf, c: set[int] = frozenset({1}), d: Filter = Filter("x")): ...  # noqa: B008

    assert function_parameters(tool).required == ()
    defaults = {name: schema.get("default", "none") for name, schema in properties(tool).items()}
    assert defaults == {"a": "none", "b": "none", "c": [1], "d": {"field": "x", "op": "eq", "value": 0}}


def test_defaults_are_left_to_the_function():
    assert function_parameters(search).validate("search", {"query": "x"}) == {"query": "x"}


def test_annotated_text_wins_over_the_docstring():
    def tool(a: Annotated[int, "mine"], b: Annotated[int, msgspec.Meta(description="meta", ge=1)], c: int):
        """Do.

        :param a: not this
        :param c: doc
        """

    texts = {name: schema["description"] for name, schema in properties(tool).items()}
    assert texts == {"a": "mine", "b": "meta", "c": "doc"}
    assert properties(tool)["b"]["minimum"] == 1


def _google(query: str, limit: int = 5, **extra):
    """Search.

    Args:
        query (dict[str, int], optional): what to
            look for: words

            or phrases
        limit: how many
        **extra: more

    Returns:
        query: not this one

    limit: nor this.
    """


def _numpy(query: str, limit: int = 5):
    """Search.

    Parameters
    ----------
    query : str
        what to
        look for: words

        or phrases
    limit
        how many

    Returns
    -------
    limit : int
        not this one
    """


def _rest(query: str, limit: int = 5):
    """Search.

    :param str query: what to
        look for: words
        or phrases
    :param limit: how many
    :returns: nothing
    """


@pytest.mark.parametrize("function", [_google, _numpy, _rest])
def test_descriptions_come_from_the_docstring(function):
    texts = {name: schema["description"] for name, schema in properties(function).items()}
    assert texts == {"query": "what to look for: words or phrases", "limit": "how many"}


def test_numpy_entry_may_name_several_parameters():
    def tool(x: int, y: int):
        """Move.

        Parameters
        ----------
        x, y : int
            where to
        """

    assert [schema["description"] for schema in properties(tool).values()] == ["where to", "where to"]


def test_prose_that_looks_like_an_entry_is_no_description():
    def tool(note: str):
        """Do it.

        note: this is prose.
        """

    assert "description" not in properties(tool)["note"]


def test_partials_methods_callable_objects_and_wrapped_functions_are_read():
    class Tool:
        def __call__(self, query: str):
            """:param query: words"""

        run = __call__

    @functools.wraps(search)
    def wrapper(*args, **kwargs): ...

    text = {"type": "string", "description": "words"}
    assert properties(Tool()) == properties(Tool().run) == {"query": text}
    assert properties(wrapper) == properties(search)
    assert function_parameters(functools.partial(search, limit=2)).json_schema["properties"]["limit"]["default"] == 2


def test_hints_are_looked_up_where_the_wrapped_function_was_written():
    def tool(filter: Filter): ...  # noqa: A002

    elsewhere = eval("lambda **kwargs: None", {})
    assert properties(functools.wraps(tool)(elsewhere)) == {"filter": {"$ref": "#/$defs/Filter"}}


def test_positional_only_parameters_are_a_config_error():
    def tool(a, /): ...

    with pytest.raises(ConfigError, match="'a' is positional-only"):
        function_parameters(tool)


def test_unreadable_signature_is_a_config_error():
    with pytest.raises(ConfigError, match="signature cannot be read"):
        function_parameters(type("NoCall", (), {})())


def test_type_schema_puts_the_object_at_the_root():
    assert type_schema(Point) == {
        "title": "Point",
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": "integer", "default": 0}},
        "required": ["x"],
        "additionalProperties": False,
    }
    assert type_schema(Tree)["type"] == "object"
    assert type_schema(Tree)["properties"]["kids"]["items"] == {"$ref": "#/$defs/Tree"}
    assert jsonschema.Draft7Validator(type_schema(Tree)).is_valid({"name": "a", "kids": [{"name": "b"}]})
    assert type_schema(object) == {}


def test_importing_the_module_does_not_import_msgspec():
    code = "import sys, looplet.schema; print('msgspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- valid calls ------------------------------------------------------------------------------------------------


def test_arguments_become_the_hinted_types():
    def tool(filters: list[Filter], point: Point, options: Options, color: Color, path: Path | None = None): ...

    args = {"filters": [{"field": "a", "value": "3"}], "point": {"x": 1.0}, "options": {"deep": "true"}, "color": "red"}
    assert function_parameters(tool).validate("t", args | {"path": "a/b"}) == {
        "filters": [Filter("a", "eq", 3)],
        "point": Point(1, 0),
        "options": {"deep": True},
        "color": Color.RED,
        "path": Path("a/b"),
    }


@pytest.mark.parametrize(
    ("hint", "sent", "received"),
    [
        (int, "5", 5),
        (int, 5.0, 5),
        (float, "2.5", 2.5),
        (bool, "true", True),
        (bool, 0, False),
        (int | None, "null", None),
        (str | None, "null", "null"),
        (int | str, "5", "5"),
        (str, "  a ", "  a "),
        (list[int], ["1", 2], [1, 2]),
    ],
)
def test_scalars_are_converted_where_nothing_is_lost(hint, sent, received):
    def tool(a): ...

    tool.__annotations__ = {"a": hint}
    for parameters in both(tool):
        result = parameters.validate("t", {"a": sent})
        assert repr(result) == repr({"a": received})


@pytest.mark.parametrize(
    ("hint", "sent"),
    [
        (int, "5.5"),
        (int, 5.5),
        (int, True),
        (int, " 5"),
        (str, 5),
        (bool, 2),
        (bool, "yes"),
        (float, True),
        (int, None),
    ],
)
def test_lossy_or_doubtful_conversions_are_refused(hint, sent):
    def tool(a): ...

    tool.__annotations__ = {"a": hint}
    for parameters in both(tool):
        assert list(problem(parameters, {"a": sent}).recovery_hint["invalid"]) == ["$.a"]


def test_double_underscore_arguments_are_dropped():
    for parameters in both(search):
        assert parameters.validate("search", {"query": "x", "__reason": "because"}) == {"query": "x"}


def test_bare_string_is_the_one_required_argument():
    for parameters in both(search):
        assert parameters.validate("search", {"_raw_arg": "x"}) == {"query": "x"}


def test_validation_leaves_the_sent_arguments_alone():
    def tool(filters: list[Filter]): ...

    args = {"filters": [{"field": "a", "value": "1"}], "__x": 1}
    for parameters in both(tool):
        parameters.validate("t", args)
    assert args == {"filters": [{"field": "a", "value": "1"}], "__x": 1}


# --- wrong calls ------------------------------------------------------------------------------------------------


def test_unknown_argument_names_the_nearest_one():
    for parameters in both(search):
        error = problem(parameters, {"query": "x", "limti": 1})
        assert error.message == "tool 'search' has no argument 'limti'; did you mean 'limit'? it takes: query, limit"
        assert error.recovery_hint == {
            "unexpected": ["limti"],
            "did_you_mean": {"limti": "limit"},
            "expected": ["query", "limit"],
        }


def test_argument_that_was_given_is_not_suggested():
    assert problem(function_parameters(search), {"query": "x", "qurey": "y"}).message == (
        "tool 'search' has no argument 'qurey'; it takes: query, limit"
    )


def test_missing_argument_is_described():
    for parameters in both(search):
        error = problem(parameters, {})
        assert error.message == "tool 'search' needs argument 'query' (string): what to look for"
        assert error.recovery_hint == {"missing": ["query"], "expected": ["query", "limit"]}


def test_tool_without_parameters_says_so():
    for parameters in both(lambda: None):
        assert parameters.validate("now", {}) == {}
        error = problem(parameters, {"when": 1}, "now")
        assert error.message == "tool 'now' has no argument 'when'; it takes no arguments"
        assert error.recovery_hint == {"unexpected": ["when"]}


def test_wrong_value_is_located_and_corrected():
    def tool(filters: list[Filter] | None = None): ...

    for parameters in both(tool):
        error = problem(parameters, {"filters": [{"field": "a", "op": "equals"}]})
        assert error.message == (
            "tool 'search': argument $.filters[0].op: expected one of 'eq', 'lt', got 'equals'; did you mean 'eq'?"
        )
        assert error.recovery_hint == {"invalid": {"$.filters[0].op": "one of 'eq', 'lt'"}, "expected": ["filters"]}


def test_all_problems_are_reported_together():
    def tool(query: str, limit: int, filters: dict[str, Filter], color: Color): ...

    args = {"qurey": 1, "limit": "many", "filters": {"k": {"op": "EQ", "valeu": 2}}, "color": ["red"]}
    for parameters in both(tool):
        error = problem(parameters, args)
        assert error.message.splitlines() == [
            "tool 'search' has no argument 'qurey'; did you mean 'query'? it takes: query, limit, filters, color",
            "tool 'search' needs argument 'query' (string)",
            "tool 'search': argument $.limit: expected integer, got 'many'",
            "tool 'search': argument $.filters.k.field: expected string, got nothing",
            "tool 'search': argument $.filters.k.op: expected one of 'eq', 'lt', got 'EQ'; did you mean 'eq'?",
            "tool 'search': argument $.filters.k: expected only the fields 'field', 'op', 'value', got 'valeu'; "
            "did you mean 'value'?",
            "tool 'search': argument $.color: expected one of 'blue', 'red', got array",
        ]
        assert sorted(error.recovery_hint) == ["did_you_mean", "expected", "invalid", "missing", "unexpected"]


def test_unknown_key_of_a_nested_object_is_refused_even_if_all_else_is_right():
    def tool(filter: Filter | None): ...  # noqa: A002

    for parameters in both(tool):
        error = problem(parameters, {"filter": {"field": "a", "valeu": 1}})
        assert error.recovery_hint["invalid"] == {"$.filter": "only the fields 'field', 'op', 'value'"}


def test_constraints_that_only_msgspec_knows_are_reported_in_its_words():
    def tool(a: Annotated[str, msgspec.Meta(pattern="^x")], b: Even): ...

    error = problem(function_parameters(tool), {"a": "y", "b": {"number": 3}})
    assert error.message.splitlines() == [
        "tool 'search': argument $.a: Expected `str` matching regex '^x'",
        "tool 'search': argument $.b: 3 is odd",
    ]


def test_value_of_no_alternative_is_told_all_of_them():
    for parameters in both(lambda a: None):
        parameters.validate("t", {"a": object()})

    def tool(a: int | list[int] | None): ...

    for parameters in both(tool):
        assert problem(parameters, {"a": {"x": 1}}).message.endswith("expected integer or array or null, got object")


def test_alternative_with_the_fewest_problems_is_explained():
    options = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, kind: {"type": "string"}},
            "required": ["kind", kind],
        }
        for kind in ("file", "page")
    ]
    error = problem(declared({"a": {"anyOf": options}}), {"a": {"kind": "page", "page": 3}})
    assert error.recovery_hint["invalid"] == {"$.a.page": "string"}


@pytest.mark.parametrize(
    ("sent", "meant"), [("error", "ERROR"), ("wran", "warn"), ("information", "info"), ("x", None)]
)
def test_nearest_choice_ignores_case_spelling_and_endings(sent, meant):
    message = problem(declared({"level": {"enum": ["info", "warn", "ERROR"]}}), {"level": sent}).message
    assert message.endswith(f"; did you mean {meant!r}?" if meant else f"got {sent!r}")


def test_long_values_are_cut():
    assert len(problem(function_parameters(search), {"query": "x", "limit": "9x" * 500}).message) < 200


def test_bare_string_without_one_required_argument_is_explained():
    def tool(a: int, b: int): ...

    assert problem(function_parameters(tool), {"_raw_arg": "x"}).message == (
        "tool 'search': expected its arguments by name, got 'x'; send one JSON object with: a, b"
    )


def test_malformed_json_is_quoted():
    error = problem(function_parameters(search), {"_raw_arguments": '{"query": ' + "x" * 100})
    assert repr('{"query": ' + "x" * 70 + "...") in error.message
    assert "not valid JSON" in error.message
    assert error.recovery_hint == {"expected": ["query", "limit"]}


def test_nesting_without_end_is_an_error_for_the_model():
    def tool(tree: Tree): ...

    tree: dict[str, Any] = {"name": "leaf"}
    for _ in range(5000):
        tree = {"name": "a", "kids": [tree]}
    for parameters in both(tool):
        assert "too deeply" in problem(parameters, {"tree": tree}).message


# --- declared parameters ----------------------------------------------------------------------------------------


def test_short_form_takes_any_value_and_knows_optional_ones():
    parameters = declared_parameters({"query": "what to look for", "limit": "(optional) how many"})
    assert (parameters.names, parameters.required) == (("query", "limit"), ("query",))
    assert parameters.json_schema["properties"]["query"] == {"description": "what to look for"}
    assert parameters.validate("t", {"query": ["x"], "limit": "5"}) == {"query": ["x"], "limit": "5"}
    assert problem(parameters, {}).message == "tool 'search' needs argument 'query': what to look for"


def test_empty_declaration_takes_no_arguments():
    assert declared_parameters({}).json_schema["properties"] == {}
    assert problem(declared_parameters({}), {"a": 1}).recovery_hint == {"unexpected": ["a"]}


def test_malformed_declarations_are_config_errors():
    with pytest.raises(ConfigError, match=r"\['query'\] are malformed: Expected `str`, got `int`.*or write a schema"):
        declared_parameters({"query": 3})
    with pytest.raises(ConfigError, match=r"Expected `str`, got `int` - at `\$.*\$ref`"):
        declared_parameters({"type": "object", "properties": {"a": {"items": {"$ref": 1}}}})
    with pytest.raises(ConfigError, match=r"Expected `array`, got `bool` - at `\$\.required`"):
        declared_parameters({"type": "object", "properties": {}, "required": True})


def declared(properties: dict[str, Any], **more: Any) -> Parameters:
    return declared_parameters({"type": "object", "properties": properties, **more})


@pytest.mark.parametrize(
    ("schema", "good", "bad", "expected"),
    [
        ({"type": "integer", "minimum": 1}, 1, 0, "at least 1"),
        ({"type": "number", "maximum": 2}, 2, 2.5, "at most 2"),
        ({"type": "string", "minLength": 2}, "ab", "a", "at least 2 characters"),
        ({"type": "string", "maxLength": 2}, "ab", "abc", "at most 2 characters"),
        ({"const": "x"}, "x", "y", "'x'"),
        ({"enum": [1, None]}, None, True, "one of 1, null"),
        ({"type": ["integer", "null"]}, None, [], "integer or null"),
        ({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, True, "x", "integer or boolean"),
        ({"type": "array", "items": {"type": "boolean"}}, [True], {}, "array"),
        ({"$ref": "#/$defs/Small"}, 3, 9, "at most 5"),
        ({"$ref": "#/definitions/Small"}, 3, 9, "at most 5"),
    ],
)
def test_supported_keywords_are_checked(schema, good, bad, expected):
    small = {"Small": {"type": "integer", "maximum": 5}}
    parameters = declared({"a": schema}, **{"$defs": small, "definitions": small})
    assert parameters.validate("t", {"a": good}) == {"a": good}
    assert problem(parameters, {"a": bad}).recovery_hint["invalid"] == {"$.a": expected}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "any"},
        {"pattern": "^never$"},
        {"$ref": "https://example.com/schema"},
        {"$ref": "other.json#/$defs/Small"},
        {"$ref": "#/$defs/Loop"},
        {"items": [{"type": "integer"}]},
        {"type": "object", "properties": {"b": {}}, "oneOf": []},
        {"type": "object", "properties": {"b": {}}, "additionalProperties": False, "patternProperties": {"x": {}}},
        True,
    ],
)
def test_what_is_not_understood_accepts_anything(schema):
    parameters = declared({"a": schema}, **{"$defs": {"Loop": {"$ref": "#/$defs/Loop"}, "Small": {"type": "null"}}})
    for value in ({"x": 1}, {"b": "text"}):
        assert parameters.validate("t", {"a": value}) == {"a": value}


def test_additional_properties_decide_about_unknown_arguments():
    assert problem(declared({"a": {}}), {"b": 1}).recovery_hint["unexpected"] == ["b"]
    assert declared({"a": {}}, additionalProperties=True).validate("t", {"b": "1"}) == {"b": "1"}
    assert declared_parameters({"type": "object"}).validate("t", {"b": "1"}) == {"b": "1"}
    typed = declared({"a": {}}, additionalProperties={"type": "integer"})
    assert typed.validate("t", {"b": "1"}) == {"b": 1}
    assert problem(typed, {"b": "x"}).recovery_hint["invalid"] == {"$.b": "integer"}
    assert declared({"a": {}}, additionalProperties={}).validate("t", {"b": "1"}) == {"b": "1"}


def test_nested_objects_are_checked_like_arguments():
    inner = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    parameters = declared({"files": {"type": "array", "items": inner}}, required=["files"])
    assert parameters.validate("t", {"files": [{"path": "a"}]}) == {"files": [{"path": "a"}]}
    assert problem(parameters, {"files": [{"paths": "a"}]}).message.splitlines() == [
        "tool 'search': argument $.files[0].path: expected string, got nothing",
        "tool 'search': argument $.files[0]: expected only the fields 'path', got 'paths'; did you mean 'path'?",
    ]


def test_union_prefers_the_alternative_that_needs_no_conversion():
    parameters = declared({"a": {"anyOf": [{"type": "integer"}, {"type": "string"}]}})
    assert parameters.validate("t", {"a": "5"}) == {"a": "5"}
    assert repr(parameters.validate("t", {"a": 5.0})) == "{'a': 5}"


# --- random signatures ------------------------------------------------------------------------------------------

TEXT = st.text('a5"\\é ', max_size=5)  # a short alphabet: the full one is slow to set up
SCALARS = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: TEXT,
    bool: st.booleans(),
    Literal["a", "b"]: st.sampled_from(["a", "b"]),
}
HINTS = st.recursive(
    st.sampled_from(list(SCALARS)),
    lambda inner: st.one_of(
        inner.map(lambda t: list[t]),
        inner.map(lambda t: dict[str, t]),
        inner.map(lambda t: Optional[t]),  # noqa: UP045 - t is a value
    ),
    max_leaves=3,
)
NAMES = st.sampled_from(["alpha", "beta", "gamma", "delta"])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 2.5, "a", "5", "true", "null", "", "5.0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=4,
)


def function_of(hints):
    def tool(**kwargs): ...

    tool.__signature__ = Signature([Parameter(n, Parameter.KEYWORD_ONLY, annotation=t) for n, t in hints.items()])
    return tool


def values_of(hint):
    if hint in SCALARS:
        return SCALARS[hint]
    arguments = hint.__args__
    if hint.__origin__ is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if hint.__origin__ is dict:
        return st.dictionaries(TEXT, values_of(arguments[1]), max_size=3)
    return st.none() | values_of(arguments[0])


@settings(derandomize=True, deadline=None)
@given(st.data(), st.dictionaries(NAMES, HINTS, max_size=3))
def test_values_of_the_hinted_types_pass_unchanged_and_fit_the_schema(data, hints):
    args = {name: data.draw(values_of(hint)) for name, hint in hints.items()}
    for parameters in both(function_of(hints)):
        assert repr(parameters.validate("t", args)) == repr(args)
        for validator in (jsonschema.Draft7Validator, jsonschema.Draft202012Validator):
            validator.check_schema(parameters.json_schema)
            validator(parameters.json_schema).validate(args)


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(NAMES, HINTS, max_size=2), st.dictionaries(NAMES, ANY_JSON, max_size=2))
def test_whatever_passes_fits_the_schema_and_the_rest_is_a_tool_error(hints, args):
    outcomes = []
    for parameters in both(function_of(hints)):
        fits = jsonschema.Draft7Validator(parameters.json_schema)
        try:
            result = parameters.validate("t", args)
        except ToolError as error:
            assert not fits.is_valid(args)
            outcomes.append(error.to_dict())
        else:
            fits.validate(result)
            outcomes.append(result)
    assert outcomes[0] == outcomes[1]

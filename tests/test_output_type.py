"""Structured output: the done tool takes a type, what does not fit goes back to the model, the result is typed."""

from __future__ import annotations

import enum
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import pydantic
import pytest
from support import both

from looplet import BaseToolRegistry, ConfigError, ErrorKind, ToolCall, ToolError, tool, tools_from
from looplet.output import parse_output, with_output_type
from looplet.testing import AsyncScriptedBackend, ScriptedBackend


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Item:
    name: str
    price: Annotated[float, msgspec.Meta(ge=0)]
    colour: Colour = Colour.RED


@dataclass
class Order:
    items: list[Item]
    speed: Literal["fast", "slow"] = "slow"
    note: str | None = None
    tags: list[str] = field(default_factory=list)


class Address(TypedDict):
    city: str
    code: Annotated[str, msgspec.Meta(pattern="^[0-9]{5}$")]
    street: NotRequired[str]


class Point(msgspec.Struct):
    x: int
    y: int = 0


class Tree(msgspec.Struct):
    value: int
    children: list[Tree] = []


class Person(pydantic.BaseModel):
    name: str
    age: Annotated[int, pydantic.Field(ge=0)]
    friends: list[Person] = []


@dataclass
class Team:
    boss: Person


FITS: list[tuple[Any, dict[str, Any], Any]] = [
    (Order, {"items": [{"name": "pen", "price": 2}]}, Order([Item("pen", 2.0)])),
    (
        Order,
        {"items": [{"name": "ink", "price": "1.5", "colour": "blue"}], "speed": "fast", "note": "n", "tags": ["t"]},
        Order([Item("ink", 1.5, Colour.BLUE)], "fast", "n", ["t"]),
    ),
    (Address, {"city": "Ulm", "code": "89073"}, {"city": "Ulm", "code": "89073"}),
    (Point, {"x": "3"}, Point(3)),
    (Tree, {"value": 1, "children": [{"value": 2}]}, Tree(1, [Tree(2)])),
    (list[int], {"answer": [1, "2"]}, [1, 2]),
    (int, {"answer": 7}, 7),
    (str | None, {"answer": None}, None),
    (Literal["yes", "no"], {"answer": "no"}, "no"),
    (dict[str, Point], {"answer": {"a": {"x": 1}}}, {"a": Point(1)}),
    (Colour, {"answer": "blue"}, Colour.BLUE),
    (Person, {"name": "Ann", "age": 3}, Person(name="Ann", age=3)),
    (list[Person], {"answer": [{"name": "Ann", "age": 3}]}, [Person(name="Ann", age=3)]),
    (Team, {"boss": {"name": "Ann", "age": 3}}, Team(Person(name="Ann", age=3))),
]

MISFITS: list[tuple[Any, dict[str, Any], str]] = [
    (Order, {"items": [{"name": "pen", "price": "dear"}]}, r"\$\.items\[0\]\.price.*(number|float)"),
    (Order, {"items": [{"name": "pen", "price": -1}]}, r"\$\.items\[0\]\.price.*(>= 0|at least 0)"),
    (Order, {"items": [{"price": 1}]}, r"\$\.items\[0\].*(name|string)"),
    (Order, {"items": [], "speed": "warp"}, r"\$\.speed"),
    (Address, {"city": "Ulm", "code": "x"}, r"\$\.code.*\[0-9\]"),
    (Tree, {"value": 1, "children": [{"value": "one"}]}, r"\$\.children\[0\]\.value.*int"),
    (list[int], {"answer": [1, "two"]}, r"\$\.answer\[1\].*int"),
    (list[int], {}, r"answer"),
    (Person, {"name": "Ann", "age": -1}, r"\$\.age.*(0|least)"),
    (Person, {"name": "Ann", "age": 1, "friends": [{"name": "Bo", "age": "old"}]}, r"\$\.friends\[0\]\.age.*integer"),
    (list[Person], {"answer": [{"name": "Ann"}]}, r"\$\.answer\[0\]\.age"),
]


def named(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("output_type", "args", "expected"), FITS, ids=lambda v: named(v)[:30])
def test_arguments_become_an_object_of_the_type(output_type, args, expected):
    tools = with_output_type(tools_from([]), output_type, "done")
    spec = tools.get("done")
    assert spec.json_schema["type"] == "object"
    assert set(args) <= set(spec.parameter_names())
    assert spec.arguments(args)
    parsed = parse_output(output_type, args)
    assert parsed == expected
    assert type(parsed) is type(expected)


@pytest.mark.parametrize(("output_type", "args", "words"), MISFITS, ids=lambda v: named(v)[:30])
def test_a_mismatch_names_the_path_and_what_was_expected(output_type, args, words):
    spec = with_output_type(tools_from([]), output_type, "done").get("done")
    for attempt in (lambda: spec.arguments(args), lambda: parse_output(output_type, args)):
        with pytest.raises(ToolError) as caught:
            attempt()
        assert (caught.value.kind, caught.value.retriable) == (ErrorKind.VALIDATION, True)
        assert re.search(words, caught.value.message), caught.value.message


def test_an_unknown_field_is_a_mismatch_at_every_depth():
    spec = with_output_type(tools_from([]), Order, "done").get("done")
    with pytest.raises(ToolError, match="no argument 'itmes'; did you mean 'items'"):
        spec.arguments({"itmes": []})
    with pytest.raises(ToolError, match=r"\$\.items\[0\].*got 'prise'; did you mean 'price'"):
        spec.arguments({"items": [{"name": "pen", "prise": 1}]})


def test_the_callers_registry_stays_as_it_was():
    @tool(description="Say that all is done.", name="finish")
    def finish(word: str) -> str:
        return word

    class Own(BaseToolRegistry):
        pass

    registry = Own()
    registry.register(finish)
    registry.set_resources({"db": 1})
    copy = with_output_type(registry, Point, "finish")
    assert registry.get("finish") is finish
    assert (type(copy), copy.resources) == (Own, {"db": 1})
    assert copy.get("finish").description == "Say that all is done."
    assert copy.get("finish").parameter_names() == ["x", "y"]
    assert copy.dispatch(ToolCall("finish", {"x": 1})).data == {"status": "completed", "x": 1}
    assert copy.tool_names == ["finish"]


def test_summary_is_another_name_for_answer_only_where_the_type_has_none():
    @dataclass
    class Report:
        answer: str
        summary: str = ""

    spec = with_output_type(tools_from([]), list[int], "done").get("done")
    assert spec.arguments({"summary": [1]}) == {"answer": [1]}
    spec = with_output_type(tools_from([]), Report, "done").get("done")
    assert spec.named({"summary": "s", "answer": "a"}) == {"summary": "s", "answer": "a"}
    with pytest.raises(ToolError, match="needs argument 'answer'"):
        spec.arguments({"summary": "s"})


@pytest.mark.parametrize("given", [3, "Order", object, lambda: 1, list[object]])
def test_what_is_no_type_with_a_schema_is_refused_at_the_call(given):
    with pytest.raises(ConfigError, match=r"output_type=.* has no JSON Schema .*use a dataclass"):
        with_output_type(tools_from([]), given, "done")


def test_what_a_type_says_about_itself_when_it_is_made_is_a_mismatch():
    with pytest.raises(ToolError, match="ends before it begins"):
        parse_output(Span, {"begin": 3, "end": 1})


@dataclass
class Span:
    begin: int
    end: int

    def __post_init__(self):
        if self.end < self.begin:
            raise ValueError("a span that ends before it begins")


def test_pydantic_is_not_imported_for_other_types():
    program = (
        "import sys\nfrom dataclasses import make_dataclass\nfrom looplet.output import parse_output\n"
        "assert parse_output(make_dataclass('P', [('x', int)]), {'x': 1}).x == 1\n"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- in a run -------------------------------------------------------------------------------------------------------


def make(*replies: Any, output_type: Any, **rest: Any):
    def fresh(*, is_async: bool) -> dict[str, Any]:
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)(list(replies))
        return {
            "llm": backend,
            "task": {"goal": "order"},
            "tools": tools_from([], include_done=True),
            "output_type": output_type,
            **rest,
        }

    return fresh


def test_a_mismatch_goes_back_to_the_model_and_is_no_end():
    asked = []

    class Gate:
        def check_done(self, state, session_log, context, step_num):
            asked.append(step_num)

    wrong = ("done", {"items": [{"name": "pen", "price": "dear"}]})
    right = ("done", {"items": [{"name": "pen", "price": 2}]})
    outcome = both(make(wrong, right, output_type=Order, hooks=[Gate()]))
    assert [step.tool_result.error_kind for step in outcome.steps] == [ErrorKind.VALIDATION, None]
    assert "$.items[0].price" in outcome.steps[0].tool_result.error
    assert outcome.stop_reason == "done"
    assert outcome.live.final_output == {"items": [{"name": "pen", "price": 2}]}
    assert asked == [2, 2]  # once in each run: a gate is not asked about what does not fit


def test_the_result_holds_the_typed_object():
    from looplet import composable_loop

    backend = ScriptedBackend([("done", {"answer": ["1", 2]})])
    tools = tools_from([], include_done=True)
    run = composable_loop(backend, {"goal": "count"}, tools, output_type=list[int])
    list(run)
    assert run.result.output == [1, 2]
    assert tools.get("done").parameter_names() == ["answer"]


def test_a_run_that_did_not_finish_has_no_output():
    from looplet import composable_loop

    backend = ScriptedBackend([("done", {"answer": "x"}), ("done", {"answer": "y"})])
    run = composable_loop(backend, {"goal": "count"}, tools_from([], include_done=True), output_type=int, max_steps=1)
    with run:
        for _ in run:
            break
    assert run.result is None or run.result.output is None

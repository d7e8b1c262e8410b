"""Values that are made quickly are the values that `dataclass` makes."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields, replace

import pytest

from looplet import Message, Reply, Step, ToolCall, ToolResult, Usage
from looplet.frozen import quickly_made
from looplet.state import LogEntry

VALUES = [
    Usage(1, 2, cost_usd=0.5),
    ToolCall("look", {"at": "this"}, call_id="c1"),
    ToolResult("look", "at='this'", data=[1], warnings=("slow",)),
    Reply("said", (ToolCall("look"),), Usage(1, 2)),
    Step(1, ToolCall("look"), ToolResult("look")),
    Message("user", ({"type": "text", "content": "hello"},)),
    LogEntry(1, "theory", "look", "because"),
]


@quickly_made
@dataclass(frozen=True, slots=True)
class Sample:
    needed: str
    number: int = 3
    parts: list[str] = field(default_factory=list)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_has_what_it_was_made_of_and_can_be_copied(value):
    given = {f.name: getattr(value, f.name) for f in fields(value)}
    for made in (type(value)(**given), type(value)(*given.values()), replace(value), copy.copy(value)):
        assert made == value
        assert {name: getattr(made, name) for name in given} == given
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_cannot_be_changed(value):
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, "changed")


@pytest.mark.parametrize("kind", [type(value) for value in VALUES], ids=lambda kind: kind.__name__)
def test_the_signature_is_that_of_the_fields(kind):
    parameters = inspect.signature(kind).parameters
    assert list(parameters) == [f.name for f in fields(kind)]
    for f in fields(kind):
        if f.default is not MISSING:
            assert parameters[f.name].default == f.default
        is_needed = f.default is MISSING and f.default_factory is MISSING
        assert (parameters[f.name].default is inspect.Parameter.empty) == is_needed


def test_each_value_has_defaults_of_its_own():
    one, other = Sample("x"), Sample("y")
    assert (one.number, one.parts) == (3, [])
    assert one.parts is not other.parts


def test_a_missing_argument_is_named_together_with_the_class():
    with pytest.raises(TypeError, match=r"Sample\.__init__\(\) missing 1 required positional argument: 'needed'"):
        Sample()
    with pytest.raises(TypeError, match=r"Sample\.__init__\(\) got an unexpected keyword argument 'strange'"):
        Sample("x", strange=1)


def test_a_subclass_is_made_the_same_way():
    class Special(Sample):
        __slots__ = ()

    assert type(Special("x", 4)) is Special
    assert Special("x", 4).number == 4

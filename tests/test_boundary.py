"""The boundary: every value gets a stable, recordable, redacted form, and nothing raises."""

import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import pathlib
from collections import namedtuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplet import ConfigError, LoopConfig, ProvenanceSink
from looplet.boundary import WITHHELD, Boundary

Point = namedtuple("Point", "x y")


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Pair:
    left: int
    right: list


class Packed(msgspec.Struct):
    a: int


class Plain:
    pass


class Unprintable:
    def __str__(self):
        raise ValueError("no")


class Model:
    def model_dump(self, mode):
        return {"mode": mode}


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (2**63, "9223372036854775808"),
        (10**5000, hex(10**5000)),
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
        (b"ab", "base64:YWI="),
        ({3, 1}, [1, 3]),
        ({1: "a", None: "b", (1, 2): "c"}, {"1": "a", "None": "b", "[1, 2]": "c"}),
        (Colour.RED, "red"),
        (Pair(1, [b"x"]), {"left": 1, "right": ["base64:eA=="]}),
        (Point(1, 2), {"x": 1, "y": 2}),
        (Packed(7), {"a": 7}),
        (Model(), {"mode": "json"}),
        (dt.date(2020, 1, 2), "2020-01-02"),
        (decimal.Decimal("1.50"), "1.50"),
        (pathlib.PurePosixPath("/x"), "/x"),
        (KeyError("k"), "KeyError: 'k'"),
        (range(3), [0, 1, 2]),
        (Plain(), "<Plain>"),
        (Plain, "Plain"),
        (Unprintable(), "<unreadable Unprintable>"),
        ({Unprintable(): 1}, {"<unreadable Unprintable>": 1}),
        ("a\ud800b", "a\\ud800b"),
        (lambda: 1, "<function>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_without_a_json_form_get_a_stable_one(value, form):
    assert Boundary().clean(value) == form


def test_cycles_and_depth_end():
    cycle: dict = {}
    cycle["me"] = cycle
    assert Boundary().clean(cycle) == {"me": "<cycle>"}
    deep: list = []
    for _ in range(500):
        deep = [deep]
    assert "<too deep>" in str(Boundary().clean(deep))


def test_containers_are_copied():
    inner = {"a": [1]}
    clean = Boundary().clean(inner)
    inner["a"].append(2)
    assert clean == {"a": [1]}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists))
def test_whatever_comes_out_is_json_and_stays_itself(value):
    clean = Boundary().clean(value)
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean
    assert Boundary().clean(clean) == clean


def test_redaction_covers_keys_strings_and_the_digits_of_numbers():
    clean = Boundary(lambda s: s.replace("4111", "[card]")).clean({"4111": 4111, "n": [4111.5, 12], "s": "x4111"})
    assert clean == {"[card]": "[card]", "n": ["[card].5", 12], "s": "x[card]"}


def test_keys_that_are_redacted_to_the_same_name_lose_nothing():
    assert Boundary(lambda s: "k").clean({"a": 1, "b": 2}) == {"k": "k", "k'": "k"}


@pytest.mark.parametrize("broken", [lambda s: 1 / 0, lambda s: None])
def test_a_redactor_that_fails_withholds_the_text(broken, caplog):
    assert Boundary(broken).clean(["secret"]) == [WITHHELD]
    assert "redactor failed" in caplog.text
    assert "secret" not in caplog.text


def test_a_redactor_that_is_no_function_is_refused_where_it_is_given(tmp_path):
    with pytest.raises(ConfigError, match="redact must be a function"):
        ProvenanceSink(tmp_path, redact="secret")
    with pytest.raises(ConfigError, match="redact must be a function"):
        LoopConfig(redact=["secret"])


def test_redactors_are_applied_in_order():
    assert Boundary(lambda s: s + "1", None, lambda s: s + "2").text("x") == "x12"

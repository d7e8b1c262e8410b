"""Checks of arguments, for errors at the call: names that a function does not have, values of the wrong kind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from types import NoneType
from typing import Any, Final, TypeVar

from looplet.errors import ConfigError, did_you_mean

T = TypeVar("T", bound=Callable[..., Any])


def strict_names(elsewhere: Callable[[str], str | None] = lambda name: None) -> Callable[[T], T]:
    """Decorate a function, an `__init__` or a dataclass: a keyword argument that it lacks is a ConfigError.

    The error gives the advice that `elsewhere` has for the name, else the argument with nearly that name, else all.
    """

    def decorate(target: Any) -> Any:
        if not isinstance(target, type):
            return _checked(target, elsewhere)
        target.__init__ = _checked(target.__init__, elsewhere)  # type: ignore[misc]
        return target

    return decorate


def _checked(function: Any, elsewhere: Callable[[str], str | None]) -> Any:
    code = function.__code__
    known = frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= known:
            owner = type(args[0]) if function.__name__ == "__init__" else function
            strange = next(name for name in kwargs if name not in known)
            raise ConfigError(_strange(owner.__name__, strange, sorted(known - {"self"}), elsewhere(strange)))
        return function(*args, **kwargs)

    return call


def _strange(owner: str, name: str, known: list[str], advice: str | None) -> str:
    hint = f": {advice}" if advice else did_you_mean(name, known) or f"; it takes: {', '.join(known)}"
    return f"{owner} takes no argument {name!r}{hint}"


@dataclass(frozen=True, slots=True)
class Kind:
    """What the value of an argument must be."""

    words: str
    fits: Callable[[Any], bool]


TEXT: Final = Kind("a str", lambda value: isinstance(value, str))
FLAG: Final = Kind("True or False", lambda value: isinstance(value, bool))
FUNCTION: Final = Kind("a function", callable)
DICT: Final = Kind("a dict", lambda value: isinstance(value, Mapping))
NUMBER: Final = Kind(
    "a number",
    lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max,
)
"""no NaN, and nothing that a float cannot hold"""
SECONDS: Final = Kind("more than 0 seconds", lambda value: NUMBER.fits(value) and value > 0)
NAMES: Final = Kind(
    "a list of names",
    lambda value: (
        isinstance(value, Collection)  # a generator could be read once
        and not isinstance(value, (str, Mapping))
        and all(isinstance(name, str) for name in value)
    ),
)


def int_from(least: int) -> Kind:
    """Return the kind of whole numbers from `least` on."""
    return Kind(
        f"a whole number from {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def template(**samples: Any) -> Kind:
    """Return the kind of texts for `str.format` with these fields."""
    known = ", ".join(f"{{{name}}}" for name in samples)
    return Kind(f"a str, with no other braces in it than {known}", partial(_takes, samples))


def _takes(samples: Mapping[str, Any], value: Any) -> bool:
    try:
        return isinstance(value, str) and isinstance(value.format(**samples), str)
    except (LookupError, ValueError, AttributeError):
        return False


def optional(kind: Kind) -> Kind:
    """Return the kind that may be left at None."""
    return Kind(kind.words, lambda value: value is None or kind.fits(value))


def check_fields(given: object, kinds: Mapping[str, Kind], owner: str = "") -> None:
    """Raise ConfigError that names the first attribute of `given` which is not of its kind."""
    for name, kind in kinds.items():
        require(owner + name, getattr(given, name), kind)


def require(name: str, value: Any, kind: Kind) -> None:
    """Raise ConfigError that names the argument, unless the value is of its kind."""
    if not _fits(kind, value):
        raise ConfigError(f"{name} must be {kind.words}, not {shown(value)}")


def _fits(kind: Kind, value: Any) -> bool:
    try:
        return kind.fits(value)
    except TypeError:  # not iterable
        return False


def shown(value: Any) -> str:
    """Return how an error names a value that was given: a short one itself, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (str, int, float, list, tuple, set, NoneType)) and len(text := repr(value)) <= 40:
        return text
    return type(value).__name__

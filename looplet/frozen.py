"""A quicker `__init__` for values of which each turn makes some."""

from __future__ import annotations

from dataclasses import MISSING, Field
from typing import Any, TypeVar

T = TypeVar("T")


def quickly_made(cls: type[T]) -> type[T]:
    """Give a frozen dataclass with slots an `__init__` that takes half the time of its own; nothing else changes.

    The one that `dataclass` writes looks every slot up by name, in `object.__setattr__`.  This one calls the slots.
    For classes without `__post_init__`, whose fields are all positional.
    """
    told: dict[str, Field[Any]] = cls.__dataclass_fields__  # type: ignore[attr-defined]
    names: dict[str, Any] = {"MISSING": MISSING}
    for name, field in told.items():
        names |= {f"put_{name}": getattr(cls, name).__set__, f"default_{name}": _default_of(field)}
    defaults = [f"if {name} is MISSING: {name} = default_{name}()" for name, field in told.items() if _is_made(field)]
    parameters = [f"{name}{_written(field)}" for name, field in told.items()]
    body = "\n ".join([*defaults, *[f"put_{name}(self, {name})" for name in told]])
    exec(f"def __init__(self, {', '.join(parameters)}):\n {body}", names)  # as `dataclass` does
    made, own = names["__init__"], cls.__init__
    made.__qualname__, made.__annotations__ = own.__qualname__, own.__annotations__
    cls.__init__ = made  # type: ignore[method-assign]
    return cls


def _is_made(field: Field[Any]) -> bool:
    return field.default_factory is not MISSING


def _default_of(field: Field[Any]) -> Any:
    return field.default_factory if _is_made(field) else field.default


def _written(field: Field[Any]) -> str:
    if _is_made(field):
        return "=MISSING"
    return "" if field.default is MISSING else f"=default_{field.name}"

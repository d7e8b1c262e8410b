r"""The one place where a value becomes recordable and redacted: exactly once, when it enters a run.

What comes out is JSON-like (str, int, float, bool, None, list, dict with string keys), safe for every encoder, and it
is what conversation, steps, spans, evals and the provider see.  Values that JSON has no word for get a stable form:

    int beyond 64 bits      its decimal digits            NaN, Infinity     "NaN", "Infinity", "-Infinity"
    bytes                   "base64:..."                  lone surrogates   "\ud800", spelled out
    set                     a sorted list                 dataclass & co.   a dict of its fields
    an image                a part (`looplet.parts`), whose base64 no redactor sees
    a cycle                 "<cycle>"                     too deep (> 100)  "<too deep>"
    anything else           str() when its class defines one, else "<ClassName>"
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Final, TypeAlias

from looplet.parts import is_sealed

Redact: TypeAlias = Callable[[str], str]

MAX_DEPTH: Final = 100
INT64: Final = 1 << 63
MAX_ESCAPING: Final = 3
"""how deep JSON in JSON is looked into for what is to be redacted"""
WITHHELD: Final = "[withheld: the redactor failed]"

_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([nrtbf\"'/\\]))")
_ESCAPED: Final = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}

logger = logging.getLogger("looplet")


class Boundary:
    """Cleans the values of one run.  Each redactor maps a string to the string that may be seen."""

    __slots__ = ("_complained", "redactors")

    def __init__(self, *redactors: Redact | None) -> None:
        self.redactors = tuple(redact for redact in redactors if redact is not None)
        self._complained = False

    def clean(self, value: Any) -> Any:
        """Return the recordable, redacted form of any value.  Never raises."""
        if type(value) is dict and not value:
            return {}
        return self._clean(value, ())

    def text(self, value: str) -> str:
        """Return the recordable, redacted form of a string.  A redactor that fails withholds the whole string."""
        if not self.redactors:
            return str(value) if value.isascii() else encodable(value)
        value = encodable(value)
        hidden, value = value, self._apply(value)
        shown = value
        for _ in range(MAX_ESCAPING):
            if "\\" not in hidden:
                break
            hidden, shown = _unescape(hidden), _unescape(shown)
            if (redacted := self._apply(hidden)) != shown:  # JSON or a repr inside the text hid it: `bob\u0040x.org`
                value = shown = redacted
        return value

    def _apply(self, text: str) -> str:
        for redact in self.redactors:
            try:
                redacted = redact(text)
            except Exception as error:  # noqa: BLE001 - the caller's redactor; it must neither leak nor end the run
                text = self._withhold(type(error).__name__)
                continue
            text = encodable(redacted) if isinstance(redacted, str) else self._withhold(type(redacted).__name__)
        return text

    def _withhold(self, problem: str) -> str:
        if not self._complained:
            self._complained = True
            logger.error("looplet: a redactor failed or gave no str (%s); what it was given is withheld", problem)
        return WITHHELD

    def _clean(self, value: Any, path: tuple[int, ...]) -> Any:
        kind = type(value)
        if kind is str:
            return self.text(value)
        if kind is bool or value is None:
            return value
        if kind is int or kind is float:
            return self._number(value)
        if id(value) in path:
            return "<cycle>"
        if len(path) >= MAX_DEPTH:
            return "<too deep>"
        try:
            return self._container(value, (*path, id(value)))
        except Exception:  # noqa: BLE001 - foreign objects: properties, iteration and str() may all raise
            return f"<unreadable {kind.__name__}>"

    def _number(self, value: float) -> Any:
        if isinstance(value, int):
            form: Any = value if -INT64 <= value < INT64 else _digits(value)
        elif math.isfinite(value):
            form = value
        else:
            form = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        if not self.redactors:
            return form
        text = str(form)
        redacted = self.text(text)
        return form if redacted == text else redacted

    def _container(self, value: Any, path: tuple[int, ...]) -> Any:
        if type(value) is dict or isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return [self._clean(item, path) for item in value]
        return self._clean(_plain(value), path)

    def _mapping(self, value: Mapping[Any, Any], path: tuple[int, ...]) -> dict[str, Any]:
        if self.redactors and is_sealed(value):
            return dict(value)
        out: dict[str, Any] = {}
        for key, item in value.items():
            name = self.text(key if type(key) is str else _plain_key(key))
            while name in out:  # two keys may be redacted to the same name; lose neither
                name += "'"
            out[name] = self._clean(item, path)
        return out


def is_json(value: Any) -> bool:
    """Tell whether a value is built of what JSON has words for, and of nothing else."""
    if isinstance(value, dict):
        return all(type(name) is str and is_json(item) for name, item in value.items())
    if type(value) is list:
        return all(map(is_json, value))
    return value is None or type(value) in (str, bool, int, float)


def _unescape(text: str) -> str:
    """Decode the escapes of JSON and Python."""
    plain = _ESCAPE.sub(lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else _ESCAPED.get(m[3], m[3]), text)
    return plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # joins surrogate pairs


def encodable(text: str) -> str:
    """Return `text` with lone surrogates spelled out, so that it can be encoded as UTF-8."""
    if text.isascii():
        return str(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return str(text)


def _digits(value: int) -> str:
    return str(value) if value.bit_length() < 4096 else hex(value)  # str() refuses very long integers


def _plain_key(key: Any) -> str:
    try:
        return str(_plain(key)) if not isinstance(key, (int, float, str)) else str(key)
    except Exception:  # noqa: BLE001 - foreign str()
        return f"<unreadable {type(key).__name__}>"


def _plain(value: Any) -> Any:
    """Return a builtin form of a foreign value."""
    import base64
    import dataclasses
    import enum

    if callable(part := getattr(type(value), "__looplet_part__", None)):
        return part(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "base64:" + base64.b64encode(bytes(value)).decode()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Set):
        return sorted(value, key=_sort_key)
    return _fields_of(value, dataclasses.is_dataclass(value) and not isinstance(value, type))


def _fields_of(value: Any, is_dataclass: bool) -> Any:
    if is_dataclass:
        import dataclasses

        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr}
    if hasattr(value, "__struct_fields__"):  # msgspec.Struct
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if hasattr(value, "_asdict"):  # a named tuple
        return value._asdict()
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):  # pydantic
        return dump(mode="json")
    if callable(isoformat := getattr(value, "isoformat", None)):
        return isoformat()
    if isinstance(value, Sequence):
        return list(value)
    if callable(item := getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:  # a numpy scalar
        return item()
    if callable(tolist := getattr(value, "tolist", None)):  # an array
        return tolist()
    return _words(value)


def _words(value: Any) -> str:
    kind = type(value)
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, BaseException):
        return f"{kind.__name__}: {value}"
    if any("__str__" in c.__dict__ or "__repr__" in c.__dict__ for c in kind.__mro__[:-1]):
        text = str(value)
        if " at 0x" not in text:  # an address is different in every process
            return text
    return f"<{kind.__name__}>"


def _sort_key(value: Any) -> tuple[str, str]:
    return type(value).__name__, str(value)

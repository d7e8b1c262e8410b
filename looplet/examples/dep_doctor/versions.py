"""Versions and ranges of both ecosystems behind one interface: PEP 440 through `packaging`, npm's semver here."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Protocol

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from looplet.examples.dep_doctor.model import PYPI


class Range(Protocol):
    """A set of versions that a manifest allows."""

    def contains(self, version: str) -> bool:
        """Tell whether the range allows `version`."""
        ...

    def bounds(self) -> list[str]:
        """Return the versions that the range is written with."""
        ...

    def has_upper_bound(self) -> bool:
        """Tell whether some later version is out of the range."""
        ...


def version_key(ecosystem: str, version: str) -> Any:
    """Return a value that orders the versions of one ecosystem; `ValueError` when it is no version."""
    return Version(version) if ecosystem == PYPI else Semver.parse(version)


def is_prerelease(ecosystem: str, version: str) -> bool:
    """Tell whether `version` is a version before its release; False for what is no version."""
    try:
        key = version_key(ecosystem, version)
    except ValueError:
        return False
    return key.is_prerelease if isinstance(key, Version) else not key.final


def just_above(ecosystem: str, version: str) -> str:
    """Return the next version after `version` that a release could have."""
    key = version_key(ecosystem, version)
    if isinstance(key, Version):
        release = (*key.release, 0, 0)[: max(3, len(key.release))]
        return ".".join(str(part) for part in (*release, 1))
    major, minor, patch = key.release
    return f"{major}.{minor}.{patch + 1}" if key.final else f"{major}.{minor}.{patch}"


def parse_range(ecosystem: str, specifier: str) -> Range | None:
    """Return the range that `specifier` describes, None when it is a URL, a tag or otherwise no range."""
    try:
        return PypiRange(specifier) if ecosystem == PYPI else NpmRange(specifier)
    except ValueError:
        return None


def pinned_version(ecosystem: str, specifier: str) -> str | None:
    """Return the only version that `specifier` allows, None when it allows several or cannot be read."""
    wanted = parse_range(ecosystem, specifier)
    return wanted.pin() if isinstance(wanted, (PypiRange, NpmRange)) else None


class PypiRange:
    """A PEP 440 specifier set; `ValueError` when it is none."""

    def __init__(self, specifier: str) -> None:
        try:
            self._set = SpecifierSet(specifier)
        except InvalidSpecifier as error:
            raise ValueError(str(error)) from error

    def contains(self, version: str) -> bool:
        """Tell whether the range allows `version`."""
        return self._set.contains(version)

    def bounds(self) -> list[str]:
        """Return the versions that the range is written with, without wildcards."""
        texts = [spec.version.removesuffix(".*") for spec in self._set]
        return [text for text in texts if _is_pep440(text)]

    def has_upper_bound(self) -> bool:
        """Tell whether some later version is out of the range."""
        return any(spec.operator in {"==", "===", "~=", "<", "<="} for spec in self._set)

    def pin(self) -> str | None:
        """Return the only version allowed, None when there are several."""
        for spec in self._set:
            if spec.operator in {"==", "==="} and not spec.version.endswith(".*"):
                return spec.version
        return None


def _is_pep440(text: str) -> bool:
    try:
        Version(text)
    except ValueError:
        return False
    return True


class Semver(NamedTuple):
    """A semantic version as a value that compares in precedence order; build metadata is dropped."""

    release: tuple[int, int, int]
    final: bool
    """False, which sorts first, for a pre-release"""
    identifiers: tuple[tuple[bool, int, str], ...]

    @classmethod
    def parse(cls, text: str) -> Semver:
        """Read `1.2.3-beta.1+build`; missing numbers are 0. `ValueError` when it is no version."""
        match = _SEMVER.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no semantic version; write it as 1.2.3")
        major, minor, patch, tail = match.groups()
        identifiers = tuple(_identifier(part) for part in tail.split(".")) if tail else ()
        return cls((int(major), int(minor or 0), int(patch or 0)), not tail, identifiers)


_SEMVER = re.compile(r"[v=]?\s*(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?")
_COMPARATOR = re.compile(
    r"(\^|~>?|>=|<=|>|<|=)?\s*v?(\d+|[xX*])(?:\.(\d+|[xX*]))?(?:\.(\d+|[xX*]))?(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?"
)
_HYPHEN = re.compile(r"(\S+)\s+-\s+(\S+)")

Comparator = tuple[str, Semver]


def _identifier(text: str) -> tuple[bool, int, str]:
    return (False, int(text), "") if text.isdigit() else (True, 0, text)


class NpmRange:
    """An npm range such as `^1.2 || >=3 <4`; `ValueError` for tags, URLs and other non-ranges."""

    def __init__(self, text: str) -> None:
        self._alternatives = [_alternative(part.strip()) for part in text.split("||")]

    def contains(self, version: str) -> bool:
        """Tell whether the range allows `version`; a pre-release only where the range names one of that release."""
        key = Semver.parse(version)
        return any(_satisfies(key, comparators) for comparators in self._alternatives)

    def bounds(self) -> list[str]:
        """Return the versions that the range comes down to."""
        return [_text(key) for comparators in self._alternatives for _, key in comparators]

    def has_upper_bound(self) -> bool:
        """Tell whether some later version is out of the range."""
        return all(any(op in {"<", "<=", "="} for op, _ in comparators) for comparators in self._alternatives)

    def pin(self) -> str | None:
        """Return the only version allowed, None when there are several."""
        comparators = self._alternatives[0]
        if len(self._alternatives) > 1 or len(comparators) != 1 or comparators[0][0] != "=":
            return None
        return _text(comparators[0][1])


def _text(key: Semver) -> str:
    tail = ".".join(text or str(number) for _, number, text in key.identifiers)
    return ".".join(map(str, key.release)) + (f"-{tail}" if tail else "")


def _satisfies(key: Semver, comparators: list[Comparator]) -> bool:
    if not key.final and not any(not bound.final and bound.release == key.release for _, bound in comparators):
        return False
    return all(_compare(key, operator, bound) for operator, bound in comparators)


def _compare(key: Semver, operator: str, bound: Semver) -> bool:
    return {"=": key == bound, ">": key > bound, ">=": key >= bound, "<": key < bound, "<=": key <= bound}[operator]


def _alternative(text: str) -> list[Comparator]:
    """Return the comparators of one side of `||`; a version must pass all of them."""
    hyphen = _HYPHEN.fullmatch(text)
    if hyphen:
        return _comparator(f">={hyphen[1]}") + _comparator(f"<={hyphen[2]}")
    parts = re.sub(r"(\^|~>?|>=|<=|>|<|=)\s+", r"\1", text).split()
    return [bound for part in parts for bound in _comparator(part)]


def _comparator(text: str) -> list[Comparator]:
    match = _COMPARATOR.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no npm range")
    operator, *numbers, tail = match.groups()
    given: list[int] = []
    for number in numbers:
        if number is None or not number.isdigit():
            break
        given.append(int(number))
    low = Semver.parse(".".join(map(str, [*given, 0, 0, 0][:3])) + (f"-{tail}" if tail and len(given) == 3 else ""))
    return _expand(operator or "=", given, low)


def _expand(operator: str, given: list[int], low: Semver) -> list[Comparator]:
    if not given:  # `*`: any version; `<*` allows none, which nobody writes
        return []
    if operator == "^":
        return [(">=", low), ("<", _bump(given, _caret_position(given)))]
    if operator.startswith("~"):
        return [(">=", low), ("<", _bump(given, min(1, len(given) - 1)))]
    if len(given) == 3:
        return [(operator, low)]
    high = _bump(given, len(given) - 1)
    partial = {"=": [(">=", low), ("<", high)], ">": [(">=", high)], "<=": [("<", high)]}
    return partial.get(operator, [(operator, low)])


def _caret_position(given: list[int]) -> int:
    """Return the index of the number that `^` keeps: the first that is not 0."""
    return next((index for index, number in enumerate(given) if number), len(given) - 1)


def _bump(given: list[int], position: int) -> Semver:
    numbers = [*given[:position], given[position] + 1, 0, 0, 0]
    return Semver((numbers[0], numbers[1], numbers[2]), True, ())

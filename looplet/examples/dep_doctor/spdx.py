"""Licence names: from what people write to SPDX identifiers, their category, and whether two go together.

A first look and not legal advice: only well-known identifiers are judged, everything else is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Category = Literal["permissive", "weak copyleft", "strong copyleft", "proprietary", "unknown"]
CATEGORIES: tuple[Category, ...] = ("permissive", "weak copyleft", "unknown", "strong copyleft", "proprietary")
"""from the one that asks least of a user of the package to the one that asks most"""

_PERMISSIVE = frozenset(
    {"MIT", "MIT-0", "MIT-CMU", "APACHE-2.0", "BSD", "BSD-2-CLAUSE", "BSD-3-CLAUSE", "0BSD", "ISC", "ZLIB", "PSF-2.0"}
    | {"PYTHON-2.0", "UNLICENSE", "CC0-1.0", "BSL-1.0", "HPND", "WTFPL", "BLUEOAK-1.0.0", "CC-BY-3.0", "CC-BY-4.0"}
    | {"ZPL-2.1", "ARTISTIC-2.0", "X11", "UPL-1.0", "NCSA"}
)
_PROPRIETARY = frozenset({"UNLICENSED", "PROPRIETARY", "COMMERCIAL", "BUSL-1.1", "LICENSEREF-PROPRIETARY"})
_WEAK_PREFIXES = ("LGPL", "MPL-", "EPL-", "CDDL-")
_STRONG_PREFIXES = ("GPL", "AGPL", "SSPL-")

_NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), identifier)
    for pattern, identifier in (
        (r"(the )?(GNU )?affero.*(v3|version 3|3\.0).*later|AGPLv3\+", "AGPL-3.0-or-later"),
        (r"(the )?(GNU )?affero.*(v3|version 3|3)|AGPL ?v?3", "AGPL-3.0-only"),
        (r"(the )?(GNU )?(lesser|library) general public.*(v3|version 3).*(later|\+)|LGPLv3\+", "LGPL-3.0-or-later"),
        (r"(the )?(GNU )?(lesser|library) general public.*(v3|version 3)|LGPL ?v?3", "LGPL-3.0-only"),
        (r"(the )?(GNU )?(lesser|library) general public|LGPL", "LGPL"),
        (r"(the )?(GNU )?general public.*(v3|version 3).*(later|\+)|GPL ?v?3(\.0)?( or later|\+)", "GPL-3.0-or-later"),
        (r"(the )?(GNU )?general public.*(v3|version 3)|GPL ?v?3(\.0)?", "GPL-3.0-only"),
        (r"(the )?(GNU )?general public.*(v2|version 2).*(later|\+)|GPL ?v?2(\.0)?( or later|\+)", "GPL-2.0-or-later"),
        (r"(the )?(GNU )?general public.*(v2|version 2)|GPL ?v?2(\.0)?", "GPL-2.0-only"),
        (r"(the )?GNU general public license( \(GPL\))?|GPL", "GPL"),
        (r"mozilla public license,?( v| version)? ?2(\.0)?( \(MPL 2\.0\))?|MPL ?v?2(\.0)?", "MPL-2.0"),
        (r"eclipse public license,?( - )?( ?v| version)? ?2(\.0)?", "EPL-2.0"),
        (r"(the )?apache( software)?( license)?[, -]*(v(ersion)? ?)?(2(\.0)?)?( license)?|ASL ?2(\.0)?", "Apache-2.0"),
        (r"(the )?(expat|MIT)( license)?( \(MIT\))?|MIT/X11", "MIT"),
        (r"(the )?(new|modified|revised|3[- ]clause) BSD( license)?|BSD[ -]3[- ]clause( license)?", "BSD-3-Clause"),
        (r"(simplified|2[- ]clause) BSD( license)?|BSD[ -]2[- ]clause( license)?", "BSD-2-Clause"),
        (r"(the )?BSD([ -]like)?( license)?", "BSD"),
        (r"ISC( license)?( \(ISCL\))?", "ISC"),
        (r"(python software foundation|PSF)( license)?", "PSF-2.0"),
        (r"(the )?unlicense( \(unlicense\))?|public domain", "Unlicense"),
        (r"zope public license.*", "ZPL-2.1"),
        (r"(other/)?proprietary( license)?|all rights reserved|commercial", "Proprietary"),
    )
)
_TOKEN = re.compile(r"\(|\)|\b(?:AND|OR|WITH)\b|[A-Za-z0-9][A-Za-z0-9.+:-]*", re.IGNORECASE)
_LATER = re.compile(r"(-OR-LATER|\+)$")
_T = TypeVar("_T")


def identify(stated: str) -> str:
    """Return an SPDX identifier or expression for a licence as metadata state it; unknown words come back unchanged.

    Takes an expression, a classifier (`License :: OSI Approved :: MIT License`), a name (`GPLv3+`) or a whole text.
    """
    text = stated.strip()
    if text.startswith("License ::"):
        text = text.rsplit(" :: ", 1)[-1]
    if "\n" in text:
        return identify_text(text) or text.split("\n", 1)[0]
    return _by_name(text) or _by_short_form(text) or text


def _by_name(text: str) -> str | None:
    known = next((identifier for pattern, identifier in _NAMES if pattern.fullmatch(text)), None)
    return known or (text if _is_identifier(text) else None)


def _by_short_form(text: str) -> str | None:
    """Look at both halves of `GNU General Public License v3 (GPLv3)`."""
    match = re.fullmatch(r"(.+?)\s*\(([A-Za-z0-9+. -]+)\)", text)
    return (_by_name(match[2]) or _by_name(match[1])) if match else None


def identify_text(text: str) -> str | None:
    """Return the licence whose text this is, None when its heading is not one that is known."""
    head = " ".join(text[:1500].split()).lower()
    for words, identifier in _HEADINGS:
        if all(word in head for word in words):
            return identifier
    return None


_HEADINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gnu affero general public license", "version 3"), "AGPL-3.0-only"),
    (("gnu lesser general public license", "version 3"), "LGPL-3.0-only"),
    (("gnu lesser general public license",), "LGPL"),
    (("gnu general public license", "version 3"), "GPL-3.0-only"),
    (("gnu general public license", "version 2"), "GPL-2.0-only"),
    (("apache license", "version 2.0"), "Apache-2.0"),
    (("mozilla public license", "2.0"), "MPL-2.0"),
    (("permission is hereby granted, free of charge",), "MIT"),
    (("permission to use, copy, modify, and/or distribute",), "ISC"),
    (("redistribution and use in source and binary forms", "neither the name"), "BSD-3-Clause"),
    (("redistribution and use in source and binary forms",), "BSD"),
    (("this is free and unencumbered software",), "Unlicense"),
)


def category(expression: str) -> Category:
    """Return what a licence expression asks of a user of the package: `OR` is the best of both, `AND` the worst."""
    order = CATEGORIES.index
    rules = _Rules(_category_of, lambda a, b: min(a, b, key=order), lambda a, b: max(a, b, key=order))
    return rules.evaluate(expression, default="unknown")


def _category_of(identifier: str) -> Category:
    name = identifier.upper()
    if name in _PERMISSIVE:
        return "permissive"
    if name in _PROPRIETARY:
        return "proprietary"
    if name.startswith(_WEAK_PREFIXES):
        return "weak copyleft"
    return "strong copyleft" if name.startswith(_STRONG_PREFIXES) else "unknown"


def goes_with(expression: str, project: str) -> bool | None:
    """Tell whether a package may be used in a project under `project`; None where that needs a person."""
    rules: _Rules[bool | None] = _Rules(
        lambda identifier: _pair(identifier.upper(), project.upper()),
        either=lambda a, b: True if True in (a, b) else None if None in (a, b) else False,
        both=lambda a, b: False if False in (a, b) else None if None in (a, b) else True,
    )
    return rules.evaluate(expression, default=None)


def _pair(package: str, project: str) -> bool | None:
    kind = _category_of(package)
    if kind == "permissive":
        return not (package == "APACHE-2.0" and _family(project) == "GPL-2.0" and not _LATER.search(project))
    if kind == "weak copyleft":
        return True
    own = category(project)
    if "unknown" in (kind, own):
        return None
    if kind == "strong copyleft" and " WITH " in package:  # the exception may allow it
        return None
    if kind == "proprietary" or own != "strong copyleft":
        return False
    return _copyleft_pair(package, project)


def _copyleft_pair(package: str, project: str) -> bool | None:
    """Judge two strong copyleft licences: equal families go together, and `or later` reaches the next version."""
    ours, theirs = _family(package), _family(project)
    if ours == theirs:
        return True
    if ours == "GPL-2.0" and theirs in {"GPL-3.0", "AGPL-3.0"}:
        return bool(_LATER.search(package))
    if ours == "GPL-3.0" and theirs == "GPL-2.0":
        return bool(_LATER.search(project))
    return True if (ours, theirs) == ("GPL-3.0", "AGPL-3.0") else None


def _family(identifier: str) -> str:
    return re.sub(r"(-ONLY|-OR-LATER|\+)$", "", identifier)


def _is_identifier(text: str) -> bool:
    rules = _Rules(lambda identifier: _category_of(identifier) != "unknown", lambda a, b: a or b, lambda a, b: a or b)
    return rules.evaluate(text, default=False)


@dataclass(frozen=True, slots=True)
class _Rules(Generic[_T]):
    """How to compute a value over an SPDX expression: of one identifier, of `OR`, of `AND`."""

    leaf: Callable[[str], _T]
    either: Callable[[_T, _T], _T]
    both: Callable[[_T, _T], _T]

    def evaluate(self, expression: str, *, default: _T) -> _T:
        """Return the value of `expression`, `default` when it is none."""
        tokens = _TOKEN.findall(expression)
        if "".join(tokens) != "".join(expression.split()):
            return default
        tokens.reverse()
        try:
            value = self._or(tokens)
        except (IndexError, RecursionError):
            return default
        return default if tokens else value

    def _or(self, tokens: list[str]) -> _T:
        value = self._and(tokens)
        while tokens and tokens[-1].upper() == "OR":
            tokens.pop()
            value = self.either(value, self._and(tokens))
        return value

    def _and(self, tokens: list[str]) -> _T:
        value = self._term(tokens)
        while tokens and tokens[-1].upper() == "AND":
            tokens.pop()
            value = self.both(value, self._term(tokens))
        return value

    def _term(self, tokens: list[str]) -> _T:
        token = tokens.pop()
        if token == "(":
            value = self._or(tokens)
            if tokens.pop() != ")":
                raise IndexError("a parenthesis is not closed")
            return value
        if tokens and tokens[-1].upper() == "WITH":
            tokens.pop()
            token += f" WITH {tokens.pop()}"
        return self.leaf(token)

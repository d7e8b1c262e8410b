"""The values that travel between the checks: what a project declares, what its locks fix, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from packaging.utils import canonicalize_name

from looplet.errors import ErrorKind, ToolError

PYPI = "PyPI"
NPM = "npm"

Part = Literal["security", "licence", "maintenance"]
Severity = Literal["critical", "high", "moderate", "low", "info", "unknown"]

PARTS: tuple[Part, ...] = ("security", "licence", "maintenance")
SEVERITIES: tuple[Severity, ...] = ("critical", "high", "moderate", "low", "unknown", "info")
"""in the order of a report: worst first"""


class BrokenFileError(ToolError):
    """A dependency file that cannot be read as what it should be; `line` is from 1, None when it is not known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message, kind=ErrorKind.PARSE)
        self.line = line


def normalize(ecosystem: str, name: str) -> str:
    """Return the name under which two spellings of one package are equal (PEP 503 for PyPI, as written for npm)."""
    return canonicalize_name(name) if ecosystem == PYPI else name.strip()


@dataclass(frozen=True, slots=True)
class Dependency:
    """One line of a manifest that asks for a package."""

    name: str
    ecosystem: str
    file: str
    """relative to the project folder, with `/`"""
    line: int | None = None
    specifier: str = ""
    """as the ecosystem writes it; empty when any version will do"""
    version: str | None = None
    """the only version the specifier allows, None when it is not pinned"""
    extras: tuple[str, ...] = ()
    marker: str | None = None
    group: str = "main"
    """`main`, `build`, `peer`, or the name of an extra or a group"""
    url: str | None = None
    """where it comes from when that is not the package index"""

    @property
    def key(self) -> str:
        """Return the normalised name."""
        return normalize(self.ecosystem, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-like dict."""
        return {
            "name": self.name,
            "specifier": self.specifier,
            "version": self.version,
            "extras": list(self.extras),
            "marker": self.marker,
            "group": self.group,
            "url": self.url,
            "file": self.file,
            "line": self.line,
        }


@dataclass(frozen=True, slots=True)
class Locked:
    """One package that a lock file (or a pinned constraint) fixes to a version."""

    name: str
    ecosystem: str
    version: str
    file: str
    line: int | None = None
    licence: str | None = None
    deprecated: str | None = None
    """what the registry said when the lock was written"""
    released: str | None = None
    """upload date of this version, `YYYY-MM-DD`"""

    @property
    def key(self) -> str:
        """Return the normalised name."""
        return normalize(self.ecosystem, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-like dict, without those that are not known."""
        fields = {"name": self.name, "version": self.version, "file": self.file, "line": self.line}
        known = {"licence": self.licence, "deprecated": self.deprecated, "released": self.released}
        return fields | {name: value for name, value in known.items() if value}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a dependency file that could not be understood."""

    file: str
    message: str
    line: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return `{"error", "line", "file"}`."""
        return {"error": self.message, "line": self.line, "file": self.file}


@dataclass(slots=True)
class Parsed:
    """What one dependency file says; its parser fills the lists."""

    path: str
    kind: str
    ecosystem: str
    dependencies: list[Dependency] = field(default_factory=list)
    locked: list[Locked] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    licence: str | None = None
    """of the project itself, as the manifest states it"""
    is_lock: bool = False
    error: Problem | None = None
    """why nothing of the file could be read"""

    def problem(self, message: str, line: int | None = None) -> None:
        """Note what could not be understood, and go on."""
        self.problems.append(Problem(self.path, message, line))


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of evidence: a fact about one package, and how much it weighs."""

    part: Part
    kind: str
    severity: Severity
    """`info` weighs nothing; `unknown` says that the fact could not be established"""
    package: str
    fact: str
    file: str
    line: int | None = None
    reference: str = ""
    """identifier of an advisory, empty otherwise"""
    ecosystem: str = ""

    @property
    def place(self) -> str:
        """Return `file:line`, or the file alone."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-like dict."""
        return {
            "part": self.part,
            "kind": self.kind,
            "severity": self.severity,
            "package": self.package,
            "fact": self.fact,
            "file": self.file,
            "line": self.line,
            "reference": self.reference,
            "ecosystem": self.ecosystem,
        }

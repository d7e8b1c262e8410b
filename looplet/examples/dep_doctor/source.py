"""One dependency file being read: its text, where a line of it is, and what the reading came to."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from looplet.examples.dep_doctor.model import PYPI, BrokenFileError, Dependency, Parsed
from looplet.examples.dep_doctor.versions import pinned_version

_TOML_LINE = re.compile(r"\(at line (\d+), column \d+\)")


@dataclass(slots=True)
class Source:
    """A file to parse: `text` is its content, `parsed` collects what it says."""

    root: Path
    path: str
    text: str
    parsed: Parsed
    _after: dict[str, int] = field(default_factory=dict)

    def line_of(self, needle: str) -> int | None:
        """Return the line (from 1) of the next occurrence of `needle`, None when there is no further one."""
        position = self.text.find(needle, self._after.get(needle, 0))
        if position < 0:
            return None
        self._after[needle] = position + len(needle)
        return self.text.count("\n", 0, position) + 1

    def toml(self) -> dict[str, Any]:
        """Return the file as TOML; `BrokenFileError` with the line when it is none."""
        try:
            return tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            match = _TOML_LINE.search(str(error))
            last = self.text.count("\n") + 1
            raise BrokenFileError(f"not valid TOML: {error}", int(match[1]) if match else last) from error
        except RecursionError as error:
            raise BrokenFileError("not usable TOML: nested too deeply") from error

    def json(self) -> dict[str, Any]:
        """Return the file as a JSON object; `BrokenFileError` with the line when it is none."""
        try:
            data = json.loads(self.text)
        except json.JSONDecodeError as error:
            raise BrokenFileError(f"not valid JSON: {error.msg}", error.lineno) from error
        except (RecursionError, ValueError) as error:  # ValueError: a number with thousands of digits
            raise BrokenFileError(f"not usable JSON: {error}") from error
        if not isinstance(data, dict):
            raise BrokenFileError(f"the file must hold a JSON object, not {type(data).__name__}", 1)
        return data

    def table(self, data: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        """Return the table at `keys`, empty when it is missing; anything else there becomes a problem."""
        value: Any = data
        for depth, key in enumerate(keys):
            value = value.get(key)
            if value is None:
                return {}
            if not isinstance(value, dict):
                where = ".".join(keys[: depth + 1])
                self.parsed.problem(f"{where} must be a table, not {type(value).__name__}", self.line_of(key))
                return {}
        return dict(value)

    def add_requirement(self, text: str, group: str, line: int | None) -> None:
        """Add one PEP 508 requirement; one that cannot be read becomes a problem."""
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            reason = str(error).splitlines()[0]
            self.parsed.problem(f"{text!r} is not a valid requirement: {reason}", line)
            return
        specifier = str(requirement.specifier)
        self.parsed.dependencies.append(
            Dependency(
                name=requirement.name,
                ecosystem=PYPI,
                file=self.path,
                line=line,
                specifier=specifier,
                version=pinned_version(PYPI, specifier),
                extras=tuple(sorted(requirement.extras)),
                marker=str(requirement.marker) if requirement.marker else None,
                group=group,
                url=requirement.url,
            )
        )

    def add_requirements(self, where: str, values: Any, group: str) -> None:
        """Add a list of PEP 508 strings that stands at `where`."""
        if values is None:
            return
        if not isinstance(values, list):
            line = self.line_of(where.rsplit(".", 1)[-1])
            self.parsed.problem(f"{where} must be a list of requirements, not {type(values).__name__}", line)
            return
        for value in values:
            if isinstance(value, str):
                self.add_requirement(value, group, self.line_of(value))
            else:
                self.parsed.problem(f"{where} holds {value!r}, which is not a requirement", None)


def group_of(path: str) -> str:
    """Return the group that a requirements file stands for, from its name: `requirements-dev.txt` is `dev`."""
    words = set(re.split(r"[^a-z]+", PurePosixPath(path).stem.lower()))
    for group, names in _GROUPS.items():
        if words & names:
            return group
    return "main"


_GROUPS = {
    "dev": {"dev", "develop", "development", "local"},
    "test": {"test", "tests", "testing", "ci"},
    "docs": {"doc", "docs"},
    "lint": {"lint", "linting", "typing", "mypy"},
}

"""Poetry's and Pipenv's dependency tables, brought into PEP 440: `^1.2` becomes `>=1.2,<2`."""

from __future__ import annotations

import re
from typing import Any

from looplet.examples.dep_doctor.model import PYPI, Dependency
from looplet.examples.dep_doctor.source import Source
from looplet.examples.dep_doctor.versions import pinned_version

_PLAIN = re.compile(r"\d+(\.\d+)*([a-z]+\d*)?")
_SHIFTED = re.compile(r"([~^])\s*(\d+(?:\.\d+)*)(\S*)")


def add_table(source: Source, table: dict[str, Any], group: str) -> None:
    """Add the entries of one table: name → version, or name → `{version, extras, markers, git, path, url}`."""
    for name, value in table.items():
        if name.lower() == "python":
            continue
        for entry in value if isinstance(value, list) else [value]:
            _add(source, name, entry, group)


def _add(source: Source, name: str, entry: Any, group: str) -> None:
    fields = {"version": entry} if isinstance(entry, str) else entry
    line = source.line_of(f"{name} =") or source.line_of(f'"{name}" =') or source.line_of(f"{name}=")
    if not isinstance(fields, dict):
        source.parsed.problem(f"{name} must be a version or a table, not {type(entry).__name__}", line)
        return
    specifier = to_pep440(str(fields.get("version", "")))
    extras = fields.get("extras")
    url = next((str(fields[key]) for key in ("git", "url", "path", "file") if key in fields), None)
    source.parsed.dependencies.append(
        Dependency(
            name=name,
            ecosystem=PYPI,
            file=source.path,
            line=line,
            specifier=specifier,
            version=pinned_version(PYPI, specifier),
            extras=tuple(str(extra) for extra in extras) if isinstance(extras, list) else (),
            marker=str(fields["markers"]) if "markers" in fields else None,
            group=group,
            url=url,
        )
    )


def to_pep440(text: str) -> str:
    """Return the PEP 440 form of a Poetry constraint; what has none is returned as it is."""
    parts = [part.strip() for part in text.split(",")]
    return ",".join(filter(None, (_part(part) for part in parts)))


def _part(text: str) -> str:
    if text in {"", "*"}:
        return ""
    if _PLAIN.fullmatch(text):
        return f"=={text}"
    if re.fullmatch(r"\d+(\.\d+)*\.\*", text):
        return f"=={text}"
    shifted = _SHIFTED.fullmatch(text)
    if shifted is None:
        return text
    numbers = [int(number) for number in shifted[2].split(".")]
    return f">={shifted[2]}{shifted[3]},<{_upper(shifted[1], numbers)}"


def _upper(operator: str, numbers: list[int]) -> str:
    if operator == "~":
        kept = min(1, len(numbers) - 1)
    else:
        kept = next((index for index, number in enumerate(numbers) if number), len(numbers) - 1)
    return ".".join(str(number) for number in [*numbers[:kept], numbers[kept] + 1])

"""Lock files: uv, Poetry, PDM, pylock.toml, Pipenv, and npm in its three forms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from looplet.examples.dep_doctor.model import NPM, PYPI, BrokenFileError, Locked
from looplet.examples.dep_doctor.source import Source

LOCK_KINDS = frozenset(
    {"uv.lock", "poetry.lock", "pdm.lock", "pylock.toml", "Pipfile.lock", "package-lock.json"}
    | {"yarn.lock", "pnpm-lock.yaml"}
)
_OWN_SOURCES = {"editable", "virtual", "directory"}
_TOML_NAME = re.compile(r'name\s*=\s*"([^"]+)"')
_JSON_OBJECT = re.compile(r'\s*"([^"]+)"\s*:\s*\{')


def parse_toml_lock(source: Source) -> None:
    """Read a lock file made of `[[package]]` tables (`[[packages]]` in pylock.toml)."""
    data = source.toml()
    packages = data.get("package", data.get("packages", []))
    if not isinstance(packages, list):
        raise BrokenFileError("the packages of a lock file must be an array of tables")
    lines = _line_index(source.text, _TOML_NAME)
    for package in packages:
        if not isinstance(package, dict) or not isinstance(package.get("name"), str):
            source.parsed.problem("an entry of the lock file has no name; write the lock file again")
            continue
        _add_toml_package(source, package, lines)


def _add_toml_package(source: Source, package: Mapping[str, Any], lines: dict[str, list[int]]) -> None:
    name, version, origin = package["name"], package.get("version"), package.get("source")
    line = _next(lines, name)
    if not isinstance(version, str) or (isinstance(origin, dict) and _OWN_SOURCES & origin.keys()):
        return  # the project itself, or a folder without a version
    source.parsed.locked.append(Locked(name, PYPI, version, source.path, line, released=_released(package)))


def _released(package: Mapping[str, Any]) -> str | None:
    """Return the upload date where uv recorded one."""
    sdist, wheels = package.get("sdist"), package.get("wheels")
    files = [sdist, *(wheels if isinstance(wheels, list) else ())]
    times = [str(file["upload-time"]) for file in files if isinstance(file, dict) and "upload-time" in file]
    return min(times)[:10] if times else None


def parse_pipfile_lock(source: Source) -> None:
    """Read the `default` and `develop` tables of a Pipfile.lock."""
    data = source.json()
    lines = _line_index(source.text, _JSON_OBJECT)
    for table in ("default", "develop"):
        for name, fields in source.table(data, table).items():
            version = fields.get("version") if isinstance(fields, dict) else None
            if isinstance(version, str) and version.startswith("=="):
                source.parsed.locked.append(
                    Locked(name, PYPI, version.removeprefix("=="), source.path, _next(lines, name))
                )


def parse_npm_lock(source: Source) -> None:
    """Read a package-lock.json: `packages` (versions 2 and 3), or else the nested `dependencies` of version 1."""
    data = source.json()
    lines = _line_index(source.text, _JSON_OBJECT)
    packages = source.table(data, "packages")
    if packages:
        for path, fields in packages.items():
            _add_npm_package(source, path, fields, _next(lines, path))
        return
    waiting = list(reversed(source.table(data, "dependencies").items()))
    while waiting:  # in the order of the file, so that lines and entries agree
        name, fields = waiting.pop()
        if isinstance(fields, dict):
            _add_npm(source, name, fields, _next(lines, name))
            waiting += reversed(source.table(fields, "dependencies").items())


def _add_npm_package(source: Source, path: str, fields: Any, line: int | None) -> None:
    """Add `node_modules/a/node_modules/@scope/b` and its like; a link has no version, a workspace no such path."""
    _, found, name = path.rpartition("node_modules/")
    if not found or not isinstance(fields, dict):
        return
    _add_npm(source, str(fields.get("name") or name), fields, line)


def _add_npm(source: Source, name: str, fields: Mapping[str, Any], line: int | None) -> None:
    version = fields.get("version")
    if not isinstance(version, str) or "/" in version or ":" in version:
        return  # a folder or a URL, which has no version to compare
    licence, deprecated = fields.get("license"), fields.get("deprecated")
    source.parsed.locked.append(
        Locked(
            name,
            NPM,
            version,
            source.path,
            line,
            licence=licence if isinstance(licence, str) else None,
            deprecated=deprecated if isinstance(deprecated, str) else None,
        )
    )


def skip_lock(source: Source) -> None:
    """Note that a lock file is there and that its format is not read."""
    source.parsed.problem(f"{source.parsed.kind} is there, but its format is not read; its versions are unknown")


def _line_index(text: str, pattern: re.Pattern[str]) -> dict[str, list[int]]:
    """Return, for each name that `pattern` finds at the start of a line, its lines in reverse order."""
    index: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = pattern.match(line)
        if match:
            index.setdefault(match[1], []).append(number)
    for lines in index.values():
        lines.reverse()
    return index


def _next(lines: dict[str, list[int]], name: str) -> int | None:
    found = lines.get(name)
    return found.pop() if found else None

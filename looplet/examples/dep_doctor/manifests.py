"""Find dependency files by their names and read them with the parser of their kind."""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from looplet.examples.dep_doctor import locks, poetry
from looplet.examples.dep_doctor.model import NPM, PYPI, BrokenFileError, Dependency, Parsed, Problem, normalize
from looplet.examples.dep_doctor.project import read_text
from looplet.examples.dep_doctor.requirements import parse_constraints, parse_requirements
from looplet.examples.dep_doctor.source import Source
from looplet.examples.dep_doctor.versions import pinned_version

_LICENCE_PREFIX = "License :: "
_REQUIREMENTS = re.compile(r"(.*[-_.])?requirements([-_.].*)?\.(txt|in)")
_CONSTRAINTS = re.compile(r"(.*[-_.])?constraints([-_.].*)?\.txt")
_PYLOCK = re.compile(r"pylock(\.[^.]+)?\.toml")


def file_kind(path: PurePosixPath) -> tuple[str, str] | None:
    """Return kind and ecosystem of a dependency file, None for any other file."""
    if path.name in _NAMED:
        return _NAMED[path.name]
    if _PYLOCK.fullmatch(path.name):
        return "pylock.toml", PYPI
    if _CONSTRAINTS.fullmatch(path.name):
        return "constraints", PYPI
    in_folder = path.parent.name == "requirements" and path.suffix in {".txt", ".in"}
    return ("requirements", PYPI) if in_folder or _REQUIREMENTS.fullmatch(path.name) else None


def parse(root: Path, path: str, kind: str, ecosystem: str) -> Parsed:
    """Read one dependency file; a file that cannot be read has its reason in `.error`, and nothing is raised."""
    parsed = Parsed(path, kind, ecosystem, is_lock=kind in locks.LOCK_KINDS)
    try:
        source = Source(root, path, read_text(root / path), parsed)
        _PARSERS[kind](source)
    except BrokenFileError as error:
        parsed.error = Problem(path, error.message, error.line)
    return parsed


def parse_pyproject(source: Source) -> None:
    """Read `[project]`, `[dependency-groups]`, `[build-system]`, and the tables of Poetry, PDM and uv."""
    data = source.toml()
    project = source.table(data, "project")
    source.add_requirements("project.dependencies", project.get("dependencies"), "main")
    for extra, values in source.table(project, "optional-dependencies").items():
        source.add_requirements(f"optional-dependencies.{extra}", values, extra)
    _dependency_groups(source, source.table(data, "dependency-groups"))
    source.add_requirements("build-system.requires", source.table(data, "build-system").get("requires"), "build")
    source.add_requirements("tool.uv.dev-dependencies", source.table(data, "tool", "uv").get("dev-dependencies"), "dev")
    for group, values in source.table(data, "tool", "pdm", "dev-dependencies").items():
        source.add_requirements(f"tool.pdm.dev-dependencies.{group}", values, group)
    _poetry(source, data)
    _leave_out_itself(source, project.get("name"))
    source.parsed.licence = _pyproject_licence(project, source.table(data, "tool", "poetry"))
    dynamic = project.get("dynamic")
    if isinstance(dynamic, list) and "dependencies" in dynamic:
        source.parsed.problem("the dependencies are dynamic: they are not in this file", source.line_of("dynamic"))


def _leave_out_itself(source: Source, name: Any) -> None:
    """Drop the requirements that name the project itself, as in `all = ["project[a,b]"]`."""
    if isinstance(name, str):
        own = normalize(PYPI, name)
        source.parsed.dependencies = [entry for entry in source.parsed.dependencies if entry.key != own]


def _dependency_groups(source: Source, groups: Mapping[str, Any]) -> None:
    """Add PEP 735 groups; `{include-group = ...}` adds nothing, since the included group is read itself."""
    for group, values in groups.items():
        own = [value for value in values if not isinstance(value, dict)] if isinstance(values, list) else values
        source.add_requirements(f"dependency-groups.{group}", own, group)


def _poetry(source: Source, data: Mapping[str, Any]) -> None:
    poetry.add_table(source, source.table(data, "tool", "poetry", "dependencies"), "main")
    poetry.add_table(source, source.table(data, "tool", "poetry", "dev-dependencies"), "dev")
    for group in source.table(data, "tool", "poetry", "group"):
        table = source.table(data, "tool", "poetry", "group", group, "dependencies")
        poetry.add_table(source, table, group)


def _pyproject_licence(project: Mapping[str, Any], tool_poetry: Mapping[str, Any]) -> str | None:
    stated = project.get("license", tool_poetry.get("license"))
    if isinstance(stated, dict):
        stated = stated.get("text")
    if isinstance(stated, str) and stated.strip():
        return stated.strip()
    classifiers = project.get("classifiers")
    for classifier in classifiers if isinstance(classifiers, list) else ():
        if str(classifier).startswith(_LICENCE_PREFIX):
            return str(classifier)
    return None


def parse_setup_cfg(source: Source) -> None:
    """Read `install_requires`, `extras_require` and the licence of a setup.cfg."""
    config = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        config.read_string(source.text)
    except configparser.Error as error:
        line = getattr(error, "lineno", None)
        raise BrokenFileError(f"not a valid setup.cfg: {str(error).splitlines()[0]}", line) from error
    _requirement_lines(source, config.get("options", "install_requires", fallback=""), "main")
    if config.has_section("options.extras_require"):
        for extra, values in config.items("options.extras_require"):
            _requirement_lines(source, values, extra)
    source.parsed.licence = config.get("metadata", "license", fallback="").strip() or None


def _requirement_lines(source: Source, text: str, group: str) -> None:
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if not line.startswith(("#", "file:")):
            source.add_requirement(line, group, source.line_of(line))


def parse_pipfile(source: Source) -> None:
    """Read `[packages]` and `[dev-packages]` of a Pipfile."""
    data = source.toml()
    poetry.add_table(source, source.table(data, "packages"), "main")
    poetry.add_table(source, source.table(data, "dev-packages"), "dev")


def parse_package_json(source: Source) -> None:
    """Read the four dependency tables and the licence of a package.json."""
    data = source.json()
    for table, group in _NPM_TABLES.items():
        for name, specifier in source.table(data, table).items():
            _add_npm(source, name, specifier, group)
    source.parsed.licence = npm_licence(data)


def _add_npm(source: Source, name: str, specifier: Any, group: str) -> None:
    match = re.compile(rf'"{re.escape(name)}"\s*:\s*"{re.escape(str(specifier))}"').search(source.text)
    line = source.line_of(match[0]) if match else None
    if not isinstance(specifier, str):
        source.parsed.problem(f"the version of {name!r} must be a string, not {type(specifier).__name__}", line)
        return
    alias = re.fullmatch(r"npm:(@?[^@]+)(?:@(.*))?", specifier)
    if alias:
        name, specifier = alias[1], alias[2] or ""
    url = specifier if re.search(r"[/:]", specifier) else None
    wanted = "" if url else specifier.strip()
    source.parsed.dependencies.append(
        Dependency(name, NPM, source.path, line, wanted, pinned_version(NPM, wanted), group=group, url=url)
    )


def npm_licence(data: Mapping[str, Any]) -> str | None:
    """Return the licence that a package.json or a lock entry states, in its present or its older forms."""
    stated = data.get("license", data.get("licenses"))
    entries = stated if isinstance(stated, list) else [stated]
    names = [entry.get("type") if isinstance(entry, dict) else entry for entry in entries]
    return " OR ".join(name for name in names if isinstance(name, str) and name) or None


_NPM_TABLES = {
    "dependencies": "main",
    "optionalDependencies": "optional",
    "devDependencies": "dev",
    "peerDependencies": "peer",
}
_NAMED = {
    "pyproject.toml": ("pyproject", PYPI),
    "setup.cfg": ("setup.cfg", PYPI),
    "Pipfile": ("Pipfile", PYPI),
    "package.json": ("package.json", NPM),
    "uv.lock": ("uv.lock", PYPI),
    "poetry.lock": ("poetry.lock", PYPI),
    "pdm.lock": ("pdm.lock", PYPI),
    "Pipfile.lock": ("Pipfile.lock", PYPI),
    "package-lock.json": ("package-lock.json", NPM),
    "npm-shrinkwrap.json": ("package-lock.json", NPM),
    "yarn.lock": ("yarn.lock", NPM),
    "pnpm-lock.yaml": ("pnpm-lock.yaml", NPM),
}
_PARSERS: dict[str, Callable[[Source], None]] = {
    "pyproject": parse_pyproject,
    "setup.cfg": parse_setup_cfg,
    "Pipfile": parse_pipfile,
    "package.json": parse_package_json,
    "requirements": parse_requirements,
    "constraints": parse_constraints,
    "uv.lock": locks.parse_toml_lock,
    "poetry.lock": locks.parse_toml_lock,
    "pdm.lock": locks.parse_toml_lock,
    "pylock.toml": locks.parse_toml_lock,
    "Pipfile.lock": locks.parse_pipfile_lock,
    "package-lock.json": locks.parse_npm_lock,
    "yarn.lock": locks.skip_lock,
    "pnpm-lock.yaml": locks.skip_lock,
}

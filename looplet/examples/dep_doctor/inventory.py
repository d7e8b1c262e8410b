"""Everything the dependency files of a project say, by package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from looplet.errors import did_you_mean
from looplet.examples.dep_doctor.manifests import file_kind, parse
from looplet.examples.dep_doctor.model import PYPI, Dependency, Locked, Parsed, Problem, normalize
from looplet.examples.dep_doctor.project import Folder, Project


@dataclass(frozen=True, slots=True)
class Known:
    """A version that a package has in the project, and where that is written."""

    version: str
    source: str
    """`pinned` or `locked`"""
    file: str
    line: int | None


@dataclass(slots=True)
class Package:
    """One package of one ecosystem: the lines that ask for it and the lock entries that fix it."""

    ecosystem: str
    key: str
    name: str
    declared: list[Dependency] = field(default_factory=list)
    locked: list[Locked] = field(default_factory=list)

    def known(self) -> list[Known]:
        """Return each version once, with the pin before the lock entry that repeats it."""
        pins = [Known(entry.version, "pinned", entry.file, entry.line) for entry in self.declared if entry.version]
        locks = [Known(entry.version, "locked", entry.file, entry.line) for entry in self.locked]
        return list({known.version: known for known in reversed([*pins, *locks])}.values())[::-1]

    def open(self) -> list[Dependency]:
        """Return the declarations whose version neither a pin nor a lock file next to them fixes."""
        return [entry for entry in self.declared if not entry.version and not self.lock_for(entry)]

    def lock_for(self, dependency: Dependency) -> Locked | None:
        """Return the lock entry that decides the version of one declaration."""
        return next((entry for entry in self.locked if covers(entry.file, dependency.file)), None)

    @property
    def place(self) -> tuple[str, int | None]:
        """Return file and line of the first mention."""
        first = (self.declared or self.locked)[0]
        return first.file, first.line


def covers(lock: str, manifest: str) -> bool:
    """Tell whether a lock file stands beside a manifest or above it."""
    return PurePosixPath(lock).parent in PurePosixPath(manifest).parents


@dataclass(frozen=True, slots=True)
class Inventory:
    """The parsed dependency files of a project."""

    files: tuple[Parsed, ...]
    packages: dict[tuple[str, str], Package]
    """(ecosystem, normalised name) → package, in the order of the files"""

    @classmethod
    def read(cls, project: Project, folder: Folder) -> Inventory:
        """Parse every dependency file of `folder`."""
        kinds = [(str(path), kind) for path in folder.files if (kind := file_kind(path))]
        files = tuple(parse(project.path, path, kind, ecosystem) for path, (kind, ecosystem) in kinds)
        return cls(files, _packages(files))

    def broken(self) -> list[Problem]:
        """Return why files could not be read at all."""
        return [parsed.error for parsed in self.files if parsed.error]

    def problems(self) -> list[Problem]:
        """Return what could not be understood in files that could be read, each once."""
        return list(dict.fromkeys(problem for parsed in self.files for problem in parsed.problems))

    def is_locked(self, ecosystem: str, manifest: str) -> bool:
        """Tell whether a lock file that could be found covers the manifest."""
        return any(
            parsed.is_lock
            and parsed.ecosystem == ecosystem
            and parsed.path != manifest
            and covers(parsed.path, manifest)
            for parsed in self.files
        ) or any(parsed.is_lock and parsed.path == manifest for parsed in self.files)

    def select(self, names: Sequence[str] | None) -> tuple[list[Package], list[str]]:
        """Return the packages with these names (all without any), and a line for each name that is not there."""
        if not names:
            return list(self.packages.values()), []
        chosen: dict[tuple[str, str], Package] = {}
        missing = []
        for name in names:
            keys = [key for key in self.packages if key[1] == normalize(key[0], name)]
            chosen |= {key: self.packages[key] for key in keys}
            if not keys:
                known = [package.name for package in self.packages.values()]
                missing.append(f"{name!r} is not a dependency of this project{did_you_mean(name, known)}")
        return list(chosen.values()), missing

    def python_declared(self) -> dict[str, list[Dependency]]:
        """Return the declared Python packages: normalised name → declarations."""
        return {
            key: package.declared
            for (ecosystem, key), package in self.packages.items()
            if ecosystem == PYPI and package.declared
        }


def _packages(files: Sequence[Parsed]) -> dict[tuple[str, str], Package]:
    packages: dict[tuple[str, str], Package] = {}
    dependencies = dict.fromkeys(entry for parsed in files for entry in parsed.dependencies)
    locked = dict.fromkeys(entry for parsed in files for entry in parsed.locked)
    for dependency in dependencies:
        key = (dependency.ecosystem, dependency.key)
        packages.setdefault(key, Package(*key, dependency.name)).declared.append(dependency)
    constraints = {parsed.path for parsed in files if parsed.kind == "constraints"}
    for entry in locked:
        key = (entry.ecosystem, entry.key)
        if key in packages or entry.file not in constraints:  # a constraint alone asks for nothing
            packages.setdefault(key, Package(*key, entry.name)).locked.append(entry)
    return packages

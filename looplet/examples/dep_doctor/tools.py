"""The tools of the Dependency Doctor: plain functions over one project folder, which keep what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from looplet.errors import ErrorKind, ToolError
from looplet.examples.dep_doctor import imports, licences, maintenance, security
from looplet.examples.dep_doctor.advisories import AdvisoryIndex, load_advisories
from looplet.examples.dep_doctor.installed import imports_of_installed
from looplet.examples.dep_doctor.inventory import Inventory, Package
from looplet.examples.dep_doctor.manifests import file_kind, parse
from looplet.examples.dep_doctor.model import PARTS, PYPI, Finding, Parsed, Part
from looplet.examples.dep_doctor.project import Folder, Project, resolve_inside, walk
from looplet.examples.dep_doctor.report import Findings, ReportCard

MAX_SHOWN = 60
"""how many entries of a list a tool returns; the rest is counted, and the report holds all findings"""


def make_tools(project: Project, findings: Findings | None = None) -> list[Callable[..., dict[str, Any]]]:
    """Return the seven tools for one project folder.

    `findings` collects the evidence; pass your own to read it, and the last `ReportCard` in `.card`, afterwards.
    `ConfigError` when the folder of advisories cannot be used.
    """
    audit = Audit(project, findings if findings is not None else Findings())
    return [
        audit.detect_files,
        audit.parse_file,
        audit.check_security,
        audit.check_licences,
        audit.check_maintenance,
        audit.check_imports,
        audit.write_report,
    ]


class Audit:
    """One audit of one project; the public methods are its tools and can be called in any order."""

    def __init__(self, project: Project, findings: Findings) -> None:
        self.project = project
        self.findings = findings
        self._advisories: AdvisoryIndex = load_advisories(project.advisories_dir)
        self._online = project.source()
        self._checked: dict[Part, set[tuple[str, str]]] = {part: set() for part in PARTS}
        self._imports_checked = False

    @cached_property
    def folder(self) -> Folder:
        """The files of the project, listed once."""
        return walk(self.project)

    @cached_property
    def inventory(self) -> Inventory:
        """The dependency files of the project, parsed once."""
        inventory = Inventory.read(self.project, self.folder)
        self.findings.add(maintenance.check_files(inventory))
        return inventory

    def detect_files(self) -> dict[str, Any]:
        """Find the dependency files of the project: manifests, requirements files and lock files."""
        found = [(path, kind) for path in self.folder.files if (kind := file_kind(path))]
        files = [
            {"path": str(path), "kind": kind, "ecosystem": ecosystem, "bytes": self._size(path)}
            for path, (kind, ecosystem) in found
        ]
        python = sum(path.suffix == ".py" for path in self.folder.files)
        counts = {"files_in_project": len(self.folder.files), "python_files": python}
        return {"files": files[:MAX_SHOWN], **_more(files), **counts, **self._note()}

    def parse_file(self, path: str) -> dict[str, Any]:
        """Read one dependency file and list what it asks for and what it locks.

        Args:
            path: Path of the file, relative to the project folder, as detect_files lists it.
        """
        _, relative = resolve_inside(self.project.path, path)
        kind = file_kind(PurePosixPath(relative))
        if kind is None:
            raise ToolError(
                f"{path!r} is no dependency file that can be read; call detect_files", kind=ErrorKind.VALIDATION
            )
        return _describe(parse(self.project.path, relative, *kind))

    def check_security(self, names: list[str] | None = None) -> dict[str, Any]:
        """Look up known versions, and ranges that are not pinned, in the advisories.

        Args:
            names: Packages to check; leave it out to check all, locked ones included.
        """

        def check(package: Package) -> Sequence[Finding]:
            return security.check_package(
                package, self._advisories, use_installed=self.project.use_installed, online=self._online
            )

        return self._check("security", names, check)

    def check_licences(self, names: list[str] | None = None) -> dict[str, Any]:
        """Find each package's licence and compare it with the licence of the project.

        Args:
            names: Packages to check; leave it out to check all, locked ones included.
        """
        own = licences.project_licence(self.project, self.folder, self.inventory)
        result = self._check(
            "licence",
            names,
            lambda package: [licences.check_package(self.project, package, own)],
            licences.check_project(own, self.inventory),
        )
        return {"project_licence": own.name if own else "unknown", **result}

    def check_maintenance(self, names: list[str] | None = None) -> dict[str, Any]:
        """Look for loose or fragile version ranges, missing lock files, and packages that nobody maintains.

        Args:
            names: Packages to check; leave it out to check all, locked ones included.
        """

        def check(package: Package) -> Sequence[Finding]:
            found = maintenance.check_package(self.project, package, self.inventory)
            if self._online and package.ecosystem == PYPI and package.declared:
                found.append(maintenance.check_age(package, self._online, self.project.day()))
            return found

        result = self._check("maintenance", names, check, maintenance.check_locks(self.inventory))
        released = {
            entry.name: entry.released
            for package in self.inventory.select(names)[0]
            for entry in package.locked
            if entry.released
        }
        return {**result, "released": dict(list(released.items())[:MAX_SHOWN])}

    def check_imports(self) -> dict[str, Any]:
        """Compare the imports of the project's Python files with the packages that its manifests ask for."""
        files = [path for path in self.folder.files if path.suffix == ".py"]
        read = files[: self.project.max_python_files]
        found, findings = imports.read_imports(self.project.path, read)
        declared = self.inventory.python_declared()
        local = imports.Local(files, [parsed.path for parsed in self.inventory.files])
        installed = imports_of_installed() if self.project.use_installed else {}
        findings += imports.check_imports(found, declared, local, installed)
        if read and files == read:
            findings += imports.check_unused(found, declared, installed)
        self._imports_checked = True
        self.findings.add(findings)
        note = {"note": f"only the first {len(read)} of {len(files)} Python files were read"} if files != read else {}
        return {"python_files": len(read), **_outcome(findings), **note}

    def write_report(self, summary: str = "") -> dict[str, Any]:
        """Write the report card: grades by fixed rules from everything that was found so far.

        Args:
            summary: A few sentences for the reader, shown above the grades; it does not change them.
        """
        notes = list(self._note().values())
        card = ReportCard.of(self.project.path.name or "/", self._evidence(), summary, notes)
        self.findings.card = card
        parts = {part.name: {"grade": part.grade, "reason": part.reason} for part in card.parts}
        return {"parts": parts, "findings": sum(len(part.evidence) for part in card.parts), "text": card.to_text()}

    def _check(
        self,
        part: Part,
        names: list[str] | None,
        check: Callable[[Package], Sequence[Finding]],
        general: Iterable[Finding] = (),
    ) -> dict[str, Any]:
        packages, missing = self.inventory.select(names)
        findings = self.findings.add([*general, *(finding for package in packages for finding in check(package))])
        self._checked[part] |= {(package.ecosystem, package.key) for package in packages}
        result = {"packages": len(packages), **_outcome(findings)}
        return {**result, "not_found": missing} if missing else result

    def _evidence(self) -> list[Finding]:
        """Return everything found, and what no tool looked at."""
        missing = list(self._unchecked())  # reads the inventory, which may add findings
        return [*self.findings, *missing]

    def _unchecked(self) -> Iterable[Finding]:
        """Yield an unknown fact for each package and part that no tool looked at."""
        for part in PARTS:
            for key, package in self.inventory.packages.items():
                if key not in self._checked[part]:
                    fact = f"{package.name} was not checked"
                    yield Finding(
                        part, "not_checked", "unknown", package.name, fact, *package.place, ecosystem=package.ecosystem
                    )
        if not self._imports_checked and any(path.suffix == ".py" for path in self.folder.files):
            yield Finding(
                "maintenance", "not_checked", "unknown", "(project)", "imports were not checked", ".", ecosystem=PYPI
            )

    def _size(self, path: PurePosixPath) -> int | None:
        try:
            return (self.project.path / path).stat().st_size
        except OSError:
            return None

    def _note(self) -> dict[str, str]:
        if not self.folder.truncated:
            return {}
        return {"note": f"the folder has more than {self.project.max_files} files; the rest was not looked at"}


def _describe(parsed: Parsed) -> dict[str, Any]:
    """Return a parsed file as a small dict; `error` and `line` when it could not be read."""
    head = {"path": parsed.path, "kind": parsed.kind, "ecosystem": parsed.ecosystem}
    if parsed.error:
        return {**head, "error": parsed.error.message, "line": parsed.error.line}
    locked = [entry.to_dict() for entry in parsed.locked]
    result: dict[str, Any] = {**head, "dependencies": [entry.to_dict() for entry in parsed.dependencies][:MAX_SHOWN]}
    result |= _more(parsed.dependencies)
    result |= {"locked": locked[:MAX_SHOWN], "locked_count": len(locked)} if locked else {}
    result |= {"problems": [problem.to_dict() for problem in parsed.problems]} if parsed.problems else {}
    return result | ({"licence": parsed.licence} if parsed.licence else {})


def _outcome(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return what stands out, and how much is clean or unknown."""
    issues = [_brief(finding) for finding in findings if finding.severity not in {"info", "unknown"}]
    unknown = [finding.fact for finding in findings if finding.severity == "unknown"]
    clean = sum(finding.severity == "info" for finding in findings)
    return {"findings": issues[:MAX_SHOWN], **_more(issues), "unknown": unknown[:MAX_SHOWN], "clean": clean}


def _brief(finding: Finding) -> dict[str, Any]:
    return {
        "severity": finding.severity,
        "kind": finding.kind,
        "package": finding.package,
        "where": finding.place,
        "fact": finding.fact,
    }


def _more(entries: Sequence[object]) -> dict[str, int]:
    return {"left_out": len(entries) - MAX_SHOWN} if len(entries) > MAX_SHOWN else {}

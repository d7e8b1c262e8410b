"""The maintenance part: how versions are asked for, whether they are locked, and packages that nobody maintains."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

from looplet.errors import ToolError
from looplet.examples.dep_doctor.installed import installed
from looplet.examples.dep_doctor.inventory import Inventory, Package
from looplet.examples.dep_doctor.known import UNMAINTAINED
from looplet.examples.dep_doctor.model import PYPI, Dependency, Finding, Problem, Severity
from looplet.examples.dep_doctor.online import Online
from looplet.examples.dep_doctor.project import Project
from looplet.examples.dep_doctor.versions import is_prerelease, parse_range

STALE_DAYS = 3 * 365
"""a package whose latest release is older than this is worth a look"""


def check_package(project: Project, package: Package, inventory: Inventory) -> list[Finding]:
    """Return the maintenance findings of one package: at least one for each line that asks for it."""
    findings = list(_check_upkeep(project, package))
    for dependency in package.declared:
        findings.append(_check_declaration(dependency, inventory))
        findings += _check_prerelease(dependency)
    return findings


def _check_upkeep(project: Project, package: Package) -> Iterator[Finding]:
    """Look for signs that nobody maintains the package any more."""
    file, line = package.place
    severity: Severity = "high" if package.declared else "low"

    def finding(kind: str, severity: Severity, fact: str) -> Finding:
        return Finding("maintenance", kind, severity, package.name, fact, file, line, ecosystem=package.ecosystem)

    known = UNMAINTAINED.get((package.ecosystem, package.key))
    marked = next((entry for entry in package.locked if entry.deprecated), None)
    if known:
        yield finding("unmaintained", severity, f"{package.name} is unmaintained: {known[0]}; use {known[1]}")
    elif marked:
        file, line = marked.file, marked.line
        yield finding("deprecated", severity, f"{package.name} is marked as deprecated: {marked.deprecated}")
    hint = installed(package.name) if project.use_installed and package.ecosystem == PYPI else None
    if hint and hint.inactive and not known:
        fact = f"hint: this interpreter's {package.name} {hint.version} is marked as inactive by its authors"
        yield finding("inactive", "moderate", fact)


def _check_declaration(dependency: Dependency, inventory: Inventory) -> Finding:
    """Judge how a version is asked for."""
    kind, severity, fact = _range_verdict(dependency, inventory.is_locked(dependency.ecosystem, dependency.file))
    return Finding(
        "maintenance",
        kind,
        severity,
        dependency.name,
        f"{dependency.name} {fact}",
        dependency.file,
        dependency.line,
        ecosystem=dependency.ecosystem,
    )


def _range_verdict(dependency: Dependency, locked: bool) -> tuple[str, Severity, str]:
    if dependency.url:
        return "direct_url", "info" if _is_local(dependency.url) else "low", f"comes from {dependency.url}"
    if dependency.version:
        return _pin_verdict(dependency.version, locked)
    if dependency.group in {"build", "peer"}:
        return "wide_on_purpose", "info", f"is a {dependency.group} requirement, for which a wide range is usual"
    wanted = parse_range(dependency.ecosystem, dependency.specifier)
    if dependency.specifier in {"", "*", "latest"} or (wanted is not None and not wanted.bounds()):
        return "unbounded", "low" if locked else "moderate", "may be any version" + _kept(locked)
    if wanted is None:
        return "unclear_range", "low", f"asks for {dependency.specifier!r}, which is no version range"
    if not wanted.has_upper_bound():
        fact = f"asks for {dependency.specifier!r}, which has no upper bound" + _kept(locked)
        return "no_upper_bound", "info" if locked else "low", fact
    return "bounded", "info", f"asks for {dependency.specifier!r}"


def _pin_verdict(version: str, locked: bool) -> tuple[str, Severity, str]:
    if locked:
        return "pinned", "info", f"is pinned to {version}"
    return "pinned_without_lock", "low", f"is pinned to {version}, but no lock file fixes what it depends on"


def _kept(locked: bool) -> str:
    return "; the lock file keeps it at one" if locked else ""


def _is_local(url: str) -> bool:
    return url.startswith(("file:", "link:", "workspace:", ".", "/"))


def _check_prerelease(dependency: Dependency) -> Iterator[Finding]:
    if dependency.version and is_prerelease(dependency.ecosystem, dependency.version):
        fact = f"{dependency.name} is pinned to the pre-release {dependency.version}"
        yield Finding(
            "maintenance",
            "prerelease_pin",
            "low",
            dependency.name,
            fact,
            dependency.file,
            dependency.line,
            ecosystem=dependency.ecosystem,
        )


def check_locks(inventory: Inventory) -> Iterator[Finding]:
    """Yield a finding for each manifest that no lock file covers; one that only asks for build tools needs none."""
    for parsed in inventory.files:
        asks = any(entry.group not in {"build", "peer"} for entry in parsed.dependencies)
        if asks and not parsed.is_lock and not inventory.is_locked(parsed.ecosystem, parsed.path):
            fact = f"no {parsed.ecosystem} lock file fixes the versions that {parsed.path} asks for"
            yield Finding(
                "maintenance", "no_lock_file", "moderate", "(project)", fact, parsed.path, 1, "", parsed.ecosystem
            )


def check_files(inventory: Inventory) -> Iterator[Finding]:
    """Yield what could not be read; a broken file also leaves security and licence unknown."""
    for problem in inventory.broken():
        fact = f"{problem.file} cannot be read: {problem.message}"
        yield Finding("maintenance", "broken_file", "high", "(project)", fact, problem.file, problem.line)
        yield _unread("security", problem)
        yield _unread("licence", problem)
    for problem in inventory.problems():
        yield Finding("maintenance", "unclear_entry", "low", "(project)", problem.message, problem.file, problem.line)


def _unread(part: str, problem: Problem) -> Finding:
    fact = f"what {problem.file} asks for is unknown, because it cannot be read"
    return Finding(
        "security" if part == "security" else "licence",
        "unread_file",
        "unknown",
        "(project)",
        fact,
        problem.file,
        problem.line,
    )


def check_age(package: Package, online: Online, today: date) -> Finding:
    """Ask for the day of the latest release of a Python package, and judge it."""
    file, line = package.place

    def finding(kind: str, severity: Severity, fact: str) -> Finding:
        return Finding("maintenance", kind, severity, package.name, fact, file, line, ecosystem=package.ecosystem)

    try:
        day = online.last_release(package.name)
    except ToolError as error:
        return finding("unknown_age", "unknown", f"{package.name}: {error.message}")
    if day is None:
        return finding("unknown_age", "unknown", f"{package.name}: the day of its latest release is not known")
    age = (today - date.fromisoformat(day)).days
    if age > STALE_DAYS:
        return finding("stale", "low", f"{package.name} had its latest release on {day}, {age} days before {today}")
    return finding("recent", "info", f"{package.name} had its latest release on {day}")

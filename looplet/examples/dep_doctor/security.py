"""The security part: known versions and open specifiers against the advisories."""

from __future__ import annotations

from collections.abc import Iterator

from looplet.errors import ToolError
from looplet.examples.dep_doctor.advisories import Advisory, AdvisoryIndex, Affected, merge_aliases
from looplet.examples.dep_doctor.installed import installed
from looplet.examples.dep_doctor.inventory import Known, Package
from looplet.examples.dep_doctor.model import PYPI, Dependency, Finding, Severity
from looplet.examples.dep_doctor.online import Online

CLEAN = "no known advisory in the snapshot"
CLEAN_ONLINE = "no known advisory in the snapshot or at the OSV API"
LESSER: dict[Severity, Severity] = {"critical": "moderate", "high": "moderate"}
"""how an advisory weighs when the affected version is possible, but not known to be used; else `low`"""


def check_package(
    package: Package, index: AdvisoryIndex, *, use_installed: bool, online: Online | None
) -> list[Finding]:
    """Return the security findings of one package: at least one for each version and each open declaration."""
    findings = [finding for known in package.known() for finding in _check_version(package, known, index, online)]
    for dependency in package.open():
        findings += _check_open(package, dependency, index, use_installed=use_installed)
    return findings


def _check_version(package: Package, known: Known, index: AdvisoryIndex, online: Online | None) -> Iterator[Finding]:
    what = f"{package.name} {known.version} ({known.source})"

    def finding(kind: str, severity: Severity, fact: str, reference: str = "") -> Finding:
        return Finding(
            "security", kind, severity, package.name, fact, known.file, known.line, reference, package.ecosystem
        )

    try:
        hits, asked = _matches(package, known.version, index, online)
    except ValueError as error:
        yield finding("unknown_version", "unknown", f"{what} cannot be compared with advisories: {error}")
        return
    for advisory, affected in hits:
        fact = f"{what} is affected by {advisory.label}{_fix(affected, known.version)}: {advisory.summary}"
        yield finding("affected", advisory.severity, fact, advisory.id)
    if asked:
        yield finding("not_asked", "unknown", f"{what}: {asked}")
    if not hits and not asked:
        yield finding("clean", "info", f"{what}: {CLEAN_ONLINE if online else CLEAN}")


def _matches(
    package: Package, version: str, index: AdvisoryIndex, online: Online | None
) -> tuple[list[tuple[Advisory, Affected]], str]:
    """Return the advisories that affect a version, and why the network was of no help (empty when it was)."""
    hits = dict(index.matching(package.ecosystem, package.key, version))
    if online is None:
        return list(hits.items()), ""
    try:
        answers = online.advisories(package.ecosystem, package.name, version)
    except ToolError as error:
        return list(hits.items()), error.message
    for advisory in answers:
        entry = next((entry for entry in advisory.affected if _is_about(entry, package)), None)
        if entry:
            hits.setdefault(advisory, entry)
    return [(advisory, hits[advisory]) for advisory in merge_aliases(hits)], ""


def _is_about(affected: Affected, package: Package) -> bool:
    return affected.ecosystem == package.ecosystem and affected.key == package.key


def _fix(affected: Affected, version: str | None) -> str:
    fixed = affected.fixed_in(version)
    return f" (fixed in {fixed})" if fixed else " (no fixed version is recorded)"


def _check_open(
    package: Package, dependency: Dependency, index: AdvisoryIndex, *, use_installed: bool
) -> Iterator[Finding]:
    """Judge a declaration whose version is not known: by what it allows, and by the installed version as a hint."""

    def finding(kind: str, severity: Severity, fact: str, reference: str = "") -> Finding:
        return Finding(
            "security",
            kind,
            severity,
            package.name,
            fact,
            dependency.file,
            dependency.line,
            reference,
            package.ecosystem,
        )

    asked_for = (
        f"{package.name} {dependency.specifier}".strip() if dependency.specifier else f"{package.name} (any version)"
    )
    allowed = [] if dependency.url else _allowed(package, dependency.specifier, index)
    for advisory, affected in allowed:
        fact = f"{asked_for} still allows affected versions: {advisory.label}{_fix(affected, None)}"
        yield finding("allows_affected", LESSER.get(advisory.severity, "low"), fact, advisory.id)
    hint = installed(package.name) if use_installed and package.ecosystem == PYPI else None
    if hint:
        yield from _check_hint(package, dependency, hint.version, index)
    elif not allowed:
        reason = f"comes from {dependency.url}" if dependency.url else "is neither pinned nor locked"
        yield finding("unknown_version", "unknown", f"{package.name} {reason}, so its version is unknown")


def _allowed(package: Package, specifier: str, index: AdvisoryIndex) -> list[tuple[Advisory, Affected]]:
    about = index.about(package.ecosystem, package.key)
    hits = {advisory: affected for advisory, affected in reversed(about) if affected.allowed_by(specifier)}
    return list(hits.items())[::-1]


def _check_hint(package: Package, dependency: Dependency, version: str, index: AdvisoryIndex) -> Iterator[Finding]:
    """Judge the version that this interpreter has; the project may well be used with another one."""
    what = f"hint: this interpreter has {package.name} {version}"
    place = (dependency.file, dependency.line)
    try:
        hits = dict(index.matching(package.ecosystem, package.key, version))
    except ValueError:
        return
    for advisory, affected in hits.items():
        fact = f"{what}, which is affected by {advisory.label}{_fix(affected, version)}"
        severity = LESSER.get(advisory.severity, "low")
        yield Finding("security", "hint_affected", severity, package.name, fact, *place, advisory.id, package.ecosystem)
    if not hits:
        yield Finding(
            "security", "hint_clean", "info", package.name, f"{what}: {CLEAN}", *place, ecosystem=package.ecosystem
        )

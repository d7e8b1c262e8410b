"""The licence part: what each package states, what that asks for, and whether it goes with the project's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from looplet.errors import ToolError
from looplet.examples.dep_doctor.installed import installed
from looplet.examples.dep_doctor.inventory import Inventory, Package
from looplet.examples.dep_doctor.manifests import npm_licence
from looplet.examples.dep_doctor.model import NPM, PYPI, Finding, Severity
from looplet.examples.dep_doctor.project import Folder, Project, read_text, resolve_inside
from looplet.examples.dep_doctor.spdx import category, goes_with, identify, identify_text

_LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING", "UNLICENSE")
_OFFLINE_GROUPS = {"dev", "test", "tests", "docs", "lint", "build", "typing"}


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence and where it was found."""

    name: str
    """an SPDX identifier or expression, or the words of the source when they are not known"""
    file: str
    line: int | None = None
    note: str = ""


def project_licence(project: Project, folder: Folder, inventory: Inventory) -> Licence | None:
    """Return the project's own licence: from a manifest nearest to the top, or else from a licence file there."""
    stated = [parsed for parsed in inventory.files if parsed.licence]
    for parsed in sorted(stated, key=lambda parsed: parsed.path.count("/")):
        return Licence(identify(parsed.licence or ""), parsed.path)
    for path in folder.files:
        if len(path.parts) == 1 and path.stem.upper() in _LICENCE_FILES:
            found = _licence_of_text(project.path / path)
            if found:
                return Licence(found, str(path), 1)
    return None


def _licence_of_text(path: Path) -> str | None:
    try:
        return identify_text(read_text(path))
    except ToolError:
        return None


def package_licence(project: Project, package: Package) -> Licence | None:
    """Return what a package states: in the lock file, in its own folder, or (as a hint) in the interpreter."""
    for entry in package.locked:
        if entry.licence:
            return Licence(identify(entry.licence), entry.file, entry.line)
    if package.ecosystem == NPM:
        return _from_node_modules(project, package)
    return _from_interpreter(package) if project.use_installed else None


def _from_node_modules(project: Project, package: Package) -> Licence | None:
    files = [entry.file for entry in package.declared] + [entry.file for entry in package.locked]
    for manifest in dict.fromkeys(files):
        path = PurePosixPath(manifest).parent / "node_modules" / package.name / "package.json"
        try:
            target, relative = resolve_inside(project.path, str(path))
            data = json.loads(read_text(target))
        except (ToolError, ValueError):
            continue
        stated = npm_licence(data) if isinstance(data, dict) else None
        if stated:
            return Licence(identify(stated), relative)
    return None


def _from_interpreter(package: Package) -> Licence | None:
    """Take the installed licence when the project may use the installed version, or does use it."""
    hint = installed(package.name)
    versions = {known.version for known in package.known()}
    if hint is None or not hint.licence or (versions and hint.version not in versions):
        return None
    file, line = package.place
    return Licence(identify(hint.licence), file, line, f"hint from this interpreter's {package.name} {hint.version}")


def check_package(project: Project, package: Package, own: Licence | None) -> Finding:
    """Return the one licence finding of a package."""
    found = package_licence(project, package)
    file, line = package.place

    def finding(kind: str, severity: Severity, fact: str) -> Finding:
        return Finding("licence", kind, severity, package.name, fact, file, line, ecosystem=package.ecosystem)

    if found is None:
        where = "the lock file or node_modules" if package.ecosystem == NPM else "what is at hand offline"
        return finding("unknown_licence", "unknown", f"{package.name}: no licence in {where}")
    file, line = found.file, found.line
    note = f"; {found.note}" if found.note else ""
    kind, severity, fact = _verdict(package, found, own)
    return finding(kind, severity, f"{package.name} is under {found.name!r} ({category(found.name)}{note}){fact}")


def _verdict(package: Package, found: Licence, own: Licence | None) -> tuple[str, Severity, str]:
    """Return kind, severity, and the rest of the sentence."""
    kind = category(found.name)
    if kind == "unknown":
        return "unclear_licence", "unknown", ", which is not judged here"
    if own is None and kind in {"permissive", "weak copyleft"}:
        return kind.replace(" ", "_"), "info", ""
    if own is None:
        return "not_judged", "unknown", "; the project states no licence to compare it with"
    fits = goes_with(found.name, own.name)
    if fits is None:
        return "not_judged", "unknown", f"; whether that goes with the project's {own.name!r} needs a person"
    if fits:
        return kind.replace(" ", "_"), "info", f", which goes with the project's {own.name!r}"
    fact = f", which does not go with the project's {own.name!r}"
    if _is_tool(package):
        return "licence_conflict", "low", f"{fact}, but only tools of the project use it"
    return "licence_conflict", "high", fact


def _is_tool(package: Package) -> bool:
    """Tell whether a package is only asked for by groups that are not shipped."""
    return bool(package.declared) and all(entry.group in _OFFLINE_GROUPS for entry in package.declared)


def check_project(own: Licence | None, inventory: Inventory) -> Sequence[Finding]:
    """Return a finding when the project itself states no licence."""
    if own is not None or not inventory.packages:
        return ()
    manifest = next((parsed for parsed in inventory.files if parsed.kind in {"pyproject", "package.json"}), None)
    where = manifest.path if manifest else inventory.files[0].path
    ecosystem = manifest.ecosystem if manifest else PYPI
    fact = "the project states no licence in a manifest or a LICENSE file, so nothing can be compared with it"
    return (Finding("licence", "no_project_licence", "low", "(project)", fact, where, ecosystem=ecosystem),)

"""Compare what the project's Python files import with what its manifests ask for."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from looplet.examples.dep_doctor.known import IMPORT_NAMES
from looplet.examples.dep_doctor.model import PYPI, Dependency, Finding, Severity, normalize

MAX_BYTES = 1_000_000
_TEST_FOLDERS = {"test", "tests", "testing"}
_NOT_FOR_IMPORT = ("types-", "pytest-", "mypy-", "flake8-")
_ROOTS = {"src", "lib"}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement of a file."""

    name: str
    """dotted, with the imported name at the end for `from a import b`"""
    file: str
    line: int
    optional: bool
    """below `if TYPE_CHECKING`, or in a `try` that survives an ImportError"""

    @property
    def top(self) -> str:
        """Return the first part of the name."""
        return self.name.partition(".")[0]

    @property
    def in_tests(self) -> bool:
        """Tell whether the file belongs to the tests."""
        path = PurePosixPath(self.file)
        return bool(_TEST_FOLDERS & set(path.parts[:-1])) or path.name.startswith(("test_", "conftest"))


def read_imports(root: Path, files: Sequence[PurePosixPath]) -> tuple[list[Import], list[Finding]]:
    """Return the absolute imports of the files, and a finding for each file that is not valid Python."""
    imports: list[Import] = []
    findings: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about the code under audit
        for file in files:
            found = _read_file(root / file, str(file))
            if isinstance(found, Finding):
                findings.append(found)
            else:
                imports += found
    return imports, findings


def _read_file(path: Path, name: str) -> list[Import] | Finding:
    try:
        if path.stat().st_size > MAX_BYTES:
            return _unread(name, f"it has more than {MAX_BYTES} bytes", None)
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        return _unread(name, f"syntax error: {error.msg}", error.lineno)
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # ValueError: a null byte
        return _unread(name, str(error) or type(error).__name__, None)
    return list(_imports(tree, name))


def _unread(file: str, reason: str, line: int | None) -> Finding:
    fact = f"{file} is not checked for imports: {reason}"
    return Finding("maintenance", "unread_source", "low", "(project)", fact, file, line, ecosystem=PYPI)


def _imports(tree: ast.Module, file: str) -> Iterator[Import]:
    waiting: list[tuple[ast.AST, bool]] = [(tree, False)]
    while waiting:
        node, optional = waiting.pop()
        for name in _names(node):
            yield Import(name, file, getattr(node, "lineno", 1), optional)
        waiting += [(child, optional or _guards(node, child)) for child in ast.iter_child_nodes(node)]


def _names(node: ast.AST) -> Iterable[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return [f"{node.module}.{alias.name}".removesuffix(".*") for alias in node.names]
    return ()


def _guards(node: ast.AST, child: ast.AST) -> bool:
    """Tell whether `node` makes the imports in `child` optional."""
    if isinstance(node, ast.If):
        return child in node.body and "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Try):
        caught = [ast.unparse(handler.type) if handler.type else "Exception" for handler in node.handlers]
        survives = any(word in name for name in caught for word in ("ImportError", "ModuleNotFound", "Exception"))
        return survives and (child in node.body or child in node.handlers)
    return False


class Local:
    """The import names that the project's own files provide."""

    def __init__(self, files: Iterable[PurePosixPath], manifests: Iterable[str]) -> None:
        roots = {PurePosixPath(), *(PurePosixPath(manifest).parent for manifest in manifests)}
        roots |= {root / name for root in roots for name in _ROOTS}
        self._everywhere: set[str] = set()
        self._beside: dict[PurePosixPath, set[str]] = {}
        for file in files:
            for folder in file.parents:
                name = file.relative_to(folder).parts[0].removesuffix(".py")
                self._beside.setdefault(folder, set()).add(name)
                self._everywhere |= {name} if folder in roots else set()

    def provides(self, entry: Import) -> bool:
        """Tell whether an import finds its module at the top, in `src`, beside a manifest or beside its own file."""
        return entry.top in self._everywhere or entry.top in self._beside.get(PurePosixPath(entry.file).parent, ())


def providers(name: str, installed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the normalised names of packages that may provide a dotted import, likely ones first."""
    parts = name.split(".")
    prefixes = [parts[: length + 1] for length in range(min(3, len(parts)))]
    listed = [package for prefix in reversed(prefixes) for package in IMPORT_NAMES.get(".".join(prefix), ())]
    known = [normalize(PYPI, package) for package in installed.get(parts[0], ())]
    alike = [normalize(PYPI, "-".join(prefix)) for prefix in prefixes if all(prefix)]
    top = normalize(PYPI, parts[0])
    return list(dict.fromkeys([*listed, *known, *alike, f"python-{top}", f"py{top}"]))


def check_imports(
    imports: Sequence[Import],
    declared: Mapping[str, Sequence[Dependency]],
    local: Local,
    installed: Mapping[str, Sequence[str]],
) -> list[Finding]:
    """Return undeclared imports, and imports by the code of what only a group of tools asks for."""
    foreign = [entry for entry in imports if _is_foreign(entry, local)]
    return [finding for entry in _first_of_each(foreign) for finding in _check_import(entry, declared, installed)]


def check_unused(
    imports: Sequence[Import], declared: Mapping[str, Sequence[Dependency]], installed: Mapping[str, Sequence[str]]
) -> list[Finding]:
    """Return the packages of the main group that no file imports; `imports` are those of all files."""
    used = {package for entry in imports for package in providers(entry.name, installed)}
    return [finding for key, asked in declared.items() if key not in used for finding in _check_unused(asked)]


def _is_foreign(entry: Import, local: Local) -> bool:
    return entry.top not in sys.stdlib_module_names and not local.provides(entry)


def _first_of_each(imports: Sequence[Import]) -> list[Import]:
    """Return the first import of each package, a required one before an optional one, the code before its tests."""
    ordered = sorted(imports, key=lambda entry: (entry.optional, entry.in_tests, entry.file, entry.line))
    return list({entry.top: entry for entry in reversed(ordered)}.values())[::-1]


def _check_import(
    entry: Import, declared: Mapping[str, Sequence[Dependency]], installed: Mapping[str, Sequence[str]]
) -> Iterator[Finding]:
    candidates = providers(entry.name, installed)
    asked = [dependency for package in candidates for dependency in declared.get(package, ())]
    if not asked:
        severity: Severity = "info" if entry.optional else "moderate"
        kind = "optional_import" if entry.optional else "undeclared_import"
        fact = f"{entry.top} is imported, but no manifest asks for it (probably the package {candidates[0]!r})"
        yield _finding(kind, severity, entry.top, fact, entry.file, entry.line)
    elif not entry.in_tests and not entry.optional and all(_is_tool_group(dependency.group) for dependency in asked):
        fact = f"{entry.top} is imported by the code, but only asked for in the group {asked[0].group!r}"
        yield _finding("import_of_dev_package", "low", asked[0].name, fact, entry.file, entry.line)


def _check_unused(asked: Sequence[Dependency]) -> Iterator[Finding]:
    """Yield a finding for a package of the main group that no file imports; tools and stubs need no import."""
    first = next((dependency for dependency in asked if dependency.group == "main" and not dependency.url), None)
    if first and not first.key.startswith(_NOT_FOR_IMPORT):
        fact = f"{first.name} is asked for, but no Python file imports it (it may still be used as a command or plugin)"
        yield _finding("unused_dependency", "low", first.name, fact, first.file, first.line)


def _is_tool_group(group: str) -> bool:
    return group in {"dev", "test", "tests", "testing", "docs", "lint", "typing", "build"}


def _finding(kind: str, severity: Severity, package: str, fact: str, file: str, line: int | None) -> Finding:
    return Finding("maintenance", kind, severity, package, fact, file, line, ecosystem=PYPI)

"""The folder under audit: its settings, the files in it, and the rule that nothing outside of it is read."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.examples.dep_doctor.model import BrokenFileError

if TYPE_CHECKING:
    from looplet.examples.dep_doctor.online import Online

SKIPPED_FOLDERS = frozenset(
    {".git", ".hg", ".svn", "node_modules", ".venv", "venv", "site-packages", "__pycache__", ".tox", ".nox", ".eggs"}
    | {".mypy_cache", ".pytest_cache", ".ruff_cache"}
)
MAX_BYTES = 20_000_000


@dataclass(frozen=True, slots=True)
class Project:
    """What is audited, and with which sources.

    `path` is the project folder; `ConfigError` when there is none.  `advisories_dir` replaces the shipped snapshot with
    a folder of OSV files.  `online` is True, or an `Online` with addresses of its own.
    """

    path: Path
    advisories_dir: Path | None = None
    online: bool | Online = False
    use_installed: bool = True
    """take hints from the packages that the running interpreter has installed"""
    max_files: int = 20_000
    """how many files of the folder are looked at"""
    max_python_files: int = 2_000
    today: date | None = None
    """the day to measure ages from; None for the real one"""

    def __post_init__(self) -> None:
        root = Path(self.path).expanduser().resolve()
        if not root.is_dir():
            raise ConfigError(f"there is no folder {str(self.path)!r}; pass the folder of a project")
        object.__setattr__(self, "path", root)

    def day(self) -> date:
        """Return the day that ages are measured from."""
        return self.today or datetime.now(UTC).date()

    def source(self) -> Online | None:
        """Return where to ask when the audit may use the network."""
        from looplet.examples.dep_doctor.online import Online

        if isinstance(self.online, Online):
            return self.online
        return Online() if self.online else None


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of a project, relative and in order, without those of tools and environments."""

    files: tuple[PurePosixPath, ...]
    truncated: bool = False
    """the folder has more files than were looked at"""


def walk(project: Project) -> Folder:
    """List the files below the project folder.

    Folders that are symbolic links are not entered, so a loop of links ends; a file that is a link counts only when
    it leads to a file inside the project.  Folders that `excluded` names are left out.
    """
    found: list[PurePosixPath] = []
    left_out = excluded(project.path)
    waiting = [project.path]
    while waiting:
        files, folders = _entries(waiting.pop(), project.path)
        found += files
        if len(found) > project.max_files:
            return Folder(tuple(sorted(found[: project.max_files])), truncated=True)
        waiting += [path for path in reversed(folders) if path.relative_to(project.path).as_posix() not in left_out]
    return Folder(tuple(sorted(found)))


def excluded(root: Path) -> frozenset[str]:
    """Return the folders that the project's own pyproject.toml leaves out: `[tool.dep-doctor] exclude = [...]`."""
    try:
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dep-doctor"]
        return frozenset(str(PurePosixPath(str(name))) for name in settings["exclude"])
    except (OSError, ValueError, KeyError, TypeError):  # a broken file is a finding, told where it is parsed
        return frozenset()


def _entries(folder: Path, root: Path) -> tuple[list[PurePosixPath], list[Path]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not ours to read
        return [], []
    if folder != root and any(entry.name == "pyvenv.cfg" for entry in entries):
        return [], []
    files = [_relative(Path(entry.path), root) for entry in entries if _is_own_file(entry, root)]
    folders = [
        Path(entry.path)
        for entry in entries
        if entry.is_dir(follow_symlinks=False) and entry.name not in SKIPPED_FOLDERS
    ]
    return files, folders


def _is_own_file(entry: os.DirEntry[str], root: Path) -> bool:
    try:
        return entry.is_file() and (not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(root))
    except (OSError, RuntimeError):  # RuntimeError: a link to itself, before Python 3.13
        return False


def _relative(path: Path, root: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(root).as_posix())


def resolve_inside(root: Path, path: str) -> tuple[Path, str]:
    """Return the file that `path` names and its path relative to `root`; `ToolError` when it is outside or missing."""
    try:
        target = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ToolError(f"{path!r} is not a usable path: {error}", kind=ErrorKind.VALIDATION) from error
    if not target.is_relative_to(root):
        raise ToolError(
            f"{path!r} is outside the project folder and is not read; pass a path that detect_files lists",
            kind=ErrorKind.PERMISSION_DENIED,
        )
    if not target.is_file():
        raise ToolError(f"there is no file {path!r} in the project; call detect_files", kind=ErrorKind.VALIDATION)
    return target, target.relative_to(root).as_posix()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; `BrokenFileError` when it is too large, unreadable or not UTF-8."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BrokenFileError(f"the file has {size} bytes; only files up to {MAX_BYTES} bytes are read")
        data = path.read_bytes()
    except OSError as error:
        raise BrokenFileError(f"the file cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BrokenFileError(f"the file is not UTF-8 text: {error.reason}; save it as UTF-8", line) from error

"""Trace files: append lines without ever leaving damage behind, and read files that others damaged.

A process can die, and a disk can fill up, in the middle of a line.  The writer takes back what it wrote in part, and
before it appends to a file it moves a torn last line out of the way.  Where it can do neither, it writes a line with
the key `looplet.recovered` after the damage.  The reader skips exactly these two kinds of damage and refuses any other.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from looplet.errors import TraceError
from looplet.telemetry import semconv
from looplet.telemetry.otlp_decode import SpanRecord, parse_json, spans_in

_MARKER: Final = b'\n{"resourceSpans":[],"%b":true}\n' % semconv.RECOVERED.encode()
_STREAMS: Final = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")  # may be files, but not ours to repair
_BLOCK: Final = 64 * 1024
_BOM: Final = b"\xef\xbb\xbf"


# --- writing --------------------------------------------------------------------------------------------------------


class OtlpFile:
    """A trace file to append to.  It is opened (and its folder created) by the first `write`.

    Not thread-safe: the caller writes from one thread at a time.  Other processes may append to the same file.  With
    `fsync`, `write` returns once the data are on the disk.  Pipes and terminals work too, without repair.
    """

    def __init__(self, path: str | os.PathLike[str], *, fsync: bool = False) -> None:
        self.path = Path(path)
        self._fsync = fsync
        self._fd: int | None = None
        self._gone = ""  # why there is no writing any more
        self._is_file = False
        self._is_named = False
        self._glue = b""  # to be written before the next line

    def write(self, data: bytes) -> None:
        """Append whole lines: all of `data` or, where the system allows, none of it.

        Raises OSError when they could not be written, or after `close` or `disown`.
        """
        if not data:
            return
        fd = self._fd if self._fd is not None else self._open()
        found = os.fstat(fd)
        if self._is_named and not found.st_nlink:
            raise FileNotFoundError(errno.ENOENT, "the file was removed while it was written to", str(self.path))
        start = found.st_size
        data = self._glue + data
        written: list[int] = []  # bytes; `extend` notes them before a Ctrl-C during the system call can raise
        try:
            _write_all(fd, data, written)
            if self._fsync and self._is_file:
                os.fsync(fd)
        except BaseException:
            self._take_back(fd, start, sum(written))
            raise
        self._glue = b""

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        fd, self._fd = self._fd, None
        self._gone = self._gone or "is closed"
        if fd is not None:
            os.close(fd)

    def disown(self) -> None:
        """Forget the file, without touching it: in a forked child it belongs to the parent."""
        self._fd = None
        self._gone = "belongs to the parent process; open another file in this one"

    def _open(self) -> int:
        if self._gone:
            raise OSError(errno.EBADF, f"this trace file {self._gone}", str(self.path))
        if self._fd is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            fd = os.open(self.path, flags, 0o666)
            found = os.fstat(fd)
            self._is_file = stat.S_ISREG(found.st_mode) and not os.fspath(self.path).startswith(_STREAMS)
            self._is_named = self._is_file and found.st_nlink > 0
            if self._is_file:
                self._glue = self._repair(fd)
            self._fd = fd
        return self._fd

    def _repair(self, fd: int) -> bytes:
        """Move a torn last line to `<name>.torn`; return what has to come before the next line."""
        try:
            size, tail = _tail(self.path)
            if not tail:
                return b""
            if _is_json(tail):
                return b"\n"  # complete, only not ended
            with self.path.with_name(self.path.name + ".torn").open("ab") as torn:
                torn.write(tail + b"\n")
            if os.fstat(fd).st_size == size:
                os.ftruncate(fd, size - len(tail))
                return b""
        except OSError:
            pass  # no room, or no permission: mark the damage instead
        return _MARKER

    def _take_back(self, fd: int, start: int, written: int) -> None:
        """Cut off what a failed write left behind, unless somebody else has written since."""
        if not self._is_file:
            self._glue = _MARKER if written else self._glue
            return
        try:
            size = os.fstat(fd).st_size
            if size == start + written:
                os.ftruncate(fd, start)
                return
        except OSError:
            pass
        self._glue = _MARKER


def _write_all(fd: int, data: bytes, written: list[int]) -> None:
    """Write; a function by itself, so that a Ctrl-C at the end of the loop is raised inside the `try` of its caller."""
    while sum(written) < len(data):
        written.extend(map(os.write, (fd,), (memoryview(data)[sum(written) :] if written else data,)))


def claim(path: str | os.PathLike[str], pause: str) -> bool:
    """Note in a trace file who goes on from a pause; tell whether nobody else had before.

    `pause`: the id of the span that paused.  Whoever's line comes first has won, whichever process wrote it.  The line
    is on the disk before this returns.  Raises TraceError where it cannot be written.
    """
    mark = b'"%b":"%b"' % (semconv.RESUMED.encode(), pause.encode())
    line = b'{"resourceSpans":[],%b,"%b":"%b"}' % (mark, semconv.CLAIM.encode(), os.urandom(8).hex().encode())
    try:
        if _first_with(path, mark):
            return False
        file = OtlpFile(path, fsync=True)
        try:
            file.write(line + b"\n")
        finally:
            file.close()
        return _first_with(path, mark) == line
    except OSError as error:
        words = f"the run cannot go on in this file ({error.strerror or error}), and so nothing was run"
        raise TraceError(words, path=os.fspath(path)) from error


def _first_with(path: str | os.PathLike[str], mark: bytes) -> bytes:
    with Path(path).open("rb") as lines:
        return next((line.strip() for line in lines if mark in line), b"")


def require_lines(path: str | os.PathLike[str]) -> None:
    """Raise TraceError for a trace to which no line can be added: packed, or one document on several lines."""
    with Path(path).open("rb") as lines:
        first = next(filter(bytes.strip, lines), b"")
    if not _is_json(first.removeprefix(_BOM)):
        words = "a run goes on only in a file of plain OTLP JSON lines; unpack this one, or take its trace.jsonl"
        raise TraceError(words, path=os.fspath(path))


def _tail(path: Path) -> tuple[int, bytes]:
    """Return the size of the file and what comes after its last newline."""
    with path.open("rb") as file:
        position = size = file.seek(0, os.SEEK_END)
        tail = b""
        while position and b"\n" not in tail:
            step = min(_BLOCK, position)
            position -= step
            file.seek(position)
            tail = file.read(step) + tail
    return size, tail.rpartition(b"\n")[2]


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(parse_json(data), dict)
    except ValueError:
        return False


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a file that could not be used and was left out; `line` counts from 1."""

    line: int
    message: str


@dataclass(frozen=True, slots=True)
class FileContents:
    """What a trace file holds: spans in the file's order, and what had to be left out."""

    spans: list[SpanRecord]
    problems: list[Problem]


def read_file(path: str | os.PathLike[str]) -> FileContents:
    """Read OTLP JSON: lines, one document or an array, also as Jaeger's API v3 returns it, also gzipped.

    Left out and reported are: a torn last line, damage that its writer marked, and lines of other signals.  Raises
    `TraceError` for a file that cannot be read, for any other damage, and for a file in which nothing is a trace.
    """
    where = os.fspath(path)
    data = _read(where)
    spans: list[SpanRecord] = []
    problems: list[Problem] = []
    is_trace = False
    for item in _items(data, where):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        line, document = item
        found = _spans(document, where, line)
        if found is None:
            problems.append(Problem(line, f"{_signal(document)} instead of spans"))
        else:
            is_trace = True
            spans += found
    if not is_trace:
        _require_torn_trace(data, where, problems)
    return FileContents(spans, problems)


def _read(path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except IsADirectoryError:
        raise TraceError("this is a folder; name the file in it, such as trace.jsonl", path=path) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"the gzip data are damaged ({error}); unpack what is left with `zcat`", path=path) from error
    except OSError as error:
        raise TraceError(f"cannot read the file: {error.strerror or error}", path=path) from error
    return data.removeprefix(_BOM)


def _items(data: bytes, path: str) -> Iterator[tuple[int, Any] | Problem]:
    """Yield the JSON documents of a file with the lines they begin at, and the damage that may be skipped."""
    damage: list[Problem] = []
    is_first = True
    for line, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            document = parse_json(text)
        except ValueError as error:
            if is_first and (documents := _pretty_printed(data)):
                yield from documents
                return
            damage.append(Problem(line, f"this line is damaged ({error})"))
        else:
            if damage and not (isinstance(document, dict) and semconv.RECOVERED in document):
                raise _damaged(damage[0], path)
            yield from damage
            damage.clear()
            yield line, document
        is_first = False
    if len(damage) > 1:
        raise _damaged(damage[0], path)
    yield from damage


def _damaged(problem: Problem, path: str) -> TraceError:
    if problem.line == 1:
        return TraceError(
            f"{problem.message}: is this a trace file? One holds a JSON document in each line", path=path, line=1
        )
    advice = "only a torn last line can be skipped; delete this line if what it said can be lost"
    return TraceError(f"{problem.message}: {advice}", path=path, line=problem.line)


def _pretty_printed(data: bytes) -> list[tuple[int, Any]]:
    """Return the documents of a text that has them on several lines each; none if any of it is damaged."""
    documents = []
    try:
        text = data.decode()
        position = _after_space(text, 0)
        while position < len(text):
            _, end = json.JSONDecoder().raw_decode(text, position)
            documents.append((text.count("\n", 0, position) + 1, parse_json(text[position:end].encode())))
            position = _after_space(text, end)
    except (ValueError, RecursionError):
        return []
    return documents


def _after_space(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip())


def _spans(document: Any, path: str, line: int) -> list[SpanRecord] | None:
    try:
        return spans_in(document, line=line)
    except ValueError as error:
        raise TraceError(f"this JSON is not a valid trace: {error}", path=path, line=line) from error


def _signal(document: Any) -> str:
    keys = document if isinstance(document, dict) else {}
    for key, signal in (("resourceMetrics", "OTLP metrics"), ("resourceLogs", "OTLP logs"), ("data", "Jaeger's JSON")):
        if key in keys:
            return signal
    return "other JSON"


def _require_torn_trace(data: bytes, path: str, problems: list[Problem]) -> None:
    """Raise TraceError, but for a file whose only line is the beginning of one of ours."""
    if not data.strip():
        raise TraceError("the file is empty: nothing was recorded", path=path)
    beginning = b'{"resourceSpans":'
    if beginning.startswith(data.lstrip()[: len(beginning)]):
        return
    found = problems[0].message
    raise TraceError(f"this is not an OTLP trace: {found}; wanted are lines with the key 'resourceSpans'", path=path)

"""`ProvenanceSink`: the exporter that writes a run's spans to `trace.jsonl`, and a readable folder around it.

The file is the artifact; everything else in the folder is rendered from it by `flush`.  looplet's own spans come
straight from the recorder.  It is also an OpenTelemetry `SpanExporter` by shape (`export`, `shutdown`, `force_flush`),
for spans of somebody else's: `provider.add_span_processor(SimpleSpanProcessor(sink))`.

Taking a span is a `list.append`: lock-free, so that a run collected in the middle of encoding can end its spans.
Writing happens at durable points only, under a lock, and no code of the caller's runs under it.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from looplet.arguments import strict_names
from looplet.boundary import Boundary
from looplet.errors import ConfigError, TraceError
from looplet.hooks import SINK
from looplet.telemetry import semconv
from looplet.telemetry.folder import clear_folder, write_folder
from looplet.telemetry.otlp import encode_spans
from looplet.telemetry.otlp_file import OtlpFile
from looplet.telemetry.recorder import Recorder, count_drop

TRACE_FILE: Final = "trace.jsonl"
MAX_UNWRITTEN: Final = 8 << 20
"""bytes kept for later when the disk refuses them; beyond, they are dropped and counted"""

MAX_KNOWN_RUNS: Final = 1024
"""of how many past runs an exporter's late spans are recognised"""

_sinks: weakref.WeakSet[ProvenanceSink] = weakref.WeakSet()


class ProvenanceSink:
    """Write runs to `dir/trace.jsonl`; pass it as `hooks=[sink]`, or wrap the backend: `llm=sink.wrap_llm(llm)`.

    redact: maps each string that enters a run to what may be seen of it, by the provider too unless
    `redact_upstream=False`.  fsync: have each durable point reach the disk, not just the operating system.
    A new run into a folder that holds one starts afresh; the old file becomes `trace-<trace id>.jsonl`.
    """

    @strict_names()
    def __init__(
        self,
        dir: str | os.PathLike[str],  # noqa: A002 - the name that users know
        *,
        redact: Callable[[str], str] | None = None,
        redact_upstream: bool = True,
        fsync: bool = False,
    ) -> None:
        if redact is not None and not callable(redact):
            raise ConfigError(f"redact must be a function from str to str, not {type(redact).__name__}")
        self.dir = Path(dir)
        self.redact = redact
        self.redact_upstream = redact_upstream
        self._fsync = fsync
        self._file: OtlpFile | None = None
        self._pending: list[Any] = []
        """what was taken and is not encoded"""
        self._unwritten = b""
        self._refused = ""
        """why the last write failed, empty after a success"""
        self._lock = threading.RLock()
        self._writer: int | None = None
        """the thread that is writing"""
        self._runs: set[str] = set()
        self._direct: dict[str, None] = {}
        self._inherited = False
        _sinks.add(self)

    @property
    def looplet_sink(self) -> ProvenanceSink:
        """Return the sink itself: what makes it one in `hooks=[...]`."""
        return self

    @property
    def path(self) -> Path:
        """Return the trace file's path."""
        return self._file.path if self._file is not None else self.dir / TRACE_FILE

    def wrap_llm(self, llm: Any, *, async_: bool | None = None) -> Any:
        """Return the backend with this sink attached; it keeps every capability and every argument."""
        return SinkedBackend(llm, self)

    def trajectory_hook(self) -> ProvenanceSink:
        """Return what to put into `hooks=[...]`: the sink itself will do."""
        return self

    def flush(self) -> Path:
        """Write everything, render the readable folder, return its path.  Raises TraceError where that is refused."""
        self.durable()
        problem = self._refused
        try:
            if not problem and self.path.exists():
                write_folder(self.path)
        except OSError as error:
            problem = str(error)
        if problem:
            words = f"not written ({problem}); make room, or give the sink another folder"
            raise TraceError(words, path=str(self.path))
        return self.dir

    # --- for runs ---------------------------------------------------------------------------------------------------

    def attach(self, recorder: Recorder) -> None:
        """Begin to write a run; the first one into a finished folder starts the file afresh."""
        self.durable()  # spans that ended after their run belong to its file, not to this one
        problems: list[tuple[str, str]] = []
        with self._lock:
            if not self._runs:
                if recorder.file is None:
                    self._open_file(recorder.run_id, problems)
                else:
                    self._go_on_in(_file_of(self.dir, recorder.run_id, recorder.file) or recorder.file)
            self._runs.add(recorder.run_id)
            self._direct[recorder.run_id] = None
            if len(self._direct) > MAX_KNOWN_RUNS:
                del self._direct[next(iter(self._direct))]
        for cause, detail in problems:
            count_drop(cause, detail)

    def file_of(self, run_id: str) -> Path | None:
        """Return the file in the sink's folder that holds a run, None when there is none."""
        return _file_of(self.dir, run_id)

    def unfit_for(self, run_id: str, file: Path | None) -> str:
        """Return why this sink cannot go on with a run that was paused, empty when it can.

        `file`: what holds the run's segments so far, None where nothing does.
        """
        found = None if file is None else _file_of(self.dir, run_id, file)
        if found is None:
            words = "which no file holds" if file is None else f"which are in {file}"
            return f"a run is one file, and this sink's folder ({self.dir}) has not the segments before, {words}"
        if self._runs and not _is_same(self.path, found):
            return f"this sink is writing another run into {self.path}, and the run goes on in {found}"
        return ""

    def on_end(self, span: Any) -> None:
        """Take an ended span."""
        self._pending.append(span)

    def durable(self) -> None:
        """Write what was taken so far.  Never raises: what cannot be written is kept, then counted."""
        here = threading.get_ident()
        if self._writer == here:  # a run was collected in the middle of writing, which takes what it left
            return
        problems: list[tuple[str, str]] = []
        with self._lock:
            self._writer = here
            try:
                self._write_pending(problems)
            finally:
                self._writer = None
        for cause, detail in problems:
            count_drop(cause, detail)

    def detach(self, recorder: Recorder) -> None:
        """End writing a run."""
        with self._lock:
            self._runs.discard(recorder.run_id)

    # --- opentelemetry.sdk.trace.export.SpanExporter ----------------------------------------------------------------

    def export(self, spans: Sequence[Any]) -> Any:
        """Write spans of a tracer provider; those of runs that this sink records anyway are passed over."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        from looplet.telemetry.router import copy_redacted, run_of

        boundary = Boundary(self.redact)
        for span in spans:
            run_id = (span.attributes or {}).get(semconv.RUN_ID) or run_of(span.context)
            if run_id not in self._direct:
                self.on_end(copy_redacted(span, boundary))
        self.durable()
        return SpanExportResult.FAILURE if self._unwritten else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Write what is left.  The sink can still be used afterwards."""
        self.durable()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Write what is left; tell whether all of it was."""
        self.durable()
        return not self._unwritten

    # --- inside -----------------------------------------------------------------------------------------------------

    def _go_on_in(self, path: Path) -> None:
        if self._file is not None and _is_same(self._file.path, path):
            return
        if self._file is not None:
            self._file.close()
        self._file = OtlpFile(path, fsync=self._fsync)

    def _open_file(self, run_id: str, problems: list[tuple[str, str]]) -> None:
        if self._file is not None:
            self._file.close()
        if self._inherited:  # the folder's file belongs to the parent process
            self._file = OtlpFile(self.dir / f"trace-{run_id}.jsonl", fsync=self._fsync)
            return
        path = self.dir / TRACE_FILE
        try:
            set_aside(path)
            clear_folder(self.dir)
        except OSError as error:
            problems.append(("an older trace could not be set aside", repr(error)))
        self._file = OtlpFile(path, fsync=self._fsync)

    def _write_pending(self, problems: list[tuple[str, str]]) -> None:
        while self._pending or self._unwritten:  # else an older trace stays where it is
            if self._file is None:
                self._open_file("export", problems)
            assert self._file is not None
            batch = self._pending[:]
            count = len(batch)
            lines = encode_spans(
                batch, on_error=lambda _, error: problems.append(("a span could not be encoded", repr(error)))
            )
            # No call between these two, and so no Ctrl-C: it leaves every span in exactly one of the two places.
            del self._pending[:count]
            self._unwritten += lines
            try:
                self._file.write(self._unwritten)
            except OSError as error:
                self._refused = str(error)
                problems.append(("the trace could not be written", f"{self._file.path}: {error}"))
                self._forget_excess(problems)
                return
            self._unwritten, self._refused = b"", ""

    def _forget_excess(self, problems: list[tuple[str, str]]) -> None:
        if len(self._unwritten) > MAX_UNWRITTEN:
            problems.append(("spans were dropped", f"{len(self._unwritten)} bytes that could not be written"))
            self._unwritten = b""

    def _disown(self) -> None:
        """In a forked child: the file, and what was to be written to it, are the parent's."""
        self._lock = threading.RLock()
        self._writer = None
        self._pending = []
        self._unwritten = b""
        self._runs = set()
        if self._file is not None:
            self._file.disown()
            self._file = None
            self._inherited = True


class SinkedBackend:
    """A backend with a sink attached; everything else is the backend's own."""

    def __init__(self, inner: Any, sink: ProvenanceSink) -> None:
        self.inner = inner
        setattr(self, SINK, sink)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for these before there is an `inner`
            raise AttributeError(name)
        return getattr(self.inner, name)


def _file_of(folder: Path, run_id: str, file: Path | None = None) -> Path | None:
    """Return the trace file in a folder that holds a run, None when there is none; `file` is known to hold it."""
    if file is not None and _is_same(file.parent, folder):
        return file
    mark = b'{"key":"%b","value":{"stringValue":"%b"}}' % (semconv.RUN_ID.encode(), run_id.encode())
    for path in [folder / TRACE_FILE, *sorted(folder.glob("trace-*.jsonl"))]:
        if path.exists():
            with path.open("rb") as lines:
                if any(mark in line for line in lines):
                    return path
    return None


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def set_aside(path: Path) -> Path | None:
    """Rename an existing trace file after its trace; return the new path, None when there is no file."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open("rb") as file:
        head = file.read(4096)
    _, _, after = head.partition(b'"traceId":"')
    trace_id = after[:32].decode("ascii", "replace")
    name = trace_id if len(trace_id) == 32 and trace_id.isalnum() else "unknown"
    target = path.with_name(f"trace-{name}.jsonl")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"trace-{name}-{number}.jsonl")
    path.rename(target)
    return target


@atexit.register
def _write_rest() -> None:
    for sink in list(_sinks):
        sink.durable()


def _disown_sinks() -> None:
    for sink in list(_sinks):
        sink._disown()  # noqa: SLF001 - same module


os.register_at_fork(after_in_child=_disown_sinks)

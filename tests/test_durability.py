"""What is left when a run is killed, the disk is full, or the folder is gone; and that the run never notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import make_tools

from looplet import ProvenanceSink, Trace, composable_loop
from looplet.telemetry import semconv
from looplet.telemetry.otlp_file import OtlpFile, read_file
from looplet.testing import ScriptedBackend

HERE = Path(__file__).parent
KILLS = 50
SEED = 20
ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "3"})


def python(*arguments) -> str:
    """Run a Python of its own to its end; return what it printed, fail if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def ids_of(spans) -> set[str]:
    return {record.span_id for record in spans}


# --- kill -9 --------------------------------------------------------------------------------------------------------


@dataclass
class Killed:
    """What a killed run left behind."""

    number: int
    begun: list[str]
    """ids of the calls whose tool began to work"""
    finished: list[str]
    """ids of the calls that the caller got as steps"""
    trace: Trace | None
    """None when the run was killed before it had written anything"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> list[Killed]:
    folder = tmp_path_factory.mktemp("killed")
    signals = python(HERE / "killed_run.py", folder, SEED, KILLS).split()[1::2]
    assert signals == [str(int(signal.SIGKILL))] * KILLS
    return [left_behind(number, folder / str(number)) for number in range(KILLS)]


def left_behind(number: int, folder: Path) -> Killed:
    file = folder / "run" / "trace.jsonl"
    written = file.exists() and file.stat().st_size > 0
    notes = [folder / name for name in ("begun", "finished")]
    begun, finished = (path.read_text().split() if path.exists() else [] for path in notes)
    return Killed(number, begun, finished, Trace.load(file) if written else None)


def test_a_killed_run_loads_and_at_most_its_last_line_is_torn(killed):
    for left in killed:
        if left.trace is None:
            assert (left.begun, left.finished) == ([], [])
            continue
        lines = Path(left.trace.path).read_bytes().count(b"\n")
        assert [problem.line for problem in left.trace.problems] in ([], [lines + 1])
    assert sum(left.trace is not None and len(left.finished) > 0 for left in killed) > KILLS / 2


def test_a_killed_run_keeps_every_step_that_its_caller_got(killed):
    for left in killed:
        runs = left.trace.runs if left.trace else []
        saved = {step.tool_call.call_id for run in runs for step in run.steps}
        assert set(left.finished) <= saved, left.number


def test_a_killed_run_is_interrupted_and_has_its_task(killed):
    for left in killed:
        if left.trace and left.trace.runs:
            (run,) = left.trace.runs
            assert (run.stop_reason, run.task) == ("interrupted", {"goal": "be killed"})
            assert run.root.synthetic


def test_every_span_of_a_killed_run_has_its_run_and_turn_above_it(killed):
    for left in killed:
        if left.trace is None or not left.trace.runs:
            continue
        assert [root.name.split()[0] for root in left.trace.roots] == [semconv.INVOKE_AGENT], left.number
        for node in left.trace.spans:
            assert node.run_id == left.trace.roots[0].run_id
            turns = [above for above in (node, *node.ancestors()) if above.name == semconv.TURN]
            assert [turn.turn_number for turn in turns] == ([node.turn_number] if node.turn_number else [])


def test_calls_that_began_and_have_no_end_are_listed(killed):
    seen = 0
    for left in killed:
        if left.trace is None or not left.trace.runs:
            continue
        (run,) = left.trace.runs
        saved = {step.tool_call.call_id for step in run.steps}
        unfinished = {call.call_id for call in run.unfinished_calls}
        assert not unfinished & saved
        assert set(left.begun) <= unfinished | saved, left.number
        seen += bool(set(left.begun) & unfinished)
    assert seen > 0  # some were killed in the middle of a tool


# --- torn lines -----------------------------------------------------------------------------------------------------


def test_a_run_torn_at_any_byte_damages_nothing_but_the_torn_line(tmp_path):
    for _ in composable_loop(ScriptedBackend([DONE]), {"goal": "g"}, make_tools(), hooks=[ProvenanceSink(tmp_path)]):
        pass
    whole = (tmp_path / "trace.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    file = tmp_path / "torn.jsonl"
    ends, complete = {0: set()}, set()
    for number, line in enumerate(lines):
        file.write_bytes(line)
        complete = complete | ids_of(read_file(file).spans)
        ends[sum(map(len, lines[: number + 1]))] = complete
    file.write_bytes(lines[-1])
    last = ids_of(read_file(file).spans)
    for cut in range(1, len(whole)):
        file.write_bytes(whole[:cut])
        writer = OtlpFile(file)
        writer.write(lines[-1])
        writer.close()
        after = read_file(file)
        kept = ends[max(end for end in ends if end <= cut)] | ends.get(cut + 1, set())
        assert (ids_of(after.spans), after.problems) == (kept | last, []), cut


# --- a full disk ----------------------------------------------------------------------------------------------------

SCRIPT = """
    import json, logging, os, resource, shutil, signal, sys, tempfile
    from pathlib import Path
    from looplet import ProvenanceSink, composable_loop, tool, tools_from
    from looplet.telemetry import recorder
    from looplet.testing import ScriptedBackend

    logged = []
    class Keep(logging.Handler):
        def emit(self, record):
            logged.append(record.getMessage())
    logging.getLogger("looplet").addHandler(Keep())

    @tool
    def echo(text: str) -> str:
        "Return the text."
        return text

    def limit(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    folder = Path(sys.argv[1])
    replies = [*(("echo", {"text": f"text {n} " + "x" * 50}) for n in range(20)), ("done", {"answer": "ok"})]

    def run(sink, on_step=lambda number: None):
        tools = tools_from([echo], include_done=True)
        hooks = [sink] if sink else []
        loop = composable_loop(ScriptedBackend(replies), {"goal": "g"}, tools, hooks=hooks, max_steps=50)
        said = []
        for step in loop:
            said.append([step.number, step.tool_call.tool, step.tool_result.data, step.tool_result.error])
            on_step(step.number)
        return said, loop.stop_reason

    def flushed(sink):
        try:
            sink.flush()
        except Exception as error:
            return type(error).__name__, str(error)

    def report(*said, **more):
        same = all(one == run(None) for one in said)
        print(json.dumps({"same": same, "drops": recorder.drops, "logged": logged, **more}))
"""


def hurt(body: str, folder: Path) -> dict:
    """Run SCRIPT and `body` in a process of its own; return what it reported."""
    return json.loads(python("-c", textwrap.dedent(SCRIPT) + textwrap.dedent(body), folder))


def only(logged: list[str], drops: dict[str, int]) -> None:
    """Require that something was lost, and that every kind of loss was logged once."""
    assert drops
    assert all(sum(cause in line for line in logged) == 1 for cause in drops)
    assert len(logged) == len(drops)


def test_a_full_disk_does_not_change_the_run_and_costs_only_what_did_not_fit(tmp_path):
    found = hurt(
        """
        def fill(number):
            if number == 6:
                limit((folder / "trace.jsonl").stat().st_size + 700)
        sink = ProvenanceSink(folder)
        report(run(sink, fill), flush=flushed(sink))
        """,
        tmp_path,
    )
    assert found["same"]
    only(found["logged"], found["drops"])
    kind, words = found["flush"]
    assert kind == "TraceError"
    assert str(tmp_path / "trace.jsonl") in words
    trace = Trace.load(tmp_path)
    (run,) = trace.runs
    assert trace.problems == []
    assert run.stop_reason == "interrupted"
    assert [step.number for step in run.steps][:6] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_has_room_again_gets_what_was_kept(tmp_path):
    found = hurt(
        """
        def fill(number):
            if number == 6:
                limit((folder / "trace.jsonl").stat().st_size + 700)
            if number == 12:
                limit(resource.RLIM_INFINITY)
        sink = ProvenanceSink(folder)
        report(run(sink, fill), flush=flushed(sink))
        """,
        tmp_path,
    )
    assert (found["same"], found["flush"]) == (True, None)
    only(found["logged"], found["drops"])
    (run,) = Trace.load(tmp_path).runs
    assert (run.stop_reason, len(run.steps)) == ("done", 21)
    assert Trace.load(tmp_path).problems == []


# --- folders that cannot be written ---------------------------------------------------------------------------------

BAD_FOLDERS = {
    "read-only": """
        run(ProvenanceSink(folder / "warm"))    # whatever is imported late is imported now
        with tempfile.TemporaryDirectory(prefix=folder.name) as bad:
            os.chmod(bad, 0o555)
            if os.geteuid() == 0:
                os.seteuid(65534)               # permissions do not bind root
            sink = ProvenanceSink(bad)
            said, flush = run(sink), flushed(sink)
            os.seteuid(os.getuid())
    """,
    "out of reach": """
        run(ProvenanceSink(folder / "warm"))
        (folder / "bad").mkdir()
        folder.chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        sink = ProvenanceSink(folder / "bad")
        said, flush = run(sink), flushed(sink)
        os.seteuid(os.getuid())
        folder.chmod(0o755)
    """,
    "below a file": """
        (folder / "file").write_text("not a folder")
        sink = ProvenanceSink(folder / "file" / "bad")
        said, flush = run(sink), flushed(sink)
    """,
    "a file": """
        (folder / "bad").write_text("not a folder")
        sink = ProvenanceSink(folder / "bad")
        said, flush = run(sink), flushed(sink)
    """,
    "removed": """
        bad = folder / "bad"
        sink = ProvenanceSink(bad)
        said, flush = run(sink, lambda number: number == 6 and shutil.rmtree(bad)), flushed(sink)
    """,
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_cannot_be_written_does_not_change_the_run(kind, tmp_path):
    found = hurt(textwrap.dedent(BAD_FOLDERS[kind]) + "\nreport(said, flush=flush)", tmp_path)
    assert found["same"]
    only(found["logged"], found["drops"])
    kind, words = found["flush"]
    assert kind == "TraceError"
    assert tmp_path.name in words


# --- a folder that holds a run --------------------------------------------------------------------------------------


def run_into(folder: Path, *replies) -> str:
    sink = ProvenanceSink(folder)
    run = composable_loop(ScriptedBackend([*replies, DONE]), {"goal": "g"}, make_tools(), hooks=[sink])
    for _ in run:
        pass
    sink.flush()
    assert run.trace_id is not None
    return run.trace_id


def derived(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("trace")}


def test_a_new_run_sets_the_old_file_aside_and_replaces_what_was_derived(tmp_path):
    foreign = {"notes.txt", "steps/mine.json", "call_notes.txt"}
    first = run_into(tmp_path, ADD, ADD, ADD)
    for name in foreign:
        (tmp_path / name).write_text("mine")
    before = derived(tmp_path)
    second = run_into(tmp_path, ADD)
    assert [run.trace_id for run in Trace.load(tmp_path).runs] == [second]
    assert [run.trace_id for run in Trace.load(tmp_path / f"trace-{first}.jsonl").runs] == [first]
    assert before - derived(tmp_path) == {
        f"{kind}.{end}"
        for n in (2, 3)
        for kind, end in (
            (f"call_{n:02}_prompt", "txt"),
            (f"call_{n:02}_response", "txt"),
            (f"steps/step_{n + 1:02}", "json"),
        )
    }
    assert foreign <= derived(tmp_path)
    assert {(tmp_path / name).read_text() for name in foreign} == {"mine"}
    assert json.loads((tmp_path / "trajectory.json").read_bytes())["trace_id"] == second


def test_a_trace_set_aside_never_replaces_another(tmp_path):
    first = run_into(tmp_path)
    (tmp_path / f"trace-{first}.jsonl").write_text("another")
    run_into(tmp_path)
    assert (tmp_path / f"trace-{first}.jsonl").read_text() == "another"
    assert [run.trace_id for run in Trace.load(tmp_path / f"trace-{first}-2.jsonl").runs] == [first]

"""`looplet demo`: the Dependency Doctor over real folders, with rules or with a model, scored from its trace."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support import environment, python

from looplet import Deny, EvalContext, Message, ProvenanceSink, Trace, eval_discover, eval_run
from looplet.cli import main
from looplet.cli.demo import EVALS
from looplet.examples.dep_doctor.agent import make_run
from looplet.examples.dep_doctor.policy import decide, history, rule_based_backend
from looplet.examples.dep_doctor.project import Project
from looplet.testing import Fault, OpenAIServer, ScriptedBackend

ROOT = Path(__file__).resolve().parent.parent
ENDPOINT = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL")


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    """Work in an empty folder, without an endpoint."""
    for name in ENDPOINT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def demo(*arguments):
    """Run the demo in this process; `--no-installed` keeps it the same on every machine."""
    return CliRunner().invoke(main, ["demo", *map(str, arguments), "--no-installed"])


def write(folder: Path, **files: str) -> Path:
    """Make a folder of files; `__` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


PACKAGE = json.dumps({"name": "x", "license": "MIT", "dependencies": {"lodash": "4.17.20"}}, indent=1)
PYPROJECT = '[project]\nname = "x"\nversion = "1"\nlicense = "MIT"\ndependencies = [\n  "PyYAML==5.3.1",\n]\n'


def both_worlds(folder: Path) -> Path:
    return write(folder, package__json=PACKAGE, pyproject__toml=PYPROJECT, main__py="import yaml\nimport requests\n")


def steps_of(output: str) -> list[str]:
    """Return the tools of the printed steps."""
    return re.findall(r"(?m)^#\d+ [✓✗] (\w+)\(", output)


def check_output(result, folder: Path) -> None:
    """Require what every demo must show: steps, report card, scores, trace, commands, and no line that is too long."""
    assert result.exit_code == 0, result.output
    text = result.stdout
    order = [
        "detect_files",
        "DEPENDENCY DOCTOR",
        "SECURITY",
        "LICENCE",
        "MAINTENANCE",
        "Scored from",
        "Trace: ",
        "Next:",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert text.count("✓ eval_") == 3
    too_long = [line for line in text.splitlines() if len(line) > 100 and "/" not in line]
    assert not too_long
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert Trace.load(folder).runs[0].stop_reason == "done"


def card_of(*arguments) -> dict:
    result = demo(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# --- kinds of folders -------------------------------------------------------------------------------------------------


def test_a_python_and_javascript_project_is_audited_in_full(tmp_path):
    result = demo(both_worlds(tmp_path / "p"), "--trace-dir", "t")
    check_output(result, tmp_path / "t")
    assert "no OPENAI_* endpoint is set: a rule-based policy decides each call" in result.stdout
    assert steps_of(result.stdout) == [
        "detect_files",
        "parse_file",
        "parse_file",
        "check_security",
        "check_licences",
        "check_maintenance",
        "check_imports",
        "write_report",
        "done",
    ]
    for fact in (
        "lodash 4.17.20 (pinned) is affected by",
        "PyYAML 5.3.1 (pinned) is affected by",
        "requests is imported",
    ):
        assert fact in " ".join(result.stdout.split())


def test_this_repository_is_audited(tmp_path):
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("pyproject.toml is in the checkout only")
    result = demo(ROOT, "--trace-dir", "t")
    check_output(result, tmp_path / "t")
    assert "parse_file(path='pyproject.toml')" in result.stdout


def test_the_sources_of_an_installed_package_are_audited(tmp_path):
    shutil.copytree(Path(click.__file__).parent, tmp_path / "click")
    result = demo("click", "--trace-dir", "t")
    check_output(result, tmp_path / "t")
    assert steps_of(result.stdout) == ["detect_files", "check_imports", "write_report", "done"]


def test_a_broken_manifest_is_a_finding(tmp_path):
    write(tmp_path / "p", pyproject__toml="[project\nname = 1\n")
    result = demo("p", "--trace-dir", "t")
    check_output(result, tmp_path / "t")
    assert re.search(r"high\s+pyproject.toml:1 — pyproject.toml cannot be read: not valid TOML", result.stdout)
    assert steps_of(result.stdout) == ["detect_files", "parse_file", "write_report", "done"]
    grades = {part: says["grade"] for part, says in card_of("p")["card"]["parts"].items()}
    assert grades == {"security": "unknown", "licence": "unknown", "maintenance": "D"}


def test_an_empty_folder_has_no_grades(tmp_path):
    (tmp_path / "p").mkdir()
    result = demo("p", "--trace-dir", "t")
    check_output(result, tmp_path / "t")
    assert steps_of(result.stdout) == ["detect_files", "write_report", "done"]
    assert "There is no dependency file in this folder." in result.stdout


def test_only_package_json_needs_no_look_at_imports(tmp_path):
    write(tmp_path / "p", package__json=PACKAGE)
    result = demo("p", "--trace-dir", "t")
    check_output(result, tmp_path / "t")
    assert "check_imports" not in result.stdout
    assert "SECURITY      D" in result.stdout


def test_names_in_a_project_cannot_control_the_terminal(tmp_path):
    evil = json.dumps({"dependencies": {"evil\x1b[31m\x07\u202e": "1.0.0"}})
    result = demo(write(tmp_path / "p", package__json=evil), "--trace-dir", "t")
    check_output(result, tmp_path / "t")


def test_the_current_folder_and_a_new_trace_folder_are_the_defaults(tmp_path):
    both_worlds(tmp_path)
    for _ in range(2):
        assert demo().exit_code == 0
    folders = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert len(folders) == 2
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", name) for name in folders)
    assert {"trace.jsonl", "trajectory.json"} <= {path.name for path in (tmp_path / "traces" / folders[0]).iterdir()}


# --- what comes after -------------------------------------------------------------------------------------------------


def test_the_printed_commands_work(tmp_path):
    both_worlds(tmp_path / "a project")
    output = demo("a project", "--trace-dir", "my traces/one").stdout.replace("\\\n", " ")
    commands = [shlex.split(line) for line in output.splitlines() if line.startswith("  looplet ")]
    assert [command[1] for command in commands] == ["show", "eval"]
    for command in commands:
        result = CliRunner().invoke(main, command[1:])
        assert result.exit_code == 0, result.output
    assert "eval_grades_follow_from_evidence" in result.stdout
    assert "docker compose up" in output
    assert str(tmp_path / "my traces") in output


def test_json_is_one_document_and_the_steps_go_to_stderr(tmp_path):
    both_worlds(tmp_path / "p")
    result = demo("p", "--trace-dir", "t", "--json")
    told = json.loads(result.stdout)
    assert told["passed"] is True
    assert told["card"]["parts"]["security"]["grade"] == "F"
    assert [score["score"] for score in told["evals"]] == [1.0, 1.0, 1.0]
    assert told["trace_id"] == Trace.load(told["trace"]).runs[0].trace_id
    assert "#1 ✓ detect_files()" in result.stderr


def test_advisories_of_ones_own_replace_the_snapshot(tmp_path):
    both_worlds(tmp_path / "p")
    wrong = demo("p", "--advisories", write(tmp_path / "broken", OWN_1__json="{"))
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: ")
    assert not (tmp_path / "traces").exists()
    advisory = {
        "id": "OWN-1",
        "modified": "2024-01-01T00:00:00Z",
        "summary": "Invented.",
        "database_specific": {"severity": "LOW"},
        "affected": [{"package": {"ecosystem": "PyPI", "name": "pyyaml"}, "versions": ["5.3.1"]}],
    }
    write(tmp_path / "own", OWN_1__json=json.dumps(advisory))
    assert "OWN-1" in demo("p", "--advisories", "own").stdout


# --- when it does not work --------------------------------------------------------------------------------------------


def test_a_run_that_does_not_complete_fails(tmp_path):
    both_worlds(tmp_path / "p")
    result = demo("p", "--trace-dir", "t", "--max-steps", "3")
    assert result.exit_code == 1
    assert "No report was written: the run ended with budget_exhausted." in result.stdout
    assert "✗ eval_audit_completed" in result.stdout
    assert "(3 steps, budget_exhausted)" in result.stdout


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["a_file"], [".", "--max-steps", "0"], [".", "--trace-dir", "a_file/t"]]
)
def test_wrong_usage_is_told(tmp_path, arguments):
    write(tmp_path, a_file="x")
    result = demo(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"OPENAI_API_KEY": "sk-x"}, "OPENAI_API_KEY set, but no OPENAI_MODEL: a rule-based policy decides"),
        ({"OPENAI_MODEL": "m"}, "no OPENAI_BASE_URL or OPENAI_API_KEY: a rule-based policy decides"),
        ({"OPENAI_MODEL": ""}, "no OPENAI_* endpoint is set: a rule-based policy decides"),
    ],
)
def test_half_an_endpoint_is_none(tmp_path, monkeypatch, given, words):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "p").mkdir()
    assert words in " ".join(demo("p").stdout.split())


def test_scripted_asks_no_model_even_with_an_endpoint(tmp_path, monkeypatch):
    for name in ENDPOINT:
        monkeypatch.setenv(name, "http://127.0.0.1:9/v1")
    (tmp_path / "p").mkdir()
    result = demo("p", "--scripted")
    assert result.exit_code == 0
    assert "--scripted: a rule-based policy decides each call" in result.stdout


# --- with a model -----------------------------------------------------------------------------------------------------


def message_of(wire: dict) -> Message:
    """Return a message of OpenAI's API as looplet has it."""
    if wire["role"] == "tool":
        return Message.of_result(wire["tool_call_id"], json.loads(wire["content"]))
    calls = [
        {"type": "tool_call", "id": call["id"], "name": call["function"]["name"]}
        | {"arguments": json.loads(call["function"]["arguments"])}
        for call in wire.get("tool_calls") or ()
    ]
    return Message(wire["role"], ({"type": "text", "content": wire.get("content") or ""}, *calls))


def rules_over_the_wire(request):
    """Answer as the rules do, to what really came over the wire."""
    return [(call.tool, call.args) for call in decide(history([message_of(m) for m in request.messages]))]


def test_a_model_behind_an_endpoint_decides_each_call(tmp_path):
    pytest.importorskip("looplet.backends.openai", reason="NOT TESTED: the demo with a real client over a socket")
    both_worlds(tmp_path / "p")
    with OpenAIServer(policy=rules_over_the_wire, model="rules-1") as server:
        done = python("-m", "looplet", "demo", "p", "--no-installed", "--trace-dir", "t", cwd=tmp_path, **server.env())
        assert not server.errors
        asked = len(server.requests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "the model rules-1 at http://127.0.0.1:" in done.stdout
    (run,) = Trace.load(tmp_path / "t").runs
    assert len(run.chats) == asked
    assert run.usage.input_tokens > 0
    steps = steps_of(demo("p").stdout)
    assert [step.tool_call.tool for step in run.steps] == steps


def test_a_model_that_refuses_is_an_audit_that_failed(tmp_path):
    pytest.importorskip("looplet.backends.openai", reason="NOT TESTED: the demo with a real client over a socket")
    (tmp_path / "p").mkdir()
    with OpenAIServer(policy=lambda request: Fault.unauthorized()) as server:
        done = python("-m", "looplet", "demo", "p", "--trace-dir", "t", cwd=tmp_path, **server.env())
    assert (done.returncode, done.stderr) == (1, "")
    assert "with --scripted, none is needed" in done.stdout
    assert "✗ eval_audit_completed" in done.stdout


def test_ctrl_c_leaves_a_whole_trace(tmp_path):
    pytest.importorskip("looplet.backends.openai", reason="NOT TESTED: the demo with a real client over a socket")
    both_worlds(tmp_path / "p")
    started: list[subprocess.Popen[str]] = []

    def interrupt(request):
        if request.number:
            started[0].send_signal(signal.SIGINT)
            return Fault.slow(30, "too late")
        return rules_over_the_wire(request)

    with OpenAIServer(policy=interrupt) as server:
        command = [sys.executable, "-m", "looplet", "demo", "p", "--trace-dir", "t"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment(**server.env()), **pipes))
        output, errors = started[0].communicate(timeout=60)
    assert (started[0].returncode, errors) == (130, "error: interrupted\n")
    assert "The trace so far: t/trace.jsonl" in output
    (run,) = Trace.load(tmp_path / "t").runs
    assert run.stop_reason == "cancelled"
    assert [step.tool_call.tool for step in run.steps] == ["detect_files"]


# --- the agent, its rules and its evals -------------------------------------------------------------------------------


def audit(project: Path, folder: Path, llm=None, hooks=()) -> EvalContext:
    """Run an audit and read it back."""
    sink = ProvenanceSink(folder)
    run = make_run(Project(project, use_installed=False), llm or rule_based_backend(), hooks=[*hooks, sink])
    list(run)
    return EvalContext.from_trace(folder)


def scores(ctx: EvalContext) -> dict[str, float]:
    return {result.name: result.score for result in eval_run(eval_discover(EVALS), ctx)}


def test_done_is_refused_before_the_report(tmp_path):
    script = [("done", {"answer": "all is well"}), ("write_report", {}), ("done", {"answer": "no grades"})]
    ctx = audit(both_worlds(tmp_path / "p"), tmp_path / "t", ScriptedBackend(script))
    assert [step.tool_result.error for step in ctx.steps] == [
        "there is no report card yet: call write_report first",
        None,
        None,
    ]
    assert ctx.completed


class NoLicences:
    def pre_dispatch(self, state, log, call, step):
        return Deny("not here") if call.tool == "check_licences" else None


def test_the_rules_go_on_when_a_tool_fails_and_say_so(tmp_path):
    ctx = audit(both_worlds(tmp_path / "p"), tmp_path / "t", hooks=[NoLicences()])
    assert ctx.completed
    assert ctx.tool_sequence.count("check_licences") == 1
    report = next(step for step in ctx.steps if step.tool_call.tool == "write_report")
    assert "check_licences failed: Permission denied" in report.tool_call.args["summary"]
    assert report.tool_result.data["parts"]["licence"]["grade"] == "unknown"
    assert scores(ctx)["eval_grades_follow_from_evidence"] == 1.0


def test_the_rules_ask_for_independent_calls_at_once(tmp_path):
    audit(both_worlds(tmp_path / "p"), tmp_path / "t")
    (run,) = Trace.load(tmp_path / "t").runs
    assert len(run.chats) == 5  # look, read both files, four checks, report, finish


def test_a_report_with_files_unread_scores_their_share(tmp_path):
    script = [
        ("detect_files", {}),
        ("parse_file", {"path": "package.json"}),
        [("check_security", {}), ("check_licences", {}), ("check_maintenance", {}), ("check_imports", {})],
        ("write_report", {}),
        ("done", {"answer": "x"}),
    ]
    ctx = audit(both_worlds(tmp_path / "p"), tmp_path / "t", ScriptedBackend(script))
    assert scores(ctx) == {
        "eval_audit_completed": 1.0,
        "eval_detected_files_were_read": 0.5,
        "eval_grades_follow_from_evidence": 1.0,
    }


@pytest.mark.parametrize(
    ("part", "grade"), [("security", "A"), ("security", "D"), ("licence", "F"), ("maintenance", "unknown")]
)
def test_a_grade_without_evidence_fails(tmp_path, part, grade):
    ctx = audit(both_worlds(tmp_path / "p"), tmp_path / "t")
    steps = [with_grade(step, part, grade) if step.tool_call.tool == "write_report" else step for step in ctx.steps]
    assert scores(ctx)["eval_grades_follow_from_evidence"] == 1.0
    assert scores(replace(ctx, steps=steps))["eval_grades_follow_from_evidence"] == 0.0


def with_grade(step, part, grade):
    data = json.loads(json.dumps(step.tool_result.data))
    data["parts"][part]["grade"] = grade
    return replace(step, tool_result=replace(step.tool_result, data=data))


def test_a_run_that_never_looked_scores_nothing(tmp_path):
    ctx = audit(both_worlds(tmp_path / "p"), tmp_path / "t", ScriptedBackend(["I am done"] * 3))
    assert set(scores(ctx).values()) == {0.0}

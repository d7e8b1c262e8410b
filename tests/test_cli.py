"""The command line: the group, `show`, and `eval` over real traces."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support import environment, make_tools, python

from looplet import (
    ApprovalHook,
    BackendError,
    ConfigError,
    Deny,
    HookDecision,
    LoopConfig,
    PermissionEngine,
    PermissionHook,
    ProvenanceSink,
    Reply,
    ToolCall,
    ToolError,
    TraceError,
    Usage,
    composable_loop,
    tool,
    tools_from,
)
from looplet.cli import COMMANDS, Command, main
from looplet.testing import ScriptedBackend

ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "3"})


def invoke(*arguments):
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def record(folder, *replies, tools=None, hooks=(), task=None, **settings) -> Path:
    """Leave the trace of a run in a folder."""
    sink = ProvenanceSink(folder)
    list(
        composable_loop(
            ScriptedBackend(replies),
            task=task or {"goal": "g"},
            tools=tools or make_tools(),
            hooks=[*hooks, sink],
            config=LoopConfig(**settings),
        )
    )
    return Path(folder)


# --- the group --------------------------------------------------------------------------------------------------------


def test_version_is_told():
    from looplet import __version__

    assert invoke("--version").output == f"looplet {__version__}\n"


def test_unknown_command_names_the_nearest_one():
    result = invoke("sohw")
    assert result.exit_code == 2
    assert "there is no command 'sohw'; did you mean 'show'?" in result.stderr


def test_list_of_commands_says_what_each_command_says_itself():
    help_text = invoke("--help").output
    for name, (_, words) in COMMANDS.items():
        assert name in help_text
        command = main.get_command(click.Context(main), name)
        assert command.get_short_help_str(limit=200) == words
        assert invoke(name, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("write x=1"), 2, "error: write x=1\n"),
        (TraceError("torn", path="a.jsonl", line=3), 2, "error: a.jsonl:3: torn\n"),
        (BackendError("two\nlines \x1b[31m"), 1, "error: two lines  [31m\n"),
        (ToolError("no"), 1, "error: no\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_failures_are_one_line_on_stderr_and_an_exit_code(error, code, words):
    @click.command(cls=Command)
    def fail():
        raise error

    result = CliRunner().invoke(fail)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", words)


def loaded_by(*arguments) -> set[str]:
    """Return the modules that a command loads in a fresh process."""
    code = (
        "import sys\nfrom looplet.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = python("-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_help_loads_no_command_and_nothing_heavy():
    loaded = loaded_by("--help")
    assert not {m for m in loaded if m.startswith(("looplet.cli.", "opentelemetry", "msgspec", "rich", "openai"))}


def test_show_loads_neither_loop_nor_client(tmp_path):
    loaded = loaded_by("show", record(tmp_path, ADD, DONE))
    assert not loaded & {"looplet.run", "looplet.loop", "looplet.cli.demo", "rich", "openai", "asyncio"}
    assert not {module for module in loaded if module.startswith("opentelemetry.sdk")}


def test_module_and_command_are_the_same():
    done = python("-m", "looplet", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("looplet ")


def test_a_reader_that_hangs_up_is_no_error(tmp_path):
    record(tmp_path, ADD, DONE)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "looplet", "show", str(tmp_path)]
    with os.fdopen(write_end) as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(tmp_path):
    done = python("-m", "looplet", "show", record(tmp_path, ADD, DONE), PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert "#1 ? add(a=1, b=2)" in done.stdout


# --- show -------------------------------------------------------------------------------------------------------------


class Gate:
    def pre_dispatch(self, state, log, call, step):
        return Deny("too dear") if call.args.get("a") == 9 else None

    def check_done(self, state, log, context, step):
        return "cite a source" if step < 5 else None


def lines_of(result) -> list[str]:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_show_tells_header_and_steps_by_turn(tmp_path):
    replies = ([ADD, ("boom", {})], ("add", {"a": 9, "b": 1}), "just talk", DONE, DONE)
    record(tmp_path, *replies, hooks=[Gate()], agent_name="adder", task={"goal": "add", "limit": 3})
    lines = lines_of(invoke("show", tmp_path))
    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")] if not line.startswith(" "))
    assert facts["agent"] == "adder"
    assert facts["ended"] == "done"
    assert len(facts["run"]) == len(facts["trace"]) == 32
    assert facts["did"] == "5 turns, 5 steps, 5 model calls (scripted)"
    assert facts["tokens"] == "40 in, 20 out (1 of 5 calls reported none)"
    assert facts["cost"] == "unknown"
    assert facts["task"] == "goal: add"
    assert "        limit: 3" in lines
    shown = [" ".join(line.split()) for line in lines[lines.index("") + 2 :]]
    expected = [
        "1 #1 ✓ add(a=1, b=2) 3",
        "#2 ✗ boom() ERROR: RuntimeError: kaput",
        "at support.py:",
        "2 · hook Gate.pre_dispatch: block+permission — too dear",
        "#3 ✗ add(a=9, b=1) ERROR: Permission denied for tool 'add': too dear -",
        "3 · no tool call in the reply (attempt 1)",
        "4 · hook Gate.check_done: block — cite a source",
        "#4 ✗ done(rejected) ERROR: cite a source -",
        "5 #5 ✓ done(answer='3') 2 keys",
        "",
        "answer 3",
    ]
    assert len(shown) == len(expected)
    assert [line[: len(wanted)] for line, wanted in zip(shown, expected, strict=True)] == expected


def test_show_is_aligned_and_fits(tmp_path):
    record(tmp_path, ("add", {"a": 1, "b": 2}), ("look", {"name": "x" * 300}), ("done", {"answer": "y" * 300}))
    lines = lines_of(invoke("show", tmp_path))
    assert max(map(len, lines)) <= 100
    table = lines[lines.index("") + 1 : -2]
    assert len({len(line) for line in table}) == 1, table  # the durations end in one column


def test_show_tells_an_error_whole_in_lines_that_fit(tmp_path):
    said = "cannot reach db.internal:5432\n" + "again " * 100 + "\nask the one who runs it"
    record(tmp_path, ("boom", {"why": said}), DONE)
    lines = lines_of(invoke("show", tmp_path))
    assert max(map(len, lines)) <= 100
    at = next(number for number, line in enumerate(lines) if "✗ boom(" in line)
    assert " ERROR " in lines[at]
    below = [line.strip() for line in lines[at + 1 : at + 12]]
    assert below[0] == "RuntimeError: cannot reach db.internal:5432"
    assert "ask the one who runs it" in below
    assert sum(line.split().count("again") for line in below) == 100


def test_show_tells_why_a_hook_refused_whole(tmp_path):
    class Strict:
        def check_done(self, state, log, context, step):
            return "a claim without a source is no claim; " * 6 + "the end" if step < 2 else None

    record(tmp_path, DONE, DONE, hooks=[Strict()])
    lines = lines_of(invoke("show", tmp_path))
    assert max(map(len, lines)) <= 100
    assert sum("the end" in line for line in lines) == 2  # the hook, and the step


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"answer": "3"}, "answer  3"),
        ({"answer": "one\ntwo"}, "answer  one two"),
        ({"answer": "3", "sure": True}, 'answer  {"answer":"3","sure":true}'),
        ({"answer": "y" * 300}, "answer  " + "y" * 91 + "…"),
    ],
)
def test_show_tells_the_answer_in_one_line(tmp_path, answer, shown):
    done = dict.fromkeys(("answer", "sure"), "(optional) what it is")
    record(tmp_path, ("done", answer), tools=tools_from([], include_done=True, done_parameters=done))
    assert shown in lines_of(invoke("show", tmp_path))


def test_show_tells_no_answer_of_a_run_without_one(tmp_path):
    record(tmp_path, ADD, ADD, max_steps=2)
    lines = lines_of(invoke("show", tmp_path))
    assert any(line.startswith("ended   budget_exhausted") for line in lines)
    assert not any(line.startswith("answer") for line in lines)


def test_show_tells_each_compaction_in_one_line(tmp_path):
    @tool
    def read(name: str) -> str:
        """Read a file."""
        return f"{name} " * 1000

    class Broken:
        def compact(self, **about):
            raise RuntimeError("no room to think")

    script = [*(("read", {"name": f"f{number}"}) for number in range(6)), DONE]
    tools = tools_from([read], include_done=True)
    record(tmp_path / "a", *script, tools=tools, context_window=3000)
    notes = [line.split("· ")[1] for line in lines_of(invoke("show", tmp_path / "a")) if "compaction" in line]
    assert "compaction (threshold): 7 → 5 messages" in "\n".join(notes)
    record(tmp_path / "b", *script, tools=tools, context_window=3000, compact_service=Broken())
    assert "compaction (threshold) failed: RuntimeError — no room" in invoke("show", tmp_path / "b").stdout


def test_show_tells_what_is_known_of_the_cost(tmp_path):
    def reply(tool_name, args, cost):
        return Reply(tool_calls=(ToolCall(tool_name, args),), usage=Usage(10, 5, cost_usd=cost))

    replies = (reply("add", ADD[1], 0.25), reply("add", ADD[1], None), reply("done", DONE[1], 0.5))
    record(tmp_path, *replies)
    assert "cost    0.750000 USD (1 of 3 calls have no price)" in lines_of(invoke("show", tmp_path))


def test_show_tells_what_was_asked_of_a_human_and_answered(tmp_path):
    hooks = [PermissionHook(PermissionEngine().ask("add", reason="it costs money")), ApprovalHook()]
    record(tmp_path, ADD, hooks=hooks)
    text = invoke("show", tmp_path).stdout
    assert "· approval of add asked for: it costs money\n" in text
    assert "waits for add(a=1, b=2) (#1, call_1): it costs money [approve, deny]" in text
    list(composable_loop(ScriptedBackend([DONE]), tools=make_tools(), resume=tmp_path, verdict="approve", hooks=hooks))
    assert "· approval of call_1: approve\n" in invoke("show", tmp_path).stdout


def test_help_of_show_teaches_by_example():
    text = invoke("show", "--help").stdout
    for words in ("looplet show traces/run_1 ", "--full", "--json", "✗ one that failed or was refused"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80


def test_show_full_tells_the_message_that_a_pause_kept(tmp_path):
    class Ask:
        def check_permission(self, call, state):
            return HookDecision(permission="ask", block="Really?") if call.tool == "add" else None

    def hooks():
        return [Ask(), ApprovalHook(), ProvenanceSink(tmp_path)]

    list(composable_loop(ScriptedBackend([ADD]), {"goal": "g"}, make_tools(), hooks=hooks()))
    resumed = {"resume": tmp_path, "verdict": "approve"}
    list(composable_loop(ScriptedBackend([DONE]), tools=make_tools(), hooks=hooks(), **resumed))
    text = "\n".join(lines_of(invoke("show", tmp_path, "--full")))
    places = [text.index(f"═══ {number} ") for number in ("0 user", "1 assistant calls add", "2 tool")]
    assert places == sorted(places)


def test_show_full_adds_spans_and_what_was_sent(tmp_path):
    record(tmp_path, ADD, DONE)
    text = "\n".join(lines_of(invoke("show", tmp_path, "--full")))
    for words in (
        "invoke_agent looplet",
        "      chat scripted",
        "        execute_tool add",
        "turn 2, sent to scripted",
    ):
        assert words in text
    assert "═══ 0 user ═══\n  goal: g" in text
    assert text.count("goal: g") == 2  # the header, and the one request that was the first to send it
    assert "execute_tool" not in "\n".join(lines_of(invoke("show", tmp_path)))


def test_show_json_is_one_document(tmp_path):
    record(tmp_path, ADD, DONE, task={"goal": "g"})
    result = invoke("show", tmp_path, "--json", "--full")
    told = json.loads(result.stdout)
    (run,) = told["runs"]
    assert (run["stop_reason"], run["turns"], run["model_calls"], run["models"]) == ("done", 2, 2, ["scripted"])
    assert run["usage"]["input_tokens"] == 20
    assert run["usage"]["cost_usd"] is None
    assert run["final_output"] == {"answer": "3"}
    assert [(step["turn"], step["tool_call"]["tool"]) for step in run["steps"]] == [(1, "add"), (2, "done")]
    assert run["steps"][0]["pretty"].startswith("#1 ✓ add(a=1, b=2) → 3")
    assert [span["name"] for span in run["spans"]] == ["invoke_agent looplet"]
    assert told["problems"] == run["problems"] == []


def test_show_indents_sub_runs_and_names_their_step(tmp_path):
    sink = ProvenanceSink(tmp_path)

    @tool
    def research(question: str) -> str:
        """Ask another agent."""
        config = LoopConfig(agent_name="researcher")
        below = composable_loop(
            ScriptedBackend([ADD, DONE]), {"goal": question}, make_tools(), hooks=[sink], config=config
        )
        list(below)
        return below.result.final_output["answer"]

    tools = tools_from([research], include_done=True)
    run = composable_loop(
        ScriptedBackend([("research", {"question": "1+2?"}), DONE]), {"goal": "g"}, tools, hooks=[sink]
    )
    list(run)
    lines = lines_of(invoke("show", tmp_path))
    at = lines.index("    sub-run of step #1")
    assert not any(line.startswith("    agent") for line in lines[:at])
    assert all(line.startswith("    ") or not line for line in lines[at:])
    assert "    agent   researcher" in lines
    told = json.loads(invoke("show", tmp_path, "--json").stdout)["runs"]
    assert [sub["parent_run_id"] for sub in told[0]["sub_runs"]] == [run.run_id]
    sub_id = told[0]["sub_runs"][0]["run_id"]
    assert lines_of(invoke("show", tmp_path, "--run", sub_id[:8]))[0] == "agent   researcher"


def two_runs(folder: Path) -> list[str]:
    """Leave two runs in one file and return their ids."""
    sink = ProvenanceSink(folder)
    runs = [composable_loop(ScriptedBackend([DONE]), {"n": n}, make_tools(), hooks=[sink]) for n in (1, 2)]
    for step_of_one, step_of_two in zip(*runs, strict=True):
        assert step_of_one.number == step_of_two.number
    return [run.run_id for run in runs]


def test_show_tells_every_run_of_a_file_or_one(tmp_path):
    first, second = two_runs(tmp_path)
    text = invoke("show", tmp_path).stdout
    assert text.index(first) < text.index(second)
    assert first not in invoke("show", tmp_path, "--run", second[:10]).stdout
    result = invoke("show", tmp_path, "--run", "xyz")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert first in result.stderr
    assert result.stderr.count("\n") == 1
    assert invoke("show", tmp_path, "--run", "").exit_code == 2  # fits both


def killed(folder: Path) -> Path:
    """Leave the trace of a process that was killed inside a tool."""
    code = (
        "import os, sys\nfrom looplet import *\nfrom looplet.testing import ScriptedBackend\n"
        "def die(x: int) -> int:\n    'Die.'\n    os._exit(9)\n"
        "def live(x: int) -> int:\n    'Live.'\n    return x\n"
        "llm = ScriptedBackend([('live', {'x': 1}), ('die', {'x': 2})])\n"
        "tools, config = tools_from([die, live], include_done=True), LoopConfig(agent_name='mortal')\n"
        "list(composable_loop(llm, {'goal': 'g'}, tools, hooks=[ProvenanceSink(sys.argv[1])], config=config))\n"
    )
    assert python("-c", code, folder).returncode == 9
    return folder


def test_show_says_what_a_killed_run_left_open(tmp_path):
    lines = lines_of(invoke("show", killed(tmp_path)))
    assert lines[0] == "agent   mortal"
    assert "ended   interrupted" in lines
    assert any(line.startswith("took    at least ") for line in lines)
    problems = [line for line in lines if line.startswith("problem: ")]
    assert any("interrupted" in line for line in problems)
    assert any("die (call_2) began and has no end" in line for line in problems)
    (run,) = json.loads(invoke("show", tmp_path, "--json").stdout)["runs"]
    assert run["unfinished_calls"] == [{"tool": "die", "call_id": "call_2"}]


def test_show_reads_around_a_torn_last_line_and_says_so(tmp_path):
    path = record(tmp_path, ADD, DONE) / "trace.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    lines = lines_of(invoke("show", path))
    assert any(line.startswith(f"problem: {path}:") for line in lines)
    assert json.loads(invoke("show", path, "--json").stdout)["problems"]


def test_show_names_a_failed_model_call(tmp_path):
    record(tmp_path, ADD, BackendError("the server is on fire"))
    text = invoke("show", tmp_path).stdout
    assert "ended   llm_error" in text
    assert "__llm_error__" in text


def test_what_was_said_cannot_control_the_terminal(tmp_path):
    evil = "\x1b]0;owned\x07\x1b[31m\u202e\x9b2J"

    @tool
    def echo(text: str) -> str:
        """Say it again."""
        return text

    tools = tools_from([echo], include_done=True)
    record(tmp_path, ("echo", {"text": evil}), ("done", {"answer": evil}), tools=tools, task={"goal": evil})
    for options in ((), ("--full",), ("--json",), ("--json", "--full")):
        shown = invoke("show", tmp_path, *options).stdout
        assert all(letter.isprintable() or letter == "\n" for letter in shown), options
    assert json.loads(invoke("show", tmp_path, "--json").stdout)["runs"][0]["task"] == {"goal": evil}


def on_terminal(columns: int, *arguments) -> str:
    """Return what a command writes to a terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        env = environment(TERM="xterm", COLUMNS=str(columns))
        env.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "looplet", *map(str, arguments)]
        assert subprocess.run(command, stdout=theirs, env=env, timeout=60).returncode == 0
        return os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminal_gets_colours_and_a_pipe_does_not(tmp_path):
    record(tmp_path, ("boom", {}), DONE)
    shown = on_terminal(90, "show", tmp_path)
    assert "\x1b[31m" in shown  # the failed step is red
    assert "boom()" in shown
    assert "\x1b" not in python("-m", "looplet", "show", tmp_path).stdout


def test_show_fits_a_terminal_of_80_columns(tmp_path):
    long = {"answer": "the answer is a long story " * 20}
    record(tmp_path, ("boom", {"why": "kaput " * 40}), ("look", {"name": "x" * 99}), "talk", ("done", long))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(80, "show", tmp_path)).splitlines()
    assert max(len(line.rstrip("\r")) for line in shown) <= 80
    assert any("#2 ✓ look(name='xxx" in line and line.rstrip("\r").endswith("s") for line in shown)


def foreign_trace(path: Path) -> Path:
    """Write a trace as other tools do: GenAI attributes, nothing of looplet."""

    def span(number, parent, name, **attributes):
        told = {key.replace("__", "."): value for key, value in attributes.items()}
        return {
            "traceId": "ab" * 16,
            "spanId": f"{number:016x}",
            "parentSpanId": parent and f"{parent:016x}",
            "name": name,
            "kind": 1,
            "startTimeUnixNano": str(10**18 + number * 1000),
            "endTimeUnixNano": str(10**18 + number * 1000 + 500),
            "attributes": [
                {"key": f"gen_ai.{key}", "value": {"intValue": str(v)} if isinstance(v, int) else {"stringValue": v}}
                for key, v in told.items()
            ],
        }

    spans = [
        span(1, "", "invoke_agent helper", operation__name="invoke_agent", agent__name="helper"),
        span(2, 1, "chat m", operation__name="chat", request__model="m", usage__input_tokens=7, usage__output_tokens=3),
        span(3, 1, "execute_tool find", operation__name="execute_tool", tool__name="find"),
    ]
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"scope": {"name": "x"}, "spans": spans}]}]}) + "\n")
    return path


def test_show_reads_traces_of_other_tools(tmp_path):
    lines = lines_of(invoke("show", foreign_trace(tmp_path / "other.jsonl")))
    assert lines[0] == "agent   helper"
    assert "ended   unknown" in lines
    assert "tokens  7 in, 3 out" in lines
    assert any("#1 ✓ find()" in line for line in lines)
    assert invoke("show", tmp_path / "other.jsonl", "--json", "--full").exit_code == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing", None, "no such file or folder"),
        ("text.md", "# not a trace\n", "wanted is a file of OTLP JSON lines"),
        ("empty.jsonl", "", "empty"),
        ("other.json", "{}", "resourceSpans"),
        ("spans.jsonl", '{"resourceSpans": []}\n', "no run of an agent"),
    ],
)
def test_what_is_no_trace_is_refused_with_a_reason(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    result = invoke("show", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path / name}")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_above_runs_names_them(tmp_path):
    record(tmp_path / "run_1", DONE)
    result = invoke("show", tmp_path)
    assert result.exit_code == 2
    assert str(tmp_path / "run_1") in result.stderr
    (tmp_path / "nothing").mkdir()
    assert "name a trace file, or the folder of a run" in invoke("show", tmp_path / "nothing").stderr


# --- eval, end to end -------------------------------------------------------------------------------------------------

EVALS = """
from looplet import eval_mark

@eval_mark("verdict")
def eval_returns_answer(ctx):
    return "answer" in ctx.final_output

@eval_mark("budget")
def eval_few_steps(ctx):
    return 1.0 if ctx.step_count <= 2 else 0.6

def eval_stopped_cleanly(ctx):
    return ctx.completed
"""


@pytest.fixture
def evals(tmp_path):
    path = tmp_path / "eval_my_agent.py"
    path.write_text(EVALS)
    return path


def test_eval_passes_good_runs_at_any_depth(tmp_path, evals):
    record(tmp_path / "traces" / "run_1", ADD, DONE)
    record(tmp_path / "traces" / "more" / "run_2", DONE)
    result = invoke("eval", tmp_path / "traces", "--evals", evals, "--threshold", "0.7", "-v")
    assert result.exit_code == 0, result.output
    assert "Found 3 evals, 2 runs" in result.stdout
    assert "run_1/trace.jsonl: 1" in result.stdout
    assert "more/run_2/trace.jsonl: 1" in result.stdout
    assert "threshold: 0.70 → PASS" in result.stdout


def test_eval_as_a_command_finds_evals_in_the_current_folder(tmp_path, evals):
    record(tmp_path / "traces" / "run_1", ADD, DONE)
    done = python("-m", "looplet", "eval", "traces/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout


def test_eval_fails_when_one_run_is_below_the_threshold(tmp_path, evals):
    record(tmp_path / "traces" / "good", DONE)
    record(tmp_path / "traces" / "long", ADD, ADD, ADD, DONE)
    command = ("eval", tmp_path / "traces", "--evals", evals, "--threshold", "0.7")
    result = invoke(*command)
    assert result.exit_code == 1
    assert "long/trace.jsonl: 0.6" in result.stdout
    assert invoke(*command, "--mean").exit_code == 0
    assert invoke(*command, "--exclude", "budget").exit_code == 0
    assert json.loads(invoke(*command, "--json").stdout)["passed"] is False


def test_eval_fails_closed(tmp_path, evals):
    (tmp_path / "none").mkdir()
    nothing = invoke("eval", tmp_path / "none", "--evals", evals)
    assert nothing.exit_code == 1
    assert "no run found" in nothing.stderr
    record(tmp_path / "run", DONE)
    (tmp_path / "run" / "trace.jsonl").write_text("not a trace\n")
    unreadable = invoke("eval", tmp_path / "run", "--evals", evals)
    assert unreadable.exit_code == 1
    assert "problem: " in unreadable.stderr
    assert invoke("eval", tmp_path / "nowhere", "--evals", evals).exit_code == 2


def test_eval_counts_an_interrupted_run_as_not_completed(tmp_path, evals):
    killed(tmp_path / "run")
    result = invoke("eval", tmp_path / "run", "--evals", evals)
    assert result.exit_code == 1
    assert "✗ eval_stopped_cleanly" in result.stdout


def test_eval_tells_runs_of_several_paths_and_files_apart(tmp_path, evals):
    record(tmp_path / "a", DONE)
    two_runs(tmp_path / "b")
    result = invoke("eval", tmp_path / "a", tmp_path / "b" / "trace.jsonl", "--evals", evals, "--json")
    (row, *_) = json.loads(result.stdout)["evals"]
    labels = [run["run"] for run in row["per_run"]]
    assert labels[0] == str(tmp_path / "a" / "trace.jsonl")
    assert [label.partition("#")[0] for label in labels[1:]] == [str(tmp_path / "b" / "trace.jsonl")] * 2
    assert len(set(labels)) == 3

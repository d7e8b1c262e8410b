"""The seeds, which users have read: each code block does what it promises, and each command can be typed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from seed_blocks import BLOCKS, ROWS, SEEDS, Block
from support import both, make_tools, python

import looplet
from looplet import (
    CheckDone,
    ConfigError,
    LoopConfig,
    OpenAIBackend,
    PostDispatch,
    PreDispatch,
    PrePrompt,
    ProvenanceSink,
    ToolSpec,
    Trace,
    composable_loop,
    eval_run,
    tool,
    tools_from,
)
from looplet.errors import ErrorKind
from looplet.telemetry import semconv
from looplet.testing import Answer, OpenAIServer, ScriptedBackend

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
STEP = r"#\d+ [✓✗] \w+\(.*?\)( → .+?)? \[\d+ms\]"
CODE = re.compile(
    r"(python |pip install |export |from \w+ import|for step in|class \w+:|def |@\w+[.(]|[A-Z_]+=|print\(|sink\.)"
)

tested: set[str] = set()


def about(*names: str) -> Callable:
    """Say which rows of the table a test runs; it is passed over while one of them is pending."""
    tested.update(names)
    waits = [f"{name} needs {BLOCKS[name].pending}" for name in names if BLOCKS[name].pending]
    return pytest.mark.skipif(bool(waits), reason="; ".join(waits))


def rows(*kinds: str) -> list[Block]:
    return [block for block in ROWS if block.kind in kinds]


def name_of(block: Block) -> str:
    return f"{block.seed}:{block.name}"


def read_shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip(f"there is no {name} beside the checkout: the table cannot be compared with what users read")
    return (SHARED / name).read_text(encoding="utf-8")


def lines_of(seed: str) -> list[str]:
    return [line.strip() for line in read_shared(f"seeds/{SEEDS[seed]}").splitlines()]


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in ROWS if not b.lost], ids=name_of)
def test_the_table_says_what_the_seed_says(block):
    lines = lines_of(block.seed)[block.first - 1 : block.last]
    if block.kind == "words":
        assert " ".join(block.text.split()) in " ".join(lines)
    else:
        assert [line.strip() for line in block.text.splitlines()] == lines


@pytest.mark.parametrize("block", [b for b in ROWS if b.lost], ids=name_of)
def test_a_lost_command_is_the_one_that_the_surface_names(block):
    assert f"`{block.text}`" in read_shared("SURFACE.md")
    assert block.text not in read_shared(f"seeds/{SEEDS[block.seed]}")


@pytest.mark.parametrize("seed", SEEDS)
def test_every_line_of_code_is_in_the_table(seed):
    told = {n for b in ROWS if b.seed == seed for n in range(b.first, b.last + 1)}
    missed = {n: line for n, line in enumerate(lines_of(seed), 1) if CODE.match(line) and n not in told}
    assert missed == {}


def test_every_row_has_its_own_name_and_is_run_or_says_why_not():
    assert len(BLOCKS) == len(ROWS)
    assert tested <= BLOCKS.keys()
    untold = {name for name, block in BLOCKS.items() if not (block.pending or block.not_run)} - tested
    assert untold == set()


@pytest.mark.parametrize("block", [b for b in ROWS if b.pending], ids=name_of)
def test_what_is_pending_still_fails_for_want_of_what_it_names(block, tmp_path):
    if block.kind == "words":
        assert not hasattr(looplet, block.pending)
    else:
        done = type_in(block, tmp_path, server_url="http://127.0.0.1:9/v1")
        assert done.returncode != 0
        assert block.pending in done.stderr


# --- running ------------------------------------------------------------------------------------------------------


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Run a Python block in an empty folder against a server; return its namespace, server included."""
    monkeypatch.chdir(tmp_path)
    servers = []

    def run(name: str, policy, *, space: dict | None = None, **settings) -> dict:
        server = OpenAIServer(policy=policy, **settings).start()
        servers.append(server)
        for variable, value in server.env().items():
            monkeypatch.setenv(variable, value)
        space = {"__name__": "seed"} if space is None else space
        exec(compile(BLOCKS[name].runnable(server.base_url), name, "exec"), space)
        assert not server.errors
        return {**space, "server": server}

    yield run
    for server in servers:
        server.close()


def type_in(block: Block, cwd: Path, *, server_url: str = "", **more: str):
    """Run a command as a shell would, `examples/` included; return what came of it."""
    if (ROOT / "examples").exists() and not (cwd / "examples").exists():
        (cwd / "examples").symlink_to(ROOT / "examples")
    words = shlex.split(block.runnable(server_url).replace("\\\n", ""), comments=True)
    variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
    command = words[len(variables) :]
    if command[0] == "looplet":
        command[:1] = ["python", "-m", "looplet"]
    assert command[0] == "python"
    return python(*command[1:], cwd=cwd, **more, **dict(word.split("=", 1) for word in variables))


def timeless(output: str) -> list[str]:
    return re.sub(r"\[\d+ms\]", "[ms]", output).splitlines()


def sent(server) -> str:
    """Return everything that went over the wire, as text."""
    return json.dumps([request.body for request in server.requests], ensure_ascii=False)


def written(folder: Path) -> str:
    """Return everything that stands on disk below a folder."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file())


@contextmanager
def served(policy) -> Iterator[tuple[OpenAIServer, OpenAIBackend]]:
    """Start a server and make a backend for it."""
    with OpenAIServer(policy=policy) as server:
        yield server, OpenAIBackend(base_url=server.base_url, api_key="any", model="any")
        assert not server.errors


SEARCH = [[("search", {"query": "loops"})], [("done", {"answer": "found"})]]
GREETING = [[("greet", {"name": "Alice"})], [("greet", {"name": "Bob"})], [("done", {"answer": "greeted"})]]
GREETED = [
    "#1 ✓ greet(name='Alice') → greeting: Hello, Alice! [ms]",
    "#2 ✓ greet(name='Bob') → greeting: Hello, Bob! [ms]",
    "#3 ✓ done(answer='greeted') → 2 keys [ms]",
]
HELLO = [*GREETING[:2], [("greet", {"name": "Carol"})], *GREETING[2:]]
HELLO_LINES = [*GREETED[:2], "#3 ✓ greet(name='Carol') → greeting: Hello, Carol! [ms]"]


# --- the README's Python ------------------------------------------------------------------------------------------


@about("readme:pitch", "readme:step-pretty", "index:print-pretty")
def test_the_pitch_prints_steps_as_it_shows_them(play, capsys):
    space = play("readme:pitch", SEARCH)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"#1 ✓ search\(query='loops'\) → 12 items \[\d+ms\]", lines[0])
    assert all(re.fullmatch(STEP, line) for line in lines)
    assert [step.tool_call.tool for step in space["state"].steps] == ["search", "done"]


@about("readme:pitch")
def test_the_pitch_stops_at_the_first_error(play, capsys):
    space = play("readme:pitch", [[("search", {"text": "loops"})], *SEARCH])
    assert re.match(r"#1 ✗ search\(text='loops'\) → ERROR: .*query", capsys.readouterr().out)
    assert len(space["state"].steps) == len(space["server"].requests) == 1


@about("readme:simple-story")
def test_the_simple_story_runs_with_what_it_names(play, capsys):
    space = play("readme:simple-story", GREETING)
    assert timeless(capsys.readouterr().out) == GREETED
    assert space["state"].step_count == 3


def flaky(request):
    """Search, again after whatever went wrong, then finish."""
    told = request.messages[-1]
    if told["role"] == "tool" and "ask" in told["content"]:
        return [("done", {"answer": "written"})]
    return [("web_search", {"query": "who"})]


@about("readme:two-hooks")
def test_redact_pii_leaves_no_address_on_the_wire_or_on_disk(play):
    space = play("readme:two-hooks", flaky)
    space["sink"].flush()
    assert len(space["ran"]) == 2  # the address of the first call's error and that of the second one's result
    assert "@example.com" not in sent(space["server"])
    assert sent(space["server"]).count("[email]") >= 3
    assert "@example.com" not in written(Path("traces"))
    assert "[email]" in written(Path("traces"))


@about("readme:two-hooks")
def test_retry_flaky_tool_denies_once_for_each_failure_and_lets_the_next_call_run(play, capsys):
    space = play("readme:two-hooks", flaky)
    steps = capsys.readouterr().out.splitlines()
    assert [re.match(r"#\d ([✓✗] \w+)", line).group(1) for line in steps] == [
        "✗ web_search",  # it failed
        "✗ web_search",  # it was denied
        "✓ web_search",
        "✓ done",
    ]
    assert "retry with backoff" in steps[1]
    assert len(space["ran"]) == 2


@about("readme:two-hooks")
def test_a_denied_retry_is_told_to_the_model_as_one_that_may_be_made_again(play):
    hook = play("readme:two-hooks", flaky)["RetryFlakyTool"]
    failures = [0]

    @tool
    def web_search(query: str) -> str:
        """Search the web."""
        failures[0] += 1
        if failures[0] % 2:
            raise ConnectionError("down")
        return "up"

    def make(*, is_async):
        failures[0] = 0
        searches = [("web_search", {"query": "who"})] * 5
        script = ScriptedBackend([*searches, ("done", {"answer": "found"})])
        return {"llm": script, "task": {}, "tools": tools_from([web_search], include_done=True), "hooks": [hook()]}

    run = both(make)
    told = [(step.tool_result.error, step.tool_result.error_retriable) for step in run.steps]
    kinds = [step.tool_result.error_kind for step in run.steps]
    assert [retriable for error, retriable in told if error] == [True] * 4
    assert kinds == [
        ErrorKind.NETWORK, ErrorKind.PERMISSION_DENIED, None, ErrorKind.NETWORK, ErrorKind.PERMISSION_DENIED, None,
    ]  # fmt: skip
    assert run.stop_reason == "done"


@about("readme:first-agent")
def test_the_first_agent_greets_both_with_the_model_that_it_names(play, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_MODEL", "another")
    space = play("readme:first-agent", GREETING)
    assert timeless(capsys.readouterr().out) == GREETED
    assert {request.body["model"] for request in space["server"].requests} == {"gpt-4o-mini"}
    offered = {entry["function"]["name"]: entry["function"] for entry in space["server"].requests[0].body["tools"]}
    assert offered["greet"]["description"] == "Greet someone by name."
    assert "Greet Alice and Bob, then finish." in sent(space["server"])


@about("readme:first-agent")
def test_the_first_agent_takes_at_most_the_steps_that_it_names(play, capsys):
    play("readme:first-agent", lambda request: [("greet", {"name": "Alice"})])
    assert timeless(capsys.readouterr().out) == [
        f"#{number} ✓ greet(name='Alice') → greeting: Hello, Alice! [ms]" for number in range(1, 6)
    ]


@about("readme:compact-chain")
@pytest.mark.parametrize("place", ["compact_service", "hooks"])
def test_the_chain_of_the_three_makes_the_next_request_smaller(place):
    names = {name: getattr(looplet, name) for name in ("compact_chain", "Prune", "Summarize", "Truncate")}
    chain = eval(BLOCKS["readme:compact-chain"].text, names)
    config = LoopConfig(compact_service=chain if place == "compact_service" else None)

    @tool
    def read(page: int) -> str:
        """Read a page."""
        return f"page {page} " + "word " * 800

    def policy(request):
        if not request.tools:
            return "SUMMARY: pages were read"
        page = sum(message["role"] == "tool" for message in request.messages)
        return [("read", {"page": page})]

    class AtStep8:
        def should_compact(self, state, session_log, conversation, step_num):
            return step_num == 8

    with served(policy) as (server, llm):
        task, tools = {"goal": "Read it all."}, tools_from([read], include_done=True)
        hooks = [AtStep8(), *([chain] if place == "hooks" else [])]
        list(composable_loop(llm, task, tools, hooks=hooks, config=config, max_steps=9))
        bodies = [json.dumps(request.body) for request in server.requests if request.body.get("tools")]
    sizes = [len(body) for body in bodies]
    assert len(sizes) == 9
    assert all(later > earlier for earlier, later in pairwise(sizes[:7]))
    assert sizes[7] < sizes[6] * 0.6
    assert all("Read it all." in body for body in bodies)


@about("readme:shipped-gates", "readme:shipped-context")
def test_the_shipped_hooks_go_together_and_leave_a_harmless_run_alone(tmp_path):
    hooks = [
        looplet.ApprovalHook(),
        looplet.PermissionHook(looplet.PermissionEngine()),
        looplet.ContextPressureHook(),
        looplet.ThresholdCompactHook(looplet.ContextBudget()),
        ProvenanceSink(tmp_path),
    ]
    llm = ScriptedBackend([("add", {"a": 1, "b": 2}), ("done", {"answer": "3"})])
    steps = list(composable_loop(llm, {"goal": "add"}, make_tools(), hooks=hooks))
    assert [step.tool_result.error for step in steps] == [None, None]
    assert len(Trace.load(tmp_path).roots) == 1


@about("readme:shipped-gates")
def test_permission_hook_keeps_a_tool_from_running():
    ran = []

    def make(*, is_async):
        ran.clear()

        @tool
        def delete(name: str) -> None:
            """Delete something."""
            ran.append(name)

        engine = looplet.PermissionEngine().deny("delete", reason="not here")
        llm = ScriptedBackend([("delete", {"name": "original"}), ("done", {"answer": "no"})])
        tools = tools_from([delete], include_done=True)
        return {"llm": llm, "task": {}, "tools": tools, "hooks": [looplet.PermissionHook(engine)]}

    first, _ = both(make).steps
    assert (ran, first.tool_result.error_kind) == ([], ErrorKind.PERMISSION_DENIED)
    assert "not here" in first.tool_result.error


@about("readme:approval")
@pytest.mark.parametrize(("verdict", "sent_mails"), [("approve", ["to Bob"]), ("deny", [])])
def test_a_run_pauses_for_a_human_and_goes_on_where_it_left_off(verdict, sent_mails, tmp_path):
    mails = []

    @tool
    def send(mail: str) -> str:
        """Send a mail."""
        mails.append(mail)
        return "sent"

    class Ask:
        def pre_dispatch(self, state, session_log, tool_call, step_num):
            return looplet.HookDecision(permission="ask", block="Send it?") if tool_call.tool == "send" else None

    tools = tools_from([send], include_done=True)
    llm = ScriptedBackend([("send", {"mail": "to Bob"}), ("done", {"answer": "it is out of my hands"})])
    hooks = [Ask(), looplet.ApprovalHook(), ProvenanceSink(tmp_path)]
    paused = composable_loop(llm, {"goal": "Write to Bob."}, tools, hooks=hooks)
    before = list(paused)
    assert (before, mails, paused.stop_reason) == ([], [], "waiting_for_approval")
    resumed = composable_loop(llm, tools=tools, hooks=hooks, resume=paused, verdict=verdict)
    steps = list(resumed)
    assert [(step.number, step.tool_call.tool) for step in steps] == [(1, "send"), (2, "done")]
    assert (mails, resumed.stop_reason, resumed.run_id) == (sent_mails, "done", paused.run_id)


@about("readme:pin")
def test_the_printed_pin_takes_this_version():
    requirement = Requirement(BLOCKS["readme:pin"].text)
    assert requirement.name == "looplet"
    assert looplet.__version__ in requirement.specifier


# --- the index's Python -------------------------------------------------------------------------------------------


@about("index:difference")
def test_the_difference_stops_the_run_at_what_is_not_approved(play):
    calls = [("look", {"name": "copy"}), ("delete", {"name": "copy"}), ("delete", {"name": "original"})]
    space = play("index:difference", [*([call] for call in calls), [("done", {"answer": "clean"})]])
    assert [(step.tool_call.tool, step.tool_call.args) for step in space["seen"]] == calls[:2]
    assert space["deleted"] == ["copy", "original"]  # a step comes after its tool: this is review, not prevention
    assert len(space["server"].requests) == 3


@about("index:difference")
def test_the_difference_sends_no_address(play):
    space = play("index:difference", [[("look", {"name": "copy"})], [("done", {"answer": "clean"})]])
    assert "@example.com" not in sent(space["server"])
    assert "belongs to" in sent(space["server"])


@about("index:difference")
def test_the_difference_ends_when_its_tokens_are_spent(play):
    calls = [Answer(tool_calls=[("look", {"name": "copy"})], usage=usage) for usage in [(6000, 2000), (6000, 2000)]]
    space = play("index:difference", [*calls, [("done", {"answer": "clean"})]])
    assert len(space["server"].requests) == 2
    assert [step.tool_call.tool for step in space["seen"]] == [
        "look"
    ] * 2  # the reply that reached the limit still counts


@about("index:runtime-checkable")
def test_the_four_hook_protocols_tell_who_implements_them():
    protocols = (PrePrompt, PreDispatch, PostDispatch, CheckDone)

    class Gate:
        def check_done(self, state, session_log, context, step_num): ...

        def pre_prompt(self, state, session_log, context, step_num): ...

    assert [isinstance(Gate(), protocol) for protocol in protocols] == [True, False, False, True]


@about("index:redact")
def test_redact_reaches_the_provider_and_the_trace(tmp_path):
    config = LoopConfig(redact=lambda text: text.replace("Alice", "[NAME]"))
    sink = ProvenanceSink(tmp_path)
    script = [[("look", {"name": "Alice"})], [("done", {"answer": "Alice was seen"})]]
    with served(script) as (server, llm):
        list(composable_loop(llm, {"goal": "Look at Alice."}, make_tools(), hooks=[sink], config=config))
        assert "Alice" not in sent(server)
        assert "[NAME]" in sent(server)
    sink.flush()
    assert "Alice" not in written(tmp_path)
    assert "[NAME]" in written(tmp_path)


# --- the quickstart's Python --------------------------------------------------------------------------------------


@about("quickstart:first-loop")
def test_the_first_loop_runs_with_a_model_that_refuses_what_new_models_refuse(play, capsys):
    space = play("quickstart:first-loop", SEARCH, refusing=["max_tokens", "temperature"])
    lines = timeless(capsys.readouterr().out)
    assert lines == ["#1 ✓ search(query='loops') → 1 results [ms]", "#2 ✓ done(answer='found') → 2 keys [ms]"]
    (first, *_) = space["server"].requests
    assert first.body["model"] == "gpt-5.5"
    assert first.headers["authorization"] == "Bearer sk-..."
    assert "Search the docs." in sent(space["server"])


@about("quickstart:endpoint")
def test_the_key_as_it_is_printed_is_refused_at_once(monkeypatch):
    words = shlex.split(BLOCKS["quickstart:endpoint"].text, comments=True)
    for name, value in (word.split("=", 1) for word in words if word != "export"):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="'…' at position 3"):
        OpenAIBackend.from_env()


@about("quickstart:hook")
def test_step_budget_stops_after_its_productive_steps_and_counts_no_failed_ones(play):
    space = play("quickstart:hook", None)
    assert [hook.cap for hook in space["hooks"]] == [8]

    def make(*, is_async):
        calls = [("add", {"a": 1, "b": 2}), ("boom", {}), ("add", {"a": 3, "b": 4}), ("done", {"answer": "no"})]
        hooks = [space["StepBudget"](max_productive=2)]
        return {"llm": ScriptedBackend(calls), "task": {}, "tools": make_tools(), "hooks": hooks}

    run = both(make)
    assert [step.tool_call.tool for step in run.steps] == ["add", "boom", "add"]
    assert run.stop_reason == "step_budget_exceeded"


def captured(play, policy=None) -> dict:
    return play("quickstart:trajectory", policy or [[("search", {"query": "the secret"})], *SEARCH[1:]])


@about("quickstart:trajectory", "readme:provenance-sink")
def test_the_trajectory_is_written_without_the_secret(play):
    space = captured(play)
    folder = Path("traces/run_1")
    assert json.loads((folder / "trajectory.json").read_text(encoding="utf-8"))
    assert len(list((folder / "steps").glob("*.json"))) == 2
    prompts = sorted(folder.glob("call_*.txt"))
    assert len(prompts) >= 2
    assert "Tell me the [REDACTED]." in "".join(path.read_text(encoding="utf-8") for path in prompts)
    assert "secret" not in written(folder)
    assert "secret" not in sent(space["server"])
    assert "[REDACTED] of" in sent(space["server"])
    assert len(space["server"].requests) == 2
    (root,) = Trace.load(folder).roots
    assert root.attributes[semconv.STOP_REASON] == "done"


@about("quickstart:evals")
def test_the_evals_pass_a_run_that_answers_and_fail_one_that_does_not(play):
    space = play("quickstart:evals", None)
    evals = [space["eval_returns_answer"], space["eval_stopped_cleanly"]]
    captured(play)
    assert [result.passed for result in eval_run(evals, looplet.EvalContext.from_trace("traces/run_1"))] == [True] * 2
    captured(play, SEARCH[:1])  # the server has no more to say
    assert [result.passed for result in eval_run(evals, looplet.EvalContext.from_trace("traces/run_1"))] == [False] * 2


@about("quickstart:sub-agent", "index:toolspec")
def test_a_sub_agent_is_a_function_that_runs_a_loop(tmp_path):
    def research(question: str) -> str:
        script = ScriptedBackend([("add", {"a": 40, "b": 2}), ("done", {"answer": f"{question} 42"})])
        for step in composable_loop(script, {"question": question}, make_tools()):
            last = step
        return last.tool_result.data["answer"]

    spec = ToolSpec("research", "Find out.", {"question": "what to find out"}, research)
    outer = ScriptedBackend([("research", {"question": "how many?"}), ("done", {"answer": "42"})])
    sink = ProvenanceSink(tmp_path)
    first, _ = composable_loop(outer, {}, tools_from([spec], include_done=True), hooks=[sink])
    assert first.tool_result.data == "how many? 42"
    trace = Trace.load(tmp_path)
    (root,) = trace.roots
    (inner,) = [span for span in trace.spans if span.name.startswith(semconv.INVOKE_AGENT) and span is not root]
    assert inner.parent.name == f"{semconv.EXECUTE_TOOL} research"


@about("quickstart:planner")
def test_a_planner_is_a_hook_that_reads_the_session_log():
    class Planner:
        def pre_prompt(self, state, session_log, context, step_num):
            return looplet.InjectContext(f"plan: step {len(session_log.entries) + 1} is next")

    def make(*, is_async):
        script = ScriptedBackend([("add", {"a": 1, "b": 2}), ("done", {"answer": "3"})])
        return {"llm": script, "task": {}, "tools": make_tools(), "hooks": [Planner()]}

    prompts = [step.prompt for step in both(make).steps]
    assert ["plan: step 1 is next" in prompts[0], "plan: step 2 is next" in prompts[1]] == [True, True]


@about("quickstart:router-1", "quickstart:router-2")
def test_the_router_owns_the_token_counters_and_they_are_up_to_date_at_each_step():
    calls = [("look", {"name": "loops"}), ("done", {"answer": "found"})]
    with served([Answer(tool_calls=[call], usage=(100, 20)) for call in calls]) as (_, llm):
        router = looplet.BackendRouter(llm)
        run = composable_loop(router, {}, make_tools())
        seen = [(router.total_input_tokens, router.total_output_tokens, step.usage.total_tokens) for step in run]
    assert seen == [(100, 20, 120), (200, 40, 120)]


@about("quickstart:memory")
def test_a_memory_manager_is_a_static_source_and_a_compact_service():
    prompts = []

    class Look:
        def should_compact(self, state, session_log, conversation, step_num):
            return step_num == 4

        def pre_prompt(self, state, session_log, context, step_num):
            prompts.append(str(context))

    def make(*, is_async):
        prompts.clear()
        calls = [("look", {"name": f"part {n} " + "word " * 200}) for n in range(4)]
        llm = ScriptedBackend([*calls, ("done", {"answer": "seen"})])
        memory = [looplet.StaticMemorySource("The user is called Ada.")]
        config = LoopConfig(memory_sources=memory, compact_service=looplet.Truncate(keep_recent=1))
        return {"llm": llm, "task": {"goal": "look"}, "tools": make_tools(), "hooks": [Look()], "config": config}

    assert both(make).stop_reason == "done"
    assert ["The user is called Ada." in prompt for prompt in prompts] == [True] * 5
    assert ["part 0" in prompt for prompt in prompts] == [False, True, True, False, False]


# --- commands -----------------------------------------------------------------------------------------------------

SCRIPTED_HELLO = ("readme:hello-scripted", "readme:dogfood-hello", "index:dogfood-hello")


@about(*SCRIPTED_HELLO)
@pytest.mark.parametrize("name", SCRIPTED_HELLO)
def test_hello_world_runs_by_script(name, tmp_path):
    done = type_in(BLOCKS[name], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert timeless(done.stdout)[:3] == HELLO_LINES
    assert len(done.stdout.splitlines()) == 4


@about("readme:ollama")
def test_hello_world_runs_against_the_endpoint_of_the_command(tmp_path):
    with OpenAIServer(policy=HELLO) as server:
        done = type_in(BLOCKS["readme:ollama"], tmp_path, server_url=server.base_url)
        assert {request.body["model"] for request in server.requests} == {"llama3.1"}
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer ollama"}
    assert (done.returncode, timeless(done.stdout)[:3]) == (0, HELLO_LINES)


@about("readme:hello", "quickstart:endpoint", "quickstart:hello", "quickstart:hello-output")
@pytest.mark.parametrize("name", ["readme:hello", "quickstart:hello"])
def test_hello_world_checks_the_wiring_of_the_exported_endpoint(name, tmp_path):
    with OpenAIServer(policy=HELLO, refusing=["max_tokens", "temperature"]) as server:
        exported = shlex.split(BLOCKS["quickstart:endpoint"].runnable(server.base_url), comments=True)
        env = dict(word.split("=", 1) for word in exported if word != "export")
        done = type_in(BLOCKS[name], tmp_path, **env)
        assert {request.body["model"] for request in server.requests} == {"gpt-5.5"}
    *greetings, last = done.stdout.splitlines()
    assert [bool(re.fullmatch(r"#\d ✓ greet\(name='\w+'\) → .+ \[\d+ms\]", line)) for line in greetings] == [True] * 3
    assert last.startswith("#4 ✓ done(")


@pytest.fixture
def examples():
    if not (ROOT / "examples").exists():
        pytest.skip("examples/ is in the checkout only")


AUDIT = [[("write_report", {"summary": "Nothing was looked at."})], [("done", {"answer": "F"})]]


@about("readme:dep-doctor")
def test_dependency_doctor_asks_the_endpoint_of_the_command(tmp_path, examples):
    with OpenAIServer(policy=AUDIT) as server:
        done = type_in(BLOCKS["readme:dep-doctor"], tmp_path, server_url=server.base_url)
        assert {request.body["model"] for request in server.requests} == {"llama3.1"}
        assert len(server.requests) == 2
    assert "#1 ✓ write_report(" in done.stdout
    assert "DEPENDENCY DOCTOR" in done.stdout


@about("readme:dep-doctor-scripted")
def test_dependency_doctor_runs_by_script(tmp_path, examples):
    done = type_in(BLOCKS["readme:dep-doctor-scripted"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "CVE-2020-14343" in done.stdout


@about("quickstart:show")
def test_the_trajectory_can_be_shown(play, tmp_path):
    captured(play)
    done = type_in(BLOCKS["quickstart:show"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "✓ search(query='the [REDACTED]')" in done.stdout
    assert "secret" not in done.stdout


@about("quickstart:eval")
def test_the_evals_run_against_the_saved_trajectory(play, tmp_path):
    Path("eval_my_agent.py").write_text(BLOCKS["quickstart:evals"].text, encoding="utf-8")
    captured(play)
    passed = type_in(BLOCKS["quickstart:eval"], tmp_path)
    captured(play, SEARCH[:1])  # the server has no more to say
    failed = type_in(BLOCKS["quickstart:eval"], tmp_path)
    assert (passed.returncode, failed.returncode) == (0, 1)
    assert "eval_returns_answer" in passed.stdout


# --- each document from top to bottom -----------------------------------------------------------------------------


def whoever(request):
    """Call the first tool once with what it asks for, then finish."""
    if any(message["role"] == "tool" for message in request.messages):
        return [("done", {"answer": "done"})]
    function = request.tools[0]["function"]
    return [(function["name"], dict.fromkeys(function["parameters"]["properties"], "Alice"))]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_blocks_of_a_document_run_one_after_the_other_in_one_namespace(seed, play, capsys):
    space: dict = {"__name__": seed}
    blocks = [block for block in rows("python") if block.seed == seed and not block.pending]
    for block in blocks:
        play(name_of(block), whoever, space=space)
    assert ("✓ done(" in capsys.readouterr().out) == any("print(step" in block.text for block in blocks)

"""Memory sources: one message after the system prompt, replaced only when its text has changed."""

import os

import pytest

from looplet import (
    AgentsMdMemorySource,
    CallableMemorySource,
    ConfigError,
    LoopConfig,
    Message,
    StaticMemorySource,
    composable_loop,
)
from looplet.telemetry import semconv
from looplet.telemetry.runs import runs_of
from looplet.testing import AsyncMockLLMBackend, AsyncScriptedBackend, MockLLMBackend, ScriptedBackend
from tests.support import both, make_tools

CALLS = [("add", {"a": 1, "b": 1}), ("add", {"a": 2, "b": 2}), ("done", {"answer": "ok"})]


def maker(sources, made, **config):
    def make(is_async):
        made.append((AsyncScriptedBackend if is_async else ScriptedBackend)(CALLS))
        return {
            "llm": made[-1],
            "task": {"goal": "g"},
            "tools": make_tools(),
            "config": LoopConfig(memory_sources=sources(), **config),
        }

    return make


def memory_of(request):
    return [m.text for m in request if m.text.startswith("MEMORY\n")]


def test_memory_stands_between_the_system_prompt_and_the_task_in_every_request():
    made = []
    both(maker(lambda: [StaticMemorySource("be kind"), StaticMemorySource(" "), StaticMemorySource("be brief")], made,
               system_prompt="You add."))  # fmt: skip
    for request in made[0].requests:
        assert [m.text for m in list(request)[:2]] == ["MEMORY\nbe kind\n\nbe brief", "goal: g"]


def test_memory_is_written_once_while_it_stays_the_same():
    outcome = both(maker(lambda: [StaticMemorySource("be kind")], [], system_prompt="You add."))
    (view,) = runs_of(outcome.trace)
    said = [chat.attributes.get(semconv.INPUT_MESSAGES, "") for chat in view.chats]
    assert ["be kind" in text for text in said] == [True, False, False]
    assert [m.text for m in view.request(view.chats[2])[:3]] == ["You add.", "MEMORY\nbe kind", "goal: g"]


def test_memory_that_changes_is_replaced_and_the_trace_tells_each_request():
    made = []
    outcome = both(maker(lambda: [CallableMemorySource(lambda state: f"{len(state.steps) // 2} pairs")], made))
    assert [memory_of(request) for request in made[0].requests] == [
        ["MEMORY\n0 pairs"], ["MEMORY\n0 pairs"], ["MEMORY\n1 pairs"]
    ]  # fmt: skip
    (view,) = runs_of(outcome.trace)
    assert [view.request(chat) for chat in view.chats] == [list(request) for request in made[0].requests]


def test_memory_that_comes_and_goes_leaves_nothing_behind():
    made = []
    both(maker(lambda: [CallableMemorySource(lambda state: "now" if len(state.steps) == 1 else None)], made))
    assert [memory_of(request) for request in made[0].requests] == [[], ["MEMORY\nnow"], []]


def test_a_source_may_be_async():
    async def load(state):
        return f"{len(state.steps)} steps"

    made = []
    both(maker(lambda: [CallableMemorySource(load)], made))
    assert memory_of(made[0].requests[2]) == ["MEMORY\n2 steps"]


def test_any_object_with_load_is_a_source():
    class Own:
        def load(self, state):
            return "mine"

    made = []
    both(maker(lambda: [Own()], made))
    assert memory_of(made[0].requests[0]) == ["MEMORY\nmine"]


def test_memory_is_redacted():
    made = []
    outcome = both(
        maker(lambda: [StaticMemorySource("mail bob@x.org")], made, redact=lambda t: t.replace("bob@x.org", "[m]"))
    )
    assert memory_of(made[0].requests[0]) == ["MEMORY\nmail [m]"]
    assert "bob@x.org" not in str([node.attributes for node in outcome.trace.spans])


def test_hooks_see_memory_in_the_prompt_as_it_is_now():
    seen = []

    class Look:
        def pre_prompt(self, state, session_log, ctx, step_num):
            seen.append([line for line in ctx.splitlines() if line.endswith(" pairs")])

    def make(is_async):
        source = CallableMemorySource(lambda state: f"{len(state.steps) // 2} pairs")
        return {**maker(lambda: [source], [])(is_async), "hooks": [Look()]}

    both(make)
    assert seen[:3] == [["0 pairs"], ["0 pairs"], ["1 pairs"]]


def test_a_text_backend_reads_memory_before_its_tools():
    class Keeps(MockLLMBackend):
        def generate(self, prompt, **settings):
            prompts.append((settings["system_prompt"], prompt))
            return super().generate(prompt, **settings)

    class AsyncKeeps(AsyncMockLLMBackend):
        async def generate(self, prompt, **settings):
            return await super().generate(prompt, **settings)

    prompts = []

    def make(is_async):
        return {
            "llm": (AsyncKeeps if is_async else Keeps)(),
            "task": {"goal": "g"},
            "tools": make_tools(),
            "config": LoopConfig(memory_sources=[StaticMemorySource("be kind")], system_prompt="You add."),
        }

    both(make)
    ((system, prompt),) = prompts
    assert system == "You add."
    assert prompt.index("MEMORY\nbe kind") < prompt.index("TOOLS") < prompt.index("goal: g")


def test_a_source_that_raises_ends_the_run_as_a_hook_does():
    def broken(state):
        if state.steps:
            raise OSError("disk gone")
        return "fine"

    outcome = both(maker(lambda: [CallableMemorySource(broken)], []))
    assert (outcome.stop_reason, outcome.raised, len(outcome.steps)) == ("error", "OSError", 1)
    (span,) = [n for n in outcome.trace.spans if n.name == semconv.PRE_PROMPT and semconv.ERROR_TYPE in n.attributes]
    assert span.attributes[semconv.HOOK_NAME] == "CallableMemorySource"


def test_a_source_that_returns_no_text_is_named():
    with pytest.raises(ConfigError, match=r"CallableMemorySource\.load returned int; it must return a str"):
        list(composable_loop(ScriptedBackend(CALLS), {"goal": "g"}, make_tools(),
                             config=LoopConfig(memory_sources=[CallableMemorySource(lambda state: 3)])))  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StaticMemorySource(3), "takes a str, not int"),
        (lambda: CallableMemorySource("text"), "takes a function of the state, not str"),
    ],
)
def test_mistakes_are_named_where_they_are_made(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# --- AGENTS.md --------------------------------------------------------------------------------------------------------


def test_agents_md_is_read_from_a_folder_or_a_file(tmp_path, monkeypatch):
    (tmp_path / "AGENTS.md").write_text("use tabs\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    sources = [
        AgentsMdMemorySource(),
        AgentsMdMemorySource(tmp_path),
        AgentsMdMemorySource(str(tmp_path / "AGENTS.md")),
    ]
    monkeypatch.chdir("/")
    assert [source.load(None) for source in sources] == ["use tabs\n"] * 3


def test_agents_md_is_read_again_when_it_has_changed(tmp_path):
    file = tmp_path / "AGENTS.md"
    source = AgentsMdMemorySource(tmp_path)
    assert source.load(None) == ""
    file.write_text("one", encoding="utf-8")
    assert source.load(None) == "one"
    before = file.stat()
    file.write_text("two", encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert source.load(None) == "two"
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert source.load(None) is source.load(None)
    file.unlink()
    assert source.load(None) == ""


def test_agents_md_that_is_edited_during_a_run_reaches_the_next_request(tmp_path):
    file = tmp_path / "AGENTS.md"
    file.write_text("first", encoding="utf-8")

    class Edit:
        def post_dispatch(self, state, session_log, tool_call, tool_result, step_num):
            file.write_text("second version", encoding="utf-8")

    backend = ScriptedBackend(CALLS)
    config = LoopConfig(memory_sources=[AgentsMdMemorySource(tmp_path)])
    list(composable_loop(backend, {"goal": "g"}, make_tools(), hooks=[Edit()], config=config))
    assert [memory_of(r) for r in backend.requests[:2]] == [["MEMORY\nfirst"], ["MEMORY\nsecond version"]]
    assert isinstance(backend.requests[0][0], Message)

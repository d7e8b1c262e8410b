"""`preview_prompt`: what the model will see, compared with what it does see."""

import pytest

from looplet import (
    CallableMemorySource,
    ConfigError,
    DefaultState,
    LoopConfig,
    StaticMemorySource,
    composable_loop,
    preview_prompt,
)
from tests.support import make_tools

TASK = {"goal": "add", "numbers": [1, 2], "note": "═══ mind the rule ═══"}
CONFIGS = {
    "plain": LoopConfig(),
    "system": LoopConfig(system_prompt="You add."),
    "memory": LoopConfig(system_prompt="You add.", memory_sources=[StaticMemorySource("be kind")]),
    "memory_alone": LoopConfig(memory_sources=[CallableMemorySource(lambda state: "be kind")]),
    "redacted": LoopConfig(system_prompt="You add.", redact=lambda text: text.replace("add", "***")),
}


class Text:
    """A backend with nothing but `generate`, system prompt and all in one text."""

    def __init__(self, *replies):
        self.replies = [*replies, '{"tool": "done", "args": {"answer": "ok"}}']
        self.prompts = []

    def generate(self, prompt):
        self.prompts.append(prompt)
        return self.replies[len(self.prompts) - 1]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_preview_is_the_text_of_the_first_request(config):
    backend = Text()
    steps = list(composable_loop(backend, TASK, make_tools(), config=config))
    assert preview_prompt(TASK, make_tools(), config=config) == backend.prompts[0] == steps[0].prompt


def test_a_preview_needs_nothing():
    assert preview_prompt() == "═══ 0 user ═══\n"
    assert "goal: g" in preview_prompt({"goal": "g"})


def test_the_preview_of_a_running_state_is_its_next_request():
    backend, state = Text('{"tool": "add", "args": {"a": 1, "b": 2}}'), DefaultState()
    run = composable_loop(backend, TASK, make_tools(), state=state)
    previews = [preview_prompt(tools=make_tools(), state=state) for _ in run]
    assert backend.prompts[1] == previews[0]


def test_a_preview_leaves_its_arguments_alone():
    state, task = DefaultState(), dict(TASK)
    preview_prompt(task, make_tools(), state, config=CONFIGS["memory"], session_log=None, step_number=3)
    assert (state, task) == (DefaultState(), TASK)


def test_a_source_that_is_awaited_cannot_be_previewed():
    async def load(state):
        return "later"

    with pytest.raises(ConfigError, match=r"CallableMemorySource\.load is async"):
        preview_prompt(TASK, config=LoopConfig(memory_sources=[CallableMemorySource(load)]))


@pytest.mark.parametrize(
    ("sources", "words"),
    [("text", r"memory_sources=\[StaticMemorySource\(text\)\]"), (["text"], "for a text: StaticMemorySource")],
)
def test_what_is_no_memory_source_is_named(sources, words):
    with pytest.raises(ConfigError, match=words):
        preview_prompt(TASK, config=LoopConfig(memory_sources=sources))

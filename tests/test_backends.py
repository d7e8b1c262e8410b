"""Whatever `llm=` is: the smallest backends, the full ones, and what is wrong with the others."""

import pytest

from looplet import (
    ConfigError,
    LoopConfig,
    LoopletError,
    Message,
    Reply,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.backends.adapter import Model
from looplet.testing import (
    AsyncMockLLMBackend,
    LLMResponsesExhausted,
    MockLLMBackend,
    PolicyBackend,
    ScriptedBackend,
    assert_exhausted,
)


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def tools():
    return tools_from([add], include_done=True)


ADD = '{"tool": "add", "args": {"a": 1, "b": 2}, "reasoning": "sum"}'
DONE = '{"tool": "done", "args": {"answer": "3"}}'


def test_the_smallest_backend_is_a_generate_method():
    class Smallest:
        def __init__(self):
            self.prompts = []

        def generate(self, prompt):
            self.prompts.append(prompt)
            return [ADD, DONE][len(self.prompts) - 1]

    backend = Smallest()
    steps = list(composable_loop(backend, {"goal": "g"}, tools(), system_prompt="be nice"))
    assert [s.tool_result.data for s in steps] == [3, {"status": "completed", "answer": "3"}]
    first, second = backend.prompts
    assert "be nice" in first
    assert "add(a: integer, b: integer)" in first
    assert ADD in second
    assert "═══ 4 tool [call_1] ═══\n3" in second


def test_generate_gets_only_the_arguments_it_takes():
    seen = {}

    class Backend:
        def generate(self, prompt, *, max_tokens, temperature, top_p=1.0):
            seen.update(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
            return DONE

    list(composable_loop(Backend(), {}, tools(), config=LoopConfig(max_tokens=7, generate_kwargs={"top_p": 0.5})))
    assert seen == {"max_tokens": 7, "temperature": 0.2, "top_p": 0.5}


def test_generate_with_tools_speaks_content_blocks():
    class Blocks:
        def generate_with_tools(self, prompt, *, tools, max_tokens, system_prompt, temperature):
            assert tools[0]["input_schema"]["type"] == "object"
            return [
                {"type": "text", "text": "ok"},
                {"type": "tool_use", "id": "t1", "name": "done", "input": {"answer": "x"}},
            ]

    (step,) = composable_loop(Blocks(), {}, tools())
    assert (step.tool_call.tool, step.tool_call.call_id) == ("done", "t1")


def test_tools_can_be_taught_in_text_to_a_chat_backend():
    backend = PolicyBackend(lambda messages: DONE)
    loop = composable_loop(backend, {"goal": "g"}, tools(), config=LoopConfig(use_native_tools=False))
    assert [s.tool_call.tool for s in loop] == ["done"]


def test_a_text_call_from_a_native_backend_becomes_a_native_one_in_the_conversation():
    backend = ScriptedBackend([ADD, DONE])
    list(composable_loop(backend, {"goal": "g"}, tools()))
    assert [part["type"] for part in backend.requests[1][1].parts] == ["tool_call"]


@pytest.mark.parametrize(
    ("llm", "words"),
    [
        (object(), "object has none"),
        (type("Backend", (), {"generat": lambda self: 1})(), "did you mean 'generate'"),
        (ScriptedBackend, "not the class"),
    ],
)
def test_an_object_that_is_no_backend_is_refused_at_the_call(llm, words):
    with pytest.raises(ConfigError, match=words):
        composable_loop(llm, {}, tools())


def test_generate_kwargs_that_nobody_takes_are_refused_at_the_call():
    class Backend:
        def generate(self, prompt):
            return DONE

    with pytest.raises(ConfigError, match="generate_kwargs has 'top_p'"):
        composable_loop(Backend(), {}, tools(), config=LoopConfig(generate_kwargs={"top_p": 1}))


def test_an_async_backend_under_for_names_the_cure():
    with pytest.raises(ConfigError, match="async for"):
        composable_loop(AsyncMockLLMBackend([DONE]), {}, tools())

    class Sneaky:
        def chat(self, messages, **settings):
            async def later():
                return Reply()

            return later()

    (step,) = composable_loop(Sneaky(), {}, tools())
    assert "async for" in step.tool_result.error
    async_composable_loop(AsyncMockLLMBackend([DONE]), {}, tools())


def test_a_backend_that_returns_nonsense_fails_in_words():
    model = Model(ScriptedBackend([]), LoopConfig(), sync=True)
    from looplet.boundary import Boundary

    with pytest.raises(LoopletError, match=r"chat\(\) returned int; it must return a looplet.Reply"):
        model.reply(3, Boundary())


def test_scripts_end_and_say_so():
    backend = MockLLMBackend([DONE, ValueError("x")], cycle=False)
    with pytest.raises(AssertionError, match="2 of 2"):
        assert_exhausted(backend)
    assert backend.generate("") == DONE
    with pytest.raises(ValueError, match="x"):
        backend.generate("")
    with pytest.raises(LLMResponsesExhausted, match="2 replies"):
        backend.generate("")
    backend.reset()
    assert backend.generate("") == DONE
    scripted = ScriptedBackend([ADD])
    scripted.chat([Message.of_text("user", "")])
    assert_exhausted(scripted)
    with pytest.raises(LLMResponsesExhausted):
        scripted.chat([])

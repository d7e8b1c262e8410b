"""What is said at the call, about arguments that cannot work: to users who make the usual mistakes."""

from __future__ import annotations

import dataclasses
import inspect
import logging

import pytest

from looplet import (
    AnthropicBackend,
    AsyncOpenAIBackend,
    BaseToolRegistry,
    Budget,
    BudgetCap,
    CancelToken,
    ConfigError,
    Conversation,
    DefaultState,
    LoopConfig,
    OpenAIBackend,
    ProvenanceSink,
    ResilientBackend,
    SessionLog,
    ToolSpec,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.testing import MockLLMBackend, ScriptedBackend

DONE = ("done", {"answer": "x"})


@tool
def greet(name: str) -> str:
    """Greet someone by name."""
    return f"Hello, {name}!"


class Watch:
    def pre_dispatch(self, state, log, call, step):
        return None


class Enough:
    def should_stop(self, state, step, entities):
        return True


def loop(**given):
    """Make a run, without running it."""
    usual = {"llm": ScriptedBackend([DONE]), "task": {}, "tools": tools_from([greet], include_done=True)}
    return composable_loop(**{**usual, **given})


def refusal(make, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    return str(caught.value)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (loop, {"max_step": 3}, "composable_loop takes no argument 'max_step'; did you mean 'max_steps'?"),
        (async_composable_loop, {"hook": []}, "async_composable_loop takes no argument 'hook'; did you mean 'hooks'?"),
        (loop, {"redact": str.upper}, "no argument 'redact': it is a setting, config=LoopConfig(redact=...)"),
        (loop, {"meter_provider": 1}, "composable_loop takes no argument 'meter_provider': "),
        (LoopConfig, {"max_step": 3}, "LoopConfig takes no argument 'max_step'; did you mean 'max_steps'?"),
        (OpenAIBackend, {"modle": "m"}, "OpenAIBackend takes no argument 'modle'; did you mean 'model'?"),
        (AsyncOpenAIBackend, {"modle": "m"}, "AsyncOpenAIBackend takes no argument 'modle'; did you mean 'model'?"),
        (OpenAIBackend.from_env, {"modle": "m"}, "OpenAIBackend takes no argument 'modle'; did you mean 'model'?"),
        (AnthropicBackend, {"api_kay": "m"}, "AnthropicBackend takes no argument 'api_kay'; did you mean 'api_key'?"),
        (ResilientBackend, {"retry": 2}, "ResilientBackend takes no argument 'retry'; did you mean 'retries'?"),
        (ToolSpec, {"exec": len}, "ToolSpec takes no argument 'exec'; did you mean 'execute'?"),
        (tools_from, {"include_don": 1}, "tools_from takes no argument 'include_don'; did you mean 'include_done'?"),
        (Budget, {"token": 1}, "Budget takes no argument 'token'; did you mean 'tokens'?"),
        (BudgetCap, {"token": 1}, "BudgetCap takes no argument 'token'; did you mean 'tokens'?"),
        (ProvenanceSink, {"folder": "x"}, "ProvenanceSink takes no argument 'folder'; it takes: dir, fsync, redact, "),
    ],
)
def test_an_argument_that_nobody_has_is_named_with_the_right_one(make, given, words):
    assert words in refusal(make, **given)


def test_a_setting_of_the_decorator_that_nobody_has_is_named_with_the_right_one():
    assert refusal(tool(timeout=5), len) == "@tool has no setting 'timeout'; did you mean 'timeout_s'?"
    registry = BaseToolRegistry()
    assert "did you mean 'timeout_s'?" in refusal(registry.tool(timeout=5), greet.execute)


def test_a_changed_copy_of_a_config_is_checked_too():
    words = refusal(dataclasses.replace, LoopConfig(), max_step=3)
    assert words == "LoopConfig takes no argument 'max_step'; did you mean 'max_steps'?"


def test_checked_names_leave_the_signature_as_it_was():
    assert list(inspect.signature(composable_loop).parameters)[:3] == ["llm", "task", "tools"]
    assert inspect.signature(LoopConfig).parameters["max_steps"].default == 15
    assert "ToolSpec" in ToolSpec.__init__.__qualname__


def test_a_type_error_from_within_stays_what_it_is():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'llm'"):
        composable_loop(max_steps=3)


ORIGINAL = {
    "recovery_temperature": "temperature=",
    "done_tool_schemas": "done_parameters=",
    "tool_result_persist_dir": "ProvenanceSink(dir)",
    "build_briefing": "pre_prompt",
    "extract_entities": "session_log.record(..., entities=[...])",
    "build_trace": "run.result",
    "build_prompt": "pre_prompt",
    "extract_step_metadata": "session_log.record(..., findings=[...])",
    "domain": "hooks",
    "reactive_recovery": "leave it out",
    "max_briefing_tokens": "let them return less",
    "context_window_steps": "compact_service=PruneToolResults(keep_recent=5)",
    "context_inline_per_step_chars": "tool_result_max_chars=",
    "context_window_total_chars": "context_window=",
    "router": "llm=",
    "checkpoint_dir": "no checkpoints yet",
    "tracer": "tracer_provider=",
    "recovery_registry": "parse_recovery=",
    "output_schema": "output_type=",
    "initial_checkpoint": "resume=",
    "cache_policy": "cache=CachePolicy()",
    "render_messages_override": "context.rewrite",
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_setting_of_the_original_is_told_where_it_went(name):
    words = refusal(LoopConfig, **{name: None})
    assert words.startswith(f"LoopConfig takes no argument {name!r}: ")
    assert ORIGINAL[name] in words


# --- kinds ------------------------------------------------------------------------------------------------------------


def work(x):
    """Work."""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"timeout_s": "5"}, "tool 'work': timeout_s must be more than 0 seconds, not '5'"),
        ({"timeout_s": True}, "timeout_s must be more than 0 seconds, not True"),
        ({"timeout_s": float("nan")}, "timeout_s must be more than 0 seconds, not nan"),
        ({"retries": "2"}, "retries must be a whole number from 0, not '2'"),
        ({"concurrent_safe": "no"}, "concurrent_safe must be True or False, not 'no'"),
        ({"free": 1}, "free must be True or False, not 1"),
        ({"requires": "db"}, "requires must be a list of names, not 'db'"),
        ({"tags": None}, "tags must be a list of names, not None"),
        ({"description": 5}, "description must be a str, not 5"),
        ({"name": 5}, "tool name 5: use 1 to 64 ASCII letters"),
    ],
)
def test_a_setting_of_a_tool_has_its_kind(given, words):
    assert words in refusal(tool(**given), work)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tool("says hello"), "@tool takes its settings by name, @tool(description=...), not 'says hello'"),
        (lambda: tools_from([5]), "a tool is a function or a ToolSpec, not 5"),
        (lambda: tools_from([tools_from([])]), "a tool is a function or a ToolSpec, not BaseToolRegistry"),
        (lambda: tools_from("greet"), "tools_from takes a list of tools, not 'greet'"),
        (lambda: tools_from(greet), "tools_from takes a list of tools, not ToolSpec: tools_from([greet])"),
        (lambda: ToolSpec("a", "b", {}, 5), "tool 'a': execute must be a function, not 5"),
        (lambda: ToolSpec("a", "b", ["x"], len), "tool 'a': parameters must be a dict, not ['x']"),
    ],
)
def test_what_is_no_tool_is_refused_by_its_name(make, words):
    assert words in refusal(make)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_steps": "3"}, "max_steps must be a whole number from 0, not '3'"),
        ({"max_steps": -1}, "max_steps must be a whole number from 0, not -1"),
        ({"system_prompt": 5}, "system_prompt must be a str, not 5"),
        ({"agent_name": 5}, "agent_name must be a str, not 5"),
        ({"done_tool": None}, "done_tool must be a str, not None"),
        ({"done_tools": [1]}, "done_tools must be a list of names, not [1]"),
        ({"capture_content": "false"}, "capture_content must be True or False, not 'false'"),
        ({"use_native_tools": "no"}, "use_native_tools must be True or False, not 'no'"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"cancel_token": CancelToken}, "cancel_token takes a CancelToken(), not the class CancelToken"),
        ({"budget": Budget}, "budget takes a Budget(...), not the class Budget"),
    ],
)
def test_a_setting_of_a_config_has_its_kind(given, words):
    assert words in refusal(LoopConfig, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "Greet Alice."}, "task must be a dict; write task={\"goal\": 'Greet Alice.'}"),
        ({"task": 5}, 'task must be a dict; write task={"goal": 5}'),
        ({"max_steps": "3"}, "max_steps must be a whole number from 0, not '3'"),
        ({"tools": [work]}, "tools must be a registry, not a list: tools=tools_from([...], include_done=True)"),
        ({"tools": work}, "tools must be a registry, not function: tools=tools_from([...], include_done=True)"),
        ({"tools": BaseToolRegistry}, "tools must be a registry, not the class BaseToolRegistry"),
        ({"hooks": Watch()}, "hooks must be a list of objects, not Watch: hooks=[MyHook()]"),
        ({"hooks": Watch}, "hooks must be a list of objects, not the class Watch"),
        ({"hooks": [Watch]}, "pass Watch(), not the class Watch"),
        ({"config": LoopConfig}, "config must be a LoopConfig, not the class LoopConfig"),
        ({"config": {"max_steps": 3}}, "config must be a LoopConfig, not dict: config=LoopConfig(...)"),
        ({"state": DefaultState}, "state must have a list `steps`, like DefaultState(), not the class DefaultState"),
        ({"session_log": SessionLog}, "session_log must be a SessionLog(), not the class SessionLog"),
        ({"conversation": Conversation}, "conversation must be a Conversation(), not the class Conversation"),
        ({"conversation": [{"role": "user"}]}, "conversation must be a Conversation(), not [{'role': 'user'}]"),
        ({"llm": OpenAIBackend}, "pass OpenAIBackend(...), not the class"),
        ({"llm": "gpt-4o"}, "pass OpenAIBackend(model='gpt-4o')"),
    ],
)
def test_an_argument_of_the_loop_has_its_kind(given, words):
    assert words in refusal(loop, **given)


@pytest.mark.parametrize("make", [ScriptedBackend, MockLLMBackend])
def test_a_script_is_a_list(make):
    assert "takes a list of replies" in refusal(make, "hello")


def test_one_call_is_no_script():
    assert "takes a list of replies" in refusal(ScriptedBackend, ("greet", {"name": "Ann"}))


# --- the way out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"done_tool": "finish"}, "the config names 'finish' as a tool that ends the run, but it is not registered"),
        ({"done_tool": "finish"}, "tools_from([...], include_done=True, done_name='finish')"),
        (
            {"done_tools": ["gret"]},
            "'gret' as a tool that ends the run, but it is not registered; did you mean 'greet'?",
        ),
    ],
)
def test_a_named_ending_tool_must_be_registered(given, words):
    assert words in refusal(loop, config=LoopConfig(**given))


@pytest.mark.parametrize(
    ("given", "is_told"),
    [
        ({"tools": tools_from([greet])}, True),
        ({"tools": BaseToolRegistry()}, True),
        ({"tools": tools_from([greet], include_done=True)}, False),
        ({"tools": tools_from([greet]), "output_type": int}, False),
        ({"tools": tools_from([greet]), "config": LoopConfig(done_tools=["greet"])}, False),
        ({"tools": tools_from([greet]), "hooks": [Enough()]}, False),
    ],
)
def test_a_run_that_the_model_cannot_end_is_told_in_the_log(given, is_told, caplog):
    with caplog.at_level(logging.WARNING, "looplet"):
        loop(**given)
    told = [record.getMessage() for record in caplog.records if "cannot end this run" in record.getMessage()]
    assert len(told) == is_told
    assert all("there is no tool 'done': tools_from([...], include_done=True)" in line for line in told)


def test_a_model_is_not_told_to_call_a_done_tool_that_there_is_not():
    backend = ScriptedBackend(["just talk", ("greet", {"name": "Ann"})])
    list(loop(llm=backend, tools=tools_from([greet]), max_steps=1))
    asked = backend.requests[1][-1].text
    assert "call one of greet" in asked
    assert "done" not in asked

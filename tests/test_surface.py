"""What users were promised: every name imports from `looplet` and can be called as its signature was printed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from support import make_tools

import looplet
from looplet import MockLLMBackend, composable_loop
from looplet.testing import ScriptedBackend

ANY = object()
"""a default that nobody was told"""

# name -> the signature that users know; `ANY` stands for a default that was not said
LOOP = {
    "composable_loop": "llm, task=None, tools=None, context=None, hooks=None, config=None, state=None, "
    "session_log=None, stream=None, conversation=None, *, max_steps=None, system_prompt=None, resume=None, "
    "verdict=None, output_type=None, tracer_provider=None, meter_provider=None",
    "async_composable_loop": "llm, task=None, tools=None, context=None, hooks=None, config=None, state=None, "
    "session_log=None, stream=None, conversation=None, *, max_steps=None, system_prompt=None, resume=None, "
    "verdict=None, output_type=None, tracer_provider=None, meter_provider=None",
    "Step": "number, tool_call, tool_result",
    "Usage": "input_tokens=0, output_tokens=0, cached_tokens=0, reasoning_tokens=0, *, cost_usd=None",
    "ToolCall": "tool, args={}, reasoning='', call_id=ANY, metadata={}",
    "ToolResult": "tool, args_summary, data, error=None, error_detail=None, duration_ms=0.0, result_key=None, "
    "call_id=None, warnings=[], metadata={}",
    "DefaultState": "steps=[], queries_used=0, max_steps=15, metadata={}, step_context={}",
    "LoopConfig": "max_steps=15, *, max_tokens=ANY, system_prompt='', temperature=ANY, done_tool='done', "
    "done_tools=[], max_turn_continuations=ANY, use_native_tools=True, concurrent_dispatch=ANY, compact_service=None, "
    "memory_sources=[], cancel_token=None, approval_handler=None, context_window=ANY, tool_metadata={}, "
    "generate_kwargs={}, redact=None, checkpoint_dir=None",
    "SessionLog": "*, title='SESSION LOG', highlights_label='highlights'",
    "Conversation": "messages=ANY",
    "CancelToken": "",
    "ToolContext": "*, cancel_token=ANY, on_progress=None, session_id=None, metadata={}, llm=None, "
    "request_approval=None, warnings=[], resources={}",
    "preview_prompt": "task=None, tools=None, state=None, session_log=None, *, config=None, step_number=1",
}
BACKENDS = {
    "OpenAIBackend": "client=None, *, model=ANY, default_max_tokens=None, base_url=None, api_key=None, "
    "tool_choice='auto'",
    "AsyncOpenAIBackend": "client=None, *, model=ANY, default_max_tokens=None, base_url=None, api_key=None, "
    "tool_choice='auto'",
    "AnthropicBackend": "client=None, *, model=ANY, default_max_tokens=ANY, api_key=None",
    "AsyncAnthropicBackend": "client=None, *, model=ANY, default_max_tokens=ANY, api_key=None",
    "BackendRouter": "default, *, agent=None, compaction=None, judge=None, subagent=None",
    "ResilientBackend": "inner, *, retries=3, timeout_s=None",
    "MockLLMBackend": "responses=None, *, cycle=True",
    "CachePolicy": "",
}
TOOLS = {
    "BaseToolRegistry": "",
    "tool": "fn=None, /, *, name=None, description=None, concurrent_safe=False, free=False, timeout_s=None",
    "tools_from": "specs, *, include_think=False, include_done=False, done_name='done', done_parameters=None",
    "ToolSpec": "name, description, parameters, execute, concurrent_safe=False, free=False, timeout_s=None, "
    "requires=[], tags=[], render={}",
    "register_done_tool": "registry, *, name='done', parameters=None",
    "MCPToolAdapter": "command, *, env=None",
    "run_sub_loop": "llm, task=None, tools=None, *, max_steps=ANY, system_prompt='', hooks=None, context=None, "
    "state=None, conversation=None, config=None",
}
HOOKS = {
    "HookDecision": "block=None, stop=None, updated_args=None, updated_result=None, permission=None, *, "
    "additional_context=None, metadata={}",
    "Allow": "updated_args=None",
    "Deny": "reason, *, retry=False",
    "Block": "reason",
    "Stop": "reason",
    "Continue": "ctx=None",
    "InjectContext": "text",
    "PrePrompt": "",
    "PreDispatch": "",
    "PostDispatch": "",
    "CheckDone": "",
    "Prompt": "",
    "compact_chain": "*services",
    "Prune": "*, keep_recent=5",
    "PruneToolResults": "*, keep_recent=5",
    "Summarize": "*, keep_recent=2",
    "SummarizeCompact": "*, keep_recent=2",
    "Truncate": "*, keep_recent=2",
    "TruncateCompact": "*, keep_recent=2",
    "StaticMemorySource": "text",
    "CallableMemorySource": "fn",
    "AgentsMdMemorySource": "",
    "ApprovalHook": "",
    "PermissionHook": "engine",
    "PermissionEngine": "rules=[], default=ANY, ask_handler=None",
    "ContextPressureHook": "llm=None",
    "ThresholdCompactHook": "budget, *, fire_tier='error'",
    "ContextBudget": "context_window=200000, warning_at=120000, error_at=160000, compact_buffer=13000",
    "ProvenanceSink": "dir, *, redact=None, redact_upstream=True",
    "StreamingHook": "emitter",
    "PerToolLimitHook": "*, limits=None, default_limit=None",
    "BudgetWarningHook": "*, thresholds=(0.5, 0.2)",
    "StagnationHook": "*, threshold=3",
    "BudgetCap": "tokens=None, *, usd=None, seconds=None, steps=None, model_calls=None, tool_calls=None",
    "Redactor": "patterns=ANY",
}
SURFACE = {**LOOP, **BACKENDS, **TOOLS, **HOOKS}

NOT_CALLED = ("PrePrompt", "PreDispatch", "PostDispatch", "CheckDone", "Prompt")
"""protocols, and what only the loop makes"""

# what can be asked of a class, or of its example
ATTRIBUTES = {
    "Run": "close result run_id state stop_reason trace_id __enter__ __exit__ __iter__ __next__",
    "AsyncRun": "aclose result run_id state stop_reason trace_id __aenter__ __aexit__ __aiter__ __anext__",
    "Step": "number tool_call tool_result usage prompt pretty summary to_dict use",
    "Usage": "input_tokens output_tokens cached_tokens reasoning_tokens total_tokens cost_usd",
    "ToolCall": "to_dict",
    "ToolResult": "error_kind error_retriable to_dict",
    "DefaultState": "usage budget_remaining step_count last_error context_summary snapshot",
    "SessionLog": "record render all_entities to_list",
    "Conversation": "append truncate fork serialize deserialize",
    "CancelToken": "cancel is_cancelled raise_if_cancelled",
    "ToolContext": "approve report_progress warn",
    "OpenAIBackend": "from_env chat generate",
    "BackendRouter": "chat total_input_tokens total_output_tokens total_cost_usd",
    "AsyncOpenAIBackend": "from_env chat generate",
    "AnthropicBackend": "from_env chat generate",
    "BaseToolRegistry": "register tool dispatch tool_names tool_catalog_text tool_schemas set_resources",
    "ToolSpec": "spec_text to_api_schema",
    "MCPToolAdapter": "tools register_all close __enter__ __exit__",
    "HookDecision": "is_block is_noop",
    "Prompt": "messages rewrite",
    "ApprovalHook": "pending",
    "PermissionEngine": "allow deny ask evaluate denials",
    "ContextBudget": "classify blocking_at",
    "ThresholdCompactHook": "fired_at should_compact",
    "ProvenanceSink": "wrap_llm trajectory_hook flush export shutdown force_flush",
}
# objects whose attributes are not all known to their class
EXAMPLES: dict[str, Callable[[], Any]] = {
    "Run": lambda: looplet.composable_loop(MockLLMBackend(), {}, make_tools()),
    "AsyncRun": lambda: looplet.async_composable_loop(MockLLMBackend(), {}, make_tools()),
    "ApprovalHook": lambda: looplet.ApprovalHook(),
    "PermissionEngine": lambda: looplet.PermissionEngine(),
    "ThresholdCompactHook": lambda: looplet.ThresholdCompactHook(looplet.ContextBudget()),
    "BackendRouter": lambda: looplet.BackendRouter(ScriptedBackend([])),
}
MODULES = ("looplet.tools", "looplet.testing", "looplet.examples", "looplet.telemetry")

LATER: tuple[str, ...] = (
    # hooks that show a run to other systems, or keep it
    "CheckpointHook", "TracingHook", "MetricsHook", "LoggingHook", "EvalHook",
    # trace, replay, evals
    "replay_loop",
    # skills, bundles, cartridges, presets
    "Skill", "FileSkillStore", "SkillManager", "AgentPreset", "cartridge_to_preset", "preset_to_cartridge",
    "minimal_preset", "coding_agent_preset", "research_agent_preset",
)  # fmt: skip
"""promised, and of a later part of the work; a name that arrives moves to its table"""

LATER_PARAMETERS = {
    "composable_loop": ("meter_provider",),
    "async_composable_loop": ("meter_provider",),
    "LoopConfig": ("checkpoint_dir",),
}
"""parameters that stand in a table above and come later"""

HOOK_METHODS = {
    "pre_loop": ("state", "session_log", "context"),
    "pre_prompt": ("state", "session_log", "context", "step_num"),
    "pre_dispatch": ("state", "session_log", "tool_call", "step_num"),
    "check_permission": ("tool_call", "state"),
    "post_dispatch": ("state", "session_log", "tool_call", "tool_result", "step_num"),
    "check_done": ("state", "session_log", "context", "step_num"),
    "should_stop": ("state", "step_num", "new_entities"),
    "should_compact": ("state", "session_log", "conversation", "step_num"),
    "on_loop_end": ("state", "session_log", "context", "llm"),
    "on_event": ("payload",),
    "on_phase_end": ("phase",),
}

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
EMPTY = inspect.Parameter.empty
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def promised(name: str) -> list[inspect.Parameter]:
    """Return the parameters that users know, without those that come later."""
    made = eval(f"lambda {SURFACE[name]}: None", {"ANY": ANY})
    later = LATER_PARAMETERS.get(name, ())
    return [p for p in inspect.signature(made).parameters.values() if p.name not in later]


def actual(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(looplet, name)).parameters)


def defaults_of(value: Any) -> dict[str, Any]:
    """Return what the parameters of a callable are when they are not given; a dataclass makes some of them."""
    told = {p.name: p.default for p in inspect.signature(value).parameters.values()}
    if dataclasses.is_dataclass(value):
        fields = {f.name: f.default_factory for f in dataclasses.fields(value)}
        told |= {name: make() for name, make in fields.items() if make is not dataclasses.MISSING and name in told}
    return told


def same(default: Any, expected: Any) -> bool:
    """Tell whether two defaults are equal, an empty list and an empty tuple included."""
    if isinstance(expected, list):
        return isinstance(default, list | tuple) and list(default) == expected
    return type(default) is type(expected) and default == expected


def disagreements(name: str) -> list[str]:
    """Return where a callable differs from what users know of it: nothing when every promised call works."""
    have, expected = actual(name), promised(name)
    wanted = [p.name for p in expected if p.kind in POSITIONAL]
    taken = [p.name for p in have.values() if p.kind in POSITIONAL]
    told = [] if taken[: len(wanted)] == wanted else [f"positional are {taken}, not {wanted}"]
    defaults = defaults_of(getattr(looplet, name))
    told += [words for parameter in expected if (words := complaint(parameter, have, defaults))]
    surplus = [p for p in have.values() if p.name not in {e.name for e in expected} and p.kind not in VARIADIC]
    return told + [f"{p.name} must be given" for p in surplus if p.default is EMPTY]


def complaint(expected: inspect.Parameter, have: dict[str, inspect.Parameter], defaults: dict[str, Any]) -> str:
    """Return what is wrong with one promised parameter, an empty string when nothing is."""
    open_kinds = {p.kind for p in have.values() if p.kind in VARIADIC}
    if expected.kind in VARIADIC:
        return "" if expected.kind in open_kinds else f"no {expected}"
    if expected.name not in have:
        return "" if inspect.Parameter.VAR_KEYWORD in open_kinds else f"no parameter {expected.name}"
    if expected.default is EMPTY:
        return ""
    default = defaults[expected.name]
    if default is EMPTY or not (expected.default is ANY or same(default, expected.default)):
        return f"{expected.name} is {default!r}, not {expected.default!r}"
    named = expected.kind in POSITIONAL or have[expected.name].kind is not inspect.Parameter.POSITIONAL_ONLY
    return "" if named else f"{expected.name} cannot be named"


@pytest.mark.parametrize("name", [name for name in SURFACE if name not in NOT_CALLED])
def test_a_promised_name_can_be_called_as_it_was_printed(name):
    assert name in looplet.__all__
    assert disagreements(name) == []


@pytest.mark.parametrize("name", SURFACE)
def test_a_promised_name_imports_lazily_and_is_documented(name):
    value = getattr(looplet, name)
    assert value.__module__.startswith("looplet.")
    assert inspect.getdoc(value)


@pytest.mark.parametrize("name", LATER)
def test_what_comes_later_is_not_there(name):
    assert name not in SURFACE
    assert not hasattr(looplet, name), f"{name} is there: take it out of LATER and write its signature into a table"


@pytest.mark.parametrize("name", LATER_PARAMETERS)
def test_a_parameter_that_comes_later_is_not_there(name):
    assert set(LATER_PARAMETERS[name]) & actual(name).keys() == set()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_promised_class_has_what_was_promised(name):
    value = EXAMPLES[name]() if name in EXAMPLES else getattr(looplet, name)
    assert [attribute for attribute in ATTRIBUTES[name].split() if not hasattr(value, attribute)] == []


@pytest.mark.parametrize("module", MODULES)
def test_public_modules_can_be_imported(module):
    assert import_module(module).__doc__


def test_from_env_takes_the_model_by_name():
    for backend in (looplet.OpenAIBackend, looplet.AsyncOpenAIBackend, looplet.AnthropicBackend):
        assert inspect.signature(backend.from_env).parameters["model"].default is None


def test_a_tool_keeps_the_settings_of_its_decorator():
    @looplet.tool(name="other", description="Do it.", concurrent_safe=True, free=True, timeout_s=2.0)
    def do_it() -> None: ...

    told = (do_it.name, do_it.description, do_it.concurrent_safe, do_it.free, do_it.timeout_s)
    assert told == ("other", "Do it.", True, True, 2.0)


def recorder(names: tuple[str, ...], into: dict[str, tuple], method: str) -> Callable[..., None]:
    """Return a hook method that takes exactly these positional arguments and notes what it was given."""
    head = ", ".join(names)
    scope = {"into": into, "method": method}
    return eval(f"lambda self, {head}, /: into.setdefault(method, ({head},)) and None", scope)


def test_hook_methods_get_the_arguments_that_were_promised():
    given: dict[str, tuple] = {}
    methods = {name: recorder(arguments, given, name) for name, arguments in HOOK_METHODS.items()}
    hook = type("Everything", (), methods)()
    llm = ScriptedBackend([("add", {"a": 1, "b": 2}), ("done", {"answer": "3"})])
    run = composable_loop(llm, {"goal": "add"}, make_tools(), context="mine", hooks=[hook])
    steps = list(run)
    assert given.keys() == HOOK_METHODS.keys()
    named = {name: dict(zip(HOOK_METHODS[name], values, strict=True)) for name, values in given.items()}
    everything = [(name, value) for values in named.values() for name, value in values.items()]
    assert {value for name, value in everything if name == "context"} == {"mine"}
    assert all(value is run.state for name, value in everything if name == "state")
    assert all(value is run.session_log for name, value in everything if name == "session_log")
    assert {type(value).__name__ for name, value in everything if name in ("step_num", "new_entities")} == {"int"}
    assert {value.tool for name, value in everything if name == "tool_call"} == {"add"}
    assert [value.data for name, value in everything if name == "tool_result"] == [steps[0].tool_result.data]


def test_the_smallest_backend_is_an_object_with_generate():
    class Smallest:
        def generate(self, prompt, *, system_prompt, max_tokens, temperature):
            return '{"tool": "done", "args": {"summary": "ok"}}'

    (step,) = composable_loop(Smallest(), {}, make_tools())
    assert step.tool_result.data["answer"] == "ok"


def test_a_sub_agent_takes_five_steps_unless_somebody_says_otherwise():
    calls = [("add", {"a": n, "b": 1}) for n in range(9)]
    outcomes = [
        looplet.run_sub_loop(ScriptedBackend(calls), {}, make_tools(), **said) for said in ({}, {"max_steps": 3})
    ]
    assert [outcome["steps"] for outcome in outcomes] == [5, 3]


def test_the_config_of_a_run_is_never_changed():
    config = looplet.LoopConfig(max_steps=7)
    list(composable_loop(MockLLMBackend(), {}, make_tools(), config=config, max_steps=3, system_prompt="be brief"))
    assert (config.max_steps, config.system_prompt) == (7, "")

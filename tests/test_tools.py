"""Tools: definition, registry, context, errors as observations."""

import asyncio

import pytest

from looplet import (
    BaseToolRegistry,
    CancelToken,
    ConfigError,
    ErrorKind,
    LoopConfig,
    ToolCall,
    ToolContext,
    ToolError,
    ToolResult,
    ToolSpec,
    composable_loop,
    register_done_tool,
    tool,
    tools_from,
)
from looplet.testing import ScriptedBackend
from looplet.toolerrors import to_tool_error
from looplet.tools import register_think_tool

DONE = ("done", {"answer": "x"})


def run(spec, *replies, **rest):
    tools = spec if isinstance(spec, BaseToolRegistry) else tools_from([spec], include_done=True)
    return list(composable_loop(ScriptedBackend([*replies, DONE]), {"goal": "g"}, tools, **rest))


def test_a_decorated_function_is_a_tool_and_still_a_function():
    @tool(name="plus", description="Add.", concurrent_safe=True, free=True, timeout_s=2)
    def add(a: int, b: int = 1) -> int:
        return a + b

    assert (add.name, add.description, add(2)) == ("plus", "Add.", 3)
    assert add.parameter_names() == ["a", "b"]
    assert add.required_parameters() == ["a"]
    assert add.spec_text() == "  plus(a: integer, b?: integer)\n    Add."
    assert add.to_api_schema()["input_schema"] == add.to_json_schema()["parameters"]


def test_the_registry_refuses_two_tools_of_one_name_and_bad_names():
    registry = BaseToolRegistry()
    registry.tool(lambda: 1, name="x")
    with pytest.raises(ConfigError, match="two tools are called 'x'"):
        registry.tool(name="x")(lambda: 2)
    with pytest.raises(ConfigError, match="letters, digits"):
        ToolSpec("no spaces", "", {}, lambda: 1)
    with pytest.raises(ConfigError, match="more than 0 seconds"):
        ToolSpec("x", "", {}, lambda: 1, timeout_s=-1)
    with pytest.raises(ConfigError, match=r"takes a list of tools"):
        tools_from(lambda: 1)
    assert "x" in registry
    assert len(registry) == 1


def test_a_misspelt_setting_gets_a_hint():
    with pytest.raises(ConfigError, match="@tool has no setting 'retry'; did you mean 'retries'"):
        tool(retry=2)(lambda: 1)


def test_done_accepts_summary_as_another_name_for_answer():
    registry = BaseToolRegistry()
    register_done_tool(registry)
    loop = composable_loop(ScriptedBackend([("done", {"summary": "s"})]), {}, registry)
    (step,) = list(loop)
    assert step.tool_call.args == {"answer": "s"}
    assert loop.result.final_output == {"answer": "s"}


def test_done_can_be_renamed_and_given_other_parameters():
    tools = tools_from([], include_done=True, done_name="finish", done_parameters={"verdict": "yes or no"})
    loop = composable_loop(
        ScriptedBackend([("finish", {}), ("finish", {"verdict": "yes"})]),
        {},
        tools,
        config=LoopConfig(done_tool="finish"),
    )
    steps = list(loop)
    assert "needs argument 'verdict'" in steps[0].tool_result.error
    assert (loop.stop_reason, loop.result.final_output) == ("done", {"verdict": "yes"})


def test_ctx_gives_a_tool_what_it_needs():
    @tool
    def work(ctx, n: int) -> dict:
        """Work."""
        ctx.report_progress("half", {"n": n})
        ctx.warn("careful")
        return {"meta": ctx.metadata["k"], "asked": ctx.approve("ok?"), "db": ctx.resources}

    config = LoopConfig(tool_metadata={"k": "v"}, approval_handler=lambda prompt, options: options[0])
    step = run(work, ("work", {"n": 1}), config=config)[0]
    assert step.tool_result.data == {"meta": "v", "asked": "approve", "db": {}}
    assert step.tool_result.warnings == ("careful",)
    assert ToolContext().approve("x") is None


def test_required_resources_are_handed_over_or_missed_in_words():
    spec = ToolSpec("q", "Query.", execute=lambda ctx: ctx.resources["db"], requires=["db"])
    tools = tools_from([spec], include_done=True)
    assert "needs resource 'db'" in run(tools, ("q", {}))[0].tool_result.error
    tools.set_resources({"db": "handle"})
    assert run(tools, ("q", {}))[0].tool_result.data == "handle"


def test_free_tools_cost_no_step():
    tools = tools_from([], include_think=True, include_done=True)
    think = ("think", {"thought": "hm"})
    loop = composable_loop(ScriptedBackend([think, think, think, DONE]), {}, tools, max_steps=1)
    assert [s.tool_call.tool for s in loop] == ["think", "think", "think", "done"]
    assert loop.state.queries_used == 0


def test_async_tools_run_under_for_on_one_loop():
    loops = []

    @tool
    async def fetch(n: int) -> int:
        """Fetch."""
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return n

    steps = run(fetch, ("fetch", {"n": 1}), ("fetch", {"n": 2}))
    assert [s.tool_result.data for s in steps[:2]] == [1, 2]
    assert loops[0] is loops[1]


def test_a_tool_may_return_a_result_of_its_own():
    result = run(ToolSpec("x", "", {}, lambda: ToolResult("x", data=1, warnings=["w"])), ("x", {}))[0].tool_result
    assert (result.data, result.warnings) == (1, ("w",))


@pytest.mark.parametrize(
    ("error", "kind", "retriable"),
    [
        (TimeoutError("t"), ErrorKind.TIMEOUT, True),
        (PermissionError("p"), ErrorKind.PERMISSION_DENIED, False),
        (ConnectionResetError("c"), ErrorKind.NETWORK, True),
        (RuntimeError("HTTP 429"), ErrorKind.RATE_LIMIT, True),
        (RuntimeError("maximum context length"), ErrorKind.CONTEXT_OVERFLOW, False),
        (ValueError("v"), ErrorKind.VALIDATION, False),
        (SystemExit(3), ErrorKind.EXECUTION, False),
        (ToolError("mine", kind="parse", retriable=True), ErrorKind.PARSE, True),
    ],
)
def test_exceptions_are_observations_with_a_kind(error, kind, retriable):
    def fail():
        raise error

    result = run(ToolSpec("f", "", {}, fail), ("f", {}))[0].tool_result
    assert (result.error_kind, result.error_retriable) == (kind, retriable)
    assert to_tool_error(error).kind == kind


def test_dispatch_works_outside_of_a_loop():
    async def later(n: int) -> int:
        return n + 1

    registry = tools_from([tool(later)])
    register_think_tool(registry)
    assert registry.dispatch(ToolCall("later", {"n": 1})).data == 2
    assert "did you mean 'later'" in registry.dispatch(ToolCall("latr", {})).error
    assert registry.tool_names == ["later", "think"]
    assert "later(n: integer)" in registry.tool_catalog_text()


def test_a_cancel_token_asks():
    token = CancelToken()
    token.raise_if_cancelled()
    token.cancel()
    with pytest.raises(ToolError, match="cancelled"):
        token.raise_if_cancelled()


def test_model_given_call_ids_are_made_unique():
    twice = [ToolCall("think", {"thought": "a"}, call_id="same"), ToolCall("think", {"thought": "b"}, call_id="same")]
    steps = run(tools_from([], include_think=True, include_done=True), twice)
    assert [s.tool_call.call_id for s in steps[:2]] == ["same", "same_2"]

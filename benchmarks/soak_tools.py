"""The tools of `soak.py`: good ones, bad ones, and those that ask a model; and who counts how often each call ran."""

from __future__ import annotations

from typing import Any, Final

from billing import HELPER, KEYS_PER_TURN

from looplet import (
    BackendRouter,
    BaseToolRegistry,
    ToolContext,
    ToolError,
    ToolSpec,
    async_composable_loop,
    async_run_sub_loop,
    composable_loop,
    run_sub_loop,
    tool,
    tools_from,
)
from looplet.subagents import agent_tool

TEXT: Final = "what a tool found out, in so many words. " * 8
HELPERS: Final = ("research", "delegate", "expert")
"""the tools that start a sub-agent"""


class Tally:
    """Counts how often each call ran; takes the same memory from the first call to the last."""

    def __init__(self, turns: int) -> None:
        self._runs = bytearray((turns + 1) * KEYS_PER_TURN)

    def run(self, key: int) -> int:
        """Note that a call runs; return how often it has, this time included."""
        self._runs[key] += 1
        return self._runs[key]

    def __getitem__(self, key: int) -> int:
        return self._runs[key]

    @property
    def total(self) -> int:
        """Return how often anything ran."""
        return sum(self._runs)


def attempts_of(name: str, key: int) -> int:
    """Return how often a call is meant to run: of `flaky`, one in twenty twice, and one in eighty in vain."""
    turn = key // KEYS_PER_TURN
    return 1 if name != "flaky" or turn % 20 != 1 else 3 if turn % 80 == 1 else 2


def takes_too_long(key: int) -> bool:
    """Tell whether a call of `slow` does: every fifth."""
    return key // KEYS_PER_TURN // 19 % 5 == 2


def make_tools(router: BackendRouter, tally: Tally, helped: Tally, *, is_async: bool) -> BaseToolRegistry:
    """Return the agent's tools; `helped` counts what the sub-agents do."""

    @tool
    def note(key: int) -> str:
        """Note something."""
        helped.run(key)
        return TEXT

    make = _async_asking_tools if is_async else _asking_tools
    asking = make(router, tally, tools_from([note], include_done=True))
    return tools_from([*_plain_tools(tally), *asking], include_done=True)


def _plain_tools(tally: Tally) -> list[ToolSpec]:
    def read(key: int) -> dict[str, Any]:
        """Read something."""
        tally.run(key)
        return {"key": key, "text": TEXT}

    def look(key: int) -> dict[str, Any]:
        """Look something up."""
        return read(key)

    def flaky(key: int) -> dict[str, Any]:
        """Fail now and then."""
        wanted = attempts_of("flaky", key)
        if tally.run(key) < wanted or wanted == 3:
            raise ToolError("not now", retriable=True, context={"retry_after_s": 0})
        return {"key": key, "text": TEXT}

    def slow(key: int, ctx: ToolContext) -> str:
        """Take too long now and then."""
        tally.run(key)
        if takes_too_long(key):
            ctx.cancel_token.wait(10)
        return TEXT

    return [
        tool(read),
        tool(concurrent_safe=True)(look),
        tool(retries=2)(flaky),
        tool(timeout_s=0.05)(slow),
    ]


def _asking_tools(router: BackendRouter, tally: Tally, helpers: BaseToolRegistry) -> list[ToolSpec]:
    expert = agent_tool(router, helpers, name="expert", description="Help.", max_steps=4, system_prompt=HELPER)

    def ask(key: int, ctx: ToolContext) -> str:
        """Ask the model."""
        tally.run(key)
        return ctx.llm.generate(f"question {key}: {TEXT}")

    def research(key: int) -> dict[str, Any]:
        """Have a sub-agent at work."""
        tally.run(key)
        found = run_sub_loop(router, {"task": str(key)}, helpers, max_steps=4, system_prompt=HELPER)
        return {"answer": found["answer"], "stop_reason": found["stop_reason"]}

    def delegate(key: int, ctx: ToolContext) -> dict[str, Any]:
        """Have a sub-agent at work, by hand."""
        tally.run(key)
        run = composable_loop(ctx.llm, {"task": str(key)}, helpers, max_steps=4, system_prompt=HELPER)
        return {"steps": [step.number for step in run], "stop_reason": run.stop_reason}

    def ask_expert(key: int) -> str:
        """Have a sub-agent at work, perhaps beside another one."""
        tally.run(key)
        return expert(str(key))

    return [tool(ask), tool(research), tool(delegate), tool(name="expert", concurrent_safe=True)(ask_expert)]


def _async_asking_tools(router: BackendRouter, tally: Tally, helpers: BaseToolRegistry) -> list[ToolSpec]:
    expert = agent_tool(router, helpers, name="expert", description="Help.", max_steps=4, system_prompt=HELPER)

    async def ask(key: int, ctx: ToolContext) -> str:
        """Ask the model."""
        tally.run(key)
        return await ctx.llm.generate(f"question {key}: {TEXT}")

    async def research(key: int) -> dict[str, Any]:
        """Have a sub-agent at work."""
        tally.run(key)
        found = await async_run_sub_loop(router, {"task": str(key)}, helpers, max_steps=4, system_prompt=HELPER)
        return {"answer": found["answer"], "stop_reason": found["stop_reason"]}

    async def delegate(key: int, ctx: ToolContext) -> dict[str, Any]:
        """Have a sub-agent at work, by hand."""
        tally.run(key)
        run = async_composable_loop(ctx.llm, {"task": str(key)}, helpers, max_steps=4, system_prompt=HELPER)
        return {"steps": [step.number async for step in run], "stop_reason": run.stop_reason}

    async def ask_expert(key: int) -> str:
        """Have a sub-agent at work, perhaps beside another one."""
        tally.run(key)
        return await expert(str(key))

    return [tool(ask), tool(research), tool(delegate), tool(name="expert", concurrent_safe=True)(ask_expert)]

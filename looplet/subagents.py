"""Sub-agents: a run that a tool of another run starts.

A function that runs `composable_loop` and is a tool is a sub-agent already: its run is a child of the tool's span and
shares the sinks, the redaction, the budget and the cancel token of the run above.  `run_sub_loop` is that function
with an end, `agent_tool` is the tool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from looplet.awaiting import discard, is_awaitable
from looplet.backends.candidates import candidates, is_async
from looplet.config import LoopConfig
from looplet.decisions import interpret
from looplet.errors import ConfigError, ToolError
from looplet.events import EventPayload, LifecycleEvent, slot
from looplet.messages import Conversation, encode
from looplet.models import SUBAGENT
from looplet.run import AsyncRun, Run, async_composable_loop, composable_loop
from looplet.telemetry import semconv
from looplet.telemetry.spans import PhaseEnd
from looplet.tools import BaseToolRegistry, ToolSpec, make_done_tool, tools_from
from looplet.types import NO_USAGE

Summarise = Callable[[Any, Any], Any]
"""given the sub-agent's state and its session log"""
MAX_STEPS = 5
"""of a sub-agent, where nobody says"""


def run_sub_loop(
    llm: Any,
    task: dict[str, Any] | None = None,
    tools: BaseToolRegistry | None = None,
    *,
    max_steps: int | None = None,
    system_prompt: str = "",
    hooks: Sequence[Any] | None = None,
    parent_hooks: Sequence[Any] | None = None,
    context: Any = None,
    state: Any = None,
    sub_tools: BaseToolRegistry | None = None,
    build_summary: Summarise | None = None,
    conversation: Conversation | None = None,
    subagent_id: str | None = None,
    config: LoopConfig | None = None,
) -> dict[str, Any]:
    """Run an agent to its end, inside a tool or anywhere else, and return what it came to.

    max_steps: 5, unless it or `config` says otherwise.  parent_hooks: their `on_event` hears of `subagent_start` and
    `subagent_stop`.  sub_tools: instead of `tools`; a done tool is added where there is none.  build_summary: called
    with the sub-agent's state and session log.  subagent_id: the run's id, unless given.

    Returns `summary`, `answer` (None unless it finished), `entities`, `findings`, `highlights`, `steps` and
    `llm_calls` (numbers), `stop_reason`, `usage`, `subagent_id`, `run_id`.

    Raises ConfigError as the loop does, ToolError where agents call agents too deep (`LoopConfig.max_depth`).
    """
    counter = _Counter()
    run = composable_loop(
        llm, task, _with_done(sub_tools if sub_tools is not None else tools, config), context,
        hooks=[*(hooks or ()), counter], config=config, state=state, conversation=conversation,
        max_steps=_steps(max_steps, config, state), system_prompt=system_prompt or None,
    )  # fmt: skip
    report = _Report(run, parent_hooks or (), subagent_id or run.run_id, counter)
    report.announce(LifecycleEvent.SUBAGENT_START)
    try:
        with run:
            for _ in run:
                pass
    finally:
        report.announce(LifecycleEvent.SUBAGENT_STOP)
    return report.outcome(build_summary)


async def async_run_sub_loop(
    llm: Any,
    task: dict[str, Any] | None = None,
    tools: BaseToolRegistry | None = None,
    *,
    max_steps: int | None = None,
    system_prompt: str = "",
    hooks: Sequence[Any] | None = None,
    parent_hooks: Sequence[Any] | None = None,
    context: Any = None,
    state: Any = None,
    sub_tools: BaseToolRegistry | None = None,
    build_summary: Summarise | None = None,
    conversation: Conversation | None = None,
    subagent_id: str | None = None,
    config: LoopConfig | None = None,
) -> dict[str, Any]:
    """Run an agent as `run_sub_loop` does, in an `async def` tool."""
    counter = _Counter()
    run = async_composable_loop(
        llm, task, _with_done(sub_tools if sub_tools is not None else tools, config), context,
        hooks=[*(hooks or ()), counter], config=config, state=state, conversation=conversation,
        max_steps=_steps(max_steps, config, state), system_prompt=system_prompt or None,
    )  # fmt: skip
    report = _Report(run, parent_hooks or (), subagent_id or run.run_id, counter)
    await report.announce_async(LifecycleEvent.SUBAGENT_START)
    try:
        async with run:
            async for _ in run:
                pass
    finally:
        await report.announce_async(LifecycleEvent.SUBAGENT_STOP)
    return report.outcome(build_summary)


def agent_tool(
    llm: Any,
    tools: BaseToolRegistry | None = None,
    *,
    name: str,
    description: str,
    max_steps: int | None = None,
    hooks: Sequence[Any] | None = None,
    system_prompt: str = "",
    config: LoopConfig | None = None,
    **settings: Any,
) -> ToolSpec:
    """Return a tool that hands a task, in words, to an agent of its own, and returns its answer.

    The agent has the tool's name, unless its `config` gives it another.  The hooks of the run above do not see what it
    does: `hooks` are its own.  The tool fails when the agent does not finish.  `settings` are those of `ToolSpec`
    (`timeout_s`, `concurrent_safe`, ...).  With an async backend the tool is `async def`.
    """
    max_steps, config = _steps(max_steps, config, None), config or LoopConfig()
    if config.agent_name == LoopConfig().agent_name:
        config = replace(config, agent_name=name)
    given: dict[str, Any] = {"max_steps": max_steps, "hooks": hooks, "system_prompt": system_prompt, "config": config}

    def ask(task: str) -> Any:
        return _answer_of(name, run_sub_loop(llm, {"task": task}, tools, **given))

    async def ask_async(task: str) -> Any:
        return _answer_of(name, await async_run_sub_loop(llm, {"task": task}, tools, **given))

    awaits = is_async(candidates(llm, SUBAGENT)[0].llm)
    parameters = {"task": "What to do, with everything that is needed to do it."}
    return ToolSpec(name, description, parameters, ask_async if awaits else ask, **settings)


def _answer_of(name: str, outcome: Mapping[str, Any]) -> Any:
    if outcome["stop_reason"] != "done":
        reason, steps = outcome["stop_reason"], outcome["steps"]
        raise ToolError(f"{name} found no answer: it stopped with {reason!r} after {steps} steps")
    return outcome["answer"]


def _with_done(tools: BaseToolRegistry | None, config: LoopConfig | None) -> Any:
    name = (config or LoopConfig()).done_tool
    registry = tools_from([]) if tools is None else tools
    if not isinstance(registry, BaseToolRegistry) or name in registry:
        return registry
    return registry.with_tool(make_done_tool(name))


def _steps(max_steps: int | None, config: LoopConfig | None, state: Any) -> int | None:
    if max_steps is not None or config is not None or getattr(state, "max_steps", None) is not None:
        return max_steps
    return MAX_STEPS


class _Counter:
    """Counts the model calls of a run."""

    def __init__(self) -> None:
        self.calls = 0

    def on_phase_end(self, phase: PhaseEnd) -> None:
        self.calls += phase.phase == semconv.CHAT


@dataclass(frozen=True, slots=True)
class _Report:
    """What is said about a sub-agent: to the hooks of the run above, and in the end."""

    run: Run | AsyncRun
    parent_hooks: Sequence[Any]
    subagent_id: str
    counter: _Counter

    def announce(self, event: LifecycleEvent) -> None:
        for hook, answer in self._answers(event):
            if is_awaitable(answer):
                discard(answer)
                raise ConfigError(f"{_name(hook)}.on_event is `async def`: call async_run_sub_loop in an async tool")
            interpret(answer, _name(hook), slot(event))

    async def announce_async(self, event: LifecycleEvent) -> None:
        for hook, answer in self._answers(event):
            interpret(await answer if is_awaitable(answer) else answer, _name(hook), slot(event))

    def outcome(self, build_summary: Summarise | None) -> dict[str, Any]:
        run, log = self.run, self.run.session_log
        output = run.result.final_output if run.result is not None else {}
        answer = output.get("answer", output or None)
        return {
            "summary": self._summary(answer) if build_summary is None else build_summary(run.state, log),
            "answer": answer,
            "entities": log.all_entities(),
            "findings": _each(finding for entry in log.entries for finding in entry.findings),
            "highlights": _each(highlight for entry in log.entries for highlight in entry.highlights),
            "steps": len(run.state.steps),
            "llm_calls": self.counter.calls,
            "stop_reason": run.stop_reason,
            "usage": run.result.usage if run.result is not None else NO_USAGE,
            "subagent_id": self.subagent_id,
            "run_id": run.run_id,
        }

    def _answers(self, event: LifecycleEvent) -> list[tuple[Any, Any]]:
        run = self.run
        payload = EventPayload(
            event,
            step_num=len(run.state.steps),
            state=run.state,
            session_log=run.session_log,
            termination_reason=run.stop_reason,
            usage=run.result.usage if run.result is not None else None,
            subagent_id=self.subagent_id,
            extra={"task": run.task, "run_id": run.run_id},
        )
        hooks = [hook for hook in self.parent_hooks if callable(getattr(hook, "on_event", None))]
        return [(hook, hook.on_event(payload)) for hook in hooks]

    def _summary(self, answer: Any) -> str:
        if isinstance(answer, str):
            return answer
        if answer is not None:
            return encode(answer).decode()
        steps = "\n".join(step.summary() for step in self.run.state.steps)
        waits = "".join(f"\nit waits for a human: {request.description}" for request in self.run.pending)
        stopped = f"stopped with {self.run.stop_reason!r} before it was done{waits}"
        return stopped + (f"\n{steps}" if steps else "")


def _each(words: Any) -> list[str]:
    return list(dict.fromkeys(words))


def _name(hook: Any) -> str:
    return type(hook).__name__

"""The arguments of `composable_loop`: checked, with errors that say what to write instead, and filled with defaults."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from looplet.arguments import int_from, require, shown
from looplet.config import LoopConfig
from looplet.errors import ConfigError, did_you_mean
from looplet.hooks import HookSet
from looplet.memory import check_sources
from looplet.messages import Conversation
from looplet.output import with_output_type
from looplet.segments import Paused
from looplet.state import DefaultState
from looplet.tools import BaseToolRegistry

logger = logging.getLogger("looplet")


def check_definition(task: Any, tools: Any, hooks: Any, config: Any) -> None:
    """Raise ConfigError for a task, tools, hooks or config of the wrong type."""
    if task is not None and not isinstance(task, Mapping):
        raise ConfigError(f'task must be a dict; write task={{"goal": {task!r:.60}}}')
    if tools is None:
        raise ConfigError("tools is required: tools=tools_from([...], include_done=True)")
    if not isinstance(tools, BaseToolRegistry):
        given = "a list" if isinstance(tools, (list, tuple)) else shown(tools)
        raise ConfigError(f"tools must be a registry, not {given}: tools=tools_from([...], include_done=True)")
    if hooks is not None and (isinstance(hooks, (str, bytes, Mapping)) or not isinstance(hooks, Sequence)):
        raise ConfigError(f"hooks must be a list of objects, not {shown(hooks)}: hooks=[MyHook()]")
    if config is not None and not isinstance(config, LoopConfig):
        raise ConfigError(f"config must be a LoopConfig, not {shown(config)}: config=LoopConfig(...)")


def check_objects(state: Any, system_prompt: Any, tracer_provider: Any, session_log: Any, conversation: Any) -> None:
    """Raise ConfigError for a prompt or a provider of the wrong type, and for objects that a run cannot write into."""
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise ConfigError(f"system_prompt must be a str, not {type(system_prompt).__name__}")
    if state is not None and not isinstance(getattr(state, "steps", None), list):
        raise ConfigError(f"state must have a list `steps`, like DefaultState(), not {shown(state)}")
    if state is not None and state.steps:
        raise ConfigError(f"state has the steps of an earlier run; pass a fresh one: {type(state).__name__}()")
    if tracer_provider is not None and not callable(getattr(tracer_provider, "get_tracer", None)):
        raise ConfigError(f"tracer_provider must be a TracerProvider, not {shown(tracer_provider)}")
    if session_log is not None and not isinstance(getattr(session_log, "entries", None), list):
        raise ConfigError(f"session_log must be a SessionLog(), not {shown(session_log)}")
    if conversation is not None and not isinstance(conversation, Conversation):
        raise ConfigError(f"conversation must be a Conversation(), not {shown(conversation)}")


def run_to_resume(resume: Any, verdict: Any, task: Any, conversation: Any) -> Paused | None:
    """Return the paused run that is to go on, None for a new one.  Raises ConfigError for what does not go with it."""
    if resume is None:
        if verdict is not None:
            raise ConfigError("verdict= answers a run that waits: pass that run, or its trace, as resume=")
        return None
    if task is not None or conversation is not None:
        raise ConfigError("a resumed run has its task and its conversation; leave out task= and conversation=")
    from looplet.resume import paused_of

    return paused_of(resume)


def merged_settings(
    config: LoopConfig | None, max_steps: int | None, system_prompt: str | None, state: Any
) -> LoopConfig:
    """Return the config with `max_steps` and `system_prompt` put in.

    Where `max_steps` and the state's own differ, the smaller wins.
    """
    settings = config or LoopConfig()
    steps = max_steps if max_steps is not None else settings.max_steps if config is not None else None
    given = getattr(state, "max_steps", None)
    if given is not None:
        steps = given if steps is None else min(steps, given)
    steps = settings.max_steps if steps is None else steps
    require("max_steps", steps, int_from(0))
    changes: dict[str, Any] = {"max_steps": steps}
    if system_prompt is not None:
        changes["system_prompt"] = system_prompt
    check_sources(settings.memory_sources)
    return replace(settings, **changes)


def state_of_run(state: Any, settings: LoopConfig) -> Any:
    """Return the state, or a new one, with the `max_steps` of the settings."""
    if state is None:
        return DefaultState(max_steps=settings.max_steps)
    if isinstance(state, type):
        raise ConfigError(f"state takes an object: pass {state.__name__}(), not the class")
    if getattr(state, "max_steps", settings.max_steps) != settings.max_steps:
        state.max_steps = settings.max_steps
    return state


def with_ending_tools(
    tools: BaseToolRegistry, output_type: Any, settings: LoopConfig, hooks: HookSet
) -> BaseToolRegistry:
    """Return the tools, with a done tool for `output_type`.

    Raises ConfigError for an ending tool that the config names and nobody registered.  A registry without `done` is
    somebody's choice, or forgotten: the log says what follows from it.
    """
    if output_type is not None:
        tools = with_output_type(tools, output_type, settings.done_tool)
    missing = [name for name in (settings.done_tool, *settings.done_tools) if name not in tools]
    if misnamed := next((name for name in missing if name != LoopConfig().done_tool), ""):
        hint = did_you_mean(misnamed, tools.tool_names)
        hint = hint or f": tools_from([...], include_done=True, done_name={misnamed!r})"
        raise ConfigError(f"the config names {misnamed!r} as a tool that ends the run, but it is not registered{hint}")
    if len(missing) == len(settings.ending_tools) and not hooks.of("should_stop"):
        logger.warning(
            "looplet: the model cannot end this run, there is no tool %r: tools_from([...], include_done=True). "
            "It goes on until a limit, a hook or your loop ends it.",
            settings.done_tool,
        )
    return tools

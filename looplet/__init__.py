"""looplet: the agent loop you own, observable from the first step.

    for step in composable_loop(llm=llm, tools=tools, task={"goal": "..."}):
        print(step.pretty())

Names are loaded when they are first used: importing looplet costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from looplet._version import __version__

if TYPE_CHECKING:
    from looplet.backends.openai import AsyncOpenAIBackend, OpenAIBackend
    from looplet.config import LoopConfig
    from looplet.decisions import Allow, Block, Continue, Deny, HookDecision, InjectContext, Stop
    from looplet.errors import (
        BackendError,
        ConfigError,
        ContextOverflow,
        ErrorKind,
        LoopletError,
        ToolError,
        TraceError,
    )
    from looplet.evals.context import EvalContext
    from looplet.evals.runner import eval_discover, eval_run, eval_run_batch
    from looplet.evals.score import EvalResult, eval_mark
    from looplet.hooks import CheckDone, PostDispatch, PreDispatch, PrePrompt
    from looplet.messages import Conversation, Message
    from looplet.prompt import Prompt
    from looplet.run import AsyncRun, Run, async_composable_loop, composable_loop
    from looplet.scope import RunResult
    from looplet.state import DefaultState, SessionLog
    from looplet.telemetry.provenance import ProvenanceSink
    from looplet.telemetry.reader import SpanNode, Trace
    from looplet.telemetry.spans import PhaseEnd
    from looplet.testing.backends import MockLLMBackend
    from looplet.tools import (
        BaseToolRegistry,
        CancelToken,
        ToolContext,
        ToolSpec,
        register_done_tool,
        tool,
        tools_from,
    )
    from looplet.types import Reply, Step, ToolCall, ToolResult, Usage

# module → the public names it provides
_HOMES = {
    "backends.openai": ("AsyncOpenAIBackend", "OpenAIBackend"),
    "config": ("LoopConfig",),
    "decisions": ("Allow", "Block", "Continue", "Deny", "HookDecision", "InjectContext", "Stop"),
    "errors": (
        "BackendError", "ConfigError", "ContextOverflow", "ErrorKind", "LoopletError", "ToolError", "TraceError",
    ),
    "evals.context": ("EvalContext",),
    "evals.runner": ("eval_discover", "eval_run", "eval_run_batch"),
    "evals.score": ("EvalResult", "eval_mark"),
    "hooks": ("CheckDone", "PostDispatch", "PreDispatch", "PrePrompt"),
    "messages": ("Conversation", "Message"),
    "prompt": ("Prompt",),
    "run": ("AsyncRun", "Run", "async_composable_loop", "composable_loop"),
    "scope": ("RunResult",),
    "state": ("DefaultState", "SessionLog"),
    "telemetry.provenance": ("ProvenanceSink",),
    "telemetry.reader": ("SpanNode", "Trace"),
    "telemetry.spans": ("PhaseEnd",),
    "testing.backends": ("MockLLMBackend",),
    "tools": (
        "BaseToolRegistry", "CancelToken", "ToolContext", "ToolSpec", "register_done_tool", "tool", "tools_from",
    ),
    "types": ("Reply", "Step", "ToolCall", "ToolResult", "Usage"),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # noqa: PLE0604 - strings, all of them


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        from looplet.errors import did_you_mean

        raise AttributeError(f"module 'looplet' has no attribute {name!r}{did_you_mean(name, _HOME_OF)}")
    from importlib import import_module

    value = getattr(import_module(f"looplet.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""looplet: the agent loop you own, observable from the first step.

    for step in composable_loop(llm=llm, tools=tools, task={"goal": "..."}):
        print(step.pretty())

Names are loaded when they are first used: importing looplet costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from looplet._lazy import lazy
from looplet._version import __version__

if TYPE_CHECKING:  # `as` makes them public for type checkers, too
    from looplet.approval import ApprovalHook as ApprovalHook
    from looplet.approval import ApprovalRequest as ApprovalRequest
    from looplet.approval import Verdict as Verdict
    from looplet.backends.anthropic import AnthropicBackend as AnthropicBackend
    from looplet.backends.anthropic import AsyncAnthropicBackend as AsyncAnthropicBackend
    from looplet.backends.messages_api import CachePolicy as CachePolicy
    from looplet.backends.openai import AsyncOpenAIBackend as AsyncOpenAIBackend
    from looplet.backends.openai import OpenAIBackend as OpenAIBackend
    from looplet.backends.rate_limit import RateLimitedBackend as RateLimitedBackend
    from looplet.backends.resilient import ResilientBackend as ResilientBackend
    from looplet.backends.router import BackendRouter as BackendRouter
    from looplet.budgets import Budget as Budget
    from looplet.budgets import BudgetCap as BudgetCap
    from looplet.cancel import CancelToken as CancelToken
    from looplet.compact_outcome import CompactOutcome as CompactOutcome
    from looplet.compaction import ClipToolResults as ClipToolResults
    from looplet.compaction import Prune as Prune
    from looplet.compaction import PruneToolResults as PruneToolResults
    from looplet.compaction import Summarize as Summarize
    from looplet.compaction import SummarizeCompact as SummarizeCompact
    from looplet.compaction import Truncate as Truncate
    from looplet.compaction import TruncateCompact as TruncateCompact
    from looplet.compaction import compact_chain as compact_chain
    from looplet.config import LoopConfig as LoopConfig
    from looplet.context import ContextBudget as ContextBudget
    from looplet.context import ContextPressureHook as ContextPressureHook
    from looplet.context import ThresholdCompactHook as ThresholdCompactHook
    from looplet.decisions import Allow as Allow
    from looplet.decisions import Block as Block
    from looplet.decisions import Continue as Continue
    from looplet.decisions import Deny as Deny
    from looplet.decisions import HookDecision as HookDecision
    from looplet.decisions import InjectContext as InjectContext
    from looplet.decisions import Stop as Stop
    from looplet.errors import BackendError as BackendError
    from looplet.errors import BudgetExhausted as BudgetExhausted
    from looplet.errors import ConfigError as ConfigError
    from looplet.errors import ContextOverflow as ContextOverflow
    from looplet.errors import ErrorKind as ErrorKind
    from looplet.errors import LoopletError as LoopletError
    from looplet.errors import ToolError as ToolError
    from looplet.errors import TraceError as TraceError
    from looplet.evals.context import EvalContext as EvalContext
    from looplet.evals.runner import eval_discover as eval_discover
    from looplet.evals.runner import eval_run as eval_run
    from looplet.evals.runner import eval_run_batch as eval_run_batch
    from looplet.evals.score import EvalResult as EvalResult
    from looplet.evals.score import eval_mark as eval_mark
    from looplet.events import EventPayload as EventPayload
    from looplet.events import LifecycleEvent as LifecycleEvent
    from looplet.hooks import CheckDone as CheckDone
    from looplet.hooks import PostDispatch as PostDispatch
    from looplet.hooks import PreDispatch as PreDispatch
    from looplet.hooks import PrePrompt as PrePrompt
    from looplet.limits import BudgetWarningHook as BudgetWarningHook
    from looplet.limits import PerToolLimitHook as PerToolLimitHook
    from looplet.long_results import ResultReader as ResultReader
    from looplet.mcp import MCPToolAdapter as MCPToolAdapter
    from looplet.memory import AgentsMdMemorySource as AgentsMdMemorySource
    from looplet.memory import CallableMemorySource as CallableMemorySource
    from looplet.memory import StaticMemorySource as StaticMemorySource
    from looplet.messages import Conversation as Conversation
    from looplet.messages import Message as Message
    from looplet.parts import Image as Image
    from looplet.permissions import PermissionDecision as PermissionDecision
    from looplet.permissions import PermissionEngine as PermissionEngine
    from looplet.permissions import PermissionHook as PermissionHook
    from looplet.permissions import PermissionOutcome as PermissionOutcome
    from looplet.permissions import PermissionRule as PermissionRule
    from looplet.preview import preview_prompt as preview_prompt
    from looplet.prices import ListPrice as ListPrice
    from looplet.prices import Price as Price
    from looplet.prompt import Prompt as Prompt
    from looplet.redactor import Redactor as Redactor
    from looplet.run import AsyncRun as AsyncRun
    from looplet.run import Run as Run
    from looplet.run import async_composable_loop as async_composable_loop
    from looplet.run import composable_loop as composable_loop
    from looplet.scope import RunResult as RunResult
    from looplet.stagnation import StagnationHook as StagnationHook
    from looplet.state import DefaultState as DefaultState
    from looplet.state import SessionLog as SessionLog
    from looplet.streaming import CallbackEmitter as CallbackEmitter
    from looplet.streaming import CompositeEmitter as CompositeEmitter
    from looplet.streaming import QueueEmitter as QueueEmitter
    from looplet.streaming import StreamingHook as StreamingHook
    from looplet.subagents import agent_tool as agent_tool
    from looplet.subagents import async_run_sub_loop as async_run_sub_loop
    from looplet.subagents import run_sub_loop as run_sub_loop
    from looplet.telemetry.provenance import ProvenanceSink as ProvenanceSink
    from looplet.telemetry.reader import SpanNode as SpanNode
    from looplet.telemetry.reader import Trace as Trace
    from looplet.telemetry.spans import PhaseEnd as PhaseEnd
    from looplet.testing.backends import MockLLMBackend as MockLLMBackend
    from looplet.tools import BaseToolRegistry as BaseToolRegistry
    from looplet.tools import ToolContext as ToolContext
    from looplet.tools import ToolSpec as ToolSpec
    from looplet.tools import register_done_tool as register_done_tool
    from looplet.tools import tool as tool
    from looplet.tools import tools_from as tools_from
    from looplet.types import Delta as Delta
    from looplet.types import Reply as Reply
    from looplet.types import Step as Step
    from looplet.types import ToolCall as ToolCall
    from looplet.types import ToolResult as ToolResult
    from looplet.types import Usage as Usage

# module → the public names it provides
_HOMES = {
    "approval": ("ApprovalHook", "ApprovalRequest", "Verdict"),
    "backends.anthropic": ("AnthropicBackend", "AsyncAnthropicBackend"),
    "backends.messages_api": ("CachePolicy",),
    "backends.openai": ("AsyncOpenAIBackend", "OpenAIBackend"),
    "backends.rate_limit": ("RateLimitedBackend",),
    "backends.resilient": ("ResilientBackend",),
    "backends.router": ("BackendRouter",),
    "budgets": ("Budget", "BudgetCap"),
    "cancel": ("CancelToken",),
    "compact_outcome": ("CompactOutcome",),
    "compaction": (
        "ClipToolResults", "Prune", "PruneToolResults", "Summarize", "SummarizeCompact", "Truncate",
        "TruncateCompact",
        "compact_chain",
    ),
    "config": ("LoopConfig",),
    "context": ("ContextBudget", "ContextPressureHook", "ThresholdCompactHook"),
    "decisions": ("Allow", "Block", "Continue", "Deny", "HookDecision", "InjectContext", "Stop"),
    "errors": (
        "BackendError", "BudgetExhausted", "ConfigError", "ContextOverflow", "ErrorKind", "LoopletError", "ToolError",
        "TraceError",
    ),
    "evals.context": ("EvalContext",),
    "evals.runner": ("eval_discover", "eval_run", "eval_run_batch"),
    "evals.score": ("EvalResult", "eval_mark"),
    "events": ("EventPayload", "LifecycleEvent"),
    "hooks": ("CheckDone", "PostDispatch", "PreDispatch", "PrePrompt"),
    "limits": ("BudgetWarningHook", "PerToolLimitHook"),
    "long_results": ("ResultReader",),
    "mcp": ("MCPToolAdapter",),
    "memory": ("AgentsMdMemorySource", "CallableMemorySource", "StaticMemorySource"),
    "messages": ("Conversation", "Message"),
    "parts": ("Image",),
    "permissions": ("PermissionDecision", "PermissionEngine", "PermissionHook", "PermissionOutcome", "PermissionRule"),
    "preview": ("preview_prompt",),
    "prices": ("ListPrice", "Price"),
    "prompt": ("Prompt",),
    "redactor": ("Redactor",),
    "run": ("AsyncRun", "Run", "async_composable_loop", "composable_loop"),
    "scope": ("RunResult",),
    "stagnation": ("StagnationHook",),
    "state": ("DefaultState", "SessionLog"),
    "streaming": ("CallbackEmitter", "CompositeEmitter", "QueueEmitter", "StreamingHook"),
    "subagents": ("agent_tool", "async_run_sub_loop", "run_sub_loop"),
    "telemetry.provenance": ("ProvenanceSink",),
    "telemetry.reader": ("SpanNode", "Trace"),
    "telemetry.spans": ("PhaseEnd",),
    "testing.backends": ("MockLLMBackend",),
    "tools": ("BaseToolRegistry", "ToolContext", "ToolSpec", "register_done_tool", "tool", "tools_from"),
    "types": ("Delta", "Reply", "Step", "ToolCall", "ToolResult", "Usage"),
}  # fmt: skip
_NAMES, __getattr__ = lazy(__name__, _HOMES)

__all__ = ["__version__", *_NAMES]  # noqa: PLE0604 - strings, all of them


def __dir__() -> list[str]:
    return __all__

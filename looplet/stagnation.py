"""`StagnationHook`: notices that a run makes the same calls and gets the same results, over and over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from typing import Any, Final, TypeAlias

from looplet.arguments import int_from, optional, require, template
from looplet.decisions import HookDecision, InjectContext, Stop
from looplet.messages import encode, sha256
from looplet.per_run import PerRun
from looplet.types import ToolCall, ToolResult

STAGNATION: Final = "stagnation"
"""the stop reason"""
NUDGE: Final = (
    "[stagnation] You have made the same call {count} times and got the same result, and nothing new came in between. "
    "Try something else, or finish with what you have."
)

Fingerprint: TypeAlias = Callable[[Any, ToolCall, ToolResult], Hashable]
Progress: TypeAlias = Callable[[Any, ToolCall, ToolResult], Any]


def call_and_result_fingerprint(state: Any, tool_call: ToolCall, tool_result: ToolResult) -> Hashable:
    """Tell calls apart by tool, arguments and result."""
    return _hash(tool_call.tool, _sorted(tool_call.args), _sorted(tool_result.data), tool_result.error)


def tool_call_fingerprint(state: Any, tool_call: ToolCall, tool_result: ToolResult) -> Hashable:
    """Tell calls apart by tool and arguments alone, for results that hold a time or another number of their own."""
    return _hash(tool_call.tool, _sorted(tool_call.args))


class StagnationHook:
    """Nudges the model when the same call has had the same result `threshold` times, and stops the run if told to.

    Anything new sets the count back: a call or a result that the run has not had yet, or whatever `progress(state,
    tool_call, tool_result)` says is progress.  So A, A, A is noticed, and so is A, B, A, B, A, B.

    fingerprint: what makes two calls the same.  nudge: with `{count}` in it.  ignore_tools: tools that may repeat
    themselves, such as one that waits.  reset_after_nudge: count from 0 again; False nudges at every further
    repetition.  stop_after: the number of nudges after which the run ends with `stagnation` instead of one more; 0
    ends it without a word, None never.
    """

    def __init__(
        self,
        *,
        fingerprint: Fingerprint = call_and_result_fingerprint,
        threshold: int = 3,
        nudge: str = NUDGE,
        progress: Progress | None = None,
        reset_after_nudge: bool = True,
        ignore_tools: Collection[str] | None = None,
        stop_after: int | None = None,
    ) -> None:
        require("threshold", threshold, int_from(2))  # one call repeats nothing
        require("stop_after", stop_after, optional(int_from(0)))
        require("nudge", nudge, template(count=1))
        self._fingerprint = fingerprint
        self._threshold = threshold
        self._nudge = nudge
        self._progress = progress
        self._reset = reset_after_nudge
        self._ignored = frozenset((ignore_tools,) if isinstance(ignore_tools, str) else ignore_tools or ())
        self._stop_after = stop_after
        self.looplet_guard: Final = True if stop_after is not None else None
        self.looplet_tool_names: Final = sorted(self._ignored)
        self._memories: PerRun[_Memory] = PerRun(self._recall)

    def pre_loop(self, state: Any, session_log: Any, context: Any) -> None:
        """Begin to watch a run."""
        self._memories.begin(state)

    def post_dispatch(
        self, state: Any, session_log: Any, tool_call: ToolCall, tool_result: ToolResult, step_num: int
    ) -> HookDecision | None:
        """Nudge or stop, if that was once too often."""
        return self._look(self._memories.of(state), state, tool_call, tool_result)

    def on_loop_end(self, state: Any, session_log: Any, context: Any, llm: Any) -> None:
        """Forget the run."""
        self._memories.end(state)

    def _recall(self, state: Any) -> _Memory:
        """Return what the hook would know of a run that goes on, had it been there from the beginning."""
        memory = _Memory()
        for step in state.steps:
            self._look(memory, state, step.tool_call, step.tool_result)
        return memory

    def _look(self, memory: _Memory, state: Any, call: ToolCall, result: ToolResult) -> HookDecision | None:
        if call.tool in self._ignored:
            return None
        count = memory.note(self._fingerprint(state, call, result))
        if self._progress is not None and self._progress(state, call, result):
            memory.counts.clear()
            return None
        if count < self._threshold:
            return None
        if self._stop_after is not None and memory.nudges >= self._stop_after:
            return Stop(STAGNATION)
        memory.nudges += 1
        if self._reset:
            memory.counts.clear()
        return InjectContext(self._nudge.format(count=count))


class _Memory:
    """What the hook knows of one run."""

    __slots__ = ("_known", "counts", "nudges")

    def __init__(self) -> None:
        self._known: set[Hashable] = set()
        self.counts: Counter[Hashable] = Counter()
        """since something new came"""
        self.nudges = 0

    def note(self, fingerprint: Hashable) -> int:
        """Count a call; return how often it came since something new did."""
        if fingerprint not in self._known:
            self._known.add(fingerprint)
            self.counts.clear()
        self.counts[fingerprint] += 1
        return self.counts[fingerprint]


def _hash(*values: Any) -> bytes:
    digest: bytes = sha256(encode(list(values))).digest()
    return digest[:16]


def _sorted(value: Any) -> Any:
    """Return the value with its dicts in one order."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, (list, tuple)) else value

"""Hooks that limit: how often a tool may be called, and a word to the model before a budget is used up.

One object may serve several runs, one after another or at the same time; each run is counted by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from looplet.arguments import DICT, int_from, optional, require, template
from looplet.decisions import Deny, HookDecision, InjectContext
from looplet.errors import ConfigError, ErrorKind
from looplet.events import EventPayload, LifecycleEvent
from looplet.per_run import PerRun
from looplet.types import Step, ToolCall

TOO_OFTEN: Final = "{tool!r} may be called {limit} times in a run, and that is used up; go on without it"
LOW: Final = "[budget] {remaining_pct:.0%} of the {name} are left ({remaining:g})."

_RAN: Final = (LifecycleEvent.POST_TOOL_USE, LifecycleEvent.POST_TOOL_FAILURE)


class PerToolLimitHook:
    """Refuses a tool's calls once it has been called so often in the run.

    limits: by tool name.  default_limit: of every other tool but `done`; None is no limit.  message: the reason
    given to the model, with `{tool}`, `{limit}` and `{used}` in it.

    Counted are calls that ran, failed ones included.  Raises ConfigError for a limit that is not a whole number.
    """

    def __init__(
        self,
        limits: Mapping[str, int] | None = None,
        *,
        default_limit: int | None = None,
        message: str = TOO_OFTEN,
        done_tools: Sequence[str] = ("done",),
    ) -> None:
        require("limits", limits, optional(DICT))
        require("default_limit", default_limit, optional(int_from(0)))
        require("message", message, template(tool="", limit=1, used=1))
        for name, limit in (limits or {}).items():
            require(f"the limit of {name!r}", limit, int_from(0))
        endings = (done_tools,) if isinstance(done_tools, str) else done_tools
        self._limits: dict[str, int | None] = dict.fromkeys(endings) | dict(limits or {})
        self._default = default_limit
        self._message = message
        self._tallies = PerRun(_Tally)
        self.looplet_tool_names: Final = list(limits or {})

    def pre_loop(self, state: Any, session_log: Any, context: Any) -> None:
        """Begin to count."""
        self._tallies.begin(state)

    def pre_dispatch(self, state: Any, session_log: Any, tool_call: ToolCall, step_num: int) -> HookDecision | None:
        """Refuse the call, or reserve it."""
        limit = self._limits.get(tool_call.tool, self._default)
        if limit is None:
            return None
        tally = self._tallies.of(state)
        used = tally.used(tool_call.tool, batch=len(state.steps))
        if used >= limit:
            return Deny(self._message.format(tool=tool_call.tool, limit=limit, used=used))
        tally.reserved.append(tool_call.tool)
        return None

    def on_event(self, payload: EventPayload) -> None:
        """Count a call that ran."""
        if payload.event in _RAN and payload.tool_call is not None:
            self._tallies.of(payload.state).ran[payload.tool_call.tool] += 1

    def on_loop_end(self, state: Any, session_log: Any, context: Any, llm: Any) -> None:
        """Forget the run."""
        self._tallies.end(state)


class _Tally:
    """The calls of one run.  Those of a batch are all reserved before the first of them runs."""

    __slots__ = ("_batch", "ran", "reserved")

    def __init__(self, state: Any) -> None:
        self.ran = Counter(step.tool_call.tool for step in state.steps if _has_run(step))
        self.reserved: list[str] = []
        self._batch = -1

    def used(self, tool: str, batch: int) -> int:
        """Return how often a tool ran, or is about to run; batch: the number of steps before it."""
        if batch != self._batch:  # those of the batch before have run, or never will
            self._batch = batch
            self.reserved.clear()
        return self.ran[tool] + self.reserved.count(tool)


def _has_run(step: Step) -> bool:
    """Tell of a step from before a pause whether its call ran, as far as can be told."""
    return step.tool_result.error_kind is not ErrorKind.PERMISSION_DENIED and not step.tool_call.tool.startswith("__")


class BudgetWarningHook:
    """Tells the model, once for each threshold, that little of a budget is left.

    thresholds: fractions that are left, of the run's steps and of every budget that it has (`state.budget`).
    message: with `{name}`, `{remaining}` and `{remaining_pct}` in it.
    """

    def __init__(self, *, thresholds: Sequence[float] = (0.5, 0.2), message: str = LOW) -> None:
        require("message", message, template(name="", remaining=1.0, remaining_pct=1.0))
        for threshold in thresholds:
            if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
                raise ConfigError(f"a threshold is a fraction from 0 to 1, such as 0.2, not {threshold!r}")
        self._thresholds = tuple(thresholds)
        self._message = message
        self._warned: PerRun[set[tuple[str, float]]] = PerRun(lambda state: set())

    def pre_loop(self, state: Any, session_log: Any, context: Any) -> None:
        """Begin with nothing said."""
        self._warned.begin(state)

    @property
    def looplet_guard(self) -> bool | None:
        """Return False: `should_stop` never stops here; what a subclass does with it is for its methods to tell."""
        return False if type(self) is BudgetWarningHook else None

    def should_stop(self, state: Any, step_num: int, new_entities: int) -> HookDecision | None:
        """Say what has become little since the last turn; never stop.

        Not in `pre_prompt`: a hook that has it may rewrite requests, and the trace of such a run tells less.
        """
        warned, lines = self._warned.of(state), []
        for name, (remaining, fraction) in _left_of(state).items():
            crossed = {(name, threshold) for threshold in self._thresholds if fraction <= threshold}
            if crossed - warned:
                warned |= crossed
                words = name.replace("_", " ")
                lines.append(self._message.format(name=words, remaining=remaining, remaining_pct=fraction))
        return InjectContext("\n".join(lines)) if lines else None

    def on_loop_end(self, state: Any, session_log: Any, context: Any, llm: Any) -> None:
        """Forget the run."""
        self._warned.end(state)


def _left_of(state: Any) -> dict[str, tuple[float, float]]:
    """Return what is left of each budget, as a number and as a fraction."""
    most, steps = getattr(state, "max_steps", 0), getattr(state, "budget_remaining", 0)
    left: dict[str, tuple[float, float]] = {"steps": (steps, steps / most)} if most else {}
    view = getattr(state, "budget", None)
    if view is not None:
        remaining = view.remaining
        for name, fraction in view.fraction_left.items():
            left[name] = min(left.get(name, (remaining[name], fraction)), (remaining[name], fraction))
    return left

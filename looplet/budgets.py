"""Budgets: what a run, with the sub-agents it starts, may spend, and who keeps watch over it.

A limit stops what would spend more of it: `tokens`, `usd` and `model_calls` stop model calls, `steps` and `tool_calls`
stop tool calls, `seconds` stops both.  So the calls of a reply that has been paid for still run, and the run ends with
`budget_exhausted` before the next request.  Nothing that has begun is interrupted.

What a model call used is known when it has ended: `tokens` and `usd` may be exceeded by the calls in flight.  Model
calls and tool calls are counted when they begin, under one lock for a run and its sub-agents, and are never exceeded.
A call whose usage or price nobody knows cannot be held against `tokens` or `usd`: it is counted apart, logged and
recorded (`Guard.unchecked`).  Give such a budget `model_calls` as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Final

from looplet.arguments import NUMBER, Kind, int_from, require, strict_names
from looplet.errors import ConfigError
from looplet.ledger import Ledger

ASKING: Final = ("tokens", "usd", "seconds", "model_calls")
"""limits that stop model calls"""
ACTING: Final = ("seconds", "steps", "tool_calls")
"""limits that stop tool calls"""
_UNKNOWN: Final = {"tokens": "unreported", "usd": "unpriced"}
"""limit -> the calls that it cannot count"""

AMOUNT: Final = Kind("a number from 0", lambda value: NUMBER.fits(value) and value >= 0)

logger = logging.getLogger("looplet")


@strict_names()
@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of a run, its sub-agents included; None is no limit.  Raises ConfigError for one that can mean nothing."""

    tokens: int | None = None
    """input and output, of all model calls"""
    _: KW_ONLY
    usd: float | None = None
    """of the model calls whose price is known"""
    seconds: float | None = None
    """from the run's first turn on, the time of your own loop body included"""
    steps: int | None = None
    """as `max_steps` counts them, with those of sub-agents"""
    model_calls: int | None = None
    tool_calls: int | None = None
    """that run: `done` is one, a refused call is none"""

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            require(f"budget {name}", limit, AMOUNT if name in ("usd", "seconds") else int_from(0))
        if not self.limits:
            raise ConfigError(
                f"a budget without a limit limits nothing; name one of {', '.join(f.name for f in fields(self))}, "
                "such as BudgetCap(10_000) for tokens"
            )

    @property
    def limits(self) -> dict[str, float]:
        """Return the limits that are set, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: limit for name, limit in values.items() if limit is not None}


class BudgetCap:
    """A `Budget` for `hooks=[...]`; `LoopConfig(budget=...)` takes the `Budget` itself.  Several all count."""

    __slots__ = ("looplet_budget",)

    @strict_names()
    def __init__(
        self,
        tokens: int | None = None,
        *,
        usd: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        model_calls: int | None = None,
        tool_calls: int | None = None,
    ) -> None:
        self.looplet_budget: Final = Budget(
            tokens, usd=usd, seconds=seconds, steps=steps, model_calls=model_calls, tool_calls=tool_calls
        )
        """what the run reads"""


class Guard:
    """Keeps watch over the budgets of one run, and over those of the runs above it, out of which it spends as well.

    May be used from any thread.
    """

    __slots__ = ("_began", "_blind", "_clock", "_earlier_s", "ledger", "levels", "limits")

    def __init__(
        self,
        budgets: Iterable[Budget],
        ledger: Ledger,
        above: Guard | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = ledger
        self.limits: dict[str, float] = {}
        """of the run itself: the smallest where several budgets name one"""
        for budget in budgets:
            for name, limit in budget.limits.items():
                self.limits[name] = min(limit, self.limits.get(name, limit))
        self.levels: tuple[Guard, ...] = (*((self,) if self.limits else ()), *(above.levels if above else ()))
        """those that have limits: this one and the guards above, nearest first"""
        self._clock = clock
        self._began: float | None = None
        self._earlier_s = 0.0
        self._blind = {name: calls for name, calls in _UNKNOWN.items() if name in self.limits}

    @property
    def limited(self) -> list[str]:
        """Return the names of the limits that the run has, those of the runs above included."""
        return list(dict.fromkeys(name for level in self.levels for name in level.limits))

    @property
    def elapsed_s(self) -> float:
        """Return how long the run has gone on; the time in which it was paused does not count."""
        return self._earlier_s + (0.0 if self._began is None else self._clock() - self._began)

    def resume(self, elapsed_s: float) -> None:
        """Go on from what an earlier segment of the run took."""
        self._earlier_s = elapsed_s

    def exhausted(self) -> str | None:
        """Return the name of a limit that is used up, None while the run may go on.

        The run's own limits come first, then those of the run above it.  The first question starts the clock.
        """
        if self._began is None:
            self._began = self._clock()
        if not self.levels:
            return None
        self._complain()
        return self._used_up((*ASKING, *ACTING))

    def take_model_call(self) -> str | None:
        """Count a model call that is about to begin, or return the limit that forbids it."""
        return self._take(ASKING, self.ledger.count_model_call)

    def take_tool_call(self) -> str | None:
        """Count a tool call that is about to run, or return the limit that forbids it."""
        return self._take(ACTING, self.ledger.count_tool)

    def calls_left(self) -> int | None:
        """Return how many tool calls may be begun now, None when no limit says."""
        if not self.levels:
            return None
        if self._used_up(("seconds",)) is not None:
            return 0
        left = [room for name, room in self.remaining().items() if name in ("steps", "tool_calls")]
        return int(min(left)) if left else None

    def used(self, name: str) -> float:
        """Return how much the run and those below it have used of what a limit is about."""
        if name == "seconds":
            return self.elapsed_s
        if name == "tokens":
            return self.ledger.total.total_tokens
        if name == "usd":
            return self.ledger.total.cost_usd or 0.0
        number: int = getattr(self.ledger.total_counts, name)
        return number

    def spent(self) -> dict[str, float]:
        """Return what the run and those below it have used, limited or not."""
        return {f.name: self.used(f.name) for f in fields(Budget)}

    def remaining(self) -> dict[str, float]:
        """Return what is left of every limit: the least, where a run above has one, too."""
        return self._least(lambda limit, used: max(limit - used, type(limit)(0)))

    def fraction_left(self) -> dict[str, float]:
        """Return what is left of every limit, from 1.0 down to 0.0."""
        return self._least(lambda limit, used: max(0.0, 1 - used / limit) if limit else 0.0)

    def unchecked(self) -> dict[str, int]:
        """Return how many calls the run's limits on tokens and USD could not count; it is in the log as well."""
        self._complain()
        counts = self.ledger.total_counts
        found = {name: getattr(counts, _UNKNOWN[name]) for name in self.limits if name in _UNKNOWN}
        return {name: calls for name, calls in found.items() if calls}

    def _take(self, names: Collection[str], count: Callable[[], None]) -> str | None:
        """Count, or return which of the limits forbids it."""
        if not self.levels:
            count()
            return None
        with self.ledger.lock:
            if (name := self._used_up(names)) is None:
                count()
            return name

    def _used_up(self, names: Collection[str]) -> str | None:
        for level in self.levels:
            for name, limit in level.limits.items():
                if name in names and level.used(name) >= limit:
                    return name
        return None

    def _least(self, measure: Callable[[float, float], float]) -> dict[str, float]:
        least: dict[str, float] = {}
        for level in self.levels:
            for name, limit in level.limits.items():
                value = measure(limit, level.used(name))
                least[name] = min(value, least.get(name, value))
        return least

    def _complain(self) -> None:
        for name, problem in list(self._blind.items()):
            if getattr(self.ledger.total_counts, problem):
                self._blind.pop(name, None)
                logger.warning(
                    "looplet: the budget of %s cannot count model calls that are %s, and there are some; "
                    "%slimit model_calls as well",
                    name,
                    problem,
                    "say what they cost (price= of the backend), or " if name == "usd" else "",
                )


class BudgetView:
    """What hooks see of a run's budgets, as `state.budget`: numbers, by the name of the limit."""

    __slots__ = ("_guard",)

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    @property
    def spent(self) -> dict[str, float]:
        """Return what the run and its sub-agents have used, limited or not."""
        return self._guard.spent()

    @property
    def remaining(self) -> dict[str, float]:
        """Return what is left of every limit, those of the runs above included."""
        return self._guard.remaining()

    @property
    def fraction_left(self) -> dict[str, float]:
        """Return what is left of every limit, from 1.0 down to 0.0."""
        return self._guard.fraction_left()

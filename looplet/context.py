"""How full the context window is, and hooks that act on it.

Tokens are `conversation.tokens`: an estimate that each reported usage corrects (`looplet.tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

from looplet.compaction import Prune, Summarize, Truncate, compact_chain
from looplet.decisions import HookDecision, InjectContext
from looplet.errors import ConfigError, did_you_mean
from looplet.messages import Conversation

TIERS: Final = ("ok", "warning", "error", "blocking")
"""from empty to full"""
DEFAULT_WINDOW: Final = 200_000


@dataclass(frozen=True, slots=True)
class ContextBudget:
    """Where a context window counts as nearly full, in tokens."""

    context_window: int = DEFAULT_WINDOW
    warning_at: int = 120_000
    error_at: int = 160_000
    compact_buffer: int = 13_000
    """what has to stay free: the reply must fit in"""

    def __post_init__(self) -> None:
        if not 0 < self.warning_at <= self.error_at <= self.blocking_at < self.context_window:
            raise ConfigError(
                "a ContextBudget needs 0 < warning_at <= error_at <= context_window - compact_buffer < context_window, "
                f"not {self}; ContextBudget.of_window({self.context_window}) has proportions that fit"
            )

    @classmethod
    def of_window(cls, context_window: int) -> Self:
        """Return the budget of a window in the proportions of the defaults."""
        share = context_window / DEFAULT_WINDOW
        return cls(context_window, round(120_000 * share), round(160_000 * share), max(1, round(13_000 * share)))

    @property
    def blocking_at(self) -> int:
        """Return how many tokens leave no room for a reply."""
        return self.context_window - self.compact_buffer

    def classify(self, tokens: int) -> str:
        """Return `ok`, `warning`, `error` or `blocking`."""
        return TIERS[sum(tokens >= limit for limit in (self.warning_at, self.error_at, self.blocking_at))]


class ThresholdCompactHook:
    """Asks for compaction from a tier of the budget on."""

    def __init__(self, budget: ContextBudget, *, fire_tier: str = "error") -> None:
        if not isinstance(budget, ContextBudget):
            raise ConfigError(f"ThresholdCompactHook takes a ContextBudget, not {type(budget).__name__}")
        if fire_tier not in TIERS[1:]:
            raise ConfigError(f"fire_tier is one of {', '.join(TIERS[1:])}{did_you_mean(fire_tier, TIERS[1:])}")
        self.budget = budget
        self.fire_tier = fire_tier
        self.fired_at: list[int] = []
        """numbers of the steps before which it asked"""

    def should_compact(self, state: Any, session_log: Any, conversation: Conversation, step_num: int) -> bool:
        """Tell whether the conversation is in the tier."""
        tier = self.budget.classify(conversation.tokens)
        if TIERS.index(tier) < TIERS.index(self.fire_tier):
            return False
        self.fired_at.append(step_num)
        return True


class ContextPressureHook:
    """Tells the model when its window gets full, and asks for compaction when it nearly is.

    `llm`: when anything is given, the run's own model is asked for a summary of what goes, unless the run has a
    `compact_service`.  Without it and without a service, old results and turns go as they are.
    """

    looplet_rewrites: Final = False

    def __init__(
        self,
        llm: Any = None,
        *,
        context_window: int | None = None,
        warning_at: int | None = None,
        error_at: int | None = None,
    ) -> None:
        budget = ContextBudget.of_window(DEFAULT_WINDOW if context_window is None else context_window)
        self.budget = ContextBudget(
            budget.context_window, warning_at or budget.warning_at, error_at or budget.error_at, budget.compact_buffer
        )
        if llm is not None:
            self.compact = compact_chain(Prune, Summarize, Truncate).compact

    def should_compact(self, state: Any, session_log: Any, conversation: Conversation, step_num: int) -> bool:
        """Tell whether the window is nearly full."""
        return conversation.tokens >= self.budget.error_at

    def pre_prompt(self, state: Any, session_log: Any, context: Any, step_num: int) -> HookDecision | None:
        """Tell the model how full its window is."""
        conversation = getattr(state, "conversation", None)
        tokens = conversation.tokens if conversation is not None else 0
        if self.budget.classify(tokens) == "ok":
            return None
        return InjectContext(
            f"About {tokens:,} of the {self.budget.context_window:,} tokens of your context window are in use. "
            "Ask tools for little at a time, and finish soon."
        )

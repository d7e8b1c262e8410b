"""Guards: the hooks and budgets that may refuse or stop, and what is checked of them when a run is made.

A run that paused goes on only with guards of the kinds that it had: a different budget or other rules are the
caller's right, none at all is a slip.  A hook is known by the name of its class; a subclass will do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache

from looplet.errors import ConfigError, did_you_mean
from looplet.hooks import TOOL_NAMES, HookSet

logger = logging.getLogger("looplet")


def require_guards(
    wanted: Iterable[str], limits: Iterable[str], given: Sequence[Sequence[str]], limited: Iterable[str]
) -> None:
    """Raise ConfigError that names the guards of a paused run which the one that is to go on lacks.

    wanted: class names; given: for each hook the names of its classes, nearest first; limits, limited: names of what
    budgets limit.
    """
    lacking = _lacking(list(wanted), given)
    unlimited = [name for name in limits if name not in set(limited)]
    if not lacking and not unlimited:
        return
    missing = [*lacking, *(f"a budget of {name}" for name in unlimited)]
    caps = ", ".join(f"{name}=..." for name in unlimited)
    hooks = ", ".join([*(f"{name}(...)" for name in lacking), *([f"BudgetCap({caps})"] if caps else [])])
    setting = f" or LoopConfig(budget=Budget({caps}))" if caps else ""
    raise ConfigError(
        f"the paused run had guards that this one lacks: {', '.join(missing)}; pass hooks=[{hooks}]{setting} again, "
        "or one that allows everything"
    )


def _lacking(wanted: Sequence[str], given: Sequence[Sequence[str]]) -> list[str]:
    """Return the names for which there is no hook; a hook stands for one name, of whichever of its classes fits best.

    The assignment is the largest there is (augmenting paths), so that no order of the hooks has one refused.
    """
    assigned: dict[int, int] = {}

    def assign(index: int, tried: set[int]) -> bool:
        for place, kinds in enumerate(given):
            if wanted[index] in kinds and place not in tried:
                tried.add(place)
                if place not in assigned or assign(assigned[place], tried):
                    assigned[place] = index
                    return True
        return False

    def distance(index: int) -> int:
        return min([kinds.index(wanted[index]) for kinds in given if wanted[index] in kinds], default=0)

    left = [index for index in sorted(range(len(wanted)), key=distance) if not assign(index, set())]
    return [wanted[index] for index in sorted(left)]


def warn_of_unknown_tools(hooks: HookSet, known: Sequence[str]) -> None:
    """Log, once each, the tools that guards name and that a run does not have.

    It is no error: the guard may be shared with a sub-agent whose tool that is, or the tool may be registered later.
    """
    for hook, names in hooks.named(TOOL_NAMES):
        for name in names:
            if name not in known:
                _warn(hook, name, did_you_mean(name, known))


@lru_cache(maxsize=1024)
def _warn(hook: str, name: str, hint: str) -> None:
    logger.warning("looplet: a %s is about the tool %r, which the run does not have%s", hook, name, hint)

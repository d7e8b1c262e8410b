"""Which backends may answer a model call, and under which rules: what a wrapper tells the loop.

A wrapper (`ResilientBackend`, `BackendRouter`, `RateLimitedBackend`) does not stand between the loop and the model.  It
has a method `looplet_candidates(purpose)`, and the loop asks the backends inside by itself, so that every attempt, wait
and fallback is seen in the run's trace.  A backend without the method is its own only candidate.

A purpose is what a call is for: `agent` (the loop's own turns), `compaction`, `judge`, `subagent` or `tool`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from looplet.errors import BackendError, ConfigError, ContextOverflow
from looplet.hooks import SINK
from looplet.types import Usage

AGENT: Final = "agent"
LONGEST_WAIT_S: Final = 3600.0
"""a provider that asks for a longer wait is not waited for"""
METHODS: Final = ("chat", "generate_with_tools", "generate")
"""what can be asked of a backend, besides `stream`"""


class Retry(Protocol):
    """When to ask again, and how long an answer may take."""

    @property
    def timeout_s(self) -> float | None:
        """Return the seconds that an attempt may take (in a stream: that the next piece may take)."""

    @property
    def deadline_s(self) -> float | None:
        """Return the seconds that all attempts and waits may take together."""

    def delay_s(self, attempt: int, error: Exception, elapsed_s: float) -> float | None:
        """Return the seconds to wait before the next attempt, None to give up; `attempt` (from 1) has failed."""


class Reservation(Protocol):
    """A place for one request under a rate limit."""

    wait_s: float
    """how long to wait before the request may go out"""
    limit: str
    """what there is too little of, such as `requests_per_minute`"""

    def settle(self, tokens: int) -> None:
        """Say how many tokens the request took in the end."""

    def give_back(self) -> None:
        """Say that the request never went out."""


class RateLimit(Protocol):
    """How much may be asked in a time; shared by threads.  It never waits by itself."""

    def reserve(self, tokens: int) -> Reservation:
        """Take a place for one request of about `tokens` tokens; 0 when nobody knows."""


class Meter(Protocol):
    """Counts what model calls use."""

    def count(self, purpose: str, model: str, usage: Usage | None) -> None:
        """Count one answer; `usage` is None when the provider reported none."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that may answer a call, and the rules under which it is asked."""

    llm: Any
    retry: Retry | None = None
    """None: asked once"""
    limits: tuple[RateLimit, ...] = ()
    meters: tuple[Meter, ...] = ()


def candidates(llm: Any, purpose: str = AGENT) -> tuple[Candidate, ...]:
    """Return who may answer, in the order in which they are to be asked; never empty.

    The method is looked up on the class: a wrapper of the caller's own that passes unknown attributes on to what it
    wraps is a backend like any other, and is asked itself.
    """
    while SINK in (own := getattr(llm, "__dict__", {})) and "inner" in own:  # a sink's wrapper asks nothing itself
        llm = own["inner"]
    if getattr(type(llm), "looplet_candidates", None) is None:
        return (Candidate(llm),)
    found: tuple[Candidate, ...] = llm.looplet_candidates(purpose)
    return found


def parts(llm: Any) -> Iterator[Any]:
    """Yield a backend and every backend inside it (`inner`, and what `looplet_parts` lists), each once."""
    seen: set[int] = set()
    waiting = [llm]
    while waiting:
        part = waiting.pop(0)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        waiting.append(getattr(part, "__dict__", {}).get("inner"))
        if getattr(type(part), "looplet_parts", None) is not None:
            waiting.extend(part.looplet_parts())


def gives_way(error: Exception) -> bool:
    """Tell whether the next candidate is to be asked after `error`.

    Yes, when the provider failed, whatever its reason: another one has other keys, quotas, models and rules.  No, when
    the request is too long: that is for compaction, and a larger model would be asked, and paid, from then on in every
    turn.  No, for the caller's mistakes (ConfigError) and for errors in a backend's own code.
    """
    if isinstance(error, ContextOverflow):
        return False
    return isinstance(error, (BackendError, ConnectionError, TimeoutError))


def kind_of(error: BaseException) -> str:
    """Return a low-cardinality name for the error."""
    return error.kind if isinstance(error, BackendError) else type(error).__name__


def name_of(llm: Any) -> str:
    """Return the model's name, or the backend's type where it says none."""
    return str(getattr(llm, "model", "") or type(llm).__name__)


def is_async(llm: Any) -> bool:
    """Tell whether a backend is to be awaited."""
    method = next((m for name in METHODS if (m := getattr(llm, name, None)) is not None), None)
    return inspect.iscoroutinefunction(method)


def require_alike(wrapper: str, given: Mapping[str, Any]) -> None:
    """Raise ConfigError unless all that was `given` (parameter → backend) are backends, all sync or all async."""
    for name, llm in given.items():
        if inspect.isclass(llm) or not any(callable(getattr(llm, method, None)) for method in METHODS):
            what = f"the class {llm.__name__}; pass an object of it" if inspect.isclass(llm) else f"{llm!r:.60}"
            wanted = ", ".join(f"{method}()" for method in METHODS)
            raise ConfigError(f"{wrapper}: {name} takes a backend (an object with one of {wanted}), not {what}")
    first, *others = given.items()
    for name, llm in others:
        if is_async(llm) != is_async(first[1]):
            odd, plain = ((name, llm), first) if is_async(llm) else (first, (name, llm))
            raise ConfigError(
                f"{wrapper}: {odd[0]} ({type(odd[1]).__name__}) is async and {plain[0]} ({type(plain[1]).__name__}) "
                f"is not; give it async backends for `async for`, or sync ones, not both"
            )

"""`ResilientBackend`: retries, time-outs, a deadline, and other backends to fall back on.

    llm = ResilientBackend(primary, retries=3, timeout_s=60, fallbacks=[secondary])

No retry library: the policy is a dozen lines, and its waits must be effects of the plan, where a library sleeps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from looplet.arguments import int_from, require, strict_names
from looplet.backends.candidates import LONGEST_WAIT_S, Candidate, candidates, require_alike
from looplet.backends.direct import Wrapper
from looplet.errors import BackendError, ConfigError

_DOUBLINGS: Final = 64
"""after that many the delay is `max_delay_s` anyway"""
_random = random.Random()
"""apart from the program's own, which may be seeded"""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential back-off with jitter, for errors that may go away: the `Retry` of a `ResilientBackend`."""

    retries: int = 3
    """attempts beyond the first"""
    timeout_s: float | None = None
    base_delay_s: float = 0.5
    max_delay_s: float = 8.0
    jitter: float = 0.2
    """by which part of itself a delay may be longer or shorter"""
    deadline_s: float | None = None
    random: Callable[[], float] = field(default=_random.random, repr=False)
    """from 0 to 1"""

    def __post_init__(self) -> None:
        require("retries", self.retries, int_from(0))
        for name in ("timeout_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ConfigError(f"{name} must be seconds above 0, or None, not {value!r}")
        for name, most in (("base_delay_s", math.inf), ("max_delay_s", math.inf), ("jitter", 1)):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= most):
                raise ConfigError(f"{name} must be a number from 0{' to 1' if most == 1 else ''}, not {value!r}")

    def delay_s(self, attempt: int, error: Exception, elapsed_s: float) -> float | None:
        """Return the seconds to wait: no less than the provider asked for; None to give up, if that is over an hour."""
        asked = getattr(error, "retry_after_s", None) or 0.0
        if asked > LONGEST_WAIT_S or attempt > self.retries or not may_go_away(error):
            return None
        spread = 1 + self.jitter * (2 * self.random() - 1)
        delay = min(self.max_delay_s, math.ldexp(self.base_delay_s, min(attempt - 1, _DOUBLINGS)) * spread)
        delay = max(delay, asked)
        too_late = self.deadline_s is not None and elapsed_s + delay >= self.deadline_s
        return None if too_late else delay


class ResilientBackend(Wrapper):
    """A backend that is asked again when it fails, and others when it goes on failing.

    retries: attempts beyond the first, for errors that may go away (`BackendError.retryable`, and the ConnectionError
    and TimeoutError of backends of your own).  The provider packages' own retries are off: these are all there are.
    timeout_s: seconds for one attempt; of a stream: until its next piece.  Waits begin at `base_delay_s`, double up to
    `max_delay_s`, and vary by `jitter`; a provider's Retry-After counts when it is longer, and one of more than an hour
    gives up.  deadline_s: seconds for all attempts and waits of one backend; a wait beyond it is not begun.

    fallbacks: backends that are asked, in order, when the one before gave up with any BackendError but ContextOverflow.
    The rules here apply to them as well.  A backend that is resilient itself, here or as `inner`, keeps its own rules.
    Each call begins with `inner` again.  When all fail the last error is raised; its notes tell of the attempts.

    Raises ConfigError for settings that cannot work, and for sync and async backends together.
    """

    @strict_names()
    def __init__(
        self,
        inner: Any,
        *,
        retries: int = 3,
        timeout_s: float | None = None,
        base_delay_s: float = 0.5,
        max_delay_s: float = 8.0,
        jitter: float = 0.2,
        deadline_s: float | None = None,
        fallbacks: Sequence[Any] = (),
    ) -> None:
        name = type(self).__name__
        if not isinstance(fallbacks, list | tuple):
            raise ConfigError(f"{name}: fallbacks takes a list of backends, not {type(fallbacks).__name__}: [backend]")
        require_alike(name, {"inner": inner, **{f"fallbacks[{i}]": llm for i, llm in enumerate(fallbacks)}})
        self.inner = inner
        self.fallbacks = tuple(fallbacks)
        self.rules = Backoff(retries, timeout_s, base_delay_s, max_delay_s, jitter, deadline_s)

    def looplet_candidates(self, purpose: str) -> tuple[Candidate, ...]:
        """Return `inner` and the fallbacks, under these rules where they bring none of their own."""
        found = [candidate for llm in self.looplet_parts() for candidate in candidates(llm, purpose)]
        return tuple(candidate if candidate.retry is not None else self._ruled(candidate) for candidate in found)

    def looplet_parts(self) -> tuple[Any, ...]:
        """Return the backends inside."""
        return (self.inner, *self.fallbacks)

    def _ruled(self, candidate: Candidate) -> Candidate:
        return replace(candidate, llm=_asked_once(candidate.llm, self.rules.timeout_s), retry=self.rules)


def may_go_away(error: Exception) -> bool:
    """Tell whether the same backend may answer when it is asked again."""
    return error.retryable if isinstance(error, BackendError) else isinstance(error, (ConnectionError, TimeoutError))


def _asked_once(llm: Any, timeout_s: float | None) -> Any:
    """Return the backend without retries of its own, if it has any: they would multiply with ours."""
    if getattr(type(llm), "looplet_once", None) is None:
        return llm
    return llm.looplet_once(timeout_s)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""`BackendRouter`: another backend for compaction, judges and sub-agents; and the counters of all of them.

router = BackendRouter(OpenAIBackend(model="gpt-4o"), compaction=OpenAIBackend(model="gpt-4o-mini"))
for step in composable_loop(llm=router, ...):
    print(step.pretty(), router.total_input_tokens, router.total_cost_usd)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from looplet.backends.candidates import AGENT, Candidate, candidates, require_alike
from looplet.backends.direct import Wrapper
from looplet.types import NO_USAGE, Usage

UNNAMED: Final = "unnamed"
"""the model of a backend that does not say which it is"""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a number of model calls used."""

    calls: int = 0
    unreported_calls: int = 0
    """those whose provider reported no usage: they are missing in the tokens"""
    unpriced_calls: int = 0
    """those whose price is not known: they are missing in the cost"""
    usage: Usage = NO_USAGE

    def with_call(self, usage: Usage | None) -> Spent:
        """Return this and one more call."""
        return Spent(
            self.calls + 1,
            self.unreported_calls + (usage is None),
            self.unpriced_calls + (usage is not None and usage.cost_usd is None),
            self.usage if usage is None else self.usage + usage,
        )


class BackendRouter(Wrapper):
    """Asks one backend for the agent's turns, others for other purposes, and counts what they use.

    A purpose without a backend of its own is `default`'s.  `subagent` is asked by runs that tools start with this
    router; `judge` and `compaction` by what calls itself that.  Counted is every call that a run makes through the
    router, retried attempts that were charged for with it, and every call by hand (`router.chat(...)`, purpose
    `agent`).  May be shared by runs in many threads.  Raises ConfigError for sync and async backends together.
    """

    def __init__(
        self, default: Any, *, agent: Any = None, compaction: Any = None, judge: Any = None, subagent: Any = None
    ) -> None:
        named = {AGENT: agent, "compaction": compaction, "judge": judge, "subagent": subagent}
        self.default = default
        self.routes = {purpose: llm for purpose, llm in named.items() if llm is not None}
        require_alike(type(self).__name__, {"default": default, **self.routes})
        self.inner = self.routes.get(AGENT, default)
        self._lock = threading.RLock()  # the garbage collector may come in here, and end a run that has used something
        self._total = Spent()
        self._by_model: dict[str, Spent] = {}
        self._by_purpose: dict[str, Spent] = {}

    def looplet_candidates(self, purpose: str) -> tuple[Candidate, ...]:
        """Return the candidates of the purpose's backend, counted here."""
        llm = self.routes.get(purpose, self.default)
        return tuple(replace(c, meters=(*c.meters, self)) for c in candidates(llm, purpose))

    def looplet_parts(self) -> tuple[Any, ...]:
        """Return the backends inside."""
        return (self.inner, self.default, *self.routes.values())

    # --- the counters -----------------------------------------------------------------------------------------------

    def count(self, purpose: str, model: str, usage: Usage | None) -> None:
        """Count one call; `usage` is None when the provider reported none."""
        model = model or UNNAMED
        with self._lock:
            self._total = self._total.with_call(usage)
            for table, name in ((self._by_model, model), (self._by_purpose, purpose)):
                table[name] = table.get(name, Spent()).with_call(usage)

    @property
    def total_input_tokens(self) -> int:
        """Return the input tokens of all calls that reported usage, cached ones among them."""
        return self._total.usage.input_tokens

    @property
    def total_output_tokens(self) -> int:
        """Return the output tokens of all calls that reported usage."""
        return self._total.usage.output_tokens

    @property
    def total_cost_usd(self) -> float | None:
        """Return the cost of the calls whose price is known, None until there is one; see `unpriced_calls`."""
        return self._total.usage.cost_usd

    @property
    def total_calls(self) -> int:
        """Return how many calls were counted."""
        return self._total.calls

    @property
    def unreported_calls(self) -> int:
        """Return how many calls reported no usage; they are in `total_calls` and in no other number."""
        return self._total.unreported_calls

    @property
    def unpriced_calls(self) -> int:
        """Return how many calls reported usage of a model whose price is not known."""
        return self._total.unpriced_calls

    @property
    def by_model(self) -> dict[str, Spent]:
        """Return what each model used, by the name that its backend asks for."""
        with self._lock:
            return dict(self._by_model)

    @property
    def by_purpose(self) -> dict[str, Spent]:
        """Return what each purpose used."""
        with self._lock:
            return dict(self._by_purpose)

    def report(self) -> str:
        """Return the counters as a table."""
        with self._lock:
            tables = {"purpose": dict(self._by_purpose), "model": dict(self._by_model), "": {"total": self._total}}
        head = ("", "calls", "input", "output", "cost", "")
        rows = [(head, *_rows(title, table)) for title, table in tables.items()]
        cells = [row for block in rows for row in block[1:]]
        widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
        return "\n".join(_line(row, widths) for row in (head, *cells))


def _rows(title: str, table: Mapping[str, Spent]) -> Iterator[tuple[str, ...]]:
    for name, spent in table.items():
        usage, cost = spent.usage, spent.usage.cost_usd
        notes = {"without usage": spent.unreported_calls, "without price": spent.unpriced_calls}
        yield (
            f"{title} {name}".strip(),
            f"{spent.calls:,}",
            f"{usage.input_tokens:,}",
            f"{usage.output_tokens:,}",
            "unknown" if cost is None else f"${cost:.6f}",
            ", ".join(f"{count} {what}" for what, count in notes.items() if count),
        )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers, note = row
    cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True))]
    return "  ".join([*cells, note]).rstrip()

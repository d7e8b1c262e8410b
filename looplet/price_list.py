"""List prices: what the providers charge, out of the tables of `genai-prices`.

The package works a price out anew for each call, from the table's own units, which takes longer than all the rest of a
bill.  So what a model costs is written on a `_Card` once; one that does not say what the package says is not used.
The card is for the price of the moment (some have a date or a time of day) and for the table in use (the package can
update it).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from typing import Any, Final

from looplet.errors import ConfigError
from looplet.types import Usage

logger = logging.getLogger("looplet")

_MTOK: Final = 1_000_000
_MOST_KNOWN: Final = 1000
"""how many names of models are remembered: a server may make up a new one for each answer"""
_PARTS: Final = {
    "input": None,
    "output": None,
    "cache_read": "input",
    "cache_write": "input",
    "cache_write_1h": "cache_write",
    "output_reasoning": "output",
}
"""what has a price of its own → what it is a part of, and costs like where it has none"""


def cost_usd(
    usage: Usage, model: str, *, url: str = "", provider: str = "", cache_write_1h_tokens: int = 0
) -> float | None:
    """Return what the tokens cost at the provider with this name, or at this address; None when nobody knows.

    Nobody knows the price of a model that is not on the list, and of counts that do not add up.
    """
    if not (url or provider):
        return None
    counts = {
        "input": usage.input_tokens,
        "output": usage.output_tokens,
        "cache_read": usage.cached_tokens,
        "cache_write": usage.cache_write_tokens,
        "cache_write_1h": cache_write_1h_tokens,
        "output_reasoning": usage.reasoning_tokens,
    }
    try:
        listed = _Table.now().find(model, provider, url)
        return None if listed is None else float(listed.total(counts))
    except ValueError:  # counts that do not add up
        return None
    except Exception as error:  # noqa: BLE001 - the package's own; the call is made, and its answer counts for more
        _complain(f"{type(error).__name__}: {error}")
        return None


def require(provider: str, model: str = "") -> None:
    """Raise ConfigError unless the list has the provider, and the model if one is named."""
    from genai_prices.data_snapshot import get_snapshot

    table = get_snapshot()
    try:
        table.find_provider(None, provider, None)
    except LookupError:
        known = ", ".join(sorted(found.id for found in table.providers))
        raise ConfigError(f"there is no list of prices of {provider!r}; there are: {known}") from None
    try:
        if model:
            table.find_provider_model(model, None, provider, None)
    except LookupError:
        raise ConfigError(
            f"the list of {provider!r} has no model {model!r}; say what it costs: "
            "Price(input_per_mtok, output_per_mtok), in USD"
        ) from None


@cache
def _complain(words: str) -> None:
    logger.warning("looplet: genai-prices could not say what a call costs (%s); such calls count as unpriced", words)


class _Table:
    """One state of the package's tables, and what was found in it."""

    _latest: _Table | None = None

    def __init__(self, snapshot: Any) -> None:
        self.snapshot = snapshot
        self.known: dict[tuple[str, str, str], _Listed | None] = {}

    @classmethod
    def now(cls) -> _Table:
        """Return the one in use."""
        from genai_prices.data_snapshot import get_snapshot

        snapshot, table = get_snapshot(), cls._latest
        if table is None or table.snapshot is not snapshot or len(table.known) > _MOST_KNOWN:
            table = cls._latest = cls(snapshot)
        return table

    def find(self, model: str, provider: str, url: str) -> _Listed | None:
        """Return the model's entry, None when there is none."""
        name = (model, provider, url)
        if name not in self.known:
            try:
                found = self.snapshot.find_provider_model(model, None, provider or None, url or None)
            except LookupError:
                self.known[name] = None
            else:
                self.known[name] = _Listed(*found)
        return self.known[name]


class _Listed:
    """A model on the list of a provider."""

    def __init__(self, provider: Any, model: Any) -> None:
        self._provider = provider
        self._model = model
        self._cards: list[tuple[Any, _Card | None]] = []
        """the price, and its card, None where a card does not say enough"""

    def total(self, counts: Mapping[str, int]) -> Decimal:
        """Return what so many tokens cost now.  Raises ValueError for counts that do not add up."""
        moment = datetime.now(UTC)
        card = self._card(self._model.get_prices(moment), moment)
        return self._asked(counts, moment) if card is None else card.total(counts)

    def _card(self, price: Any, moment: datetime) -> _Card | None:
        """Return the price's card if it says what the package says, on both sides of each step of a price."""
        for known, card in self._cards:
            if known is price:
                return card
        new = _Card(price)
        usable = new if self._agrees(new, moment) else None
        self._cards.append((price, usable))
        return usable

    def _agrees(self, card: _Card, moment: datetime) -> bool:
        try:
            return all(card.total(counts) == self._asked(counts, moment) for counts in card.samples())
        except ValueError:  # a price that the package itself finds no sense in
            return False

    def _asked(self, counts: Mapping[str, int], moment: datetime) -> Decimal:
        """Have the package work it out."""
        from genai_prices import Usage as Tokens

        tokens = Tokens(**{f"{name}_tokens": count for name, count in counts.items() if count})
        price = self._model.calc_price(tokens, self._provider, genai_request_timestamp=moment)
        total: Decimal = price.total_price
        return total


class _Card:
    """What a model costs, at one time."""

    def __init__(self, price: Any) -> None:
        found = {name: getattr(price, f"{name}_mtok", None) for name in _PARTS}
        self._rates = {name: rate for name, rate in found.items() if rate is not None}

    def total(self, counts: Mapping[str, int]) -> Decimal:
        """Return what so many tokens cost.  Raises ValueError when a part is more than the whole."""
        own = dict(counts)
        for name in self._rates:
            if (whole := _PARTS[name]) is not None:
                own[whole] -= counts[name]
        total = Decimal(0)
        for name, rate in self._rates.items():
            if own[name] < 0:
                raise ValueError(f"more tokens are parts of {name} than there are in all")
            if own[name]:
                total += _rate_at(rate, counts["input"]) * own[name] / _MTOK
        return total

    def samples(self) -> Iterator[dict[str, int]]:
        """Yield counts in which everything is some of the input or output, and the input is around each step."""
        steps = {tier.start for rate in self._rates.values() for tier in getattr(rate, "tiers", ())}
        for size in sorted({0, 10_007, *steps, *(start + 1 for start in steps)}):
            yield {
                "input": size,
                "output": size // 3 + 11,
                "cache_read": size // 5,
                "cache_write": size // 7,
                "cache_write_1h": size // 11,
                "output_reasoning": size // 13 + 2,
            }


def _rate_at(rate: Any, input_tokens: int) -> Decimal:
    """Return the price per million tokens in a request of this size."""
    at: Decimal = getattr(rate, "base", rate)
    for tier in getattr(rate, "tiers", ()):
        if input_tokens > tier.start:
            at = tier.price
    return at

"""List prices: what the providers charge, out of the tables of `genai-prices`.

The package is slow: it works each call out anew, from its tables.  So `_Rates` holds the prices of a model, per million
tokens.  Before they are used they are compared with the package for some counts of tokens; where the two differ, the
package is asked each time.  Rates hold for one entry of the tables, which may have a date or a time of day, and for as
long as the package does not update its tables.
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
"""kind of token that may have a price of its own → the kind that it is a part of, whose price it has otherwise"""


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
    """The package's tables as they are until it updates them, and what was looked up in them."""

    _latest: _Table | None = None

    def __init__(self, snapshot: Any) -> None:
        self.snapshot = snapshot
        self.known: dict[tuple[str, str, str], _ListedModel | None] = {}

    @classmethod
    def now(cls) -> _Table:
        """Return the one in use."""
        from genai_prices.data_snapshot import get_snapshot

        snapshot, table = get_snapshot(), cls._latest
        if table is None or table.snapshot is not snapshot or len(table.known) > _MOST_KNOWN:
            table = cls._latest = cls(snapshot)
        return table

    def find(self, model: str, provider: str, url: str) -> _ListedModel | None:
        """Return the model's entry, None when there is none."""
        name = (model, provider, url)
        if name not in self.known:
            try:
                found = self.snapshot.find_provider_model(model, None, provider or None, url or None)
            except LookupError:
                self.known[name] = None
            else:
                self.known[name] = _ListedModel(*found)
        return self.known[name]


class _ListedModel:
    """A model on the list of a provider."""

    def __init__(self, provider: Any, model: Any) -> None:
        self._provider = provider
        self._model = model
        self._rates: list[tuple[Any, _Rates | None]] = []
        """entry of the table → its rates, None where they are not what the package says"""

    def total(self, counts: Mapping[str, int]) -> Decimal:
        """Return what so many tokens cost now.  Raises ValueError for counts that do not add up."""
        moment = datetime.now(UTC)
        rates = self._rates_of(self._model.get_prices(moment), moment)
        return self._by_package(counts, moment) if rates is None else rates.total(counts)

    def _rates_of(self, price: Any, moment: datetime) -> _Rates | None:
        """Return the rates of an entry, None unless they agree with the package on both sides of each tier's start."""
        for known, rates in self._rates:
            if known is price:
                return rates
        new = _Rates(price)
        usable = new if self._agrees(new, moment) else None
        self._rates.append((price, usable))
        return usable

    def _agrees(self, rates: _Rates, moment: datetime) -> bool:
        try:
            return all(rates.total(counts) == self._by_package(counts, moment) for counts in rates.samples())
        except ValueError:  # a price that the package itself finds no sense in
            return False

    def _by_package(self, counts: Mapping[str, int], moment: datetime) -> Decimal:
        """Return the cost that the package works out."""
        from genai_prices import Usage as Tokens

        tokens = Tokens(**{f"{name}_tokens": count for name, count in counts.items() if count})
        price = self._model.calc_price(tokens, self._provider, genai_request_timestamp=moment)
        total: Decimal = price.total_price
        return total


class _Rates:
    """What a model costs, in USD per million tokens: one entry of the table."""

    def __init__(self, price: Any) -> None:
        found = {name: getattr(price, f"{name}_mtok", None) for name in _PARTS}
        self._per_mtok = {name: rate for name, rate in found.items() if rate is not None}

    def total(self, counts: Mapping[str, int]) -> Decimal:
        """Return what so many tokens cost.  Raises ValueError when a part is more than the whole."""
        own = dict(counts)
        for name in self._per_mtok:
            if (whole := _PARTS[name]) is not None:
                own[whole] -= counts[name]
        total = Decimal(0)
        for name, rate in self._per_mtok.items():
            if own[name] < 0:
                raise ValueError(f"more tokens are parts of {name} than there are in all")
            if own[name]:
                total += _rate_at(rate, counts["input"]) * own[name] / _MTOK
        return total

    def samples(self) -> Iterator[dict[str, int]]:
        """Yield counts with some tokens of each kind, and an input just below and just above the start of each tier."""
        steps = {tier.start for rate in self._per_mtok.values() for tier in getattr(rate, "tiers", ())}
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

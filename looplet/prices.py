"""What model calls cost: the price that a backend was given, else the list price of the provider at its address.

A price that nobody knows is no cost, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from looplet import price_list
from looplet.arguments import NUMBER, TEXT, Kind, check_fields, optional, shown
from looplet.errors import ConfigError
from looplet.types import Usage

_MTOK: Final = 1_000_000
_RATE: Final = Kind("a number of USD from 0", lambda value: NUMBER.fits(value) and value >= 0)


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs, in USD per million tokens; `Price(0, 0)` for one that costs nothing.

    Raises ConfigError for what is no price.
    """

    input_per_mtok: float
    output_per_mtok: float
    """of all output, reasoning included"""
    cached_input_per_mtok: float | None = None
    """of input that was read from the provider's cache; None: as other input"""
    cache_write_per_mtok: float | None = None
    """of input that was written to it; None: as other input"""

    def __post_init__(self) -> None:
        either = optional(_RATE)
        rates = {"input_per_mtok": _RATE, "output_per_mtok": _RATE}
        check_fields(self, {**rates, "cached_input_per_mtok": either, "cache_write_per_mtok": either}, "Price: ")

    def cost_usd(self, usage: Usage, model: str, cache_write_1h_tokens: int = 0) -> float | None:
        """Return what the tokens cost, whoever answered; None for counts that do not add up."""
        cached, written = usage.cached_tokens, usage.cache_write_tokens
        fresh = usage.input_tokens - cached - written
        if fresh < 0:
            return None
        rate = self.input_per_mtok
        read_rate = rate if self.cached_input_per_mtok is None else self.cached_input_per_mtok
        write_rate = rate if self.cache_write_per_mtok is None else self.cache_write_per_mtok
        sent = fresh * rate + cached * read_rate + written * write_rate
        return (sent + usage.output_tokens * self.output_per_mtok) / _MTOK


@dataclass(frozen=True, slots=True)
class ListPrice:
    """What a provider charges by its list, for a proxy that passes its prices on.

    `provider` as `genai-prices` calls it: `openai`, `anthropic`, `azure`, ...  Raises ConfigError for one that it does
    not know, and for a model that the provider does not have.
    """

    provider: str
    model: str = ""
    """the provider's name for it, where the proxy has one of its own; empty: by the name that the answer gives"""

    def __post_init__(self) -> None:
        check_fields(self, {"provider": TEXT, "model": TEXT}, "ListPrice: ")
        price_list.require(self.provider, self.model)

    def cost_usd(self, usage: Usage, model: str, cache_write_1h_tokens: int = 0) -> float | None:
        """Return what the tokens cost; None for a model that the list does not have."""
        name = self.model or model
        return price_list.cost_usd(usage, name, provider=self.provider, cache_write_1h_tokens=cache_write_1h_tokens)


def checked(price: Any) -> Price | ListPrice | None:
    """Return what a backend was given as its price; raises ConfigError for anything else."""
    if price is None or isinstance(price, (Price, ListPrice)):
        return price
    raise ConfigError(
        f"price takes Price(input_per_mtok, output_per_mtok), in USD, or ListPrice(provider), not {shown(price)}"
    )


def priced(usage: Usage, model: str, llm: Any, *, cache_write_1h_tokens: int = 0) -> Usage:
    """Return `usage` with its cost in USD where one is known: its own, by the backend's `price`, or by its `base_url`.

    `model`: who answered.  `cache_write_1h_tokens`: how many of those written are kept for an hour; lists have a price
    of their own for it.
    """
    if usage.cost_usd is not None:
        return usage
    price = getattr(llm, "price", None)
    if isinstance(price, (Price, ListPrice)):
        cost = price.cost_usd(usage, model, cache_write_1h_tokens)
    else:  # an attribute of that name may be anything, in a backend of the caller's own
        url = str(getattr(llm, "base_url", "") or "")
        cost = price_list.cost_usd(usage, model, url=url, cache_write_1h_tokens=cache_write_1h_tokens)
    return usage if cost is None else replace(usage, cost_usd=cost)

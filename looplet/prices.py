"""What model calls cost, from the price tables of `genai-prices`; an unknown model has no cost, never 0."""

from __future__ import annotations

from dataclasses import replace

from looplet.types import Usage

_unpriced: set[tuple[str, str]] = set()


def priced(usage: Usage, model: str, provider_url: str) -> Usage:
    """Return `usage` with its cost in USD where the provider at `provider_url` has a list price for `model`."""
    if usage.cost_usd is not None or not provider_url or (model, provider_url) in _unpriced:
        return usage
    from genai_prices import Usage as Tokens
    from genai_prices import calc_price

    tokens = Tokens(
        input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, cache_read_tokens=usage.cached_tokens
    )
    try:
        price = calc_price(tokens, model, provider_api_url=provider_url)
    except (LookupError, ValueError):  # no such model; counts that do not add up
        _unpriced.add((model, provider_url))
        return usage
    return replace(usage, cost_usd=float(price.total_price))

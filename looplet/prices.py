"""What model calls cost, from the price tables of `genai-prices`; an unknown model has no cost, never 0."""

from __future__ import annotations

from dataclasses import replace

from looplet.types import Usage

_unpriced: set[tuple[str, str]] = set()


def priced(usage: Usage, model: str, provider_url: str, **more: int) -> Usage:
    """Return `usage` with its cost in USD where the provider at `provider_url` has a list price for `model`.

    `more`: counts of tokens that have a price of their own and no field in `Usage`, such as `cache_write_1h_tokens`.
    """
    if usage.cost_usd is not None or not provider_url or (model, provider_url) in _unpriced:
        return usage
    from genai_prices import Usage as Tokens
    from genai_prices import calc_price

    try:
        tokens = Tokens(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cached_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            **more,
        )
        price = calc_price(tokens, model, provider_api_url=provider_url)
    except LookupError:
        _unpriced.add((model, provider_url))
        return usage
    except (ValueError, TypeError):  # counts that do not add up; a count it does not know
        return usage
    return replace(usage, cost_usd=float(price.total_price))

"""How a scripted stream cuts a text."""

from __future__ import annotations


def pieces(text: str) -> list[str]:
    """Return a text in the pieces, four at most, in which a stream brings it."""
    size = max(1, -(-len(text) // 4))
    return [text[start : start + size] for start in range(0, len(text), size)]

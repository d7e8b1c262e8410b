"""Clipping: a very long tool result as the model reads it.  The step and the trace keep the whole of it.

What is cut is said where it is missing, with how much it was.  Strings keep their beginning and their end, lists their
first items, dicts their keys, images everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from looplet.messages import encode
from looplet.parts import is_blob, with_markers

LEAST_CHARS: Final = 100
"""nothing is clipped to less: the words that say so need room, too"""
_HEAD: Final = 2 / 3
"""of a clipped string: the rest of what is kept is its end"""
_MORE: Final = "…"
"""the key under which a clipped dict says how many of its keys are missing"""


def clip_result(response: Any, max_chars: int | None) -> tuple[Any, bool]:
    """Return what the model reads of a tool call within about `max_chars` characters, and whether it was clipped.

    `response` is JSON-like; one that is short enough comes back as the same object, and any does for None.
    """
    if max_chars is None or (len(response) if isinstance(response, str) else len(encode(response))) <= max_chars:
        return response, False
    length = length_of(response)
    clipped = _clip(response, max(LEAST_CHARS, max_chars)) if length > max_chars else response
    return (clipped, True) if length_of(clipped) < length else (response, False)


def length_of(value: Any) -> int:
    """Return how many characters a model reads: a text's own, else those of the JSON, a marker for each image."""
    return len(value) if isinstance(value, str) else len(encode(with_markers(value)).decode())


def _clip(value: Any, room: int) -> Any:
    """Return `value` within about `room` characters."""
    if is_blob(value) or length_of(value) <= room:
        return value
    if isinstance(value, str):
        return _clip_text(value, room)
    if isinstance(value, Mapping):
        return _clip_dict(value, room)
    return _clip_list(value, room) if isinstance(value, (list, tuple)) else value


def _clip_text(text: str, room: int) -> str:
    marker = "\n[… {:,} characters are left out here; the run's trace has them …]\n"
    keep = max(0, room - len(marker.format(len(text))))
    head = int(keep * _HEAD)
    clipped = text[:head] + marker.format(len(text) - keep) + text[len(text) - (keep - head) :]
    return clipped if len(clipped) < len(text) else text


def _clip_list(items: Sequence[Any], room: int) -> list[Any]:
    marker = "[… {:,} of {:,} items are left out here; the run's trace has them …]"
    left = room - len(marker.format(len(items), len(items))) - len('[,""]')
    kept: list[Any] = []
    full = False
    for item in items:
        needed = length_of(item) + len('"",')
        full = full or (needed > left and (bool(kept) or left < LEAST_CHARS))
        if not full or is_blob(item):
            kept.append(_clip(item, left))
            left -= needed
    return kept if len(kept) == len(items) else [*kept, marker.format(len(items) - len(kept), len(items))]


def _clip_dict(entries: Mapping[str, Any], room: int) -> dict[str, Any]:
    names = {key: len(key) + len('"":"",') for key in entries}
    lengths = {key: length_of(value) for key, value in entries.items()}
    left, waiting = room - sum(names.values()) - len("{}"), len(entries)
    if sum(min(LEAST_CHARS, length) for length in lengths.values()) > left:
        return _clip_keys(entries, names, room)
    clipped: dict[str, Any] = {}
    for key in sorted(lengths, key=lambda name: lengths[name]):  # the short ones whole; the long ones share the rest
        clipped[key] = _clip(entries[key], max(LEAST_CHARS, left // waiting))
        left, waiting = left - length_of(clipped[key]), waiting - 1
    return {key: clipped[key] for key in entries}


def _clip_keys(entries: Mapping[str, Any], names: Mapping[str, int], room: int) -> dict[str, Any]:
    """Return the first entries of a dict that has more keys than there is room for."""
    marker = "{:,} of {:,} keys are left out here; the run's trace has them"
    left = room - len(marker.format(len(entries), len(entries))) - len('{"…":"",}')
    kept: dict[str, Any] = {}
    for key, value in entries.items():
        if (left := left - names[key]) < 0:
            break
        kept[key] = _clip(value, max(LEAST_CHARS, left // 2))
        left -= length_of(kept[key])
    return kept if len(kept) == len(entries) else {**kept, _MORE: marker.format(len(entries) - len(kept), len(entries))}

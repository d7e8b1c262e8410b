"""What the providers' wire formats share.

Responses come from many servers that only claim a format, so everything in one may be missing or of another type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from looplet.errors import BackendError
from looplet.messages import Message, Part, tells_failure
from looplet.parts import is_sealed
from looplet.prompt import part_text
from looplet.types import ToolCall, Usage, cut

Wire = dict[str, Any]

MOST_TOKENS: Final = 10**12
"""of a call that could be true"""
NOT_RUN: Final = '{"error":"not run"}'
"""stands for the result of a call that has none: the APIs want one for each"""


def wire_name(name: str) -> str:
    """Return a tool name that an API takes back: models make up names that it refuses."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64] or "unknown"


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool call came to, on its way into a request."""

    text: str
    """for a call that is not there: with a line that names it"""
    images: list[Part]
    failed: bool
    place: Wire | None
    """what waits for it, None when its call is not there: compacted away, or made in plain text"""


def results_of(message: Message, waiting: dict[str, Wire]) -> Iterator[Result]:
    """Yield the results in a tool message, each with the place that waits for it, by the id of its call."""
    for part in message.parts:
        call_id = str(part.get("id") or "")
        place, response = waiting.pop(call_id, None), part.get("response")
        text = part_text(part) if place is not None else f"Result of tool call {call_id}:\n{part_text(part)}"
        yield Result(text, list(images_of(response)), tells_failure(response), place)


def is_image(value: Any) -> bool:
    """Tell whether a JSON-like value is an image that a model can be shown: data that is one, or its address."""
    if not isinstance(value, Mapping) or value.get("modality") != "image":
        return False
    return is_sealed(value) or (value.get("type") == "uri" and isinstance(value.get("uri"), str))


def images_of(value: Any) -> Iterator[Part]:
    """Yield the images in a JSON-like value, in order."""
    if isinstance(value, dict):
        if is_image(value):
            yield value
        else:
            for item in value.values():
                yield from images_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from images_of(item)


def call_of(name: Any, arguments: Any, call_id: Any) -> ToolCall:
    """Return a call; arguments that are no JSON object go to the registry as they are, which tells the model."""
    return ToolCall(text_of(name), arguments_of(arguments), call_id=text_of(call_id))


def arguments_of(given: Any) -> dict[str, Any]:
    """Return a call's arguments, given as an object or as its JSON; what is neither, as `_raw_arguments`."""
    if isinstance(given, Mapping):
        return dict(given)
    if given is None or given == "":
        return {}
    try:
        value = json.loads(given)
    except (TypeError, ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"_raw_arguments": given if isinstance(given, str) else str(given)}


def finish_reason(reported: str | None, has_calls: bool) -> str:
    """Return the conventions' word, or a likely one when the provider's is none that we know."""
    return reported or ("tool_call" if has_calls else "stop")


def bad_response(answer: Any, missing: str, hint: str, usage: Usage | None) -> BackendError:
    """Return the error for a response that lacks what makes it one; `hint` is about a base URL that is wrong.

    `usage`: what the provider charges for it all the same.
    """
    if isinstance(answer, str):
        words = f"the answer is no JSON: {cut(' '.join(answer.split()), 120)!r}; {hint}"
        return BackendError(words, kind="bad_response")
    error = field_of(answer, "error")
    said = text_of(field_of(error, "message")) or (str(error) if error else "")
    words = f"the answer has no {missing}" + (f"; it says: {cut(said, 300)}" if said else "; try again")
    return BackendError(words, kind="bad_response", retryable=True, usage=usage)


def field_of(value: Any, name: str) -> Any:
    """Return a field of an object or mapping, None when there is none."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def text_of(value: Any) -> str:
    """Return a string as it is, the text parts of a list joined, an empty string for anything else."""
    if isinstance(value, list):
        return "".join(text_of(field_of(part, "text")) for part in value)
    return value if isinstance(value, str) else ""


def counts_of(usage: Any, sent: str, received: str) -> tuple[int, int] | None:
    """Return the two numbers that make a usage; one may be left out.

    None when both are, and when one is no number of tokens: what somebody made up is not counted as 0.
    """
    given = [value for name in (sent, received) if (value := field_of(usage, name)) is not None]
    if not given or not all(map(is_count, given)):
        return None
    return count_of(field_of(usage, sent)), count_of(field_of(usage, received))


def count_of(value: Any) -> int:
    """Return a number of tokens, 0 for anything else."""
    return int(value) if is_count(value) else 0


def is_count(value: Any) -> bool:
    """Tell whether a value is a number of tokens; some servers send `12.0`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= MOST_TOKENS and value == int(value)

"""A request as text: what `generate()` backends read, what `step.prompt` shows, and what `pre_prompt` may rewrite.

Every part of every message stands under a header line of its own, so that a rewritten text can be split back into the
messages it came from.  A line of content that looks like a header is indented by one space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from looplet.errors import ConfigError
from looplet.messages import Message, Part, encode, unsealed
from looplet.parts import is_blob, with_blobs, with_markers

RULE: Final = "═══"
TEXT_REPLY: Final = (
    'Reply with one JSON object and nothing else: {"tool": "<name>", "args": {...}, "reasoning": "<why>"}. '
    'Several calls at once: {"tools": [{"tool": ..., "args": ...}, ...]}.'
)


class Prompt(str):
    """The text of the messages about to be sent; `messages` holds the messages themselves.

    Any string method gives a plain `str`.  Returned from `pre_prompt` with its first and last header lines in place,
    such a string *is* the rewritten request.  `rewrite(fn)` is the way that cannot miss: it maps every text by itself.
    """

    __slots__ = ("messages",)
    messages: Sequence[Message]

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Prompt:
        """Return the prompt that shows `messages`."""
        prompt = cls(render(messages))
        prompt.messages = messages
        return prompt

    def rewrite(self, function: Callable[[str], str]) -> Prompt:
        """Return a prompt in which `function` has mapped the text of every part."""
        rewritten = [
            Message(m.role, tuple(_with_text(p, text, function(text)) for p in m.parts for text in [part_text(p)]))
            for m in self.messages
        ]
        return Prompt.of([old if old == new else new for old, new in zip(self.messages, rewritten, strict=True)])

    def split_back(self, text: str) -> list[Message] | None:
        """Return the messages of a rewritten text, None when it is no rewriting but something to add.

        Raises ConfigError when the text begins and ends like this prompt but lost a header line in between.
        """
        first, last = _blocks(self.messages[:1]), _blocks(self.messages[-1:], len(self.messages) - 1)
        ends = [*first, *last] if first and last else _blocks(self.messages)
        if not ends or not _holds_line(text, ends[0][0]) or not _holds_line(text, ends[-1][0]):
            return None
        texts = _split(text, [header for header, _ in _blocks(self.messages)])
        parts = iter(texts)
        out = []
        for message in self.messages:
            new = tuple(_with_text(part, part_text(part), next(parts)) for part in message.parts)
            out.append(message if new == message.parts else Message(message.role, new))
        return out


class Shown:
    """The text of a conversation as far as it was rendered before: only what was appended since costs anything."""

    __slots__ = ("_count", "_edits", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._count = 0
        self._edits = 0

    def prompt(self, messages: Sequence[Message], *, stable: int, edits: int) -> Prompt:
        """Return `Prompt.of(messages)`.

        The first `stable` messages are those of the last call, and some more, unless `edits` has changed.
        """
        if edits != self._edits or stable < self._count:
            self._text, self._count, self._edits = "", 0, edits
        self._text = _joined(self._text, render(messages[self._count : stable], self._count))
        self._count = stable
        prompt = Prompt(_joined(self._text, render(messages[stable:], stable)))
        prompt.messages = messages
        return prompt


def _joined(text: str, more: str) -> str:
    return f"{text}\n{more}" if text and more else text or more


def render(messages: Iterable[Message], first: int = 0) -> str:
    """Return the messages as text; the first header carries the number `first`."""
    return "\n".join([f"{header}\n{_guard(text)}" for header, text in _blocks(messages, first)])


def render_task(task: dict[str, Any]) -> str:
    """Return the task as the first user message shows it: one `key: value` line for each entry."""
    return "\n".join(
        f"{key}: {value if isinstance(value, str) else encode(value).decode()}" for key, value in task.items()
    )


def reread_task(text: str, task: dict[str, Any]) -> dict[str, Any]:
    """Return the task that a rewritten `render_task` text shows; `{"task": text}` when its keys are gone."""
    marks = [re.search(rf"(?m)^{re.escape(key)}: ", text) for key in task]
    starts = [mark.start() for mark in marks if mark]
    if len(starts) != len(task) or starts != sorted(starts):
        return {"task": text}
    ends = [*starts[1:], len(text) + 1]
    values = [text[mark.end() : end - 1] for mark, end in zip(marks, ends, strict=True) if mark]
    pairs = zip(task.items(), values, strict=True)
    return {key: value if isinstance(old, str) else _parsed(value) for (key, old), value in pairs}


def part_text(part: Part) -> str:
    """Return the text of one message part; structured parts as JSON, images as markers."""
    kind = part["type"]
    if kind in ("text", "reasoning"):
        return str(part["content"])
    if kind == "tool_call_response":
        value = part.get("response")
    elif kind == "tool_call":
        value = part.get("arguments")
    else:
        value = part if is_blob(part) else part.get("arguments", part.get("content", part.get("uri")))
    text = value if isinstance(value, str) else encode(value).decode()
    if isinstance(value, str) or '"blob"' not in text:
        return text
    shown = with_markers(value)
    return shown if isinstance(shown, str) else encode(shown).decode()


def text_protocol(catalog: str) -> Message:
    """Return the message that teaches a plain-text model which tools there are and how to call them."""
    return Message.of_text("user", f"TOOLS\n{catalog}\n\n{TEXT_REPLY}")


def _blocks(messages: Iterable[Message], first: int = 0) -> list[tuple[str, str]]:
    return [
        (f"{RULE} {number} {message.role}{_what(part)} {RULE}", part_text(part))
        for number, message in enumerate(messages, first)
        for part in message.parts
    ]


def _what(part: Part) -> str:
    kind = part["type"]
    if kind == "tool_call":
        return f" calls {part.get('name')} [{part.get('id')}]"
    if kind == "tool_call_response":
        return f" [{part.get('id')}]"
    return " thinks" if kind == "reasoning" else ""


def _guard(text: str) -> str:
    return re.sub(rf"(?m)^( *){RULE}", rf"\1 {RULE}", text) if RULE in text else text


def _unguard(text: str) -> str:
    return re.sub(rf"(?m)^( *) {RULE}", rf"\1{RULE}", text) if RULE in text else text


def _holds_line(text: str, line: str) -> bool:
    return text.startswith(line) or f"\n{line}" in text


def _split(text: str, headers: list[str]) -> list[str]:
    texts = []
    at = text.index(headers[0]) + len(headers[0])
    for header in headers[1:]:
        found = re.compile(rf"\n{re.escape(header)}(?=\n|$)").search(text, at)
        if found is None:
            raise ConfigError(
                f"pre_prompt returned a rewritten prompt without its header line {header!r}; "
                "keep every header line, or return `ctx.rewrite(fn)` on the Prompt it was given"
            )
        texts.append(_unguard(text[at : found.start()].removeprefix("\n")))
        at = found.end()
    texts.append(_unguard(text[at:].removeprefix("\n")))
    return texts


def _with_text(part: Part, old: str, new: str) -> Part:
    if new == old or is_blob(part):
        return part
    kind = part["type"]
    if kind == "tool_call_response":
        response = part.get("response")
        return {**part, "response": new if isinstance(response, str) else with_blobs(_parsed(new), response)}
    if kind == "uri":
        return {**part, "uri": new}
    if kind == "tool_call":
        value = _parsed(new)
        return {**part, "arguments": value if isinstance(value, dict) else {"text": new}}
    rewritten = {**part, "content": new}
    return unsealed(rewritten) if kind == "reasoning" else rewritten


def _parsed(text: str) -> Any:
    import msgspec

    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text

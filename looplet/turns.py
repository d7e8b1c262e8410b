"""The turns of a conversation: what belongs together in it, and what must never be lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from looplet.messages import Conversation, Message, Part
from looplet.tokens import size_of

SUMMARY: Final = "SUMMARY OF THE CONVERSATION SO FAR"
"""the first line of a summary"""


class Answer(NamedTuple):
    """Where a tool result stands, and what it answers."""

    at: int
    """index of its message"""
    part: int
    call_at: int | None
    """index of the message with the call; None for a result without one"""
    call_id: str
    tool: str
    """empty where the call stands in a text (`use_native_tools=False`)"""


def answers(messages: Sequence[Message]) -> Iterator[Answer]:
    """Yield the tool results, oldest first."""
    calls: dict[str, tuple[int, str]] = {}
    for at, message in enumerate(messages):
        for number, part in enumerate(message.parts):
            if part["type"] == "tool_call":
                calls[part["id"]] = at, part["name"]
            elif part["type"] == "tool_call_response":
                call_at, tool = calls.get(part["id"], (None, ""))
                yield Answer(at, number, call_at, part["id"], tool)


def split(conversation: Iterable[Message], keep_recent: int) -> tuple[list[Message], list[Message]]:
    """Return the old messages and those of the last `keep_recent` turns; a turn begins with the model's reply.

    No tool call is parted from its result, and what the user said last is recent.
    """
    messages = list(conversation)
    replies = [at for at, message in enumerate(messages) if message.role == "assistant"]
    if keep_recent > 0:
        cut_at = replies[-keep_recent] if len(replies) >= keep_recent else 0
    else:
        cut_at = max((at + 1 for at, message in enumerate(messages) if message.role != "user"), default=0)
    for answer in reversed(list(answers(messages))):
        if answer.at >= cut_at and answer.call_at is not None:
            cut_at = min(cut_at, answer.call_at)
    return messages[:cut_at], messages[cut_at:]


def damage(before: Sequence[Message], after: Sequence[Message]) -> str:
    """Return why no provider would take what an edit has left, in words; empty where it would."""
    if any(message.role == "user" for message in before) and not any(message.role == "user" for message in after):
        return "left no message of the user"
    if alone := _unpaired(after) - _unpaired(before):
        return f"parted the tool call {min(alone)!r} from its result"
    return ""


def _unpaired(messages: Sequence[Message]) -> set[str]:
    """Return the ids of calls without a result, and of results without a call."""
    called = {part["id"] for message in messages for part in message.parts if part["type"] == "tool_call"}
    paired = {answer.call_id for answer in answers(messages) if answer.call_at is not None}
    alone = {answer.call_id for answer in answers(messages) if answer.call_at is None}
    return (called - paired) | alone


def task_of(conversation: Conversation) -> Message | None:
    """Return the message that says what is to be done: the marked one, else the first of the user."""
    task = conversation.task
    if task is not None and any(message is task for message in conversation):
        return task
    return next((m for m in conversation if m.role == "user" and not is_summary(m)), None)


def summary_message(text: str) -> Message:
    """Return the message that stands for what a summary replaced."""
    return Message.of_text("user", f"{SUMMARY}\n{text}")


def is_summary(message: Message) -> bool:
    """Tell whether a message is a summary that a compaction left."""
    return message.role == "user" and message.text.startswith(SUMMARY)


def with_responses(
    messages: Sequence[Message], change: Callable[[Any], Any], only: Collection[tuple[int, int]] | None = None
) -> list[Message]:
    """Return the messages with their tool results changed where that makes them smaller, the others as they are.

    `only` names those that may change, as pairs of message and part index.
    """
    out = []
    for at, message in enumerate(messages):
        chosen = [
            part["type"] == "tool_call_response" and (only is None or (at, number) in only)
            for number, part in enumerate(message.parts)
        ]
        parts = [_with_response(p, change) if c else p for p, c in zip(message.parts, chosen, strict=True)]
        changed = Message(message.role, tuple(parts))
        out.append(changed if any(chosen) and size_of(changed) < size_of(message) else message)
    return out


def _with_response(part: Part, change: Callable[[Any], Any]) -> Part:
    return {**part, "response": change(part.get("response"))}

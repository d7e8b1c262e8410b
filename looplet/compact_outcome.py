"""What a compaction came to, and what it must not do to a conversation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from looplet.errors import LoopletError
from looplet.messages import Conversation, Message
from looplet.turns import damage


@dataclass(frozen=True, slots=True)
class CompactOutcome:
    """What a compaction came to."""

    reason: str
    """what asked for it: `threshold`, `overflow`, or the name of a hook"""
    messages_before: int
    messages_after: int
    tokens_before: int
    """of the next request, estimated (`Conversation.tokens`)"""
    tokens_after: int
    summary: str = ""
    stages: tuple[str, ...] = ()
    """the services that changed something, in order"""
    warnings: tuple[str, ...] = ()
    """what did not work"""

    @property
    def compacted(self) -> bool:
        """Tell whether the next request is smaller."""
        return self.tokens_after < self.tokens_before

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as a JSON-like dict."""
        told = asdict(self)
        return {**told, "stages": list(self.stages), "warnings": list(self.warnings), "compacted": self.compacted}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A conversation before a service had its way with it."""

    messages: list[Message]
    tokens: int

    @classmethod
    def of(cls, conversation: Conversation) -> Snapshot:
        """Take it."""
        return cls(list(conversation), conversation.tokens)

    def damage(self, conversation: Conversation) -> str:
        """Return what is wrong with an edit, in words; empty where nothing is."""
        if conversation.tokens > self.tokens:
            return "made the conversation longer"
        return damage(self.messages, list(conversation))

    def undo_damage(self, conversation: Conversation) -> None:
        """Take an edit back that left the conversation worse."""
        if any(not isinstance(message, Message) for message in conversation) or self.damage(conversation):
            conversation.restore(self.messages)


def measured(
    told: Any, service: Any, conversation: Conversation, reason: str, before: Snapshot
) -> CompactOutcome | None:
    """Return what a service did, with our own numbers; None when it did nothing.

    Raises LoopletError for an answer that is no outcome, and for an edit after which no provider would go on.
    """
    name = type(service).__name__
    if told is not None and not isinstance(told, CompactOutcome):
        raise LoopletError(f"{name}.compact returned {type(told).__name__}; it may return a CompactOutcome")
    if problem := before.damage(conversation):
        raise LoopletError(f"{name}.compact {problem}")
    messages, tokens = len(conversation), conversation.tokens
    did = (messages, tokens) != (len(before.messages), before.tokens)
    if told is None and not did:
        return None
    stages = told.stages if told is not None and told.stages else (name,) if did else ()
    return CompactOutcome(
        reason,
        len(before.messages),
        messages,
        before.tokens,
        tokens,
        told.summary if told is not None else "",
        stages,
        told.warnings if told is not None else (),
    )


def warned(outcome: CompactOutcome | None, conversation: Conversation, reason: str, words: str) -> CompactOutcome:
    """Return the outcome, that of doing nothing for None, with a warning more."""
    if outcome is None:
        count, tokens = len(conversation), conversation.tokens
        return CompactOutcome(reason, count, count, tokens, tokens, warnings=(words,))
    return replace(outcome, warnings=(*outcome.warnings, words))

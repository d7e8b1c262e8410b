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
        values = asdict(self)
        return {**values, "stages": list(self.stages), "warnings": list(self.warnings), "compacted": self.compacted}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A conversation before a service edits it."""

    messages: list[Message]
    tokens: int

    @classmethod
    def of(cls, conversation: Conversation) -> Snapshot:
        """Return the conversation as it is now."""
        return cls(list(conversation), conversation.tokens)

    def damage(self, conversation: Conversation) -> str:
        """Return what is wrong with an edit, in words; empty where nothing is."""
        if conversation.tokens > self.tokens:
            return "made the conversation longer"
        return damage(self.messages, list(conversation))

    def undo_damage(self, conversation: Conversation) -> None:
        """Undo an edit that left the conversation worse (`damage`)."""
        if any(not isinstance(message, Message) for message in conversation) or self.damage(conversation):
            conversation.restore(self.messages)


def outcome_of(
    returned: Any, service: Any, conversation: Conversation, reason: str, before: Snapshot
) -> CompactOutcome | None:
    """Return what a service did, with sizes measured here; None when it did nothing.

    returned: by the service's `compact`, an outcome or None.  before: the conversation as the service got it.

    Raises LoopletError for an answer that is no outcome, and for an edit after which no provider would go on.
    """
    name = type(service).__name__
    if returned is not None and not isinstance(returned, CompactOutcome):
        raise LoopletError(f"{name}.compact returned {type(returned).__name__}; it may return a CompactOutcome")
    if problem := before.damage(conversation):
        raise LoopletError(f"{name}.compact {problem}")
    messages, tokens = len(conversation), conversation.tokens
    did = (messages, tokens) != (len(before.messages), before.tokens)
    if returned is None and not did:
        return None
    stages = returned.stages if returned is not None and returned.stages else (name,) if did else ()
    return CompactOutcome(
        reason,
        len(before.messages),
        messages,
        before.tokens,
        tokens,
        returned.summary if returned is not None else "",
        stages,
        returned.warnings if returned is not None else (),
    )


def with_warning(outcome: CompactOutcome | None, conversation: Conversation, reason: str, words: str) -> CompactOutcome:
    """Return the outcome with one more warning; for None, an outcome that changed nothing."""
    if outcome is None:
        count, tokens = len(conversation), conversation.tokens
        return CompactOutcome(reason, count, count, tokens, tokens, warnings=(words,))
    return replace(outcome, warnings=(*outcome.warnings, words))

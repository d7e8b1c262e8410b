"""`Outgoing`: how the requests of a run are put together: head, conversation, and what is said once (the briefing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from looplet.message_log import LoggedRequest, MessageLog
from looplet.messages import Conversation, Message
from looplet.prompt import Prompt, Shown, render


@dataclass(slots=True)
class Outgoing:
    """The requests that the loop itself sends, not those of compaction or tools.

    Methods take `rewritten`: the messages that a hook has made of the next request, None when no hook has.
    """

    conversation: Conversation
    log: MessageLog
    """numbers the messages that are sent, in whatever request of the run"""
    head: tuple[Message, ...] = ()
    """the messages that every request begins with: system prompt, memory, text protocol"""
    memory: Message | None = None
    """the message of the head with the texts of the memory sources"""
    task: Message | None = None
    """the message that shows the task"""
    task_position: int | None = None
    """index of `task` in the run's first request; None until then, and when it is not in it"""
    briefing: list[str] = field(default_factory=list)
    """texts for the next request only"""
    briefed: list[str] = field(default_factory=list)
    """the texts that the last request had"""
    count: int = 0
    """how many requests were begun"""
    text: str = ""
    """what was new in the last request, as text, until a step has taken it"""
    _shown: Shown = field(default_factory=Shown)
    """the conversation as text, for hooks that get the `Prompt`"""
    _prefix: int = 0
    """how many leading messages the next request shares with the last one, if the conversation was only appended to"""
    _edits: int = 0
    """`conversation.edits` when the last request was numbered"""

    def begin_with(self, head: tuple[Message, ...], memory: Message | None) -> None:
        """Let the next request begin with another head."""
        self.head, self.memory = head, memory
        self._edits = -1
        self._shown = Shown()

    def request(self, rewritten: Sequence[Message] | None) -> Sequence[Message]:
        """Return the messages of the next request, with what hooks have added so far."""
        added = (Message.of_text("user", "\n\n".join(dict.fromkeys(self.briefing))),) if self.briefing else ()
        return self.conversation.view(self.head, added) if rewritten is None else [*rewritten, *added]

    def prompt(self, rewritten: Sequence[Message] | None) -> Prompt:
        """Return the next request as text; of the run's first one, note where the task is before a hook rewrites it."""
        request = self.request(rewritten)
        if rewritten is not None:
            return Prompt.of(request)
        if not self.count:
            self.task_position = next((at for at, message in enumerate(request) if message is self.task), None)
        return self._shown.prompt(request, stable=self._stable, edits=self.conversation.edits)

    def new_text(self, rewritten: Sequence[Message] | None, *, whole: bool) -> str:
        """Return as text what the next request has more than the last one; all of it with `whole`."""
        first = self._prefix if not whole and self._edits == self.conversation.edits else 0
        return render(self.request(rewritten)[first:], first)

    def take_briefing(self) -> None:
        """Note that the next request has the briefing."""
        self.briefed += self.briefing
        self.briefing = []

    def take_text(self) -> str:
        """Return the text of what was new in the last request, once."""
        text, self.text = self.text, ""
        return text

    def number(self, messages: Sequence[Message], *, is_rewritten: bool) -> LoggedRequest:
        """Number the messages of a request that is about to be sent."""
        if is_rewritten:
            logged = self.log.request(messages)
        else:
            stable, edits = self._stable, self.conversation.edits
            unchanged = self._prefix if self._edits == edits else 0
            self._prefix, self._edits = stable, edits
            logged = self.log.request(messages, unchanged=unchanged, stable=stable)
        self.text = render(logged.new, logged.first)
        return logged

    @property
    def _stable(self) -> int:
        """Return how many leading messages the next request is likely to begin with, too."""
        return len(self.head) + len(self.conversation)

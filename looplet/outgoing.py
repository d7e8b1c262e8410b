"""`Outgoing`: the requests of a run.

What each begins with, what is said in the next one only, and what of it has been sent before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from looplet.message_log import LoggedRequest, MessageLog
from looplet.messages import Conversation, Message
from looplet.prompt import Prompt, Shown, render


@dataclass(slots=True)
class Outgoing:
    """The requests in which the loop itself asks.  `rewritten`: what a hook has made of the one at hand, if any has."""

    conversation: Conversation
    log: MessageLog
    """numbers the messages that are sent, in whatever request of the run"""
    head: tuple[Message, ...] = ()
    """the messages that every request begins with: system prompt, memory, text protocol"""
    memory: Message | None = None
    """the one of them that tells what the memory sources said"""
    task: Message | None = None
    """the message that shows the task"""
    task_position: int | None = None
    """of that message in the first request, None while there is none"""
    briefing: list[str] = field(default_factory=list)
    """texts for the next request only"""
    briefed: list[str] = field(default_factory=list)
    """those that the last request had"""
    count: int = 0
    """how many requests were begun"""
    text: str = ""
    """of what was new in the last request, until a step has taken it"""
    _shown: Shown = field(default_factory=Shown)
    """the conversation as text, for hooks that get the `Prompt`"""
    _prefix: int = 0
    """how many leading messages the next request shares with the last one, if the conversation was only appended to"""
    _edits: int = 0
    """of the conversation, when the last request was numbered"""

    def begin_with(self, head: tuple[Message, ...], memory: Message | None) -> None:
        """Have the next request begin otherwise than the last one did."""
        self.head, self.memory = head, memory
        self._edits = -1
        self._shown = Shown()

    def request(self, rewritten: Sequence[Message] | None) -> Sequence[Message]:
        """Return the messages about to be sent, what hooks added so far included."""
        added = (Message.of_text("user", "\n\n".join(dict.fromkeys(self.briefing))),) if self.briefing else ()
        return self.conversation.view(self.head, added) if rewritten is None else [*rewritten, *added]

    def prompt(self, rewritten: Sequence[Message] | None) -> Prompt:
        """Return the request at hand as text; note where the task is in the first one, before it is rewritten."""
        request = self.request(rewritten)
        if rewritten is not None:
            return Prompt.of(request)
        if not self.count:
            self.task_position = next((at for at, message in enumerate(request) if message is self.task), None)
        return self._shown.prompt(request, stable=self._stable, edits=self.conversation.edits)

    def new_text(self, rewritten: Sequence[Message] | None, *, whole: bool) -> str:
        """Return the text of what the request at hand has more than the last one, or of all of it."""
        first = self._prefix if not whole and self._edits == self.conversation.edits else 0
        return render(self.request(rewritten)[first:], first)

    def take_briefing(self) -> None:
        """Note that the request at hand says what hooks have said so far."""
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

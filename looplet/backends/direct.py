"""Asking a wrapped backend outside of a run: `router.chat(...)`, as if it were one backend.

Inside of a run the loop asks the candidates by itself and the methods here are not used.  The rules are the same:
`attempts` for each candidate, the next one where the error lets it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Final

from opentelemetry.context import get_current

from looplet.backends.attempts import RETRY, attempts
from looplet.backends.bill import Bill
from looplet.backends.candidates import (
    AGENT,
    METHODS,
    Candidate,
    Retry,
    candidates,
    gives_way,
    is_async,
    kind_of,
    name_of,
)
from looplet.errors import BackendError, words_of
from looplet.executors import AsyncExecutor, SyncExecutor, refuse_async
from looplet.messages import Message
from looplet.plan import INLINE, SERIAL, Call, Effects, Wait, finish
from looplet.tokens import BYTES_PER_TOKEN, size_of_all
from looplet.types import Delta, Reply

STREAM: Final = "stream"
_END: Final = object()


class Wrapper:
    """A backend around others.  It can do what the one called `inner` can, and its attributes are that one's."""

    inner: Any
    asks_as: str = AGENT
    """the purpose of a call by hand"""

    def looplet_candidates(self, purpose: str) -> tuple[Candidate, ...]:
        """Return the backends that may answer, under this wrapper's rules."""
        raise NotImplementedError

    def looplet_parts(self) -> tuple[Any, ...]:
        """Return the backends inside."""
        return (self.inner,)

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # copying and pickling ask for these before there is an `inner`
            raise AttributeError(name)
        is_text = name == "generate" and not hasattr(self.inner, name) and hasattr(self.inner, "chat")
        value = getattr(self.inner, "chat" if is_text else name)  # `_Question` has texts asked by `chat`
        if name in METHODS or name == STREAM:
            return _asking(self, name, value)
        return value


class Purposed(Wrapper):
    """A wrapped backend, asked for one purpose whatever the caller says."""

    def __init__(self, inner: Any, purpose: str) -> None:
        self.inner = inner
        self.asks_as = purpose

    def looplet_candidates(self, purpose: str) -> tuple[Candidate, ...]:
        """Return the backends that may answer for the purpose."""
        return candidates(self.inner, self.asks_as)


def for_purpose(llm: Any, purpose: str) -> Any:
    """Return the backend as one that a router knows by this purpose; one that routes nothing as it is."""
    return Purposed(llm, purpose) if getattr(type(llm), "looplet_candidates", None) is not None else llm


def _asking(llm: Wrapper, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the signature of `method`, sync or async like it, that asks the candidates of `llm`."""

    @wraps(method)
    def ask(*args: Any, **settings: Any) -> Any:
        return finish(_asked(llm, _Question(name, args, settings, SERIAL), _called), SyncExecutor().perform)

    @wraps(method)
    async def ask_async(*args: Any, **settings: Any) -> Any:
        return await AsyncExecutor().finish(_asked(llm, _Question(name, args, settings, INLINE), _called))

    @wraps(method)
    def stream(*args: Any, **settings: Any) -> Iterator[Delta | Reply]:
        return _stream(_Streaming(llm, _Question(name, args, settings, SERIAL)))

    @wraps(method)
    def stream_async(*args: Any, **settings: Any) -> AsyncIterator[Delta | Reply]:
        return _stream_async(_Streaming(llm, _Question(name, args, settings, INLINE)))

    if is_async(llm.inner):
        return stream_async if name == STREAM else ask_async
    return stream if name == STREAM else ask


@dataclass(frozen=True, slots=True)
class _Question:
    """A call of one of a backend's methods."""

    name: str
    args: tuple[Any, ...]
    settings: Mapping[str, Any]
    lane: str

    def can_ask(self, candidate: Candidate) -> bool:
        """Tell whether the candidate has the method."""
        return hasattr(candidate.llm, self.name) or (self.name == "generate" and hasattr(candidate.llm, "chat"))

    def of(self, llm: Any) -> Callable[[], Any]:
        """Return the call; a text is asked for by `chat` where there is one, which reports usage."""
        if self.name == "generate" and hasattr(llm, "chat"):
            return partial(_generate_by_chat, llm.chat, *self.args, **self.settings)
        return partial(getattr(llm, self.name), *self.args, **self.settings)

    def tokens(self, candidate: Candidate) -> int:
        """Return about how many tokens the question has, if anybody limits them."""
        if not candidate.limits:
            return 0
        said = self.args[0] if self.args else self.settings.get("messages", self.settings.get("prompt", ""))
        return (len(said) if isinstance(said, str) else size_of_all(said)) // BYTES_PER_TOKEN

    def answer(self, value: Any) -> Any:
        """Return what the caller expects."""
        return value.text if self.name == "generate" and isinstance(value, Reply) else value


def _generate_by_chat(chat: Callable[..., Any], prompt: str, **settings: Any) -> Any:
    return chat([Message.of_text("user", prompt)], **settings)


def _asked(
    llm: Wrapper,
    question: _Question,
    attempt: Callable[[_Question, Any], Effects[Any]],
    is_begun: Callable[[], bool] = lambda: False,
) -> Effects[Any]:
    """Ask one candidate after the other; once the answer `is_begun`, nothing is tried again."""
    able = [candidate for candidate in candidates(llm, llm.asks_as) if question.can_ask(candidate)]
    before: list[str] = []
    for candidate in able:
        ruled = replace(candidate, retry=candidate.retry and _UntilBegun(candidate.retry, is_begun))
        ask = partial(attempt, question, candidate.llm)
        bill = Bill(candidate, llm.asks_as, str(getattr(candidate.llm, "model", "") or ""))
        try:
            value = yield from attempts(ruled, ask, _wait, partial(_hear, bill), tokens=question.tokens(candidate))
        except Exception as error:
            spent = bill.total(bill.priced(getattr(error, "usage", None)))
            if spent is not None:
                bill.meter(spent)
            if candidate is able[-1] or is_begun() or not gives_way(error):
                for words in before:
                    error.add_note(words)
                raise
            before.append(f"asked before: {name_of(candidate.llm)}: {kind_of(error)}: {words_of(error)}")
        else:
            reply = value if isinstance(value, Reply) else Reply()
            if candidate.meters:
                bill.meter(bill.total(bill.priced(reply.usage, reply.model)))
            return question.answer(value)
    raise AttributeError(f"no backend here has the method {question.name}")


@dataclass(frozen=True, slots=True)
class _UntilBegun:
    """Retry rules that end when the answer has begun."""

    rules: Retry
    is_begun: Callable[[], bool]

    @property
    def timeout_s(self) -> float | None:
        return self.rules.timeout_s

    @property
    def deadline_s(self) -> float | None:
        return self.rules.deadline_s

    def delay_s(self, attempt: int, error: Exception, elapsed_s: float) -> float | None:
        return None if self.is_begun() else self.rules.delay_s(attempt, error, elapsed_s)


def _called(question: _Question, llm: Any) -> Effects[Any]:
    call = question.of(llm)
    if question.lane == INLINE:
        return (yield Call(call, get_current()))
    return (yield Call(lambda: refuse_async(call()), get_current(), question.lane))


def _hear(bill: Bill, what: str, facts: Mapping[str, Any]) -> None:
    if what == RETRY:
        bill.add_failed(facts["usage"])


def _wait(seconds: float) -> Effects[None]:
    yield Wait(seconds)


# --- streams --------------------------------------------------------------------------------------------------------


class _Streaming:
    """A streamed answer.  Once a piece of it was handed out nothing is tried again: the caller has seen it."""

    def __init__(self, llm: Any, question: _Question) -> None:
        self.plan = self._items(llm, question)
        """yields effects, and what is for the caller: deltas, the reply"""
        self.opened: Any = None
        """the backend's own stream"""
        self._is_begun = False

    def _items(self, llm: Any, question: _Question) -> Generator[Any, Any, None]:
        yield (yield from _asked(llm, question, self._attempt, lambda: self._is_begun))

    def _attempt(self, question: _Question, llm: Any) -> Generator[Any, Any, Reply]:
        context, lane = get_current(), question.lane
        try:
            self.opened = yield Call(question.of(llm), context, lane)
            take = partial(anext if lane == INLINE else next, self.opened, _END)
            while (item := (yield Call(take, context, lane))) is not _END:
                if isinstance(item, Reply):
                    return item
                self._is_begun = True
                yield item
        except Exception:
            opened, self.opened = self.opened, None
            with suppress(Exception):  # one that timed out is still at work in its thread, and ends there
                yield Call(partial(_close, opened), context)
            raise
        raise BackendError("the stream ended without a reply; try again", kind="stream_cut", retryable=True)


def _stream(streaming: _Streaming) -> Iterator[Delta | Reply]:
    perform, plan = SyncExecutor().perform, streaming.plan
    resume: Callable[[Any], Any] = plan.send
    value: Any = None
    try:
        while True:
            item = resume(value)
            value, resume = None, plan.send
            if isinstance(item, Delta | Reply):
                yield item
                continue
            try:
                value = perform(item)
            except BaseException as error:  # noqa: BLE001 - relayed into the plan, which re-raises
                value, resume = error, plan.throw
    except StopIteration:
        return
    finally:
        plan.close()
        _close(streaming.opened)


async def _stream_async(streaming: _Streaming) -> AsyncIterator[Delta | Reply]:
    perform, plan = AsyncExecutor().perform, streaming.plan
    resume: Callable[[Any], Any] = plan.send
    value: Any = None
    try:
        while True:
            item = resume(value)
            value, resume = None, plan.send
            if isinstance(item, Delta | Reply):
                yield item
                continue
            try:
                value = await perform(item)
            except BaseException as error:  # noqa: BLE001 - relayed into the plan, which re-raises
                value, resume = error, plan.throw
    except StopIteration:
        return
    finally:
        plan.close()
        if (closing := _close(streaming.opened)) is not None:
            await closing


def _close(stream: Any) -> Any:
    """Give back what a stream holds; returns something to await for an async one."""
    close = getattr(stream, "aclose", None) or getattr(stream, "close", None)
    return close() if close is not None else None

"""One model call of a run: who is asked and how often, what it cost, and how the trace tells it.

The loop, compaction, tools and judges all ask through `ask`.  A call is one `chat` span for each backend that was
asked: retries are events on it, another backend is another span.  Usage and cost stand there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from opentelemetry.trace import SpanKind

from looplet.backends.adapter import Model
from looplet.backends.attempts import attempts
from looplet.backends.bill import Bill
from looplet.backends.candidates import Candidate, gives_way, kind_of
from looplet.cancel import CancelToken
from looplet.errors import BackendError, BudgetExhausted, LoopletError
from looplet.message_log import LoggedRequest
from looplet.messages import Message
from looplet.models import AGENT, Option
from looplet.plan import Call, CallCancelled, Effects, Wait
from looplet.scope import RunScope
from looplet.streaming import ChatEndEvent, ChatRetryEvent, ChatStartEvent, DeltaGate, StreamEvent
from looplet.telemetry import attributes, semconv
from looplet.telemetry.spans import Phase
from looplet.tokens import BYTES_PER_TOKEN, size_of_all
from looplet.tools import BaseToolRegistry
from looplet.types import Delta, Reply, Usage

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask a model, and for whom."""

    messages: Sequence[Message]
    log: Callable[[], LoggedRequest]
    """numbers the messages, when they are about to be sent"""
    purpose: str = AGENT
    tools: BaseToolRegistry | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """keyword arguments that beat the run's"""
    token: CancelToken | None = None
    """the token of the tool or hook that asks, None for the loop; cancelled when nobody waits for the answer"""

    def check_cancelled(self, run: RunScope) -> None:
        """Raise Closing when the run was cancelled, ToolError (`cancelled`) when nobody waits for the answer."""
        run.check_cancelled()
        if self.token is not None:
            self.token.raise_if_cancelled()


def ask(
    run: RunScope,
    above: Phase,
    request: Request,
    read: Callable[[Phase, Reply], tuple[Reply, T]],
    begun: Callable[[Phase], None] | None = None,
) -> Effects[T]:
    """Return what `read` makes of the reply, inside the call's span; `read` also says what is recorded of the reply.

    `begun` is called with each span, when it begins.

    Raises what the last backend raised, BudgetExhausted, and what `Request.check_cancelled` raises.
    """
    request.check_cancelled(run)
    logged: LoggedRequest | None = None
    *others, last = run.models.of(request.purpose)
    for option in others:
        logged = _allowed(run, request, logged)
        try:
            return (yield from _ask_one(run, above, request, logged, option, read, begun))
        except Exception as error:
            if not gives_way(error):
                raise
            facts = {semconv.ERROR_TYPE: kind_of(error), semconv.REQUEST_MODEL: option.model.name}
            above.event(semconv.EVENT_FALLBACK, facts)
    logged = _allowed(run, request, logged)
    return (yield from _ask_one(run, above, request, logged, last, read, begun))


def _allowed(run: RunScope, request: Request, logged: LoggedRequest | None) -> LoggedRequest:
    """Take a model call out of the budget; log the request with the first, so that what is never sent has no number."""
    if (spent := run.guard.take_model_call()) is not None:
        raise BudgetExhausted(spent)
    return request.log() if logged is None else logged


def _ask_one(
    run: RunScope,
    above: Phase,
    request: Request,
    logged: LoggedRequest,
    option: Option,
    read: Callable[[Phase, Reply], tuple[Reply, T]],
    begun: Callable[[Phase], None] | None,
) -> Effects[T]:
    model = option.model
    call = _Call(run, request, option.candidate, model)
    facts = _identity(run, request, model) | attributes.of_request(logged) if run.trace.recording else None
    with above.phase(semconv.CHAT, model.name, SpanKind.CLIENT, facts) as phase:
        if begun is not None:
            begun(phase)
        phase.note(model=model.name, provider=model.provider, purpose=request.purpose)
        reply: Reply | None = None
        try:
            call.emit(ChatStartEvent, model=model.name)
            reply = yield from call.perform(phase)
            recorded, result = read(phase, reply)
        except BaseException as error:
            if isinstance(error, Exception):
                phase.fail_with(error, kind_of(error))
            call.end(phase, None, call.charged(error) if reply is None else reply.usage, error)
            raise
        call.end(phase, recorded, reply.usage)
    run.trace.durable()
    return result


class _Call:
    """One `chat` span in the making."""

    __slots__ = ("_bill", "_candidate", "_first_chunk_s", "_gate", "_model", "_request", "_run")

    def __init__(self, run: RunScope, request: Request, candidate: Candidate, model: Model) -> None:
        self._run = run
        self._request = request
        self._candidate = candidate
        self._model = model
        self._bill = Bill(candidate, run.models.routed(request.purpose), model.name)
        self._first_chunk_s: float | None = None
        self._gate: DeltaGate | None = None

    def perform(self, phase: Phase) -> Effects[Reply]:
        """Ask, as often as the rules allow."""
        streams = bool(self._run.stream) and self._model.streams and self._request.purpose == AGENT
        attempt = self._streamed if streams else self._asked
        notify = partial(self._record_delay, phase)
        raw = yield from attempts(self._candidate, partial(attempt, phase), self._wait, notify, tokens=self._size())
        return self._model.reply(raw, self._run.boundary, self._request.tools.tool_names if self._request.tools else ())

    def _size(self) -> int:
        """Return about how many tokens the request has, for limits on tokens."""
        return size_of_all(self._request.messages) // BYTES_PER_TOKEN if self._candidate.limits else 0

    def charged(self, error: BaseException) -> Usage | None:
        """Return what the provider charges for an attempt that failed."""
        return self._bill.priced(getattr(error, "usage", None))

    def emit(self, event: type[StreamEvent], **facts: Any) -> None:
        """Make an event for the run's stream; `purpose` says whether the agent asks, or compaction, a tool, ..."""
        if self._run.stream.emitters:
            self._run.emit(event, purpose=self._request.purpose, **facts)

    def end(
        self, phase: Phase, recorded: Reply | None, usage: Usage | None, error: BaseException | None = None
    ) -> None:
        """Count what the call used, and say so on its span."""
        spent = self._bill.total(usage)
        counts = error is None or spent is not None
        facts: dict[str, Any] = attributes.of_reply(recorded) if recorded is not None and phase.recording else {}
        if self._first_chunk_s is not None:
            facts[semconv.TIME_TO_FIRST_CHUNK] = self._first_chunk_s
        phase.note(reply=recorded, usage=spent)
        if counts:  # in the ledger and on the span, one right after the other: a Ctrl-C may come between
            facts |= attributes.of_usage(spent)
            self._run.count_usage(spent)
        phase.put(facts)
        if counts:
            self._bill.meter(spent)
        self.emit(
            ChatEndEvent,
            model=self._model.name,
            usage=spent,
            finish_reason=recorded.finish_reason if recorded is not None else "",
            error_type=kind_of(error) if error is not None else None,
        )

    def _asked(self, phase: Phase) -> Effects[Any]:
        request = self._request
        call = self._model.request(request.messages, request.tools, request.settings)
        return (yield from self._wait_for(phase, call))

    def _wait_for(self, phase: Phase, call: Callable[[], Any]) -> Effects[Any]:
        """Make a call of the backend; when nobody waits for the answer any more, leave it to itself."""
        self._request.check_cancelled(self._run)  # whoever heard of the call's beginning may have cancelled
        try:
            token = self._request.token or self._run.cancel_token
            return (yield Call(call, phase.context, self._model.lane, token=token))
        except CallCancelled:
            self._request.check_cancelled(self._run)
            raise

    def _streamed(self, phase: Phase) -> Effects[Any]:
        request = self._request
        gate = self._gate = DeltaGate(self._run.boundary, self._emit_delta)
        phase.put({semconv.REQUEST_STREAM: True})
        began = phase.elapsed_s()
        opened = self._model.stream(request.messages, request.tools, request.settings)
        items = iterator_of((yield from self._wait_for(phase, opened)))
        try:
            item = yield from self._taken(phase, items, gate, began)
        except GeneratorExit:
            raise
        except BaseException:
            yield from self._close(phase, items)
            raise
        yield from self._close(phase, items)
        return item

    def _taken(self, phase: Phase, items: Any, gate: DeltaGate, began: float) -> Effects[Any]:
        """Hand on the deltas, return the reply.  A function of its own for the reason of `loop.take_turns`: Ctrl-C."""
        while not isinstance(item := (yield from self._wait_for(phase, partial(next_of, items))), Reply):
            if item is END:
                raise BackendError("the stream ended without a reply", kind="stream_cut", retryable=True)
            _require_delta(item)
            if self._first_chunk_s is None:
                self._first_chunk_s = phase.elapsed_s() - began
            gate.take(item)
            self._request.check_cancelled(self._run)
        gate.finish()
        return item

    def _close(self, phase: Phase, items: Any) -> Effects[None]:
        """Give back what a stream holds: the answer is here, or nobody wants it."""
        with suppress(Exception):  # one that timed out is still at work in its thread, and ends there
            yield from phase.call(partial(close, items), self._model.lane)

    def _emit_delta(self, event: type[StreamEvent], **facts: Any) -> None:
        self._run.emit(event, **facts)

    def _wait(self, seconds: float) -> Effects[None]:
        yield Wait(seconds, self._request.token or self._run.cancel_token)
        self._request.check_cancelled(self._run)

    def _record_delay(self, phase: Phase, what: str, facts: Mapping[str, Any]) -> None:
        """Record a retry, or a wait for a rate limit."""
        if what != "retry":
            values = {semconv.RATE_LIMIT_WAIT: float(facts["seconds"]), semconv.RATE_LIMIT_NAME: facts["limit"]}
            phase.event(semconv.EVENT_RATE_LIMITED, values)
            return
        usage = self._bill.add_failed(facts["usage"])
        values = {
            semconv.ATTEMPT: facts["attempt"],
            semconv.ERROR_TYPE: facts["error_type"],
            semconv.RETRY_DELAY: facts["delay_s"],
        }
        phase.event(semconv.EVENT_RETRY, values | (attributes.of_usage(usage) if usage is not None else {}))
        self._run.emit(ChatRetryEvent, **{name: facts[name] for name in ("attempt", "error_type", "delay_s")})


DELTAS: Final = ("text", "reasoning", "tool_call")
"""the kinds of what a stream yields before the reply"""
END: Final = object()
"""what `next_of` returns after the last item"""


def _require_delta(item: Any) -> None:
    """Raise LoopletError for what a backend's stream must not yield."""
    if not isinstance(item, Delta):
        found = f"a {type(item).__name__}"
    elif item.kind not in DELTAS:
        found = f"a Delta of the kind {item.kind!r:.40}"
    else:
        return
    raise LoopletError(f"the backend's stream() yielded {found}; it yields Deltas ({', '.join(DELTAS)}), then a Reply")


def iterator_of(stream: Any) -> Any:
    """Return the iterator, or async iterator, over a stream."""
    return stream if hasattr(stream, "__next__") or hasattr(stream, "__anext__") else iter(stream)


def next_of(items: Any) -> Any:
    """Return the next item or `END`; something to await for an async iterator."""
    return anext(items, END) if hasattr(items, "__anext__") else next(items, END)


def close(items: Any) -> Any:
    """Give back what a stream holds; something to await for an async iterator."""
    end = getattr(items, "aclose", None) or getattr(items, "close", None)
    return end() if callable(end) else None


def _identity(run: RunScope, request: Request, model: Model) -> dict[str, Any]:
    identity: dict[str, Any] = {
        semconv.OPERATION_NAME: semconv.CHAT,
        semconv.PROVIDER_NAME: model.provider,
        semconv.PROTOCOL: model.protocol,
    }
    if model.name:
        identity[semconv.REQUEST_MODEL] = model.name
    if request.purpose != AGENT:
        identity[semconv.CHAT_PURPOSE] = request.purpose
    max_tokens = request.settings.get("max_tokens") or run.config.max_tokens
    if max_tokens is not None:
        identity[semconv.REQUEST_MAX_TOKENS] = max_tokens
    temperature = request.settings.get("temperature", run.config.temperature)
    if temperature is not None:
        identity[semconv.REQUEST_TEMPERATURE] = float(temperature)
    if model.server_address:
        identity[semconv.SERVER_ADDRESS] = str(model.server_address)
        if model.server_port:
            identity[semconv.SERVER_PORT] = int(model.server_port)
    return identity

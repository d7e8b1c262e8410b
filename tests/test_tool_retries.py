"""Retries: a tool that was declared to bear it is asked again, within one span, one result and one step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import both

from looplet import CancelToken, ConfigError, ErrorKind, LoopConfig, ToolError, ToolSpec, tool, tools_from
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend
from looplet.toolerrors import MAX_ASKED_DELAY_S, MAX_DELAY_S, retry_delay_s

DONE = ("done", {"answer": "ok"})
AT_ONCE = {"retry_after_s": 0}


def network(words: str = "lost") -> ToolError:
    return ToolError(words, kind=ErrorKind.NETWORK, retriable=True, context=AT_ONCE)


class Flaky:
    """A tool function that does what its script says, one entry for each attempt: raises errors, returns the rest."""

    def __init__(self, *script: Any) -> None:
        self.script = script
        self.attempts = 0

    def __call__(self, ctx) -> Any:
        self.attempts += 1
        said = self.script[min(self.attempts, len(self.script)) - 1]
        ctx.warn(f"attempt {self.attempts}")
        if isinstance(said, BaseException):
            raise said
        return said


def making(*script: Any, config: Any = None, **settings: Any) -> Callable[..., Any]:
    """Return a `make` for `both`: one call of a flaky tool, then done."""

    def make(*, is_async: bool) -> dict[str, Any]:
        flaky = Flaky(*script)

        async def later(ctx) -> Any:
            return flaky(ctx)

        spec = ToolSpec("flaky", "Try.", None, later if is_async else flaky, **settings)
        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("flaky", {}), DONE])
        tools = tools_from([spec], include_done=True)
        return {"llm": backend, "task": {}, "tools": tools, "config": config}

    return make


def retries_of(outcome) -> list[tuple[Any, ...]]:
    """Return what the retry events of the one call say."""
    (span,) = outcome.trace.find("execute_tool flaky")
    keys = (semconv.ATTEMPT, semconv.ERROR_TYPE, semconv.RETRY_DELAY)
    return [tuple(e.attributes[key] for key in keys) for e in span.events if e.name == semconv.EVENT_TOOL_RETRY]


def test_a_call_is_made_again_until_it_works():
    outcome = both(making(network(), ConnectionResetError("again"), "found", retries=3))
    step = outcome.steps[0]
    assert (step.tool_result.data, step.tool_result.error) == ("found", None)
    assert step.tool_result.warnings == ("attempt 3",)
    assert retries_of(outcome) == [(1, "network", 0.0), (2, "network", 0.2)]
    assert [step.tool_call.tool for step in outcome.steps] == ["flaky", "done"]
    (span,) = outcome.trace.find("execute_tool flaky")
    assert span.record.status_code == 0


def test_the_last_error_counts_when_no_attempt_works():
    outcome = both(making(network("one"), network("two"), network("three"), network("four"), retries=2))
    result = outcome.steps[0].tool_result
    assert (result.error, result.error_kind) == ("three", ErrorKind.NETWORK)
    assert retries_of(outcome) == [(1, "network", 0.0), (2, "network", 0.0)]
    (span,) = outcome.trace.find("execute_tool flaky")
    assert span.attributes[semconv.ERROR_TYPE] == "network"


@pytest.mark.parametrize(
    "error",
    [
        ToolError("bad words", kind=ErrorKind.VALIDATION, retriable=True, context=AT_ONCE),
        ToolError("not you", kind=ErrorKind.PERMISSION_DENIED, retriable=True, context=AT_ONCE),
        ToolError("stop", kind=ErrorKind.CANCELLED, retriable=True, context=AT_ONCE),
        ToolError("later", kind=ErrorKind.RATE_LIMIT, retriable=True, context={"retry_after_s": MAX_ASKED_DELAY_S + 1}),
        RuntimeError("kaput"),
        ValueError("no number"),
        TimeoutError("the effect is unknown"),
    ],
    ids=lambda error: str(error),
)
def test_what_must_not_or_cannot_be_mended_by_repeating_is_not_repeated(error):
    outcome = both(making(error, "never", retries=3))
    assert outcome.steps[0].tool_result.error is not None
    assert retries_of(outcome) == []


def test_nothing_is_repeated_unless_it_was_declared():
    outcome = both(making(network(), "never"))
    assert outcome.steps[0].tool_result.error == "lost"
    assert retries_of(outcome) == []


def test_what_the_model_is_told_and_what_an_idempotent_tool_bears():
    outcome = both(making(TimeoutError("slow"), "found", retries=1, idempotent=True))
    assert outcome.steps[0].tool_result.data == "found"
    assert retries_of(outcome) == [(1, "timeout", 0.05)]


@pytest.mark.parametrize(("idempotent", "made"), [(False, 1), (True, 2)])
def test_an_abandoned_attempt_is_repeated_only_if_that_does_no_harm(idempotent, made):
    reasons: list[str] = []
    back = threading.Semaphore(0)

    def make(*, is_async: bool) -> dict[str, Any]:
        @tool(timeout_s=0.02, retries=1, idempotent=idempotent)
        def flaky(ctx) -> None:
            """Work until told to stop."""
            ctx.cancel_token.wait()
            reasons.append(ctx.cancel_token.reason)
            back.release()

        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("flaky", {}), DONE])
        return {"llm": backend, "task": {}, "tools": tools_from([flaky], include_done=True)}

    outcome = both(make)
    for _ in range(2 * made):
        assert back.acquire(timeout=5)
    assert reasons == ["timeout"] * 2 * made  # each attempt has a token of its own
    assert outcome.steps[0].tool_result.error_kind == ErrorKind.TIMEOUT
    assert len(retries_of(outcome)) == made - 1
    (span,) = outcome.trace.find("execute_tool flaky")
    assert span.attributes[semconv.TOOL_ABANDONED] is True


def test_a_call_that_worked_in_the_end_was_not_abandoned():
    def make(*, is_async: bool) -> dict[str, Any]:
        slow = iter([True, False])

        @tool(timeout_s=0.02, retries=1, idempotent=True)
        def flaky(ctx) -> str:
            """Be slow, once."""
            if next(slow):
                ctx.cancel_token.wait()
            return "found"

        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("flaky", {}), DONE])
        return {"llm": backend, "task": {}, "tools": tools_from([flaky], include_done=True)}

    outcome = both(make)
    assert outcome.steps[0].tool_result.data == "found"
    (span,) = outcome.trace.find("execute_tool flaky")
    assert span.attributes[semconv.TOOL_ABANDONED] is False


def test_a_cancelled_token_ends_the_waiting_and_the_repeating():
    made: list[Any] = []

    def make(*, is_async: bool) -> dict[str, Any]:
        token = CancelToken()

        @tool(retries=5)
        def flaky() -> None:
            """Fail, and have somebody cancel the run during the wait."""
            made.append(1)
            threading.Timer(0.01, token.cancel).start()
            raise ToolError("full", kind=ErrorKind.RATE_LIMIT, retriable=True, context={"retry_after_s": 30})

        backend = (AsyncScriptedBackend if is_async else ScriptedBackend)([("flaky", {}), DONE])
        tools = tools_from([flaky], include_done=True)
        return {"llm": backend, "task": {}, "tools": tools, "config": LoopConfig(cancel_token=token)}

    began = time.monotonic()
    outcome = both(make)
    assert time.monotonic() - began < 25  # nobody sat through the half minute that the tool asked for
    assert made == [1, 1]  # once in each run
    assert outcome.stop_reason == "cancelled"
    assert [step.tool_result.error for step in outcome.live.steps] == ["full"]


def test_a_retry_event_tells_no_secret():
    config = LoopConfig(redact=lambda text: text.replace("hunter2", "[secret]"))
    outcome = both(making(network("hunter2 refused"), "ok", retries=1, config=config))
    (span,) = outcome.trace.find("execute_tool flaky")
    (event,) = [e for e in span.events if e.name == semconv.EVENT_TOOL_RETRY]
    assert event.attributes[semconv.EXCEPTION_MESSAGE] == "[secret] refused"


def test_the_delays_grow_to_a_limit_and_heed_what_the_tool_says():
    plain = ToolError("lost", kind=ErrorKind.NETWORK, retriable=True)
    delays = [retry_delay_s(plain, attempt, idempotent=False) for attempt in (1, 2, 3, 4, 5, 1000)]
    assert delays == pytest.approx([0.05, 0.2, 0.8, 3.2, MAX_DELAY_S, MAX_DELAY_S])
    asked = ToolError("full", kind=ErrorKind.RATE_LIMIT, retriable=True, context={"retry_after_s": 7})
    assert retry_delay_s(asked, 1, idempotent=False) == 7.0
    nonsense = ToolError("full", kind=ErrorKind.RATE_LIMIT, retriable=True, context={"retry_after_s": "soon"})
    assert retry_delay_s(nonsense, 1, idempotent=False) == 0.05


@pytest.mark.parametrize("retries", [-1, 1.5, True, "2"])
def test_a_number_of_retries_that_cannot_be_is_refused(retries):
    with pytest.raises(ConfigError, match="tool 'x': retries must be a whole number from 0"):
        ToolSpec("x", "", {}, lambda: 1, retries=retries)


def test_the_decorator_takes_both_settings():
    @tool(retries=2, idempotent=True)
    def fetch(url: str) -> str:
        """Fetch."""
        return url

    assert (fetch.retries, fetch.idempotent) == (2, True)

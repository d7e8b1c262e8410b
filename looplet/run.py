"""`composable_loop` and its async twin: one plan, two drivers.

    for step in composable_loop(llm=..., tools=..., task={...}):
        print(step.pretty())

A run ends when its plan does.  It can also be left: `break`, `close()`, an exception in a `with` body, dropping it,
the end of the interpreter.  Leaving throws `Closing(reason)` into the plan and goes on performing its effects, so
that the end phase (`on_loop_end` hooks, totals, the last lines of the trace) happens however the run ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from looplet.arguments import strict_names
from looplet.base_run import BaseRun
from looplet.errors import ConfigError
from looplet.executors import AsyncExecutor, SyncExecutor
from looplet.plan import Call, Closing, Gather, Wait

if TYPE_CHECKING:  # the loop itself is loaded by the first run, so that importing looplet stays cheap
    from looplet.config import LoopConfig
    from looplet.messages import Conversation
    from looplet.types import Step


class Run(BaseRun[SyncExecutor], Iterator["Step"]):
    """One run under `for`.  Also a context manager, which can tell an exception in its body from a `break`."""

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        raise ConfigError("this run is for `for`; for `async for`, make it with async_composable_loop(...)")

    def __next__(self) -> Step:
        if self._ended:
            raise StopIteration
        self._begin()
        step: Step = self._drive(self._plan.send, None)
        return step

    def close(self, reason: str = "closed_by_caller") -> None:
        """End the run now, in order; does nothing when it has ended.

        From a hook or another thread: as soon as what is going on there has come back; a model call is not waited
        for where the run has a `cancel_token`.
        """
        if self._nothing_to_leave(reason):
            return
        if self._driving:
            self._ask_to_close(reason)
            return
        with suppress(StopIteration):
            self._drive(self._plan.throw, Closing(reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(_reason_for(kind))

    def _drive(self, resume: Callable[[Any], Any], value: Any) -> Any:
        """Perform effects until the plan yields a step; raises StopIteration, or what the run raises, at its end."""
        self._driving = True
        try:
            return self._perform(resume, value)
        except BaseException as error:
            if self._ended or self._inherited:
                raise
            return self._perform(self._plan.throw, error)  # a Ctrl-C in the driver itself, between two effects
        finally:
            self._driving = False

    def _perform(self, resume: Callable[[Any], Any], value: Any) -> Any:
        while True:
            self._require_own_process()  # a tool may have forked
            try:
                item = self._advance(resume, value)
                if not isinstance(item, (Call, Gather, Wait)):
                    return item
                value, resume = self._executor.perform(item), self._plan.send
            except BaseException as error:  # relayed into the plan until it has ended
                if self._inherited:
                    raise
                if self._ended:
                    self._settle(error)
                    raise
                value, resume = error, self._plan.throw


class AsyncRun(BaseRun[AsyncExecutor], AsyncIterator["Step"]):
    """One run under `async for`.  Also an async context manager."""

    def __aiter__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        raise ConfigError("this run is for `async for`; for `for`, make it with composable_loop(...)")

    async def __anext__(self) -> Step:
        if self._ended:
            raise StopAsyncIteration
        self._begin()
        try:
            step: Step = await self._drive(self._plan.send, None)
        except _PlanReturned:
            raise StopAsyncIteration from None
        return step

    async def aclose(self, reason: str = "closed_by_caller") -> None:
        """End the run now, in order; does nothing when it has ended.

        From a hook, or while another task awaits a step: as soon as what is going on there has come back, but a model
        call is not waited for.
        """
        if self._nothing_to_leave(reason):
            return
        if self._driving:
            self._ask_to_close(reason)
            return
        with suppress(_PlanReturned):
            await self._drive(self._plan.throw, Closing(reason))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose(_reason_for(kind))

    async def _drive(self, resume: Callable[[Any], Any], value: Any) -> Any:
        """Like `Run._drive`; raises `_PlanReturned` at the end, because coroutines may not raise StopIteration."""
        self._scope.loop = _running_loop()
        self._driving = True
        try:
            return await self._perform(resume, value)
        except GeneratorExit:  # the awaiting coroutine is closed: nothing can be awaited any more
            self._leave_now("cancelled")
            raise
        except BaseException as error:
            if self._ended or self._inherited:
                raise
            return await self._perform(self._plan.throw, error)  # a Ctrl-C in the driver itself, between two effects
        finally:
            self._driving = False

    async def _perform(self, resume: Callable[[Any], Any], value: Any) -> Any:
        while True:
            self._require_own_process()  # a tool may have forked
            try:
                item = self._advance(resume, value)
                if not isinstance(item, (Call, Gather, Wait)):
                    return item
                value, resume = await self._executor.perform(item), self._plan.send
            except GeneratorExit:
                raise
            except BaseException as error:
                if self._inherited:
                    raise
                if self._ended:
                    self._settle(error)
                    if isinstance(error, StopIteration):
                        raise _PlanReturned from None
                    raise
                value, resume = error, self._plan.throw


def _running_loop() -> Any:
    import asyncio

    return asyncio.get_running_loop()


class _PlanReturned(Exception):
    """The plan has returned its result."""


def _reason_for(kind: type[BaseException] | None) -> str:
    return "closed_by_caller" if kind is None or issubclass(kind, GeneratorExit) else "exception_in_body"


def _elsewhere(name: str) -> str | None:
    from looplet.config import LoopConfig

    if name == "meter_provider":
        return "there are no metrics yet"
    return f"it is a setting, config=LoopConfig({name}=...)" if name in LoopConfig.__dataclass_fields__ else None


@strict_names(_elsewhere)
def composable_loop(
    llm: Any,
    task: dict[str, Any] | None = None,
    tools: Any = None,
    context: Any = None,
    hooks: Sequence[Any] | None = None,
    config: LoopConfig | None = None,
    state: Any = None,
    session_log: Any = None,
    stream: Any = None,
    conversation: Conversation | None = None,
    *,
    max_steps: int | None = None,
    system_prompt: str | None = None,
    resume: Any = None,
    verdict: Any = None,
    output_type: Any = None,
    tracer_provider: Any = None,
) -> Run:
    """Return the run of an agent: iterate over it to make it happen, a `Step` for each tool call.

    llm: a backend (`looplet.backends`).  task: JSON-like, shown to the model as `key: value` lines.
    tools: a `BaseToolRegistry` (`tools_from([...])`).  context: an object of yours that hooks get.
    stream: an emitter, a function or a queue that gets the run's events as they happen (`looplet.streaming`).
    max_steps: beats the config's; when an explicit state disagrees, the smaller wins.
    resume, verdict: a run that paused for an approval, its trace file or folder, and the answer (`looplet.approval`).
    output_type: a type that the arguments of `done` must fit; `run.result.output` is an object of it.

    Raises ConfigError here, not at the first step, for arguments that cannot work.
    """
    from looplet.setup import make_scope

    settings: dict[str, Any] = dict(  # noqa: C408 - reads as the call it becomes
        context=context, hooks=hooks, config=config, state=state, session_log=session_log, stream=stream,
        conversation=conversation, max_steps=max_steps, system_prompt=system_prompt, resume=resume, verdict=verdict,
        output_type=output_type, tracer_provider=tracer_provider,
    )  # fmt: skip
    return Run(make_scope(llm, task, tools, sync=True, **settings), SyncExecutor())


@strict_names(_elsewhere)
def async_composable_loop(
    llm: Any,
    task: dict[str, Any] | None = None,
    tools: Any = None,
    context: Any = None,
    hooks: Sequence[Any] | None = None,
    config: LoopConfig | None = None,
    state: Any = None,
    session_log: Any = None,
    stream: Any = None,
    conversation: Conversation | None = None,
    *,
    max_steps: int | None = None,
    system_prompt: str | None = None,
    resume: Any = None,
    verdict: Any = None,
    output_type: Any = None,
    tracer_provider: Any = None,
) -> AsyncRun:
    """Return the run of an agent for `async for`; the parameters are those of `composable_loop`.

    Backends, tools and hooks may be `async def`; sync tools and backends run on looplet's own threads.
    """
    from looplet.setup import make_scope

    settings: dict[str, Any] = dict(  # noqa: C408 - reads as the call it becomes
        context=context, hooks=hooks, config=config, state=state, session_log=session_log, stream=stream,
        conversation=conversation, max_steps=max_steps, system_prompt=system_prompt, resume=resume, verdict=verdict,
        output_type=output_type, tracer_provider=tracer_provider,
    )  # fmt: skip
    return AsyncRun(make_scope(llm, task, tools, sync=False, **settings), AsyncExecutor())

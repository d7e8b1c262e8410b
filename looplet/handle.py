"""A run's model, handed to code that the run calls: tools (`ctx.llm`), compaction, judges, `on_loop_end` hooks.

Each call is a `chat` span of the run, passes its boundary and counts in its ledger and budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

from looplet.awaiting import begin_in
from looplet.backends.candidates import Candidate, candidates
from looplet.cancel import CancelToken
from looplet.errors import ConfigError, ErrorKind, ToolError
from looplet.executors import AsyncExecutor, SyncExecutor
from looplet.messages import Message, clean_message
from looplet.modelcall import Request, ask
from looplet.plan import INLINE, CallCancelled, Effects, finish
from looplet.scope import RunScope
from looplet.telemetry.spans import Phase
from looplet.threads import wait_for_either
from looplet.types import Reply


def handle_of(
    run: RunScope, phase: Phase, purpose: str, *, is_async: bool, token: CancelToken | None = None
) -> ModelHandle:
    """Return a backend whose calls are made below `phase`; `is_async`: for code that can await.

    token: cancelled when nobody waits for that code any more; then its calls end, and no further one is made.
    """
    return (AsyncModelHandle if is_async else BlockingModelHandle)(run, phase, purpose, token or run.cancel_token)


class ModelHandle:
    """What blocking and async handles share.  What is not asking (`close()`, settings) is the backend's own."""

    def __init__(self, run: RunScope, phase: Phase, purpose: str, token: CancelToken) -> None:
        self._run = run
        self._phase = phase
        self._purpose = purpose
        self._token = token

    @property
    def model(self) -> str:
        """Return the name of the model that is asked first."""
        return self._run.models.of(self._purpose)[0].model.name

    @property
    def provider(self) -> str:
        """Return the name of its provider."""
        return self._run.models.of(self._purpose)[0].model.provider

    def looplet_candidates(self, purpose: str) -> tuple[Candidate, ...]:
        """Return the backends behind it: a sub-agent that is given the handle asks them itself, and counts once."""
        return candidates(self._run.models.llm, purpose)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._run.models.llm, name)

    def _plan(self, messages: Sequence[Message], system_prompt: str, settings: Mapping[str, Any]) -> Effects[Reply]:
        run = self._run
        if run.trace.recorder.closed:
            raise ToolError("the run has ended; its model cannot be asked any more")
        asked = [clean_message(message, run.boundary.clean) for message in messages]
        if system_prompt:
            asked.insert(0, Message.of_text("system", run.boundary.text(system_prompt)))
        request = Request(
            asked, partial(run.outgoing.log.aside, asked), self._purpose, settings=settings, token=self._token
        )
        return ask(run, self._phase, request, _as_it_is)


class BlockingModelHandle(ModelHandle):
    """Asks and waits; under `async for` it belongs in a thread, which is where plain tools and services run."""

    def chat(self, messages: Sequence[Message], *, system_prompt: str = "", **settings: Any) -> Reply:
        """Ask the model; `settings`: tools, max_tokens, temperature and whatever the backend takes.

        Raises what the backend raises, and BudgetExhausted.
        """
        return self._finish(self._plan(messages, system_prompt, settings))

    def generate(self, prompt: str, **settings: Any) -> str:
        """Return the answer to a text."""
        return self.chat([Message.of_text("user", prompt)], **settings).text

    def _finish(self, plan: Effects[Reply]) -> Reply:
        loop = self._run.loop
        if loop is not None and self._run.models.of(self._purpose)[0].model.lane == INLINE:
            return _in_loop(self._run, plan, self._token)
        executor = SyncExecutor()
        try:
            return finish(plan, executor.perform)
        finally:
            executor.close()


class AsyncModelHandle(ModelHandle):
    """Asks and lets others work meanwhile."""

    async def chat(self, messages: Sequence[Message], *, system_prompt: str = "", **settings: Any) -> Reply:
        """Ask the model; as `BlockingModelHandle.chat`."""
        executor = AsyncExecutor()
        try:
            reply: Reply = await executor.finish(self._plan(messages, system_prompt, settings))
            return reply
        finally:
            executor.close()

    async def generate(self, prompt: str, **settings: Any) -> str:
        """Return the answer to a text."""
        return (await self.chat([Message.of_text("user", prompt)], **settings)).text


def _in_loop(run: RunScope, plan: Effects[Reply], token: CancelToken) -> Reply:
    """Have the run's event loop perform the plan, and wait in this thread, but no longer than anybody waits for it."""
    import asyncio

    loop = run.loop
    try:
        here: Any = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if here is loop:
        raise ConfigError("this code runs in the event loop, where it must not wait: make it `async def` and await llm")
    job, give_up = begin_in(loop, partial(_finish_there, plan), copy_context())
    try:
        wait_for_either(job, token)
        reply: Reply = job.outcome()
    except (CallCancelled, asyncio.CancelledError):
        give_up()
        run.check_cancelled()  # as the plan itself does, which may have been a moment slower
        raise ToolError("nobody waits for this answer any more", kind=ErrorKind.CANCELLED) from None
    return reply


async def _finish_there(plan: Effects[Reply]) -> Reply:
    executor = AsyncExecutor()
    try:
        reply: Reply = await executor.finish(plan)
        return reply
    finally:
        executor.close()


def _as_it_is(phase: Phase, reply: Reply) -> tuple[Reply, Reply]:
    return reply, reply

"""A run's hooks, sorted once by what they implement.

A hook is any object with at least one of the methods below; nothing is inherited and nothing is registered.  Methods
are looked up with `getattr` when the run is made, never while it runs.  All arguments are positional:

    pre_loop(state, session_log, context)                              once, before the first turn
    pre_prompt(state, session_log, context, step_num)                  before each request; may rewrite or add to it
    pre_dispatch(state, session_log, tool_call, step_num)              before each tool call
    check_permission(tool_call, state)                                 after pre_dispatch
    post_dispatch(state, session_log, tool_call, tool_result, step_num)  after each tool call
    check_done(state, session_log, context, step_num)                  before a `done` call is accepted
    should_stop(state, step_num, new_entities)                         after each turn
    on_loop_end(state, session_log, context, llm)                      once, at the end, whatever the end
    on_phase_end(phase)                                                an observer: watches, cannot steer
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from looplet.errors import ConfigError, did_you_mean

STEERING: Final = (
    "pre_loop",
    "pre_prompt",
    "pre_dispatch",
    "check_permission",
    "post_dispatch",
    "check_done",
    "should_stop",
    "on_loop_end",
)
OBSERVING: Final = "on_phase_end"
GATES: Final = frozenset({"check_permission", "check_done"})
"""a gate that raises has said no"""


@runtime_checkable
class PrePrompt(Protocol):
    """`def pre_prompt(self, state, log, ctx, step): return ctx.rewrite(scrub)`"""

    def pre_prompt(self, state: Any, session_log: Any, context: Any, step_num: int, /) -> Any: ...


@runtime_checkable
class PreDispatch(Protocol):
    """`def pre_dispatch(self, state, log, tc, step): return Deny("read only") if tc.tool == "delete" else None`"""

    def pre_dispatch(self, state: Any, session_log: Any, tool_call: Any, step_num: int, /) -> Any: ...


@runtime_checkable
class PostDispatch(Protocol):
    """`def post_dispatch(self, state, log, tc, result, step): print(result.data)`"""

    def post_dispatch(
        self, state: Any, session_log: Any, tool_call: Any, tool_result: Any, step_num: int, /
    ) -> Any: ...


@runtime_checkable
class CheckDone(Protocol):
    """`def check_done(self, state, log, ctx, step): return "cite a source first" if step < 3 else None`"""

    def check_done(self, state: Any, session_log: Any, context: Any, step_num: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class BoundMethod:
    """One method of one hook, ready to be called."""

    hook: str
    """the hook's class name, for spans and errors"""
    method: str
    function: Callable[..., Any]
    index: int
    """the hook's place in `hooks=[...]`"""
    wants_call: bool = False
    """`check_done` that takes `tool_call=`: the call that is about to end the run"""


class HookSet:
    """The hooks of one run, by method."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self.names = [_name(hook) for hook in hooks]
        self._methods: dict[str, list[BoundMethod]] = {name: [] for name in STEERING}
        self.observers: list[BoundMethod] = []
        for index, hook in enumerate(hooks):
            self._add(hook, index)

    def of(self, method: str) -> list[BoundMethod]:
        """Return the implementations of a steering method, in the order of `hooks=[...]`."""
        return self._methods[method]

    def _add(self, hook: Any, index: int) -> None:
        if inspect.isclass(hook):
            raise ConfigError(f"hooks take objects: pass {hook.__name__}(), not the class {hook.__name__}")
        found = {name: f for name in (*STEERING, OBSERVING) if callable(f := getattr(hook, name, None))}
        if not found and not hasattr(hook, SINK):
            raise ConfigError(_no_method(hook))
        if slip := _misspelt(hook):
            raise ConfigError(slip)
        for name, function in found.items():
            bound = BoundMethod(_name(hook), name, function, index, name == "check_done" and _takes_call(function))
            (self.observers if name == OBSERVING else self._methods[name]).append(bound)


SINK: Final = "looplet_sink"
"""an object with this attribute writes the run's trace; `looplet.telemetry.provenance` has one"""


def _name(hook: Any) -> str:
    return hook.__name__ if inspect.ismodule(hook) else type(hook).__name__


def _takes_call(function: Callable[..., Any]) -> bool:
    try:
        return "tool_call" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # no signature to be had
        return False


def _misspelt(hook: Any) -> str:
    """Return what to say of a method that is almost a hook method: a guard that is never asked is no guard."""
    from difflib import get_close_matches

    known = (*STEERING, OBSERVING)
    for name in vars(type(hook)):
        if name not in known and not name.startswith("_") and get_close_matches(name, known, n=1, cutoff=0.9):
            return f"hook {_name(hook)} has a method {name!r}{did_you_mean(name, known)}"
    return ""


def _no_method(hook: Any) -> str:
    known = (*STEERING, OBSERVING)
    public = [name for name in dir(hook) if not name.startswith("_") and callable(getattr(hook, name, None))]
    for name in public:
        if hint := did_you_mean(name, known):
            return f"hook {_name(hook)} has no hook method, but it has {name!r}{hint}"
    return f"hook {_name(hook)} has none of the hook methods: {', '.join(known)}"

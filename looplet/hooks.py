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
    should_compact(state, session_log, conversation, step_num)         before each request: shorten it?
    on_loop_end(state, session_log, context, llm)                      once, at the end, whatever the end
    on_event(payload)                                                  lifecycle events (`looplet.events`)
    on_phase_end(phase)                                                an observer: watches, cannot steer

Some objects in `hooks=[...]` have an attribute instead, by which the run knows what they bring (`BRINGS`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Protocol, runtime_checkable

from looplet.errors import ConfigError, did_you_mean
from looplet.events import COVERED_BY, LifecycleEvent, slot

EVENTS: Final = "on_event"
OBSERVING: Final = "on_phase_end"
ARGUMENTS: Final = {
    "pre_loop": "state, session_log, context",
    "pre_prompt": "state, session_log, context, step_num",
    "pre_dispatch": "state, session_log, tool_call, step_num",
    "check_permission": "tool_call, state",
    "post_dispatch": "state, session_log, tool_call, tool_result, step_num",
    "check_done": "state, session_log, context, step_num",
    "should_stop": "state, step_num, new_entities",
    "should_compact": "state, session_log, conversation, step_num",
    "on_loop_end": "state, session_log, context, llm",
    EVENTS: "payload",
    OBSERVING: "phase",
}
METHODS: Final = tuple(ARGUMENTS)
STEERING: Final = tuple(name for name in METHODS if name not in (EVENTS, OBSERVING))
GATES: Final = frozenset({"check_permission", "check_done"})
"""a gate that raises has said no"""
GUARDING: Final = ("pre_dispatch", "check_permission", "check_done", "should_stop")
"""a hook with one of them may refuse or stop: a run that goes on after a pause must have it again"""


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
    rewrites: bool | None = None
    """what the hook says of its `pre_prompt` (`REWRITES`); None when it does not say"""


class HookSet:
    """The hooks of one run, by method."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self._hooks = list(hooks)
        self.names = [_name(hook) for hook in hooks]
        self._methods: dict[str, list[BoundMethod]] = {name: [] for name in (*STEERING, *map(slot, LifecycleEvent))}
        self.observers: list[BoundMethod] = []
        for index, hook in enumerate(hooks):
            self._add(hook, index)

    def of(self, method: str) -> list[BoundMethod]:
        """Return the implementations of a steering method or event slot, in the order of `hooks=[...]`."""
        return self._methods[method]

    def state_dicts(self) -> list[tuple[str, Any]]:
        """Return what hooks that remember say of themselves, by name and place among those: `state_dict()`."""
        return [(key, hook.state_dict()) for key, hook in self._rememberers()]

    def load_state_dicts(self, states: Iterable[Sequence[Any]]) -> None:
        """Give hooks back what they remembered: `load_state_dict(state)`."""
        remembered = {str(key): state for key, state in states}
        for key, hook in self._rememberers():
            if key in remembered:
                hook.load_state_dict(remembered[key])

    def _rememberers(self) -> Iterator[tuple[str, Any]]:
        seen: Counter[str] = Counter()
        for hook in self._hooks:
            if callable(getattr(hook, "state_dict", None)) and callable(getattr(hook, "load_state_dict", None)):
                seen[name := _name(hook)] += 1
                yield f"{name}:{seen[name]}", hook

    def with_method(self, name: str) -> list[Any]:
        """Return the objects in `hooks=[...]` that have a method of this name."""
        return [hook for hook in self._hooks if callable(getattr(hook, name, None))]

    def brought(self, attribute: str) -> list[Any]:
        """Return what the objects in `hooks=[...]` bring under an attribute of `BRINGS`."""
        return [found for _, found in self.named(attribute)]

    def named(self, attribute: str) -> list[tuple[str, Any]]:
        """Return what the objects in `hooks=[...]` have under an attribute, each with the object's name."""
        return [(_name(hook), found) for hook in self._hooks if (found := getattr(hook, attribute, None)) is not None]

    def guards(self) -> list[Sequence[str]]:
        """Return the hooks that may refuse or stop, each as the names of its classes, its own one first."""
        asked = {bound.index for name in GUARDING for bound in self._methods[name]}
        said = [getattr(hook, GUARD, None) for hook in self._hooks]
        is_guard = [answer if isinstance(answer, bool) else index in asked for index, answer in enumerate(said)]
        return [_kinds(hook) for hook, guards in zip(self._hooks, is_guard, strict=True) if guards]

    def _add(self, hook: Any, index: int) -> None:
        if inspect.isclass(hook):
            raise ConfigError(f"hooks take objects: pass {hook.__name__}(), not the class {hook.__name__}")
        found = {name: f for name in METHODS if callable(f := getattr(hook, name, None))}
        if not found and not any(hasattr(hook, name) for name in BRINGS):
            raise ConfigError(_no_method(hook))
        if slip := _misspelt(hook):
            raise ConfigError(slip)
        for name, function in found.items():
            wants_call = _check_signature(hook, name, function)
            bound = BoundMethod(_name(hook), name, function, index, wants_call, _rewrites(hook))
            if name == EVENTS:
                self._add_listener(bound, found)
            else:
                (self.observers if name == OBSERVING else self._methods[name]).append(bound)

    def _add_listener(self, bound: BoundMethod, others: Container[str]) -> None:
        for event in LifecycleEvent:
            if COVERED_BY.get(event) not in others:
                self._methods[slot(event)].append(replace(bound, method=slot(event)))


SINK: Final = "looplet_sink"
"""an object with this attribute writes the run's trace; `looplet.telemetry.provenance` has one"""
BUDGET: Final = "looplet_budget"
"""a `Budget` that the run must not exceed"""
REDACT: Final = "looplet_redact"
"""a function like `LoopConfig.redact`"""
EMITTER: Final = "looplet_emitter"
"""gets the run's stream of events"""
APPROVALS: Final = "looplet_approvals"
"""a function of the `ApprovalRequest`s of a run that pauses, and its run id: with one, the run may pause"""
REWRITES: Final = "looplet_rewrites"
"""True or False, where a hook says in advance whether its `pre_prompt` ever rewrites a request"""
GUARD: Final = "looplet_guard"
"""True or False, where the methods of a hook do not tell whether it guards (`GUARDING`)"""
TOOL_NAMES: Final = "looplet_tool_names"
"""the names of tools, without wildcards, that a guard is about"""
COMPACT: Final = "compact"
"""a compaction service: this method makes the conversation shorter"""
BRINGS: Final = (SINK, BUDGET, REDACT, EMITTER, APPROVALS, COMPACT)


def _name(hook: Any) -> str:
    return hook.__name__ if inspect.ismodule(hook) else type(hook).__name__


def _kinds(hook: Any) -> Sequence[str]:
    """Return the names of an object's classes, nearest first; a proxy is of its target's classes if it says so."""
    if inspect.ismodule(hook):
        return [hook.__name__]
    claimed = hook.__class__
    lines = (*(claimed.__mro__ if isinstance(claimed, type) else ()), *type(hook).__mro__)
    return list(dict.fromkeys(kind.__name__ for kind in lines if kind is not object))


def _rewrites(hook: Any) -> bool | None:
    said = getattr(hook, REWRITES, None)
    return said if isinstance(said, bool) else None


def _check_signature(hook: Any, method: str, function: Callable[..., Any]) -> bool:
    """Tell whether a `check_done` takes `tool_call=`; raises ConfigError for a method that cannot be called."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # no signature to be had
        return False
    wants_call = method == "check_done" and "tool_call" in signature.parameters
    arguments = ARGUMENTS[method]
    try:
        signature.bind(*arguments.split(", "), **({"tool_call": None} if wants_call else {}))
    except TypeError as error:
        words = f"{_name(hook)}.{method} cannot be called as {method}({arguments}): {error}"
        raise ConfigError(words) from None
    return wants_call


def _misspelt(hook: Any) -> str:
    """Return what to say of a method that is almost a hook method: a guard that is never asked is no guard."""
    near = _misspelt_methods(tuple(dir(hook)))
    name = next((name for name in near if callable(getattr(hook, name, None))), "")
    return f"hook {_name(hook)} has a method {name!r}{did_you_mean(name, METHODS)}" if name else ""


@lru_cache(maxsize=256)
def _misspelt_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    from difflib import get_close_matches

    public = (name for name in names if name not in METHODS and not name.startswith("_"))
    return tuple(name for name in public if get_close_matches(name, METHODS, n=1, cutoff=0.9))


def _no_method(hook: Any) -> str:
    known = METHODS
    if hasattr(hook, "limits"):
        return f"a {_name(hook)} is no hook; write BudgetCap(...), or LoopConfig(budget={_name(hook)}(...))"
    public = [name for name in dir(hook) if not name.startswith("_") and callable(getattr(hook, name, None))]
    for name in public:
        if hint := did_you_mean(name, known):
            return f"hook {_name(hook)} has no hook method, but it has {name!r}{hint}"
    return f"hook {_name(hook)} has none of the hook methods: {', '.join(known)}"

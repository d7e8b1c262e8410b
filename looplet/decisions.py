"""What a hook may answer: `HookDecision`, and short ways to make one.

Each hook method honours the fields that have a meaning there (`MEANING`); any other field is a mistake that is
reported with the hook's and the method's name, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

from looplet.arguments import DICT, FLAG, TEXT, Kind, check_fields, optional, require
from looplet.errors import ConfigError
from looplet.types import ToolResult

PERMISSIONS: Final = ("allow", "deny", "ask")


_KINDS: Final = {
    "block": optional(TEXT),
    "stop": optional(TEXT),
    "updated_args": optional(DICT),
    "updated_result": optional(Kind("a ToolResult", lambda value: isinstance(value, ToolResult))),
    "additional_context": optional(TEXT),
    "compact": optional(FLAG),
    "metadata": DICT,
}


@dataclass(frozen=True, slots=True)
class HookDecision:
    """One answer of one hook; every field that is None says nothing."""

    block: str | None = None
    """do not do it, and tell the model this reason"""
    stop: str | None = None
    """end the run with this stop reason"""
    updated_args: dict[str, Any] | None = None
    """run the tool with these arguments instead"""
    updated_result: ToolResult | None = None
    """this is the result: before dispatch the tool does not run, after it the result is replaced"""
    permission: str | None = None
    """`allow`, `deny`, or `ask`: a human decides, with `block` as the question; refused where nobody can be asked"""
    additional_context: str | None = None
    """text for the next request to the model"""
    compact: bool | None = None
    """make the conversation shorter before the next request"""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.permission not in (None, *PERMISSIONS):
            raise ConfigError(f"permission is one of {', '.join(map(repr, PERMISSIONS))}, not {self.permission!r}")
        check_fields(self, _KINDS, "HookDecision: ")
        if self.stop == "":
            raise ConfigError("a stop reason must not be empty: Stop('enough')")

    def is_block(self) -> bool:
        """Tell whether the call or the ending is refused."""
        return self.permission == "deny" or (self.block is not None and not self.is_ask())

    def is_ask(self) -> bool:
        """Tell whether a human is to decide."""
        return self.permission == "ask"

    def is_stop(self) -> bool:
        """Tell whether the run is to end."""
        return self.stop is not None

    def is_noop(self) -> bool:
        """Tell whether the decision changes nothing."""
        return not self.effects()

    @property
    def reason(self) -> str:
        """Return the words that go with the decision."""
        return self.block or self.stop or ""

    @property
    def retry(self) -> bool:
        """Tell whether the model is invited to make a refused call again."""
        return bool(self.metadata.get("retry"))

    def effects(self) -> list[str]:
        """Return the names of the fields that change something; to allow a call changes nothing."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "metadata"}
        return [name for name, value in values.items() if value is not None and (name, value) not in _SILENT]


_SILENT: Final = (("permission", "allow"), ("compact", False))


def Allow(updated_args: dict[str, Any] | None = None) -> HookDecision:  # noqa: N802 - reads like a word of the language
    """Let the call run, with other arguments if given."""
    return HookDecision(permission="allow", updated_args=updated_args)


def Deny(reason: str, *, retry: bool = False) -> HookDecision:  # noqa: N802
    """Refuse the call; with `retry` the model is told that the same call may succeed later."""
    require("the reason of Deny(reason)", reason, TEXT)
    return HookDecision(permission="deny", block=reason, metadata={"retry": True} if retry else {})


def Block(reason: str) -> HookDecision:  # noqa: N802
    """Refuse the call, or the ending when returned from `check_done`."""
    require("the reason of Block(reason)", reason, TEXT)
    return HookDecision(block=reason)


def Stop(reason: str) -> HookDecision:  # noqa: N802
    """End the run with this stop reason."""
    require("the reason of Stop(reason)", reason, TEXT)
    return HookDecision(stop=reason)


def Continue(ctx: str | None = None) -> HookDecision:  # noqa: N802
    """Go on, with some text for the next request if given."""
    return HookDecision(additional_context=ctx)


def InjectContext(text: str) -> HookDecision:  # noqa: N802
    """Add text to the next request to the model."""
    return HookDecision(additional_context=text)


_ANYWHERE: Final = frozenset({"stop", "additional_context"})

# hook method -> the fields that mean something there
MEANING: Final[dict[str, frozenset[str]]] = {
    "pre_loop": _ANYWHERE,
    "pre_prompt": _ANYWHERE,
    "pre_dispatch": _ANYWHERE | {"block", "permission", "updated_args", "updated_result"},
    "check_permission": _ANYWHERE | {"block", "permission", "updated_args"},
    "post_dispatch": _ANYWHERE | {"updated_result"},
    "check_done": _ANYWHERE | {"block", "permission"},
    "should_stop": _ANYWHERE,
    "should_compact": _ANYWHERE | {"compact"},
    "on_loop_end": frozenset(),
    "on_event(pre_llm_call)": _ANYWHERE,
    "on_event(post_llm_response)": _ANYWHERE,
    "on_event(pre_tool_use)": _ANYWHERE | {"block", "permission", "updated_args", "updated_result"},
    "on_event(post_tool_use)": _ANYWHERE | {"updated_result"},
    "on_event(post_tool_failure)": _ANYWHERE | {"updated_result"},
    "on_event(pre_compact)": frozenset({"block"}),
}

_RETURNS: Final = {
    "pre_prompt": "None, a str or a HookDecision",
    "pre_dispatch": "None, a ToolResult or a HookDecision",
    "check_permission": "None, a bool or a HookDecision",
    "post_dispatch": "None, a str, a ToolResult or a HookDecision",
    "check_done": "None, a str (the reason to go on) or a HookDecision",
    "should_stop": "None, a bool, a str (the stop reason) or a HookDecision",
    "should_compact": "None, a bool or a HookDecision",
    "pre_loop": "None or a HookDecision",
    "on_loop_end": "None or an int",
}

_NOTHING: Final = HookDecision()


def interpret(value: Any, hook: str, method: str) -> HookDecision:
    """Return the decision that a hook method's return value stands for.

    Raises ConfigError naming hook and method for a type or a field that has no meaning there.
    """
    if value is None:
        return _NOTHING
    decision = _decision_of(value, method)
    if decision is None:
        raise ConfigError(
            f"{hook}.{method} returned {type(value).__name__} ({value!r:.60}); "
            f"it may return {_RETURNS.get(method, 'None or a HookDecision')}"
        )
    if decision.is_ask() and method == "check_done":
        raise ConfigError(
            f"{hook}.check_done cannot have a human asked; ask in check_permission, with done by its name"
        )
    meaning = MEANING.get(method, frozenset())
    if strange := [name for name in decision.effects() if name not in meaning]:
        raise ConfigError(
            f"{hook}.{method} returned a HookDecision with {', '.join(strange)}, which has no meaning there; "
            f"{method} understands {', '.join(sorted(meaning)) or 'no field'}"
        )
    return decision


def _decision_of(value: Any, method: str) -> HookDecision | None:
    if isinstance(value, HookDecision):
        return value
    if isinstance(value, ToolResult):
        return HookDecision(updated_result=value) if method in ("pre_dispatch", "post_dispatch") else None
    if isinstance(value, bool):
        return _of_bool(value, method)
    if isinstance(value, str):
        return _of_str(value, method)
    return _NOTHING if isinstance(value, int) and method == "on_loop_end" else None


def _of_bool(value: bool, method: str) -> HookDecision | None:
    if method == "should_stop":
        return HookDecision(stop="hook_requested_stop") if value else _NOTHING
    if method == "check_permission":
        return _NOTHING if value else HookDecision(permission="deny")
    if method == "should_compact":
        return HookDecision(compact=True) if value else _NOTHING
    return None


def _of_str(value: str, method: str) -> HookDecision | None:
    if method in ("pre_prompt", "post_dispatch", "pre_loop"):
        return HookDecision(additional_context=value) if value else _NOTHING
    if method == "check_done":
        return HookDecision(block=value)
    if method == "should_stop":
        return HookDecision(stop=value) if value else _NOTHING
    return None

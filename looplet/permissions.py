"""Permissions: rules about which tool calls may run.

    engine = PermissionEngine(default=PermissionDecision.DENY)
    engine.allow("read_*").ask("write_file", reason="it changes your files").deny("*", reason="read only")
    composable_loop(..., hooks=[PermissionHook(engine)])

The first rule that matches decides, the default where none does.  A tool that ends the run (`done_tools`) is bound
only by a rule that names it exactly: no wildcard and no default keeps a run from ending.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Final, TypeAlias

from looplet.arguments import TEXT, require, shown
from looplet.awaiting import discard, is_awaitable
from looplet.decisions import Allow, Deny, HookDecision
from looplet.errors import ConfigError
from looplet.types import ToolCall

MAX_DENIALS: Final = 10_000
"""of how many refusals an engine keeps a record"""
WILDCARDS: Final = frozenset("*?[")
"""the signs that make a rule's tool a pattern"""


class PermissionDecision(StrEnum):
    """What is to happen with a call."""

    ALLOW = "allow"
    DENY = "deny"
    ASK = "ask"
    """a human decides"""


ArgMatcher: TypeAlias = "Callable[[dict[str, Any]], Any] | Mapping[str, Any]"
"""a function of the arguments, or for each argument the value, a glob or a function that it must satisfy"""
AskHandler: TypeAlias = Callable[[ToolCall, str], Any]
"""given the call and the rule's reason; True or `PermissionDecision.ALLOW` lets it run, anything else does not"""


@dataclass(frozen=True, slots=True)
class PermissionRule:
    """One rule.

    tool: a tool's name, or a pattern with `*`, `?` and `[...]`; case counts.  arg_matcher: without one, the rule is
    about every call of the tool.  In a dict, a text is a glob (its `*` matches `/` and `..`, too: check paths with a
    function), and an argument that the call leaves out is None.
    """

    tool: str
    decision: PermissionDecision
    arg_matcher: ArgMatcher | None = None
    reason: str = ""
    """told to the model with a refusal, and to the human who is asked"""

    def __post_init__(self) -> None:
        if not isinstance(self.tool, str) or not self.tool:
            raise ConfigError(f"a permission rule needs a tool name or pattern, not {self.tool!r}")
        require(f"the reason of the rule {self.tool!r}", self.reason, TEXT)
        object.__setattr__(self, "decision", _decision(self.decision))
        if not (self.arg_matcher is None or callable(self.arg_matcher) or isinstance(self.arg_matcher, Mapping)):
            raise ConfigError(f"arg_matcher of {self.tool!r} must be a function of the arguments or a dict")

    def matches(self, call: ToolCall) -> bool:
        """Tell whether the rule is about a call.

        A matcher that raises fails closed: a rule that allows is then about another call, any other is about this one.
        """
        if call.tool != self.tool and not fnmatchcase(call.tool, self.tool):
            return False
        try:
            return _matches(self.arg_matcher, call.args)
        except Exception:  # noqa: BLE001 - the caller's matcher; what cannot be judged is not allowed
            return self.decision is not PermissionDecision.ALLOW


@dataclass(frozen=True, slots=True)
class PermissionOutcome:
    """What the rules, and the human if one was asked, say about a call."""

    decision: PermissionDecision
    """`ASK` where there is nobody to ask"""
    rule: PermissionRule | None = None
    """None: the default"""
    reason: str = ""

    @property
    def allowed(self) -> bool:
        """Tell whether the call may run."""
        return self.decision is PermissionDecision.ALLOW

    @property
    def denied(self) -> bool:
        """Tell whether the call is refused."""
        return self.decision is PermissionDecision.DENY


class PermissionEngine:
    """Rules in order, a default, and whom to ask.  One engine may serve several runs, from any thread."""

    def __init__(
        self,
        rules: Iterable[PermissionRule] = (),
        default: PermissionDecision = PermissionDecision.ALLOW,
        ask_handler: AskHandler | None = None,
        *,
        done_tools: Iterable[str] = ("done",),
    ) -> None:
        self.rules: list[PermissionRule] = []
        self.default = _decision(default)
        self.ask_handler = ask_handler
        self.done_tools = frozenset((done_tools,) if isinstance(done_tools, str) else done_tools)
        self._denials: deque[dict[str, Any]] = deque(maxlen=MAX_DENIALS)
        """`{tool, args, rule, reason}` of every call that was refused here, oldest first"""
        if ask_handler is not None and not callable(ask_handler):
            raise ConfigError("ask_handler must be a function (call, reason) -> PermissionDecision or bool")
        for rule in rules:
            if not isinstance(rule, PermissionRule):
                raise ConfigError(f"rules must be PermissionRule objects, not {type(rule).__name__}")
            self.rules.append(rule)

    @property
    def denials(self) -> list[dict[str, Any]]:
        """Return what was refused, oldest first: tool, args, rule, reason; the last `MAX_DENIALS`."""
        return list(self._denials)

    def allow(self, tool: str, *, arg_matcher: ArgMatcher | None = None, reason: str = "") -> PermissionEngine:
        """Add a rule that lets calls run; return the engine."""
        return self._add(tool, PermissionDecision.ALLOW, arg_matcher, reason)

    def deny(self, tool: str, *, arg_matcher: ArgMatcher | None = None, reason: str = "") -> PermissionEngine:
        """Add a rule that refuses calls; return the engine."""
        return self._add(tool, PermissionDecision.DENY, arg_matcher, reason)

    def ask(self, tool: str, *, arg_matcher: ArgMatcher | None = None, reason: str = "") -> PermissionEngine:
        """Add a rule that has a human decide; return the engine."""
        return self._add(tool, PermissionDecision.ASK, arg_matcher, reason)

    def evaluate(self, call: ToolCall) -> PermissionOutcome:
        """Return what holds for a call; asks the `ask_handler`, once, where a rule says so.

        Raises ConfigError when that is `async def`: then await `aevaluate`.
        """
        outcome, answer = self._ask(call)
        if answer is not None:
            discard(answer)
            raise ConfigError("the ask_handler is async: await engine.aevaluate(call), or use PermissionHook(engine)")
        return outcome

    async def aevaluate(self, call: ToolCall) -> PermissionOutcome:
        """Return what holds for a call; the `ask_handler` may be plain or `async def`."""
        outcome, answer = self._ask(call)
        return outcome if answer is None else await self._await(call, outcome, answer)

    def decide(self, call: ToolCall) -> PermissionOutcome | Awaitable[PermissionOutcome]:
        """Return what holds for a call, to be awaited only where an `async def` handler is asked."""
        outcome, answer = self._ask(call)
        return outcome if answer is None else self._await(call, outcome, answer)

    def _add(
        self, tool: str, decision: PermissionDecision, arg_matcher: ArgMatcher | None, reason: str
    ) -> PermissionEngine:
        self.rules.append(PermissionRule(tool, decision, arg_matcher, reason))
        return self

    def _judge(self, call: ToolCall) -> PermissionOutcome:
        ends = call.tool in self.done_tools
        for rule in self.rules:
            if not (ends and rule.tool != call.tool) and rule.matches(call):
                return PermissionOutcome(rule.decision, rule, rule.reason)
        return PermissionOutcome(PermissionDecision.ALLOW if ends else self.default)

    def _ask(self, call: ToolCall) -> tuple[PermissionOutcome, Awaitable[Any] | None]:
        """Return what holds for a call, and the handler's answer where that is to be awaited first."""
        outcome = self._judge(call)
        if outcome.decision is PermissionDecision.ASK and self.ask_handler is not None:
            try:
                answer = self.ask_handler(call, outcome.reason)
            except Exception as error:  # noqa: BLE001 - the caller's code; who cannot answer has not allowed
                return self._note(call, _failed(outcome, error)), None
            if is_awaitable(answer):
                return outcome, answer
            outcome = _answered(outcome, answer)
        return self._note(call, outcome), None

    async def _await(self, call: ToolCall, outcome: PermissionOutcome, answer: Awaitable[Any]) -> PermissionOutcome:
        try:
            outcome = _answered(outcome, await answer)
        except Exception as error:  # noqa: BLE001 - as in `_ask`
            outcome = _failed(outcome, error)
        return self._note(call, outcome)

    def _note(self, call: ToolCall, outcome: PermissionOutcome) -> PermissionOutcome:
        if outcome.denied:
            args = {name: value for name, value in call.args.items() if not name.startswith("__")}
            rule = outcome.rule.tool if outcome.rule is not None else None
            self._denials.append({"tool": call.tool, "args": args, "rule": rule, "reason": outcome.reason})
        return outcome


class PermissionHook:
    """Asks an engine about every call: the gate for `hooks=[...]`.

    A call that a human is to decide about goes to the engine's `ask_handler`; without one, to the run's
    `approval_handler`; without that, the run pauses if it can (`ApprovalHook`), and else the call is refused.
    """

    def __init__(self, engine: PermissionEngine) -> None:
        if not isinstance(engine, PermissionEngine):
            raise ConfigError(f"PermissionHook takes a PermissionEngine, not {type(engine).__name__}")
        self.engine = engine

    @property
    def looplet_tool_names(self) -> list[str]:
        """Return the tools that the rules name without a wildcard."""
        return [rule.tool for rule in self.engine.rules if not WILDCARDS.intersection(rule.tool)]

    def check_permission(self, tool_call: ToolCall, state: Any) -> HookDecision | Awaitable[HookDecision]:
        """Return what the engine says, to be awaited where its `ask_handler` is `async def`."""
        outcome = self.engine.decide(tool_call)
        return _to_decision(outcome) if isinstance(outcome, PermissionOutcome) else _awaited(outcome)


async def _awaited(outcome: Awaitable[PermissionOutcome]) -> HookDecision:
    return _to_decision(await outcome)


def _to_decision(outcome: PermissionOutcome) -> HookDecision:
    if outcome.allowed:
        return Allow()
    if not outcome.denied:
        return HookDecision(permission="ask", block=outcome.reason or None)
    where = f"the rule {outcome.rule.tool!r} forbids it" if outcome.rule is not None else "no rule allows it"
    return Deny(outcome.reason or where)


def _answered(outcome: PermissionOutcome, answer: Any) -> PermissionOutcome:
    if answer is True or (isinstance(answer, str) and answer == PermissionDecision.ALLOW):
        return PermissionOutcome(PermissionDecision.ALLOW, outcome.rule, outcome.reason)
    if answer is False or (isinstance(answer, str) and answer == PermissionDecision.DENY):
        return _refused(outcome, "a human refused it")
    known = "True, False, PermissionDecision.ALLOW and .DENY"
    return _refused(outcome, f"the ask_handler answered {shown(answer)}, which is none of {known}")


def _failed(outcome: PermissionOutcome, error: Exception) -> PermissionOutcome:
    return _refused(outcome, f"the ask_handler failed ({type(error).__name__})")


def _refused(outcome: PermissionOutcome, why: str) -> PermissionOutcome:
    reason = f"{why}: {outcome.reason}" if outcome.reason else why
    return PermissionOutcome(PermissionDecision.DENY, outcome.rule, reason)


def _decision(value: Any) -> PermissionDecision:
    try:
        return PermissionDecision(value)
    except ValueError:
        known = ", ".join(repr(str(decision)) for decision in PermissionDecision)
        raise ConfigError(f"a permission is one of {known}, not {value!r}") from None


def _matches(matcher: ArgMatcher | None, args: dict[str, Any]) -> bool:
    if matcher is None:
        return True
    if not isinstance(matcher, Mapping):
        return _says(matcher, args)
    return all(_fits(wanted, args.get(name)) for name, wanted in matcher.items())


def _fits(wanted: Any, value: Any) -> bool:
    if callable(wanted):
        return _says(wanted, value)
    if isinstance(wanted, str) and isinstance(value, str):
        return value == wanted or fnmatchcase(value, wanted)
    return bool(wanted == value)


def _says(matcher: Callable[[Any], Any], value: Any) -> bool:
    answer = matcher(value)
    if is_awaitable(answer):  # and true, whatever it would come to
        discard(answer)
        raise ConfigError("an arg_matcher must be a plain function")
    return bool(answer)

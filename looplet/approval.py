"""Approval: a call that a human must decide about, the answer, and `ApprovalHook`, with which a run may pause for it.

A gate asks with `HookDecision(permission="ask")`; a tool asks with `ctx.approve(...)`, or by returning
`{"needs_approval": True, "approval_description": ..., "approval_options": [...]}`.  With `LoopConfig.approval_handler`
the answer comes at once.  With an `ApprovalHook` the run ends, `waiting_for_approval`, and goes on with

    composable_loop(llm, tools=tools, hooks=hooks, resume=run_or_path, verdict="approve")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeAlias

from looplet.arguments import TEXT, require, shown
from looplet.errors import ConfigError

WAITING: Final = "waiting_for_approval"
"""the stop reason of a run that pauses"""
OPTIONS: Final = ("approve", "deny")
_DENIALS: Final = frozenset({"deny", "denied", "reject", "rejected", "no", "n", "false"})
_YES_NO: Final[Mapping[Any, str]] = {True: "approve", False: "deny"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A human's answer about one call.  With the hash, it holds for the arguments that were shown and no others."""

    answer: str
    """one of the request's options"""
    call_id: str = ""
    arguments_sha256: str = ""
    reason: str = ""
    """told to the model"""
    run_id: str = ""
    """of the run that asked; with it, the verdict holds for that run and no other"""

    def __post_init__(self) -> None:
        require("the answer of a Verdict", self.answer, TEXT)

    @property
    def denies(self) -> bool:
        """Tell whether the call must not run."""
        return self.answer.lower() in _DENIALS


@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """A question about one tool call, JSON-like through `to_dict`."""

    step: int
    """number of the step that the call will be"""
    tool: str
    description: str = ""
    options: Sequence[str] = OPTIONS
    call_id: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    """as the tool will get them"""
    arguments_sha256: str = ""
    has_run: bool = False
    """the tool was called and asked by itself; it is called again with the answer"""
    run_id: str = ""

    def answer(self, answer: str, reason: str = "") -> Verdict:
        """Return an answer that holds for this call of this run with these arguments."""
        return Verdict(answer, self.call_id, self.arguments_sha256, reason, self.run_id)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-like dict; `from_dict` is the inverse."""
        return {**asdict(self), "options": list(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ApprovalRequest:
        """Build the request that `to_dict` described."""
        return cls(**{**data, "options": tuple(data.get("options", OPTIONS))})


class ApprovalHook:
    """With it in `hooks=[...]`, a run whose call needs an approval pauses; `pending` says what it waits for."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[ApprovalRequest, ...]] = {}

    @property
    def requests(self) -> list[ApprovalRequest]:
        """Return the open questions of all runs that have this hook."""
        return [request for requests in self._open.values() for request in requests]

    @property
    def pending(self) -> ApprovalRequest | None:
        """Return the first open question, None when there is none."""
        return next(iter(self.requests), None)

    def looplet_approvals(self, requests: Sequence[ApprovalRequest], run_id: str) -> None:
        """Take what a run waits for: nothing, once it has gone on."""
        if requests:
            self._open[run_id] = tuple(requests)
        else:
            self._open.pop(run_id, None)


def answer_of(answer: Any, options: Sequence[str]) -> str:
    """Return the option that an `approval_handler` chose.  Raises ConfigError for what is none of them."""
    said = _YES_NO[answer] if isinstance(answer, bool) else answer
    if not isinstance(said, str) or said not in options:
        known = [*map(repr, options), *(["True", "False"] if tuple(options) == OPTIONS else [])]
        raise ConfigError(f"the approval_handler answered {shown(answer)}; it may answer {' or '.join(known)}")
    return str(said)


Verdicts: TypeAlias = "str | bool | Verdict | Mapping[str, Any] | Sequence[Verdict]"


def verdicts_of(requests: Sequence[ApprovalRequest], verdict: Verdicts | None) -> dict[str, Verdict]:
    """Return the answer to each request, by call id; it holds for the arguments that were shown.

    `verdict`: one of the options or a Verdict for a single request, `{call_id: answer}` or a list of Verdicts for
    several.  Raises ConfigError for what is missing, unknown, or said about other arguments.
    """
    given = _by_call(requests, verdict)
    known = {request.call_id: request for request in requests}
    if strange := [call_id for call_id in given if call_id not in known]:
        raise ConfigError(f"verdict for call {strange[0]!r}, but the run waits for {_listed(requests)}")
    if missing := [request for request in requests if request.call_id not in given]:
        raise ConfigError(f"verdict= is missing for {_listed(missing)}: {{'{missing[0].call_id}': 'approve'}}")
    return {call_id: _checked(known[call_id], answer) for call_id, answer in given.items()}


def _by_call(requests: Sequence[ApprovalRequest], verdict: Verdicts | None) -> dict[str, Verdict]:
    if verdict is None:
        raise ConfigError(f"the run waits for {_listed(requests)}; pass verdict='approve' or 'deny'")
    if isinstance(verdict, Mapping):
        return {str(call_id): _one(answer) for call_id, answer in verdict.items()}
    if isinstance(verdict, (str, bool, Verdict)):
        one = _one(verdict)
        if len(requests) > 1 and not one.call_id:
            raise ConfigError(f"the run waits for {_listed(requests)}; pass a verdict for each: {{call_id: answer}}")
        return {one.call_id or requests[0].call_id: one}
    if isinstance(verdict, Sequence):
        answers = [one for one in verdict if isinstance(one, Verdict) and one.call_id]
        if answers and len(answers) == len(verdict):
            return {one.call_id: one for one in answers}
    raise ConfigError(f"verdict takes an option, {{call_id: option}} or request.answer(option), not {verdict!r:.60}")


def _one(answer: Any) -> Verdict:
    if isinstance(answer, Verdict):
        return answer
    if isinstance(answer, bool):
        return Verdict(_YES_NO[answer])
    if isinstance(answer, str):
        return Verdict(answer)
    raise ConfigError(f"a verdict is one of the request's options, True or False, not {answer!r:.60}")


def _checked(request: ApprovalRequest, verdict: Verdict) -> Verdict:
    """Return the verdict, bound to the call and the arguments that were shown."""
    if verdict.answer not in request.options:
        raise ConfigError(f"verdict {verdict.answer!r} is none of {', '.join(map(repr, request.options))}")
    if verdict.arguments_sha256 not in ("", request.arguments_sha256):
        raise ConfigError(f"the verdict on {request.call_id!r} was given for other arguments than the run waits with")
    if verdict.run_id not in ("", request.run_id):
        raise ConfigError(f"the verdict on {request.call_id!r} was given for run {verdict.run_id}")
    return request.answer(verdict.answer, verdict.reason)


def _listed(requests: Sequence[ApprovalRequest]) -> str:
    return ", ".join(f"{request.call_id!r} ({request.tool})" for request in requests)

"""Hypothesis strategies: scripts of runs as plain data, so that a run can be made of them again and again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hypothesis import strategies as st

from looplet import (
    Allow,
    BackendError,
    Block,
    Continue,
    Deny,
    HookDecision,
    InjectContext,
    LoopConfig,
    Message,
    Reply,
    Stop,
    ToolCall,
    ToolContext,
    ToolError,
    ToolResult,
    Usage,
    tool,
    tools_from,
)
from looplet.boundary import Boundary
from looplet.testing import AsyncMockLLMBackend, AsyncScriptedBackend, MockLLMBackend, ScriptedBackend

WORDS = st.text(st.characters() | st.sampled_from('═ \n"\\{}:\ud800'), max_size=12)
"""any text: control characters, lines, lone surrogates and all"""
NUMBERS = st.integers(-3, 3) | st.integers() | st.floats()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


class Opaque:
    """An object that no JSON encoder knows."""


class Hostile:
    """An object that refuses to be looked at."""

    def __getattribute__(self, name):
        raise RuntimeError(f"hands off {name!r}")

    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


@dataclass
class Knot:
    """An object that holds itself."""

    name: str = "knot"
    inside: list = field(default_factory=list)


class Unspeakable(Exception):
    """An exception without words."""

    def __str__(self):
        raise RuntimeError("no words")


def knot():
    value = Knot()
    value.inside.append(value)
    return value


ODD_VALUES = {
    "opaque": Opaque,
    "hostile": Hostile,
    "knot": knot,
    "bytes": lambda: b"\x00\xff",
    "set": lambda: {"b", "a", 1},
    "keys": lambda: {1: "one", None: "none", b"\xff": 2, ("a", 1): 3},
    "big": lambda: 1 << 70,
    "surrogate": lambda: "\ud800 alone",
    "exception": lambda: ValueError("as a value"),
    "class": lambda: Opaque,
    "result": lambda: ToolResult(
        "strange", "its own words", data={"own": 1}, warnings=("careful",), result_key=Opaque()
    ),
    "failed": lambda: ToolResult("strange", error="its own failure"),
    "error": lambda: ToolError("a value, not raised"),
}
ODD_FAILURES = {
    "plain": lambda: RuntimeError("kaput"),
    "number": lambda: ToolError(404),
    "words": lambda: ToolError("use metres", kind="validation", retriable=True, recovery_hint={"unit": "m"}),
    "unspeakable": Unspeakable,
    "exit": lambda: SystemExit(3),
    "surrogate": lambda: OSError("\ud800 gone"),
    "timeout": lambda: TimeoutError(),
}


def make_odd_tools():
    """Return tools that give, fail and warn in every way there is; `aslow` is `async def`."""

    @tool
    def add(a: int, b: int = 1) -> int:
        """Add two numbers."""
        return a + b

    @tool(concurrent_safe=True)
    def echo(value: Any) -> Any:
        """Return the value."""
        return value

    @tool(concurrent_safe=True)
    def odd(kind: str) -> Any:
        """Return something odd."""
        return ODD_VALUES[kind]()

    @tool
    def fail(kind: str) -> None:
        """Raise something."""
        failure = ODD_FAILURES[kind]()
        raise failure

    @tool
    async def aslow(value: str) -> str:
        """Return the value, later."""
        return value

    @tool(free=True)
    def hint(text: str, ctx: ToolContext) -> None:
        """Warn and report."""
        ctx.warn(text)
        ctx.report_progress("half", {"text": text})

    return tools_from([add, echo, odd, fail, aslow, hint], include_done=True)


# --- what the model says ----------------------------------------------------------------------------------------------

GOOD_CALLS = st.one_of(
    st.tuples(st.just("add"), st.fixed_dictionaries({"a": st.integers(-9, 9)}, optional={"b": st.integers(-9, 9)})),
    st.tuples(st.just("echo"), st.fixed_dictionaries({"value": JSON_VALUES})),
    st.tuples(st.just("odd"), st.fixed_dictionaries({"kind": st.sampled_from(sorted(ODD_VALUES))})),
    st.tuples(st.just("fail"), st.fixed_dictionaries({"kind": st.sampled_from(sorted(ODD_FAILURES))})),
    st.tuples(st.just("aslow"), st.fixed_dictionaries({"value": WORDS})),
    st.tuples(st.just("hint"), st.fixed_dictionaries({"text": WORDS})),
)
BAD_CALLS = st.one_of(
    st.tuples(st.sampled_from(["ad", "", "rm -rf", "söök", "a\nb"]), st.dictionaries(WORDS, JSON_VALUES, max_size=2)),
    st.tuples(st.just("add"), st.dictionaries(st.sampled_from(["a", "b", "c", "x\ny"]), JSON_VALUES, max_size=3)),
    st.tuples(st.just("done"), st.dictionaries(st.sampled_from(["answer", "conclusion"]), JSON_VALUES, max_size=2)),
)
DONE = st.tuples(st.just("done"), st.fixed_dictionaries({"answer": WORDS}) | st.fixed_dictionaries({"summary": WORDS}))
CALLS = GOOD_CALLS | GOOD_CALLS | BAD_CALLS
BATCHES = st.lists(CALLS | DONE, min_size=2, max_size=4)
USAGES = st.none() | st.builds(
    Usage, st.integers(0, 99), st.integers(0, 99), st.integers(0, 9), st.integers(0, 9), st.none() | st.floats(0, 1)
)
FAILURES = st.builds(ConnectionError, WORDS) | st.builds(
    BackendError, WORDS, kind=st.sampled_from(["rate_limit", "timeout"]), status=st.sampled_from([429, 503])
)


def _reply(calls, **rest):
    return Reply(tool_calls=tuple(ToolCall(name, dict(args), **more) for name, args, more in calls), **rest)


EXTRAS = st.fixed_dictionaries(
    {},
    optional={"reasoning": WORDS, "call_id": st.sampled_from(["same", "call_1"]), "metadata": st.just({"theory": "t"})},
)
NATIVE = st.builds(
    _reply,
    st.lists(st.builds(lambda call, more: (*call, more), CALLS | DONE, EXTRAS), min_size=1, max_size=3),
    text=st.just("") | WORDS,
    usage=USAGES,
    reasoning=st.just("") | WORDS,
    finish_reason=st.sampled_from(["", "stop", "tool_call", "length"]),
    model=st.sampled_from(["", "scripted-2"]),
    response_id=st.sampled_from(["", "resp_1"]),
    parts=st.sampled_from([(), ({"type": "text"}, {"type": "reasoning", "content": "hm", "signature": "s"})]),
)


@st.composite
def _texts(draw):
    """Return what a model without native tools may say: a call, or several, well-formed or not, or none."""
    calls = draw(st.lists(CALLS | DONE, min_size=1, max_size=3))
    said: list[Any] = [{"tool": name, "args": _jsonable(args), "reasoning": draw(WORDS)} for name, args in calls]
    text = json.dumps(said[0] if len(said) == 1 else {"tools": said}, ensure_ascii=draw(st.booleans()))
    form = draw(st.sampled_from(["plain", "plain", "fenced", "chatty", "cut", "noise"]))
    return {
        "plain": text,
        "fenced": f"Sure!\n```json\n{text}\n```\nHope that helps.",
        "chatty": f"I will do this: {text} - right?",
        "cut": text[: draw(st.integers(0, len(text)))],
        "noise": draw(WORDS),
    }[form]


def _jsonable(args):
    return Boundary().clean(args)


TEXTS = _texts()
TEXT_REPLIES = st.builds(Reply, TEXTS, usage=USAGES) | TEXTS
REPLIES = st.lists(NATIVE | NATIVE | TEXT_REPLIES | BATCHES | FAILURES, min_size=1, max_size=6)


# --- what hooks do ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raises:
    """The hook raises."""

    words: str

    def __call__(self, state):
        raise OSError(self.words)


@dataclass(frozen=True)
class Edits:
    """The hook changes the conversation behind the loop's back."""

    how: str
    number: int
    words: str = ""

    def __call__(self, state):
        talk = state.conversation
        if self.how == "truncate":
            talk.truncate(self.number)
        elif self.how == "append":
            talk.append(Message.of_text("user", self.words))
        elif self.how == "replace":
            talk.replace([Message.of_text("user", self.words), *list(talk)[self.number :]])
        elif self.how == "drop":
            talk.replace(m for i, m in enumerate(list(talk)) if i % 3 != self.number)
        else:
            talk.replace(reversed(list(talk)))


class ScriptedHook:
    """A hook that answers each method from a list, then says nothing more."""

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.answers = {method: list(said) for method, said in answers.items()}
        for method in answers:
            setattr(self, method, partial(self.answer, method))

    def answer(self, method, *args):
        """Return or do what is next."""
        said = self.answers[method]
        value = said.pop(0) if said else None
        if callable(value):
            state = next(a for a in args if hasattr(a, "budget_remaining"))
            return value(state)
        return value


RAISES = st.builds(Raises, WORDS)
EDITS = st.builds(
    Edits, st.sampled_from(["truncate", "append", "replace", "drop", "reverse"]), st.integers(0, 4), WORDS
)
ANYWHERE = st.none() | st.none() | st.builds(InjectContext, WORDS) | st.builds(Stop, st.just("enough"))
RESULTS = st.builds(ToolResult, st.just("add"), data=JSON_VALUES) | st.builds(ToolResult, st.just("add"), error=WORDS)
DENIALS = st.builds(Deny, WORDS) | st.builds(Deny, WORDS, retry=st.just(True)) | st.builds(Block, WORDS)
ARGUMENTS = st.builds(Allow, st.fixed_dictionaries({"a": st.integers(0, 9)}))
ANSWERS = {
    "pre_loop": ANYWHERE | WORDS,
    "pre_prompt": ANYWHERE | WORDS | st.builds(Continue, WORDS),
    "pre_dispatch": ANYWHERE | RESULTS | DENIALS | ARGUMENTS,
    "check_permission": ANYWHERE | st.booleans() | DENIALS | ARGUMENTS,
    "check_done": ANYWHERE | WORDS | st.builds(Block, WORDS),
    "post_dispatch": ANYWHERE
    | WORDS
    | RESULTS
    | st.builds(HookDecision, updated_result=RESULTS, additional_context=st.none() | WORDS),
    "should_stop": ANYWHERE | st.booleans() | st.sampled_from(["", "satisfied"]),
    "on_loop_end": st.none() | st.integers(0, 3),
}


@st.composite
def hook_answers(draw, *, raising=True, editing=False, methods=tuple(ANSWERS)):
    """Return what one hook answers: method → list."""
    chosen = draw(st.lists(st.sampled_from(methods), min_size=1, max_size=4, unique=True))
    answers = {}
    for method in chosen:
        one = ANSWERS[method]
        if editing and method != "on_loop_end":
            one = one | EDITS | EDITS
        if raising:
            one = one | one | one | RAISES
        answers[method] = draw(st.lists(one, min_size=1, max_size=6))
    return answers


# --- whole runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """A run as plain data; calling it with `is_async=` makes fresh arguments of the loop."""

    replies: list[Any]
    hooks: list[dict[str, list[Any]]] = field(default_factory=list)
    task: dict[Any, Any] = field(default_factory=lambda: {"goal": "g"})
    native: bool = True
    config: dict[str, Any] = field(default_factory=dict)

    def __call__(self, is_async: bool) -> dict[str, Any]:
        return {
            "llm": self.backend(is_async),
            "task": self.task,
            "tools": make_odd_tools(),
            "hooks": [ScriptedHook(answers) for answers in self.hooks],
            "config": LoopConfig(**self.config),
        }

    def backend(self, is_async: bool) -> Any:
        """Return a backend that plays the script."""
        if self.native:
            return (AsyncScriptedBackend if is_async else ScriptedBackend)(self.replies)
        return (AsyncMockLLMBackend if is_async else MockLLMBackend)(self.replies, cycle=False)


CONFIGS = st.fixed_dictionaries(
    {"max_steps": st.integers(0, 8)},
    optional={
        "system_prompt": WORDS,
        "concurrent_dispatch": st.booleans(),
        "max_parallel_calls": st.integers(1, 3),
        "parse_recovery": st.integers(0, 2),
        "gate_failures": st.integers(1, 3),
        "max_tokens": st.integers(1, 9),
        "temperature": st.floats(0, 1),
    },
)
TASKS = st.dictionaries(WORDS, JSON_VALUES, max_size=3)


@st.composite
def scripts(draw, *, raising=True, editing=False, methods=tuple(ANSWERS)):
    """Return a whole `Script`."""
    native = draw(st.booleans() | st.just(True))
    plain = st.lists(TEXTS | FAILURES, min_size=1, max_size=6)
    hooks = st.lists(hook_answers(raising=raising, editing=editing, methods=methods), max_size=2)
    return Script(draw(REPLIES if native else plain), draw(hooks), draw(TASKS), native, draw(CONFIGS))

"""Whatever a run consists of: sync and async say the same, live objects and the file say the same, every span ends."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import attach, detach
from strategies import Script, scripts
from support import both, outcome_of, run_async, run_sync

from looplet import ProvenanceSink, async_composable_loop, composable_loop
from looplet.prompt import render
from looplet.telemetry import semconv

EXAMPLES = int(os.environ.get("LOOPLET_EXAMPLES", "0"))
"""of each property; set it to search longer, and elsewhere each time"""


def moderate(examples: int) -> settings:
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Left(Exception):
    """Raised in the caller's body."""


@dataclass(frozen=True)
class Exit:
    """How the caller leaves a run: `how` at step `number`."""

    how: str
    number: int

    def __call__(self, step) -> bool:
        """Serve as the body of a loop: return True to break."""
        if self.how == "raise" and step.number >= self.number:
            raise Left("out of here")
        return self.how == "break" and step.number >= self.number


EXITS = st.just(Exit("stay", 0)) | st.builds(Exit, st.sampled_from(["stay", "break", "raise"]), st.integers(1, 4))


# --- sync, async, file ------------------------------------------------------------------------------------------------


@moderate(250)
@given(scripts(), EXITS)
def test_sync_and_async_and_the_file_tell_the_same_story(script, leaving):
    both(script, leaving)


ENDINGS = {"done", "budget_exhausted", "llm_error"}
"""of runs that no hook and no caller steers"""


@moderate(150)
@given(scripts(), st.booleans())
def test_whatever_models_and_tools_do_is_no_exception_for_the_caller(script, is_async):
    with tempfile.TemporaryDirectory() as folder:
        outcome = (run_async if is_async else run_sync)(replace(script, hooks=[]), Path(folder))
    assert outcome.raised is None
    assert outcome.stop_reason in ENDINGS
    assert [step.number for step in outcome.steps] == list(range(1, len(outcome.steps) + 1))


# --- every span ends --------------------------------------------------------------------------------------------------


@dataclass
class Collector:
    """A sink that keeps the spans themselves."""

    spans: list[Any] = field(default_factory=list)
    attached: list[Any] = field(default_factory=list)
    detached: list[Any] = field(default_factory=list)

    @property
    def looplet_sink(self):
        return self

    def attach(self, recorder):
        self.attached.append(recorder)

    def on_end(self, span):
        self.spans.append(span)

    def durable(self):
        pass

    def detach(self, recorder):
        self.detached.append(recorder)


class StartCounter:
    """A tracer provider that records nothing but how many spans were started."""

    def __init__(self):
        self.started = Counter()

    def get_tracer(self, *args, **kwargs):
        return self

    def start_span(self, name, *args, **kwargs):
        self.started[name] += 1
        return trace.INVALID_SPAN


PARENT = trace.SpanContext(0xABCDEF << 64, 0x1234, True, trace.TraceFlags(1))
"""of the request that a run is part of"""


@contextmanager
def inside(parent: trace.SpanContext | None) -> Iterator[None]:
    """Make a span of somebody else's the current one, as a web framework does."""
    if parent is None:
        yield
        return
    token = attach(trace.set_span_in_context(trace.NonRecordingSpan(parent)))
    try:
        yield
    finally:
        detach(token)


def leave(run, leaving, seen):
    """Iterate without a `with` block and leave by `close()`; note what is current in the body."""
    for step in run:
        seen.append(trace.get_current_span().get_span_context().span_id)
        if leaving(step):
            run.close()


async def aleave(run, leaving, seen):
    async for step in run:
        seen.append(trace.get_current_span().get_span_context().span_id)
        if leaving(step):
            await run.aclose()


@moderate(120)
@given(scripts(editing=True), EXITS, st.booleans(), st.sampled_from([None, PARENT]))
def test_every_span_ends_once_in_one_tree_and_none_is_current_in_the_body(script, leaving, is_async, parent):
    sink, counter, seen = Collector(), StartCounter(), []
    arguments = script(is_async=is_async)
    arguments.update(hooks=[*arguments["hooks"], sink], tracer_provider=counter)
    with inside(parent), suppress(Exception):
        if is_async:
            run = async_composable_loop(**arguments)
            asyncio.run(aleave(run, leaving, seen))
        else:
            run = composable_loop(**arguments)
            leave(run, leaving, seen)
    with suppress(OSError):  # of a hook that raises at the end
        if run.stop_reason is None:  # an exception in the body of a bare `for`: nobody has closed the run yet
            asyncio.run(run.aclose()) if is_async else run.close()
    assert Counter(span.name for span in sink.spans) == counter.started
    assert [r.open for r in sink.attached] == [{}]
    assert sink.detached == sink.attached
    assert set(seen) <= {parent.span_id if parent else 0}
    check_tree(sink.spans, run.run_id, parent)


def check_tree(spans, run_id, parent):
    """Require one root, no orphan, no id twice, the run's id everywhere and the turn's number below a turn."""
    by_id = {span.context.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    assert len({span.context.trace_id for span in spans}) == 1
    (root,) = (span for span in spans if span.parent is None or span.parent.span_id not in by_id)
    assert root.name.startswith(semconv.INVOKE_AGENT)
    assert root.parent == parent
    assert root.attributes[semconv.STOP_REASON]
    for span in spans:
        assert span.attributes[semconv.RUN_ID] == run_id
        assert span.start_time <= span.end_time
        above = turn_above(span, by_id)
        assert span.attributes.get(semconv.TURN_NUMBER) == (above and above.attributes[semconv.TURN_NUMBER])


def turn_above(span, by_id):
    while span is not None and span.name != semconv.TURN:
        span = by_id.get(span.parent.span_id) if span.parent else None
    return span


# --- two at once ------------------------------------------------------------------------------------------------------


def take_turns(runs, order):
    """Advance the runs in `order`, then each to its end; return their steps and what they raised."""
    steps, raised = [[] for _ in runs], [None for _ in runs]

    def advance(which):
        try:
            steps[which].append(next(runs[which]))
        except StopIteration:
            return False
        except Exception as error:
            raised[which] = type(error).__name__
            return False
        return True

    for which in order:
        advance(which)
    for which in range(len(runs)):
        while advance(which):
            pass
    return steps, raised


@moderate(60)
@given(scripts(), scripts(), st.lists(st.integers(0, 1), max_size=12), st.sampled_from([None, PARENT]))
def test_interleaved_runs_never_mix(one, other, order, parent):
    pair = [one, other]
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(4)]
        alone = [run_sync(script, folder) for script, folder in zip(pair, folders, strict=False)]
        stack.enter_context(inside(parent))
        runs = []
        for script, folder in zip(pair, folders[2:], strict=True):
            arguments = script(is_async=False)
            arguments["hooks"].append(ProvenanceSink(folder))
            runs.append(composable_loop(**arguments))
        steps, raised = take_turns(runs, order)
        for which, run in enumerate(runs):
            outcome = outcome_of(run, steps[which], raised[which], folders[2 + which])
            assert outcome.tree == alone[which].tree
            assert outcome.steps == alone[which].steps
            assert outcome.live == outcome.saved
            assert {node.run_id for node in outcome.trace.spans} == {run.run_id}
            if parent is not None:
                assert {node.record.trace_id for node in outcome.trace.spans} == {f"{parent.trace_id:032x}"}


# --- the request log --------------------------------------------------------------------------------------------------


class Wiretap:
    """A backend that keeps what it was sent, as it was then."""

    def __init__(self, inner):
        self.inner = inner
        self.model, self.provider = inner.model, inner.provider
        self.wire: list[tuple[str, Any]] = []


class ChatWiretap(Wiretap):
    def chat(self, messages, *, system_prompt, tools, max_tokens=None, temperature=None):
        self.wire.append((system_prompt, [message.to_dict() for message in messages]))
        return self.inner.chat(messages)


class TextWiretap(Wiretap):
    def generate(self, prompt, *, system_prompt, max_tokens=None, temperature=None):
        self.wire.append((system_prompt, prompt))
        return self.inner.generate(prompt)


@dataclass(frozen=True)
class Tapped:
    """A script whose backend keeps what it was sent, in `wires`; `rewrites` adds a hook that rewrites requests."""

    script: Script
    wires: list[Wiretap]
    rewrites: list[str] = field(default_factory=list)

    def __call__(self, is_async):
        arguments = self.script(is_async=False)
        if is_async:  # a sync backend on looplet's own thread
            arguments["hooks"] = self.script(is_async=True)["hooks"]
        tap = (ChatWiretap if self.script.native else TextWiretap)(arguments["llm"])
        self.wires.append(tap)
        rewriting = [Rewriter(list(self.rewrites))] if self.rewrites else []
        return {**arguments, "llm": tap, "hooks": [*rewriting, *arguments["hooks"]]}


def sent_according_to(view, tap) -> list[tuple[str, Any]]:
    """Return what the trace says that the backend got; raises TraceError where a hash does not fit."""
    out = []
    for chat in view.chats:
        messages = view.request(chat)
        system = ""
        if messages and messages[0].role == "system":
            system, messages = messages[0].text, messages[1:]
        text = isinstance(tap, TextWiretap)
        out.append((system, render(messages) if text else [message.to_dict() for message in messages]))
    return out


@moderate(150)
@given(scripts(editing=True), st.booleans())
def test_requests_are_rebuilt_from_the_file_as_they_were_sent(script, is_async):
    wires: list[Wiretap] = []
    with tempfile.TemporaryDirectory() as folder:
        outcome = (run_async if is_async else run_sync)(Tapped(script, wires), Path(folder))
        (view,) = outcome.trace.runs
        assert sent_according_to(view, wires[0]) == wires[0].wire
        assert outcome.live == outcome.saved


class Rewriter:
    """A hook that rewrites the request line by line, or message by message, or adds to it, or leaves it alone."""

    def __init__(self, hows):
        self.hows = hows

    def pre_prompt(self, state, log, context, step):
        how = self.hows.pop(0) if self.hows else "lines"
        if how == "lines":
            lines = context.split("\n")
            return "\n".join(line if line.startswith("═══") else re.sub("[aeiou]", "*", line) for line in lines)
        if how == "messages":
            return context.rewrite(lambda text: text.upper())
        return "an addition" if how == "add" else None


HOWS = st.lists(st.sampled_from(["lines", "messages", "add", "none"]), min_size=1, max_size=5)
STEERING = ("pre_dispatch", "check_permission", "check_done", "post_dispatch", "should_stop", "on_loop_end")


@moderate(100)
@given(scripts(methods=STEERING), HOWS)
def test_rewritten_requests_are_the_ones_in_the_file(script, hows):
    wires: list[Wiretap] = []
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        sync = run_sync(Tapped(script, wires, hows), Path(one))
        other = run_async(Tapped(script, wires, hows), Path(two))
        for outcome, tap in zip((sync, other), wires, strict=True):
            (view,) = outcome.trace.runs
            assert sent_according_to(view, tap) == tap.wire
    assert wires[0].wire == wires[1].wire
    assert sync.steps == other.steps
    assert sync.tree == other.tree
    assert sync.raised == other.raised
    assert [(s.number, s.tool_call) for s in sync.live.steps] == [(s.number, s.tool_call) for s in sync.saved.steps]


# --- the folder -------------------------------------------------------------------------------------------------------


def readable(folder: Path) -> dict[str, bytes]:
    """Return the files that do not tell ids and times."""
    files = [*folder.glob("call_*.txt"), *folder.glob("steps/*.json")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@moderate(60)
@given(scripts(editing=True), EXITS)
def test_two_identical_runs_have_identical_folders(script, leaving):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        first, second = (run_sync(script, Path(folder), leaving) for folder in (one, two))
        for folder in (one, two):
            ProvenanceSink(folder).flush()
        assert readable(Path(one)) == readable(Path(two))
        assert len(list(Path(one).glob("steps/*.json"))) == len(first.live.steps) == len(second.live.steps)
        assert len(list(Path(one).glob("call_*.txt"))) == 2 * len(first.trace.runs[0].chats)

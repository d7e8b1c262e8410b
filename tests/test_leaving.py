"""Every way out of a run, sync and async: one root, its stop reason, each span ended once, nothing left current."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import threading
import weakref
from pathlib import Path
from textwrap import dedent, indent

import pytest
from opentelemetry import trace as trace_api
from support import CountingProvider, add, look, python, require_whole

from looplet import (
    ConfigError,
    HookDecision,
    ProvenanceSink,
    Trace,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.testing import AsyncScriptedBackend, ScriptedBackend

HERE = Path(__file__).parent
ADD = ("add", {"a": 1, "b": 2})
DONE = ("done", {"answer": "3"})
BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
HOOKS = ["pre_loop", "pre_prompt", "pre_dispatch", "check_permission", "check_done", "post_dispatch", "should_stop"]


class Place:
    """A folder for one trace file, and runs that are written to it and counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.provider = CountingProvider()
        self.sink = ProvenanceSink(folder)

    def run(self, is_async, replies=(ADD, ADD, DONE), *, llm=None, tools=(), hooks=(), **settings):
        backend = llm or (AsyncScriptedBackend(replies) if is_async else ScriptedBackend(replies))
        registry = tools_from([*tools, add, look], include_done=True)
        settings |= {"hooks": [*hooks, self.sink], "tracer_provider": self.provider}
        return (async_composable_loop if is_async else composable_loop)(backend, {"goal": "g"}, registry, **settings)

    def whole(self, reason: str) -> Trace:
        assert trace_api.get_current_span() is trace_api.INVALID_SPAN
        return require_whole(self.folder, self.provider, reason)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "traces")


def hook(**methods):
    """Return a hook with these methods; each gets only what the run passes."""
    return type("Hook", (), {name: staticmethod(function) for name, function in methods.items()})()


def raises(error):
    def fail(*args):
        raise error

    return fail


async def anext_of(run):
    return await anext(run)


async def steps_of(run):
    return [step async for step in run]


def go(run):
    """Iterate to the end; return the steps."""
    return asyncio.run(steps_of(run)) if hasattr(run, "__anext__") else list(run)


def anonymous(run, body):
    for step in run():
        if body(step):
            break


def closed(run, body):
    held = run()
    for step in held:
        if body(step):
            break
    held.close()


def within(run, body):
    with run() as held:
        for step in held:
            if body(step):
                break


async def async_anonymous(run, body):
    async for step in run():
        if body(step):
            break


async def async_closed(run, body):
    held = run()
    async for step in held:
        if body(step):
            break
    await held.aclose()


async def async_within(run, body):
    async with run() as held:
        async for step in held:
            if body(step):
                break


STYLES = [anonymous, closed, within, async_anonymous, async_closed, async_within]


def leave(place, style, body=lambda step: True, **settings):
    """Leave a run without a word, by closing it, or with a `with` block; nobody else holds it."""
    is_async = style.__name__.startswith("async")
    leaving = style(lambda: place.run(is_async, **settings), body)
    if is_async:
        asyncio.run(leaving)


# --- by itself ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "done"),
        ({"max_steps": 2}, "budget_exhausted"),
        ({"hooks": [hook(post_dispatch=lambda *args: HookDecision(stop="enough"))]}, "enough"),
        ({"hooks": [hook(should_stop=lambda *args: "tired")]}, "tired"),
        ({"hooks": [hook(should_stop=lambda *args: True)]}, "hook_requested_stop"),
        ({"replies": [ADD, ConnectionError("down")]}, "llm_error"),
    ],
)
def test_a_run_that_ends_by_itself(place, is_async, settings, reason):
    run = place.run(is_async, **settings)
    go(run)
    assert (run.stop_reason, run.result.stop_reason) == (reason, reason)
    place.whole(reason)


# --- the caller leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_run_that_is_left(place, style):
    ended = []
    leave(place, style, hooks=[hook(on_loop_end=lambda *args: ended.append("bye"))])
    place.whole("closed_by_caller")
    assert ended == ["bye"]


@pytest.mark.parametrize("style", STYLES)
def test_an_exception_in_the_body(place, style):
    def body(step):
        raise LookupError

    with pytest.raises(LookupError):
        leave(place, style, body)
    gc.collect()  # the run that nobody closed is in the traceback's frames until here
    place.whole("exception_in_body" if style in (within, async_within) else "closed_by_caller")


def test_close_twice_and_before_the_first_step(place):
    early = place.run(False)
    early.close()
    early.close()
    assert (early.stop_reason, early.trace_id, list(early)) == ("closed_by_caller", None, [])
    assert not place.folder.exists()
    run = place.run(False)
    next(run)
    run.close()
    run.close()
    assert (run.stop_reason, list(run), run.result.stop_reason) == ("closed_by_caller", [], "closed_by_caller")
    place.whole("closed_by_caller")


def test_aclose_twice_and_before_the_first_step(place):
    async def main():
        early, run = place.run(True), place.run(True)
        await early.aclose()
        await early.aclose()
        assert [step async for step in early] == []
        await anext(run)
        await run.aclose()
        await run.aclose()
        assert [step async for step in run] == []
        return early.stop_reason, run.stop_reason

    assert asyncio.run(main()) == ("closed_by_caller", "closed_by_caller")
    place.whole("closed_by_caller")


@pytest.mark.parametrize("method", [*HOOKS, "on_loop_end"])
def test_close_from_inside_a_hook(place, method):
    run = place.run(False, [ADD, DONE], hooks=[hook(**{method: lambda *args: run.close()})])
    list(run)
    reason = "done" if method == "on_loop_end" else "closed_by_caller"
    assert run.stop_reason == reason
    place.whole(reason)


@pytest.mark.parametrize("method", [*HOOKS, "on_loop_end"])
def test_aclose_from_inside_a_hook(place, method):
    async def close(*args):
        await run.aclose()

    run = place.run(True, [ADD, DONE], hooks=[hook(**{method: close})])
    go(run)
    reason = "done" if method == "on_loop_end" else "closed_by_caller"
    assert run.stop_reason == reason
    place.whole(reason)


def test_close_from_another_thread_keeps_the_call_that_was_running(place):
    begun, closed = threading.Event(), threading.Event()

    @tool
    def work() -> str:
        """Work until somebody has closed the run."""
        begun.set()
        assert closed.wait(5)
        return "finished"

    def close():
        assert begun.wait(5)
        run.close()
        closed.set()

    run = place.run(False, [("work", {}), ADD, DONE], tools=[work])
    closer = threading.Thread(target=close)
    closer.start()
    assert list(run) == []
    closer.join()
    assert [step.tool_result.data for step in run.state.steps] == ["finished"]
    trace = place.whole("closed_by_caller")
    assert [step.tool_result.data for step in trace.runs[0].steps] == ["finished"]


BUSY = [ADD, [("look", {"name": "a"})] * 3, ("wait", {})] * 15


@tool(timeout_s=0.001)
async def wait() -> None:
    """Wait, about as long as it may."""
    await asyncio.sleep(0.0009)


def test_close_from_another_thread_at_any_moment(tmp_path):
    dice = random.Random(7)
    for number in range(60):
        place = Place(tmp_path / str(number))
        run = place.run(False, [*BUSY, DONE], tools=[wait], max_steps=99)
        closer = threading.Timer(dice.uniform(0.0005, 0.01), run.close)
        closer.start()
        list(run)
        closer.join()
        if run.trace_id is not None:  # it had begun
            place.whole(run.stop_reason)
        assert run.stop_reason in ("closed_by_caller", "done")


def test_aclose_and_cancellation_at_any_moment(tmp_path):
    dice = random.Random(7)

    async def main():
        for number in range(60):
            place = Place(tmp_path / str(number))
            run = place.run(True, [*BUSY, DONE], tools=[wait], max_steps=99)
            task = asyncio.ensure_future(steps_of(run))
            await asyncio.sleep(dice.uniform(0.0005, 0.01))
            await run.aclose() if number % 2 else task.cancel()
            await asyncio.sleep(dice.uniform(0, 0.002))
            if number % 3 == 0:
                task.cancel()
            await asyncio.wait([task])
            place.whole(run.stop_reason)
            assert run.stop_reason in ("closed_by_caller", "cancelled", "done")

    asyncio.run(main(), debug=True)


@pytest.mark.parametrize("kind", ["sync tool", "async tool", "async backend"])
def test_aclose_from_another_task_while_a_step_is_awaited(place, kind):
    begun, closed = threading.Event(), threading.Event()

    async def wait():
        begun.set()
        while not closed.is_set():
            await asyncio.sleep(0)

    @tool(name="work")
    def work() -> str:
        """Work in a thread."""
        begun.set()
        assert closed.wait(5)
        return "finished"

    @tool(name="work")
    async def async_work() -> str:
        """Work in the loop."""
        await wait()
        return "finished"

    class Backend(AsyncScriptedBackend):
        async def chat(self, messages, **settings):
            if kind == "async backend":
                await wait()
            return await super().chat(messages)

    async def main():
        run = place.run(True, llm=Backend([("work", {}), DONE]), tools=[async_work if kind == "async tool" else work])
        step = asyncio.ensure_future(anext(run))
        while not begun.is_set():
            await asyncio.sleep(0)
        await run.aclose()
        closed.set()
        with pytest.raises(StopAsyncIteration):
            await step
        return run

    run = asyncio.run(main())
    assert run.stop_reason == "closed_by_caller"
    trace = place.whole("closed_by_caller")
    assert len(trace.runs[0].steps) == (0 if kind == "async backend" else 1)


# --- something raises -----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("method", [*HOOKS, "on_loop_end"])
def test_an_exception_in_a_hook(place, is_async, method):
    run = place.run(is_async, [ADD, DONE, DONE, DONE], hooks=[hook(**{method: raises(OSError("broken"))})])
    if method == "check_permission":  # a gate that raises has said no, three times at most
        run = place.run(is_async, [ADD] * 4, hooks=[hook(**{method: raises(OSError("broken"))})])
    with pytest.raises(OSError, match="broken"):
        go(run)
    assert run.stop_reason == "error"
    place.whole("error")


@BOTH
@pytest.mark.parametrize("method", [*HOOKS, "on_loop_end"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_hook(place, is_async, method, error):
    run = place.run(is_async, [ADD, DONE], hooks=[hook(**{method: raises(error)})])
    with pytest.raises(error):
        go(run)
    assert run.stop_reason == "cancelled"
    place.whole("cancelled")


@BOTH
def test_an_interrupt_in_a_tool(place, is_async):
    ended = []
    broken = tool(name="broken")(raises(KeyboardInterrupt))
    run = place.run(
        is_async, [ADD, ("broken", {}), DONE], tools=[broken], hooks=[hook(on_loop_end=lambda *a: ended.append(1))]
    )
    with pytest.raises(KeyboardInterrupt):
        go(run)
    assert (run.stop_reason, ended) == ("cancelled", [1])
    (span,) = place.whole("cancelled").find("execute_tool broken")
    assert (span.is_error, span.attributes[semconv.ERROR_TYPE]) == (True, "cancelled")


@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_backend(place, is_async, error):
    class Backend:
        def chat(self, messages, **settings):
            raise error

    class AsyncBackend:
        async def chat(self, messages, **settings):
            raise error

    run = place.run(is_async, llm=AsyncBackend() if is_async else Backend())
    with pytest.raises(error):
        go(run)
    assert run.stop_reason == "cancelled"
    place.whole("cancelled")


@BOTH
@pytest.mark.parametrize("how", ["sync", "async", "timed", "async timed", "parallel", "async parallel", "own task"])
def test_an_exit_in_a_tool_is_an_observation(place, is_async, how):
    settings = {"timeout_s": 5.0} if "timed" in how else {"concurrent_safe": True} if "parallel" in how else {}

    def leave_here() -> str:
        """Exit."""
        sys.exit("enough")

    async def leave_there() -> str:
        """Exit, from a coroutine."""
        sys.exit("enough")

    async def leave_elsewhere() -> str:
        """Exit, from a task."""

        async def leave_now():
            sys.exit("enough")

        return await asyncio.create_task(leave_now())

    if how == "own task" and is_async:
        pytest.skip("asyncio itself ends an event loop in which a task exits")
    function = leave_elsewhere if how == "own task" else leave_there if "async" in how else leave_here
    call = ("leave", {})
    run = place.run(
        is_async,
        [[call, call] if "parallel" in how else call, ADD, DONE],
        tools=[tool(name="leave", **settings)(function)],
    )
    steps = go(run)
    assert steps[0].tool_result.error == "SystemExit: enough"
    assert run.stop_reason == "done"
    place.whole("done")


# --- cancellation ---------------------------------------------------------------------------------------------------


def waits_in(where: str, begun: threading.Event, release: threading.Event):
    """Return the arguments of a run that gets stuck there."""

    async def stuck(*args, **kwargs):
        begun.set()
        await asyncio.sleep(5)  # for good, but for a goodbye that comes after the time-out that was to end it

    def stuck_thread(*args, **kwargs):
        begun.set()
        release.wait(5)

    async def async_work():
        await stuck()

    def work():
        stuck_thread()

    if where.startswith("hook "):
        return {"replies": [ADD, DONE], "hooks": [hook(**{where.removeprefix("hook "): stuck})]}
    if where.endswith("backend"):
        return {"llm": type("Backend", (), {"chat": stuck if where == "async backend" else stuck_thread})()}
    how = {"timed tool": {"timeout_s": 30}, "parallel tools": {"concurrent_safe": True}}.get(where, {})
    waiting = async_work if where in ("async tool", "timed tool") else work
    calls = [("work", {})] * (2 if where == "parallel tools" else 1)
    return {"replies": [calls, DONE], "tools": [tool(name="work", description="Wait.", **how)(waiting)]}


PLACES = ["async backend", "sync backend", "sync tool", "async tool", "timed tool", "parallel tools"]


@pytest.mark.parametrize("where", [*PLACES, *(f"hook {method}" for method in [*HOOKS, "on_loop_end"])])
@pytest.mark.parametrize("how", ["cancel", "wait_for", "timeout"])
def test_a_cancelled_run(place, where, how):
    begun, release = threading.Event(), threading.Event()
    run = place.run(True, **waits_in(where, begun, release))

    async def main():
        if how == "wait_for":
            return await asyncio.wait_for(steps_of(run), 0.02)
        if how == "timeout":
            async with asyncio.timeout(0.02):
                return await steps_of(run)
        task = asyncio.ensure_future(steps_of(run))
        while not begun.is_set():
            await asyncio.sleep(0)
        task.cancel()
        return await task

    with pytest.raises(asyncio.CancelledError if how == "cancel" else TimeoutError):
        asyncio.run(main())
    assert run.stop_reason == "cancelled"
    before = place.whole("cancelled").path
    size = (place.folder / "trace.jsonl").stat().st_size
    release.set()
    assert (before, (place.folder / "trace.jsonl").stat().st_size) == (str(place.folder / "trace.jsonl"), size)


@pytest.mark.parametrize("where", PLACES)
def test_a_step_that_nobody_awaits_any_more(place, where):
    """The awaiting coroutine is closed: what a garbage collector does to it when its event loop is gone."""
    begun, release = threading.Event(), threading.Event()
    said = []
    settings = waits_in(where, begun, release)
    settings["hooks"] = [hook(on_loop_end=lambda *args: said.append("bye"))]
    run = place.run(True, **settings)

    async def main():
        step = run.__anext__()
        step.send(None)
        while not begun.is_set():
            await asyncio.sleep(0)
        step.close()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    release.set()
    for task in asyncio.all_tasks(loop):
        loop.run_until_complete(asyncio.wait([task]))
    loop.close()
    assert (run.stop_reason, said) == ("cancelled", ["bye"])
    place.whole("cancelled")


# --- dropped --------------------------------------------------------------------------------------------------------


class Box:
    """Something to be in a reference cycle with."""


@BOTH
@pytest.mark.parametrize("how", ["del", "cycle", "cycle, other thread", "plan first"])
def test_a_dropped_run(place, is_async, how):
    said = []
    goodbye = hook(on_loop_end=lambda *args: said.append(threading.current_thread().name))
    run = place.run(is_async, hooks=[goodbye])
    asyncio.run(anext_of(run)) if is_async else next(run)
    gone = weakref.ref(run)
    if how == "plan first":  # the collector finalises in no particular order
        run._plan.close()
    elif how != "del":
        box = Box()
        box.run, run.box = run, box
        del box
    gc.disable()
    try:
        del run
        if how == "cycle, other thread":
            collector = threading.Thread(target=gc.collect)
            collector.start()
            collector.join()
        elif how == "cycle":
            gc.collect()
    finally:
        gc.enable()
    assert gone() is None
    (end,) = place.whole("closed_by_caller").find("looplet.end")
    skipped = [event.attributes for event in end.events if event.name == semconv.EVENT_HOOK_SKIPPED]
    at_home = how in ("del", "cycle")
    assert said == (["MainThread"] if at_home else [])
    assert [told[semconv.HOOK_NAME] for told in skipped] == ([] if at_home else ["Hook"])


@BOTH
def test_an_async_hook_cannot_be_asked_when_a_run_is_dropped_and_the_trace_says_so(place, is_async):
    async def goodbye(*args):
        raise AssertionError

    run = place.run(is_async, hooks=[hook(on_loop_end=goodbye)])
    asyncio.run(anext_of(run)) if is_async else next(run)
    del run
    (end,) = place.whole("closed_by_caller").find("looplet.end")
    assert [event.name for event in end.events] == [semconv.EVENT_HOOK_SKIPPED]


@BOTH
def test_a_hook_that_raises_while_a_run_is_dropped_is_reported_by_python(place, is_async, monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda caught: reported.append(repr(caught.exc_value)))
    run = place.run(is_async, hooks=[hook(on_loop_end=raises(OSError("broken")))])
    asyncio.run(anext_of(run)) if is_async else next(run)
    del run
    assert reported == ["OSError('broken')"]
    place.whole("error")


@BOTH
def test_async_observers_cannot_be_awaited_when_the_plan_is_collected_first(place, is_async):
    class Observer:
        async def on_phase_end(self, end):
            await asyncio.sleep(0)

    run = place.run(is_async, hooks=[Observer()])
    asyncio.run(anext_of(run)) if is_async else next(run)
    run._plan.close()
    del run
    gc.collect()
    place.whole("closed_by_caller")


def test_a_run_whose_plan_is_in_its_end_phase_can_still_be_dropped(place):
    async def stuck(*args):
        await asyncio.Event().wait()

    said = []
    hooks = [hook(on_loop_end=stuck), hook(on_loop_end=lambda *args: said.append("second"))]
    run = place.run(True, [DONE], hooks=hooks)

    async def main():
        assert (await anext(run)).number == 1
        step = run.__anext__()
        step.send(None)
        step.close()

    asyncio.run(main())
    assert (run.stop_reason, said) == ("done", ["second"])
    (end,) = place.whole("done").find("looplet.end")
    assert [event.name for event in end.events] == [semconv.EVENT_HOOK_SKIPPED]


# --- processes ------------------------------------------------------------------------------------------------------

SCRIPT = """
    import asyncio, gc, multiprocessing, os, sys, threading
    from pathlib import Path
    from looplet import *
    from looplet.testing import AsyncScriptedBackend, ScriptedBackend

    folder = Path(sys.argv[1])
    sink = ProvenanceSink(folder)
    ADD, DONE = ("add", {"a": 1, "b": 2}), ("done", {"answer": "3"})

    class Goodbye:
        def on_loop_end(self, *args):
            print("bye", flush=True)

    class AsyncGoodbye:
        async def on_loop_end(self, *args):
            print("bye", flush=True)

    @tool
    def add(a: int, b: int) -> int:
        "Add."
        return a + b

    def make(loop=composable_loop, backend=ScriptedBackend, hooks=(), tools=(), script=(ADD, DONE), sink=sink):
        return loop(backend(script), {}, tools_from([add, *tools], include_done=True), hooks=[*hooks, sink])
"""


def script(body: str, folder: Path) -> str:
    """Run SCRIPT and `body` in a process of its own; return what it printed, fail if it complains."""
    done = python("-X", "dev", "-W", "error", "-c", dedent(SCRIPT) + dedent(body), folder)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


EXITS = {
    "sync": ("run = make(hooks=[Goodbye()]); next(run)", "bye\n"),
    "async": (
        "run = make(async_composable_loop, AsyncScriptedBackend, [Goodbye()]); asyncio.run(main(run))",
        "bye\n",
    ),
    "sync, async hook": ("run = make(hooks=[AsyncGoodbye()]); next(run)", ""),
    "async, async hook": (
        "run = make(async_composable_loop, AsyncScriptedBackend, [AsyncGoodbye()]); asyncio.run(main(run))",
        "",
    ),
    "private loop": ("run = make(hooks=[Looper(), AsyncGoodbye()]); next(run)", ""),
    "another thread": (
        "run = make(hooks=[Goodbye()]); t = threading.Thread(target=next, args=[run]); t.start(); t.join()",
        "",
    ),
}


@pytest.mark.parametrize("how", EXITS)
def test_an_open_run_at_interpreter_exit(tmp_path, how):
    body, printed = EXITS[how]
    helpers = """
        async def main(run):
            await anext(run)

        class Looper:
            looplet_rewrites = False

            async def pre_prompt(self, *args):
                await asyncio.sleep(0)
    """
    assert script(dedent(helpers) + body, tmp_path) == printed
    trace = Trace.load(tmp_path)
    (root,) = trace.roots
    assert root.attributes[semconv.STOP_REASON] == "interpreter_exit"
    (end,) = trace.find("looplet.end")
    assert [event.name for event in end.events] == ([] if printed else [semconv.EVENT_HOOK_SKIPPED])


def test_a_run_that_another_thread_is_in_at_interpreter_exit(tmp_path):
    script(
        """
        begun = threading.Event()

        @tool
        def stuck():
            "Never come back."
            begun.set()
            threading.Event().wait()

        run = make(tools=[stuck], script=[("stuck", {})])
        threading.Thread(target=list, args=[run], daemon=True).start()
        begun.wait()
        """,
        tmp_path,
    )
    (root,) = Trace.load(tmp_path).roots
    assert root.attributes[semconv.STOP_REASON] == "interpreter_exit"
    (stuck,) = Trace.load(tmp_path).find("execute_tool stuck")
    assert stuck.attributes[semconv.STOP_REASON] == "interpreter_exit"


def test_a_forked_child_leaves_the_run_of_its_parent_alone(tmp_path):
    said = script(
        """
        run = make(hooks=[Goodbye()])
        next(run)
        before = sink.path.read_bytes()
        if os.fork() == 0:
            try:
                next(run)
            except ConfigError as error:
                print(error, flush=True)
            run.close()
            own = make()
            assert [step.number for step in own] == [1, 2]
            assert (sink.path.parent, sink.path.name) == (folder, f"trace-{own.run_id}.jsonl")
            again = make()
            assert [step.number for step in again] == [1, 2]
            del run
            gc.collect()
            sys.exit()
        os.wait()
        assert sink.path.read_bytes() == before
        list(run)
        """,
        tmp_path,
    )
    assert said == "this run belongs to the parent process; start a new one after the fork\nbye\n"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert (len(names), names[-1]) == (3, "trace.jsonl")
    for name in names:
        trace = Trace.load(tmp_path / name)
        assert [root.attributes[semconv.STOP_REASON] for root in trace.roots] == ["done"]
        assert trace.problems == []


FORKS = {
    "os.fork, child exits": """
        if os.fork() == 0:
            sys.exit(7)
        return os.wait()[1] // 256
    """,
    "os.fork, child returns": """
        if os.fork() == 0:
            return "child"
        return os.wait()[1] // 256
    """,
    "multiprocessing": """
        child = multiprocessing.get_context("fork").Process(target=in_child)
        child.start()
        child.join()
        return child.exitcode
    """,
}


@pytest.mark.parametrize("how", FORKS)
@BOTH
def test_a_fork_inside_a_tool(tmp_path, how, is_async):
    tools = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads

        def in_child():
            assert [step.number for step in make()] == [1, 2]
            gc.collect()
            os._exit(7)

        @tool
        def fork() -> int:
            "Fork."
    """
    said = script(
        dedent(tools)
        + indent(dedent(FORKS[how]), "    ")
        + dedent(f"""
        kinds = [(composable_loop, ScriptedBackend), (async_composable_loop, AsyncScriptedBackend)]
        run = make(*kinds[{is_async:d}], [Goodbye()], [fork], [("fork", {{}}), DONE])

        async def main():
            return [step async for step in run]

        try:
            steps = asyncio.run(main()) if {is_async} else list(run)
        except ConfigError:
            os._exit(7)
        print(steps[0].tool_result.data)
        """),
        tmp_path,
    )
    in_a_thread = is_async and how != "multiprocessing"  # where the child ends with its only thread
    assert said == f"bye\n{0 if in_a_thread else 7}\n"
    trace = Trace.load(tmp_path)
    assert trace.problems == []
    assert [root.attributes[semconv.STOP_REASON] for root in trace.roots] == ["done"]
    others = [path for path in tmp_path.iterdir() if path.name != "trace.jsonl"]
    assert len(others) == (1 if how == "multiprocessing" else 0)


def test_a_run_collected_while_the_sink_encodes_does_not_lock_up(tmp_path):
    said = script(
        """
        from looplet.telemetry.recorder import Resource

        class Collecting(dict):
            "Attributes whose encoding makes the garbage collector run, with a dropped run for it to find."

            def items(self):
                run = make(hooks=[Goodbye()])
                next(run)
                run.itself = run
                del run
                gc.collect()
                return super().items()

        gc.disable()
        run = make()
        next(run)
        resource = Resource(Collecting({"service.name": "x"}))
        for span in run._scope.trace.recorder.open.values():
            span.resource = resource
        print(len(list(run)))
        """,
        tmp_path,
    )
    assert said == "bye\n1\n"
    reasons = [root.attributes[semconv.STOP_REASON] for root in Trace.load(tmp_path).roots]
    assert sorted(reasons) == ["closed_by_caller", "done"]


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_a_thousand_real_interrupts(tmp_path, capsys):
    done = python(HERE / "interrupted_runs.py", tmp_path, 7, 1000)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        sys.stdout.write(f"\ninterrupted: {found}\n")
    assert found["current"] == 0
    assert found["next run failed"] == 0
    assert found["interrupted"] >= 900
    assert found["damaged"] + found["not whole"] + found["spans left open"] <= 10


def test_an_interrupted_start_of_a_thread_is_an_interrupt(tmp_path):
    done = python(HERE / "interrupted_workers.py", 7, 6000)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"started", "KeyboardInterrupt"}, found


def test_ctrl_c_does_not_wait_for_stuck_tools(tmp_path):
    for how in ("sync", "timed", "parallel", "async", "async parallel", "under async for"):
        done = python("-X", "dev", "-W", "error", HERE / "interrupted_runs.py", tmp_path / how, how)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "cancelled\n"), how
        assert [root.attributes[semconv.STOP_REASON] for root in Trace.load(tmp_path / how).roots] == ["cancelled"]


def test_a_run_is_iterated_by_one_at_a_time(place):
    run = place.run(False, hooks=[hook(pre_prompt=lambda *args: next(run))])
    with pytest.raises(ConfigError, match="being iterated already"):
        next(run)
    place.whole("error")

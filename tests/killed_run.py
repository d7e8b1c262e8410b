"""Runs to be killed: started by `test_durability.py` in a process of its own, one forked child for each.

    python killed_run.py FOLDER SEED COUNT

Child N writes FOLDER/N/run/trace.jsonl; beside it `begun` and `finished` hold the ids of the tool calls whose tool
began to work, and of those that were yielded to the caller.  An odd child is killed by this process after a while, an
even one kills itself at some function call or line, which hits the moments between two system calls too.
"""

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from looplet import ProvenanceSink, Reply, ToolCall, Usage, async_composable_loop, composable_loop, tool, tools_from

BATCHES = 300
"""replies of one to three calls; far more than a child survives"""
MAX_DELAY_S = 0.04
MAX_EVENTS = 30_000


class Clerk:
    """A model that wants notes written, one to three at a time, sometimes in parallel."""

    provider, model = "test", "clerk"

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.calls = 0

    def chat(self, messages, **settings):
        wanted = self.random.choice([["write"], ["write", "write"], ["peek", "peek"], ["peek", "write", "peek"]])
        return Reply(tool_calls=tuple(map(self.call, wanted)), finish_reason="tool_call", usage=Usage(10, 5))

    def call(self, name):
        self.calls += 1
        return ToolCall(name, {"note": f"call_{self.calls}"}, call_id=f"call_{self.calls}")


class AsyncClerk(Clerk):
    async def chat(self, messages, **settings):
        return super().chat(messages)


def note_down(file, text):
    os.write(file, text.encode() + b"\n")


def make_tools(folder, begun):
    @tool
    def write(note: str) -> dict:
        """Write a note and read it back."""
        note_down(begun, note)
        path = folder / "note.txt"
        path.write_text(note * 20)
        return {"read": path.read_text()}

    @tool(concurrent_safe=True)
    def peek(note: str) -> dict:
        """Look how large the last note is."""
        note_down(begun, note)
        path = folder / "note.txt"
        return {"bytes": path.stat().st_size if path.exists() else 0}

    return tools_from([write, peek])


def die_at(event):
    """Kill this process at the given one of the calls and lines to come."""
    left = iter(range(event))

    def count(frame, kind, argument):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    sys.settrace(count)


def live(folder, seed, event):
    """Run until killed; `event` says when, None leaves that to the parent."""
    folder.mkdir()
    begun, finished = (os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("begun", "finished"))
    is_async = seed % 4 > 1
    settings = {
        "llm": AsyncClerk(seed) if is_async else Clerk(seed),
        "task": {"goal": "be killed"},
        "tools": make_tools(folder, begun),
        "hooks": [ProvenanceSink(folder / "run")],
        "max_steps": 3 * BATCHES,
    }

    async def iterate():
        async for step in async_composable_loop(**settings):
            note_down(finished, step.tool_call.call_id)

    if event is not None:
        die_at(event)
    if is_async:
        asyncio.run(iterate())
    else:
        for step in composable_loop(**settings):
            note_down(finished, step.tool_call.call_id)


def start(folder, seed, event):
    """Fork a child that lives until it is killed; return its process id, and the pipe that says it has begun."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(begun, b"!")
            live(folder, seed, event)
        finally:
            os._exit(1)
    os.close(begun)
    os.read(ready, 1)
    os.close(ready)
    return child


def warm_up(folder):
    """Do a short run, so that no child spends its life importing."""
    begun = os.open(os.devnull, os.O_WRONLY)
    tools, hooks = make_tools(folder, begun), [ProvenanceSink(folder / "warm")]
    for _ in composable_loop(Clerk(0), {"goal": "warm up"}, tools, hooks=hooks, max_steps=3):
        pass


def main():
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warm_up(folder)
    for number in range(count):
        dice = random.Random(f"{seed} {number}")
        if number % 2:
            child = start(folder / str(number), number, None)
            time.sleep(dice.uniform(0, MAX_DELAY_S))
            os.kill(child, signal.SIGKILL)
        else:
            child = start(folder / str(number), number, int(dice.uniform(0, MAX_EVENTS)))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{number} {-os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    main()

"""A scripted provider that keeps a bill: the other side of `soak.py` and `concurrency.py`, in a process of its own.

It says who was asked what by the system prompt, goes wrong on purpose, and writes down in whole numbers every usage
that it sent and that a client could read.  In a process of its own it takes neither time nor memory from what is
measured.

    with Provider("soak", turns=100) as provider:
        OpenAIBackend(base_url=provider.base_url, model=MODEL)
        ...
        bill = provider.bill()
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import looplet
from looplet.testing import Answer, ChatRequest, Fault, OpenAIServer
from looplet.types import Usage

MODEL: Final = "gpt-4o-mini"
PRICED_AT: Final = "https://api.openai.com/v1"
"""whose list prices count; a server on this machine has none"""
AGENT: Final = "You are the agent of a soak test."
HELPER: Final = "You help the agent of a soak test."
KEYS_PER_TURN: Final = 4
"""calls have the keys from `turn * KEYS_PER_TURN` on"""
FAULTS: Final = ("rate_limited", "server_error", "overloaded", "cut", "malformed", "empty", "slow")
UNREADABLE: Final = ("rate_limited", "server_error", "overloaded", "cut", "malformed")
"""what no client finds a usage in, so it is not billed: the usage is the last thing in an answer"""


def nano_usd(tokens: dict[str, int]) -> int:
    """Return what so many tokens of each kind cost, in billionths of a dollar."""
    from genai_prices import Usage as Tokens
    from genai_prices import calc_price

    def price(**counts: int) -> int:
        return round(calc_price(Tokens(**counts), MODEL, provider_api_url=PRICED_AT).total_price * 1_000_000_000)

    million = 1_000_000
    fresh, output = price(input_tokens=million) // million, price(output_tokens=million) // million
    cached = price(input_tokens=million, cache_read_tokens=million) // million
    return (tokens["input"] - tokens["cached"]) * fresh + tokens["cached"] * cached + tokens["output"] * output


@dataclass
class Bill:
    """What the provider did, and what it charges for."""

    requests: int = 0
    billed: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("input", "output", "cached", "reasoning"), 0))
    asked: Counter[str] = field(default_factory=Counter)
    """what for → requests, refused ones included"""
    faults: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    """what went wrong in the provider itself"""

    def add(self, usage: Usage) -> None:
        """Charge for one answer."""
        self.billed += 1
        told = (usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens)
        for name, count in zip(self.tokens, told, strict=True):
            self.tokens[name] += count


class Script:
    """What the provider answers; `turns`: how many turns the agent is kept busy."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.bill = Bill()
        self._turn = 0
        self._lock = threading.Lock()

    def __call__(self, request: ChatRequest) -> Any:
        """Answer, or go wrong; a fault leaves the script where it was."""
        with self._lock:
            who = self._who(request)
            self.bill.requests += 1
            self.bill.asked[who] += 1
            fault = self._fault(request, who)
            if fault:
                self.bill.faults[fault] += 1
            if fault == "context_overflow":
                return Fault.context_overflow()
            if fault in UNREADABLE:
                return {"rate_limited": lambda: Fault.rate_limited(0.001)}.get(fault, getattr(Fault, fault))()
            if fault == "empty":
                return self._empty(request)
            answer = self._answer(request, who)
            self.bill.add(answer.usage)
            return Fault.slow(0.01, answer) if fault else answer

    def _fault(self, request: ChatRequest, who: str) -> str:
        if who == "agent" and request.number % 40 == 25 and len(request.messages) > 14:
            return "context_overflow"
        return FAULTS[request.number // 10 % len(FAULTS)] if request.number % 10 == 9 else ""

    def _empty(self, request: ChatRequest) -> Fault:
        """Answer without any choice, and charge for it: the usage is there to be read."""
        usage = _usage(request)
        self.bill.add(usage)
        return Fault("empty", answer=Answer("", usage=usage))

    def _who(self, request: ChatRequest) -> str:
        known = {AGENT: "agent", HELPER: "helper"}
        first = request.messages[0]
        return known.get(first["content"], "compaction" if first["role"] == "system" else "tool")

    def _answer(self, request: ChatRequest, who: str) -> Answer:
        if who == "agent":
            self._turn += 1
            return Answer(tool_calls=list(self._calls(self._turn)), usage=_usage(request), model=MODEL)
        if who == "helper":
            return Answer(tool_calls=[_help(request)], usage=_usage(request), model=MODEL)
        text = f"Request {request.number}: " + "what was found out so far is this and that. " * 8
        return Answer(text, usage=_usage(request), model=MODEL)

    def _calls(self, turn: int) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield the agent's calls in a turn."""
        names = self._names(turn)
        for at, name in enumerate(names):
            yield name, {"key": turn * KEYS_PER_TURN + at}
        if not names:
            yield "done", {"answer": f"{turn} turns"}

    def _names(self, turn: int) -> tuple[str, ...]:
        if turn >= self.turns:
            return ()
        if turn % 31 == 0:
            return (("research",), ("delegate",), ("expert", "expert"))[turn // 31 % 3]
        if turn % 23 == 0:
            return ("ask",)
        if turn % 19 == 0:
            return ("slow",)
        return ("look", "look", "look") if turn % 3 == 0 else ("flaky",) if turn % 3 == 1 else ("read",)


class Echo(Script):
    """Three turns for each of many agents: each is answered with the name in its own task."""

    def _fault(self, request: ChatRequest, who: str) -> str:
        return ""

    def _answer(self, request: ChatRequest, who: str) -> Answer:
        task = next(message["content"] for message in request.messages if message["role"] == "user")
        name = task.removeprefix("name: ")
        results = sum(message["role"] == "tool" for message in request.messages)
        call = ("echo", {"name": name, "turn": results + 1}) if results + 1 < self.turns else ("done", {"answer": name})
        return Answer(tool_calls=[call], usage=_usage(request), model=MODEL)


def _help(request: ChatRequest) -> tuple[str, dict[str, Any]]:
    """Return what a sub-agent calls: its only tool, then `done`."""
    key = int(request.messages[1]["content"].removeprefix("task: "))
    is_done = request.messages[-1]["role"] == "tool"
    return ("done", {"answer": f"helped with {key}"}) if is_done else ("note", {"key": key})


def _usage(request: ChatRequest) -> Usage:
    """Return about as many tokens as a real model would count; some cached, some spent on reasoning."""
    given = len(json.dumps([request.messages, request.tools])) // 4
    return Usage(given, 20 + request.number % 13, given // 2 if request.number % 3 else 0, request.number % 5)


SCRIPTS: Final = {"soak": Script, "echo": Echo}


class Provider:
    """The server in a process of its own."""

    def __init__(self, script: str, *, turns: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), script, str(turns)]
        found_at = {"PYTHONPATH": str(Path(looplet.__file__).resolve().parent.parent)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **found_at}
        )
        assert self._process.stdout is not None
        self.base_url = self._process.stdout.readline().strip()

    def bill(self) -> Bill:
        """Stop the server and return its bill."""
        told, _ = self._process.communicate()
        return Bill(**json.loads(told))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.communicate()


class _Server(OpenAIServer):
    """Forgets the requests: a long test asks for many."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self._requests: Any = deque(maxlen=1)


def main(script: str, turns: str) -> None:
    """Serve until standard input ends, then print the bill."""
    policy = SCRIPTS[script](int(turns))
    with _Server(policy) as server:
        print(server.base_url, flush=True)
        sys.stdin.read()
        policy.bill.errors = [repr(error) for error in server.errors]
    print(json.dumps(vars(policy.bill)))


if __name__ == "__main__":
    main(*sys.argv[1:])

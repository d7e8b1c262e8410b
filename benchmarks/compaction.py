"""How long the requests of a run get: the same scripted run with each compaction service.

The model reads one page per turn and says what is on it; the provider counts four characters as a token.  The window
is large enough for all of it, so that the run without compaction ends, too; `context_window` is what the services get.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import click

from looplet import (
    LoopConfig,
    Prune,
    Reply,
    Summarize,
    ToolCall,
    Truncate,
    Usage,
    compact_chain,
    composable_loop,
    tool,
    tools_from,
)
from looplet.compaction import SUMMARY_PROMPT
from looplet.prompt import part_text

SERVICES = {
    "none": None,
    "Prune": Prune(),
    "Truncate": Truncate(),
    "Summarize": Summarize(),
    "compact_chain(Prune, Truncate)": compact_chain(Prune, Truncate),
    "compact_chain(Prune, Summarize, Truncate)": compact_chain(Prune, Summarize, Truncate),
}


@tool
def read_page(number: int) -> str:
    """Return a page of a long document."""
    return f"page {number}\n" + "All work and no play makes a long page. " * 62


@dataclass
class Reader:
    """A model that reads pages in order, then finishes."""

    pages: int
    provider: str = "benchmark"
    model: str = "scripted"
    read: int = 0
    requests: list[int] = field(default_factory=list)
    """tokens of each request of the agent"""
    summaries: list[int] = field(default_factory=list)
    """tokens of each request for a summary"""

    def chat(self, messages: Any, *, system_prompt: str = "", tools: Any = None, **settings: Any) -> Reply:
        """Return the call for the next page, or a summary."""
        chars = len(system_prompt) + sum(len(part_text(part)) for message in messages for part in message.parts)
        usage = Usage(chars // 4, 40)
        if system_prompt == SUMMARY_PROMPT:
            self.summaries.append(chars // 4)
            return Reply(text=f"{self.read} pages read. " + "No play on any of them. " * 30, usage=usage)
        self.requests.append(chars // 4)
        self.read += 1
        call = ToolCall("read_page", {"number": self.read}) if self.read <= self.pages else ToolCall("done", {})
        return Reply(text=f"Page {self.read - 1} says: no play.", tool_calls=(call,), usage=usage)


def measure(service: Any, pages: int, context_window: int) -> dict[str, int]:
    """Run once; return tokens."""
    model = Reader(pages)
    window = None if service is None else context_window  # with a window, a run compacts by itself
    config = LoopConfig(max_steps=pages + 1, context_window=window, compact_service=service)
    steps = list(
        composable_loop(model, {"goal": "read all"}, tools_from([read_page], include_done=True), config=config)
    )
    if len(steps) != pages + 1:
        raise SystemExit(f"{len(steps)} steps instead of {pages + 1}")
    return {
        "largest": max(model.requests),
        "last": model.requests[-1],
        "all": sum(model.requests) + sum(model.summaries),
        "summaries": len(model.summaries),
    }


@click.command(help=__doc__.splitlines()[0])
@click.option("--pages", default=40, show_default=True, type=click.IntRange(1), help="turns of the run")
@click.option("--context-window", default=16_000, show_default=True, type=click.IntRange(1), help="tokens")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def main(pages: int, context_window: int, as_json: bool) -> None:
    """Measure and print."""
    found = {name: measure(service, pages, context_window) for name, service in SERVICES.items()}
    if as_json:
        print(json.dumps({"pages": pages, "context_window": context_window, "services": found}, indent=2))
        return
    print(f"tokens sent in {pages} turns, 2,500 characters read in each; context_window={context_window:,}")
    print(f"{'compact_service':42}{'largest':>9}{'last':>9}{'all requests':>14}{'summaries':>11}")
    for name, row in found.items():
        print(f"{name:42}{row['largest']:9,}{row['last']:9,}{row['all']:14,}{row['summaries']:11}")


if __name__ == "__main__":
    main()

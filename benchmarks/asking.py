"""CPU time of one model call in the thread that makes it: the provider's package alone, looplet's backend, and a price.

The server is in this process, in threads of its own, whose time does not count.  The requests are those of a run with
one tool call per turn; each length and each way to ask is sampled in turn, so that a slow machine slows all down alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from time import thread_time
from typing import Any

import anthropic
import click
import openai

from looplet import AnthropicBackend, Message, OpenAIBackend, Reply, ToolCall, Usage, tool, tools_from
from looplet.backends import completions, messages_api
from looplet.prices import priced
from looplet.testing import AnthropicServer, OpenAIServer

LENGTHS = (5, 20, 80)
PRICED = {"gpt-4o-mini": "https://api.openai.com/v1", "claude-sonnet-4-5": "https://api.anthropic.com"}
"""model → where it has a list price; the second one's depends on the size of the request"""


@tool
def echo(text: str, times: int = 1) -> str:
    """Return the text, as often as you like."""
    return text * times


SCHEMAS = tools_from([echo]).tool_schemas()


def conversation(turns: int) -> list[Message]:
    """Return the messages of a run's request after so many turns."""
    said = [Message.of_text("user", "goal: benchmark")]
    for number in range(turns):
        call = ToolCall("echo", {"text": f"number {number}", "times": 2}, call_id=f"call_{number}")
        said.append(Message.of_reply(Reply(text="And once more.", tool_calls=(call,))))
        result = {"type": "tool_call_response", "id": call.call_id, "response": {"said": "number " * 20}}
        said.append(Message("tool", (result,)))
    return said


def ways(openai_url: str, anthropic_url: str, messages: list[Message]) -> dict[str, Callable[[], Any]]:
    """Return what is measured: name → one call."""
    oai, claude = (
        openai.OpenAI(base_url=openai_url, api_key="k"),
        anthropic.Anthropic(base_url=anthropic_url, api_key="k"),
    )
    asked = completions.request_of(messages, model="m", tools=SCHEMAS)
    asked_claude = messages_api.request_of(messages, model="m", tools=SCHEMAS, max_tokens=100)
    ours, ours_claude = OpenAIBackend(oai, model="m"), AnthropicBackend(claude, model="m")
    return {
        "openai package": lambda: oai.chat.completions.create(**asked),
        "OpenAIBackend": lambda: ours.chat(messages, tools=SCHEMAS),
        "anthropic package": lambda: claude.messages.create(**asked_claude),
        "AnthropicBackend": lambda: ours_claude.chat(messages, tools=SCHEMAS),
    }


def cpu_ms(call: Callable[[], Any], times: int) -> float:
    """Return the CPU time of one call in this thread, milliseconds."""
    began = thread_time()
    for _ in range(times):
        call()
    return (thread_time() - began) / times * 1e3


def measure(lengths: tuple[int, ...], samples: int) -> dict[str, list[float]]:
    """Return the milliseconds of each way to ask, by length."""
    with OpenAIServer(policy=lambda request: "hi") as one, AnthropicServer(policy=lambda request: "hi") as other:
        calls = [ways(one.base_url, other.base_url, conversation(turns)) for turns in lengths]
        found: dict[str, list[list[float]]] = {name: [[] for _ in lengths] for name in calls[0]}
        for number in range(samples + 1):
            for place, named in enumerate(calls):
                for name, call in named.items():
                    took = cpu_ms(call, 5)
                    if number:  # the first makes connections, and caches
                        found[name][place].append(took)
    return {name: [median(cell) for cell in cells] for name, cells in found.items()}


def price_us(model: str, url: str) -> float:
    """Return the CPU time of one price, microseconds."""

    class Listed:
        base_url = url

    priced(Usage(1000, 100, 500), model, Listed())
    return median(cpu_ms(lambda: priced(Usage(1000, 100, 500), model, Listed()), 1000) for _ in range(5)) * 1e3


@click.command(help=__doc__.splitlines()[0])
@click.option("--turns", "lengths", multiple=True, default=LENGTHS, show_default=True, type=click.IntRange(1))
@click.option("--samples", default=7, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def main(lengths: tuple[int, ...], samples: int, as_json: bool) -> None:
    """Measure and print."""
    found = measure(lengths, samples)
    prices = {model: price_us(model, url) for model, url in PRICED.items()}
    if as_json:
        print(json.dumps({"turns": lengths, "cpu_ms_per_call": found, "cpu_us_per_price": prices}, indent=2))
        return
    print(f"{'CPU ms per call, by turns':28}" + "".join(f"{turns:9,}" for turns in lengths))
    for name, row in found.items():
        print(f"{name:28}" + "".join(f"{cell:9.2f}" for cell in row))
    print(f"\n{'CPU µs per price':28}")
    for model, took in prices.items():
        print(f"{model:28}{took:9.1f}")


if __name__ == "__main__":
    main()

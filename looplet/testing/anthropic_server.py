"""A server on loopback that speaks Anthropic's Messages API, so that tests use the real `anthropic` client.

    with AnthropicServer(policy=[[("search", {"query": "loops"})], "found 3"]) as server:
        client = anthropic.Anthropic(base_url=server.base_url, api_key="any")

It checks requests as the real API does where an agent engine can go wrong: that messages take turns, that every call
has its result behind it, that what the model thought comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from looplet.testing._answers import ChatRequest, Fault, Policy, PolicyAnswer
from looplet.testing._anthropic_problems import problems
from looplet.testing._anthropic_wire import Block, failure, render
from looplet.testing._serving import Response, ScriptedServer

__all__ = ["AnthropicServer"]


class AnthropicServer(ScriptedServer):
    """The server; `policy`, `port`, `refusing` and `model` are those of `OpenAIServer`.

    `Answer.thinking` is what the model thought first.  Where the request has its results, thoughts that this server
    made up are checked: by their signatures, and in the latest message against what it said then.
    """

    _chat_path = "/v1/messages"
    _prefix = ""
    _environment = "ANTHROPIC"

    def __init__(
        self, policy: Policy = None, *, port: int = 0, refusing: Sequence[str] = (), model: str = "looplet-test"
    ) -> None:
        super().__init__(policy, port=port, refusing=refusing, model=model)
        self._issued: dict[str, list[Block]] = {}

    def _problems(self, body: Any) -> Iterator[Fault]:
        return problems(body, self._issued)

    def _refusal(self, name: str, value: Any) -> Fault:
        return Fault.error(400, f"`{name}` is deprecated for this model.")

    def _render(self, request: ChatRequest, answer: PolicyAnswer) -> Response:
        response, blocks = render(request, answer)
        self._issued.update({block["id"]: blocks for block in blocks if block["type"] == "tool_use"})
        return response

    def _failure(self, fault: Fault) -> Response:
        return failure(fault)

"""An OpenAI-compatible HTTP server on loopback, so that tests use the real `openai` client over a real socket.

    with OpenAIServer(policy=[[("search", {"query": "loops"})], "found 3"]) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="any")

It checks requests as the real API does where an agent engine can go wrong, above all that every tool call has its
answer.  Nothing it says depends on the clock: ids count from 0 and `created` is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from looplet.testing._answers import Answer, ChatRequest, Fault, Policy, PolicyAnswer
from looplet.testing._problems import problems
from looplet.testing._serving import RecordedRequest, Response, ScriptedServer
from looplet.testing._wire import failure, render

__all__ = ["Answer", "ChatRequest", "Fault", "OpenAIServer", "Policy", "PolicyAnswer", "RecordedRequest"]


class OpenAIServer(ScriptedServer):
    """The server; `policy` decides what the model answers.

    A function is asked for every request, from as many threads as there are parallel requests; a list gives its
    answers in order and then a 500; None repeats the last user message.  Requests that carry a key of `refusing` are
    refused before the policy is asked.  `port=0` takes a free port.  Raises `ConfigError` for a policy of another type.
    """

    _chat_path = "/v1/chat/completions"
    _prefix = "/v1"
    _environment = "OPENAI"

    def _problems(self, body: Any) -> Iterator[Fault]:
        return problems(body)

    def _refusal(self, name: str, value: Any) -> Fault:
        return Fault.refuses(name, value)

    def _render(self, request: ChatRequest, answer: PolicyAnswer) -> Response:
        return render(request, answer)

    def _failure(self, fault: Fault) -> Response:
        return failure(fault)

    def _other(self, route: tuple[str, str]) -> Response | None:
        if route != ("GET", "/v1/models"):
            return None
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "looplet"}
        return Response.of({"object": "list", "data": [entry]})

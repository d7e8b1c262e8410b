"""Real parts for tests: scripted backends, and scripted servers on loopback.

Names are loaded when they are first used: a scripted backend needs no HTTP server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from looplet._lazy import lazy

if TYPE_CHECKING:
    from looplet.testing.anthropic_server import AnthropicServer as AnthropicServer
    from looplet.testing.backends import AsyncMockLLMBackend as AsyncMockLLMBackend
    from looplet.testing.backends import AsyncScriptedBackend as AsyncScriptedBackend
    from looplet.testing.backends import Cut as Cut
    from looplet.testing.backends import LLMResponsesExhausted as LLMResponsesExhausted
    from looplet.testing.backends import MockLLMBackend as MockLLMBackend
    from looplet.testing.backends import PolicyBackend as PolicyBackend
    from looplet.testing.backends import ScriptedBackend as ScriptedBackend
    from looplet.testing.backends import assert_exhausted as assert_exhausted
    from looplet.testing.server import Answer as Answer
    from looplet.testing.server import ChatRequest as ChatRequest
    from looplet.testing.server import Fault as Fault
    from looplet.testing.server import OpenAIServer as OpenAIServer

# module → the public names it provides
_HOMES = {
    "anthropic_server": ("AnthropicServer",),
    "backends": (
        "AsyncMockLLMBackend", "AsyncScriptedBackend", "Cut", "LLMResponsesExhausted", "MockLLMBackend",
        "PolicyBackend", "ScriptedBackend", "assert_exhausted",
    ),
    "server": ("Answer", "ChatRequest", "Fault", "OpenAIServer"),
}  # fmt: skip
__all__, __getattr__ = lazy(__name__, _HOMES)

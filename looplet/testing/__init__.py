"""Real parts for tests: scripted backends, and scripted servers on loopback."""

from looplet.testing.anthropic_server import AnthropicServer
from looplet.testing.backends import (
    AsyncMockLLMBackend,
    AsyncScriptedBackend,
    Cut,
    LLMResponsesExhausted,
    MockLLMBackend,
    PolicyBackend,
    ScriptedBackend,
    assert_exhausted,
)
from looplet.testing.server import Answer, ChatRequest, Fault, OpenAIServer

__all__ = [
    "Answer",
    "AnthropicServer",
    "AsyncMockLLMBackend",
    "AsyncScriptedBackend",
    "ChatRequest",
    "Cut",
    "Fault",
    "LLMResponsesExhausted",
    "MockLLMBackend",
    "OpenAIServer",
    "PolicyBackend",
    "ScriptedBackend",
    "assert_exhausted",
]

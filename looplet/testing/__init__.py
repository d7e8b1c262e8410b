"""Real parts for tests: scripted backends and an OpenAI-compatible server on loopback."""

from looplet.testing.backends import (
    AsyncMockLLMBackend,
    AsyncScriptedBackend,
    LLMResponsesExhausted,
    MockLLMBackend,
    PolicyBackend,
    ScriptedBackend,
    assert_exhausted,
)
from looplet.testing.server import Answer, ChatRequest, Fault, OpenAIServer

__all__ = [
    "Answer",
    "AsyncMockLLMBackend",
    "AsyncScriptedBackend",
    "ChatRequest",
    "Fault",
    "LLMResponsesExhausted",
    "MockLLMBackend",
    "OpenAIServer",
    "PolicyBackend",
    "ScriptedBackend",
    "assert_exhausted",
]

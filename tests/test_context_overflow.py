"""A request that is too long, in each provider's words: the run makes it shorter once, then says clearly why not."""

import asyncio
import json

import pytest

from looplet import (
    AnthropicBackend,
    AsyncAnthropicBackend,
    AsyncOpenAIBackend,
    OpenAIBackend,
    ProvenanceSink,
    Trace,
    async_composable_loop,
    composable_loop,
    tool,
    tools_from,
)
from looplet.telemetry import semconv
from looplet.testing import Answer, AnthropicServer, Fault, OpenAIServer

PHRASES = {
    "openai": (400, "This model's maximum context length is 8192 tokens. However, your messages resulted in 9 tokens."),
    "openai-responses": (400, "Your input exceeds the context window of this model. Please adjust your input."),
    "openai-tpm": (
        429,
        "Request too large for gpt-4o in organization x on tokens per min (TPM): Limit 3, Requested 5.",
    ),
    "openai-string": (400, "Invalid 'messages[3].content': string too long. Expected a string with maximum length 9."),
    "openai-array": (400, "Invalid 'messages': array too long. Expected an array with maximum length 2048."),
    "anthropic": (400, "prompt is too long: 202609 tokens > 200000 maximum"),
    "anthropic-output": (400, "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000"),
    "anthropic-bytes": (413, "request_too_large: Request exceeds the maximum size"),
    "bedrock": (400, "Input is too long for requested model."),
    "amazon": (400, "Input Tokens Exceeded: Number of input tokens exceeds maximum length."),
    "gemini": (400, "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576)."),
    "gemini-older": (400, "The input token count exceeds the maximum number of tokens allowed."),
    "groq": (413, "Request too large for model `llama-3.1-8b-instant` in organization `x` on tokens per minute (TPM)"),
    "groq-code": (400, "context_length_exceeded: Please reduce the length of the messages or completion."),
    "mistral": (400, "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"),
    "vllm": (400, "The decoder prompt (length 9000) is longer than the maximum model length of 8192."),
    "vllm-2": (400, "This model's maximum context length is 2048 tokens, but the prompt contains 2049 input tokens"),
    "sglang": (400, "The input (9000 tokens) is longer than the model's context length (8192 tokens)."),
    "ollama": (400, "the input length exceeds the context length"),
    "ollama-2": (400, "prompt too long; exceeded max context length by 40 tokens"),
    "llama.cpp": (400, "request (4390 tokens) exceeds the available context size (4096 tokens), try increasing it"),
    "llama.cpp-500": (500, "Context size has been exceeded."),
    "llama-cpp-python": (400, "Requested tokens (2285) exceed context window of 2048"),
    "lm-studio": (400, "The number of tokens to keep from the initial prompt is greater than the context length."),
    "tgi": (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4097. Given: 5000 `inputs`"),
    "tgi-2": (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 1100"),
    "cohere": (400, "too many tokens: total number of tokens in the prompt cannot exceed 4081"),
    "xai": (400, "This model's maximum prompt length is 131072 but the request contains 537812 tokens."),
    "copilot": (400, "prompt token count of 169000 exceeds the limit of 128000"),
    "github-models": (413, "tokens_limit_reached: Request body too large for gpt-4o model. Max size: 8000 tokens."),
    "dashscope": (400, "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 30720]"),
    "moonshot": (400, "Invalid request: Your request exceeded model token limit: 8192"),
    "minimax": (400, "invalid params, context window exceeds limit (2013)"),
    "zhipu": (400, "Prompt exceeds max length"),
    "siliconflow": (400, "length of prompt_tokens (163280) must be less than max_seq_len (32768)."),
    "fireworks": (400, "The prompt is too long: 140000, model maximum context length: 131071"),
}
OTHERS = {
    "output limit": (400, "max_tokens is too large: 200000. This model supports at most 16384 completion tokens."),
    "many tools": (400, "Invalid 'tools': array too long. Expected an array with maximum length 128, but got 130."),
    "rate": (429, "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29000, Requested 5000."),
    "rate with its words": (429, "Too many tokens, please wait before trying again."),
    "server": (500, "The server had an error while processing your request."),
    "image": (400, "image exceeds 5 MB maximum: 5316852 bytes > 5242880 bytes"),
}


@tool
def fetch(n: int) -> str:
    """Fetch a long page."""
    return f"page {n}: " + "x" * 4_000


def replies(number):
    return Answer(tool_calls=[("fetch", {"n": number}) if number < 4 else ("done", {"answer": "ok"})])


class Window:
    """Answers; refuses requests beyond a number of bytes with a fault."""

    def __init__(self, fault, limit):
        self.fault = fault
        self.limit = limit
        self.refused = self.answered = 0

    def __call__(self, request):
        if len(json.dumps(request.body["messages"])) > self.limit:
            self.refused += 1
            return self.fault
        self.answered += 1
        return replies(self.answered)


def play(folder, fault, is_async, *, limit=10_000, openai=True, **more):
    """Return the steps of a run, its stop reason, its compactions, and the server's policy."""
    policy = fault if isinstance(fault, Window) else Window(fault, limit)
    sync, other = (OpenAIBackend, AsyncOpenAIBackend) if openai else (AnthropicBackend, AsyncAnthropicBackend)
    given = {"task": {"goal": "read"}, "tools": tools_from([fetch], include_done=True), **more}
    given["hooks"] = [ProvenanceSink(folder)]

    async def main(**backend):
        async with other(**backend) as llm:
            run = async_composable_loop(llm, **given)
            return [step async for step in run], run

    def plain(**backend):
        with sync(**backend) as llm:
            run = composable_loop(llm, **given)
            return list(run), run

    with (OpenAIServer if openai else AnthropicServer)(policy=policy) as server:
        backend = {"model": "m", "api_key": "k", "base_url": server.base_url, "max_retries": 0}
        steps, run = asyncio.run(main(**backend)) if is_async else plain(**backend)
    return steps, run.stop_reason, Trace.load(folder).find(semconv.COMPACT), policy


modes = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
providers = pytest.mark.parametrize("openai", [True, False], ids=["openai", "anthropic"])
TOO_LONG = Fault.error(400, "prompt is too long: 9 tokens > 8 maximum")


@modes
@pytest.mark.parametrize("name", PHRASES)
def test_whatever_the_provider_calls_it_the_request_is_made_shorter_and_sent_again(name, is_async, tmp_path):
    _, stopped, compactions, policy = play(tmp_path, Fault.error(*PHRASES[name]), is_async)
    assert stopped == "done"
    assert policy.refused == len(compactions) > 0
    assert {span.attributes[semconv.COMPACT_REASON] for span in compactions} == {"overflow"}


@modes
@providers
@pytest.mark.parametrize("more", [{}, {"stream": lambda event: None}], ids=["whole", "stream"])
def test_what_cannot_be_made_shorter_ends_the_run_and_says_so(openai, more, is_async, tmp_path):
    steps, stopped, compactions, policy = play(tmp_path, TOO_LONG, is_async, limit=0, openai=openai, **more)
    assert (stopped, len(compactions), policy.refused) == ("llm_error", 1, 1)
    assert "compaction could not make the conversation shorter" in steps[-1].tool_result.error


@modes
@providers
@pytest.mark.parametrize("more", [{}, {"stream": lambda event: None}], ids=["whole", "stream"])
def test_what_stays_too_long_is_compacted_once_and_ends_the_run_with_both_sizes(openai, more, is_async, tmp_path):
    class Narrows(Window):
        def __call__(self, request):
            self.limit = 0 if self.answered == 2 else self.limit
            return super().__call__(request)

    policy = Narrows(TOO_LONG, 10_000)
    steps, stopped, compactions, policy = play(tmp_path, policy, is_async, openai=openai, **more)
    assert (stopped, len(compactions), policy.refused) == ("llm_error", 1, 2)
    assert "ClipToolResults took it from" in steps[-1].tool_result.error


@modes
@providers
def test_a_stream_that_is_refused_as_too_long_is_asked_again(openai, is_async, tmp_path):
    _, stopped, compactions, policy = play(tmp_path, TOO_LONG, is_async, openai=openai, stream=lambda event: None)
    assert stopped == "done"
    assert policy.refused == len(compactions) > 0


@modes
@pytest.mark.parametrize("name", OTHERS)
def test_what_shortening_would_not_help_is_no_overflow(name, is_async, tmp_path):
    _, stopped, compactions, _ = play(tmp_path, Fault.error(*OTHERS[name]), is_async)
    assert (stopped, compactions) == ("llm_error", [])

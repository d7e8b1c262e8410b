"""What the errors of the providers' packages mean: one `BackendError`, with the provider's words and what to do."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, Final
from urllib.parse import urlsplit

from looplet.errors import BackendError, ConfigError, ContextOverflow
from looplet.types import cut

_KINDS: Final = {
    401: "auth",
    402: "quota",
    403: "auth",
    404: "not_found",
    408: "timeout",
    409: "conflict",
    429: "rate_limit",
    529: "overloaded",
}
_RETRYABLE: Final = frozenset({"timeout", "conflict", "rate_limit", "server_error", "overloaded"})
_ADVICE: Final = {
    "auth": "check api_key= ({env}_API_KEY)",
    "not_found": "is {model!r} a model there (model=, {env}_MODEL), and {url} the API (base_url=, {env}_BASE_URL)?",
    "rate_limit": "ask again later, or less often",
    "overloaded": "ask again later",
    "quota": "see the plan and the billing of this key",
    "server_error": "try again later",
    "timeout": "try again later, or raise timeout_s=",
    "conflict": "try again",
}
STREAM_CUT: Final = "stream_cut"
"""the answer broke off, and nobody said why"""
_STREAMED: Final = {
    "overloaded_error": "overloaded",
    "rate_limit_error": "rate_limit",
    "rate_limit_exceeded": "rate_limit",
    "api_error": "server_error",
    "server_error": "server_error",
    "timeout_error": "timeout",
    "invalid_request_error": "bad_request",
    "authentication_error": "auth",
    "permission_error": "auth",
    "billing_error": "quota",
    "insufficient_quota": "quota",
}
"""types and codes of errors that come in a stream, where no status says what they are"""
_TOO_LONG: Final = re.compile(
    r"""context[ _-]?(?:length|window|size|limit)  # OpenAI, Azure, Mistral, vLLM, SGLang, Ollama, llama.cpp, OpenRouter
    | (?:prompt|input|request|body)[ ](?:is[ ])?too[ ](?:long|large)  # Anthropic, Bedrock, Fireworks, Groq, GitHub
    | request_too_large | tokens_limit_reached | max_prompt_tokens_exceeded
    | too[ ]many[ ]tokens  # Cohere
    | token[ ]count\b.{0,40}\bexceeds  # Gemini, Copilot
    | input[ ]tokens[ ]exceed | input[ ]length[ ]should[ ]be  # Amazon, DashScope
    | exceeded[ ]model[ ]token[ ]limit | prompt[ ]exceeds[ ]max[ ]length  # Moonshot, Zhipu
    | maximum[ ](?:prompt|model)[ ]length  # xAI, vLLM
    | inputs`?[ ](?:tokens[ ]\+|must[ ]have[ ]less[ ]than) | max_seq_len  # TGI, Together, SiliconFlow
    | 'messages\b[^']*':[ ](?:string|array)[ ]too[ ]long  # OpenAI: one message, or how many
    """,
    re.IGNORECASE | re.VERBOSE,
)
_TOO_LONG_STATUS: Final = frozenset({400, 413, 422, 500})
"""500: llama.cpp, when there is no room left while it reads"""
_NEVER_FITS: Final = "request too large for"
"""with 429: a request that is longer than what a minute allows is refused in the next minute, too"""
_UNSUPPORTED: Final = re.compile(
    r"Unsupported (?:parameter|value): '(?P<openai>[\w.]+)'|`?(?P<anthropic>\w+)`? is deprecated for this model"
)


def to_backend_error(error: Exception, *, package: str, model: str, base_url: str) -> BackendError | ConfigError:
    """Return what `error`, raised by the client of `package` (`openai` or `anthropic`), means.

    ConfigError for what the package itself refuses: a parameter that it does not know, an answer too long to wait for.
    """
    sdk, env = import_module(package), package.upper()
    if isinstance(error, sdk.APITimeoutError):
        words = f"no answer from {base_url} in time; raise timeout_s="
        return BackendError(words, kind="timeout", retryable=True)
    if _is_broken_json(error):
        words = f"{base_url} answered with broken JSON ({error}); try again"
        return BackendError(words, kind="bad_response", retryable=True)
    if _is_damaged(error):
        words = f"{base_url} sent an answer that cannot be unpacked ({_cause(error)}); try again"
        return BackendError(words, kind="bad_response", retryable=True)
    if isinstance(error, sdk.APIConnectionError):
        words = f"cannot reach {base_url}; check {env}_BASE_URL (or base_url=) and the network: {_cause(error)}"
        return BackendError(words, kind="network", retryable=True)
    if isinstance(error, sdk.APIStatusError):
        return _of_status(error, env, model, base_url)
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        words = "a parameter that only your server knows goes into generate_kwargs={'extra_body': {...}}"
        return ConfigError(f"{error}; {words}")
    if isinstance(error, ValueError) and str(error).startswith("Streaming is "):
        return ConfigError(f"{error}; pass timeout_s= to wait for so long an answer, or a smaller max_tokens")
    kind = "bad_response" if isinstance(error, sdk.APIError) else "backend_error"
    return BackendError(f"{type(error).__name__}: {error}", kind=kind)


def to_stream_error(error: Exception, *, package: str, model: str, base_url: str) -> BackendError:
    """Return what an error in the middle of an answer means: the provider's own kind of it, else `stream_cut`."""
    sdk, host = import_module(package), urlsplit(base_url).netloc
    if _is_broken_json(error):
        words = f"{host} sent broken JSON in its stream ({error}); try again"
        return BackendError(words, kind="bad_response", retryable=True)
    if not isinstance(error, sdk.APIError) or isinstance(error, sdk.APIConnectionError):
        kind = "timeout" if "Timeout" in type(error).__name__ else STREAM_CUT
        advice = _ADVICE.get(kind, "try again")
        return BackendError(f"the stream from {host} broke off: {_cause(error)}; {advice}", kind=kind, retryable=True)
    words = _words(error).rstrip(".")
    if _TOO_LONG.search(f"{_code(error)} {_type(error)} {words}"):
        return ContextOverflow(f"{host} said: {words}; send less, or compact the conversation")
    kind = _stream_kind(error, words)
    advice = _ADVICE.get(kind, "try again").format(model=model, url=base_url, env=package.upper())
    retryable = kind in _RETRYABLE or kind == STREAM_CUT
    return BackendError(f"{host} broke its answer off: {words}; {advice}", kind=kind, retryable=retryable)


def refused_parameter(error: Exception) -> str | None:
    """Return the name of the parameter that the model does not take, None when the error is another one."""
    if getattr(error, "status_code", None) != 400:
        return None
    if getattr(error, "code", None) in ("unsupported_parameter", "unsupported_value") and (
        name := getattr(error, "param", None)
    ):
        return str(name)
    found = _UNSUPPORTED.search(_words(error))
    return found["openai"] or found["anthropic"] if found else None


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that `retry-after-ms` or `Retry-After` (seconds, or a date) ask for; `now` is Unix time."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return None


def _of_status(error: Any, env: str, model: str, base_url: str) -> BackendError:
    status, words = error.status_code, _words(error).rstrip(".")
    said = f"{urlsplit(base_url).netloc} answered {status}: {words}"
    refused, code = refused_parameter(error), getattr(error, "code", None)
    if refused is None and _is_too_long(status, f"{code} {_type(error)} {words}"):
        return ContextOverflow(f"{said}; send less, or compact the conversation", status=status)
    kind = _kind(status, code, words)
    wait = retry_after_s(error.response.headers, time.time())
    if refused is not None:
        advice = f"leave {refused!r} out"
    elif kind == "rate_limit" and wait is not None:
        advice = f"ask again in {wait:g} s"
    else:
        advice = _ADVICE.get(kind, "").format(model=model, url=base_url, env=env)
    return BackendError(
        f"{said}; {advice}" if advice else said,
        status=status,
        kind=kind,
        retryable=kind in _RETRYABLE,
        retry_after_s=wait,
    )


def _is_too_long(status: int, words: str) -> bool:
    if status == 429:
        return _NEVER_FITS in words.lower()
    return status in _TOO_LONG_STATUS and _TOO_LONG.search(words) is not None


def _stream_kind(error: Any, words: str) -> str:
    code = _code(error)
    named = _STREAMED.get(_type(error)) or _STREAMED.get(code)
    return named or (_kind(int(code), None, words) if code.isdigit() else STREAM_CUT)


def _kind(status: int, code: str | None, words: str) -> str:
    if code == "insufficient_quota" or "credit balance is too low" in words:
        return "quota"
    return _KINDS.get(status) or ("server_error" if status >= 500 else "bad_request")


def _words(error: Any) -> str:
    """Return the provider's own words, wherever in the body they are."""
    body = _body(error)
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    if not body:
        body = str(error)
    said = body if isinstance(body, str) else json.dumps(body, default=str)
    return cut(" ".join(said.split()), 500)


def _type(error: Any) -> str:
    """Return the provider's own word for what kind of error this is, an empty string when it has none."""
    body = _body(error)
    return str(body.get("type") or "") if isinstance(body, Mapping) else ""


def _code(error: Any) -> str:
    """Return the provider's code for the error: a word, or an HTTP status."""
    body = _body(error)
    return str(body.get("code") or "") if isinstance(body, Mapping) else ""


def _body(error: Any) -> Any:
    """Return what the provider says about the error; one package has unwrapped it, the other has not."""
    body = getattr(error, "body", None)
    inner = body.get("error") if isinstance(body, Mapping) else None
    return inner if isinstance(inner, Mapping) else body


def _is_broken_json(error: Exception) -> bool:
    """Tell whether the answer is no JSON, or is nested so deep that nobody can read it."""
    if isinstance(error, RecursionError):
        return "decoding" in str(error)
    return isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))


def _is_damaged(error: BaseException | None) -> bool:
    """Tell whether the answer came, but compressed in a way that nobody can undo."""
    while error is not None:
        if type(error).__name__ == "DecodingError":  # of httpx, in whichever version the package uses
            return True
        error = error.__cause__
    return False


def _cause(error: BaseException) -> str:
    """Return the innermost reason; the package only says "Connection error."."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"

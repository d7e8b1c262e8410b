"""What the errors of the `openai` package mean: one `BackendError`, with the provider's words and what to do."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import urlsplit

from looplet.errors import BackendError, ConfigError, ContextOverflow
from looplet.types import cut

_KINDS: Final = {401: "auth", 403: "auth", 404: "not_found", 408: "timeout", 409: "conflict", 429: "rate_limit"}
_RETRYABLE: Final = frozenset({"timeout", "conflict", "rate_limit", "server_error"})
_ADVICE: Final = {
    "auth": "check api_key= (OPENAI_API_KEY)",
    "not_found": "is {model!r} a model there (model=, OPENAI_MODEL), and {url} the API (base_url=, OPENAI_BASE_URL)?",
    "rate_limit": "ask again later, or less often",
    "quota": "see the plan and the billing of this key",
    "server_error": "try again later",
    "timeout": "try again later, or raise timeout_s=",
    "conflict": "try again",
}
_TOO_LONG: Final = re.compile(r"context[ _-]?(length|window|size)", re.IGNORECASE)
_UNSUPPORTED: Final = re.compile(r"Unsupported (?:parameter|value): '([\w.]+)'")


def to_backend_error(error: Exception, *, model: str, base_url: str) -> BackendError | ConfigError:
    """Return what `error`, raised by the client, means; ConfigError for a parameter that the package does not know."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        words = f"no answer from {base_url} in time; raise timeout_s="
        return BackendError(words, kind="timeout", retryable=True)
    if isinstance(error, openai.APIConnectionError):
        words = f"cannot reach {base_url}: {_cause(error)}; check base_url= (OPENAI_BASE_URL) and the network"
        return BackendError(words, kind="network", retryable=True)
    if isinstance(error, openai.APIStatusError):
        return _of_status(error, model, base_url)
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        words = f"{base_url} answered with broken JSON ({error}); try again"
        return BackendError(words, kind="bad_response", retryable=True)
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        words = "a parameter that only your server knows goes into generate_kwargs={'extra_body': {...}}"
        return ConfigError(f"{error}; {words}")
    kind = "bad_response" if isinstance(error, openai.APIError) else "backend_error"
    return BackendError(f"{type(error).__name__}: {error}", kind=kind)


def refused_parameter(error: Exception) -> str | None:
    """Return the name of the parameter that the model does not take, None when the error is another one."""
    if getattr(error, "status_code", None) != 400:
        return None
    if getattr(error, "code", None) in ("unsupported_parameter", "unsupported_value") and (
        name := getattr(error, "param", None)
    ):
        return str(name)
    found = _UNSUPPORTED.search(_words(error))
    return found.group(1) if found else None


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


def _of_status(error: Any, model: str, base_url: str) -> BackendError:
    status, words = error.status_code, _words(error).rstrip(".")
    said = f"{urlsplit(base_url).netloc} answered {status}: {words}"
    refused = refused_parameter(error)
    if refused is None and status in (400, 413, 422) and _TOO_LONG.search(f"{error.code} {error.type} {words}"):
        return ContextOverflow(f"{said}; send less, or compact the conversation", status=status)
    kind = _kind(status, error.code)
    wait = retry_after_s(error.response.headers, time.time())
    if refused is not None:
        advice = f"leave {refused!r} out"
    elif kind == "rate_limit" and wait is not None:
        advice = f"ask again in {wait:g} s"
    else:
        advice = _ADVICE.get(kind, "").format(model=model, url=base_url)
    return BackendError(
        f"{said}; {advice}" if advice else said,
        status=status,
        kind=kind,
        retryable=kind in _RETRYABLE,
        retry_after_s=wait,
    )


def _kind(status: int, code: str | None) -> str:
    if code == "insufficient_quota":
        return "quota"
    return _KINDS.get(status) or ("server_error" if status >= 500 else "bad_request")


def _words(error: Any) -> str:
    """Return the provider's own words, wherever in the body they are."""
    body = getattr(error, "body", None)
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    if not body:
        body = str(error)
    said = body if isinstance(body, str) else json.dumps(body, default=str)
    return cut(" ".join(said.split()), 500)


def _cause(error: BaseException) -> str:
    """Return the innermost reason; the package only says "Connection error."."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"

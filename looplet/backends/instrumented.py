"""Keep an instrumented provider client from telling a model call a second time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from looplet.telemetry import semconv
from looplet.telemetry.recorder import RecordedSpan

# What instrumentations look at: the API's own key (OpenInference, Logfire, OpenLLMetry), its older plain name, and
# OpenLLMetry's.  The OpenTelemetry project's GenAI instrumentations look at none of them, see `_util_genai`.
_KEYS: Final = (
    getattr(otel_context, "_SUPPRESS_INSTRUMENTATION_KEY", ""),
    "suppress_instrumentation",
    "suppress_language_model_instrumentation",
)
_UTIL_GENAI: Final = "opentelemetry.util.genai.invocation"


@contextmanager
def recorded_once() -> Iterator[bool]:
    """Suppress instrumentation while looplet's own `chat` span is the current one; yield whether it is."""
    span = trace.get_current_span()
    if not (isinstance(span, RecordedSpan) and span.name.split(" ", 1)[0] == semconv.CHAT):
        yield False
        return
    token = otel_context.attach(_suppressed(otel_context.get_current()))
    try:
        yield True
    finally:
        otel_context.detach(token)


def _suppressed(context: Context) -> Context:
    for key in filter(None, _KEYS):
        context = otel_context.set_value(key, True, context)
    return _util_genai(context)


def _util_genai(context: Context) -> Context:
    """Tell `opentelemetry-util-genai`, if it is in use, that this model call is being recorded already."""
    module = sys.modules.get(_UTIL_GENAI)
    key, data = getattr(module, "CLIENT_INFERENCE_CONTEXT_KEY", None), getattr(module, "InferenceData", None)
    return otel_context.set_value(key, data(), context) if key and data else context
